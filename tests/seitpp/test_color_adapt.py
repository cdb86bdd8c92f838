"""ColorAdapt and the choice of a batch against the published outputs; constant channels."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import fails
from seitpp.color_adapt import ColorAdapt, ColorChange, color_adapt
from small_training import CountWaits
from token_augment import EmbeddingNoise


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('key', ['ca0', 'ca1'])
def test_color_adapt_is_the_published_one(golden, key):
    z = golden('seitpp/color.npz')
    perm = torch.from_numpy(z[f'{key}_perm'])
    out = color_adapt(torch.from_numpy(z[f'{key}_in']), perm[:len(perm) // 2])
    np.testing.assert_allclose(out, z[f'{key}_out'], atol=1e-5)


def test_color_adapt_of_codes_is_the_published_one(golden):
    z = golden('seitpp/color.npz')
    codebook = np.random.default_rng(150).standard_normal((391, 32)).astype(np.float32)
    codes = np.random.default_rng(180).integers(0, 391, (4, 32, 32))
    x = torch.from_numpy(codebook[codes]).permute(0, 3, 1, 2)
    out = color_adapt(x, torch.from_numpy(z['ca_codes_perm'])[:2])
    np.testing.assert_allclose(out[:, :, ::4, ::4], z['ca_codes_out_every4'], atol=1e-5)


@pytest.mark.parametrize('number', [0, 1])
def test_noise_is_the_published_one(golden, number, monkeypatch):
    z = golden('seitpp/color.npz')
    channel_std, element_std = z['noise_scale_std'].tolist()
    drawn = {name: torch.from_numpy(z[f'noise{number}_{name}']).movedim(1, -1) for name in ('channel', 'element')}
    perm = torch.from_numpy(z[f'noise{number}_perm'])
    half = len(perm) // 2

    def normal_(x, mean, std, generator):
        return x.copy_(drawn['channel' if x.shape[1:3] == (1, 1) else 'element'][perm[:half]] * std + mean)
    monkeypatch.setattr(torch, 'randperm', lambda *_, **__: perm)
    monkeypatch.setattr(torch.Tensor, 'normal_', normal_)
    x = torch.from_numpy(z[f'ca{number}_in'])
    out = EmbeddingNoise(0.5, channel_std, element_std)(x, generator())
    np.testing.assert_allclose(out, z[f'noise{number}_out'], atol=1e-5)


@pytest.mark.parametrize('key, probs', [('main_seit (0.5, 0.25)', (0.5, 0.25)), ('finetune (0.75, 0.25)', (0.75, 0.25)),
                                        ('only noise 0.5', (0.5, 0))])
def test_the_choice_of_a_batch_has_the_published_frequencies(golden, key, probs):
    expected = golden('seitpp/color_choice.json')[key]['frequencies']
    change = ColorChange(*probs)
    np.random.seed(0)
    drawn = [change.draw() for _ in range(20_000)]
    for name, kind in (('Noise', EmbeddingNoise), ('ColorAdapt', ColorAdapt), ('Identity', type(None))):
        share = sum(isinstance(each, kind) for each in drawn) / len(drawn)
        assert share == pytest.approx(expected.get(name, 0), abs=0.015)


def test_with_both_chances_0_nothing_is_drawn_or_changed(golden):
    assert golden('seitpp/color_choice.json')['pretrain (0, 0)'] is None
    x = torch.randn(4, 3, 5, 5)
    before = np.random.get_state()[1].copy(), generator().get_state()
    same = generator()
    assert torch.equal(ColorChange(0., 0.)(x.clone(), same), x)
    assert np.array_equal(np.random.get_state()[1], before[0]) and torch.equal(same.get_state(), before[1])


def test_chances_above_1_are_refused():
    fails(lambda: ColorChange(0.8, 0.3), '0.8 .*0.3 add up to more than 1')


def test_half_of_a_batch_changes_and_gets_the_statistics_of_its_partner():
    x = torch.randn(7, 3, 6, 6, generator=generator(1)) * (torch.rand(7, 3, 1, 1, generator=generator(2)) + 0.5) + 1
    for change in (ColorAdapt(), ColorChange(0, 1.)):
        out = change(x.clone(), generator())
        changed = (out != x).flatten(1).any(1)
        middle = 3  # the image in the middle is its own partner
        assert changed[torch.arange(7) != middle].sum() in (2, 3) and torch.allclose(out[middle], x[middle], atol=1e-6)
        for i in changed.nonzero().flatten().tolist():
            torch.testing.assert_close(out[i].mean((1, 2)), x[6 - i].mean((1, 2)))
            torch.testing.assert_close(out[i].std((1, 2)), x[6 - i].std((1, 2)))
            unit, was = (F.layer_norm(each[i].flatten(1), (36,)) for each in (out, x))
            torch.testing.assert_close(unit, was, atol=1e-3, rtol=0)  # what the channels show stays


@pytest.mark.parametrize('value', [0., 0.1, 12345.678, -1e-30])
def test_a_constant_channel_stays_constant_at_the_mean_of_its_partner(value):
    x = torch.randn(4, 3, 32, 32, generator=generator())
    x[1, 2] = value
    x[3] = value
    out = color_adapt(x.clone(), torch.tensor([1, 3, 2]))
    assert out.isfinite().all()
    assert torch.equal(out[1, 2], x[2, 2].mean().expand(32, 32))
    torch.testing.assert_close(out[3], x[0].mean((1, 2))[:, None, None].expand(3, 32, 32))
    torch.testing.assert_close(out[2, 2], torch.full((32, 32), value), atol=1e-6, rtol=1e-6)  # a constant partner
    assert torch.equal(out[0], x[0])


def test_the_host_waits_for_nothing():
    counter = CountWaits()
    with counter:
        ColorAdapt()(torch.randn(6, 3, 5, 5), generator())
        ColorChange(1., 0.)(torch.randn(6, 3, 5, 5), generator())
    assert counter.count == 0


def test_a_seed_gives_one_change():
    x = torch.randn(6, 3, 5, 5, generator=generator(1))
    first, again, other = (ColorAdapt()(x.clone(), generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
