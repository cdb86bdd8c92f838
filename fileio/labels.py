"""Classes: how many a model has, and whether two sets of labels mean the same ones."""
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fileio.files import MAX_LABEL_BYTES, read_bytes, write_text
from utils import InputError

MAX_CLASS = 10 ** 6  # a larger label is no class number


def check_class_names(ours: list[str] | None, theirs: list[str] | None, our_file: str | Path,
                      their_file: str | Path) -> None:
    """InputError unless two lists of class names, where both are known, are the same in the same order."""
    if same_class_names(ours, theirs):
        return
    for label, (our_name, their_name) in enumerate(itertools.zip_longest(ours, theirs)):
        if our_name != their_name:
            our_word, their_word = ('missing' if name is None else ascii(name) for name in (our_name, their_name))
            raise InputError(f'{their_file}: class {label} is {their_word}, but in {our_file} it is {our_word}: labels '
                             'would mean other classes; make both sets from the same class names')


def same_class_names(ours: list[str] | None, theirs: list[str] | None) -> bool:
    """Whether two lists of class names do not contradict one another: they are the same, or one is not known."""
    return ours is None or theirs is None or list(ours) == list(theirs) or _repeat_labels(ours, theirs) or (
        _repeat_labels(theirs, ours))


def _repeat_labels(names: list[str], others: list[str]) -> bool:
    """Whether names are only the labels, as of folders 0, 1, 2 or 00, 01, 02, which no number in others contradicts."""
    ours, theirs = ([int(name) if str(name).isdecimal() else None for name in side] for side in (names, others))
    return bool(ours) and ours == list(range(len(ours))) and all(n in (None, label) for label, n in enumerate(theirs))


def count_classes(labels: dict[str, np.ndarray], asked: int | None, trained: int | None) -> int:
    """Classes of a model's head: `asked`, or what it was trained for, or the largest label of the first file + 1.

    Args:
        labels: of each file.
        asked: --nb-classes, or None.
        trained: outputs of a checkpoint's head, or None.

    Raises:
        InputError: naming a file with a label beyond them.
    """
    classes = asked or trained or int(next(iter(labels.values())).max()) + 1
    for path, values in labels.items():
        if int(values.max()) >= classes:
            raise InputError(f'{path}: holds class {int(values.max())}, but there are {classes} classes (0 to '
                             f'{classes - 1}): fix the labels or give --nb-classes')
    return classes


def read_labels(path: str | Path) -> np.ndarray:
    """The (N,) int64 classes in a label file; empty lines at its end are passed over.

    Raises:
        InputError: naming the first bad line.
    """
    text = read_bytes(path, MAX_LABEL_BYTES).removeprefix(b'\xef\xbb\xbf').rstrip(b' \t\r\n')
    if not text:
        raise InputError(f'{path}: no labels in it')
    bad = re.search(rb'^(?![ \t]*[+-]?\d{1,18}[ \t\r]*$).*', text, re.MULTILINE)
    if bad:
        line = text.count(b'\n', 0, bad.start()) + 1
        raise InputError(f'{path}: line {line} is not an integer class: {bad.group()[:40].decode(errors="replace")!r}')
    labels = np.fromstring(text, np.int64, sep=' ')
    wrong = (labels < 0) | (labels > MAX_CLASS)
    if wrong.any():
        line = int(np.argmax(wrong))
        raise InputError(f'{path}: line {line + 1}: class {labels[line]} is not from 0 to {MAX_CLASS:,}; classes are '
                         'numbered from 0')
    return labels


def write_labels(path: str | Path, labels: Iterable[int]) -> None:
    """Write a label file atomically. Raises InputError."""
    write_text(path, ''.join(f'{label}\n' for label in labels))
