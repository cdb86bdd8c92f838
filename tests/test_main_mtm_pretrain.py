"""Masked-token pre-training as a user runs it."""
import argparse

import numpy as np
import pytest
import torch

import main_mtm_finetune
import main_mtm_pretrain
from foreign_sets import codes_of, labels_of, write_folder
from helpers import Killed, assert_same, before_step, call, fails, kill, make_data, read_log, states
from masked import PUBLISHED_FINETUNE, PUBLISHED_PRETRAIN, SMALL, split_flags, token_adapt_flags
from processes import training_differs
from seitpp import mtm_recipe
from seitpp.models_mtm import MODELS, draw_masks, masked_token_loss
from seitpp.token_adapt import load_token_adapt
from small_training import CountWaits
from token_files.codebook import load_codebook

pytestmark = pytest.mark.usefixtures('one_thread')

# Defaults that are not the published ones, and why.
OTHER_DEFAULTS = {'--device': 'cuda where there is one, as in every program', '--grad_clip': 'published 3, never used'}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The pre-training flags of a set of 24 images of 10x10 codes, without its label file."""
    folder = tmp_path_factory.mktemp('data')
    ours, _ = split_flags(make_data(folder))
    (folder / 'train-label.txt').unlink()
    return [*ours, *token_adapt_flags(folder, 30, 10, 8)]


def pretrain(*words):
    return call(main_mtm_pretrain, *SMALL, *words)


# ---------------------------------------------------------------- flags

@pytest.mark.parametrize('program', [main_mtm_pretrain, main_mtm_finetune])
def test_published_flags_and_defaults(golden, program):
    parser = program.get_args_parser()
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    for option in golden('seitpp/flags.json')[program.__name__]:
        for flag in option['flags']:
            action = actions[flag.replace('_', '-')]
            if flag in program.NO_EFFECT or flag.replace('_', '-') in program.NO_EFFECT:
                assert (action.nargs == 0) == (option['nargs'] == 0), flag
                continue
            if flag not in OTHER_DEFAULTS:
                default = action.default if option['default'] is not None else action.default or None
                assert default == option['default'], flag
            if isinstance(action, argparse.BooleanOptionalAction):
                assert option['nargs'] == 0, flag
            elif flag != '--cutmix-minmax':  # published '+', of which two numbers made sense
                assert action.nargs == option['nargs'], flag


def test_the_published_commands_parse():
    args = main_mtm_pretrain.parse_args(PUBLISHED_PRETRAIN.split())
    assert (args.batch_size, args.accum_iter, args.clip_grad, args.save_periods) == (
        128, 4, None, ['last2', 'every_200_epochs'])
    args = main_mtm_finetune.parse_args(PUBLISHED_FINETUNE.split())
    assert (args.layer_decay, args.dist_eval, args.tokenadapt_path) == (0.65, True, 'weights/tokenadapt.ckpt')
    assert main_mtm_pretrain.parse_args(['--grad_clip', '3', '--local_rank', '-1']).clip_grad == 3


@pytest.mark.parametrize('flags, words', [
    (['--input-size', '72'], '--input-size 72: give 2 x --token-patch-size 8'), (['--input-size', '60'], 'multiple'),
    (['--batch-size', '5'], '--batch-size 5: half of it goes through TokenAdapt'), (['--rrc', '--src'], 'exclude'),
    (['--mask-ratio-min', '0.7', '--mask-ratio-max', '0.6'], 'rising order'), (['--save-periods', 'best'], 'best'),
    (['--mask-ratio-max', '0'], '--mask-ratio-max 0 masks nothing'),
    (['--mask-ratio-min', '0', '--mask-ratio-max', '0.0'], '--mask-ratio-max 0 masks nothing'),
    (['--mask-ratio-min', '0.9', '--input-size', '48'], '--mask-ratio-min 0.9 leaves the encoder none of .* 9 of 2x2'),
    (['--input-size', '16'], '--mask-ratio-min 0.4 leaves the encoder none .* larger --input-size'),
    (['--mask_ratio_mu', '30'], 'hardly any ratio'), (['--bce-loss', '--smoothing', '0.1'], '--smoothing 0'),
    (['--token-noise-prob', '0.8', '--token-coloradapt-prob', '0.3'], 'add up to more than 1'),
    (['--eda-rc-prob', '0.8', '--eda-sc-prob', '0.3'], 'add up to more than 1'), (['--epoch', '3'], '--epoch')])
def test_flags_that_cannot_be(flags, words):
    fails(lambda: main_mtm_pretrain.parse_args(flags), words)


# ---------------------------------------------------------------- exact resume

@pytest.fixture(scope='module')
def uninterrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    flags = [*data, '--epochs', 2, '--accum-iter', 2, '--token-coloradapt-prob', 0.4, '--token-noise-prob', 0.3,
             '--eda-sc-prob', 0.3]
    pretrain(*flags, '--output-dir', folder)
    return flags, folder


def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, monkeypatch):
    flags, whole = uninterrupted
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 1, 3, kill)  # amid the batches of a step
        pretrain(*flags, '--save-every', 1, '--output-dir', tmp_path)
    assert states(tmp_path / 'checkpoint-last.pth')['step'] == 2
    pretrain(*flags, '--save-every', 1, '--output-dir', tmp_path, '--resume', 'auto')
    assert not training_differs(whole, tmp_path, ['checkpoint-last.pth'])


def test_checkpoints_have_the_published_keys_and_hold_token_adapt(uninterrupted):
    _, folder = uninterrupted
    checkpoint = states(folder / 'checkpoint-last.pth')
    assert checkpoint.keys() >= {'model', 'optimizer', 'epoch', 'scaler', 'args'} and checkpoint['epoch'] == 1
    assert any(name.startswith('conversion_function.') for name in checkpoint['model'])
    assert {path.name for path in folder.glob('check*')} == {
        f'checkpoint-last{n}.pth{end}' for n in ('', 1) for end in ('', '.summary.json')}
    fails(lambda: pretrain(*uninterrupted[0], '--output-dir', folder), 'an earlier run is here; add --resume auto')


def test_a_published_checkpoint_resumes(uninterrupted, tmp_path):
    """It holds the flags as a Namespace, and of our keys only model, optimizer, epoch, scaler and args."""
    flags, folder = uninterrupted
    ours = states(folder / 'checkpoint-last1.pth')
    args = {name: ours['args'][name] for name in ('batch_size', 'accum_iter', 'epochs', 'seed', 'blr', 'flip')}
    torch.save({**{key: ours[key] for key in ('model', 'optimizer', 'epoch', 'scaler')},
                'args': argparse.Namespace(**args)}, tmp_path / 'published.pth')
    pretrain(*flags, '--resume', tmp_path / 'published.pth', '--output-dir', tmp_path / 'out')
    assert_same(*(states(each / 'checkpoint-last.pth')['model'] for each in (folder, tmp_path / 'out')))


def test_without_token_adapt_a_checkpoint_that_holds_it_resumes(uninterrupted, tmp_path):
    flags, folder = uninterrupted
    pretrain(*flags, '--tokenadapt-path', '', '--epochs', 3, '--resume', folder / 'checkpoint-last.pth',
             '--output-dir', tmp_path)
    state = states(tmp_path / 'checkpoint-last.pth')
    assert state['epoch'] == 2 and not any(name.startswith('conversion_function.') for name in state['model'])


# ---------------------------------------------------------------- what it trains

def test_it_learns(data, tmp_path):
    pretrain(*data, '--epochs', 12, '--rrc-ratio', 0.9, '--output-dir', tmp_path, '--tokenadapt-path', '')
    losses = [line['train_loss'] for line in read_log(tmp_path)]
    assert losses[0] == pytest.approx(np.log(30), abs=0.2) and losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize('flags', [
    ['--rrc', '--amp', 'bf16', '--token-noise-prob', 1, '--smoothing', 0.1, '--lr', 1e-3],
    ['--src', '--bce-loss', '--token-coloradapt-prob', 1, '--grad-clip', 0.1, '--eda-rc-prob', 1, '--seed', 3],
    ['--tokenadapt-path', '', '--batch-size', 5, '--mask-ratio-min', 0, '--mask-ratio-max', 0.5, '--accum-iter', 2],
    ['--input-size', 80, '--mask-ratio-min', 0.5, '--mask-ratio-max', 0.5, '--token-cache', 'none', '--flip']])
def test_every_switch_runs(data, tmp_path, flags):
    assert pretrain(*data, '--epochs', 1, '--output-dir', tmp_path, *flags) == 0
    line, = read_log(tmp_path)
    assert np.isfinite(line['train_loss'])


def test_gradients_are_clipped_where_asked_for(data, tmp_path):
    for name, flags in (('plain', []), ('clipped', ['--clip-grad', 1e-9])):
        pretrain(*data, '--epochs', 1, '--output-dir', tmp_path / name, *flags)
    plain, clipped = (states(tmp_path / name / 'checkpoint-last.pth')['optimizer']['state'][0]['exp_avg']
                      for name in ('plain', 'clipped'))
    assert clipped.norm() < 1e-8 < plain.norm()


def test_a_step_asks_the_device_nothing(data):
    """Input, masks, model and loss: no operation for which the host would wait on a GPU."""
    args = main_mtm_pretrain.parse_args([str(word) for word in [
        *SMALL, *data, '--token-noise-prob', 0.5, '--token-coloradapt-prob', 0.5, '--eda-sc-prob', 0.5]])
    codebook = load_codebook(args.codebook_path)
    prepare = mtm_recipe.make_input(args, codebook, 10, 8, load_token_adapt(args.tokenadapt_path, codebook))
    model = main_mtm_pretrain.create_model(args.model, args.model_kwargs, 30, 8)
    generator = torch.Generator().manual_seed(0)
    mask_ratio = main_mtm_pretrain.make_mask_ratio(args)
    counter = CountWaits()
    for _ in range(5):
        batch = torch.randint(0, 30, (4, 10, 10)).to(torch.uint16), torch.zeros(4, dtype=torch.int64)
        with counter:
            codes, _ = prepare(*batch, generator)
            masks = draw_masks(4, 16, mask_ratio, generator)
            masked_token_loss(model(codes, *masks), codes, masks.masked).backward()
    assert counter.count == 0


def test_codes_of_equal_rows_are_one_to_the_model(data):
    """The model sees the lowest of equal rows, from both halves."""
    args = main_mtm_pretrain.parse_args([str(word) for word in [*SMALL, *data]])
    codebook = load_codebook(args.codebook_path)
    codebook[15:] = codebook[:15] * 2
    prepare = mtm_recipe.make_input(args, codebook, 10, 8, load_token_adapt(args.tokenadapt_path, codebook))
    codes, _ = prepare(torch.full((4, 10, 10), 20).to(torch.uint16), torch.zeros(4), torch.Generator().manual_seed(0))
    assert (codes[:2] == 5).all() and codes.max() < 15


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('flags, words', [
    (['--tokenadapt-path', 'gone.ckpt'], "^gone.ckpt: there is no such.* give --tokenadapt-path '' to train without"),
    (['--model', 'deit_base_token_32'], 'is none of mae_token'),
    (['--input-size', 96], 'larger than the 10x10'), (['--batch-size', 64], '--batch-size 64 x --accum-iter 1'),
    (['--model-kwargs', 'heads=2'], "--model-kwargs {'heads': 2}"), (['--resume', 'gone.pth'], 'gone.pth')])
def test_mistakes_by_flag(data, tmp_path, flags, words):
    fails(lambda: pretrain(*data, '--epochs', 1, '--output-dir', tmp_path, *flags), words)
    assert not list(tmp_path.glob('checkpoint*'))


def test_another_codebook_is_refused(uninterrupted, tmp_path):
    flags, folder = uninterrupted
    torch.save(torch.randn(40, 32), tmp_path / 'codebook.ckpt')
    for more in ([], ['--tokenadapt-path', '']):
        fails(lambda: pretrain(*flags, '--codebook-path', tmp_path / 'codebook.ckpt', *more, '--output-dir',
                               tmp_path / 'out', '--resume', folder / 'checkpoint-last.pth'),
              'checkpoint-last.pth: its model reads 30 codes, but the codebook has 40 rows')
    fails(lambda: pretrain(*flags, '--codebook-path', tmp_path / 'codebook.ckpt', '--output-dir', tmp_path / 'out'),
          'tokenadapt.ckpt: is for a codebook of 30 x 32, not of 40 x 32')


def test_only_one_model_is_published():
    assert MODELS == ['mae_token_vit_base_patch16_dec512d4b_k2s2_vitvqgan_32']


def test_a_flag_without_effect_can_be_added_on_resuming(uninterrupted, tmp_path, capsys):
    """The published command has --flip; a run that was started without it resumes with it, without a warning."""
    flags, folder = uninterrupted
    capsys.readouterr()
    pretrain(*flags, '--flip', '--output-dir', tmp_path, '--resume', folder / 'checkpoint-last1.pth')
    printed = capsys.readouterr().out
    assert 'note: --flip has no effect' in printed and 'had False' not in printed
    weights, again = (torch.load(path / 'checkpoint-last.pth', weights_only=True)['model']
                      for path in (folder, tmp_path))
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_views_in_pre_training_and_fine_tuning(tmp_path, monkeypatch, capsys):
    codes = codes_of(48, 10, 512).reshape(24, 2, 100)
    path = write_folder(tmp_path, codes, labels_of(24))
    words = ['--codebook-path', 'fsq:8,8,8', '--train-token-file', path, '--tokenadapt-path', '', '--epochs', 2,
             '--val-share', 0.1]
    pretrain(*words, '--output-dir', tmp_path / 'a')
    out = capsys.readouterr().out
    assert '2 of its 24 images are held out' in out and 'train: 22 images of 10x10 codes in 2 views' in out
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 1, 2, kill)
        pretrain(*words, '--save-every', 1, '--output-dir', tmp_path / 'b')
    pretrain(*words, '--save-every', 1, '--output-dir', tmp_path / 'b', '--resume', 'auto')
    assert not training_differs(tmp_path / 'a', tmp_path / 'b', ['checkpoint-last.pth'])
    capsys.readouterr()
    small = [word for word in SMALL if not str(word).startswith('decoder_')]
    call(main_mtm_finetune, *small, *words, '--finetune', tmp_path / 'a/checkpoint-last.pth', '--output-dir',
         tmp_path / 'c')
    out = capsys.readouterr().out
    assert 'val: 2 images of 10x10 codes in 2 views' in out and '* Acc@1' in out
