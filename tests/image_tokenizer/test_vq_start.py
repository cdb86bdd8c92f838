"""Where training starts: near a patch tokenizer."""
import pytest
import torch

from helpers import fails
from image_data.quality import psnr
from image_tokenizer.kmeans import kmeans, nearest_rows
from image_tokenizer.tokenizers import unit_range
from image_tokenizer.vq_start import RIDGE, cut_patches, fit_start, least_squares
from small_tokenizer import new_training, smooth


@pytest.mark.parametrize('heads', [1, 0])
def test_a_new_tokenizer_is_near_euclidean_kmeans_of_patches(heads):
    training = new_training(heads=heads)
    pixels = smooth(200)
    fit_start(training.model, training.quantizer, pixels[:150].split(40), torch.Generator().manual_seed(0))
    images = unit_range(pixels[150:])
    with torch.no_grad():
        reconstruction, codes, _ = training.reconstruct(images)
    assert len(codes.unique()) > 0.9 * 64
    rows = kmeans(cut_patches(pixels[:150], 4), 64, 10, torch.Generator().manual_seed(0))
    patches = cut_patches(pixels[150:], 4)
    error = (patches - rows[nearest_rows(patches, rows)]).square().view(50, -1).mean(1)
    assert psnr(images, reconstruction).mean() > -10 * error.log10().mean() - 2


@pytest.mark.parametrize('heads', [1, 0])
def test_each_layer_begins_as_the_identity(heads):
    training = new_training(heads=heads)
    x = torch.randn(2, 6, 64)
    for part in training.model.encoder, training.model.decoder:
        assert torch.equal(part.transformer(x, 2, 3), part.transformer.norm(x))


def test_least_squares_over_pairs():
    x = torch.randn(100, 5)
    matrix = torch.randn(5, 3)
    found = least_squares((part, part @ matrix) for part in x.split(30))
    square = x.double().T @ x.double()
    pulled = RIDGE * square.diagonal().mean() * torch.eye(5)
    wanted = torch.linalg.solve(square + pulled, square @ matrix.double()).float()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found, matrix, atol=0.1, rtol=0)


@pytest.mark.parametrize('pixels', [torch.full((8, 3, 32, 32), 200, dtype=torch.uint8),
                                    smooth(8)[:, :1].expand(-1, 3, -1, -1)], ids=['equal', 'gray'])
def test_dull_images_give_finite_weights(pixels):
    training = new_training(8)
    fit_start(training.model, training.quantizer, [pixels], torch.Generator().manual_seed(0))
    assert all(value.isfinite().all() for value in training.state_dict().values())


def test_more_codes_than_patches():
    training = new_training(200, 8)
    fails(lambda: fit_start(training.model, training.quantizer, [smooth(4)], torch.Generator()),
          '--codes 200: more than the 64 patches of the first 4 images')
