"""Which images a rank sees in an epoch, as index arrays: pure functions of (n, world size, rank, seed, epoch)."""
import numpy as np
import torch

REPEATS = 3  # of repeated augmentation


def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))


def _every_nth(indices: torch.Tensor, world_size: int, rank: int) -> np.ndarray:
    """Every world_size-th index from rank on, padded from the front so that all ranks get the same number."""
    missing = -len(indices) % world_size
    while missing > 0:  # more ranks than images: the front is used again
        indices = torch.cat([indices, indices[:missing]])
        missing = -len(indices) % world_size
    return indices[rank::world_size].numpy()


def shuffled(n: int, world_size: int, rank: int, seed: int, epoch: int) -> np.ndarray:
    """A rank's share (ceil(n / world_size),) int64 of a random order of n images, as torch's DistributedSampler."""
    return _every_nth(_permutation(n, seed, epoch), world_size, rank)


def repeated_augmentation(n: int, world_size: int, rank: int, seed: int, epoch: int,
                          repeats: int = REPEATS) -> np.ndarray:
    """Repeated augmentation (Hoffer et al., 2020; DeiT): each image `repeats` times running, dealt to the ranks
    in turn so that its copies meet different augmentations; an epoch keeps its usual length.

    Returns (n // 256 * 256 // world_size,) int64, or the whole share where that is shorter or n < 256.
    """
    indices = _every_nth(_permutation(n, seed, epoch).repeat_interleave(repeats), world_size, rank)
    return indices[:int(n // 256 * 256 / world_size) or len(indices) // repeats]


def in_order(n: int, world_size: int, rank: int) -> np.ndarray:
    """A rank's share for evaluation, int64: each image on exactly one rank, none twice."""
    return torch.arange(n)[rank::world_size].numpy()
