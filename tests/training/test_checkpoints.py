"""Reading checkpoints, the rule of resuming, and starting from other weights."""
import argparse

import pytest
import timm
import torch
from timm.optim import kron, list_optimizers

import main_seit
import recipe
from engine import optimizer_step
from helpers import SMALL, accuracy_lines, assert_same, fails, make_data, mistake, run_here, states
from seitpp import models_mtm_finetune  # noqa: F401 - registers its models with timm
from seitpp.models_mtm import MODELS
from training import checkpoints
from training.checkpoints import (check_codes, check_origin, load_checkpoint, origin, origin_note,
                                  without_token_adapt)
from training.pretrained import load_pretrained
from utils import InputError, seed_step


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp('run')
    run_here(*SMALL, *data, '--epochs', 1, '--output-dir', folder)
    return folder


def tiny(**kwargs):
    return timm.create_model('deit_tiny_token_32', **{'depth': 1, **kwargs})


RULES = main_seit.get_args_parser().rules


def resume(state, checkpoint, path, flags, steps):
    checkpoints.resume(state, checkpoint, path, flags, steps, RULES.exact, RULES.of_a_start)


def state_of(*flags, width=32, code_dim=32):
    args = main_seit.parse_args(['--amp', 'off', '--model-ema-decay', '0.9', *flags])
    torch.manual_seed(0)
    model = tiny(embed_dim=width, num_heads=2, num_classes=3, img_size=8, in_chans=code_dim)
    return recipe.make_state(args, model, torch.device('cpu'), (code_dim, 8, 8), 1), vars(args)


def saved(state, flags):
    """A checkpoint of `state` after one step of the optimizer."""
    state.train_model(torch.randn(2, 32, 8, 8)).sum().backward()
    state.optimizer.step()
    return state.state_dict() | {'args': flags, 'classes': None}


# ---------------------------------------------------------------- reading

def test_published_checkpoint_with_a_namespace_evaluates(data, tmp_path, capsys):
    model = tiny(embed_dim=32, num_heads=2, img_size=8, num_classes=4)
    torch.save({'model': model.state_dict(), 'args': argparse.Namespace(lr=1)}, tmp_path / 'trained-vit.ckpt')
    flags = [w for w in map(str, data) if '-train' not in w and 'train-' not in w]  # evaluation needs no training files
    run_here(*SMALL, *flags, '--eval', '--resume', tmp_path / 'trained-vit.ckpt')
    line, = accuracy_lines(capsys.readouterr().out)
    assert line.startswith('* Acc@1 ')


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
def test_names_of_ddp_and_compile_are_taken_off(trained, data, prefix, tmp_path, capsys):
    run_here(*SMALL, *data, '--eval', '--resume', trained / 'checkpoint.pth')
    lines = accuracy_lines(capsys.readouterr().out)
    content = states(trained / 'checkpoint.pth')
    for key in ('model', 'model_ema'):
        content[key] = {prefix + name: value for name, value in content[key].items()}
    torch.save(content, tmp_path / 'wrapped.pth')
    run_here(*SMALL, *data, '--eval', '--resume', tmp_path / 'wrapped.pth')
    output = capsys.readouterr().out
    assert accuracy_lines(output) == lines and 'which is taken off' in output
    model = tiny(embed_dim=32, num_heads=2, num_classes=4, img_size=8)
    load_pretrained(model, str(tmp_path / 'wrapped.pth'))


def test_it_is_said_where_averaged_weights_are_not_taken(trained, data, tmp_path, capsys):
    """Whatever the file is called; not where they are evaluated too, nor where the file has none."""
    note = 'its plain weights are taken, not the averaged ones (EMA) that it holds too'
    (tmp_path / 'renamed.pth').write_bytes((trained / 'best_ema_checkpoint.pth').read_bytes())
    for path in (trained / 'best_ema_checkpoint.pth', tmp_path / 'renamed.pth'):
        run_here(*SMALL, *data, '--eval', '--no-model-ema', '--resume', path)
        assert f'note: {path}: {note}; --model-ema evaluates those, too\n' in capsys.readouterr().out
        run_here(*SMALL, *data, '--eval', '--resume', path)
        output = capsys.readouterr().out
        assert 'note:' not in output and len(accuracy_lines(output)) == 2
    model = tiny(embed_dim=32, num_heads=2, num_classes=4, img_size=8)
    load_pretrained(model, str(tmp_path / 'renamed.pth'))
    assert f'note: {tmp_path / "renamed.pth"}: {note}\n' in capsys.readouterr().out
    torch.save(states(tmp_path / 'renamed.pth') | {'model_ema': None}, tmp_path / 'renamed.pth')
    run_here(*SMALL, *data, '--eval', '--no-model-ema', '--resume', tmp_path / 'renamed.pth')
    load_pretrained(model, str(tmp_path / 'renamed.pth'))
    assert 'note:' not in capsys.readouterr().out


def test_weights_of_other_names_are_an_error_about_names(data, tmp_path):
    torch.save({'model': {'net.' + k: v for k, v in tiny().state_dict().items()}}, tmp_path / 'c.pth')
    line = mistake(*SMALL, *data, '--eval', '--resume', tmp_path / 'c.pth')
    assert 'no head.bias among its weights (net.cls_token' in line and 'label' not in line


def test_a_checkpoint_keeps_the_class_names(data, tmp_path):
    folder = tmp_path / 'named'
    folder.mkdir()
    for path in data[1].parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    names = ['ant', 'bee', 'cat', 'dog']
    for split in ('train', 'val'):
        (folder / f'{split}-token.json').write_text('{"classes": ["ant", "bee", "cat", "dog"]}')
    flags = [folder / word.name if hasattr(word, 'name') else word for word in data]
    run_here(*SMALL, *flags, '--epochs', 1, '--output-dir', folder / 'run')
    assert states(folder / 'run' / 'checkpoint.pth')['classes'] == names
    (folder / 'val-token.json').write_text('{"classes": ["ant", "be\\u0301e", "cat", "dog"]}')
    line = mistake(*SMALL, *flags, '--eval', '--resume', folder / 'run' / 'checkpoint.pth')
    assert "class 1 is 'be\\u0301e'" in line and "it is 'bee'" in line
    assert 'class 1' in mistake(*SMALL, *flags, '--epochs', 1)
    (folder / 'val-token.json').write_text('{"classes": ["bee", "cat", "dog"]}')
    assert "class 0 is 'bee'" in mistake(*SMALL, *flags, '--epochs', 1)


# ---------------------------------------------------------------- resuming

def test_hyperparameters_are_the_command_lines_and_differences_are_said(capsys):
    state, flags = state_of()
    checkpoint = saved(state, flags)
    other, flags = state_of('--weight-decay', '0.3', '--lr', '1e-2', '--opt-eps', '1e-6', '--opt-betas', '0.8', '0.9')
    resume(other, checkpoint, 'c.pth', flags, 12)
    output = capsys.readouterr().out
    for words in ('--weight-decay is 0.3; the run that wrote c.pth had 0.1', '--lr is 0.01', '--opt-eps is 1e-06',
                  '--opt-betas is [0.8, 0.9]'):
        assert output.count(f'note: {words}') == 1
    assert output.count('note: ') == 4
    group = other.optimizer.param_groups[1]
    assert (group['weight_decay'], group['eps'], tuple(group['betas'])) == (0.3, 1e-6, (0.8, 0.9))
    for mine, theirs in zip(other.optimizer.state.values(), state.optimizer.state.values()):
        assert torch.equal(mine['exp_avg'], theirs['exp_avg'])


def test_the_same_flags_resume_without_a_word(capsys):
    state, flags = state_of()
    checkpoint = saved(state, flags)
    again, flags = state_of()
    resume(again, checkpoint, 'c.pth', {**flags, 'resume': 'auto', 'output_dir': 'elsewhere'}, 12)
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('missing', [None, 'removed'])
def test_optimizer_groups_of_another_torch_resume(missing):
    state, flags = state_of()
    checkpoint = saved(state, flags)
    for group in checkpoint['optimizer']['param_groups']:
        for key in ('fused', 'foreach', 'capturable', 'differentiable', 'maximize', 'decoupled_weight_decay'):
            group[key] = None
            if missing == 'removed':
                del group[key]
    other, flags = state_of()
    resume(other, checkpoint, 'c.pth', flags, 12)
    assert all(group['fused'] for group in other.optimizer.param_groups)
    other.train_model(torch.randn(2, 32, 8, 8)).sum().backward()
    other.scaler.scale(other.train_model(torch.randn(2, 32, 8, 8)).sum()).backward()
    other.scaler.step(other.optimizer)


@pytest.mark.parametrize('damage', [
    lambda c: c['optimizer'].pop('state'), lambda c: c['optimizer']['param_groups'].pop(),
    lambda c: c['optimizer']['param_groups'][0]['params'].pop(), lambda c: c['optimizer'].update(param_groups=3),
    lambda c: c['optimizer']['state'][0].update(exp_avg=torch.zeros(3)),
    lambda c: c['optimizer']['state'][1].update(exp_avg_sq=None), lambda c: c['optimizer']['state'][2].pop('exp_avg')])
def test_an_optimizer_state_that_does_not_fit_is_one_line(damage):
    state, flags = state_of()
    checkpoint = saved(state, flags)
    damage(checkpoint)
    with pytest.raises(InputError, match='c.pth: its optimizer state does not fit'):
        resume(state_of()[0], checkpoint, 'c.pth', flags, 12)


@pytest.mark.parametrize('flag, value', [('seed', 1), ('batch_size', 4), ('accum_iter', 2), ('repeated_aug', True)])
def test_flags_that_change_the_run_are_refused_or_allowed_with_a_warning(flag, value, capsys):
    state, flags = state_of()
    checkpoint = saved(state, flags)
    with pytest.raises(InputError, match='--allow-inexact-resume'):
        resume(state, checkpoint, 'c.pth', {**flags, flag: value}, 12)
    resume(state, checkpoint, 'c.pth', {**flags, flag: value, 'allow_inexact_resume': True}, 12)
    assert 'no longer those of the uninterrupted run' in capsys.readouterr().out


def test_another_optimizer_and_weights_alone_are_refused(trained, data, tmp_path):
    state, flags = state_of()
    checkpoint = saved(state, flags)
    with pytest.raises(InputError, match='was written with --opt adamw, not sgd'):
        resume(state, checkpoint, 'c.pth', {**flags, 'opt': 'sgd'}, 12)
    torch.save({'model': states(trained / 'checkpoint.pth')['model']}, tmp_path / 'weights.pth')
    assert '--finetune' in mistake(*SMALL, *data, '--epochs', 1, '--resume', tmp_path / 'weights.pth')


def test_weights_that_do_not_fit_are_named(trained, data):
    line = mistake(*SMALL, *data, '--model-kwargs', 'depth=2', 'embed_dim=32', 'num_heads=2', '--eval', '--resume',
                   trained / 'checkpoint.pth')
    assert 'checkpoint.pth: does not fit' in line and 'blocks.1.norm1.weight: missing' in line


def test_very_long_lists_of_shards_do_not_make_checkpoints_unreadable(tmp_path):
    state, flags = state_of()
    flags = {**flags, 'train_token_file': ','.join(f'folder/train-token-{i:05d}.data.bin.gz' for i in range(2000))}
    torch.save(saved(state, checkpoints.flags_to_save(flags)), tmp_path / 'c.pth')
    again, _ = state_of()
    resume(again, checkpoints.load_checkpoint(str(tmp_path / 'c.pth')), 'c.pth', flags, 12)


@pytest.mark.parametrize('step, more, resumed', [
    (11, {'accum_iter': 4}, 8), (3, {'accum_iter': 4}, 0), (11, {'batch_size': 4}, 11), (6, {}, 6), (0, {}, 0),
    (9, {'repeated_aug': True}, 9)])
def test_an_inexact_resume_is_at_whole_steps_with_one_left(step, more, resumed):
    """Of 12 batches an epoch. With half the batch, twice as many batches were done: more than there are."""
    state, flags = state_of()
    checkpoint = saved(state, flags) | {'step': step, 'world_size': 1}
    resume(state, checkpoint, 'c.pth', {**flags, **more, 'allow_inexact_resume': True}, 12)
    assert state.step == resumed


def test_checkpoints_of_before_say_nothing_of_the_scaled_learning_rate(capsys):
    state, flags = state_of()
    checkpoint = saved(state, {**flags, 'lr': 0.0015, 'amp': 'fp16'})
    del checkpoint['classes']
    resume(state, checkpoint, 'c.pth', flags, 12)
    assert '--lr' not in capsys.readouterr().out
    checkpoint['classes'] = None
    resume(state, checkpoint, 'c.pth', flags, 12)
    assert 'note: --lr is 0.00075' in capsys.readouterr().out


@pytest.mark.parametrize('momentum', ['0', '0.9'])
def test_sgd_resumes_with_and_without_momentum(momentum):
    state, flags = state_of('--opt', 'momentum', '--momentum', momentum)
    checkpoint = saved(state, flags)
    other, flags = state_of('--opt', 'momentum', '--momentum', momentum)
    resume(other, checkpoint, 'c.pth', flags, 12)
    assert len(other.optimizer.state) == len(state.optimizer.state)


@pytest.mark.parametrize('change', [
    {'best_acc1': 'x'}, {'step': 'x'}, {'step': -1}, {'epoch': -5}, {'meter': 'x'}, {'meter': torch.zeros(5, 7)},
    {'model_ema': [1]}, {'world_size': 0}])
def test_fields_that_cannot_be_are_one_line(trained, change, tmp_path):
    torch.save(states(trained / 'checkpoint.pth') | change, tmp_path / 'c.pth')
    name, = change
    with pytest.raises(InputError, match=f'c.pth: damaged or not a checkpoint .its {name} cannot be'):
        checkpoints.load_checkpoint(str(tmp_path / 'c.pth'))


def test_fields_that_are_empty_are_as_if_missing():
    state, flags = state_of()
    empty = dict.fromkeys(('best_acc1', 'best_ema_acc1', 'step', 'meter', 'model_ema'))
    resume(state, saved(state, flags) | empty, 'c.pth', flags, 12)
    assert state.best == {'model': 0., 'ema': 0.} and state.step == 0 and state.losses is None


def test_a_head_bias_that_is_a_number_is_one_line(trained, data, tmp_path):
    content = states(trained / 'checkpoint.pth')
    content['model']['head.bias'] = torch.tensor(1.)
    torch.save(content, tmp_path / 'c.pth')
    assert 'no head.bias' in mistake(*SMALL, *data, '--eval', '--resume', tmp_path / 'c.pth')


@pytest.mark.parametrize('classes', [5, [1], {'a': 1}])
def test_class_names_of_another_meaning_are_unknown(trained, classes, tmp_path):
    torch.save(states(trained / 'checkpoint.pth') | {'classes': classes}, tmp_path / 'c.pth')
    assert checkpoints.load_checkpoint(str(tmp_path / 'c.pth'))['classes'] is None


# ---------------------------------------------------------------- whose weights

TINY = {'depth': 1, 'embed_dim': 32, 'num_heads': 2}
KINDS = {'main_mtm_pretrain.py': (MODELS[0], {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 2}),
         'main_mtm_finetune.py': ('mtm_deit_tiny_token_32', {}), 'main_seit.py': ('deit_tiny_token_32', {}),
         '': ('vit_tiny_patch16_224', {})}


@pytest.fixture(scope='module')
def weights():
    found = {program: timm.create_model(name, **TINY, **more).state_dict() for program, (name, more) in KINDS.items()}
    return {**found, 'patch': timm.create_model('deit_tiny_token_32_patch', **TINY).state_dict()}


def test_each_program_is_told_from_the_others(weights):
    for program in KINDS:
        assert origin(weights[program]) == program
    assert origin(weights['patch']) == 'main_seit.py' and origin({}) == ''
    other = timm.create_model('deit_small_token_4', **TINY).state_dict()
    assert origin(other) == 'main_seit.py'


def test_notes_and_refusals(weights):
    pretrained = weights['main_mtm_pretrain.py']
    assert origin_note(pretrained, weights['main_seit.py']) == ' (these are weights of main_mtm_pretrain.py)'
    assert origin_note(pretrained, pretrained) == origin_note(weights[''], pretrained) == ''
    check_origin(pretrained, ('main_mtm_pretrain.py',), 'x.pth')
    fails(lambda: check_origin(weights['main_seit.py'], ('main_mtm_finetune.py',), 'x.pth'),
          '^x.pth: its weights belong to main_seit.py, whose network is another: give a checkpoint of '
          'main_mtm_finetune.py$')
    fails(lambda: check_origin(weights[''], ('main_mtm_finetune.py',), 'x.pth'), 'are of no model of masked tokens')
    check_codes(pretrained, 391, 'x.pth')
    fails(lambda: check_codes(pretrained, 30, 'x.pth'), '^x.pth: its model reads 391 codes, but the codebook has 30')


def test_token_adapt_is_left_out():
    value = torch.zeros(1)
    names = {'conversion_function.0.weight': value, 'reverse_transform.1.bias': value, 'norm.weight': value}
    assert list(without_token_adapt(names)) == ['norm.weight']


# ---------------------------------------------------------------- every optimizer of timm

OPTIMIZERS = [*list_optimizers(), 'lookahead_adamw', 'lookahead_lamb', 'lookahead_kron']
NOT_HERE = {'adahessian': 'second derivatives',
            **dict.fromkeys(list_optimizers('bnb*') + list_optimizers('fused*'), 'CUDA')}


def train_steps(state, first, count):
    """So many steps of the optimizer; each draws from a seed of its own, as in the engine."""
    for step in range(first, first + count):
        seed_step(0, 0, step, 0, torch.Generator())
        state.scheduler.step(step)  # another learning rate each time
        x = torch.randn(2, state.model.patch_embed.proj.in_channels, 8, 8)
        state.scaler.scale(state.train_model(x).square().sum()).backward()
        optimizer_step(state, None)


@pytest.mark.slow  # a hundred optimizers
@pytest.mark.parametrize('name', [name for name in OPTIMIZERS if name not in NOT_HERE])
def test_every_optimizer_resumes_exactly(name, tmp_path, monkeypatch):
    monkeypatch.setattr(kron, 'has_dynamo', False)  # it would compile for minutes
    steps = 7 if name.startswith('lookahead') else 2  # Lookahead looks every sixth step
    words = ['--opt', name, '--warmup-epochs', '0', '--unscale-lr', '--lr', '1e-2']
    small = {'width': 16, 'code_dim': 4}  # for Kron, which multiplies all sides of a weight
    whole, flags = state_of(*words, **small)
    before = [value.clone() for value in whole.model.parameters()]
    train_steps(whole, 0, steps)
    torch.save(whole.state_dict() | {'args': flags, 'classes': None}, tmp_path / 'checkpoint.pth')
    train_steps(whole, steps, 3)
    assert any((a != b).any() for a, b in zip(before, whole.model.parameters()))

    resumed, _ = state_of(*words, **small)
    checkpoint = load_checkpoint(str(tmp_path / 'checkpoint.pth'))
    resume(resumed, checkpoint, 'checkpoint.pth', flags, 10)
    train_steps(resumed, steps, 3)
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.skipif(torch.cuda.is_available(), reason='some work there')
@pytest.mark.parametrize('name', NOT_HERE)
def test_an_optimizer_that_cannot_work_is_refused_before_training(name):
    fails(lambda: state_of('--opt', name), f'--opt {name}: .*{NOT_HERE[name]}')


def test_counters_in_groups_are_kept_and_hyperparameters_are_not():
    state, flags = state_of('--opt', 'lookahead_lamb', '--lr', '1e-2')
    train_steps(state, 0, 2)
    file = state.state_dict() | {'args': flags, 'classes': None}
    resumed, flags = state_of('--opt', 'lookahead_lamb', '--lr', '1e-2', '--weight-decay', '0.3')
    resume(resumed, file, 'x', flags, 10)
    for group in resumed.optimizer.param_groups:
        assert group['step'] == 2 and group['lookahead_step'] == 2
    assert {group['weight_decay'] for group in resumed.optimizer.param_groups} == {0., 0.3}
    train_steps(resumed, 2, 1)
    assert state.optimizer.param_groups[0]['step'] == 2  # a copy of its own


@pytest.mark.parametrize('count', ['3', None, torch.ones(2), [3], {}])
def test_a_damaged_count_of_steps_is_one_line(count):
    state, flags = state_of('--opt', 'lamb')
    train_steps(state, 0, 1)
    file = state.state_dict() | {'args': flags, 'classes': None}
    file['optimizer']['param_groups'][0]['step'] = count
    fails(lambda: resume(state_of('--opt', 'lamb')[0], file, 'x.pth', flags, 10), 'x.pth: its optimizer state does not')


@pytest.mark.parametrize('data', [3, [], {'codebook': torch.ones(2)}, {'codebook': None}, {1: []}])
def test_damaged_facts_of_data_are_one_line(data, tmp_path):
    torch.save({'model': {}, 'data': data}, tmp_path / 'x.pth')
    fails(lambda: load_checkpoint(str(tmp_path / 'x.pth')), 'x.pth: damaged or not a checkpoint .its data cannot be')
