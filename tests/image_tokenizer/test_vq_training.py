"""The losses, what is measured of a tokenizer, and its file."""
import copy

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F
from torchvision.models import vgg16

from helpers import fails
from image_tokenizer.perceptual_loss import PerceptualLoss
from image_tokenizer.tokenizers import load_tokenizer, unit_range
from token_files.codebook import quantize
from small_tokenizer import new_training, smooth
from image_tokenizer.vq_training import (Collapsed, LossWeights, check_usage, evaluate_tokenizer, perplexity,
                                         save_tokenizer)


@pytest.fixture
def training():
    return new_training()


@pytest.fixture
def images():
    return unit_range(smooth(4))


def test_the_terms_of_the_loss(training, images):
    other = (images + 0.2).requires_grad_()
    training.weights = LossWeights(l1=2, l2=3, gradient=5, commitment=7)
    terms = training.terms(images, other, torch.tensor(0.5))
    torch.testing.assert_close(terms, torch.tensor([3.5, 0.4, 0.12, 0.]), atol=1e-5, rtol=0)
    training.weights = LossWeights(l1=0, l2=1, commitment=0)
    reconstruction, _, commitment = training.reconstruct(images)
    torch.testing.assert_close(training(images).sum(), F.mse_loss(reconstruction, images))


def test_gradients_reach_every_weight_and_recomputing_changes_none(training, images):
    for layer in training.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.1)
    training.train()
    gradients = []
    for recompute in (False, True):
        training.set_grad_checkpointing(recompute)
        training.zero_grad()
        training(images).sum().backward()
        gradients.append({name: value.grad.clone() for name, value in training.named_parameters()})
    for name, value in gradients[0].items():
        assert value.any(), name
        torch.testing.assert_close(value, gradients[1][name])


def test_perplexity():
    for counts in ([5, 5, 5, 5], [9, 0, 0], [3, 1, 0, 4]):
        shares = np.array([count for count in counts if count]) / sum(counts)
        assert float(perplexity(torch.tensor(counts))) == pytest.approx(2 ** -(shares * np.log2(shares)).sum())


def test_evaluation_is_that_of_all_images_whatever_the_batches(training, capsys):
    pixels = smooth(10)
    stats = evaluate_tokenizer(training, pixels.split(4), 'off')
    assert stats == pytest.approx(evaluate_tokenizer(training, [pixels], 'off', 'EMA'), rel=1e-5)
    assert stats.keys() == {'psnr', 'ssim', 'loss', 'usage', 'perplexity'} and 0 < stats['usage'] <= 1
    assert capsys.readouterr().out.count('* PSNR ') == 2
    fails(lambda: evaluate_tokenizer(training, [], 'off'), 'no image is left')


def test_collapse_stops_where_tokens_can_tell(capsys):
    check_usage(0.6, 100, 1000)
    assert not capsys.readouterr().out
    for usage, tokens in ((0.4, 1000), (0.05, 999)):
        check_usage(usage, 100, tokens)
        assert f'warning: only {usage:.1%} of 100 codes' in capsys.readouterr().out
    with pytest.raises(Collapsed, match=r'5.0% of 100 codes occur in 1,000') as caught:
        check_usage(0.05, 100, 1000)
    assert caught.value.exit_code == 3


def test_the_file_is_the_tokenizer(training, images, tmp_path):
    path = tmp_path / 'tokenizer.safetensors'
    save_tokenizer(training, path)
    tokenizer = load_tokenizer(path)
    codebook = training.codebook()
    assert torch.equal(tokenizer.codebook, codebook)
    torch.testing.assert_close((codebook - codebook.mean(0)).square().mean(), torch.tensor(1.))
    with torch.no_grad():
        reconstruction, codes, _ = training.reconstruct(images)
        assert torch.equal(quantize(tokenizer(images), codebook), codes)
        torch.testing.assert_close(tokenizer.decode(codebook[codes]), reconstruction)
    with safetensors.safe_open(path, 'pt') as file:
        assert file.metadata() == {'format': 'seit-tokenizer', 'version': '1'}


# ---------------------------------------------------------------- the perceptual term

@pytest.fixture(scope='module')
def vgg(tmp_path_factory):
    with torch.device('meta'):
        state = vgg16(weights=None).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items()
             if name.startswith('features.')}
    path = tmp_path_factory.mktemp('vgg') / 'vgg16.pth'
    torch.save(state, path)
    return path


def test_the_perceptual_term(vgg, training, images):
    loss = PerceptualLoss(vgg, torch.device('cpu'))
    assert loss(images, images) == 0
    other = (images * 0.5).requires_grad_()
    loss(images, other).backward()
    assert other.grad.isfinite().all() and other.grad.any()
    training.perceptual = loss
    assert copy.deepcopy(training).perceptual.layers is loss.layers
    assert not [name for name in training.state_dict() if 'perceptual' in name]
    training.weights = LossWeights(l2=0, commitment=0, perceptual=2)
    with torch.no_grad():
        torch.testing.assert_close(training(images)[1], 2 * loss(images, training.reconstruct(images)[0]))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / 'x.pth'
    for value, said in (({'features.0.weight': torch.ones(2)}, r'features.0.weight: \(2,\) for \(64, 3, 3, 3\)'),
                        (torch.ones(2), 'not the state dict'), ({}, 'missing')):
        torch.save(value, path)
        fails(lambda: PerceptualLoss(path, torch.device('cpu')), 'x.pth', said)
