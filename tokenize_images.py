"""Tokenize images into the three published files and a JSON manifest.

    python tokenize_images.py --data-path IMAGES/train --name my-train --output-dir tokens \\
        --tokenizer-path tokens/tokenizer.pt --codebook-path tokens/codebook.ckpt --image-size 64
    torchrun --nproc_per_node=8 tokenize_images.py --data-path 'train-{000..146}.tar' ...

Writes NAME-token.data.bin.gz, NAME-token.index.npy.gz, NAME-label.txt and NAME-token.json; with --shard-size each shard
is such a set, of NAME-token-00000 and so on; with --format compact the first two are NAME-token.data.bin and
NAME-token.model.bin, a third smaller (token_files/compact.py). For --data-path and where labels come from see
image_data/sources.py: class folders (label: the folder's number in alphabetical order), a list file of 'path label'
lines, tar shards (.cls, or .json's 'label', beside the image), parquet files (column 'label').

Killed at any moment, the same command resumes where it stopped (token_files/parts.py). On one machine the files are the
same, byte for byte, for any number of processes and interruptions (on CPUs: for the same OMP_NUM_THREADS, which
torchrun sets to 1). An image that stopped the run may be mended or replaced under its name before the command is given
again. For a finished set, names, labels, sizes and times of the images are compared with those that it was made of.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before installed packages of the same names
from flags import DEVICE_HELP, Parser, add_allow_torchscript, add_exif_rotate, add_max_pixels, integer
from image_data.sources import open_source
from image_tokenizer.tokenizing import EncodingOptions, tokenize
from token_files.parts import OutputFiles
from token_files.token_file import FORMATS
from utils import InputError, cores, init_distributed, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    group = parser.add_argument_group('files')
    add = group.add_argument
    add('--data-path', required=True, metavar='PATH',
        help="class folders of images (labels: folders in alphabetical order); a .txt list of 'path label' lines; "
             ".tar shards, as a glob, x-{000..146}.tar or comma list (labels: members .cls, or .json's 'label'); "
             "or .parquet files, a folder of them or a glob (labels: column 'label')")
    add('--name', required=True, help='first part of the file names, as in imagenet1k-train')
    add('--output-dir', required=True, metavar='DIR', help='folder that the token sets are written to')
    add('--tokenizer-path', required=True, metavar='FILE', help='a tokenizer of any kind of docs/tokenizers.md')
    add('--tokenizer-code-path', metavar='DIR', help="folder of a pickled tokenizer's code, which is then run")
    add_allow_torchscript(add)
    add('--codebook-path', metavar='FILE',
        help="the codebook (default: the tokenizer's, which is then written to DIR/codebook.ckpt)")
    add('--limit-codes', action='store_true',
        help='renumber the codes so that only those in use are left, and write that codebook to DIR/codebook.ckpt; '
        'only for the training split')
    add('--format', choices=FORMATS, default='published',
        help="published: the paper's files, which other programs read; compact: a third smaller (docs/token_format.md)")
    add('--shard-size', type=integer(), default=0, metavar='N',
        help='images in each numbered shard; 0 makes one set of files')
    add('--skip-bad-images', action='store_true', help='leave unreadable images out, instead of stopping at the first')
    add_max_pixels(add)
    add_exif_rotate(add)

    group = parser.add_argument_group('computation')
    add = group.add_argument
    add('--image-size', type=integer(1), default=256, help='pixels to which both sides of an image are resized')
    add('--batch-size', type=integer(1), default=64,
        help='images of a batch of one process; another size may change a few codes, by rounding')
    add('--amp', choices=('off', 'bf16'), default='off',
        help='off: compute in fp32; bf16: faster, and a line says how many codes agree with those of fp32')
    add('--compile', action='store_true',
        help='compile the tokenizer by torch.compile; this may change a few codes, by rounding')
    add('--num-workers', type=integer(), default=cores(), help='processes that decode images, for each rank')
    add('--device', default='auto', help=DEVICE_HELP)
    args = parser.parse_args(argv)
    # the name becomes part of file names; a leading dot would hide them, and is how unfinished files begin
    if not args.name or args.name != Path(args.name).name or args.name.startswith('.'):
        raise InputError(f'--name {args.name}: give a plain word, as in imagenet1k-train, and folders to --output-dir')
    return args


def main(args: argparse.Namespace) -> None:
    """Tokenize the images of all ranks' parts, and put the parts together."""
    device = init_distributed(args.device)
    output = OutputFiles(Path(args.output_dir), args.name, args.shard_size, args.format)
    options = EncodingOptions(args.tokenizer_path, args.image_size, args.codebook_path,
                              code_path=args.tokenizer_code_path,
                              allow_torchscript=args.allow_torchscript, batch_size=args.batch_size, amp=args.amp,
                              compiled=args.compile, limit_codes=args.limit_codes)
    source = open_source(args.data_path, args.exif_rotate)
    tokenize(source, output, options, device, args.num_workers, args.skip_bad_images, args.max_image_pixels)


if __name__ == '__main__':
    run(main, parse_args)
