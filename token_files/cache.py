"""The cache of a node: token files decoded once into a memory-mapped array that all ranks share.

`open_codes` is the door. The first rank of a node decodes the files into a .npy, then all ranks map it: the codes of
ImageNet-1k (2.6 GB) are in the memory of a node once, and a second run starts at once. A cache is named by a
fingerprint of the files, so that one of changed files is never read. Beside it lies the SHA-256 of the codes, by which
ranks, and a resumed run, tell that they read the same ones (`digest_of_codes`) without reading them all.

A set of another project that is an array of 16 bits already is mapped as it lies, and only its SHA-256 is kept here.
Labels that are inside such a set are cached too, since finding them may mean to read all of it.
"""
import contextlib
import errno
import functools
import glob
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fileio.files import atomic_path, remove_leftovers, write_text
from fileio.torch_files import digest_of
from token_files.token_file import TokenFile, decode, labels_of
from utils import CPU, InputError, local_rank, one_first, print0


def _fingerprint(path: Path) -> tuple[int, int, str]:
    """What changes when the file does: its size, time and checksum (gzip keeps one of the content at its end).

    Of a folder: number of its files, its time, and a checksum of their names, sizes and times.
    """
    try:
        if path.is_dir():
            with os.scandir(path) as entries:
                stats = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
            return len(stats), path.stat().st_mtime_ns, hashlib.sha256(repr(stats).encode()).hexdigest()
        with open(path, 'rb') as file:
            stat = os.stat(file.fileno())
            file.seek(max(0, stat.st_size - 8))
            return stat.st_size, stat.st_mtime_ns, file.read().hex()
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None


def cache_path(files: Sequence[TokenFile], folder: str = '') -> Path:
    """Where the decoded codes of token files belong; the name changes with what they are decoded from."""
    paths = [Path(file.name).absolute() for file in files]
    # Two hashes: the key changes with the files' content, the location with their paths alone. So changed files get
    # another cache, and the old one, of the same location, can be told and removed.
    content = [(file.format, *map(_fingerprint, file.files)) for file in files]
    key = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    location = hashlib.sha256(os.fsencode('\0'.join(map(str, paths)))).hexdigest()[:8]
    stem = files[0].stream.name.removesuffix('.gz').removesuffix('.data.bin')
    return Path(folder or files[0].stream.absolute().parent) / f'{stem}.{location}.codes-{key}.npy'


def decode_into(files: Sequence[TokenFile], allocate: Callable[[tuple[int, int]], np.ndarray],
                device: torch.device = CPU) -> np.ndarray:
    """Decode every image into the array that `allocate((N, n))` returns once the grid is known.

    Raises:
        InputError: for damaged files, and for files that are not as their manifests say.
    """
    for file in files:
        file.check_content()
    codes = None  # allocated when the first run tells how many codes an image has
    start = 0
    for file in files:
        for first, run in decode(file, device):
            if codes is None:
                codes = allocate((sum(map(len, files)), run.shape[1]))
            if run.shape[1] != codes.shape[1]:
                raise InputError(f'{file.stream}: {run.shape[1]} codes an image, where {files[0].stream} has '
                                 f'{codes.shape[1]}: they are no shards of one set')
            codes[start + first:start + first + len(run)] = run
        start += len(file)
    return codes


def _allocate(path: str, shape: tuple[int, int]) -> np.ndarray:
    """A new .npy of codes, mapped for writing, with all its space on disk taken."""
    codes = np.lib.format.open_memmap(path, 'w+', np.uint16, shape)
    # A write into a map on a full disk kills the process by a bus error. Taking all space at once gives an error that
    # can be reported.
    if hasattr(os, 'posix_fallocate'):
        with open(path, 'rb+') as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):  # this file system cannot
                    raise
    return codes


def build_cache(files: Sequence[TokenFile], path: Path, device: torch.device = CPU) -> None:
    """Decode token files into the .npy at `path`, atomically; older caches of the same files are removed."""
    more = f' and {len(files) - 1} more' if len(files) > 1 else ''
    if all(file.is_foreign for file in files):
        _cache_labels(files, path)  # first: whoever sees the codes sees them too
    print0(f'decoding {files[0].stream}{more} into {path}')
    with atomic_path(path, 'choose another folder with --token-cache') as temporary:
        codes = decode_into(files, functools.partial(_allocate, temporary), device)
        codes.flush()
        digest = digest_of(codes)  # now, while they are in memory
    write_text(digest_path(path), digest + '\n')
    # Only after the new cache is there: a run that is killed on the way leaves a cache that works.
    for old in path.parent.glob(_versions(path)):
        if old != path:
            with contextlib.suppress(OSError):
                old.unlink()
                digest_path(old).unlink(missing_ok=True)
                labels_path(old).unlink(missing_ok=True)


def _cache_labels(files: Sequence[TokenFile], path: Path) -> None:
    """Write the labels inside sets of others beside the .npy at `path`."""
    # sets without labels, or with wrong ones, may be given a file of labels: what is wrong is said by who reads them
    with contextlib.suppress(InputError):
        labels = np.concatenate([file.content.labels() for file in files])
        with atomic_path(labels_path(path)) as temporary, open(temporary, 'wb') as file:
            np.save(file, labels)


def labels_path(path: Path) -> Path:
    """Where the labels are kept of a set whose codes are cached at `path`."""
    return path.with_name(path.name.replace('.codes-', '.labels-'))


def labels_inside(files: Sequence[TokenFile], cache: str = '') -> np.ndarray:
    """The labels (N,) int64 that are inside sets of others, which `open_codes` has opened with this `cache`.

    Raises InputError where one has none, and for a set of ours.
    """
    if cache != 'none' and all(file.is_foreign for file in files):
        path = labels_path(cache_path(files, cache))
        if path.exists():
            labels = map_array(path)
            if labels.dtype == np.int64 and labels.shape == (sum(map(len, files)),):
                return np.array(labels)
            raise InputError(f'{path}: no cache of labels; delete it, and it is made again')
    return np.concatenate([labels_of(file, None) for file in files])


def digest_path(path: Path) -> Path:
    """Where the SHA-256 of the codes in a cache is kept."""
    return path.with_suffix('.sha256')


def digest_of_codes(files: Sequence[TokenFile], codes: np.ndarray, cache: str = '') -> str:
    """SHA-256 of codes (N, n) as `open_codes` returned them for these files and this `cache`. Collective.

    It does not depend on the format of the files. From beside the cache, where it is; else the codes are read.
    """
    if cache == 'none':
        return digest_of(codes)
    path = digest_path(cache_path(files, cache))
    with one_first(local_rank() == 0):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding='ascii').strip()
            if re.fullmatch('[0-9a-f]{64}', text):
                return text
        digest = digest_of(codes)
        if local_rank() == 0:
            with contextlib.suppress(InputError):  # a cache that this user may only read: the next start digests again
                write_text(path, digest + '\n')
        return digest


def _versions(path: Path, ending: str = '.npy', kind: str = 'codes') -> str:
    """A glob for the names of a cache: those made from earlier versions of its files too."""
    return f'{glob.escape(path.name.rpartition(f".{kind}-")[0])}.{kind}-*{ending}'


def mapped_in_place(files: Sequence[TokenFile]) -> bool:
    """Whether a set needs no cache, since its file holds codes as a cache does."""
    return len(files) == 1 and files[0].is_foreign and files[0].content.array is not None


def open_codes(files: Sequence[TokenFile], cache: str = '', device: torch.device = CPU) -> np.ndarray:
    """The codes of token files, (N, n) uint16, one file after the other. Collective.

    With several ranks, the first of each node decodes and all map the same file.

    Args:
        files: the shards of one set.
        cache: folder of the decoded file; '' puts it beside the (first) token file; 'none' decodes into the memory of
            this process instead.
        device: that decodes; a GPU is faster for compact files.

    Raises:
        InputError: for damaged files, or a cache that cannot be written or read.
    """
    if mapped_in_place(files):
        return files[0].content.array
    if cache == 'none':
        return decode_into(files, in_memory, device)
    path = cache_path(files, cache)
    with one_first(local_rank() == 0):
        for ending in ('.npy', '.sha256'):
            remove_leftovers(path.parent, f'.{_versions(path, ending)}.*.tmp')
        remove_leftovers(path.parent, f'.{_versions(labels_path(path), kind="labels")}.*.tmp')
        if not os.path.exists(path):
            build_cache(files, path, device)
    return map_cache(path)


def in_memory(shape: tuple[int, int]) -> np.ndarray:
    """An empty uint16 array. Raises InputError where memory lacks."""
    try:
        return np.empty(shape, np.uint16)
    except MemoryError:
        raise InputError(f'{shape[0]:,} images of {shape[1]} codes do not fit into memory: use a cache') from None


def map_cache(path: Path) -> np.ndarray:
    """The codes in a cache, mapped. Raises InputError."""
    codes = map_array(path)
    if codes.dtype != np.uint16 or codes.ndim != 2 or not codes.size:
        raise InputError(f'{path}: no cache of codes; delete it, and it is made again')
    return codes


def map_array(path: Path) -> np.ndarray:
    """The array in a cache, mapped. Raises InputError."""
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
    except OSError as error:
        if error.errno is None:  # numpy complains about the content, not the system about the file
            raise InputError(f'{path}: damaged cache ({error}); delete it, and it is made again') from None
        raise InputError(f'{path}: the cache cannot be mapped ({error.strerror}); choose another folder with '
                         '--token-cache') from None
    except Exception as error:  # numpy parses the header as Python, and passes on what that raises
        raise InputError(f'{path}: damaged cache ({error}); delete it, and it is made again') from None
    if not isinstance(array, np.ndarray):
        raise InputError(f'{path}: no cache of codes; delete it, and it is made again')
    return array
