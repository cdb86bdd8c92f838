import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'scripts')]
torch.set_num_threads(2)


@pytest.fixture(scope='session')
def golden():
    """Loader of golden files by name: .npz as arrays, .json as values."""
    import json
    folder = ROOT / 'tests' / 'golden'

    def load(name):
        path = folder / name
        return np.load(path) if path.suffix == '.npz' else json.loads(path.read_text())
    load.folder = folder
    return load
