"""Which images a rank sees in an epoch, as index arrays: pure functions of (n, world size, rank, seed, epoch).

Because nothing else decides, a resumed run computes the order anew and goes on at its step. Each function makes the
order of the whole epoch and gives a rank every world_size-th of its images.
"""
import numpy as np
import torch

REPEATS = 3  # copies of an image in repeated augmentation, as in DeiT


def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))


def _every_nth(indices: torch.Tensor, world_size: int, rank: int) -> np.ndarray:
    """Every world_size-th index from rank on, padded from the front so that all ranks get the same number.

    A rank with fewer images than the others would take fewer steps, and the others would wait for its gradients.
    """
    missing = -len(indices) % world_size
    while missing > 0:  # more ranks than images: the front is used again
        indices = torch.cat([indices, indices[:missing]])
        missing = -len(indices) % world_size
    return indices[rank::world_size].numpy()


def shuffled(n: int, world_size: int, rank: int, seed: int, epoch: int) -> np.ndarray:
    """A rank's images (ceil(n / world_size),) int64, of n in random order, as torch's DistributedSampler deals them."""
    return _every_nth(_permutation(n, seed, epoch), world_size, rank)


def repeated_augmentation(n: int, world_size: int, rank: int, seed: int, epoch: int,
                          repeats: int = REPEATS) -> np.ndarray:
    """Repeated augmentation (Hoffer et al., 2020; DeiT): `repeats` copies of an image follow each other.

    They are dealt to the ranks in turn, so that a step averages the gradients of differently augmented copies. An epoch
    keeps its usual length, and sees a part of the images.

    Returns:
        (n // 256 * 256 // world_size,) int64, or all of the rank's images where these are fewer or n < 256.
    """
    indices = _every_nth(_permutation(n, seed, epoch).repeat_interleave(repeats), world_size, rank)
    # DeiT's rounding to 256 images
    return indices[:int(n // 256 * 256 / world_size) or len(indices) // repeats]


def draw_views(n: int, views: int, seed: int, epoch: int) -> np.ndarray | None:
    """Which view of each of n images an epoch reads, (n,) int64 in [0, views); None where there is one view.

    The same for all ranks, however many there are, so an image has one view in an epoch even where it is read twice.
    """
    if views == 1:
        return None
    # another seed than the order's, or an image's place in the epoch would tell its view
    mixed = int(np.random.SeedSequence((seed, epoch, views)).generate_state(1)[0])
    return torch.randint(views, (n,), generator=torch.Generator().manual_seed(mixed)).numpy()


def in_order(n: int, world_size: int, rank: int) -> np.ndarray:
    """A rank's images for evaluation, int64: each on exactly one rank. No padding: it would count twice."""
    return torch.arange(n)[rank::world_size].numpy()
