"""The token ViTs with a plain 2x2 patch embedding."""
import pytest
import timm
import torch

from helpers import fails
from models_seit import MODELS, create_model

SMALL = {'depth': 2, 'embed_dim': 32, 'num_heads': 2}


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_only_the_stem_differs(size):
    torch.manual_seed(0)
    plain = create_model(f'deit_{size}_token_32_patch', {'depth': 1}, 10, 16, 32).eval()
    published = create_model(f'deit_{size}_token_32', {'depth': 1}, 10, 16, 32).eval()
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in (plain, published)]
    differ = {name for name in shapes[1] if shapes[0][name] != shapes[1][name]}
    assert shapes[0].keys() == shapes[1].keys() and differ == {'patch_embed.proj.weight'}
    assert plain.patch_embed.proj.kernel_size == plain.patch_embed.proj.stride == (2, 2)
    assert f'deit_{size}_token_32_patch' in MODELS and plain(torch.zeros(2, 32, 16, 16)).shape == (2, 10)


def test_patches_do_not_overlap():
    model = create_model('deit_tiny_token_32_patch', SMALL, 10, 8, 32).eval()
    x = torch.randn(1, 32, 8, 8)
    changed = x.clone()
    changed[:, :, 2, 2] += 1
    rows = (model.patch_embed(x) != model.patch_embed(changed)).any(-1)
    assert rows.nonzero()[:, 1].tolist() == [5]


def test_mistakes_are_one_line():
    with pytest.raises(ValueError, match='no weights are hosted'):
        timm.create_model('deit_tiny_token_32_patch', pretrained=True)
    fails(lambda: create_model('deit_tiny_token_32', {'embed_layer': 'x'}, 10, 8), 'embed_layer')
    fails(lambda: create_model('deit_tiny_token_32_patch', SMALL, 10, 7, 32), 'deit_tiny_token_32_patch')
