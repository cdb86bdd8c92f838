"""Draw loss, accuracy and learning rate of one or more runs from their log.txt.

    python scripts/plot_log.py output/log.txt [more/log.txt ...] --output curves.png
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.figures import DRAWINGS, picture_format, pyplot, save_figure
from fileio.files import MAX_JSON_BYTES, check_writable, parse_json, read_bytes
from flags import Parser
from utils import InputError, print0, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    parser.add_argument('logs', nargs='+', metavar='LOG', help='log.txt of a run; several are drawn together')
    parser.add_argument('--output', required=True, metavar='FILE.png',
                        help='the picture to write: .png, .jpg, .webp, .pdf or .svg')
    return parser.parse_args(argv)


def read_log(path: str) -> list[dict[str, Any]]:
    """The lines of a log.txt as dicts; others are left out, which is said. Raises InputError where none is left."""
    lines = []
    left_out = 0
    for text in filter(bytes.strip, read_bytes(path, MAX_JSON_BYTES).split(b'\n')):
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and is_number(line.get('epoch')):
            lines.append(line)
        else:
            left_out += 1
    if not lines:
        raise InputError(f'{path}: no epochs in it; give the log.txt of a run')
    if left_out:
        print0(f'note: {path}: {left_out} of {left_out + len(lines)} lines are left out: they are no whole lines of an '
               'epoch, as a killed run leaves them')
    return lines


def is_number(value: Any) -> bool:
    """Whether a value of JSON can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def run_names(paths: Sequence[str]) -> list[str]:
    """The names of runs, by which they differ: of each log its folder, with those above it as far as it takes."""
    folders = [Path(path).absolute().parent.parts for path in paths]
    for depth in range(1, max(map(len, folders))):
        names = ['/'.join(folder[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            return names
    return ['/'.join(folder) for folder in folders]


def draw(panel: Any, lines: list[dict[str, Any]], key: str, label: str, **style: Any) -> None:
    """Draw one curve on a panel, where the log has that key."""
    points = [(line['epoch'], line[key]) for line in lines if is_number(line.get(key))]
    if points:
        panel.plot(*zip(*points), marker='.', label=label, **style)


def main(args: argparse.Namespace) -> None:
    plt = pyplot()
    logs = {path: read_log(path) for path in args.logs}
    picture_format(args.output, DRAWINGS)  # raises for another ending, before anything is drawn
    check_writable(args.output, inputs=args.logs)
    # the legends stand below the panels, as within them they cover curves; that takes height
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(13, 4 + 0.7 * len(logs)), layout='constrained')
    for number, (lines, name) in enumerate(zip(logs.values(), run_names(list(logs)))):
        # one run: a color for each curve; several: a color for each run, and dashes for what is compared with it
        run_name = f'{name} ' if len(logs) > 1 else ''
        first, second = ({'color': f'C{number % 10}' if len(logs) > 1 else color, 'linestyle': line}
                         for color, line in (('C0', '-'), ('C1', '--')))
        draw(loss, lines, 'train_loss', run_name + 'train', **first)
        draw(loss, lines, 'test_loss', run_name + 'val', **second)
        draw(accuracy, lines, 'test_acc1', run_name + 'top-1', **first)
        draw(accuracy, lines, 'ema_test_acc1', run_name + 'top-1, EMA', **second)
        draw(accuracy, lines, 'test_psnr', run_name + 'PSNR', **first)
        draw(accuracy, lines, 'ema_test_psnr', run_name + 'PSNR, EMA', **second)
        draw(rate, lines, 'train_lr', run_name + 'learning rate', **first)
    tokenizers = any('test_psnr' in line for lines in logs.values() for line in lines)
    quality = 'PSNR of held-out images (dB)' if tokenizers else 'validation accuracy (%)'
    for panel, title in ((loss, 'loss'), (accuracy, quality), (rate, 'learning rate')):
        panel.set(title=title, xlabel='epoch')
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(loc='upper center', bbox_to_anchor=(0.5, -0.14), fontsize=9, frameon=False,
                         ncols=2 if len(panel.lines) < 3 else 1)
    save_figure(figure, args.output)
    print0(args.output)


if __name__ == '__main__':
    run(main, parse_args)
