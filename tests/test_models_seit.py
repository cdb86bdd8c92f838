"""Models against the published shapes and logits."""
import zlib

import numpy as np
import pytest
import timm
import torch

import models_seit  # noqa: F401 (registers the models)

NAMES = ['deit_small_token_32', 'deit_base_token_32', 'deit_small_token_4', 'deit_base_token_4']


def fill_golden(model, seed=0, gain=0.02):
    """Weights by the golden rule: a generator named after each tensor."""
    state = {}
    for name, value in model.state_dict().items():
        x = gain * np.random.default_rng(zlib.crc32(name.encode()) + seed).standard_normal(tuple(value.shape))
        x = x.astype(np.float32) + ('norm' in name and name.endswith('weight'))
        state[name] = torch.from_numpy(x)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize('name', NAMES)
def test_state_dict_has_published_names_and_shapes(name, golden):
    model = timm.create_model(name)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == golden('state_dict_shapes.json')[name]


@pytest.mark.parametrize('name', NAMES)
def test_logits_are_the_published_models(name, golden):
    model = fill_golden(timm.create_model(name)).eval()
    c = model.in_chans
    x = torch.from_numpy(np.random.default_rng(0 + c).standard_normal((2, c, 28, 28)).astype(np.float32))
    with torch.no_grad():
        logits = model(x)
    np.testing.assert_allclose(logits.numpy(), golden('logits.npz')[name], atol=1e-4)


def test_tiny_and_small_experiments():
    model = timm.create_model('deit_tiny_token_32', num_classes=10)
    assert model.embed_dim == 192 and len(model.blocks) == 12 and model.blocks[0].attn.num_heads == 3
    model = timm.create_model('deit_tiny_token_32', depth=2, embed_dim=64, num_heads=2, img_size=14)
    assert model.pos_embed.shape == (1, 1 + 49, 64) and model(torch.zeros(3, 32, 14, 14)).shape == (3, 1000)


def test_initialisation():
    torch.manual_seed(0)
    model = timm.create_model('deit_small_token_32')
    for value in (model.cls_token, model.pos_embed, model.blocks[0].mlp.fc1.weight, model.head.weight):
        assert value.std().item() == pytest.approx(0.02, rel=0.15)
    conv = torch.nn.Conv2d(32, 384, 4, 2, 1)  # PyTorch's default initialisation
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(conv.weight.std().item(), rel=0.05)
    assert not model.head.bias.any()


def test_drop_path_grows_and_rate_is_passed():
    model = timm.create_model('deit_small_token_32', drop_path_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.2)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert model.pos_drop.p == model.blocks[0].attn.proj_drop.p == model.blocks[0].mlp.drop1.p == 0.2
    assert model.head_drop.p == 0  # as timm 0.5.4's drop_rate, which spared the head


def test_pretrained_is_refused():
    with pytest.raises(ValueError, match='no weights are hosted'):
        timm.create_model('deit_small_token_32', pretrained=True)


def test_activation_checkpointing_changes_nothing():
    model = fill_golden(timm.create_model('deit_tiny_token_32', depth=2, num_classes=3, img_size=8)).train()
    x = torch.randn(2, 32, 8, 8)
    plain = model(x)
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(model(x), plain)
