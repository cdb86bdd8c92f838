"""Learn a patch tokenizer and its codebook from images: PCA of patches, then Euclidean k-means of them.

    python scripts/fit_patch_tokenizer.py --data-path IMAGES/train --image-size 64 --output-dir tokens

Writes tokenizer.pt (plain tensors) and codebook.ckpt. A stand-in for ViT-VQGAN that fits in a minute on a CPU and
takes 80 KB; equal input and flags give equal files on one machine. Images come as in tokenize_images.py: class folders,
a list file, tar shards or parquet files. Memory goes with --max-patches, not with --max-images.

A patch gets the code whose row is nearest in Euclidean distance (image_tokenizer.PatchTokenizer says how that agrees
with the cosine by which codes are found everywhere here). The elements of rows are principal components, with standard
deviation 1 together, since embedding noise has that too, and a constant last one.
"""
import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import check_writable, save_torch
from flags import SEED, Parser, integer
from image_data.sources import Source, load_images, open_source
from image_tokenizer.kmeans import kmeans, nearest_rows
from image_tokenizer.tokenizers import PatchTokenizer, check_sizes, lift_rows, unit_range
from utils import InputError, cores, print0, run

BATCH_SIZE = 64  # images decoded at a time
ROWS_AT_ONCE = 1 << 16  # patches in one product: bounds memory
SHUFFLED_WHOLE = 1 << 24  # numbers that are shuffled in memory to draw from them (128 MiB)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError for values that cannot be."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--data-path', required=True, metavar='PATH',
        help='class folders of images, a list file .txt, tar shards or parquet files: see image_data/sources.py')
    add('--output-dir', required=True, metavar='DIR')
    add('--image-size', type=integer(1), default=256, help='images are resized to this, both sides')
    add('--patch-size', type=integer(1), default=8)
    add('--dim', type=integer(2), default=32, help='length of a codebook row: components kept, and one')
    add('--codes', type=integer(2), default=391, help='rows of the codebook')
    add('--max-images', type=integer(1), default=2000, help='drawn at random for the fit')
    add('--max-patches', type=integer(1), default=200_000, help='of their patches, drawn at random')
    add('--iterations', type=integer(0), default=50, help='of k-means')
    add('--seed', type=SEED, default=0)
    add('--num-workers', type=integer(0), metavar='N', help='processes that decode images; default: the cores')
    add('--skip-bad-images', action='store_true', help='leave unreadable images out, instead of stopping at one')
    add('--max-image-pixels', type=integer(1), metavar='N', help="images with more are refused; default: PIL's limit")
    args = parser.parse_args(argv)
    check_sizes(args.image_size, args.patch_size)
    return args


# ---------------------------------------------------------------- patches

def draw(total: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` of the numbers below `total` (all, where there are fewer), none twice, in random order: int64.

    Many numbers are not shuffled to draw a few of them.
    """
    if total <= SHUFFLED_WHOLE or 2 * count > total:
        return torch.randperm(total, generator=generator)[:count]
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        drawn = torch.cat([drawn, torch.randint(total, (count,), generator=generator)]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:count]]


def sample_patches(source: Source, args: argparse.Namespace, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Patches drawn at random from images drawn at random, which are decoded and dropped batch by batch.

    Returns:
        (N, 3·p·p) float32, and the number of images that they are from.

    Raises:
        InputError: for images that cannot be read, and too few patches.
    """
    n = (args.image_size // args.patch_size) ** 2
    images = draw(len(source), args.max_images, generator)
    chosen = draw(len(images) * n, args.max_patches, generator)  # patch k of image i has number i · n + k
    check_enough(args, len(chosen))
    order = chosen.argsort()
    starts = torch.searchsorted(chosen[order], torch.arange(len(images) + 1) * n).tolist()
    used = [i for i in range(len(images)) if starts[i] < starts[i + 1]]
    position = {int(images[i]): i for i in used}

    width = 3 * args.patch_size ** 2
    cut = PatchTokenizer(torch.zeros(width), torch.eye(width), torch.tensor(1.)).patches
    patches = torch.empty(len(chosen), width)
    filled = torch.zeros(len(chosen), dtype=torch.bool)
    numbers = sorted(position)  # row groups of parquet files are read once
    batches = [numbers[first:first + BATCH_SIZE] for first in range(0, len(numbers), BATCH_SIZE)]
    good = 0
    for batch in load_images(source, batches, args.image_size, skip_bad=args.skip_bad_images,
                             workers=cores() if args.num_workers is None else args.num_workers,
                             max_pixels=args.max_image_pixels):
        good += len(batch.indices)
        for index, pixels in zip(batch.indices.tolist(), batch.pixels):
            i = position[index]
            rows = order[starts[i]:starts[i + 1]]
            patches[rows] = cut(unit_range(pixels[None]))[0, chosen[rows] - i * n]
            filled[rows] = True
    if not filled.all():
        patches = patches[filled]
        check_enough(args, len(patches))
    return patches, good


def check_enough(args: argparse.Namespace, patches: int) -> None:
    """InputError where patches are too few, or too small, for the codebook."""
    width = 3 * args.patch_size ** 2
    if patches < args.codes:
        raise InputError(f'{args.data_path}: {patches} patches are too few for {args.codes} codes: give more images, '
                         'or lower --codes')
    if width < args.dim - 1:
        raise InputError(f'--dim {args.dim}: a patch of --patch-size {args.patch_size} has {width} values; choose '
                         f'{width + 1} or less')


# ---------------------------------------------------------------- the fit

def fit_pca(patches: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (m,) and leading components (m, dim) of patches (N, m); each component's largest entry is positive."""
    mean = patches.mean(0)
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in patches.split(ROWS_AT_ONCE):
        centered = (part - mean).double()
        scatter += centered.T @ centered
    _, vectors = torch.linalg.eigh(scatter)
    basis = vectors.flip(1)[:, :dim]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return mean, (basis * largest.sign()).float().contiguous()


def square_sum(values: torch.Tensor) -> float:
    """The sum of the squares, without a copy."""
    return float(values.flatten() @ values.flatten())


def main(args: argparse.Namespace) -> None:
    fit(open_source(args.data_path), args)


def fit(source: Source, args: argparse.Namespace) -> None:
    """Fit a tokenizer to the images of a source, whatever --data-path says, and write it. Raises InputError."""
    tokenizer_path = Path(args.output_dir) / 'tokenizer.pt'
    codebook_path = Path(args.output_dir) / 'codebook.ckpt'
    for path in (tokenizer_path, codebook_path):
        if os.path.isfile(path):
            raise InputError(f'{path}: is there, and tokens may have been made with it: choose another --output-dir, '
                             'or remove it')
        check_writable(path)
    generator = torch.Generator().manual_seed(args.seed)
    patches, images = sample_patches(source, args, generator)
    if (patches == patches[0]).all():
        raise InputError(f'{args.data_path}: every patch is the same; give images with something on them')
    mean, basis = fit_pca(patches, args.dim - 1)
    components = patches.sub_(mean) @ basis
    lost = (square_sum(patches) - square_sum(components)) / len(patches)  # of a patch, by the projection
    del patches
    rows = kmeans(components, args.codes, args.iterations, generator)
    scale = 1 / rows.std()
    codebook = lift_rows(rows * scale)
    save_torch({'mean': mean, 'basis': basis, 'scale': scale, 'rows': codebook}, tokenizer_path)
    save_torch(codebook, codebook_path)
    assigned = nearest_rows(components, rows)
    error = square_sum(components - rows[assigned]) / len(components) + lost
    psnr = -10 * math.log10(max(error / len(mean), 1e-10))
    print0(f'{images:,} images, {len(components):,} patches; {args.codes} codes of {args.dim}, '
           f'{len(assigned.unique())} in use; {psnr:.2f} dB over all patches; wrote {tokenizer_path} and codebook.ckpt')


if __name__ == '__main__':
    run(main, parse_args)
