"""Smaller sets of encoded images: how an image is made smaller, which are kept, and what a budget allows.

    sample   a fraction of each class is kept, with the bytes unchanged
    resize   both sides times a factor, by PIL, bicubic with its antialias; then a JPEG of quality 95
    jpeg     a JPEG at the image's own size, of a quality
    webp     a lossy WebP at the image's own size, of a quality
    avif     a lossy AVIF at the image's own size, of a quality

The last three may have a side too: an image whose short side is longer is first resized, so that it has that side.

Encoders are PIL's: a JPEG has one scan, its chroma at half the resolution, and Huffman tables made for the image, by
which small ones take a third less for the same pixels. An AVIF is libaom's, of speed 6 and with chroma at half the
resolution, which are PIL's defaults, and made by one thread, as more give other bytes. All images become RGB, and what
they hold beside pixels (EXIF, color profiles) is dropped, but by `sample`. A side that is longer than the format holds
is brought down to LONGEST, and the other with it; `write_set` says so.

Each method has one parameter. For a budget of bytes the largest parameter within it is found by bisection, on all
images or on some of them. Where sides are searched too, that is done at each, and the one is best whose images are
nearest to their sources. Worker processes make images, in chunks, and give them back in order.
"""
import contextlib
import ctypes
import io
import math
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, features
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
COMPARED = 500  # of them, on which sides are compared by PSNR, at most
AVIF_SPEED = 6  # of libaom, 0 to 10: PIL's default
EQUAL_PSNR = 100.  # what psnr gives for equal images
# Pixels on a side that libjpeg and libwebp write; libavif writes more, and reads this.
LONGEST = {'resize': 65500, 'jpeg': 65500, 'webp': 16383, 'avif': 32768}
ENDINGS = {'resize': '.jpg', 'jpeg': '.jpg', 'webp': '.webp', 'avif': '.avif'}
SIDED = 'jpeg', 'webp', 'avif'  # methods that may have a side
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
    'avif': Method(0, 100, 1, f'PIL, lossy AVIF by libaom, speed {AVIF_SPEED}, one thread, chroma 4:2:0, full range'),
}


def check_encoder(method: str) -> None:
    """InputError, naming what is missing, where this Pillow cannot write what a method makes."""
    if method == 'sample':
        return
    codec, missing = {'webp': ('webp', 'libwebp'), 'avif': ('avif', 'libavif')}.get(method, ('jpg', 'libjpeg'))
    with warnings.catch_warnings():  # an old Pillow warns of codecs that it does not know
        warnings.simplefilter('ignore')
        found = features.check(codec)
    if found:
        spec = METHODS[method]
        try:
            shrink(Image.new('RGB', (8, 8)), method, spec.parameter(spec.highest))
        except BadImage as error:  # a library may be built without its encoder
            missing = f'an encoder ({error})'
        else:
            return
    advice = 'install one that has it' + (', as those of PyPI do from 11.3 on' if method == 'avif' else '')
    raise InputError(f'--method {method}: this Pillow, {PIL.__version__}, lacks {missing}; {advice}, or take another '
                     'method')


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


def sides_of(image: Image.Image, method: str, parameter: float, side: int | None = None) -> list[int]:
    """Width and height that a method asks for, whether or not its format holds them.

    Args:
        image: whose sides become smaller.
        method, parameter: see METHODS.
        side: pixels of the short side, but where it has fewer; None to keep the size.
    """
    if method == 'resize':
        return [max(1, math.floor(pixels * parameter + 0.5)) for pixels in image.size]
    short = min(image.size)
    if side is None or short <= side:
        return list(image.size)
    return [(2 * pixels * side + short) // (2 * short) for pixels in image.size]  # rounded without floats


def shrink(image: Image.Image, method: str, parameter: float, side: int | None = None) -> bytes:
    """The file that an RGB image becomes by a method that encodes it. Raises BadImage where it cannot be written.

    Args:
        image: RGB, of any size.
        method, parameter: see METHODS; all but 'sample'.
        side: see `sides_of`.
    """
    file = io.BytesIO()
    quality = RESIZED_QUALITY if method == 'resize' else parameter
    try:
        sides = sides_of(image, method, parameter, side)
        if method == 'resize' or sides != list(image.size):
            image = image.resize(sides, Image.Resampling.BICUBIC)
        image = fit_sides(image, LONGEST[method])
        if method == 'webp':
            image.save(file, 'WEBP', quality=quality)
        elif method == 'avif':  # which would keep the source's color profile
            image.save(file, 'AVIF', quality=quality, speed=AVIF_SPEED, codec='aom', max_threads=1, icc_profile=None)
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
    if method == 'sample':
        measured = np.arange(len(source))
        sizes = source.sizes()
    else:
        measured = draw_images(len(source), SEARCHED, seed)

    def total_of(number: int) -> float:
        """Bytes that the set comes to, all images together."""
        parameter = spec.parameter(number)
        if method == 'sample':
            total = int(sizes[sample_classes(source.labels, parameter, seed)].sum())
        else:
            smaller = ShrunkImages(source, measured, method, parameter, max_pixels, only_sizes=True)
            total = measure_total(smaller, workers)
        print0(f'{method} {parameter:g}: {total:,.0f} bytes, {total / len(source):,.1f} an image of the source')
        return total
    number = largest_within(spec.lowest, spec.highest, total_of, budget)
    if number == spec.highest:
        print0(f'note: the largest parameter, {spec.parameter(number):g}, keeps within the budget')
    return spec.parameter(number), len(measured)


def draw_images(count: int, most: int, seed: int) -> np.ndarray:
    """Numbers of at most `most` of `count` images, rising; of one seed, fewer are some of more."""
    if count <= most:
        return np.arange(count)
    return np.sort(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].numpy())


def measure_total(smaller: 'ShrunkImages', workers: int) -> float:
    """Bytes that all images of a source come to, by those that are made smaller. Raises InputError."""
    size = sum(image.size for image in shrink_images(smaller, workers))
    return size * len(smaller.source) / smaller.image_count


class Side(NamedTuple):
    """What the search within a budget came to at one side.

    Attributes:
        side: pixels of short sides.
        parameter: the largest within the budget; None where the lowest exceeds it.
        bytes_per_image: with that parameter, or with the lowest.
        psnr: mean, in dB, at the sources' sizes; None without a parameter.
    """
    side: int
    parameter: int | None
    bytes_per_image: float
    psnr: float | None


def search_sides(source: Source, method: str, sides: list[int], budget: float, seed: int, workers: int,
                 max_pixels: int | None) -> tuple[list[Side], int, int]:
    """The largest parameter within a budget at each side, and how near the images then are to their sources.

    Args:
        source, method, budget, seed, workers, max_pixels: see `find_parameter`; the method is one of SIDED.
        sides: pixels of short sides.

    Returns:
        What each side came to, on how many images their bytes were measured, and on how many PSNR.

    Raises:
        InputError: naming an image that cannot be read.
    """
    measured = draw_images(len(source), SEARCHED, seed)
    compared = draw_images(len(source), min(COMPARED, SEARCHED), seed)
    found = [_search_side(source, method, side, budget, measured, compared, workers, max_pixels) for side in sides]
    return found, len(measured), len(compared)


def _search_side(source: Source, method: str, side: int, budget: float, measured: np.ndarray, compared: np.ndarray,
                 workers: int, max_pixels: int | None) -> Side:
    spec = METHODS[method]
    totals = {}

    def total_of(number: int) -> float:
        """Bytes that the set comes to, all images together."""
        totals[number] = measure_total(ShrunkImages(source, measured, method, number, max_pixels, True, side), workers)
        return totals[number]
    try:
        quality = largest_within(spec.lowest, spec.highest, total_of, budget)
    except Unreachable as limits:
        least = limits.least / len(source)
        print0(f'{method}, side {side}: {least:,.1f} bytes an image at least, which exceeds the budget: left out')
        return Side(side, None, least, None)
    images = shrink_images(ShrunkImages(source, compared, method, quality, max_pixels, side=side), workers)
    mean_psnr = math.fsum(image.psnr for image in images) / len(compared)
    size = totals[quality] / len(source)
    print0(f'{method}, side {side}: quality {quality}, {size:,.1f} bytes an image, PSNR {mean_psnr:.2f} dB')
    return Side(side, quality, size, mean_psnr)


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
        side: see `sides_of`.
    """

    def __init__(self, source: Source, images: np.ndarray, method: str, parameter: float,
                 max_pixels: int | None = None, only_sizes: bool = False, side: int | None = None):
        self.source = source
        self.image_count = len(images)
        self.chunks = [images[first:first + CHUNK] for first in range(0, len(images), CHUNK)]
        self.method = method
        self.parameter = parameter
        self.max_pixels = max_pixels
        self.only_sizes = only_sizes
        self.side = side

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
        data = shrink(image, self.method, self.parameter, self.side)
        ending = ENDINGS[self.method]
        if self.only_sizes:
            return Shrunk(b'', ending, len(data), None, math.nan, oriented=orientation != UPRIGHT)
        fitted = max(sides_of(image, self.method, self.parameter, self.side)) > LONGEST[self.method]
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
