"""The benchmarks at a tiny size: that they run and what their JSON line holds. No test here asserts a time."""
import importlib
import json
import subprocess
import sys

import pytest
import timm
import torch

import benchmarks.common
import benchmarks.data
import benchmarks.encode
import benchmarks.evaluate
import benchmarks.start
import benchmarks.train
import main_seit
from benchmarks.one_hot import OneHot
from codebook import load_codebook, load_synonyms
from conftest import ROOT
from token_augment import RandomResizedCrop
from utils import InputError

MODEL = ['--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2', '--input-size',
         '64', '--grid', '8', '--nb-classes', '10', '--device', 'cpu', '--batch-size', '4']
SPREAD = {'median', 'min', 'max'}
PROGRAMS = sorted(path.stem for path in (ROOT / 'benchmarks').glob('*.py') if 'run(main' in path.read_text())


@pytest.fixture(autouse=True)
def same_threads():
    """Benchmarks set torch's threads: put them back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measure(capsys, program, name, *words):
    """The JSON object on the last line that a benchmark prints."""
    assert not program.main(program.parse_args([*words, '--threads', '2']))
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert lines
    assert result['benchmark'] == name
    assert result.keys() >= {'asked', 'hardware'}
    assert result['hardware'].keys() >= {'cpu', 'cores', 'threads', 'gpu', 'torch', 'timm'}
    assert result['hardware']['threads'] == result['asked']['threads'] == 2
    assert 'main_flags' not in result['asked']
    return result


def is_spread(value):
    return value.keys() == SPREAD and 0 < value['min'] <= value['median'] <= value['max']


# ---------------------------------------------------------------- data

def test_data(capsys):
    result = measure(capsys, benchmarks.data, 'data', '--device', 'cpu', '--grid', '16', '--batch-size', '8',
                     '--batches', '2', '--one-hot-images', '4', '--repeats', '2')
    for key in ('images_per_second', 'one_hot_images_per_second', 'ratio', 'ms_an_image', 'one_hot_ms_an_image'):
        assert is_spread(result[key]), key
    assert result['crop_difference'] < 1e-4
    assert result['tokens_on_gpu'] is False


def test_the_one_hot_implementation_has_the_same_statistics(tmp_path):
    """Mean square of the model input over a batch, noise and all, of either implementation."""
    args = main_seit.parse_args(benchmarks.common.make_tokens(tmp_path, 64, 16, 10))
    codebook = load_codebook(args.codebook_path)
    data = main_seit.load_data(args, codebook, 14)['train']
    augment = main_seit.make_augment(args, codebook, 16, 14, torch.device('cpu'))
    one_hot = OneHot(codebook, 14, load_synonyms(args.token_synonym_dict, len(codebook), args.token_synonym_thres))
    codes = data.batch(range(64))[0]
    plain = one_hot(codes)
    ours = augment(codes, torch.Generator().manual_seed(0))
    assert ours.shape == plain.shape
    assert ours.square().mean().item() == pytest.approx(plain.square().mean().item(), rel=0.1)


def test_crops_that_differ_are_not_compared():
    codebook = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    codes = torch.randint(0, 40, (4, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint16)
    one_hot = OneHot(codebook, 14, (torch.zeros(40, 1).long(), torch.ones(40).long()))
    cpu = torch.device('cpu')
    crop = RandomResizedCrop(codebook, 16, 14, 0.08, cpu)
    assert benchmarks.data.crop_difference(crop, one_hot, codes, cpu) < 1e-4
    one_hot.codebook = codebook.flip(0)
    with pytest.raises(RuntimeError, match='the crops differ by'):
        benchmarks.data.crop_difference(crop, one_hot, codes, cpu)


# ---------------------------------------------------------------- train

def test_train(capsys):
    result = measure(capsys, benchmarks.train, 'train', *MODEL, '--steps', '2', '--repeats', '2')
    for key in ('images_per_second', 'constant_images_per_second', 'data_to_constant', 'ms_a_step',
                'flops_utilization'):
        assert is_spread(result[key]), key
    assert result['matmul_peak_tflops'] > 0
    assert result['peak_memory_mb'] > 0
    assert result['asked']['model'] == 'deit_tiny_token_32'
    assert result['asked']['amp'] == 'off'
    assert result['asked']['steps'] == 2


def test_train_with_other_flags_of_the_program(capsys, monkeypatch):
    monkeypatch.setattr(benchmarks.train, 'matmul_peak', lambda *_: 1e9)
    measure(capsys, benchmarks.train, 'train', *MODEL, '--steps', '2', '--repeats', '1', '--accum-iter', '2',
            '--no-model-ema', '--cutmix', '0', '--clip-grad', '1')


def test_flops_of_vit_b_are_those_in_the_literature():
    model = timm.create_model('deit_base_token_32', num_classes=1000)
    assert benchmarks.train.forward_flops(model, (32, 28, 28)) / 1e9 == pytest.approx(35, abs=0.5)


# ---------------------------------------------------------------- start, encode, evaluate

def test_start(capsys, tmp_path):
    words = ['--images', '40', '--grid', '4', '--ranks', '2', '--repeats', '1', '--folder', str(tmp_path)]
    result = measure(capsys, benchmarks.start, 'start', *words)
    for state in ('cold_2', 'warm_2'):
        assert is_spread(result[state]['seconds'])
        assert result[state].keys() == {'seconds', 'import_seconds', 'open_seconds', 'map', 'map_share', 'rest',
                                        'rest_own'}
        assert result[state]['rest']['median'] > result[state]['map']['median'] > 0
    assert (tmp_path / 'set-token.data.bin.gz').exists()  # kept for the next time
    assert 'folder' not in result['asked']


def test_encode(capsys):
    result = measure(capsys, benchmarks.encode, 'tokenize', '--device', 'cpu', '--tokenizer', 'patch', '--images', '6',
                     '--batch-size', '4', '--image-size', '32', '--num-workers', '0', '--repeats', '1')
    for key in ('tokenizer_images_per_second', 'with_decoding_images_per_second'):
        assert result[key].keys() == {'fp32', 'bf16'}
        assert all(map(is_spread, result[key].values()))


def test_evaluate(capsys):
    result = measure(capsys, benchmarks.evaluate, 'eval', *MODEL, '--tokenizer', 'patch', '--images', '12',
                     '--image-workers', '0', '--repeats', '1')
    assert is_spread(result['tokens_images_per_second'])
    assert is_spread(result['images_images_per_second'])
    assert result['asked']['nb_classes'] == 10


# ---------------------------------------------------------------- the command lines

@pytest.mark.parametrize('name, words, message', [
    ('data', ['--repeats', '0'], '--repeats: 0: give a value of 1 or more'),
    ('data', ['--modle', 'x'], 'unrecognized arguments: --modle'),
    ('data', ['--threads', 'two'], "--threads: 'two' is not a whole number"),
    ('train', ['--batch-size', '3'], 'odd'),
    ('train', ['--modle', 'x'], 'unrecognized arguments: --modle'),
    ('train', ['--steps', '5', '--accum-iter', '2'], '--steps 5 is no multiple of --accum-iter 2'),
    ('encode', ['--num-workers', '-1'], '--num-workers: -1: give a value of 0 or more'),
    ('evaluate', ['--images', '0'], '--images: 0: give a value of 1 or more'),
    ('start', ['--ranks', '1', '0'], '--ranks: 0: give a value of 1 or more'),
])
def test_mistakes_are_one_line(name, words, message):
    with pytest.raises(InputError, match=message) as error:
        importlib.import_module(f'benchmarks.{name}').parse_args(words)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['data', 'encode', 'evaluate', 'train'])
def test_the_device_is_chosen_by_default(name):
    assert importlib.import_module(f'benchmarks.{name}').parse_args([]).device == 'auto'


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
def test_cuda_where_there_is_none():
    with pytest.raises(InputError, match='no CUDA device'):
        benchmarks.data.main(benchmarks.data.parse_args(['--device', 'cuda']))


def test_no_file_stands_before_a_module_of_python():
    """Python puts the folder of a program first on its path: a tokenize.py there would break inspect and torch."""
    names = {path.stem for path in (ROOT / 'benchmarks').glob('*.py')}
    assert names & set(sys.stdlib_module_names) == set()


def test_each_is_a_program():
    """Started by its path from another folder, as the documents have it."""
    assert PROGRAMS == ['data', 'encode', 'evaluate', 'start', 'start_probe', 'tokenizers', 'train']
    done = subprocess.run([sys.executable, ROOT / 'benchmarks' / 'encode.py', '--images', '0'], capture_output=True,
                          text=True, cwd=ROOT / 'demo')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('error: argument --images: 0: give a value of 1 or more')
    assert done.stderr.count('\n') == 1
