"""Exporting from the command line."""
import pytest
import torch

from helpers import call, fails
from image_tokenizer.vitvqgan import ViTVQGAN
from inference.classifier import load_classifier
from scripts import export_classifier

pytestmark = pytest.mark.usefixtures('one_thread')


def test_the_file_of_a_run(small_runs, tmp_path, capsys):
    call(export_classifier, small_runs['main_seit.py'], '--output', tmp_path / 'x.pt2', '--use-ema')
    *_, line, preparation = capsys.readouterr().out.splitlines()
    assert line.startswith(f'{tmp_path}/x.pt2: ')
    assert 'pixels (batch, 3, 40, 40) uint8 -> probabilities (batch, 3)' in line
    assert preparation == 'pixels of an image: RGB, both sides resized to 40 pixels (bicubic)'
    pixels = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8)
    with torch.no_grad():
        wanted = load_classifier(small_runs['main_seit.py'], use_ema=True)(pixels)
        torch.testing.assert_close(torch.export.load(tmp_path / 'x.pt2').module()(pixels), wanted)


def test_a_pickled_tokenizer_of_strange_code(small_runs, tmp_path, state, foreign):
    """What its code computes is in the file, which needs the code no more."""
    folder, make = foreign
    path = make(lambda code: code.OtherNames(ViTVQGAN.from_state_dict(state)), tmp_path / 'tokenizer.ckpt')
    checkpoint = torch.load(small_runs['main_seit.py'] / 'best_checkpoint.pth', weights_only=True)
    torch.save({'model': checkpoint['model'], 'args': checkpoint['args']}, tmp_path / 'x.pth')
    words = ['--codebook-path', small_runs['tokens'] / 'codebook.ckpt', '--tokenizer-path', path,
             '--tokenizer-input-size', 64]
    fails(lambda: call(export_classifier, tmp_path / 'x.pth', '--output', tmp_path / 'x.pt2', *words),
          'tokenizer.ckpt: runs code when loaded')
    assert not (tmp_path / 'x.pt2').exists()
    call(export_classifier, tmp_path / 'x.pth', '--output', tmp_path / 'x.pt2', *words, '--tokenizer-code-path', folder)
    assert torch.export.load(tmp_path / 'x.pt2').module()(torch.zeros(4, 3, 64, 64).byte()).shape == (4, 3)


@pytest.mark.parametrize('words, message', [
    (['--output', 'x.pth'], 'x.pth: give a name that ends in .pt2 or .onnx'), ([], 'required: --output'),
    (['--output', '/proc/x.pt2'], '/proc/x.pt2: cannot be written')])
def test_mistakes_are_one_line(small_runs, words, message):
    fails(lambda: call(export_classifier, small_runs['main_seit.py'], *words), message)


def test_masked_pre_training_has_no_classes(small_runs, tmp_path):
    fails(lambda: call(export_classifier, small_runs['main_mtm_pretrain.py'], '--output', tmp_path / 'x.pt2'),
          'fine-tune it with main_mtm_finetune.py')
