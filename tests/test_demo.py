"""The committed demo: what it holds, and that its tokens are those of its images."""
import json
import os

import numpy as np
import torch
from PIL import Image

from conftest import ROOT
from image_tokenizer import image_transform, load_tokenizer, quantize
from token_dataset import TokenDataset, load_codebook, load_synonyms

DEMO = ROOT / 'demo'


def test_it_is_small_and_whole():
    size = sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(DEMO) for name in names)
    assert size < 5e6
    codebook = load_codebook(DEMO / 'codebook.ckpt')
    assert codebook.shape == (391, 32) and abs(codebook.std().item() - 1) < 1e-3
    assert load_synonyms(DEMO / 'synonyms.json', 391, 5)[1].tolist() == [5] * 391
    for split, count in (('train', 10_000), ('val', 2_000)):
        name = f'fashion-{split}'
        data = TokenDataset(DEMO / f'{name}-token.data.bin.gz', DEMO / f'{name}-label.txt', 391, 'none')
        assert (len(data), data.grid) == (count, 8) and np.bincount(data.labels).min() > count / 12


def test_tokens_are_those_of_the_images():
    data = TokenDataset(DEMO / 'fashion-val-token.data.bin.gz', DEMO / 'fashion-val-label.txt', 391, 'none')
    classes = json.loads((DEMO / 'fashion-val-token.json').read_text())['classes']
    tokenizer, codebook = load_tokenizer(DEMO / 'tokenizer.pt'), load_codebook(DEMO / 'codebook.ckpt')
    transform, found, expected = image_transform(64), [], []
    for label, name in enumerate(classes):
        # the kept images are the first of each class, in the order the tokens have
        paths = sorted((DEMO / 'images' / 'val' / name).iterdir())
        images = torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])
        found.append(quantize(tokenizer(images), codebook))
        expected.append(data.codes[data.labels == label][:len(paths)].astype(np.int64))
    found, expected = torch.cat(found).numpy(), np.concatenate(expected)
    assert len(found) == 400
    assert (found != expected).mean() < 1e-3  # rounding on another processor may move a code or two
