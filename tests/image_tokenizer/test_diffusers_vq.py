"""Weights of diffusers' VQModel as a tokenizer, against what diffusers computes; where diffusers is installed."""
import json

import pytest
import safetensors.torch
import torch

from fileio.files import sha256
from helpers import call, fails, smooth_images
from image_tokenizer import diffusers_vq
from image_tokenizer.tokenizers import check_codes, decode_codes, encode_images, load_tokenizer, unit_range
from token_files.codebook import load_codebook

pytestmark = pytest.mark.usefixtures('one_thread')
SIZES = {'block_out_channels': [32, 64], 'down_block_types': ['DownEncoderBlock2D'] * 2, 'norm_num_groups': 16,
         'up_block_types': ['UpDecoderBlock2D'] * 2, 'latent_channels': 4, 'num_vq_embeddings': 30}
WEIGHTS = 'diffusion_pytorch_model.safetensors'


def make(folder, **config):
    """A folder as diffusers saves one, with random weights of a fixed seed; returns the model and the weights' file."""
    VQModel = pytest.importorskip('diffusers').VQModel
    torch.manual_seed(0)
    model = VQModel(**SIZES, **config).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight, 0.1, 0.5)
    model.save_pretrained(folder)
    return model, folder / WEIGHTS


def pixels(count=3, size=16):
    return torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.mark.parametrize('config', [{}, {'norm_type': 'spatial'}, {'lookup_from_codebook': True}])
@torch.no_grad()
def test_codes_and_images_are_those_of_diffusers(config, tmp_path):
    model, path = make(tmp_path, **config)
    tokenizer = load_tokenizer(path)
    assert tokenizer.kind == 'VQModel of diffusers' and tokenizer.patch_size == 2
    low = 0 if 'lookup_from_codebook' in config else -1
    x = unit_range(pixels()) * (1 - low) + low
    z, _, (_, _, expected) = model.quantize(model.encode(x).latents)
    codebook = load_codebook(path)
    assert torch.equal(tokenizer.codebook, codebook)
    check_codes(tokenizer, codebook, path)
    features, codes = encode_images(tokenizer, codebook, pixels())
    assert features is None and torch.equal(codes, expected.view(3, 64)) and len(codes.unique()) > 3
    made = model.decoder(model.post_quant_conv(z), z if 'norm_type' in config else None)
    torch.testing.assert_close(decode_codes(tokenizer, codebook, codes), ((made - low) / (1 - low)).clamp(0, 1),
                               atol=1e-4, rtol=1e-4)
    fails(lambda: encode_images(tokenizer, codebook, pixels(1, 15)), '15x15 do not divide into patches of 2')
    broken = unit_range(pixels())
    broken[0, 0, 0, 0] = torch.nan
    assert (tokenizer.codes(broken)[0] == -1).any() and (tokenizer.codes(broken)[1] >= 0).all()


def test_torch_files_and_old_names(tmp_path):
    """Names of attention from before 2023, in a .bin."""
    _, path = make(tmp_path)
    expected = load_tokenizer(path)
    state = safetensors.torch.load_file(path)
    for old, new in diffusers_vq.OLD_NAMES.items():
        state = {key.replace(f'.{new}.', f'.{old}.'): value for key, value in state.items()}
    assert any('.proj_attn.' in key for key in state)
    torch.save(state, tmp_path / 'diffusion_pytorch_model.bin')
    tokenizer = load_tokenizer(tmp_path / 'diffusion_pytorch_model.bin')
    assert all(torch.equal(a, b) for a, b in zip(tokenizer.parameters(), expected.parameters()))


def test_through_the_program(tmp_path):
    import tokenize_images
    _, path = make(tmp_path / 'vq')
    smooth_images(tmp_path / 'images', per_class=2)
    call(tokenize_images, '--data-path', tmp_path / 'images', '--name', 'my', '--output-dir', tmp_path / 'tokens',
         '--image-size', 16, '--tokenizer-path', path, '--num-workers', 0, '--device', 'cpu')
    manifest = json.loads((tmp_path / 'tokens' / 'my-token.json').read_text())
    assert manifest['tokenizer'] == {'file': WEIGHTS, 'sha256': sha256(path), 'kind': 'VQModel of diffusers',
                                     'path': f'../vq/{WEIGHTS}'}
    assert torch.equal(load_codebook(tmp_path / 'tokens' / 'codebook.ckpt'), load_codebook(path))


def test_what_is_wrong(tmp_path):
    _, path = make(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    for change, pattern in (({'_class_name': 'AutoencoderKL'}, 'config.json: is not of a VQModel'),
                            ({'block_out_channels': [32, 32]}, 'not the VQModel of its config.json: encoder'),
                            ({'norm_num_groups': 7}, 'config.json: no VQModel can be made of it'),
                            ({'num_vq_embeddings': 31}, r'quantize.embedding.weight has shape \(30, 4\)')):
        (tmp_path / 'config.json').write_text(json.dumps(config | change))
        fails(lambda: load_tokenizer(path), pattern)
    (tmp_path / 'config.json').unlink()
    fails(lambda: load_tokenizer(path), 'config.json: No such file')


def test_without_diffusers(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'diffusers', None)
    torch.save({'encoder.down_blocks.0.resnets.0.norm1.weight': torch.zeros(3), diffusers_vq.TABLE: torch.zeros(3, 2)},
               tmp_path / 'a.bin')
    fails(lambda: load_tokenizer(tmp_path / 'a.bin'), 'a.bin: weights of a VQModel .* requirements-diffusers.txt')
