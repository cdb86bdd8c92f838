"""Kill training and tokenising at random moments, and check that each still ends with the same bytes.

    python scripts/torture.py                              # all of it
    python scripts/torture.py --only tokenise --kills 200 --seed 1

Works on the demo's images and a tiny model, on the CPU. Four parts, each against the run that nobody disturbed:
  train      chains of `main_seit.py --resume auto`, killed (SIGKILL, all ranks at once) until --kills is reached:
             alone, accumulating gradients, with two processes and with four
  tokenise   the same for scripts/tokenize_images.py
  restart    torchrun --max-restarts with four processes, of which one is killed
  hosts      torchrun on two hosts, of which one is cut off and dies; it comes back, and the run goes on. The hosts are
             network namespaces joined by a veth pair, or (--loopback, or without the rights) addresses of this machine
Weights, EMA, optimiser, losses and log lines (but for their time fields) must be equal, token files byte by byte. Ends
with one line of JSON, and with exit code 1 if anything differs or --seconds did not suffice.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'scripts')]
import utils  # noqa: E402
from utils import InputError, free_port, say  # noqa: E402

DEMO = ROOT / 'demo'
PARTS = 'train', 'tokenise', 'restart', 'hosts'
CHAIN = 25  # kills of one run, at most
MODEL = ['--device', 'cpu', '--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2',
         '--input-size', '56', '--warmup-epochs', '0', '--drop-path', '0.3', '--dist-eval']
# name -> (processes, flags)
RUNS = {
    'alone': (1, ['--epochs', '2', '--batch-size', '8', '--save-every', '2']),
    'accumulating': (1, ['--epochs', '2', '--batch-size', '8', '--accum-iter', '3', '--save-every', '1']),
    'two processes': (2, ['--epochs', '2', '--batch-size', '4', '--save-every', '2', '--repeated-aug']),
    'four processes': (4, ['--epochs', '2', '--batch-size', '4', '--save-every', '3', '--clip-grad', '1']),
}
LAUNCHED = ['--epochs', '8', '--batch-size', '4', '--save-every', '5']  # long enough to be met at work


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--kills', type=int, default=50, help='of training, and as many of tokenising')
    add('--seconds', type=float, default=1200, help='give up after')
    add('--seed', type=int, default=0)
    add('--only', nargs='+', choices=PARTS, default=list(PARTS))
    add('--loopback', action='store_true', help='two addresses of this machine, even where namespaces can be made')
    add('--work-dir', metavar='DIR', help='keep all runs there (default: a temporary folder)')
    return parser


# ---------------------------------------------------------------- processes that start at once

def context():
    """Forks of a server that has imported the programs once: an attempt starts in 0.1 s instead of five."""
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['main_seit', 'tokenize_images', 'torture'])
    before = {name: os.environ.get(name) for name in ('PYTHONPATH', 'OMP_NUM_THREADS', 'PYTHONWARNINGS')}
    os.environ.update(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / 'scripts')]), OMP_NUM_THREADS='1',
                      PYTHONWARNINGS='ignore:resource_tracker')  # of locks that killed processes had
    multiprocessing.forkserver.ensure_running()  # it keeps these variables
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return server


def program(name, words, env, output):
    """In the child: run main_seit or tokenize_images on a command line, its output appended to a file."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    module = __import__(name)
    parse = getattr(module, 'parse_args', None) or module.get_args_parser().parse_args
    utils.run(lambda: module.main(parse(words)))


class Job:
    """A program on `size` processes of this machine, started as torchrun would. `output`: the file they print to."""

    def __init__(self, name, words, size=1, output=os.devnull):
        env = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': str(size)}
        self.ranks = []
        for rank in range(size):
            own = {**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
            self.ranks.append(context().Process(target=program, daemon=True, args=(
                name, [str(word) for word in words], own if size > 1 else {}, str(output))))
            self.ranks[-1].start()

    def wait(self, seconds=300):
        """Exit codes of all ranks, negative for a signal; None for one that still runs after so long."""
        end = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(0, end - time.monotonic()))
        return [rank.exitcode for rank in self.ranks]

    def kill(self):
        for rank in self.ranks:
            rank.kill()
        self.wait()

    def signal(self, number, rank=0):
        os.kill(self.ranks[rank].pid, number)


# ---------------------------------------------------------------- what must be equal

def same(a, b):
    """Whether two checkpoints' values are equal bit by bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    return type(a) is type(b) and a == b


def log_lines(folder):
    """log.txt without the fields that hold times."""
    lines = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    return [{key: value for key, value in line.items() if 'time' not in key} for line in lines]


def training_differs(whole, other):
    """What differs between the folders of two training runs, as words."""
    found = [] if log_lines(whole) == log_lines(other) else ['log.txt']
    for name in 'checkpoint.pth', 'best_checkpoint.pth', 'best_ema_checkpoint.pth':
        a, b = (torch.load(folder / name, weights_only=True) for folder in (whole, other))
        found += [f'{name}: {key}' for key in a.keys() | b.keys()
                  if key != 'args' and not (key in a and key in b and same(a[key], b[key]))]
    return found + leftovers(other)


def tokens_differ(whole, other):
    """Names of the files that differ between two folders."""
    a, b = ({path.name: path.read_bytes() for path in folder.rglob('*') if path.is_file()} for folder in (whole, other))
    return [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]


def leftovers(folder):
    """Temporary files in a folder."""
    return [path.name for path in folder.rglob('*') if path.suffix in ('.tmp', '.new')]


# ---------------------------------------------------------------- chains of kills

class Clock:
    """The time that is left."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    def left(self):
        return max(0., self.end - time.monotonic())


def chain(name, words, size, duration, kills, chance, clock, output):
    """Start a program again and again, killing it at random moments, until it ends by itself. Returns the kills.

    Args: duration: of the undisturbed run, in seconds; kills: at most so many.
    """
    for done in range(kills):
        job = Job(name, words, size, output)
        codes = job.wait(chance.uniform(0, duration / 2))
        if None not in codes:
            break
        job.kill()
    else:
        done = kills
        codes = Job(name, words, size, output).wait(clock.left())
    if any(code != 0 for code in codes):
        raise InputError(f'{output}: exit codes {codes} after {done} kills')
    return done


def timed(name, words, size, output):
    """Run undisturbed; returns the seconds it took."""
    began = time.monotonic()
    codes = Job(name, words, size, output).wait()
    if any(code != 0 for code in codes):
        raise InputError(f'{output}: exit codes {codes}')
    return time.monotonic() - began


def chains(name, runs, words, differs, folder, args, chance, clock):
    """Chains of kills over `runs` (title -> (processes, flags)) in turn until args.kills of them. Returns figures.

    Args: words(flags, folder): a command line; differs(whole, other): as `training_differs`.
    """
    found = {'kills': 0, 'chains': 0, 'longest_chain': 0, 'differing': []}
    durations = {}
    for title, (size, flags) in runs.items():
        place = folder / title.replace(' ', '-')
        timed(name, words(flags, place / 'first'), size, place.with_suffix('.out'))  # warms caches, and:
        durations[title] = timed(name, words(flags, place / 'whole'), size, place.with_suffix('.out'))
        if differs(place / 'whole', place / 'first'):
            raise InputError(f'{place}: two undisturbed runs differ, so there is nothing to compare with')
    while found['kills'] < args.kills and clock.left():
        for title, (size, flags) in runs.items():
            place = folder / title.replace(' ', '-')
            own = place / f'killed-{found["chains"]}'
            kills = chain(name, words(flags, own), size, durations[title], CHAIN, chance, clock,
                          own.with_suffix('.out'))
            what = differs(place / 'whole', own)
            say(f'{name}, {title}: killed {kills} times, then ' + (f'DIFFERS: {what}' if what else 'the same'))
            found['kills'] += kills
            found['chains'] += 1
            found['longest_chain'] = max(found['longest_chain'], kills)
            found['differing'] += what
    return found


def tokenise_words(flags, folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    return ['--data-path', DEMO / 'images' / 'val', '--name', 'png', '--output-dir', folder, '--image-size', 64,
            '--tokenizer-path', DEMO / 'tokenizer.pt', '--codebook-path', DEMO / 'codebook.ckpt', '--num-workers', 0,
            '--device', 'cpu', *flags]


def tokenise_part(folder, args, chance, clock):
    small = ['--batch-size', '2']
    runs = {'alone': (1, small), 'shards': (1, [*small, '--shard-size', '30', '--limit-codes']),
            'two processes': (2, [*small, '--shard-size', '100'])}
    return chains('tokenize_images', runs, tokenise_words, tokens_differ, folder, args, chance, clock)


def train_words(tokens):
    """A function of (flags, folder) that gives the command line of a training run."""
    def words(flags, folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        files = [[f'--{split}-token-file', tokens / 'png-token.data.bin.gz', f'--{split}-label-file',
                  tokens / 'png-label.txt'] for split in ('train', 'val')]
        return [*MODEL, *sum(files, []), '--codebook-path', DEMO / 'codebook.ckpt', '--token-synonym-dict',
                DEMO / 'synonyms.json', '--output-dir', folder, '--resume', 'auto', *flags]
    return words


# ---------------------------------------------------------------- torchrun

def torchrun(flags, words, output, prefix=(), env=None):
    """Start torchrun in a session of its own."""
    command = [*prefix, sys.executable, '-m', 'torch.distributed.run', *flags, ROOT / 'main_seit.py', *words]
    with open(output, 'a') as log:
        return subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, start_new_session=True,
                                env={**os.environ, **(env or {}), 'OMP_NUM_THREADS': '1'})


def workers(launcher):
    """{rank: process id} of the processes that a torchrun (perhaps inside `ip netns exec`) has started."""
    found = {}
    for place in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if os.getsid(int(place.name)) != launcher.pid and not descends(int(place.name), launcher.pid):
                continue
            env = dict(word.split(b'=', 1) for word in (place / 'environ').read_bytes().split(b'\0') if b'=' in word)
            if b'RANK' in env and b'LOCAL_RANK' in env:
                found[int(env[b'RANK'])] = int(place.name)
    return found


def descends(process, ancestor):
    """Whether a process was started by another, directly or not."""
    while process > 1 and process != ancestor:
        process = int(Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[1])
    return process == ancestor


def kill_all(launcher):
    """SIGKILL a torchrun and its workers, all at once."""
    for process in [launcher.pid, *workers(launcher).values()]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    launcher.wait()


def until(ready, what, clock, seconds=300):
    """Wait for `ready()`; returns the seconds it took. Raises InputError after `seconds`."""
    began = time.monotonic()
    while not ready():
        if time.monotonic() - began > min(seconds, clock.left()):
            raise InputError(f'{what}: not within {time.monotonic() - began:.0f} s')
        time.sleep(0.05)
    return time.monotonic() - began


def restart_part(folder, words, chance, clock):
    """Four processes under torchrun, one of them killed: it restarts them by itself. Returns figures."""
    timed('main_seit', words(LAUNCHED, folder / 'whole'), 4, folder / 'whole.out')
    out = folder / 'restarted'
    launcher = torchrun(['--nproc-per-node=4', '--max-restarts=3', f'--master-port={free_port()}'],
                        words(LAUNCHED, out), folder / 'restarted.out')
    try:
        until((out / 'checkpoint.pth').exists, 'a first checkpoint', clock)
        time.sleep(chance.uniform(0, 1))
        before = workers(launcher)
        rank = chance.randrange(4)
        os.kill(before[rank], signal.SIGKILL)
        restarted = until(lambda: set(workers(launcher).values()) - set(before.values()), 'a restart', clock, 60)
        until(lambda: launcher.poll() is not None, 'the end of the run', clock)
        code = launcher.returncode
    finally:
        kill_all(launcher)
    differing = training_differs(folder / 'whole', out) if code == 0 else [f'exit code {code}']
    say(f'restart: rank {rank} of 4 killed, restarted after {restarted:.1f} s, then '
        + (f'DIFFERS: {differing}' if differing else 'the same'))
    return {'processes': 4, 'killed_rank': rank, 'seconds_to_restart': round(restarted, 1), 'differing': differing}


# ---------------------------------------------------------------- two hosts

class Namespaces:
    """Two hosts as network namespaces, joined by a cable (veth) to pull. Raises InputError without the rights."""
    name, addresses = 'network namespaces and veth', ['10.213.77.1', '10.213.77.2']

    def __init__(self):
        mark = f'{os.getpid() % 100000}'
        self.spaces, self.cards = [f'seit{mark}a', f'seit{mark}b'], [f'v{mark}a', f'v{mark}b']
        self.ip('netns', 'add', self.spaces[0])
        self.ip('netns', 'add', self.spaces[1])
        try:
            self.ip('-n', self.spaces[0], 'link', 'add', self.cards[0], 'type', 'veth', 'peer', 'name', self.cards[1],
                    'netns', self.spaces[1])
            for space, card, address in zip(self.spaces, self.cards, self.addresses):
                self.ip('-n', space, 'link', 'set', 'lo', 'up')
                self.ip('-n', space, 'addr', 'add', f'{address}/24', 'dev', card)
                self.ip('-n', space, 'link', 'set', card, 'up')
        except InputError:
            self.close()
            raise

    @staticmethod
    def ip(*words):
        try:
            done = subprocess.run(['ip', *words], capture_output=True, text=True)
        except FileNotFoundError:
            raise InputError('no ip program (iproute2) here') from None
        if done.returncode:
            raise InputError(f'ip {" ".join(words)}: {done.stderr.strip()}')

    def place(self, host):
        """(words before a command, environment) to run it on a host."""
        return ['ip', 'netns', 'exec', self.spaces[host]], {'GLOO_SOCKET_IFNAME': self.cards[host]}

    def cut(self, launcher):
        """Pull the cable, then let the second host die: the first hears nothing of it."""
        self.ip('-n', self.spaces[1], 'link', 'set', self.cards[1], 'down')
        kill_all(launcher)

    def mend(self):
        self.ip('-n', self.spaces[1], 'link', 'set', self.cards[1], 'up')

    def close(self):
        for space in self.spaces:
            self.ip('netns', 'del', space)


class Loopback:
    """Two hosts as two addresses of this machine. The second is cut off by freezing its processes: it sends nothing."""
    name, addresses = 'two loopback addresses', ['127.0.0.1', '127.0.0.2']

    def __init__(self):
        self.frozen = None

    def place(self, host):
        return [], {'GLOO_SOCKET_IFNAME': 'lo'}

    def cut(self, launcher):
        for process in [launcher.pid, *workers(launcher).values()]:
            os.kill(process, signal.SIGSTOP)
        self.frozen = launcher

    def mend(self):
        kill_all(self.frozen)

    def close(self):
        pass


def two_hosts(loopback):
    if not loopback:
        try:
            return Namespaces()
        except InputError as error:
            say(f'hosts: no network namespaces ({error})')
    return Loopback()


def hosts_part(folder, words, args, chance, clock):
    """Two hosts under torchrun's c10d rendezvous, one cut off in the middle of the run. Returns figures.

    Stated: the other's worker ends within --dist-timeout (0.25 minutes here) and 30 s more, and waits for a host.
    """
    flags = [*LAUNCHED, '--dist-timeout', '0.25']
    timed('main_seit', words(flags, folder / 'whole'), 2, folder / 'whole.out')
    hosts, out, port, launchers = two_hosts(args.loopback), folder / 'cut', free_port(), [None, None]

    def start(host):
        prefix, env = hosts.place(host)
        env['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'  # else a host that joins later is never told where rank 0 is
        launchers[host] = torchrun(
            ['--nnodes=2', '--nproc-per-node=1', '--rdzv-backend=c10d', f'--rdzv-endpoint={hosts.addresses[0]}:{port}',
             '--rdzv-id=torture', '--max-restarts=3', f'--local-addr={hosts.addresses[host]}',
             f'--rdzv-conf=is_host={1 - host}'], words(flags, out), folder / f'host{host}.out', prefix, env)

    say(f'hosts: {hosts.name}')
    try:
        start(0), start(1)
        until((out / 'checkpoint.pth').exists, 'a first checkpoint', clock)
        time.sleep(chance.uniform(0, 1))
        before = set(workers(launchers[0]).values())
        hosts.cut(launchers[1])
        noticed = until(lambda: not before & set(workers(launchers[0]).values()), 'the end of the cut-off run', clock,
                        45)
        hosts.mend()
        start(1)
        began = time.monotonic()
        until(lambda: None not in [launcher.poll() for launcher in launchers], 'the end of the run', clock)
        codes, finished = [launcher.returncode for launcher in launchers], time.monotonic() - began
    finally:
        for launcher in filter(None, launchers):
            kill_all(launcher)
        hosts.close()
    differing = training_differs(folder / 'whole', out) if not any(codes) else [f'exit codes {codes}']
    say(f'hosts: noticed after {noticed:.1f} s, finished {finished:.1f} s after the host came back, '
        + (f'DIFFERS: {differing}' if differing else 'the same'))
    return {'hosts': hosts.name, 'seconds_to_notice': round(noticed, 1), 'seconds_to_finish': round(finished, 1),
            'differing': differing}


# ---------------------------------------------------------------- the program

def main(args):
    began, clock, chance = time.monotonic(), Clock(args.seconds), random.Random(args.seed)
    found = {'seed': args.seed}
    with contextlib.ExitStack() as stack:
        folder = Path(args.work_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        timed('tokenize_images', tokenise_words(['--name', 'png'], folder / 'tokens'), 1, folder / 'tokens.out')
        words = train_words(folder / 'tokens')
        for part in args.only:
            place = folder / part
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            if part == 'train':
                found[part] = chains('main_seit', RUNS, words, training_differs, place, args, chance, clock)
            elif part == 'tokenise':
                found[part] = tokenise_part(place, args, chance, clock)
            elif part == 'restart':
                found[part] = restart_part(place, words, chance, clock)
            else:
                found[part] = hosts_part(place, words, args, chance, clock)
    found |= {'seconds': round(time.monotonic() - began), 'cpus': os.cpu_count(), 'machine': platform.machine(),
              'python': platform.python_version(), 'torch': torch.__version__}
    print(json.dumps(found))
    too_few = any(found[part]['kills'] < args.kills for part in ('train', 'tokenise') if part in found)
    if too_few or any(found[part]['differing'] for part in args.only):
        sys.exit(1)


if __name__ == '__main__':
    utils.run(lambda: main(get_args_parser().parse_args()))
