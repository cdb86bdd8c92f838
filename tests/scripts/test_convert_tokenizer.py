"""Converting published tokenizer files: all that is needed is found, nothing is guessed, and no code runs."""
import subprocess
import sys

import pytest
import torch

from scripts import convert_tokenizer
from conftest import ROOT
from helpers import GOLDEN_SIZE, Bomb, call, fails, same_weights
from image_tokenizer.pickled import load_running_code
from image_tokenizer.tokenizers import load_tokenizer
from image_tokenizer.vitvqgan import ViTVQGAN
from small_vqgans import small_state
from utils import InputError


@pytest.mark.parametrize('wrap', [lambda bomb: bomb, lambda bomb: {'state_dict': bomb}, lambda bomb: [bomb]])
def test_no_code_runs(tmp_path, wrap):
    marker = tmp_path / 'it-ran'
    torch.save(wrap(Bomb(marker)), tmp_path / 'bomb.ckpt')
    with pytest.raises(InputError):
        convert_tokenizer.convert(tmp_path / 'bomb.ckpt', convert_tokenizer.read_inert(tmp_path / 'bomb.ckpt'))
    assert not marker.exists()


def test_blocked_call_is_refused(tmp_path):
    (tmp_path / 'os.ckpt').write_bytes(b'\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.')
    with pytest.raises(InputError, match='posix.system'):
        convert_tokenizer.read_inert(tmp_path / 'os.ckpt')


def test_module_saved_by_an_old_torch(tmp_path, foreign):
    """Only running its code can read it."""
    folder, make = foreign
    path = make(lambda code: code.Convolution(), tmp_path / 'old.ckpt', _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match='a module in an old format.*--tokenizer-code-path'):
        convert_tokenizer.read_inert(path)


def test_other_features_are_not_converted(state, tmp_path, foreign):
    folder, make = foreign

    def fill(code):
        model = code.Scaled(GOLDEN_SIZE, GOLDEN_SIZE, codebook_size=50, image_size=64)
        model.load_state_dict(state)
        return model
    path = make(fill, tmp_path / 'Scaled.ckpt')
    with pytest.raises(InputError, match='other features'):
        load_running_code(path, folder, convert_tokenizer.convert)


@pytest.mark.slow
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
    same_weights(convert_tokenizer.convert(path, convert_tokenizer.read_inert(path))[0], state)
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


def test_an_output_that_cannot_be_written_is_refused_before_the_work(state, tmp_path, monkeypatch):
    torch.save(state, tmp_path / 'a.pt')
    monkeypatch.setattr(convert_tokenizer, 'read_inert', None)
    for output in ('a.pt/b.safetensors', 'n' * 250, '.'):
        fails(lambda: call(convert_tokenizer, '--input', tmp_path / 'a.pt', '--output', tmp_path / output),
              'cannot be written')
    assert [path.name for path in tmp_path.iterdir()] == ['a.pt']


class ModelCheckpoint:
    """Stands for Lightning's callback, which checkpoints of before 2022 name."""


@pytest.mark.parametrize('family', ['taming', 'llamagen', 'ibq', 'maskgit'])
@pytest.mark.parametrize('ending', ['pt', 'safetensors'])
def test_a_vqgan_keeps_its_names_and_so_its_family(family, ending, tmp_path):
    state = small_state(family)
    names = {f'model_ema.{key.replace(".", "")}': value + 1 for key, value in state.items()} if family == 'ibq' else {}
    torch.save({'state_dict': state | names | {'loss.x': torch.zeros(2)}, 'callbacks': {ModelCheckpoint: {'best': 1.}}},
               tmp_path / 'last.ckpt')
    with pytest.raises(InputError, match='runs code when loaded.*ModelCheckpoint.*scripts/convert_tokenizer.py'):
        load_tokenizer(tmp_path / 'last.ckpt')
    call(convert_tokenizer, '--input', tmp_path / 'last.ckpt', '--output', tmp_path / f'plain.{ending}')
    torch.save(state | names, tmp_path / 'expected.pt')
    plain, expected = load_tokenizer(tmp_path / f'plain.{ending}'), load_tokenizer(tmp_path / 'expected.pt')
    assert plain.kind == expected.kind
    same_weights(plain, expected.state_dict())
