"""Make a smaller set of images: fewer of them, smaller ones, or more compressed ones, at a parameter or a budget.

    python scripts/shrink_images.py --data-path IMAGES/train --output-dir small --method jpeg --parameter 8
    python scripts/shrink_images.py --data-path IMAGES/train --output-dir small --method resize --bytes-per-image 1000
    python scripts/shrink_images.py --data-path 'train-{000..146}.tar' --output-dir small --method sample \\
        --parameter 0.2
    python scripts/shrink_images.py --data-path IMAGES/train --output-dir small --method avif --bytes-per-image 500 \\
        --side 224 160 112 64 48 32

Methods and their parameters: sample, the part of the images that is kept, the same of each class, one at least, drawn
by --seed; resize, the factor of both sides, of each image's own size (then a JPEG of quality 95); jpeg, PIL's quality
1 to 95; webp and avif, PIL's quality 0 to 100 (image_data/shrinking.py). An image with a longer side than the format
holds (65,500 pixels as a JPEG, 16,383 as a WebP, 32,768 as an AVIF) is made as small as it does, which a line says.

With --side, jpeg, webp and avif first resize an image, bicubically with antialias, so that its short side has that many
pixels; one whose short side has as many or fewer keeps its size. With a budget several sides may be given. At each the
largest quality within the budget is searched, and the side whose images then have the best mean PSNR, each at the size
of its source, is taken. That PSNR is measured on all images, or on 500 drawn by --seed where there are more. A line
tells what each side came to, and the manifest does (`searched_sides`: where `parameter` is null, the bytes are those of
the lowest quality, which exceed the budget).

Instead of --parameter a budget: --total-bytes of all files together, or --bytes-per-image, which is the total divided
by the images of the *source*, so that a budget is the same storage for every method. The largest parameter within it is
taken, of parts and factors the largest multiple of 0.001; bytes are taken to rise with it. What images become is
measured on all of them, or on 2,000 drawn by --seed where there are more: then the total may miss the budget a little.
The manifest has the true figures.

Writes DIR/images/CLASS/NAME.jpg and DIR/manifest.json, when all is done. Classes without names, or with names that are
not in alphabetical order, become folders 0000, 0001 and so on, so that labels stay.

Killed at any moment, the same command resumes where it stopped. The files are the same, byte for byte, for any number
of processes and interruptions. In the manifest, bytes an image as files and without headers (of a JPEG the
entropy-coded scans, of a WebP or AVIF the bitstreams; null where an image is neither), and the mean PSNR against the
source.
"""
import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import read_json
from flags import SEED, Parser, add_exif_rotate, add_max_pixels, integer, number
from image_data.shrinking import (METHODS, SIDED, Unreachable, check_encoder, check_parameter, find_parameter,
                                  search_sides)
from image_data.shrunk_sets import MANIFEST, SetFolder, check_outside, class_folders, identify_run, write_set
from image_data.sources import Source, open_source
from utils import InputError, cores, print0, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--data-path', required=True, metavar='PATH',
        help='class folders of images, a list file .txt, tar shards or parquet files: see image_data/sources.py')
    add('--output-dir', required=True, metavar='DIR', help='folder that the smaller set is written to')
    add('--method', required=True, choices=list(METHODS), help='how the set becomes smaller')
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument('--parameter', type=number(0), metavar='P',
                      help='of sample: part of the images; of resize: factor of the sides; of the others: quality')
    size.add_argument('--bytes-per-image', type=number(0), metavar='B',
                      help='find the largest parameter with files of B bytes for each image of the source, or less')
    size.add_argument('--total-bytes', type=integer(0), metavar='T',
                      help='find the largest parameter with files of T bytes together, or less')
    add('--side', type=integer(1), nargs='+', metavar='S',
        help='of jpeg, webp, avif: resize short sides to S pixels first; of several, with a budget, the best is taken')
    add('--seed', type=SEED, default=0, help='seed of the images that are drawn')
    add('--num-workers', type=integer(), default=cores(), metavar='N', help='processes that make images smaller')
    add_max_pixels(add)
    add_exif_rotate(add)
    args = parser.parse_args(argv)
    if args.parameter is not None:
        check_parameter(args.method, args.parameter)
    if args.side and args.method not in SIDED:
        raise InputError(f'--side {args.side[0]}: --method {args.method} has no side; {", ".join(SIDED)} have')
    if args.side and args.parameter is not None and len(args.side) > 1:
        raise InputError(f'--side {" ".join(map(str, args.side))}: with --parameter give one; several are searched '
                         'with --bytes-per-image or --total-bytes')
    return args


def order_sides(sides: list[int] | None) -> list[int] | None:
    """Each side once, falling: the same search for any order. None without sides."""
    return sorted(set(sides), reverse=True) if sides else None


def choose_parameter(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """The parameter, and on how many images a budget was measured (None without one); with sides also the one taken.

    Raises InputError.
    """
    if args.parameter is not None:
        noted = {'parameter': check_parameter(args.method, args.parameter), 'searched_images': None}
        return noted | ({'side': args.side[0]} if args.side else {})
    flag, budget, unit, scale = '--total-bytes', args.total_bytes, 'in all', 1
    if args.bytes_per_image is not None:
        flag, budget, unit, scale = '--bytes-per-image', args.bytes_per_image * len(source), 'an image', len(source)
    if args.side:
        found, searched, compared = search_sides(source, args.method, order_sides(args.side), budget, args.seed,
                                                 args.num_workers, args.max_image_pixels)
        within = [side for side in found if side.parameter is not None]
        if not within:
            least = min(found, key=lambda side: side.bytes_per_image)
            least_bytes = least.bytes_per_image * len(source) / scale
            raise InputError(f'{flag} {budget / scale:,.10g}: --method {args.method} takes {least_bytes:,.1f} bytes '
                             f'{unit} at least, with --side {least.side}, for {args.data_path}; choose a budget of '
                             f'{math.ceil(least_bytes):,} or more, a smaller side, or another method')
        best = max(within, key=lambda side: side.psnr)  # of equal ones the first, which is the largest
        return {'parameter': best.parameter, 'searched_images': searched, 'side': best.side,
                'compared_images': compared, 'searched_sides': [side._asdict() for side in found]}
    try:
        parameter, searched = find_parameter(source, args.method, budget, args.seed, args.num_workers,
                                             args.max_image_pixels)
    except Unreachable as limits:
        raise InputError(f'{flag} {budget / scale:,.10g}: --method {args.method} reaches {limits.least / scale:,.1f} '
                         f'to {limits.most / scale:,.1f} bytes {unit} with {args.data_path}; choose a budget of '
                         f'{math.ceil(limits.least / scale):,} or more, or another method') from None
    return {'parameter': parameter, 'searched_images': searched}


def print_set(manifest: dict[str, Any], output_dir: str) -> None:
    """Say what a set has become."""
    bare = manifest['scan_bytes_per_image']
    side = f', side {manifest["side"]}' if 'side' in manifest else ''
    print0(f'{manifest["method"]} {manifest["parameter"]:g}{side}: {manifest["images"]:,} images of '
           f'{manifest["bytes_per_image"]:,.1f} bytes' + (f' ({bare:,.1f} without headers)' if bare else '')
           + f', {manifest["total_bytes"]:,} in all; PSNR {manifest["psnr"]:.2f} dB; the source: '
           f'{manifest["source_images"]:,} of {manifest["source_bytes_per_image"]:,.1f}; wrote {output_dir}')
    budget = manifest['budget'] or {}
    limit = budget.get('total_bytes', budget.get('bytes_per_image', math.inf) * manifest['source_images'])
    if manifest['total_bytes'] > limit:
        print0(f'note: the budget was searched on {manifest["searched_images"]:,} images; all of them exceed it by '
               f'{manifest["total_bytes"] - limit:,.0f} bytes')


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # as in worker processes, so that PSNRs are summed in the same order
    source = open_source(args.data_path, args.exif_rotate)
    check_outside(args.output_dir, source)
    class_folders(source)  # refuses, before any work, what folders cannot hold
    budget = {name: value for name in ('bytes_per_image', 'total_bytes')
              if (value := getattr(args, name)) is not None}
    run_id = identify_run(source, args.method, args.parameter, budget, args.seed, order_sides(args.side))
    folder = SetFolder(args.output_dir, run_id, source.stamp())
    if folder.is_complete():
        folder.remove_leftovers()
        return
    check_encoder(args.method)
    # the search for a budget takes minutes; a resumed run has its result on disk
    noted = folder.begun() or choose_parameter(args, source)
    folder.begin(noted)
    if not folder.has_manifest():
        write_set(folder, source, noted, args.num_workers, args.max_image_pixels)
    folder.finish()
    print_set(read_json(folder.path / MANIFEST), args.output_dir)


if __name__ == '__main__':
    run(main, parse_args)
