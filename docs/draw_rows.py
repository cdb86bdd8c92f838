"""Draw what rows of table 1 keep of some images: a line of pictures for each image set, and for each token set decoded.

The images are of different classes, whose names stand over them; at the left stand the names that --titles gives. Of
one image, with --images 1, the pictures stand beside one another, over these names.

    python docs/draw_rows.py --data-path output/tables/chosen/val output/tables/images/jpeg-8/val/images \\
        --token-file output/tables/tokens/vitvqgan-16x16/val-token.data.bin.gz \\
        --tokenizer-path output/tables/tokenizers/vitvqgan-16x16/tokenizer.safetensors \\
        --codebook-path output/tables/tokenizers/vitvqgan-16x16/codebook.ckpt --output rows.png \\
        --titles 'full pixels' 'JPEG q8' 'tokens 16x16'
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import resize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.figures import draw_sheet, picture_format, save_sheet
from fileio.files import check_writable
from fileio.labels import name_labels, spread
from flags import Parser, integer
from image_data.sources import load_images, open_source
from image_tokenizer.tokenizers import check_codebook, decode_codes, load_tokenizer, unit_range
from token_files.cache import open_codes
from token_files.codebook import load_codebook
from token_files.made_with import check_made_with
from token_files.token_file import count_uses, open_token_files
from utils import InputError, print0, run

COLUMNS = 4  # of pictures of one image


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--data-path', nargs='+', required=True, metavar='PATH', help='the same images, as each row stores them')
    add('--token-file', nargs='+', required=True, metavar='FILE', help='tokens of them, in the same order')
    add('--tokenizer-path', nargs='+', required=True, metavar='FILE', help='one for each --token-file')
    add('--codebook-path', nargs='+', required=True, metavar='FILE', help='one for each --token-file')
    add('--output', required=True, metavar='FILE.png')
    add('--titles', nargs='+', metavar='TITLE',
        help='of the lines, one for each --data-path and then for each --token-file (default: their paths)')
    add('--images', type=integer(1), default=10, help='how many, of as many classes as there are')
    add('--image-size', type=integer(1), default=64, help='that all are resized to, as training does')
    args = parser.parse_args(argv)
    for name in ('tokenizer_path', 'codebook_path'):
        if len(getattr(args, name)) != len(args.token_file):
            raise InputError(f'--{name.replace("_", "-")}: {len(getattr(args, name))} for {len(args.token_file)} '
                             '--token-file: give one for each')
    lines = len(args.data_path) + len(args.token_file)
    if args.titles and len(args.titles) != lines:
        raise InputError(f'--titles: {len(args.titles)} for {lines} lines: give one for each --data-path, and one for '
                         'each --token-file')
    return args


def decoded(path: str, tokenizer_path: str, codebook_path: str, chosen: np.ndarray, images: int) -> torch.Tensor:
    """Images of the tokens of some images, (B, 3, S, S) float32 in [0, 1]. Raises InputError."""
    files = open_token_files(path)
    codes = open_codes(files, cache='none')
    if len(codes) != images:
        raise InputError(f'{path}: {len(codes)} images, but --data-path has {images}; give the tokens of the same '
                         'images')
    tokenizer, codebook = load_tokenizer(tokenizer_path), load_codebook(codebook_path)
    check_made_with(files, codebook, codebook_path, tokenizer_path)
    check_codebook(tokenizer, codebook, codebook_path)
    codes = codes[chosen]
    count_uses(codes, len(codebook), path)
    pictures = decode_codes(tokenizer, codebook, torch.from_numpy(codes.astype(np.int64)))
    if pictures is None:
        raise InputError(f'{tokenizer_path}: has no decoder')
    return pictures


def main(args: argparse.Namespace) -> None:
    """Draw the sheet."""
    picture_format(args.output)  # raises for another ending, before the work
    check_writable(args.output, inputs=[*args.data_path, *args.token_file, *args.tokenizer_path, *args.codebook_path])
    sources = [open_source(path) for path in args.data_path]
    images = len(sources[0])
    for path, source in zip(args.data_path, sources):
        if len(source) != images:
            raise InputError(f'{path}: {len(source)} images, but {args.data_path[0]} has {images}; give the same '
                             'images, as each row stores them')
    chosen = spread(sources[0].labels, images, args.images)
    lines = [unit_range(next(load_images(source, [chosen], args.image_size)).pixels) for source in sources]
    for path, tokenizer, codebook in zip(args.token_file, args.tokenizer_path, args.codebook_path):
        lines.append(resize(decoded(path, tokenizer, codebook, chosen, images), [args.image_size] * 2, antialias=True))
    titles = args.titles or [*args.data_path, *args.token_file]
    pictures = torch.stack(lines)
    if len(chosen) == 1:
        sheet = draw_sheet(pictures, COLUMNS, captions=titles)
    else:
        sheet = draw_sheet(pictures, 1, name_labels(sources[0].labels[chosen], sources[0].classes), titles)
    save_sheet(sheet, args.output)
    print0(f'{len(lines)} lines of {len(chosen)} images: {args.output}')


if __name__ == '__main__':
    run(main, parse_args)
