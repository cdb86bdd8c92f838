"""Report what is in a token set: codes in use, their entropy, bytes an image; draw images beside their reconstruction.

    python scripts/inspect_tokens.py --token-file tokens/my-train-token.data.bin.gz \\
        --label-file tokens/my-train-label.txt --codebook-path tokens/codebook.ckpt \\
        --tokenizer-path tokens/tokenizer.pt --data-path IMAGES/train --output sheet.png

Prints text for people, then one JSON line. The codes are decoded in memory (2 bytes each); no cache is written.
--data-path is what the tokens were made from, as in tokenize_images.py: class folders, a list, tar shards or parquet.
"""
import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import atomic_path, check_writable, expand_files
from fileio.labels import read_labels
from flags import Parser, integer
from image_data.sources import Source, open_source, source_images
from image_tokenizer.tokenizers import decode_codes, load_tokenizer
from token_files.cache import open_codes
from token_files.codebook import load_codebook
from token_files.token_file import TokenFile, bytes_per_image, count_codes, entropy_bits, open_token_file
from utils import InputError, print0, run

PATCH_SIZE = 8  # pixels a code covers where no tokenizer says so (the published one)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError for values that cannot be."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--token-file', required=True, metavar='FILE', help='NAME.data.bin.gz, or a glob of shards')
    add('--codebook-path', required=True, metavar='FILE', help='the codebook of the tokens')
    add('--label-file', metavar='FILE', help='labels of the images: adds the number of images of each class')
    add('--data-path', metavar='PATH', help='the images that the tokens were made from (class folders, a list file '
        '.txt, tar shards or parquet files: see image_data/sources.py): adds their bytes')
    add('--tokenizer-path', metavar='FILE',
        help='a tokenizer with a decoder: adds reconstructions to the sheet of --output')
    add('--output', metavar='FILE.png',
        help='draw a sheet of source images and reconstructions, whichever there are')
    add('--images', type=integer(1), default=16, help='images on the sheet, from the first on')
    add('--max-image-pixels', type=integer(1), metavar='N', help="refuse images with more pixels; default: PIL's limit")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- numbers


def summarize(files: Sequence[TokenFile], source: Source | None, codes: np.ndarray,
              counts: np.ndarray) -> dict[str, Any]:
    """What the token set holds, as plain values. Args: as in `bytes_per_image`, with codes (N, n)."""
    images, n = codes.shape
    return {'images': images, 'grid': math.isqrt(n), 'codes': len(counts), 'codes_used': int((counts > 0).sum()),
            'entropy_bits': round(entropy_bits(counts), 4), 'most_bits': round(math.log2(len(counts)), 4),
            'bytes_per_image': bytes_per_image(files, codes.shape, counts, source.encoded_bytes() if source else None),
            'code_counts': counts.tolist()}


def count_classes(label_file: str, images: int) -> dict[int, int]:
    """Images of each class, {class: count}. Raises InputError unless there is a label for each image."""
    labels = np.concatenate([read_labels(file) for file in expand_files(label_file)])
    if len(labels) != images:
        raise InputError(f'{label_file}: {len(labels)} labels for {images} images; give the labels of this token file')
    classes, counts = np.unique(labels, return_counts=True)
    return dict(zip(classes.tolist(), counts.tolist()))


# ---------------------------------------------------------------- text

def histogram(counts: np.ndarray) -> list[str]:
    """Lines of text: the part of all codes that each tenth of the codebook has, most used first."""
    ranked = np.sort(counts)[::-1]
    lines = []
    first = 1
    for part in np.array_split(ranked, min(10, len(ranked))):
        fraction = part.sum() / ranked.sum()
        last = first + len(part) - 1
        lines.append(f'  {f"{first}-{last}":>9} {fraction:6.1%} {"#" * round(50 * fraction)}')
        first = last + 1
    return lines


def describe(summary: dict[str, Any]) -> list[str]:
    """The lines for people."""
    size = summary['bytes_per_image']
    entropy = summary['entropy_bits']
    most = summary['most_bits']
    ratio = f' of {most:.2f} ({entropy / most:.1%})' if most else ''
    lines = [f'{summary["images"]:,} images of {summary["grid"]}x{summary["grid"]} codes, {summary["codes_used"]} of '
             f'{summary["codes"]} codes in use',
             f'entropy: {entropy:.2f} bits a code{ratio}',
             f'bytes an image: {size["raw"]:,.0f} as a byte stream, {size["stored"]:,.0f} on disk, '
             f'{size["fixed"]:,.0f} at log2(codes) bits a code, {size["entropy"]:,.0f} at the entropy']
    if 'source' in size:
        lines.append(f'source images: {size["source"]:,.0f} bytes an image, '
                     f'{size["source"] / size["stored"]:.1f} times the tokens on disk')
    if 'class_counts' in summary:
        counts = summary['class_counts'].values()
        lines.append(f'labels: {len(counts)} classes of {min(counts):,} to {max(counts):,} images')
    lines.append('codes by rank of use, most used first, and their share:')
    return lines + histogram(np.array(summary['code_counts']))


# ---------------------------------------------------------------- pictures


def contact_sheet(args: argparse.Namespace, codes: np.ndarray, codebook: torch.Tensor,
                  source: Source | None) -> Image.Image:
    """The first images: each one's source beside its reconstruction, whichever of them there are."""
    count = min(args.images, len(codes))
    grid_size = math.isqrt(codes.shape[1])
    patch_size = PATCH_SIZE
    decoded = None
    if args.tokenizer_path:
        tokenizer = load_tokenizer(args.tokenizer_path)
        if codebook.shape[1] != tokenizer.embed_dim:
            raise InputError(f'{args.codebook_path}: rows of {codebook.shape[1]} elements, but the tokenizer gives '
                             f'{tokenizer.embed_dim}')
        patch_size = tokenizer.patch_size
        decoded = decode_codes(tokenizer, codebook, torch.from_numpy(codes[:count].astype(np.int64)))
    original = source_images(source, count, patch_size * grid_size, args.max_image_pixels) if source else None
    parts = [part for part in (original, decoded) if part is not None]
    if not parts:
        raise InputError('--output: nothing to draw; give --data-path, or a --tokenizer-path that has a decoder')
    cells = torch.cat(parts, dim=3)  # (B, 3, side, side * parts)
    return to_pil_image(make_grid(cells, nrow=math.ceil((count / len(parts)) ** 0.5), pad_value=1))


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> None:
    codebook = load_codebook(args.codebook_path)
    files = [open_token_file(path) for path in expand_files(args.token_file)]
    if args.output:
        inputs = [args.codebook_path, args.label_file, args.tokenizer_path, args.data_path]
        check_writable(args.output, inputs=[*filter(None, inputs), *(file.stream for file in files)])
    source = open_source(args.data_path) if args.data_path else None
    codes = open_codes(files, cache='none')
    try:
        counts = count_codes(codes, len(codebook))
    except ValueError as error:
        raise InputError(f'{args.token_file}: {error}; give the codebook the tokens were made with') from None
    if source and len(source) != len(codes):
        raise InputError(f'{args.data_path}: {len(source)} images, but {args.token_file} holds {len(codes)}; give the '
                         'images that the tokens were made from')
    summary = summarize(files, source, codes, counts)
    if args.label_file:
        summary['class_counts'] = count_classes(args.label_file, len(codes))
    print0('\n'.join(describe(summary)))
    if args.output:
        sheet = contact_sheet(args, codes, codebook, source)
        with atomic_path(args.output) as temporary:
            sheet.save(temporary, 'PNG')
        print0(f'contact sheet: {args.output}')
    print0(json.dumps(summary))


if __name__ == '__main__':
    run(main, parse_args)
