"""Models of timm by their names."""
import pytest
import torch

from helpers import fails
from inference.pixel_models import create_pixel_model

SMALL = {'depth': 1, 'embed_dim': 32, 'num_heads': 2}


@pytest.mark.parametrize('name, model_kwargs, size', [
    ('vit_tiny_patch16_224', SMALL, 48), ('resnet10t', {}, 40), ('vit_tiny_patch16_224.augreg_in21k', SMALL, 32)])
def test_a_model_has_the_classes_and_reads_the_size_that_are_asked_for(name, model_kwargs, size):
    model = create_pixel_model(name, model_kwargs, 7, size)
    assert not model.training
    with torch.no_grad():
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_drop_rates_are_timms():
    model = create_pixel_model('vit_tiny_patch16_224', SMALL | {'depth': 2}, 7, 32, drop=0.25, drop_path=0.5)
    assert model.head_drop.p == 0.25 and model.blocks[1].drop_path1.drop_prob == 0.5


@pytest.mark.parametrize('name, model_kwargs, size, message', [
    ('vit_tinny_patch16_224', {}, 32, '--model vit_tinny_patch16_224: timm has no such model; near it are .*vit_tiny_'),
    ('qqq', {}, 32, '--model qqq: timm has no such model, and none of a name like it'),
    ('vit_tiny_patch16_224.nix', {}, 32, '--model vit_tiny_patch16_224.nix with .*Invalid pretrained tag'),
    ('deit_tiny_token_32', {}, 32, '--model deit_tiny_token_32 reads tokens; train it with main_seit.py'),
    ('vit_tiny_patch16_224', {'deep': 3}, 32, "with --model-kwargs {'deep': 3}, --input-size 32: .*'deep'"),
    ('vit_tiny_patch16_224', SMALL, 40, '--input-size 40: patches of 16 pixels do not divide the image'),
    ('vit_tiny_patch16_224', SMALL | {'global_pool': ''}, 32, r'gives \(1, 5, 7\) for an image')])
def test_mistakes_are_one_line(name, model_kwargs, size, message):
    fails(lambda: create_pixel_model(name, model_kwargs, 7, size), message)
