"""The two halves of a batch of SeiT++: one is augmented as embeddings, the other by TokenAdapt (SeiT++, ECCV 2024).

The first half is cropped among the embeddings of codes, as in SeiT. The second is converted, flipped, mapped and
cropped as an image is, and becomes codes again. Where images are mixed, each half is mixed within itself, because
an image of the second has FINER times as many positions on a side.
"""
import copy
from pathlib import Path

import torch
from timm.data import Mixup

from seitpp.token_adapt import FINER, RandomGeometry, TokenAdapt, crop_embeddings, load_token_adapt
from token_augment import RandomResizedCrop
from token_files.codebook import look_up, nearest_codes_of
from utils import InputError

ADAPTED_MIXUP = 0.8  # Mixup's alpha in TokenAdapt's half, whatever the first half has, as published


def check_halves(batch_size: int, mixed: bool) -> None:
    """InputError for a batch that cannot be cut into two halves, or whose halves cannot be `mixed`."""
    unit = 4 if mixed else 2
    if batch_size % unit:
        near = max(unit, batch_size // unit * unit)
        reason = 'each half is mixed with its mirror image' if mixed else 'half of it goes through TokenAdapt'
        raise InputError(f'--batch-size {batch_size}: {reason}: give a multiple of {unit}, such as {near}')


def adapted_mixup(mixup: Mixup) -> Mixup:
    """The mixing of TokenAdapt's half, for that of the first half: Mixup as well, with an alpha of its own."""
    mixup = copy.copy(mixup)
    mixup.mixup_alpha = ADAPTED_MIXUP
    return mixup


class TokenHalves:
    """Augment a batch in halves; of an odd batch the first has one more.

    Args:
        token_adapt: frozen, on the device.
        codebook: (K, d) float32, on the device.
        crop: of the first half.
        finer_crop: of the second, for sides twice as long.
        mixup: of the first half, by timm, or None: nothing is mixed.
    """

    def __init__(self, token_adapt: TokenAdapt, codebook: torch.Tensor, crop: RandomResizedCrop,
                 finer_crop: RandomResizedCrop, mixup: Mixup | None = None):
        self.token_adapt = token_adapt
        self.codebook = codebook
        self.crop = crop
        self.geometry = RandomGeometry(finer_crop.draw, finer_crop.size)
        self.mixups = (mixup, adapted_mixup(mixup)) if mixup else None

    def augment(self, x: torch.Tensor, targets: torch.Tensor | None, generator: torch.Generator) -> tuple:
        """Embeddings (B, d, g, g) to those of the first half (n, d, s, s) and codes of the second (B - n, s, s) int64.

        Also returns the targets: labels (B,) become (B, classes) float32 where images are mixed, else they stay.
        """
        first, second = x.chunk(2)
        first = crop_embeddings(first, self.crop.draw(len(first), generator), self.crop.size)
        second = self.geometry(self.token_adapt.convert(second), generator)
        if self.mixups:
            # timm mixes an image with its mirror image in what it is given, so with one of the same half
            mixed = [mixup(half, labels) for mixup, half, labels in zip(self.mixups, (first, second), targets.chunk(2))]
            first, second = (half for half, _ in mixed)
            targets = torch.cat([half_targets for _, half_targets in mixed])
        return first, self.token_adapt.to_codes(second), targets

    def codes(self, x: torch.Tensor, targets: torch.Tensor | None, generator: torch.Generator) -> tuple:
        """Embeddings (B, d, g, g) and labels -> codes (B, s, s) int64, the nearest rows' in the first half; targets."""
        first, codes, targets = self.augment(x, targets, generator)
        return torch.cat([nearest_codes_of(first, self.codebook), codes]), targets

    def embeddings(self, x: torch.Tensor, targets: torch.Tensor | None, generator: torch.Generator) -> tuple:
        """Embeddings (B, d, g, g) and labels -> (B, d, s, s), codebook rows in the second half only; targets."""
        first, codes, targets = self.augment(x, targets, generator)
        return torch.cat([first, look_up(codes, self.codebook)]), targets


def open_halves(path: str | Path, codebook: torch.Tensor, crop: RandomResizedCrop, mixup: Mixup | None,
                batch_size: int, device: torch.device) -> TokenHalves | None:
    """TokenHalves by the TokenAdapt in a file, or None for the path ''.

    Args:
        path: see token_adapt.load_token_adapt.
        codebook: (K, d) float32.
        crop, mixup: see TokenHalves.
        batch_size, device: of the batches to come.

    Raises:
        InputError: for a bad file, or a batch that cannot be split.
    """
    if not path:
        return None
    check_halves(batch_size, bool(mixup))
    # the same distribution of boxes, on a grid of FINER x FINER positions for each code
    finer_crop = copy.copy(crop)
    finer_crop.grid_size *= FINER
    finer_crop.size *= FINER
    return TokenHalves(load_token_adapt(path, codebook).to(device), codebook.to(device), crop, finer_crop, mixup)
