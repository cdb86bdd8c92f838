"""Top-1 over groups of classes, from the classes.csv of a report: a JSON file for each group.

    python tables/class_groups.py --report output/run/report --group Imagenette n01440764 n02102040 \\
        --output output/run/imagenette.json

Writes {"acc1": top-1 (%) over the images of these classes, "images": how many}.
"""
import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import read_bytes, write_text
from flags import Parser
from utils import InputError, first_line, run

MAX_BYTES = 1 << 24


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--report', required=True, metavar='DIR', help='of --report of main_seit.py or main_pixels.py')
    add('--group', required=True, nargs='+', metavar='NAME', help='a name of the group, and the names of its classes')
    add('--output', required=True, metavar='FILE.json')
    args = parser.parse_args(argv)
    if len(args.group) < 2:
        raise InputError(f'--group {args.group[0]}: name its classes too')
    return args


def top1(report: str | Path, classes: Sequence[str]) -> dict[str, float]:
    """'acc1' (%) and 'images' of some classes of a report. Raises InputError."""
    path = Path(report, 'classes.csv')
    try:
        rows = {row['name']: row for row in csv.DictReader(io.StringIO(read_bytes(path, MAX_BYTES).decode()))}
        missing = [name for name in classes if name not in rows]
        if missing:
            raise InputError(f'{path}: has no class {", ".join(missing)}')
        images = {name: int(rows[name]['images']) for name in classes}
        right = sum(float(rows[name]['top1']) * count for name, count in images.items() if count)
    except (UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f'{path}: is no classes.csv of --report ({first_line(error)})') from None
    return {'acc1': right / max(1, sum(images.values())), 'images': sum(images.values())}


def main(args: argparse.Namespace) -> None:
    """Write the numbers of a group."""
    write_text(args.output, json.dumps(top1(args.report, args.group[1:])) + '\n')


if __name__ == '__main__':
    run(main, parse_args)
