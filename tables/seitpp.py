"""Table 5: SeiT++: ColorAdapt, TokenAdapt and masked-token pre-training, each on top of what stands above it.

    python tables/seitpp.py --preset tiny --data-path DATA --output-dir output/tables --device cpu

The paper gives SeiT++ 500 epochs, 400 of pre-training and 100 of fine-tuning, against 300 of SeiT. Both that proportion
and as many epochs as SeiT are here. Its network reads numbers of codes, not embeddings, so it is also trained from
scratch, with the same augmentation: for SeiT's epochs, and for those of fine-tuning, which pre-training comes before.
The learning rate of pre-training is the preset's; others of the preset have a line each, with one seed.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flags import Parser
from tables.plan import Line, Plan
from tables.presets import PAPER, PAPER_SEITPP
from tables.table import SEARCH_SEED, Options, add_table_flags, run_table
from utils import run

COLOR_ADAPT = ('--noise-recipe', 'seit++', '--token-coloradapt-prob', '0.25')  # published


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__.splitlines()[0])
    add_table_flags(parser)
    return parser.parse_args(argv)


def lines(plan: Plan, seeds: Sequence[int]) -> list[Line]:
    """The lines of the table."""
    tokens = plan.main_tokens()
    rows, path = plan.token_adapt(tokens)
    return [
        plan.base_line('tokens', seeds, paper=PAPER['tokens'][0]),
        plan.token_line('ColorAdapt', seeds, tokens, COLOR_ADAPT),
        plan.token_line('ColorAdapt, TokenAdapt', seeds, tokens, (*COLOR_ADAPT, '--tokenadapt-path', path), rows),
        plan.base_line('codes', seeds),
        plan.codes_line(f'MTM network, from scratch, {plan.tuning_epochs} epochs', seeds, plan.tuning_epochs),
        plan.base_line('fine-tuning', seeds),
        *(plan.pretrained_line(f'pre-trained at {lr:g}, equal epochs', [SEARCH_SEED], 2, lr)
          for lr in plan.preset.masked.pretrain_lrs[1:]),
        plan.pretrained_line('pre-trained, published epochs', seeds, 4, paper=PAPER_SEITPP),
    ]


def main(args: argparse.Namespace) -> int:
    """Make the table. Returns the exit code."""
    return run_table('seitpp', 'SeiT++', lines, Options(**vars(args)))


if __name__ == '__main__':
    run(main, parse_args)
