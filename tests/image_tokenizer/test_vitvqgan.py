"""ViT-VQGAN against the published one, and building it from state dicts."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import GOLDEN_SIZE, golden_state, same_weights
from image_tokenizer.vitvqgan import SIZES, Size, ViTVQGAN, position_table, read_config
from utils import InputError


@pytest.fixture(scope='session')
def vectors(golden):
    return {key: torch.from_numpy(np.asarray(value)) for key, value in golden('vitvqgan.npz').items()}


# ---------------------------------------------------------------- the model

@pytest.mark.parametrize('image_size', [64, 256])
def test_golden_features_and_reconstruction(shapes, vectors, image_size):
    """With stored position tables of the images' size, and with none (then they are for 256x256, so computed here)."""
    state = golden_state(shapes['golden_shapes'], int(vectors['seed']))
    if image_size == 64:
        state |= {f'{part}_pos_embedding': position_table(8, 8, 64) for part in ('encoder.en', 'decoder.de')}
    model = ViTVQGAN.from_state_dict(state)
    assert model.image_size == image_size
    with torch.no_grad():
        features = model(vectors['images'])
        reconstruction = model.decoder(model.post_quant(features))
    torch.testing.assert_close(features, vectors['features'], atol=1e-4, rtol=0)
    torch.testing.assert_close(reconstruction, vectors['reconstruction'], atol=1e-4, rtol=0)


def test_golden_position_table(vectors):
    torch.testing.assert_close(position_table(8, 8, 64), vectors['pos_embedding'], atol=1e-6, rtol=0)


def test_names_and_shapes(shapes):
    assert Size(*(shapes['golden_config'][key] for key in Size._fields)) == GOLDEN_SIZE
    with torch.device('meta'):
        models = {name: ViTVQGAN.from_name(name) for name in SIZES}
        small = ViTVQGAN(GOLDEN_SIZE, GOLDEN_SIZE, image_size=64)
    found = {key: list(value.shape) for key, value in small.state_dict().items()}
    assert found == shapes['golden_shapes']
    for name, model in models.items():
        found = {key: list(value.shape) for key, value in model.state_dict().items()}
        assert found.pop('quantizer.embedding.weight') == [8192, 32]
        assert found == shapes['release_shapes'][name]


def test_plain_load_state_dict(state):
    model = ViTVQGAN(GOLDEN_SIZE, GOLDEN_SIZE, codebook_size=50, image_size=64)
    model.load_state_dict(state)
    same_weights(model, state)


def test_sizes_are_read_from_shapes(state):
    model = ViTVQGAN.from_state_dict(state)
    assert (model.patch_size, model.embed_dim, model.image_size) == (8, 32, 64)
    assert model.encoder.transformer.layers[0][0].fn.heads == 2 and not model.training
    assert model.codebook.shape == (50, 32)


def test_encoder_and_decoder_may_differ_in_size():
    torch.manual_seed(0)
    made = ViTVQGAN(Size(32, 1, 1, 48), Size(64, 2, 2, 96), embed_dim=16, image_size=32, patch_size=4)
    read = ViTVQGAN.from_state_dict(made.state_dict())
    same_weights(read, made.state_dict())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(read(images), made(images))
        assert read.decode(read(images)).shape == images.shape


def test_convolutions_in_the_place_of_attention():
    size = Size(64, 2, 0, 256)
    torch.manual_seed(0)
    model = ViTVQGAN(size, size, codebook_size=7, embed_dim=8, image_size=32, patch_size=8).eval()
    loaded = ViTVQGAN.from_state_dict(model.state_dict())
    assert loaded.kind == model.kind == 'VQGAN of ConvNeXt blocks'
    assert read_config(model.state_dict())['encoder'] == size
    images = torch.rand(2, 3, 32, 48)
    features = loaded(images)
    assert torch.equal(features, model(images)) and features.shape == (2, 4 * 6, 8)
    # a code is told of its neighbors on the grid: of 6 in a row, not of 4
    images.requires_grad_()
    model(images)[0, 3 * 6 + 5].sum().backward()
    seen = images.grad[0].abs().sum(0).view(4, 8, 6, 8).sum((1, 3)) > 0
    assert seen.all()
    assert model.decode(features[:, :16]).shape == (2, 3, 32, 32)
    for part in model.encoder, model.decoder:
        part.transformer.grad_checkpointing = True
    assert torch.equal(model(images), features)
    weights = model.state_dict()
    del weights['encoder.transformer.layers.1.conv_dw.bias']
    with pytest.raises(InputError, match='layers.1.conv_dw.bias is missing'):
        ViTVQGAN.from_state_dict(weights)


def test_another_image_size_gets_its_own_position_table(state):
    model = ViTVQGAN.from_state_dict(state)
    for height, width in ((96, 96), (64, 32)):
        fresh = ViTVQGAN.from_state_dict({key: value for key, value in state.items() if 'pos_emb' not in key})
        fresh.encoder.en_pos_embedding = torch.full_like(fresh.encoder.en_pos_embedding, torch.nan)
        images = torch.rand(1, 3, height, width)
        with torch.no_grad():
            assert model(images).shape == (1, height * width // 64, 32)
            assert torch.equal(model(images), fresh(images))


def test_decode_normalizes_rows(state):
    model = ViTVQGAN.from_state_dict(state)
    rows = model.codebook[torch.arange(16)[None]]
    with torch.no_grad():
        images = model.decode(rows)
        assert images.shape == (1, 3, 32, 32)
        torch.testing.assert_close(images, model.decode(rows * 7))
        assert torch.equal(images, model.decoder(model.post_quant(F.normalize(rows, dim=-1))))
        with pytest.raises(InputError, match='no square'):
            model.decode(rows[:, :15])


def test_encoder_alone_is_enough(state):
    part = {key: value for key, value in state.items() if key.startswith(('encoder.', 'pre_quant.'))}
    model = ViTVQGAN.from_state_dict(part)
    same_weights(model, part)
    assert model.codebook is None
    with pytest.raises(InputError, match='no decoder'):
        model.decode(torch.zeros(1, 4, 32))
    with pytest.raises(InputError, match='multiple of 8'):
        model(torch.zeros(1, 3, 60, 64))


@pytest.mark.parametrize('change, message', [
    ({'encoder.transformer.norm.bias': None}, 'encoder.transformer.norm.bias is missing'),
    ({'encoder.transformer.layers.0.0.fn.to_qkv.weight': None}, 'to_qkv.weight is missing'),
    ({'pre_quant.weight': None}, 'pre_quant.weight is missing'),
    ({'post_quant.weight': None}, 'post_quant.weight is missing'),
    ({'pre_quant.bias': torch.zeros(31)}, r'pre_quant.bias has shape \(31,\), expected \(32,\)'),
    ({'pre_quant.weight': torch.zeros(32)}, r'pre_quant.weight has shape \(32,\): expected 2 dimensions'),
    ({'encoder.transformer.layers.1.0.fn.to_qkv.weight': torch.zeros(300, 64)}, r'expected \(384, 64\)'),
    ({'encoder.to_patch_embedding.0.weight': torch.zeros(64, 3, 0, 0)}, 'to_patch_embedding'),
    ({'encoder.en_pos_embedding': torch.zeros(1, 63, 64)}, 'en_pos_embedding has shape'),
    ({'encoder.transformer.layers.0.0.fn.to_qkv.bias': torch.zeros(384)}, 'to_qkv.bias is unknown'),
    ({'pre_quant.bias': 'text'}, 'pre_quant.bias is missing'),
])
def test_a_state_dict_that_does_not_fit_is_named(state, change, message):
    state = {key: value for key, value in (state | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        ViTVQGAN.from_state_dict(state)
