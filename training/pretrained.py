"""Fine-tuning: --finetune, which starts from other weights, and --attn-only, which trains few of them.

A model of tokens may start from weights of pixels, and the other way round. `load_pretrained` decides by rules, which
docs/pretraining.md has too, what becomes of each tensor, and prints it.
"""
import math
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from fileio.labels import same_class_names
from training.checkpoints import load_checkpoint, load_weights, note_average
from utils import InputError, print0

POSITIONS = 'pos_embed'
OPTIONAL = ('cls_token', 'dist_token', 'head_dist.')  # parts without which a model's blocks are the same
OTHER_CLASSES = 'other classes'


def load_pretrained(model: nn.Module, path: str, classes: list[str] | None = None, new_head: bool = False) -> None:
    """--finetune: start from other weights, of tokens or of pixels, and print what became of them.

    * Stem and head: kept as a whole where all shapes are the model's, otherwise from scratch. A head of as many classes
      but other names starts from scratch too.
    * Position embeddings: resampled bicubically where the grid is another, those of class and distillation token kept.
    * Class token, distillation token and its head: kept where both have them, otherwise from scratch or left out.
    * Final norm: kept, be it called `norm`, as in models of tokens, or `fc_norm`, as timm calls it after mean pooling.
    * All other tensors: kept.

    Args:
        model: changed in place.
        path: of a checkpoint; its 'model' is taken, not its average.
        classes: names of the model's classes, where they are known.
        new_head: start the head from scratch, whatever the classes are.

    Raises:
        InputError: for another architecture.
    """
    checkpoint = load_checkpoint(path)
    note_average(checkpoint, path)
    wanted = model.state_dict()
    weights, renamed = with_norm_of(dict(checkpoint['model']), wanted)
    left_out = [key for key in weights if str(key).startswith(OPTIONAL) and key not in wanted]
    weights = {key: value for key, value in weights.items() if key not in left_out}
    heads = prefixes(model, 'classifier')
    # a head for classes of other names fits by its shape, but its scores would mean other things
    renew_head = new_head or not same_class_names(checkpoint.get('classes'), classes)
    scratch = {}
    # A part is taken as a whole or not at all: a new weight with an old bias would start from neither.
    for prefix in dict.fromkeys((*prefixes(model, 'first_conv'), *heads, *OPTIONAL)):
        part = {key: value for key, value in wanted.items() if key.startswith(prefix)}
        reason = why_from_scratch(weights, part)
        if renew_head and prefix in heads and not reason:
            reason = OTHER_CLASSES
        if reason:
            weights |= part  # the model's initial values
            scratch[prefix] = reason
    resampled = ''
    if isinstance(weights.get(POSITIONS), torch.Tensor) and POSITIONS in wanted:
        positions = weights[POSITIONS]
        weights[POSITIONS] = fit_positions(positions, wanted[POSITIONS], path)
        if positions.shape != wanted[POSITIONS].shape:
            resampled = positions_note(positions.shape[1], wanted[POSITIONS].shape[1])
    load_weights(model, weights, path)
    kept = sum(not key.startswith(tuple(scratch)) for key in wanted) - bool(resampled)
    print0(summary(path, f'{kept} tensors kept{renamed}', resampled, scratch, left_out))


def summary(path: str, kept: str, resampled: str, scratch: dict[str, str], left_out: list[str]) -> str:
    """The line that says what became of the weights of a file.

    Args:
        path: of the file.
        kept: how many tensors were kept, as a text.
        resampled: text of `positions_note`.
        scratch: prefix of a part's names -> why it starts from scratch.
        left_out: names of the file's tensors that the model has no use for.
    """
    text = f'{path}: {kept}'
    if resampled:
        text += f', {POSITIONS} {resampled}'
    if scratch:
        text += ', started from scratch: ' + ', '.join(
            f'{prefix}* ({why})' if prefix.endswith('.') else f'{prefix} ({why})' for prefix, why in scratch.items())
    return text + (f', left out: {", ".join(left_out)}' if left_out else '')


def prefixes(model: nn.Module, part: str) -> list[str]:
    """How the names of a part's weights begin in a model of timm; `part` is 'classifier' or 'first_conv'."""
    names = model.pretrained_cfg.get(part) or ()
    return [f'{name}.' for name in ((names,) if isinstance(names, str) else names)]


def with_norm_of(weights: dict[str, Any], wanted: dict[str, torch.Tensor]) -> tuple[dict[str, Any], str]:
    """Weights with the final norm under the name that is wanted, and a note where that is another than the file's."""
    for model_name, file_name in (('norm.', 'fc_norm.'), ('fc_norm.', 'norm.')):
        keys = [key for key in wanted if key.startswith(model_name) and key not in weights]
        names = {file_name + key[len(model_name):]: key for key in keys}
        if keys and names.keys() <= weights.keys() and not names.keys() & wanted.keys():
            return {names.get(key, key): value for key, value in weights.items()}, f' ({file_name}* as {model_name}*)'
    return weights, ''


def why_from_scratch(weights: dict[str, Any], part: dict[str, torch.Tensor]) -> str:
    """Why a part of a model cannot be kept, '' where all its tensors are among the weights in their shapes."""
    in_file = [weights[key] for key in part if isinstance(weights.get(key), torch.Tensor)]
    if len(in_file) < len(part):
        return 'another shape' if in_file else 'not in the file'
    return '' if all(weights[key].shape == value.shape for key, value in part.items()) else 'another shape'


# ---------------------------------------------------------------- position embeddings

def prefix_tokens(number: int) -> int | None:
    """How many of a ViT's tokens, 1, 2 or 0, are no patches of a square grid; None where there is no such number."""
    return next((p for p in (1, 2, 0) if number > p and math.isqrt(number - p) ** 2 == number - p), None)


def positions_note(before: int, now: int) -> str:
    """What `fit_positions` does with so many positions to make another number of them."""
    old_prefix, new_prefix = prefix_tokens(before), prefix_tokens(now)
    old, new = math.isqrt(before - old_prefix), math.isqrt(now - new_prefix)
    notes = [f'resampled from {old}x{old} to {new}x{new}'] if old != new else []
    if old_prefix > new_prefix:
        notes.append(f'cut to {new_prefix} of its {old_prefix} prefix tokens')
    if old_prefix < new_prefix:
        notes.append(f'from scratch for {new_prefix - old_prefix} of {new_prefix} prefix tokens')
    return ' and '.join(notes)


def fit_positions(positions: torch.Tensor, wanted: torch.Tensor, path: str) -> torch.Tensor:
    """Position embeddings (1, p + n, d) of p = 0, 1 or 2 prefix tokens, as those wanted, (1, q + m, d).

    Prefix tokens too many are cut, missing ones are the model's own, and the grid is resampled.

    Raises:
        InputError: when the patches make no square grid.
    """
    if positions.shape == wanted.shape:
        return positions
    old_prefix = prefix_tokens(positions.shape[1]) if positions.ndim == 3 else None
    new_prefix = prefix_tokens(wanted.shape[1])
    if old_prefix is None or new_prefix is None or positions.shape[2] != wanted.shape[2]:
        raise InputError(f'{path}: position embeddings of shape {tuple(positions.shape)} do not fit '
                         f'{tuple(wanted.shape)}: the weights are of another model')
    # prefix tokens that both have, those that only the model has, and the file's grid
    grid = torch.cat([positions[:, :min(old_prefix, new_prefix)], wanted[:, min(old_prefix, new_prefix):new_prefix],
                      positions[:, old_prefix:]], 1)
    side = math.isqrt(wanted.shape[1] - new_prefix)
    return resample_abs_pos_embed(grid.float(), [side, side], num_prefix_tokens=new_prefix, antialias=False)


def freeze_all_but_attention(model: nn.Module) -> None:
    """--attn-only: attention, head and position embeddings train, nothing else. InputError for a model without."""
    head = tuple(prefixes(model, 'classifier'))
    names = [name for name, _ in model.named_parameters() if '.attn.' in name]
    if not names:
        raise InputError('--attn-only: the model has no attention')
    for name, value in model.named_parameters():
        value.requires_grad = '.attn.' in name or name.startswith(head) or name == 'pos_embed'
