"""Parameters and multiplications of models of timm on pixels and on tokens: the table of docs/backbones.md.

    python benchmarks/backbones.py
    python benchmarks/backbones.py --models convnext_small maxvit_tiny_tf_224

Multiplications and additions in pairs (GMAC) of the forward pass of one image, as torch counts them: of 224 x 224
pixels, and of 28 x 28 codes of 32 elements.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import forward_flops
from flags import Parser
from inference.pixel_models import create_pixel_model
from models_seit import STEMS, create_model
from utils import InputError, run

FAMILIES = ('deit3_small_patch16_224', 'resnet50', 'regnety_016', 'convnext_tiny', 'efficientnet_b0',
            'swin_tiny_patch4_window7_224', 'pvt_v2_b2', 'levit_256', 'mambaout_tiny', 'edgenext_small')
PIXELS, CODES = (3, 224, 224), (32, 28, 28)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    parser.add_argument('--models', nargs='+', default=list(FAMILIES), metavar='NAME', help='models of timm')
    return parser.parse_args(argv)


def gmac(model: nn.Module, shape: Sequence[int]) -> float:
    """Pairs of a multiplication and an addition, in 1e9, in the forward pass of an input (1, *shape)."""
    return forward_flops(model, shape) / 2e9


def row(name: str) -> str:
    """A line of the table. Raises InputError for a name that timm does not know."""
    cells = []
    for stem in (None, *STEMS):
        try:
            model = create_model(name, {}, 1000, CODES[-1], CODES[0], stem)
        except InputError as error:
            if stem is None:
                raise
            print(f'{name}: {error}', file=sys.stderr)
            cells.append('')
        else:
            if stem:
                cells.append(f'{gmac(model, CODES):.2f}')
            else:
                on_tokens, size = gmac(model, CODES), sum(weight.numel() for weight in model.parameters())
    adapted = '' if any(cells) else f'{on_tokens:.2f}'
    pixels = gmac(create_pixel_model(name, {}, 1000, PIXELS[-1]), PIXELS)
    return f'| {name} | {size / 1e6:.1f} | {pixels:.2f} | {adapted} | {" | ".join(cells)} |'


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    print('| model | M parameters | pixels | Stem-adaptor | fast | native |')
    print('|-------|-------------:|-------:|-------------:|-------:|-----:|')
    for name in args.models:
        print(row(name), flush=True)


if __name__ == '__main__':
    run(main, parse_args)
