"""torch.hub's entries, in processes of their own as users have them."""
import ast
import subprocess
import sys

import pytest
import torch

import models_seit
from conftest import ROOT
from helpers import clean_environment, states

SMALL = 'depth=1, embed_dim=32, num_heads=2'


def run_python(code, folder):
    """Run code in a folder of a user, where the path does not hold this project's."""
    code = f'import torch, sys\nROOT = {str(ROOT)!r}\n{code}'
    return subprocess.run([sys.executable, '-c', code], cwd=folder, env=clean_environment(PYTHONPATH=''),
                          capture_output=True, text=True, timeout=300)


def loading(entry, options):
    return f"torch.hub.load(ROOT, '{entry}', source='local', {options})"


@pytest.mark.slow
def test_entries_with_a_checkpoint_in_a_users_folder(small_runs, tmp_path):
    """Beside a utils.py of the user, which is not imported yet; the classifier works when the path is as before."""
    (tmp_path / 'utils.py').write_text('raise RuntimeError("the utils of the user")')
    image = next(small_runs['images'].rglob('*.png'))
    run = str(small_runs['main_seit.py'])
    done = run_python(f"""
from PIL import Image
path = list(sys.path)
classify = {loading('classifier', f'checkpoint={run!r}')}
model = {loading('deit_tiny_token_32', f'checkpoint={run!r}')}
assert sys.path == path
names, probabilities = classify([Image.open({str(image)!r})])
assert names[0] in classify.classes == ['ant', 'bee', 'cat']
assert not model.training and all(torch.equal(a, b) for a, b in
                                  zip(model.state_dict().values(), classify.model.state_dict().values()))
print(sorted(name for name in {{name.partition('.')[0] for name in sys.modules}}
             if (getattr(sys.modules[name], '__file__', None) or '').startswith(ROOT + '/')
             and not (sys.modules[name].__file__).startswith(ROOT + '/.venv')))
""", tmp_path)
    assert done.returncode == 0, done.stderr
    modules, = [line for line in done.stdout.splitlines() if line.startswith('[')]
    # the check of names in hubconf.py knows all modules of ours that are imported
    constants = {node.targets[0].id: node.value for node in ast.parse((ROOT / 'hubconf.py').read_text()).body
                 if isinstance(node, ast.Assign)}
    assert ast.literal_eval(modules) == sorted(ast.literal_eval(constants['_OURS']))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['utils', 'engine', 'training'])
def test_another_module_of_a_name_of_ours_is_refused(name, tmp_path):
    (tmp_path / f'{name}.py').write_text('mine = 1')
    done = run_python(f"import {name}\ntry:\n    {loading('deit_tiny_token_32', SMALL)}\n"
                      f"except ImportError as error:\n    print(error)", tmp_path)
    message, = done.stdout.splitlines()
    assert message.startswith(f"a module '{name}' that is not of this project is imported already ({tmp_path}")
    assert message.endswith('load from torch.hub in a process that has not imported it, or rename it')


@pytest.fixture(scope='module')
def hubconf():
    """In this process, in which all modules are ours."""
    module = torch.hub._import_module('hubconf', str(ROOT / 'hubconf.py'))
    assert 'hubconf' not in sys.modules
    return module


def test_all_that_can_be_called_is_an_entry(hubconf):
    """torch.hub.list shows whatever can be called, and torch.hub.help its docstring."""
    entries = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith('_')]
    assert entries == sorted(['classifier', *models_seit.MODELS])
    assert 'The model deit_base_token_4: embeddings' in hubconf.deit_base_token_4.__doc__


@pytest.mark.parametrize('name', models_seit.MODELS)
def test_every_model_has_an_entry(hubconf, name):
    model = getattr(hubconf, name)(depth=1, embed_dim=32, num_heads=2, num_classes=5)
    assert isinstance(model, models_seit.TokenVisionTransformer) and model.num_classes == 5
    assert model(torch.zeros(1, model.in_chans, 28, 28)).shape == (1, 5)


def test_a_published_checkpoint_needs_its_arguments(hubconf, small_runs, tmp_path):
    weights = states(small_runs['main_seit.py'] / 'checkpoint.pth')['model']
    torch.save({'model': weights}, tmp_path / 'vit.ckpt')
    model = hubconf.deit_base_token_32(tmp_path / 'vit.ckpt', depth=1, embed_dim=32, num_heads=2)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    averaged = hubconf.deit_tiny_token_32(small_runs['main_seit.py'], use_ema=True)
    wanted = states(small_runs['main_seit.py'] / 'best_ema_checkpoint.pth')['model_ema']
    assert all(torch.equal(wanted[name], value) for name, value in averaged.state_dict().items())
