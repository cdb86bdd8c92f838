"""TorchScript programs as tokenizers: on consent alone, through the programs, and what is refused."""
import json
import warnings
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evaluate_on_images
import main_seit
import tokenize_images
from fileio.files import sha256
from helpers import call, fails, smooth_images
from image_tokenizer.tokenizers import check_codes, decode_codes, encode_images, load_tokenizer
from image_tokenizer.tokenizing import load_models
from inference.classifier import load_classifier
from scripts import build_synonyms, inspect_tokens
from token_files.codebook import load_codebook

pytestmark = pytest.mark.usefixtures('one_thread')
FORMULA = 'fsq:5,3'
P = 8
SIZES = ['--device', 'cpu', '--batch-size', 6, '--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1',
         'embed_dim=32', 'num_heads=2']


class Encoder(nn.Module):
    """Finite scalar quantization of a patch's mean red and green, with an output more, as Cosmos' has."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = F.avg_pool2d(x * self.scale, 8)
        digits = torch.stack([((x[:, 0] + 1) * 2).round(), (x[:, 1] + 1).round()], 1)
        return (digits[:, 0] + 5 * digits[:, 1]).int(), digits


class Decoder(nn.Module):
    def forward(self, codes):
        red, green = (codes % 5 - 2) / 2, (codes // 5 - 1).float()
        return torch.stack([red, green, torch.zeros_like(red)], 1).repeat_interleave(8, 2).repeat_interleave(8, 3)


class Continuous(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 8)


class Failing(nn.Module):
    def forward(self, x):
        return x.view(3, 5)


def save(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that torch.jit is deprecated
        torch.jit.script(module.eval()).save(str(path))
    return path


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """encoder.jit, decoder.jit, images, tokens of them, and a run of one epoch."""
    folder = tmp_path_factory.mktemp('torchscript')
    save(Encoder(), folder / 'encoder.jit')
    save(Decoder(), folder / 'decoder.jit')
    smooth_images(folder / 'images', per_class=4)
    tokenize(folder, folder / 'tokens', '--allow-torchscript')
    tokens = folder / 'tokens'
    call(build_synonyms, '--codebook-path', FORMULA, '--output', tokens / 'synonyms.json')
    files = [word for split in ('train', 'val') for word in (
        f'--{split}-token-file', tokens / 'my-token.data.bin.gz', f'--{split}-label-file', tokens / 'my-label.txt')]
    call(main_seit, *SIZES, '--codebook-path', FORMULA, '--token-synonym-dict', tokens / 'synonyms.json', *files,
         '--token-patch-size', 8, '--input-size', 64, '--epochs', 1, '--output-dir', folder / 'run')
    return folder


def tokenize(folder, output, *words, formula=FORMULA):
    call(tokenize_images, '--data-path', folder / 'images', '--name', 'my', '--output-dir', output, '--image-size', 64,
         '--tokenizer-path', folder / 'encoder.jit', '--codebook-path', formula, '--num-workers', 0, '--device', 'cpu',
         *words)


def test_codes_and_images(made):
    tokenizer = load_tokenizer(made / 'encoder.jit', allow_torchscript=True)
    codebook = load_codebook(FORMULA)
    check_codes(tokenizer, codebook, FORMULA)
    pixels = torch.randint(256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    features, codes = encode_images(tokenizer, codebook, pixels, amp='bf16')
    expected, _ = Encoder()(pixels / 255 * 2 - 1)
    assert features is None and codes.dtype == torch.int64 and torch.equal(codes, expected.flatten(1).long())
    assert tokenizer.patch_size == P
    made_of = decode_codes(tokenizer, codebook, codes)
    torch.testing.assert_close(made_of, (Decoder()(codes.view(3, 4, 4)) + 1) / 2)
    fails(lambda: encode_images(tokenizer, codebook, pixels[..., :31, :31]), '31x31 do not divide into patches of 8')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_frozen_programs_and_other_precision(tmp_path, dtype):
    """Of a program without parameters the dtype is found by trying."""
    module = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 4, 1)).eval().to(dtype)

    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x).argmax(1)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        torch.jit.freeze(torch.jit.trace(Codes().eval(), torch.zeros(1, 3, 16, 16, dtype=dtype))).save(
            str(tmp_path / 'encoder.jit'))
    tokenizer = load_tokenizer(tmp_path / 'encoder.jit', allow_torchscript=True)
    assert tokenizer.dtype == dtype and tokenizer.decoder is None
    _, codes = encode_images(tokenizer, torch.zeros(4, 2), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert codes.shape == (1, 4)
    assert decode_codes(tokenizer, torch.zeros(4, 2), codes) is None


def test_the_manifest_names_kind_and_file(made):
    manifest = json.loads((made / 'tokens' / 'my-token.json').read_text())
    assert manifest['tokenizer'] == {'file': 'encoder.jit', 'sha256': sha256(made / 'encoder.jit'),
                                     'kind': 'TorchScript', 'path': '../encoder.jit'}
    assert manifest['codebook']['file'] == FORMULA and manifest['codes'] == 15


def test_it_runs_on_consent_alone(made, tmp_path):
    line = 'encoder.jit: is a TorchScript program, .* add --allow-torchscript of tokenize_images.py'
    fails(lambda: tokenize(made, tmp_path / 'x'), line)
    assert not (tmp_path / 'x').exists()
    fails(lambda: load_classifier(made / 'run' / 'checkpoint.pth'), line)
    fails(lambda: call(evaluate_on_images, '--model-path', made / 'run' / 'checkpoint.pth', '--data-path',
                       made / 'images', '--num-workers', 0, '--device', 'cpu'), line)


def test_evaluation_on_images_is_that_on_tokens(made, tmp_path):
    """All but consent is in the checkpoint."""
    call(evaluate_on_images, '--model-path', made / 'run' / 'checkpoint.pth', '--data-path', made / 'images',
         '--num-workers', 0, '--device', 'cpu', '--allow-torchscript', '--output', tmp_path / 'x.json')
    stats = json.loads((tmp_path / 'x.json').read_text())
    log = json.loads((made / 'run' / 'log.txt').read_text().splitlines()[-1])
    assert abs(stats['loss'] - log['test_loss']) < 1e-4 and stats['acc1'] == pytest.approx(log['test_acc1'])
    classify = load_classifier(made / 'run' / 'checkpoint.pth', allow_torchscript=True)
    pixels = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    torch.testing.assert_close(classify(pixels).sum(1), torch.ones(2))


def test_tokens_are_decoded(made, tmp_path):
    call(inspect_tokens, '--token-file', made / 'tokens' / 'my-token.data.bin.gz', '--codebook-path', FORMULA,
         '--tokenizer-path', made / 'encoder.jit', '--allow-torchscript', '--data-path', made / 'images', '--quality',
         '--num-workers', 0, '--output', tmp_path / 'x.json')
    assert json.loads((tmp_path / 'x.json').read_text())['psnr'] > 0


def test_codebooks_that_do_not_belong_to_it(made, tmp_path):
    fails(lambda: tokenize(made, tmp_path, '--allow-torchscript', formula='fsq:2,2'),
          'gives code 1[0-4]?, but the codebook has 4 rows|gives code [4-9], but the codebook has 4 rows')
    fails(lambda: tokenize(made, tmp_path, '--allow-torchscript', '--limit-codes'), 'leave out --limit-codes')
    fails(lambda: load_models(made / 'encoder.jit', None, None, 64, False, True), 'has no codebook of its own')


def test_programs_that_are_no_tokenizers(tmp_path):
    for module, pattern in ((Continuous(), r'gives torch.float32 \(1, 3, 32, 32\)'), (Failing(), 'fails on an image')):
        save(module, tmp_path / 'encoder.jit')
        fails(lambda: load_tokenizer(tmp_path / 'encoder.jit', allow_torchscript=True), 'encoder.jit: ', pattern)
    damaged = tmp_path / 'damaged.jit'
    with zipfile.ZipFile(save(Encoder(), tmp_path / 'encoder.jit')) as old, zipfile.ZipFile(damaged, 'w') as new:
        for member in old.infolist():
            new.writestr(member.filename, b'(' if member.filename.endswith('.py') else old.read(member))
    fails(lambda: load_tokenizer(damaged, allow_torchscript=True), 'damaged.jit: damaged or no TorchScript program')
