"""Validation images that are training images too: a mistake that no accuracy shows.

The same file is found by whatever path it is named, and so are copies: images of the same class, name and size,
of which some are compared. Images that were encoded again, or renamed and copied, are not found.
"""
from collections.abc import Iterator
from pathlib import PurePath

from image_data.decoding import BadImage
from image_data.sources import Source
from utils import InputError, is_main, print0

COMPARED = 16  # pairs of images of the same class, name and size


def note_shared_images(train: Source, val: Source) -> None:
    """Say where images of one set are images of another."""
    if not is_main():  # it would take each rank the same time
        return
    shared = same_places(train, val)
    number = f'{len(shared):,}' if shared else 'some'
    shared = shared or copies(train, val)
    if shared:
        print0(f'note: {val.data_path}: {number} of its {len(val):,} images are training images of {train.data_path} '
               f'too, such as {val.names[shared[0]]}: results on these say nothing of other images')


def same_places(train: Source, val: Source) -> list[int]:
    """The images of `val` that lie where images of `train` do."""
    places = [place for place, _ in val.places()]
    wanted = set(places) - {None}
    found = {place for place, _ in train.places() if place in wanted}
    return [i for i, place in enumerate(places) if place in found]


def copies(train: Source, val: Source) -> list[int]:
    """Some images of `val` that are copies of images of `train`: of the same class, name and size."""
    of_val = {key: i for i, key in enumerate(_keys(val))}
    pairs = [(of_val[key], j) for j, key in enumerate(_keys(train)) if key in of_val]
    shared = []
    for i, j in pairs[::max(1, len(pairs) // COMPARED)][:COMPARED]:  # over the whole set
        content = _content(val, i)
        if content is not None and content == _content(train, j):
            shared.append(i)
    return shared


def _keys(source: Source) -> Iterator[tuple[int, str, int]]:
    """Class, name and size of each image."""
    for label, name, (_, size) in zip(source.labels.tolist(), source.names, source.places()):
        yield label, PurePath(name).name, size


def _content(source: Source, i: int) -> bytes | None:
    """The bytes of an image, or None where it cannot be read, which is said where it is used."""
    try:
        return source.read(i)
    except (OSError, BadImage, InputError):
        return None
