"""k-means: against a slow one, its seeds, empty clusters, bounded memory."""
import numpy as np
import pytest
import torch

from image_tokenizer import kmeans as module
from image_tokenizer.kmeans import kmeans, nearest_rows, seed_rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slow_kmeans(features, rows, iterations):
    """Lloyd from given rows, one feature at a time."""
    for _ in range(iterations):
        assigned = [int(np.argmin([((f - r) ** 2).sum() for r in rows])) for f in features]
        members = [[i for i, a in enumerate(assigned) if a == k] for k in range(len(rows))]
        worst = sorted(range(len(features)), key=lambda i: -((features[i] - rows[assigned[i]]) ** 2).sum())
        rows = [features[m].mean(0) if m else features[worst.pop(0)] for m in members]
    return np.array(rows)


@pytest.mark.parametrize('iterations', [0, 1, 6])
def test_it_is_the_slow_one(iterations):
    features = torch.randn(200, 5, generator=generator(1))
    seeds = seed_rows(features, 8, generator())
    slow = slow_kmeans(features.double().numpy(), list(seeds.double().numpy()), iterations)
    np.testing.assert_allclose(kmeans(features, 8, iterations, generator()), slow, atol=1e-5)


def test_nearest_rows_are_the_nearest_in_parts_of_any_size(monkeypatch):
    features = torch.randn(100, 7, generator=generator())
    rows = torch.randn(13, 7, generator=generator(1))
    expected = torch.cdist(features.double(), rows.double()).argmin(1)
    for size in (1, 7, 1000):
        monkeypatch.setattr(module, 'ROWS_AT_ONCE', size)
        assert torch.equal(nearest_rows(features, rows), expected)
    assert nearest_rows(rows[:1], rows[[0, 0, 1]]).tolist() == [0]  # of equal rows the first


def test_seeds_are_drawn_by_squared_distance():
    """Of a point at 0, one at 1 and one at 3, the second seed after 0 is the last nine times in ten."""
    features = torch.tensor([[0.], [1.], [3.]])
    pairs = [seed_rows(features, 2, generator(seed)).flatten().tolist() for seed in range(3000)]
    after_zero = [second for first, second in pairs if first == 0]
    assert 800 < len(after_zero) < 1200
    assert np.mean([second == 3 for second in after_zero]) == pytest.approx(0.9, abs=0.03)
    assert 0 not in after_zero


def test_far_clusters_are_all_found():
    """Where random seeds would miss some: ten small clusters beside a large one."""
    means = torch.cat([torch.zeros(1, 4), 10 * torch.randn(10, 4, generator=generator(3))])
    features = means.repeat_interleave(torch.tensor([500] + [5] * 10), 0)
    features = features + 0.01 * torch.randn(features.shape, generator=generator(4))
    rows = kmeans(features, 11, 20, generator())
    assert torch.cdist(means, rows).min(1).values.max() < 0.05


def test_fewer_different_features_than_codes():
    features = torch.tensor([[1., 0], [0, 1]]).repeat(10, 1)
    rows = kmeans(features, 4, 5, generator())
    assert rows.shape == (4, 2) and rows.isfinite().all()
    assert torch.cdist(features, rows).min(1).values.max() == 0
