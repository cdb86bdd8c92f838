"""Classes: how many a model has, and whether two sets of labels mean the same ones."""
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.origins import origin_note
from utils import InputError


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


def head_size(weights: dict[str, Any], classifier: str | tuple[str, ...], path: str) -> int:
    """Classes that the head of a checkpoint's weights tells apart, by its name. Raises InputError without one."""
    classifier = classifier if isinstance(classifier, str) else classifier[0]  # the second distills
    bias = weights.get(f'{classifier}.bias')
    if not isinstance(bias, torch.Tensor) or bias.ndim != 1:
        names = ', '.join(map(str, list(weights)[:3]))
        raise InputError(f'{path}: no {classifier}.bias among its weights ({names}, ...): of another kind of model'
                         + origin_note(weights, {}))
    return len(bias)
