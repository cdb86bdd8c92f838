"""Image tokenizers: images -> features -> codes -> (where there is a decoder) images.

A tokenizer is any nn.Module with this interface; plug in your own VQ model by giving it one:

    patch_size: int     pixels a code covers, on each side
    embed_dim: int      width of a feature = width of a codebook row
    forward(images)     (B, 3, H, W) float in [0, 1]  ->  (B, n, embed_dim), n = H/patch_size * W/patch_size, row by row
    decode(embeddings)  (B, n, embed_dim) codebook rows  ->  (B, 3, H, W) float, unclamped. Optional.

The codebook is a (K, embed_dim) tensor of its own. A feature's code is the row of largest cosine (`quantize`);
the row as stored, not normalised, is what SeiT trains on.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

from utils import InputError, load_torch


def image_transform(size):
    """PIL image -> (3, size, size) float32 in [0, 1]: both sides resized bicubically, nothing cropped or normalised
    (the published preparation)."""
    return transforms.Compose([transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC),
                               transforms.ToTensor()])


def open_image_folder(path, transform):
    """torchvision's ImageFolder, its complaints as one line. Labels are class folders in alphabetical order."""
    try:
        return ImageFolder(path, transform)
    except OSError as error:  # no folder, no class folders, class folders without images
        raise InputError(f'{path}: no class folders of images ({str(error).splitlines()[0]})') from None


def quantize(features, codebook):
    """Codes of features: the nearest codebook row after L2-normalising both (ViT-VQGAN's quantiser).

    Args: features (..., d) float; codebook (K, d) float.
    Returns (...) int64 in [0, K). Ties go to the lowest code.
    """
    return (F.normalize(features, dim=-1) @ F.normalize(codebook, dim=-1).T).argmax(-1)


class PatchTokenizer(nn.Module):
    """A linear tokenizer learned by PCA: a patch minus the mean patch, on the leading components.

    Args:
        mean: (3·p·p,) mean patch, values in [0, 1], ordered (channel, row, column).
        basis: (3·p·p, d) orthonormal components as columns.
        scale: () what features are multiplied by, so that codebook elements have standard deviation 1.
    """

    def __init__(self, mean, basis, scale):
        super().__init__()
        self.register_buffer('mean', mean)
        self.register_buffer('basis', basis)
        self.register_buffer('scale', scale)
        self.patch_size = int(round((len(mean) / 3) ** 0.5))
        self.embed_dim = basis.shape[1]

    def patches(self, images):
        """(B, 3, H, W) -> (B, n, 3·p·p)."""
        p = self.patch_size
        if images.shape[-2] % p or images.shape[-1] % p:
            raise InputError(f'images of {images.shape[-2]}x{images.shape[-1]} do not divide into patches of {p}: '
                             f'choose an image size that is a multiple of {p}')
        return rearrange(images, 'b c (h p) (w q) -> b (h w) (c p q)', p=p, q=p)

    def forward(self, images):
        """(B, 3, H, W) float in [0, 1] -> (B, n, d) features."""
        return (self.patches(images) - self.mean) @ self.basis * self.scale

    def decode(self, embeddings):
        """(B, n, d) codebook rows, n a square -> (B, 3, H, W)."""
        patches = embeddings / self.scale @ self.basis.T + self.mean
        side = int(round(embeddings.shape[1] ** 0.5))
        return rearrange(patches, 'b (h w) (c p q) -> b c (h p) (w q)',
                         h=side, p=self.patch_size, q=self.patch_size)


def load_tokenizer(path):
    """Read a tokenizer file, without running code from it. Raises InputError."""
    state = load_torch(path, 'a tokenizer')
    if isinstance(state, dict) and {'mean', 'basis', 'scale'} <= state.keys():
        return PatchTokenizer(state['mean'], state['basis'], state['scale']).eval()
    found = ', '.join(list(state)[:5]) if isinstance(state, dict) else type(state).__name__
    raise InputError(f'{path}: a tokenizer file of no known kind (found: {found})')
