"""Compact token files: a stream of rANS blocks with its index, and the context model of the set; see rans.py.

    NAME.data.bin    header, words of each block, blocks; an image set, or one shard of it
    NAME.model.bin   the context model, one for all shards of a set

The manifest says that a set is compact, and where its model is. docs/token_format.md has the bytes. Images are encoded
in blocks that do not depend on each other, so that threads, or a GPU, decode many at once and a reader of a few images
skips the rest. The names that token_file.py uses of this module are those of published.py.

Most damage shows in the index, or in a block that does not end in the state that its encoding began with. Checksums of
the manifest find the rest: a bit that swaps two codes of equal likelihood, blocks of equal length that changed places,
in a block of one code another number of images, and by chance one in 2 ** 31.
"""
import functools
import hashlib
import math
import os
import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fileio.files import MAX_IMAGES, atomic_path, read_bytes
from fileio.hub import fetch_beside
from token_files.context_model import MAX_SYMBOLS, ContextModel, fit
from token_files.prefetching import prefetch
from token_files.rans import decode_blocks, decode_blocks_on, encode_blocks
from utils import CPU, InputError, cores

NAMES = ('compact',)  # as a manifest's "format" states them
ENDING = 'data.bin'  # of a stream's name
MAX_CODES = MAX_SYMBOLS
MAGIC = b'SeiTcmp1'
HEADER = np.dtype([('magic', 'S8'), ('images', '<u4'), ('grid', '<u2'), ('block_images', '<u2'), ('model', 'V16')])
BLOCK_CODES = 4096  # a block has as many images as have no more codes than this, or one
MAX_GRID = 256  # codes on a side: what a small file can claim to hold stays small
MAX_MODEL_BYTES = 1 << 27
MAX_NAME_BYTES = 255  # what file systems take
ENCODE_CODES = 1 << 22  # at a time: bounds memory
DECODE_CODES = 1 << 24  # at a time, in a thread
MAX_THREADS = 8  # each has its codes in memory
GPU_CODES = 1 << 28  # 1.5 GB there
LEAST_WORDS = 2  # of a block: its state


@dataclass(frozen=True)
class Stream:
    """A compact stream whose header, index and model have been read and checked.

    Attributes:
        path: of the stream.
        model_path, model: of the set; shards share them.
        images: in this stream.
        grid: codes on a side.
        block_images: images of a block; the last block may have fewer.
        lengths: (blocks,) int64, 32-bit words of each block.
    """
    path: Path
    model_path: Path
    model: ContextModel
    images: int
    grid: int
    block_images: int
    lengths: np.ndarray

    def __len__(self) -> int:
        """Number of images."""
        return self.images

    @property
    def files(self) -> tuple[Path, Path]:
        """Stream and model."""
        return self.path, self.model_path

    def decode(self, device: torch.device = CPU) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first, codes (m, n) uint16) for one run of images after another. Raises InputError.

        `device` does the work: all cores of a CPU, or a GPU.
        """
        # Threads, not processes: numpy lets go of Python's lock in the long operations. A GPU works on its own; one
        # thread feeds it.
        blocks = len(self.lengths)
        threads = min(cores(), MAX_THREADS) if device.type == 'cpu' else 1
        max_codes = DECODE_CODES if device.type == 'cpu' else GPU_CODES
        step = min(max(1, max_codes // (self.block_images * self.grid ** 2)), -(-blocks // threads))
        ends = self.model.ends()
        yield from prefetch(lambda first: (first * self.block_images,
                                           self.decode_blocks(first, min(first + step, blocks), ends, device)),
                            range(0, blocks, step), threads)

    def decode_blocks(self, first: int, last: int, ends: np.ndarray | None = None,
                      device: torch.device = CPU) -> np.ndarray:
        """Codes (m, n) uint16 of the images of blocks `first` to `last` - 1; reads nothing of the others.

        `ends` is `self.model.ends()`, for callers that have it already.

        Raises:
            InputError: naming the block that is damaged.
        """
        lengths = self.lengths[first:last]
        # header, index, then the blocks one after the other
        start = HEADER.itemsize + 4 * (len(self.lengths) + int(self.lengths[:first].sum()))
        try:
            with open(self.path, 'rb') as file:
                file.seek(start)
                words = np.frombuffer(file.read(4 * int(lengths.sum())), '<u4')
        except OSError as error:
            raise InputError(f'{self.path}: {error.strerror}') from None
        if len(words) != lengths.sum():
            raise InputError(f'{self.path}: was cut short while it was read')
        images = min(last * self.block_images, self.images) - first * self.block_images
        try:
            decode = decode_blocks if device.type == 'cpu' else functools.partial(decode_blocks_on, device)
            return decode(self.model, self.model.ends() if ends is None else ends, words, lengths,
                          (images, self.block_images, self.grid ** 2))
        except ValueError as error:
            block, complaint = error.args
            raise InputError(f'{self.path}: block {first + block}, of image {(first + block) * self.block_images} and '
                             f'those after it, {complaint}; the stream is damaged, fetch or make it again') from None


# ---------------------------------------------------------------- reading

def format_for(codebook_size: int) -> str:
    """Name of the format of codes of a codebook. Raises InputError where it cannot hold them."""
    if codebook_size > MAX_CODES:
        raise InputError(f'{codebook_size} codes are more than token files hold ({MAX_CODES})')
    return NAMES[0]


def companion_path(token_file: str | Path) -> Path:
    """Path of the model that is written beside a stream, without a shard's number. Raises InputError."""
    path = Path(token_file)
    if not path.name.endswith(f'.{ENDING}'):
        raise InputError(f'{path}: a compact token file is named NAME.{ENDING}')
    return path.with_name(re.sub(r'(-\d+)?\.data\.bin$', '.model.bin', path.name))


def is_compact(path: Path) -> bool:
    """Whether a file begins as a compact stream does."""
    try:
        with open(path, 'rb') as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_stream(path: Path, manifest: dict[str, Any], manifest_path: Path) -> Stream:
    """Read header and index of a stream, and the model that the manifest names. Raises InputError."""
    header, lengths = _read_header(path)
    model_path = _model_path(path, manifest, manifest_path)
    fetch_beside(model_path)
    data = read_bytes(model_path, MAX_MODEL_BYTES)
    # A wrong model decodes without complaint to wrong codes, so each stream holds the hash of its model.
    if identity_of(data) != header['model'].tobytes():
        raise InputError(f'{model_path}: is not the model that {path} was encoded with: it is damaged, or of another '
                         'set; fetch or make it again')
    return Stream(path, model_path, _parse_model(data, model_path), int(header['images']), int(header['grid']),
                  int(header['block_images']), lengths)


def identity_of(model_data: bytes) -> bytes:
    """What streams state of the file of their model: 16 bytes."""
    return hashlib.sha256(model_data).digest()[:16]


def _parse_model(data: bytes, path: Path) -> ContextModel:
    """The model in the bytes of a file. Raises InputError."""
    try:
        return ContextModel.from_bytes(data)
    except ValueError as error:
        raise InputError(f'{path}: no context model: {error}; fetch or make it again') from None


def _read_header(path: Path) -> tuple[np.void, np.ndarray]:
    """The header of a stream, and the words of each block, checked against the size of the file."""
    advice = 'it is damaged or truncated, fetch or make it again'
    try:
        size = os.path.getsize(path)
        with open(path, 'rb') as file:
            data = file.read(HEADER.itemsize)
            if len(data) < HEADER.itemsize or not data.startswith(MAGIC):
                raise InputError(f'{path}: does not begin as a compact stream does; {advice}')
            header = np.frombuffer(data, HEADER)[0]
            images, grid, block_images = (int(header[name]) for name in ('images', 'grid', 'block_images'))
            if not (0 < images <= MAX_IMAGES and 0 < grid <= MAX_GRID and block_images == _block_images(grid ** 2)):
                raise InputError(f'{path}: its header says {images} images of {grid}x{grid} codes in blocks of '
                                 f'{block_images}; {advice}')
            blocks = -(-images // block_images)
            # before the index is read: a damaged header must not have us take memory for 2 ** 27 images
            if size < HEADER.itemsize + 4 * (1 + LEAST_WORDS) * blocks:
                raise InputError(f'{path}: {size:,} bytes are too few for the {blocks:,} blocks its header says; '
                                 f'{advice}')
            lengths = np.frombuffer(file.read(4 * blocks), '<u4').astype(np.int64)
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    if len(lengths) < blocks or lengths.min() < LEAST_WORDS \
            or HEADER.itemsize + 4 * (blocks + int(lengths.sum())) != size:
        raise InputError(f'{path}: {size:,} bytes, which are not what its index of {blocks:,} blocks says; {advice}')
    return header, lengths


def _model_path(path: Path, manifest: dict[str, Any], manifest_path: Path) -> Path:
    """The model beside a stream that its manifest names."""
    name = manifest.get('model')
    if not _is_file_name(name):
        raise InputError(f"{manifest_path}: 'model' is {reprlib.repr(name)}, no name of a file; fetch or make the set "
                         'again')
    return path.with_name(name)


def _is_file_name(name: Any) -> bool:
    """Whether a value of a manifest can be the name of a file, of one line, in the folder of the manifest."""
    try:
        encoded = os.fsencode(name)
    except (TypeError, ValueError):  # ValueError: a surrogate, which JSON can hold
        return False
    return b'\0' not in encoded and name == Path(name).name and name != '..' and len(name.splitlines()) == 1 \
        and len(encoded) <= MAX_NAME_BYTES


# ---------------------------------------------------------------- writing

def write_model(token_file: Path, codes: Iterable[np.ndarray], images: int) -> dict[str, str]:
    """Fit the model of a set and write it atomically; returns what manifests say of it. Raises InputError.

    Args:
        token_file: path of the stream, or of the first shard.
        codes: of all shards: (m, n) integers, run after run; `images` rows together.
        images: more than 0.
    """
    path = companion_path(token_file)
    data = fit(codes, images).to_bytes()
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(data)
    return {'model': path.name}


def write_stream(path: Path, codes: Iterable[np.ndarray], images: int, manifest: dict[str, Any]) -> Path:
    """Write a stream atomically. The same codes give the same bytes, however they are cut into runs.

    Args:
        path: of the stream.
        codes: (m, n) integers that the model has, run after run; `images` rows together.
        images: more than 0.
        manifest: its 'model' names the model, which `write_model` left beside the stream.

    Returns:
        Path of the model.

    Raises:
        ValueError: for a grid that is too large, a code that the model lacks, another number of images.
        InputError: for a file that cannot be written, or a model that cannot be read.
    """
    model_path = path.with_name(manifest['model'])
    # read back from the file, so that what is encoded is what a reader will decode with
    data = read_bytes(model_path, MAX_MODEL_BYTES)
    model = _parse_model(data, model_path)
    ends = model.ends()
    lengths = []
    written = 0
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        for chunk, block_images in _whole_blocks(codes):
            if not written:
                grid = math.isqrt(chunk.shape[1])
                if grid > MAX_GRID:
                    raise ValueError(f'grids of {grid}x{grid} codes; the format {NAMES[0]} holds '
                                     f'{MAX_GRID}x{MAX_GRID}')
                header = np.array([(MAGIC, images, grid, block_images, identity_of(data))], HEADER)
                file.write(header.tobytes())
                # room for the index, which is known when all blocks are written
                file.seek(4 * -(-images // block_images), os.SEEK_CUR)
            words, chunk_lengths = encode_blocks(model, ends, chunk, block_images)
            file.write(words.astype('<u4').tobytes())
            lengths.append(chunk_lengths)
            written += len(chunk)
        if written != images:
            raise ValueError(f'{written} images, where {images} were to be written')
        file.seek(HEADER.itemsize)
        file.write(np.concatenate(lengths).astype('<u4').tobytes())
    return model_path


def _block_images(n: int) -> int:
    """Images of a block, of n codes each."""
    return max(1, BLOCK_CODES // n)


def _whole_blocks(runs: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (codes of about ENCODE_CODES, images of a block), always the same cuts; the last ones are fewer.

    Callers cut a set into runs as it suits them; blocks must not depend on it, or equal sets would not be equal files.
    """
    pending = []
    for run in runs:
        block_images = _block_images(run.shape[1])
        size = max(1, ENCODE_CODES // (block_images * run.shape[1])) * block_images
        pending.append(run)
        if sum(map(len, pending)) >= size:
            codes = np.concatenate(pending)
            whole = len(codes) // size * size
            for start in range(0, whole, size):
                yield codes[start:start + size], block_images
            pending = [codes[whole:]]
    codes = np.concatenate(pending)
    if len(codes):
        yield codes, block_images
