"""Learn a codebook in the latents of a pre-trained tiny autoencoder: k-means, no training, no GPU.

    python scripts/fit_latent_tokenizer.py --encoder taef2_encoder.pth --decoder taef2_decoder.pth \\
        --data-path IMAGES/train --image-size 256 --output-dir tokens

The autoencoders are those of the TAESD family (madebyollin/taesd, MIT): taesd, taesd3, taef1, taef2. Writes
tokenizer.pt (plain tensors: autoencoder and centers) and codebook.ckpt; equal input and flags give equal files on one
machine.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flags import Parser, add_fit_flags, integer
from image_data.sources import open_source
from image_tokenizer.latent_fit import LatentOptions, fit
from image_tokenizer.latents import PATCH
from image_tokenizer.patch_fit import write_fitted
from image_tokenizer.tokenizers import check_sizes
from utils import run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError for values that cannot be."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--encoder', required=True, metavar='FILE',
        help="weights of the autoencoder's encoder; a file of both halves is given to --decoder too")
    add('--decoder', default='', metavar='FILE', help='weights of its decoder; without, codes cannot be drawn')
    add('--max-images', type=integer(1), default=LatentOptions.max_images,
        help='images to draw at random; an image of 256 pixels takes about half a second of a core')
    add('--max-latents', type=integer(1), default=LatentOptions.max_latents, help='latents to draw from them')
    add_fit_flags(add, LatentOptions)
    args = parser.parse_args(argv)
    check_sizes(args.image_size, PATCH)
    return args


def main(args: argparse.Namespace) -> None:
    """Fit, and write the two files."""
    options = LatentOptions(args.image_size, args.codes, args.max_images, args.max_latents, args.iterations, args.seed)
    source = open_source(args.data_path, args.exif_rotate)
    write_fitted(args.output_dir, lambda: fit(source, args.encoder, args.decoder, options, args.num_workers,
                                              args.skip_bad_images, args.max_image_pixels))


if __name__ == '__main__':
    run(main, parse_args)
