"""The convolutional VQGAN of the families that publish weights of it.

Esser et al., 'Taming Transformers for High-Resolution Image Synthesis' (CVPR 2021, arXiv 2012.09841). Latent
diffusion, LlamaGen, Janus and IBQ took its encoder and decoder over; MaskGIT's lacks attention and halves images by
averaging. They differ in names, in sizes, in how a code is found, and in the range of their images. Sizes and
attention are read off the names and shapes of a state dict; the rest is a `Family`.

`VQGAN` is the tokenizer, with codes of its own (see tokenizers.py), `from_state_dict` builds it from a checkpoint.
Names within are those of taming; `rename` turns the others into them. All names of encoder and decoder must fit,
since a layer that is silently left out would give other codes.
"""
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from image_tokenizer.vitvqgan import check_divides, check_names_and_shapes, drop_prefix, grid_side, shape_of
from token_files.codebook_sources import EMA, UNIT_ROWS, deviation, fit_rows, unit_rows
from utils import InputError

GROUPS = 32  # of every normalization
MAX_PARTS = 64  # levels, or blocks of a level; published are 5 and 5. More a damaged or hostile file claims
PRODUCTS_AT_ONCE = 1 << 25  # of features with rows of the codebook: 128 MB
TABLE = 'quantize.embedding.weight'
ENCODER = re.compile(r'((?:.*\.)?)encoder\.(down\.0\.block|conv_blocks\.0\.res)\.0\.(?:norm1|conv1)\.weight')
IBQ_BLOCKS = 4  # a level, where taming and latent diffusion publish 2


class Family(NamedTuple):
    """What a state dict's shapes do not say.

    Attributes:
        name: for messages and manifests.
        rule: how a code is found: the nearest row ('euclid'), the row of largest 'cosine' or largest 'dot' product, or
            the largest of 'logits' that a layer gives.
        input_range: lowest and highest value of a pixel.
        names: where its names differ from taming's: pattern, and what takes its place.
    """
    name: str
    rule: str
    input_range: tuple[float, float] = (-1., 1.)
    names: tuple[tuple[str, str | Callable], ...] = ()


LLAMAGEN_NAMES = ((r'^(encoder)\.conv_blocks\.(\d+)\.res\.', r'\1.down.\2.block.'),
                  (r'^(encoder)\.conv_blocks\.', r'\1.down.'),
                  (r'^(decoder)\.conv_blocks\.(\d+)\.res\.', r'\1.up.\2.block.'),
                  (r'^(decoder)\.conv_blocks\.', r'\1.up.'),
                  (r'^(..coder)\.mid\.0\.', r'\1.mid.block_1.'), (r'^(..coder)\.mid\.1\.', r'\1.mid.attn_1.'),
                  (r'^(..coder)\.mid\.2\.', r'\1.mid.block_2.'))
MASKGIT_NAMES = ((r'^(..coder)\.mid\.(\d+)\.', lambda match: f'{match[1]}.mid.block_{int(match[2]) + 1}.'),
                 (r'^(decoder\.up\.\d+)\.upsample_conv\.', r'\1.upsample.conv.'))
TAMING = Family('VQGAN of taming or latent diffusion', 'euclid')
GUMBEL = Family('VQGAN of taming with Gumbel softmax', 'logits')
IBQ = Family('VQGAN of IBQ', 'dot')
LLAMAGEN = Family('VQGAN of LlamaGen or Janus', 'cosine', names=LLAMAGEN_NAMES)
MASKGIT = Family('VQGAN of MaskGIT', 'euclid', (0., 1.), MASKGIT_NAMES)


class Level(NamedTuple):
    """Size of a level: channels, residual blocks, and whether each of them is followed by attention."""
    channels: int
    blocks: int
    attention: bool


class Half(NamedTuple):
    """Size of an encoder or decoder.

    Attributes:
        first: channels after the first convolution.
        levels: from the finest to the coarsest.
        middle: blocks in the middle.
        attention: whether the first of them is followed by attention.
    """
    first: int
    levels: tuple[Level, ...]
    middle: int
    attention: bool


# ---------------------------------------------------------------- layers

def normalization(channels: int) -> nn.GroupNorm:
    """Raises InputError for channels that do not divide into its groups."""
    if channels % GROUPS:
        raise InputError(f'a VQGAN of {channels} channels, which {GROUPS} does not divide')
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """(B, c, H, W) -> (B, channels, H, W). MaskGIT's has no biases, and its shortcut begins behind the convolutions."""

    def __init__(self, c: int, channels: int, maskgit: bool):
        super().__init__()
        self.norm1 = normalization(c)
        self.conv1 = nn.Conv2d(c, channels, 3, padding=1, bias=not maskgit)
        self.norm2 = normalization(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=not maskgit)
        self.nin_shortcut = None
        if c != channels:
            self.nin_shortcut = nn.Conv2d(channels if maskgit else c, channels, 1, bias=not maskgit)
        self.maskgit = maskgit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        if self.nin_shortcut is not None:
            # as it was published, and so trained: x itself is not added there
            x = self.nin_shortcut(changed if self.maskgit else x)
        return x + changed


class Attention(nn.Module):
    """Attention of one head among all positions, (B, c, H, W) -> (B, c, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = normalization(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (rearrange(layer(y), 'b c h w -> b (h w) c') for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(y, 'b (h w) c -> b c h w', h=x.shape[2]))


class Halving(nn.Module):
    """A convolution of stride 2, padded below and at the right alone: (B, c, H, W) -> (B, c, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Doubling(nn.Module):
    """Nearest neighbors and a convolution: (B, c, H, W) -> (B, c, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2., mode='nearest'))


class Blocks(nn.Module):
    """A level without its change of size: residual blocks, each with attention or none."""

    def __init__(self, c: int, level: Level, maskgit: bool):
        super().__init__()
        inputs = [c] + [level.channels] * (level.blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(width, level.channels, maskgit) for width in inputs)
        self.attn = nn.ModuleList(Attention(level.channels) for _ in inputs) if level.attention else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn is not None:
                x = self.attn[i](x)
        return x


def middle(channels: int, half: Half, maskgit: bool) -> nn.Sequential:
    """block_1, attn_1 where there is attention, block_2, ..."""
    layers = nn.Sequential()
    for i in range(1, half.middle + 1):
        layers.add_module(f'block_{i}', ResidualBlock(channels, channels, maskgit))
        if i == 1 and half.attention:
            layers.add_module('attn_1', Attention(channels))
    return layers


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, z, H/p, W/p)."""

    def __init__(self, half: Half, z: int, maskgit: bool):
        super().__init__()
        self.conv_in = nn.Conv2d(3, half.first, 3, padding=1, bias=not maskgit)
        self.down = nn.ModuleList()
        c = half.first
        for level in half.levels:
            part = Blocks(c, level, maskgit)
            c = level.channels
            if level is not half.levels[-1]:
                part.downsample = nn.AvgPool2d(2) if maskgit else Halving(c)
            self.down.append(part)
        self.mid = middle(c, half, maskgit)
        self.norm_out = normalization(c)
        self.conv_out = nn.Conv2d(c, z, 1) if maskgit else nn.Conv2d(c, z, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for part in self.down:
            x = part(x)
            if hasattr(part, 'downsample'):
                x = part.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, z, h, w) -> images (B, 3, h·p, w·p)."""

    def __init__(self, half: Half, z: int, maskgit: bool):
        super().__init__()
        c = half.first
        self.conv_in = nn.Conv2d(z, c, 3, padding=1)
        self.mid = middle(c, half, maskgit)
        parts = []
        for level in reversed(half.levels):  # the coarsest is the first to be computed
            part = Blocks(c, level, maskgit)
            c = level.channels
            if level is not half.levels[0]:
                part.upsample = Doubling(c)
            parts.append(part)
        self.up = nn.ModuleList(reversed(parts))
        self.norm_out = normalization(c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(x))
        for part in reversed(self.up):
            x = part(x)
            if hasattr(part, 'upsample'):
                x = part.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


# ---------------------------------------------------------------- the tokenizer

class VQGAN(nn.Module):
    """An image tokenizer with codes of its own (see image_tokenizer/tokenizers.py for the interface).

    Args:
        family: how codes are found, and the range of images.
        encoder: its size.
        decoder: its size, or None: images cannot be decoded.
        z: channels between the two and their 1x1 convolutions.
        codes: rows of the codebook, K.
        embed_dim: width of a row.

    Attributes:
        kind: the family's name.
        input_range: lowest and highest value of a pixel.
        codebook: (K, embed_dim) float, the rows as `--codebook-path` reads them from the same file: scaled, since
            embedding noise would drown them as they are published, and with one more element where directions are not
            enough (token_files/codebook_sources.py).
    """

    def __init__(self, family: Family, encoder: Half, decoder: Half | None, z: int, codes: int, embed_dim: int):
        super().__init__()
        maskgit = family is MASKGIT
        self.kind = family.name
        self.rule = family.rule
        self.input_range = family.input_range
        self.embed_dim = embed_dim
        self.patch_size = 2 ** (len(encoder.levels) - 1)
        self.encoder = Encoder(encoder, z, maskgit)
        self.quant_conv = nn.Identity() if maskgit else nn.Conv2d(z, embed_dim, 1)
        gumbel = self.rule == 'logits'
        self.quantize = nn.ModuleDict({'embed' if gumbel else 'embedding': nn.Embedding(codes, embed_dim)})
        if gumbel:
            self.quantize['proj'] = nn.Conv2d(embed_dim, codes, 1)
        self.post_quant_conv = None
        self.decoder = None
        if decoder:
            self.post_quant_conv = nn.Identity() if maskgit else nn.Conv2d(embed_dim, z, 1)
            self.decoder = Decoder(decoder, z, maskgit)
        self.register_buffer('codebook', None, persistent=False)
        self.deviation = 1.  # of the rows of the file, which is 1 in `codebook`

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> 'VQGAN':
        """Build the model that a state dict describes, in float32 and eval mode.

        A prefix shared by all names is dropped, foreign names (`loss.*`) are ignored, averaged weights are preferred.

        Raises:
            InputError: naming the family, and what is missing, of another shape, or unknown.
        """
        state = without_prefix(state)
        family = family_of(state)
        state = rename(with_averages(state), family)
        try:
            with torch.device('meta'):  # names and shapes only; the tensors are those of `state`
                model = cls(family, **read_config(state, family))
        except InputError as error:
            raise InputError(f'not a {family.name}: {error}') from None
        expected = model.state_dict()
        check_names_and_shapes(state, expected, f'a {family.name}')
        model.load_state_dict({key: state[key].detach().float() for key in expected}, assign=True)
        model.eval().requires_grad_(False)
        rows = model.rows()
        if not rows.isfinite().all() or not rows.any():
            raise InputError(f'a {family.name} whose codebook is not finite, or all zero: a damaged file')
        model.codebook = fit_rows(rows, f'a {family.name}')
        model.embed_dim = model.codebook.shape[1]
        model.deviation = deviation(rows)
        return model

    def rows(self) -> torch.Tensor:
        """(K, d) the codebook as encoder and decoder know it: of unit length where the rule is 'cosine'."""
        rows = self.quantize['embed' if self.rule == 'logits' else 'embedding'].weight.detach()
        return unit_rows(rows) if self.rule == 'cosine' else rows

    def codes(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float in `input_range` -> (B, n) int64, row by row; -1 where features are not finite.

        H and W: multiples of patch_size. Rows are compared in float32 also under autocast.
        """
        check_divides(images, self.patch_size)
        features = rearrange(self.quant_conv(self.encoder(images)), 'b d h w -> (b h w) d')
        with torch.autocast(images.device.type, enabled=False):
            features = features.float()
            codes = largest_products(features, *self.weights_and_biases())
        codes = torch.where(features.isfinite().all(-1), codes, -1)
        return codes.view(images.shape[0], -1)  # len() would make the number of images a constant of an export

    forward = codes

    def weights_and_biases(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(K, d) and (K,) or None: the code of a feature is that of the largest product and bias, by any rule."""
        if self.rule == 'logits':
            return self.quantize['proj'].weight.flatten(1), self.quantize['proj'].bias
        rows = self.rows()
        # |f - r|^2 / 2 = |f|^2 / 2 - (f r - |r|^2 / 2): |f| does not matter, and neither does it to a cosine
        return rows, -rows.square().sum(1) / 2 if self.rule == 'euclid' else None

    def decode(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, n, embed_dim) rows of `codebook`, n a square -> (B, 3, H, W) float in `input_range`, unclamped."""
        side = grid_side(self.decoder, embeddings)
        width = self.rows().shape[1]  # without a constant element
        rows = rearrange(embeddings[..., :width] * self.deviation, 'b (h w) d -> b d h w', h=side)
        return self.decoder(self.post_quant_conv(rows))


def largest_products(features: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The row of (K, d) whose product with each of features (N, d), plus its bias (K,), is largest: (N,) int64."""
    # traced, for an export, the number of parts would become a constant, and with it the number of images
    at_once = max(1, PRODUCTS_AT_ONCE // len(rows))
    parts = [features] if torch.compiler.is_compiling() else features.split(at_once)
    if bias is None:
        return torch.cat([(part @ rows.T).argmax(1) for part in parts])
    return torch.cat([(part @ rows.T + bias).argmax(1) for part in parts])


# ---------------------------------------------------------------- reading state dicts

def weights_of_file(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict that make a VQGAN, under the names of its family: averaged, without prefix and loss.

    Raises:
        InputError: for none or several.
    """
    parts = 'encoder.', 'decoder.', 'quantize.', 'quant_conv.', 'post_quant_conv.'
    return {key: value for key, value in with_averages(without_prefix(state)).items()
            if key.startswith(parts) and isinstance(value, torch.Tensor)}


def prefixes(state: dict) -> set[str]:
    """What stands before the names of a VQGAN's encoder in `state`: {''} for a plain one, empty for none."""
    return {match.group(1) for match in map(ENCODER.fullmatch, map(str, state)) if match}


def without_prefix(state: dict) -> dict[str, Any]:
    """`state` with the prefix of the tokenizer's names dropped. Raises InputError for none or several."""
    return drop_prefix(state, prefixes(state), 'encoder of a VQGAN', 'encoders of VQGANs')


def family_of(state: dict[str, Any]) -> Family:
    """Whose weights these are, by their names."""
    if any(key.startswith(UNIT_ROWS) for key in state):
        return LLAMAGEN
    if any(key.startswith('encoder.mid.0.') for key in state):
        return MASKGIT
    if any(key.startswith('quantize.proj.') for key in state):
        return GUMBEL
    return IBQ if count(state, r'encoder\.down\.0\.block\.(\d+)\.') == IBQ_BLOCKS else TAMING


def with_averages(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with averaged weights (EMA) in place of the last ones, where it has them."""
    return {key: state.get(EMA + key.replace('.', ''), value) for key, value in state.items()
            if not key.startswith(EMA)}


def rename(state: dict[str, Any], family: Family) -> dict[str, Any]:
    """`state` under the names of taming."""
    renamed = {}
    levels = count(state, r'decoder\.conv_blocks\.(\d+)\.')
    for key, value in state.items():
        for pattern, new in family.names:
            key = re.sub(pattern, new, key)
        if family is LLAMAGEN:  # which numbers the decoder's levels as they are computed, taming as the encoder's
            key = re.sub(r'^(decoder\.up)\.(\d+)', lambda match: f'{match[1]}.{levels - 1 - int(match[2])}', key)
        renamed[key] = value
    return renamed


def count(state: dict[str, Any], pattern: str) -> int:
    """How many numbers stand in a place of the names. Raises InputError for more than can be."""
    found = len({match.group(1) for match in map(re.compile(pattern).match, state) if match})
    if found > MAX_PARTS:
        raise InputError(f'{found} levels or blocks, more than any VQGAN has')
    return found


def read_half(state: dict[str, Any], part: str, levels: str) -> Half:
    """Size of the 'encoder' or 'decoder', whose `levels` are 'down' or 'up'. Raises InputError."""
    sizes = []
    for i in range(count(state, rf'{part}\.{levels}\.(\d+)\.')):
        name = f'{part}.{levels}.{i}'
        sizes.append(Level(shape_of(state, f'{name}.block.0.conv1.weight', 4)[0],
                           count(state, rf'{re.escape(name)}\.block\.(\d+)\.'), f'{name}.attn.0.q.weight' in state))
    if not sizes:
        raise InputError(f'{part}.{levels}.0.block.0.conv1.weight is missing')
    return Half(shape_of(state, f'{part}.conv_in.weight', 4)[0], tuple(sizes),
                count(state, rf'{part}\.mid\.block_(\d+)\.'), f'{part}.mid.attn_1.q.weight' in state)


def read_config(state: dict[str, Any], family: Family) -> dict[str, Any]:
    """VQGAN's arguments but for the family, from names and shapes. Raises InputError."""
    codes, embed_dim = shape_of(state, 'quantize.embed.weight' if family.rule == 'logits' else TABLE, 2)
    encoder = read_half(state, 'encoder', 'down')
    decoder = read_half(state, 'decoder', 'up') if any(key.startswith('decoder.') for key in state) else None
    if decoder and len(decoder.levels) != len(encoder.levels):
        raise InputError(f'{len(encoder.levels)} levels of the encoder, but {len(decoder.levels)} of the decoder')
    z = shape_of(state, 'encoder.conv_out.weight', 4)[0]
    if family is MASKGIT and z != embed_dim:  # nothing stands between the two
        raise InputError(f'the encoder gives {z} channels, but rows of the codebook have {embed_dim}')
    return {'encoder': encoder, 'decoder': decoder, 'z': z, 'codes': codes, 'embed_dim': embed_dim}


# names, by a part of them, that tell what a file is near to, where it is none that is read
NEAR = {TAMING.name: ('encoder.down.', 'encoder.mid.block_1.', 'decoder.up.', 'quant_conv.', TABLE),
        LLAMAGEN.name: ('encoder.conv_blocks.', 'decoder.conv_blocks.', 'quant_conv.', TABLE),
        MASKGIT.name: ('encoder.down.', 'encoder.mid.0.', 'decoder.up.', 'upsample_conv.', TABLE),
        'ViT-VQGAN': ('encoder.transformer.', 'to_patch_embedding.', 'pre_quant.', 'post_quant.',
                      'quantizer.embedding.weight')}


def nearest_family(state: dict) -> str:
    """The kind of tokenizer that shares most names with `state`, and one that is missing, in words; '' for none."""
    names = [str(key) for key in state]
    there = {kind: [any(mark in name for name in names) for mark in marks] for kind, marks in NEAR.items()}
    kind = max(there, key=lambda kind: sum(there[kind]) / len(there[kind]))
    if not any(there[kind]):
        return ''
    missing = [mark for mark, found in zip(NEAR[kind], there[kind]) if not found]
    return f'{kind}, but without {missing[0]}*' if missing else kind
