"""Starting from other weights: what becomes of each tensor, between models of tokens and of pixels."""
import functools
import http.server
import threading

import pytest
import timm
import torch
from torch import nn

import models_seit  # noqa: F401 - its models are timm's then
from training.pretrained import load_pretrained
from utils import InputError


def tiny(**kwargs):
    return timm.create_model('deit_tiny_token_32', **{'depth': 1, **kwargs})


# Small models by kind: the grid of tokens is of 2x2 codes, that of pixels of patches.
SMALL = {'depth': 2, 'embed_dim': 32, 'num_heads': 2}
MODELS = {
    'tokens': lambda side, classes: timm.create_model('deit_tiny_token_32', img_size=2 * side, num_classes=classes,
                                                      **SMALL),
    'pixels': lambda side, classes: timm.create_model('deit_tiny_patch16_224', img_size=8 * side, patch_size=8,
                                                      num_classes=classes, global_pool='avg', **SMALL),
}
NORM = {'tokens': 'norm.', 'pixels': 'fc_norm.'}


def randomize(model, seed):
    """Weights that differ everywhere, so that no two tensors are equal by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    return model


def save(model, path, **more):
    torch.save({'model': model.state_dict(), **more}, path)
    return str(path)


def bicubic(positions, side):
    """Position embeddings (1, 1 + n, d) on a grid of another side, as torch resamples images."""
    before = int((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, (side, side), mode='bicubic', align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize('classes', [5, 3])
@pytest.mark.parametrize('side', [4, 6])
@pytest.mark.parametrize('now', list(MODELS))
@pytest.mark.parametrize('before', list(MODELS))
def test_what_becomes_of_every_tensor(before, now, side, classes, tmp_path, capsys):
    """All four roads; each tensor equals the file's, or its resampling, or what the model had."""
    source = randomize(MODELS[before](4, 5), 1).state_dict()
    path = str(tmp_path / 'weights.pth')
    torch.save({'model': source}, path)
    model = randomize(MODELS[now](side, classes), 2)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    load_pretrained(model, path)
    expected = {}
    for key, value in own.items():
        theirs = key.replace(NORM[now], NORM[before]) if key.startswith(NORM[now]) else key
        new = (before != now and key.startswith('patch_embed.')) or (classes != 5 and key.startswith('head.'))
        expected[key] = value if new else source[theirs]
    expected['pos_embed'] = bicubic(source['pos_embed'], side) if side != 4 else source['pos_embed']
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5 if key == 'pos_embed' else 0)
        assert not torch.equal(expected[key], own[key]) or key.startswith(('patch_embed.', 'head.'))

    stem = ['patch_embed.proj.* (another shape)'] if before != now else []
    scratch = stem + (['head.* (another shape)'] if classes != 5 else [])
    kept = len(own) - 2 * len(scratch) - (side != 4)
    line = f'{path}: {kept} tensors kept'
    line += f' ({NORM[before]}* as {NORM[now]}*)' if before != now else ''
    line += ', pos_embed resampled from 4x4 to 6x6' if side != 4 else ''
    line += f', started from scratch: {", ".join(scratch)}' if scratch else ''
    assert capsys.readouterr().out == line + '\n'


@pytest.mark.parametrize('named, given, kept', [
    (['ant', 'bee', 'cat'], ['ant', 'bee', 'cat'], True), (['ant', 'bee', 'cat'], ['ant', 'bee', 'dog'], False),
    (['ant', 'bee', 'cat'], None, True), (None, ['ant', 'bee', 'dog'], True)])
def test_a_head_of_other_classes_starts_from_scratch(named, given, kept, tmp_path, capsys):
    """As many classes are not the same classes, where their names are known."""
    source = randomize(MODELS['tokens'](4, 3), 1)
    path = save(source, tmp_path / 'w.pth', classes=named)
    model = randomize(MODELS['tokens'](4, 3), 2)
    own = model.head.weight.clone()
    load_pretrained(model, path, given)
    assert torch.equal(model.head.weight, source.head.weight if kept else own)
    assert torch.equal(model.head.bias, source.head.bias) == kept
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)
    assert ('head.* (other classes)' in capsys.readouterr().out) == (not kept)


def test_a_model_without_a_class_token(tmp_path, capsys):
    """Its position is cut, or starts from scratch; the patches' are kept."""
    def bare():
        return timm.create_model('deit_tiny_patch16_224', img_size=32, patch_size=8, num_classes=3, class_token=False,
                                 global_pool='avg', **SMALL)

    tokens = randomize(MODELS['tokens'](4, 3), 1)
    model = randomize(bare(), 2)
    load_pretrained(model, save(tokens, tmp_path / 'w.pth'))
    assert torch.equal(model.pos_embed, tokens.pos_embed[:, 1:])
    output = capsys.readouterr().out
    assert 'pos_embed cut to 0 of its 1 prefix tokens' in output and 'left out: cls_token' in output
    back = randomize(MODELS['tokens'](4, 3), 3)
    own = back.cls_token.clone(), back.pos_embed[:, :1].clone()
    load_pretrained(back, save(model, tmp_path / 'bare.pth'))
    assert torch.equal(back.cls_token, own[0]) and torch.equal(back.pos_embed[:, :1], own[1])
    assert torch.equal(back.pos_embed[:, 1:], tokens.pos_embed[:, 1:])
    output = capsys.readouterr().out
    assert 'pos_embed from scratch for 1 of 1 prefix tokens' in output and 'cls_token (not in the file)' in output


def with_tokens(kind, side, **kwargs):
    """A small model of tokens or of pixels with some prefix tokens, and `side` patches on a side."""
    if kind == 'tokens':
        return timm.create_model('deit_tiny_token_32', img_size=2 * side, num_classes=3, **SMALL, **kwargs)
    return timm.create_model('vit_tiny_patch16_224', img_size=8 * side, patch_size=8, num_classes=3, global_pool='avg',
                             **SMALL, **kwargs)


# arguments of timm's ViT, and the tokens whose positions come first
PREFIXES = [({'reg_tokens': 4}, 5), ({'reg_tokens': 5, 'class_token': False}, 5), ({'reg_tokens': 8}, 9),
            ({'reg_tokens': 4, 'no_embed_class': True}, 0), ({'no_embed_class': True}, 0)]


@pytest.mark.parametrize('kwargs, prefix', PREFIXES)
@pytest.mark.parametrize('old, new', [(4, 2), (2, 4), (3, 2), (3, 3)])
@pytest.mark.parametrize('before, now', [('tokens', 'tokens'), ('tokens', 'pixels'), ('pixels', 'tokens')])
def test_any_number_of_prefix_tokens(kwargs, prefix, old, new, before, now, tmp_path, capsys):
    """2x2 patches and 5 tokens are as many positions as 3x3 patches alone."""
    source = randomize(with_tokens(before, old, **kwargs), 1)
    model = randomize(with_tokens(now, new, **kwargs), 2)
    load_pretrained(model, save(source, tmp_path / 'w.pth'))
    assert torch.equal(model.pos_embed[:, :prefix], source.pos_embed[:, :prefix])
    padded = torch.cat([source.pos_embed[:, :1], source.pos_embed[:, prefix:]], 1)  # bicubic has one token in front
    expected = bicubic(padded, new)[:, 1:] if old != new else source.pos_embed[:, prefix:]
    torch.testing.assert_close(model.pos_embed[:, prefix:], expected)
    for name in ('cls_token', 'reg_token'):
        if getattr(model, name) is not None:
            assert torch.equal(getattr(model, name), getattr(source, name))
    output = capsys.readouterr().out
    assert (f'pos_embed resampled from {old}x{old} to {new}x{new}' in output) == (old != new)
    assert 'prefix tokens' not in output and 'left out' not in output and '_token (' not in output


@pytest.mark.parametrize('before, now, kept, said', [
    # file, model -> which of the file's positions the model's prefix tokens get (None: their own), and what is printed
    ({'reg_tokens': 4}, {}, [0], ['cut to 1 of its 5 prefix tokens', 'left out: reg_token']),
    ({}, {'reg_tokens': 2}, [0, None, None], ['from scratch for 2 of 3 prefix', 'reg_token (not in the file)']),
    ({'reg_tokens': 4}, {'reg_tokens': 1}, [0, None],
     ['cut to 1 of its 5', 'from scratch for 1 of 2 prefix tokens', 'reg_token (another shape)']),
    ({'reg_tokens': 4, 'class_token': False}, {'reg_tokens': 4}, [None, 0, 1, 2, 3],
     ['from scratch for 1 of 5 prefix tokens', 'cls_token (not in the file)']),
    ({'reg_tokens': 1, 'class_token': False}, {}, [None],
     ['cut to 0 of its 1 prefix tokens and from scratch for 1 of 1', 'left out: reg_token']),
    ({'reg_tokens': 4}, {'reg_tokens': 4, 'no_embed_class': True}, [], ['cut to 0 of its 5 prefix tokens'])])
def test_other_prefix_tokens(before, now, kept, said, tmp_path, capsys):
    source = randomize(with_tokens('tokens', 4, **before), 1)
    model = randomize(with_tokens('pixels', 4, **now), 2)
    own = model.pos_embed.clone()
    load_pretrained(model, save(source, tmp_path / 'w.pth', args={'model_kwargs': before}))
    for place, row in enumerate(kept):
        expected = own[:, place] if row is None else source.pos_embed[:, row]
        assert torch.equal(model.pos_embed[:, place], expected)
    assert model.pos_embed.shape[1] == len(kept) + 16
    assert torch.equal(model.pos_embed[:, len(kept):], source.pos_embed[:, -16:])
    output = capsys.readouterr().out
    assert all(text in output for text in said), output


def test_as_many_prefix_tokens_of_another_kind(tmp_path, capsys):
    """A distillation token is no register, though the positions are as many."""
    source = randomize(timm.create_model('deit_tiny_distilled_patch16_224', img_size=32, patch_size=8, num_classes=3,
                                         **SMALL), 1)
    model = randomize(with_tokens('tokens', 4, reg_tokens=1), 2)
    own = model.pos_embed.clone()
    load_pretrained(model, save(source, tmp_path / 'w.pth'))
    assert torch.equal(model.pos_embed[:, [0, *range(2, 18)]], source.pos_embed[:, [0, *range(2, 18)]])
    assert torch.equal(model.pos_embed[:, 1], own[:, 1])
    output = capsys.readouterr().out
    assert 'cut to 1 of its 2 prefix tokens and from scratch for 1 of 2' in output and 'left out: dist_token' in output


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
        load_pretrained(other, f'{address}/w.pth')
        assert torch.equal(other.head.weight, model.head.weight)
        with pytest.raises(InputError, match='gone.pth: cannot be fetched'):
            load_pretrained(other, f'{address}/gone.pth')
        server.shutdown()


def test_a_file_without_a_head_and_one_of_another_depth(tmp_path, capsys):
    old = tiny(num_classes=5, img_size=28)
    torch.save({'model': old.state_dict()}, tmp_path / 'old.pth')
    torch.save({'model': {k: v for k, v in old.state_dict().items() if 'head' not in k}}, tmp_path / 'headless.pth')
    load_pretrained(old, str(tmp_path / 'headless.pth'))
    assert 'started from scratch: head.* (not in the file)' in capsys.readouterr().out
    with pytest.raises(InputError, match='blocks.1.norm1.weight: missing'):
        load_pretrained(tiny(depth=2), str(tmp_path / 'old.pth'))


@pytest.mark.parametrize('prefix, said', [
    (2, 'pos_embed cut to 1 of its 2 prefix tokens'), (0, 'pos_embed from scratch for 1 of 1 prefix tokens')])
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
    load_pretrained(model, str(tmp_path / 'w.pth'))
    output = capsys.readouterr().out
    assert said in output and (
        'left out: dist_token, head_dist.weight, head_dist.bias' in output) == (prefix == 2)
    assert torch.equal(model.pos_embed[:, 1:], positions[:, prefix:])
    assert torch.equal(model.pos_embed[:, 0], positions[:, 0] if prefix else own)


@pytest.mark.parametrize('shape', [(1, 200, 192), (1, 197, 100), (197, 192), (1, 0, 192)])
def test_finetune_from_positions_of_no_square_is_one_line(shape, tmp_path):
    torch.save({'model': {**tiny().state_dict(), 'pos_embed': torch.zeros(shape)}}, tmp_path / 'w.pth')
    with pytest.raises(InputError, match='w.pth: position embeddings of shape'):
        load_pretrained(tiny(), str(tmp_path / 'w.pth'))
