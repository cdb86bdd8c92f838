"""PSNR and SSIM against their definitions."""
import numpy as np
import pytest
import torch

from helpers import fails
from image_data.quality import psnr, ssim


@pytest.fixture
def images():
    return torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(0))


def noisy(images, scale=0.1):
    return images + scale * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))


def test_psnr_is_that_of_the_clamped_image(images):
    other = noisy(images)
    wanted = [10 * np.log10(1 / np.mean((a - np.clip(b, 0, 1)) ** 2)) for a, b in zip(images.numpy(), other.numpy())]
    np.testing.assert_allclose(psnr(images, other), wanted, rtol=1e-5)
    assert torch.equal(psnr(images, images), torch.full((3,), 100.))


def slow_ssim(a, b):
    """SSIM of two channels (H, W), window by window, in float64."""
    steps = np.arange(11) - 5
    row = np.exp(-steps ** 2 / (2 * 1.5 ** 2))
    weights = np.outer(row, row) / np.outer(row, row).sum()
    values = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x = a[top:top + 11, left:left + 11]
            y = b[top:top + 11, left:left + 11]
            mean_x = (weights * x).sum()
            mean_y = (weights * y).sum()
            variances = (weights * (x - mean_x) ** 2).sum() + (weights * (y - mean_y) ** 2).sum()
            covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
            values.append((2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
                          / ((mean_x ** 2 + mean_y ** 2 + 1e-4) * (variances + 9e-4)))
    return np.mean(values)


def test_ssim_is_the_mean_over_windows_and_channels(images):
    other = noisy(images).clamp(0, 1)
    wanted = [np.mean([slow_ssim(x, y) for x, y in zip(a, b)])
              for a, b in zip(images.double().numpy(), other.double().numpy())]
    np.testing.assert_allclose(ssim(images, other), wanted, atol=1e-5)
    torch.testing.assert_close(ssim(images, images), torch.ones(3))
    assert (ssim(images, noisy(images, 0.3)) < ssim(images, other)).all()


def test_small_images_have_no_ssim(images):
    fails(lambda: ssim(images[..., :10], images[..., :10]), 'SSIM needs images of 11 pixels or more .* not 24x10')
