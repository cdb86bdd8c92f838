"""The committed demo: what it holds, that its tokens are those of its images, and that make_demo.py makes it again."""
import gzip
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from demo import make_demo
from helpers import DEMO, call, contents, fails, published_transform
from image_tokenizer.tokenizers import load_tokenizer
from token_dataset import TokenDataset
from token_files.codebook import load_codebook, load_synonyms, quantize


def demo_tokens(split, folder=DEMO):
    name = f'fashion-{split}'
    return TokenDataset(folder / f'{name}-token.data.bin', folder / f'{name}-label.txt', 391, 'none')


def test_it_is_small_and_whole():
    size = sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(DEMO) for name in names)
    assert size < 5e6
    codebook = load_codebook(DEMO / 'codebook.ckpt')
    assert codebook.shape == (391, 32) and abs(codebook[:, :-1].std().item() - 1) < 1e-3
    assert torch.equal(codebook, load_tokenizer(DEMO / 'tokenizer.pt').codebook)
    assert load_synonyms(DEMO / 'synonyms.json', 391, 5)[1].tolist() == [5] * 391
    for split, count in (('train', 10_000), ('val', 2_000)):
        data = demo_tokens(split)
        assert (len(data), data.grid_size) == (count, 8) and np.bincount(data.labels).min() > count / 12


def test_tokens_are_those_of_the_images():
    data = demo_tokens('val')
    classes = json.loads((DEMO / 'fashion-val-token.json').read_text())['classes']
    tokenizer = load_tokenizer(DEMO / 'tokenizer.pt')
    codebook = load_codebook(DEMO / 'codebook.ckpt')
    transform = published_transform(64)
    found = []
    expected = []
    for label, name in enumerate(classes):
        # the kept images are the first of each class, in the order the tokens have
        paths = sorted((DEMO / 'images' / 'val' / name).iterdir())
        images = torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])
        found.append(quantize(tokenizer(images), codebook))
        expected.append(data.codes[data.labels == label][:len(paths)].astype(np.int64))
    found = torch.cat(found).numpy()
    expected = np.concatenate(expected)
    assert len(found) == 400
    assert (found != expected).mean() < 1e-3  # rounding on another processor may move a code or two


# ---------------------------------------------------------------- making it

@pytest.fixture
def fashion(tmp_path):
    """A folder like Fashion-MNIST's: the validation images that the demo keeps as PNGs, in their first order, twice."""
    paths = sorted((DEMO / 'images' / 'val').rglob('*.png'), key=lambda path: path.name)
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    labels = np.array([int(path.parent.name[0]) for path in paths], np.uint8)
    folder = tmp_path / 'fashion'
    folder.mkdir()
    for split in ('train', 't10k'):
        (folder / f'{split}-images-idx3-ubyte.gz').write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
        (folder / f'{split}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    return folder


@pytest.fixture
def output(tmp_path):
    """An output folder with the demo's tokenizer and codebook."""
    folder = tmp_path / 'demo'
    folder.mkdir()
    for name in ('tokenizer.pt', 'codebook.ckpt'):
        shutil.copy(DEMO / name, folder)
    return folder


def make(fashion, output, *words):
    return call(make_demo, '--fashion-mnist', fashion, '--output-dir', output, '--train-images', 30,
                '--val-images', 400, '--png-images', 400, *words)


def test_it_is_made_again(fashion, output):
    (output / 'fashion-val-token.json').write_text('of an earlier run')
    (output / 'fashion-val-label.txt').write_text('of an earlier run')
    make(fashion, output)
    committed = demo_tokens('val')
    kept = np.concatenate([np.flatnonzero(committed.labels == label)[:count]
                           for label, count in enumerate(np.bincount(demo_tokens('val', output).labels))])
    assert len(kept) == 400 and np.array_equal(demo_tokens('val', output).labels, committed.labels[kept])
    assert (demo_tokens('val', output).codes != committed.codes[kept]).mean() < 1e-3  # as above
    assert len(demo_tokens('train', output)) == 30
    for name in ('synonyms.json', 'tokenizer.pt', 'codebook.ckpt'):
        assert (output / name).read_bytes() == (DEMO / name).read_bytes(), name
    made = contents(output / 'images')
    assert made.keys() == contents(DEMO / 'images').keys()
    said = json.loads((output / 'fashion-val-token.json').read_text())
    before = json.loads((DEMO / 'fashion-val-token.json').read_text())
    assert said.keys() == before.keys() | {'source_sizes'} and said['classes'] == before['classes']
    first = contents(output)
    make(fashion, output)
    assert contents(output) == first


def test_mistakes_get_one_line(fashion, output, tmp_path, monkeypatch):
    monkeypatch.setattr(make_demo, 'build_synonyms', None)  # the first step that writes
    fails(lambda: make(tmp_path / 'none', output), 'none/train-images-idx3-ubyte.gz: no such file')
    fails(lambda: make(fashion, output, '--train-images', 401), 'train-images.*: 400 images; 401 are wanted')
    fails(lambda: make(fashion, output, '--png-images', 401), 't10k-images.*: 400 images; 401 are wanted')
    fails(lambda: make(fashion, output, '--train-images', 0), '--train-images: 0')
    (tmp_path / 'file').write_text('x')
    fails(lambda: make(fashion, tmp_path / 'file'), 'cannot be written')
    path = fashion / 't10k-labels-idx1-ubyte.gz'
    labels = path.read_bytes()
    path.write_bytes(gzip.compress(bytes(8) + bytes([10] * 400)))
    fails(lambda: make(fashion, output), 'class 10 among the t10k labels')
    path.write_bytes(gzip.compress(bytes(8) + bytes(399)))
    fails(lambda: make(fashion, output), 'are not 399 images of 28x28')
    path.write_bytes(labels[:50])
    fails(lambda: make(fashion, output), 't10k-labels-idx1-ubyte.gz: damaged or truncated')
    assert contents(output).keys() == {'tokenizer.pt', 'codebook.ckpt'}


def test_what_a_step_says_is_passed_on(fashion, output):
    (output / 'codebook.ckpt').write_bytes(b'x')
    fails(lambda: make(fashion, output), 'codebook.ckpt: damaged or not a codebook')
