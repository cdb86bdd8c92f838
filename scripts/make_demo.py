"""Make the demo data set from the original Fashion-MNIST files (MIT licence, Zalando Research).

    python scripts/make_demo.py --fashion-mnist DIR --output-dir demo

DIR holds train-images-idx3-ubyte.gz and its three companions: Debian's package dataset-fashion-mnist installs them,
torchvision.datasets.FashionMNIST(root, download=True) leaves them in root/FashionMNIST/raw. Uses the tokenizer and
codebook in the output folder (`--fit` makes them anew), and writes the same token streams every time.
"""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from token_dataset import reading_gzip  # noqa: E402
from utils import InputError, run  # noqa: E402

CLASSES = ['tshirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'boot']


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--fashion-mnist', required=True, metavar='DIR')
    add('--output-dir', default=str(ROOT / 'demo'), metavar='DIR')
    add('--image-size', type=int, default=64)
    add('--train-images', type=int, default=10_000)
    add('--val-images', type=int, default=2_000)
    add('--png-images', type=int, default=400, help='validation images kept as PNGs')
    add('--fit', action='store_true', help='fit the tokenizer and codebook too')
    return parser


def read_idx(path, header):
    """The bytes of an MNIST-format file after its header."""
    with reading_gzip(path) as file:
        return np.frombuffer(file.read(), np.uint8)[header:]


def export(source, split, count, folder):
    """Write the first `count` images of a split as PNGs into class folders."""
    images = read_idx(source / f'{split}-images-idx3-ubyte.gz', 16).reshape(-1, 28, 28)
    labels = read_idx(source / f'{split}-labels-idx1-ubyte.gz', 8)
    if len(images) != len(labels) or len(images) < count:
        raise InputError(f'{source}: {len(images)} {split} images and {len(labels)} labels; {count} are wanted')
    for i in range(count):
        path = folder / f'{labels[i]}-{CLASSES[labels[i]]}' / f'{i:05d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path, optimize=True)


def script(name, *words):
    """Run a sibling script with this Python; its failure is ours."""
    command = [sys.executable, str(ROOT / 'scripts' / name), *map(str, words)]
    if subprocess.run(command).returncode:
        raise InputError(f'scripts/{name} failed, see above')


def main(args):
    source, output = Path(args.fashion_mnist), Path(args.output_dir)
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary)
        export(source, 'train', args.train_images, images / 'train')
        export(source, 't10k', args.val_images, images / 'val')
        if args.fit:
            script('fit_patch_tokenizer.py', '--data-path', images / 'train', '--image-size', args.image_size,
                   '--output-dir', output)
        script('build_synonyms.py', '--codebook-path', output / 'codebook.ckpt', '--output', output / 'synonyms.json')
        for split in ('train', 'val'):
            for old in output.glob(f'fashion-{split}-[tl]*'):  # tokenize_images.py refuses to overwrite another set
                old.unlink()
            script('tokenize_images.py', '--data-path', images / split, '--name', f'fashion-{split}', '--output-dir',
                   output, '--tokenizer-path', output / 'tokenizer.pt', '--codebook-path', output / 'codebook.ckpt',
                   '--image-size', args.image_size, '--device', 'cpu')
    export(source, 't10k', args.png_images, output / 'images' / 'val')


if __name__ == '__main__':
    run(lambda: main(get_args_parser().parse_args()))
