"""ViT-VQGAN against the published one, every kind of tokenizer file, and the promise that none runs code unasked."""
import subprocess
import sys
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import convert_tokenizer
from image_tokenizer import ModuleTokenizer, PatchTokenizer, load_tokenizer, quantize
from utils import InputError
from vitvqgan import SIZES, Size, ViTVQGAN, position_table

ROOT = Path(__file__).resolve().parent.parent
GOLDEN_SIZE = Size(64, 2, 2, 128)
CODE = '''
import enum
import functools
from pathlib import Path

import numpy as np
from torch import nn
from vitvqgan import ViTVQGAN

class SameNames(ViTVQGAN):
    """Our names and our features."""

class Scaled(ViTVQGAN):
    """Our names, other features."""
    def forward(self, images):
        return super().forward(images) * 2

class Autoencoder(ViTVQGAN):
    """Our names; gives images and a loss."""
    def forward(self, images):
        return self.decoder(self.post_quant(super().forward(images))), 0.

class OtherNames(nn.Module):
    """As SeiT's may be: encoder and projection under names we do not know."""
    def __init__(self, model):
        super().__init__()
        self.vit, self.proj, self.codes = model.encoder, model.pre_quant, model.quantizer['embedding']
        self.unrelated = nn.Linear(7, 5)
    def forward(self, images):
        return self.proj(self.vit(images))

class Convolution(nn.Module):
    """No ViT-VQGAN at all, but the right output."""
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 8, stride=8)
    def forward(self, images):
        import late_import
        return self.conv(images).flatten(2).transpose(1, 2)

class Classifier(nn.Linear):
    """The wrong kind."""

class Callback:
    """What a Lightning file may carry along."""
    def __init__(self):
        self.best, self.kind, self.where = np.arange(3.), Kind.LAST, Path('x')
        self.settings = SettingsDict(a=1, b=SettingsDict(c=functools.partial(max, 1)))

class SettingsDict(dict):
    """Unpickled item by item, as Lightning's hyper-parameters are."""

class Kind(enum.Enum):
    LAST = 1
'''


def golden_state(shapes, seed=0):
    """Weights that are a function of their names: the rule of the golden files."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith('_pos_embedding'):
            continue
        rng = np.random.default_rng(zlib.crc32(name.encode()) + seed)
        values = 0.05 * rng.standard_normal(shape).astype(np.float32)
        state[name] = torch.from_numpy((values + ('norm' in name and name.endswith('weight'))).astype(np.float32))
    return state


@pytest.fixture(scope='session')
def shapes(golden):
    return golden('vitvqgan_shapes.json')


@pytest.fixture(scope='session')
def vectors(golden):
    return {key: torch.from_numpy(np.asarray(value)) for key, value in golden('vitvqgan.npz').items()}


@pytest.fixture
def state(shapes):
    """A whole checkpoint: the golden weights, position tables and a codebook of 50 rows."""
    codebook = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    tables = {name: position_table(8, 8, 64) for name in shapes['golden_shapes'] if name.endswith('_pos_embedding')}
    return golden_state(shapes['golden_shapes']) | tables | {'quantizer.embedding.weight': codebook}


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A folder of foreign code, with `make(use, path)`: save use(its module) so that only the folder can load it."""
    folder = tmp_path / 'foreign'
    folder.mkdir()
    (folder / 'published_code.py').write_text(CODE)
    (folder / 'late_import.py').write_text('')

    def forget():
        for name in ('published_code', 'late_import'):
            sys.modules.pop(name, None)

    def make(use, path, **save_options):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(folder))
            import published_code
            torch.save(use(published_code), path, **save_options)
        forget()
        return path

    yield folder, make
    forget()


def same_weights(model, state):
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in state)


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


def test_golden_codes(golden):
    arrays = golden('quantize.npz')
    codes = quantize(torch.from_numpy(arrays['features']), torch.from_numpy(arrays['codebook']))
    assert np.array_equal(codes.view(2, 32, 32).numpy(), arrays['indices'])


def test_names_and_shapes(shapes):
    assert GOLDEN_SIZE == Size(*(shapes['golden_config'][key] for key in Size._fields))
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


def test_another_image_size_gets_its_own_position_table(state):
    model = ViTVQGAN.from_state_dict(state)
    for height, width in ((96, 96), (64, 32)):
        fresh = ViTVQGAN.from_state_dict({key: value for key, value in state.items() if 'pos_emb' not in key})
        fresh.encoder.en_pos_embedding = torch.full_like(fresh.encoder.en_pos_embedding, torch.nan)
        images = torch.rand(1, 3, height, width)
        with torch.no_grad():
            assert model(images).shape == (1, height * width // 64, 32)
            assert torch.equal(model(images), fresh(images))


def test_decode_normalises_rows(state):
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

class Bomb:
    """Pickled, it is a call that creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f'open({str(self.marker)!r}, "w").close()',)


@pytest.mark.parametrize('wrap', [lambda bomb: bomb, lambda bomb: {'state_dict': bomb}, lambda bomb: [bomb]])
def test_no_code_runs_unasked(tmp_path, wrap):
    marker = tmp_path / 'it-ran'
    torch.save(wrap(Bomb(marker)), tmp_path / 'bomb.ckpt')
    with pytest.raises(InputError, match='runs code when loaded.*scripts/convert_tokenizer.py.*--tokenizer-code-path'):
        load_tokenizer(tmp_path / 'bomb.ckpt')
    with pytest.raises(InputError):
        convert_tokenizer.convert(tmp_path / 'bomb.ckpt', convert_tokenizer.read_inert(tmp_path / 'bomb.ckpt'))
    assert not marker.exists()
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / 'bomb.ckpt', code_path=tmp_path)
    assert marker.exists()  # so the file was a bomb


def test_blocked_call_is_refused(tmp_path):
    (tmp_path / 'os.ckpt').write_bytes(b'\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.')
    for read in (load_tokenizer, convert_tokenizer.read_inert):
        with pytest.raises(InputError, match='posix.system'):
            read(tmp_path / 'os.ckpt')


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
    """Only running its code can read it: loader and converter say so, and do with the flag."""
    folder, make = foreign
    path = make(lambda code: code.Convolution(), tmp_path / 'old.ckpt', _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match='runs code when loaded.*published_code.Convolution'):
        load_tokenizer(path)
    with pytest.raises(InputError, match='a module in an old format.*--tokenizer-code-path'):
        convert_tokenizer.read_inert(path)
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
    with pytest.raises(InputError, match='other features'):
        convert_tokenizer.load_running_code(tmp_path / 'Scaled.ckpt', folder, convert_tokenizer.convert)


def test_pickled_module_of_another_make_is_used_as_found(tmp_path, foreign):
    folder, make = foreign
    path = make(lambda code: code.Convolution(), tmp_path / 'conv.ckpt')
    tokenizer = load_tokenizer(path, folder)
    assert isinstance(tokenizer, ModuleTokenizer) and (tokenizer.patch_size, tokenizer.embed_dim) == (8, 32)
    assert tokenizer(torch.rand(2, 3, 256, 256)).shape == (2, 1024, 32)
    path = make(lambda code: code.Classifier(256, 5), tmp_path / 'wrong.ckpt')
    with pytest.raises(InputError, match=r'wrong.ckpt: the module gives shape \(1, 3, 256, 5\)'):
        load_tokenizer(path, folder)


def test_the_flag_runs_no_code_for_a_plain_file(state, tmp_path, monkeypatch):
    torch.save(state, tmp_path / 'a.pt')
    monkeypatch.setattr('image_tokenizer.load_running_code', None)
    same_weights(load_tokenizer(tmp_path / 'a.pt', code_path=tmp_path / 'nowhere'), state)


def test_damaged_file_with_the_flag(tmp_path, foreign):
    folder, make = foreign
    path = make(lambda code: code.Convolution(), tmp_path / 'conv.ckpt')
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match='conv.ckpt'):
        load_tokenizer(path, folder)


# ---------------------------------------------------------------- the converter

def test_convert_pickled_module(state, tmp_path, foreign):
    """In another process, where the classes of the file do not exist."""
    folder, make = foreign
    model = ViTVQGAN.from_state_dict(state)
    path = make(lambda code: code.OtherNames(model), tmp_path / 'tokenizer.ckpt')
    command = [sys.executable, ROOT / 'scripts' / 'convert_tokenizer.py', '--input', path]
    done = subprocess.run([*command, '--output', tmp_path / 'plain.safetensors'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'from vit.' in done.stdout and 'from proj.' in done.stdout and 'unrelated.weight' in done.stdout
    converted = load_tokenizer(tmp_path / 'plain.safetensors')
    same_weights(converted, {key: value for key, value in state.items() if not key.startswith(('decoder.', 'post_q'))})
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(converted(images), model(images))
    done = subprocess.run([*command, '--output', tmp_path / 'b.pt', '--tokenizer-code-path', folder],
                          capture_output=True, text=True, env={'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0 and 'agree' in done.stdout, done.stderr
    same_weights(load_tokenizer(tmp_path / 'b.pt'), converted.state_dict())


def test_convert_lightning_with_foreign_classes(state, tmp_path, foreign):
    folder, make = foreign
    path = make(lambda code: {'callbacks': {code.Callback: {'best': code.Callback()}}, 'state_dict': state | {
        'loss.to_pixel.1.weight': torch.zeros(1)}}, tmp_path / 'last.ckpt')
    with pytest.raises(InputError, match='holds published_code.Callback.*convert_tokenizer.py'):
        load_tokenizer(path)
    same_weights(convert_tokenizer.convert(path, convert_tokenizer.read_inert(path)), state)
    same_weights(load_tokenizer(path, folder), state)


@pytest.mark.parametrize('drop, message', [
    ('pre_quant.', 'no pre_quant'), ('encoder.to_patch', 'no ViT-VQGAN encoder'),
    ('encoder.transformer.norm', 'encoder.transformer.norm.weight is missing'),
    ('post_quant', 'post_quant.* is missing')])
def test_convert_names_what_is_missing(state, tmp_path, drop, message):
    with pytest.raises(InputError, match=f'x.ckpt: .*{message}'):
        convert_tokenizer.convert('x.ckpt', {key: value for key, value in state.items() if not key.startswith(drop)})


def test_convert_refuses_to_guess(state):
    guess = {key.replace('pre_quant', 'one'): value for key, value in state.items()}
    guess |= {'two.weight': guess['one.weight'], 'two.bias': guess['one.bias']}
    with pytest.raises(InputError, match='no pre_quant.*one.weight'):
        convert_tokenizer.convert('x.ckpt', guess)
