"""Fine-tuning: --finetune, which starts from other weights, and --attn-only, which trains few of them."""
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from checkpoints import load_checkpoint, load_weights
from utils import InputError, print0


def load_pretrained(model: nn.Module, path: str) -> None:
    """--finetune: start from other weights. Raises InputError for weights of another architecture.

    A head or stem of another shape starts from scratch, distillation weights are left out, and position embeddings
    are resampled bicubically.
    """
    weights = dict(load_checkpoint(path)['model'])
    wanted = model.state_dict()
    for key in [key for key in weights if str(key).startswith(('dist_token', 'head_dist.'))]:
        print0(f'--finetune: {key} is left out: the model has no distillation token')
        del weights[key]
    for key in [key for key in wanted if key.startswith(('head.', 'patch_embed.'))]:
        shape = tuple(weights[key].shape) if isinstance(weights.get(key), torch.Tensor) else None
        if shape != wanted[key].shape:
            print0(f'--finetune: {key} starts from scratch (in the file: {shape or "none"})')
            weights[key] = wanted[key]
    if isinstance(weights.get('pos_embed'), torch.Tensor):
        weights['pos_embed'] = fit_positions(weights['pos_embed'], wanted['pos_embed'], path)
    load_weights(model, weights, path)


def fit_positions(positions: torch.Tensor, wanted: torch.Tensor, path: str) -> torch.Tensor:
    """Position embeddings (1, p + n, d) of p = 0, 1 or 2 prefix tokens, as (1, 1 + m, d) for a class token and m
    patches: a second prefix token is cut, a missing one is the model's own, and the grid is resampled.

    Raises:
        InputError: when the patches make no square grid.
    """
    if positions.shape == wanted.shape:
        return positions
    squares = [prefix for prefix in (1, 2, 0) if positions.ndim == 3 and positions.shape[1] > prefix
               and round((positions.shape[1] - prefix) ** 0.5) ** 2 == positions.shape[1] - prefix]
    if not squares or positions.shape[2] != wanted.shape[2]:
        raise InputError(f'{path}: position embeddings of shape {tuple(positions.shape)} do not fit '
                         f'{tuple(wanted.shape)}: the weights are of another model')
    prefix = squares[0]
    if prefix != 1:
        print0(f'--finetune: pos_embed has {prefix} prefix tokens; '
               + ('the first is taken' if prefix else "the class token's starts from scratch"))
    first = positions[:, :1] if prefix else wanted[:, :1]
    side = round((wanted.shape[1] - 1) ** 0.5)
    grid = torch.cat([first, positions[:, prefix:]], 1).float()
    return resample_abs_pos_embed(grid, [side, side], antialias=False)


def freeze_all_but_attention(model: nn.Module) -> None:
    """--attn-only: attention, head and position embeddings train, nothing else."""
    for name, value in model.named_parameters():
        value.requires_grad = '.attn.' in name or name.startswith('head.') or name == 'pos_embed'
