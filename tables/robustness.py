"""Table 3: accuracy on corrupted images, and on ImageNet-R, -A and -Sketch, of tokens and of full pixels.

    python tables/robustness.py --preset tiny --data-path DATA --output-dir output/tables --device cpu

Evaluates the checkpoints of table 1's base lines, which are trained first where they are not there. The corruptions are
applied to the images; tokens are made of what comes out.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flags import Parser
from tables.plan import Line, Plan
from tables.presets import PAPER_ROBUSTNESS
from tables.table import Options, add_table_flags, run_table
from utils import run

CORRUPTIONS = ('gaussian_noise', 'gaussian_blur', 'defocus_blur', 'jpeg_compression', 'contrast', 'brightness')
SEVERITIES = range(1, 6)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__.splitlines()[0])
    add_table_flags(parser)
    return parser.parse_args(argv)


def lines(plan: Plan, seeds: Sequence[int]) -> list[Line]:
    """The lines of the table: for tokens, then for pixels."""
    val = plan.split('val')
    sets = {'clean': (val, ())}
    sets |= {f'{name} {severity}': (val, ('--corruption', name, '--severity', str(severity)))
             for name in CORRUPTIONS for severity in SEVERITIES}
    sets |= {name: (plan.data / name, ('--classes', name)) for name in plan.preset.more_sets}
    tokens = plan.main_tokens()
    made = []
    for kind in ('tokens', 'pixels'):
        base = plan.base_line(kind, seeds)
        for name, (path, flags) in sets.items():
            runs = {}
            for seed, run_row in base.runs.items():
                if kind == 'tokens':
                    command = plan.evaluate_tokens(run_row, tokens, path, flags)
                else:
                    command = plan.evaluate_pixels(run_row, path, flags)
                row = f'evaluate/{kind}/{run_row.folder.name}/{name.replace(" ", "-")}'
                runs[seed] = plan.row(row, [command], [run_row])
            paper = PAPER_ROBUSTNESS.get(name) if kind == 'tokens' else None
            made.append(Line(f'{kind} {name}', kind, runs, base.data, 'printed top1', paper=paper))
    return made


def main(args: argparse.Namespace) -> int:
    """Make the table. Returns the exit code."""
    return run_table('robustness', 'Robustness', lines, Options(**vars(args)))


if __name__ == '__main__':
    run(main, parse_args)
