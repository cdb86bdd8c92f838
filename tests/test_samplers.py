"""Which images a rank sees."""
import numpy as np
import pytest
from torch.utils.data import DistributedSampler

import samplers


def test_repeated_augmentation_is_the_published_order(golden):
    for key, expected in golden('ra_sampler.npz').items():
        n, world, repeats, epoch, rank = (int(part[1:]) for part in key.split('_'))
        found = samplers.repeated_augmentation(n, world, rank, 0, epoch, repeats)
        assert np.array_equal(found, expected), key


@pytest.mark.parametrize('n, world', [(100, 1), (101, 4), (7, 3), (2, 8)])
def test_shuffled_is_torchs_distributed_sampler(n, world):
    for rank in range(world):
        theirs = DistributedSampler(range(n), world, rank, shuffle=True, seed=3)
        for epoch in (0, 5):
            theirs.set_epoch(epoch)
            assert samplers.shuffled(n, world, rank, 3, epoch).tolist() == list(theirs)


@pytest.mark.parametrize('n, world', [(100, 1), (101, 4), (2, 8)])
def test_evaluation_sees_every_image_exactly_once(n, world):
    seen = np.concatenate([samplers.in_order(n, world, rank) for rank in range(world)])
    assert sorted(seen) == list(range(n))


def test_epochs_and_seeds_differ():
    orders = {tuple(samplers.shuffled(50, 1, 0, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (7, 0))}
    assert len(orders) == 3
