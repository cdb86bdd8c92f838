"""Augmentation of token grids: codes -> augmented codes -> embeddings -> crop -> noise (SeiT sec. 3.2, Token-EDA).

Everything is a batched tensor operation on the device the batch is on, drawn from an explicit generator on that
device (only how many images get which change is numpy's draw, on the host), and without a host synchronisation. The
published program crops one-hot grids and multiplies them by the codebook; because the crop is linear, resampling
codebook rows is the same function at a fraction of the work.

Shapes: codes (B, h, w) int64; codebook (K, d) float32; model input (B, d, s, s) float32.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from utils import InputError


def uniform(shape, generator, low=0., high=1.):
    """Uniform float32 numbers in [low, high) on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


# ---------------------------------------------------------------- Token-EDA, on codes

def replace_synonyms(codes, table, count, prob, generator):
    """Synonym replacement: each code independently, with probability `prob`, becomes one of its synonyms.

    Args: table (K, k) int64, count (K,) int64: see token_dataset.load_synonyms.
    """
    flat = codes.flatten()  # index_select is three times as fast as indexing
    pick = (uniform(flat.shape, generator) * count.index_select(0, flat)).long()
    synonyms = table.flatten().index_select(0, flat * table.shape[1] + pick).view(codes.shape)
    return torch.where(uniform(codes.shape, generator) < prob, synonyms, codes)


def swap_table(grid, scale):
    """Displacements of two patches that are further apart than their side, for each side a swap can draw.

    The published program redraws two uniform corners until their distance exceeds the side s. The displacement
    (dy, dx) of such a pair has weight (n - |dy|)(n - |dx|), n = grid - s, so it can be drawn at once from a table.

    Returns (sides, (2·grid - 1)²) float32: for each side the cumulative probability of each displacement.
    Raises InputError when a side that can be drawn leaves no room for two patches.
    """
    sides = max(1, math.ceil(grid * scale))  # int(grid · U(0, scale)) is below this
    d = torch.arange(-grid + 1, grid, dtype=torch.float64)
    rows = []
    for side in range(sides):
        n = grid - side
        weight = (n - d.abs()).clamp(min=0)
        weight = weight[:, None] * weight * ((d[:, None] ** 2 + d ** 2).sqrt() > side)
        if not weight.sum() > 0:
            raise InputError(f'--swap-token-scale {scale} can draw patches of side {side}, but a {grid}x{grid} grid '
                             f'has no room for two of them: use {(side - 0.01) / grid:.2f} or less')
        rows.append((weight / weight.sum()).flatten().cumsum(0))
    return torch.stack(rows).float()


def draw_swap(batch, grid, scale, table, generator):
    """Parameters of a swap for each image: (batch, 5) int64 (side, y0, x0, y1, x1)."""
    side = (uniform((batch,), generator, 0, scale) * grid).long().clamp(max=len(table) - 1)
    drawn = torch.searchsorted(table[side], uniform((batch, 1), generator), right=True)
    drawn = drawn.squeeze(1).clamp(max=table.shape[1] - 1)
    delta = torch.stack([drawn // (2 * grid - 1), drawn % (2 * grid - 1)], 1) - (grid - 1)
    # the first corner is uniform over the places from which the second stays on the grid
    room = (grid - side)[:, None] - delta.abs()
    first = (uniform((batch, 2), generator) * room).long() + (-delta).clamp(min=0)
    return torch.cat([side[:, None], first, first + delta], 1)


def swap_patches(codes, params):
    """Swap two square patches in each grid; where they overlap, what lands on the second place wins.

    Args: params (B, 5) int64 (side, y0, x0, y1, x1). Both patches are copied from the original grid.
    """
    b, h, w = codes.shape
    side, y0, x0, y1, x1 = params.unsqueeze(-1).unbind(1)  # each (B, 1)
    y, x = torch.arange(h, device=codes.device), torch.arange(w, device=codes.device)
    in_first, in_second = (((y >= top) & (y < top + side))[:, :, None] & ((x >= left) & (x < left + side))[:, None]
                           for top, left in ((y0, x0), (y1, x1)))  # (B, h, w)
    apart = ((y1 - y0) * w + x1 - x0)[:, :, None]
    source = torch.where(in_second, -apart, torch.where(in_first, apart, 0)) + (y[:, None] * w + x)
    return codes.flatten(1).gather(1, source.flatten(1)).view(b, h, w)


def erase_rectangle(codes, scale, empty, generator):
    """Put the code `empty` into one rectangle a grid, its sides int(h·U(0, scale)) and int(w·U(0, scale))."""
    b, h, w = codes.shape
    in_rows = _random_interval(b, h, scale, generator)
    in_columns = _random_interval(b, w, scale, generator)
    return torch.where(in_rows[:, :, None] & in_columns[:, None, :], empty, codes)


def _random_interval(batch, size, scale, generator):
    """(batch, size) bool, true on int(size·U(0, scale)) places in a row, anywhere."""
    length, start = uniform((2, batch, 1), generator)
    length = (length * scale * size).long()
    start = (start * (size - length + 1)).long()
    at = torch.arange(size, device=length.device)
    return (at >= start) & (at < start + length)


# ---------------------------------------------------------------- crops

def draw_random_resized_crop(batch, grid, min_area, generator, ratio=(3 / 4, 4 / 3), tries=10):
    """Boxes (batch, 4) int64 (top, left, height, width) as torchvision's RandomResizedCrop draws them.

    Area U(min_area, 1)·grid², log-uniform aspect width/height; the first of `tries` draws that fits, else all.
    """
    area = uniform((batch, tries), generator, min_area, 1) * grid ** 2
    aspect = uniform((batch, tries), generator, math.log(ratio[0]), math.log(ratio[1])).exp()
    size = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], -1).round().long()  # (B, tries, 2)
    fits = ((size > 0) & (size <= grid)).all(-1)
    first = fits.long().argmax(1)[:, None, None].expand(-1, 1, 2)
    size = torch.where(fits.any(1)[:, None], size.gather(1, first).squeeze(1), grid)
    start = (uniform((batch, 2), generator) * (grid - size + 1)).long()
    return torch.cat([start, size], 1)


def draw_random_crop(batch, grid, size, generator):
    """Boxes (batch, 4) int64 of a plain random crop: size x size, anywhere on the grid (`--src`)."""
    start = (uniform((batch, 2), generator) * (grid - size + 1)).long()
    return torch.cat([start, torch.full_like(start, size)], 1)


def cubic_taps(start, length, size, a=-0.75):
    """Where to read and with what weights to resample one axis: `size` bicubic samples of [start, start + length), as
    torch's interpolate with align_corners=False and without antialias; taps beyond the crop's border read its edge.

    Args: start, length (B,) int64. Returns (B, size, 4) int64 places and (B, size, 4) float32 weights that sum to 1.
    """
    length, start = length[:, None], start[:, None]
    at = (torch.arange(size, device=start.device) + 0.5) * (length / size) - 0.5  # (B, size)
    below = at.floor()
    t = at - below
    near, far = torch.stack([t, 1 - t], -1), torch.stack([t + 1, 2 - t], -1)
    near = ((a + 2) * near - (a + 3)) * near * near + 1
    far = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    weight = torch.stack([far[..., 0], near[..., 0], near[..., 1], far[..., 1]], -1)
    tap = below.long()[..., None] + torch.arange(-1, 3, device=start.device)
    return tap.clamp(min=0).minimum(length[..., None] - 1) + start[..., None], weight


def resized_crop(codes, table, boxes, size):
    """Look up each grid of codes, crop it to its box and resample it bicubically, one axis after the other.

    Either axis is a sum of four weighted rows for each place, which is what embedding_bag computes; for the first the
    rows are the table's own, so the embeddings of the whole grid are never written out.

    Args: codes (B, h, w) int64; table (K, d); boxes (B, 4) int64 (top, left, height, width). Returns
    (B, d, size, size), channels last in memory. A box of size x size is copied exactly.
    """
    b, h, _ = codes.shape
    taps, weights = cubic_taps(boxes[:, :2].flatten(), boxes[:, 2:].flatten(), size)
    (y, x), (y_weight, x_weight) = (both.view(b, 2, size, 4).unbind(1) for both in (taps, weights))
    rows = codes.int().gather(2, x.reshape(b, 1, size * 4).expand(-1, h, -1))  # (B, h, size · 4), int32
    out = _weighted_sums(rows, table, x_weight[:, None].expand(-1, h, -1, -1))  # (B · h · size, d)
    out = out.view(b * h, -1)  # a row of the grid in each
    first = (torch.arange(b, device=codes.device) * h)[:, None, None]  # of each image's rows
    return rearrange(_weighted_sums(first + y, out, y_weight), '(b y) (x d) -> b d y x', b=b, x=size)


def _weighted_sums(rows, table, weight):
    """(n, d) sums of four rows of table (m, d) each; rows, n · 4 integers; weight, n · 4 numbers."""
    return F.embedding_bag(rows.reshape(-1, 4), table, mode='sum', per_sample_weights=weight.reshape(-1, 4))


def center_crop(codes, size):
    """The middle size x size codes of each grid (torchvision's CenterCrop)."""
    h, w = codes.shape[-2:]
    top, left = round((h - size) / 2), round((w - size) / 2)
    return codes[..., top:top + size, left:left + size]


# ---------------------------------------------------------------- noise

def add_embedding_noise(x, fraction, channel_std, element_std, generator):
    """Noise on a random floor(B·fraction) of the batch: N(0, channel_std²) a (sample, channel) plus
    N(0, element_std²) an element. x (B, d, s, s) is changed in place and returned."""
    chosen = torch.randperm(len(x), generator=generator, device=x.device)[:int(len(x) * fraction)]
    b, d, h, w = len(chosen), *x.shape[1:]
    # drawn channels last, as `resized_crop` lays out x
    noise = torch.empty(b, h, w, d, device=x.device).normal_(0, element_std, generator=generator)
    noise += torch.empty(b, 1, 1, d, device=x.device).normal_(0, channel_std, generator=generator)
    rearrange(x, 'b d y x -> b y x d').index_add_(0, chosen, noise)
    return x


# ---------------------------------------------------------------- the two pipelines

def check_crop(size, grid):
    """InputError unless a crop of size x size codes fits the grid."""
    if size > grid:
        raise InputError(f'a crop of {size}x{size} codes is larger than the {grid}x{grid} token grid: lower '
                         'the input size')


class TrainAugment:
    """codes (B, g, g) uint16 -> model input (B, d, s, s): one Token-EDA choice an image, crop, noise.

    Args:
        codebook: (K, d) float32.
        synonyms: (table, count) of token_dataset.load_synonyms, or None without synonym replacement.
        grid, size: sides of the token grid and of the model's input, in codes.
        device: where batches are.
        rc_prob, sc_prob, erase_prob: probabilities of synonym replacement, swap and erase; at most one an image.
        replace_prob: of each code within synonym replacement. swap_scale, erase_scale: fractions of the grid's side.
        rrc_ratio: smallest area of the random-resized crop; simple_crop: a plain random crop instead.
        noise_prob, noise_scale, noise_std: fraction of the batch, per-channel and per-element deviation.
    """

    def __init__(self, codebook, synonyms, grid, size, device, rc_prob=0.25, sc_prob=0.25, erase_prob=0.,
                 replace_prob=0.25, swap_scale=0.25, erase_scale=0.25, rrc_ratio=0.08, simple_crop=False,
                 noise_prob=0.5, noise_scale=1., noise_std=1.):
        check_crop(size, grid)
        if rc_prob + sc_prob + erase_prob > 1:
            raise InputError('--eda-rc-prob, --eda-sc-prob and --eda-erase-prob add up to more than 1')
        self.grid, self.size, self.empty = grid, size, len(codebook)
        self.embedding = torch.cat([codebook, codebook.new_zeros(1, codebook.shape[1])]).to(device)
        self.synonyms = tuple(t.to(device) for t in synonyms) if synonyms else None
        self.displacements = swap_table(grid, swap_scale).to(device) if sc_prob else None
        self.rc_prob, self.sc_prob, self.erase_prob = rc_prob, sc_prob, erase_prob
        self.replace_prob, self.swap_scale, self.erase_scale = replace_prob, swap_scale, erase_scale
        self.rrc_ratio, self.simple_crop = rrc_ratio, simple_crop
        self.noise = noise_prob, noise_scale, noise_std

    def token_eda(self, codes, generator):
        """At most one of synonym replacement, swap and erase for each image of codes (B, g, g) int64; in place.

        numpy's global generator draws how many images get each, `generator` which: as if each image had chosen for
        itself, but without work for the others, and without asking the device.
        """
        changes = {self._replace: self.rc_prob, self._swap: self.sc_prob, self._erase: self.erase_prob}
        counts = np.random.multinomial(len(codes), [*changes.values(), max(0, 1 - sum(changes.values()))])
        order, first = torch.randperm(len(codes), generator=generator, device=codes.device), 0
        for change, count in zip(changes, counts.tolist()):
            chosen, first = order[first:first + count], first + count
            if count:
                codes.index_copy_(0, chosen, change(codes.index_select(0, chosen), generator))
        return codes

    def _replace(self, codes, generator):
        return replace_synonyms(codes, *self.synonyms, self.replace_prob, generator)

    def _swap(self, codes, generator):
        return swap_patches(codes, draw_swap(len(codes), self.grid, self.swap_scale, self.displacements, generator))

    def _erase(self, codes, generator):
        return erase_rectangle(codes, self.erase_scale, self.empty, generator)

    def crop(self, codes, boxes):
        """Look up and crop; without randomness, so torch.compile can fuse it."""
        return resized_crop(codes, self.embedding, boxes, self.size)

    def __call__(self, codes, generator):
        codes = self.token_eda(codes.long(), generator)
        if self.simple_crop:
            boxes = draw_random_crop(len(codes), self.grid, self.size, generator)
        else:
            boxes = draw_random_resized_crop(len(codes), self.grid, self.rrc_ratio, generator)
        x = self.crop(codes, boxes)
        return add_embedding_noise(x, *self.noise, generator) if self.noise[0] else x


class EvalTransform:
    """codes (B, g, g) uint16 -> model input (B, d, size, size): centre crop and look-up."""

    def __init__(self, codebook, size, device):
        self.size, self.embedding = size, codebook.to(device)

    def __call__(self, codes):
        check_crop(self.size, codes.shape[-1])
        return rearrange(self.embedding[center_crop(codes, self.size).long()], 'b y x d -> b d y x')
