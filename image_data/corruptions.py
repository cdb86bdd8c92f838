"""ImageNet-C's corruptions (Hendrycks & Dietterich 2019), with the published strengths for severities 1 to 5.

An image's corruption is a function of (seed, name, severity, number of the image): the same in any batch, order,
worker process or rank. Here are those that need no outside data; frost, fog, snow, and the motion, zoom and glass blurs
are not. The code is our own, on numpy and PIL: the packages that have it, imagecorruptions and imagenet-c, fail with
today's numpy and scikit-image.

What differs from the published image set, which nothing here reads:

* The set was made of 224 x 224 pixels, the middle of images resized to 256. Here an image is corrupted at the size that
  the program decodes it to (--tokenizer-input-size of evaluate_on_images.py), before any crop. Blurs keep their
  published radii in pixels of that size; nothing is scaled. With 256 pixels, of which the model reads the middle 224,
  content and blur have the published scale. Smaller images are blurred more: in 64 pixels the published radii cover
  3.5 times as much of the picture.
* The set was saved as JPEG of quality 85, which softens noise a little. Here pixels go to the model as they are.
"""
import io
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from flags import Parser, integer
from utils import InputError

# Strengths by severity, from 1 to 5.
GAUSSIAN_NOISE = .08, .12, .18, .26, .38  # standard deviation; values are in [0, 1]
SHOT_NOISE = 60, 25, 12, 5, 3  # photons that make white
IMPULSE_NOISE = .03, .06, .09, .17, .27  # part of the values
SPECKLE_NOISE = .15, .2, .35, .45, .6  # standard deviation, as a part of the value
GAUSSIAN_BLUR = 1, 2, 3, 4, 6  # standard deviation in pixels
DEFOCUS_BLUR = (3, .1), (4, .5), (6, .5), (8, .5), (10, .5)  # radius in pixels, deviation that softens the disk's edge
CONTRAST = .4, .3, .2, .1, .05  # part that is left
BRIGHTNESS = .1, .2, .3, .4, .5  # added to HSV's value
SATURATE = (.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2)  # factor and summand of HSV's saturation
JPEG_QUALITY = 25, 18, 15, 10, 7
PIXELATE = .6, .5, .4, .3, .25  # part of each side that is left

GAUSSIAN_CUT = 4  # standard deviations at which a Gaussian blur ends


# ---------------------------------------------------------------- noise: values (H, W, 3) float64 in [0, 1]

def _gaussian_noise(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    return x + rng.normal(scale=GAUSSIAN_NOISE[severity - 1], size=x.shape)


def _shot_noise(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    photons = SHOT_NOISE[severity - 1]
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    hit = rng.random(x.shape) < IMPULSE_NOISE[severity - 1]  # each color on its own, as published
    salt = rng.random(x.shape) < .5
    return np.where(hit, salt.astype(x.dtype), x)


def _speckle_noise(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    return x + x * rng.normal(scale=SPECKLE_NOISE[severity - 1], size=x.shape)


# ---------------------------------------------------------------- blur

def _gaussian_blur(x: np.ndarray, severity: int, _: np.random.Generator) -> np.ndarray:
    sigma = GAUSSIAN_BLUR[severity - 1]
    weights = _gaussian(int(GAUSSIAN_CUT * sigma + .5), sigma)
    return _filter(x, np.outer(weights, weights), 'edge')


def _defocus_blur(x: np.ndarray, severity: int, _: np.random.Generator) -> np.ndarray:
    return _filter(x, _disk(*DEFOCUS_BLUR[severity - 1]), 'reflect')


def _gaussian(radius: int, sigma: float) -> np.ndarray:
    """Weights (2·radius + 1,) of a Gaussian, with sum 1."""
    weights = np.exp(-np.arange(-radius, radius + 1) ** 2 / (2 * sigma ** 2))
    return weights / weights.sum()


def _disk(radius: int, sigma: float) -> np.ndarray:
    """A disk as a kernel, with a softened edge.

    Where the disk touches the kernel's border (radius 8 and 10) the sum is 1.3 % and 1.1 % above 1, because the border
    is mirrored when the edge is softened. So it is in the published program, and so it stays.
    """
    half = max(radius, 8)
    steps = np.arange(-half, half + 1) ** 2
    disk = (steps[:, None] + steps <= radius ** 2).astype(np.float64)
    weights = _gaussian(1 if radius <= 8 else 2, sigma)
    return _filter((disk / disk.sum())[..., None], np.outer(weights, weights), 'reflect')[..., 0]


def _filter(x: np.ndarray, kernel: np.ndarray, border: str) -> np.ndarray:
    """Convolve each channel of x (H, W, C) with a symmetric kernel (k, k); beyond the border as np.pad's mode has it.

    By FFT in float64: exact to 1e-15, and the same in any number of threads, as torch's convolution would not be.
    """
    height, width, _ = x.shape
    radius = kernel.shape[0] // 2
    padded = np.pad(x, ((radius, radius), (radius, radius), (0, 0)), mode=border)
    shape = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, shape)[..., None]
    # what wraps around lies in the first 2·radius rows and columns
    return np.fft.irfft2(spectrum, shape, axes=(0, 1))[2 * radius:, 2 * radius:][:height, :width]


# ---------------------------------------------------------------- light and color

def _contrast(x: np.ndarray, severity: int, _: np.random.Generator) -> np.ndarray:
    means = x.mean((0, 1))  # of each color
    return (x - means) * CONTRAST[severity - 1] + means


def _brightness(x: np.ndarray, severity: int, _: np.random.Generator) -> np.ndarray:
    value = x.max(2, keepdims=True)  # HSV's
    raised = np.minimum(value + BRIGHTNESS[severity - 1], 1)
    # with hue and saturation as they were, colors grow in proportion; black, which has none, becomes gray
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def _saturate(x: np.ndarray, severity: int, _: np.random.Generator) -> np.ndarray:
    factor, summand = SATURATE[severity - 1]
    value = x.max(2, keepdims=True)
    depth = value - x  # (H, W, 3), in proportion to the saturation while hue and value stay
    largest = depth.max(2, keepdims=True)  # saturation · value
    saturation = largest / np.where(value > 0, value, 1)
    changed = np.clip(saturation * factor + summand, 0, 1)
    # gray has no hue: it counts as red, as in the published program
    direction = np.where(largest > 0, depth / np.where(largest > 0, largest, 1), np.array([0., 1, 1]))
    return value - direction * changed * value


# ---------------------------------------------------------------- by PIL: images (H, W, 3) uint8

def _jpeg_compression(image: Image.Image, severity: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, 'JPEG', quality=JPEG_QUALITY[severity - 1])
    return Image.open(data)


def _pixelate(image: Image.Image, severity: int) -> Image.Image:
    part = PIXELATE[severity - 1]
    small = image.resize([max(int(side * part), 1) for side in image.size], Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BOX)


# ---------------------------------------------------------------- all

ON_VALUES = {
    'gaussian_noise': _gaussian_noise, 'shot_noise': _shot_noise, 'impulse_noise': _impulse_noise,
    'speckle_noise': _speckle_noise, 'gaussian_blur': _gaussian_blur, 'defocus_blur': _defocus_blur,
    'contrast': _contrast, 'brightness': _brightness, 'saturate': _saturate,
}
ON_IMAGES = {'jpeg_compression': _jpeg_compression, 'pixelate': _pixelate}
CORRUPTIONS = (*ON_VALUES, *ON_IMAGES)
SEVERITIES = 5


def corrupt(pixels: torch.Tensor, name: str, severity: int, seed: int = 0, index: int = 0) -> torch.Tensor:
    """Corrupt one image.

    Args:
        pixels: (3, H, W) uint8, on the CPU; left as it is.
        name: one of CORRUPTIONS.
        severity: 1 to 5.
        seed: 0 or more.
        index: number of the image in its set; with the others it decides what is drawn.

    Returns:
        (3, H, W) uint8.

    Raises:
        InputError: for another name or severity.
    """
    if name not in CORRUPTIONS:
        raise InputError(f'unknown corruption {name!r}; there are {", ".join(CORRUPTIONS)}')
    if severity not in range(1, SEVERITIES + 1):
        raise InputError(f'corruption {name}: severity {severity} is not from 1 to {SEVERITIES}')
    image = pixels.permute(1, 2, 0).numpy()
    if name in ON_IMAGES:
        changed = np.array(ON_IMAGES[name](Image.fromarray(image), severity))
    else:
        # crc32 and not hash(), which Python draws anew in each process
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), severity, index])
        values = ON_VALUES[name](image / 255, severity, rng)
        # cut off, not rounded, as published. The sum of 1e-4 keeps a value that should be 100 from becoming 99
        changed = (np.clip(values, 0, 1) * 255 + 1e-4).astype(np.uint8)
    return torch.from_numpy(changed).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Corruption:
    """`corrupt` with all but the image given: (pixels, index) -> pixels."""
    name: str
    severity: int
    seed: int = 0

    def __call__(self, pixels: torch.Tensor, index: int) -> torch.Tensor:
        return corrupt(pixels, self.name, self.severity, self.seed, index)

    def __str__(self) -> str:
        return f'{self.name} of severity {self.severity}, seed {self.seed}'


# ---------------------------------------------------------------- flags

def add_robustness_flags(parser: Parser) -> None:
    """The flags of programs that evaluate on other images than those of training.

    `make_corruption` reads --corruption and --severity, `class_subsets.read_classes` reads --classes.
    """
    add = parser.add_group('robustness')
    add('--corruption', choices=CORRUPTIONS, metavar='NAME',
        help='corrupt each image after resizing, as ImageNet-C does; NAME is one of ' + ', '.join(CORRUPTIONS))
    add('--severity', type=integer(1, SEVERITIES), metavar='N',
        help=f'how strong --corruption is, from 1 to {SEVERITIES}')
    add('--classes', metavar='imagenet|imagenet-a|imagenet-r|imagenet-sketch|FILE',
        help="compare only the scores of these of the model's classes, which must be the classes of the images; a FILE "
             'holds a class a line, by its name or its number in the model')


def make_corruption(name: str | None, severity: int | None, seed: int) -> Corruption | None:
    """What --corruption and --severity ask for, or None where neither is given. Raises InputError for one alone."""
    if name is None and severity is None:
        return None
    if name is None:
        raise InputError(f'--severity {severity}: name a --corruption; there are {", ".join(CORRUPTIONS)}')
    if severity is None:
        raise InputError(f'--corruption {name}: give a --severity from 1 to {SEVERITIES} too')
    return Corruption(name, severity, seed)
