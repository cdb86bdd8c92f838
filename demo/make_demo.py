"""Make the demo data set from the original Fashion-MNIST files (MIT license, Zalando Research).

    python demo/make_demo.py --fashion-mnist DIR --output-dir demo

DIR holds train-images-idx3-ubyte.gz and its three companions: Debian's package dataset-fashion-mnist installs them,
torchvision.datasets.FashionMNIST(root, download=True) leaves them in root/FashionMNIST/raw. Uses the tokenizer and
codebook in the output folder (`--fit` makes new ones), and writes the same token streams every time.
"""
import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fileio.files import check_writable, write_text  # noqa: E402
from flags import Parser, integer  # noqa: E402
from image_data.sources import open_source  # noqa: E402
from image_tokenizer.patch_fit import FitOptions, fit_to_folder  # noqa: E402
from image_tokenizer.tokenizing import EncodingOptions, tokenize  # noqa: E402
from token_files.codebook import build_synonyms  # noqa: E402
from token_files.parts import OutputFiles  # noqa: E402
from token_files.published import open_gzip  # noqa: E402
from utils import InputError, run  # noqa: E402

CLASSES = ['tshirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'boot']
LISTED = 10  # images of a class in the list of validation
SIDE = 28  # of an image, in pixels


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--fashion-mnist', required=True, metavar='DIR', help='folder of the four original files')
    add('--output-dir', default=str(ROOT / 'demo'), metavar='DIR', help='folder of the demo')
    add('--image-size', type=integer(1), default=64, help='resize images to this many pixels on both sides')
    add('--train-images', type=integer(1), default=10_000, help='training images, the first ones')
    add('--val-images', type=integer(1), default=2_000, help='validation images, the first ones')
    add('--png-images', type=integer(), default=400, help='validation images that are kept as PNGs too')
    add('--fit', action='store_true', help='fit a new tokenizer and codebook')
    return parser.parse_args(argv)


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes of an MNIST-format file after its header, uint8. Raises InputError."""
    with open_gzip(path) as file:
        return np.frombuffer(file.read(), np.uint8)[header:]


def read_split(source: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images (count, 28, 28) uint8 and labels (count,) uint8 of a split. Raises InputError."""
    path = source / f'{split}-images-idx3-ubyte.gz'
    pixels = read_idx(path, 16)
    labels = read_idx(source / f'{split}-labels-idx1-ubyte.gz', 8)
    if len(pixels) != len(labels) * SIDE ** 2:
        raise InputError(f'{path}: {len(pixels):,} pixels are not {len(labels):,} images of {SIDE}x{SIDE}, as many as '
                         'there are labels: fetch both files again')
    if len(labels) < count:
        raise InputError(f'{path}: {len(labels)} images; {count} are wanted')
    if labels.max(initial=0) >= len(CLASSES):
        raise InputError(f'{source}: class {labels.max()} among the {split} labels, where there are {len(CLASSES)}')
    return pixels.reshape(-1, SIDE, SIDE)[:count], labels[:count]


def export(images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write images (n, 28, 28) as PNGs into class folders."""
    for number, (image, label) in enumerate(zip(images, labels)):
        path = folder / f'{label}-{CLASSES[label]}' / f'{number:05d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, optimize=True)


def write_lists(folder: Path, name: str) -> None:
    """Write train.txt and val.txt, lists of the images in the class folders of `name`: val has the last of each."""
    lines = {'train': [], 'val': []}
    for path in sorted((folder / name).iterdir()):
        images = sorted(path.iterdir())
        for split, part in (('train', images[:-LISTED]), ('val', images[-LISTED:])):
            lines[split] += [f'{image.relative_to(folder).as_posix()}\t{path.name}\n' for image in part]
    for split, listed in lines.items():
        write_text(folder / f'{split}.txt', ''.join(listed))


def main(args: argparse.Namespace) -> None:
    source = Path(args.fashion_mnist)
    output = Path(args.output_dir)
    train = read_split(source, 'train', args.train_images)
    val = read_split(source, 't10k', max(args.val_images, args.png_images))
    check_writable(output / 'synonyms.json')
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary)
        export(*train, images / 'train')
        export(val[0][:args.val_images], val[1][:args.val_images], images / 'val')
        # a fit gives other codes on another machine; with the committed tokenizer the streams are always the same
        if args.fit:
            for name in ('tokenizer.pt', 'codebook.ckpt'):  # fitting refuses to overwrite others
                (output / name).unlink(missing_ok=True)
            fit_to_folder(open_source(images / 'train'), output, FitOptions(args.image_size))
        build_synonyms(output / 'codebook.ckpt', output / 'synonyms.json')
        options = EncodingOptions(output / 'tokenizer.pt', args.image_size, output / 'codebook.ckpt')
        for split in ('train', 'val'):
            for old in output.glob(f'fashion-{split}-[tl]*'):  # tokenizing refuses to overwrite another set
                old.unlink()
            tokenize(open_source(images / split), OutputFiles(output, f'fashion-{split}', format='compact'), options,
                     torch.device('cpu'))
    export(val[0][:args.png_images], val[1][:args.png_images], output / 'images' / 'val')
    write_lists(output / 'images', 'val')


if __name__ == '__main__':
    run(main, parse_args)
