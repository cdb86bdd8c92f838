"""One rank of benchmarks/start.py: open a token set as main_seit.py does, take one batch, print what it cost.

    python benchmarks/start_probe.py LAUNCH_TIME DIGESTS FLAGS

or under torchrun. LAUNCH_TIME is as time.time() gives it. DIGESTS is 'with' or 'without' the digests by which ranks see
that they hold the same data. FLAGS are main_seit.py's that name the token files. Rank 0 prints a JSON list with an
entry a rank.
"""
import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_seit
import recipe
from samplers import shuffled
from token_dataset import facts_of, open_splits
from token_files import cache
from token_files.codebook import load_codebook
from utils import barrier, init_distributed, print0, rank, run, world_size

IMPORTED = time.time()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """When this process was launched, and main_seit.py's arguments. Raises InputError."""
    launched, digests, *main_flags = sys.argv[1:] if argv is None else argv
    # two codes on a side, which any grid has
    main_args = main_seit.parse_args([*main_flags, '--no-eval', '--input-size', '16'])
    return argparse.Namespace(launched=float(launched), digests=digests == 'with', main_args=main_args)


def memory_of(path: str | Path) -> dict[str, float]:
    """Resident memory of this process in MB: of the mapped file `path`, and of everything else.

    Returns:
        {'map', 'map_share', 'rest', 'rest_own'}: map_share counts 1/n of a page that n processes map; rest_own leaves
        out pages of files, such as the code of libraries, which all processes of a machine share.
    """
    totals = {'map': 0., 'map_share': 0., 'rest': 0., 'rest_own': 0.}
    in_map = False
    for line in Path('/proc/self/smaps').read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(':'):  # the head of a mapping: addresses, rights, file
            in_map = line.endswith(str(path))
            continue
        name = {'Rss:': 'map', 'Pss:': 'map_share'} if in_map else {'Rss:': 'rest', 'Anonymous:': 'rest_own'}
        if key in name:
            totals[name[key]] += int(values[0]) * 1024 / 1e6
    return totals


def main(args: argparse.Namespace) -> None:
    main_args = args.main_args
    device = init_distributed('cpu')
    codebook = load_codebook(main_args.codebook_path)
    size = main_args.input_size // main_args.token_patch_size
    if not args.digests:  # neither when the cache is made
        cache.digest_of = lambda _: ''
    data = open_splits(recipe.split_files(main_args), codebook, main_args.codebook_path,
                       main_args.token_cache, size, device)['train']
    if args.digests:
        recipe.check_data(main_args, facts_of({'train': data}, codebook), None)
    opened = time.time()
    next(data.batches(shuffled(len(data), world_size(), rank(), main_args.seed, 0), main_args.batch_size, device))
    cost = {'seconds': time.time() - args.launched, 'import_seconds': IMPORTED - args.launched,
            'open_seconds': opened - IMPORTED}
    barrier()  # all hold their map while it is measured
    cost |= memory_of(data.codes.filename)
    barrier()
    costs = [cost] * world_size()
    if world_size() > 1:
        dist.all_gather_object(costs, cost)
    print0(json.dumps(costs))


if __name__ == '__main__':
    run(main, parse_args)
