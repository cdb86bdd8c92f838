"""The two halves of a batch: the published chain, mixing, and what cannot be split."""
import numpy as np
import pytest
import timm.data.mixup
import torch
from timm.data import Mixup

from helpers import fails, token_adapt_state
from seitpp import token_adapt
from small_training import CountWaits
from masked import NAMES, geometry_of
from image_tokenizer.vitvqgan import Size
from seitpp.halves import TokenHalves, adapted_mixup, check_halves
from seitpp.token_adapt import TokenAdapt
from token_augment import RandomResizedCrop

CPU = torch.device('cpu')


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_halves(mixup=None):
    """Halves of 8x8 codes, cropped to 6x6."""
    torch.manual_seed(0)
    codebook = torch.randn(20, 5)
    model = TokenAdapt(20, 5, 8, 6, Size(64, 1, 1, 64)).requires_grad_(False)
    crops = (RandomResizedCrop(codebook, side, size, 0.2, CPU) for side, size in ((8, 6), (16, 12)))
    return TokenHalves(model, codebook, *crops, mixup)


def small_mixup(**kwargs):
    return Mixup(**{'mixup_alpha': 0., 'cutmix_alpha': 1., 'num_classes': 10, **kwargs})


# ---------------------------------------------------------------- the published outputs

@torch.no_grad()
@pytest.mark.parametrize('number', [0, 1])
def test_a_pretraining_input_is_the_published_one(golden, number, monkeypatch):
    z = golden('seitpp/pretrain_input.npz')
    key = f'p{number}'
    codebook = torch.from_numpy(np.random.default_rng(150).standard_normal((391, 32)).astype(np.float32))
    codes = torch.from_numpy(np.random.default_rng(180).integers(0, 391, (4, 32, 32)))
    assert np.array_equal(codes.numpy(), z['codes'])
    model = TokenAdapt(391, 32)
    model.load_state_dict(token_adapt_state(golden('seitpp/state_dict_shapes.json')[NAMES]))
    base, finer = (RandomResizedCrop(codebook, side, size, 0.2, CPU) for side, size in ((32, 28), (64, 56)))
    halves = TokenHalves(model, codebook, base, finer)
    # the published draws for ours
    monkeypatch.setattr(base, 'draw', lambda *_: torch.from_numpy(z[f'{key}_base_crops']))
    monkeypatch.setattr(halves.geometry, 'draw', lambda *_: geometry_of(z, key, 'ta_crops'))
    seen = {}
    to_codes = model.to_codes

    def look(converted):
        seen['converted'] = converted
        return to_codes(converted)
    monkeypatch.setattr(model, 'to_codes', look)

    x = codebook[codes].permute(0, 3, 1, 2)
    first, _, _ = halves.augment(x, None, generator())
    np.testing.assert_allclose(first[:, :, ::7, ::7], z[f'{key}_base_embed'], atol=2e-4)
    np.testing.assert_allclose(seen['converted'][:, :, ::8, ::8], z[f'{key}_ta_space'], atol=2e-4)
    out, targets = halves.codes(x, None, generator())
    sure = z[f'{key}_margins'] > 1e-3
    assert sure.mean() > 0.9 and targets is None
    assert np.array_equal(out.numpy()[sure], z[f'{key}_final_codes'][sure])


@pytest.mark.parametrize('key, half', [('base_cutmix', 0), ('ta_mixup', 1), ('ta_cutmix', 1)])
def test_mixing_is_the_published_one(golden, key, half, monkeypatch):
    z = golden('seitpp/mixup.npz')
    drawn = float(z[f'{key}_lam_drawn'])
    box = z[f'{key}_box_yl_yh_xl_xh'].tolist()
    monkeypatch.setattr(Mixup, '_params_per_batch', lambda self: (drawn, 'cutmix' in key))
    monkeypatch.setattr(timm.data.mixup, 'rand_bbox', lambda *_, **__: box)
    mixup = small_halves(small_mixup(label_smoothing=0.1)).mixups[half]
    out, targets = mixup(torch.from_numpy(z[f'{key}_in']), torch.from_numpy(z[f'{key}_labels']))
    np.testing.assert_allclose(out, z[f'{key}_out'], atol=1e-5)
    np.testing.assert_allclose(targets, z[f'{key}_targets'], atol=1e-5)


def test_the_first_half_gets_cutmix_only_and_the_second_mixup_as_often(golden):
    z = golden('seitpp/mixup.npz')
    np.random.seed(0)
    first, second = small_halves(small_mixup()).mixups
    assert all(first._params_per_batch()[1] for _ in range(100))
    drawn = [second._params_per_batch() for _ in range(20_000)]
    cutmix = np.array([chosen for _, chosen in drawn])
    lam = np.array([value for value, _ in drawn])
    assert cutmix.mean() == pytest.approx(float(z['ta_fraction_cutmix']), abs=0.015)
    assert lam[~cutmix].mean() == pytest.approx(float(z['ta_mean_lam_mixup']), abs=0.015)
    assert lam[~cutmix].var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.005)  # of Beta(0.8, 0.8)
    assert lam[cutmix].var() == pytest.approx(1 / 12, abs=0.005)  # of Beta(1, 1)


def test_the_second_half_has_the_options_of_the_first():
    mixup = small_mixup(mixup_alpha=0.3, cutmix_minmax=(0.2, 0.4), prob=0.5, switch_prob=0.1, mode='elem',
                        label_smoothing=0.2)
    assert vars(adapted_mixup(mixup)) == {**vars(mixup), 'mixup_alpha': 0.8} and mixup.mixup_alpha == 0.3


# ---------------------------------------------------------------- ours

def test_halves_keep_their_place_and_an_odd_batch_gives_the_first_one_more():
    halves = small_halves()
    codes = torch.randint(0, 20, (5, 8, 8), generator=generator(1))
    x = halves.codebook[codes].permute(0, 3, 1, 2)
    labels = torch.arange(5)
    first, second, targets = halves.augment(x, labels, generator())
    assert first.shape == (3, 5, 6, 6) and second.shape == (2, 6, 6) and torch.equal(targets, labels)
    np.random.seed(1)
    codes, _ = halves.codes(x, labels, generator(2))
    np.random.seed(1)
    embeddings, _ = halves.embeddings(x, labels, generator(2))
    assert codes.shape == (5, 6, 6) and codes.dtype == torch.int64 and embeddings.shape == (5, 5, 6, 6)
    rows = halves.codebook[codes].permute(0, 3, 1, 2)
    assert torch.equal(embeddings[3:], rows[3:]) and not torch.equal(embeddings[:3], rows[:3])


def test_mixed_targets_follow_their_half():
    halves = small_halves(small_mixup(label_smoothing=0.))
    x = torch.randn(8, 5, 8, 8, generator=generator())
    np.random.seed(0)
    _, targets = halves.codes(x, torch.arange(8), generator())
    assert targets.shape == (8, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    for i, row in enumerate(targets):
        partner = 3 - i if i < 4 else 11 - i
        assert set(row.nonzero().flatten().tolist()) <= {i, partner}


def test_a_seed_gives_one_batch_and_numpy_alone_decides_what_the_host_draws():
    halves = small_halves(small_mixup())
    x = torch.randn(8, 5, 8, 8, generator=generator())

    def batch(seed, numpy_seed):
        np.random.seed(numpy_seed)
        return halves.embeddings(x.clone(), torch.arange(8), generator(seed))
    for a, b in zip(batch(1, 1), batch(1, 1)):
        assert torch.equal(a, b)
    assert not torch.equal(batch(1, 1)[0], batch(2, 1)[0]) and not torch.equal(batch(1, 1)[0], batch(1, 2)[0])


@torch.no_grad()
def test_half_precision_changes_few_codes():
    halves = small_halves()
    x = halves.codebook[torch.randint(0, 20, (8, 8, 8), generator=generator(1))].permute(0, 3, 1, 2)
    outs = []
    for enabled in (False, True):
        np.random.seed(3)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            outs.append(halves.codes(x, None, generator()))
    assert torch.equal(outs[0][0][:4], outs[1][0][:4])  # the nearest rows are those of float32
    assert (outs[0][0] == outs[1][0]).float().mean() > 0.9


@pytest.mark.parametrize('size, mixed', [(3, False), (6, True), (1, False), (2, True)])
def test_batches_that_halves_cannot_split_are_refused(size, mixed):
    fails(lambda: check_halves(size, mixed), f'--batch-size {size}: ', 'give a multiple of ' + ('4' if mixed else '2'))


def test_batches_that_can_be_split_pass():
    check_halves(2, False)
    check_halves(8, True)


def test_the_host_waits_for_nothing():
    halves = small_halves(small_mixup())
    counter = CountWaits()
    with counter:
        for seed in range(20):  # flips, maps and both kinds of mixing
            np.random.seed(seed)
            halves.codes(torch.randn(4, 5, 8, 8), torch.arange(4), generator())
    assert counter.count == 0


def test_the_geometry_is_drawn_for_the_converted_side():
    halves = small_halves()
    np.random.seed(0)
    drawn = [halves.geometry.draw(2, 16, generator()) for _ in range(300)]
    shifts = [abs(row[1]) for each in drawn for row in each.maps]
    assert max(shifts) == 3  # round(0.2 * 16)
    assert token_adapt.SHIFT * 64 == 12.8
