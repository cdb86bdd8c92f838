"""Some of a model's classes: which of them a set of images has, and a model that chooses only among those.

ImageNet-R and ImageNet-A hold 200 of ImageNet's 1000 classes each, ImageNet-Sketch all of them. A model of 1000 classes
is scored on such a set over the classes of the set alone, as is usual: the logits of the others are left out.
Labels keep the model's numbers.
"""
import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import ImageNetInfo
from torch import nn

from fileio.files import read_bytes
from fileio.labels import check_class_names
from image_data.sources import Source
from utils import InputError, print0

IMAGENET_CLASSES = 1000
# What --classes takes, besides a file -> timm's table of the classes; None for all of ImageNet's.
KNOWN = {'imagenet': None, 'imagenet-sketch': None, 'imagenet-a': 'imagenet_a_synsets.txt',
         'imagenet-r': 'imagenet_r_synsets.txt'}
MAX_FILE_BYTES = 1 << 24


@dataclass(frozen=True)
class ClassSubset:
    """Some of a model's classes.

    Attributes:
        value: --classes as given, one of KNOWN or a file.
        indices: the numbers of the classes in the model. A set of images without class names has them in this order.
        names: of the classes, or None where the model has none.
    """
    value: str
    indices: list[int]
    names: list[str] | None

    def __len__(self) -> int:
        return len(self.indices)


# ---------------------------------------------------------------- which classes

def read_classes(value: str, names: list[str] | None, num_classes: int, model_path: str) -> ClassSubset:
    """The classes that --classes names.

    Args:
        value: one of KNOWN, or a UTF-8 text file with a class a line: its name, or its number from 0.
        names: the model's class names, where they are known. A model of 1000 classes without names has ImageNet's, in
            the usual order.
        num_classes: of the model.
        model_path: the model's checkpoint.

    Returns:
        The subset: of ImageNet's in alphabetical order of the synsets, of a file in the order of its lines.

    Raises:
        InputError: the model lacks a class, or the file cannot be read, holds none, or one twice.
    """
    names = _meaningful_names(names)
    if not names and num_classes == IMAGENET_CLASSES:  # the published checkpoints have no class names
        names = ImageNetInfo('imagenet-1k').label_names()
    requested = _known_synsets(value) if value in KNOWN else _read_lines(value)
    # A file may name classes or number them. A name wins: folders may be called by numbers of another order.
    numbers = {name: label for label, name in enumerate(names or ())}
    indices = []
    for entry in requested:
        is_number = value not in KNOWN and re.fullmatch('[0-9]{1,9}', entry)
        index = numbers.get(entry, int(entry) if is_number else None)
        if index is None or index >= num_classes:
            raise InputError(f'--classes {value}: {model_path} has no class {entry[:60]!r}, only {num_classes} '
                             f'{"others" if names else "without names"}; give a file with a class of the model a line')
        if index in indices:
            raise InputError(f'--classes {value}: class {entry[:60]!r} is in it twice')
        indices.append(index)
    return ClassSubset(value, indices, [names[index] for index in indices] if names else None)


def _meaningful_names(names: list[str] | None) -> list[str] | None:
    """Class names that mean something: None for those of folders that are called by their labels, as 0, 1, 2."""
    repeated = names and all(name.isdecimal() and int(name) == label for label, name in enumerate(names))
    return None if repeated else names


def _known_synsets(value: str) -> list[str]:
    """WordNet's names, as in n01440764, of the classes of one of KNOWN."""
    table = KNOWN[value]
    if table is None:
        return ImageNetInfo('imagenet-1k').label_names()
    try:  # timm reads these tables itself, but has no function that gives them
        return importlib.resources.files('timm.data').joinpath('_info', table).read_text().split()
    except OSError:
        raise InputError(f'--classes {value}: timm {timm.__version__} has no {table}; install timm 1.0.15 or later, or '
                         'give a file with a class a line') from None


def _read_lines(value: str) -> list[str]:
    """The lines of a file that are not empty. Raises InputError."""
    if not Path(value).exists():
        raise InputError(f'--classes {value}: no such file, and none of {", ".join(KNOWN)}')
    try:
        lines = read_bytes(value, MAX_FILE_BYTES).decode('utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f'{value}: no UTF-8 text ({error.reason} at byte {error.start}); save it so') from None
    entries = [line.strip() for line in lines if line.strip()]
    if not entries:
        raise InputError(f'{value}: no classes in it; give one a line')
    return entries


# ---------------------------------------------------------------- their images

def map_labels(subset: ClassSubset, source: Source) -> np.ndarray:
    """The model's labels of images that have just the classes of a subset.

    By the images' class names, such as folders called n01443537; where these or the model's are not known, the images'
    classes are taken to be the subset's in its order, with a note.

    Returns:
        (N,) int64, numbers of the model's classes.

    Raises:
        InputError: the images have other classes, or not all of them.
    """
    classes = _meaningful_names(source.classes)
    if classes and subset.names:
        _check_names(subset, classes, source.data_path)
        numbers = dict(zip(subset.names, subset.indices))
        return np.array([numbers[name] for name in classes], np.int64)[source.labels]
    count = _count_classes(source)
    if count != len(subset):
        raise InputError(f'{source.data_path}: {count} classes without names that are known, but --classes '
                         f'{subset.value} is {len(subset)}: number the labels from 0 to {len(subset) - 1} in its '
                         'order, or name the class folders as the model does')
    print0(f'note: {source.data_path}: its labels are taken as the classes of --classes {subset.value} in their order')
    return np.array(subset.indices, np.int64)[source.labels]


def _check_names(subset: ClassSubset, classes: list[str], data_path: str) -> None:
    """InputError unless the images' classes are those of the subset, in any order."""
    missing = sorted(set(subset.names) - set(classes))
    surplus = sorted(set(classes) - set(subset.names))
    if missing or surplus:
        complaints = [f'{len(some):,} are {what} (first: {ascii(some[0])})'
                 for some, what in ((missing, 'missing'), (surplus, 'not of it')) if some]
        raise InputError(f'{data_path}: its classes are not the {len(subset)} of --classes {subset.value}: '
                         f'{" and ".join(complaints)}; give the images that belong to it, or other --classes')


def match_classes(source: Source, names: list[str] | None, num_classes: int, model_path: str,
                  value: str | None = None) -> tuple[np.ndarray, int, list[int] | None]:
    """What the labels of images mean to a model, checked.

    Args:
        source: the images.
        names: the model's class names, where they are known.
        num_classes: of the model.
        model_path: the model's checkpoint.
        value: --classes, or None for all classes of the model.

    Returns:
        The model's labels (N,) int64 of the images; how many classes they have; the classes that the model is to choose
        among, for OnlyClasses, or None for all.

    Raises:
        InputError: the images have other classes.
    """
    if value is None:
        return source.labels, check_classes(source, names, num_classes, model_path), None
    subset = read_classes(value, names, num_classes, model_path)
    return map_labels(subset, source), len(subset), subset.indices


def check_classes(source: Source, names: list[str] | None, num_classes: int, model_path: str) -> int:
    """Check that labels of the images mean the model's classes; a note where the model has more.

    Args:
        source: the images.
        names: the model's class names, where they are known.
        num_classes: of the model.
        model_path: the model's checkpoint.

    Returns:
        Number of classes of the images.

    Raises:
        InputError: the images have more classes than the model, or other ones.
    """
    classes = _count_classes(source)
    if classes > num_classes:
        raise InputError(f'{source.data_path}: {classes} classes, but the model has {num_classes}')
    if names and source.classes:
        check_class_names(names[:len(source.classes)], source.classes, model_path, source.data_path)
    if classes < num_classes:
        print0(f'note: {source.data_path} has {classes} classes and the model {num_classes}; labels are from '
               f'{source.labels_from}')
    return classes


def _count_classes(source: Source) -> int:
    """Number of classes: the names, or the largest label + 1."""
    return max(len(source.classes or ()), int(source.labels.max()) + 1)


# ---------------------------------------------------------------- the model

class OnlyClasses(nn.Module):
    """A model that chooses among some of its classes: the logits of all others become -inf.

    So labels and predictions keep the model's numbers, and top-k, softmax and cross-entropy are those over the subset.

    Args:
        model: x -> logits (B, C).
        indices: of the classes that stay.
        num_classes: C.
    """

    def __init__(self, model: nn.Module, indices: list[int], num_classes: int):
        super().__init__()
        self.model = model
        masked = torch.ones(num_classes, dtype=torch.bool)
        masked[indices] = False
        self.register_buffer('masked', masked, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).masked_fill(self.masked, float('-inf'))
