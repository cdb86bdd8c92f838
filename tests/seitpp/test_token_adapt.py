"""TokenAdapt against the published outputs: networks, files, geometry; and what bad files get."""
import math

import numpy as np
import pytest
import torch

from helpers import fails, token_adapt_state
from image_tokenizer.vitvqgan import Size
from masked import NAMES, geometry_of
from seitpp import token_adapt as ta
from token_augment import RandomResizedCrop
from token_files.codebook import nearest_codes_of

CODES = torch.randn(391, 32, generator=torch.Generator().manual_seed(5))


def rng(k):
    return np.random.default_rng(k)


def normal(k, shape):
    return torch.from_numpy(rng(k).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope='module')
def published(golden, tmp_path_factory):
    """A file as the released tokenadapt.ckpt, with golden weights."""
    path = tmp_path_factory.mktemp('published') / 'tokenadapt.ckpt'
    torch.save(token_adapt_state(golden('seitpp/state_dict_shapes.json')[NAMES]), path)
    return path


@pytest.fixture(scope='module')
def model(published):
    return ta.load_token_adapt(published, CODES)


# ---------------------------------------------------------------- networks and the file

def test_names_shapes_and_size_are_the_published_ones(golden):
    shapes = golden('seitpp/state_dict_shapes.json')
    state = ta.TokenAdapt(391, 32).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == shapes[NAMES]
    assert sum(value.numel() for value in state.values()) == shapes['parameters']['tokenadapt']


def test_position_tables_are_the_published_ones(golden):
    z = golden('seitpp/pos_embed.npz')
    state = ta.TokenAdapt(391, 32).state_dict()
    for name, key in (('conversion_function.1.de_pos_embedding', 'ta_384_32'),
                      ('reverse_transform.0.en_pos_embedding', 'ta_384_28')):
        np.testing.assert_allclose(state[name][0, ::39], z[key], atol=5e-6)


@torch.no_grad()
def test_conversion_and_inversion_are_the_published_ones(golden, model):
    z = golden('seitpp/tokenadapt.npz')
    converted = model.convert(normal(160, (2, 32, 32, 32)))
    assert converted.shape == (2, 32, 64, 64)
    np.testing.assert_allclose(converted[:, :, ::4, ::4], z['conversion_every4'], atol=1e-4)
    np.testing.assert_allclose(converted[:, ::8, 20:28, 20:28], z['conversion_block'], atol=1e-4)
    np.testing.assert_allclose([converted.mean(), converted.std()], z['conversion_mean_std'], atol=1e-4)
    cropped = normal(161, (2, 32, 56, 56))
    logits = model.invert(cropped).flatten(2).transpose(1, 2)  # (2, 784, 391)
    np.testing.assert_allclose(logits[:, ::56], z['inversion_logits_every56'], atol=1e-4)
    sure = z['inversion_margins'].reshape(2, 28, 28) > 1e-4
    assert sure.mean() > 0.9
    assert np.array_equal(model.to_codes(cropped).numpy()[sure], z['inversion_codes'][sure])


def test_the_published_file_loads_frozen_and_half_precision_too(published, model, tmp_path):
    state = torch.load(published, weights_only=True)
    assert len(state) == 36 and not any(value.requires_grad for value in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / 'half.ckpt')
    half = ta.load_token_adapt(tmp_path / 'half.ckpt', CODES).state_dict()
    assert all(value.dtype == torch.float32 for value in half.values())


@torch.no_grad()
def test_other_grids_widths_and_depths_come_back_from_the_file(tmp_path):
    model = ta.TokenAdapt(20, 5, 8, 7, Size(64, 2, 1, 128))
    torch.save(model.state_dict(), tmp_path / 'a.ckpt')
    loaded = ta.load_token_adapt(tmp_path / 'a.ckpt', torch.randn(20, 5))
    x = torch.randn(3, 5, 8, 8)
    assert torch.equal(loaded.convert(x), model.convert(x))
    assert loaded.to_codes(model.convert(x)).shape == (3, 8, 8)  # 8, where 7 has the stored table
    assert loaded.to_codes(model.convert(x)[..., :14, :14]).shape == (3, 7, 7)


def test_bad_files_get_one_line(published, tmp_path):
    state = torch.load(published, weights_only=True)
    path = tmp_path / 'bad.ckpt'

    def refused(value, *patterns, codebook=CODES):
        torch.save(value, path)
        fails(lambda: ta.load_token_adapt(path, codebook), 'bad.ckpt: ', *patterns)
    first = 'conversion_function.0.bias'
    refused({name: state[name] for name in state if name != first}, f'{first} is missing; give a tokenadapt.ckpt')
    refused({**state, 'module.x': torch.zeros(1)}, 'module.x is unknown')
    refused({f'module.{name}': value for name, value in state.items()}, 'reverse_transform.1.weight is missing')
    refused({**state, first: torch.zeros(3)}, r'bias has shape \(3,\), expected \(384,\)')
    refused({**state, first: torch.full((384,), math.nan)}, 'not finite')
    refused({**state, 'reverse_transform.0.en_pos_embedding': torch.zeros(1, 783, 384)}, '783 places.*no square')
    refused({'model': state}, 'missing')
    refused(state['conversion_function.0.bias'], 'found: Tensor')
    refused(state, 'for a codebook of 391 x 32, not of 390 x 32', codebook=CODES[:390])
    refused(state, 'for a codebook of 391 x 32, not of 391 x 16', codebook=CODES[:, :16])
    path.write_bytes(b'nothing')
    fails(lambda: ta.load_token_adapt(path, CODES), 'damaged or not TokenAdapt weights')


# ---------------------------------------------------------------- codes

def test_nearest_codes_are_the_published_ones(golden):
    z = golden('seitpp/nearest_code.npz')
    codebook = normal(150, (391, 32))
    codes = nearest_codes_of(normal(151, (2, 32, 28, 28)), codebook)
    sure = z['margins'] > 1e-4
    assert sure.mean() > 0.99 and codes.dtype == torch.int64
    assert np.array_equal(codes.numpy()[sure], z['codes'][sure])


def test_nearest_codes_are_those_of_float32_under_autocast():
    codebook = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    codebook[200:] = codebook[:200] + 1e-2 * torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    codes = torch.randint(0, 400, (2, 16, 16), generator=torch.Generator().manual_seed(2))
    x = codebook[codes].permute(0, 3, 1, 2)
    before = torch.get_float32_matmul_precision()
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(nearest_codes_of(x, codebook), codes)
    assert torch.get_float32_matmul_precision() == before


# ---------------------------------------------------------------- geometry

@pytest.mark.parametrize('name', ['rotate', 'translate_x', 'translate_y', 'shear_x', 'shear_y'])
@pytest.mark.parametrize('number', [0, 1])
def test_affine_maps_are_the_published_ones(golden, name, number):
    z = golden('seitpp/affine.npz')
    out = ta.affine_map(torch.from_numpy(z['image']), *z[f'{name}{number}_params'].tolist())
    np.testing.assert_allclose(out, z[f'{name}{number}_out'], atol=1e-4)


@pytest.mark.parametrize('number', range(5))
def test_geometry_is_the_published_one(golden, number):
    z = golden('seitpp/tokenadapt_geometry.npz')
    out = ta.apply_geometry(normal(171, (3, 2, 64, 64)), geometry_of(z, f's{number}', 'crops'), 56)
    np.testing.assert_allclose(out, z[f's{number}_out'], atol=2e-4)


def test_random_geometry_has_the_published_distribution(golden):
    stats = golden('seitpp/tokenadapt_events.json')
    crop = RandomResizedCrop(torch.zeros(1, 1), 64, 56, 0.2, torch.device('cpu'))
    geometry = ta.RandomGeometry(crop.draw, 56)
    np.random.seed(0)
    generator = torch.Generator().manual_seed(0)
    drawn = [geometry.draw(1, 64, generator) for _ in range(6000)]
    share = len(drawn)
    assert sum(each.flip for each in drawn) / share == pytest.approx(0.5, abs=0.03)
    counts = np.bincount([len(each.maps) for each in drawn], minlength=6) / share
    assert 1 - counts[0] == pytest.approx(stats['any affine'], abs=0.03)
    np.testing.assert_allclose(counts, stats['number of affines'], atol=0.03)
    rows = np.array([row for each in drawn for row in each.maps])
    assert ((rows != 0).sum(1) <= 1).all()  # one map each
    for place, expected in enumerate(stats['values'].values()):
        values = rows[rows[:, place] != 0, place]
        assert len(values) / share == pytest.approx(expected['n/N'], abs=0.03)
        width = expected['max'] - expected['min']
        for mine, theirs in ((values.min(), expected['min']), (values.max(), expected['max']),
                             (values.mean(), expected['mean'])):
            assert mine == pytest.approx(theirs, abs=0.04 * width)
        if place in (1, 2):
            assert (values == np.round(values)).all()
    for each in drawn:  # always in the published order
        places = [np.flatnonzero(row) for row in each.maps]
        places = [int(place[0]) for place in places if len(place)]  # a shift may round to 0
        assert places == sorted(set(places))


def test_geometry_of_larger_images_is_the_same_in_their_pixels():
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    geometry = ta.Geometry(True, [(20., 0., 0., 0., 0.), (0., 3., -2., 0., 0.), (0., 0., 0., 0., 8.)],
                           torch.tensor([[2, 3, 10, 12], [0, 0, 16, 16]]))
    small = ta.apply_geometry(x, geometry, 14)
    smooth = torch.nn.functional.interpolate(x, scale_factor=4, mode='bilinear')
    large = ta.apply_geometry(smooth, geometry.times(4), 56)
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 0.06


def test_maps_keep_gradients():
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    geometry = ta.Geometry(True, [(20., 0., 0., 0., 0.)], torch.tensor([[2, 3, 10, 12], [0, 0, 16, 16]]))
    ta.apply_geometry(x, geometry, 14).sum().backward()
    assert (x.grad != 0).float().mean() > 0.4
