"""Synonyms of each code, for Token-EDA: the nearest other rows of the L2-normalized codebook.

    python scripts/build_synonyms.py --codebook-path tokens/codebook.ckpt --output tokens/synonyms.json
"""
import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import check_writable, write_text
from flags import Parser, integer
from token_files.codebook import load_codebook, nearest_codes
from utils import InputError, print0, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--codebook-path', required=True, metavar='FILE')
    add('--output', required=True, metavar='FILE')
    add('--top-k', type=integer(1), default=5, help='synonyms of a code, best first (training uses the first 5)')
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    codebook = load_codebook(args.codebook_path)
    if args.top_k >= len(codebook):
        raise InputError(f'--top-k {args.top_k}: choose 1 to {len(codebook) - 1}, the other codes in '
                         f'{args.codebook_path}')
    check_writable(args.output, inputs=[args.codebook_path])
    lists = nearest_codes(codebook, args.top_k).tolist()
    rows = ',\n'.join(f'"{code}": {json.dumps(row)}' for code, row in enumerate(lists))
    write_text(args.output, '{\n' + rows + '\n}\n')
    print0(f'{len(lists)} codes, {args.top_k} synonyms each: {args.output}')


if __name__ == '__main__':
    run(main, parse_args)
