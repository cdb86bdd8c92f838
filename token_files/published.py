"""The published token stream on disk, a gzip of codes as bytes, and its index (SeiT, arXiv 2303.11114, sec. 3).

    NAME.data.bin.gz    gzip of a stream of codes, see token_files/token_codecs.py
    NAME.index.npy.gz   gzip of a .npy with N + 1 integer offsets into the decompressed stream
"""
import contextlib
import gzip
import io
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from fileio.files import MAX_GZIP_RATIO, MAX_IMAGES, MAX_IMAGE_BYTES, MAX_INDEX_RATIO, SMALL, atomic_path
from token_files.prefetching import prefetch
from token_files.token_codecs import PUBLISHED, Codec, encode
from utils import InputError, first_line

CHUNK_BYTES = 1 << 24  # of stream decoded at a time: bounds memory, long enough for numpy to be fast


@dataclass(frozen=True)
class ByteStream:
    """A gzip of a stream of bytes, and its index, which has been read and checked.

    Attributes:
        path: of NAME.data.bin.gz.
        index: (N + 1,) int64 offsets of the images in the decompressed stream, rising from 0.
        codec: of the stream.
    """
    path: Path
    index: np.ndarray
    codec: Codec

    def __len__(self) -> int:
        """Number of images."""
        return len(self.index) - 1

    @property
    def files(self) -> tuple[Path, Path]:
        """Stream and index."""
        return self.path, index_path(self.path)

    def decode(self, device: torch.device | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first, codes (m, n) uint16) for one run of images after another, n the same square for all.

        There is nothing in it for another device than the CPU.

        Reads the gzip as a stream, so memory stays at a few times CHUNK_BYTES. Raises InputError.
        """
        return _decode_bytes(self)


# ---------------------------------------------------------------- reading

def index_path(token_file: str | Path) -> Path:
    """Path of the index that belongs to a token file. Raises InputError for a name without 'data.bin'."""
    path = Path(token_file)
    if 'data.bin' not in path.name:
        raise InputError(f'{path}: a token file is named NAME.data.bin.gz (its index is found by that name)')
    return path.with_name(path.name.replace('data.bin', 'index.npy'))


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


# ---------------------------------------------------------------- decoding

def _image_chunks(index: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges (first, last) of images whose bytes make about CHUNK_BYTES together."""
    first = 0
    while first < len(index) - 1:
        last = int(np.searchsorted(index, index[first] + CHUNK_BYTES, side='right')) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def _decode_bytes(stream: ByteStream) -> Iterator[tuple[int, np.ndarray]]:
    """See `ByteStream.decode`."""
    path, index = stream.path, stream.index
    codes_an_image = None
    with open_gzip(path) as file:
        if index[-1] > MAX_GZIP_RATIO * os.path.getsize(path) + SMALL:
            raise InputError(f'{path}: its index says {index[-1]:,} bytes, which no gzip of its size unpacks '
                             'to: one of the two is truncated or of another file')

        def read(chunk: tuple[int, int]) -> tuple[int, int, np.ndarray]:
            first, last = chunk
            return first, last, np.frombuffer(file.read(int(index[last] - index[first])), np.uint8)

        for first, last, data in prefetch(read, _image_chunks(index)):  # unpacks while the chunk before is decoded
            if len(data) < index[last] - index[first]:
                raise InputError(f'{path}: the stream ends at byte {index[first] + len(data)}, but its index '
                                 f'says {index[-1]}: one of the two is truncated or of another file')
            codes = _decode_images(stream, data, first, last, codes_an_image)
            if codes_an_image is None:
                codes_an_image = codes.shape[1]
                if len(stream) * codes_an_image > index[-1]:
                    raise InputError(f'{path}: {len(stream)} images of {codes_an_image} codes, as the first has, are '
                                     f'more than the {index[-1]} bytes its index says')
            yield first, codes
        if file.read(1):
            raise InputError(f'{path}: the stream goes on after byte {index[-1]}, where its index ends')


def _decode_images(stream: ByteStream, data: np.ndarray, first: int, last: int, n: int | None) -> np.ndarray:
    """Codes (images, n) of images `first` to `last` - 1, whose bytes are `data`; the first image of all tells n."""
    try:
        codes, lengths = stream.codec.decode(data, stream.index[first:last + 1] - stream.index[first])
    except ValueError as error:
        image, complaint = error.args
        raise InputError(f'{stream.path}: image {first + image} {complaint} ({stream.codec.name}); the stream or its '
                         'index is damaged') from None
    n = n or int(lengths[0])
    if math.isqrt(n) ** 2 != n:
        raise InputError(f'{stream.path}: image {first} has {n} codes, which is no square grid')
    if (lengths != n).any():
        bad = int(np.argmax(lengths != n))
        raise InputError(f'{stream.path}: image {first + bad} has {lengths[bad]} codes where the first has {n}')
    return codes.reshape(-1, n)


# ---------------------------------------------------------------- writing

def gzip_bytes(data: bytes) -> bytes:
    """gzip without name or time, so that equal content gives equal files."""
    return gzip.compress(data, compresslevel=9, mtime=0)


def write_stream(path: str | Path, codes: np.ndarray | Iterable[np.ndarray], codec: Codec = PUBLISHED) -> None:
    """Write a stream and its index, each atomically.

    Args:
        path: of the stream.
        codes: (N, n) integers, or an iterable of such runs of images, for what does not fit in memory.
        codec: of the stream.

    Raises:
        ValueError: for a code that the codec cannot hold.
        InputError: for a file that cannot be written.
    """
    offsets = [np.zeros(1, np.int64)]
    end = 0
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        compress = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: as gzip, without name or time
        for run in [codes] if isinstance(codes, np.ndarray) else codes:
            stream, index = encode(codec, run)
            offsets.append(index[1:] + end)
            end += index[-1]
            file.write(compress.compress(stream.tobytes()))
        file.write(compress.flush())
    npy = io.BytesIO()
    np.save(npy, np.concatenate(offsets))
    with atomic_path(index_path(path)) as temporary:
        Path(temporary).write_bytes(gzip_bytes(npy.getvalue()))
