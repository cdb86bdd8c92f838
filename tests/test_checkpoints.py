"""Reading checkpoints, the rule of resuming, and starting from other weights."""
import argparse
import functools
import http.server
import threading

import pytest
import timm
import torch

import checkpoints
import main_seit
import recipe
from helpers import SMALL, accuracy_lines, make_data, mistake, run_here, states
from utils import InputError


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


def state_of(*flags):
    args = main_seit.parse_args(['--amp', 'off', '--model-ema-decay', '0.9', *flags])
    torch.manual_seed(0)
    return recipe.make_state(args, tiny(embed_dim=32, num_heads=2, num_classes=3, img_size=8), torch.device('cpu'),
                             (32, 8, 8)), vars(args)


def saved(state, flags):
    """A checkpoint of `state` after one step of the optimizer."""
    state.train_model(torch.randn(2, 32, 8, 8)).sum().backward()
    state.optimizer.step()
    return state.state_dict() | {'args': flags}


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
    checkpoints.load_pretrained(model, str(tmp_path / 'wrapped.pth'))


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
    checkpoints.resume(other, checkpoint, 'c.pth', flags)
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
    checkpoints.resume(again, checkpoint, 'c.pth', {**flags, 'resume': 'auto', 'output_dir': 'elsewhere'})
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
    checkpoints.resume(other, checkpoint, 'c.pth', flags)
    assert all(group['fused'] for group in other.optimizer.param_groups)
    other.train_model(torch.randn(2, 32, 8, 8)).sum().backward()
    other.scaler.scale(other.train_model(torch.randn(2, 32, 8, 8)).sum()).backward()
    other.scaler.step(other.optimizer)


@pytest.mark.parametrize('damage', [
    lambda c: c['optimizer'].pop('state'), lambda c: c['optimizer']['param_groups'].pop(),
    lambda c: c['optimizer']['param_groups'][0]['params'].pop(), lambda c: c['optimizer'].update(param_groups=3)])
def test_an_optimizer_state_that_does_not_fit_is_one_line(damage):
    state, flags = state_of()
    checkpoint = saved(state, flags)
    damage(checkpoint)
    with pytest.raises(InputError, match='c.pth: its optimizer state does not fit'):
        checkpoints.resume(state_of()[0], checkpoint, 'c.pth', flags)


@pytest.mark.parametrize('flag, value', [('seed', 1), ('batch_size', 4), ('accum_iter', 2), ('repeated_aug', True)])
def test_flags_that_change_the_run_are_refused_or_allowed_with_a_warning(flag, value, capsys):
    state, flags = state_of()
    checkpoint = saved(state, flags)
    with pytest.raises(InputError, match='--allow-inexact-resume'):
        checkpoints.resume(state, checkpoint, 'c.pth', {**flags, flag: value})
    checkpoints.resume(state, checkpoint, 'c.pth', {**flags, flag: value, 'allow_inexact_resume': True})
    assert 'no longer those of the uninterrupted run' in capsys.readouterr().out


def test_another_optimizer_and_weights_alone_are_refused(trained, data, tmp_path):
    state, flags = state_of()
    checkpoint = saved(state, flags)
    with pytest.raises(InputError, match='was written with --opt adamw, not sgd'):
        checkpoints.resume(state, checkpoint, 'c.pth', {**flags, 'opt': 'sgd'})
    torch.save({'model': states(trained / 'checkpoint.pth')['model']}, tmp_path / 'weights.pth')
    assert '--finetune' in mistake(*SMALL, *data, '--epochs', 1, '--resume', tmp_path / 'weights.pth')


def test_weights_that_do_not_fit_are_named(trained, data):
    line = mistake(*SMALL, *data, '--model-kwargs', 'depth=2', 'embed_dim=32', 'num_heads=2', '--eval', '--resume',
                   trained / 'checkpoint.pth')
    assert 'checkpoint.pth: does not fit' in line and 'blocks.1.norm1.weight: missing' in line


# ---------------------------------------------------------------- other weights

def test_finetune_from_an_address(tmp_path):
    """A local server stands for the web."""
    model = tiny()
    torch.save({'model': model.state_dict()}, tmp_path / 'w.pth')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *a: None
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        other = tiny()
        checkpoints.load_pretrained(other, f'{address}/w.pth')
        assert torch.equal(other.head.weight, model.head.weight)
        with pytest.raises(InputError, match='gone.pth: cannot be fetched'):
            checkpoints.load_pretrained(other, f'{address}/gone.pth')
        server.shutdown()


def test_finetune_resamples_positions_and_drops_what_differs(tmp_path, capsys):
    old = tiny(num_classes=5, img_size=28)
    torch.save({'model': old.state_dict()}, tmp_path / 'old.pth')
    new = tiny(num_classes=3, img_size=20)
    head = new.head.weight.clone()
    checkpoints.load_pretrained(new, str(tmp_path / 'old.pth'))
    assert torch.equal(new.head.weight, head)
    assert torch.equal(new.blocks[0].mlp.fc1.weight, old.blocks[0].mlp.fc1.weight)
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])
    grid = old.pos_embed[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    slow = torch.nn.functional.interpolate(grid, (10, 10), mode='bicubic', align_corners=False)
    torch.testing.assert_close(new.pos_embed[:, 1:], slow.flatten(2).transpose(1, 2))
    torch.save({'model': {k: v for k, v in old.state_dict().items() if 'head' not in k}}, tmp_path / 'headless.pth')
    checkpoints.load_pretrained(old, str(tmp_path / 'headless.pth'))
    assert '--finetune: head.weight starts from scratch (in the file: none)' in capsys.readouterr().out
    with pytest.raises(InputError, match='blocks.1.norm1.weight: missing'):
        checkpoints.load_pretrained(tiny(depth=2), str(tmp_path / 'old.pth'))


@pytest.mark.parametrize('prefix, said', [(2, 'the first is taken'), (0, "the class token's starts from scratch")])
def test_finetune_from_two_prefix_tokens_or_none(prefix, said, tmp_path, capsys):
    model = tiny()
    weights = dict(model.state_dict())
    positions = torch.randn(1, prefix + 196, 192)
    weights['pos_embed'] = positions
    if prefix == 2:
        weights |= {'dist_token': torch.zeros(1, 1, 192), 'head_dist.weight': torch.zeros(1000, 192),
                    'head_dist.bias': torch.zeros(1000)}
    torch.save({'model': weights}, tmp_path / 'w.pth')
    own = model.pos_embed[:, 0].clone()
    checkpoints.load_pretrained(model, str(tmp_path / 'w.pth'))
    output = capsys.readouterr().out
    assert said in output and ('dist_token is left out' in output) == (prefix == 2)
    assert torch.equal(model.pos_embed[:, 1:], positions[:, prefix:])
    assert torch.equal(model.pos_embed[:, 0], positions[:, 0] if prefix else own)


@pytest.mark.parametrize('shape', [(1, 200, 192), (1, 197, 100), (197, 192), (1, 0, 192)])
def test_finetune_from_positions_of_no_square_is_one_line(shape, tmp_path):
    torch.save({'model': {**tiny().state_dict(), 'pos_embed': torch.zeros(shape)}}, tmp_path / 'w.pth')
    with pytest.raises(InputError, match='w.pth: position embeddings of shape'):
        checkpoints.load_pretrained(tiny(), str(tmp_path / 'w.pth'))
