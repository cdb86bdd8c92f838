"""Labels: the files that hold them, how many classes they make, and whether two sets mean the same classes.

A label is a number, and the order of the class names gives it its meaning. Two sets with other names for one number
would train and evaluate without an error, so names are compared wherever both sets have them.
"""
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fileio.files import MAX_LABEL_BYTES, read_bytes, write_text
from utils import InputError

MAX_CLASS = 10 ** 6  # a larger label is no class number


def check_class_names(names: list[str] | None, others: list[str] | None, file: str | Path,
                      other_file: str | Path) -> None:
    """InputError unless two lists of class names, where both are known, are the same in the same order."""
    if same_class_names(names, others):
        return
    for label, pair in enumerate(itertools.zip_longest(names, others)):
        if pair[0] != pair[1]:
            name, other = ('missing' if name is None else ascii(name) for name in pair)
            raise InputError(f'{other_file}: class {label} is {other}, but in {file} it is {name}: labels would mean '
                             'other classes; make both sets from the same class names')


def same_class_names(names: list[str] | None, others: list[str] | None) -> bool:
    """Whether two lists of class names do not contradict one another: they are the same, or one is not known."""
    return names is None or others is None or list(names) == list(others) or _repeat_labels(names, others) or (
        _repeat_labels(others, names))


def _repeat_labels(names: list[str], others: list[str]) -> bool:
    """Whether names are only the labels, as of folders 0, 1, 2 or 00, 01, 02, which no number in others contradicts."""
    numbers, other_numbers = ([int(name) if str(name).isdecimal() else None for name in side]
                              for side in (names, others))
    # 'n01440764' says nothing about its number; '7' as the name of class 3 does
    return bool(numbers) and numbers == list(range(len(numbers))) and all(
        number in (None, label) for label, number in enumerate(other_numbers))


def count_classes(labels: dict[str, np.ndarray], requested: int | None, trained: int | None,
                  advice: str = 'fix the labels or give --nb-classes') -> int:
    """Classes of a model's head: `requested`, or what it was trained for, or the largest label of the first file + 1.

    Args:
        labels: of each file, by its path.
        requested: --nb-classes, or None.
        trained: outputs of a checkpoint's head, or None.
        advice: what the user can do about a label beyond them.

    Raises:
        InputError: naming a file with a label beyond them.
    """
    classes = requested or trained or int(next(iter(labels.values())).max()) + 1
    for path, values in labels.items():
        if int(values.max()) >= classes:
            raise InputError(f'{path}: holds class {int(values.max())}, but there are {classes} classes (0 to '
                             f'{classes - 1}): {advice}')
    return classes


def read_labels(path: str | Path) -> np.ndarray:
    """The (N,) int64 classes in a label file; empty lines at its end are passed over.

    Raises:
        InputError: naming the first bad line.
    """
    text = read_bytes(path, MAX_LABEL_BYTES).removeprefix(b'\xef\xbb\xbf').rstrip(b' \t\r\n')
    if not text:
        raise InputError(f'{path}: no labels in it')
    # one expression over the whole file: a loop over a million lines takes seconds
    bad = re.search(rb'^(?![ \t]*[+-]?\d{1,18}[ \t\r]*$).*', text, re.MULTILINE)
    if bad:
        line = text.count(b'\n', 0, bad.start()) + 1
        raise InputError(f'{path}: line {line} is not an integer class: {bad.group()[:40].decode(errors="replace")!r}')
    labels = np.fromstring(text, np.int64, sep=' ')
    out_of_range = (labels < 0) | (labels > MAX_CLASS)
    if out_of_range.any():
        line = int(np.argmax(out_of_range))
        raise InputError(f'{path}: line {line + 1}: class {labels[line]} is not from 0 to {MAX_CLASS:,}; classes are '
                         'numbered from 0')
    return labels


def write_labels(path: str | Path, labels: Iterable[int]) -> None:
    """Write a label file atomically. Raises InputError."""
    write_text(path, ''.join(f'{label}\n' for label in labels))


def spread(labels: np.ndarray | None, images: int, count: int) -> np.ndarray:
    """Which images to show of a set, so that they are of as many classes as can be: rising (m,) int64, m <= count.

    Args:
        labels: (N,) int64 of the set, or None where they are not known: then images from all over the set are taken.
        images: N.
        count: how many are asked for.
    """
    count = min(count, images)
    if labels is None:
        return np.linspace(0, images - 1, count).astype(np.int64)
    of_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if len(of_class) > count:  # some classes, from all over their numbers
        of_class = [of_class[number] for number in np.linspace(0, len(of_class) - 1, count).astype(int)]
    # the first image of each class, then the second of each, and so on
    turns = sorted((turn, number) for numbers in of_class for turn, number in enumerate(numbers[:count].tolist()))
    return np.array(sorted(number for _, number in turns[:count]), np.int64)


def name_labels(labels: Iterable[int] | None, names: list[str] | None) -> list[str]:
    """The names of labels, for pictures; the number where a class has no name, and none at all without labels."""
    names = names or []
    return [str(names[label]) if label < len(names) else str(label) for label in ([] if labels is None else labels)]
