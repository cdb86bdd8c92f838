"""A trained model from its checkpoint: built as the flags in the file say, with the file's weights.

Checkpoints of main_seit.py, main_mtm_pretrain.py and main_mtm_finetune.py hold models of tokens, those of
main_pixels.py models of images. The weights tell which program wrote them; its flags, which the checkpoint holds too,
tell the model's name and arguments. A file without flags needs them from the caller. Of masked-token pre-training the
encoder is taken, as the classifier that main_mtm_finetune.py makes of it, without a head.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import models_seit
from image_data.dataset import Normalize
from inference.pixel_models import create_pixel_model
from seitpp.models_mtm_finetune import create_model as create_code_model, encoder_weights, kwargs_of_encoder
from seitpp.mtm_recipe import canonical_codes
from token_augment import EvalTransform, center_crop, check_crop
from training.checkpoints import (CODES, PIXELS, PRETRAIN, SEIT, check_codes, compare_model_flags, head_size,
                                  load_weights, note_average, program_of, said_of_the_model, saved_flags,
                                  without_token_adapt)
from training.pretrained import POSITIONS, prefix_positions, prefixes
from utils import InputError

CLASSIFIER = 'deit_base_token_32'  # what main_mtm_finetune.py makes of main_mtm_pretrain.py's one model
CROP_RATIO = 0.875  # for images, where a checkpoint does not say


@dataclass(frozen=True)
class TrainedModel:
    """A model with the weights of a checkpoint.

    Attributes:
        model: on the CPU, in eval mode. It reads what `make_prepare` gives.
        program: that wrote the checkpoint: SEIT, PRETRAIN, FINETUNE or PIXELS.
        name: of the model, as --model of that program.
        input_size: codes on a side of its input, or pixels for PIXELS.
        crop_ratio: images are resized to input_size divided by it, and cropped; None for tokens.
        classes: outputs of its head, 0 without one.
        class_names: in the order of the outputs, where the checkpoint has them.
    """
    model: nn.Module
    program: str
    name: str
    input_size: int
    crop_ratio: float | None
    classes: int
    class_names: list[str] | None


def load_model(checkpoint: dict[str, Any], path: str, codebook: torch.Tensor | None = None, use_ema: bool = False,
               name: str = '', model_kwargs: dict[str, Any] | None = None, input_size: int | None = None,
               crop_ratio: float | None = None, stem: str | None = None) -> TrainedModel:
    """The model of a checkpoint, with its weights.

    Args:
        checkpoint: of `load_checkpoint`.
        path: of its file, for errors.
        codebook: (K, d), which must be the one of the model's tokens; None checks nothing.
        use_ema: take the averaged weights.
        name, model_kwargs: as --model and --model-kwargs of the program; default: as the checkpoint says.
        input_size, crop_ratio: of images; default: as the checkpoint says. `input_size` is that of a model of tokens
            too, 8 pixels to a code, where the checkpoint and its weights do not say it.
        stem: of a model of tokens that is no ViT; default: as the checkpoint says.

    Raises:
        InputError: where the checkpoint does not say enough, or does not fit what is given.
    """
    weights = weights_of(checkpoint, path, use_ema)
    flags = saved_flags(checkpoint)
    program = program_with(checkpoint, path, stem)
    given = {'model': name, 'model_kwargs': model_kwargs, 'stem': stem, 'input_size': input_size,
             'eval_crop_ratio': crop_ratio}
    compare_model_flags(checkpoint, {flag: value for flag, value in given.items() if value}, path)
    # arguments of the checkpoint belong to its model, not to another one that the caller names
    kwargs = model_kwargs or (flags.get('model_kwargs') if name in ('', flags.get('model')) else None) or {}
    encoder_alone = program == PRETRAIN and not name
    name = name or flags.get('model')
    if not isinstance(name, str) or not isinstance(kwargs, dict):
        raise InputError(f'{path}: does not say of which model it is: give --model')

    if program == PIXELS:
        size, crop_ratio = size_and_crop(flags, path, input_size, crop_ratio)
        classes = pixel_classes(weights, path, name, kwargs, size)
        model = create_pixel_model(name, kwargs, classes, size)
    elif program == SEIT:
        size, crop_ratio = token_grid_of(checkpoint, weights, path, name, kwargs, input_size), None
        classes = head_size(weights, models_seit.classifier_of(name), path)
        code_dim = None if codebook is None else codebook.shape[1]
        said = flags if name == flags.get('model') else {}  # a stem belongs to its model, too
        model = models_seit.create_model(name, kwargs, classes, size, code_dim, stem or said.get('stem'),
                                         said.get('token_patch_size', 8))
    else:
        size, crop_ratio = grid_size_of(weights, path, kwargs), None
        codes = count_codes(weights, path, codebook)
        weights = encoder_weights(weights) if program == PRETRAIN else without_token_adapt(weights)
        classes = 0 if program == PRETRAIN else head_size(weights, 'head', path)
        if encoder_alone:  # its flags are those of the whole model, of which the decoder is left out
            kwargs = kwargs_of_encoder({'model_kwargs': kwargs})
        model = create_code_model(CLASSIFIER if encoder_alone else name, kwargs, codebook_size=codes, img_size=size,
                                  num_classes=classes)
    load_weights(model, weights, path)
    return TrainedModel(model.eval(), program, name, size, crop_ratio, classes, checkpoint.get('classes'))


def make_prepare(trained: TrainedModel, device: torch.device, codebook: torch.Tensor | None = None) -> Callable:
    """A function on the device: pixels (B, 3, s, s) uint8, or codes (B, g, g) uint16 -> what a model reads.

    Args:
        device: of the pixels or codes, and of the model.
        codebook: (K, d), for a model of tokens.
    """
    if trained.program == PIXELS:
        return Normalize(device)
    if trained.program == SEIT:
        return EvalTransform(codebook, trained.input_size, device)
    # models of masked tokens have seen only the first of codebook rows of one direction (mtm_recipe.make_input)
    canonical = canonical_codes(codebook).to(device)

    def prepare(codes: torch.Tensor) -> torch.Tensor:
        check_crop(trained.input_size, codes.shape[-1])
        return canonical[center_crop(codes.long(), trained.input_size)]

    return prepare


# ---------------------------------------------------------------- what a checkpoint says

def weights_of(checkpoint: dict[str, Any], path: str, use_ema: bool) -> dict[str, Any]:
    """The weights of a checkpoint, or its averaged ones. Raises InputError where it has none of these."""
    if not use_ema:
        note_average(checkpoint, path, '; --use-ema takes those')
        return checkpoint['model']
    if not isinstance(checkpoint.get('model_ema'), dict):
        raise InputError(f'{path}: holds no EMA weights; leave --use-ema out')
    return checkpoint['model_ema']


def grid_size_of(weights: dict[str, Any], path: str, model_kwargs: dict[str, Any]) -> int:
    """Codes on a side that a model of tokens reads: its patches are of 2x2 codes, or of one. Raises InputError."""
    prefix = prefix_positions(weights, bool(model_kwargs.get('no_embed_class')))
    if prefix is None:
        raise InputError(f'{path}: has no position embeddings of a square grid: give another checkpoint')
    stem = weights.get('patch_embed.proj.weight')
    # of 2x2 codes with or without their neighbors, 4 or 2 on a side; of one code 3 or 1
    is_single = isinstance(stem, torch.Tensor) and stem.ndim == 4 and stem.shape[2] % 2
    return (1 if is_single else 2) * math.isqrt(weights[POSITIONS].shape[1] - prefix)


def program_with(checkpoint: dict[str, Any], path: str, stem: str | None) -> str:
    """The program of a checkpoint, of which a stem that is given says what weights alone do not. Raises InputError."""
    program = program_of(checkpoint)
    if not stem or program == SEIT:
        return program
    if program != PIXELS or saved_flags(checkpoint):
        raise InputError(f'--stem {stem}: is of models of {SEIT}, and {path} is of {program}: omit it')
    return SEIT


def token_grid_of(checkpoint: dict[str, Any], weights: dict[str, Any], path: str, name: str,
                  model_kwargs: dict[str, Any], input_size: int | None = None) -> int:
    """Codes on a side that a model of main_seit.py reads: by its positions, as its flags say, or by `input_size`.

    Raises InputError.
    """
    if name in models_seit.MODELS:
        return grid_size_of(weights, path, model_kwargs)
    size = said_of_the_model(checkpoint).get('vit_input_size') or (input_size or 0) // 8
    if type(size) is not int or size < 1:
        raise InputError(f'{path}: does not say how many codes its model reads: give --input-size, with 8 pixels to a '
                         'code')
    return size


def size_and_crop(flags: dict[str, Any], path: str, input_size: int | None,
                  crop_ratio: float | None) -> tuple[int, float]:
    """Pixels on a side and crop ratio, as given or as a run's flags say. Raises InputError."""
    size = input_size or flags.get('input_size')
    crop = crop_ratio or flags.get('eval_crop_ratio') or CROP_RATIO
    if type(size) is not int or size < 1 or not isinstance(crop, int | float) or not 0 < crop <= 1:
        raise InputError(f'{path}: does not say how it reads images: give --input-size and --eval-crop-ratio')
    return size, crop


def pixel_classes(weights: dict[str, Any], path: str, name: str, model_kwargs: dict[str, Any], input_size: int) -> int:
    """Outputs of the head of a model of images, 1 where timm knows no head of that model. Raises InputError."""
    heads = prefixes(create_pixel_model(name, model_kwargs, 1, input_size), 'classifier')
    return head_size(weights, heads[0].removesuffix('.'), path) if heads else 1


def count_codes(weights: dict[str, Any], path: str, codebook: torch.Tensor | None) -> int:
    """Codes that a model of masked tokens knows, as many as the codebook's where one is given. Raises InputError."""
    table = weights.get(CODES)
    if not isinstance(table, torch.Tensor) or table.ndim != 2:
        raise InputError(f'{path}: has no embeddings of codes ({CODES}): give another checkpoint')
    if codebook is not None:
        check_codes(weights, len(codebook), path)
    return len(table)
