"""Models of timm on images, by name: main_pixels.py trains them, inference/models.py loads what it trained."""
import difflib
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import nn

from models_seit import MODELS, check_loads_nothing
from utils import InputError


def create_pixel_model(name: str, model_kwargs: dict[str, Any], classes: int, input_size: int, drop: float = 0.,
                       drop_path: float = 0.) -> nn.Module:
    """The model of --model and the flags beside it, (B, 3, input_size, input_size) -> (B, classes), in eval mode.

    Raises:
        InputError: for a name that timm does not know, a model of tokens, or arguments that cannot work together.
    """
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models(), 3)
        raise InputError(f'--model {name}: timm has no such model'
                         + (f'; near it are {", ".join(similar)}' if similar else ', and none of a name like it'))
    if name in MODELS:
        raise InputError(f'--model {name} reads tokens; train it with main_seit.py')
    check_loads_nothing(model_kwargs)
    values = {'--model-kwargs': model_kwargs, '--drop': drop, '--drop-path': drop_path, '--input-size': input_size}
    flags = f'--model {name} with ' + ', '.join(f'{flag} {value}' for flag, value in values.items() if value)
    try:
        cfg = timm.get_pretrained_cfg(name)
        size = {'img_size': input_size} if cfg and cfg.fixed_input_size else {}  # others take no size
        model = timm.create_model(name, num_classes=classes, drop_rate=drop or None, drop_path_rate=drop_path or None,
                                  **(size | model_kwargs))
        with torch.no_grad():  # sizes that do not fit end in an error here, and not after the data was read
            shape = model.eval()(torch.zeros(1, 3, input_size, input_size)).shape
        if shape != (1, classes):
            raise TypeError(f'gives {tuple(shape)} for an image')
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        raise InputError(f'{flags}: {" ".join(str(error).split()) or repr(error)}') from None
    patch_size = to_2tuple(getattr(getattr(model, 'patch_embed', None), 'patch_size', None) or 1)
    if any(input_size % side for side in patch_size):  # timm would leave out the pixels that remain
        raise InputError(f'{flags}: patches of {patch_size[0]} pixels do not divide the image')
    return model
