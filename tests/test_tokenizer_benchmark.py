"""benchmarks/tokenizers.py at a toy size. No test here asserts a time."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks.tokenizers as tokenizers
import main_seit
import tokenize_images
from benchmarks import arms
from helpers import call, fails, smooth_images, without_times
from image_data.sources import load_images, open_source
from image_tokenizer.tokenizers import unit_range
from scripts import build_synonyms, fit_patch_tokenizer

TRAINING = ['--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2', '--batch-size', '8', '--epochs', '2',
            '--device', 'cpu']


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Three classes of 8 images of 40 pixels, and a patch tokenizer for them at 32 pixels."""
    folder = tmp_path_factory.mktemp('images')
    smooth_images(folder / 'train')
    smooth_images(folder / 'val', 5)
    call(fit_patch_tokenizer, '--data-path', folder / 'train', '--image-size', 32, '--output-dir', folder / 'tok',
         '--codes', 24, '--dim', 8, '--num-workers', 0)
    return folder


def words(images, output, *more):
    """A command line of the benchmark for two arms with the same tokenizer, of two classes."""
    tok = images / 'tok'
    line = ['--train-path', images / 'train', '--val-path', images / 'val', '--output-dir', output, '--tokenizer',
            'patch', tok / 'tokenizer.pt', tok / 'codebook.ckpt', 32, '--tokenizer', 'small', tok / 'tokenizer.pt', '-',
            16, '--classes', 2, '--images-per-class', 6, '--seeds', 0, 1, '--lrs', 1e-3, 3e-3,
            '--quality-size', 24, '--threads', 1, '--repeats', 2, '--image-workers', 0, '--jobs', 2, *TRAINING, *more]
    return [str(word) for word in line]


def judge(*line, started=None):
    """The exit code of the benchmark, run in this process, which also takes the place of those that it starts."""
    programs = {'tokenize_images.py': tokenize_images, 'scripts/build_synonyms.py': build_synonyms,
                'main_seit.py': main_seit}

    def run_here(todo, jobs, threads):
        for (program, *more), _ in todo:
            if started is not None:
                started.append(program)
            assert call(programs[program], *more) == 0

    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, 'run_programs', run_here)
        try:
            return tokenizers.main(tokenizers.parse_args(line))
        finally:
            torch.set_num_threads(before)


@pytest.fixture(scope='module')
def judged(images, tmp_path_factory):
    """The output folder of a whole benchmark, and its exit code."""
    output = tmp_path_factory.mktemp('judged')
    return output, judge(*words(images, output))


def test_the_sheet_has_a_column_for_every_arm(judged):
    output, _ = judged
    columns = [np.asarray(Image.open(path / 'column.png')) for path in (output, output / 'patch', output / 'small')]
    assert all(column.shape == (8 * 26 + 2, 28, 3) for column in columns)
    sheet = np.asarray(Image.open(output / 'sheet.png'))[arms.TITLE:]
    found = [any(np.array_equal(sheet[:, left:left + 28], column) for left in range(sheet.shape[1] - 27))
             for column in columns]
    assert found == [True] * 3 and not np.array_equal(columns[0], columns[1])


def test_every_arm_has_its_results(judged):
    output, code = judged
    results = json.loads((output / 'results.json').read_text())
    assert (code, list(results)) == (0, ['patch', 'small'])
    tokens, small = results.values()
    assert (tokens['grid'], tokens['codes'], tokens['code_dim']) == (4, 24, 8)
    assert 0 < tokens['entropy_bits'] <= tokens['most_bits']
    assert tokens['bytes']['entropy'] == pytest.approx(16 * tokens['entropy_bits'] / 8, abs=0.01)
    assert tokens['images_per_second']['min'] > 0
    assert small['grid'] == 2 and small['bytes']['entropy'] < tokens['bytes']['entropy']
    for result in (tokens, small):
        assert result['psnr'] > 10 and 0 < result['ssim'] <= 1
        # the search is with the first seed, whose accuracy is then used again
        assert result['search'][str(result['lr'])] == max(result['search'].values()) == result['top1'][0]
        assert result['seeds'] == [0, 1] and len(result['top1']) == len(result['ema_top1']) == 2
        assert result['top1_mean'] == pytest.approx(np.mean(result['top1']), abs=1e-3)
        assert result['top1_sd'] == pytest.approx(np.std(result['top1'], ddof=1), abs=1e-3)
    assert len((output / 'train.txt').read_text().splitlines()) == 12
    assert len((output / 'val.txt').read_text().splitlines()) == 10
    rows = (output / 'table.md').read_text().splitlines()
    assert [row.split(' | ')[0] for row in rows[2:4]] == ['| patch', '| small']
    assert len({row.count('|') for row in rows[:4]}) == 1


def test_a_second_run_trains_nothing_and_a_stopped_one_resumes(images, judged, capsys):
    output, _ = judged
    before = json.loads((output / 'results.json').read_text())
    logs = {path: path.read_text() for path in output.glob('*/lr-*/log.txt')}
    assert len(logs) == 6  # two rates with the first seed, the best with the second, for each arm
    started = []
    # a run that was stopped after its first epoch
    stopped = output / 'small' / 'lr-0.001-seed-0'
    whole = [json.loads(line) for line in (stopped / 'log.txt').read_text().splitlines()]
    (stopped / 'log.txt').write_text(json.dumps(whole[0]) + '\n')
    (stopped / 'checkpoint_previous.pth').replace(stopped / 'checkpoint.pth')
    assert judge(*words(images, output), started=started) == 0
    assert started == ['tokenize_images.py', 'tokenize_images.py', 'tokenize_images.py', 'tokenize_images.py',
                       'main_seit.py']
    again = [json.loads(line) for line in (stopped / 'log.txt').read_text().splitlines()]
    assert without_times(again) == without_times(whole)
    assert {path: path.read_text() for path in logs if stopped not in path.parents} == {
        path: text for path, text in logs.items() if stopped not in path.parents}
    after = json.loads((output / 'results.json').read_text())
    assert [result['top1'] for result in after.values()] == [result['top1'] for result in before.values()]
    *_, last = capsys.readouterr().out.splitlines()
    printed = json.loads(last)
    assert printed['benchmark'] == 'tokenizers' and printed['arms'] == after
    assert printed['asked']['seeds'] == [0, 1] and 'depth=1' in printed['asked']['training_flags']


def test_a_failed_arm_is_one_line_and_stops_no_other(images, judged, capsys):
    """A tokenizer that is not there, one that does not fit, and a folder that holds another arm's results."""
    output, _ = judged
    tok = images / 'tok'
    line = words(images, output, '--tokenizer', 'gone', tok / 'no.pt', '-', 32, '--tokenizer', 'odd',
                 tok / 'tokenizer.pt', tok / 'codebook.ckpt', 20)
    assert judge(*line) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [text for text in lines if text.startswith('error: ')] == [
        f'error: gone: {tok / "no.pt"}: No such file or directory',
        'error: odd: --image-size 20: patches of 8 do not divide it; choose 16 or 24']
    results = json.loads((output / 'results.json').read_text())
    assert [name for name, result in results.items() if 'failed' in result] == ['gone', 'odd']
    table = (output / 'table.md').read_text()
    assert all(f'| {name} |' in table for name in ('patch', 'gone', 'odd', 'small'))

    assert judge(*words(images, output, '--epochs', '3')) == 1
    results = json.loads((output / 'results.json').read_text())
    assert all('results of another training flags' in result['failed'] for result in results.values())


@pytest.mark.parametrize('more, message', [
    (['--seed', '1'], '--seed: this benchmark sets it'),
    (['--input-size=64'], '--input-size: this benchmark sets it'),
    (['--modle', 'x'], 'unrecognized arguments: --modle'),
    (['--tokenizer', 'patch', 'b', '-', '16'], "'patch': name every arm"),
    (['--tokenizer', '../a', 'b', '-', '16'], 'name every arm'),
    (['--tokenizer', 'a', 'b', 'c', 'x'], "the arm a: 'x' is not a whole number"),
])
def test_mistakes(images, tmp_path, more, message):
    fails(lambda: tokenizers.parse_args(words(images, tmp_path, *more)), message)


def test_too_few_classes(images, tmp_path):
    fails(lambda: judge(*words(images, tmp_path, '--classes', '4')), 'has 3 classes, but --classes is 4')
    (tmp_path / 'list.txt').write_text('a.png 0\n')
    fails(lambda: judge(*words(images, tmp_path, '--train-path', tmp_path / 'list.txt')), 'give a folder')


@pytest.mark.slow
def test_programs_run_some_at_a_time_and_one_that_fails_is_quoted(tmp_path):
    (tmp_path / 'bad.py').write_text('import sys\nprint("one")\nsys.exit("error: two")')
    (tmp_path / 'good.py').write_text('import os, sys\nprint(os.environ["OMP_NUM_THREADS"], sys.argv[1])')
    programs = [([str(tmp_path / 'bad.py')], tmp_path / 'bad.log')]
    programs += [([str(tmp_path / 'good.py'), i], tmp_path / f'{i}.log') for i in range(3)]
    fails(lambda: arms.run_programs(programs, 2, 5), r'bad.py ended with code 1 \(two\); see .*bad.log')
    assert [(tmp_path / f'{i}.log').read_text() for i in range(3)] == [f'5 {i}\n' for i in range(3)]


def test_reconstructions_of_any_size_are_compared_with_one_original(images):
    source = open_source(images / 'val')

    def quality(made_size, sizes):
        made = unit_range(next(load_images(source, [range(len(source))], made_size)).pixels)
        return arms.image_quality(source, lambda batch: made[batch.start:batch.stop], sizes, 0)

    assert quality(24, [24, 40])[0] == {'psnr': 100, 'ssim': 1}
    at_24, at_16 = quality(16, [24, 16])
    assert 20 < at_24['psnr'] < 100 and at_24['ssim'] < 1
    assert at_16 == {'psnr': 100, 'ssim': 1}
    assert arms.image_quality(source, lambda batch: None, [24], 0) == [{'psnr': None, 'ssim': None}]
