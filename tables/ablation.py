"""Table 2: what each augmentation of tokens, and the Stem-adaptor, is worth.

    python tables/ablation.py --preset tiny --data-path DATA --output-dir output/tables --device cpu

Each part is left out of the base recipe, and alone added to none of them. Erasing is not in the published recipe: it is
added to it instead of left out.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flags import Parser
from tables.plan import Line, Plan
from tables.presets import PAPER
from tables.table import Options, add_table_flags, run_table
from utils import run

# Flags with which a part is left out; of those that are given twice, the last counts.
OFF = {
    'synonym': ('--eda-rc-prob', '0'),
    'swap': ('--eda-sc-prob', '0'),
    'erase': ('--eda-erase-prob', '0'),
    'crop': ('--rrc-ratio', '1'),
    'noise': ('--token-noise-prob', '0'),
    'CutMix': ('--cutmix', '0'),
}
# Flags that add a part which the base recipe may lack.
ON = {'erase': ('--eda-erase-prob', '0.25'), 'noise': ('--token-noise-prob', '0.5')}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__.splitlines()[0])
    add_table_flags(parser)
    return parser.parse_args(argv)


def off(*kept: str) -> tuple[str, ...]:
    """The flags that leave out all parts but some."""
    return tuple(word for part, flags in OFF.items() if part not in kept for word in flags)


def lines(plan: Plan, seeds: Sequence[int]) -> list[Line]:
    """The lines of the table."""
    tokens = plan.main_tokens()
    lacks = ['erase'] + [part for part in OFF if OFF[part] == plan.preset.tokens]
    variants = {f'without {part}': flags for part, flags in OFF.items() if part not in lacks}
    variants |= {f'with {part}': ON[part] for part in lacks}
    variants |= {'none': off()}
    variants |= {f'only {part}': off(part) + ON.get(part, ()) for part in OFF}
    model, *kwargs = plan.preset.token_model
    variants |= {'patch stem': ('--model', f'{model}_patch', *kwargs)}
    return [plan.base_line('tokens', seeds, paper=PAPER['tokens'][0])] + [
        plan.token_line(name, seeds, tokens, flags) for name, flags in variants.items()]


def main(args: argparse.Namespace) -> int:
    """Make the table. Returns the exit code."""
    return run_table('ablation', 'Ablation of token augmentation', lines, Options(**vars(args)))


if __name__ == '__main__':
    run(main, parse_args)
