"""Where tests find modules, the golden files, and a small disk."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(2)


@pytest.fixture(scope='session')
def golden():
    """Loader of golden files by name (tests/golden/README.md): .npz as arrays, .json as values."""
    folder = ROOT / 'tests' / 'golden'

    def load(name):
        path = folder / name
        return np.load(path) if path.suffix == '.npz' else json.loads(path.read_text())
    load.folder = folder
    return load


@pytest.fixture(scope='module')
def one_thread():
    """As in the processes that a test starts: on a CPU, rounding depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def small_runs(tmp_path_factory):
    """Folders of small runs by program, see small_classifiers.py; made once."""
    from small_classifiers import make_runs
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = make_runs(tmp_path_factory.mktemp('small'))
    torch.set_num_threads(threads)
    return runs


# ---------------------------------------------------------------- tokenizer files

@pytest.fixture(scope='session')
def shapes(golden):
    """Names and shapes of ViT-VQGAN's parameters."""
    return golden('vitvqgan_shapes.json')


@pytest.fixture
def state(shapes):
    """A whole ViT-VQGAN checkpoint: the golden weights, position tables and a codebook of 50 rows."""
    from helpers import golden_state
    from image_tokenizer.vitvqgan import position_table
    codebook = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    tables = {name: position_table(8, 8, 64) for name in shapes['golden_shapes'] if name.endswith('_pos_embedding')}
    return golden_state(shapes['golden_shapes']) | tables | {'quantizer.embedding.weight': codebook}


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A folder of foreign code, with `make(use, path)`: save use(its module) so that only the folder can load it."""
    from helpers import TOKENIZER_CODE
    folder = tmp_path / 'foreign'
    folder.mkdir()
    (folder / 'published_code.py').write_text(TOKENIZER_CODE)
    (folder / 'late_import.py').write_text('')

    def forget():
        for name in ('published_code', 'late_import'):
            sys.modules.pop(name, None)

    def make(use, path, **save_options):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(folder))
            import published_code
            torch.save(use(published_code), path, **save_options)
        forget()
        return path

    yield folder, make
    forget()


@pytest.fixture
def small_disk(tmp_path):
    """A function of bytes: a folder on a disk of that size."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = []

    def make(size):
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], capture_output=True)
        if done.returncode:
            pytest.skip('no rights to mount a tmpfs; the tests with RLIMIT_FSIZE run instead')
        mounted.append(folder)
        return folder
    yield make
    if mounted:
        subprocess.run(['umount', '-l', folder], check=True)


LAUNCHER = 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'GROUP_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'


@pytest.fixture
def no_launcher(monkeypatch):
    """monkeypatch, in an environment without what torchrun and SLURM set; what programs set is restored too."""
    for name in [*LAUNCHER, *(name for name in os.environ if name.startswith('SLURM_'))]:
        monkeypatch.setenv(name, 'x')
        monkeypatch.delenv(name)
    return monkeypatch
