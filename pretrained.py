"""Fine-tuning: --finetune, which starts from other weights, and --attn-only, which trains few of them."""
import math
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from checkpoints import load_checkpoint, load_weights
from utils import InputError, print0

DISTILLATION = ('dist_token', 'head_dist.')


def load_pretrained(model: nn.Module, path: str) -> None:
    """--finetune: start from other weights, of tokens or of pixels. Raises InputError for another architecture.

    A head or stem of another shape starts from scratch, weights of distillation are left out where the model has none,
    and position embeddings are resampled bicubically. What timm calls `fc_norm` after mean pooling is `norm` in models
    of tokens: it is taken by either name.
    """
    weights = dict(load_checkpoint(path)['model'])
    wanted = model.state_dict()
    for key in [key for key in weights if str(key).startswith(DISTILLATION) and key not in wanted]:
        print0(f'--finetune: {key} is left out: the model has no distillation token')
        del weights[key]
    for ours, theirs in (('norm.', 'fc_norm.'), ('fc_norm.', 'norm.')):
        for end in ('weight', 'bias'):
            if ours + end in wanted and ours + end not in weights and theirs + end in weights:
                weights[ours + end] = weights.pop(theirs + end)
    for prefix in (*prefixes(model, 'classifier'), *prefixes(model, 'first_conv'), *DISTILLATION):
        start_other_shapes(weights, wanted, prefix)
    if isinstance(weights.get('pos_embed'), torch.Tensor) and 'pos_embed' in wanted:
        weights['pos_embed'] = fit_positions(weights['pos_embed'], wanted['pos_embed'], path)
    load_weights(model, weights, path)


def prefixes(model: nn.Module, part: str) -> list[str]:
    """How the names of a part's weights begin in a model of timm; `part` is 'classifier' or 'first_conv'."""
    names = model.pretrained_cfg.get(part) or ()
    return [f'{name}.' for name in ((names,) if isinstance(names, str) else names)]


def start_other_shapes(weights: dict[str, Any], wanted: dict[str, torch.Tensor], prefix: str) -> None:
    """Where a weight of a part is of another shape, or missing, replace all of the part by the model's own."""
    keys = [key for key in wanted if key.startswith(prefix)]
    shapes = {key: tuple(weights[key].shape) if isinstance(weights.get(key), torch.Tensor) else None for key in keys}
    if all(shapes[key] == wanted[key].shape for key in keys):
        return
    for key in keys:
        print0(f'--finetune: {key} starts from scratch (in the file: {shapes[key] or "none"})')
        weights[key] = wanted[key]


def prefix_tokens(number: int) -> int | None:
    """How many of a ViT's tokens, 1, 2 or 0, are no patches of a square grid; None where there is no such number."""
    return next((p for p in (1, 2, 0) if number > p and math.isqrt(number - p) ** 2 == number - p), None)


def fit_positions(positions: torch.Tensor, wanted: torch.Tensor, path: str) -> torch.Tensor:
    """Position embeddings (1, p + n, d) of p = 0, 1 or 2 prefix tokens, as those wanted, (1, q + m, d).

    Prefix tokens too many are cut, missing ones are the model's own, and the grid is resampled.

    Raises:
        InputError: when the patches make no square grid.
    """
    if positions.shape == wanted.shape:
        return positions
    prefix = prefix_tokens(positions.shape[1]) if positions.ndim == 3 else None
    ours = prefix_tokens(wanted.shape[1])
    if prefix is None or ours is None or positions.shape[2] != wanted.shape[2]:
        raise InputError(f'{path}: position embeddings of shape {tuple(positions.shape)} do not fit '
                         f'{tuple(wanted.shape)}: the weights are of another model')
    if prefix != ours:
        print0(f'--finetune: pos_embed has {prefix} prefix tokens and the model {ours}: '
               + ('the first are taken' if prefix > ours else 'missing ones start from scratch'))
    grid = torch.cat([positions[:, :min(prefix, ours)], wanted[:, min(prefix, ours):ours], positions[:, prefix:]], 1)
    side = math.isqrt(wanted.shape[1] - ours)
    return resample_abs_pos_embed(grid.float(), [side, side], num_prefix_tokens=ours, antialias=False)


def freeze_all_but_attention(model: nn.Module) -> None:
    """--attn-only: attention, head and position embeddings train, nothing else. InputError for a model without."""
    head = tuple(prefixes(model, 'classifier'))
    names = [name for name, _ in model.named_parameters() if '.attn.' in name]
    if not names:
        raise InputError('--attn-only: the model has no attention')
    for name, value in model.named_parameters():
        value.requires_grad = '.attn.' in name or name.startswith(head) or name == 'pos_embed'
