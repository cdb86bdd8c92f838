"""The benchmarks at a tiny size: that they run and what their JSON line holds. No test here asserts a time."""
import importlib
import importlib.util
import json
import mmap
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch

import benchmarks.common
import benchmarks.data
import benchmarks.encode
import benchmarks.evaluate
import benchmarks.formats
import benchmarks.masked_tokens
import benchmarks.start
import benchmarks.train
import main_seit
import recipe
from benchmarks.one_hot import OneHot
from token_dataset import open_splits
from token_files.codebook import load_codebook, load_synonyms
from conftest import ROOT
from token_augment import RandomResizedCrop
from token_files.context_model import bits, fit
from token_files.token_file import count_codes, entropy_bits, open_token_file, write_model, write_set
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
    data = open_splits(recipe.split_files(args), codebook, args.codebook_path, args.token_cache, 14,
                       torch.device('cpu'))['train']
    augment = main_seit.make_augment(args, codebook, 16, 14, torch.device('cpu'), mixup=None)
    one_hot = OneHot(codebook, 14, load_synonyms(args.token_synonym_dict, len(codebook), args.token_synonym_thres))
    codes, labels = data.batch(range(64))
    torch.manual_seed(0)
    plain = one_hot(codes)
    ours, _ = augment(codes, labels, torch.Generator().manual_seed(0))
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


def test_masked_tokens(capsys):
    result = measure(capsys, benchmarks.masked_tokens, 'masked_tokens', '--device', 'cpu', '--grid', '8',
                     '--input-size', '48', '--batch-size', '4', '--steps', '2', '--repeats', '2', '--width', '64',
                     '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2', '--decoder-kwargs',
                     'decoder_embed_dim=32', 'decoder_depth=1', 'decoder_num_heads=2')
    for name in 'seit', 'pretrain', 'pretrain_without_tokenadapt', 'finetune', 'finetune_without_tokenadapt':
        assert is_spread(result[f'{name}_images_per_second']), name
    for name in 'pretrain', 'finetune':
        assert is_spread(result[f'{name}_to_seit'])
        assert result[f'{name}_tokenadapt_share']['max'] < 1


def test_train_with_other_flags_of_the_program(capsys, monkeypatch):
    monkeypatch.setattr(benchmarks.train, 'matmul_peak', lambda *_: 1e9)
    measure(capsys, benchmarks.train, 'train', *MODEL, '--steps', '2', '--repeats', '1', '--accum-iter', '2',
            '--no-model-ema', '--cutmix', '0', '--clip-grad', '1')


def test_flops_of_vit_b_are_those_in_the_literature():
    model = timm.create_model('deit_base_token_32', num_classes=1000)
    assert benchmarks.common.forward_flops(model, (32, 28, 28)) / 1e9 == pytest.approx(35, abs=0.5)


# ---------------------------------------------------------------- start

@pytest.mark.slow
def test_start(capsys, tmp_path):
    words = ['--images', '40', '--grid', '4', '--ranks', '2', '--repeats', '1', '--folder', str(tmp_path)]
    result = measure(capsys, benchmarks.start, 'start', *words)
    for state in ('cold_2_with_digests', 'cold_2_without_digests', 'warm_2_with_digests', 'warm_2_without_digests'):
        assert is_spread(result[state]['seconds'])
        assert result[state].keys() == {'seconds', 'import_seconds', 'open_seconds', 'map', 'map_share', 'rest',
                                        'rest_own'}
        assert result[state]['rest']['median'] > result[state]['map']['median'] > 0
    assert is_decoding(result['decode'])
    assert result.keys() >= {'stream_mb', 'index_mb'}
    assert (tmp_path / 'published-token.data.bin.gz').exists()  # kept for the next time
    assert holds_the_codes(tmp_path)
    assert 'folder' not in result['asked']


def is_decoding(value):
    return value.keys() == {'seconds', 'codes_per_second', 'memory', 'memory_added'} and value['seconds']['min'] > 0 \
        and value['codes_per_second']['min'] > 0 and value['memory']['min'] > value['memory_added']['max'] >= 0


@pytest.mark.slow
def test_start_compact(capsys, tmp_path):
    """Without ranks only decoding is measured, into the cache of the compact set."""
    words = ['--images', '40', '--grid', '4', '--format', 'compact', '--repeats', '1', '--folder', str(tmp_path)]
    result = measure(capsys, benchmarks.start, 'start', *words, '--ranks')
    assert is_decoding(result['decode'])
    assert 'model_mb' in result and not any(key.startswith(('cold', 'warm')) for key in result)
    assert [path.name.partition('.')[0] for path in tmp_path.glob('*.codes-*.npy')] == ['compact-token']
    assert holds_the_codes(tmp_path)


def holds_the_codes(folder):
    """Whether the one map in a folder is what the set of either format was made from."""
    path, = folder.glob('*.codes-*.npy')
    return (np.load(path) == np.concatenate(list(benchmarks.common.make_codes(40, 4)))).all()


def test_the_peak_of_memory_is_seen():
    """Also of what is gone at the end."""
    size = 50_000_000
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with benchmarks.start.PeakMemory() as memory, mmap.mmap(-1, size, flags=private) as block:
        block.write(bytes(size))
        deadline = time.monotonic() + 60
        while memory.peak < memory.before + 45 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert memory.peak - memory.before > 45


def test_work_is_kept_on_some_cores():
    before = os.sched_getaffinity(0)
    with pytest.raises(KeyError), benchmarks.common.on_cores(1):
        assert len(os.sched_getaffinity(0)) == 1
        raise KeyError
    assert os.sched_getaffinity(0) == before


def test_neighbors_of_synthetic_codes_depend_on_each_other():
    """Else a context model would have nothing to learn, and no tables like those of a real set."""
    codes = np.concatenate(list(benchmarks.common.make_codes(1000, 16)))
    assert codes.shape == (1000, 256)
    assert 300 < len(np.unique(codes)) <= codes.max() + 1 <= benchmarks.common.CODES
    model = fit([codes], len(codes))
    share = bits(model, model.symbol_of()[codes].reshape(-1, 16, 16)) / codes.size
    assert share < entropy_bits(count_codes(codes, 391)) - 1
    assert min(map(len, model.tables)) >= 16


# ---------------------------------------------------------------- formats

SPEEDS = 'encode_codes_per_second', 'decode_codes_per_second'
PACKAGES = {'zstd -19': ('compression', 'zstandard'), 'brotli -11': ('brotli',)}
MISSING = [name for name, packages in PACKAGES.items() if not any(map(importlib.util.find_spec, packages))]


def test_formats(capsys):
    result = measure(capsys, benchmarks.formats, 'formats', '--images', '300', '--grid', '4', '--repeats', '2')
    assert (result['images'], result['grid']) == (300, 4)
    assert 0 < result['codes_used'] <= benchmarks.common.CODES
    assert len(result['groups']) == 2
    assert result['not_installed'] == MISSING
    names = set(benchmarks.formats.NAMES) - set(MISSING)
    assert result['bytes_an_image'].keys() == result['bits_a_code'].keys() == names
    for name, size in result['bytes_an_image'].items():
        total = size.pop('total')
        assert sum(size.values()) == pytest.approx(total, abs=0.01)
        assert result['bits_a_code'][name] == pytest.approx(total * 8 / 16, abs=0.01)
    for key in SPEEDS:
        assert result[key].keys() == names - {'brotli -11'}
        assert all(map(is_spread, result[key].values()))
    assert result['speed_images'] == 300
    assert result['bytes_an_image']['compact']['stream'] * 8 / 16 > result['model_bits']
    assert 'source_bytes_an_image' not in result


@pytest.mark.parametrize('name', ['published', 'compact'])
def test_bytes_are_those_of_the_files(capsys, tmp_path, name):
    """A set that is there, in either format, has the bytes that its files have; as shards, those of one set."""
    benchmarks.common.make_tokens(tmp_path, 60, 4, 10, name)
    tokens = benchmarks.common.token_file(tmp_path, name)
    benchmarks.common.make_images(tmp_path / 'images', 60, width=32, height=24)
    result = measure(capsys, benchmarks.formats, 'formats', '--repeats', '1', '--token-file', str(tokens),
                     '--data-path', str(tmp_path / 'images'))
    of_files = [path.stat().st_size for path in open_token_file(tokens).files]
    size = result['bytes_an_image'][name]
    assert (size['stream'] * 60, size['index or model'] * 60) == pytest.approx(of_files, abs=0.1)
    assert (size['manifest'] > 0) is (name == 'compact')  # a published set without a manifest needs none
    assert result['bytes_an_image']['compact']['manifest'] > 0
    source_bytes = sum(path.stat().st_size for path in (tmp_path / 'images').rglob('*.jpg'))
    assert result['source_bytes_an_image'] == pytest.approx(source_bytes / 60, abs=0.1)
    assert not {'token_file', 'data_path'} & result['asked'].keys()


def test_the_table_has_a_line_for_each_format(capsys, monkeypatch):
    monkeypatch.setattr(benchmarks.formats, 'import_first', lambda *_: None)
    args = benchmarks.formats.parse_args(['--images', '40', '--grid', '4', '--repeats', '1'])
    benchmarks.formats.main(args)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    assert len({line.count('|') for line in lines}) == 1
    first = [line.split(' | ')[0].strip('| ') for line in lines]
    assert first[2:7] == list(benchmarks.formats.NAMES)
    assert first[7] == 'entropy of single codes'
    assert first[8].startswith('context model alone, ')
    assert [line.split(' | ')[0].strip('| ') for line in lines if 'not installed' in line] == list(PACKAGES)


def test_codes_of_sixteen_bits(capsys, tmp_path):
    codes = np.random.default_rng(0).integers(600, size=(50, 16), dtype=np.uint16)
    codes[0, 0] = 599
    tokens = tmp_path / 'large-token.data.bin'
    manifest = {'format': 'compact', **write_model(tokens, 'compact', [codes], 50)}
    write_set(tokens, [codes], 50, manifest=manifest)
    result = measure(capsys, benchmarks.formats, 'formats', '--repeats', '1', '--token-file', str(tokens))
    assert result['bytes_an_image']['published']['manifest'] > 0  # which names the format
    assert result['codes_used'] == len(np.unique(codes))


def test_a_format_that_loses_codes_is_found(monkeypatch):
    def decompress(data):
        return data if data.startswith(b'\x93NUMPY') else data[:-1] + bytes([data[-1] ^ 1])

    monkeypatch.setattr(benchmarks.formats, 'find_compressors', lambda: {'xz -9': (bytes, decompress)})
    with pytest.raises(RuntimeError, match='xz -9: the codes are not those that were encoded'):
        benchmarks.formats.main(benchmarks.formats.parse_args(['--images', '20', '--grid', '2', '--repeats', '1']))


def test_images_that_are_not_those_of_the_tokens(tmp_path):
    benchmarks.common.make_tokens(tmp_path, 6, 4, 10)
    benchmarks.common.make_images(tmp_path / 'images', 5, width=32, height=24)
    args = benchmarks.formats.parse_args(['--token-file', str(benchmarks.common.token_file(tmp_path)),
                                          '--data-path', str(tmp_path / 'images')])
    with pytest.raises(InputError, match='has 5 images, but .* 6: give the images that the tokens were made from'):
        benchmarks.formats.main(args)


# ---------------------------------------------------------------- encode, evaluate

def test_encode(capsys):
    result = measure(capsys, benchmarks.encode, 'tokenize', '--device', 'cpu', '--tokenizer', 'patch', '--images', '6',
                     '--batch-size', '4', '--image-size', '32', '--num-workers', '0', '--repeats', '1')
    for key in ('tokenizer_images_per_second', 'with_decoding_images_per_second'):
        assert result[key].keys() == {'fp32', 'bf16'}
        assert all(map(is_spread, result[key].values()))


def test_a_tokenizer_that_is_there_is_timed_and_the_line_is_kept(capsys, tmp_path):
    tokenizer, codebook = benchmarks.common.make_tokenizer('small', torch.device('cpu'))
    torch.save(tokenizer.state_dict(), tmp_path / 'vit.pt')
    torch.save(codebook, tmp_path / 'codebook.ckpt')
    words = ['--device', 'cpu', '--tokenizer-path', str(tmp_path / 'vit.pt'), '--images', '3', '--batch-size', '2',
             '--image-size', '32', '--amp', 'off', '--num-workers', '0', '--repeats', '1', '--output',
             str(tmp_path / 'found.json')]
    result = measure(capsys, benchmarks.encode, 'tokenize', *words, '--codebook-path', str(tmp_path / 'codebook.ckpt'))
    assert json.loads((tmp_path / 'found.json').read_text()) == result
    assert not {'output', 'tokenizer_path', 'codebook_path'} & result['asked'].keys()
    with pytest.raises(InputError, match='give --tokenizer-path and --codebook-path together'):
        benchmarks.encode.parse_args(words)


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
    ('start', ['--format', 'gzip'], "argument --format: invalid choice: 'gzip'"),
    ('formats', ['--data-path', 'x'], '--data-path: give the tokens of these images to --token-file'),
    ('formats', ['--threads', '0'], '--threads: 0: give a value of 1 or more'),
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


@pytest.mark.slow
def test_each_is_a_program():
    """Started by its path from another folder, as the documents have it."""
    assert PROGRAMS == ['backbones', 'data', 'encode', 'evaluate', 'formats', 'masked_tokens', 'start', 'start_probe',
                        'train']
    done = subprocess.run([sys.executable, ROOT / 'benchmarks' / 'encode.py', '--images', '0'], capture_output=True,
                          text=True, cwd=ROOT / 'demo')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('error: argument --images: 0: give a value of 1 or more')
    assert done.stderr.count('\n') == 1
