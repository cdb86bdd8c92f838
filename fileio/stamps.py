"""Were the files replaced that a finished result was made of? Their sizes and times say it, without reading them.

Another size proves another file. A later time does not, as copies of files have new ones: then a line is printed.
"""
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from utils import InputError, print0


class Stamp(NamedTuple):
    """Of files in their order: SHA-256 of their sizes, and when the last of them was changed, in nanoseconds."""
    sizes: str
    changed: int


def stamp_of(paths: Iterable[str | Path], members: Iterable[int] = ()) -> Stamp:
    """The stamp of files, one of which may be missing, and of the sizes of what is in them, where these are known."""
    sizes = hashlib.sha256()
    changed = 0
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError:  # it is said where the file is read
            sizes.update(b'none\n')
            continue
        sizes.update(f'{stat.st_size}\n'.encode())
        changed = max(changed, stat.st_ctime_ns)  # unlike st_mtime_ns it cannot be set, as `cp -p` would
    for size in members:
        sizes.update(f'{size}\n'.encode())
    return Stamp(sizes.hexdigest(), changed)


def changed_since(stamp: Stamp, paths: Iterable[str | Path]) -> bool:
    """Whether one of the files of a stamp was changed after the first of `paths` was written."""
    return stamp.changed > min((os.stat(path).st_mtime_ns for path in paths), default=stamp.changed)


def check_stamp(stamp: Stamp, sizes: Any, paths: Iterable[str | Path], result: str, advice: str) -> str:
    """Compare the images that a result was made of with what they are now.

    Args:
        stamp: of the images now.
        sizes: of the images then, as in a stamp; None where they were not kept.
        paths: of the result.
        result: a text that names it.
        advice: what to do to make it again.

    Returns:
        A text: what was compared, their names and labels included.

    Raises:
        InputError: for images of other sizes. Where only their times are later, a note is printed.
    """
    if sizes is not None and sizes != stamp.sizes:
        raise InputError(f'{result} was made of images that have changed since, as other sizes show: {advice}')
    compared = 'names and labels' if sizes is None else 'names, labels and sizes'
    if changed_since(stamp, paths):
        print0(f'note: {result} is older than its images: if they were replaced, and not only copied, {advice}')
        return f'its images have the same {compared}'
    return f'its images have the same {compared}, and are older'
