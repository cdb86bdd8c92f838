"""Class-incremental tasks: order, steps and measures."""
from collections import Counter

import numpy as np
import pytest

from continual.tasks import average_incremental, endless, forgetting, make_tasks, step_batches, step_draws, task_seed
from helpers import fails


@pytest.mark.parametrize(('classes', 'base', 'increment', 'tasks'), [(100, 10, 10, 10), (100, 50, 5, 11), (7, 3, 2, 3),
                                                                     (5, 5, 1, 1)])
def test_each_class_comes_once(classes, base, increment, tasks):
    made = make_tasks(classes, base, increment)
    assert len(made) == tasks and made.ends[-1] == classes
    positions = [position for task in range(tasks) for position in made.classes(task)]
    assert positions == list(range(classes))
    assert sorted(made.order[positions]) == list(range(classes))


def test_the_order_is_that_of_the_field():
    """iCaRL's protocol: np.random.seed(1993), then np.random.permutation; the first classes of 100 are well known."""
    assert make_tasks(100, 10, 10).order[:10].tolist() == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert make_tasks(100, 10, 10, 7).order.tolist() != make_tasks(100, 10, 10).order.tolist()


def test_each_image_is_in_one_task():
    labels = np.random.default_rng(0).integers(0, 9, 200)
    tasks = make_tasks(9, 3, 2)
    positions = tasks.positions(labels)
    assert (tasks.order[positions] == labels).all()
    parts = [tasks.images(positions, task) for task in range(len(tasks))]
    assert sorted(np.concatenate(parts)) == list(range(200))
    for task in range(len(tasks)):
        assert sorted(np.concatenate(parts[:task + 1])) == tasks.images(positions, task, joint=True).tolist()


def test_protocols_that_do_not_divide_are_one_line():
    fails(lambda: make_tasks(100, 10, 20), '--base-classes 10 and then --inc-classes 20 at a time do not divide .* 100')
    fails(lambda: make_tasks(9, 10, 10), '--base-classes 10 are more than the 9 classes')


# ---------------------------------------------------------------- steps

def test_passes_see_all_and_begin_anywhere():
    whole = endless(7, 0, 21, (3,))
    assert all(sorted(part) == list(range(7)) for part in np.split(whole, 3))
    assert whole[:7].tolist() != whole[7:14].tolist()
    for start, stop in ((0, 3), (5, 9), (7, 14), (13, 21), (4, 4)):
        assert endless(7, start, stop, (3,)).tolist() == whole[start:stop].tolist()


def test_a_batch_is_part_memory_and_all_are_seen_equally_often():
    batches = step_batches(40, 6, 8, 0.25, range(60), 5)
    assert batches.shape == (60, 8)
    assert ((batches >= 40).sum(1) == 2).all()
    counts = Counter(batches.ravel().tolist())
    new, held = ([counts[i] for i in part] for part in (range(40), range(40, 46)))
    assert max(new) - min(new) <= 1 and max(held) - min(held) <= 1 and len(counts) == 46
    # whatever step one begins at, and without a memory the batch is the task's own
    assert (step_batches(40, 6, 8, 0.25, range(17, 29), 5) == batches[17:29]).all()
    assert step_batches(40, 0, 8, 0.25, range(5), 5).max() < 40
    assert len({tuple(row >= 40) for row in batches}) > 5  # old images are anywhere in the batch, not at its end


def test_augmentation_differs_between_copies():
    draws = step_draws((3, 4), 9, 10)
    assert draws.shape == (12, 4) and len({tuple(draw) for draw in draws.tolist()}) == 12
    assert draws[4:8].tolist() == step_draws((1, 4), 9, 11).tolist()


def test_seeds_of_tasks_differ():
    assert len({task_seed(seed, task) for seed in range(5) for task in range(5)}) == 25
    assert all(0 <= task_seed(2 ** 62, task) < 2 ** 63 for task in range(20))


# ---------------------------------------------------------------- measures

def test_measures():
    assert average_incremental([90., 60., 30.]) == 60
    assert forgetting([[90.]]) is None
    assert forgetting([[90.], [70., 80.]]) == 20
    # the best before: 90 and 80; what was gained counts as negative
    assert forgetting([[90.], [70., 80.], [40., 90., 50.]]) == (50 - 10) / 2
