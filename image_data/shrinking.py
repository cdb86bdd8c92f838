"""Smaller sets of encoded images: how an image is made smaller, which are kept, and what a budget allows.

    sample   a fraction of each class is kept, with the bytes unchanged
    resize   both sides times a factor, by PIL, bicubic with its antialias; then a JPEG of quality 95
    jpeg     a JPEG at the image's own size, of a quality
    webp     a lossy WebP at the image's own size, of a quality

Encoders are PIL's: a JPEG has one scan, its chroma at half the resolution, and Huffman tables made for the image, by
which small ones take a third less for the same pixels. All images become RGB, and what they hold beside pixels (EXIF,
color profiles) is dropped, but by `sample`. A side that is longer than the format holds is brought down to LONGEST, and
the other with it; `write_set` says so.

Each method has one parameter. For a budget of bytes the largest parameter within it is found by bisection, on all
images or on some of them; worker processes make them, in chunks, and give them back in order.
"""
import contextlib
import ctypes
import io
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from image_data.decoding import (UPRIGHT, BadImage, bare_bytes, decode_oriented, decode_rgb, fit_sides,
                                 image_extensions, image_formats, is_image, pixels_of)
from image_data.quality import psnr
from image_data.sources import Source, next_batch
from image_data.workers import plan_workers
from utils import InputError, print0

RESIZED_QUALITY = 95  # of the JPEGs that resized images become
STEPS = 1000  # in which fractions and factors are searched
SEARCHED = 2000  # images on which a budget's parameter is searched, at most
EQUAL_PSNR = 100.  # what psnr gives for equal images
LONGEST = {'resize': 65500, 'jpeg': 65500, 'webp': 16383}  # pixels on a side that libjpeg and libwebp write
CHUNK = 32  # images that a process makes at a time


class Method(NamedTuple):
    """A way to make image sets smaller.

    Attributes:
        lowest, highest: whole numbers between which a budget's parameter is searched.
        scale: what they are divided by; 1 where the parameter is a whole number.
        encoder: what writes the images, for the manifest.
    """
    lowest: int
    highest: int
    scale: int
    encoder: str

    def parameter(self, number: int) -> float | int:
        """The parameter of a number: 500 is a fraction of 0.5."""
        return number if self.scale == 1 else number / self.scale


METHODS = {
    'sample': Method(1, STEPS, STEPS, 'none: bytes unchanged'),
    'resize': Method(1, STEPS, STEPS, f'PIL, bicubic; JPEG of quality {RESIZED_QUALITY}, chroma 4:2:0, optimized'),
    'jpeg': Method(1, 95, 1, 'PIL, JPEG, chroma 4:2:0, optimized'),
    'webp': Method(0, 100, 1, 'PIL, lossy WebP'),
}


def check_parameter(method: str, parameter: float) -> float | int:
    """The parameter, as a whole number where the method takes those. Raises InputError for one it does not take."""
    spec = METHODS[method]
    if spec.scale > 1:
        if not 0 < parameter <= 1:
            raise InputError(f'--parameter {parameter:g}: {method} takes more than 0, and 1 at most')
        return parameter
    if parameter != int(parameter) or not spec.lowest <= parameter <= spec.highest:
        raise InputError(f'--parameter {parameter:g}: {method} takes a whole number from {spec.lowest} to '
                         f'{spec.highest}')
    return int(parameter)


# ---------------------------------------------------------------- one image

class Shrunk(NamedTuple):
    """An image made smaller.

    Attributes:
        data: of the file; b'' where only its size was asked for.
        ending: of its name, as in '.jpg'.
        size: bytes of the file.
        bare: bytes without headers (decoding.bare_bytes), or None.
        psnr: against the source at the source's size, in dB; NaN where it was not asked for.
        fitted: whether a side was longer than LONGEST.
        oriented: whether the source's EXIF orientation is not upright.
    """
    data: bytes
    ending: str
    size: int
    bare: int | None
    psnr: float
    fitted: bool = False
    oriented: bool = False


def sides_of(image: Image.Image, method: str, parameter: float) -> list[int]:
    """Width and height that a method asks for, whether or not its format holds them."""
    return [max(1, math.floor(side * parameter + 0.5)) if method == 'resize' else side for side in image.size]


def shrink(image: Image.Image, method: str, parameter: float) -> bytes:
    """The file that an RGB image becomes by 'resize', 'jpeg' or 'webp'. Raises BadImage where it cannot be written."""
    file = io.BytesIO()
    quality = RESIZED_QUALITY if method == 'resize' else parameter
    try:
        if method == 'resize':
            image = image.resize(sides_of(image, method, parameter), Image.Resampling.BICUBIC)
        image = fit_sides(image, LONGEST[method])
        if method == 'webp':
            image.save(file, 'WEBP', quality=quality)
        else:
            image.save(file, 'JPEG', quality=quality, optimize=True)
    except (OSError, ValueError) as error:
        raise BadImage(f'{image.width} x {image.height} pixels cannot be written as {method}: {error}') from None
    return file.getvalue()


def psnr_of(image: Image.Image, data: bytes) -> float:
    """PSNR, in dB, of an encoded image against an RGB one, at whose size it is compared (bicubic)."""
    other = decode_rgb(data, image.width * image.height)
    if other.size != image.size:
        other = other.resize(image.size, Image.Resampling.BICUBIC)
    return float(psnr(pixels_of(image)[None] / 255, pixels_of(other)[None] / 255))


def ending_of(name: str, data: bytes) -> str:
    """The ending for an unchanged image: its own, or that of its format. Raises BadImage."""
    if is_image(name):
        return PurePath(name).suffix
    try:
        with Image.open(io.BytesIO(data), formats=image_formats()) as image:
            ending = {'JPEG': '.jpg', 'TIFF': '.tif'}.get(image.format, f'.{image.format.lower()}')
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise BadImage('no image of a kind that is read') from None
    if ending not in image_extensions():
        raise BadImage(f'its format, {image.format}, has no ending that is read')
    return ending


# ---------------------------------------------------------------- which images are kept

def sample_classes(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """The images, rising, of a fraction of each class: rounded, one at least; a larger fraction has all of a smaller.

    Args:
        labels: (N,) of the images.
        fraction: above 0, 1 at most.
        seed: of the draw.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
    # One random order of all images, of which each class keeps its first ones: so a larger fraction only adds images,
    # and the sets of a table are nested.
    by_class = order[np.argsort(labels[order], kind='stable')]
    counts = np.unique(labels, return_counts=True)[1]
    positions = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each within its class
    kept = np.maximum(1, np.floor(counts * fraction + 0.5))
    return np.sort(by_class[positions < np.repeat(kept, counts)])


# ---------------------------------------------------------------- budgets

class Unreachable(Exception):
    """No number keeps within the budget; `least` and `most` are what the lowest and the highest come to."""

    def __init__(self, least: float, most: float):
        super().__init__(f'{least} to {most}')
        self.least = least
        self.most = most


def largest_within(lowest: int, highest: int, measure: Callable[[int], float], budget: float) -> int:
    """The largest whole number whose measure does not exceed the budget, by bisection.

    Args:
        lowest, highest: of the numbers.
        measure: of a number; rises with it.
        budget: in what `measure` gives.

    Raises:
        Unreachable: when the lowest exceeds the budget too.
    """
    # Both ends first: most budgets are larger than the set, or smaller than anything, by a mistake in the unit.
    most = measure(highest)
    if most <= budget:
        return highest
    least = measure(lowest)
    if least > budget:
        raise Unreachable(least, most)
    while highest - lowest > 1:
        middle = (lowest + highest) // 2
        if measure(middle) <= budget:
            lowest = middle
        else:
            highest = middle
    return lowest


def find_parameter(source: Source, method: str, budget: float, seed: int, workers: int,
                   max_pixels: int | None) -> tuple[float | int, int]:
    """The largest parameter whose set keeps within a budget, and on how many images it was measured.

    Args:
        source: of the images.
        method: of METHODS.
        budget: bytes of all files together.
        seed: draws the images that are kept, and those that are measured where there are more than SEARCHED.
        workers: processes that make images smaller.
        max_pixels: larger images cannot be read; None for PIL's limit.

    Raises:
        InputError: naming an image that cannot be read.
        Unreachable: when no parameter keeps within the budget.
    """
    spec = METHODS[method]
    measured = np.arange(len(source))
    if method == 'sample':
        sizes = source.sizes()
    elif len(source) > SEARCHED:
        measured = np.sort(torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:SEARCHED])

    def total_of(number: int) -> float:
        """Bytes that the set comes to, all images together."""
        parameter = spec.parameter(number)
        if method == 'sample':
            total = int(sizes[sample_classes(source.labels, parameter, seed)].sum())
        else:
            smaller = ShrunkImages(source, measured, method, parameter, max_pixels, only_sizes=True)
            total = sum(image.size for image in shrink_images(smaller, workers)) * len(source) / len(measured)
        print0(f'{method} {parameter:g}: {total:,.0f} bytes, {total / len(source):,.1f} an image of the source')
        return total
    number = largest_within(spec.lowest, spec.highest, total_of, budget)
    if number == spec.highest:
        print0(f'note: the largest parameter, {spec.parameter(number):g}, keeps within the budget')
    return spec.parameter(number), len(measured)


# ---------------------------------------------------------------- in worker processes

class ShrunkImages(Dataset):
    """Images of a source made smaller, in chunks of CHUNK, for a DataLoader.

    An item is a list of Shrunk; or a text: which image cannot be read, and why.

    Args:
        source: of the images.
        images: (N,) numbers in the source.
        method, parameter: see METHODS.
        max_pixels: larger images cannot be read; None for PIL's limit.
        only_sizes: leave the files' bytes and PSNR out.
    """

    def __init__(self, source: Source, images: np.ndarray, method: str, parameter: float,
                 max_pixels: int | None = None, only_sizes: bool = False):
        self.source = source
        self.chunks = [images[first:first + CHUNK] for first in range(0, len(images), CHUNK)]
        self.method = method
        self.parameter = parameter
        self.max_pixels = max_pixels
        self.only_sizes = only_sizes

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> list[Shrunk] | str:
        smaller = []
        for i in map(int, self.chunks[number]):
            try:
                smaller.append(self._shrink(i))
            except OSError as error:
                return f'{self.source.names[i]} is no readable image ({error.strerror or error})'
            except (BadImage, InputError) as error:
                return f'{self.source.names[i]} is no readable image ({error})'
        return smaller

    def _shrink(self, i: int) -> Shrunk:
        data = self.source.read(i)
        if self.method == 'sample':
            return Shrunk(data, ending_of(self.source.names[i], data), len(data), bare_bytes(data), EQUAL_PSNR)
        image, orientation = decode_oriented(data, self.max_pixels, self.source.exif_rotate)
        data = shrink(image, self.method, self.parameter)
        ending = '.webp' if self.method == 'webp' else '.jpg'
        if self.only_sizes:
            return Shrunk(b'', ending, len(data), None, math.nan, oriented=orientation != UPRIGHT)
        fitted = max(sides_of(image, self.method, self.parameter)) > LONGEST[self.method]
        return Shrunk(data, ending, len(data), bare_bytes(data), psnr_of(image, data), fitted,
                      orientation != UPRIGHT)


def shrink_images(smaller: ShrunkImages, workers: int) -> Iterator[Shrunk]:
    """Yield images made smaller, in order, by worker processes. Raises InputError for one that cannot be read."""
    image_formats()  # PIL's list is made once, before the processes fork
    processes, ahead = plan_workers(min(workers, len(smaller)), 0)  # nothing passes through shared memory
    loader = iter(DataLoader(smaller, batch_size=None, num_workers=processes, collate_fn=_unchanged,
                             prefetch_factor=ahead if processes else None,
                             multiprocessing_context='fork' if processes else None, generator=torch.Generator(),
                             worker_init_fn=_end_with_parent))
    for number in range(len(smaller)):
        chunk = next_batch(loader, smaller.source)
        if isinstance(chunk, str):
            raise InputError(f'{smaller.source.data_path}: {chunk}: replace or remove it')
        if smaller.source.oriented:
            oriented = [i for i, image in zip(smaller.chunks[number], chunk) if image.oriented]
            smaller.source.oriented.add(smaller.source, oriented, number == len(smaller) - 1)
        yield from chunk


def _end_with_parent(_: int) -> None:
    """Let the kernel end this process when its parent is killed: else it waits for ever to hand over its images."""
    with contextlib.suppress(OSError, AttributeError):  # no Linux
        set_parent_death_signal = 1  # of sys/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _unchanged(chunk: list[Shrunk] | str) -> list[Shrunk] | str:
    return chunk
