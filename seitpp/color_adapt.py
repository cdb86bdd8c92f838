"""ColorAdapt: images of a batch exchange the statistics of their channels (SeiT++, ECCV 2024).

Changes of embeddings (B, d, h, w) float32, in place, with a generator argument, as in token_augment.py. Which change a
batch gets is drawn by numpy on the host, so that a change that is not drawn costs nothing; all else is drawn from the
generator, on its device. Programs call `color_recipe` or make a `ColorChange`; `color_adapt` is the formula.
"""
from collections.abc import Callable

import numpy as np
import torch

from token_augment import EmbeddingNoise
from utils import InputError

HALF = 0.5  # fraction of a batch's images that get the change of the batch, as published
SMALLEST = 1e-6  # a channel's deviation over its largest magnitude; below this it is only rounding


class ColorAdapt:
    """Give floor(B·fraction) random images the mean and deviation, channel by channel, of a partner: image B - 1 - i.

    A channel that is constant over an image has no deviation to scale, and the published program makes it NaN; here it
    stays constant, at the partner's mean.
    """

    def __init__(self, fraction: float = HALF):
        self.fraction = fraction

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        images = torch.randperm(len(x), generator=generator, device=x.device)[:int(len(x) * self.fraction)]
        return color_adapt(x, images)


def color_adapt(x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """ColorAdapt of some images (n,) int64, by the statistics of the batch before any change; in place."""
    mean = x.mean((2, 3), keepdim=True)
    deviation = x.std((2, 3), keepdim=True, correction=0)  # the divisor cancels in the ratio
    constant = deviation <= SMALLEST * x.abs().amax((2, 3), keepdim=True)
    partner = len(x) - 1 - images
    ratio = torch.where(constant[images], 0, deviation[partner] / deviation[images])
    return x.index_copy_(0, images, (x[images] - mean[images]) * ratio + mean[partner])


class ColorChange:
    """One change for a batch: noise with one probability, ColorAdapt with another, or none; on half of its images.

    This is the recipe of SeiT++. Since then --token-noise-prob means the chance of a batch in the published program,
    where it meant a fraction of images in SeiT.

    Args:
        noise_prob, color_prob: chances of a batch to get one or the other.
        channel_std, element_std: of the noise, see token_augment.EmbeddingNoise.

    Raises:
        InputError: when the chances add up to more than 1.
    """

    def __init__(self, noise_prob: float, color_prob: float, channel_std: float = 1., element_std: float = 1.):
        if noise_prob + color_prob > 1:
            raise InputError(f'--token-noise-prob {noise_prob} and --token-coloradapt-prob {color_prob} add up to more '
                             'than 1: a batch gets one of the two')
        self.noise_prob = noise_prob
        self.color_prob = color_prob
        self.noise = EmbeddingNoise(HALF, channel_std, element_std)
        self.color_adapt = ColorAdapt()

    def draw(self) -> EmbeddingNoise | ColorAdapt | None:
        """The change of a batch, or None, drawn by numpy's global generator.

        Where both are off no number is drawn, so that the draws of Mixup, from the same generator, stay the same.
        """
        if not self.noise_prob + self.color_prob:
            return None
        number = np.random.random()
        if number < self.noise_prob:
            return self.noise
        return self.color_adapt if number < self.noise_prob + self.color_prob else None

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        change = self.draw()
        return change(x, generator) if change else x


def color_recipe(name: str, noise_prob: float, color_prob: float, channel_std: float, element_std: float) -> Callable:
    """A function (x, generator) -> x with the changes of a recipe of --noise-recipe. Raises InputError.

    'v0.0': noise on floor(B·noise_prob) images of each batch, as in SeiT, and before it, by a chance of its own,
    ColorAdapt.
    'seit++': a ColorChange.
    """
    if name == 'seit++':
        return ColorChange(noise_prob, color_prob, channel_std, element_std)
    color = ColorChange(0., color_prob)
    noise = EmbeddingNoise(noise_prob, channel_std, element_std)
    return lambda x, generator: noise(color(x, generator), generator)
