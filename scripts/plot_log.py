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


def draw(panel: Any, lines: list[dict[str, Any]], key: str, label: str) -> None:
    """Draw one curve on a panel, where the log has that key."""
    points = [(line['epoch'], line[key]) for line in lines if is_number(line.get(key))]
    if points:
        panel.plot(*zip(*points), marker='.', label=label)


def main(args: argparse.Namespace) -> None:
    plt = pyplot()
    logs = {path: read_log(path) for path in args.logs}
    picture_format(args.output, DRAWINGS)  # raises for another ending, before anything is drawn
    check_writable(args.output, inputs=args.logs)
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(13, 4), layout='constrained')
    for path, lines in logs.items():
        # a run is named by its folder, where more than one is drawn
        run_name = f'{Path(path).absolute().parent.name} ' if len(logs) > 1 else ''
        draw(loss, lines, 'train_loss', run_name + 'train')
        draw(loss, lines, 'test_loss', run_name + 'val')
        draw(accuracy, lines, 'test_acc1', run_name + 'top-1')
        draw(accuracy, lines, 'ema_test_acc1', run_name + 'top-1, EMA')
        draw(accuracy, lines, 'test_psnr', run_name + 'PSNR')
        draw(accuracy, lines, 'ema_test_psnr', run_name + 'PSNR, EMA')
        draw(rate, lines, 'train_lr', run_name + 'learning rate')
    tokenizers = any('test_psnr' in line for lines in logs.values() for line in lines)
    quality = 'PSNR of held-out images (dB)' if tokenizers else 'validation accuracy (%)'
    for panel, title in ((loss, 'loss'), (accuracy, quality), (rate, 'learning rate')):
        panel.set(title=title, xlabel='epoch')
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    save_figure(figure, args.output)
    print0(args.output)


if __name__ == '__main__':
    run(main, parse_args)
