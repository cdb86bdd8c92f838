"""Table 1: storage against accuracy. Full pixels, fewer images, smaller images, JPEG, and tokens.

    python tables/storage.py --preset tiny --data-path DATA --output-dir output/tables --device cpu
    python tables/storage.py --preset imagenet --data-path DATA --output-dir output/tables --dry-run
"""
import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flags import Parser
from tables.plan import Line, Plan, percent
from tables.presets import PAPER
from tables.report import COMPACT
from tables.table import Options, add_table_flags, run_table
from utils import run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__.splitlines()[0])
    add_table_flags(parser)
    return parser.parse_args(argv)


def lines(plan: Plan, seeds: Sequence[int]) -> list[Line]:
    """The lines of the table."""
    preset = plan.preset
    full = plan.full().row
    sets = {'full pixels': plan.full()}
    sets |= {f'sample {percent(share)}': plan.shrunk('sample', share) for share in preset.shares}
    sets |= {f'resize x{side:g}': plan.shrunk('resize', side) for side in preset.sides}
    sets |= {f'JPEG q{quality}': plan.shrunk('jpeg', quality) for quality in preset.qualities}
    made = [plan.pixel_line(name, seeds, images, full=full, **paper(name)) for name, images in sets.items()]
    sets = {'tokens': plan.main_tokens()}
    sets |= {f'tokens {percent(share)}': plan.main_tokens(share) for share in preset.token_shares}
    sets |= {f'tokens {name}': plan.tokens(name) for name in list(preset.tokenizers)[1:]}
    for name, tokens in sets.items():
        line = plan.token_line(name, seeds, tokens, full=full, **paper(name))
        # the same codes in fewer bytes: nothing is trained again
        compact = replace(line, name=f'{name}{COMPACT}', data=plan.compact(tokens), paper=None, paper_size=None)
        made += [line, compact]
    return made


def paper(name: str) -> dict[str, object]:
    """What the paper says of a line: its accuracy and storage."""
    value, size = PAPER.get(name, (None, None))
    return {'paper': value, 'paper_size': size}


def main(args: argparse.Namespace) -> int:
    """Make the table. Returns the exit code."""
    return run_table('storage', 'Storage against accuracy', lines, Options(**vars(args)))


if __name__ == '__main__':
    run(main, parse_args)
