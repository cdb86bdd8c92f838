"""What every program here shares: errors for users, processes, files, seeds."""
import argparse
import contextlib
import ctypes
import datetime
import glob
import hashlib
import http.client
import json
import os
import pickle
import pickletools
import re
import socket
import sys
import tempfile
import time
import urllib.parse
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

MAX_JSON_BYTES = 1 << 24  # cards are of kilobytes, synonyms of 65,536 codes of 3 MB, a log of 10,000 epochs of 5 MB
MAX_TENSOR_SHARE = 4  # bytes of tensors to a byte of their file: those that share memory are stored once
MAX_WORD = 1 << 14  # characters of a string in a torch file
GROWING = {'hex', 'hexcodec', 'base64', 'base64codec', 'uu', 'uucodec', 'quopri', 'quopricodec', 'quotedprintable'}
SMALL = 1 << 20  # bytes that are allowed whatever a file's size


# ---------------------------------------------------------------- errors a user can mend

class InputError(Exception):
    """A mistake in what the user gave. The message is one line: what, which file, what to do."""

    def __init__(self, message):
        # It may quote a file, which may hold line breaks and a terminal's control characters.
        super().__init__(re.sub(r'[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+', ' ', str(message)))


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
            time.sleep(0.1)  # destroying holds the GIL, which gloo's threads (torch 2.5) need to drop their last work
            dist.destroy_process_group()


def parse_flags(parser, words=None):
    """parse_args, with `_` and `-` in flags alike: the published commands mix them."""
    words = sys.argv[1:] if words is None else words
    spelled = [word.partition('=') for word in words]
    return parser.parse_args([(flag.replace('_', '-') if flag.startswith('--') else flag) + equals + value
                              for flag, equals, value in spelled])


def check_least(args, **least):
    """InputError for a flag below what `least` allows; None passes."""
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise InputError(f'--{name.replace("_", "-")} {value}: must be {bound} or more')


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


def init_distributed(device, dist_url='env://', minutes=10):
    """Join the process group that torchrun, torch.distributed.launch or srun describes, if any.

    Args:
        device: 'cuda', 'cuda:N' or 'cpu', as the user gave it.
        dist_url: torch.distributed's init_method.
        minutes: how long ranks wait for one another before they take the others for lost.
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
            raise RankError(f'GPU {number} is asked for (by local rank or --device), but there are '
                            f'{torch.cuda.device_count()}: start fewer processes on this node')
        torch.cuda.set_device(number)
        kind = f'cuda:{number}'
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        wait = datetime.timedelta(minutes=minutes)
        store, rank_, size = next(rendezvous(dist_url, int(os.environ['RANK']), int(os.environ['WORLD_SIZE']),
                                             timeout=wait))
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            # torchrun on one node keeps its store when it restarts the ranks: the addresses of the dead are still there
            store = dist.PrefixStore(f'restart {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
        dist.init_process_group('nccl' if kind.startswith('cuda') else 'gloo', store=store, rank=rank_,
                                world_size=size, timeout=wait,
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


def cores():
    """Processor cores for each process of this node."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, here // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


def free_port():
    """A TCP port that is free on this machine now."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


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


def say_no_effect(args, reasons):
    """Name, once, the flags of `reasons` (flag -> why it changes nothing) that were given."""
    for flag, why in reasons.items():
        if getattr(args, flag[2:].replace('-', '_')):
            say(f'note: {flag} has no effect: {why}')


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
def atomic_path(path, advice='choose another folder'):
    """Yield a temporary path beside `path`; on success flush it to disk and rename it, else remove it.

    The reader of `path` sees the old file or the whole new one, never a part.
    Raises InputError, with the `advice`, when the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
        os.close(handle)
    except OSError as error:
        raise InputError(f'{path}: cannot be written ({error.strerror}); {advice}') from None
    try:
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private; ours are like any other
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise InputError(f'{path}: cannot be written ({error.strerror})') from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _flush_folder(folder):
    """Bring the names in a folder to disk, where the system allows that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path, text):
    """Write a whole text file atomically."""
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding='utf-8')


def read_bytes(path, limit):
    """The content of a file. Raises InputError when it cannot be read or has more than `limit` bytes."""
    try:
        with open(path, 'rb') as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    if len(data) > limit:
        raise InputError(f'{path}: more than {limit:,} bytes, which no file of its kind has')
    return data


def parse_json(data):
    """The value of UTF-8 bytes of JSON. Raises ValueError, for what is nested too deep as well."""
    try:
        return json.loads(data.decode('utf-8'))
    except RecursionError:
        raise ValueError('nested too deep') from None


def read_json(path):
    """The JSON value in `path`; InputError when it is missing, not JSON, or longer than MAX_JSON_BYTES."""
    data = read_bytes(path, MAX_JSON_BYTES)
    try:
        return parse_json(data)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f'{path}: not JSON ({error})') from None


def is_address(path):
    return str(path).startswith(('https://', 'http://'))


def download(url, folder):
    """Fetch `url` into `folder`; returns the path. Raises InputError. (torch.hub's cache goes by file name alone.)

    An address may end in '#sha256=' and 64 hexadecimal digits: a file with another SHA-256 is refused.
    """
    address, _, fragment = url.partition('#')
    stated = re.fullmatch(r'sha256=([0-9a-f]{64})', fragment)
    if fragment and not stated:
        raise InputError(f'{url}: after # may stand sha256= and 64 hexadecimal digits, and nothing else')
    path = os.path.join(folder, Path(urllib.parse.urlparse(address).path).name or 'file')
    try:
        torch.hub.download_url_to_file(address, path, progress=is_main() and sys.stderr.isatty())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f'{url}: cannot be fetched ({error})') from None
    if stated and sha256(path) != stated.group(1):
        raise InputError(f'{url}: what was fetched has SHA-256 {sha256(path)}: fetch it again, or mistrust it')
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


def check_zip(file, size):
    """RuntimeError unless the members of an open torch file of `size` bytes have their checksums (torch does not look)
    and are not compressed."""
    if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
        raise RuntimeError('it is compressed, which no torch file is')
    if sum(member.file_size for member in file.infolist()) > size:
        raise RuntimeError('its members claim more bytes than it has')
    bad = file.testzip()
    if bad:
        raise RuntimeError(f'{bad} has another checksum than was written')


def check_pickle(file):
    """RuntimeError for a pickle in which a few bytes become any number of them, or any number of seconds.

    Torch runs no code from it, but allows bytearray(n) and chains of encodings, and takes hours to refuse long names.
    """
    names, words = set(), set()
    for operation, word, _ in pickletools.genops(file):
        if isinstance(word, str):
            (names if operation.name == 'GLOBAL' else words).add(word)
    if any(len(name) > 1000 for name in names) or any(len(word) > MAX_WORD for word in words):
        raise RuntimeError('it holds a name too long')
    if any(name.endswith(' bytearray') for name in names):
        raise RuntimeError('it calls bytearray, which no tensor needs')
    if '_codecs encode' in names and GROWING & {re.sub('[^a-z0-9]', '', word.lower()) for word in words}:
        raise RuntimeError('it calls encode, to make bytes longer')


def check_torch(path):
    """Exceptions of any kind where a torch file should not be given to torch."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            check_zip(file, os.path.getsize(path))
            for member in file.infolist():
                if member.filename.lower().endswith('data.pkl'):
                    check_pickle(file.read(member))
    else:
        with open(path, 'rb') as file:
            for _ in range(5):  # before torch 1.6: magic number, protocol, system, the object, keys of its storages
                if file.peek(1):
                    check_pickle(file)


def check_tensors(value, limit):
    """RuntimeError unless the tensors in nested containers are plain, and take `limit` bytes at most together.

    A tensor of a few bytes can claim any shape, with strides of 0.
    """
    todo, seen = [value], {}
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node  # kept, so that no other object gets its id
        if isinstance(node, torch.Tensor):
            if node.layout is not torch.strided or node.is_quantized or node.is_nested or node.device.type != 'cpu':
                raise RuntimeError('it holds a tensor that is not a plain one')
            limit -= node.numel() * node.element_size()
            if limit < 0:
                raise RuntimeError('its tensors claim more numbers than it has')
        elif isinstance(node, (dict, list, tuple, set)):
            todo += node.values() if isinstance(node, dict) else node
        elif hasattr(node, '__dict__'):
            todo.append(vars(node))


def load_torch(path, what):
    """torch.load on the CPU without running code from the file (`weights_only=True`).

    argparse.Namespace is allowed, because the published checkpoints hold one. `path` may be an http(s) address, see
    `download`. Raises InputError naming `what` the file should be.
    """
    path = str(path)
    if is_address(path):
        with tempfile.TemporaryDirectory() as folder:
            return load_torch(download(path, folder), what)
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            check_torch(path)
            value = torch.load(path, map_location='cpu', weights_only=True)
            check_tensors(value, MAX_TENSOR_SHARE * os.path.getsize(path) + SMALL)
            return value
        except pickle.UnpicklingError as error:
            name = re.search(r'GLOBAL (\S+)', str(error))
            why = f'it carries {name.group(1)}, which would run code when loaded' if name else 'it is no torch file'
            raise InputError(f'{path}: refused as {what}: {why}') from None
        except OSError as error:
            raise InputError(f'{path}: cannot read {what} ({error.strerror or error})') from None
        except Exception as error:  # damage makes the unpickler raise nearly anything
            why = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise InputError(f'{path}: damaged or not {what} ({why})') from None


def save_torch(value, path):
    """torch.save, atomically; equal values give equal files. Raises InputError (a full disk, say)."""
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        try:
            torch.save(value, file)  # given a path, torch would put the temporary name into the file
        except RuntimeError as error:  # how torch's writer passes on an OSError
            raise InputError(f'{path}: cannot be written ({str(error).splitlines()[0][:120]})') from None


# ---------------------------------------------------------------- the run's log

class RunLog:
    """`log.txt`: one JSON line an epoch. Lines of epochs that are to run (again) are dropped on opening."""

    def __init__(self, path, start_epoch=0):
        self.path = Path(path)
        kept = [line for line in self._lines() if isinstance(line, dict) and type(line.get('epoch', -1)) is int
                and line.get('epoch', -1) < start_epoch] if start_epoch else []
        write_text(self.path, ''.join(json.dumps(line) + '\n' for line in kept))

    def _lines(self):
        if not self.path.exists():
            return
        for line in read_bytes(self.path, MAX_JSON_BYTES).split(b'\n'):
            with contextlib.suppress(ValueError):  # a half line is what a crash leaves behind
                yield parse_json(line)

    def write(self, **values):
        """Append a line, on disk when this returns. Raises InputError."""
        try:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(values) + '\n')
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f'{self.path}: cannot be written ({error.strerror})') from None
