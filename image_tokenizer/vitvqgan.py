"""ViT-VQGAN, the tokenizer SeiT was trained on, under the parameter names of the public checkpoints.

Yu et al., 'Vector-quantized Image Modeling with Improved VQGAN' (ICLR 2022, arXiv 2110.04627), section 3.1 for the
encoder and the decoder, 3.2 for the codebook: narrow rows, L2-normalized before they are compared or decoded.

`ViTVQGAN` is the tokenizer, `ViTVQGAN.from_state_dict` builds it from a checkpoint: sizes are read off the shapes, and
all names must fit, since a layer that is silently left out would give other codes. Module names, such as `to_qkv`,
`fn` and `net`, are those of the checkpoints.
"""
import math
import re
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils import InputError

HEAD_DIM = 64  # of every published size
KERNEL = 7  # of ConvNeXt
# More than these a damaged or hostile file claims; the published 'base' has 786,432 and 12.
MAX_TABLE = 1 << 26  # numbers in a position table
MAX_DEPTH = 256  # layers of a transformer


class Size(NamedTuple):
    """Size of one transformer: width, layers, attention heads, feed-forward width. Without heads: of `Convolutions`."""
    dim: int
    depth: int
    heads: int
    mlp_dim: int


SIZES = {'small': Size(512, 8, 8, 2048), 'base': Size(768, 12, 12, 3072)}


# ---------------------------------------------------------------- transformer

def position_table(height: int, width: int, dim: int, device: torch.device | None = None) -> torch.Tensor:
    """Fixed position embedding: [sin x, cos x, sin y, cos y], dim/4 each; x is the column, y the row.

    Returns:
        (1, height·width, dim) float32, row by row.

    Raises:
        InputError: unless 4 divides `dim`, and for a table that is too large.
    """
    if dim % 4:
        raise InputError(f'a position embedding of width {dim} cannot be computed: the width must be a multiple of 4')
    if height * width * dim > MAX_TABLE:
        raise InputError(f'a position embedding for {height}x{width} codes of width {dim} is too large')
    frequency = 10000 ** (-torch.arange(dim // 4, device=device) / (dim // 4))

    def sines_and_cosines(length: int) -> torch.Tensor:
        angle = torch.arange(length, device=device)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], -1)  # (length, dim/2)

    x = repeat(sines_and_cosines(width), 'w d -> (h w) d', h=height)
    y = repeat(sines_and_cosines(height), 'h d -> (h w) d', w=width)
    return torch.cat([x, y], -1)[None]


def add_position(x: torch.Tensor, height: int, width: int, table: torch.Tensor) -> torch.Tensor:
    """x (B, height·width, dim) plus `table` (1, side², dim), or plus a computed table where the grid is another."""
    if height != width or table.shape[1] != height * width:
        table = position_table(height, width, x.shape[-1], x.device).to(table.dtype)
    return x + table


class Attention(nn.Module):
    """Self-attention, (B, n, dim) -> (B, n, dim); queries, keys and values without bias."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * HEAD_DIM, bias=False)
        self.to_out = nn.Linear(heads * HEAD_DIM, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = rearrange(self.to_qkv(x), 'b n (t h d) -> t b h n d', t=3, h=self.heads)
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), 'b h n d -> b n (h d)'))


class FeedForward(nn.Module):
    """(B, n, dim) -> (B, n, dim). Tanh, not GELU: what the public weights were trained with."""

    def __init__(self, dim: int, mlp_dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, mlp_dim), nn.Tanh(), nn.Linear(mlp_dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class PreNorm(nn.Module):
    """`fn` of the normalized input."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(self.norm(x))


class Transformer(nn.Module):
    """Pre-norm layers and a final norm, (B, n, dim) -> (B, n, dim); the sides of the grid do not matter."""

    def __init__(self, size: Size):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([PreNorm(size.dim, Attention(size.dim, size.heads)),
                           PreNorm(size.dim, FeedForward(size.dim, size.mlp_dim))]) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.dim)
        self.grad_checkpointing = False  # recompute activations: less memory, more time

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        for layer in self.layers:
            for part in layer:  # attention, feed-forward
                recompute = self.grad_checkpointing and torch.is_grad_enabled()
                x = x + (checkpoint(part, x, use_reentrant=False) if recompute else part(x))
        return self.norm(x)


class Convolutions(nn.Module):
    """ConvNeXt's blocks on the grid, in a transformer's place, (B, height·width, dim) -> (B, height·width, dim).

    Our own, and in no published file: attention over 28x28 codes takes three to four times as long on a CPU.
    """

    def __init__(self, size: Size):
        super().__init__()
        self.layers = nn.ModuleList(ConvNeXtBlock(size.dim, kernel_size=KERNEL, mlp_ratio=size.mlp_dim / size.dim,
                                                  ls_init_value=None) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.dim)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        x = rearrange(x, 'b (h w) d -> b d h w', h=height, w=width)  # no copy: the layout is channels-last
        for layer in self.layers:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return self.norm(rearrange(x, 'b d h w -> b (h w) d'))


def make_layers(size: Size) -> nn.Module:
    """What stands between patches and features, on both sides."""
    return Transformer(size) if size.heads else Convolutions(size)


# ---------------------------------------------------------------- encoder, decoder, tokenizer

class Encoder(nn.Module):
    """(B, channels, H, W) -> (B, n, dim), n = H/patch · W/patch; `grid_size` is the stored position table's side."""

    def __init__(self, size: Size, patch_size: int, grid_size: int, channels: int = 3):
        super().__init__()
        # a Sequential of one, for the published name to_patch_embedding.0
        self.to_patch_embedding = nn.Sequential(nn.Conv2d(channels, size.dim, patch_size, stride=patch_size))
        self.register_buffer('en_pos_embedding', position_table(grid_size, grid_size, size.dim))
        self.transformer = make_layers(size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.to_patch_embedding(images)  # (B, dim, h, w)
        height, width = x.shape[-2:]
        x = rearrange(x, 'b d h w -> b (h w) d')
        return self.transformer(add_position(x, height, width, self.en_pos_embedding), height, width)


class Decoder(nn.Module):
    """(B, n, dim), n a square -> (B, channels, H, W), unclamped."""

    def __init__(self, size: Size, patch_size: int, grid_size: int, channels: int = 3):
        super().__init__()
        self.register_buffer('de_pos_embedding', position_table(grid_size, grid_size, size.dim))
        self.transformer = make_layers(size)
        convolution = nn.ConvTranspose2d(size.dim, channels, patch_size, stride=patch_size)
        self.to_pixel = nn.Sequential(OrderedDict({'1': convolution}))  # the published name is to_pixel.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(x.shape[1])
        x = self.transformer(add_position(x, side, side, self.de_pos_embedding), side, side)
        return self.to_pixel(rearrange(x, 'b (h w) d -> b d h w', h=side))


class ViTVQGAN(nn.Module):
    """An image tokenizer (see image_tokenizer/tokenizers.py for the interface).

    Args:
        encoder: Size of the encoder.
        decoder: Size of the decoder, or None: images cannot be decoded.
        codebook_size: rows of the codebook, or 0: the codebook is elsewhere, as SeiT's is.
        embed_dim: width of features and of codebook rows.
        image_size: pixels of the square images the position tables are stored for; for others they are computed.
        patch_size: pixels a code covers, on each side.
    """

    kind = 'ViT-VQGAN'

    def __init__(self, encoder: Size, decoder: Size | None = None, codebook_size: int = 0, embed_dim: int = 32,
                 image_size: int = 256, patch_size: int = 8):
        super().__init__()
        if not encoder.heads:
            self.kind = 'VQGAN of ConvNeXt blocks'
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.image_size = image_size
        grid_size = image_size // patch_size
        self.encoder = Encoder(encoder, patch_size, grid_size)
        self.pre_quant = nn.Linear(encoder.dim, embed_dim)
        self.quantizer = nn.ModuleDict({'embedding': nn.Embedding(codebook_size, embed_dim)}) if codebook_size else None
        self.post_quant = nn.Linear(embed_dim, decoder.dim) if decoder else None
        self.decoder = Decoder(decoder, patch_size, grid_size) if decoder else None

    @classmethod
    def from_name(cls, name: str) -> 'ViTVQGAN':
        """The published size 'small' or 'base', whole, with 8192 codes and random weights: for benchmarks.

        Raises:
            InputError: for another name.
        """
        if name not in SIZES:
            raise InputError(f'no ViT-VQGAN is called {name}: choose {" or ".join(SIZES)}')
        return cls(SIZES[name], SIZES[name], codebook_size=8192)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> 'ViTVQGAN':
        """Build the model a state dict describes, in float32 and eval mode.

        Sizes are read from the shapes. A prefix shared by all names is dropped, foreign names (`loss.*`) are ignored,
        position tables may be absent.

        Raises:
            InputError: naming what is missing, of another shape, or unknown.
        """
        state = drop_prefix(state, prefixes(state), 'ViT-VQGAN encoder', 'ViT-VQGAN encoders')
        with torch.device('meta'):  # names and shapes only; the tensors are those of `state`
            model = cls(**read_config(state))
        expected = model.state_dict()
        grid_size = model.image_size // model.patch_size
        tables = {key: position_table(grid_size, grid_size, value.shape[-1]) for key, value in expected.items()
                  if key.endswith('_pos_embedding')}
        state = tables | state
        check_names_and_shapes(state, expected)
        model.load_state_dict({key: state[key].detach().float() for key in expected}, assign=True)
        return model.eval()

    @property
    def codebook(self) -> torch.Tensor | None:
        """(K, embed_dim) float, rows as stored, or None where the checkpoint has none."""
        return None if self.quantizer is None else self.quantizer['embedding'].weight.detach()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, n, embed_dim) features, row by row. H and W: multiples of patch_size."""
        check_divides(images, self.patch_size)
        return self.pre_quant(self.encoder(images))

    def decode(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, n, embed_dim) codebook rows as stored, n a square -> (B, 3, H, W) float, unclamped.

        The decoder was trained on normalized rows (section 3.2), so they are normalized here.
        """
        grid_side(self.decoder, embeddings)
        return self.decoder(self.post_quant(F.normalize(embeddings, dim=-1)))


def check_divides(images: torch.Tensor, patch_size: int) -> None:
    """InputError unless images (B, 3, H, W) divide into patches."""
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise InputError(f'images of {height}x{width} do not divide into patches of {patch_size}: choose an image size '
                         f'that is a multiple of {patch_size}')


def grid_side(decoder: nn.Module | None, embeddings: torch.Tensor) -> int:
    """Codes on a side of embeddings (B, n, d) that are to be decoded. Raises InputError where that cannot be."""
    if decoder is None:
        raise InputError('this tokenizer has no decoder: codes cannot be turned back into images')
    side = math.isqrt(embeddings.shape[1])
    if side ** 2 != embeddings.shape[1]:
        raise InputError(f'{embeddings.shape[1]} codes are no square grid: only square images can be decoded')
    return side


# ---------------------------------------------------------------- reading state dicts

def prefixes(state: dict) -> set[str]:
    """What stands before the names of a ViT-VQGAN encoder in `state`: a set, {''} for a plain one, empty for none."""
    name = re.compile(r'((?:.*\.)?)(?:encoder\.(?:to_patch_embedding|transformer)|pre_quant)\.')
    return {match.group(1) for match in map(name.match, map(str, state)) if match}


def drop_prefix(state: dict, found: set[str], one: str, several: str) -> dict[str, Any]:
    """`state` with the prefix common to the tokenizer's names dropped. Raises InputError for none or several.

    Args:
        state: of any names.
        found: its prefixes, as `prefixes` finds them.
        one, several: what has them, for errors.
    """
    choices = sorted(found)  # '' first
    if not choices:
        raise InputError(f'holds no {one}')
    prefix = choices[0]
    if prefix and len(choices) > 1:
        raise InputError(f'holds several {several}, under {" and ".join(choices)}')
    return {str(key)[len(prefix):]: value for key, value in state.items() if str(key).startswith(prefix)}


def shape_of(state: dict[str, Any], key: str, dims: int) -> tuple[int, ...]:
    """Shape of the tensor `key`. Raises InputError where it is missing, or has not `dims` non-empty dimensions."""
    if not isinstance(state.get(key), torch.Tensor) or not state[key].is_floating_point():
        raise InputError(f'{key} is missing')
    shape = tuple(state[key].shape)
    if len(shape) != dims or 0 in shape:
        raise InputError(f'{key} has shape {shape}: expected {dims} dimensions')
    return shape


def read_size(state: dict[str, Any], part: str) -> Size:
    """Size of the layers of 'encoder' or 'decoder', from the shapes. Raises InputError."""
    name = f'{part}.transformer.layers'
    layers = re.compile(rf'{re.escape(name)}\.(\d+)\.')
    depth = len({match.group(1) for match in map(layers.match, state) if match})
    if depth > MAX_DEPTH:
        raise InputError(f'{part} has {depth} layers, more than any ViT-VQGAN')
    if f'{name}.0.conv_dw.weight' in state:
        mlp_dim, dim = shape_of(state, f'{name}.0.mlp.fc1.weight', 2)
        return Size(dim, depth, 0, mlp_dim)
    rows, dim = shape_of(state, f'{name}.0.0.fn.to_qkv.weight', 2)
    mlp_dim = shape_of(state, f'{name}.0.1.fn.net.0.weight', 2)[0]
    return Size(dim, depth, max(1, rows // (3 * HEAD_DIM)), mlp_dim)


def read_config(state: dict[str, Any]) -> dict[str, Any]:
    """ViTVQGAN's arguments, from the shapes. Raises InputError."""
    patch_size = shape_of(state, 'encoder.to_patch_embedding.0.weight', 4)[-1]
    image_size = 256
    if 'encoder.en_pos_embedding' in state:
        image_size = patch_size * math.isqrt(shape_of(state, 'encoder.en_pos_embedding', 3)[1])
    codebook = 'quantizer.embedding.weight'
    return {'encoder': read_size(state, 'encoder'),
            'decoder': read_size(state, 'decoder') if any(key.startswith('decoder.') for key in state) else None,
            'codebook_size': shape_of(state, codebook, 2)[0] if codebook in state else 0,
            'embed_dim': shape_of(state, 'pre_quant.weight', 2)[0],
            'image_size': image_size, 'patch_size': patch_size}


def check_names_and_shapes(state: dict[str, Any], expected: dict[str, torch.Tensor], what: str = 'a ViT-VQGAN') -> None:
    """InputError unless `state` has every name of `expected` in its shape, and no unknown one in encoder or decoder.

    `what`: the kind of tokenizer, for the message.
    """
    problems = []
    for key, value in expected.items():
        if not isinstance(state.get(key), torch.Tensor) or not state[key].is_floating_point():
            problems.append(f'{key} is missing')
        elif state[key].shape != value.shape:
            problems.append(f'{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}')
    # An extra tensor there (a bias, say) means another architecture, whose features would silently differ.
    problems += [f'{key} is unknown' for key in state
                 if key.startswith(('encoder.', 'decoder.')) and key not in expected]
    if problems:
        more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
        raise InputError(f'not {what}: {"; ".join(problems[:3])}{more}')
