"""Where the training of a ViT-VQGAN starts: near a patch tokenizer, fitted to the first images.

From random weights, features of all images point in one direction for hundreds of steps, all to one code. So every
layer starts as the identity; what goes into the codebook is fitted to principal components of patches, with a constant
beside them by which directions differ as the components do; rows are clusters of these features; and what comes out of
the decoder is fitted to the patches. A few seconds of least squares are worth an hour of training on a CPU. Call
`start_weights`, then `fit_start`.
"""
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.convnext import ConvNeXtBlock
from torch import nn

from image_tokenizer.kmeans import kmeans
from image_tokenizer.tokenizers import unit_range
from image_tokenizer.vector_quantizer import VectorQuantizer
from image_tokenizer.vitvqgan import ViTVQGAN, add_position
from token_files.codebook import quantize
from utils import InputError, device_of_sums

CONSTANT = 2.  # beside components whose mean square length is 1
RIDGE = 1e-2  # of the mean square of an input: less fits better, but by large weights that the first steps wreck
ITERATIONS = 10  # of k-means


def start_weights(model: ViTVQGAN) -> None:
    """New weights by which every layer of encoder and decoder is the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # What a layer adds to its input is 0 when its last weights and biases are: the layer is the identity, and yet it
    # learns, because those weights have gradients.
    for part in (model.encoder, model.decoder):
        for layer in part.transformer.layers:
            if isinstance(layer, ConvNeXtBlock):
                nn.init.zeros_(layer.mlp.fc2.weight)
                continue
            attention, feed_forward = layer
            nn.init.zeros_(attention.fn.to_out.weight)
            nn.init.zeros_(feed_forward.fn.net[2].weight)
    embedding = model.encoder.to_patch_embedding[0]
    nn.init.xavier_uniform_(embedding.weight.view(len(embedding.weight), -1))
    nn.init.zeros_(embedding.bias)


def cut_patches(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, 3, S, S) uint8 -> patches (B·n, 3·p·p) float32 in [0, 1], ordered (channel, row, column)."""
    return rearrange(unit_range(pixels), 'b c (h p) (w q) -> (b h w) (c p q)', p=patch_size, q=patch_size)


def least_squares(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The matrix (a, b) float32 that best takes x (N, a) to y (N, b), over all pairs of them."""
    square = 0
    product = 0
    for x, y in pairs:
        device = x.device
        x, y = (part.to(device_of_sums(device)).double() for part in (x, y))
        square = square + x.T @ x
        product = product + x.T @ y
    square = square + RIDGE * square.diagonal().mean() * torch.eye(len(square), device=square.device)
    return torch.linalg.solve(square, product).float().to(device)


def components_of(batches: Sequence[torch.Tensor], patch_size: int, number: int) -> Callable:
    """A function of patches (N, 3·p·p): their leading principal components (N, number), of mean square length 1.

    Where patches have fewer, zeros follow.
    """
    count = 0
    total = 0
    square = 0
    for pixels in batches:
        patches = cut_patches(pixels, patch_size).to(device_of_sums(pixels.device)).double()
        count += len(patches)
        total = total + patches.sum(0)
        square = square + patches.T @ patches
    mean = total / count
    values, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
    values = values.clamp(min=0).flip(0)[:number]
    basis = (vectors.flip(1)[:, :number] / values.sum().sqrt().clamp(min=1e-6)).float().to(pixels.device)
    mean = mean.float().to(pixels.device)
    return lambda patches: F.pad((patches - mean) @ basis, (0, number - basis.shape[1]))


@torch.no_grad()
def fit_start(model: ViTVQGAN, quantizer: VectorQuantizer, batches: Sequence[torch.Tensor],
              generator: torch.Generator) -> None:
    """Fit pre_quant, the codebook and to_pixel to images, one after the other.

    Args:
        model: with the weights of `start_weights`.
        quantizer: of its features.
        batches: (B, 3, S, S) uint8, on the device of the model.
        generator: on that device.

    Raises:
        InputError: for fewer patches than codes.
    """
    codes, dim = quantizer.rows.shape
    size = model.patch_size
    images = sum(map(len, batches))
    patches = images * (batches[0].shape[-1] // size) ** 2
    if patches < codes:
        raise InputError(f'--codes {codes}: more than the {patches} patches of the first {images} images; give more '
                         'images, or fewer codes')

    # Features: principal components of patches, and a constant. Codes are compared by direction; beside a constant,
    # patches of other contrast have other directions too.
    components = components_of(batches, size, dim - 1)

    def target_features(pixels: torch.Tensor) -> torch.Tensor:
        return F.pad(components(cut_patches(pixels, size)), (0, 1), value=CONSTANT)

    def encoder_outputs(pixels: torch.Tensor) -> torch.Tensor:
        return F.pad(model.encoder(unit_range(pixels)).flatten(0, 1), (0, 1), value=1.)

    matrix = least_squares((encoder_outputs(pixels), target_features(pixels)) for pixels in batches)
    matrix *= (dim / (1 + CONSTANT ** 2)) ** 0.5  # now elements of features have mean square 1
    model.pre_quant.weight.copy_(matrix[:-1].T)
    model.pre_quant.bias.copy_(matrix[-1])

    # codebook
    unit = torch.cat([F.normalize(model(unit_range(pixels)), dim=-1).flatten(0, 1) for pixels in batches])
    quantizer.set_rows(kmeans(unit, codes, ITERATIONS, generator))

    # pixels
    color = torch.stack([unit_range(pixels).mean((0, 2, 3)) for pixels in batches]).mean(0)

    def decoder_outputs(pixels: torch.Tensor) -> torch.Tensor:
        rows = quantizer.rows[quantize(model(unit_range(pixels)), quantizer.rows)]
        side = math.isqrt(rows.shape[1])
        x = add_position(model.post_quant(rows), side, side, model.decoder.de_pos_embedding)
        return model.decoder.transformer(x, side, side).flatten(0, 1)

    matrix = least_squares((decoder_outputs(pixels), cut_patches(pixels, size) - color.repeat_interleave(size ** 2))
                           for pixels in batches)
    to_pixel = model.decoder.to_pixel[-1]
    to_pixel.weight.copy_(matrix.view_as(to_pixel.weight))
    to_pixel.bias.copy_(color)
