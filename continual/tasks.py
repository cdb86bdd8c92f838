"""Class-incremental tasks: which classes come when, which images a step sees, and how a run is measured.

Protocols are named B10-Inc10: ten classes in the first task, ten more in each later one. The order of the classes is
numpy's RandomState(seed).permutation, with seed 1993 as in iCaRL and those who followed (Rebuffi et al., CVPR 2017).
A model's label of a class is its position in that order, so that the classes seen so far are its first outputs.

`make_tasks` cuts the classes into tasks, `step_batches` says which images each step of a task sees, as a pure function
of seed and step, and the measures at the end are those of the tables.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils import InputError, rank

ORDER_SEED = 1993


@dataclass(frozen=True)
class Tasks:
    """Classes in the order in which they come, cut into tasks.

    Attributes:
        order: (C,) int64, a permutation of the labels.
        ends: classes seen after each task, rising to C.
    """
    order: np.ndarray
    ends: tuple[int, ...]

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self.ends)

    def classes(self, task: int) -> range:
        """The positions in the order of a task's classes."""
        return range(self.ends[task - 1] if task else 0, self.ends[task])

    def positions(self, labels: np.ndarray) -> np.ndarray:
        """The position in the order, (N,) int64, of the class of each label (N,)."""
        position_of = np.empty(len(self.order), np.int64)
        position_of[self.order] = np.arange(len(self.order))
        return position_of[labels]

    def images(self, positions: np.ndarray, task: int, joint: bool = False) -> np.ndarray:
        """The images, rising int64, of a task's classes, or of all classes seen by then if `joint`.

        Args:
            positions: (N,), of each image's class.
        """
        classes = self.classes(task)
        return np.flatnonzero((positions < classes.stop) & (joint | (positions >= classes.start)))


def make_tasks(classes: int, base: int, increment: int, seed: int = ORDER_SEED) -> Tasks:
    """The tasks of a protocol: `base` classes first, then `increment` at a time, in the order of a seed.

    Raises:
        InputError: when these do not divide the classes.
    """
    if base > classes or (classes - base) % increment:
        rest = 'are more than' if base > classes else f'and then --inc-classes {increment} at a time do not divide'
        raise InputError(f'--base-classes {base} {rest} the {classes} classes: choose others')
    order = np.random.RandomState(seed).permutation(classes).astype(np.int64)
    return Tasks(order, tuple(range(base, classes + 1, increment)))


# ---------------------------------------------------------------- which images a step sees

def endless(n: int, start: int, stop: int, seed: Sequence[int]) -> np.ndarray:
    """Items `start` to `stop` - 1, int64, of an endless row of the numbers below n: pass after pass, each shuffled."""
    # only the passes that are asked for are made, so that a resumed task need not repeat those before
    passes = [np.random.default_rng((*seed, number)).permutation(n) for number in range(start // n, -(-stop // n))]
    skipped = start // n * n
    return np.concatenate([np.empty(0, np.int64), *passes])[start - skipped:stop - skipped]


def step_batches(new: int, held: int, batch_size: int, memory_fraction: float, steps: range, seed: int) -> np.ndarray:
    """Which images each step sees, (steps, batch_size) int64: below `new` the task's own, then those of the memory.

    All images of a kind are seen equally often, to within one. Each batch is shuffled, because CutMix and Mixup pair
    its images.

    Args:
        new: how many images the task has.
        held: how many images the memory holds.
        batch_size: of all processes together.
        memory_fraction: of a batch, that comes from memory where it holds any image.
        steps: numbers of the steps, from the task's first one on.
        seed: of the task.
    """
    from_memory = round(memory_fraction * batch_size) if held else 0
    fresh = batch_size - from_memory
    parts = [endless(new, steps.start * fresh, steps.stop * fresh, (seed, 0)).reshape(len(steps), fresh)]
    if from_memory:
        replayed = endless(held, steps.start * from_memory, steps.stop * from_memory, (seed, 1))
        parts.append(new + replayed.reshape(len(steps), from_memory))
    batches = np.concatenate(parts, 1)
    for row, step in zip(batches, steps):
        row[:] = row[np.random.default_rng((seed, 2, step)).permutation(batch_size)]
    return batches


def step_draws(shape: tuple[int, int], seed: int, first: int) -> np.ndarray:
    """What the augmentation of each image of some steps is seeded by, (steps · B, 4) int64.

    The seed has the step and the position in the batch, and not the image: an image of a small memory comes more than
    once in an epoch, and shall be augmented differently each time.

    Args:
        shape: (steps, B) of this rank.
        seed: of the task.
        first: number of the first step.
    """
    steps, positions = np.indices(shape)
    return np.stack([np.full(shape, seed), np.full(shape, rank()), first + steps, positions], -1).reshape(-1, 4)


def task_seed(seed: int, task: int) -> int:
    """The seed of a task in a run of `seed`, below 2 ** 63."""
    # 63 bits, because seeds of torch and of --seed are signed
    return int(np.random.SeedSequence((seed, task)).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ---------------------------------------------------------------- measures

def average_incremental(accuracy: Sequence[float]) -> float:
    """The mean over tasks of the accuracy, after each, on all classes seen (iCaRL)."""
    return sum(accuracy) / len(accuracy)


def forgetting(matrix: Sequence[Sequence[float]]) -> float | None:
    """How much of the best accuracy on each old task is lost now, on average (Chaudhry et al., ECCV 2018).

    Args:
        matrix: row t has the accuracy on tasks 0 to t after task t.

    Returns:
        The mean over the tasks before the last of (best accuracy so far, without the last row) - (last row), or None
        after the first task.
    """
    *before, last = matrix
    lost = [max(row[task] for row in before[task:]) - last[task] for task in range(len(before))]
    return sum(lost) / len(lost) if lost else None
