"""A VQGAN through the programs: images to tokens, training, evaluation on images, sheets, export, TokenAdapt."""
import json

import pytest
import torch

import evaluate_on_images
import main_seit
import tokenize_images
from fileio.files import sha256
from helpers import call, fails, smooth_images
from image_tokenizer.tokenizers import load_tokenizer, unit_range
from image_tokenizer.vqgan import VQGAN
from inference.classifier import load_classifier
from inference.export import export_classifier
from scripts import build_synonyms, inspect_tokens
from seitpp.token_adapt import Geometry
from seitpp.token_adapt_training import Change, CodePairs
from small_vqgans import CODES, small_state
from token_files.codebook import load_codebook

pytestmark = pytest.mark.usefixtures('one_thread')
SIZES = ['--device', 'cpu', '--batch-size', 6, '--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1',
         'embed_dim=32', 'num_heads=2']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A folder with weights of LlamaGen's kind, images, tokens of them, and a run of one epoch."""
    folder = tmp_path_factory.mktemp('vqgan')
    torch.save({'model': small_state('llamagen', dim=32)}, folder / 'vq.pt')
    smooth_images(folder / 'images', per_class=4)
    tokens = folder / 'tokens'
    call(tokenize_images, '--data-path', folder / 'images', '--name', 'my', '--output-dir', tokens, '--image-size', 32,
         '--tokenizer-path', folder / 'vq.pt', '--num-workers', 0, '--device', 'cpu')
    call(build_synonyms, '--codebook-path', tokens / 'codebook.ckpt', '--output', tokens / 'synonyms.json')
    call(main_seit, *SIZES, '--codebook-path', tokens / 'codebook.ckpt', '--token-synonym-dict',
         tokens / 'synonyms.json', '--train-token-file', tokens / 'my-token.data.bin.gz', '--train-label-file',
         tokens / 'my-label.txt', '--val-token-file', tokens / 'my-token.data.bin.gz', '--val-label-file',
         tokens / 'my-label.txt', '--token-patch-size', 4, '--input-size', 32, '--epochs', 1, '--output-dir',
         folder / 'run')
    return folder


def test_the_manifest_names_kind_and_file(made):
    manifest = json.loads((made / 'tokens' / 'my-token.json').read_text())
    kind = manifest['tokenizer'].pop('kind')
    assert kind == 'VQGAN of LlamaGen or Janus' and 'kind' not in manifest['run']['tokenizer']
    assert manifest['tokenizer'] == {'file': 'vq.pt', 'sha256': sha256(made / 'vq.pt'), 'path': '../vq.pt'}
    codebook = load_codebook(made / 'tokens' / 'codebook.ckpt')
    assert codebook.shape == (CODES, 32) and torch.equal(codebook, load_tokenizer(made / 'vq.pt').codebook)


def evaluate(made, *words):
    call(evaluate_on_images, '--model-path', made / 'run' / 'checkpoint.pth', '--data-path', made / 'images',
         '--num-workers', 0, '--device', 'cpu', '--tokenizer-path', made / 'vq.pt', '--vit-input-size', 8,
         '--tokenizer-input-size', 32, *words)


def test_evaluation_on_images_is_that_on_tokens(made, tmp_path, capsys):
    evaluate(made, '--codebook-path', made / 'tokens' / 'codebook.ckpt', '--output', tmp_path / 'x.json')
    stats = json.loads((tmp_path / 'x.json').read_text())
    log = json.loads((made / 'run' / 'log.txt').read_text().splitlines()[-1])
    assert abs(stats['loss'] - log['test_loss']) < 1e-4 and stats['acc1'] == pytest.approx(log['test_acc1'])


def test_the_weights_file_serves_as_codebook(made, tmp_path):
    """Of a run on codebook.ckpt: the evaluation, the classifier, and a training that goes on."""
    evaluate(made, '--codebook-path', made / 'vq.pt', '--output', tmp_path / 'x.json')
    log = json.loads((made / 'run' / 'log.txt').read_text().splitlines()[-1])
    assert json.loads((tmp_path / 'x.json').read_text())['acc1'] == pytest.approx(log['test_acc1'])
    classify = load_classifier(made / 'run' / 'checkpoint.pth', codebook_path=made / 'vq.pt',
                               tokenizer_path=made / 'vq.pt')
    assert torch.equal(classify.codebook, load_codebook(made / 'tokens' / 'codebook.ckpt'))
    tokens = made / 'tokens'
    call(main_seit, *SIZES, '--codebook-path', made / 'vq.pt', '--token-synonym-dict', tokens / 'synonyms.json',
         '--train-token-file', tokens / 'my-token.data.bin.gz', '--train-label-file', tokens / 'my-label.txt',
         '--no-eval', '--token-patch-size', 4, '--input-size', 32, '--epochs', 2, '--resume',
         made / 'run' / 'checkpoint.pth')


def test_limited_codes_are_trained_on_and_not_evaluated(made, tmp_path):
    """--limit-codes renumbers the codes, and the tokenizer gives the old numbers."""
    call(tokenize_images, '--data-path', made / 'images', '--name', 'few', '--output-dir', tmp_path, '--image-size', 32,
         '--tokenizer-path', made / 'vq.pt', '--limit-codes', '--num-workers', 0, '--device', 'cpu')
    manifest = json.loads((tmp_path / 'few-token.json').read_text())
    rows = load_codebook(tmp_path / 'codebook.ckpt')
    assert len(rows) == manifest['codes'] == len(manifest['kept_codes']) < CODES
    assert torch.equal(rows, load_tokenizer(made / 'vq.pt').codebook[manifest['kept_codes']])
    call(build_synonyms, '--codebook-path', tmp_path / 'codebook.ckpt', '--output', tmp_path / 'synonyms.json')
    call(main_seit, *SIZES, '--codebook-path', tmp_path / 'codebook.ckpt', '--token-synonym-dict',
         tmp_path / 'synonyms.json', '--train-token-file', tmp_path / 'few-token.data.bin.gz', '--train-label-file',
         tmp_path / 'few-label.txt', '--no-eval', '--token-patch-size', 4, '--input-size', 32, '--epochs', 1,
         '--output-dir', tmp_path / 'run')
    fails(lambda: call(evaluate_on_images, '--model-path', tmp_path / 'run' / 'checkpoint.pth', '--data-path',
                       made / 'images', '--num-workers', 0, '--device', 'cpu'),
          f'codebook.ckpt: {len(rows)} codes, but the tokenizer gives the numbers of its own {CODES}')
    fails(lambda: load_classifier(tmp_path / 'run' / 'checkpoint.pth'), 'codebook.ckpt: .* the numbers of its own')


def test_a_codebook_of_fewer_rows_is_refused(made, tmp_path):
    torch.save(load_codebook(made / 'tokens' / 'codebook.ckpt')[:-1].clone(), tmp_path / 'few.ckpt')
    fails(lambda: call(tokenize_images, '--data-path', made / 'images', '--name', 'x', '--output-dir', tmp_path / 'x',
                       '--image-size', 32, '--tokenizer-path', made / 'vq.pt', '--codebook-path',
                       tmp_path / 'few.ckpt', '--num-workers', 0, '--device', 'cpu'), 'few.ckpt: 39 codes')
    assert not (tmp_path / 'x').exists()


def test_tokens_are_decoded(made, tmp_path, capsys):
    call(inspect_tokens, '--token-file', made / 'tokens' / 'my-token.data.bin.gz', '--codebook-path',
         made / 'tokens' / 'codebook.ckpt', '--tokenizer-path', made / 'vq.pt', '--data-path', made / 'images',
         '--quality', '--num-workers', 0, '--output', tmp_path / 'x.json')
    assert json.loads((tmp_path / 'x.json').read_text())['psnr'] > 0


def test_a_classifier_is_exported_without_the_decoder(made, tmp_path):
    classify = load_classifier(made / 'run' / 'checkpoint.pth', tokenizer_path=made / 'vq.pt')
    assert isinstance(classify.tokenizer, VQGAN)
    assert export_classifier(classify, tmp_path / 'x.pt2') < 1e-4
    assert classify.tokenizer.decoder is not None
    weights = sum(value.numel() * 4 for value in classify.state_dict().values())
    assert (tmp_path / 'x.pt2').stat().st_size < 0.8 * weights


def test_token_adapt_is_given_its_codes():
    tokenizer = VQGAN.from_state_dict(small_state('taming'))
    pairs = CodePairs(tokenizer, tokenizer.codebook, 4, 3)
    images = unit_range(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8))
    assert torch.equal(pairs.codes_of(images).flatten(1), tokenizer.codes(2 * images - 1))
    change = Change(Geometry(False, [], torch.tensor([0, 0, 6, 6]).expand(2, -1)))
    assert pairs.targets_of(images, change).shape == (2, 3, 3)
