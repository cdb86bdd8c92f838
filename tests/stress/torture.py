"""Kill training and tokenizing at random moments, and check that each still ends with the same bytes.

    python tests/stress/torture.py                              # all of it
    python tests/stress/torture.py --only tokenize --kills 200 --seed 1

Works on the demo's images and a tiny model, on the CPU. Four parts, each against the run that nobody disturbed:
  train      chains of `main_seit.py --resume auto`, killed (SIGKILL, all ranks at once) until --kills is reached:
             alone, accumulating gradients, with two processes and with four
  tokenize   the same for tokenize_images.py
  restart    torchrun --max-restarts with four processes, of which one is killed
  hosts      torchrun on two hosts, of which one is cut off and dies; it comes back, and the run resumes. The hosts are
             network namespaces joined by a veth pair, or (--loopback, or without the rights) addresses of this machine
Weights, EMA, optimizer, losses and log lines (but for their time fields) must be equal, token files byte by byte. Ends
with one line of JSON, and with exit code 1 if anything differs or --seconds did not suffice.
"""
import argparse
import contextlib
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import processes
from benchmarks.common import free_port
from flags import SEED, Parser, integer, number
from processes import DEMO, Job, kill_all, torchrun, until, workers
from utils import InputError, print0, run

PARTS = 'train', 'tokenize', 'restart', 'hosts'
CHAIN = 25  # kills of one run, at most
MODEL = ['--device', 'cpu', '--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2',
         '--input-size', '48', '--warmup-epochs', '0', '--drop-path', '0.3', '--dist-eval']
# name -> (processes, flags)
TRAIN = {
    'alone': (1, ['--epochs', '2', '--batch-size', '8', '--save-every', '2']),
    'accumulating': (1, ['--epochs', '2', '--batch-size', '8', '--accum-iter', '3', '--save-every', '1']),
    'two processes': (2, ['--epochs', '2', '--batch-size', '4', '--save-every', '2', '--repeated-aug']),
    'four processes': (4, ['--epochs', '2', '--batch-size', '4', '--save-every', '3', '--clip-grad', '1']),
}
TOKENIZE = {
    'alone': (1, ['--batch-size', '2']),
    'shards': (1, ['--batch-size', '2', '--shard-size', '30', '--limit-codes']),
    'two processes': (2, ['--batch-size', '2', '--shard-size', '100']),
}
LAUNCHED = ['--epochs', '8', '--batch-size', '4', '--save-every', '5']  # long enough to be met at work


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser('Kill training and tokenizing at random moments; each must still end with the same bytes.')
    add = parser.add_argument
    add('--kills', type=integer(1), default=50, help='of training, and as many of tokenizing')
    add('--seconds', type=number(1), default=1200, help='give up after')
    add('--seed', type=SEED, default=0)
    add('--only', nargs='+', choices=PARTS, default=list(PARTS))
    add('--loopback', action='store_true', help='two addresses of this machine, even where namespaces can be made')
    add('--work-dir', metavar='DIR', help='keep all runs there (default: a temporary folder)')
    return parser.parse_args(words)


# ---------------------------------------------------------------- chains of kills

class Clock:
    """The time that is left."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self, most: float = math.inf) -> float:
        """Seconds, `most` at most; 0 when none are left."""
        return min(most, max(0., self.end - time.monotonic()))


@dataclass
class Limits:
    """How long and how randomly a part goes on.

    Attributes:
        kills: enough of them.
        clock: the time that is left.
        chance: random numbers.
    """
    kills: int
    clock: Clock
    chance: random.Random


@dataclass
class Program:
    """A program to kill.

    Attributes:
        name: main_seit or tokenize_images.
        words: (flags, folder) -> its command line.
        differs: (folder of the undisturbed run, another) -> what differs, in words.
    """
    name: str
    words: Callable[[Sequence[Any], Path], list[Any]]
    differs: Callable[[Path, Path], list[str]]

    def start(self, size: int, flags: Sequence[Any], folder: Path, output: Path) -> Job:
        """Start it on `size` processes."""
        return Job(self.name, self.words(flags, folder), size, output)

    def finish(self, size: int, flags: Sequence[Any], folder: Path, output: Path) -> float:
        """Run it undisturbed; returns the seconds it took. Raises InputError for an exit code."""
        began = time.monotonic()
        check_codes(self.start(size, flags, folder, output).wait(), output)
        return time.monotonic() - began


def check_codes(codes: Sequence[int | None], output: Path, kills: int = 0) -> None:
    """InputError unless all exit codes are 0."""
    if any(code != 0 for code in codes):
        raise InputError(f'{output}: exit codes {codes} after {kills} kills')


def kill_and_restart(start: Callable[[], Job], duration: float, limits: Limits, output: Path) -> int:
    """Start a program again and again, killing it at random moments, until it ends by itself.

    Args:
        start: starts it.
        duration: of the undisturbed run, in seconds.
        limits: of the part.
        output: what it prints to, for errors.

    Returns:
        The kills, CHAIN at most.
    """
    for kills in range(CHAIN):
        job = start()
        codes = job.wait(limits.chance.uniform(0, duration / 2))
        if None not in codes:
            check_codes(codes, output, kills)
            return kills
        job.kill()
    check_codes(start().wait(limits.clock.left()), output, CHAIN)
    return CHAIN


def chains(program: Program, runs: dict[str, tuple[int, list[str]]], folder: Path, limits: Limits) -> dict[str, Any]:
    """Chains of kills over `runs`, title -> (processes, flags), in turn until there are enough. Returns figures."""
    figures = {'kills': 0, 'chains': 0, 'longest_chain': 0, 'differing': []}
    durations = {}
    for title, (size, flags) in runs.items():
        home = folder / title.replace(' ', '-')
        output = home.with_suffix('.out')
        program.finish(size, flags, home / 'first', output)  # warms caches, and:
        durations[title] = program.finish(size, flags, home / 'whole', output)
        if program.differs(home / 'whole', home / 'first'):
            raise InputError(f'{home}: two undisturbed runs differ, so there is nothing to compare with')
    while figures['kills'] < limits.kills and limits.clock.left():
        for title, (size, flags) in runs.items():
            home = folder / title.replace(' ', '-')
            killed = home / f'killed-{figures["chains"]}'
            output = killed.with_suffix('.out')
            kills = kill_and_restart(lambda size=size, flags=flags, killed=killed, output=output:
                                     program.start(size, flags, killed, output), durations[title], limits, output)
            differing = program.differs(home / 'whole', killed)
            print0(f'{program.name}, {title}: killed {kills} times, then {verdict(differing)}')
            figures['kills'] += kills
            figures['chains'] += 1
            figures['longest_chain'] = max(figures['longest_chain'], kills)
            figures['differing'] += differing
    return figures


def verdict(differing: list[str]) -> str:
    """What a comparison came to, in words."""
    return f'DIFFERS: {differing}' if differing else 'the same'


def train_words(tokens: Path) -> Callable[[Sequence[Any], Path], list[Any]]:
    """A function of (flags, folder) that gives the command line of a training run on the token set in `tokens`."""
    files = []
    for split in ('train', 'val'):
        files += [f'--{split}-token-file', tokens / 'png-token.data.bin.gz', f'--{split}-label-file',
                  tokens / 'png-label.txt']

    def words(flags: Sequence[Any], folder: Path) -> list[Any]:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return [*MODEL, *files, '--codebook-path', DEMO / 'codebook.ckpt', '--token-synonym-dict',
                DEMO / 'synonyms.json', '--output-dir', folder, '--resume', 'auto', *flags]
    return words


# ---------------------------------------------------------------- torchrun

def restart_part(training: Program, folder: Path, limits: Limits) -> dict[str, Any]:
    """Four processes under torchrun, one of them killed: it restarts them by itself. Returns figures."""
    training.finish(4, LAUNCHED, folder / 'whole', folder / 'whole.out')
    output = folder / 'restarted'
    launcher = torchrun(['--nproc-per-node=4', '--max-restarts=3', f'--master-port={free_port()}'],
                        training.words(LAUNCHED, output), folder / 'restarted.out')
    try:
        until((output / 'checkpoint.pth').exists, 'a first checkpoint', limits.clock.left(300))
        time.sleep(limits.chance.uniform(0, 1))
        before = workers(launcher)
        rank = limits.chance.randrange(4)
        os.kill(before[rank], signal.SIGKILL)
        restarted = until(lambda: set(workers(launcher).values()) - set(before.values()), 'a restart', 60)
        until(lambda: launcher.poll() is not None, 'the end of the run', limits.clock.left(300))
        code = launcher.returncode
    finally:
        kill_all(launcher)
    differing = training.differs(folder / 'whole', output) if code == 0 else [f'exit code {code}']
    print0(f'restart: rank {rank} of 4 killed, restarted after {restarted:.1f} s, then {verdict(differing)}')
    return {'processes': 4, 'killed_rank': rank, 'seconds_to_restart': round(restarted, 1), 'differing': differing}


# ---------------------------------------------------------------- two hosts

class Namespaces:
    """Two hosts as network namespaces, joined by a cable (veth) to pull. Raises InputError without the rights."""
    name = 'network namespaces and veth'
    addresses = '10.213.77.1', '10.213.77.2'

    def __init__(self):
        mark = os.getpid() % 100000
        self.spaces = [f'seit{mark}a', f'seit{mark}b']
        self.cables = [f'v{mark}a', f'v{mark}b']
        self.ip('netns', 'add', self.spaces[0])
        self.ip('netns', 'add', self.spaces[1])
        try:
            self.ip('-n', self.spaces[0], 'link', 'add', self.cables[0], 'type', 'veth', 'peer', 'name', self.cables[1],
                    'netns', self.spaces[1])
            for space, cable, address in zip(self.spaces, self.cables, self.addresses):
                self.ip('-n', space, 'link', 'set', 'lo', 'up')
                self.ip('-n', space, 'addr', 'add', f'{address}/24', 'dev', cable)
                self.ip('-n', space, 'link', 'set', cable, 'up')
        except InputError:
            self.close()
            raise

    @staticmethod
    def ip(*words: str) -> None:
        """Run the ip program. Raises InputError where it fails."""
        try:
            done = subprocess.run(['ip', *words], capture_output=True, text=True)
        except FileNotFoundError:
            raise InputError('no ip program (iproute2) here') from None
        if done.returncode:
            raise InputError(f'ip {" ".join(words)}: {done.stderr.strip()}')

    def place(self, host: int) -> tuple[list[str], dict[str, str]]:
        """(words before a command, environment) to run it on a host."""
        return ['ip', 'netns', 'exec', self.spaces[host]], {'GLOO_SOCKET_IFNAME': self.cables[host]}

    def cut(self, launcher: subprocess.Popen) -> None:
        """Pull the cable, then let the second host die: the first hears nothing of it."""
        self.ip('-n', self.spaces[1], 'link', 'set', self.cables[1], 'down')
        kill_all(launcher)

    def mend(self) -> None:
        """Plug the cable in again."""
        self.ip('-n', self.spaces[1], 'link', 'set', self.cables[1], 'up')

    def close(self) -> None:
        """Remove the hosts."""
        for space in self.spaces:
            self.ip('netns', 'del', space)


class Loopback:
    """Two hosts as two addresses of this machine. The second is cut off by freezing its processes: it sends nothing."""
    name = 'two loopback addresses'
    addresses = '127.0.0.1', '127.0.0.2'

    def __init__(self):
        self.frozen = None

    def place(self, host: int) -> tuple[list[str], dict[str, str]]:
        """See Namespaces."""
        return [], {'GLOO_SOCKET_IFNAME': 'lo'}

    def cut(self, launcher: subprocess.Popen) -> None:
        """Freeze the second host."""
        for process in [launcher.pid, *workers(launcher).values()]:
            os.kill(process, signal.SIGSTOP)
        self.frozen = launcher

    def mend(self) -> None:
        """Kill what is frozen: the host can be started again."""
        kill_all(self.frozen)

    def close(self) -> None:
        """Nothing to remove."""


def two_hosts(loopback: bool) -> Namespaces | Loopback:
    """The best two hosts that this machine can be; addresses of it with `loopback`."""
    if not loopback:
        try:
            return Namespaces()
        except InputError as error:
            print0(f'hosts: no network namespaces ({error})')
    return Loopback()


def hosts_part(training: Program, folder: Path, limits: Limits, loopback: bool) -> dict[str, Any]:
    """Two hosts under torchrun's c10d rendezvous, one cut off in the middle of the run. Returns figures.

    Stated: the other's worker ends within --dist-timeout (0.25 minutes here) and 30 s more, and waits for a host.
    """
    flags = [*LAUNCHED, '--dist-timeout', '0.25']
    training.finish(2, flags, folder / 'whole', folder / 'whole.out')
    hosts = two_hosts(loopback)
    output = folder / 'cut'
    port = free_port()
    launchers = [None, None]

    def start(host: int) -> None:
        prefix, env = hosts.place(host)
        env['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'  # else a host that joins later is never told where rank 0 is
        launchers[host] = torchrun(
            ['--nnodes=2', '--nproc-per-node=1', '--rdzv-backend=c10d', f'--rdzv-endpoint={hosts.addresses[0]}:{port}',
             '--rdzv-id=torture', '--max-restarts=3', f'--local-addr={hosts.addresses[host]}',
             f'--rdzv-conf=is_host={1 - host}'], training.words(flags, output), folder / f'host{host}.out', prefix, env)

    print0(f'hosts: {hosts.name}')
    try:
        start(0)
        start(1)
        until((output / 'checkpoint.pth').exists, 'a first checkpoint', limits.clock.left(300))
        time.sleep(limits.chance.uniform(0, 1))
        before = set(workers(launchers[0]).values())
        hosts.cut(launchers[1])
        noticed = until(lambda: not before & set(workers(launchers[0]).values()), 'the end of the cut-off run', 45)
        hosts.mend()
        start(1)
        finished = until(lambda: None not in [launcher.poll() for launcher in launchers], 'the end of the run',
                         limits.clock.left(300))
        codes = [launcher.returncode for launcher in launchers]
    finally:
        for launcher in filter(None, launchers):
            kill_all(launcher)
        hosts.close()
    differing = [f'exit codes {codes}'] if any(codes) else training.differs(folder / 'whole', output)
    print0(f'hosts: noticed after {noticed:.1f} s, finished {finished:.1f} s after the host came back, '
           f'{verdict(differing)}')
    return {'hosts': hosts.name, 'seconds_to_notice': round(noticed, 1), 'seconds_to_finish': round(finished, 1),
            'differing': differing}


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> int:
    began = time.monotonic()
    limits = Limits(args.kills, Clock(args.seconds), random.Random(args.seed))
    tokenizing = Program('tokenize_images', processes.tokenize_words, processes.tokens_differ)
    figures = {'seed': args.seed}
    with contextlib.ExitStack() as stack:
        folder = Path(args.work_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        tokenizing.finish(1, [], folder / 'tokens', folder / 'tokens.out')
        training = Program('main_seit', train_words(folder / 'tokens'), processes.training_differs)
        for part in args.only:
            home = folder / part
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            if part == 'train':
                figures[part] = chains(training, TRAIN, home, limits)
            elif part == 'tokenize':
                figures[part] = chains(tokenizing, TOKENIZE, home, limits)
            elif part == 'restart':
                figures[part] = restart_part(training, home, limits)
            else:
                figures[part] = hosts_part(training, home, limits, args.loopback)
    figures |= {'seconds': round(time.monotonic() - began), 'cpus': os.cpu_count(), 'machine': platform.machine(),
                'python': platform.python_version(), 'torch': torch.__version__}
    print(json.dumps(figures))
    too_few = any(figures[part]['kills'] < args.kills for part in ('train', 'tokenize') if part in figures)
    return int(too_few or any(figures[part]['differing'] for part in args.only))


if __name__ == '__main__':
    run(main, parse_args)
