"""Tokenizers saved as whole modules, as SeiT published its own: loading one runs the code that the file names.

A pickle can run anything. So one is loaded only where the user gives the folder of that code. What comes out is any
nn.Module, of which nothing is known but what it does: features are computed for one noise image. Where a ViTVQGAN
with the same weights gives the same features, it takes the module's place, since it needs none of that code. Any other
module is wrapped as it is.

Such code has modules of its own names, often `utils`, `engine` or `training`, which are ours too. While it runs, ours
are hidden, and imports find them only where nobody else has the name (`ForeignCode`).
"""
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fileio.hub import local_path
from image_tokenizer.vitvqgan import ViTVQGAN
from utils import InputError, first_line

ROOT = Path(__file__).resolve().parent.parent


class ModuleTokenizer(nn.Module):
    """A module of unknown make, with the interface of tokenizers.py but for a decoder.

    Args:
        module: gives (B, n, embed_dim) features for (B, 3, H, W) images in [0, 1].
        patch_size: pixels a code covers, on each side.
        embed_dim: width of a feature.

    Attributes:
        code: where the module's calls may import from; None where that is where all others do.
    """
    code: 'ForeignCode | None' = None

    kind = 'pickled module'

    def __init__(self, module: nn.Module, patch_size: int, embed_dim: int):
        super().__init__()
        self.module = module
        self.patch_size = patch_size
        self.embed_dim = embed_dim

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.code is None:
            return self.module(images)
        with self.code.running():
            return self.module(images)


# ---------------------------------------------------------------- running a file's code

class ForeignCode:
    """Code that is not ours, and what it imports.

    Args:
        folder: of the code.

    Attributes:
        ours: names of our modules and packages.
        modules: the code's own modules that have names of ours, by full name.
        path: sys.path of the code, as it left it.
    """

    def __init__(self, folder: str | Path):
        names = {path.stem for path in ROOT.glob('*.py')} | {path.parent.name for path in ROOT.glob('*/__init__.py')}
        self.ours = {name for name in names if _is_ours(name, sys.modules.get(name))}
        self.modules = {}
        folders = {ROOT, *(ROOT / name for name in names)}  # ROOT / 'scripts' is there when a script runs
        self.start_path = [str(Path(folder).resolve()),
                           *(entry for entry in sys.path if Path(entry).resolve() not in folders)]
        self.path = self.start_path

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let imports find what the code means, inside the with block."""
        hidden = self._take_modules()
        path_before = list(sys.path)
        last_resort = _HiddenModules(hidden)
        sys.modules.update(self.modules)
        sys.path[:] = self.path
        sys.meta_path.append(last_resort)
        try:
            yield
        finally:
            sys.meta_path.remove(last_resort)
            self.path = list(sys.path)
            sys.path[:] = path_before
            self.modules = {name: module for name, module in self._take_modules().items()
                            if module is not hidden.get(name)}
            sys.modules.update(hidden)

    def is_needed(self) -> bool:
        """Whether the code would import something else outside of `running`."""
        return bool(self.modules) or self.path != self.start_path

    def _take_modules(self) -> dict[str, ModuleType]:
        """Take all modules of names of ours out of sys.modules."""
        names = [name for name in sys.modules if name.partition('.')[0] in self.ours]
        return {name: sys.modules.pop(name) for name in names}


def _is_ours(name: str, module: ModuleType | None) -> bool:
    """Whether a name of ours means our module: an installed package of the name may be loaded instead."""
    file = getattr(module, '__file__', None)
    return module is None or (file is not None and
                              Path(file).resolve() in (ROOT / f'{name}.py', ROOT / name / '__init__.py'))


class _HiddenModules:
    """The last of the finders: for names that nobody else has, such as of our classes in a file, our modules after all.

    Args:
        modules: by full name, those of packages too.
    """

    def __init__(self, modules: dict[str, ModuleType]):
        self.modules = modules
        self.specs = {name: module.__spec__ for name, module in modules.items()}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in self.modules else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        name = module.__spec__.name
        module.__spec__ = self.specs[name]  # importing has put another one there
        # with all of its package, which would be read a second time
        sys.modules.update({other: value for other, value in self.modules.items() if other.startswith(f'{name}.')})


def load_running_code(path: str | Path, code_path: str | Path, use: Callable[[str | Path, Any], Any]) -> Any:
    """Load a torch file by running the code it asks for.

    Args:
        path: of the file.
        code_path: the folder of the code.
        use: called with `path` and what was loaded, while the code's imports work, since a module may import at its
            first call.

    Returns:
        What `use` returns; a ModuleTokenizer can import at later calls too.

    Raises:
        InputError: for a missing folder, and whatever goes wrong in the file's own code.
    """
    if not Path(code_path).is_dir():
        raise InputError(f'--tokenizer-code-path {code_path}: no such folder')
    code = ForeignCode(code_path)
    with code.running():
        try:
            value = torch.load(local_path(path), map_location='cpu', weights_only=False)
        except (ImportError, AttributeError) as error:
            raise InputError(f'{path}: its code cannot be imported from {code_path} ({first_line(error)}): give '
                             '--tokenizer-code-path the folder its classes are imported from, or convert the file '
                             'with scripts/convert_tokenizer.py, which needs no code') from None
        except Exception as error:  # the file's own code runs here, and may raise anything
            raise InputError(f'{path}: cannot be loaded as a tokenizer ({first_line(error)})') from None
        used = use(path, value)
    if isinstance(used, ModuleTokenizer) and code.is_needed():
        used.code = code
        # torch.compile would look the code's imports up outside of `running` too
        used.forward = torch.compiler.disable(used.forward)
    return used


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
