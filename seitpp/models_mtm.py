"""Masked-token modeling (SeiT++, ECCV 2024, sec. 3): an encoder that reads codes, a decoder that predicts masked ones.

A ViT reads patches of 2x2 codes. Some patches are masked: a learned token stands for them, or they are left out
before the encoder. From what it sees a small decoder predicts the codes of the masked patches.

In the order of a training step: `draw_masks`, `MaskedTokenModel.encode` and `.decode`, `masked_token_loss`.

Shapes: codes (B, s, s) int64; N = (s/2)² patches; masked (B, N) bool; logits (B, s², K) for K codes, row by row.
"""
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import register_model
from timm.models.vision_transformer import Block
from torch import nn

from image_tokenizer.vitvqgan import position_table
from models_seit import check_loads_nothing
from utils import InputError, device_of_sums, uniform_float64

PATCH = 2  # codes on a side
CODE_DIM = 32  # elements of a learned code embedding
DROPOUT = 0.1  # of code embeddings and in the decoder
LAYER_NORM = functools.partial(nn.LayerNorm, eps=1e-6)
TIMM_ARGUMENTS = ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir')  # timm's create_model passes them on


# ---------------------------------------------------------------- masks

class Masks(NamedTuple):
    """Which patches are seen, (B, n) int64 in rising order, and which are to be predicted, (B, N) bool.

    A patch that is seen and masked is seen as a mask token.
    """
    seen: torch.Tensor
    masked: torch.Tensor


@dataclass(frozen=True)
class MaskRatio:
    """The fraction of patches that are masked: normally distributed, cut off at both ends.

    `low` is also the fraction of patches that are left out before the encoder, so that the encoder's sequences have one
    length whatever ratio is drawn.

    Raises:
        InputError: for ratios out of order, that mask nothing, or that are hardly ever drawn.
    """
    low: float = 0.4
    high: float = 1.
    mean: float = 0.45
    std: float = 0.25

    def __post_init__(self) -> None:
        if self.high == 0:  # any ratio above 0 masks a patch, as numbers of patches are rounded up
            raise InputError('--mask-ratio-max 0 masks nothing, so that there is nothing to predict: give it above 0')
        if not 0 <= self.low <= self.high <= 1 or self.low == 1:
            raise InputError(f'mask ratios from {self.low:g} to {self.high:g}: give --mask-ratio-min and '
                             '--mask-ratio-max in rising order, from 0 to 1, the first below 1')
        first, last = self._ends()
        if self.low < self.high and last - first < 1e-6:
            raise InputError(f'--mask-ratio-mu {self.mean:g} with --mask-ratio-std {self.std:g} gives hardly any ratio '
                             f'from {self.low:g} to {self.high:g}: choose a mean that is nearer, another '
                             'deviation, or ratios further apart')

    def _ends(self) -> list[float]:
        """The probabilities, of the whole normal distribution, of a value below `low` and below `high`."""
        return [math.erfc((self.mean - end) / self.std / 2 ** 0.5) / 2 for end in (self.low, self.high)]

    def quantile(self, probability: torch.Tensor) -> torch.Tensor:
        """The ratio, float64, below which a draw lies with a probability (float64, 0 to 1)."""
        first, last = self._ends()  # plain numbers: a tensor of them would have to be copied to the device
        ratio = self.mean + self.std * torch.special.ndtri(first + probability * (last - first))
        return ratio.clamp(self.low, self.high)

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """One ratio () float64, on `device_of_sums` of the generator's device."""
        return self.quantile(uniform_float64((), generator))


def masks_of(noise: torch.Tensor, ratio: torch.Tensor | float, unseen: float) -> Masks:
    """Masks by noise (B, N): the ceil(N·ratio) least of an image are masked, the ceil(N·unseen) least never seen.

    `ratio` is at least `unseen`. How many are masked is not asked of the device.
    """
    n = noise.shape[1]
    order = noise.argsort(1)
    # from the least noise on: first patches that are never seen, then those seen as mask tokens, then the visible ones
    seen = order[:, math.ceil(n * unseen):].sort(1).values
    count = (n * torch.as_tensor(ratio, dtype=torch.float64, device=device_of_sums(noise.device))).ceil()
    count = count.long().to(noise.device)
    return Masks(seen, order.argsort(1) < count)  # argsort of an order: the rank of each patch


def draw_masks(batch: int, patches: int, ratio: MaskRatio, generator: torch.Generator) -> Masks:
    """Masks of a batch: one ratio for all its images, in each the patches at random."""
    drawn_ratio = ratio.draw(generator)
    noise = torch.rand(batch, patches, generator=generator, device=generator.device)
    return masks_of(noise, drawn_ratio, ratio.low)


# ---------------------------------------------------------------- the model

class TokenEmbedding(nn.Module):
    """codes (B, s, s) int64 -> (B, code_dim, s, s): a learned embedding, normalized, and dropout.

    `word_embeddings` and `LayerNorm` are published names of weights.
    """

    def __init__(self, codebook_size: int, code_dim: int = CODE_DIM) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(codebook_size, code_dim)
        self.LayerNorm = nn.LayerNorm(code_dim, eps=1e-6)
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.normal_(self.word_embeddings.weight, std=0.02)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return rearrange(self.dropout(self.LayerNorm(self.word_embeddings(codes))), 'b y x d -> b d y x')


class CodePatches(nn.Module):
    """(B, code_dim, s, s) -> (B, N, embed_dim): one token for each patch of codes."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(CODE_DIM, embed_dim, PATCH, PATCH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class CodePrediction(nn.Module):
    """(B, N, dim) -> logits (B, s², K): each patch token gives an embedding to each of its codes, which is compared
    with those of all codes."""

    def __init__(self, dim: int, codebook_size: int, grid_size: int) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.bias = nn.Parameter(torch.zeros(1, 1, codebook_size))
        self.fc = nn.Linear(dim, PATCH * PATCH * CODE_DIM)
        self.ln = nn.LayerNorm(CODE_DIM)

    def forward(self, x: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        x = rearrange(self.fc(x), 'b (h w) (y x d) -> b (h y w x) d', h=self.grid_size, y=PATCH, x=PATCH)
        return self.ln(F.gelu(x)) @ embeddings.T + self.bias


class MaskedTokenModel(nn.Module):
    """Codes and masks -> logits of all codes. The state dict has the published names.

    The fixed sine-cosine `decoder_pos_embed` belongs to the published weights; nothing reads it. TokenAdapt's networks
    are kept beside these weights by `keep_token_adapt`.

    Args:
        codebook_size: K.
        img_size: s, an even number of codes on a side.
        embed_dim, depth, num_heads: of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder.
    """

    def __init__(self, codebook_size: int = 391, img_size: int = 28, embed_dim: int = 768, depth: int = 12,
                 num_heads: int = 12, decoder_embed_dim: int = 512, decoder_depth: int = 4,
                 decoder_num_heads: int = 16) -> None:
        super().__init__()
        if img_size < PATCH or img_size % PATCH:
            raise ValueError(f'an input size of {img_size} is no multiple of the patch size, {PATCH}')
        self.grid_size = img_size // PATCH
        positions = 1 + self.grid_size ** 2  # of the class token and the patches
        self.mask_token_label = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = fixed_positions(self.grid_size, embed_dim)
        self.decoder_pos_embed = fixed_positions(self.grid_size, decoder_embed_dim)
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, decoder_embed_dim))
        self.token_emb = TokenEmbedding(codebook_size)
        self.patch_embed = CodePatches(embed_dim)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, qkv_bias=True, norm_layer=LAYER_NORM) for _ in range(depth))
        self.norm = LAYER_NORM(embed_dim)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, qkv_bias=True, proj_drop=DROPOUT, attn_drop=DROPOUT,
                  norm_layer=LAYER_NORM) for _ in range(decoder_depth))
        self.decoder_norm = LAYER_NORM(decoder_embed_dim)
        self.mlm_layer = CodePrediction(decoder_embed_dim, codebook_size, self.grid_size)
        self.init_weights()

    def init_weights(self) -> None:
        """As published: Xavier for linear layers, PyTorch's default for the patch convolution."""
        nn.init.normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def encode(self, codes: torch.Tensor, masks: Masks) -> torch.Tensor:
        """(B, 1 + n, embed_dim): features of the class token and of the patches that are seen."""
        x = self.patch_embed(self.token_emb(codes))
        x = torch.where(masks.masked[..., None], self.mask_token_label.to(x.dtype), x) + self.pos_embed[:, 1:]
        x = x.gather(1, _rows(masks.seen, x))  # (B, n, embed_dim), some of them mask tokens
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token.to(x.dtype), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, features: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Features of `encode` -> logits. The class token of the image stands at each masked position, as published."""
        x = self.decoder_embed(features)
        fillers = x[:, :1].expand(-1, masks.masked.shape[1], -1)  # (B, N, decoder_embed_dim)
        known = fillers.scatter(1, _rows(masks.seen, x), x[:, 1:])
        # a patch that was seen as a mask token is filled too: the encoder knows nothing of it
        x = torch.cat([x[:, :1], torch.where(masks.masked[..., None], fillers, known)], 1)
        x = x + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        # logits do not train the embeddings they are compared with
        return self.mlm_layer(self.decoder_norm(x)[:, 1:], self.token_emb.word_embeddings.weight.detach())

    def forward(self, codes: torch.Tensor, seen: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        masks = Masks(seen, masked)
        return self.decode(self.encode(codes, masks), masks)


def fixed_positions(grid_size: int, dim: int) -> nn.Parameter:
    """(1, 1 + grid_size², dim) that does not train: zeros for the class token, then a sine-cosine table."""
    table = position_table(grid_size, grid_size, dim)
    return nn.Parameter(torch.cat([torch.zeros(1, 1, dim), table], 1), requires_grad=False)


def _rows(indices: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Indices (B, n) of rows of x (B, N, D), as gather and scatter take them: (B, n, D)."""
    return indices[..., None].expand(-1, -1, x.shape[-1])


def keep_token_adapt(model: nn.Module, token_adapt: nn.Module | None) -> None:
    """Put TokenAdapt's frozen networks into a model's state dict, where the published checkpoints have them."""
    if token_adapt is not None:
        model.conversion_function = token_adapt.conversion_function.requires_grad_(False)
        model.reverse_transform = token_adapt.reverse_transform.requires_grad_(False)


# ---------------------------------------------------------------- loss

def masked_token_loss(logits: torch.Tensor, codes: torch.Tensor, masked: torch.Tensor, smoothing: float = 0.,
                      bce: bool = False) -> torch.Tensor:
    """Cross-entropy of the codes, mean over the masked patches of a batch.

    Args:
        logits: (B, s², K).
        codes: (B, s, s) int64, the true ones.
        masked: (B, N) bool.
        smoothing: of the labels.
        bce: binary cross-entropy with each of the K codes instead, mean over them.
    """
    side = codes.shape[-1]
    if bce:
        truth = F.one_hot(codes.flatten(1), logits.shape[-1]).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, truth, reduction='none').mean(-1)
    else:
        losses = F.cross_entropy(logits.transpose(1, 2), codes.flatten(1), reduction='none', label_smoothing=smoothing)
    losses = rearrange(losses, 'b (h y w x) -> b (h w) (y x)', h=side // PATCH, y=PATCH, x=PATCH).mean(-1)
    return (losses * masked).sum() / masked.sum().clamp(min=1)  # masks of the caller may be empty


# ---------------------------------------------------------------- timm's names

@register_model
def mae_token_vit_base_patch16_dec512d4b_k2s2_vitvqgan_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The published model: ViT-B, patches of 2x2 codes, a decoder of 4 blocks of 512."""
    if pretrained:
        raise ValueError('no weights of masked-token models are hosted; load a checkpoint with load_state_dict')
    return MaskedTokenModel(**{name: value for name, value in kwargs.items() if name not in TIMM_ARGUMENTS})


MODELS = timm.list_models(module='models_mtm')


def create_model(name: str, model_kwargs: dict[str, Any], codebook_size: int, img_size: int) -> nn.Module:
    """The model of --model and --model-kwargs, for codes and sizes as given. Raises InputError."""
    if name not in MODELS:
        raise InputError(f'--model {name} is none of {", ".join(MODELS)}: give its sizes by --model-kwargs')
    return make_model(name, name, model_kwargs, codebook_size=codebook_size, img_size=img_size)


def make_model(name: str, registered: str, model_kwargs: dict[str, Any], **options: Any) -> nn.Module:
    """timm's model of a registered name, with the user's arguments; mistakes in those are InputErrors.

    Args:
        name: as the user gave it, for errors.
        registered: timm's.
        model_kwargs: the user's arguments.
        **options: the program's arguments.
    """
    check_loads_nothing(model_kwargs)
    try:
        return timm.create_model(registered, **options, **model_kwargs)
    except (ArithmeticError, AssertionError, AttributeError, InputError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        arguments = f' with --model-kwargs {model_kwargs}' if model_kwargs else ''
        raise InputError(f'the model {name}{arguments}: {str(error) or repr(error)}') from None
