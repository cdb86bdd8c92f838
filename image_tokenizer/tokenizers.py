"""Image tokenizers: images -> features -> codes -> (where there is a decoder) images.

A tokenizer is any nn.Module with this interface; plug in your own VQ model by giving it one:

    patch_size: int     pixels a code covers, on each side
    embed_dim: int      width of a feature = width of a codebook row
    forward(images)     (B, 3, H, W) float in [0, 1]  ->  (B, n, embed_dim), n = H/patch_size * W/patch_size, row by row
    decode(embeddings)  (B, n, embed_dim) codebook rows  ->  (B, 3, H, W) float, unclamped. Optional.

The codebook is a (K, embed_dim) tensor of its own. A feature's code is the row of largest cosine
(`codebook.quantize`); the row as stored, not normalized, is what SeiT trains on.

A tokenizer that finds codes in another way gives them itself, instead of features:

    codes(images)       (B, 3, H, W) float in input_range  ->  (B, n) int64, row by row; -1 where it can give none
    codebook            (K, embed_dim) float, whose row numbers they are; None where another file has it
    input_range         (lowest, highest) value of a pixel, also of those that `decode` gives. Optional: (0, 1)

    images_of(codes)    (B, n) int64 -> (B, 3, H, W), in place of `decode`, where the decoder reads no rows

`find_codes` alone asks which of the two ways a tokenizer has. `kind` is what manifests call it, optional too.

`load_tokenizer` reads every kind of tokenizer file: the patch tokenizer below; ViT-VQGAN (vitvqgan.py) and VQGAN
(vqgan.py) as a plain state dict, as .safetensors or as a public Lightning checkpoint; weights of diffusers' VQModel
(diffusers_vq.py); and what runs code: SeiT's published module (pickled.py), and TorchScript programs (torchscript.py).
"""
import contextlib
import math
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import torch
from einops import rearrange
from torch import nn

from fileio.files import download, is_address
from fileio.hub import local_path
from fileio.torch_files import is_safetensors, load_safetensors, load_torch
from image_tokenizer.diffusers_vq import is_vq_model, load_vq_model
from image_tokenizer.kmeans import nearest_rows
from image_tokenizer.latents import LatentTokenizer, is_latent_tokenizer
from image_tokenizer.pickled import from_module, load_running_code
from image_tokenizer import vqgan
from image_tokenizer.torchscript import is_torchscript, load_torchscript
from image_tokenizer.vitvqgan import ViTVQGAN, check_divides, prefixes
from image_tokenizer.vqgan import VQGAN
from token_files.codebook import quantize
from utils import InputError

DECODED_AT_ONCE = 8  # images: bounds memory
LIFT = 2.  # of the last element of a patch tokenizer's rows, where the others have standard deviation 1
FORMAT = 'seit-tokenizer'  # in the metadata of .safetensors that this project writes
VERSION = 1  # of that format


# ---------------------------------------------------------------- images to codes and back

def check_sizes(image_size: int, patch_size: int, flag: str = '--image-size') -> None:
    """InputError unless patches divide images of so many pixels on a side, which a flag says."""
    if patch_size > image_size:
        raise InputError(f'{flag} {image_size}: smaller than patches of {patch_size} pixels; choose a multiple '
                         f'of {patch_size}')
    if image_size % patch_size:
        multiple = image_size // patch_size * patch_size
        raise InputError(f'{flag} {image_size}: images of it do not divide into patches of {patch_size}: choose '
                         f'{multiple} or {multiple + patch_size}')


def check_codebook(tokenizer: nn.Module, codebook: torch.Tensor, path: str) -> None:
    """InputError unless a codebook (K, d), of a file `path`, has as many elements as a tokenizer's features.

    One that gives codes and has no codebook takes any.
    """
    if tokenizer.embed_dim is not None and codebook.shape[1] != tokenizer.embed_dim:
        raise InputError(f'{path}: rows of {codebook.shape[1]} elements, but the tokenizer gives '
                         f'{tokenizer.embed_dim}: give the codebook that belongs to it')


def check_codes(tokenizer: nn.Module, codebook: torch.Tensor, path: str) -> None:
    """InputError unless the codes of a tokenizer are row numbers of a codebook (K, d), of a file `path`.

    Features are compared with any codebook of their width. Codes that a tokenizer gives are of its own.
    """
    check_codebook(tokenizer, codebook, path)
    own = tokenizer.codebook if gives_codes(tokenizer) else None
    if own is None:
        return
    if len(codebook) != len(own):
        raise InputError(f'{path}: {len(codebook)} codes, but the tokenizer gives the numbers of its own {len(own)}: '
                         'give the codebook that belongs to it, whole (one of tokenize_images.py --limit-codes serves '
                         'training alone)')
    if not torch.allclose(codebook.float(), own.float().to(codebook.device), rtol=1e-3, atol=1e-3):
        raise InputError(f'{path}: other rows than those of the tokenizer, whose numbers are its codes: give the '
                         'codebook that belongs to it')


def unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels -> float32 in [0, 1], rounded as torchvision's ToTensor does, on any device."""
    # Divided by a tensor, since CUDA divides by a plain number by multiplying with its reciprocal, which rounds
    # differently: a few codes would be others than on a CPU.
    return pixels / torch.full((1,), 255., device=pixels.device)


def gives_codes(tokenizer: nn.Module) -> bool:
    """Whether a tokenizer gives codes itself, and no features."""
    return callable(getattr(tokenizer, 'codes', None))


def find_codes(tokenizer: nn.Module, codebook: torch.Tensor, images: torch.Tensor,
               precision: contextlib.AbstractContextManager | None = None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Codes of images, in the way that the tokenizer has.

    Args:
        tokenizer: as the module's docstring has it.
        codebook: (K, d) float32, on the device of the tokenizer.
        images: (B, 3, H, W) float in [0, 1], there too.
        precision: what the tokenizer, and not the comparison of features, is computed in.

    Returns:
        features (B, n, d) float32, None of a tokenizer that gives codes itself, and codes (B, n) int64. Those of
        features that are not finite mean nothing; a tokenizer that gives codes itself gives -1 then.

    Raises:
        InputError: for a code beyond the codebook, of a tokenizer that has none of its own.
    """
    own = gives_codes(tokenizer)
    if own:
        low, high = getattr(tokenizer, 'input_range', (0, 1))
        images = images if (low, high) == (0, 1) else images * (high - low) + low
    with precision or contextlib.nullcontext():
        found = tokenizer.codes(images) if own else tokenizer(images)
    if own:
        # an export cannot look at values; there the codebook was compared before
        check = tokenizer.codebook is None and not torch.compiler.is_compiling()
        if check and found.numel() and int(found.max()) >= len(codebook):
            raise InputError(f'the tokenizer gives code {int(found.max())}, but the codebook has {len(codebook)} rows: '
                             'give the codebook that belongs to it')
        return None, found
    features = found.float()
    return features, quantize(features, codebook)


def check_found(features: torch.Tensor | None, codes: torch.Tensor) -> None:
    """InputError where a tokenizer gives no code for some image, by what `find_codes` returns."""
    if not (codes.min() >= 0 if features is None else features.isfinite().all()):
        raise InputError('the tokenizer gives no codes for some images: its features are not finite, so its weights '
                         'are damaged, or its precision is too coarse for them')


def compile_tokenizer(tokenizer: nn.Module) -> nn.Module:
    """A tokenizer by torch.compile, for `find_codes`."""
    if not gives_codes(tokenizer):
        return torch.compile(tokenizer)
    tokenizer.codes = torch.compile(tokenizer.codes)
    return tokenizer


def encode_images(tokenizer: nn.Module, codebook: torch.Tensor, pixels: torch.Tensor,
                  amp: str = 'off') -> tuple[torch.Tensor | None, torch.Tensor]:
    """Images to codes, on the device of the tokenizer and the codebook.

    Args:
        tokenizer: as the module's docstring has it.
        codebook: (K, d).
        pixels: (B, 3, S, S) uint8, on any device.
        amp: 'off' or 'bf16', for the tokenizer alone: codes are compared in float32.

    Returns:
        features and codes, see `find_codes`.
    """
    images = unit_range(pixels.to(codebook.device, non_blocking=True))
    return find_codes(tokenizer, codebook, images,
                      torch.autocast(codebook.device.type, torch.bfloat16, enabled=amp == 'bf16'))


@torch.inference_mode()
def decode_codes(tokenizer: nn.Module, codebook: torch.Tensor, codes: torch.Tensor) -> torch.Tensor | None:
    """Codes to images, on the device of the tokenizer and the codebook.

    Args:
        tokenizer: as the module's docstring has it.
        codebook: (K, d).
        codes: (B, n) int64, n a square.

    Returns:
        (B, 3, S, S) float32 in [0, 1], or None where the tokenizer has no decoder.
    """
    of_codes = hasattr(tokenizer, 'images_of')
    if not (of_codes or hasattr(tokenizer, 'decode')) or getattr(tokenizer, 'decoder', True) is None:
        return None
    parts = codes.to(codebook.device).split(DECODED_AT_ONCE)
    images = torch.cat([tokenizer.images_of(part) if of_codes else tokenizer.decode(codebook[part]) for part in parts])
    low, high = getattr(tokenizer, 'input_range', (0, 1))
    return (images if (low, high) == (0, 1) else (images - low) / (high - low)).clamp(0, 1)


# ---------------------------------------------------------------- tokenizers

class PatchTokenizer(nn.Module):
    """A linear tokenizer learned by PCA: a patch minus the mean patch, on the leading components.

    With `rows` its feature of a patch is the row whose components are nearest in Euclidean distance. A row is nearest
    to itself by cosine too, so codes are those of the nearest rows. Without, components are compared by direction, and
    the smaller a patch's contrast, the more its code is chance.

    Args:
        mean: (3·p·p,) mean patch, values in [0, 1], ordered (channel, row, column).
        basis: (3·p·p, d) orthonormal components as columns.
        scale: () what components are multiplied by, so that those of codebook rows have standard deviation 1.
        rows: (K, d + 1) the codebook: scaled components, then LIFT. Or None, as in files made before 2026-11-25.
    """

    kind = 'patch tokenizer'

    def __init__(self, mean: torch.Tensor, basis: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor | None = None):
        super().__init__()
        self.register_buffer('mean', mean)
        self.register_buffer('basis', basis)
        self.register_buffer('scale', scale)
        self.register_buffer('rows', rows)
        self.patch_size = int(round((len(mean) / 3) ** 0.5))
        self.embed_dim = basis.shape[1] if rows is None else rows.shape[1]

    @property
    def codebook(self) -> torch.Tensor | None:
        """(K, embed_dim) float, or None: then it is elsewhere."""
        return self.rows

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, n, 3·p·p)."""
        p = self.patch_size
        check_divides(images, p)
        return rearrange(images, 'b c (h p) (w q) -> b (h w) (c p q)', p=p, q=p)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, n, embed_dim) features."""
        components = (self.patches(images) - self.mean) @ self.basis * self.scale
        if self.rows is None:
            return components
        nearest = nearest_rows(components.flatten(0, 1), self.rows[:, :-1])
        return self.rows[nearest].view(*components.shape[:2], self.embed_dim)

    def decode(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, n, embed_dim) codebook rows, n a square -> (B, 3, H, W)."""
        patches = embeddings[..., :self.basis.shape[1]] / self.scale @ self.basis.T + self.mean
        side = int(round(embeddings.shape[1] ** 0.5))
        return rearrange(patches, 'b (h w) (c p q) -> b c (h p) (w q)',
                         h=side, p=self.patch_size, q=self.patch_size)


def lift_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows (K, d) of components with LIFT as one more element: rows near zero get a direction, and like ones."""
    return torch.cat([rows, torch.full_like(rows[:, :1], LIFT)], 1)


# ---------------------------------------------------------------- files

def load_tokenizer(path: str | Path, code_path: str | Path | None = None,
                   allow_torchscript: bool = False) -> nn.Module:
    """Read a tokenizer file of any kind, for use in eval mode on the CPU.

    Args:
        path: a .safetensors, or a torch file, or an http(s) or hf:// address of either; a TorchScript program has no
            http(s) address.
        code_path: a folder with the code of a pickled module. Giving it is the user's consent to run what the file
            says; it is used only for a file that cannot be read without.
        allow_torchscript: the user's consent to run a TorchScript program.

    Raises:
        InputError: for a file that is no tokenizer, is damaged, or needs code that was not given.
    """
    if is_torchscript(path):
        if not allow_torchscript:
            raise InputError(f'{path}: is a TorchScript program, which is run on each image. If you trust it, add '
                             '--allow-torchscript of tokenize_images.py, and of the programs that evaluate, probe, '
                             'inspect and predict')
        return load_torchscript(path)
    try:
        value = read_file(path)
    except CodeNeeded:
        if code_path is None:
            raise
        return load_running_code(path, code_path, build_tokenizer)
    return build_tokenizer(path, value)


class CodeNeeded(InputError):
    """A file that runs code when loaded. `name` is the first class it asks for, as 'package.module.Class'."""

    def __init__(self, path: str | Path, name: str):
        why = 'carries a numpy value' if name.startswith('numpy.') else 'runs code when loaded'
        super().__init__(f'{path}: {why} (it holds {name}). Convert it once to a plain file with '
                         'scripts/convert_tokenizer.py, which runs none of it; or, if you trust it, give the folder '
                         'of its code to --tokenizer-code-path of tokenize_images.py or evaluate_on_images.py')
        self.name = name


def read_file(path: str | Path) -> Any:
    """What a .safetensors or torch file holds, without running code from it. Raises InputError, or its CodeNeeded."""
    file = local_path(path)
    if is_address(file) and is_safetensors(file):
        with tempfile.TemporaryDirectory() as folder:
            return read_file(download(file, folder))
    if is_safetensors(file):
        state = load_safetensors(file, 'a tokenizer')
        check_version(file)
        return state
    try:
        return load_torch(path, 'a tokenizer')
    except InputError as error:
        # load_torch refuses a foreign class and a file of another kind alike. What torch said tells one from the other.
        refusal = str(error.__context__) if isinstance(error.__context__, pickle.UnpicklingError) else ''
        name = re.search(r'GLOBAL (\S+) ', refusal)
        if name or 'persistent_load of storage' in refusal:  # the latter is how torch < 1.6 saved modules
            raise CodeNeeded(path, name.group(1) if name else 'a module in an old format') from None
        raise


def check_version(path: str | Path) -> None:
    """InputError for a .safetensors that a later version of this project wrote; others may be anything."""
    with safetensors.safe_open(path, 'pt') as file:
        metadata = file.metadata() or {}
    version = metadata.get('version', '')
    if metadata.get('format') == FORMAT and version != str(VERSION):
        newer = version.isdecimal() and int(version[:9]) > VERSION
        raise InputError(f'{path}: is of version {version[:20]!r} of {FORMAT}, and {VERSION} is read here: '
                         + ('update the project' if newer else 'a damaged file; make it again'))


def build_tokenizer(path: str | Path, value: Any) -> nn.Module:
    """The tokenizer in what was read from `path`: a dict of tensors, a dict with a 'state_dict', or a module.

    Raises:
        InputError: when it is anything else.
    """
    if isinstance(value, nn.Module):
        return from_module(path, value.eval())
    state = value
    if isinstance(state, dict) and isinstance(state.get('state_dict'), dict):
        state = state['state_dict']  # Lightning
    elif isinstance(state, dict) and isinstance(state.get('model'), dict) and vqgan.prefixes(state['model']):
        state = state['model']  # LlamaGen
    if not isinstance(state, dict):
        raise InputError(f'{path}: a tokenizer file of no known kind (found: {type(state).__name__})')
    if {'mean', 'basis', 'scale'} <= state.keys():
        return patch_tokenizer(path, state)
    if is_latent_tokenizer(state):
        return from_state(LatentTokenizer, path, state)
    if is_vq_model(state):
        return load_vq_model(path, state)
    kind = VQGAN if vqgan.prefixes(state) else ViTVQGAN if prefixes(state) else None
    if kind is None:
        names = ', '.join(str(key)[:40] for key in list(state)[:5]) or 'nothing'
        near = vqgan.nearest_family(state)
        raise InputError(f'{path}: a tokenizer file of no known kind (found: {names}'
                         + (f'; nearest to a {near})' if near else ')'))
    return from_state(kind, path, state)


def from_state(kind: type[nn.Module], path: str | Path, state: dict[str, Any]) -> nn.Module:
    """The tokenizer of a kind in a state dict of the file `path`. Raises InputError."""
    try:
        return kind.from_state_dict(state)
    except InputError as error:
        raise InputError(f'{path}: {error}') from None


def patch_tokenizer(path: str | Path, state: dict[str, Any]) -> PatchTokenizer:
    """The PatchTokenizer of a state dict. Raises InputError when the names or shapes do not fit."""
    names = ('mean', 'basis', 'scale', 'rows') if 'rows' in state else ('mean', 'basis', 'scale')
    unknown = [str(name)[:40] for name in state if name not in names]
    if unknown:
        raise InputError(f'{path}: a patch tokenizer with {", ".join(unknown[:3])}, which this version does not know: '
                         'update the project, or fit the tokenizer again')
    tensors = [state[name] for name in names]
    if not all(isinstance(tensor, torch.Tensor) and tensor.is_floating_point() for tensor in tensors):
        raise InputError(f'{path}: not a patch tokenizer: {", ".join(names)} are not all float tensors')
    shapes = [tuple(tensor.shape) for tensor in tensors]
    size = shapes[0][0] if len(shapes[0]) == 1 else 0
    dim = shapes[1][1] if len(shapes[1]) == 2 else 0
    codes = shapes[-1][0] if len(shapes[-1]) == 2 else 0
    if (not size or not dim or size != 3 * math.isqrt(size // 3) ** 2 or shapes[1:3] != [(size, dim), ()]
            or ('rows' in state and (not codes or shapes[3] != (codes, dim + 1)))):
        raise InputError(f'{path}: not a patch tokenizer: {", ".join(names)} have shapes {shapes}, expected (3pp,), '
                         '(3pp, d), () and, in newer files, (K, d + 1)')
    return PatchTokenizer(*(tensor.float() for tensor in tensors)).eval()
