"""Learn a patch tokenizer and its codebook from images: PCA of patches, then Euclidean k-means of them.

    python scripts/fit_patch_tokenizer.py --data-path IMAGES/train --image-size 64 --output-dir tokens

Writes tokenizer.pt (plain tensors) and codebook.ckpt. A stand-in for ViT-VQGAN that fits in a minute on a CPU and
takes 80 KB; equal input and flags give equal files on one machine. Images come as in tokenize_images.py: class folders,
a list file, tar shards or parquet files. Memory goes with --max-patches, not with --max-images.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flags import Parser, add_fit_flags, integer
from image_data.sources import open_source
from image_tokenizer.patch_fit import FitOptions, fit_to_folder
from image_tokenizer.tokenizers import check_sizes
from utils import run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError for values that cannot be."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--patch-size', type=integer(1), default=FitOptions.patch_size, help='pixels on a side that a code covers')
    add('--dim', type=integer(2), default=FitOptions.dim,
        help='elements of a codebook row: principal components, and a constant')
    add('--max-images', type=integer(1), default=FitOptions.max_images, help='images to draw at random')
    add('--max-patches', type=integer(1), default=FitOptions.max_patches, help='patches to draw from them')
    add_fit_flags(add, FitOptions)
    args = parser.parse_args(argv)
    check_sizes(args.image_size, args.patch_size)
    return args


def main(args: argparse.Namespace) -> None:
    """Fit, and write the two files."""
    options = FitOptions(args.image_size, args.patch_size, args.dim, args.codes, args.max_images, args.max_patches,
                         args.iterations, args.seed)
    source = open_source(args.data_path, args.exif_rotate)
    fit_to_folder(source, args.output_dir, options, args.num_workers, args.skip_bad_images, args.max_image_pixels)


if __name__ == '__main__':
    run(main, parse_args)
