"""Encoded images and their labels from a folder, a list file, tar shards or parquet files, in a fixed order.

What --data-path may be, in which order the images come, and where their labels come from:

    DIR                     class folders of images; both in alphabetical order. The label is the number of the folder.
    LIST.txt                lines 'path label', cut at the tab or else at the last space; paths are relative to the
                            folder of the list. In the order of the lines. Behind a tab, labels may be names of classes,
                            which are numbered in alphabetical order.
    SHARD.tar               tar shards in the layout of webdataset: members KEY.jpg (or another image) and KEY.cls, an
                            integer as text, or KEY.json, an object with an integer 'label'. In the order of the
                            archive. A path, a glob, 'x-{000..146}.tar' or a comma-separated list.
    FILE.parquet            as image sets on Hugging Face: a column 'image' of struct{bytes, path} and an integer
                            column 'label'. A path, a glob, a comma-separated list, or a folder, which gives all in it.

`open_source` opens any of them as a `Source`, which numbers the images and reads their bytes; `load_images` decodes
batches of them in worker processes. Images are what PIL reads. Hidden names (.ipynb_checkpoints, __MACOSX, ._x) are
never classes, images or members.
Tar shards are read in place, by offset: nothing is extracted. Parquet needs pyarrow (requirements-formats.txt).
"""
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fileio.files import expand_files
from fileio.labels import MAX_CLASS, check_class_names
from fileio.parquet import class_names, read_column, read_labels_of
from fileio.stamps import Stamp, stamp_of
from image_data.decoding import (UPRIGHT, BadImage, IgnoredFiles, decode_oriented, image_formats, is_hidden,
                                 resize_square)
from image_data.folders import holds_class_folders, read_folder, read_regular_file
from image_data.parquet_files import check_one_split, image_bytes, open_images
from image_data.tar_shards import read_tar
from image_data.workers import plan_workers
from utils import InputError, cores, print0, print_line, union_over_ranks, world_size


# ---------------------------------------------------------------- sources

class Source:
    """Images in a fixed order.

    Attributes:
        data_path: what was asked for.
        names: of the images, the same wherever the set lies; unique but for a list that names a file twice.
        labels: (N,) int64, -1 in a set that was opened without them.
        classes: names in the order of the labels, or None.
        labels_from: where the labels come from, for messages.
        change: what `load_images` does to a prepared image, (pixels (3, S, S) uint8, i) -> pixels, such as a
            corruptions.Corruption; None for nothing.
        exif_rotate: turn images as their EXIF orientation says; of what tells one set from another.
        oriented: counts the images whose orientation is not upright; None for no count.
    """
    data_path: str
    names: list[str]
    labels: np.ndarray
    classes: list[str] | None = None
    labels_from: str
    change: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    exif_rotate: bool = False
    oriented: 'OrientedImages | None' = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """The encoded bytes of image i. Raises OSError, BadImage or InputError where they cannot be read."""
        raise NotImplementedError

    def sizes(self) -> np.ndarray:
        """Bytes of each encoded image, (N,) int64. Raises InputError."""
        raise NotImplementedError

    def content_digest(self) -> str:
        """SHA-256 of names, labels and sizes: changes when images are added, or replaced by others of another size."""
        return hashlib.sha256(f'{self.digest()} {self.stamp().sizes}'.encode()).hexdigest()

    def stamp(self) -> Stamp:
        """Sizes and times of the files that hold the images, by which one sees that they were replaced."""
        raise NotImplementedError

    def places(self) -> Iterator[tuple[Hashable, int]]:
        """Of each image where it lies, the same by whatever path one comes, and its bytes; None where it is gone."""
        raise NotImplementedError

    def encoded_bytes(self) -> int:
        """Bytes of all encoded images together. Raises InputError."""
        return int(self.sizes().sum())

    def digest(self) -> str:
        """SHA-256 of names and labels: changes when the list of images does, and with `exif_rotate`.

        Not of the pixels, which would read the whole set: a run may resume after a damaged image was mended.
        """
        lines = hashlib.sha256()
        for name, label in zip(self.names, self.labels.tolist()):
            lines.update(f'{label} {name}\n'.encode(errors='surrogateescape'))
        if self.exif_rotate:  # else codes, checkpoints and memories of other pixels would be taken for those of these
            lines.update(b'--exif-rotate\n')
        return lines.hexdigest()


class OrientedImages:
    """Which images of a source have an EXIF orientation that is not upright: said once, over all ranks.

    The line comes when this rank has read what it was first asked for, as an epoch, and the other ranks have, too. No
    rank waits for another.
    """

    numbers = itertools.count()  # ranks open the same sources in the same order

    def __init__(self) -> None:
        self.number = next(self.numbers)
        self.images = set()
        self.done = False

    def add(self, source: Source, images: Sequence[int], last: bool) -> None:
        """Note images of the source that were read, `last` with the last ones of a pass over it."""
        if self.done:
            return
        self.images.update(map(int, images))
        if not last:
            return
        self.done = True
        found = union_over_ranks(f'oriented images of source {self.number}' if world_size() > 1 else '', self.images)
        if found:
            how = 'are turned by it' if source.exif_rotate else 'are read as they are stored; --exif-rotate turns them'
            print_line(f'note: {source.data_path}: {len(found):,} of the images read have an EXIF orientation other '
                       f'than 1, and {how} (first: {source.names[min(found)]})')


def open_source(data_path: str | Path, exif_rotate: bool = False) -> Source:
    """The Source that `data_path` names, see the module's docstring. Prints what is ignored. Raises InputError.

    With `exif_rotate` its images are turned as their EXIF orientation says.
    """
    ignored = IgnoredFiles()
    source = _open(str(data_path), ignored)
    source.data_path = str(data_path)
    source.exif_rotate = exif_rotate
    source.oriented = OrientedImages()
    ignored.report(source.data_path)
    return source


def _open(data_path: str, ignored: IgnoredFiles) -> Source:
    path = Path(data_path)
    if os.path.isdir(data_path):
        parquet = sorted(file for file in path.glob('*.parquet') if not is_hidden(file.name))
        if not parquet:
            return FolderImages(path, ignored)
        if holds_class_folders(path):
            raise InputError(f'{path}: holds parquet files ({parquet[0].name}) and class folders of images; give the '
                             f"parquet files as a glob, '{path}/*.parquet', or move them out")
        check_one_split(path, parquet)
        if len(parquet) > 1:
            print0(f'note: {path}: {len(parquet)} parquet files are read as one set ({parquet[0].name} to '
                   f'{parquet[-1].name})')
        return ParquetImages(parquet)
    files = expand_files(data_path)
    kinds = {file.suffix.lower() for file in files}
    if kinds == {'.txt'} and len(files) == 1:
        return ListedImages(files[0])
    if kinds == {'.tar'}:
        return TarImages(files, ignored)
    if kinds == {'.parquet'}:
        return ParquetImages(files)
    if not os.path.exists(files[0]):
        raise InputError(f'{files[0]}: no such file or folder')
    raise InputError(f'{data_path}: images come from a folder of class folders, a list file .txt, .tar shards '
                     '(uncompressed) or .parquet files, one kind at a time')


class ImageFiles(Source):
    """Images that are files of their own; `folder` is what their names are relative to."""
    folder: Path

    def read(self, i: int) -> bytes:
        return read_regular_file(self.folder / self.names[i])

    def sizes(self) -> np.ndarray:
        try:
            return np.array([os.path.getsize(self.folder / name) for name in self.names], np.int64)
        except OSError as error:
            raise InputError(f'{error.filename}: {error.strerror}') from None

    def stamp(self) -> Stamp:
        return stamp_of(self.folder / name for name in self.names)

    def places(self) -> Iterator[tuple[Hashable, int]]:
        return (place_of(self.folder / name) for name in self.names)


def place_of(path: Path) -> tuple[tuple[int, int] | None, int]:
    """Device and inode of a file, which links and other spellings of its path have in common, and its bytes."""
    try:
        stat = os.stat(path)
    except OSError:
        return None, 0
    return (stat.st_dev, stat.st_ino), stat.st_size


class FolderImages(ImageFiles):
    """Class folders of images."""
    labels_from = 'class folders in alphabetical order'

    def __init__(self, path: Path, ignored: IgnoredFiles):
        self.folder = path
        self.classes, self.names, labels = read_folder(path, ignored)
        self.labels = np.array(labels, np.int64)


def read_lines(path: Path) -> list[str]:
    """The lines of a list of images. Raises InputError."""
    try:
        return path.read_text(encoding='utf-8-sig').split('\n')
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    except UnicodeDecodeError as error:
        raise InputError(f'{path}: no UTF-8 text ({error.reason} at byte {error.start}); save it so') from None


class ListedImages(ImageFiles):
    """A text file of paths and labels."""
    labels_from = 'the list file'

    def __init__(self, path: Path):
        self.folder = path.parent
        self.names = []
        labels = []
        for number, line in enumerate(read_lines(path), 1):
            if not line.strip():
                continue
            separator = '\t' if '\t' in line else ' '
            name, _, label = line.rstrip().rpartition(separator)
            label = label.strip()
            is_number = bool(re.fullmatch('[0-9]{1,18}', label))
            # behind a space, what is no number may be the end of a path whose label is missing
            if not name.strip() or '\0' in name or not label or not (is_number or separator == '\t'):
                raise InputError(f"{path}: line {number} is not 'path label' with an integer label from 0, or a name "
                                 f'behind a tab: {line[:60]!r}')
            if is_number and int(label) > MAX_CLASS:
                raise InputError(f'{path}: line {number}: class {label} is not from 0 to {MAX_CLASS:,}')
            if labels and is_number != isinstance(labels[0], int):
                raise InputError(f'{path}: line {number}: the label {label[:60]!r} is '
                                 f'{"a number" if is_number else "a name"}, and those before are not: give one kind')
            self.names.append(os.fsdecode(name.strip().encode()))  # as the system spells names, which need not be UTF-8
            labels.append(int(label) if is_number else label)
        if not labels:
            raise InputError(f'{path}: no images in the list')
        if isinstance(labels[0], str):
            self.classes = sorted(set(labels))
            numbers = {name: number for number, name in enumerate(self.classes)}
            labels = [numbers[label] for label in labels]
        self.labels = np.array(labels, np.int64)


def shard_names(paths: Sequence[Path]) -> list[str]:
    """What the files of a set are called: their own names, or where two have the same one, paths from a common folder.

    Both are the same wherever the set lies.
    """
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    absolute = [os.path.abspath(path) for path in paths]
    folder = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [os.path.relpath(path, folder) for path in absolute]


def number_repeated(names: list[str]) -> list[str]:
    """Names that are unique: the second image of a name ends in #2, as of a file that is given twice."""
    unique = {}  # a dict keeps its order
    for name in names:
        other = name
        repeat = 1
        while other in unique:
            repeat += 1
            other = f'{name}#{repeat}'
        unique[other] = None
    return list(unique)


class TarImages(Source):
    """Tar shards in webdataset's layout, read by offset; any tar of images where they are not `labeled`."""
    labels_from = "the members .cls, or .json's 'label', of the tar shards"

    def __init__(self, paths: list[Path], ignored: IgnoredFiles, labeled: bool = True):
        self.paths = paths
        self.names = []
        labels = []
        locations = []
        for number, (path, shard) in enumerate(zip(paths, shard_names(paths))):
            before = len(labels)
            for image in read_tar(path, ignored, shard, labeled):
                self.names.append(f'{shard}/{image.name}')
                labels.append(image.label)
                locations.append((number, image.offset, image.size))
            if len(labels) == before:
                first = ignored.first.get(IgnoredFiles.NO_IMAGE if labeled else IgnoredFiles.OTHER)
                raise InputError(f'{path}: no images in it' + (f' (first member: {first})' if first else ''))
        self.names = number_repeated(self.names)  # a member may be in an archive twice
        self.labels = np.array(labels, np.int64)
        self.locations = np.array(locations, np.int64)

    def read(self, i: int) -> bytes:
        number, offset, size = self.locations[i].tolist()
        with open(self.paths[number], 'rb') as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise BadImage('the shard ends within it')
        return data

    def sizes(self) -> np.ndarray:
        return self.locations[:, 2]

    def stamp(self) -> Stamp:
        return stamp_of(self.paths, self.locations[:, 2].tolist())  # a tar is padded, and may keep its size

    def places(self) -> Iterator[tuple[Hashable, int]]:
        shards = [place_of(path)[0] for path in self.paths]
        return (((shards[number], offset), size) for number, offset, size in self.locations.tolist())


class ParquetImages(Source):
    """Parquet files with columns 'image' (struct{bytes, path}) and, where they are `labeled`, 'label' (integers)."""
    labels_from = "the column 'label' of the parquet files"

    def __init__(self, paths: list[Path], labeled: bool = True):
        self.paths = paths
        self.labeled = labeled
        self.names = []
        labels = []
        locations = []
        named_path = None  # the first file with class names
        for number, (path, shard) in enumerate(zip(paths, shard_names(paths))):
            file = open_images(path, labeled)
            classes = class_names(file) if labeled else None
            check_class_names(self.classes, classes, named_path, path)
            if self.classes is None and classes is not None:
                self.classes = classes
                named_path = path
            labels_here = read_labels_of(path, file, classes) if labeled else [-1] * file.metadata.num_rows
            labels += labels_here
            self.names += [f'{shard}/{row}' for row in range(len(labels_here))]
            locations += [(number, group, row) for group in range(file.num_row_groups)
                       for row in range(file.metadata.row_group(group).num_rows)]
        if not labels:
            raise InputError(f'{paths[0]}: no images in it')
        self.names = number_repeated(self.names)  # a file may be given twice
        self.labels = np.array(labels, np.int64)
        self.locations = np.array(locations, np.int64)
        self.group = None  # (file, row group, its images): the group read last, since images are asked for in order

    def _cell(self, i: int) -> bytes | None:
        number, group, row = self.locations[i].tolist()
        if self.group is None or self.group[:2] != (number, group):
            path = self.paths[number]
            self.group = number, group, read_column(path, open_images(path, self.labeled), 'image', [group])
        return image_bytes(self.group[2][row])

    def read(self, i: int) -> bytes:
        data = self._cell(i)
        if data is None:
            raise BadImage('holds no encoded image')
        return data

    def sizes(self) -> np.ndarray:
        return np.array([len(self._cell(i) or b'') for i in range(len(self))], np.int64)

    def stamp(self) -> Stamp:
        return stamp_of(self.paths)

    def places(self) -> Iterator[tuple[Hashable, int]]:
        # with the bytes of the whole file: those of each image would take reading all
        files = [place_of(path) for path in self.paths]
        return (((files[number][0], group, row), files[number][1]) for number, group, row in self.locations.tolist())


# ---------------------------------------------------------------- decoding in worker processes

class ImageBatch(NamedTuple):
    """Decoded images, those that can be read.

    Attributes:
        indices: (B,) int64, which images of the source.
        pixels: (B, 3, S, S) uint8, on the CPU.
        encoded_bytes: (B,) int64, of each encoded image.
        skipped: (index, what is wrong) of the images that cannot be read.
        oriented: indices of those whose EXIF orientation is not upright.
    """
    indices: np.ndarray
    pixels: torch.Tensor
    encoded_bytes: np.ndarray
    skipped: list[tuple[int, str]]
    oriented: Sequence[int] = ()


def load_images(source: Source, batches: Sequence[Sequence[int]], size: int, *, workers: int | None = 0,
                skip_bad: bool | None = None, pin_memory: bool = False, max_pixels: int | None = None,
                prepare: Callable[[Image.Image, int, int], torch.Tensor] | None = None) -> Iterator[ImageBatch]:
    """Read and decode images, batch after batch.

    Args:
        source: of the images.
        batches: indices into the source.
        size: images become squares of it.
        workers: processes that decode, fewer where cores, batches or shared memory allow no more; None for as many as
            there are cores, where the program has no flag for it.
        skip_bad: leave images that cannot be read out, with a line on standard error for each; None where the program
            has no such flag.
        pin_memory: put pixels into page-locked memory, for a GPU.
        max_pixels: larger images cannot be read; None for PIL's limit.
        prepare: (RGB image, number of its batch, position there) -> (3, size, size) uint8; None resizes both sides.

    Yields:
        An ImageBatch for each batch, in order.

    Raises:
        InputError: naming an image that cannot be read, unless `skip_bad`.
    """
    image_formats()  # PIL's list is made once, before the processes fork
    processes, ahead = plan_workers(min(cores() if workers is None else workers, len(batches)),
                                    max(map(len, batches), default=0) * 3 * size * size)
    loader = iter(DataLoader(
        _DecodedBatches(source, batches, size, max_pixels, prepare), batch_size=None, num_workers=processes,
        collate_fn=_unchanged, pin_memory=pin_memory, prefetch_factor=ahead if processes else None,
        multiprocessing_context='fork' if processes else None,
        generator=torch.Generator()))  # else it would draw from torch's global one, and shift what a training draws
    for number in range(len(batches)):
        batch = next_batch(loader, source, workers is not None)
        if source.oriented:
            source.oriented.add(source, batch.oriented, number == len(batches) - 1)
        for i, why in batch.skipped:
            if not skip_bad:
                advice = 'replace or remove it' + (', or add --skip-bad-images' if skip_bad is False else '')
                raise InputError(f'{source.data_path}: {source.names[i]} is no readable image ({why}): {advice}')
            tqdm.write(f'skipped {source.names[i].encode(errors="backslashreplace").decode()}: {why}', file=sys.stderr)
        yield batch


def next_batch(loader: Iterator[Any], source: Source, has_flag: bool = True) -> Any:
    """A DataLoader's next batch; `has_flag`: the program's --num-workers says how many processes decode.

    Raises:
        InputError: where a process that decodes has died, or found no shared memory.
    """
    try:
        return next(loader)
    except RuntimeError as error:
        if re.search('DataLoader worker .* (killed|exited)|shared memory', str(error)):
            advice = 'give a smaller --num-workers, or 0' if has_flag else 'let nothing else run beside it'
            raise InputError(f'{source.data_path}: a process that decodes images failed, perhaps for lack of memory '
                             f'({str(error).splitlines()[-1][:200]}); {advice}') from None
        raise


def _unchanged(batch: ImageBatch) -> ImageBatch:
    return batch


class _DecodedBatches(Dataset):
    """Batches of a source's images, decoded, for a DataLoader. Item i is the ImageBatch of `batches[i]`."""

    def __init__(self, source: Source, batches: Sequence[Sequence[int]], size: int, max_pixels: int | None,
                 prepare: Callable[[Image.Image, int, int], torch.Tensor] | None):
        self.source = source
        self.batches = batches
        self.size = size
        self.max_pixels = max_pixels
        self.prepare = prepare or (lambda image, number, position: resize_square(image, size))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> ImageBatch:
        batch = self.batches[number]
        pixels = torch.empty((len(batch), 3, self.size, self.size), dtype=torch.uint8)
        if torch.utils.data.get_worker_info():
            # The DataLoader would move them there when it sends them. A lack of shared memory is an error here, and
            # would be a hang there.
            pixels.share_memory_()
        good = []
        sizes = []
        skipped = []
        oriented = []
        for position, i in enumerate(map(int, batch)):
            try:
                data = self.source.read(i)
                image, orientation = decode_oriented(data, self.max_pixels, self.source.exif_rotate)
                image = self.prepare(image, number, position)
            except OSError as error:
                skipped.append((i, error.strerror or str(error)))
            except (BadImage, InputError) as error:
                skipped.append((i, str(error)))
            else:
                pixels[len(good)] = self.source.change(image, i) if self.source.change else image
                good.append(i)
                sizes.append(len(data))
                oriented += [i] if orientation != UPRIGHT else []
        return ImageBatch(np.array(good, np.int64), pixels[:len(good)], np.array(sizes, np.int64), skipped, oriented)


def source_images(source: Source, numbers: Sequence[int], size: int, max_pixels: int | None) -> torch.Tensor:
    """The images of these numbers as a tokenizer gets them: (len(numbers), 3, size, size) float32 in [0, 1]."""
    batch = next(load_images(source, [numbers], size, max_pixels=max_pixels))
    return batch.pixels / 255
