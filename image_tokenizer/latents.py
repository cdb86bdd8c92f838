"""Codes of a pre-trained autoencoder: k-means in the latents of the TAESD family.

The tiny autoencoders of madebyollin/taesd (MIT) turn 8x8 pixels into a latent of 4, 16 or 32 numbers, and back. Their
files are plain state dicts of an `nn.Sequential`. A codebook fitted in their latents makes a tokenizer of them that has
seen far more images than a user's own, without a GPU.

`LatentTokenizer` is the tokenizer, with codes of its own (see tokenizers.py); latent_fit.py makes one.
"""
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from image_tokenizer.kmeans import nearest_rows
from image_tokenizer.vitvqgan import check_divides, check_names_and_shapes, grid_side, shape_of
from token_files.codebook_sources import deviation, fit_rows
from utils import InputError

PATCH = 8  # pixels on a side of a latent
CLAMP = 3.  # largest latent that a decoder reads


# ---------------------------------------------------------------- the autoencoder

class Block(nn.Module):
    """Three convolutions and a skip, (B, c, H, W) -> (B, c, H, W); with `pooled`, a change by pooled groups first."""

    def __init__(self, width: int, pooled: bool):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(width, width, 3, padding=1))
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(nn.Conv2d(width, 4 * width, 1, bias=False), nn.GroupNorm(4, 4 * width), nn.ReLU(),
                                      nn.Conv2d(4 * width, width, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """Softly to -CLAMP ... CLAMP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / CLAMP) * CLAMP


def make_encoder(width: int, dim: int, pooled: bool) -> nn.Sequential:
    """Images (B, 3, H, W) in [0, 1] -> latents (B, dim, H/8, W/8), with the numbers of layers as published."""
    layers = [nn.Conv2d(3, width, 3, padding=1), Block(width, False)]
    for stage in range(3):
        layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
        layers += [Block(width, pooled and stage == 2) for _ in range(3)]
    return nn.Sequential(*layers, nn.Conv2d(width, dim, 3, padding=1))


def make_decoder(width: int, dim: int, pooled: bool) -> nn.Sequential:
    """Latents -> images, unclamped."""
    layers = [Clamp(), nn.Conv2d(dim, width, 3, padding=1), nn.ReLU()]
    for stage in range(3):
        layers += [Block(width, pooled and stage == 0) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2.), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Block(width, False), nn.Conv2d(width, 3, 3, padding=1))


# ---------------------------------------------------------------- the tokenizer

class LatentTokenizer(nn.Module):
    """A tiny autoencoder whose latents get the code of the nearest of K centers.

    Args:
        width: channels of the autoencoder.
        dim: elements of a latent.
        pooled: whether it is of the kind with pooled groups, as that of FLUX.2.
        codes: K.
        decodes: whether it has a decoder.

    Attributes:
        centers: (K, dim) in the latents.
        codebook: (K, embed_dim) float: the centers scaled, as training reads them.
    """

    kind = 'k-means of a tiny autoencoder'
    input_range = 0, 1
    patch_size = PATCH

    def __init__(self, width: int, dim: int, pooled: bool, codes: int, decodes: bool):
        super().__init__()
        self.encoder = make_encoder(width, dim, pooled)
        self.decoder = make_decoder(width, dim, pooled) if decodes else None
        self.register_buffer('centers', torch.zeros(codes, dim))
        self.register_buffer('codebook', None, persistent=False)
        self.embed_dim = dim
        self.deviation = 1.

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> 'LatentTokenizer':
        """The tokenizer of a state dict, in float32 and eval mode. Raises InputError for names or shapes of another."""
        codes, dim = shape_of(state, 'centers', 2)
        width = shape_of(state, 'encoder.0.weight', 4)[0]
        with torch.device('meta'):  # names and shapes only; the tensors are those of `state`
            model = cls(width, dim, 'encoder.11.pool.0.weight' in state, codes,
                        any(str(key).startswith('decoder.') for key in state))
        expected = model.state_dict()
        check_names_and_shapes(state, expected, f'a {cls.kind}')
        model.load_state_dict({key: state[key].detach().float() for key in expected}, assign=True)
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise InputError(f'a {cls.kind} with values that are not finite: a damaged file')
        model.codebook = fit_rows(model.centers, f'a {cls.kind}')
        model.embed_dim = model.codebook.shape[1]
        model.deviation = deviation(model.centers)
        return model.eval().requires_grad_(False)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, n, dim), row by row. H and W: multiples of 8."""
        check_divides(images, PATCH)
        if images.device.type == 'cpu':  # whose convolutions are 1.6 times as fast so
            images = images.contiguous(memory_format=torch.channels_last)
        return rearrange(self.encoder(images), 'b d h w -> b (h w) d')

    def codes(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, n) int64, row by row; -1 where latents are not finite."""
        latents = self.latents(images)
        with torch.autocast(images.device.type, enabled=False):
            latents = latents.float()
            codes = nearest_rows(latents.flatten(0, 1), self.centers).view(latents.shape[0], -1)
        return torch.where(latents.isfinite().all(-1), codes, -1)

    forward = codes

    def decode(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, n, embed_dim) rows of `codebook`, n a square -> (B, 3, H, W) float, unclamped. Raises InputError."""
        side = grid_side(self.decoder, embeddings)
        latents = embeddings[..., :self.centers.shape[1]] * self.deviation  # without a constant element
        return self.decoder(rearrange(latents, 'b (h w) d -> b d h w', h=side))


def is_latent_tokenizer(state: dict[str, Any]) -> bool:
    """Whether a state dict is one of `LatentTokenizer`."""
    return 'centers' in state and 'encoder.0.weight' in state
