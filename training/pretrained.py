"""Fine-tuning: --finetune, which starts from other weights, and --attn-only, which trains few of them.

A model of tokens may start from weights of pixels, and the other way round. `load_pretrained` decides by rules, which
docs/pretraining.md has too, what becomes of each tensor, and prints it.
"""
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from fileio.labels import same_class_names
from training.checkpoints import (PIXELS, check_start, load_checkpoint, load_weights, note_average, program_of,
                                  saved_flags)
from utils import InputError, print0, shown

POSITIONS = 'pos_embed'
TOKENS = ('cls_token', 'dist_token', 'reg_token')  # before the patches, in timm's order: class, distillation, registers
OPTIONAL = (*TOKENS, 'head_dist.')  # parts without which a model's blocks are the same
OTHER_CLASSES = 'other classes'


def load_pretrained(model: nn.Module, path: str, classes: list[str] | None = None, new_head: bool = False,
                    codebook: str = '', checkpoint: dict[str, Any] | None = None) -> None:
    """--finetune: start from other weights, of tokens or of pixels, and print what became of them.

    * Stem and head: kept as a whole where all shapes are the model's, otherwise from scratch. A head of as many classes
      but other names starts from scratch too.
    * Position embeddings: resampled bicubically where the grid is another, those of prefix tokens kept.
    * Prefix tokens (class, distillation, registers) and the distillation's head: kept where both have them and as many,
      otherwise from scratch or left out.
    * Final norm: kept, be it called `norm`, as in models of tokens, or `fc_norm`, as timm calls it after mean pooling.
    * All other tensors: kept.

    Args:
        model: changed in place.
        path: of a checkpoint; its 'model' is taken, not its average.
        classes: names of the model's classes, where they are known.
        new_head: start the head from scratch, whatever the classes are.
        codebook: SHA-256 of the values of the codebook that a model of tokens reads; a line says where the weights were
            trained on another one.
        checkpoint: what `path` holds, where it is loaded already.

    Raises:
        InputError: for another architecture, and where ranks read other weights.
    """
    checkpoint = checkpoint or load_checkpoint(path)
    note_average(checkpoint, path)
    wanted = model.state_dict()
    weights, renamed = with_norm_of(dict(checkpoint['model']), wanted)
    resampled = ''
    if isinstance(weights.get(POSITIONS), torch.Tensor) and POSITIONS in wanted:
        weights[POSITIONS], resampled = fit_positions(weights, model, path, without_positions(checkpoint))
    heads = prefixes(model, 'classifier')
    # a head for classes of other names fits by its shape, but its scores would mean other things
    renew_head = new_head or not same_class_names(checkpoint.get('classes'), classes)
    stem = prefixes(model, 'first_conv')
    renewed = dict.fromkeys(heads, OTHER_CLASSES) if renew_head else {}
    # filters of colors may have the shape of those of a codebook of three elements
    colors = any(isinstance(value, torch.Tensor) and value.shape[1:2] == (3,) for key, value in weights.items()
                 if str(key).startswith(tuple(stem)))
    if codebook and program_of(checkpoint) == PIXELS and (saved_flags(checkpoint) or colors):
        renewed |= dict.fromkeys(stem, 'of pixels')
    weights, scratch, left_out = fit_parts(weights, wanted, (*stem, *heads, *OPTIONAL), renewed)
    load_weights(model, weights, path)
    check_start(model)
    before = (checkpoint.get('data') or {}).get('codebook')
    if codebook and before and codebook != before:
        print0(f'warning: {path}: was trained with another codebook (SHA-256 {shown(before)}, not {shown(codebook)}): '
               'its stem knows nothing of these codes')
    kept = sum(not key.startswith(tuple(scratch)) for key in wanted) - bool(resampled)
    print0(summary(path, f'{kept} tensors kept{renamed}', resampled, scratch, left_out))


def fit_parts(weights: dict[str, Any], wanted: dict[str, torch.Tensor], parts: Sequence[str],
              renewed: dict[str, str] | None = None) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Weights with the parts that a model has, and without optional ones that it has not.

    Args:
        weights: of a file.
        wanted: initial values of the model.
        parts: how names of weights begin that may start from scratch.
        renewed: those of them that do so in any case, and why.

    Returns:
        The weights; why parts start from scratch, by the beginning of their names; names of weights that are left out.
    """
    left_out = [key for key in weights if str(key).startswith(OPTIONAL) and key not in wanted]
    weights = {key: value for key, value in weights.items() if key not in left_out}
    scratch = {}
    # A part is taken as a whole or not at all: a new weight with an old bias would start from neither.
    for prefix in dict.fromkeys(parts):
        part = {key: value for key, value in wanted.items() if key.startswith(prefix)}
        reason = why_from_scratch(weights, part) or ((renewed or {}).get(prefix, '') if part else '')
        if reason:
            weights |= part  # the model's initial values
            scratch[prefix] = reason
    return weights, scratch, left_out


def summary(path: str, kept: str, resampled: str, scratch: dict[str, str], left_out: list[str]) -> str:
    """The line that says what became of the weights of a file.

    Args:
        path: of the file.
        kept: how many tensors were kept, as a text.
        resampled: what `fit_positions` did.
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

def count_tokens(weights: dict[str, Any]) -> dict[str, int]:
    """How many prefix tokens of each kind the weights of a ViT have, by name, in the order of their positions."""
    return {name: weights[name].shape[1] for name in TOKENS
            if isinstance(weights.get(name), torch.Tensor) and weights[name].ndim == 3}


def prefix_positions(weights: dict[str, Any], without: bool = False) -> int | None:
    """How many of a ViT's positions are no patches of a square grid: one for each prefix token, or none.

    Args:
        weights: of the ViT.
        without: where both can be, prefix tokens have no positions (timm's no_embed_class).

    Returns:
        None where no square grid is left.
    """
    positions = weights.get(POSITIONS)
    if not isinstance(positions, torch.Tensor) or positions.ndim != 3:
        return None
    tokens = sum(count_tokens(weights).values())
    # 1 and 2: files that lack the tokens themselves
    for prefix in (0, tokens, 1, 2) if without else (tokens, 0, 1, 2):
        patches = positions.shape[1] - prefix
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return prefix
    return None


def without_positions(checkpoint: dict[str, Any]) -> bool | None:
    """Whether a checkpoint's flags say that its prefix tokens have no positions; None where they do not say."""
    kwargs = saved_flags(checkpoint).get('model_kwargs')
    return kwargs.get('no_embed_class') if isinstance(kwargs, dict) else None


def fit_positions(weights: dict[str, Any], model: nn.Module, path: str,
                  without: bool | None = None) -> tuple[torch.Tensor, str]:
    """Position embeddings of weights as a model has them, and what was done to them, '' for nothing.

    The grid is resampled. Prefix tokens of a kind that both have, and as many of it, keep their positions; others that
    the file has are cut, and those that only the model has are its own.

    Args:
        weights: with POSITIONS.
        model: whose positions are wanted.
        path: of the weights, for errors.
        without: whether the weights' prefix tokens have no positions, where that is known.

    Raises:
        InputError: when the patches make no square grid.
    """
    positions = weights[POSITIONS]
    own = model.state_dict()
    wanted = own[POSITIONS]
    new_prefix = prefix_positions(own)
    patches = getattr(getattr(model, 'patch_embed', None), 'num_patches', None)
    if new_prefix is not None and patches:
        new_prefix = wanted.shape[1] - patches  # 9 positions may be 3x3 patches, or 2x2 and 5 prefix tokens
    if without is None:
        without = new_prefix == 0
    old_prefix = prefix_positions(weights, without)
    if None in (old_prefix, new_prefix) or positions.shape[2] != wanted.shape[2]:
        if positions.shape == wanted.shape:
            return positions, ''
        raise InputError(f'{path}: position embeddings of shape {tuple(positions.shape)} do not fit '
                         f'{tuple(wanted.shape)}, and only square grids of one width are resampled: take an input size '
                         'as they were trained with, or other weights')
    old_tokens, new_tokens = (_tokens_with_positions(*values) for values in ((weights, old_prefix), (own, new_prefix)))
    prefix = wanted[:, :new_prefix].clone()
    kept = 0
    for name, place in new_tokens.items():
        if len(old_tokens.get(name, ())) == len(place):
            prefix[:, place] = positions[:, old_tokens[name]].to(prefix)
            kept += len(place)
    old, new = (math.isqrt(number) for number in (positions.shape[1] - old_prefix, wanted.shape[1] - new_prefix))
    notes = [f'resampled from {old}x{old} to {new}x{new}'] if old != new else []
    if kept < old_prefix:
        notes.append(f'cut to {kept} of its {old_prefix} prefix tokens')
    if kept < new_prefix:
        notes.append(f'from scratch for {new_prefix - kept} of {new_prefix} prefix tokens')
    if not notes:
        return positions, ''
    fitted = torch.cat([prefix, positions[:, old_prefix:].to(prefix)], 1)
    if old != new:
        fitted = resample_abs_pos_embed(fitted.float(), [new, new], [old, old], new_prefix, antialias=False)
    return fitted, ' and '.join(notes)


def _tokens_with_positions(weights: dict[str, Any], prefix: int) -> dict[str, list[int]]:
    """Which positions belong to the prefix tokens of each kind, where the first `prefix` positions are theirs."""
    counts = count_tokens(weights)
    if sum(counts.values()) != prefix:  # files that lack the tokens themselves, and tokens without positions
        counts = dict.fromkeys(TOKENS[:prefix], 1)
    places = {}
    start = 0
    for name, count in counts.items():
        places[name] = list(range(start, start + count))
        start += count
    return places


def freeze_all_but_attention(model: nn.Module) -> None:
    """--attn-only: attention, head and position embeddings train, nothing else. InputError for a model without."""
    head = tuple(prefixes(model, 'classifier'))
    names = [name for name, _ in model.named_parameters() if '.attn.' in name]
    if not names:
        raise InputError('--attn-only: the model has no attention')
    for name, value in model.named_parameters():
        value.requires_grad = '.attn.' in name or name.startswith(head) or name == 'pos_embed'
