"""Table 4: images a second of training on tokens and on pixels, and the bytes read for them.

    python tables/speed.py --preset tiny --data-path DATA --output-dir output/tables --threads 1 --device cpu

The same two epochs without evaluation, the second of which counts: with a model that costs next to nothing, so that
loading is what takes the time, and with the preset's model. Rows run one at a time, and nothing else should.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flags import Parser
from tables.plan import Line, Plan
from tables.table import Options, add_table_flags, run_table
from utils import InputError, run

EPOCHS = 2
LR = 1e-3  # no speed depends on it
TIMED = ('--epochs', str(EPOCHS), '--warmup-epochs', '1', '--no-eval', '--no-model-ema')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__.splitlines()[0])
    add_table_flags(parser)
    args = parser.parse_args(argv)
    if args.jobs > 1:
        raise InputError(f'--jobs {args.jobs}: rows that are timed run one at a time')
    if args.lrs and len(args.lrs) > 1:
        raise InputError('--lrs: one is enough, because nothing is learned here')
    return args


def lines(plan: Plan, seeds: Sequence[int]) -> list[Line]:
    """The lines of the table."""
    preset = plan.preset
    tokens = plan.main_tokens()
    images = plan.full()
    made = []
    for bound, token_model, pixel_model in (('loader', preset.small_model, preset.small_pixel_model),
                                            ('compute', preset.token_model, preset.pixel_model)):
        for kind, words, row in (('tokens', plan.token_words(tokens, TIMED, token_model), tokens.row),
                                 ('pixels', plan.pixel_words(images, TIMED, pixel_model), images.row)):
            name = f'{kind} {bound}-bound'
            runs = {seed: plan.train(f'speed {name}', plan.lrs[kind], seed, words, [row]) for seed in seeds}
            made.append(Line(name, kind, runs, row, 'images_per_second', EPOCHS))
    return made


def main(args: argparse.Namespace) -> int:
    """Make the table. Returns the exit code."""
    return run_table('speed', 'Speed of training', lines,
                     Options(**vars(args) | {'lrs': args.lrs or [LR]}))


if __name__ == '__main__':
    run(main, parse_args)
