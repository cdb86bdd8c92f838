"""Draw what rows of table 1 keep of some images: a line of pictures for each image set, and one of tokens decoded.

The images are of different classes, whose names stand over them; at the left stand the names that --titles gives.

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
from fileio.figures import draw_sheet, picture_format
from fileio.files import atomic_path, check_writable, expand_files
from fileio.labels import name_labels, spread
from flags import Parser, integer
from image_data.sources import load_images, open_source
from image_tokenizer.tokenizers import decode_codes, load_tokenizer, unit_range
from token_files.cache import open_codes
from token_files.codebook import load_codebook
from token_files.token_file import open_token_file
from utils import InputError, print0, run



def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--data-path', nargs='+', required=True, metavar='PATH', help='the same images, as each row stores them')
    add('--token-file', required=True, metavar='FILE', help='tokens of them, in the same order')
    add('--tokenizer-path', required=True, metavar='FILE')
    add('--codebook-path', required=True, metavar='FILE')
    add('--output', required=True, metavar='FILE.png')
    add('--titles', nargs='+', metavar='TITLE',
        help='of the lines, one for each --data-path and one for the tokens (default: their paths)')
    add('--images', type=integer(1), default=10, help='how many, of as many classes as there are')
    add('--image-size', type=integer(1), default=64, help='that all are resized to, as training does')
    args = parser.parse_args(argv)
    if args.titles and len(args.titles) != len(args.data_path) + 1:
        raise InputError(f'--titles: {len(args.titles)} for {len(args.data_path) + 1} lines: give one for each '
                         '--data-path, and one for the tokens')
    return args


def main(args: argparse.Namespace) -> None:
    picture = picture_format(args.output)
    check_writable(args.output, inputs=[*args.data_path, args.token_file, args.tokenizer_path, args.codebook_path])
    codes = open_codes([open_token_file(path) for path in expand_files(args.token_file)], cache='none')
    sources = [open_source(path) for path in args.data_path]
    for path, source in zip(args.data_path, sources):
        if len(source) != len(codes):
            raise InputError(f'{path}: {len(source)} images, but {args.token_file} holds {len(codes)}; give the images '
                             'that the tokens were made from')
    chosen = spread(sources[0].labels, len(codes), args.images)
    lines = [unit_range(next(load_images(source, [chosen], args.image_size)).pixels) for source in sources]
    decoded = decode_codes(load_tokenizer(args.tokenizer_path), load_codebook(args.codebook_path),
                           torch.from_numpy(codes[chosen].astype(np.int64)))
    if decoded is None:
        raise InputError(f'{args.tokenizer_path}: has no decoder')
    lines.append(resize(decoded, [args.image_size, args.image_size], antialias=True))
    sheet = draw_sheet(torch.stack(lines), 1, name_labels(sources[0].labels[chosen], sources[0].classes),
                       args.titles or [*args.data_path, args.token_file])
    with atomic_path(args.output) as temporary:
        sheet.save(temporary, picture, quality=95)
    print0(f'{len(lines)} lines of {len(chosen)} images: {args.output}')


if __name__ == '__main__':
    run(main, parse_args)
