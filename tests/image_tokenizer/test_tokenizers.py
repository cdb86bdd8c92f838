"""Images to codes and back; every kind of tokenizer file, and the promise that none runs code unasked."""
import sys
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from token_files.codebook import load_codebook, quantize
from conftest import ROOT
from helpers import GOLDEN_SIZE, Bomb, encoded, noise, published_transform, run_python, same_weights
from image_data.decoding import decode_image
from image_tokenizer.pickled import ModuleTokenizer
from image_tokenizer.tokenizers import (PatchTokenizer, decode_codes, encode_images, lift_rows, load_tokenizer,
                                        unit_range)
from image_tokenizer.vitvqgan import Size, ViTVQGAN
from utils import InputError


# ---------------------------------------------------------------- images to codes and back

def patch_tokenizer(patch=4, dim=8):
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(3 * patch ** 2, dim, generator=generator))
    return PatchTokenizer(torch.full((3 * patch ** 2,), 0.5), basis, torch.tensor(2.)).eval()


def test_codes_are_those_of_the_published_preparation():
    tokenizer = patch_tokenizer()
    codebook = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    images = [noise(seed) for seed in range(5)]
    pixels = torch.stack([decode_image(encoded(image), 16) for image in images])
    features, codes = encode_images(tokenizer, codebook, pixels)
    expected = tokenizer(torch.stack([published_transform(16)(image) for image in images]))
    assert torch.equal(features, expected) and features.dtype == torch.float32
    assert torch.equal(codes, quantize(expected, codebook)) and codes.shape == (5, 16) and codes.dtype == torch.int64
    half, _ = encode_images(tokenizer, codebook, pixels, 'bf16')
    assert half.dtype == torch.float32 and not torch.equal(half, features)
    torch.testing.assert_close(half, features, atol=0.05, rtol=0.05)


def test_golden_codes(golden):
    arrays = golden('quantize.npz')
    codes = quantize(torch.from_numpy(arrays['features']), torch.from_numpy(arrays['codebook']))
    assert np.array_equal(codes.view(2, 32, 32).numpy(), arrays['indices'])


def test_all_pixels_are_scaled_as_torchvision_does():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert torch.equal(unit_range(torch.from_numpy(every).permute(2, 0, 1)),
                       published_transform(16)(Image.fromarray(every)))


def test_codes_become_images_where_there_is_a_decoder():
    tokenizer = patch_tokenizer()
    codebook = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    codes = torch.randint(40, (19, 16), generator=torch.Generator().manual_seed(2))  # more than are decoded at once
    images = decode_codes(tokenizer, codebook, codes)
    assert images.shape == (19, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(images, tokenizer.decode(codebook[codes]).clamp(0, 1))
    size = Size(16, 1, 1, 32)
    assert decode_codes(ViTVQGAN(size, None, 40, 8, 16, 4), codebook, codes) is None
    assert decode_codes(ViTVQGAN(size, size, 40, 8, 16, 4), codebook, codes).shape == (19, 3, 16, 16)
    assert decode_codes(ModuleTokenizer(tokenizer, 4, 8), codebook, codes) is None


class Brightness(torch.nn.Module):
    """A tokenizer of one's own that gives codes: a patch's brightness, of images in [-2, 2]."""
    patch_size = 4
    embed_dim = 1
    input_range = (-2., 2.)
    codebook = torch.linspace(-2, 2, 5)[:, None]

    def codes(self, images):
        return (torch.nn.functional.avg_pool2d(images.mean(1), 4).flatten(1) + 2).round().long()

    def decode(self, rows):
        side = int(rows.shape[1] ** 0.5)
        return rows.view(-1, 1, side, side).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


def test_a_tokenizer_of_ones_own_may_give_codes():
    tokenizer = Brightness()
    values = torch.tensor([[0, 64, 128, 255]], dtype=torch.uint8).view(1, 1, 2, 2)
    pixels = values.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    features, codes = encode_images(tokenizer, tokenizer.codebook, pixels)
    assert features is None and codes.tolist() == [[0, 1, 2, 4]]
    made = decode_codes(tokenizer, tokenizer.codebook, codes)
    assert made[0, 0, ::4, ::4].tolist() == [[0, 0.25], [0.5, 1]]


def test_images_that_patches_do_not_divide():
    with pytest.raises(InputError, match='30x32 do not divide into patches of 4'):
        patch_tokenizer()(torch.zeros(1, 3, 30, 32))


# ---------------------------------------------------------------- files that run no code

def test_patch_tokenizer_files(tmp_path):
    state = {'mean': torch.zeros(48), 'basis': torch.eye(48)[:, :8].contiguous(), 'scale': torch.tensor(2.)}
    torch.save(state, tmp_path / 'a.pt')
    safetensors.torch.save_file(state, tmp_path / 'a.safetensors')
    for name in ('a.pt', 'a.safetensors'):
        tokenizer = load_tokenizer(tmp_path / name)
        assert isinstance(tokenizer, PatchTokenizer) and (tokenizer.patch_size, tokenizer.embed_dim) == (4, 8)
    torch.save(state | {'mean': torch.zeros(47)}, tmp_path / 'b.pt')
    with pytest.raises(InputError, match=r'b.pt: not a patch tokenizer.*\(47,\)'):
        load_tokenizer(tmp_path / 'b.pt')
    newer = state | {'rows': torch.randn(5, 9)}
    torch.save(newer, tmp_path / 'c.pt')
    tokenizer = load_tokenizer(tmp_path / 'c.pt')
    assert tokenizer.embed_dim == 9 and tokenizer(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 9)
    for wrong, match in (({'rows': torch.ones(5, 8)}, r'\(5, 8\).*d \+ 1'), ({'rows': torch.ones(0, 9)}, 'd \\+ 1'),
                         ({'rows': 3.}, 'not all float'), ({'rotation': torch.eye(8)}, 'with rotation, which this')):
        torch.save(newer | wrong, tmp_path / 'd.pt')
        with pytest.raises(InputError, match=f'd.pt: .*{match}'):
            load_tokenizer(tmp_path / 'd.pt')


def test_files_made_before_rows_were_in_them_give_their_codes():
    """A tokenizer, a codebook and codes of 20 images that fit_patch_tokenizer.py of 2026-11-24 made."""
    folder = ROOT / 'tests' / 'golden' / 'patch_tokenizer'
    tokenizer = load_tokenizer(folder / 'tokenizer.pt')
    codes = np.load(folder / 'codes.npz')
    pixels = torch.from_numpy(codes['pixels'])[:, None].expand(-1, 3, -1, -1)  # gray
    _, ours = encode_images(tokenizer, load_codebook(folder / 'codebook.ckpt'), pixels)
    assert tokenizer.codebook is None and tokenizer.embed_dim == 12
    assert np.array_equal(ours.numpy(), codes['codes'])


def test_nearest_directions_are_the_nearest_rows():
    """Near the mean patch and far from it, for rows of very different length, one of them of length 0."""
    generator = torch.Generator().manual_seed(0)
    components = torch.randn(2000, 6, generator=generator) * torch.tensor([5., 3, 1, 0.5, 0.2, 0.1])
    rows = components[torch.randperm(2000, generator=generator)[:50]]
    rows[0] = 0
    codebook = lift_rows(rows)
    tokenizer = PatchTokenizer(torch.full((12,), 0.5), torch.eye(12)[:, :6], torch.tensor(3.), codebook)
    images = torch.zeros(2000, 12)
    images[:, :6] = components / 3
    codes = quantize(tokenizer((images + 0.5).view(2000, 3, 2, 2))[:, 0], codebook)
    assert (codes == torch.cdist(components.double(), rows.double()).argmin(1)).float().mean() > 0.999
    assert torch.equal(quantize(codebook, codebook), torch.arange(50))
    torch.testing.assert_close((tokenizer.decode(codebook[:, None]).flatten(1)[:, :6] - 0.5) * 3, rows)


def test_plain_and_safetensors(state, tmp_path):
    torch.save(state, tmp_path / 'a.pt')
    safetensors.torch.save_file(state, tmp_path / 'a.safetensors')
    same_weights(load_tokenizer(tmp_path / 'a.pt'), state)
    same_weights(load_tokenizer(str(tmp_path / 'a.safetensors')), state)


@pytest.mark.parametrize('prefix', ['', 'module.', 'stage1.model.'])
def test_lightning(state, tmp_path, prefix):
    lightning = {'epoch': 3, 'pytorch-lightning_version': '1.5', 'callbacks': {}, 'optimizer_states': [],
                 'state_dict': OrderedDict({prefix + key: value for key, value in state.items()})}
    lightning['state_dict']['loss.discriminator.weight'] = torch.zeros(3, 3)
    torch.save(lightning, tmp_path / 'last.ckpt')
    same_weights(load_tokenizer(tmp_path / 'last.ckpt'), state)


def test_half_precision_file_becomes_float32(state, tmp_path):
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / 'half.pt')
    assert load_tokenizer(tmp_path / 'half.pt').pre_quant.weight.dtype == torch.float32


def test_two_encoders_are_refused(state, tmp_path):
    torch.save({f'{part}.{key}': value for part in ('raw', 'ema') for key, value in state.items()}, tmp_path / 'two.pt')
    with pytest.raises(InputError, match='several'):
        load_tokenizer(tmp_path / 'two.pt')


def test_bad_files(state, tmp_path):
    torch.save(state, tmp_path / 'whole.pt')
    safetensors.torch.save_file(state, tmp_path / 'whole.safetensors')
    for ending in ('.pt', '.safetensors'):
        whole = (tmp_path / f'whole{ending}').read_bytes()
        for length in (0, 5, 1000, len(whole) // 2, len(whole) - 1):
            (tmp_path / f'cut{ending}').write_bytes(whole[:length])
            with pytest.raises(InputError, match='cut'):
                load_tokenizer(tmp_path / f'cut{ending}')
        (tmp_path / f'text{ending}').write_text('this is no tokenizer\n')
        with pytest.raises(InputError, match='text'):
            load_tokenizer(tmp_path / f'text{ending}')
        with pytest.raises(InputError, match='missing'):
            load_tokenizer(tmp_path / f'missing{ending}')
        (tmp_path / f'folder{ending}').mkdir()
        with pytest.raises(InputError, match='folder'):
            load_tokenizer(tmp_path / f'folder{ending}')


@pytest.mark.parametrize('value, found', [
    ({'head.weight': torch.zeros(2, 2)}, 'found: head.weight'), ({'state_dict': {'x': torch.zeros(1)}}, 'found: x'),
    (torch.zeros(391, 32), 'found: Tensor'), ([1, 2], 'found: list'), ({}, 'found: nothing'),
    ({1: 2}, 'found: 1'), ({'encoder.layer.0.weight': torch.zeros(2)}, 'found: encoder.layer.0.weight'),
])
def test_unknown_kinds_are_described(tmp_path, value, found):
    torch.save(value, tmp_path / 'what.ckpt')
    with pytest.raises(InputError, match='no known kind.*' + found):
        load_tokenizer(tmp_path / 'what.ckpt')


# ---------------------------------------------------------------- files that do

@pytest.mark.parametrize('wrap', [lambda bomb: bomb, lambda bomb: {'state_dict': bomb}, lambda bomb: [bomb]])
def test_no_code_runs_unasked(tmp_path, wrap):
    marker = tmp_path / 'it-ran'
    torch.save(wrap(Bomb(marker)), tmp_path / 'bomb.ckpt')
    with pytest.raises(InputError, match='runs code when loaded.*scripts/convert_tokenizer.py.*--tokenizer-code-path'):
        load_tokenizer(tmp_path / 'bomb.ckpt')
    assert not marker.exists()
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / 'bomb.ckpt', code_path=tmp_path)
    assert marker.exists()  # so the file was a bomb


def test_blocked_call_is_refused(tmp_path):
    (tmp_path / 'os.ckpt').write_bytes(b'\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.')
    with pytest.raises(InputError, match='posix.system'):
        load_tokenizer(tmp_path / 'os.ckpt')


def test_pickled_module_needs_the_flag(state, tmp_path, foreign):
    folder, make = foreign
    path = make(lambda code: code.OtherNames(ViTVQGAN.from_state_dict(state)), tmp_path / 'tokenizer.ckpt')
    with pytest.raises(InputError, match='holds published_code.OtherNames.*convert_tokenizer.py.*--tokenizer-code'):
        load_tokenizer(path)
    with pytest.raises(InputError, match='cannot be imported from.*No module named .published_code'):
        load_tokenizer(path, code_path=tmp_path)
    with pytest.raises(InputError, match='no such folder'):
        load_tokenizer(path, code_path=tmp_path / 'nowhere')
    assert 'published_code' not in sys.modules and str(folder) not in sys.path


def test_module_saved_by_an_old_torch(tmp_path, foreign):
    """Only running its code can read it."""
    folder, make = foreign
    path = make(lambda code: code.Convolution(), tmp_path / 'old.ckpt', _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match='runs code when loaded.*published_code.Convolution'):
        load_tokenizer(path)
    assert isinstance(load_tokenizer(path, folder), ModuleTokenizer)


def test_pickled_module_with_our_names_becomes_ours(state, tmp_path, foreign):
    folder, make = foreign

    def save(kind):
        def fill(code):
            model = getattr(code, kind)(GOLDEN_SIZE, GOLDEN_SIZE, codebook_size=50, image_size=64)
            model.load_state_dict(state)
            return model
        return make(fill, tmp_path / f'{kind}.ckpt')

    before = list(sys.path)
    for kind in ('SameNames', 'Autoencoder'):
        tokenizer = load_tokenizer(save(kind), folder)
        assert type(tokenizer) is ViTVQGAN
        same_weights(tokenizer, state)
    scaled = load_tokenizer(save('Scaled'), folder)
    assert isinstance(scaled, ModuleTokenizer) and (scaled.patch_size, scaled.embed_dim) == (8, 32)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(scaled(images), 2 * tokenizer(images))
    assert sys.path == before


def test_pickled_module_of_another_make_is_used_as_found(tmp_path, foreign):
    folder, make = foreign
    path = make(lambda code: code.Convolution(), tmp_path / 'conv.ckpt')
    tokenizer = load_tokenizer(path, folder)
    assert isinstance(tokenizer, ModuleTokenizer) and (tokenizer.patch_size, tokenizer.embed_dim) == (8, 32)
    assert tokenizer(torch.rand(2, 3, 256, 256)).shape == (2, 1024, 32)
    path = make(lambda code: code.Classifier(256, 5), tmp_path / 'wrong.ckpt')
    with pytest.raises(InputError, match=r'wrong.ckpt: the module gives shape \(1, 3, 256, 5\)'):
        load_tokenizer(path, folder)


VQ = """
import torch
{imports}
class VQ(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 32, 8, 8)
    def forward(self, x):
        {late}
        return scale(self.conv(x)).flatten(2).transpose(1, 2)
"""
SCALE = 'def scale(x):\n    return 3 * x\n'
# folders of code whose modules have names of ours: {file: text}; the class is in the first
FOREIGN_CODE = {
    'module': {'vq.py': VQ.format(imports='from utils import scale', late=''), 'utils.py': SCALE},
    'module that this process has not imported': {
        'vq.py': VQ.format(imports='import tokenize_images\nscale = tokenize_images.scale', late=''),
        'tokenize_images.py': SCALE},
    'its own class': {'flags.py': VQ.format(imports=SCALE, late='')},
    'folder without __init__': {'vq.py': VQ.format(imports='from training.layers import scale', late=''),
                                'training/layers.py': SCALE},
    'package': {'image_tokenizer/vq.py': VQ.format(imports='from .pickled import scale', late=''),
                'image_tokenizer/__init__.py': 'from engine import scale', 'image_tokenizer/pickled.py':
                'from . import scale', 'engine.py': SCALE},
    'at each call': {'vq.py': VQ.format(imports='', late='from utils import scale'), 'utils.py': SCALE},
    'folder that the code adds': {'vq.py': VQ.format(
        imports='import os, sys\nsys.path.append(os.path.join(os.path.dirname(__file__), "lib"))',
        late='from utils.ops import scale'), 'lib/utils/ops.py': SCALE},
}
SAVE = """
import os, sys, torch
sys.path.remove(os.environ['PYTHONPATH'])
first = set(sys.modules)
for folder, module in zip(sys.argv[1::2], sys.argv[2::2]):
    sys.path.insert(0, folder)
    __import__(module)
    torch.save(sys.modules[module].VQ(), folder + '/vq.pt')
    sys.path.remove(folder)
    for name in set(sys.modules) - first:
        del sys.modules[name]
"""


@pytest.fixture(scope='module')
def foreign_code(tmp_path_factory):
    """A folder of code and vq.pt for each of FOREIGN_CODE."""
    folders = {}
    words = []
    for kind, files in FOREIGN_CODE.items():
        folders[kind] = tmp_path_factory.mktemp('code')
        for name, text in files.items():
            (folders[kind] / name).parent.mkdir(parents=True, exist_ok=True)
            (folders[kind] / name).write_text(text)
        words += [folders[kind], next(iter(files)).removesuffix('.py').replace('/', '.')]
    done = run_python(SAVE, *words, cwd=folders['module'].parent)
    assert done.returncode == 0, done.stderr
    return folders


def modules_of_ours():
    ours = 'utils', 'flags', 'training', 'engine', 'image_tokenizer', 'tokenize_images'
    return {name: module for name, module in sys.modules.items() if name.partition('.')[0] in ours}


@pytest.mark.slow
@pytest.mark.parametrize('kind', FOREIGN_CODE)
def test_code_gets_its_own_modules_of_our_names(foreign_code, kind):
    before = list(sys.path), list(sys.meta_path), modules_of_ours()
    folder = foreign_code[kind]
    tokenizer = load_tokenizer(folder / 'vq.pt', folder)
    assert isinstance(tokenizer, ModuleTokenizer) and tokenizer.embed_dim == 32
    for module in tokenizer, torch.compile(tokenizer, backend='eager'):
        images = torch.rand(2, 3, 16, 16)
        expected = 3 * tokenizer.module.conv(images).flatten(2).transpose(1, 2)
        assert torch.equal(module(images), expected)
    # nothing of it is left to us but modules of names that we do not have
    sys.modules.pop('vq', None)
    assert (sys.path, sys.meta_path, modules_of_ours()) == before
    assert all(module.__spec__.origin == module.__file__ for module in before[2].values())


def test_the_flag_runs_no_code_for_a_plain_file(state, tmp_path, monkeypatch):
    torch.save(state, tmp_path / 'a.pt')
    monkeypatch.setattr('image_tokenizer.tokenizers.load_running_code', None)
    same_weights(load_tokenizer(tmp_path / 'a.pt', code_path=tmp_path / 'nowhere'), state)


def test_damaged_file_with_the_flag(tmp_path, foreign):
    folder, make = foreign
    path = make(lambda code: code.Convolution(), tmp_path / 'conv.ckpt')
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match='conv.ckpt'):
        load_tokenizer(path, folder)


def test_a_numpy_value_is_not_called_code(state, tmp_path):
    torch.save({'state_dict': state, 'best': np.float64(0.5)}, tmp_path / 'a.ckpt')
    with pytest.raises(InputError, match='a.ckpt: carries a numpy value .*scripts/convert_tokenizer.py'):
        load_tokenizer(tmp_path / 'a.ckpt')


@pytest.mark.parametrize('metadata, said', [
    ({'format': 'seit-tokenizer', 'version': '2'}, 'version .2. of seit-tokenizer, and 1 is read here: update'),
    ({'format': 'seit-tokenizer'}, 'a damaged file'), ({'format': 'seit-tokenizer', 'version': 'x'}, 'a damaged file'),
    ({'format': 'seit-tokenizer', 'version': '1'}, None), ({'format': 'pt', 'version': '9'}, None), (None, None)])
def test_a_file_of_a_newer_version_is_refused(state, metadata, said, tmp_path):
    path = tmp_path / 'tokenizer.safetensors'
    safetensors.torch.save_file(state, path, metadata)
    if said is None:
        assert load_tokenizer(path).codebook.shape == (50, 32)
        return
    with pytest.raises(InputError, match=said) as caught:
        load_tokenizer(path)
    assert '\n' not in str(caught.value)
