"""The augmentations as one would first write them: image by image, on one-hot grids. Slow and obvious.

benchmarks/data.py measures the real ones against these, and tests compare what they compute.
"""
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from token_augment import draw_random_resized_crop


@dataclass
class OneHot:
    """codes (B, g, g) -> model inputs (B, d, size, size) of the distribution that main_seit.make_augment gives.

    Attributes:
        codebook: (K, d) float32.
        size: side of the model input.
        synonyms: table (K, k) and count (K,), see codebook.load_synonyms.
        synonym_share: part of the images with synonym replacement.
        synonym_prob: of each code in such an image.
        swap_share: part of the images with two patches swapped.
        swap_scale: largest side of a patch, as a part of the grid's.
        min_area: the smallest area of the random-resized crop, as a part of the grid's.
        noise: part of each batch that gets noise; deviations of what a channel shares and of each element.
        rng: of all but crop and noise, which draw from torch's own generator.
    """
    codebook: torch.Tensor
    size: int
    synonyms: tuple[torch.Tensor, torch.Tensor]
    synonym_share: float = 0.25
    synonym_prob: float = 0.25
    swap_share: float = 0.25
    swap_scale: float = 0.25
    min_area: float = 0.08
    noise: tuple[float, float, float] = (0.5, 1., 1.)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def replace_synonyms(self, codes: np.ndarray) -> np.ndarray:
        """Each code (g, g), with probability `synonym_prob`, becomes one of its synonyms."""
        table, count = (tensor.cpu().numpy() for tensor in self.synonyms)
        pick = self.rng.integers(count[codes])
        return np.where(self.rng.random(codes.shape) < self.synonym_prob, table[codes, pick], codes)

    def swap(self, codes: np.ndarray) -> np.ndarray:
        """Two square patches of codes (g, g) change places; corners are redrawn until they are far enough apart."""
        grid_size = len(codes)
        side = int(grid_size * self.rng.uniform(0, self.swap_scale))
        while True:
            (y0, x0), (y1, x1) = self.rng.integers(grid_size - side, size=(2, 2))
            if np.hypot(y1 - y0, x1 - x0) > side:
                break
        swapped = codes.copy()
        swapped[y0:y0 + side, x0:x0 + side] = codes[y1:y1 + side, x1:x1 + side]
        swapped[y1:y1 + side, x1:x1 + side] = codes[y0:y0 + side, x0:x0 + side]
        return swapped

    def crop(self, codes: np.ndarray, box: list[int]) -> torch.Tensor:
        """One-hot grid, crop to a box (top, left, height, width), bicubic resampling, codebook: codes (g, g) ->
        (d, size, size)."""
        top, left, height, width = box
        one_hot = F.one_hot(torch.from_numpy(codes).long(), len(self.codebook))  # (g, g, K)
        grid = one_hot.permute(2, 0, 1).float()
        cropped = grid[None, :, top:top + height, left:left + width]
        resampled = F.interpolate(cropped, (self.size, self.size), mode='bicubic', align_corners=False)[0]
        return (resampled.permute(1, 2, 0) @ self.codebook).permute(2, 0, 1)

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        inputs = []
        for image in codes.numpy():
            choice = self.rng.random()
            if choice < self.synonym_share:
                image = self.replace_synonyms(image)
            elif choice < self.synonym_share + self.swap_share:
                image = self.swap(image)
            box = draw_random_resized_crop(1, len(image), self.min_area, torch.default_generator)[0].tolist()
            inputs.append(self.crop(image, box))
        x = torch.stack(inputs)
        fraction, channel_std, element_std = self.noise
        for i in torch.randperm(len(x))[:int(len(x) * fraction)]:
            x[i] += torch.randn_like(x[i]) * element_std + torch.randn(len(x[i]), 1, 1) * channel_std
        return x
