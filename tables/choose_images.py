"""Choose classes and images of class folders: a folder of links to them.

    python tables/choose_images.py --data-path IMAGES/train --classes 20 --images-per-class 500 --output-dir small/train

Takes the first classes in alphabetical order, or all, after those that are skipped, and the first images of each.
Nothing is copied. `chosen.json`, beside the classes, is written when all links are there.
"""
import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import write_text
from flags import Parser, integer
from image_data.sources import FolderImages, open_source
from utils import InputError, print0, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--data-path', required=True, metavar='DIR', help='a folder with a folder of images for every class')
    add('--output-dir', required=True, metavar='DIR')
    add('--classes', type=integer(1), help='how many; default: all')
    add('--skip-classes', type=integer(), default=0, metavar='N', help='leave the first N classes out')
    add('--images-per-class', type=integer(1), help='at most; default: all')
    return parser.parse_args(argv)


def link(path: Path, target: str) -> None:
    """Make `path` a link to a file; one that is there already must be the same. Raises InputError."""
    relative = os.path.relpath(os.path.realpath(target), os.path.realpath(path.parent))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            os.symlink(relative, path)
    except OSError as error:
        raise InputError(f'{path}: cannot be made ({error.strerror}); choose another --output-dir') from None
    if os.path.realpath(path) != os.path.realpath(target):
        raise InputError(f'{path}: is another image already; choose another --output-dir')


def main(args: argparse.Namespace) -> None:
    source = open_source(args.data_path)
    if not isinstance(source, FolderImages):
        raise InputError(f'{args.data_path}: give a folder with a folder of images for every class')
    last = args.skip_classes + args.classes if args.classes else len(source.classes)
    if args.skip_classes >= len(source.classes):
        raise InputError(f'{args.data_path}: has {len(source.classes)} classes, and --skip-classes leaves none')
    if len(source.classes) < last:
        skipped = f' after --skip-classes {args.skip_classes}' if args.skip_classes else ''
        raise InputError(f'{args.data_path}: has {len(source.classes)} classes, but --classes is {args.classes}'
                         + skipped)
    chosen = np.concatenate([np.flatnonzero(source.labels == label)[:args.images_per_class]
                             for label in range(args.skip_classes, last)])
    for index in chosen:
        name = source.names[index]
        link(Path(args.output_dir, name), os.path.join(source.folder, name))
    made = {'classes': last - args.skip_classes, 'images': len(chosen)}
    write_text(Path(args.output_dir, 'chosen.json'), json.dumps(made) + '\n')
    print0(f'{len(chosen):,} images of {made["classes"]} classes: {args.output_dir}')


if __name__ == '__main__':
    run(main, parse_args)
