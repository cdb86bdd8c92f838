"""Which program a checkpoint's weights belong to. SeiT and SeiT++ give one name to two networks."""
from collections.abc import Sequence
from typing import Any

import torch

from utils import InputError

SEIT = 'main_seit.py'
PRETRAIN = 'main_mtm_pretrain.py'
FINETUNE = 'main_mtm_finetune.py'
CODES = 'token_emb.word_embeddings.weight'
TOKEN_ADAPT = ('conversion_function.', 'reverse_transform.')  # how the names of TokenAdapt's weights begin


def origin(weights: dict[str, Any]) -> str:
    """The program that makes weights of these names and shapes; '' for none of the three on tokens."""
    if 'mlm_layer.bias' in weights:
        return PRETRAIN
    if CODES in weights:
        return FINETUNE
    stem = weights.get('patch_embed.proj.weight')
    if isinstance(stem, torch.Tensor) and stem.ndim == 4 and stem.shape[1] != 3 and stem.shape[2] in (2, 4):
        return SEIT  # images have 3 channels
    return ''


def origin_note(weights: dict[str, Any], wanted: dict[str, Any]) -> str:
    """For an error about weights that do not fit a model: whose they are, where they are another program's."""
    theirs = origin(weights)
    return f' (these are weights of {theirs})' if theirs and theirs != origin(wanted) else ''


def check_origin(weights: dict[str, Any], programs: Sequence[str], path: str) -> None:
    """InputError unless the weights of a file belong to one of some programs."""
    theirs = origin(weights)
    if theirs not in programs:
        what = f'belong to {theirs}, whose network is another' if theirs else 'are of no model of masked tokens'
        raise InputError(f'{path}: its weights {what}: give a checkpoint of {" or ".join(programs)}')


def check_codes(weights: dict[str, Any], codebook_size: int, path: str) -> None:
    """InputError unless the weights of a model that reads codes are for so many of them."""
    table = weights.get(CODES)
    if isinstance(table, torch.Tensor) and len(table) != codebook_size:
        raise InputError(f'{path}: its model reads {len(table)} codes, but the codebook has {codebook_size} rows: give '
                         'the codebook that it was trained with in --codebook-path')


def without_token_adapt(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights without TokenAdapt's, which published checkpoints hold beside the model's."""
    return {name: value for name, value in weights.items() if not str(name).startswith(TOKEN_ADAPT)}
