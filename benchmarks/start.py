"""Benchmark: process start to first batch, and memory, of 1 to many ranks.

    python benchmarks/start.py --ranks 1 4
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from flags import integer
from token_cache import cache_path
from byte_streams import index_path
from token_files import open_token_file
from utils import InputError, run

PROBE = Path(__file__).with_name('start_probe.py')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = common.make_parser('Measure process start to first batch, and memory, of 1 to many ranks.', 3)
    add = parser.add_argument
    add('--images', type=integer(1), default=1_281_167)
    add('--grid', type=integer(2), default=32, help='codes on a side')
    add('--ranks', type=integer(1), nargs='+', default=[1, 4])
    add('--folder', metavar='DIR', help='keep the synthetic set here, and use one that is here already')
    return parser.parse_args(argv)


def start(folder: Path, ranks: int) -> list[dict[str, float]]:
    """Start processes of start_probe.py, as a launcher would; returns what each measured. Raises InputError."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': str(ranks), 'MASTER_ADDR': '127.0.0.1',
           'MASTER_PORT': str(common.free_port())}
    command = [sys.executable, str(PROBE), str(time.time()), *common.token_flags(folder)]
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


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The numbers of the JSON line; the set is made in `folder` where there is none."""
    tokens = common.token_file(folder)
    if not tokens.exists():
        print(f'writing {args.images:,} images of random codes into {folder}', flush=True)
        common.make_tokens(folder, args.images, args.grid, 1000)
    result = {'stream_mb': round(tokens.stat().st_size / 1e6),
              'index_mb': round(index_path(tokens).stat().st_size / 1e6)}
    cache = cache_path([open_token_file(tokens)])
    for ranks in args.ranks:
        for state in ('cold', 'warm'):
            runs = []
            for _ in range(args.repeats):
                if state == 'cold':
                    cache.unlink(missing_ok=True)
                runs.append(start(folder, ranks))
                print(f'{ranks} ranks, {state}: {max(rank["seconds"] for rank in runs[-1]):.1f} s', flush=True)
            result[f'{state}_{ranks}'] = combine(runs)
    return result


def main(args: argparse.Namespace) -> None:
    device = common.set_up('cpu', args.threads)
    with tempfile.TemporaryDirectory(prefix='seit-benchmark-') as temporary:
        result = measure(args, Path(args.folder or temporary))
    common.print_result('start', result, vars(args), device)


if __name__ == '__main__':
    run(main, parse_args)
