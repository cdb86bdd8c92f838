"""The recipe against golden files; flags, ranges, derived numbers."""
import argparse
import copy
import json

import numpy as np
import pytest
import timm
import torch

import flags
import main_seit
import recipe
from training import pretrained
from training.run_info import run_record
from utils import InputError


@pytest.mark.parametrize('name, flags', [
    ('default_300ep_8x128', ['--lr', str(7.5e-4 * 8 * 128 / 512)]),
    ('default_300ep_1x64', ['--lr', str(7.5e-4 * 64 / 512)]),
    ('short_20ep_1x256', ['--lr', str(7.5e-4 * 256 / 512), '--epochs', '20'])])
def test_schedule_is_the_published_one(name, flags, golden):
    args = main_seit.parse_args([*flags, '--unscale-lr'])
    assert recipe.scaled_lr(args) == golden('lr_schedule.json')[name]['base_lr']
    optimizer = recipe.make_optimizer(args, torch.nn.Linear(2, 2))
    scheduler = recipe.make_scheduler(args, optimizer)
    rates = []
    for epoch in range(args.epochs):
        scheduler.step(max(epoch - 1, 0))
        rates.append(optimizer.param_groups[0]['lr'])
    np.testing.assert_allclose(rates, golden('lr_schedule.json')[name]['lr_by_epoch'], atol=1e-12, rtol=0)


def test_parameter_groups_are_the_published_ones(golden):
    model = timm.create_model('deit_small_token_32')
    optimizer = recipe.make_optimizer(main_seit.parse_args([]), model)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults['eps'] == 1e-8
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [{'weight_decay': g['weight_decay'], 'names': sorted(names[id(p)] for p in g['params'])}
              for g in optimizer.param_groups]
    assert groups == golden('param_groups.json')


@pytest.mark.parametrize('flags, rate', [
    ([], 7.5e-4 * 64 / 512), (['--accum-iter', '4'], 7.5e-4 * 256 / 512), (['--unscale-lr'], 7.5e-4),
    (['--batch-size', '512', '--lr', '1e-3'], 1e-3)])
def test_the_learning_rate_scales_with_the_effective_batch_and_args_stay(flags, rate):
    args = main_seit.parse_args(flags)
    before = copy.deepcopy(vars(args))
    assert recipe.scaled_lr(args) == pytest.approx(rate)
    optimizer = recipe.make_optimizer(args, torch.nn.Linear(2, 2))
    assert optimizer.param_groups[0]['lr'] == pytest.approx(rate)
    recipe.make_state(args, timm.create_model('deit_tiny_token_32', depth=1), torch.device('cpu'), (32, 28, 28))
    assert vars(args) == before


def test_a_run_repeated_from_its_args_json_has_the_same_learning_rate():
    args = main_seit.parse_args(['--batch-size', '128'])
    record = json.loads(json.dumps(run_record(vars(args), torch.device('cpu'))))
    again = argparse.Namespace(**record)
    assert recipe.scaled_lr(again) == recipe.scaled_lr(args) and record['lr'] == 7.5e-4


def test_attn_only_trains_only_attention():
    model = timm.create_model('deit_tiny_token_32', depth=2)
    pretrained.freeze_all_but_attention(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters()
                       if '.attn.' in n or n in ('head.weight', 'head.bias', 'pos_embed')}


@pytest.mark.parametrize('flags, words', [
    (['--bce-loss'], '--smoothing 0'), (['--batch-size', '7'], 'odd'), (['--eval'], '--resume'),
    (['--resume', 'auto'], '--output-dir'), (['--eval', '--resume', 'x', '--no-eval'], 'exclude'),
    (['--tensorboard'], '--output-dir')])
def test_flags_that_cannot_work_together(flags, words):
    with pytest.raises(InputError, match=words):
        main_seit.parse_args(flags)


@pytest.mark.parametrize('flags', [
    ['--eda-rc-prob', '2'], ['--epochs', '0'], ['--seed', '-1'], ['--seed', str(2 ** 64)], ['--token-patch-size', '0'],
    ['--token-synonym-thres', '0'], ['--start_epoch', '-1'], ['--drop', '2'], ['--eda-sc-prob', 'nan'],
    ['--dist-timeout', 'nan'], ['--token-noise-std', '-1'], ['--clip-grad', '-1'], ['--clip-grad', '0'],
    ['--lr', '-1'], ['--lr', 'inf'], ['--save-every', '0'], ['--save-every', '5x'], ['--save-every', '-3m'],
    ['--weight-decay', '-0.1'], ['--model-ema-decay', '1.5'], ['--batch-size', '1e3'], ['--opt-betas', '0.9', '2'],
    ['--lr-noise-pct', '0'], ['--amp', 'fp8'], ['--nb-classes', '0']])
def test_values_out_of_range_name_their_flag(flags):
    with pytest.raises(InputError) as error:
        main_seit.parse_args(flags)
    assert flags[0].replace('_', '-') in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('text, value', [('500', (500, 'steps')), ('30m', (30.0, 'minutes'))])
def test_save_interval(text, value):
    assert flags.save_interval(text) == value


@pytest.mark.parametrize('flags', [['--batch-size', '8', '--accum-iter', '4'], ['--batch-size', '32']])
def test_an_epoch_without_a_step_is_refused(flags):
    with pytest.raises(InputError, match='the 31 images of a process make no step'):
        recipe.count_steps(main_seit.parse_args(flags), 31, 'tokens')


def test_steps_are_whole_accumulations():
    args = main_seit.parse_args(['--batch-size', '4', '--accum-iter', '3'])
    assert recipe.count_steps(args, 59, 'tokens') == 12


def test_flags_that_must_be_alike_leave_out_places():
    alike = recipe.flags_alike(main_seit.parse_args(['--output-dir', 'a', '--lr', '2e-3']))
    assert alike['--lr'] == 2e-3 and '--batch-size' in alike
    assert not {'--output-dir', '--train-token-file', '--codebook-path', '--token-cache', '--resume'} & alike.keys()


def test_bce_targets_are_one_wherever_the_mix_is_positive():
    args = main_seit.parse_args(['--bce-loss', '--smoothing', '0'])
    _, criterion = recipe.make_loss(args, 3)
    logits = torch.randn(2, 3)
    targets = torch.tensor([[0.3, 0.7, 0], [0, 0, 1.]])
    slow = torch.nn.functional.binary_cross_entropy_with_logits(logits, (targets > 0).float())
    torch.testing.assert_close(criterion(logits, targets), slow)
