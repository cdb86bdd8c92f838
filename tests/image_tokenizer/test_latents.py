"""Codes of tiny autoencoders: the published layout, against a plain reference, and fitting in small."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tokenize_images
from helpers import call, fails, open_codes, smooth_images
from image_tokenizer.latents import LatentTokenizer
from image_tokenizer.tokenizers import decode_codes, encode_images, load_tokenizer
from scripts import fit_latent_tokenizer
from token_files.codebook import load_codebook

WIDTH, DIM = 8, 6


def weights(half, dim=DIM, pooled=True, seed=0):
    """A state dict in the published names, with random values."""
    g = torch.Generator().manual_seed(seed)
    state = {}

    def put(name, *shape):
        state[name] = torch.randn(*shape, generator=g) / max(1, np.prod(shape[1:])) ** 0.5

    def block(i, pool):
        for j in (0, 2, 4):
            put(f'{i}.conv.{j}.weight', WIDTH, WIDTH, 3, 3)
            put(f'{i}.conv.{j}.bias', WIDTH)
        if pool:
            put(f'{i}.pool.0.weight', 4 * WIDTH, WIDTH, 1, 1)
            put(f'{i}.pool.1.weight', 4 * WIDTH)
            put(f'{i}.pool.1.bias', 4 * WIDTH)
            put(f'{i}.pool.3.weight', WIDTH, 4 * WIDTH, 1, 1)

    def conv(i, out, inner, bias):
        put(f'{i}.weight', out, inner, 3, 3)
        if bias:
            put(f'{i}.bias', out)
    if half == 'encoder':
        conv(0, WIDTH, 3, True)
        block(1, False)
        for at in (2, 6, 10):
            conv(at, WIDTH, WIDTH, False)
            for i in (1, 2, 3):
                block(at + i, pooled and at == 10)
        conv(14, dim, WIDTH, True)
    else:
        conv(1, WIDTH, dim, True)
        for at in (3, 8, 13):
            for i in range(3):
                block(at + i, pooled and at == 3)
            conv(at + 4, WIDTH, WIDTH, False)
        block(18, False)
        conv(19, 3, WIDTH, True)
    return state


def reference(state, x, half):
    """What the published network computes, layer by layer, written from its description."""
    def conv(i, x, stride=1):
        return F.conv2d(x, state[f'{i}.weight'], state.get(f'{i}.bias'), stride=stride, padding=1)

    def block(i, x):
        if f'{i}.pool.0.weight' in state:
            y = F.conv2d(x, state[f'{i}.pool.0.weight'])
            y = F.relu(F.group_norm(y, 4, state[f'{i}.pool.1.weight'], state[f'{i}.pool.1.bias']))
            x = x + F.conv2d(y, state[f'{i}.pool.3.weight'])
        y = F.relu(conv(f'{i}.conv.0', x))
        return F.relu(x + conv(f'{i}.conv.4', F.relu(conv(f'{i}.conv.2', y))))
    if half == 'encoder':
        x = block(1, conv(0, x))
        for at in (2, 6, 10):
            x = conv(at, x, 2)
            for i in (1, 2, 3):
                x = block(at + i, x)
        return conv(14, x)
    x = F.relu(conv(1, 3 * torch.tanh(x / 3)))
    for at in (3, 8, 13):
        for i in range(3):
            x = block(at + i, x)
        x = conv(at + 4, F.interpolate(x, scale_factor=2.))
    return conv(19, block(18, x))


def whole(pooled=True, codes=9):
    state = {f'{half}.{name}': value for half in ('encoder', 'decoder')
             for name, value in weights(half, pooled=pooled).items()}
    return state | {'centers': torch.randn(codes, DIM, generator=torch.Generator().manual_seed(1)) / 10}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('autoencoder')
    for half in ('encoder', 'decoder'):
        torch.save({name: value.half() for name, value in weights(half).items()}, folder / f'{half}.pth')
    smooth_images(folder / 'images', per_class=4)
    return folder


def fit(files, output, *more):
    return call(fit_latent_tokenizer, '--encoder', files / 'encoder.pth', '--decoder', files / 'decoder.pth',
                '--data-path', files / 'images', '--output-dir', output, '--image-size', 40, '--codes', 12,
                '--num-workers', 0, *more)


@pytest.mark.parametrize('pooled', [True, False])
def test_codes_and_pictures_are_those_of_the_published_layers(pooled):
    state = whole(pooled)
    tokenizer = LatentTokenizer.from_state_dict(state)
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    latents = reference({k[8:]: v for k, v in state.items() if k.startswith('encoder.')}, images, 'encoder')
    rows = latents.permute(0, 2, 3, 1).flatten(1, 2)
    expected = torch.cdist(rows, state['centers'].expand(2, -1, -1)).argmin(-1)
    assert torch.equal(tokenizer.codes(images), expected) and expected.shape == (2, 9)
    pictures = tokenizer.decode(tokenizer.codebook[expected])
    grid = state['centers'][expected].view(2, 3, 3, DIM).permute(0, 3, 1, 2)
    decoder = {k[8:]: v for k, v in state.items() if k.startswith('decoder.')}
    torch.testing.assert_close(pictures, reference(decoder, grid, 'decoder'), atol=1e-4, rtol=1e-4)
    rows = tokenizer.codebook[:, :DIM]
    assert (rows - rows.mean(0)).square().mean().sqrt() == pytest.approx(1, abs=1e-4)


def test_a_fitted_tokenizer_tokenizes(files, tmp_path, capsys):
    fit(files, tmp_path)
    assert '12 images, 300 latents; 12 codes of ' in capsys.readouterr().out
    fit(files, tmp_path / 'again')
    for name in ('tokenizer.pt', 'codebook.ckpt'):
        assert (tmp_path / name).read_bytes() == (tmp_path / 'again' / name).read_bytes()
    call(tokenize_images, '--data-path', files / 'images', '--name', 'my', '--output-dir', tmp_path, '--image-size', 40,
         '--tokenizer-path', tmp_path / 'tokenizer.pt', '--codebook-path', tmp_path / 'codebook.ckpt',
         '--num-workers', 0, '--device', 'cpu')
    assert 'k-means of a tiny autoencoder' in (tmp_path / 'my-token.json').read_text()
    codes = open_codes(tmp_path / 'my-token.data.bin.gz', 'none')
    assert codes.shape == (12, 25) and len(np.unique(codes)) > 3
    tokenizer, codebook = load_tokenizer(tmp_path / 'tokenizer.pt'), load_codebook(tmp_path / 'codebook.ckpt')
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    _, found = encode_images(tokenizer, codebook, pixels)
    assert decode_codes(tokenizer, codebook, found).shape == (2, 3, 40, 40)


def test_both_halves_in_one_file_and_no_decoder(files, tmp_path):
    torch.save({f'encoder.layers.{name}': value for name, value in weights('encoder').items()}
               | {f'decoder.layers.{name}': value for name, value in weights('decoder').items()}, tmp_path / 'both.pth')
    fit(files, tmp_path / 'two')
    words = ['--data-path', files / 'images', '--image-size', 40, '--codes', 12, '--num-workers', 0]
    call(fit_latent_tokenizer, '--encoder', tmp_path / 'both.pth', '--decoder', tmp_path / 'both.pth', '--output-dir',
         tmp_path / 'one', *words)
    call(fit_latent_tokenizer, '--encoder', files / 'encoder.pth', '--output-dir', tmp_path / 'blind', *words)
    tokenizer, codebook = load_tokenizer(tmp_path / 'blind' / 'tokenizer.pt'), load_codebook(tmp_path / 'blind' /
                                                                                             'codebook.ckpt')
    assert decode_codes(tokenizer, codebook, torch.zeros(1, 4, dtype=torch.int64)) is None
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(tokenizer.codes(images), load_tokenizer(tmp_path / 'two' / 'tokenizer.pt').codes(images))


def test_what_is_no_autoencoder_is_refused_in_one_line(files, tmp_path):
    fails(lambda: fit(files, tmp_path, '--image-size', 42), '--image-size 42')
    fails(lambda: fit(files, tmp_path, '--codes', 2000), '300 latents are too few for 2000 codes')
    fails(lambda: fit(files, tmp_path, '--encoder', files / 'decoder.pth'), 'no encoder of the TAESD family')
    broken = weights('encoder')
    del broken['7.conv.2.weight']
    torch.save(broken, tmp_path / 'broken.pth')
    fails(lambda: fit(files, tmp_path, '--encoder', tmp_path / 'broken.pth'), 'encoder.7.conv.2.weight is missing')
    torch.save({'0.weight': torch.zeros(8, 3, 3, 3)}, tmp_path / 'short.pth')
    fails(lambda: fit(files, tmp_path, '--encoder', tmp_path / 'short.pth'), 'short.pth')
    torch.save(weights('encoder') | {'14.weight': torch.tensor(1.)}, tmp_path / 'flat.pth')
    fails(lambda: fit(files, tmp_path, '--encoder', tmp_path / 'flat.pth'), 'flat.pth and .*encoder.14.weight')
    assert not (tmp_path / 'tokenizer.pt').exists()
    fit(files, tmp_path / 'there')
    fails(lambda: fit(files, tmp_path / 'there'), 'tokenizer.pt: is there')
