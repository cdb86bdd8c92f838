"""Augmentation of token grids: codes -> Token-EDA -> look-up and crop -> noise (SeiT sec. 3.2).

Each augmentation is a small class whose objects take (x, generator) and give x; main_seit.py's `make_augment` puts them
in a row. They stand below in the order in which a batch meets them: on codes, while they are looked up, on embeddings.

Everything is a batched tensor operation on the batch's
device, drawn from a generator on that device (only how many images get which change is numpy's draw, on the host),
without a host synchronization. The published program crops one-hot grids and multiplies them by the codebook; the
crop is linear, so resampling codebook rows is the same function at a fraction of the work.

Shapes: codes (B, g, g) int64; codebook (K, d) float32; model input (B, d, s, s) float32.
"""
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from utils import InputError

LEAST_GRID = 2  # codes on a side of a patch, of all models here


def uniform(shape: tuple[int, ...], generator: torch.Generator, low: float = 0., high: float = 1.) -> torch.Tensor:
    """Uniform float32 numbers in [low, high) on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


# ---------------------------------------------------------------- Token-EDA, on codes

class ReplaceSynonyms:
    """Synonym replacement: each code independently, with probability `prob`, becomes one of its synonyms.

    Args:
        table: (K, k) int64, the synonyms of each code, see codebook.load_synonyms.
        count: (K,) int64, how many of them there are.
        prob: chance of each code to be replaced.
        device: of the batches.
    """

    def __init__(self, table: torch.Tensor, count: torch.Tensor, prob: float, device: torch.device):
        self.table = table.to(device)
        self.count = count.to(device)
        self.prob = prob

    def __call__(self, codes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        flat = codes.flatten()  # for index_select, which is three times as fast as indexing
        # every code draws a synonym, of which few are used: cheaper than to collect the codes that change
        pick = (uniform(flat.shape, generator) * self.count.index_select(0, flat)).long()
        synonyms = self.table.flatten().index_select(0, flat * self.table.shape[1] + pick).view(codes.shape)
        return torch.where(uniform(codes.shape, generator) < self.prob, synonyms, codes)


class SwapPatches:
    """Swap two square patches in each grid; both are copied from the original, and where they overlap the second wins.

    Args:
        grid_size: side of the token grid in codes.
        scale: a patch has the side int(grid_size · U(0, scale)).
        device: of the batches.

    Raises:
        InputError: when a side that can be drawn leaves no room for two patches.
    """

    def __init__(self, grid_size: int, scale: float, device: torch.device):
        self.grid_size = grid_size
        self.scale = scale
        self.table = swap_table(grid_size, scale).to(device)

    def draw(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Parameters of a swap for each image: (batch, 5) int64 (side, y0, x0, y1, x1)."""
        grid = self.grid_size
        side = (uniform((batch,), generator, 0, self.scale) * grid).long().clamp(max=len(self.table) - 1)
        # the inverse of the cumulative distribution; float32 may end a little below 1, hence the clamp
        drawn = torch.searchsorted(self.table[side], uniform((batch, 1), generator), right=True)
        drawn = drawn.squeeze(1).clamp(max=self.table.shape[1] - 1)
        delta = torch.stack([drawn // (2 * grid - 1), drawn % (2 * grid - 1)], 1) - (grid - 1)
        # the first corner is uniform over the positions from which the second stays on the grid
        room = (grid - side)[:, None] - delta.abs()
        first = (uniform((batch, 2), generator) * room).long() + (-delta).clamp(min=0)
        return torch.cat([side[:, None], first, first + delta], 1)

    def __call__(self, codes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return swap_patches(codes, self.draw(len(codes), generator))


def swap_table(grid_size: int, scale: float) -> torch.Tensor:
    """Displacements of two patches that are further apart than their side, for each side a swap can draw.

    The published program redraws two uniform corners until their distance exceeds the side s. The displacement
    (dy, dx) of such a pair has weight (n - |dy|)(n - |dx|), n = grid_size - s, so it can be drawn at once from a table.

    Returns:
        (sides, (2·grid_size - 1)²) float32: for each side the cumulative probability of each displacement.
    """
    sides = max(1, math.ceil(grid_size * scale))  # int(grid_size · U(0, scale)) is below this
    d = torch.arange(-grid_size + 1, grid_size, dtype=torch.float64)
    rows = []
    for side in range(sides):
        n = grid_size - side
        weight = (n - d.abs()).clamp(min=0)
        weight = weight[:, None] * weight * ((d[:, None] ** 2 + d ** 2).sqrt() > side)
        if not weight.sum() > 0:
            most = (side - 0.01) / grid_size
            raise InputError(f'--swap-token-scale {scale}: no room for two patches of side {side} on a grid of side '
                             f'{grid_size}: use {most:.2f} or less')
        rows.append((weight / weight.sum()).flatten().cumsum(0))
    return torch.stack(rows).float()


def swap_patches(codes: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Swap as `params` (B, 5) int64 (side, y0, x0, y1, x1) say."""
    b, h, w = codes.shape
    side, y0, x0, y1, x1 = params.unsqueeze(-1).unbind(1)  # each (B, 1)
    y = torch.arange(h, device=codes.device)
    x = torch.arange(w, device=codes.device)
    in_first, in_second = (((y >= top) & (y < top + side))[:, :, None] & ((x >= left) & (x < left + side))[:, None]
                           for top, left in ((y0, x0), (y1, x1)))  # (B, h, w)
    # each code is read from somewhere: in a patch from the other one, that many codes on or back, elsewhere from itself
    apart = ((y1 - y0) * w + x1 - x0)[:, :, None]
    source = torch.where(in_second, -apart, torch.where(in_first, apart, 0)) + (y[:, None] * w + x)
    return codes.flatten(1).gather(1, source.flatten(1)).view(b, h, w)


class EraseRectangle:
    """Put the code `empty` into one rectangle of each grid, with sides int(g·U(0, scale)).

    `empty` is one more than the largest code of the codebook; crops give it an embedding of zeros.
    """

    def __init__(self, scale: float, empty: int):
        self.scale = scale
        self.empty = empty

    def __call__(self, codes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        b, h, w = codes.shape
        in_rows = self._interval(b, h, generator)
        in_columns = self._interval(b, w, generator)
        return torch.where(in_rows[:, :, None] & in_columns[:, None, :], self.empty, codes)

    def _interval(self, batch: int, size: int, generator: torch.Generator) -> torch.Tensor:
        """(batch, size) bool, true at int(size·U(0, scale)) positions in a row, anywhere."""
        length, start = uniform((2, batch, 1), generator)
        length = (length * self.scale * size).long()
        start = (start * (size - length + 1)).long()
        position = torch.arange(size, device=length.device)
        return (position >= start) & (position < start + length)


class TokenEDA:
    """At most one change for each image of codes; in place (SeiT sec. 3.2).

    numpy's global generator draws how many images get each change, and the device's generator which ones. The
    distribution is that of a draw for each image. But the host knows the sizes of the parts without waiting for the
    device, and each change is computed for its images alone.

    Args:
        changes: (probability, change), where change(codes, generator) gives codes; the probabilities sum to 1 or less.
    """

    def __init__(self, changes: list[tuple[float, Callable]]):
        self.changes = [change for _, change in changes]
        probabilities = [probability for probability, _ in changes]
        self.probabilities = [*probabilities, max(0, 1 - sum(probabilities))]

    def __call__(self, codes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        counts = np.random.multinomial(len(codes), self.probabilities).tolist()
        order = torch.randperm(len(codes), generator=generator, device=codes.device)
        for change, images in zip(self.changes, order.split(counts)):
            if len(images):
                codes.index_copy_(0, images, change(codes.index_select(0, images), generator))
        return codes


# ---------------------------------------------------------------- crops

def draw_random_resized_crop(batch: int, grid_size: int, min_area: float, generator: torch.Generator,
                             ratio: tuple[float, float] = (3 / 4, 4 / 3), tries: int = 10) -> torch.Tensor:
    """Boxes (batch, 4) int64 (top, left, height, width) as torchvision's RandomResizedCrop draws them.

    Area U(min_area, 1)·grid_size², log-uniform aspect width/height; the first of `tries` draws that fits, else all.
    """
    # all tries of all images are drawn at once, and the first that fits is taken: no loop that asks the device
    area = uniform((batch, tries), generator, min_area, 1) * grid_size ** 2
    aspect = uniform((batch, tries), generator, math.log(ratio[0]), math.log(ratio[1])).exp()
    size = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], -1).round().long()  # (B, tries, 2)
    fits = ((size > 0) & (size <= grid_size)).all(-1)
    first = fits.long().argmax(1)[:, None, None].expand(-1, 1, 2)
    size = torch.where(fits.any(1)[:, None], size.gather(1, first).squeeze(1), grid_size)
    start = (uniform((batch, 2), generator) * (grid_size - size + 1)).long()
    return torch.cat([start, size], 1)


def draw_random_crop(batch: int, grid_size: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Boxes (batch, 4) int64 of a plain random crop: size x size, anywhere on the grid (`--src`)."""
    start = (uniform((batch, 2), generator) * (grid_size - size + 1)).long()
    return torch.cat([start, torch.full_like(start, size)], 1)


def cubic_taps(start: torch.Tensor, length: torch.Tensor, size: int,
               a: float = -0.75) -> tuple[torch.Tensor, torch.Tensor]:
    """Where to read and with what weights to resample one axis: `size` bicubic samples of [start, start + length), as
    torch's interpolate with align_corners=False and without antialias; taps beyond the crop's border read its edge.

    Returns (B, size, 4) int64 positions and (B, size, 4) float32 weights that sum to 1, for start, length (B,) int64.
    """
    # Keys' cubic kernel with torch's a: four neighbors, two of them within a distance of 1 and two beyond
    length = length[:, None]
    center = (torch.arange(size, device=start.device) + 0.5) * (length / size) - 0.5  # (B, size)
    below = center.floor()
    t = center - below
    near = torch.stack([t, 1 - t], -1)
    far = torch.stack([t + 1, 2 - t], -1)
    near = ((a + 2) * near - (a + 3)) * near * near + 1
    far = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    weight = torch.stack([far[..., 0], near[..., 0], near[..., 1], far[..., 1]], -1)
    tap = below.long()[..., None] + torch.arange(-1, 3, device=start.device)
    return tap.clamp(min=0).minimum(length[..., None] - 1) + start[:, None, None], weight


def resized_crop(codes: torch.Tensor, table: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Look up each grid of codes, crop it to its box and resample it bicubically, one axis after the other.

    Either axis is a sum of four weighted rows, which is what embedding_bag computes; for the first the rows are the
    table's own, so the embeddings of the whole grid are never written out.

    Args:
        codes: (B, h, w) int64.
        table: (K, d) float.
        boxes: (B, 4) int64 (top, left, height, width); one of size x size is copied exactly.
        size: side of the result.

    Returns:
        (B, d, size, size), channels last in memory.
    """
    b, h, _ = codes.shape
    taps, weights = cubic_taps(boxes[:, :2].flatten(), boxes[:, 2:].flatten(), size)
    # rows before columns or columns before rows is the same; columns first reads the small table of codes
    (y, x), (y_weight, x_weight) = (both.view(b, 2, size, 4).unbind(1) for both in (taps, weights))
    rows = codes.int().gather(2, x.reshape(b, 1, size * 4).expand(-1, h, -1))  # (B, h, size · 4), int32
    out = _weighted_sums(rows, table, x_weight[:, None].expand(-1, h, -1, -1))  # (B · h · size, d)
    out = out.view(b * h, -1)  # a row of the grid in each
    first_row = (torch.arange(b, device=codes.device) * h)[:, None, None]  # where each image begins
    return rearrange(_weighted_sums(first_row + y, out, y_weight), '(b y) (x d) -> b d y x', b=b, x=size)


def _weighted_sums(rows: torch.Tensor, table: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(n, d) sums of four rows of table (m, d) each; rows, n · 4 integers; weight, n · 4 numbers."""
    return F.embedding_bag(rows.reshape(-1, 4), table, mode='sum', per_sample_weights=weight.reshape(-1, 4))


def center_crop(codes: torch.Tensor, size: int) -> torch.Tensor:
    """The middle size x size codes of each grid (torchvision's CenterCrop)."""
    h, w = codes.shape[-2:]
    top = round((h - size) / 2)
    left = round((w - size) / 2)
    return codes[..., top:top + size, left:left + size]


def check_crop(size: int, grid_size: int, path: str = '') -> None:
    """InputError unless a crop of size x size codes fits the grid, which is of the token file `path`."""
    start = f'{path}: ' if path else ''
    if grid_size < LEAST_GRID:
        raise InputError(f'{start}a token grid of {grid_size}x{grid_size} codes is too small for any model, as '
                         f'their patches are of {LEAST_GRID}x{LEAST_GRID}: tokenize the images at a larger size')
    if size > grid_size:
        raise InputError(f'{start}a crop of {size}x{size} codes is larger than the {grid_size}x{grid_size} token grid: '
                         f'take a model of a smaller input size, {grid_size // LEAST_GRID * LEAST_GRID} codes at most, '
                         'or tokenize the images at a larger size')


class RandomResizedCrop:
    """codes (B, g, g) -> embeddings (B, d, size, size), of random boxes (torchvision's distribution), bicubic.

    Args:
        codebook: (K, d) float32; the code K stands for an erased one, whose embedding is zero.
        grid_size: g, side of the token grid in codes.
        size: side of the result in codes.
        min_area: the smallest area, as a fraction of the grid's.
        device: of the batches.
    """

    def __init__(self, codebook: torch.Tensor, grid_size: int, size: int, min_area: float, device: torch.device):
        check_crop(size, grid_size)
        self.embedding = torch.cat([codebook, codebook.new_zeros(1, codebook.shape[1])]).to(device)
        self.grid_size = grid_size
        self.size = size
        self.min_area = min_area

    def draw(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Boxes (batch, 4)."""
        return draw_random_resized_crop(batch, self.grid_size, self.min_area, generator)

    def resample(self, codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Look up and crop; without randomness, so torch.compile can fuse it."""
        return resized_crop(codes, self.embedding, boxes, self.size)

    def __call__(self, codes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self.resample(codes, self.draw(len(codes), generator))


class RandomCrop(RandomResizedCrop):
    """The same with a plain random crop of size x size codes (`--src`); `min_area` is not used."""

    def draw(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        return draw_random_crop(batch, self.grid_size, self.size, generator)


class EvalTransform:
    """codes (B, g, g) uint16 -> model input (B, d, size, size): center crop and look-up."""

    def __init__(self, codebook: torch.Tensor, size: int, device: torch.device):
        self.size = size
        self.embedding = codebook.to(device)

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        check_crop(self.size, codes.shape[-1])
        return rearrange(self.embedding[center_crop(codes, self.size).long()], 'b y x d -> b d y x')


# ---------------------------------------------------------------- noise

class EmbeddingNoise:
    """Noise on a random floor(B·fraction) of the batch: N(0, channel_std²) a (sample, channel) plus
    N(0, element_std²) an element. x (B, d, s, s) is changed in place and returned."""

    def __init__(self, fraction: float, channel_std: float, element_std: float):
        self.fraction = fraction
        self.channel_std = channel_std
        self.element_std = element_std

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if not self.fraction:
            return x
        b, d, h, w = x.shape
        noisy = torch.randperm(b, generator=generator, device=x.device)[:int(b * self.fraction)]
        # drawn channels last, as `resized_crop` lays out x: adding then walks both through memory in one direction
        noise = torch.empty(len(noisy), h, w, d, device=x.device).normal_(0, self.element_std, generator=generator)
        noise += torch.empty(len(noisy), 1, 1, d, device=x.device).normal_(0, self.channel_std, generator=generator)
        rearrange(x, 'b d y x -> b y x d').index_add_(0, noisy, noise)
        return x
