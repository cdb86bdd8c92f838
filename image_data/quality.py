"""How close images are to their originals: PSNR, and SSIM as Wang et al. (2004) define it.

Both are of each image in a batch, on any device, so that means over images do not depend on the batches.
"""
import torch
import torch.nn.functional as F

from utils import InputError

WINDOW = 11  # pixels on a side of SSIM's Gaussian
SIGMA = 1.5  # its deviation
STABLE = 0.01 ** 2, 0.03 ** 2  # SSIM's constants for values in [0, 1]
EXACT_ERROR = 1e-10  # the least mean squared error that counts, 100 dB: means over images stay finite


def psnr(images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image, in dB; equal images have 100.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        reconstruction: (B, 3, H, W) float; what lies outside [0, 1] is clamped.

    Returns:
        (B,) float32.
    """
    error = (images.float() - reconstruction.float().clamp(0, 1)).square().mean((1, 2, 3))
    return -10 * error.clamp(min=EXACT_ERROR).log10()


def ssim(images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image, at most 1: the mean over channels and over all windows within the image.

    Args:
        images: (B, 3, H, W) float in [0, 1], both sides of 11 pixels or more.
        reconstruction: (B, 3, H, W) float; what lies outside [0, 1] is clamped.

    Returns:
        (B,) float32.

    Raises:
        InputError: for smaller images.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise InputError(f'SSIM needs images of {WINDOW} pixels or more on a side, not '
                         f'{images.shape[-2]}x{images.shape[-1]}')
    x = images.float()
    y = reconstruction.float().clamp(0, 1)
    steps = torch.arange(WINDOW, device=x.device) - WINDOW // 2
    weights = (-steps.square() / (2 * SIGMA ** 2)).exp()
    weights = weights / weights.sum()
    # local means of x, y and their products: a Gaussian is a column of weights times a row of them
    maps = torch.cat([x, y, x * x, y * y, x * y], 1)  # (B, 15, H, W)
    channels = maps.shape[1]
    maps = F.conv2d(maps, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    maps = F.conv2d(maps, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    mean_x, mean_y, square_x, square_y, product = maps.chunk(5, 1)
    variances = square_x - mean_x.square() + square_y - mean_y.square()
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + STABLE[0]) / (mean_x.square() + mean_y.square() + STABLE[0])
    return (luminance * (2 * covariance + STABLE[1]) / (variances + STABLE[1])).mean((1, 2, 3))
