"""Training a ViT-VQGAN: the losses, what is measured of it on held-out images, and the file that it becomes.

There is no adversarial term: what 9 bits a code cannot say, such as fine texture, comes out as blur.
`TokenizerTraining` is the module that is trained. `evaluate_tokenizer` judges it, and stops a run whose codebook has
collapsed. `save_tokenizer` writes what image_tokenizer/tokenizers.py opens. scripts/train_tokenizer.py has the loop.
"""
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from fileio.files import atomic_path
from image_data.quality import WINDOW, psnr, ssim
from image_tokenizer.tokenizers import FORMAT, VERSION, unit_range
from image_tokenizer.vector_quantizer import VectorQuantizer
from image_tokenizer.vitvqgan import ViTVQGAN
from image_tokenizer.vq_start import start_weights
from utils import InputError, autocast, device_of_sums, print0, sum_over_ranks

COLLAPSED = 0.1  # a run stops when a smaller part of the codes than this is in use
SPARSE = 0.5  # it warns below this part
TOKENS_A_CODE = 10  # held-out tokens for each code: with fewer, codes are unused by chance


class Collapsed(InputError):
    """Most codes are unused."""
    exit_code = 3


@dataclass(frozen=True)
class LossWeights:
    """What the terms of the loss are multiplied by; 0 leaves one out.

    Attributes:
        l1, l2: mean absolute and squared error of pixels.
        gradient: mean absolute error of the differences between neighboring pixels.
        perceptual: see image_tokenizer/perceptual_loss.py.
        commitment: of features to their rows.
    """
    l1: float = 0.
    l2: float = 1.
    gradient: float = 0.
    perceptual: float = 0.
    commitment: float = 4.


class TokenizerTraining(nn.Module):
    """A ViT-VQGAN and its quantizer, as they are trained.

    Args:
        model: without a codebook of its own.
        quantizer: of its features.
        weights: of the terms of the loss.
        perceptual: (images, reconstruction) -> (), or None.
    """

    def __init__(self, model: ViTVQGAN, quantizer: VectorQuantizer, weights: LossWeights,
                 perceptual: Callable | None = None):
        super().__init__()
        self.model = model
        self.quantizer = quantizer
        self.weights = weights
        self.perceptual = perceptual
        start_weights(model)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass."""
        for part in (self.model.encoder, self.model.decoder):
            part.transformer.grad_checkpointing = enable

    def reconstruct(self, images: torch.Tensor,
                    draws: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) to reconstructions, float32, codes (B, n), and the commitment loss ().

        `draws` is as in VectorQuantizer.
        """
        quantized, codes, commitment = self.quantizer(self.model(images), draws)
        return self.model.decode(quantized).float(), codes, commitment

    def forward(self, images: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) float in [0, 1] -> the weighted terms of the loss, to be added up.

        `draws` is as in VectorQuantizer: the codebook changes only where they are given.
        """
        reconstruction, _, commitment = self.reconstruct(images, draws)
        return self.terms(images, reconstruction, commitment)

    def terms(self, images: torch.Tensor, reconstruction: torch.Tensor, commitment: torch.Tensor) -> torch.Tensor:
        """The weighted terms of the loss, those whose weight is not 0."""
        weights = self.weights
        error = reconstruction - images
        terms = [weights.commitment * commitment]
        if weights.l1:
            terms.append(weights.l1 * error.abs().mean())
        if weights.l2:
            terms.append(weights.l2 * error.square().mean())
        if weights.gradient:
            terms.append(weights.gradient * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()))
        if weights.perceptual:
            terms.append(weights.perceptual * self.perceptual(images, reconstruction))
        return torch.stack(terms)

    def codebook(self) -> torch.Tensor:
        """(K, d) float32 on the CPU. Its elements differ from the mean row's by 1 in the mean square.

        SeiT's embedding noise has that deviation too; what is the same in all rows carries no information.
        """
        rows = nn.functional.normalize(self.quantizer.rows, dim=1).cpu()
        return rows / (rows - rows.mean(0)).square().mean().sqrt().clamp(min=1e-6)


# ---------------------------------------------------------------- measuring

def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """2 to the entropy in bits of codes used counts (K,) times, (): K where all are used alike, 1 for one alone."""
    frequencies = counts.double() / counts.sum().clamp(min=1)
    return 2 ** -torch.special.xlogy(frequencies, frequencies).sum().div(torch.log(torch.tensor(2.)))


@torch.no_grad()
def evaluate_tokenizer(training: TokenizerTraining, batches: Iterable[torch.Tensor], amp: str,
                       name: str = '') -> dict[str, float]:
    """Measure on held-out images, of which each rank has some. Prints a line. Collective.

    Args:
        training: left in eval mode.
        batches: (B, 3, S, S) uint8 on the device.
        amp: 'off', 'bf16' or 'fp16'.
        name: marks the line: '' or 'EMA'.

    Returns:
        {'psnr' and 'ssim': means over images (SSIM for images of 11 pixels or more), 'usage': part of the codes that
        occur, 'perplexity', 'loss'}.

    Raises:
        InputError: without images. Collapsed: for a usage below COLLAPSED, where there are tokens enough to tell.
    """
    training.eval()
    device = training.quantizer.rows.device
    size = len(training.quantizer.rows)
    home = device_of_sums(device)
    sums = torch.zeros(4 + size, dtype=torch.float64, device=home)  # PSNR, SSIM, loss, images, uses of the codes
    with_ssim = training.model.image_size >= WINDOW
    for pixels in batches:
        images = unit_range(pixels)
        with autocast(device, amp):
            reconstruction, codes, commitment = training.reconstruct(images)
            loss = training.terms(images, reconstruction, commitment).sum()
        sums[0] += psnr(images, reconstruction).sum().to(home)
        if with_ssim:
            sums[1] += ssim(images, reconstruction).sum().to(home)
        sums[2] += loss.to(home) * len(images)
        sums[3] += len(images)
        sums[4:] += torch.bincount(codes.flatten(), minlength=size).to(home)
    sum_over_ranks(sums)
    counts = sums[4:]
    if not sums[3]:
        raise InputError('no image is left to evaluate')
    values = torch.stack([*(sums[:3] / sums[3]), (counts > 0).double().mean(), perplexity(counts)]).tolist()
    stats = dict(zip(('psnr', 'ssim', 'loss', 'usage', 'perplexity'), values))
    if not with_ssim:
        del stats['ssim']
    ssim_note = f' SSIM {stats["ssim"]:.4f}' if with_ssim else ''
    print0(f'* PSNR {stats["psnr"]:.3f}{ssim_note} usage {stats["usage"]:.1%} perplexity {stats["perplexity"]:.1f} '
           f'loss {stats["loss"]:.4f}' + (f' ({name})' if name else ''))
    check_usage(stats['usage'], size, int(counts.sum()))
    return stats


def check_usage(usage: float, codes: int, tokens: int) -> None:
    """Warn where few codes occur in held-out tokens; Collapsed where hardly any do, and the tokens suffice to tell."""
    if usage < COLLAPSED and tokens >= TOKENS_A_CODE * codes:
        raise Collapsed(f'the codebook has collapsed: {usage:.1%} of {codes} codes occur in {tokens:,} held-out '
                        'tokens; raise --revive-below, lower --lr or --codes; the files on disk are from before')
    if usage < SPARSE:
        print0(f'warning: only {usage:.1%} of {codes} codes occur in {tokens:,} held-out tokens: raise --revive-below, '
               'or lower --lr or --codes')


# ---------------------------------------------------------------- the file

def save_tokenizer(training: TokenizerTraining, path: str | Path) -> None:
    """Write a .safetensors that image_tokenizer.load_tokenizer reads, atomically. Raises InputError."""
    state = {key: value.cpu().contiguous() for key, value in training.model.state_dict().items()}
    state['quantizer.embedding.weight'] = training.codebook()
    data = safetensors.torch.save(state, {'format': FORMAT, 'version': str(VERSION)})
    # The library writes the two entries of the metadata in any order. In one order, equal tokenizers are equal files.
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8 + size])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    text = json.dumps(header, separators=(',', ':')).encode().ljust(size)
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + size:])
