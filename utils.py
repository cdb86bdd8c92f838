"""What every program here needs: errors for users, entry, processes, printing, step seeds.

A program ends in `run(main, parse_args)`, which turns an InputError into one line and an exit code. With several
processes everything that only one of them may do, such as writing, goes through `on_main`, so that an error there
reaches all, and no rank waits for one that is gone.
"""
import contextlib
import ctypes
import datetime
import os
import random
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.attention import SDPBackend, sdpa_kernel

CPU = torch.device('cpu')
AMP_DTYPE = {'bf16': torch.bfloat16, 'fp16': torch.float16}
_store = None  # torch's store of the process group, once this rank has joined it: there the ranks count their errors

# ---------------------------------------------------------------- errors a user can mend


class InputError(Exception):
    """A mistake in what the user gave. The message is one line: what, which file, what to do."""
    exit_code = 2

    def __init__(self, message: str):
        # The message may quote a file, which may hold line breaks and a terminal's control characters.
        super().__init__(re.sub(r'[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+', ' ', str(message)))


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class RankError(InputError):
    """A mistake that this rank alone meets before the ranks have joined, such as a missing GPU."""


def run(main: Callable, parse_args: Callable) -> None:
    """Call `main(parse_args())` and leave the program.

    Exit codes: 0, or what `main` returns; 2 for an InputError, which becomes one line on standard error (another
    `exit_code` of its class where that is set); 130 for Ctrl-C.
    """
    keep_standard_output()
    code = 0
    try:
        code = main(parse_args()) or 0
    except InputError as error:
        report(error)
        leave(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError:
        if not dist.is_initialized() or _count_errors(0) == 0:
            raise
        leave(2)  # torch's complaint that another rank is gone, which has said why
    if dist.is_initialized():
        time.sleep(0.1)  # destroying holds the GIL, which gloo's threads (torch 2.5) need to drop their last work
        dist.destroy_process_group()
    sys.exit(code)


def leave(code: int) -> None:
    """Leave the program after a mistake. Where another rank may be gone, without what Python does at its end."""
    if dist.is_initialized() and rank() > 0:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)  # an ordinary end may abort: gloo's threads meet the connection that the other rank closed
    sys.exit(code)


def report(error: InputError) -> None:
    """Print an error once for all ranks: the first that meets one does."""
    if dist.is_initialized():
        first = _count_errors(1) == 1
    else:
        first = local_rank() == 0 or isinstance(error, RankError)
    if first:
        with contextlib.suppress(OSError, ValueError):  # standard error that is full or closed
            print(f'error: {error}', file=sys.stderr, flush=True)
    if dist.is_initialized() and rank() == 0:
        if dist.get_backend() == 'gloo':
            dist.destroy_process_group()  # ranks that wait for this one learn that it is gone ...
        time.sleep(1)  # ... while the store, which may end with this process, can still tell them why


def _count_errors(new: int) -> int:
    """How many ranks have met an InputError, with `new` more of this one."""
    try:
        return _store.add('errors', new)
    except RuntimeError:
        return new  # the rank that kept the store is gone: a line twice is better than none


def keep_standard_output() -> None:
    """Let a program run whatever its standard output and error are.

    Where there is none, what it prints is dropped; where they are not UTF-8, what they cannot hold is escaped.
    """
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_WRONLY)
            while handle < 3:  # the next files must not get the numbers to which libraries print
                handle = os.dup(handle)
            file = open(handle, 'w', encoding='utf-8', errors='backslashreplace')  # noqa: SIM115 - for all its time
            setattr(sys, name, file)
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a stream of a notebook, a closed one
            getattr(sys, name).reconfigure(errors='backslashreplace')


# ---------------------------------------------------------------- processes

def slurm_environment() -> None:
    """Translate the variables of an `srun` step into torchrun's; others are left alone."""
    env = os.environ
    # SLURM_STEP_NUM_TASKS exists only inside srun, so a plain python in a batch script stays one process.
    if 'RANK' in env or int(env.get('SLURM_STEP_NUM_TASKS', 1)) < 2:
        return
    # torch.distributed reads the names that torchrun sets
    env['RANK'] = env['SLURM_PROCID']
    env['LOCAL_RANK'] = env['SLURM_LOCALID']
    env['WORLD_SIZE'] = env['SLURM_STEP_NUM_TASKS']
    nodes = env.get('SLURM_STEP_NODELIST', env.get('SLURM_JOB_NODELIST', '127.0.0.1'))
    env.setdefault('MASTER_ADDR', first_host(nodes))
    step = int(env.get('SLURM_STEP_ID', env.get('SLURM_STEPID', 0)))  # steps of a job run side by side
    # ranks cannot ask each other for a free port, so all compute the same one, and other jobs mostly compute others
    port = int(env.get('SLURM_JOB_ID', 0)) + 1009 * step
    env.setdefault('MASTER_PORT', str(10000 + port % 50000))


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: 'n[09-12,20]-ib,m3' -> 'n09-ib'; any number of brackets."""
    name = re.match(r'(?:[^,\[]|\[[^\]]*\])+', nodes).group()  # up to the first comma outside brackets
    return re.sub(r'\[(\w+)[^\]]*\]', r'\1', name)


def init_distributed(device: str, dist_url: str = 'env://', minutes: float = 10) -> torch.device:
    """Join the process group that torchrun, torch.distributed.launch or srun describes, if any.

    Args:
        device: as the user gave it: 'auto' (CUDA where there is one), 'cuda', 'cuda:N', 'cpu', or another accelerator
            that torch has here, such as 'mps' or 'xpu:1'.
        dist_url: torch.distributed's init_method.
        minutes: how long ranks wait for one another before they take the others for lost.

    Once joined, a second call does no more than name the device: a program may run another one's `main`.

    Returns:
        The device of this rank: one GPU a local rank (NCCL), or the CPU (gloo), or another accelerator by its backend.

    Raises:
        InputError: for a device that is not there.
    """
    global _store
    slurm_environment()
    device = device_of_rank(device)
    if int(os.environ.get('WORLD_SIZE', 1)) > 1 and not dist.is_initialized():
        wait = datetime.timedelta(minutes=minutes)
        backend = _backend_of(device)
        if 'RANK' not in os.environ:
            raise InputError(f'WORLD_SIZE is {os.environ["WORLD_SIZE"]} but RANK is not set: start with torchrun or '
                             'srun, or unset WORLD_SIZE')
        try:
            store, joined_rank, size = next(rendezvous(dist_url, int(os.environ['RANK']), int(os.environ['WORLD_SIZE']),
                                                    timeout=wait))
        except (RuntimeError, ValueError) as error:
            raise InputError(f'the processes did not find each other at {dist_url} in {minutes:g} minutes '
                             f'({first_line(error)})') from None
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            # torchrun on one node keeps its store when it restarts the ranks, with the addresses of dead ranks in it
            store = dist.PrefixStore(f'restart {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
        _store = store
        on_gpu = device.type == 'cuda'
        dist.init_process_group(backend, store=store, rank=joined_rank, world_size=size,
                                timeout=wait, device_id=device if on_gpu else None)
    return device


def device_of_rank(device: str) -> torch.device:
    """The device of this local rank; with `cuda`, the current one from here on. Raises InputError."""
    kind, _, number = device.partition(':')
    accelerator = _accelerator('cuda' if kind == 'auto' else kind)
    if (kind != 'cpu' and not accelerator) or (number and not (number.isdecimal() and kind not in ('auto', 'cpu'))):
        raise InputError(f'--device {device}: choose auto, cuda, cuda:N or cpu, or another accelerator that torch has '
                         'here, such as mps')
    if kind == 'cpu' or (kind == 'auto' and not torch.cuda.is_available()):
        return torch.device('cpu')
    kind = 'cuda' if kind == 'auto' else kind
    if not accelerator.is_available():
        raise InputError(f'--device {kind}, but torch finds no {kind.upper()} device here: add --device cpu')
    count = accelerator.device_count()
    if number:
        number = int(number)
    else:
        number = local_rank()
        if number >= count and _bound_to_gpu():
            number = 0  # srun shows this task one GPU, which is number 0 whatever the local rank
    if number >= count:
        raise RankError(f'GPU {number} is asked for (by local rank or --device), but there are {count}: start fewer '
                        'processes on this node')
    if hasattr(accelerator, 'set_device'):  # mps has one device, and no such function
        accelerator.set_device(number)
    return torch.device(kind, number)


def _accelerator(kind: str) -> Any:
    """The module of torch for a kind of accelerator, such as torch.cuda; None for a word that is none."""
    if kind == 'cpu':
        return None
    try:
        module = torch.get_device_module(torch.device(kind))
    except RuntimeError:  # no device of torch, or one such as meta that computes nothing
        return None
    return module if hasattr(module, 'is_available') and hasattr(module, 'device_count') else None


def _backend_of(device: torch.device) -> str:
    """The backend of torch.distributed for a device. Raises InputError where there is none."""
    if device.type in ('cpu', 'cuda'):
        return 'gloo' if device.type == 'cpu' else 'nccl'
    backend = dist.Backend.default_device_backend_map.get(device.type, 'gloo')
    if backend == 'gloo' or not dist.is_backend_available(backend):  # gloo sums on the host
        raise InputError(f'--device {device.type}: torch.distributed has no backend for several processes on it: '
                         'start one process')
    return backend


def _bound_to_gpu() -> bool:
    """Whether srun shows each task GPUs of its own, numbered from 0."""
    env = os.environ
    if 'SLURM_GPU_BIND' in env:
        return 'none' not in env['SLURM_GPU_BIND']
    return ('SLURM_GPUS_PER_TASK' in env or 'SLURM_NTASKS_PER_GPU' in env
            or 'gpu' in env.get('SLURM_TRES_PER_TASK', ''))  # where --cpus-per-task stands too


def rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's rank on its node, 0 when alone."""
    return int(os.environ.get('LOCAL_RANK', os.environ.get('SLURM_LOCALID', 0)))


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def cores() -> int:
    """Processor cores for each process of this node."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    env = os.environ
    if 'LOCAL_WORLD_SIZE' in env:  # torchrun
        return max(1, here // int(env['LOCAL_WORLD_SIZE']))
    if 'SLURM_CPUS_PER_TASK' in env:
        return max(1, min(here, int(env['SLURM_CPUS_PER_TASK'])))
    if 'SLURM_STEP_NUM_TASKS' in env and here >= int(env.get('SLURM_CPUS_ON_NODE', here + 1)):
        return max(1, here // _tasks_of_node())  # srun has not bound this task to cores of its own
    return max(1, here)


def _tasks_of_node() -> int:
    """How many tasks of this srun step run on this node, from a list such as '8(x2),4': of each node in turn."""
    tasks = []
    for item in os.environ.get('SLURM_STEP_TASKS_PER_NODE', '1').split(','):
        count, times = re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', item.strip()).groups()
        tasks += [int(count)] * int(times or 1)
    return tasks[min(int(os.environ.get('SLURM_NODEID', 0)), len(tasks) - 1)]


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def one_first(first: bool) -> Iterator[None]:
    """Run the body on the ranks where `first` is true, then on the others, for which its files are there by then."""
    if not first:
        barrier()
    yield
    if first:
        barrier()


def on_main(function: Callable, *args: Any) -> Any:
    """`function(*args)` of rank 0, on every rank; its InputError is raised on every rank too. Collective."""
    answer = [None, None]  # value, error: other ranks must learn of an error too, or they would wait for the value
    if is_main():
        try:
            answer = [function(*args), None]
        except InputError as error:
            answer = [None, error]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def gather(values: list[Any], distributed: bool) -> list[Any] | None:
    """All ranks' lists in one on rank 0, None on others; without `distributed` the list of this rank. Collective."""
    if not distributed or world_size() == 1:
        return values
    gathered = [None] * world_size() if is_main() else None
    dist.gather_object(values, gathered)
    return [value for part in gathered for value in part] if is_main() else None


def shown(value: Any) -> str:
    """A value for messages: a SHA-256 is cut."""
    return f'{value[:12]}...' if isinstance(value, str) and re.fullmatch('[0-9a-f]{64}', value) else str(value)


def check_same_on_all_ranks(facts: dict[str, Any]) -> None:
    """InputError on every rank unless all ranks have the same facts (plain values by name). Collective."""
    if world_size() == 1:
        return
    facts_of = [None] * world_size()
    dist.all_gather_object(facts_of, facts)
    for other, other_facts in enumerate(facts_of):
        for name in facts_of[0] | other_facts:
            first, value = facts_of[0].get(name), other_facts.get(name)
            if first != value:
                raise InputError(f'the ranks are not of one run: {name} is {shown(first)} on rank 0 and {shown(value)} '
                                 f'on rank {other}: start all with the same flags, on folders that all nodes share')


def union_over_ranks(name: str, numbers: set[int]) -> set[int] | None:
    """All ranks' numbers together, on the rank that asks last; None on the others. Nobody waits.

    Args:
        name: of the question, the same on all ranks, and asked once by each.
        numbers: of this rank, 0 or more.
    """
    if world_size() == 1:
        return numbers
    if _store is None:
        return None
    bits = np.zeros(max(numbers, default=-1) + 1, bool)
    bits[list(numbers)] = True
    _store.set(f'{name} {rank()}', zlib.compress(np.packbits(bits).tobytes()))
    if _store.add(name, 1) < world_size():
        return None
    rows = (zlib.decompress(_store.get(f'{name} {other}')) for other in range(world_size()))
    return set().union(*(np.unpackbits(np.frombuffer(row, np.uint8)).nonzero()[0].tolist() for row in rows))


# ---------------------------------------------------------------- memory

def keep_freed_memory(device: torch.device) -> None:
    """Let glibc's malloc keep what is freed, where a CPU computes.

    Otherwise each large tensor is given back to the kernel and fetched again, page by page: half the time of
    augmentation on a CPU.
    """
    if device.type != 'cpu':
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library: all works, only slower
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold = -1  # of malloc.h
        mmap_threshold = -3
        if not mallopt(mmap_threshold, 1 << 30):
            mallopt(mmap_threshold, 1 << 25)  # older versions take no more
        mallopt(trim_threshold, (1 << 31) - 1)


# ---------------------------------------------------------------- printing

def print0(*values: Any) -> None:
    """Print on rank 0, by `print_line`."""
    if is_main():
        print_line(*values)


def print_line(*values: Any) -> None:
    """Print on this rank. A standard output that is closed, or full, does not stop the program."""
    text = ' '.join(map(str, values))
    try:
        encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
        print(text.encode(encoding, 'backslashreplace').decode(encoding), flush=True)  # names of files may be any bytes
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, 'wb') as null:
            os.dup2(null.fileno(), sys.stdout.fileno())


# ---------------------------------------------------------------- seeds

def seed_step(seed: int, epoch: int, step: int, rank: int, generator: torch.Generator) -> None:
    """Make the randomness of one step a pure function of (seed, epoch, step, rank).

    Seeds numpy's global generator (timm's Mixup), torch's (drop-path, dropout), `generator` (the token augmentations)
    and Python's (timm's random erasing). So a resumed run repeats the step exactly, and no random state is saved.
    """
    # a hash, so that neighboring steps and ranks get unrelated seeds
    seeds = np.random.SeedSequence((seed, epoch, step, rank)).generate_state(4)
    np.random.seed(seeds[0])
    torch.manual_seed(int(seeds[1]))
    generator.manual_seed(int(seeds[2]))
    random.seed(int(seeds[3]))


# ---------------------------------------------------------------- devices

def device_of_sums(device: torch.device) -> torch.device:
    """Where float64 is computed for a device: there for CPU and CUDA; on the CPU for others, of which mps has none."""
    return device if device.type in ('cpu', 'cuda') else CPU


def uniform_float64(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Uniform float64 numbers in [0, 1), on `device_of_sums` of the generator's device."""
    device = generator.device
    if device_of_sums(device) == device:
        return torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
    return torch.rand(shape, generator=generator, device=device).to(device_of_sums(device)).double()


def sum_over_ranks(sums: torch.Tensor) -> None:
    """Add up over ranks, in place, a tensor on `device_of_sums`. Collective."""
    if not dist.is_initialized():
        return
    if sums.device == CPU and dist.get_backend() != 'gloo':  # an accelerator's backend takes no tensor of the host
        rows = [None] * world_size()
        dist.all_gather_object(rows, sums)
        sums.copy_(torch.stack(rows).sum(0))
    else:
        dist.all_reduce(sums)


@contextlib.contextmanager
def autocast(device: torch.device, amp: str) -> Iterator[None]:
    """Automatic mixed precision: `amp` is 'bf16', 'fp16' or 'off'."""
    if amp == 'off':
        yield
    else:
        with torch.autocast(device.type, AMP_DTYPE[amp]), plain_attention(device, amp):
            yield


@contextlib.contextmanager
def plain_attention(device: torch.device, amp: str) -> Iterator[None]:
    """In half precision on the CPU, attention as products and a softmax, in the precision of its inputs.

    torch's fused attention is slower there than these: a third of a small ViT's step. A backward pass belongs here too,
    as checkpointed blocks compute attention again in it.
    """
    if device.type != 'cpu' or amp == 'off':
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # which the CPU asks, too
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(model.parameters()).device
