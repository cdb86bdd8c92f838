"""Learn a codebook in the latents of a pre-trained tiny autoencoder: k-means, no training, no GPU.

    python scripts/fit_latent_tokenizer.py --encoder taef2_encoder.pth --decoder taef2_decoder.pth \\
        --data-path IMAGES/train --image-size 256 --output-dir tokens

The autoencoders are those of the TAESD family (madebyollin/taesd, MIT): taesd, taesd3, taef1, taef2. Writes
tokenizer.pt (plain tensors: autoencoder and centers) and codebook.ckpt; equal input and flags give equal files on one
machine.
"""
import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import check_writable, save_torch
from flags import SEED, Parser, add_exif_rotate, add_max_pixels, integer
from image_data.sources import open_source
from image_tokenizer.latent_fit import LatentOptions, fit
from image_tokenizer.latents import PATCH
from image_tokenizer.tokenizers import check_sizes
from utils import InputError, print0, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError for values that cannot be."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--encoder', required=True, metavar='FILE',
        help="weights of the autoencoder's encoder; a file of both halves is given to --decoder too")
    add('--decoder', default='', metavar='FILE', help='weights of its decoder; without, codes cannot be drawn')
    add('--data-path', required=True, metavar='PATH',
        help='class folders of images, a list file .txt, tar shards or parquet files: see image_data/sources.py')
    add('--output-dir', required=True, metavar='DIR', help='folder for tokenizer.pt and codebook.ckpt')
    add('--image-size', type=integer(1), default=LatentOptions.image_size,
        help='resize images to this many pixels on both sides')
    add('--codes', type=integer(2), default=LatentOptions.codes, help='rows of the codebook')
    add('--max-images', type=integer(1), default=LatentOptions.max_images,
        help='images to draw at random; an image of 256 pixels takes about half a second of a core')
    add('--max-latents', type=integer(1), default=LatentOptions.max_latents, help='latents to draw from them')
    add('--iterations', type=integer(0), default=LatentOptions.iterations, help='iterations of k-means')
    add('--seed', type=SEED, default=LatentOptions.seed, help='seed of the draws and of k-means')
    add('--num-workers', type=integer(0), metavar='N', help='processes that decode images; default: as many as cores')
    add('--skip-bad-images', action='store_true', help='leave out unreadable images, instead of stopping at one')
    add_max_pixels(add)
    add_exif_rotate(add)
    args = parser.parse_args(argv)
    check_sizes(args.image_size, PATCH)
    return args


def main(args: argparse.Namespace) -> None:
    """Fit, and write the two files."""
    paths = [Path(args.output_dir, name) for name in ('tokenizer.pt', 'codebook.ckpt')]
    for path in paths:
        if os.path.isfile(path):
            raise InputError(f'{path}: is there, and tokens may have been made with it: choose another folder, or '
                             'remove it')
        check_writable(path)
    options = LatentOptions(args.image_size, args.codes, args.max_images, args.max_latents, args.iterations, args.seed)
    tokenizer, summary = fit(open_source(args.data_path, args.exif_rotate), args.encoder, args.decoder, options,
                             args.num_workers, args.skip_bad_images, args.max_image_pixels)
    save_torch(dict(tokenizer.state_dict()), paths[0])
    save_torch(tokenizer.codebook, paths[1])
    print0(f'{summary}; wrote {paths[0]} and codebook.ckpt')


if __name__ == '__main__':
    run(main, parse_args)
