"""Token files: one image set on disk as a grid of codes an image.

The published files (SeiT, arXiv 2303.11114, sec. 3):

    NAME.data.bin.gz    gzip of a stream of codes, see token_codecs.py
    NAME.index.npy.gz   gzip of a .npy with N + 1 integer offsets into the decompressed stream
    labels              text, one integer class a line

What is ours is said in a manifest beside the stream, NAME.json, as tokenize_images.py writes it: format, grid, class
names, checksums. A set without one is a published one. A set may also come as shards, each a whole set.
"""
import contextlib
import gzip
import hashlib
import io
import math
import os
import re
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from files import (
    MAX_GZIP_RATIO,
    MAX_IMAGE_BYTES,
    MAX_IMAGES,
    MAX_INDEX_RATIO,
    MAX_LABEL_BYTES,
    SMALL,
    atomic_path,
    read_bytes,
    read_json,
    sha256,
    write_text,
)
from token_codecs import CODECS, PUBLISHED, Codec, encode
from utils import InputError, first_line

CHUNK_BYTES = 1 << 24  # of stream decoded at a time: bounds memory, long enough for numpy to be fast
MAX_CLASS = 10 ** 6  # a larger label is no class number


@dataclass(frozen=True)
class TokenFile:
    """A token file whose manifest and index have been read and checked.

    Attributes:
        stream: path of NAME.data.bin.gz.
        index: (N + 1,) int64 offsets of the images in the decompressed stream, rising from 0.
        manifest: the JSON object beside the stream, {} where there is none.
        codec: of the stream.
    """
    stream: Path
    index: np.ndarray
    manifest: dict[str, Any]
    codec: Codec

    def __len__(self) -> int:
        """Number of images."""
        return len(self.index) - 1

    @property
    def manifest_path(self) -> Path:
        """Path of the manifest, whether there is one or not."""
        return manifest_path(self.stream)

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of the labels, where the manifest has them."""
        names = self.manifest.get('classes')
        return names if isinstance(names, list) else None

    def bytes_on_disk(self) -> int:
        """Size in bytes of the stream and its index."""
        return os.path.getsize(self.stream) + os.path.getsize(index_path(self.stream))

    def check_checksums(self, path: Path) -> None:
        """InputError unless `path`, a file of this set, has the size and SHA-256 that the manifest states."""
        stated = self.manifest.get('files', {}).get(path.name)
        if stated is None:
            raise InputError(f'{self.manifest_path}: says nothing of {path.name}: it or the manifest is of another set')
        actual = {'sha256': sha256(path), 'bytes': os.path.getsize(path)}
        if actual != stated:
            why = 'changed or damaged, fetch or make it again'
            before = stated.get('sha256') if isinstance(stated, dict) else None
            if path.suffix != '.gz' and _sha256_with_lf(path) == before:
                why = 'its line endings were changed to CRLF (by git?): change them back to LF'
            raise InputError(f'{path}: {actual["bytes"]} bytes, SHA-256 {actual["sha256"][:12]}..., where its manifest '
                             f'says {reprlib.repr(stated)}: {why}')


def _sha256_with_lf(path: Path) -> str:
    """SHA-256 of a text file as it was before its line endings became CRLF."""
    return hashlib.sha256(read_bytes(path, MAX_LABEL_BYTES).replace(b'\r\n', b'\n')).hexdigest()


# ---------------------------------------------------------------- opening

def index_path(token_file: str | Path) -> Path:
    """Path of the index that belongs to a token file. Raises InputError for a name without 'data.bin'."""
    path = Path(token_file)
    if 'data.bin' not in path.name:
        raise InputError(f'{path}: a token file is named NAME.data.bin.gz (its index is found by that name)')
    return path.with_name(path.name.replace('data.bin', 'index.npy'))


def manifest_path(token_file: str | Path) -> Path:
    """Path of the manifest that may lie beside a token file. Raises InputError, see `index_path`."""
    index_path(token_file)
    path = Path(token_file)
    return path.with_name(re.sub(r'data\.bin(\.gz)?', 'json', path.name))


def open_token_file(path: str | Path) -> TokenFile:
    """Read the manifest and the index of a token file; the stream is left for `decode`. Raises InputError."""
    path = Path(path)
    manifest = read_manifest(path)
    try:
        path.stat()
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    return TokenFile(path, read_index(index_path(path)), manifest, CODECS[manifest.get('format', PUBLISHED.name)])


def read_manifest(token_file: str | Path) -> dict[str, Any]:
    """The manifest of a token file, {} where there is none. Raises InputError unless it is of a known format."""
    path = manifest_path(token_file)
    if not os.path.exists(path):
        return {}
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise InputError(f'{path}: no JSON object; fetch or make the set again')
    name = manifest.get('format', PUBLISHED.name)
    if not isinstance(name, str) or name not in CODECS:
        raise InputError(f'{path}: format {reprlib.repr(name)} is none of the token formats read here '
                         f'({", ".join(CODECS)}); fetch or make the set again, or update this program')
    if not isinstance(manifest.get('files', {}), dict):
        raise InputError(f"{path}: 'files' is no object; fetch or make the set again")
    return manifest


@contextlib.contextmanager
def open_gzip(path: str | Path) -> Iterator[BinaryIO]:
    """Open a gzip file for reading; what can be wrong with it becomes an InputError."""
    try:
        with gzip.open(path, 'rb') as file:
            yield file
    except FileNotFoundError:
        raise InputError(f'{path}: no such file') from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f'{path}: damaged or truncated gzip ({error}); fetch or make it again') from None
    except OSError as error:
        raise InputError(f'{path}: {error.strerror or error}') from None


def parse_npy(data: bytes) -> np.ndarray:
    """The array in the bytes of a .npy, which must be as long as it says. Raises ValueError.

    (np.load would take the memory that the header claims before it looks at the length.)
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_column, dtype = read_header[version](file)
    except Exception as error:  # numpy parses the header as Python, and passes on what that raises
        raise ValueError(first_line(error)[:120]) from None
    start = file.tell()
    if dtype.hasobject or by_column or math.prod(shape) * dtype.itemsize != len(data) - start:
        raise ValueError(f'{len(data) - start} bytes for {dtype} of shape {shape}')
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def read_index(path: Path) -> np.ndarray:
    """The (N + 1,) int64 offsets in an index file, checked to rise from 0. Raises InputError."""
    with open_gzip(path) as file:
        limit = min(8 * MAX_IMAGES, MAX_INDEX_RATIO * os.path.getsize(path)) + SMALL
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f'{path}: unpacks to more than {limit:,} bytes, which no index of its size does; fetch or '
                         'make it again, or make shards')
    try:
        index = parse_npy(data)
    except ValueError as error:
        raise InputError(f'{path}: not a .npy array ({error})') from None
    if index.ndim != 1 or index.dtype.kind not in 'iu' or len(index) < 2:
        raise InputError(f'{path}: expected N + 1 integer offsets, found {index.dtype} of shape {index.shape}')
    index = index.astype(np.int64)
    lengths = np.diff(index)
    if index[0] != 0 or (lengths <= 0).any():
        raise InputError(f'{path}: offsets do not rise from 0; the index is damaged or of another file')
    if lengths.max() > MAX_IMAGE_BYTES:
        raise InputError(f'{path}: image {lengths.argmax()} has more than {MAX_IMAGE_BYTES:,} bytes; the index is '
                         'damaged')
    return index


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


# ---------------------------------------------------------------- decoding

def prefetch(function: Callable, items: Iterable) -> Iterator:
    """Yield function(item) for each item in order; a thread computes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in items:
            ready = waiting
            waiting = thread.submit(function, item)
            if ready:
                yield ready.result()
        if waiting:
            yield waiting.result()


def _image_chunks(index: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges (first, last) of images whose bytes make about CHUNK_BYTES together."""
    first = 0
    while first < len(index) - 1:
        last = int(np.searchsorted(index, index[first] + CHUNK_BYTES, side='right')) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def decode(file: TokenFile) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first, codes) for one run of images after another: codes (m, n) uint16, n the same square for all.

    Reads the gzip as a stream, so memory stays at a few times CHUNK_BYTES. Raises InputError.
    """
    index = file.index
    codes_an_image = None
    with open_gzip(file.stream) as stream:
        if index[-1] > MAX_GZIP_RATIO * os.path.getsize(file.stream) + SMALL:
            raise InputError(f'{file.stream}: its index says {index[-1]:,} bytes, which no gzip of its size unpacks '
                             'to: one of the two is truncated or of another file')

        def read(chunk: tuple[int, int]) -> tuple[int, int, np.ndarray]:
            first, last = chunk
            return first, last, np.frombuffer(stream.read(int(index[last] - index[first])), np.uint8)

        for first, last, data in prefetch(read, _image_chunks(index)):  # unpacks while the chunk before is decoded
            if len(data) < index[last] - index[first]:
                raise InputError(f'{file.stream}: the stream ends at byte {index[first] + len(data)}, but its index '
                                 f'says {index[-1]}: one of the two is truncated or of another file')
            codes = _decode_images(file, data, first, last, codes_an_image)
            if codes_an_image is None:
                codes_an_image = codes.shape[1]
                _check_grid(file, codes_an_image)
            yield first, codes
        if stream.read(1):
            raise InputError(f'{file.stream}: the stream goes on after byte {index[-1]}, where its index ends')


def _decode_images(file: TokenFile, data: np.ndarray, first: int, last: int, n: int | None) -> np.ndarray:
    """Codes (images, n) of images `first` to `last` - 1, whose bytes are `data`; the first image of all tells n."""
    try:
        codes, lengths = file.codec.decode(data, file.index[first:last + 1] - file.index[first])
    except ValueError as error:
        image, complaint = error.args
        raise InputError(f'{file.stream}: image {first + image} {complaint} ({file.codec.name}); the stream or its '
                         'index is damaged') from None
    n = n or int(lengths[0])
    if math.isqrt(n) ** 2 != n:
        raise InputError(f'{file.stream}: image {first} has {n} codes, which is no square grid')
    if (lengths != n).any():
        bad = int(np.argmax(lengths != n))
        raise InputError(f'{file.stream}: image {first + bad} has {lengths[bad]} codes where the first has {n}')
    return codes.reshape(-1, n)


def _check_grid(file: TokenFile, n: int) -> None:
    """InputError where the manifest or the index cannot be of a stream whose first image has n codes."""
    for key, value in (('images', len(file)), ('grid', math.isqrt(n))):
        stated = file.manifest.get(key, value)
        if stated != value:
            raise InputError(f'{file.manifest_path}: says {key} {reprlib.repr(stated)}, but {file.stream} has '
                             f'{value}: the manifest is of another set, or the set is damaged')
    if len(file) * n > file.index[-1]:
        raise InputError(f'{file.stream}: {len(file)} images of {n} codes, as the first has, are more than the '
                         f'{file.index[-1]} bytes its index says')


# ---------------------------------------------------------------- writing

def gzip_bytes(data: bytes) -> bytes:
    """gzip without name or time, so that equal content gives equal files."""
    return gzip.compress(data, compresslevel=9, mtime=0)


def write_tokens(token_file: str | Path, label_file: str | Path, codes: np.ndarray | Iterable[np.ndarray],
                 labels: Iterable[int], codec: Codec = PUBLISHED) -> None:
    """Write the three files of a set, each atomically; a codec other than PUBLISHED needs a manifest that names it.

    Args:
        token_file: path of the stream.
        label_file: path of the labels.
        codes: (N, n) integers, or an iterable of such runs of images, for what does not fit in memory.
        labels: (N,) integers.
        codec: of the stream.

    Raises:
        ValueError: for a code that the codec cannot hold.
        InputError: for a file that cannot be written.
    """
    offsets = [np.zeros(1, np.int64)]
    end = 0
    with atomic_path(token_file) as temporary, open(temporary, 'wb') as file:
        compress = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: as gzip, without name or time
        for run in [codes] if isinstance(codes, np.ndarray) else codes:
            stream, index = encode(codec, run)
            offsets.append(index[1:] + end)
            end += index[-1]
            file.write(compress.compress(stream.tobytes()))
        file.write(compress.flush())
    npy = io.BytesIO()
    np.save(npy, np.concatenate(offsets))
    with atomic_path(index_path(token_file)) as temporary:
        Path(temporary).write_bytes(gzip_bytes(npy.getvalue()))
    write_text(label_file, ''.join(f'{label}\n' for label in labels))
