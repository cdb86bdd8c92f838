"""Draw loss, accuracy and learning rate of one or more runs from their log.txt.

    python scripts/plot_log.py output/log.txt [more/log.txt ...] --output curves.png
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import MAX_JSON_BYTES, InputError, atomic_path, parse_json, read_bytes, run  # noqa: E402


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('logs', nargs='+', metavar='LOG', help='log.txt of a run')
    parser.add_argument('--output', required=True, metavar='FILE.png')
    return parser


def read_log(path):
    """The lines of a log.txt as dicts."""
    try:
        lines = [parse_json(line) for line in read_bytes(path, MAX_JSON_BYTES).splitlines()]
    except ValueError as error:
        raise InputError(f'{path}: not a log of JSON lines ({error})') from None
    if not lines or not all(isinstance(line, dict) and 'epoch' in line for line in lines):
        raise InputError(f'{path}: no epochs in it')
    return lines


def draw(panel, lines, key, label):
    """One curve, where the log has that key."""
    points = [(line['epoch'], line[key]) for line in lines if key in line]
    if points:
        panel.plot(*zip(*points), marker='.', label=label)


def main(args):
    try:
        import matplotlib
    except ImportError:
        raise InputError('plots need matplotlib: pip install -r requirements-plot.txt') from None
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    logs = {path: read_log(path) for path in args.logs}
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(13, 4), layout='constrained')
    for path, lines in logs.items():
        run_name = f'{Path(path).absolute().parent.name} ' if len(logs) > 1 else ''
        draw(loss, lines, 'train_loss', run_name + 'train')
        draw(loss, lines, 'test_loss', run_name + 'val')
        draw(accuracy, lines, 'test_acc1', run_name + 'top-1')
        draw(accuracy, lines, 'ema_test_acc1', run_name + 'top-1, EMA')
        draw(rate, lines, 'train_lr', run_name + 'learning rate')
    for panel, title in ((loss, 'loss'), (accuracy, 'validation accuracy (%)'), (rate, 'learning rate')):
        panel.set(title=title, xlabel='epoch')
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    with atomic_path(args.output) as temporary:
        figure.savefig(temporary, format='png', dpi=120)
    print(args.output)


if __name__ == '__main__':
    run(lambda: main(get_args_parser().parse_args()))
