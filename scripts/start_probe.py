"""One rank of `scripts/benchmark.py start`: open a token set as main_seit.py does, take one batch, print what it cost.

    python scripts/start_probe.py LAUNCH_TIME FLAGS   (or under torchrun; LAUNCH_TIME as time.time() gives it)

FLAGS are main_seit.py's that name the token files. Rank 0 prints a JSON list with an entry a rank.
"""
import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_seit  # noqa: E402
from samplers import shuffled  # noqa: E402
from token_dataset import load_codebook  # noqa: E402
from utils import barrier, init_distributed, is_main, rank, run, world_size  # noqa: E402


def memory_of(path):
    """Resident memory of this process in MB: of the mapped file `path`, and of everything else.

    {'map', 'map_share'; 'rest', 'rest_own'}: map_share counts 1/n of a page that n processes map; rest_own leaves out
    pages of files, such as the code of libraries, which all processes of a machine share.
    """
    totals, in_map = {'map': 0., 'map_share': 0., 'rest': 0., 'rest_own': 0.}, False
    for line in Path('/proc/self/smaps').read_text().splitlines():
        key, *words = line.split()
        if not key.endswith(':'):  # the head of a mapping: addresses, rights, file
            in_map = line.endswith(str(path))
            continue
        name = {'Rss:': 'map', 'Pss:': 'map_share'} if in_map else {'Rss:': 'rest', 'Anonymous:': 'rest_own'}
        if key in name:
            totals[name[key]] += int(words[0]) * 1024 / 1e6
    return totals


def main(launched, flags):
    imported = time.time()
    device = init_distributed('cpu')
    args = main_seit.parse_args(flags)
    data = main_seit.load_split(args, 'train', load_codebook(args.codebook_path))
    opened = time.time()
    next(data.batches(shuffled(len(data), world_size(), rank(), args.seed, 0), args.batch_size, device))
    own = {'seconds': time.time() - launched, 'import_seconds': imported - launched, 'open_seconds': opened - imported}
    barrier()  # all hold their map while it is measured
    own |= memory_of(data.codes.filename)
    barrier()
    every = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(every, own)
    if is_main():
        print(json.dumps(every), flush=True)


if __name__ == '__main__':
    run(lambda: main(float(sys.argv[1]), sys.argv[2:]))
