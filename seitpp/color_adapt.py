"""ColorAdapt: images of a batch exchange the statistics of their channels (SeiT++, ECCV 2024).

Changes of embeddings (B, d, h, w) float32, in place, with a generator argument, as in token_augment.py. Which change a
batch gets is numpy's draw, on the host; all else is drawn from the generator, on its device.
"""
from collections.abc import Callable

import numpy as np
import torch

from token_augment import EmbeddingNoise
from utils import InputError

HALF = 0.5  # of a batch gets the change that the batch gets, as published
SMALLEST = 1e-6  # deviation of a channel, as a part of its largest magnitude: below, it is rounding


class ColorAdapt:
    """Give floor(B·fraction) random images the mean and deviation, channel by channel, of a partner: image B - 1 - i.

    A channel that is constant over an image has no deviation to scale, and the published program makes it NaN; here it
    stays constant, at the partner's mean.
    """

    def __init__(self, fraction: float = HALF):
        self.fraction = fraction

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randperm(len(x), generator=generator, device=x.device)[:int(len(x) * self.fraction)]
        return color_adapt(x, chosen)


def color_adapt(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """ColorAdapt of the images `chosen` (n,) int64, by the statistics of the batch as it was; in place."""
    mean = x.mean((2, 3), keepdim=True)
    deviation = x.std((2, 3), keepdim=True, correction=0)  # which one makes no difference: it cancels
    constant = deviation <= SMALLEST * x.abs().amax((2, 3), keepdim=True)
    partner = len(x) - 1 - chosen
    ratio = torch.where(constant[chosen], 0, deviation[partner] / deviation[chosen])
    return x.index_copy_(0, chosen, (x[chosen] - mean[chosen]) * ratio + mean[partner])


class ColorChange:
    """One change for a batch: noise with one probability, ColorAdapt with another, or none; on half of its images.

    What SeiT++ does, and what the published program's --token-noise-prob has meant since: the chance of a batch.

    Args:
        noise_prob, color_prob: chances of the two.
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
        """The change of a batch, by numpy's global generator; nothing is drawn where both are off."""
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
    """(x, generator) -> x: the changes of a batch that a recipe of --noise-recipe names. Raises InputError.

    'v0.0': noise on floor(B·noise_prob) images of each batch, as in SeiT, and before it, by a chance of its own,
    ColorAdapt.
    'seit++': a ColorChange.
    """
    if name == 'seit++':
        return ColorChange(noise_prob, color_prob, channel_std, element_std)
    color = ColorChange(0., color_prob)
    noise = EmbeddingNoise(noise_prob, channel_std, element_std)
    return lambda x, generator: noise(color(x, generator), generator)
