"""A replay memory of a number of bytes, and the policies by which it is filled when a task ends.

`fill` lets a task's images pass by when its training has ended, by one of two policies; `save_memory` and `load_memory`
carry what is held to the next task.

The bytes of a sample are those of its data (continual/forms.py), LABEL_BYTES for the label and INDEX_BYTES by which the
next sample is located. The file of a memory is as long, but for headers of a thousand
bytes or so. Neither policy holds more than the limit at any moment, beside the one sample that is looked at.

    reservoir   a uniform sample of all images that came by, whatever their class. Each image of the stream has a random
                key, and those with the smallest keys are kept, as many as fit: for samples of one size this is
                Vitter's reservoir (1985). Keys need no bytes: given the largest key that may be kept, those of the
                samples held are uniform below it, so that alone is stored (Li's Algorithm L, 1994).
    balanced    of each class as many samples as of any other, to within one, or all that there are. Which of a class
                are held is chosen at random once; when classes come, the last of each are dropped. Once an image did
                not fit, no class gets more than its class had then and one, though smaller ones would fit.

An image that takes more than an equal share of the limit for a class is never held: it would cost whole classes their
place, in a memory of images of different sizes.
"""
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fileio.files import atomic_path
from utils import InputError

LABEL_BYTES = 2
INDEX_BYTES = 4
MAX_CLASSES = 1 << 8 * LABEL_BYTES
NO_BOUND = 1 << 31  # on the samples of a class: more than any class has
POLICIES = ('reservoir', 'balanced')


class Sample(NamedTuple):
    """A stored image.

    Attributes:
        label: of the model, from 0.
        index: an unsigned number of INDEX_BYTES that tells how many bytes the data has.
        data: its bytes.
    """
    label: int
    index: int
    data: bytes

    @property
    def size(self) -> int:
        """Bytes that it takes in memory."""
        return len(self.data) + LABEL_BYTES + INDEX_BYTES


Encode = Callable[[int], Sample]  # the number of an image of the task -> the sample that it becomes


class ReplayMemory:
    """Samples of `limit` bytes together at most.

    Args:
        limit: in bytes.

    Attributes:
        samples: in a fixed order, from which seeded draws pick by position.
        size: bytes of the samples.
        largest_key: with the reservoir, the largest key that may be kept, see the module's docstring.
        most: with the balanced policy, how many samples a class may have.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.samples = []
        self.size = 0
        self.largest_key = 1.
        self.most = NO_BOUND

    def __len__(self) -> int:
        return len(self.samples)

    def fits(self, sample: Sample) -> bool:
        """Whether there is room for one more sample."""
        return self.size + sample.size <= self.limit

    def add(self, sample: Sample) -> None:
        """Take one more sample. Raises ValueError where it does not fit."""
        if not self.fits(sample):
            raise ValueError(f'{sample.size} bytes more than {self.size} exceed {self.limit}')
        self.samples.append(sample)
        self.size += sample.size

    def remove(self, position: int) -> None:
        """Drop the sample at a position."""
        self.size -= self.samples.pop(position).size

    def labels(self) -> np.ndarray:
        """(n,) int64."""
        return np.array([sample.label for sample in self.samples], np.int64)


# ---------------------------------------------------------------- policies

def fill(memory: ReplayMemory, policy: str, images: np.ndarray, labels: np.ndarray, encode: Encode,
         seed: Sequence[int]) -> int:
    """Let a task's images pass by the memory, in place, in an order of the seed.

    Args:
        memory: of the tasks before.
        policy: one of POLICIES.
        images: (n,) of the task.
        labels: (N,) of all images, those of tasks to come too.
        seed: of this task.

    Returns:
        How many images were passed over, because they take more than an equal share of the memory for a class.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(images)
    class_bytes = bytes_per_class(memory.limit, labels)
    if policy == 'reservoir':
        return fill_reservoir(memory, order.tolist(), encode, class_bytes, rng)
    return fill_balanced(memory, {label: order[labels[order] == label].tolist()
                                  for label in np.unique(labels[order]).tolist()}, encode, class_bytes)


def bytes_per_class(limit: int, labels: np.ndarray) -> int:
    """Bytes for each class where all classes of `labels`, 0 to the largest, divide `limit` equally."""
    return limit // (int(labels.max()) + 1)


def fill_reservoir(memory: ReplayMemory, stream: Iterable[int], encode: Encode, class_bytes: int,
                   rng: np.random.Generator) -> int:
    """Let a stream of images pass by the reservoir, in place; only those that are taken are encoded.

    Returns:
        How many images would have been taken, but are of more than `class_bytes` bytes.
    """
    large = 0
    for number in stream:
        # a key that is too large is not kept, so that the image need not be encoded
        if rng.random() >= memory.largest_key:
            continue
        sample = encode(number)
        if sample.size > class_bytes:
            large += 1
            continue
        while not memory.fits(sample):
            together = len(memory) + 1
            memory.largest_key *= rng.random() ** (1 / together)  # the largest of so many uniform keys ...
            position = int(rng.integers(together))  # ... which is equally likely to be any sample's
            if position == len(memory):
                break
            memory.remove(position)
        else:
            memory.add(sample)
    return large


def fill_balanced(memory: ReplayMemory, new: dict[int, Sequence[int]], encode: Encode, class_bytes: int) -> int:
    """Make room for new classes, in place, and take as many of them as of the others.

    Samples are ordered by their rank within their class, and then by class; those that come first are held, as many as
    fit. New ones come in this order, and the last of the old ones go until each fits.

    Args:
        memory: changed in place.
        new: label -> images in the order in which they are taken.
        class_bytes: images of more bytes are passed over.

    Returns:
        How many images were passed over.
    """
    ranks = rank_samples(memory)
    end = memory.most, 0  # samples of this rank, (position in the class, label), or a higher one do not fit
    large = []
    waiting = {label: small_samples(images, encode, class_bytes, large) for label, images in sorted(new.items())}
    for position in range(memory.most):
        for label in list(waiting):
            sample = next(waiting[label], None) if (position, label) < end else None
            if sample is None:
                del waiting[label]
                continue
            # old samples of a higher rank go first: then no class keeps more than one beyond the others
            while not memory.fits(sample) and ranks and ranks[-1] > (position, label):
                end = ranks.pop()
                memory.remove(len(ranks))
            if memory.fits(sample):
                memory.add(sample)
            else:
                end = position, label
        if not waiting:
            break
    memory.most = min(memory.most, end[0] + 1)  # see the module's docstring: later classes get no more either
    return len(large)


def rank_samples(memory: ReplayMemory) -> list[tuple[int, int]]:
    """Sort a memory's samples by (position within their class, label), and return these."""
    counts = Counter()
    ranked = []
    for sample in memory.samples:
        ranked.append(((counts[sample.label], sample.label), sample))
        counts[sample.label] += 1
    ranked.sort()
    memory.samples = [sample for _, sample in ranked]
    return [rank for rank, _ in ranked]


def small_samples(images: Iterable[int], encode: Encode, class_bytes: int, large: list[int]) -> Iterator[Sample]:
    """The samples of images that take `class_bytes` bytes at most; sizes of the others are noted in `large`."""
    for number in images:
        sample = encode(number)
        if sample.size <= class_bytes:
            yield sample
        else:
            large.append(sample.size)


def check_room(limit: int, labels: np.ndarray, encode: Encode, form: str, names: Sequence[str] = ()) -> None:
    """InputError unless an equal share of `limit` bytes holds an image of each class.

    Args:
        limit: bytes of the memory.
        labels: (N,) of all images.
        form: how images are stored, for the error.
        names: of the classes, for the error.
    """
    # the first image of a class that is small enough will do, so mostly one image of each class is encoded
    classes = np.unique(labels)
    class_bytes = bytes_per_class(limit, labels)
    for label in classes.tolist():
        large = []
        if next(small_samples(np.flatnonzero(labels == label).tolist(), encode, class_bytes, large), None) is None:
            name = f'class {names[label]}' if names else 'a class'
            raise InputError(f'--memory-bytes {limit}: less than an image of each of the {len(classes)} classes takes '
                             f'as {form} ({name} has none below {min(large)} bytes): give {len(classes) * min(large)} '
                             'or more')


# ---------------------------------------------------------------- files

def save_memory(memory: ReplayMemory, path: Path) -> None:
    """Write a memory atomically, as .npz. Raises InputError."""
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, labels=memory.labels().astype(np.uint16),
                 index=np.array([sample.index for sample in memory.samples], np.uint32),
                 data=np.frombuffer(b''.join(sample.data for sample in memory.samples), np.uint8),
                 limit=np.int64(memory.limit), largest_key=np.float64(memory.largest_key), most=np.int64(memory.most))


def load_memory(path: Path, length_of: Callable[[int], int]) -> ReplayMemory:
    """Read a memory.

    Args:
        path: that `save_memory` wrote.
        length_of: index -> bytes of data.

    Raises:
        InputError: for a file that is damaged, or none.
    """
    try:
        with np.load(path) as arrays:
            labels, index, data, limit, largest_key, most = (
                arrays[name] for name in ('labels', 'index', 'data', 'limit', 'largest_key', 'most'))
        memory = ReplayMemory(int(limit))
        memory.largest_key = float(largest_key)
        memory.most = int(most)
        lengths = [length_of(value) for value in index.tolist()]
        if len(labels) != len(index) or data.dtype != np.uint8 or sum(lengths) != len(data):
            raise ValueError('its lengths differ')
        stream = data.tobytes()
        start = 0
        for label, value, length in zip(labels.tolist(), index.tolist(), lengths):
            memory.add(Sample(label, value, stream[start:start + length]))
            start += length
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f'{path}: no replay memory, or damaged ({error}); remove its line and those after it from '
                         'results.jsonl, and its task fills it again') from None
    return memory
