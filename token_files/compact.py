"""Compact token files: a stream of rANS blocks with its index, and the context model of the set; see rans.py.

    NAME.data.bin    header, words of each block, blocks; an image set, or one shard of it
    NAME.model.bin   the context model, one for all shards of a set

The manifest says that a set is compact, and where its model is. docs/token_format.md has the bytes.

Most damage shows in the index, or in a block that does not end in the state that its encoding began with. Checksums of
the manifest find the rest: a bit that swaps two codes of equal likelihood, blocks of equal length that changed places,
in a block of one code another number of images, and by chance one in 2 ** 31.
"""
import functools
import hashlib
import math
import os
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fileio.files import MAX_IMAGES, atomic_path, read_bytes
from token_files.context_model import ContextModel
from token_files.prefetching import prefetch
from token_files.rans import decode_blocks, decode_blocks_on, encode_blocks
from utils import InputError, cores

NAME = 'compact'  # as a manifest's "format" states it
MAGIC = b'SeiTcmp1'
HEADER = np.dtype([('magic', 'S8'), ('images', '<u4'), ('grid', '<u2'), ('block_images', '<u2'), ('model', 'V16')])
BLOCK_CODES = 4096  # a block has as many images as have no more codes than this, or one
MAX_GRID = 256  # codes on a side: what a small file can claim to hold stays small
MAX_MODEL_BYTES = 1 << 27
MAX_NAME_BYTES = 255  # what file systems take
ENCODE_CODES = 1 << 22  # at a time: bounds memory
DECODE_CODES = 1 << 24
MAX_THREADS = 8  # each has its codes in memory
GPU_CODES = 1 << 28  # 1.5 GB there
CPU = torch.device('cpu')
LEAST_WORDS = 2  # of a block: its state


@dataclass(frozen=True)
class CompactStream:
    """A compact stream whose header, index and model have been read and checked.

    Attributes:
        path: of the stream.
        model_path: of the model.
        model: of the set.
        images: in this stream.
        grid: codes on a side.
        block_images: images of a block.
        lengths: (blocks,) int64, words of each block.
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

        Args:
            device: that does the work; all cores of a CPU do.
        """
        blocks = len(self.lengths)
        threads = min(cores(), MAX_THREADS) if device.type == 'cpu' else 1
        most = DECODE_CODES if device.type == 'cpu' else GPU_CODES
        at_once = min(max(1, most // (self.block_images * self.grid ** 2)), -(-blocks // threads))
        ends = self.model.ends()
        yield from prefetch(lambda first: (first * self.block_images,
                                           self.decode_blocks(first, min(first + at_once, blocks), ends, device)),
                            range(0, blocks, at_once), threads)

    def decode_blocks(self, first: int, last: int, ends: np.ndarray | None = None,
                      device: torch.device = CPU) -> np.ndarray:
        """Codes (m, n) uint16 of the images of blocks `first` to `last` - 1; reads nothing of the others.

        Args:
            first: block.
            last: the block after the last one.
            ends: `self.model.ends()`, if it is there already.
            device: that does the work.

        Raises:
            InputError: naming the block that is damaged.
        """
        lengths = self.lengths[first:last]
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

def is_compact(path: Path) -> bool:
    """Whether a file begins as a compact stream does."""
    try:
        with open(path, 'rb') as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_compact(path: Path, manifest: dict[str, Any], manifest_path: Path) -> CompactStream:
    """Read header, index and model of a stream. Raises InputError."""
    header, lengths = _read_header(path)
    model_path = _model_path(path, manifest, manifest_path)
    data = read_bytes(model_path, MAX_MODEL_BYTES)
    if hashlib.sha256(data).digest()[:16] != header['model'].tobytes():
        raise InputError(f'{model_path}: is not the model that {path} was encoded with: it is damaged, or of another '
                         'set; fetch or make it again')
    try:
        model = ContextModel.from_bytes(data)
    except ValueError as error:
        raise InputError(f'{model_path}: no context model: {error}; fetch or make it again') from None
    return CompactStream(path, model_path, model, int(header['images']), int(header['grid']),
                         int(header['block_images']), lengths)


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

def write_model(model: ContextModel, path: Path) -> bytes:
    """Write a model atomically; returns what streams state of it. Raises InputError."""
    data = model.to_bytes()
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(data)
    return hashlib.sha256(data).digest()[:16]


def write_compact(path: Path, runs: Iterable[np.ndarray], images: int, model: ContextModel, identity: bytes) -> None:
    """Write a stream atomically. The same codes give the same bytes, however they are cut into runs.

    Args:
        path: of the stream.
        runs: codes (m, n) integers that the model has, `images` rows together.
        images: more than 0.
        model: of the set.
        identity: what `write_model` returned.

    Raises:
        ValueError: for a grid that is too large.
        InputError: for a file that cannot be written.
    """
    ends = model.ends()
    lengths = []
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        n = None
        for codes, block_images in _whole_blocks(runs):
            if n is None:
                n = codes.shape[1]
                grid = math.isqrt(n)
                if grid > MAX_GRID:
                    raise ValueError(f'grids of {grid}x{grid} codes; the format {NAME} holds {MAX_GRID}x{MAX_GRID}')
                file.write(np.array([(MAGIC, images, grid, block_images, identity)], HEADER).tobytes())
                file.seek(4 * -(-images // block_images), os.SEEK_CUR)  # the index, which comes last
            words, run_lengths = encode_blocks(model, ends, codes, block_images)
            file.write(words.astype('<u4').tobytes())
            lengths.append(run_lengths)
        file.seek(HEADER.itemsize)
        file.write(np.concatenate(lengths).astype('<u4').tobytes())


def _block_images(n: int) -> int:
    """Images of a block, of n codes each."""
    return max(1, BLOCK_CODES // n)


def _whole_blocks(runs: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (codes of about ENCODE_CODES, images of a block), always the same cuts; the last ones are fewer."""
    waiting = []
    for run in runs:
        block_images = _block_images(run.shape[1])
        size = max(1, ENCODE_CODES // (block_images * run.shape[1])) * block_images
        waiting.append(run)
        if sum(map(len, waiting)) >= size:
            codes = np.concatenate(waiting)
            whole = len(codes) // size * size
            for start in range(0, whole, size):
                yield codes[start:start + size], block_images
            waiting = [codes[whole:]]
    codes = np.concatenate(waiting)
    if len(codes):
        yield codes, block_images
