"""Which images a rank sees in an epoch, as index arrays: pure functions of (n, world size, rank, seed, epoch)."""
import torch


def _permutation(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))


def _share(indices, world_size, rank):
    """Every world_size-th index from rank on, padded from the front so that all ranks get the same number."""
    missing = -len(indices) % world_size
    while missing > 0:  # more ranks than images: the front is used again
        indices = torch.cat([indices, indices[:missing]])
        missing = -len(indices) % world_size
    return indices[rank::world_size].numpy()


def shuffled(n, world_size, rank, seed, epoch):
    """A rank's share of one random order of n images, as torch's DistributedSampler deals it.

    Returns (ceil(n / world_size),) int64.
    """
    return _share(_permutation(n, seed, epoch), world_size, rank)


def repeated_augmentation(n, world_size, rank, seed, epoch, repeats=3):
    """Repeated augmentation (Hoffer et al., 2020; DeiT): each image `repeats` times running, dealt to the ranks
    in turn so that its copies meet different augmentations; an epoch keeps its usual length.

    Returns (n // 256 * 256 // world_size,) int64, or the whole share where that is shorter or n < 256.
    """
    share = _share(_permutation(n, seed, epoch).repeat_interleave(repeats), world_size, rank)
    return share[:int(n // 256 * 256 / world_size) or len(share) // repeats]


def in_order(n, world_size, rank):
    """A rank's share for evaluation: each image on exactly one rank, none twice. Returns int64 indices."""
    return torch.arange(n)[rank::world_size].numpy()
