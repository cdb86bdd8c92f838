"""Write the synonyms of each code, for Token-EDA: the nearest other rows of the L2-normalized codebook.

    python scripts/build_synonyms.py --codebook-path tokens/codebook.ckpt --output tokens/synonyms.json
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flags import Parser, integer
from token_files.codebook import SYNONYMS, build_synonyms
from utils import run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--codebook-path', required=True, metavar='FILE', help='the codebook of the tokens')
    add('--output', required=True, metavar='FILE', help='the JSON file to write')
    add('--top-k', type=integer(1), default=SYNONYMS,
        help='synonyms to write for each code, best first (training uses the first 5)')
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    build_synonyms(args.codebook_path, args.output, args.top_k)


if __name__ == '__main__':
    run(main, parse_args)
