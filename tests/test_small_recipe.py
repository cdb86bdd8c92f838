"""--recipe small, and the warnings of every training."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import main_continual
import main_pixels
import main_seit
import recipe
from helpers import SMALL, call, fails, make_data, make_images, mistake, read_log, run_here, states
from small_training import small
from token_files.token_file import write_set

BARE = ['--device', 'cpu', '--input-size', '64']  # without a model and a batch, which the recipe sets


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def rule(images, grid=14, **given):
    """`small_values` for one process."""
    return recipe.small_values(images, grid, 1, given)


@pytest.mark.parametrize('images, epochs, batch', [
    (24, 60, 24), (400, 34, 32), (800, 28, 32), (2000, 22, 64), (10_000, 15, 128), (80_000, 10, 128)])
def test_epochs_and_batch_follow_the_number_of_images(images, epochs, batch):
    values = rule(images)
    assert (values['epochs'], values['batch_size']) == (epochs, batch)
    assert 1 <= values['warmup_epochs'] < epochs and values['unscale_lr']
    steps = epochs * (images // batch)
    assert steps * (1 - values['model_ema_decay']) > 1, 'the EMA moves'


def test_crops_follow_the_grid():
    assert [rule(400, grid)['rrc_ratio'] for grid in (8, 14, 28, 64)] == [0.6, 0.6, 0.15, 0.08]


def test_what_depends_on_a_flag_that_was_given_follows_it():
    values = rule(400, epochs=300, lr=4e-3, batch_size=10)
    assert values['warmup_epochs'] == 30 and values['warmup_lr'] == 4e-4
    assert values['model_ema_decay'] == 0.99916
    assert rule(400, epochs=1)['warmup_epochs'] == 0


def test_processes_divide_the_batch(monkeypatch):
    monkeypatch.setattr(recipe, 'world_size', lambda: 4)
    assert rule(10_000)['batch_size'] == 32 and rule(400)['batch_size'] == 8
    monkeypatch.setattr(recipe, 'world_size', lambda: 2)
    assert rule(20)['batch_size'] == 10, 'each process has ten images'
    assert recipe.small_values(10_000, 14, 4, {})['batch_size'] == 16


@pytest.mark.parametrize('updates, decay', [(5, 0), (10, 0), (20, 0.5), (1500, 0.99333), (25_000, 0.9996)])
def test_a_decay_that_is_advised_moves(updates, decay):
    assert recipe.moving_decay(updates) == pytest.approx(decay, abs=1e-9)
    assert updates * (1 - recipe.moving_decay(updates)) >= min(10, updates) - 1e-6


def test_published_and_no_recipe_give_the_same_bytes(data, tmp_path, capsys):
    words = [*SMALL, *data, '--epochs', 1]
    out = tmp_path / 'out'
    run_here(*words, '--output-dir', out)
    first = {name: (out / name).read_bytes() for name in ('checkpoint.pth', 'best_checkpoint.pth', 'args.json')}
    for path in sorted(out.iterdir()):
        path.unlink()
    assert 'recipe' not in capsys.readouterr().out
    run_here(*words, '--recipe', 'published', '--output-dir', out)
    assert first == {name: (out / name).read_bytes() for name in first}


def test_small_sets_what_was_not_given_and_says_so(data, tmp_path, capsys):
    run_here(*BARE, *data, '--recipe', 'small', '--epochs', 2, '--lr', '3e-3', '--output-dir', tmp_path / 'out')
    saved = states(tmp_path / 'out' / 'checkpoint.pth')
    assert saved['args']['model_kwargs'] == recipe.SMALL_VIT and saved['args']['model'] == 'deit_tiny_token_32'
    expected = rule(24, 8, epochs=2, lr=3e-3)
    assert {name: saved['args'][name] for name in expected} == expected
    assert json.loads((tmp_path / 'out' / 'args.json').read_text())['batch_size'] == 24
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('recipe small')]
    assert len(lines) == 1 and lines[0].startswith('recipe small for 24 images of 4 classes: --batch-size 24 ')
    assert '--model-kwargs depth=4 embed_dim=128 num_heads=4' in lines[0]
    assert '--epochs' not in lines[0] and '--lr ' not in lines[0], 'what was given is not set'
    assert read_log(tmp_path / 'out')[1]['train_lr'] == pytest.approx(3e-4), 'warm-up, and not scaled with the batch'


def test_a_model_that_was_given_brings_its_own_arguments(data, tmp_path):
    args = main_seit.parse_args(['--recipe', 'small', '--model', 'deit_small_token_32'])
    chosen = recipe.choose(args, {'model': 'x', 'model_kwargs': {'depth': 4}}, 400, 14, 10, None, None)
    assert chosen.model == 'deit_small_token_32' and chosen.model_kwargs == {} and chosen.epochs == 34
    args = main_seit.parse_args(['--recipe', 'small', '--finetune', 'x.pth'])
    assert recipe.choose(args, {'model': 'x'}, 400, 14, 10, None, None).model == 'deit_base_token_32'
    args = main_seit.parse_args(['--recipe', 'small', '--model-kwargs', 'depth=2'])
    chosen = recipe.choose(args, {'model': 'x', 'model_kwargs': {'depth': 4}}, 400, 14, 10, None, None)
    assert chosen.model == 'x' and chosen.model_kwargs == {'depth': 2}


def test_a_resumed_run_keeps_its_values(data, tmp_path, monkeypatch, capsys):
    out = ['--output-dir', tmp_path / 'out', '--epochs', 2]
    run_here(*BARE, *data, '--recipe', 'small', *out)
    values = recipe.small_values
    monkeypatch.setattr(recipe, 'small_values', lambda *args: values(*args) | {'lr': 1e-2, 'batch_size': 4})
    run_here(*BARE, *data, '--recipe', 'small', *out[:-1], 3, '--resume', 'auto')
    saved = states(tmp_path / 'out' / 'checkpoint.pth')
    assert (saved['epoch'], saved['args']['lr'], saved['args']['batch_size']) == (2, 1e-3, 24)
    assert 'note: the learning rate is that of a schedule of 3 epochs from here on, not of 2: ' in (
        capsys.readouterr().out)
    line = mistake(*BARE, *data, *out[:-1], 4, '--resume', 'auto')
    assert line == '--recipe is published, but the run that is resumed had small: give that'
    old = states(tmp_path / 'out' / 'checkpoint.pth')
    del old['args']['recipe']  # as a run of before there was one
    torch.save(old, tmp_path / 'out' / 'checkpoint.pth')
    line = mistake(*BARE, *data, '--recipe', 'small', *out[:-1], 4, '--resume', 'auto')
    assert line == '--recipe is small, but the run that is resumed had published: give that'


def test_too_few_validation_images(data):
    few = make_few(Path(data[9]).parent)
    line = mistake(*BARE, *data[:8], *few, '--recipe', 'small')
    assert '3 validation images for 4 classes are too few for --recipe small' in line and '--no-eval' in line


def make_few(folder):
    """Flags of three validation images."""
    few = folder / 'few-token.data.bin.gz'
    write_set(few, [np.zeros((3, 100), int)], 3, folder / 'few-label.txt', np.array([0, 1, 2]))
    return ['--val-token-file', few, '--val-label-file', folder / 'few-label.txt']


def test_pixels_have_it_too(tmp_path, capsys):
    images = make_images(tmp_path)
    call(main_pixels, '--recipe', 'small', '--train-path', images / 'train', '--val-path', images / 'val',
         '--input-size', 32, '--epochs', 1, '--output-dir', tmp_path / 'out', '--device', 'cpu', '--num-workers', 0)
    saved = states(tmp_path / 'out' / 'checkpoint.pth')['args']
    assert saved['model_kwargs'] == {**recipe.SMALL_VIT, 'patch_size': 8, 'global_pool': 'avg'}
    assert saved['model'] == 'deit_tiny_patch16_224' and saved['rrc_ratio'] == 0.6
    assert '--token-noise-prob' not in capsys.readouterr().out, 'pixels have no such flag'
    assert main_pixels.small_model(224)['model_kwargs']['patch_size'] == 16


def test_tasks_have_none():
    words = ['--new', 'pixels', '--train-path', 'x', '--val-path', 'y', '--base-classes', '2', '--output-dir', 'o']
    fails(lambda: main_continual.parse_args([*words, '--recipe', 'small']), '--recipe small is not for')


# ---------------------------------------------------------------- warnings of every training

def warnings(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning: ')]


def test_a_training_that_cannot_work_is_said(data, tmp_path, capsys):
    run_here(*SMALL, *data, '--epochs', 2, '--model-ema-decay', '0.99996')
    lines = warnings(capsys)
    assert len(lines) == 2
    assert lines[0].startswith('warning: --epochs 2 are not more than --warmup-epochs 5: ')
    assert lines[1].startswith('warning: --model-ema-decay 0.99996: in 6 steps the EMA hardly leaves the initial ')
    run_here('--device', 'cpu', '--batch-size', 8, '--input-size', 64, *data, '--epochs', 1, '--warmup-epochs', 0,
             '--no-model-ema', '--model', 'deit_tiny_token_32')
    lines = warnings(capsys)
    assert len(lines) == 1 and '5.4 M parameters are trained on 24 images' in lines[0]
    assert 'choose --recipe small, or a smaller model' in lines[0]


def test_a_training_that_can_work_is_not_warned_of(data, capsys):
    run_here(*SMALL, *data, '--epochs', 2, '--warmup-epochs', 1, '--model-ema-decay', '0.5')
    assert not warnings(capsys)


def test_other_programs_warn_too(tmp_path, capsys):
    small(tmp_path, '--epochs', 1, '--warmup-epochs', 1)
    assert [line[:25] for line in warnings(capsys)] == ['warning: --epochs 1 are n', 'warning: --model-ema-deca']
