"""Programs on several processes that start at once and can be killed, torchrun, and what two runs must have alike.

The tests and tests/stress/torture.py use these.
"""
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import utils
from benchmarks.common import free_port

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / 'demo'


# ---------------------------------------------------------------- processes that start at once

def context() -> multiprocessing.context.ForkServerContext:
    """Forks of a server that has imported the programs once: an attempt starts in 0.1 s instead of five."""
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['main_seit', 'main_pixels', 'tokenize_images', 'processes', 'small_training',
                                   'scripts.train_tokenizer', 'scripts.fit_token_adapt'])
    folders = [str(ROOT), str(ROOT / 'tests')]
    variables = {'PYTHONPATH': os.pathsep.join(folders), 'OMP_NUM_THREADS': '1',
                 'PYTHONWARNINGS': 'ignore:resource_tracker'}  # of locks that killed processes had
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    multiprocessing.forkserver.ensure_running()  # it keeps these variables
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return server


def program(name: str, words: list[str], env: dict[str, str], output: str) -> None:
    """In the child: run a program of this project on a command line, its output appended to a file."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    module = importlib.import_module(name)
    utils.run(module.main, functools.partial(module.parse_args, words))


class Job:
    """A program on some processes of this machine, started as torchrun would.

    Args:
        name: of its module, as in main_seit or scripts.train_tokenizer.
        words: of its command line.
        size: how many processes.
        output: the file they print to.
        more: further words of each rank.
    """

    def __init__(self, name: str, words: Sequence[Any], size: int = 1, output: str | Path = os.devnull,
                 more: Sequence[Sequence[Any]] | None = None):
        launch = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': str(size)}
        self.ranks = []
        for rank in range(size):
            line = [str(word) for word in (*words, *(more[rank] if more else ()))]
            env = {**launch, 'RANK': str(rank), 'LOCAL_RANK': str(rank)} if size > 1 else {}
            self.ranks.append(context().Process(target=program, daemon=True, args=(name, line, env, str(output))))
            self.ranks[-1].start()

    def wait(self, seconds: float = 300) -> list[int | None]:
        """Exit codes of all ranks, negative for a signal; None for one that still runs after so long."""
        end = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(0, end - time.monotonic()))
        return [rank.exitcode for rank in self.ranks]

    def kill(self) -> None:
        """SIGKILL all ranks."""
        for rank in self.ranks:
            rank.kill()
        self.wait()

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one rank."""
        os.kill(self.ranks[rank].pid, number)


# ---------------------------------------------------------------- torchrun

def torchrun(flags: Sequence[str], words: Sequence[Any], output: str | Path, prefix: Sequence[str] = (),
             env: dict[str, str] | None = None) -> subprocess.Popen:
    """Start main_seit.py by torchrun, in a session of its own.

    Args:
        flags: torchrun's.
        words: main_seit.py's.
        output: the file to which all print.
        prefix: what stands before the command, such as ip netns exec.
        env: more environment variables.
    """
    command = [*prefix, sys.executable, '-m', 'torch.distributed.run', *flags, ROOT / 'main_seit.py', *words]
    with open(output, 'a') as log:
        return subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, start_new_session=True,
                                env={**os.environ, **(env or {}), 'OMP_NUM_THREADS': '1'})


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """{rank: process id} of the processes that a torchrun (perhaps inside `ip netns exec`) has started."""
    processes = {}
    for folder in Path('/proc').glob('[0-9]*'):
        process = int(folder.name)
        with contextlib.suppress(OSError):
            if os.getsid(process) != launcher.pid and not descends(process, launcher.pid):
                continue
            variables = (folder / 'environ').read_bytes().split(b'\0')
            env = dict(variable.split(b'=', 1) for variable in variables if b'=' in variable)
            if b'RANK' in env and b'LOCAL_RANK' in env:
                processes[int(env[b'RANK'])] = process
    return processes


def descends(process: int, ancestor: int) -> bool:
    """Whether a process was started by another, directly or not."""
    while process > 1 and process != ancestor:
        process = int(Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[1])
    return process == ancestor


def kill_all(launcher: subprocess.Popen) -> None:
    """SIGKILL a torchrun and its workers, all at once."""
    for process in [launcher.pid, *workers(launcher).values()]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    launcher.wait()


def until(ready: Callable[[], Any], what: str, seconds: float = 300) -> float:
    """Wait for `ready()`; returns the seconds it took. Raises InputError after `seconds`."""
    began = time.monotonic()
    while not ready():
        if time.monotonic() - began > seconds:
            raise utils.InputError(f'{what}: not within {seconds:.0f} s')
        time.sleep(0.05)
    return time.monotonic() - began


# ---------------------------------------------------------------- command lines on the demo's images

def tokenize_words(flags: Sequence[Any], folder: Path) -> list[Any]:
    """A command line of tokenize_images.py: the demo's validation images into `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return ['--data-path', DEMO / 'images' / 'val', '--name', 'png', '--output-dir', folder, '--image-size', 64,
            '--tokenizer-path', DEMO / 'tokenizer.pt', '--codebook-path', DEMO / 'codebook.ckpt', '--num-workers', 0,
            '--device', 'cpu', *flags]


# ---------------------------------------------------------------- what must be equal

def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints' values are equal bit by bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    return type(a) is type(b) and a == b


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """log.txt without the fields that hold times."""
    lines = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    return [{key: value for key, value in line.items() if 'time' not in key} for line in lines]


CHECKPOINTS = 'checkpoint.pth', 'best_checkpoint.pth', 'best_ema_checkpoint.pth'


def training_differs(whole: Path, other: Path, checkpoints: Sequence[str] = CHECKPOINTS,
                     outputs: Sequence[str] = ()) -> list[str]:
    """What differs between the folders of two training runs, in words; temporary files of the other count.

    Args:
        whole, other: the folders.
        checkpoints: that both have.
        outputs: files whose bytes must be equal.
    """
    differing = [] if log_lines(whole) == log_lines(other) else ['log.txt']
    differing += [name for name in outputs if (whole / name).read_bytes() != (other / name).read_bytes()]
    for name in checkpoints:
        a, b = (torch.load(folder / name, weights_only=True) for folder in (whole, other))
        for entry in (entry for saved in (a, b) for entry in (saved.get('made_with') or {}).values()):
            if isinstance(entry, dict):
                entry.pop('path')  # which starts from the folder of the run
        differing += [f'{name}: {key}' for key in a.keys() | b.keys()
                      if key != 'args' and not (key in a and key in b and same(a[key], b[key]))]
    return differing + leftovers(other)


def without_path(path: Path) -> bytes:
    """The bytes of a file; of a manifest without the path of the tokenizer, which starts from its folder."""
    data = path.read_bytes()
    return re.sub(rb', "path": "[^"]*"', b'', data, count=1) if path.suffix == '.json' else data


def tokens_differ(whole: Path, other: Path) -> list[str]:
    """Names of the files that differ between two folders."""
    a, b = ({path.name: without_path(path) for path in folder.rglob('*') if path.is_file()}
            for folder in (whole, other))
    return [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]


def leftovers(folder: Path) -> list[str]:
    """Temporary files in a folder."""
    return [path.name for path in folder.rglob('*') if path.suffix in ('.tmp', '.new')]
