"""The training of a tokenizer in small."""
import torch

from image_tokenizer.vector_quantizer import VectorQuantizer
from image_tokenizer.vitvqgan import Size, ViTVQGAN
from image_tokenizer.vq_training import LossWeights, TokenizerTraining

SIZE = Size(64, 2, 1, 128)


def smooth(count, size=32, seed=0):
    """Images of colored waves with an edge, (count, 3, size, size) uint8."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*[torch.arange(size) / size] * 2, indexing='ij')
    f, g, phase = (6 * torch.rand(3, count, 3, 1, 1, generator=generator))
    waves = torch.sin(f * y + g * x + phase) * (1 - 0.8 * (x > torch.rand(count, 1, 1, 1, generator=generator)))
    return (127.5 + 120 * waves).to(torch.uint8)


def new_training(codes=64, patch_size=4, heads=1):
    torch.manual_seed(0)
    size = SIZE._replace(heads=heads)
    model = ViTVQGAN(size, size, embed_dim=16, image_size=32, patch_size=patch_size)
    return TokenizerTraining(model, VectorQuantizer(codes, 16), LossWeights()).eval()
