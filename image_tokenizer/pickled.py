"""Tokenizers saved as whole modules, as SeiT published its own: loading one runs the code that the file names.

A pickle can run anything. So one is loaded only where the user gives the folder of that code. What comes out is any
nn.Module, of which nothing is known but what it does: features are computed for one noise image. Where a ViTVQGAN
with the same weights gives the same features, it takes the module's place, since it needs none of that code. Any other
module is wrapped as it is.
"""
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from image_tokenizer.vitvqgan import ViTVQGAN
from utils import InputError, first_line


class ModuleTokenizer(nn.Module):
    """A module of unknown make, with the interface of tokenizers.py but for a decoder.

    Args:
        module: gives (B, n, embed_dim) features for (B, 3, H, W) images in [0, 1].
        patch_size: pixels a code covers, on each side.
        embed_dim: width of a feature.
    """

    def __init__(self, module: nn.Module, patch_size: int, embed_dim: int):
        super().__init__()
        self.module = module
        self.patch_size = patch_size
        self.embed_dim = embed_dim

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.module(images)


# ---------------------------------------------------------------- running a file's code


@contextlib.contextmanager
def on_sys_path(folder: str | Path) -> Iterator[None]:
    """Let Python import from `folder` inside the with block."""
    folder = str(Path(folder).resolve())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the code imported may have tidied it away
            sys.path.remove(folder)


def load_running_code(path: str | Path, code_path: str | Path, use: Callable[[str | Path, Any], Any]) -> Any:
    """Load a torch file by running the code it asks for.

    Args:
        path: of the file.
        code_path: the folder of the code.
        use: called with `path` and what was loaded, while the folder is importable, since a module may import at its
            first call.

    Returns:
        What `use` returns.

    Raises:
        InputError: for a missing folder, and whatever goes wrong in the file's own code.
    """
    if not Path(code_path).is_dir():
        raise InputError(f'--tokenizer-code-path {code_path}: no such folder')
    with on_sys_path(code_path):
        try:
            value = torch.load(path, map_location='cpu', weights_only=False)
        except (ImportError, AttributeError) as error:
            raise InputError(f'{path}: its code cannot be imported from {code_path} ({first_line(error)}): give '
                             '--tokenizer-code-path the folder its classes are imported from, or convert the file '
                             'with scripts/convert_tokenizer.py, which needs no code') from None
        except Exception as error:  # the file's own code runs here, and may raise anything
            raise InputError(f'{path}: cannot be loaded as a tokenizer ({first_line(error)})') from None
        return use(path, value)  # within the block: the module may import more of its code when it is called


# ---------------------------------------------------------------- what a module is

@torch.no_grad()
def features_of(module: nn.Module, side: int) -> torch.Tensor:
    """Features (1, n, d) that a module gives for one fixed noise image of side x side pixels.

    Raises:
        InputError: when it gives anything else, or n is no square that divides the image.
    """
    # noise, which a constant image is not: other weights or another order of patches give other features
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        features = module(image)
    except Exception as error:  # code of unknown origin
        raise InputError(f'the module fails on a {side}x{side} image ({first_line(error)})') from None
    if not isinstance(features, torch.Tensor):
        raise InputError(f'the module gives a {type(features).__name__} for an image, not features (1, n, d)')
    grid_size = math.isqrt(features.shape[1]) if features.ndim == 3 else 0
    if grid_size == 0 or grid_size ** 2 != features.shape[1] or side % grid_size:
        raise InputError(f'the module gives shape {tuple(features.shape)} for an image, not features (1, n, d) '
                         'on a square grid')
    return features


def same_features(expected: torch.Tensor, features: torch.Tensor) -> bool:
    """Whether features (1, n, d) are the wanted ones but for rounding."""
    return expected.shape == features.shape and bool((expected - features).abs().max() <= 1e-3 * expected.abs().max())


def from_module(path: str | Path, module: nn.Module) -> nn.Module:
    """A pickled module as a tokenizer: as a ViTVQGAN where names and features agree, else wrapped.

    Raises:
        InputError: for a module that gives no features.
    """
    try:
        model = ViTVQGAN.from_state_dict(module.state_dict())
    except InputError:
        model = None  # other names
    side = 256 if model is None else model.image_size
    try:
        features = features_of(module, side)
    except InputError as error:
        if model is None:
            raise InputError(f'{path}: {error}') from None
        return model  # an autoencoder, whose output is images
    if model is not None and same_features(features, features_of(model, side)):
        return model
    return ModuleTokenizer(module, side // math.isqrt(features.shape[1]), features.shape[2]).eval()
