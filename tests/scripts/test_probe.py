"""scripts/probe.py on checkpoints of each program: features, their accuracies, mistakes."""
import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from sklearn.neighbors import KNeighborsClassifier

import main_mtm_pretrain
import main_pixels
from scripts import probe
from helpers import SMALL, call, fails, make_data, run_here, smooth_images, states
from seitpp.models_mtm import create_model as create_masked
from token_files.codebook import load_codebook
from masked import DECODER, SIZES
from token_augment import EvalTransform
from token_dataset import TokenDataset

pytestmark = pytest.mark.usefixtures('one_thread')
PIXELS = ['--device', 'cpu', '--model', 'deit_tiny_patch16_224', '--model-kwargs', 'depth=1', 'embed_dim=32',
          'num_heads=2', 'global_pool=avg', 'img_size=32', '--input-size', 32, '--batch-size', 6, '--num-workers', 0,
          '--eval-crop-ratio', 1]
FILES = ('--codebook-path', '--train-token-file', '--train-label-file', '--val-token-file', '--val-label-file')


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    """Flags of a set of 40 training images, and a checkpoint of main_seit.py."""
    folder = tmp_path_factory.mktemp('tokens')
    words = make_data(folder, n=40)
    run_here(*SMALL, *words, '--epochs', 1, '--no-eval', '--output-dir', folder / 'run')
    pairs = dict(zip(words[::2], words[1::2]))
    return [word for flag in FILES for word in (flag, pairs[flag])], folder / 'run' / 'checkpoint.pth'


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Flags of 24 images of three classes, and a checkpoint of main_pixels.py."""
    folder = tmp_path_factory.mktemp('images')
    smooth_images(folder / 'data')
    words = ['--train-path', folder / 'data', '--val-path', folder / 'data']
    call(main_pixels, *PIXELS, *words, '--epochs', 1, '--output-dir', folder / 'run')
    return words, folder / 'run' / 'checkpoint.pth'


def probed(words, checkpoint, *flags):
    return call(probe, '--device', 'cpu', '--num-workers', 0, '--checkpoint', checkpoint, *words, *flags)


def test_tokens_as_scikit_learn_judges_them(tokens, tmp_path, capsys):
    """Features are what the head reads, in eval mode; the lines and the file say the same."""
    words, checkpoint = tokens
    probed(words, checkpoint, '--neighbors', 5, '--output', tmp_path / 'p.json')
    output = capsys.readouterr().out
    results = json.loads((tmp_path / 'p.json').read_text())
    assert results == results | {'train': 40, 'val': 11, 'classes': 4, 'dim': 32}
    for name, key in (('kNN', 'knn'), ('linear', 'linear')):
        found, = re.findall(rf'^\* {name} Acc@1 (\S+) Acc@5 (\S+) \(', output, re.MULTILINE)
        assert found == (f'{results[key]["acc1"]:.3f}', f'{results[key]["acc5"]:.3f}')

    flags = dict(zip(words[::2], words[1::2]))
    model = timm.create_model('deit_tiny_token_32', depth=1, embed_dim=32, num_heads=2, img_size=8, num_classes=4)
    model.load_state_dict(states(checkpoint)['model'])
    read = []
    model.head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    codebook = load_codebook(flags['--codebook-path'])
    sets = {}
    for split in ('train', 'val'):
        data = TokenDataset(flags[f'--{split}-token-file'], flags[f'--{split}-label-file'], 30, 'none')
        codes, labels = data.batch(np.arange(len(data)))
        with torch.no_grad():
            model.eval()(EvalTransform(codebook, 8, torch.device('cpu'))(codes))
        sets[split] = read.pop().numpy(), labels.numpy()
    neighbors = KNeighborsClassifier(5, metric='cosine', weights=lambda distances: np.exp(-distances / 0.07))
    theirs = neighbors.fit(*sets['train']).score(*sets['val'])
    assert results['knn']['acc1'] == pytest.approx(100 * theirs)


def test_images_and_one_probe_alone(images, tmp_path, capsys):
    words, checkpoint = images
    probed(words, checkpoint, '--neighbors', 1, '--probes', 'knn', '--output', tmp_path / 'p.json')
    results = json.loads((tmp_path / 'p.json').read_text())
    assert results['knn']['acc1'] == 100 and 'linear' not in results  # each image is its own nearest neighbor
    assert results['dim'] == 32 and '* linear' not in capsys.readouterr().out


def test_averaged_weights_are_others(images, tmp_path):
    words, checkpoint = images
    averaged = states(checkpoint)
    averaged['model_ema'] = {key: value + 1 for key, value in averaged['model'].items()}
    averaged['model'] = {key: torch.full_like(value, torch.nan) for key, value in averaged['model'].items()}
    torch.save(averaged, tmp_path / 'averaged.pth')
    probed(words, tmp_path / 'averaged.pth', '--neighbors', 1, '--use-ema', '--output', tmp_path / 'p.json')
    assert json.loads((tmp_path / 'p.json').read_text())['knn']['acc1'] == 100


def test_a_convolutional_network(images, tmp_path, capsys):
    """Any model of timm, by its name; its weights know the classes."""
    words, _ = images
    torch.save({'model': timm.create_model('resnet10t', num_classes=7).state_dict()}, tmp_path / 'w.pth')
    probed(words, tmp_path / 'w.pth', '--model', 'resnet10t', '--input-size', 32, '--probes', 'knn', '--neighbors', 1)
    assert '* kNN Acc@1 100.000' in capsys.readouterr().out
    fails(lambda: probed(words, tmp_path / 'w.pth'), 'w.pth: does not say of which model it is: give --model')
    fails(lambda: probed(words, tmp_path / 'w.pth', '--model', 'resnet10t'), 'w.pth: does not say how it reads images')


def test_masked_token_pre_training_without_labels(tokens, tmp_path, capsys):
    """Its encoder, as the classifier that main_mtm_finetune.py makes of it."""
    words, _ = tokens
    args = main_mtm_pretrain.parse_args([*SIZES, *DECODER])
    masked = create_masked(args.model, args.model_kwargs, 30, 8)
    torch.save({'model': masked.state_dict(), 'args': {'model': args.model, 'model_kwargs': args.model_kwargs}},
               tmp_path / 'masked.pth')
    probed(words, tmp_path / 'masked.pth', '--neighbors', 40)
    output = capsys.readouterr().out
    assert 'features: 40 for training and 11 for validation, 32 numbers each, 4 classes' in output
    assert output.count('\n* ') == 2


def test_mistakes_are_one_line(tokens, images, tmp_path):
    words, checkpoint = tokens
    paths, pixels = images
    output = tmp_path / 'p.json'
    fails(lambda: probed(words, pixels, '--output', output), 'is of main_pixels.py, which reads images: give --train-p')
    fails(lambda: probed(paths, checkpoint), 'is of main_seit.py, which reads tokens: give --train-token-file')
    fails(lambda: probed(words[:-2], checkpoint), 'give --train-path, --val-path, or --train-token-file, ')
    fails(lambda: probed([*words, *paths], checkpoint), 'give --train-path, --val-path, or --train-token-file, ')
    fails(lambda: probed(words, checkpoint, '--neighbors', 41), '--neighbors 41: .*train-token.data.bin.gz has 40 imag')
    fails(lambda: probed(words, checkpoint, '--model', 'deit_tiny_token_32'), 'checkpoint.pth: does not fit the model')
    fails(lambda: probed(paths, pixels, '--model', 'resnet10t'), 'no fc.bias among its weights')
    fails(lambda: probed(words, checkpoint, '--output', checkpoint), 'is read, and would be replaced')
    smooth_images(tmp_path / 'val')
    (tmp_path / 'val' / 'cat').rename(tmp_path / 'val' / 'dog')
    fails(lambda: probed([*paths[:2], '--val-path', tmp_path / 'val'], pixels, '--output', output),
          "val: class 2 is 'dog', but in .* it is 'cat'")
    broken = torch.load(checkpoint)
    broken['model'] = {name: value * math.nan for name, value in broken['model'].items()}
    torch.save(broken, tmp_path / 'broken.pth')
    fails(lambda: probed(words, tmp_path / 'broken.pth', '--output', output), 'gives features that are not finite')
    assert not output.exists()
