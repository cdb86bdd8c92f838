"""Predictions of pictures: against the classifier, on the terminal, in files, and what bad input gets."""
import csv
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from conftest import ROOT
from helpers import call, clean_environment, fails, save_image, states, write_tar
from inference.classifier import load_classifier
from scripts import predict

pytestmark = pytest.mark.usefixtures('one_thread')
CPU = ['--device', 'cpu', '--num-workers', 0]


@pytest.fixture
def here(small_runs, tmp_path, monkeypatch):
    """The current folder; returns the runs."""
    monkeypatch.chdir(tmp_path)
    return small_runs


@pytest.fixture
def images(here):
    return sorted(here['images'].rglob('*.png'))


def expected(run, paths, k=3):
    """[(class, probability), ...] of each picture, the most probable first."""
    classify = load_classifier(run)
    top = classify([Image.open(path) for path in paths])[1].topk(k)
    return [[(classify.classes[n], p) for n, p in zip(*row)] for row in zip(top.indices.tolist(), top.values.tolist())]


@pytest.mark.parametrize('program', ['main_seit.py', 'main_mtm_finetune.py', 'main_pixels.py', 'task'])
def test_all_kinds_of_checkpoints_and_of_pictures(program, here, images, tmp_path):
    """In batches of 5, which cross from picture to picture, but not from files to a tar."""
    run = here['tasks'] / 'task-0' if program == 'task' else here[program]
    write_tar(tmp_path / 'x.tar', [(path.name + '.png', path.read_bytes()) for path in images[:3]])
    call(predict, run, here['images'], images[0], 'x.tar', *CPU, '--batch-size', 5, '--output', 'p.jsonl')
    rows = [json.loads(line) for line in (tmp_path / 'p.jsonl').read_text().splitlines()]
    assert [row['picture'] for row in rows] == [*map(str, images), str(images[0]),
                                                *(f'x.tar/{path.name}.png' for path in images[:3])]
    wanted = expected(run, [*images, images[0], *images[:3]], 2 if program == 'task' else 3)
    for row, top in zip(rows, wanted):
        assert [c['class'] for c in row['top']] == [name for name, _ in top] and row['class'] == top[0][0]
        assert [c['probability'] for c in row['top']] == pytest.approx([p for _, p in top], abs=2e-6)
        assert row['probability'] == row['top'][0]['probability']


def test_the_table_on_the_terminal(here, images, capsys):
    call(predict, here['main_seit.py'], *images[:2], *CPU, '--top-k', 2)
    *_, header, first, second, last = capsys.readouterr().out.splitlines()
    width = min(predict.MOST_WIDE, len(str(images[0])))
    assert header == f'{"picture":<{width}}  class  probability, and others in %'
    (best, p), (other, q) = expected(here['main_seit.py'], images[:1])[0][:2]
    assert first == f'{images[0]}  {best:<5}  {100 * p:5.1f} %  {other} {100 * q:.1f}'
    assert second.startswith(str(images[1])) and last == '2 pictures'


def test_csv_is_read_back_whatever_names_are(here, tmp_path, capsys):
    odd = ['a,b "c".png', 'line\nbreak.png', 'caf\u00e9.png', b'\xff.png'.decode(errors='surrogateescape')]
    for name in odd:
        save_image(tmp_path / 'odd' / name, 0)
    call(predict, here['main_seit.py'], 'odd', *CPU, '--output', 'p.CSV')
    assert capsys.readouterr().out.endswith('4 pictures: p.CSV\n')
    with open('p.CSV', encoding='utf-8', errors='surrogateescape', newline='') as file:
        rows = list(csv.DictReader(file))
    assert {row['picture'] for row in rows} == {f'odd/{name}' for name in odd}
    assert list(rows[0]) == ['picture', 'class', 'probability', 'class_2', 'probability_2', 'class_3', 'probability_3']
    assert sum(float(rows[0][f'probability{end}']) for end in ('', '_2', '_3')) == pytest.approx(1, abs=2e-6)
    call(predict, here['main_seit.py'], 'odd', *CPU)  # one line each, with no control character
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == '4 pictures' and any(line.startswith('odd/line\\nbreak.png ') for line in lines)


def test_bad_pictures_are_named_left_out_and_counted(here, images, tmp_path, capfd):
    (tmp_path / 'bad.png').write_bytes(images[0].read_bytes()[:200])
    (tmp_path / 'list.txt').write_text(f'{images[0]}\nbad.png\ngone.png\n{images[1]} 1\n')
    call(predict, here['main_seit.py'], 'list.txt', *CPU, '--batch-size', 1, '--output', 'p.csv')
    out, err = capfd.readouterr()
    assert out.endswith('2 pictures, 2 that could not be read left out: p.csv\n')
    assert 'skipped bad.png: ' in err and 'skipped gone.png: No such file or directory' in err
    assert len((tmp_path / 'p.csv').read_text().splitlines()) == 3


def test_workers_decode_the_same(here, images, tmp_path):
    for workers, name in ((0, 'a.csv'), (2, 'b.csv')):
        call(predict, here['main_pixels.py'], here['images'], '--device', 'cpu', '--num-workers', workers,
             '--batch-size', 5, '--output', name)
    assert (tmp_path / 'a.csv').read_text() == (tmp_path / 'b.csv').read_text()


def test_memory_holds_a_batch_at_a_time(here, images, monkeypatch):
    """Each picture is written before the next batch is decoded."""
    events = []
    load = predict.load_images

    def watched(*args, **kwargs):
        for batch in load(*args, **kwargs):
            events.append('decoded')
            yield batch
    monkeypatch.setattr(predict, 'load_images', watched)
    row = predict.json_row
    monkeypatch.setitem(predict.LINES, '.jsonl', (lambda k: '', lambda *a: events.append('written') or row(*a)))
    call(predict, here['main_seit.py'], here['images'], *CPU, '--batch-size', 6, '--output', 'x.jsonl')
    assert events == [*['decoded', *['written'] * 6] * 2]


# ---------------------------------------------------------------- mistakes

def test_nothing_is_left_where_no_picture_can_be_read(here, tmp_path):
    (tmp_path / 'a.png').write_bytes(b'x')
    (tmp_path / 'b.png').write_bytes(b'')
    fails(lambda: call(predict, here['main_seit.py'], 'a.png', *CPU, '--output', 'p.csv'),
          r'a.png is no readable image \(no image of a kind that is read\): replace or remove it')
    fails(lambda: call(predict, here['main_seit.py'], 'a.png', 'b.png', *CPU, '--output', 'p.csv'),
          'none of the 2 pictures could be read')
    assert not list(tmp_path.glob('*.csv')) and not list(tmp_path.glob('.*.tmp'))


def test_what_a_checkpoint_does_not_say_is_given_by_flags(here, images, tmp_path):
    torch.save({'model': states(here['main_seit.py'] / 'best_checkpoint.pth')['model']}, 'vit.ckpt')
    words = ['--codebook-path', here['tokens'] / 'codebook.ckpt', '--tokenizer-path', here['tokens'] / 'tokenizer.pt',
             '--tokenizer-input-size', 40, '--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32',
             'num_heads=2']
    call(predict, 'vit.ckpt', images[0], *CPU, '--output', 'p.jsonl', *words)
    row = json.loads((tmp_path / 'p.jsonl').read_text())
    name, p = expected(here['main_seit.py'], images[:1])[0][0]
    assert ['ant', 'bee', 'cat'][int(row['class'])] == name and row['probability'] == pytest.approx(p, abs=2e-6)
    for start, flag in ((0, '--codebook-path'), (2, '--tokenizer-path'), (4, '--tokenizer-input-size')):
        rest = words[:start] + words[start + 2:]
        fails(lambda: call(predict, 'vit.ckpt', images[0], *CPU, *rest), f'vit.ckpt: does not say .* {flag}$')
    fails(lambda: call(predict, 'vit.ckpt', images[0], *CPU, *words[:6]), 'vit.ckpt: .*give --model')


@pytest.mark.parametrize('words, message', [
    (['--output', 'p.txt'], '--output p.txt: give a name that ends in .csv or .jsonl'),
    (['--top-k', 0], '--top-k: 0: give a value of 1 or more'), (['--device', 'nix'], '--device nix: choose'),
    (['--max-image-pixels', 100], 'more pixels than are allowed'), (['nowhere'], 'nowhere: no such file or folder')])
def test_mistakes_are_one_line(here, images, words, message):
    fails(lambda: call(predict, here['main_seit.py'], images[0], *words, *CPU[2 * ('--device' in words):]), message)


def test_an_output_does_not_replace_a_picture_list_or_checkpoint(here, images, tmp_path):
    (tmp_path / 'list.csv').write_text('x')
    fails(lambda: call(predict, here['main_seit.py'], 'list.csv', *CPU, '--output', 'list.csv'), 'would be replaced')


def test_probabilities_that_are_not_finite_are_refused(here, images, tmp_path):
    checkpoint = states(here['main_pixels.py'] / 'checkpoint.pth')
    checkpoint['model']['head.bias'][0] = torch.nan
    torch.save(checkpoint, 'x.pth')
    fails(lambda: call(predict, 'x.pth', images[0], *CPU), 'not finite')


@pytest.mark.slow
def test_exit_codes(here, images, tmp_path):
    (tmp_path / 'empty').mkdir()
    for words, code in (([here['main_seit.py'], images[0]], 0), ([here['main_seit.py'], 'empty'], 2)):
        done = subprocess.run([sys.executable, str(ROOT / 'scripts' / 'predict.py'), *map(str, words), '--device',
                               'cpu'], capture_output=True, text=True, env=clean_environment(), cwd=tmp_path)
        assert done.returncode == code, done.stderr
    assert done.stderr == 'error: empty: no pictures in it, nor in a folder below it\n'
