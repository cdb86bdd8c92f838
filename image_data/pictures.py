"""Pictures without labels, as predictions are made of them: whatever a user names on a command line.

    PICTURE                 a file of any name; whether it is an image is seen when it is read
    FOLDER                  all images in it and below it, in class folders or not
    LIST.txt                a path a line, with a label behind it (see sources.py) or without; relative to the list
    SHARD.tar               every image in a tar, with or without labels; a glob or 'x-{000..146}.tar' too
    FILE.parquet            as in sources.py, with or without labels

They are sources like those of sources.py, for `load_images`. Names of files are paths that can be opened from here.
"""
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fileio.files import expand_files
from image_data.decoding import IgnoredFiles, is_image
from image_data.folders import images_in
from image_data.sources import ImageFiles, ParquetImages, Source, TarImages, read_lines
from utils import InputError

READERS = {'.tar': lambda paths, ignored: TarImages(paths, ignored, labeled=False),
           '.parquet': lambda paths, ignored: ParquetImages(paths, labeled=False)}


class PictureFiles(ImageFiles):
    """Pictures that are files of their own, by their paths."""
    labels_from = 'nowhere'
    folder = Path()

    def __init__(self, paths: list[str]):
        self.names = paths
        self.labels = np.full(len(paths), -1)


def open_pictures(arguments: Sequence[str]) -> list[Source]:
    """The pictures of a command line, in its order; neighbors of one kind are one source. Prints what is ignored.

    Raises:
        InputError: for what is not there, and a folder, list or tar without pictures.
    """
    sources = []
    files = [(argument, path) for argument in arguments for path in _expand(argument)]
    for suffix, group in itertools.groupby(files, lambda file: _kind(file[1])):
        group = list(group)
        ignored = IgnoredFiles()
        if suffix:
            source = READERS[suffix]([path for _, path in group], ignored)
        else:
            source = PictureFiles([name for _, path in group for name in pictures_in(path, ignored)])
        source.data_path = ' '.join(dict.fromkeys(argument for argument, _ in group))
        if len(source.data_path) > 100 or source.names == [source.data_path]:  # a picture is named beside it
            source.data_path = 'pictures'
        ignored.report(source.data_path)
        sources.append(source)
    return sources


def _expand(argument: str) -> Iterable[Path]:
    """Files and folders of an argument; commas belong to names, since a command line has spaces for lists."""
    return [Path(argument)] if os.path.exists(argument) or ',' in argument else expand_files(argument)


def _kind(path: Path) -> str:
    """Whose reader opens a path: '.tar' or '.parquet'; '' for pictures, folders and lists."""
    suffix = path.suffix.lower()
    return suffix if suffix in READERS and not os.path.isdir(path) else ''


def pictures_in(path: Path, ignored: IgnoredFiles) -> list[str]:
    """Paths of the pictures of a folder, a list or a picture. Raises InputError."""
    if os.path.isdir(path):
        names = images_in(path, '', ignored)
        if not names:
            raise InputError(f'{path}: no pictures in it, nor in a folder below it')
        return [os.path.join(path, name) for name in names]
    if path.suffix.lower() == '.txt':
        return read_paths(path)
    if not os.path.exists(path):
        raise InputError(f'{path}: no such file or folder')
    return [str(path)]


def read_paths(path: Path) -> list[str]:
    """The pictures of a list: lines of a path, behind which a label may stand. Raises InputError."""
    names = []
    for line in map(str.strip, read_lines(path)):
        # what ends as an image does is a path as it is: 'my photo 3.jpg', and not 'photo.jpg 3'
        labeled = None if is_image(line) else re.fullmatch(r'(.*\S)\s*(?:\t[^\t]*|[ ][0-9]{1,18})', line)
        name = labeled.group(1) if labeled else line
        if '\0' in name:
            raise InputError(f'{path}: is no list of paths: it holds bytes of 0')
        if name:
            names.append(str(path.parent / os.fsdecode(name.encode())))
    if not names:
        raise InputError(f'{path}: no pictures in the list')
    return names
