"""Fitting a codebook in the latents of a tiny autoencoder: k-means of latents drawn from images drawn at random.

Equal images and options give equal tokenizers on one machine. Latents get the code of the nearest center; the codebook
that training reads is the centers scaled to deviation 1, that of embedding noise.
"""
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fileio.torch_files import load_torch
from image_data.sources import Source, load_images
from image_tokenizer.kmeans import kmeans, nearest_rows
from image_tokenizer.latents import PATCH, LatentTokenizer
from image_tokenizer.patch_fit import draw
from image_tokenizer.tokenizers import check_sizes, unit_range
from utils import InputError

BATCH_SIZE = 16  # images encoded at a time
MEASURED = 32  # images whose reconstruction is measured


@dataclass(frozen=True)
class LatentOptions:
    """What a fitted tokenizer depends on, beside the autoencoder and the images.

    Attributes:
        image_size: pixels on each side.
        codes: rows of the codebook.
        max_images: drawn at random for the fit.
        max_latents: of their latents, drawn at random.
        iterations: of k-means.
        seed: of all that is drawn.
    """
    image_size: int = 256
    codes: int = 391
    max_images: int = 500
    max_latents: int = 200_000
    iterations: int = 50
    seed: int = 0


def read_half(path: str | Path, half: str) -> dict[str, torch.Tensor]:
    """The weights of an autoencoder's 'encoder' or 'decoder', by the names of `LatentTokenizer`. Raises InputError.

    The file may be of one half, or of both, as 'encoder.*' and 'decoder.*'; 'layers.' before the numbers is dropped.
    """
    value = load_torch(path, 'an autoencoder')
    state = value if isinstance(value, dict) else {}
    weights = {}
    for key, tensor in state.items():
        match = re.fullmatch(rf'(?:{half}\.)?(?:layers\.)?(\d+\..+)', str(key))
        if match and isinstance(tensor, torch.Tensor):
            weights[f'{half}.{match[1]}'] = tensor.detach().float()
    first = f'{half}.{0 if half == "encoder" else 1}.weight'
    if first not in weights or weights[first].ndim != 4:
        names = ', '.join(str(key)[:40] for key in list(state)[:3]) or type(value).__name__
        raise InputError(f'{path}: no {half} of the TAESD family (found: {names}): give a plain state dict, such as '
                         f'taesd_{half}.pth')
    return weights


def fit(source: Source, encoder: str | Path, decoder: str | Path | None, options: LatentOptions,
        workers: int | None = None, skip_bad: bool | None = None,
        max_pixels: int | None = None) -> tuple[LatentTokenizer, str]:
    """Fit a codebook in the latents of an autoencoder.

    Args:
        source: of the images.
        encoder, decoder: files of the TAESD family; without a decoder, codes cannot be drawn.
        options: of the fit.
        workers, skip_bad, max_pixels: as for `patch_fit.fit`.

    Returns:
        The tokenizer, and a line that says what it was fitted to and how well it fits.

    Raises:
        InputError: for files of another layout, images that cannot be read, and too few of them.
    """
    check_sizes(options.image_size, PATCH)
    state = read_half(encoder, 'encoder') | (read_half(decoder, 'decoder') if decoder else {})
    last = state.get('encoder.14.weight')
    dim = len(last) if last is not None and last.ndim else 1  # of another layout: refused below
    try:
        model = LatentTokenizer.from_state_dict(state | {'centers': torch.randn(2, dim)})
    except InputError as error:
        raise InputError(f'{encoder}{f" and {decoder}" if decoder else ""}: {error}') from None
    generator = torch.Generator().manual_seed(options.seed)
    images = draw(len(source), options.max_images, generator).sort().values.tolist()
    latents = []
    with torch.inference_mode():
        for batch in load_images(source, [images[i:i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE)],
                                 options.image_size, workers=workers, skip_bad=skip_bad, max_pixels=max_pixels):
            if len(batch.indices):
                latents.append(model.latents(unit_range(batch.pixels)).flatten(0, 1))
    latents = torch.cat(latents) if latents else torch.empty(0, dim)
    read = len(latents) // (options.image_size // PATCH) ** 2
    latents = latents[draw(len(latents), options.max_latents, generator)]
    if len(latents) < options.codes:
        raise InputError(f'{source.data_path}: {len(latents)} latents are too few for {options.codes} codes: give more '
                         'images, a larger --image-size, or fewer codes')
    if not latents.isfinite().all():
        raise InputError(f'{encoder}: gives latents that are not finite: a damaged file')
    centers = kmeans(latents, options.codes, options.iterations, generator)
    used = len(nearest_rows(latents, centers).unique())
    try:
        model = LatentTokenizer.from_state_dict(state | {'centers': centers})
    except InputError as error:
        raise InputError(f'{source.data_path}: {error}; give images with something on them') from None
    summary = f'{read:,} images, {len(latents):,} latents; {options.codes} codes of {model.embed_dim}, {used} in use'
    if decoder:
        measured = images[:MEASURED]
        db = psnr(model, source, measured, options.image_size, skip_bad, max_pixels)
        summary += f'; {db:.2f} dB over {len(measured)} images'
    return model, summary


@torch.inference_mode()
def psnr(model: LatentTokenizer, source: Source, numbers: list[int], size: int, skip_bad: bool | None,
         max_pixels: int | None) -> float:
    """PSNR (dB) of the reconstructions of some images, from their mean squared error."""
    errors = []
    batches = [numbers[i:i + BATCH_SIZE] for i in range(0, len(numbers), BATCH_SIZE)]
    for batch in load_images(source, batches, size, skip_bad=skip_bad, max_pixels=max_pixels):
        images = unit_range(batch.pixels)
        if len(images):
            decoded = model.decode(model.codebook[model.codes(images)]).clamp(0, 1)
            errors.append((decoded - images).square().mean((1, 2, 3)))
    return -10 * math.log10(max(torch.cat(errors).mean().item(), 1e-10)) if errors else math.nan
