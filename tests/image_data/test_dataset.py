"""Images a batch at a time, and their transforms."""
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from helpers import fails, smooth_images
from image_data.dataset import ImageDataset, Normalize, eval_transform, posterize, random_erasing, train_transform

CPU = torch.device('cpu')


@pytest.mark.slow
def test_an_image_is_augmented_by_its_draw_alone(tmp_path):
    """Not by its place in a batch, by its neighbors, or by which process decodes it."""
    smooth_images(tmp_path / 'x')
    data = ImageDataset(str(tmp_path / 'x'), 16, train_transform(16, 0.1, 0.5, 0., 'rand-m9-mstd0.5-inc1'))
    indices = np.arange(24)
    draws = np.stack([indices * 0 + 7, indices], 1)
    whole, = data.batches(indices, 24, CPU, draws=draws)
    assert whole[0].shape == (24, 3, 16, 16) and whole[0].dtype == torch.uint8
    assert torch.equal(whole[1], torch.arange(3).repeat_interleave(8))
    data.workers = 2
    order = np.random.default_rng(0).permutation(24)
    mixed = list(data.batches(order, 5, CPU, draws=draws[order]))
    assert [len(pixels) for pixels, _ in mixed] == [5, 5, 5, 5, 4]
    assert torch.equal(torch.cat([pixels for pixels, _ in mixed]), whole[0][order])
    other, = data.batches(indices, 24, CPU, draws=draws + 1)
    assert (other[0] != whole[0]).flatten(1).any(1).all()


def test_evaluation_resizes_and_crops_the_middle(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 255
    result = torch.as_tensor(eval_transform(32, 1.)(Image.fromarray(pixels)))
    assert result.shape == (3, 32, 32) and int(result[:, :, 2:-2].min()) == 255
    result = torch.as_tensor(eval_transform(32, 0.5)(Image.fromarray(pixels)))
    assert int(result.min()) == 255


def test_pixels_are_normalized_by_the_constants_of_imagenet():
    x = Normalize(CPU)(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert torch.allclose(x[0, :, 0, 0], torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-4)


def test_no_bits_are_black():
    """timm asks for them at magnitude 10, and Pillow 12 refuses."""
    image = Image.new('RGB', (4, 4), (200, 100, 50))
    assert posterize(image, 0).getpixel((0, 0)) == (0, 0, 0)
    assert posterize(image, 1).getpixel((0, 0)) == (128, 0, 0)
    assert posterize(image, 8) is image
    assert auto_augment.NAME_TO_OP['PosterizeIncreasing'] is posterize


def test_erasing_is_of_a_step():
    x = torch.zeros(64, 3, 16, 16)
    erased = random_erasing(0.25, CPU)(x.clone()).flatten(1).any(1)
    assert 2 < erased.sum() < 32
    assert torch.equal(random_erasing(0., CPU)(x.clone()), x)


def test_a_policy_that_timm_lacks_is_one_line():
    fails(lambda: train_transform(16, 0.1, 0., 0., 'randy'), '--aa randy: is no policy of timm')
