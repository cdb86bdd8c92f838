"""Token sets as other projects write them, made by hand."""
import json

import numpy as np
import pytest
import safetensors.numpy

from helpers import npy


def codes_of(n=6, grid=3, high=65536, seed=0):
    codes = np.random.default_rng(seed).integers(0, high, (n, grid, grid))
    codes[0, 0, :2] = 0, high - 1
    return codes


def labels_of(n=6):
    return np.arange(n) % 4


def write_safetensors(path, codes, labels=None, names=('indices', 'labels')):
    tensors = {names[0]: codes} | ({} if labels is None else {names[1]: labels})
    safetensors.numpy.save_file(tensors, path, {'tokenizer_type': 'discrete'})
    return path


def write_jsonl(path, codes, labels):
    lines = [json.dumps({'class_id': int(label), 'tokens': row.ravel().tolist()}) for row, label in zip(codes, labels)]
    path.write_text('\n'.join(lines) + '\n')
    return path


def write_folder(folder, codes, labels, name='imagenet24'):
    """LlamaGen's: codes (N, views, n), labels (N,)."""
    for kind in 'codes', 'labels':
        (folder / f'{name}_{kind}').mkdir(parents=True)
    for i, (views, label) in enumerate(zip(codes, labels)):
        (folder / f'{name}_codes/{i}.npy').write_bytes(npy(views[None].astype(np.int64)))
        (folder / f'{name}_labels/{i}.npy').write_bytes(npy(np.array([label])))
    return folder / f'{name}_codes'


def write_parquet(path, codes, labels, kind=None, names=('tokens', 'label'), **options):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    columns = {names[0]: pyarrow.array(codes.tolist(), kind), names[1]: pyarrow.array(labels.tolist())}
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path
