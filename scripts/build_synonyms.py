"""Synonyms of each code, for Token-EDA: the nearest other rows of the L2-normalised codebook.

    python scripts/build_synonyms.py --codebook-path tokens/codebook.ckpt --output tokens/synonyms.json
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from token_dataset import load_codebook  # noqa: E402
from utils import InputError, run, write_text  # noqa: E402


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--codebook-path', required=True, metavar='FILE')
    add('--output', required=True, metavar='FILE')
    add('--top-k', type=int, default=5, help='synonyms of a code, best first (training uses the first 5)')
    return parser


def nearest_codes(codebook, top_k):
    """(K, top_k) int64: the other rows by falling cosine; equal ones by rising code."""
    unit = F.normalize(codebook.double(), dim=-1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return similarity.argsort(dim=1, descending=True, stable=True)[:, :top_k]


def main(args):
    codebook = load_codebook(args.codebook_path)
    if not 1 <= args.top_k < len(codebook):
        raise InputError(f'--top-k {args.top_k}: choose 1 to {len(codebook) - 1}, the other codes in '
                         f'{args.codebook_path}')
    lists = nearest_codes(codebook, args.top_k).tolist()
    rows = ',\n'.join(f'"{code}": {json.dumps(row)}' for code, row in enumerate(lists))
    write_text(args.output, '{\n' + rows + '\n}\n')
    print(f'{len(lists)} codes, {args.top_k} synonyms each: {args.output}')


if __name__ == '__main__':
    run(lambda: main(get_args_parser().parse_args()))
