"""Augmentations against golden files, golden distributions, and slow obvious versions."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import token_augment as ta
from utils import InputError, seed_step

CPU = torch.device('cpu')


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_codes(b=16, g=16, k=50, seed=0):
    return torch.randint(0, k, (b, g, g), generator=generator(seed))


# ---------------------------------------------------------------- crops

def crop_embeddings(x, boxes, size):
    """resized_crop of embeddings (B, h, w, d): every place has a code of its own."""
    table = x.flatten(0, 2)
    return ta.resized_crop(torch.arange(len(table)).view(x.shape[:3]), table, boxes, size)


def test_resized_crop_is_the_published_one_hot_route(golden):
    z = golden('crop.npz')
    codes, codebook = torch.from_numpy(z['tokens'].astype(np.int64)), torch.from_numpy(z['codebook'])
    out = ta.resized_crop(codes, codebook, torch.from_numpy(z['params_ijhw']), 28)
    np.testing.assert_allclose(out.numpy(), z['random_resized_crop'], atol=2e-5)


def test_center_crop_is_the_published_one(golden):
    z = golden('crop.npz')
    codes = torch.from_numpy(z['tokens'])
    out = ta.EvalTransform(torch.from_numpy(z['codebook']), 28, CPU)(codes)
    np.testing.assert_allclose(out.numpy(), z['center_crop'], atol=2e-5)


def test_resized_crop_against_interpolate():
    x = torch.randn(6, 16, 16, 5, generator=generator())
    boxes = ta.draw_random_resized_crop(6, 16, 0.08, generator())
    out = crop_embeddings(x, boxes, 14)
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        crop = x[i, top:top + h, left:left + w].permute(2, 0, 1)[None]
        slow = F.interpolate(crop, (14, 14), mode='bicubic', align_corners=False)[0]
        torch.testing.assert_close(out[i], slow, atol=2e-5, rtol=0)


def test_simple_crop_copies_exactly():
    x = torch.randn(8, 16, 16, 5, generator=generator())
    boxes = ta.draw_random_crop(8, 16, 12, generator())
    out = crop_embeddings(x, boxes, 12)
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        assert torch.equal(out[i].permute(1, 2, 0), x[i, top:top + h, left:left + w])
    assert boxes[:, :2].min() >= 0 and boxes[:, :2].max() <= 4 and len(boxes[:, 0].unique()) > 1


def test_random_resized_crop_has_the_published_distribution(golden):
    stats = golden('augment_stats.json')
    n = stats['rrc_n']
    boxes = ta.draw_random_resized_crop(n, 32, 0.08, generator())
    top, left, h, w = boxes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 32).all() and (left + w <= 32).all()
    assert ((h * w).float() / 1024).mean().item() == pytest.approx(stats['rrc_area_mean'], abs=0.003)
    assert h.float().mean().item() == pytest.approx(stats['rrc_h_mean'], abs=0.06)
    assert w.float().mean().item() == pytest.approx(stats['rrc_w_mean'], abs=0.06)
    assert top.float().mean().item() == pytest.approx(stats['rrc_i_mean'], abs=0.06)
    full = ((h == 32) & (w == 32)).float().mean().item()
    assert full == pytest.approx(stats['rrc_full_rate'], abs=5e-4)
    expected = np.array(stats['rrc_h_hist'])
    found = np.bincount(h.numpy(), minlength=33)
    # two samples of equal size: each bin's difference has variance of about found + expected
    assert (np.abs(found - expected) < 5 * np.sqrt(found + expected + 1)).all()


def test_crop_falls_back_to_the_whole_grid():
    # aspects so extreme that no draw fits: torchvision's fallback is the whole of a square
    boxes = ta.draw_random_resized_crop(4, 8, 0.99, generator(), ratio=(5., 6.))
    assert boxes.tolist() == [[0, 0, 8, 8]] * 4


# ---------------------------------------------------------------- swap

def slow_swap(grid, side, y0, x0, y1, x1):
    out = grid.clone()
    out[y0:y0 + side, x0:x0 + side] = grid[y1:y1 + side, x1:x1 + side]
    out[y1:y1 + side, x1:x1 + side] = grid[y0:y0 + side, x0:x0 + side]
    return out


def test_swap_is_the_published_one(golden):
    z = golden('swap.npz')
    codes = torch.from_numpy(z['tokens'].astype(np.int64))
    out = ta.swap_patches(codes, torch.from_numpy(z['params_ps_y0x0y1x1']))
    assert np.array_equal(out.numpy(), z['swapped'])


def test_swap_against_slow_version_and_bounds():
    codes = random_codes(400)
    params = ta.SwapPatches(16, 0.4, CPU).draw(400, generator())
    out = ta.swap_patches(codes, params)
    for i, p in enumerate(params.tolist()):
        side, y0, x0, y1, x1 = p
        assert math.hypot(y1 - y0, x1 - x0) > side
        assert min(p) >= 0 and max(y0, x0, y1, x1) <= 16 - side - 1
        assert torch.equal(out[i], slow_swap(codes[i], *p))


def test_swap_has_the_published_distribution(golden):
    stats = golden('augment_stats.json')
    n = stats['swap_n']
    side, *corner = ta.SwapPatches(32, 0.25, CPU).draw(n, generator()).unbind(1)
    expected = np.array(stats['swap_ps_hist'])
    found = np.bincount(side.numpy(), minlength=9)
    assert (np.abs(found - expected) < 5 * np.sqrt(found + expected + 1)).all()
    y0, x0, y1, x1 = (c.double() for c in corner)
    distance = torch.hypot(y1 - y0, x1 - x0)
    for s, mean in enumerate(stats['swap_dist_mean_by_ps']):
        assert distance[side == s].mean().item() == pytest.approx(mean, abs=0.5)  # about 5 standard errors


def test_swap_pairs_are_uniform_over_those_allowed():
    # side 1 on a 4x4 grid: all ordered pairs of 3x3 corners further apart than 1, equally often
    p = ta.SwapPatches(4, 0.5, CPU).draw(60000, generator())
    p = p[p[:, 0] == 1][:, 1:]
    pairs = [(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)
             if math.hypot(a - c, b - d) > 1]
    counts = torch.zeros(3, 3, 3, 3)
    counts.index_put_(tuple(p.unbind(1)), torch.ones(len(p)), accumulate=True)
    assert counts.sum() == sum(counts[q] for q in pairs)
    expected = len(p) / len(pairs)
    assert all(abs(counts[q] - expected) < 5 * expected ** 0.5 for q in pairs)


def test_swap_without_room_is_refused():
    with pytest.raises(InputError, match='no room'):
        ta.swap_table(8, 1.0)


# ---------------------------------------------------------------- synonyms, erase, choice

def test_synonyms_come_from_the_lists_at_the_given_rate():
    k = 40
    table = (torch.arange(k)[:, None] + torch.arange(1, 6)) % k
    count = torch.full((k,), 5)
    count[7] = 2
    codes = random_codes(256, 32, k)
    out = ta.ReplaceSynonyms(table, count, 0.25, CPU)(codes, generator())
    shift = (out - codes) % k
    assert shift.max() <= 5
    assert (shift > 0).float().mean().item() == pytest.approx(0.25, abs=0.005)
    rates = torch.bincount(shift[codes != 7].flatten(), minlength=6)[1:].float()
    assert (rates / rates.sum() - 0.2).abs().max() < 0.01
    assert shift[codes == 7].max() == 2


def test_erase_makes_one_rectangle_of_zero_embeddings():
    codes = random_codes(300)
    out = ta.EraseRectangle(0.5, 99)(codes, generator())
    sizes = []
    for before, after in zip(codes, out):
        at = (after == 99).nonzero()
        assert torch.equal(after[after != 99], before[after != 99])
        if len(at):
            low, high = at.min(0).values, at.max(0).values
            size = high - low + 1
            assert len(at) == size.prod()  # the bounding box is full: a rectangle
            sizes.append(size)
    sizes = torch.stack(sizes)
    assert sizes.min() == 1 and sizes.max() == 7
    crop = ta.RandomCrop(torch.randn(50, 4), 16, 16, 1., CPU)
    x = crop(ta.EraseRectangle(0.5, 50)(codes, generator()), generator())
    assert (x.abs().sum(1) == 0).any() and crop.embedding[50].abs().sum() == 0


def test_one_choice_an_image_at_the_given_rates():
    codes = random_codes(4000, 16, 50)
    synonyms = torch.full((50, 5), 60), torch.full((50,), 5)
    eda = ta.TokenEDA([(0.25, ta.ReplaceSynonyms(*synonyms, 0.25, CPU)), (0.25, ta.SwapPatches(16, 0.4, CPU)),
                       (0.2, ta.EraseRectangle(0.9, 50))])
    out = eda(codes.clone(), generator())
    changed = (out != codes).flatten(1)
    replaced, erased = (out == 60).flatten(1).any(1), (out == 50).flatten(1).any(1)
    assert not (replaced & erased).any()
    for kind in (replaced, erased):  # any image may be chosen
        assert kind[:2000].float().mean().item() == pytest.approx(kind[2000:].float().mean().item(), abs=0.06)
    assert replaced.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert 0.12 < erased.float().mean() < 0.2  # some rectangles are empty
    swapped = changed.any(1) & ~replaced & ~erased
    assert 0.15 < swapped.float().mean() < 0.25  # some sides are 0


def test_crop_larger_than_the_grid_is_refused():
    with pytest.raises(InputError, match='larger than the 8x8'):
        ta.RandomResizedCrop(torch.randn(5, 4), 8, 10, 0.08, CPU)
    with pytest.raises(InputError, match='larger than the 8x8'):
        ta.EvalTransform(torch.randn(5, 4), 10, CPU)(torch.zeros(1, 8, 8, dtype=torch.uint16))


@pytest.mark.parametrize('size, grid_size, message', [
    (2, 1, 'x.bin: a token grid of 1x1 codes is too small for any model, .* 2x2: tokenize the images at a larger size'),
    (28, 1, 'x.bin: a token grid of 1x1 codes is too small for any model'),
    (28, 2, 'larger than the 2x2 token grid: take a model of a smaller input size, 2 codes at most, or tokenize'),
    (28, 27, 'larger than the 27x27 token grid: take a model of a smaller input size, 26 codes at most')])
def test_advice_for_small_grids_is_of_sizes_that_work(size, grid_size, message):
    with pytest.raises(InputError, match=message):
        ta.check_crop(size, grid_size, 'x.bin')


# ---------------------------------------------------------------- noise and the whole

def test_embedding_noise_hits_half_the_batch_with_the_right_deviations():
    x = ta.EmbeddingNoise(0.5, 2., 0.5)(torch.zeros(65, 32, 14, 14), generator())
    noisy = x.flatten(1).abs().sum(1) > 0
    assert noisy.sum() == 32
    channel = x[noisy].mean((2, 3))
    assert channel.std().item() == pytest.approx(2., rel=0.08)
    assert (x[noisy] - channel[..., None, None]).std().item() == pytest.approx(0.5, rel=0.02)


def test_a_seed_gives_one_batch_and_another_seed_another():
    synonyms = torch.randint(0, 50, (50, 5)), torch.full((50,), 5)
    eda = ta.TokenEDA([(0.25, ta.ReplaceSynonyms(*synonyms, 0.25, CPU)), (0.25, ta.SwapPatches(16, 0.25, CPU)),
                       (0.1, ta.EraseRectangle(0.25, 50))])
    crop = ta.RandomResizedCrop(torch.randn(50, 32), 16, 14, 0.08, CPU)
    noise = ta.EmbeddingNoise(0.5, 1., 1.)
    codes = random_codes()

    def batch(seed):
        g = generator()
        seed_step(seed, 0, 0, 0, g)  # as the training loop does
        return noise(crop(eda(codes.clone(), g), g), g)
    first, again, other = map(batch, (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (16, 32, 14, 14) and first.dtype == torch.float32
