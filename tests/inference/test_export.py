"""Exported classifiers: reloaded, for other batches, with their names; and what cannot be exported."""
import json
import sys

import pytest
import torch
from PIL import Image

from helpers import fails
from image_tokenizer.pickled import ModuleTokenizer
from image_tokenizer.vitvqgan import Size, ViTVQGAN
from inference import export
from inference.classifier import Classifier, load_classifier
from inference.export import export_classifier
from inference.models import TrainedModel
from models_seit import create_model
from training.checkpoints import SEIT

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = {'depth': 1, 'embed_dim': 32, 'num_heads': 2}


def with_tokenizer(tokenizer, size=32):
    """A classifier of three classes on 8x8 codes of a tokenizer."""
    torch.manual_seed(0)
    model = create_model('deit_tiny_token_32', SMALL, 3, 8).eval()
    return Classifier(TrainedModel(model, SEIT, 'x', 8, None, 3, None), ['x', 'y', 'z'], tokenizer,
                      torch.randn(20, 32), size).eval()


def vitvqgan():
    torch.manual_seed(1)
    return ViTVQGAN(Size(64, 1, 1, 64), Size(64, 1, 1, 64), 20, embed_dim=32, image_size=32, patch_size=4).eval()


def reloaded(path):
    """What runs an exported file, and what it says beside the model: classes and preparation."""
    if path.suffix == '.pt2':
        files = dict.fromkeys(export.PT2_FILES.values(), '')
        module = torch.export.load(path, extra_files=files).module()
        return module, *files.values()
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    facts = session.get_modelmeta().custom_metadata_map
    return (lambda pixels: torch.from_numpy(session.run(['probabilities'], {'pixels': pixels.numpy()})[0]),
            facts[export.CLASSES], facts[export.PREPARATION])


def check(classify, path, images=()):
    assert export_classifier(classify, path) < 1e-5
    run, classes, preparation = reloaded(path)
    assert json.loads(classes) == classify.classes and preparation == classify.preparation
    pixels = [classify.read(image) for image in images] or list(
        torch.randint(256, (5, 3, classify.size, classify.size), dtype=torch.uint8))
    for batch in (1, 5):
        x = torch.stack(pixels[:batch])
        with torch.no_grad():
            torch.testing.assert_close(run(x), classify(x), atol=1e-5, rtol=0)
    assert not list(path.parent.glob('.*.tmp'))


@pytest.mark.parametrize('program, kind', [
    ('main_seit.py', 'pt2'), ('main_mtm_finetune.py', 'pt2'), ('main_pixels.py', 'pt2'), ('task', 'pt2'),
    ('main_pixels.py', 'onnx'), *(pytest.param(program, 'onnx', marks=pytest.mark.slow)
                                  for program in ('main_seit.py', 'main_mtm_finetune.py'))])
def test_files_give_what_the_module_gives(small_runs, tmp_path, program, kind):
    if kind == 'onnx':
        pytest.importorskip('onnxscript')
    run = small_runs['tasks'] / 'task-0' if program == 'task' else small_runs[program]
    images = [Image.open(path) for path in sorted(small_runs['images'].rglob('*.png'))]
    check(load_classifier(run), tmp_path / f'x.{kind}', images)


@pytest.mark.parametrize('kind, size', [('pt2', 32), pytest.param('onnx', 40, marks=pytest.mark.slow)])
def test_a_vitvqgan_is_exported_without_its_decoder(tmp_path, kind, size):
    """At the size of its position table, and at another."""
    if kind == 'onnx':
        pytest.importorskip('onnxscript')
    classify = with_tokenizer(vitvqgan(), size)
    check(classify, tmp_path / f'x.{kind}')
    assert classify.tokenizer.decoder is not None  # the module itself keeps it
    assert b'decoder' not in (tmp_path / f'x.{kind}').read_bytes()


class Strange(torch.nn.Module):
    """A tokenizer whose features depend on values, as no graph can say."""

    def forward(self, images):
        features = images.reshape(len(images), 64, 48)[..., :32]
        return features * 2 if images.mean().item() > 0.5 else features


@pytest.mark.parametrize('kind', ['pt2', 'onnx'])
def test_what_cannot_be_exported_is_one_line(tmp_path, kind):
    if kind == 'onnx':
        pytest.importorskip('onnxscript')
    classify = with_tokenizer(ModuleTokenizer(Strange(), 4, 32))
    fails(lambda: export_classifier(classify, tmp_path / f'x.{kind}'), f'x.{kind}: the model cannot be exported ')
    assert not list(tmp_path.iterdir())


def test_a_file_that_gives_something_else_is_none(small_runs, tmp_path, monkeypatch):
    write = export._write_pt2

    def wrong(classifier, path):
        run = write(classifier, path)
        return lambda pixels: run(pixels).flip(1)
    monkeypatch.setattr(export, '_write_pt2', wrong)
    fails(lambda: export_classifier(load_classifier(small_runs['main_seit.py']), tmp_path / 'x.pt2'),
          'x.pt2: the exported model gives other probabilities than the module')
    assert not list(tmp_path.iterdir())


def test_names_and_packages(tmp_path, monkeypatch):
    fails(lambda: export.check_kind('x.pth'), 'x.pth: give a name that ends in .pt2 or .onnx')
    assert export.check_kind('x.PT2') == '.pt2'
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            fails(lambda: export.check_kind('x.onnx'), f'{name}.*pip install -r requirements-export.txt')
