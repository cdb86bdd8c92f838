"""TokenAdapt: pixel augmentation for codes (SeiT++, ECCV 2024).

A frozen network turns the embeddings of a grid of codes into an "image" of twice its side, on which flips, affine maps,
crops and Mixup act as they do on pixels, and a second one turns the result back into codes. `load_token_adapt` reads
the two networks from their file; `RandomGeometry` draws and applies what is done between them.

Which maps a batch gets, and their angles and lengths, are drawn by numpy on the host, so that a map that is not drawn
costs nothing; boxes are drawn from the generator, on its device. Nothing waits for the device.

Shapes: embeddings (B, d, g, g); converted (B, d, 2g, 2g); cropped (B, d, 2s, 2s); codes (B, s, s). Published: d = 32,
g = 32, s = 28.
"""
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from fileio.files import is_address, read_json
from fileio.torch_files import load_torch
from image_tokenizer.vitvqgan import HEAD_DIM, Decoder, Encoder, Size, read_size, shape_of
from token_augment import resized_crop
from token_files.made_with import check_codebook_of, entry_of
from utils import InputError

SIZE = Size(384, 1, 6, 1536)  # published
FINER = 2  # a code is FINER x FINER in the converted image
FLIP = AFFINE = EACH_MAP = 0.5  # chances: of a flip, of the group of affine maps, of each map in it
ANGLE = 30.  # degrees, to either side
SHEAR = 15.  # degrees, to one side only
SHIFT = 0.2  # of the side, to either side; published: 12.8 of 64


def size_of_width(width: int, depth: int = SIZE.depth) -> Size:
    """A transformer of another width, a multiple of HEAD_DIM, in the published proportions."""
    return Size(width, depth, width // HEAD_DIM, SIZE.mlp_dim // SIZE.dim * width)


class TokenAdapt(nn.Module):
    """Conversion and inversion, under the published names.

    Args:
        codes: K, rows of the codebook.
        code_dim: d, elements of a row.
        grid_size, crop_size: g and s, the sides of the stored position tables; for other sides they are computed.
        size: of the two transformers.
    """

    def __init__(self, codes: int, code_dim: int, grid_size: int = 32, crop_size: int = 28, size: Size = SIZE):
        super().__init__()
        self.conversion_function = nn.Sequential(nn.Linear(code_dim, size.dim),
                                                 Decoder(size, FINER, grid_size, code_dim))
        self.reverse_transform = nn.Sequential(Encoder(size, FINER, crop_size, code_dim), nn.Linear(size.dim, codes))
        for part in (self.conversion_function[1], self.reverse_transform[0]):
            part.apply(_start_weights)

    def convert(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, d, g, g) -> (B, d, 2g, 2g) float32, also under autocast."""
        return self.conversion_function(rearrange(embeddings, 'b d y x -> b (y x) d')).float()

    def invert(self, converted: torch.Tensor) -> torch.Tensor:
        """(B, d, 2s, 2s) -> logits (B, K, s, s)."""
        return rearrange(self.reverse_transform(converted), 'b (y x) k -> b k y x', y=converted.shape[2] // FINER)

    @torch.compiler.disable(recursive=False)  # the networks are compiled, and `change`, another each time, is not
    def forward(self, embeddings: torch.Tensor, change: Callable | None = None) -> torch.Tensor:
        """(B, d, g, g) -> logits (B, K, s, s) of the codes of what `change` makes of the converted image; for training.

        Without a change s is g.
        """
        converted = self.convert(embeddings)
        return self.invert(change(converted) if change else converted)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass."""
        for part in (self.conversion_function[1], self.reverse_transform[0]):
            part.transformer.grad_checkpointing = enable

    def to_codes(self, converted: torch.Tensor) -> torch.Tensor:
        """(B, d, 2s, 2s) -> codes (B, s, s) int64, without gradient."""
        return self.invert(converted).argmax(1)


def _start_weights(module: nn.Module) -> None:
    """Xavier's; biases 0, but those of convolutions are PyTorch's, as published."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- the file

def load_token_adapt(path: str | Path, codebook: torch.Tensor) -> TokenAdapt:
    """A frozen TokenAdapt for the codes of a codebook (K, d), of a file with the published names. On the CPU.

    The file is a plain state dict, as the published tokenadapt.ckpt; sizes are read from its shapes.

    Raises:
        InputError: naming what is missing, of another shape or unknown, and for the TokenAdapt of another codebook.
    """
    state = load_torch(path, 'TokenAdapt weights')
    if not isinstance(state, dict):
        raise InputError(f'{path}: no TokenAdapt weights (found: {type(state).__name__}); give a tokenadapt.ckpt')
    try:
        config = read_config(state)
        with torch.device('meta'):  # names and shapes only; the tensors are those of `state`
            model = TokenAdapt(**config)
        check_weights(state, model.state_dict())
    except InputError as error:
        raise InputError(f'{path}: no TokenAdapt weights: {error}; give a tokenadapt.ckpt, or make one with '
                         'scripts/fit_token_adapt.py') from None
    if (config['codes'], config['code_dim']) != codebook.shape:
        raise InputError(f'{path}: is for a codebook of {config["codes"]} x {config["code_dim"]}, not of '
                         f'{len(codebook)} x {codebook.shape[1]}: give the codebook it was made for, or make one for '
                         'this codebook with scripts/fit_token_adapt.py')
    if not is_address(path) and os.path.exists(manifest_of(path)):
        manifest = read_json(manifest_of(path))
        entry = entry_of(manifest, 'codebook') if isinstance(manifest, dict) else None
        if entry and 'values_sha256' in entry:
            check_codebook_of(entry, str(path), codebook, 'the one given')
    model.load_state_dict({name: state[name].detach().float() for name in state}, assign=True)
    return model.requires_grad_(False).eval()


def manifest_of(path: str | Path) -> Path:
    """Where scripts/fit_token_adapt.py states with which tokenizer and codebook a TokenAdapt was trained."""
    return Path(path).with_suffix('.json')


def read_config(state: dict[str, Any]) -> dict[str, Any]:
    """TokenAdapt's arguments, from the shapes of its weights. Raises InputError."""
    codes = shape_of(state, 'reverse_transform.1.weight', 2)[0]
    code_dim = shape_of(state, 'conversion_function.0.weight', 2)[1]
    sides = []
    for name in ('conversion_function.1.de_pos_embedding', 'reverse_transform.0.en_pos_embedding'):
        positions = shape_of(state, name, 3)[1]
        sides.append(math.isqrt(positions))
        if sides[-1] ** 2 != positions:
            raise InputError(f'{name} has {positions} places, which make no square grid')
    size = read_size(state, 'conversion_function.1')
    return {'codes': codes, 'code_dim': code_dim, 'grid_size': sides[0], 'crop_size': sides[1], 'size': size}


def check_weights(state: dict[str, Any], wanted: dict[str, torch.Tensor]) -> None:
    """InputError unless `state` has exactly the names of `wanted`, in their shapes, and all numbers are finite."""
    problems = []
    for name, value in wanted.items():
        if not isinstance(state.get(name), torch.Tensor) or not state[name].is_floating_point():
            problems.append(f'{name} is missing')
        elif state[name].shape != value.shape:
            problems.append(f'{name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}')
        elif not state[name].isfinite().all():
            problems.append(f'{name} has elements that are not finite')
    problems += [f'{str(name)[:80]} is unknown' for name in state if name not in wanted]
    if problems:
        more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
        raise InputError('; '.join(problems[:3]) + more)


# ---------------------------------------------------------------- geometry

class Geometry(NamedTuple):
    """What is done to a batch of images, in this order.

    Attributes:
        flip: mirror all of them.
        maps: rows (angle, shift x, shift y, shear x, shear y) of affine maps of all of them, in degrees and pixels.
        boxes: (B, 4) int64 (top, left, height, width), the crop of each, on the images' device.
    """
    flip: bool
    maps: list[tuple[float, ...]]
    boxes: torch.Tensor

    def times(self, factor: int) -> 'Geometry':
        """The same for images `factor` times as large: lengths in pixels grow, angles stay."""
        maps = [(angle, x * factor, y * factor, *shears) for angle, x, y, *shears in self.maps]
        return Geometry(self.flip, maps, self.boxes * factor)


class RandomGeometry:
    """Images (B, d, 2g, 2g) float32 -> (B, d, size, size): flip and affine maps, alike in the batch; a crop of each.

    Args:
        draw_boxes: (B, generator) -> boxes of crops, such as token_augment.RandomResizedCrop.draw of the side 2g.
        size: of the result.
    """

    def __init__(self, draw_boxes: Callable[[int, torch.Generator], torch.Tensor], size: int):
        self.draw_boxes = draw_boxes
        self.size = size

    def draw(self, batch: int, side: int, generator: torch.Generator) -> Geometry:
        """What is done to a batch of images of a side."""
        flip = np.random.random() < FLIP
        return Geometry(flip, draw_maps(side), self.draw_boxes(batch, generator))

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return apply_geometry(x, self.draw(len(x), x.shape[-1], generator), self.size)


def draw_maps(side: int) -> list[tuple[float, ...]]:
    """Rows of affine maps for images of a side: mostly none, else some of rotation, shifts, shears, in this order."""
    if np.random.random() >= AFFINE:
        return []
    drawn = [np.random.uniform(-ANGLE, ANGLE), *np.round(np.random.uniform(-SHIFT * side, SHIFT * side, 2)),
             *np.random.uniform(0, SHEAR, 2)]
    is_used = np.random.random(len(drawn)) < EACH_MAP
    # one row for each map, with zeros for the others: maps follow one another, and each resamples the image
    return [tuple(float(value) if i == number else 0. for i in range(len(drawn)))
            for number, value in enumerate(drawn) if is_used[number]]


def apply_geometry(x: torch.Tensor, geometry: Geometry, size: int) -> torch.Tensor:
    """Flip, map, crop and resample images (B, d, S, S) float32 to (B, d, size, size), channels last in memory."""
    if geometry.flip:
        x = x.flip(-1)
    for row in geometry.maps:
        x = affine_map(x, *row)
    return crop_embeddings(x, geometry.boxes, size)


def affine_map(x: torch.Tensor, angle: float, shift_x: float, shift_y: float, shear_x: float,
               shear_y: float) -> torch.Tensor:
    """Rotate, shear and shift images (B, d, S, S) about their center, bilinearly, with zeros outside.

    As torchvision does it, a plane of ones goes the same way and is multiplied by: pixels on the border of what the
    image covers are weighted twice. Angles are in degrees, shifts in pixels.
    """
    # torchvision's matrix: rotation after shear; grid_sample asks where each pixel comes from, hence the inverse
    a, u, v = (math.radians(degrees) for degrees in (angle, shear_x, shear_y))
    forward = np.array([[math.cos(a - v), -math.cos(a - v) * math.tan(u) - math.sin(a) * math.cos(v)],
                        [math.sin(a - v), -math.sin(a - v) * math.tan(u) + math.cos(a) * math.cos(v)]]) / math.cos(v)
    inverse = np.linalg.inv(forward)
    side = x.shape[-1]
    position = torch.arange(side, device=x.device, dtype=torch.float32) - (side - 1) / 2
    # by Python's numbers: a matrix would have to be copied to the device, and the host to wait for that
    grid = torch.stack([(position - shift_x) * row[0] + (position - shift_y)[:, None] * row[1]
                        for row in inverse.tolist()], -1) * (2 / side)
    planes = F.pad(x.flatten(0, 1), (0, 0, 0, 0, 0, 1), value=1.)[None]  # (1, B·d + 1, S, S): all go the same way
    planes = F.grid_sample(planes, grid[None], mode='bilinear', padding_mode='zeros', align_corners=False)[0]
    return (planes[:-1] * planes[-1]).view(x.shape)


def crop_embeddings(x: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """`resized_crop` of embeddings (B, d, h, w) instead of codes: each position counts as a code of its own."""
    table = rearrange(x, 'b d y x -> (b y x) d')
    codes = torch.arange(len(table), device=x.device).view(x.shape[0], *x.shape[2:])
    return resized_crop(codes, table, boxes, size)
