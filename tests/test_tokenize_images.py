"""tokenize_images.py: its flags, several processes, runs that are killed, and training on what it makes."""
import io
import json
import os
import signal
import time

import pytest
import torch
from PIL import Image, ImageOps

import main_seit
import tokenize_images
from helpers import (DIM, assert_same, call, contents, encoded, fails, held, make_images, samples, start, tokenize,
                     tokenize_words, two_processes, with_bad_images)
from image_tokenizer import tokenizing
from processes import tokens_differ


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def plain(data, tmp_path_factory):
    """The training images tokenized in one go."""
    return tokenize(data, tmp_path_factory.mktemp('plain'))


@pytest.fixture(scope='module')
def compact(data, tmp_path_factory):
    """The training images tokenized in one go to a compact set."""
    return tokenize(data, tmp_path_factory.mktemp('compact'), format='compact')


# ---------------------------------------------------------------- flags

def run(data, output, **options):
    call(tokenize_images, *tokenize_words(data, output, **options))
    return output


@pytest.mark.parametrize('options', [
    {}, {'format': 'compact', 'limit_codes': True}, {'shard_size': 20, 'amp': 'bf16', 'batch_size': 5},
    {'name': 'x', 'image_size': 20}], ids=['defaults', 'compact', 'shards', 'size'])
def test_the_program_makes_what_the_library_makes_for_its_flags(data, tmp_path, options):
    made = contents(run(data, tmp_path / 'program', **options))
    assert made == contents(tokenize(data, tmp_path / 'library', **options))


def test_bad_images_stop_the_program_or_are_skipped(data, tmp_path):
    listed, bad = with_bad_images(data, tmp_path / 'in')
    fails(lambda: run(data, tmp_path / 'out', data_path=listed), f'{bad[0]} is no readable image', 'skip-bad-images')
    fails(lambda: run(data, tmp_path / 'out', data_path=listed, max_image_pixels=100), '00.png is no readable image')
    run(data, tmp_path / 'out', data_path=listed, skip_bad_images=True)
    assert len((tmp_path / 'out' / 'my-label.txt').read_text().splitlines()) == 45 - len(bad)


@pytest.fixture(scope='module')
def held_images(data, tmp_path_factory):
    """The images of `data` as a camera stores them that was held otherwise, and as they are to be seen."""
    root = tmp_path_factory.mktemp('held')
    for number, (path, _) in enumerate(samples(data / 'train')):
        image = Image.open(path)
        orientation = (1, 6, 3)[number % 3]
        for name, content in (('stored', held(image, orientation)),
                              ('upright', encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(held(image,
                                                                                                     orientation))))))):
            target = root / name / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return root


def codes_and_manifest(folder):
    data = {path.name: path.read_bytes() for path in folder.glob('my-token.*')}
    return data['my-token.data.bin.gz'], json.loads(data['my-token.json'])


def test_images_are_tokenized_as_stored_or_turned(data, plain, held_images, tmp_path, capsys):
    stored, upright = held_images / 'stored', held_images / 'upright'
    codes, manifest = codes_and_manifest(run(data, tmp_path / 'plain', data_path=stored))
    assert codes == codes_and_manifest(plain)[0] and 'exif_rotate' not in {*manifest, *manifest['run']}
    note, = (line for line in capsys.readouterr().out.splitlines() if 'EXIF' in line)
    assert note.startswith(f'note: {stored}: 30 of the images read have') and '--exif-rotate turns them' in note
    turned, manifest = codes_and_manifest(run(data, tmp_path / 'turned', data_path=stored, exif_rotate=True))
    assert turned == codes_and_manifest(run(data, tmp_path / 'upright', data_path=upright))[0] != codes
    assert manifest['exif_rotate'] is manifest['run']['exif_rotate'] is True
    for options, folder in (({}, 'turned'), ({'exif_rotate': True}, 'plain')):
        fails(lambda: run(data, tmp_path / folder, data_path=stored, **options), 'belongs to another run')


def test_a_run_is_not_resumed_with_the_other_orientation(data, held_images, tmp_path, monkeypatch):
    words = {'data_path': held_images / 'stored'}
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, 'finish', None)
        with pytest.raises(TypeError):
            run(data, tmp_path, **words)
    fails(lambda: run(data, tmp_path, **words, exif_rotate=True), 'exif_rotate')
    run(data, tmp_path, **words)


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 1])
def test_orientations_are_counted_over_two_processes(data, held_images, tmp_path, workers):
    words = tokenize_words(data, tmp_path, data_path=held_images / 'stored', num_workers=workers)
    output, _ = start('tokenize_images.py', *words, launch=two_processes()).communicate()
    note, = (line for line in output.splitlines() if 'EXIF' in line)
    assert ': 30 of the images read have an EXIF orientation other than 1, and are read as they are stored' in note


def test_bad_options_get_one_line(data, tmp_path):
    out = tmp_path / 'out'
    torch.save(torch.ones(40, 5), tmp_path / 'narrow.ckpt')
    torch.save(torch.ones(65537, DIM), tmp_path / 'huge.ckpt')
    for options, said in (({'image_size': 18}, '--image-size 18: .* patches of 4: choose 16 or 20'),
                          ({'codebook_path': tmp_path / 'narrow.ckpt'}, 'narrow.ckpt: rows of 5.*gives 8'),
                          ({'codebook_path': tmp_path / 'huge.ckpt'}, 'huge.ckpt: 65537 codes.*--limit-codes'),
                          ({'codebook_path': None}, 'tok.pt: has no codebook of its own'),
                          ({'batch_size': 0}, '--batch-size: 0'), ({'shard_size': -1}, '--shard-size: -1'),
                          ({'name': '../x'}, '--name ../x'), ({'name': ''}, '--name')):
        fails(lambda: run(data, out, **options), said)
        assert not out.exists()


# ---------------------------------------------------------------- processes and interruptions

@pytest.mark.slow
def test_a_mistake_that_only_rank_0_meets_is_printed_once(data, tmp_path):
    (tmp_path / 'out').write_text('x')
    process = start('tokenize_images.py', *tokenize_words(data, tmp_path / 'out'), launch=two_processes())
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1 and output.count('error: ') == 1 and 'cannot be written' in output


@pytest.mark.slow
def test_two_processes_make_the_same_files(data, plain, tmp_path):
    words = tokenize_words(data, tmp_path / 'out', num_workers=1)
    process = start('tokenize_images.py', *words, launch=two_processes())
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert not tokens_differ(tmp_path / 'out', plain)


@pytest.mark.slow
def test_a_bad_image_that_only_the_second_rank_meets_is_named(data, tmp_path):
    listed, bad = with_bad_images(data, tmp_path / 'in')
    listed.write_text('\n'.join(line for line in listed.read_text().splitlines()
                                if bad[0] not in line and bad[1] not in line))  # what is left is in the second part
    process = start('tokenize_images.py', *tokenize_words(data, tmp_path / 'out', data_path=listed),
                    launch=two_processes())
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1  # torchrun's, where a rank failed
    assert sum(f'{bad[2]} is no readable image' in line for line in output.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize('moment', ['parts', 'end'])
def test_killed_then_resumed_makes_the_same_files(data, plain, moment, tmp_path):
    """Killed with -9 once a part is there, or while the final files are written; then with two workers."""
    out = tmp_path / 'out'
    options = {'batch_size': 2, 'num_workers': 1}
    process = start('tokenize_images.py', *tokenize_words(data, out, **options))
    seen = {'parts': lambda: [*out.glob('.my.parts/0*.npz')], 'end': lambda: [*out.glob('my-token*')]}[moment]
    deadline = time.time() + 60
    while not seen() and process.poll() is None and time.time() < deadline:
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it had not come to its end
    run(data, out, **options)
    assert not tokens_differ(out, plain)


@pytest.mark.slow
def test_two_processes_make_the_same_compact_files(data, compact, tmp_path):
    words = tokenize_words(data, tmp_path / 'out', num_workers=1, format='compact')
    process = start('tokenize_images.py', *words, launch=two_processes())
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert not tokens_differ(tmp_path / 'out', compact)


@pytest.mark.slow
def test_a_killed_compact_run_resumes_to_the_same_files(data, compact, tmp_path):
    words = tokenize_words(data, tmp_path, num_workers=1, format='compact')
    process = start('tokenize_images.py', *words)
    deadline = time.time() + 60
    while not [*tmp_path.glob('.my.parts/0*.npz')] and process.poll() is None and time.time() < deadline:
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run(data, tmp_path, format='compact')
    assert not tokens_differ(tmp_path, compact)


# ---------------------------------------------------------------- training

def test_training_on_shards_equals_training_on_the_single_file(data, plain, tmp_path):
    shards = tokenize(data, tmp_path / 'shards', shard_size=20)
    results = []
    for name, tokens, labels in (('one', plain / 'my-token.data.bin.gz', plain / 'my-label.txt'),
                                 ('many', f'{shards}/my-token-*.data.bin.gz', f'{shards}/my-label-*.txt')):
        call(main_seit, '--device', 'cpu', '--model', 'deit_tiny_token_32', '--swap-token-scale', 0.25,
             '--input-size', 32, '--batch-size', 8, '--codebook-path', data / 'codebook.ckpt', '--eda-rc-prob', 0,
             '--epochs', 2, '--warmup-epochs', 0, '--output_dir', tmp_path / name, '--train-token-file', tokens,
             '--train-label-file', labels, '--val-token-file', tokens, '--val-label-file', labels, '--token-cache',
             'none', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2', f'in_chans={DIM}')
        results.append(torch.load(tmp_path / name / 'checkpoint.pth', weights_only=True))
    for key in ('model', 'model_ema', 'optimizer'):
        assert_same(results[0][key], results[1][key])
