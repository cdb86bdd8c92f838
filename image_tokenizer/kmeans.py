"""Euclidean k-means in little memory: k-means++ seeds (Arthur and Vassilvitskii, 2007), then Lloyd's iterations."""
import torch

from utils import device_of_sums, uniform_float64

ROWS_AT_ONCE = 1 << 14  # features whose products with all rows are in memory together


def nearest_rows(features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The nearest of rows (K, d) for each of features (N, d): (N,) int64. Ties go to the lowest row."""
    # |f - r|^2 / 2 = |f|^2 / 2 - (f r - |r|^2 / 2): the nearest row has the largest bracket, and |f| does not matter
    half = rows.square().sum(1) / 2
    # traced, for an export, the number of parts would become a constant, and with it the number of images
    parts = [features] if torch.compiler.is_compiling() else features.split(ROWS_AT_ONCE)
    return torch.cat([(part @ rows.T - half).argmax(1) for part in parts])


def seed_rows(features: torch.Tensor, codes: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: features drawn one by one, each by its squared distance from those drawn before.

    Where fewer than `codes` features differ, some are drawn twice.
    """
    drawn = torch.randint(len(features), (1,), generator=generator, device=features.device)
    rows = [features[drawn[0]]]
    distance = (features - rows[0]).square().sum(1)
    square = features.square().sum(1)
    for _ in range(codes - 1):
        # in float64: the sum over a million features must still tell two of them apart
        cumulative = distance.to(device_of_sums(features.device)).double().cumsum(0)
        target = uniform_float64((1,), generator) * cumulative[-1]
        drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=len(features) - 1)
        row = features[drawn[0]]
        rows.append(row)
        # |f - r|^2 without the (N, d) difference; rounding may take it a little below zero
        torch.minimum(distance, (square - 2 * (features @ row) + row @ row).clamp(min=0), out=distance)
    return torch.stack(rows)


def kmeans(features: torch.Tensor, codes: int, iterations: int, generator: torch.Generator) -> torch.Tensor:
    """Rows (codes, d), the means of the clusters.

    A cluster that empties starts again at the features that fit their rows worst.

    Args:
        features: (N, d) float, N of `codes` or more.
        codes: number of clusters.
        iterations: Lloyd's, after the seeds; fewer where nothing moves any more.
        generator: on the device of the features.
    """
    rows = seed_rows(features, codes, generator)
    before = None
    for _ in range(iterations):
        assigned = nearest_rows(features, rows)
        if before is not None and torch.equal(assigned, before):
            break
        before = assigned
        count = torch.bincount(assigned, minlength=codes)
        means = torch.zeros_like(rows).index_add_(0, assigned, features) / count.clamp(min=1)[:, None]
        empty = (count == 0).nonzero().squeeze(1)
        if len(empty):
            worst = (features - rows[assigned]).square().sum(1).argsort(descending=True)
            means[empty] = features[worst[:len(empty)]]
        rows = means
    return rows
