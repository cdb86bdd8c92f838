"""Files: which ones a flag names, reading within limits, writing whole or not at all, locks, downloads.

A training may be killed at any moment, and its inputs come from strangers. So nothing is written in place:
`atomic_path` writes beside the file and renames. Nothing is read without a limit, see the numbers at the top. A folder
has one writer, see `hold_folder`. A run that starts again asks `is_same_run` whether its folder has results of it.
"""
import contextlib
import errno
import fcntl
import glob
import http.client
import json
import os
import re
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fileio.hub import check_digest, check_fragment, digest_of_file, is_on_hub, local_path
from utils import InputError, first_line, is_main

# What a file may claim before memory is taken for it. Damaged or hostile ones would have us allocate anything.
MAX_FILES = 100_000  # shards of a set
SMALL = 1 << 20  # bytes that are allowed whatever a file's size
MAX_JSON_BYTES = 1 << 24  # manifests are of kilobytes, synonyms of 65,536 codes 3 MB, a log of 10,000 epochs 5 MB
MAX_LABEL_BYTES = 1 << 28  # of one label file
MAX_IMAGES = 1 << 27  # of one token file, 100 times ImageNet-1k; larger sets come as shards
MAX_IMAGE_BYTES = 2 * 1024 ** 2  # two a code, of a grid of 1024 x 1024
MAX_INDEX_RATIO = 64  # bytes of an index to one of its gzip; a regular one has 8
MAX_GZIP_RATIO = 1032  # bytes of anything to one of its gzip: what deflate can do
MAX_TENSOR_RATIO = 4  # bytes of tensors to a byte of their file: those that share memory are stored once


# ---------------------------------------------------------------- names

def expand_files(spec: str) -> list[Path]:
    """The files that a path, a glob (sorted) or a comma-separated list of both names.

    '{000..146}' counts, as in the names of tar shards. What exists under a name with such characters is that file or
    folder; within a list, no name has a comma. An hf:// address is fetched. Raises InputError when a glob matches
    nothing.
    """
    spec = str(spec)
    if os.path.exists(spec):
        return [Path(spec)]
    files = []
    for pattern in filter(None, map(str.strip, spec.split(','))):
        matches = _match(pattern)
        if not matches:
            raise InputError(f'{pattern}: no file matches')
        files += matches
    if not files:
        raise InputError(f'{spec!r} names no file')
    return files


def _match(pattern: str) -> list[Path]:
    """The sorted files that a glob with counting braces matches; a name without magic as it is."""
    if os.path.exists(pattern):
        return [Path(pattern)]
    if is_on_hub(pattern):
        return [Path(local_path(name)) for name in _count_braces(pattern)]
    folder = next((str(parent) for parent in Path(pattern).parents if os.path.isdir(parent)), '')  # is no pattern
    rest = os.path.relpath(pattern, folder) if folder else pattern
    files = []
    for name in _count_braces(rest):
        if glob.has_magic(name):
            files += sorted(glob.glob(os.path.join(glob.escape(folder), name)))
        else:
            files.append(os.path.join(folder, name))
    return [Path(file) for file in files]


def _count_braces(pattern: str) -> list[str]:
    """'a-{00..02}.tar' as ['a-00.tar', 'a-01.tar', 'a-02.tar']; other names as they are, in a list."""
    match = re.search(r'\{(\d+)\.\.(\d+)\}', pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    if int(last) - int(first) >= MAX_FILES:
        raise InputError(f'{pattern}: counts {int(last) - int(first) + 1:,} files; {MAX_FILES:,} are the most')
    return [name for number in range(int(first), int(last) + 1)
            for name in _count_braces(f'{pattern[:match.start()]}{number:0{len(first)}d}{pattern[match.end():]}')]


# ---------------------------------------------------------------- reading

def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a file. Raises InputError when it cannot be read or has more than `limit` bytes."""
    try:
        with open(local_path(path), 'rb') as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    if len(data) > limit:
        raise InputError(f'{path}: more than {limit:,} bytes, which no file of its kind has')
    return data


def parse_json(data: bytes) -> Any:
    """The value of UTF-8 bytes of JSON. Raises ValueError, for what is nested too deep as well."""
    try:
        return json.loads(data.decode('utf-8'))
    except RecursionError:
        raise ValueError('nested too deep') from None


def read_json(path: str | Path) -> Any:
    """The JSON value in `path`; InputError when it is missing, not JSON, or longer than MAX_JSON_BYTES."""
    data = read_bytes(path, MAX_JSON_BYTES)
    try:
        return parse_json(data)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f'{path}: not JSON ({error})') from None


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises InputError."""
    try:
        return digest_of_file(local_path(path))
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None


def identity(path: str | Path) -> dict[str, str]:
    """Name and checksum of a file, or of what an address gives. Raises InputError."""
    if is_address(path):
        with tempfile.TemporaryDirectory() as folder:
            return identity(download(path, folder))
    return {'file': Path(path).name, 'sha256': sha256(path)}


# ---------------------------------------------------------------- writing

@contextlib.contextmanager
def atomic_path(path: str | Path, advice: str = 'choose another folder') -> Iterator[str]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it, else remove it.

    The reader of `path` sees the old file or the whole new one, never a part. While it is written the temporary file
    is locked, so that `remove_leftovers` can tell it from what a killed run left.

    Raises:
        InputError: when the folder cannot be written, with the `advice`.
    """
    path = _target(path)
    handle, temporary = _temporary_beside(path, advice)
    with contextlib.suppress(OSError):  # some file systems have no locks
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield temporary
        # The content is on disk before the name points to it: after a power cut the file is the old one or whole.
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # a mount may refuse it
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only the user can read
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise InputError(f'{path}: cannot be written ({error.strerror or error}); {advice}') from None
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _temporary_beside(path: Path, advice: str) -> tuple[int, str]:
    """(open handle, name) of a new temporary file beside `path`. Raises InputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, 'a folder is there')
        if os.path.exists(path) and not path.is_file():
            raise FileExistsError(errno.EEXIST, 'a device, pipe or socket is there')
        return tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
    except OSError as error:
        raise InputError(f'{path}: cannot be written ({error.strerror}); {advice}') from None


def _target(path: str | Path) -> Path:
    """What a link points to: the link stays, and what it points to is written."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def check_writable(path: str | Path, advice: str = 'choose another folder or name',
                   inputs: Sequence[str | Path] = ()) -> None:
    """InputError unless `atomic_path` could write `path` now: called before long work that ends in that file.

    `inputs` are files that the program reads, which the output must not replace.
    """
    if any(os.path.realpath(path) == os.path.realpath(file) for file in inputs):
        raise InputError(f'{path}: is read, and would be replaced by the output; choose another name for the output')
    handle, temporary = _temporary_beside(_target(path), advice)
    os.close(handle)
    os.unlink(temporary)


def remove_leftovers(folder: str | Path, pattern: str) -> None:
    """Remove temporary files that killed runs left in a folder; those a living process writes stay."""
    with contextlib.suppress(OSError):  # the folder may be unreadable
        # The writer of a temporary file holds its lock; the system took away the locks of killed processes.
        for path in Path(folder).glob(pattern):
            with contextlib.suppress(OSError), open(path, 'rb+') as file:  # NFS locks what is open for writing
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _flush_folder(folder: Path) -> None:
    """Bring the names in a folder to disk, where the system allows that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 text file atomically; file names that are not UTF-8 are escaped, as in \\udce9."""
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding='utf-8', errors='backslashreplace')


def save_torch(value: Any, path: str | Path) -> None:
    """torch.save, atomically; equal values give equal files. Raises InputError (a full disk, say)."""
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        try:
            torch.save(value, file)  # not to a path: torch would store the temporary name, another one each time
        except RuntimeError as error:  # how torch's writer passes on an OSError
            raise InputError(f'{path}: cannot be written ({first_line(error)})') from None


def check_same(path: Path, definition: dict[str, Any], flag: str = '--output-dir',
               added: Sequence[str] = ()) -> None:
    """Note in a JSON file what the results in its folder are made of, as plain values by name.

    Raises InputError as `is_same_run` does, whose advice names the `flag` of the folder.
    """
    if not is_same_run(path, definition, f'choose another {flag}, or remove that folder', added=added):
        write_text(path, json.dumps(definition, indent=1) + '\n')


def is_same_run(path: Path, definition: dict[str, Any], advice: str, ignored: Sequence[str] = (),
             field: str | None = None, added: Sequence[str] = ()) -> bool:
    """Whether a JSON file says that results are made of `definition`: a run that begins asks if it is the same run.

    Args:
        path: of the JSON file.
        definition: plain values by name.
        advice: what the user can do when it is another run.
        ignored: names that may differ.
        added: names that files of before lack.
        field: the one of the file's fields that holds the definition; None where the file holds nothing else.

    Returns:
        False where there is no file.

    Raises:
        InputError: where the file says something else, with the names that differ.
    """
    if not os.path.exists(path):
        return False
    definition = json.loads(json.dumps(definition))  # as JSON gives it back: tuples are lists, say
    before = read_json(path)
    if field and isinstance(before, dict):
        before = before.get(field)
    before = before if isinstance(before, dict) else {}
    differ = [name for name in {**definition, **before}
              if name not in ignored and (name in before or name not in added)
              and before.get(name) != definition.get(name)]
    if differ:
        raise InputError(f'{path.parent}: holds results of another {", ".join(differ)}; {advice}')
    return True


# ---------------------------------------------------------------- one writer a folder

def hold_folder(folder: str | Path, advice: str = 'choose another --output-dir', wait: float = 0,
                name: str = '.lock') -> BinaryIO:
    """Make a folder, and hold it for this process until the returned file is closed or the process ends.

    Args:
        folder: that only one process may write.
        advice: what the user can do where it cannot be held.
        wait: seconds to wait for another process that holds it.
        name: of the lock file in the folder.

    Raises:
        InputError: when another process holds the folder, or it cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return lock_file(Path(folder) / name, wait)
    except BlockingIOError:
        raise InputError(f'{folder}: another process is at work there; wait until it ends, or {advice}') from None
    except OSError as error:
        raise InputError(f'{folder}: cannot be written ({error.strerror}); {advice}') from None


def lock_file(path: str | Path, wait: float = 0) -> BinaryIO:
    """Open `path` and lock it for this process until it is closed or the process ends, however it ends.

    On a file system without locks every process gets the file.

    Args:
        path: of the file, which is made where it does not exist.
        wait: seconds to wait for another process that holds the lock.

    Raises:
        BlockingIOError: when another process holds the lock.
        OSError: when the file cannot be opened.
    """
    file = open(path, 'ab')  # noqa: SIM115 - it stays open, and so locked
    try:
        # lockf's lock is of the process, flock's is of the open file, which forked processes have too. When a run is
        # killed, its loader processes may live on for a while, and must not keep the folder from the next run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        if not _wait_for_lock(file, wait):
            file.close()
            raise BlockingIOError(f'{path} is locked') from None
    except OSError:
        pass  # this file system has no locks; the user is not kept from working there
    return file


def _wait_for_lock(file: BinaryIO, seconds: float) -> bool:
    """Whether this process gets the lock of an open file within some seconds."""
    # Not in a thread that waits in the system's call: when the time is over it would wait on, and what it gets for a
    # file that is closed by then drops all locks that this process has on the path.
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))
        with contextlib.suppress(BlockingIOError, PermissionError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


# ---------------------------------------------------------------- the web

def is_address(path: str | Path) -> bool:
    """Whether a path is an http(s) address, or an hf:// address of the Hugging Face Hub (fileio/hub.py)."""
    return str(path).startswith(('https://', 'http://')) or is_on_hub(path)


def download(url: str, folder: str | Path) -> str:
    """Fetch `url` into `folder`, or a file of the Hub into its own cache; returns the path.

    An address may end in '#sha256=' and 64 hexadecimal digits: a file with another SHA-256 is refused.

    Raises:
        InputError: when it cannot be fetched, or is not the file it should be.
    """
    # No cache: torch.hub's goes by file name alone, and checkpoints of many runs are called checkpoint.pth.
    address, _, fragment = url.partition('#')
    if fragment:
        check_fragment(url)
    if is_on_hub(url):
        return str(local_path(url))
    try:
        path = os.path.join(folder, Path(urllib.parse.urlparse(address).path).name or 'file')
        torch.hub.download_url_to_file(address, path, progress=is_main() and sys.stderr.isatty())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f'{url}: cannot be fetched ({error})') from None
    if fragment:
        check_digest(path, url)
    return path
