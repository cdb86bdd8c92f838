"""Token sets as other projects write them, read in place.

    NAME.safetensors    tensors `indices` (N, g, g) or (N, n) and `labels` (N,), as cosmos-imagenet has them
    NAME.npy, NAME.npz  the same as numpy arrays; a .npy has no labels
    NAME.parquet        columns `tokens`, lists of codes or lists of rows of codes, and `label`
    NAME.jsonl          lines {"class_id": int, "tokens": [ints]}, as 1d-tokenizer writes them
    NAME_codes          LlamaGen's folder of {i}.npy (1, views, n), beside it NAME_labels with {i}.npy (1,)

Other names of tensors, arrays and columns stand behind the path: NAME.safetensors#codes+classes, or #codes for codes
alone. Codes are integers of any type from 0 to 65,535; int16 is understood as uint16, whose codes from 32,768 on it
shows as negative. n is a square. No code in a file is run.

`open_set` looks at sizes and types, `decode` then yields codes as published.Stream does, so that token_file.py, the
cache and all behind them know no difference. An array of 16 bits in a file is what a cache is: `mapped` maps it.
"""
import contextlib
import lzma
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors
import torch

from fileio.files import MAX_GZIP_RATIO, MAX_IMAGE_BYTES, MAX_IMAGES, SMALL, parse_json, read_bytes
from fileio.labels import MAX_CLASS
from fileio.parquet import (check_labels_type, class_names, list_depth, open_parquet, read_labels_of, read_lists,
                            types_of)
from token_files.published import parse_npy
from utils import CPU, InputError, first_line

ENDINGS = '.safetensors', '.npy', '.npz', '.parquet', '.jsonl'
FOLDER = 'folder of .npy'
NAMES = {'.safetensors': ('indices', 'labels'), '.npz': ('indices', 'labels'), '.parquet': ('tokens', 'label')}
MAX_N = MAX_IMAGE_BYTES // 2  # codes of an image
MAX_LINE = 16 * MAX_N  # bytes of a line of JSON
CODES_AT_ONCE = 1 << 22  # decoded at a time: bounds memory
TYPES = {f'{kind}{8 * size}': np.dtype(f'<{kind.lower()}{size}') for kind in 'IU' for size in (1, 2, 4, 8)}


@dataclass(frozen=True)
class ForeignSet:
    """A token set of another project that has been looked at.

    Attributes:
        path: of the file or folder.
        part: '#' and the names behind the path, '' where none were given.
        format: in a word, for messages and the name of a cache.
        images: N; views of one image count each.
        views: rows of one image, which follow each other, where the files tell.
        files: what the set lies in.
        read_codes: yields (m, n) integers, run after run.
        read_labels: gives (N,) integers; None for a set without labels.
        array: (N, n) uint16, mapped, where the file holds codes as a cache does; else None.
        classes: class names, or None.
    """
    path: Path
    part: str
    format: str
    images: int
    files: tuple[Path, ...]
    read_codes: Callable[[], Iterator[np.ndarray]]
    read_labels: Callable[[], np.ndarray] | None
    array: np.ndarray | None = None
    views: int = 1
    classes: list[str] | None = None

    def __len__(self) -> int:
        """Number of images."""
        return self.images

    def decode(self, device: torch.device = CPU) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first, codes (m, n) uint16) for one run of images after another, n the same square for all.

        The CPU reads, whatever the `device`. Raises InputError.
        """
        first = 0
        n = None
        for values in self.read_codes():
            n = n or values.shape[1]
            if values.shape[1] != n:
                raise InputError(f'{self.path}: image {first} has {values.shape[1]} codes where the first has {n}')
            check_square(n, self.path, f'image {first}')
            if first + len(values) > self.images:
                break
            yield first, as_codes(values, self.path, first)
            first += len(values)
        if first != self.images or n is None:
            raise InputError(f'{self.path}: does not hold the {self.images:,} images it says: truncated or changed, '
                             'fetch it again')

    def labels(self) -> np.ndarray:
        """The labels (N,) int64 in the set. Raises InputError where it has none, too."""
        if not self.read_labels:
            raise InputError(f'{self.path}{self.part}: holds no labels that are known here; name a file of labels')
        labels = np.asarray(self.read_labels())
        if labels.dtype.kind not in 'iu' or labels.ndim != 1:
            raise InputError(f'{self.path}: its labels are {labels.dtype} of shape {labels.shape}, where (N,) integers '
                             'are expected')
        if len(labels) != self.images:
            raise InputError(f'{self.path}: {len(labels)} labels for {self.images} images')
        wrong = (labels < 0) | (labels > MAX_CLASS)
        if wrong.any():
            image = int(np.argmax(wrong))
            raise InputError(f'{self.path}: image {image} has class {labels[image]}, which is not from 0 to '
                             f'{MAX_CLASS:,}; classes are numbered from 0')
        return labels.astype(np.int64)


# ---------------------------------------------------------------- names

def split_name(spec: str | Path) -> tuple[str, str]:
    """A path, and what stands behind '#', which names the arrays in the file; '' where nothing does."""
    text = str(spec)
    name, _, part = text.rpartition('#')
    # a folder may have a '#' in its name, too
    if not name or os.path.lexists(text) or ('/' in part and not name.lower().endswith(ENDINGS)):
        return text, ''
    return name, part


def is_foreign(spec: str | Path) -> bool:
    """Whether a path is that of a set of others, by its ending, or as a folder that is not named as a stream is."""
    name, _ = split_name(spec)
    return name.lower().endswith(ENDINGS) or (os.path.isdir(name) and '.data.bin' not in os.path.basename(name))


def names_in(path: Path, part: str, defaults: tuple[str, str]) -> tuple[str, str | None]:
    """The names of codes and labels; None for labels that were not asked for. Raises InputError."""
    if not part:
        return defaults
    names = part.split('+')
    if len(names) > 2 or not all(names):
        raise InputError(f'{path}#{part}: write the names of codes and labels behind the path, as in '
                         f'{path.name}#{"+".join(defaults)}')
    return names[0], names[1] if len(names) == 2 else None


def open_set(spec: str | Path) -> ForeignSet:
    """Look at a set; its codes are left for `decode`. Raises InputError."""
    name, part = split_name(spec)
    path = Path(name)
    try:
        path.stat()
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    except ValueError:  # a null byte
        raise InputError(f'{path}: is no name of a file') from None
    if path.is_dir():
        kind, opener = '', _open_folder
    else:
        kind = next(ending for ending in ENDINGS if name.lower().endswith(ending))
        opener = {'.safetensors': _open_safetensors, '.npy': _open_npy, '.npz': _open_npz, '.parquet': _open_parquet,
                  '.jsonl': _open_jsonl}[kind]
    if kind in NAMES:
        return opener(path, f'#{part}' if part else '', *names_in(path, part, NAMES[kind]))
    if part:
        raise InputError(f'{path}#{part}: holds no names to choose from; give the path alone')
    return opener(path)


# ---------------------------------------------------------------- shapes and codes

def check_square(n: int, path: Path, what: str) -> None:
    """InputError unless n codes make a square grid that can be read."""
    if not 0 < n <= MAX_N or math.isqrt(n) ** 2 != n:
        raise InputError(f'{path}: {what} has {n:,} codes, which is no square grid of at most {math.isqrt(MAX_N)} on a '
                         'side')


def check_shape(dtype: np.dtype, shape: tuple[int, ...], path: Path, name: str) -> tuple[int, int]:
    """(N, n) of an array of codes (N, n) or (N, g, g). Raises InputError for other types and shapes."""
    what = f'{name} ({dtype} of shape {tuple(shape)})' if name else f'its array ({dtype} of shape {tuple(shape)})'
    if dtype.kind not in 'iu' or len(shape) not in (2, 3) or (len(shape) == 3 and shape[1] != shape[2]):
        raise InputError(f'{path}: {what} cannot be codes, which are integers (N, n) or (N, g, g)')
    if not 0 < shape[0] <= MAX_IMAGES:
        raise InputError(f'{path}: {what} has no images, or more than {MAX_IMAGES:,}; give shards')
    n = math.prod(shape[1:])
    check_square(n, path, what)
    return shape[0], n


def as_codes(values: np.ndarray, path: Path, first: int) -> np.ndarray:
    """Codes (m, n) uint16 of integers of any type, of images from `first` on. Raises InputError."""
    if values.dtype.itemsize == 2:  # int16 is what torch has had for uint16: codes from 32,768 on are negative there
        return values.astype(values.dtype.newbyteorder('='), copy=False).view(np.uint16)
    wrong = (values < 0) | (values > 0xffff)
    if wrong.any():
        image, place = np.argwhere(wrong)[0]
        raise InputError(f'{path}: image {first + image} has code {values[image, place]}; codes are from 0 to 65,535')
    return values.astype(np.uint16)


def rows_at_once(n: int) -> int:
    """Images of n codes that are decoded at a time."""
    return max(1, CODES_AT_ONCE // n)


def _runs(array: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """An array (N, n) or (N, g, g), run after run, as (m, n)."""
    step = rows_at_once(n)
    return (np.asarray(array[start:start + step]).reshape(-1, n) for start in range(0, len(array), step))


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """A part of a file as an array, mapped. Raises InputError."""
    try:
        return np.memmap(path, dtype, 'r', offset, tuple(shape))
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f'{path}: cannot be mapped ({first_line(error)}); fetch it again') from None


def _as_cache(array: np.ndarray, n: int) -> np.ndarray | None:
    """A mapped array as (N, n) uint16 without a copy, None where it is not stored so."""
    if array.dtype not in (np.dtype('<i2'), np.dtype('<u2')) or not array.flags.c_contiguous or not array.flags.aligned:
        return None
    return array.view('<u2').reshape(-1, n)


# ---------------------------------------------------------------- safetensors

def _open_safetensors(path: Path, part: str, codes: str, labels: str | None) -> ForeignSet:
    header = read_header(path)
    names = ', '.join(sorted(header))[:200] or 'none'
    if codes not in header:
        raise InputError(f'{path}: no tensor {codes!r} in it (there are {names}); name codes and labels as in '
                         f'{path.name}#codes+labels')
    if labels not in header:
        if part and labels:
            raise InputError(f'{path}: no tensor {labels!r} in it (there are {names})')
        labels = None
    images, n = check_shape(*header[codes][:2], path, codes)
    array = _map(path, *header[codes])
    return ForeignSet(path, part, 'safetensors', images, (path,), lambda: _runs(array, n),
                      (lambda: np.array(_map(path, *header[labels]))) if labels else None, _as_cache(array, n))


def read_header(path: Path) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """The tensors of a .safetensors by name: type, shape, first byte. Other types than integers are of kind 'V'.

    Raises InputError.
    """
    try:
        # the library compares all places and sizes with one another and with the length of the file
        with safetensors.safe_open(path, 'numpy'):
            pass
        with open(path, 'rb') as file:
            size = int.from_bytes(file.read(8), 'little')
            header = parse_json(file.read(size))
        header.pop('__metadata__', None)
        return {name: (TYPES.get(entry['dtype'], np.dtype('V1')), tuple(entry['shape']),
                       8 + size + entry['data_offsets'][0]) for name, entry in header.items()}
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = getattr(error, 'strerror', None) or first_line(error)
        raise InputError(f'{path}: damaged or no .safetensors ({why}); fetch it again') from None


# ---------------------------------------------------------------- numpy

def _open_npy(path: Path) -> ForeignSet:
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, and passes on what that raises
        raise InputError(f'{path}: damaged or no array of numbers in a .npy ({first_line(error)})') from None
    if not isinstance(array, np.memmap):
        raise InputError(f'{path}: damaged or no array of numbers in a .npy')
    images, n = check_shape(array.dtype, array.shape, path, '')
    if array.offset + array.nbytes != os.path.getsize(path):
        raise InputError(f'{path}: has {os.path.getsize(path):,} bytes, where its header says '
                         f'{array.offset + array.nbytes:,}: fetch it again')
    return ForeignSet(path, '', 'npy', images, (path,), lambda: _runs(array, n), None, _as_cache(array, n))


def _open_npz(path: Path, part: str, codes: str, labels: str | None) -> ForeignSet:
    with _npz(path) as archive:
        names = [name.removesuffix('.npy') for name in archive.namelist() if name.endswith('.npy')]
    if codes not in names:
        raise InputError(f'{path}: no array {codes!r} in it (there are {", ".join(names)[:200] or "none"}); name codes '
                         f'and labels as in {path.name}#codes+labels')
    if labels not in names:
        if part and labels:
            raise InputError(f'{path}: no array {labels!r} in it (there are {", ".join(names)[:200]})')
        labels = None
    with _npz(path) as archive, _member(archive, codes, path) as (dtype, shape, _):
        images, n = check_shape(dtype, shape, path, codes)

    def read_codes() -> Iterator[np.ndarray]:
        with _npz(path) as archive, _member(archive, codes, path) as (dtype, shape, file):
            step = rows_at_once(n)
            for start in range(0, images, step):
                yield _read_rows(file, dtype, min(step, images - start), n, path)

    def read_labels() -> np.ndarray:
        with _npz(path) as archive, _member(archive, labels, path) as (dtype, shape, file):
            if dtype.kind not in 'iu' or len(shape) != 1:
                raise InputError(f'{path}: {labels} ({dtype} of shape {shape}) cannot be labels, which are (N,) '
                                 'integers')
            return _read_rows(file, dtype, shape[0], 1, path)[:, 0]
    return ForeignSet(path, part, 'npz', images, (path,), read_codes, read_labels if labels else None)


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """An open .npz; what can be wrong with it becomes an InputError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    # zipfile and the modules that unpack for it raise all of these
    except (OSError, EOFError, ValueError, RuntimeError, KeyError, IndexError, struct.error, zipfile.BadZipFile,
            zlib.error, lzma.LZMAError) as error:
        why = getattr(error, 'strerror', None) or first_line(error)
        raise InputError(f'{path}: damaged or no .npz ({why}); fetch it again') from None


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str, path: Path) -> Iterator[tuple[np.dtype, tuple[int, ...], BinaryIO]]:
    """Type and shape of an array in an .npz, and the file at its first number. Raises InputError."""
    info = archive.getinfo(f'{name}.npy')
    # before memory is taken: a few bytes must not claim any number of them
    if info.compress_size > os.path.getsize(path) or info.file_size > MAX_GZIP_RATIO * info.compress_size + SMALL:
        raise InputError(f'{path}: {name} claims {info.file_size:,} bytes, which no .npz of its size unpacks to')
    with archive.open(info) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, by_column, dtype = read(file)
        except InputError:
            raise
        except Exception as error:  # numpy parses the header as Python, and passes on what that raises
            raise InputError(f'{path}: {name} is damaged or no array ({first_line(error)})') from None
        size = info.file_size - file.tell()
        if dtype.hasobject or (by_column and len(shape) > 1) or math.prod(shape) * dtype.itemsize != size:
            raise InputError(f'{path}: {name} has {size:,} bytes for {dtype} of shape {shape}, in rows; save it again '
                             'as a plain array of integers')
        yield dtype, shape, file


def _read_rows(file: BinaryIO, dtype: np.dtype, rows: int, n: int, path: Path) -> np.ndarray:
    """The next rows of n numbers, (rows, n). Raises InputError where the file ends before."""
    data = file.read(rows * n * dtype.itemsize)
    if len(data) != rows * n * dtype.itemsize:
        raise InputError(f'{path}: ends before the codes do: truncated, fetch it again')
    return np.frombuffer(data, dtype).reshape(rows, n)


# ---------------------------------------------------------------- parquet

def _open_parquet(path: Path, part: str, codes: str, labels: str | None) -> ForeignSet:
    file = open_parquet(path)
    types = types_of(file)
    names = ', '.join(types)[:200] or 'none'
    if codes not in types or list_depth(types[codes]) not in (1, 2):
        found = f'is of type {str(types[codes])[:80]}' if codes in types else f'is not there (there are {names})'
        raise InputError(f'{path}: column {codes!r} {found}; codes are lists of integers, or lists of rows of them: '
                         f'name the columns as in {path.name}#codes+labels')
    if labels not in types:
        if part and labels:
            raise InputError(f'{path}: no column {labels!r} in it (there are {names})')
        labels = None
    else:
        check_labels_type(path, types[labels], labels)
    images = file.metadata.num_rows
    if not 0 < images <= MAX_IMAGES:
        raise InputError(f'{path}: {images:,} images, where 1 to {MAX_IMAGES:,} are read; give shards')

    def read_codes() -> Iterator[np.ndarray]:
        first = 0
        for values, lengths in read_lists(path, open_parquet(path), codes, 1024):
            count = len(lengths[0])
            if not count:
                continue
            same = all((sizes == sizes[0]).all() for sizes in lengths if len(sizes))
            if not same or (len(lengths) == 2 and lengths[0][0] != lengths[1][:1].sum()):
                raise InputError(f'{path}: images from {first} to {first + count - 1} are not all square grids of one '
                                 'size')
            yield values.reshape(count, -1)
            first += count
    names_of_classes = class_names(file) if labels == 'label' else None
    return ForeignSet(path, part, 'parquet', images, (path,), read_codes,
                      (lambda: np.array(read_labels_of(path, open_parquet(path), names_of_classes, labels)))
                      if labels else None, classes=names_of_classes)


# ---------------------------------------------------------------- JSON lines

def _open_jsonl(path: Path) -> ForeignSet:
    images = sum(1 for _ in _lines(path))
    if not 0 < images <= MAX_IMAGES:
        raise InputError(f'{path}: {images:,} lines, where 1 to {MAX_IMAGES:,} are read')

    def read_codes() -> Iterator[np.ndarray]:
        rows = []
        for number, line in _lines(path):
            tokens = _parse_line(path, number, line)[1]
            if rows and len(tokens) != len(rows[0]):
                raise InputError(f'{path}: line {number} has {len(tokens)} codes where those before have '
                                 f'{len(rows[0])}')
            rows.append(tokens)
            if len(rows) == rows_at_once(len(tokens)):
                yield _as_array(path, number, rows)
                rows = []
        if rows:
            yield _as_array(path, number, rows)

    def read_labels() -> np.ndarray:
        return np.array([_parse_line(path, number, line)[0] for number, line in _lines(path)], np.int64)
    return ForeignSet(path, '', 'jsonl', images, (path,), read_codes, read_labels)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line that is not empty. Raises InputError."""
    try:
        with open(path, 'rb') as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b''), 1):
                if len(line) > MAX_LINE:
                    raise InputError(f'{path}: line {number} has more than {MAX_LINE:,} bytes')
                if not line.isspace():
                    yield number, line
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None


def _parse_line(path: Path, number: int, line: bytes) -> tuple[int, list[int]]:
    """Class and codes of a line of JSON. Raises InputError."""
    try:
        value = parse_json(line)
    except ValueError as error:
        raise InputError(f'{path}: line {number} is no JSON ({first_line(error)[:80]}): cut or damaged') from None
    tokens = value.get('tokens') if isinstance(value, dict) else None
    label = value.get('class_id') if isinstance(value, dict) else None
    if type(label) is not int or not isinstance(tokens, list) or set(map(type, tokens)) != {int}:
        raise InputError(f'{path}: line {number} is not of the form {{"class_id": a number, "tokens": [numbers]}}')
    if not 0 <= label <= MAX_CLASS:
        raise InputError(f'{path}: line {number} has class {label}, which is not from 0 to {MAX_CLASS:,}')
    return label, tokens


def _as_array(path: Path, number: int, rows: list[list[int]]) -> np.ndarray:
    try:
        return np.array(rows, np.int64)
    except OverflowError:
        raise InputError(f'{path}: in the {len(rows)} lines to line {number} a code is beyond 65,535') from None


# ---------------------------------------------------------------- LlamaGen's folders

def _open_folder(path: Path) -> ForeignSet:
    path = _codes_folder(path)
    names = numbered(path)
    if not 0 < len(names) <= MAX_IMAGES:
        raise InputError(f'{path}: no files 0.npy, 1.npy and so on in it, or more than {MAX_IMAGES:,}')
    _, views, n = _array_in(path / names[0], 3).shape
    check_square(n, path, names[0])
    if len(names) * views > MAX_IMAGES:
        raise InputError(f'{path}: more than {MAX_IMAGES:,} grids')

    def read_codes() -> Iterator[np.ndarray]:
        step = max(1, rows_at_once(n) // views)
        for start in range(0, len(names), step):
            yield np.concatenate([_codes_of(path / name, (1, views, n)) for name in names[start:start + step]])

    folder = path.with_name(f'{path.name.removesuffix("_codes")}_labels')
    if not path.name.endswith('_codes') or not folder.is_dir():
        return ForeignSet(path, '', FOLDER, len(names) * views, (path,), read_codes, None, views=views)

    def read_labels() -> np.ndarray:
        others = set(numbered(folder)) ^ set(names)
        if others:
            name = min(others)
            raise InputError(f'{folder if name in names else path}: has no {name}, but '
                             f'{path if name in names else folder} has')
        return np.concatenate([_array_in(folder / name, 1) for name in names]).repeat(views)
    return ForeignSet(path, '', FOLDER, len(names) * views, (path, folder), read_codes, read_labels, views=views)


def _codes_folder(path: Path) -> Path:
    """The folder of codes in LlamaGen's --code-path, or the folder itself. Raises InputError."""
    if path.name.endswith('_codes'):
        return path
    inside = sorted(folder for folder in path.glob('*_codes') if folder.is_dir())
    if len(inside) > 1:
        raise InputError(f'{path}: holds {" and ".join(folder.name for folder in inside[:5])}; give one of them')
    return inside[0] if inside else path


def numbered(folder: Path) -> list[str]:
    """The names 0.npy, 1.npy and so on in a folder, in the order of their numbers. Raises InputError."""
    try:
        names = [name for name in os.listdir(folder) if re.fullmatch(r'[0-9]{1,18}\.npy', name)]
    except OSError as error:
        raise InputError(f'{folder}: {error.strerror}') from None
    return sorted(names, key=lambda name: (int(name[:-4]), name))


def _array_in(path: Path, dimensions: int) -> np.ndarray:
    """The integers in a .npy of one image, of shape (1, views, n) or (1,). Raises InputError."""
    try:
        array = parse_npy(read_bytes(path, 8 * MAX_IMAGE_BYTES))
    except ValueError as error:
        raise InputError(f'{path}: damaged or no array ({error})') from None
    if array.dtype.kind not in 'iu' or array.ndim != dimensions or array.shape[0] != 1 or not array.size:
        raise InputError(f'{path}: {array.dtype} of shape {array.shape}, where '
                         f'{"(1, views, codes)" if dimensions == 3 else "(1,)"} integers are expected')
    return array


def _codes_of(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """(views, n) of the .npy of one image. Raises InputError."""
    array = _array_in(path, 3)
    if array.shape != shape:
        raise InputError(f'{path}: shape {array.shape}, where the first file has {shape}')
    return array[0]
