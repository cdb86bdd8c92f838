"""Check token sets, downloaded or made: streams, indices, labels, cards with their checksums, codebook, synonyms.

    python scripts/verify_tokens.py --token-file tokens/my-train-token.data.bin.gz \\
        --label-file tokens/my-train-label.txt --codebook-path tokens/codebook.ckpt \\
        --token-synonym-dict tokens/synonyms.json

Files may be globs or comma-separated lists, as in training. Prints one line when all is right; else every problem
found, one a line, and exits with 1. Nothing is written.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from token_dataset import (BYTES, card_path, check_file, decode_images, index_path, load_codebook,  # noqa: E402
                           load_synonyms, read_card, read_index, read_labels)
from utils import InputError, expand_files, run, sha256  # noqa: E402


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--token-file', required=True, metavar='FILE', help='a path, a glob or a comma-separated list')
    add('--label-file', required=True, metavar='FILE', help='as many, in the same order')
    add('--codebook-path', metavar='FILE')
    add('--token-synonym-dict', metavar='FILE', help='needs --codebook-path')
    return parser


class Problems(list):
    """The complaints found, as lines."""

    def attempt(self, check, *args):
        """check(*args), or None with its InputError noted."""
        try:
            return check(*args)
        except InputError as error:
            if str(error) not in self:  # several readers meet the same
                self.append(str(error))


def read_stream(token_file):
    """(images, codes an image, largest code, number of codes in use) of a token file. Raises InputError."""
    index, used = read_index(token_file), np.zeros(1 << 16, bool)
    for _, codes in decode_images(token_file, index):
        used[codes] = True
    return len(index) - 1, codes.shape[1], int(used.nonzero()[0][-1]), int(used.sum())


def check_files(token_file, label_file, card, problems):
    """Add complaints about the sizes and checksums that a card states for its files."""
    for path in (token_file, index_path(token_file), label_file):
        if path.exists():
            problems.attempt(check_file, token_file, card, path)


def check_set(token_file, label_file, codebook, codebook_path, problems):
    """Check one set and add to `problems`; returns (images, codes an image), None where the stream is unreadable."""
    card = problems.attempt(read_card, token_file) or {}
    labels = problems.attempt(read_labels, label_file)
    found = problems.attempt(read_stream, token_file)
    if card:
        check_files(token_file, label_file, card, problems)
    if found is None:
        return None
    images, n, largest, used = found
    if labels is not None and len(labels) != images:
        problems.append(f'{label_file}: {len(labels)} labels for the {images} images of {token_file}')
    if codebook is not None and largest >= len(codebook):
        problems.append(f'{token_file}: holds code {largest}, but {codebook_path} has {len(codebook)} rows')
    if card.get('codes_used', used) != used:
        problems.append(f'{card_path(token_file)}: says codes_used {card["codes_used"]!r}, but {used} are')
    if codebook is not None and 'codebook' in card:
        stated = card['codebook'].get('sha256') if isinstance(card['codebook'], dict) else None
        if stated != sha256(codebook_path):
            problems.append(f'{codebook_path}: is not the codebook that {card_path(token_file)} names by its SHA-256')
    if isinstance(card.get('classes'), list) and labels is not None and labels.max() >= len(card['classes']):
        problems.append(f'{label_file}: holds class {labels.max()}, but {card_path(token_file)} names '
                        f'{len(card["classes"])} classes')
    return images, n, card.get('format', BYTES)


def main(args):
    if args.token_synonym_dict and not args.codebook_path:
        raise InputError('--token-synonym-dict: give --codebook-path too, synonyms are of its rows')
    token_files, label_files = expand_files(args.token_file), expand_files(args.label_file)
    if len(token_files) != len(label_files):
        raise InputError(f'{len(token_files)} token files, but {len(label_files)} label files: give one for each')
    problems = Problems()
    codebook = problems.attempt(load_codebook, args.codebook_path) if args.codebook_path else None
    if codebook is not None and not codebook.isfinite().all():
        problems.append(f'{args.codebook_path}: has elements that are not finite')
    if args.token_synonym_dict and codebook is not None:
        problems.attempt(load_synonyms, args.token_synonym_dict, len(codebook), 5)
    sets = [check_set(*files, codebook, args.codebook_path, problems) for files in zip(token_files, label_files)]
    sizes = {found[1] for found in sets if found}
    if len(sizes) > 1:
        problems.append(f'{args.token_file}: shards of {" and ".join(map(str, sorted(sizes)))} codes an image: '
                        'they are no shards of one set')
    if problems:
        print('\n'.join(problems))
        print(f'{len(problems)} problem{"s" * (len(problems) > 1)} found')
        sys.exit(1)
    grid = round(sets[0][1] ** 0.5)
    print(f'right: {sum(found[0] for found in sets):,} images of {grid}x{grid} codes in {len(sets)} '
          f'file{"s" * (len(sets) > 1)} ({", ".join(sorted({found[2] for found in sets}))})')


if __name__ == '__main__':
    run(lambda: main(get_args_parser().parse_args()))
