"""VQGANs of each family against a plain reference over the names of their files; and what is refused."""
import re

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from helpers import fails
from image_tokenizer import tokenizers, vqgan
from image_tokenizer.tokenizers import (check_codes, compile_tokenizer, decode_codes, encode_images, find_codes,
                                        load_tokenizer, unit_range)
from image_tokenizer.vqgan import VQGAN, largest_products
from small_vqgans import CODES, DIM, FAMILIES, SIDE, small_state
from token_files.codebook import load_codebook

pytestmark = pytest.mark.usefixtures('one_thread')
KINDS = {'taming': 'taming or latent diffusion', 'ldm': 'taming or latent diffusion', 'llamagen': 'LlamaGen or Janus',
         'janus': 'LlamaGen or Janus', 'ibq': 'IBQ', 'maskgit': 'MaskGIT', 'gumbel': 'Gumbel'}


def pixels(count=3, size=16):
    generator = torch.Generator().manual_seed(5)
    smooth = F.interpolate(torch.rand(count, 3, 4, 4, generator=generator), (size, size), mode='bilinear')
    return (255 * smooth).to(torch.uint8)


# ---------------------------------------------------------------- a plain reference

def conv(state, name, x, stride=1, padding=None):
    weight = state[f'{name}.weight']
    padding = weight.shape[-1] // 2 if padding is None else padding
    return F.conv2d(x, weight, state.get(f'{name}.bias'), stride, padding)


def norm(state, name, x):
    b, c, h, w = x.shape
    groups = x.reshape(b, 32, -1)
    groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
    return groups.reshape(x.shape) * state[f'{name}.weight'].view(-1, 1, 1) + state[f'{name}.bias'].view(-1, 1, 1)


def swish(x):
    return x * torch.sigmoid(x)


def residual(state, name, x, maskgit):
    h = conv(state, f'{name}.conv1', swish(norm(state, f'{name}.norm1', x)))
    h = conv(state, f'{name}.conv2', swish(norm(state, f'{name}.norm2', h)))
    if f'{name}.nin_shortcut.weight' in state:
        x = conv(state, f'{name}.nin_shortcut', h if maskgit else x)
    return x + h


def attention(state, name, x):
    b, c, h, w = x.shape
    y = norm(state, f'{name}.norm', x)
    q, k, v = (conv(state, f'{name}.{layer}', y).view(b, c, -1) for layer in 'qkv')
    weights = (torch.einsum('bci,bcj->bij', q, k) * c ** -0.5).softmax(2)
    return x + conv(state, f'{name}.proj_out', torch.einsum('bij,bcj->bci', weights, v).reshape(b, c, h, w))


def numbers(state, pattern):
    return sorted({int(match[1]) for match in map(re.compile(pattern).match, state) if match})


def mid(state, half, x, maskgit):
    if maskgit:
        names = [f'{half}.mid.{i}' for i in numbers(state, rf'{half}\.mid\.(\d+)\.')]
    elif f'{half}.mid.0.norm1.weight' in state:
        names = [f'{half}.mid.0', f'{half}.mid.1', f'{half}.mid.2']
    else:
        names = [f'{half}.mid.block_1', f'{half}.mid.attn_1', f'{half}.mid.block_2']
    for name in names:
        attends = f'{name}.q.weight' in state
        x = attention(state, name, x) if attends else residual(state, name, x, maskgit)
    return x


def level(state, name, x, maskgit):
    block = f'{name}.res' if f'{name}.res.0.norm1.weight' in state else f'{name}.block'
    for j in numbers(state, rf'{re.escape(block)}\.(\d+)\.'):
        x = residual(state, f'{block}.{j}', x, maskgit)
        if f'{name}.attn.{j}.q.weight' in state:
            x = attention(state, f'{name}.attn.{j}', x)
    return x


def reference_codes(state, family, images):
    """Images (B, 3, H, W) in [0, 1] -> codes (B, n), by distances in float64."""
    maskgit = family == 'maskgit'
    x = images if maskgit else 2 * images - 1
    x = conv(state, 'encoder.conv_in', x)
    down = 'conv_blocks' if family in ('llamagen', 'janus') else 'down'
    levels = numbers(state, rf'encoder\.{down}\.(\d+)\.')
    for i in levels:
        x = level(state, f'encoder.{down}.{i}', x, maskgit)
        if i < levels[-1]:
            x = F.avg_pool2d(x, 2) if maskgit else conv(
                state, f'encoder.{down}.{i}.downsample.conv', F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    x = conv(state, 'encoder.conv_out', swish(norm(state, 'encoder.norm_out', mid(state, 'encoder', x, maskgit))))
    x = x if maskgit else conv(state, 'quant_conv', x)
    if family == 'gumbel':
        return conv(state, 'quantize.proj', x).argmax(1).flatten(1)
    rows = state['quantize.embedding.weight'].double()
    features = x.flatten(2).transpose(1, 2).double()
    if family == 'ibq':
        return (features @ rows.T).argmax(-1)
    if family in ('llamagen', 'janus'):
        features, rows = F.normalize(features, dim=-1), F.normalize(rows, dim=-1)
    return (features[:, :, None] - rows).square().sum(-1).argmin(-1)


def reference_images(state, family, codes):
    """Codes (B, n) -> images in [0, 1]."""
    maskgit = family == 'maskgit'
    llamagen = family in ('llamagen', 'janus')
    rows = state['quantize.embed.weight' if family == 'gumbel' else 'quantize.embedding.weight']
    x = (F.normalize(rows, dim=-1) if llamagen else rows)[codes].transpose(1, 2)
    x = x.reshape(*x.shape[:2], int(codes.shape[1] ** 0.5), -1)
    x = conv(state, 'decoder.conv_in', x if maskgit else conv(state, 'post_quant_conv', x))
    x = mid(state, 'decoder', x, maskgit)
    names = [f'decoder.conv_blocks.{i}' for i in numbers(state, r'decoder\.conv_blocks\.(\d+)\.')] if llamagen else \
        [f'decoder.up.{i}' for i in reversed(numbers(state, r'decoder\.up\.(\d+)\.'))]
    for name in names:
        x = level(state, name, x, maskgit)
        if name != names[-1]:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(state, f'{name}.upsample_conv' if maskgit else f'{name}.upsample.conv', x)
    x = conv(state, 'decoder.conv_out', swish(norm(state, 'decoder.norm_out', x)))
    return (x if maskgit else (x + 1) / 2).clamp(0, 1)


# ---------------------------------------------------------------- the same codes and images

@pytest.mark.parametrize('family', FAMILIES)
def test_codes_and_images_are_those_of_the_reference(family, tmp_path):
    state = small_state(family)
    path = tmp_path / ('a.safetensors' if family == 'janus' else 'a.ckpt')
    if family == 'janus':  # within a model of more
        safetensors.torch.save_file({f'gen_vision_model.{key}': value for key, value in state.items()}
                                    | {'language_model.norm.weight': torch.ones(3)}, path)
    elif family == 'llamagen':
        torch.save({'model': state, 'steps': 5, 'optimizer': {}}, path)
    elif family == 'maskgit':
        torch.save(state, path)
    else:  # Lightning
        torch.save({'state_dict': state | {'loss.discriminator.main.0.weight': torch.zeros(2)}, 'epoch': 3}, path)
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, VQGAN) and KINDS[family] in tokenizer.kind and tokenizer.patch_size == SIDE
    codebook = tokenizer.codebook
    assert ((codebook - codebook.mean(0)).square().mean().sqrt() - 1).abs() < 1e-4
    images = pixels()
    features, codes = encode_images(tokenizer, codebook, images)
    expected = reference_codes(state, family, unit_range(images))
    assert features is None and codes.dtype == torch.int64 and codes.shape == (3, (16 // SIDE) ** 2)
    assert torch.equal(codes, expected) and len(codes.unique()) > 3  # no single code that would be right by chance
    made = decode_codes(tokenizer, codebook, codes)
    torch.testing.assert_close(made, reference_images(state, family, codes), atol=1e-4, rtol=1e-4)
    assert made.std() > 0.01


@pytest.mark.parametrize('ending', ['.ckpt', '.safetensors'])
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('rows', ['', 'averaged', 'of one direction', 'with a zero row'])
def test_the_file_as_codebook_gives_the_rows_of_the_tokenizer(rows, family, ending, tmp_path):
    """--codebook-path and --tokenizer-path of one file: equal bit by bit, since manifests state a SHA-256 of rows."""
    state = small_state(family)
    table = 'quantize.embed.weight' if family == 'gumbel' else 'quantize.embedding.weight'
    if rows == 'averaged':
        state |= {f'model_ema.{key.replace(".", "")}': value for key, value in small_state(family, 1).items()}
    elif rows:
        state[table][3] = 2 * state[table][7] if rows == 'of one direction' else 0.
    if family in ('janus', 'ldm'):
        state = {f'some.{key}': value for key, value in state.items()}
    path = tmp_path / f'a{ending}'
    if ending == '.safetensors':
        safetensors.torch.save_file(state, path)
    else:
        torch.save({'model' if family == 'llamagen' else 'state_dict': state}, path)
    tokenizer, codebook = load_tokenizer(path), load_codebook(path)
    assert torch.equal(tokenizer.codebook, codebook)
    check_codes(tokenizer, codebook, path)
    # unit rows of one direction are equal, and no constant keeps them apart
    more = rows == 'with a zero row' or (rows == 'of one direction' and family not in ('llamagen', 'janus'))
    assert codebook.shape[1] == tokenizer.embed_dim == tokenizer.rows().shape[1] + more
    _, codes = encode_images(tokenizer, codebook, pixels())
    plain = small_state(family, 1) if rows == 'averaged' else {k.removeprefix('some.'): v for k, v in state.items()}
    assert torch.equal(codes, reference_codes(plain, family, unit_range(pixels())))
    torch.testing.assert_close(decode_codes(tokenizer, codebook, codes), reference_images(plain, family, codes),
                               atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('size', [20, 32])
def test_images_of_other_sizes(size):
    state = small_state('taming')
    tokenizer = VQGAN.from_state_dict(state)
    _, codes = encode_images(tokenizer, tokenizer.codebook, pixels(2, size))
    assert torch.equal(codes, reference_codes(state, 'taming', unit_range(pixels(2, size))))
    fails(lambda: encode_images(tokenizer, tokenizer.codebook, pixels(1, 18)), '18x18 do not divide into patches of 4')


def test_averaged_weights_are_preferred(tmp_path):
    """IBQ's are kept under names without points, beside those of the last step."""
    last, averaged = small_state('ibq', 0), small_state('ibq', 1)
    names = {f'model_ema.{key.replace(".", "")}': value for key, value in averaged.items()}
    extra = {'model_ema.decay': torch.tensor(0.99), 'model_ema.num_updates': torch.tensor(3),
             'loss.discriminator.main.0.weight': torch.zeros(2, 2)}
    torch.save({'state_dict': last | names | extra}, tmp_path / 'a.ckpt')
    tokenizer = load_tokenizer(tmp_path / 'a.ckpt')
    _, codes = encode_images(tokenizer, tokenizer.codebook, pixels())
    assert torch.equal(codes, reference_codes(averaged, 'ibq', unit_range(pixels())))


@pytest.mark.parametrize('missing', ['attention of the last level', 'attention of the middle', 'decoder'])
def test_what_a_file_lacks_is_left_out(missing):
    state = small_state('taming', decoder=missing != 'decoder')
    pattern = {'decoder': '(?!)', 'attention of the middle': r'coder\.mid\.attn_1',
               'attention of the last level': r'\.attn\.'}[missing]
    state = {key: value for key, value in state.items() if not re.search(pattern, key)}
    tokenizer = VQGAN.from_state_dict(state)
    made = decode_codes(tokenizer, tokenizer.codebook, torch.zeros(1, 4, dtype=torch.int64))
    assert (made is None) == (missing == 'decoder')
    if missing != 'attention of the middle':  # the reference has it always
        _, codes = encode_images(tokenizer, tokenizer.codebook, pixels())
        assert torch.equal(codes, reference_codes(state, 'taming', unit_range(pixels())))


def test_other_dtypes_become_float32():
    state = {key: value.bfloat16() for key, value in small_state('taming').items()}
    tokenizer = VQGAN.from_state_dict(state)
    assert {value.dtype for value in tokenizer.state_dict().values()} == {torch.float32}


def test_products_in_parts_are_those_of_all(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features, rows, bias = (torch.randn(size, generator=generator) for size in ((50, 4), (30, 4), (30,)))
    expected = (features @ rows.T + bias).argmax(1)
    monkeypatch.setattr(vqgan, 'PRODUCTS_AT_ONCE', 7 * 30)
    assert torch.equal(largest_products(features, rows, bias), expected)
    assert torch.equal(largest_products(features, rows, None), (features @ rows.T).argmax(1))


# ---------------------------------------------------------------- the interface

def test_features_that_are_not_finite_have_no_code():
    tokenizer = VQGAN.from_state_dict(small_state('taming'))
    images = torch.rand(2, 3, 16, 16)
    images[1] = torch.nan
    _, codes = find_codes(tokenizer, tokenizer.codebook, images)
    assert (codes[0] >= 0).all() and (codes[1] == -1).all()


def test_bf16_and_compiled_codes():
    tokenizer = VQGAN.from_state_dict(small_state('taming'))
    _, codes = encode_images(tokenizer, tokenizer.codebook, pixels())
    _, half = encode_images(tokenizer, tokenizer.codebook, pixels(), 'bf16')
    assert (half == codes).float().mean() > 0.8
    calls = []
    original = tokenizer.codes

    def traced(function):
        calls.append(function)
        return original

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'compile', traced)
        compiled = compile_tokenizer(tokenizer)
    assert len(calls) == 1 and torch.equal(encode_images(compiled, tokenizer.codebook, pixels())[1], codes)


def test_only_the_codebook_of_the_tokenizer_has_its_codes():
    tokenizer = VQGAN.from_state_dict(small_state('taming'))
    check_codes(tokenizer, tokenizer.codebook.clone(), 'own')
    fails(lambda: check_codes(tokenizer, tokenizer.codebook[:-1], 'short'), f'short: 39 codes, .* its own {CODES}')
    fails(lambda: check_codes(tokenizer, tokenizer.codebook.flip(0), 'flipped'), 'flipped: other rows')
    fails(lambda: check_codes(tokenizer, tokenizer.codebook[:, 1:], 'narrow'), f'narrow: rows of 4 .* gives {DIM}')


# ---------------------------------------------------------------- what is refused

def without(state, *names):
    return {key: value for key, value in state.items() if not key.startswith(names)}


@pytest.mark.parametrize('change, said', [
    (lambda state: without(state, 'quantize.'), 'not a VQGAN of taming.*quantize.embedding.weight is missing'),
    (lambda state: without(state, 'quant_conv.bias'), 'not a VQGAN of taming.*quant_conv.bias is missing'),
    (lambda state: without(state, 'encoder.down.1.downsample'), r'down.1.downsample.conv.weight is missing'),
    (lambda state: without(state, 'decoder.up.2.'), '3 levels of the encoder, but 2 of the decoder'),
    (lambda state: state | {'encoder.conv_out.weight': torch.zeros(6, 64, 1, 1)}, r'\(6, 64, 1, 1\), expected'),
    (lambda state: state | {'encoder.conv_in.weight': torch.zeros(32, 4, 3, 3)}, r'\(32, 4, 3, 3\), expected'),
    (lambda state: state | {'quant_conv.weight': torch.zeros(5, 6, 1, 1, dtype=torch.int64)}, 'quant_conv.weight is'),
    (lambda state: state | {'encoder.down.0.block.0.conv1.weight': torch.zeros(33, 32, 3, 3)}, '33 channels, which 32'),
    (lambda state: state | {'encoder.down.0.block.0.conv1.weight': 3.}, 'conv1.weight is missing'),
    (lambda state: state | {'encoder.extra.weight': torch.zeros(2)}, 'encoder.extra.weight is unknown'),
    (lambda state: state | {'quantize.embedding.weight': torch.full((40, 5), torch.nan)}, 'is not finite'),
    (lambda state: state | {'quantize.embedding.weight': torch.zeros(40, 5)}, 'all zero'),
    (lambda state: state | {f'encoder.down.{i}.x': torch.zeros(1) for i in range(99)}, 'more than any VQGAN has'),
    (lambda state: {f'{part}.{key}': value for part in 'ab' for key, value in state.items()}, 'several encoders'),
])
def test_damaged_files_are_one_line(change, said, tmp_path):
    torch.save(change(small_state('taming')), tmp_path / 'bad.ckpt')
    fails(lambda: load_tokenizer(tmp_path / 'bad.ckpt'), 'bad.ckpt: ', said)


def test_other_damage_of_maskgit_is_one_line():
    wide = small_state('maskgit') | {'quantize.embedding.weight': torch.ones(40, 7)}
    fails(lambda: VQGAN.from_state_dict(wide), 'not a VQGAN of MaskGIT: the encoder gives 6 channels, but .* have 7')


@pytest.mark.parametrize('ending', ['ckpt', 'safetensors'])
def test_cut_files_are_one_line(ending, tmp_path):
    state = small_state('llamagen')
    path = tmp_path / f'cut.{ending}'
    if ending == 'ckpt':
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        fails(lambda: load_tokenizer(path), 'cut')


@pytest.mark.parametrize('names, near', [
    (('encoder.mid.block_1.norm1.weight', 'decoder.up.0.block.0.norm1.weight', 'quant_conv.weight'),
     'nearest to a VQGAN of taming or latent diffusion, but without encoder.down'),
    (('decoder.conv_blocks.0.res.0.norm1.weight', 'quantize.embedding.weight'), 'nearest to a VQGAN of LlamaGen'),
    (('decoder.up.1.upsample_conv.weight', 'encoder.mid.0.norm1.weight'), 'nearest to a VQGAN of MaskGIT'),
    (('to_patch_embedding.0.weight', 'quantizer.embedding.weight'), 'nearest to a ViT-VQGAN'),
])
def test_a_file_of_none_is_refused_with_the_nearest(names, near, tmp_path):
    torch.save({name: torch.zeros(2) for name in names}, tmp_path / 'what.ckpt')
    fails(lambda: tokenizers.load_tokenizer(tmp_path / 'what.ckpt'), 'no known kind', near)
