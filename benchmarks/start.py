"""Benchmark: process start to first batch, and memory, of 1 to many ranks; decoding into the node's map alone.

    python benchmarks/start.py --ranks 1 4
    python benchmarks/start.py --format compact --ranks 1 4
    python benchmarks/start.py --format compact --ranks                      only decoding
    python benchmarks/start.py --format compact --ranks --device cuda        on a GPU
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from flags import integer
from token_files.cache import cache_path, digest_path, open_codes
from token_files.token_file import FORMATS, open_token_file
from utils import InputError, cores, run

PROBE = Path(__file__).with_name('start_probe.py')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = common.make_parser('Measure process start to first batch, and memory, of 1 to many ranks; and decoding '
                                'alone.', 3, threads='cores that decoding alone may use')
    parser.set_defaults(threads=cores())
    add = parser.add_argument
    add('--images', type=integer(1), default=1_281_167, help="images of the synthetic set; default: ImageNet's")
    add('--grid', type=integer(2), default=32, help='codes on a side')
    add('--device', default='cpu', help='device of decoding alone: cpu, or cuda, which helps with the compact format')
    add('--format', choices=FORMATS, default='published', help='format of the synthetic set')
    add('--ranks', type=integer(1), nargs='*', default=[1, 4],
        help='how many ranks to start, one count after the other; none: only decoding')
    add('--folder', metavar='DIR', help='keep the synthetic set here, or use the one that is here')
    return parser.parse_args(argv)


# ---------------------------------------------------------------- decoding alone

class PeakMemory:
    """The most memory that this process has at a time, of its own: without the map, and without library files.

    Attributes:
        before: MB when it was entered.
        peak: MB.
    """

    def __enter__(self) -> 'PeakMemory':
        self.before = self.peak = anonymous_memory()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.01):
            self.peak = max(self.peak, anonymous_memory())

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.peak = max(self.peak, anonymous_memory())


def anonymous_memory() -> float:
    """Resident memory of this process in MB that is no file's."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon:')) * 1024 / 1e6


def decode_once(tokens: Path, threads: int, device: torch.device) -> dict[str, float]:
    """Decode a token file into the map beside it; what that cost this process.

    Args:
        tokens: the stream.
        threads: cores to keep to.
        device: that decodes.

    Returns:
        Seconds, codes a second, and MB: at most, and how much of that came with decoding.
    """
    cache_path([open_token_file(tokens)]).unlink(missing_ok=True)
    torch.zeros(1, device=device)  # starts CUDA, which takes seconds and is not what is measured
    with common.on_cores(threads), PeakMemory() as memory:
        began = time.perf_counter()
        codes = open_codes([open_token_file(tokens)], device=device)
        seconds = time.perf_counter() - began
    return {'seconds': seconds, 'codes_per_second': codes.size / seconds, 'memory': memory.peak,
            'memory_added': memory.peak - memory.before}


def decode_alone(tokens: Path, threads: int, device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """The spread of what `decode_once` returns, each time in a new process."""
    costs = []
    for _ in range(repeats):
        # a new process each time: memory that Python has once taken it seldom gives back
        with ProcessPoolExecutor(1, get_context('spawn')) as process:
            costs.append(process.submit(decode_once, tokens, threads, device).result())
        print(f'decoding: {costs[-1]["seconds"]:.1f} s, {costs[-1]["memory"]:.0f} MB', flush=True)
    return {key: common.spread([cost[key] for cost in costs]) for key in costs[0]}


# ---------------------------------------------------------------- ranks

def start(flags: Sequence[str], ranks: int, digests: str) -> list[dict[str, float]]:
    """Start processes of start_probe.py, as a launcher would; returns what each measured.

    Args:
        flags: main_seit.py's that name the files.
        ranks: how many.
        digests: 'with' or 'without' comparing digests of the data.

    Raises:
        InputError: when one failed.
    """
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': str(ranks), 'MASTER_ADDR': '127.0.0.1',
           'MASTER_PORT': str(common.free_port())}
    command = [sys.executable, str(PROBE), str(time.time()), digests, *flags]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                                  env={**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}) for rank in range(ranks)]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise InputError(f'{PROBE.name} failed, see above')
    return json.loads(outputs[0].splitlines()[-1])


def combine(runs: list[list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The spread over runs of each number: of the slowest or largest rank; map_share of all ranks together."""
    combined = {}
    for key in runs[0][0]:
        over_ranks = sum if key == 'map_share' else max
        combined[key] = common.spread([over_ranks(rank[key] for rank in ranks) for ranks in runs])
    return combined


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """The numbers of the JSON line; the set is made in `folder` where there is none."""
    tokens = common.token_file(folder, args.format)
    if not tokens.exists():
        print(f'writing {args.images:,} images of synthetic codes into {folder}', flush=True)
        common.make_tokens(folder, args.images, args.grid, 1000, args.format)
    file = open_token_file(tokens)
    stream, companion = (round(path.stat().st_size / 1e6, 2) for path in file.files)
    kind = 'model' if 'model' in file.manifest else 'index'
    result = {'stream_mb': stream, f'{kind}_mb': companion,
              'decode': decode_alone(tokens, args.threads, device, args.repeats)}
    cache = cache_path([file])
    flags = common.token_flags(folder, args.format)
    for ranks in args.ranks:
        for state in ('cold', 'warm'):  # cold: the first rank decodes; warm: all map the cache of a run before
            runs = {'without': [], 'with': []}
            for _ in range(args.repeats):
                for digests, costs in runs.items():  # in turn, so that what slows the machine slows both
                    if state == 'cold':
                        for path in (cache, digest_path(cache)):
                            path.unlink(missing_ok=True)
                    costs.append(start(flags, ranks, digests))
                    print(f'{ranks} ranks, {state}, {digests} digests: '
                          f'{max(rank["seconds"] for rank in costs[-1]):.1f} s', flush=True)
            for digests, costs in runs.items():
                result[f'{state}_{ranks}_{digests}_digests'] = combine(costs)
    return result


def main(args: argparse.Namespace) -> None:
    device = common.set_up(args.device, args.threads)
    with tempfile.TemporaryDirectory(prefix='seit-benchmark-') as temporary:
        result = measure(args, device, Path(args.folder or temporary))
    common.print_result('start', result, vars(args), device)


if __name__ == '__main__':
    run(main, parse_args)
