"""Training a tokenizer: exact resume, two processes, the file in the other programs, and what bad input gets."""
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_on_images
import main_seit
import processes
import tokenize_images
from scripts import train_tokenizer
from helpers import (Killed, accuracy_lines, before_step, call, contents, fails, kill, read_log, smooth_images,
                     states)
from image_tokenizer.tokenizers import load_tokenizer
from image_tokenizer.vq_training import Collapsed
from processes import Job
from token_files.codebook import load_codebook
from training.preemption import REQUEUE

pytestmark = pytest.mark.usefixtures('one_thread')

OUTPUTS = ['tokenizer.safetensors', 'codebook.ckpt', 'reconstruction.png']


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """48 images in three classes."""
    folder = tmp_path_factory.mktemp('images')
    smooth_images(folder, per_class=16)
    return folder


def words(images, folder, *more):
    """A command line of ten steps an epoch, two epochs."""
    return ['--data-path', images, '--image-size', 32, '--patch-size', 8, '--width', 64, '--depth', 1, '--codes', 12,
            '--dim', 32, '--val-images', 8, '--batch-size', 4, '--epochs', 2, '--model-ema-decay', 0.9, '--lr', 4e-3,
            '--num-workers', 0, '--device', 'cpu', '--save-every', 2, '--output-dir', folder, '--resume', 'auto', *more]


def train(images, folder, *more):
    return call(train_tokenizer, *words(images, folder, *more))


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp('whole')
    assert train(images, folder) == 0
    return folder


def differs(whole, other):
    """What differs between the folders of two runs, in words."""
    return processes.training_differs(whole, other, ['checkpoint.pth'], OUTPUTS)


# ---------------------------------------------------------------- runs

def test_a_run_leaves_a_tokenizer_a_codebook_a_picture_and_a_log(whole):
    tokenizer = load_tokenizer(whole / 'tokenizer.safetensors')
    codebook = load_codebook(whole / 'codebook.ckpt')
    assert torch.equal(tokenizer.codebook, codebook) and codebook.shape == (12, 32)
    torch.testing.assert_close((codebook - codebook.mean(0)).square().mean(), torch.tensor(1.))
    with Image.open(whole / 'reconstruction.png') as picture:  # eight images, each in three ways
        assert picture.mode == 'RGB' and picture.height == 22 + 4 * 99 and picture.width > 2 * 3 * 96
    for line in read_log(whole):
        for key in ('psnr', 'ssim', 'usage', 'perplexity', 'loss'):
            assert np.isfinite([line[f'test_{key}'], line[f'ema_test_{key}']]).all()
    assert json.loads((whole / 'args.json').read_text())['codes'] == 12
    checkpoint = states(whole / 'checkpoint.pth')
    assert checkpoint['classes'] is None and checkpoint['args']['patch_size'] == 8


def test_training_raises_the_psnr_of_held_out_images(images, tmp_path):
    train(images, tmp_path, '--epochs', 10, '--lr', 0.03)
    values = [line['ema_test_psnr'] for line in read_log(tmp_path)]
    assert values[-1] > values[0] + 0.1


def test_killed_and_resumed_equals_uninterrupted(images, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 1, 5, kill)
        train(images, tmp_path)
    assert states(tmp_path / 'checkpoint.pth')['step'] == 4
    assert train(images, tmp_path) == 0
    assert not differs(whole, tmp_path)


@pytest.mark.slow
def test_two_processes_keep_equal_codebooks_and_resume_exactly(images, tmp_path):
    """Rank 0 saves: had rank 1 another codebook, a resumed run, which gives it rank 0's, would end differently."""
    run = [*words(images, tmp_path / 'a', '--batch-size', 2), '--model-ema-force-cpu']
    assert Job('scripts.train_tokenizer', run, 2, tmp_path / 'out').wait() == [0, 0], (tmp_path / 'out').read_text()
    run = [*words(images, tmp_path / 'b', '--batch-size', 2, '--epochs', 2), '--model-ema-force-cpu']
    first = Job('scripts.train_tokenizer', run, 2, os.devnull)
    while not (tmp_path / 'b' / 'checkpoint.pth').exists():
        assert first.ranks[0].exitcode in (None, 0)
    first.signal(signal.SIGTERM, rank=1)
    assert first.wait(60) in ([REQUEUE] * 2, [0, 0])
    assert Job('scripts.train_tokenizer', run, 2, os.devnull).wait() == [0, 0]
    assert not differs(tmp_path / 'a', tmp_path / 'b')


def test_convolutions_train_resume_and_tokenize(images, tmp_path, monkeypatch):
    more = '--mixer', 'convolution', '--grad-checkpointing'
    assert train(images, tmp_path / 'a', *more) == 0
    assert read_log(tmp_path / 'a')[-1]['test_usage'] > 0.5
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 1, 5, kill)
        train(images, tmp_path / 'b', *more)
    assert train(images, tmp_path / 'b', *more) == 0
    assert not differs(tmp_path / 'a', tmp_path / 'b')
    fails(lambda: train(images, tmp_path / 'b', '--epochs', 3), 'does not fit the model|mixer')
    path = tmp_path / 'a' / 'tokenizer.safetensors'
    assert load_tokenizer(path).kind == 'VQGAN of ConvNeXt blocks'
    call(tokenize_images, '--data-path', images, '--tokenizer-path', path, '--codebook-path',
         tmp_path / 'a' / 'codebook.ckpt', '--image-size', 32, '--output-dir', tmp_path / 'tokens', '--name', 'x',
         '--num-workers', 0, '--device', 'cpu')
    assert 'VQGAN of ConvNeXt blocks' in next((tmp_path / 'tokens').glob('*-token.json')).read_text()


@pytest.mark.parametrize('batch_size', [1, 4])
def test_batches_of_bad_images_alone_are_left_out(batch_size, images, tmp_path, monkeypatch, capfd):
    """In training and evaluation; killed and resumed, such a run ends as the undisturbed one."""
    for name in ('data', 'val'):
        shutil.copytree(images, tmp_path / name)
        for number, path in enumerate(sorted((tmp_path / name).rglob('*.png'))):
            if number % 3 == 0 or name == 'val' and number < 36:
                path.write_bytes(b'')
    more = ['--val-path', tmp_path / 'val', '--val-images', 48, '--batch-size', batch_size, '--skip-bad-images',
            '--epoch-images', 24]
    assert train(tmp_path / 'data', tmp_path / 'a', *more) == 0
    if batch_size == 1:
        assert 'takes their place' in capfd.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 1, 5, kill)
        train(tmp_path / 'data', tmp_path / 'b', *more)
    assert train(tmp_path / 'data', tmp_path / 'b', *more) == 0
    assert not differs(tmp_path / 'a', tmp_path / 'b')


@pytest.mark.slow
def test_ranks_whose_batches_are_bad_keep_step(images, tmp_path):
    shutil.copytree(images, tmp_path / 'data')
    for number, path in enumerate(sorted((tmp_path / 'data').rglob('*.png'))):
        if number % 2:
            path.write_bytes(b'')
    run = words(tmp_path / 'data', tmp_path / 'out', '--batch-size', 1, '--skip-bad-images', '--epoch-images', 16)
    assert Job('scripts.train_tokenizer', run, 2, tmp_path / 'log').wait(200) == [0, 0], (tmp_path / 'log').read_text()


# ---------------------------------------------------------------- the other programs

def test_tokenize_train_and_evaluate_with_it(images, whole, tmp_path, capsys):
    tokenizer = ['--tokenizer-path', whole / 'tokenizer.safetensors']
    call(tokenize_images, '--data-path', images, '--name', 'x', '--output-dir', tmp_path, *tokenizer,
         '--image-size', 32, '--num-workers', 0, '--device', 'cpu')
    assert torch.equal(load_codebook(tmp_path / 'codebook.ckpt'), load_codebook(whole / 'codebook.ckpt'))
    tokens = tmp_path / 'x-token.data.bin.gz'
    labels = tmp_path / 'x-label.txt'
    model = ['--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2',
             '--device', 'cpu', '--batch-size', 8]
    call(main_seit, *model, '--codebook-path', whole / 'codebook.ckpt', '--train-token-file', tokens,
         '--train-label-file', labels, '--val-token-file', tokens, '--val-label-file', labels, '--input-size', 32,
         '--eda-rc-prob', 0, '--swap-token-scale', 0.5, '--epochs', 1, '--output-dir', tmp_path / 'run')
    on_tokens = accuracy_lines(capsys.readouterr().out)[0]
    call(evaluate_on_images, *model, *tokenizer, '--codebook-path', whole / 'codebook.ckpt', '--data-path', images,
         '--model-path', tmp_path / 'run' / 'checkpoint.pth', '--tokenizer-input-size', 32, '--vit-input-size', 4,
         '--num-workers', 0)
    assert accuracy_lines(capsys.readouterr().out) == [on_tokens]


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('more, said', [
    (['--image-size', 4], '--image-size 4: smaller than patches of 8 pixels'),
    (['--image-size', 36], '--image-size 36: .* choose 32 or 40'),
    (['--width', 100], '--width 100: heads of 64 do not divide it: choose 64 or 128'),
    (['--width', 97, '--mixer', 'convolution'], '--width 97: the four parts of positions do not divide it: choose 96'),
    (['--l2', 0], '--l1, --l2 and --gradient are all 0'),
    (['--codes', 800], '--codes 800: more than the 640 patches of the first 40 images'),
    (['--val-images', 48], 'of its 48 images 48 cannot be held out'),
    (['--batch-size', 64], 'the 40 images of a process make no step of --batch-size 64'),
    (['--epoch-images', 3], 'the 3 images of a process make no step'),
    (['--vgg-path', __file__], 'test_train_tokenizer.py: '),
    (['--mixup', 1], '--mixup')])
def test_mistakes_get_one_line(images, tmp_path, more, said):
    fails(lambda: train(images, tmp_path, *more), said)
    assert contents(tmp_path).keys() <= {'.lock'}


def test_outputs_of_another_run_are_not_replaced(images, whole, tmp_path):
    before = contents(whole)
    fails(lambda: train(images, whole, '--resume', ''), 'an earlier run is here')
    assert contents(whole) == before
    (tmp_path / 'tokenizer.safetensors').write_bytes(b'mine')
    fails(lambda: train(images, tmp_path, '--resume', ''), 'tokenizer.safetensors: an earlier run is here')
    fails(lambda: train(images, tmp_path), 'tokenizer.safetensors: an earlier run is here')
    assert (tmp_path / 'tokenizer.safetensors').read_bytes() == b'mine'


def test_another_architecture_is_not_resumed(images, whole):
    before = contents(whole)
    fails(lambda: train(images, whole, '--epochs', 3, '--width', 128), 'does not fit the model')
    fails(lambda: train(images, whole, '--epochs', 3, '--codes', 13), 'does not fit the model')
    fails(lambda: train(images, whole, '--epochs', 3, '--no-flip'), 'flip True -> False')
    changed = {name for name, data in contents(whole).items() if data != before.get(name)}
    assert changed <= {'args.json', 'log.txt'} and not changed & set(OUTPUTS)


def test_a_collapse_stops_the_run_and_writes_nothing(images, whole, tmp_path, monkeypatch):
    for name, data in contents(whole).items():
        (tmp_path / name).write_bytes(data)
    before = contents(tmp_path)
    evaluate = train_tokenizer.evaluate_tokenizer

    def collapsed(training, *more):
        training.quantizer.rows.copy_(training.quantizer.rows[:1].expand(12, -1))
        return evaluate(training, *more)
    monkeypatch.setattr(train_tokenizer, 'evaluate_tokenizer', collapsed)
    with pytest.raises(Collapsed, match=re.escape('8.3% of 12 codes occur in 128 held-out tokens')):
        train(images, tmp_path, '--epochs', 3, '--save-every', '60m')
    after = contents(tmp_path)
    assert all(after[name] == before[name] for name in [*OUTPUTS, 'checkpoint.pth', 'log.txt'])


@pytest.mark.parametrize('change', ['added', 'replaced', 'gone'])
def test_a_resumed_run_has_the_same_images(change, whole, tmp_path):
    smooth_images(tmp_path / 'images', per_class=16)  # those of `whole`
    shutil.copytree(whole, tmp_path / 'run')
    assert train(tmp_path / 'images', tmp_path / 'run', '--epochs', 2) == 0
    path = sorted((tmp_path / 'images').rglob('*.png'))[0]
    if change == 'gone':
        path.unlink()
    else:
        Image.new('RGB', (9, 9)).save(path if change == 'replaced' else path.with_name('new.png'))
    fails(lambda: train(tmp_path / 'images', tmp_path / 'run', '--epochs', 3), 'differs in training images ',
          'held-out images ', '--allow-inexact-resume')


def test_other_held_out_images_are_not_resumed(images, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')
    fails(lambda: train(images, tmp_path / 'run', '--epochs', 3, '--val-images', 9), 'differs in ')
    smooth_images(tmp_path / 'val', per_class=4)
    fails(lambda: train(images, tmp_path / 'run', '--epochs', 3, '--val-path', tmp_path / 'val'), 'held-out images ')
