"""What every program here shares: errors for users, processes, files, seeds."""
import argparse
import contextlib
import ctypes
import glob
import hashlib
import http.client
import json
import os
import pickle
import re
import sys
import tempfile
import urllib.parse
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


# ---------------------------------------------------------------- errors a user can mend

class InputError(Exception):
    """A mistake in what the user gave. The message is one line: what, which file, what to do."""


class RankError(InputError):
    """A mistake that this rank alone meets, such as one bad image of many: reported whatever the rank."""


def run(main, *args):
    """Call `main(*args)`; an InputError becomes one line on standard error and exit code 2.

    With several ranks the same mistake is met by all of them; one rank a node reports it.
    """
    try:
        main(*args)
    except InputError as error:
        local_rank = int(os.environ.get('LOCAL_RANK', os.environ.get('SLURM_LOCALID', 0)))
        if local_rank == 0 or isinstance(error, RankError):
            print(f'error: {error}', file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_available() and dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def parse_flags(parser, words=None):
    """parse_args, with `_` and `-` in flags alike: the published commands mix them."""
    words = sys.argv[1:] if words is None else words
    spelled = [word.partition('=') for word in words]
    return parser.parse_args([(flag.replace('_', '-') if flag.startswith('--') else flag) + equals + value
                              for flag, equals, value in spelled])


# ---------------------------------------------------------------- processes

def slurm_environment():
    """Translate the variables of an `srun` step into torchrun's; others are left alone."""
    env = os.environ
    # SLURM_STEP_NUM_TASKS exists only inside srun, so a plain python in a batch script stays one process.
    if 'RANK' in env or int(env.get('SLURM_STEP_NUM_TASKS', 1)) < 2:
        return
    env['RANK'], env['LOCAL_RANK'] = env['SLURM_PROCID'], env['SLURM_LOCALID']
    env['WORLD_SIZE'] = env['SLURM_STEP_NUM_TASKS']
    nodes = env.get('SLURM_STEP_NODELIST', env.get('SLURM_JOB_NODELIST', '127.0.0.1'))
    first = re.match(r'([^,\[]+)(?:\[(\d+))?', nodes)  # node[012-015,020] -> node012
    env.setdefault('MASTER_ADDR', first.group(1) + (first.group(2) or ''))
    env.setdefault('MASTER_PORT', str(10000 + int(env.get('SLURM_JOB_ID', 0)) % 50000))


def init_distributed(device, dist_url='env://'):
    """Join the process group that torchrun, torch.distributed.launch or srun describes, if any.

    Args:
        device: 'cuda', 'cuda:N' or 'cpu', as the user gave it.
        dist_url: torch.distributed's init_method.
    Returns the torch.device of this rank: one GPU a local rank (NCCL), or the CPU (gloo).
    """
    slurm_environment()
    kind, _, number = device.partition(':')
    if kind not in ('cuda', 'cpu') or (number and not number.isdigit()):
        raise InputError(f'--device {device}: choose cuda, cuda:N or cpu')
    if kind == 'cuda':
        if not torch.cuda.is_available():
            raise InputError('--device cuda, but torch finds no CUDA device here: add --device cpu')
        number = int(number or os.environ.get('LOCAL_RANK', 0))
        if number >= torch.cuda.device_count():
            raise InputError(f'GPU {number} is asked for (by local rank or --device), but there are '
                             f'{torch.cuda.device_count()}: start fewer processes on this node')
        torch.cuda.set_device(number)
        kind = f'cuda:{number}'
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        dist.init_process_group('nccl' if kind.startswith('cuda') else 'gloo', init_method=dist_url,
                                rank=int(os.environ['RANK']), world_size=int(os.environ['WORLD_SIZE']),
                                device_id=torch.device(kind) if kind.startswith('cuda') else None)
    return torch.device(kind)


def keep_freed_memory():
    """Let glibc's malloc keep what is freed. Otherwise each large tensor is given back to the kernel and fetched anew,
    page by page: half the time of augmentation on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: all works, only slower
        mallopt = ctypes.CDLL(None).mallopt
        trim, mmap = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(mmap, 1 << 30) or mallopt(mmap, 1 << 25)  # older versions take no more
        mallopt(trim, (1 << 31) - 1)


def rank():
    """This process's rank, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def one_first(first):
    """Run the body on the ranks where `first` is true, then on the others (which find its files)."""
    if not first:
        barrier()
    yield
    if first:
        barrier()


def say(*words):
    """Print on rank 0."""
    if is_main():
        print(*words, flush=True)


# ---------------------------------------------------------------- seeds

def seed_step(seed, epoch, step, rank_, generator):
    """Make the randomness of one step a pure function of (seed, epoch, step, rank).

    Seeds numpy's global generator (timm's Mixup), torch's (drop-path, dropout) and `generator`
    (the token augmentations). So a resumed run continues exactly, and no state is to be saved.
    """
    words = np.random.SeedSequence((seed, epoch, step, rank_)).generate_state(3)
    np.random.seed(words[0])
    torch.manual_seed(int(words[1]))
    generator.manual_seed(int(words[2]))


# ---------------------------------------------------------------- files

def expand_files(spec):
    """The files that a path, a glob (sorted) or a comma-separated list of both names, as a list of Paths.

    '{000..146}' counts, as in the names of tar shards. Raises InputError when a glob matches nothing.
    """
    if os.path.exists(spec):
        return [Path(spec)]  # whatever characters its name has
    files = []
    for word in filter(None, (word.strip() for word in str(spec).split(','))):
        found = [path for pattern in _count_braces(word)
                 for path in (sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern])]
        if not found:
            raise InputError(f'{word}: no file matches')
        files += map(Path, found)
    if not files:
        raise InputError(f'{str(spec)!r} names no file')
    return files


def _count_braces(pattern):
    """'a-{00..02}.tar' as ['a-00.tar', 'a-01.tar', 'a-02.tar']; other words as they are, in a list."""
    match = re.search(r'\{(\d+)\.\.(\d+)\}', pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    return [word for number in range(int(first), int(last) + 1)
            for word in _count_braces(f'{pattern[:match.start()]}{number:0{len(first)}d}{pattern[match.end():]}')]


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success flush it to disk and rename it, else remove it.

    The reader of `path` sees the old file or the whole new one, never a part.
    Raises InputError when the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
        os.close(handle)
    except OSError as error:
        raise InputError(f'{path}: cannot be written ({error.strerror}); choose another folder') from None
    try:
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private; ours are like any other
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f'{path}: cannot be written ({error.strerror})') from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path, text):
    """Write a whole text file atomically."""
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding='utf-8')


def read_json(path):
    """The JSON value in `path`; InputError when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f'{path}: not JSON ({error})') from None


def download(url, folder):
    """Fetch `url` into `folder`; returns the path. Raises InputError. (torch.hub's cache goes by file name alone.)"""
    path = os.path.join(folder, Path(urllib.parse.urlparse(url).path).name or 'file')
    try:
        torch.hub.download_url_to_file(url, path, progress=is_main() and sys.stderr.isatty())
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f'{url}: cannot be fetched ({error})') from None
    return path


def sha256(path):
    """SHA-256 of a file, in hexadecimal. Raises InputError."""
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            for block in iter(lambda: file.read(1 << 20), b''):
                digest.update(block)
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    return digest.hexdigest()


def load_torch(path, what):
    """torch.load on the CPU without running code from the file (`weights_only=True`).

    argparse.Namespace is allowed, because the published checkpoints hold one. `path` may be an http(s) address.
    Raises InputError naming `what` the file should be.
    """
    path = str(path)
    if path.startswith(('https://', 'http://')):
        with tempfile.TemporaryDirectory() as folder:
            return load_torch(download(path, folder), what)
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            name = re.search(r'GLOBAL (\S+)', str(error))
            why = f'it carries {name.group(1)}, which would run code when loaded' if name else 'it is no torch file'
            raise InputError(f'{path}: refused as {what}: {why}') from None
        except OSError as error:
            raise InputError(f'{path}: cannot read {what} ({error.strerror or error})') from None
        except Exception as error:  # damage makes the unpickler raise nearly anything
            raise InputError(f'{path}: damaged or not {what} ({(str(error).splitlines() or [""])[0][:120]})') from None


def save_torch(value, path):
    """torch.save, atomically; equal values give equal files (given a path, torch would store its name too)."""
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        torch.save(value, file)


# ---------------------------------------------------------------- the run's log

class RunLog:
    """`log.txt`: one JSON line an epoch. Lines of epochs that are to run (again) are dropped on opening."""

    def __init__(self, path, start_epoch=0):
        self.path = Path(path)
        kept = [line for line in self._lines() if line.get('epoch', -1) < start_epoch] if start_epoch else []
        write_text(self.path, ''.join(json.dumps(line) + '\n' for line in kept))

    def _lines(self):
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding='utf-8').splitlines():
            with contextlib.suppress(ValueError):  # a half line is what a crash leaves behind
                yield json.loads(line)

    def write(self, **values):
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(values) + '\n')
