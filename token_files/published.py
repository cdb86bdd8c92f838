"""The published token stream: codes as bytes, a gzip of them, and an index (SeiT, arXiv 2303.11114, sec. 3).

    NAME.data.bin.gz    gzip of a stream of codes, one image after the other
    NAME.index.npy.gz   gzip of a .npy with N + 1 integer offsets into the decompressed stream

There are two ways to store a code as bytes, which a manifest's "format" tells apart:

    escaped-bytes   the paper's: code c < 255 is byte c; c >= 255 is byte 255, then byte c - 255. The largest code is
                    therefore 509.
    uint16-le       this project's, for larger codebooks: each code is two bytes, little-endian.

`open_stream` reads the index, `Stream.decode` the codes, `write_stream` writes both. The stream is decoded in runs of
images: all of ImageNet-1k unpacks to more than a gigabyte, which need not be in memory beside the codes made of it.

This module and compact.py have the same names for what token_file.py uses of them: NAMES, ENDING, MAX_CODES, MAX_GRID,
format_for, companion_path, open_stream, Stream, write_model and write_stream.
"""
import contextlib
import gzip
import io
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from fileio.files import MAX_GZIP_RATIO, MAX_IMAGES, MAX_IMAGE_BYTES, MAX_INDEX_RATIO, SMALL, atomic_path
from fileio.hub import fetch_beside
from token_files.prefetching import prefetch
from utils import CPU, InputError, first_line

ESCAPE = 255
ENDING = 'data.bin.gz'  # of a stream's name
MAX_GRID = math.isqrt(MAX_IMAGE_BYTES)  # codes on a side: no image of more bytes is read, and a code has one at least
CHUNK_BYTES = 1 << 24  # of stream decoded at a time: bounds memory, long enough for numpy to be fast


class Codec(NamedTuple):
    """One way to store codes.

    Attributes:
        name: as a manifest's "format" states it.
        largest_code: that it can hold.
        encode: codes (N, n) integers, one row an image -> (stream (bytes,) uint8, index (N + 1,) int64).
        decode: stream (bytes,) uint8 of whole images, their offsets (m + 1,) int64 from 0 -> (codes, one image after
            the other, (sum,) uint16; codes of each image (m,) int64). Raises ValueError(image, complaint).
    """
    name: str
    largest_code: int
    encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    decode: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


# ---------------------------------------------------------------- escaped bytes

def encode_escaped(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Codec.encode`; codes in [0, 509]."""
    escaped = codes >= ESCAPE
    index = np.concatenate([[0], np.cumsum(codes.shape[1] + escaped.sum(1))]).astype(np.int64)
    flat = codes.ravel()
    escaped = escaped.ravel()
    # The byte of a code stands after the bytes of all codes before it, escapes included. The stream begins as nothing
    # but escapes, of which all that are no escape are overwritten.
    position = np.arange(flat.size) + np.cumsum(escaped)
    stream = np.full(index[-1], ESCAPE, np.uint8)
    stream[position] = flat - ESCAPE * escaped
    return stream, index


def decode_escaped(stream: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Codec.decode`. An escape byte without a code byte after it, within its image, is refused."""
    is_escape = stream == ESCAPE
    follows_escape = np.empty_like(is_escape)
    follows_escape[:1] = False
    follows_escape[1:] = is_escape[:-1]
    dangling = is_escape & follows_escape  # 255 255: code 510 would be this, but the format ends at 509
    dangling[offsets[1:] - 1] |= is_escape[offsets[1:] - 1]  # an escape as an image's last byte
    if dangling.any():
        image = int(np.searchsorted(offsets, np.argmax(dangling), side='right')) - 1
        raise ValueError(image, 'has a dangling escape byte')
    codes = stream.astype(np.uint16) + follows_escape * np.uint16(ESCAPE)
    is_code = ~is_escape
    lengths = np.add.reduceat(is_code, offsets[:-1], dtype=np.int64)
    return codes[np.flatnonzero(is_code)], lengths  # by positions: four times as fast as by a mask


# ---------------------------------------------------------------- 16 bits

def encode_uint16(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Codec.encode`; codes in [0, 65535]."""
    index = np.arange(len(codes) + 1, dtype=np.int64) * 2 * codes.shape[1]
    return codes.astype('<u2').view(np.uint8).ravel(), index


def decode_uint16(stream: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Codec.decode`. An image with half a code is refused."""
    odd = offsets[1:] % 2 != 0
    if odd.any():
        raise ValueError(int(np.argmax(odd)), 'has an odd number of bytes')
    return stream.view('<u2'), np.diff(offsets) // 2


# ---------------------------------------------------------------- the codecs

CODECS = {codec.name: codec for codec in (
    Codec('escaped-bytes', 2 * ESCAPE - 1, encode_escaped, decode_escaped),
    Codec('uint16-le', 0xffff, encode_uint16, decode_uint16),
)}
PUBLISHED = CODECS['escaped-bytes']
NAMES = tuple(CODECS)  # as a manifest's "format" states them
MAX_CODES = max(codec.largest_code for codec in CODECS.values()) + 1


def codec_for(codebook_size: int) -> Codec:
    """The codec for codes of a codebook: the first that can hold them. Raises InputError where none can."""
    for codec in CODECS.values():
        if codebook_size <= codec.largest_code + 1:
            return codec
    raise InputError(f'{codebook_size} codes are more than token files hold ({MAX_CODES})')


def format_for(codebook_size: int) -> str:
    """Name of the format of codes of a codebook. Raises InputError where none can hold them."""
    return codec_for(codebook_size).name


def encode(codec: Codec, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(stream, index) of codes (N, n), see `Codec.encode`. Raises ValueError for a code the codec cannot hold."""
    codes = np.asarray(codes)
    if codes.size and not 0 <= codes.min() <= codes.max() <= codec.largest_code:
        raise ValueError(f'codes run from {codes.min()} to {codes.max()}; the format {codec.name} holds 0 to '
                         f'{codec.largest_code}')
    return codec.encode(codes)


def raw_bytes(counts: np.ndarray) -> int:
    """Bytes of a stream, before gzip, of the codes that occur `counts` (K,) times."""
    if codec_for(len(counts)) is PUBLISHED:
        return int(counts.sum() + counts[ESCAPE:].sum())
    return 2 * int(counts.sum())


# ---------------------------------------------------------------- reading

@dataclass(frozen=True)
class Stream:
    """A gzip of a stream of bytes, and its index, which has been read and checked.

    Attributes:
        path: of NAME.data.bin.gz.
        index: (N + 1,) int64 offsets of the images in the decompressed stream, rising from 0.
        codec: how codes are stored in it.
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
        return self.path, companion_path(self.path)

    def decode(self, device: torch.device = CPU) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first, codes (m, n) uint16) for one run of images after another, n the same square for all.

        A gzip is unpacked by the CPU, whatever the `device`; compact streams have one. Memory stays at a few times
        CHUNK_BYTES. Raises InputError.
        """
        return _decode_bytes(self)


def companion_path(token_file: str | Path) -> Path:
    """Path of the index of a stream. Raises InputError for a name without 'data.bin'."""
    path = Path(token_file)
    if 'data.bin' not in path.name:
        raise InputError(f'{path}: a token file is named NAME.data.bin.gz (its index is found by that name), one of '
                         'other projects NAME.safetensors, .npy, .npz, .parquet or .jsonl')
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


def open_stream(path: Path, manifest: dict[str, Any], manifest_path: Path) -> Stream:
    """Read the index of a stream, which is in the format that the manifest states. Raises InputError."""
    codec = CODECS[manifest.get('format', PUBLISHED.name)]
    fetch_beside(companion_path(path))
    return Stream(path, read_index(companion_path(path)), codec)


# ---------------------------------------------------------------- decoding

def _image_chunks(index: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges (first, last) of images whose bytes make about CHUNK_BYTES together."""
    first = 0
    while first < len(index) - 1:
        last = int(np.searchsorted(index, index[first] + CHUNK_BYTES, side='right')) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def _decode_bytes(stream: Stream) -> Iterator[tuple[int, np.ndarray]]:
    """See `Stream.decode`."""
    path, index = stream.path, stream.index
    codes_an_image = None
    with open_gzip(path) as file:
        # before anything is unpacked: a damaged index must not have us take its sizes for memory
        if index[-1] > MAX_GZIP_RATIO * os.path.getsize(path) + SMALL:
            raise InputError(f'{path}: its index says {index[-1]:,} bytes, which no gzip of its size unpacks '
                             'to: one of the two is truncated or of another file')

        def read(chunk: tuple[int, int]) -> tuple[int, int, np.ndarray]:
            first, last = chunk
            return first, last, np.frombuffer(file.read(int(index[last] - index[first])), np.uint8)

        for first, last, data in prefetch(read, _image_chunks(index)):  # a thread unpacks while this one decodes
            if len(data) < index[last] - index[first]:
                raise InputError(f'{path}: the stream ends at byte {index[first] + len(data)}, but its index '
                                 f'says {index[-1]}: one of the two is truncated or of another file')
            codes = _decode_images(stream, data, first, last, codes_an_image)
            if codes_an_image is None:
                codes_an_image = codes.shape[1]
                # a code takes a byte at least; callers allocate (N, n) codes when they have seen the first run
                if len(stream) * codes_an_image > index[-1]:
                    raise InputError(f'{path}: {len(stream)} images of {codes_an_image} codes, as the first has, are '
                                     f'more than the {index[-1]} bytes its index says')
            yield first, codes
        if file.read(1):
            raise InputError(f'{path}: the stream goes on after byte {index[-1]}, where its index ends')


def _decode_images(stream: Stream, data: np.ndarray, first: int, last: int, n: int | None) -> np.ndarray:
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


def write_model(token_file: Path, codes: Iterable[np.ndarray], images: int) -> dict[str, str]:
    """Nothing: streams of this format have no model, and a manifest says nothing of one. See compact.py."""
    return {}


def write_stream(path: Path, codes: Iterable[np.ndarray], images: int, manifest: dict[str, Any]) -> Path:
    """Write a stream and its index, each atomically. The same codes give the same bytes.

    Args:
        path: of the stream.
        codes: (m, n) integers, run after run; `images` rows together.
        images: more than 0.
        manifest: its 'format' says which codec.

    Returns:
        Path of the index.

    Raises:
        ValueError: for a code that the codec cannot hold, another number of images.
        InputError: for a file that cannot be written.
    """
    codec = CODECS[manifest.get('format', PUBLISHED.name)]
    offsets = [np.zeros(1, np.int64)]
    end = 0
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        compress = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: as gzip, without name or time
        for run in codes:
            stream, index = encode(codec, run)
            offsets.append(index[1:] + end)
            end += index[-1]
            file.write(compress.compress(stream.tobytes()))
        file.write(compress.flush())
        index = np.concatenate(offsets)
        if len(index) - 1 != images:
            raise ValueError(f'{len(index) - 1} images, where {images} were to be written')
    npy = io.BytesIO()
    np.save(npy, index)
    with atomic_path(companion_path(path)) as temporary:
        Path(temporary).write_bytes(gzip_bytes(npy.getvalue()))
    return companion_path(path)
