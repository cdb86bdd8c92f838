"""Training TokenAdapt: codes of an image and of what is made of it, and how many of the latter come out right.

How the published TokenAdapt was trained is not known; this is our procedure. An image is tokenized, and so is the same
image flipped, mapped, cropped and perhaps mixed with another, in pixels. TokenAdapt does the same to the first codes,
converted, and learns by cross-entropy to give the second. What maps leave empty is black.

A `Change` is what is done to a batch; `CodePairs` makes the codes on both sides and the loss; `evaluate_token_adapt`
counts the codes that come out right, beside what merely moving the codes would give.
"""
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fileio.files import save_torch, write_text
from image_tokenizer.tokenizers import find_codes, unit_range
from seitpp.token_adapt import (ANGLE, FINER, SHEAR, SHIFT, Geometry, RandomGeometry, TokenAdapt, apply_geometry,
                                manifest_of)
from token_files.codebook import look_up
from utils import InputError, autocast, device_of_sums, print0, rank, seed_step, sum_over_ranks

IMAGES_PER_CHANGE = 16  # images that are measured under the same maps
MEASURED = ('none', 'flip', 'rotate', 'shift', 'shear', 'crop', 'mixup', 'all')


class Change(NamedTuple):
    """What is made of a batch of images.

    Attributes:
        geometry: for images of FINER pixels a code.
        kept: weight of each image, 0 to 1, in its mixture with the image at the mirrored position in the batch; 1 for
            no mixing.
    """
    geometry: Geometry
    kept: float = 1.

    @torch.compiler.disable  # --compile would compile anew for each change
    def apply(self, x: torch.Tensor, size: int, finer: int = 1) -> torch.Tensor:
        """Images (B, c, S, S) float32 -> (B, c, size, size); `finer` times as many pixels a code as converted ones."""
        x = apply_geometry(x, self.geometry.times(finer), size)
        return x if self.kept == 1 else x * self.kept + x.flip(0) * (1 - self.kept)


class CodePairs:
    """Codes of images, and of what is made of them.

    Args:
        tokenizer: frozen, on the device, see image_tokenizer/tokenizers.py.
        codebook: (K, d) float32, on the device.
        grid_size: g, codes on a side of an image.
        size: s, codes on a side of what is made of it.
    """

    def __init__(self, tokenizer: nn.Module, codebook: torch.Tensor, grid_size: int, size: int):
        self.tokenizer = tokenizer
        self.codebook = codebook
        self.grid_size = grid_size
        self.size = size
        self.finer = tokenizer.patch_size // FINER  # pixels of an image for one of a converted image
        self.black = self.codes_of(torch.zeros(1, 3, *2 * (size * tokenizer.patch_size,), device=codebook.device))

    @torch.no_grad()
    def codes_of(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) float in [0, 1] -> (B, S/patch, S/patch) int64, in float32 also under autocast."""
        with torch.autocast(images.device.type, enabled=False):
            _, codes = find_codes(self.tokenizer, self.codebook, images)
        return codes.view(len(images), images.shape[2] // self.tokenizer.patch_size, -1)

    @torch.no_grad()
    def targets_of(self, images: torch.Tensor, change: Change) -> torch.Tensor:
        """(B, 3, S, S) float in [0, 1] -> codes (B, s, s) int64 of what is made of them."""
        return self.codes_of(change.apply(images, self.size * self.tokenizer.patch_size, self.finer).clamp(0, 1))

    def logits_of(self, model: nn.Module, codes: torch.Tensor, change: Change) -> torch.Tensor:
        """TokenAdapt's logits (B, K, s, s) float32 for codes (B, g, g)."""
        return model(look_up(codes, self.codebook), lambda x: change.apply(x, FINER * self.size)).float()

    def loss(self, model: nn.Module, pixels: torch.Tensor, change: Change) -> torch.Tensor:
        """Cross-entropy () for images (B, 3, S, S) uint8."""
        images = unit_range(pixels)
        return F.cross_entropy(self.logits_of(model, self.codes_of(images), change), self.targets_of(images, change))

    def moved(self, codes: torch.Tensor, change: Change) -> torch.Tensor:
        """What TokenAdapt is compared with: the codes (B, g, g) themselves, each moved to the nearest position.

        Where maps leave nothing, there is the code of black; of a mixture it takes the image of the larger weight.
        Returns (B, s, s).
        """
        b, g, _ = codes.shape
        # Positions go the way of the images, and a plane of ones beside them, which tells what the maps leave empty.
        position = (torch.arange(FINER * g, device=codes.device) + 0.5) / FINER
        planes = torch.stack([*torch.meshgrid(position, position, indexing='ij'), torch.ones_like(position).expand(
            FINER * g, -1)]).expand(b, -1, -1, -1)
        planes = F.avg_pool2d(apply_geometry(planes, change.geometry, FINER * self.size), FINER)
        y, x = (planes[:, :2] / planes[:, 2:].clamp(min=1e-6)).long().clamp(0, g - 1).unbind(1)  # (B, s, s)
        moved = codes.flatten(1).gather(1, (y * g + x).flatten(1)).view_as(y)
        moved = torch.where(planes[:, 2] < 0.5, self.black, moved)
        return moved if change.kept >= 0.5 else moved.flip(0)


# ---------------------------------------------------------------- measuring

def measured_changes(pairs: CodePairs, batch: int, random: RandomGeometry, generator: torch.Generator) -> list[Change]:
    """A change for each name in MEASURED, drawn by numpy's global generator and `generator`.

    But for 'crop' and 'all' the middle of the image is taken, by whole codes, so that moving codes can be right.
    """
    side = FINER * pairs.grid_size
    start = FINER * ((pairs.grid_size - pairs.size) // 2)
    box = [start, start, FINER * pairs.size, FINER * pairs.size]
    middle = torch.tensor(box, device=generator.device).expand(batch, -1)
    shift = np.round(np.random.uniform(-SHIFT * side, SHIFT * side, 2)).tolist()
    rows = [(np.random.uniform(-ANGLE, ANGLE), 0., 0., 0., 0.), (0., *shift, 0., 0.),
            (0., 0., 0., np.random.uniform(0, SHEAR), 0.)]
    still = Geometry(False, [], middle)
    geometries = [still, Geometry(True, [], middle), *(Geometry(False, [row], middle) for row in rows),
                  Geometry(False, [], random.draw_boxes(batch, generator))]
    return [*map(Change, geometries), Change(still, np.random.uniform(0.5, 1)),
            Change(random.draw(batch, side, generator))]


@torch.no_grad()
def evaluate_token_adapt(model: TokenAdapt, pairs: CodePairs, batches: Iterable[torch.Tensor], random: RandomGeometry,
                         amp: str, name: str = '') -> dict[str, float]:
    """How many codes (%) of changed images come out right, for each change, and if codes were only moved. Collective.

    Args:
        model: left in eval mode.
        pairs: of its tokenizer.
        batches: (B, 3, S, S) uint8 on the device, of this rank's part of the held-out images.
        random: the training's.
        amp: 'off', 'bf16' or 'fp16'.
        name: marks the printed line: '' or 'EMA'.

    Returns:
        {'codes_flip': by TokenAdapt, 'moved_flip': by moving codes, and so for all MEASURED; 'loss': of 'all'}.

    Raises:
        InputError: without images.
    """
    model.eval()
    device = pairs.codebook.device
    generator = torch.Generator(device)
    # fractions of codes that are right, summed over images: by TokenAdapt, by moving
    home = device_of_sums(device)
    hits = torch.zeros(len(MEASURED), 2, dtype=torch.float64, device=home)
    sums = torch.zeros(2, dtype=torch.float64, device=home)  # loss, images
    parts = (part for pixels in batches for part in pixels.split(IMAGES_PER_CHANGE))
    for number, part in enumerate(parts):
        seed_step(0, 0, number, rank(), generator)  # the same changes each time
        images = unit_range(part)
        codes = pairs.codes_of(images)
        for row, change in zip(hits, measured_changes(pairs, len(images), random, generator)):
            targets = pairs.targets_of(images, change)
            with autocast(device, amp):
                logits = pairs.logits_of(model, codes, change)
            row += torch.stack([(predicted == targets).to(home).double().mean((1, 2)).sum()
                                for predicted in (logits.argmax(1), pairs.moved(codes, change))])
        loss = F.cross_entropy(logits, targets).to(home).double()
        sums += torch.stack([loss, torch.ones_like(loss)]) * len(images)
    sum_over_ranks(hits)
    sum_over_ranks(sums)
    if not sums[1]:
        raise InputError('no image is left to evaluate')
    percent = dict(zip(MEASURED, (100 * hits / sums[1]).tolist()))
    print0('* codes right, and by moving them: '
           + ', '.join(f'{key} {adapted:.1f} ({moved:.1f})' for key, (adapted, moved) in percent.items())
           + (f' ({name})' if name else ''))
    stats = {'loss': (sums[0] / sums[1]).item()}
    for key, (adapted, moved) in percent.items():
        stats |= {f'codes_{key}': adapted, f'moved_{key}': moved}
    return stats


# ---------------------------------------------------------------- the file

def save_token_adapt(model: TokenAdapt, path: str | Path, made_with: dict[str, Any] | None = None) -> None:
    """Write a file that token_adapt.load_token_adapt reads, and with published sizes the published program.

    `made_with`: what a manifest beside it states, 'tokenizer' and 'codebook' as those of token sets; None writes none.
    """
    if made_with:
        write_text(manifest_of(path), json.dumps(made_with) + '\n')
    save_torch({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, path)
