"""How many worker processes may decode images, and where they can pass the pixels on.

Worker processes send pixels through shared memory, and open sockets in a temporary folder for that. A container with
little shared memory and a TMPDIR with a long path both make a DataLoader hang or die, so both are looked at before.
"""
import contextlib
import multiprocessing.util
import os
import shutil
import socket
import sys
import tempfile

from utils import cores, print0

PREFETCH = 4  # batches that each worker process is ahead, where shared memory allows it
SHARED_MEMORY = '/dev/shm'  # where decoded batches pass from process to process


def plan_workers(workers: int, batch_bytes: int) -> tuple[int, int]:
    """Choose what this machine can do; says so where that is fewer processes than were asked for.

    Args:
        workers: processes that are asked for.
        batch_bytes: pixels of a batch.

    Returns:
        Worker processes, and the batches that each is ahead. (0, 0): decode in this process.
    """
    workers = min(workers, cores())
    if workers <= 0:
        return 0, 0
    if not choose_socket_folder():
        print0('note: no temporary folder takes the sockets of worker processes (a path of 107 bytes at most): images '
               'are decoded without them, which is slower; set TMPDIR to a short path')
        return 0, 0
    # two batches less: one is with the caller, one on its way there
    batches_that_fit = shared_memory() // max(1, batch_bytes) - 2
    if batches_that_fit < workers:
        print0(f'note: {SHARED_MEMORY} has little room: {max(0, batches_that_fit)} instead of {workers} worker '
               'processes decode images; make it larger (docker run --shm-size)')
        workers = max(0, batches_that_fit)
    return (workers, min(PREFETCH, batches_that_fit // workers)) if workers else (0, 0)


def shared_memory() -> int:
    """Bytes of shared memory that this process may fill."""
    if not sys.platform.startswith('linux'):
        return sys.maxsize
    if not os.access(SHARED_MEMORY, os.W_OK):
        return 0
    # ranks of a node share it; a tenth is left to others
    return int(0.9 * shutil.disk_usage(SHARED_MEMORY).free) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def choose_socket_folder() -> bool:
    """Find a temporary folder for the sockets of worker processes; those that fork from this one use it.

    A socket's path has 107 bytes at most on Linux, so a long TMPDIR does not do: workers would wait for ever.
    """
    default_folder = tempfile.tempdir
    with contextlib.suppress(OSError):  # no folder for temporary files at all
        for folder in (tempfile.gettempdir(), '/tmp', '/var/tmp'):
            if not _takes_sockets(folder):
                continue
            tempfile.tempdir = folder
            try:
                return _can_bind(multiprocessing.util.get_temp_dir())  # made now, or earlier in this process
            finally:
                tempfile.tempdir = default_folder
    return False


def _takes_sockets(folder: str) -> bool:
    try:
        with tempfile.TemporaryDirectory(prefix='pymp-', dir=folder) as inner:
            return _can_bind(inner)
    except OSError:
        return False


def _can_bind(folder: str) -> bool:
    """Whether a socket can be made in a folder, with a name as long as multiprocessing's are."""
    path = os.path.join(folder, 'listener-12345678')
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
        os.unlink(path)
    except OSError:
        return False
    return True
