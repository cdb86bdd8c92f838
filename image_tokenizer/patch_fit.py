"""Fitting a patch tokenizer and its codebook to images: PCA of patches, then Euclidean k-means of them.

It is a stand-in for ViT-VQGAN that fits in a minute on a CPU and takes 80 KB. Patches are drawn at random from images
drawn at random, which are decoded and dropped batch by batch, so memory goes with the patches and not with the images.
Equal images and options give equal tokenizers on one machine.

A patch gets the code whose row is nearest in Euclidean distance (tokenizers.PatchTokenizer says how that agrees with
the cosine by which codes are looked for everywhere here). The elements of rows are principal components, with standard
deviation 1 together, since SeiT's embedding noise has that too. The last element is a constant: codes are compared by
direction, and rows of gray patches, whose components are all near 0, would have none.

`fit` does it, in the order draw patches, PCA, k-means; `fit_to_folder` also writes the files.
"""
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fileio.files import check_writable, save_torch
from image_data.sources import Source, load_images
from image_tokenizer.kmeans import kmeans, nearest_rows
from image_tokenizer.tokenizers import PatchTokenizer, check_sizes, lift_rows, unit_range
from utils import InputError, print0

BATCH_SIZE = 64  # images decoded at a time
ROWS_AT_ONCE = 1 << 16  # patches in one product: bounds memory
SHUFFLED_WHOLE = 1 << 24  # numbers that are shuffled in memory to draw from them (128 MiB)


@dataclass(frozen=True)
class FitOptions:
    """What a fitted tokenizer depends on, beside the images.

    Attributes:
        image_size, patch_size: pixels on each side.
        dim: elements of a codebook row: the components kept, and one.
        codes: rows of the codebook.
        max_images: drawn at random for the fit.
        max_patches: of their patches, drawn at random.
        iterations: of k-means.
        seed: of all that is drawn.
    """
    image_size: int = 256
    patch_size: int = 8
    dim: int = 32
    codes: int = 391
    max_images: int = 2000
    max_patches: int = 200_000
    iterations: int = 50
    seed: int = 0


def fit_to_folder(source: Source, folder: str | Path, options: FitOptions, workers: int | None = None,
                  skip_bad: bool | None = None, max_pixels: int | None = None) -> None:
    """Fit a patch tokenizer, and write it as `write_fitted` does.

    Args:
        folder: must hold neither file yet.
        source, options, workers, skip_bad, max_pixels: as for `fit`.

    Raises:
        InputError: as `fit` does, and for files that exist or cannot be written, before the work.
    """
    write_fitted(folder, lambda: fit(source, options, workers, skip_bad, max_pixels))


def write_fitted(folder: str | Path, fit_one: Callable[[], tuple[nn.Module, str]]) -> None:
    """Fit a tokenizer, write it as tokenizer.pt and its codebook as codebook.ckpt, and print what was made.

    Args:
        folder: must hold neither file yet.
        fit_one: gives the tokenizer, and a line about it.

    Raises:
        InputError: for files that exist or cannot be written, before the work.
    """
    tokenizer_path = Path(folder) / 'tokenizer.pt'
    codebook_path = Path(folder) / 'codebook.ckpt'
    for path in (tokenizer_path, codebook_path):
        if os.path.isfile(path):
            raise InputError(f'{path}: is there, and tokens may have been made with it: choose another folder, or '
                             'remove it')
        check_writable(path)
    tokenizer, summary = fit_one()
    save_torch(dict(tokenizer.state_dict()), tokenizer_path)
    save_torch(tokenizer.codebook, codebook_path)
    print0(f'{summary}; wrote {tokenizer_path} and codebook.ckpt')


def fit(source: Source, options: FitOptions, workers: int | None = None, skip_bad: bool | None = None,
        max_pixels: int | None = None) -> tuple[PatchTokenizer, str]:
    """Fit a patch tokenizer to the images of a source.

    Args:
        source: of the images.
        options: of the fit.
        workers: processes that decode images; None for as many as there are cores.
        skip_bad: leave out images that cannot be read, instead of stopping at one; None where the program has no flag
            for it.
        max_pixels: larger images count as unreadable; None for PIL's limit.

    Returns:
        The tokenizer, and a line that says what it was fitted to and how well it fits.

    Raises:
        InputError: for options that do not fit together, images that cannot be read, and too little to learn from.
    """
    check_sizes(options.image_size, options.patch_size)
    generator = torch.Generator().manual_seed(options.seed)
    patches, images = sample_patches(source, options, generator, workers, skip_bad, max_pixels)
    if (patches == patches[0]).all():
        raise InputError(f'{source.data_path}: every patch is the same; give images with something on them')
    mean, basis = fit_pca(patches, options.dim - 1)
    components = patches.sub_(mean) @ basis
    lost = (square_sum(patches) - square_sum(components)) / len(patches)  # of a patch, by the projection
    del patches  # the largest tensor by far: k-means needs memory too
    rows = kmeans(components, options.codes, options.iterations, generator)
    scale = 1 / rows.std()  # after k-means, so that the deviation is that of the rows, which training sees
    tokenizer = PatchTokenizer(mean, basis, scale, lift_rows(rows * scale))

    # how well it fits: the squared error of a patch is what the projection loses, and the distance to its row
    assigned = nearest_rows(components, rows)
    error = square_sum(components - rows[assigned]) / len(components) + lost
    psnr = -10 * math.log10(max(error / len(mean), 1e-10))
    return tokenizer, (f'{images:,} images, {len(components):,} patches; {options.codes} codes of {options.dim}, '
                       f'{len(assigned.unique())} in use; {psnr:.2f} dB over all patches')


# ---------------------------------------------------------------- patches

def draw(total: int, count: int, generator: torch.Generator, shuffled_whole: int = SHUFFLED_WHOLE) -> torch.Tensor:
    """`count` of the numbers below `total` (all, where there are fewer), none twice, in random order: int64.

    More than `shuffled_whole` numbers are not shuffled to draw a few of them.
    """
    if total <= shuffled_whole or 2 * count > total:
        return torch.randperm(total, generator=generator)[:count]
    # few of very many: draw with repeats, drop them, and draw more until there are enough
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        drawn = torch.cat([drawn, torch.randint(total, (count,), generator=generator)]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:count]]  # unique() has sorted them


def sample_patches(source: Source, options: FitOptions, generator: torch.Generator, workers: int | None = None,
                   skip_bad: bool | None = None, max_pixels: int | None = None) -> tuple[torch.Tensor, int]:
    """Patches drawn at random from images drawn at random; `workers` and what follows are as for `fit`.

    Returns:
        (N, 3·p·p) float32, and the number of images that they are from.

    Raises:
        InputError: for images that cannot be read, and too few patches.
    """
    n = (options.image_size // options.patch_size) ** 2
    images = draw(len(source), options.max_images, generator)
    drawn = draw(len(images) * n, options.max_patches, generator)  # patch k of image i has number i · n + k
    check_enough(source.data_path, options, len(drawn))

    # Sorted by number, the patches of an image stand together: from starts[i] to starts[i + 1].
    order = drawn.argsort()
    starts = torch.searchsorted(drawn[order], torch.arange(len(images) + 1) * n).tolist()
    used = [i for i in range(len(images)) if starts[i] < starts[i + 1]]
    position = {int(images[i]): i for i in used}

    width = 3 * options.patch_size ** 2
    cut = PatchTokenizer(torch.zeros(width), torch.eye(width), torch.tensor(1.)).patches
    patches = torch.empty(len(drawn), width)
    filled = torch.zeros(len(drawn), dtype=torch.bool)
    numbers = sorted(position)  # a parquet file is read by row groups: in this order each of them once
    batches = [numbers[first:first + BATCH_SIZE] for first in range(0, len(numbers), BATCH_SIZE)]
    images_read = 0
    for batch in load_images(source, batches, options.image_size, skip_bad=skip_bad, workers=workers,
                             max_pixels=max_pixels):
        images_read += len(batch.indices)
        for index, pixels in zip(batch.indices.tolist(), batch.pixels):
            i = position[index]
            rows = order[starts[i]:starts[i + 1]]
            patches[rows] = cut(unit_range(pixels[None]))[0, drawn[rows] - i * n]
            filled[rows] = True
    if not filled.all():  # bad images were left out
        patches = patches[filled]
        check_enough(source.data_path, options, len(patches))
    return patches, images_read


def check_enough(data_path: str, options: FitOptions, patches: int) -> None:
    """InputError where patches are too few, or too small, for the codebook."""
    width = 3 * options.patch_size ** 2
    if patches < options.codes:
        raise InputError(f'{data_path}: {patches} patches are too few for {options.codes} codes: give more images, '
                         'a larger --image-size, or fewer codes')
    if width < options.dim - 1:
        raise InputError(f'rows of {options.dim} elements: a patch of {options.patch_size} x {options.patch_size} '
                         f'pixels has {width} values; choose {width + 1} or less')


# ---------------------------------------------------------------- components

def fit_pca(patches: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (m,) and leading components (m, dim) of patches (N, m); each component's largest entry is positive."""
    mean = patches.mean(0)
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    # in float64: the products of 200,000 patches are added up, and eigenvectors are as exact as their sum
    for part in patches.split(ROWS_AT_ONCE):
        centered = (part - mean).double()
        scatter += centered.T @ centered
    _, vectors = torch.linalg.eigh(scatter)
    basis = vectors.flip(1)[:, :dim]
    # Eigenvectors have a sign by chance. A fixed one makes equal images give equal tokenizers.
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return mean, (basis * largest.sign()).float().contiguous()


def square_sum(values: torch.Tensor) -> float:
    """The sum of the squares, without a copy."""
    return float(values.flatten() @ values.flatten())
