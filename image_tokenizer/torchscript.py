"""Tokenizers that are TorchScript programs, as Cosmos-Tokenizer is published: encoder.jit, and decoder.jit beside it.

Such a file holds its own code. That code is no Python, but it is run, so that a file is loaded only where the user
allows it. It gives codes and no table: the codebook is the one that is given, such as fsq:8,8,8,5,5,5.
"""
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fileio.hub import fetch_beside, local_path
from image_tokenizer.vitvqgan import check_divides, grid_side
from utils import InputError

SIDE = 256  # pixels of the image by which a program is tried


class TorchScriptTokenizer(nn.Module):
    """An image tokenizer with codes of its own (see image_tokenizer/tokenizers.py for the interface), and no codebook.

    Args:
        encoder: images (B, 3, H, W) in input_range -> codes (B, H/p, W/p) of integers, alone or the first of a tuple.
        decoder: those codes -> images (B, 3, H, W) in input_range, or the first of a tuple; or None.
        dtype: of the images that it reads.
        patch_size: p.
        code_dtype: of the codes.
    """

    kind = 'TorchScript'
    input_range = (-1., 1.)
    codebook = None
    embed_dim = None  # any codebook's

    def __init__(self, encoder: nn.Module, decoder: nn.Module | None, dtype: torch.dtype, patch_size: int,
                 code_dtype: torch.dtype):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.dtype = dtype
        self.patch_size = patch_size
        self.code_dtype = code_dtype

    @torch.compiler.disable
    def codes(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float in `input_range` -> (B, n) int64, row by row. H and W: multiples of patch_size.

        Its own precision counts, whatever autocast says.
        """
        check_divides(images, self.patch_size)
        with torch.autocast(images.device.type, enabled=False):
            return first_of(self.encoder(images.to(self.dtype))).flatten(1).long()

    forward = codes

    def images_of(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, n) int64 codes, n a square -> (B, 3, H, W) float32 in `input_range`, unclamped."""
        side = grid_side(self.decoder, codes)
        with torch.autocast(codes.device.type, enabled=False):
            return first_of(self.decoder(codes.view(-1, side, side).to(self.code_dtype))).float()


def first_of(value: Any) -> Any:
    """The first of a tuple; other values as they are."""
    return value[0] if isinstance(value, (tuple, list)) and value else value


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript program."""
    path = local_path(path)
    try:
        with zipfile.ZipFile(path) as file:
            names = [name.partition('/')[2] for name in file.namelist()]
    except (OSError, zipfile.BadZipFile):
        return False
    return 'constants.pkl' in names and any(name.startswith('code/') for name in names)


def load_torchscript(path: str | Path) -> TorchScriptTokenizer:
    """The tokenizer of an encoder's file, with the decoder of the name decoder.jit beside encoder.jit. On the CPU.

    Raises:
        InputError: for what cannot be loaded, or gives no grid of codes for an image.
    """
    file = Path(local_path(path))
    beside = file.with_name(file.name.replace('encoder', 'decoder'))
    fetch_beside(beside)
    decoder = load_program(beside, beside) if beside != file and os.path.exists(beside) else None
    encoder = load_program(file, path)
    parameters = [tensor.dtype for tensor in (*encoder.parameters(), *encoder.buffers()) if tensor.is_floating_point()]
    # what a program reads is not stated; one that was frozen has no parameters
    dtypes = [parameters[0]] if parameters else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        try:
            codes = codes_of_noise(encoder, dtype)
            break
        except Exception as error:  # of a program of unknown make
            if dtype == dtypes[-1]:
                raise InputError(f'{path}: fails on an image of {SIDE}x{SIDE} pixels ({last_line(error)})') from None
    if not isinstance(codes, torch.Tensor) or codes.dtype not in (torch.int32, torch.int64) or codes.ndim != 3 or (
            codes.shape[0] != 1 or codes.shape[1] != codes.shape[2] or SIDE % codes.shape[1]):
        found = f'{codes.dtype} {tuple(codes.shape)}' if isinstance(codes, torch.Tensor) else type(codes).__name__
        raise InputError(f'{path}: gives {found} for an image of {SIDE}x{SIDE} pixels, and no grid of codes: give the '
                         'encoder of a discrete tokenizer')
    return TorchScriptTokenizer(encoder, decoder, dtype, SIDE // codes.shape[1], codes.dtype).eval()


def load_program(file: Path, name: str | Path) -> nn.Module:
    """A TorchScript program, on the CPU. Raises InputError, which calls it `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that torch.jit is deprecated, which nobody here can change
            return torch.jit.load(str(file), map_location='cpu').eval()
    except Exception as error:  # damage makes torch raise nearly anything
        raise InputError(f'{name}: damaged or no TorchScript program ({last_line(error)})') from None


@torch.no_grad()
def codes_of_noise(encoder: nn.Module, dtype: torch.dtype) -> Any:
    """The first of what an encoder gives for an image of noise."""
    image = 2 * torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) - 1
    return first_of(encoder(image.to(dtype)))


def last_line(error: Exception) -> str:
    """The last line of a message: TorchScript's begin with where in the program it happened."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1][:200]
