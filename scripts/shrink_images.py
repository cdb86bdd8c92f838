"""Make a smaller set of images: fewer of them, smaller ones, or more compressed ones, at a parameter or a budget.

    python scripts/shrink_images.py --data-path IMAGES/train --output-dir small --method jpeg --parameter 8
    python scripts/shrink_images.py --data-path IMAGES/train --output-dir small --method resize --bytes-per-image 1000
    python scripts/shrink_images.py --data-path 'train-{000..146}.tar' --output-dir small --format tar \\
        --method sample --parameter 0.2

Methods and their parameters: sample, the share of the images that are kept, the same of each class, one at least, drawn
by --seed, or the --keep best or worst by --scores (a high score is good); resize, the factor of both sides, of each
image's own size (then a JPEG of quality 95); jpeg, PIL's quality 1 to 95; webp, PIL's quality 0 to 100 (shrinking.py).

Instead of --parameter a budget: --total-bytes of all files together, or --bytes-per-image, which is the total divided
by the images of the *source*, so that a budget is the same storage for every method. The largest parameter within it is
taken, of shares and factors the largest multiple of 0.001; bytes are taken to rise with it. What images become is
measured on all of them, or on 2,000 drawn by --seed where there are more: then the total may miss the budget a little.
The manifest has the true figures.

Writes DIR/images/CLASS/NAME.jpg, or DIR/images-000000.tar and so on with members CLASS/NAME.jpg and CLASS/NAME.cls, and
DIR/manifest.json, when all is done. Classes without names, or with names that are not in alphabetical order, become
folders 0000, 0001 and so on, so that labels stay. Bytes are those of images, without what a tar adds.

Killed at any moment, the same command resumes where it stopped. The files are the same, byte for byte, for any number
of processes and interruptions. In the manifest, bytes an image as files and without headers (of a JPEG the
entropy-coded scans, of a WebP the bitstream; null where an image is neither), and the mean PSNR against the source.
"""
import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import features
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import expand_files, read_json, sha256
from flags import SEED, Parser, integer, number
from image_data.shrinking import (METHODS, Ranking, ShrunkImages, Unreachable, check_parameter, largest_within,
                                  make_chunks, read_scores, shrink_chunks)
from image_data.shrunk_sets import PART, SetFolder, class_folders, image_names
from image_data.sources import Source, TarImages, open_source
from utils import InputError, cores, print0, run

SEARCHED = 2000  # images on which a budget's parameter is searched, at most


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--data-path', required=True, metavar='PATH',
        help='class folders of images, a list file .txt, tar shards or parquet files: see image_data/sources.py')
    add('--output-dir', required=True, metavar='DIR')
    add('--method', required=True, choices=list(METHODS))
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument('--parameter', type=number(0), metavar='P',
                      help='sample: share of the images; resize: factor of the sides; jpeg, webp: quality')
    size.add_argument('--bytes-per-image', type=number(0), metavar='B',
                      help='find the largest parameter with files of B bytes for each image of the source, or less')
    size.add_argument('--total-bytes', type=integer(0), metavar='T', help='likewise, with files of T bytes together')
    add('--format', default='folder', choices=list(PART), help='class folders, or tar shards')
    add('--scores', metavar='FILE', help="sample by lines 'name<TAB>score' instead of at random")
    add('--keep', choices=('best', 'worst'), help='with --scores: keep the highest or the lowest of each class')
    add('--seed', type=SEED, default=0)
    add('--num-workers', type=integer(), default=cores(), metavar='N', help='processes that make images smaller')
    add('--max-image-pixels', type=integer(1), metavar='N', help="images with more are refused; default: PIL's limit")
    args = parser.parse_args(argv)
    if bool(args.scores) != bool(args.keep):
        raise InputError('--scores and --keep belong together: give both, or none')
    if args.scores and args.method != 'sample':
        raise InputError(f'--scores: --method {args.method} keeps all images; it goes with --method sample')
    if args.parameter is not None:
        check_parameter(args.method, args.parameter)
    return args


# ---------------------------------------------------------------- making images smaller


def choose_parameter(args: argparse.Namespace, source: Source, ranking: Ranking) -> dict[str, Any]:
    """The parameter, and on how many images a budget was measured (None without one). Raises InputError."""
    if args.parameter is not None:
        return {'parameter': check_parameter(args.method, args.parameter), 'searched_images': None}
    method = METHODS[args.method]
    budget = args.total_bytes if args.bytes_per_image is None else args.bytes_per_image * len(source)
    drawn = np.arange(len(source))
    if args.method == 'sample':
        sizes = source.sizes()
    elif len(source) > SEARCHED:
        drawn = np.sort(torch.randperm(len(source), generator=torch.Generator().manual_seed(args.seed))[:SEARCHED])

    def measure(step: int) -> float:
        """Bytes that the set comes to, all images together."""
        parameter = method.parameter(step)
        if args.method == 'sample':
            total = int(sizes[ranking.kept(parameter)].sum())
        else:
            made = ShrunkImages(source, make_chunks(drawn), args.method, parameter, args.max_image_pixels, True)
            measured = sum(image.size for chunk in shrink_chunks(made, args.num_workers) for image in chunk)
            total = measured * len(source) / len(drawn)
        print0(f'{args.method} {parameter:g}: {total:,.0f} bytes, {total / len(source):,.1f} an image of the source')
        return total

    try:
        step = largest_within(method.lowest, method.highest, measure, budget)
    except Unreachable as limits:
        asked, unit, scale = ('--total-bytes', 'in all', 1)
        if args.bytes_per_image is not None:
            asked, unit, scale = ('--bytes-per-image', 'an image', len(source))
        raise InputError(f'{asked} {budget / scale:,.10g}: --method {args.method} reaches {limits.least / scale:,.1f} '
                         f'to {limits.most / scale:,.1f} bytes {unit} with {args.data_path}; choose a budget of '
                         f'{math.ceil(limits.least / scale):,} or more, or another method') from None
    if step == method.highest:
        print0(f'note: the largest parameter, {method.parameter(step):g}, keeps within the budget')
    return {'parameter': method.parameter(step), 'searched_images': len(drawn)}


# ---------------------------------------------------------------- the program

def check_outside(output_dir: str, data_path: str, source: Source) -> None:
    """InputError when the output would be taken for a part of the source by the next run."""
    output = os.path.realpath(output_dir)
    if os.path.isdir(data_path):
        home = os.path.realpath(data_path)
        inside = output == home or output.startswith(os.path.join(home, ''))
    else:
        inside = isinstance(source, TarImages) and output in {
            os.path.realpath(path.parent) for path in expand_files(data_path)}
    if inside:
        raise InputError(f'--output-dir {output_dir}: lies in {data_path}, and would be taken for a part of it; choose '
                         'a folder outside')


def identify_run(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """All that the set depends on, by names that an error can give. Raises InputError."""
    versions = {'PIL': PIL.__version__, **{name: features.version(name) for name in ('jpg', 'libjpeg_turbo', 'webp')}}
    scores = None
    if args.scores:
        scores = {'file': Path(args.scores).name, 'sha256': sha256(args.scores), 'keep': args.keep}
    budget = {name: value for name in ('bytes_per_image', 'total_bytes')
              if (value := getattr(args, name)) is not None}
    return {'method': args.method, 'parameter': args.parameter, 'budget': budget or None, 'format': args.format,
            'scores': scores, 'seed': args.seed, 'images': source.digest(), 'versions': versions}


def make_manifest(folder: SetFolder, parts: int, source: Source, found: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a set all of whose parts are finished. Raises InputError."""
    records = [record for part in range(parts) for record in folder.read_records(part)]
    bare = [record.bare for record in records]
    total = sum(record.size for record in records)
    run_id = folder.run_id
    return {'method': run_id['method'], **found, 'budget': run_id['budget'], 'images': len(records),
            'bytes_per_image': total / len(records), 'total_bytes': total,
            'scan_bytes_per_image': None if None in bare else sum(bare) / len(bare),
            'psnr': math.fsum(record.psnr for record in records) / len(records),
            'encoder': METHODS[run_id['method']].encoder, 'format': run_id['format'],
            'source': source.data_path, 'source_images': len(source),
            'source_bytes_per_image': source.encoded_bytes() / len(source), 'classes': source.classes,
            'seed': run_id['seed'], 'scores': run_id['scores'], 'versions': run_id['versions'], 'run': run_id,
            'files': folder.outputs(parts)}


def write_set(args: argparse.Namespace, folder: SetFolder, source: Source, ranking: Ranking,
              found: dict[str, Any]) -> None:
    """Make what is left of a set, and its manifest. Raises InputError."""
    images = ranking.kept(found['parameter']) if args.method == 'sample' else np.arange(len(source))
    names = image_names(source, images, args.format)
    size = PART[args.format]
    starts = range(0, len(images), size)
    left = [(part, slice(start, start + size)) for part, start in enumerate(starts) if not folder.is_written(part)]
    if len(left) < len(starts):
        print0(f'{folder.path}: resumed with {len(starts) - len(left):,} of {len(starts):,} parts')
    chunks = [chunk for _, chosen in left for chunk in make_chunks(images[chosen])]
    made = ShrunkImages(source, chunks, args.method, found['parameter'], args.max_image_pixels)
    smaller = (image for chunk in shrink_chunks(made, args.num_workers) for image in chunk)
    with tqdm(total=len(images), initial=len(images) - sum(map(len, chunks)), unit=' images', unit_scale=True,
              mininterval=0.1 if sys.stderr.isatty() else 60) as bar:
        for part, chosen in left:
            folder.write_part(part, names[chosen], source.labels[images[chosen]], smaller)
            bar.update(len(names[chosen]))
    folder.write_manifest(make_manifest(folder, len(starts), source, found))


def print_set(manifest: dict[str, Any], output_dir: str) -> None:
    """Say what a set has become."""
    bare = manifest['scan_bytes_per_image']
    print0(f'{manifest["method"]} {manifest["parameter"]:g}: {manifest["images"]:,} images of '
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
    source = open_source(args.data_path)
    check_outside(args.output_dir, args.data_path, source)
    class_folders(source, args.format)  # refuses, before any work, what folders cannot hold
    folder = SetFolder(args.output_dir, args.format, identify_run(args, source))
    if folder.is_complete():
        folder.remove_leftovers()
        print0(f'{args.output_dir}: finished already')
        return
    ranking = Ranking(source.labels, args.seed, read_scores(args.scores, source) if args.scores else None, args.keep)
    found = folder.begun()
    if found is None:
        found = choose_parameter(args, source, ranking)
    folder.begin(found)
    if not folder.has_manifest():
        write_set(args, folder, source, ranking, found)
    folder.finish()
    print_set(read_json(folder.path / 'manifest.json'), args.output_dir)


if __name__ == '__main__':
    run(main, parse_args)
