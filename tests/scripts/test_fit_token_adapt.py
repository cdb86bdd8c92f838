"""Fitting TokenAdapt: what a run leaves, exact resume, two processes, its file in main_seit.py, and bad input."""
import json
import os
import shutil

import numpy as np
import pytest
import torch

from scripts import fit_patch_tokenizer
from scripts import fit_token_adapt
import main_seit
import processes
import tokenize_images
from helpers import Killed, before_step, call, contents, fails, kill, read_log, smooth_images, states
from processes import Job
from seitpp.token_adapt import load_token_adapt
from seitpp.token_adapt_training import MEASURED
from token_files.codebook import load_codebook

pytestmark = pytest.mark.usefixtures('one_thread')

FILE = 'tokenadapt.ckpt'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Folder images/ of 48 images in three classes, tokenizer.pt and codebook.ckpt: 4x4 of 12 codes an image."""
    folder = tmp_path_factory.mktemp('data')
    smooth_images(folder / 'images', per_class=16)
    call(fit_patch_tokenizer, '--data-path', folder / 'images', '--image-size', 32, '--patch-size', 8, '--codes', 12,
         '--dim', 8, '--output-dir', folder, '--num-workers', 0)
    return folder


def words(data, folder, *more):
    """A command line of ten steps an epoch, two epochs."""
    return ['--data-path', data / 'images', '--image-size', 32, '--tokenizer-path', data / 'tokenizer.pt',
            '--codebook-path', data / 'codebook.ckpt', '--width', 64, '--val-images', 8, '--batch-size', 4,
            '--epochs', 2, '--num-workers', 0, '--device', 'cpu', '--save-every', 2, '--output-dir', folder,
            '--resume', 'auto', *more]


def fit(data, folder, *more):
    return call(fit_token_adapt, *words(data, folder, *more))


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp('whole')
    assert fit(data, folder) == 0
    return folder


def differs(whole, other):
    """What differs between the folders of two runs, in words."""
    return processes.training_differs(whole, other, ['checkpoint.pth'], [FILE])


# ---------------------------------------------------------------- runs

def test_a_run_leaves_the_file_and_a_log(data, whole, golden):
    model = load_token_adapt(whole / FILE, load_codebook(data / 'codebook.ckpt'))
    names = golden('seitpp/state_dict_shapes.json')['tokenadapt.ckpt (what load_state_dict(strict=False) can match)']
    assert list(torch.load(whole / FILE, weights_only=True)) == list(model.state_dict())
    assert model.state_dict().keys() == names.keys()
    assert model.state_dict()['reverse_transform.0.en_pos_embedding'].shape == (1, 9, 64)  # 28 of 32 pixels are 3 codes
    for line in read_log(whole):
        assert all(np.isfinite([line[f'test_codes_{name}'], line[f'test_moved_{name}']]).all() for name in MEASURED)
    assert states(whole / 'checkpoint.pth')['classes'] is None


def test_training_is_worth_more_than_moving_codes(data, tmp_path):
    fit(data, tmp_path, '--epochs', 20, '--val-images', 20, '--lr', 2e-3, '--unscale-lr', '--save-every', '60m')
    first, last = (read_log(tmp_path)[number] for number in (0, -1))
    assert last['test_loss'] < first['test_loss'] - 0.3
    assert last['test_codes_none'] > 95
    for name in ('shift', 'crop'):
        assert last[f'test_codes_{name}'] > last[f'test_moved_{name}'] + 2


def test_killed_and_resumed_equals_uninterrupted(data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 1, 5, kill)
        fit(data, tmp_path)
    assert states(tmp_path / 'checkpoint.pth')['step'] == 4
    assert fit(data, tmp_path) == 0
    assert not differs(whole, tmp_path)


@pytest.mark.slow
def test_two_processes_killed_and_resumed_equal_two_uninterrupted(data, tmp_path):
    run = [*words(data, tmp_path / 'a', '--batch-size', 2, '--save-every', 1), '--model-ema']
    assert Job('scripts.fit_token_adapt', run, 2, tmp_path / 'out').wait() == [0, 0], (tmp_path / 'out').read_text()
    run = [*words(data, tmp_path / 'b', '--batch-size', 2, '--save-every', 1), '--model-ema']
    first = Job('scripts.fit_token_adapt', run, 2, os.devnull)
    while not (tmp_path / 'b' / 'checkpoint.pth').exists():
        assert first.ranks[0].exitcode in (None, 0)
    first.kill()
    assert Job('scripts.fit_token_adapt', run, 2, os.devnull).wait() == [0, 0]
    assert not differs(tmp_path / 'a', tmp_path / 'b')


def test_main_seit_trains_with_it(data, whole, tmp_path, capsys):
    call(tokenize_images, '--data-path', data / 'images', '--name', 'x', '--output-dir', tmp_path, '--tokenizer-path',
         data / 'tokenizer.pt', '--codebook-path', data / 'codebook.ckpt', '--image-size', 32, '--num-workers', 0,
         '--device', 'cpu')
    tokens = tmp_path / 'x-token.data.bin.gz'
    labels = tmp_path / 'x-label.txt'
    call(main_seit, '--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2',
         'in_chans=8', '--device', 'cpu', '--batch-size', 8, '--codebook-path', data / 'codebook.ckpt',
         '--train-token-file', tokens, '--train-label-file', labels, '--val-token-file', tokens, '--val-label-file',
         labels, '--input-size', 32, '--eda-rc-prob', 0, '--swap-token-scale', 0.5, '--epochs', 1, '--tokenadapt-path',
         whole / FILE)
    assert '* Acc@1 ' in capsys.readouterr().out


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('more, said', [
    (['--width', 100], '--width 100: heads of 64 do not divide it: choose 64 or 128'),
    (['--input-size', 30], '--input-size 30: give a multiple of 8'),
    (['--input-size', 40], '--input-size 40: give a multiple of 8, the pixels of a code, up to --image-size 32'),
    (['--image-size', 36], '--image-size 36: .* patches of 8: choose 32 or 40'),
    (['--batch-size', 64], 'the 40 images of a process make no step of --batch-size 64'),
    (['--tokenizer-path', __file__], 'test_fit_token_adapt.py: '),
    (['--codebook-path', 'gone.ckpt'], 'gone.ckpt: cannot read a codebook'),
    (['--mixup', 1], '--mixup')])
def test_mistakes_get_one_line(data, tmp_path, more, said):
    fails(lambda: fit(data, tmp_path, *more), said)
    assert contents(tmp_path).keys() <= {'.lock'}


def test_tokenizers_that_do_not_fit_get_one_line(data, tmp_path):
    call(fit_patch_tokenizer, '--data-path', data / 'images', '--image-size', 30, '--patch-size', 5, '--codes', 12,
         '--dim', 8, '--output-dir', tmp_path, '--num-workers', 0)
    odd = ['--tokenizer-path', tmp_path / 'tokenizer.pt', '--codebook-path', tmp_path / 'codebook.ckpt']
    fails(lambda: fit(data, '', *odd, '--image-size', 30, '--resume', ''), 'patches of 5: .* even number of pixels')
    torch.save(torch.randn(12, 5), tmp_path / 'codebook.ckpt')
    fails(lambda: fit(data, '', *odd, '--resume', ''), 'rows of 5 elements, but the tokenizer gives 8')


def test_outputs_of_another_run_are_not_replaced(data, whole, tmp_path):
    before = contents(whole)
    fails(lambda: fit(data, whole, '--resume', ''), 'an earlier run is here')
    assert contents(whole) == before
    (tmp_path / FILE).write_bytes(b'mine')
    fails(lambda: fit(data, tmp_path), f'{FILE}: an earlier run is here')
    assert (tmp_path / FILE).read_bytes() == b'mine'


def test_another_architecture_is_not_resumed(data, whole):
    before = (whole / FILE).read_bytes()
    fails(lambda: fit(data, whole, '--epochs', 3, '--width', 128), 'does not fit the model')
    assert (whole / FILE).read_bytes() == before


# ---------------------------------------------------------------- what it was made with

def test_a_tokenadapt_names_its_codebook(data, whole, tmp_path):
    codebook = load_codebook(data / 'codebook.ckpt')
    manifest = json.loads((whole / 'tokenadapt.json').read_text())
    assert manifest['codebook']['file'] == 'codebook.ckpt' and manifest['tokenizer']['file'] == 'tokenizer.pt'
    load_token_adapt(whole / FILE, codebook)
    load_token_adapt(whole / FILE, codebook.clone())
    fails(lambda: load_token_adapt(whole / FILE, codebook.flip(0)), 'tokenadapt.ckpt: was made with the codebook '
          'codebook.ckpt', 'is another')
    for content in (None, '[]', '{"codebook": 3}', '{"codebook": {"sha256": "x"}}'):  # then nothing is stated
        shutil.copy(whole / FILE, tmp_path)
        if content:
            (tmp_path / 'tokenadapt.json').write_text(content)
        load_token_adapt(tmp_path / FILE, codebook.flip(0))


def test_another_codebook_is_not_resumed(data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')
    torch.save(load_codebook(data / 'codebook.ckpt').flip(0), tmp_path / 'other.ckpt')
    fails(lambda: fit(data, tmp_path / 'run', '--epochs', 3, '--codebook-path', tmp_path / 'other.ckpt'),
          'differs in codebook ', '--allow-inexact-resume')
