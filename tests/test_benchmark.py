"""The benchmarks at a tiny size: that they run and what their JSON line holds. No test here asserts a time."""
import json

import pytest
import torch

import benchmark
from utils import InputError

MODEL = ['--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2', '--input-size',
         '64', '--grid', '8', '--nb-classes', '10', '--device', 'cpu', '--batch-size', '4']
SPREAD = {'median', 'min', 'max'}


def measure(capsys, *words):
    """The JSON object on the last line that a sub-command prints."""
    benchmark.main(benchmark.parse_args([*words, '--threads', '2']))
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert lines and result['benchmark'] == words[0] and {'asked', 'hardware'} <= result.keys()
    assert {'cpu', 'cores', 'threads', 'gpu', 'torch', 'timm'} <= result['hardware'].keys()
    return result


def is_spread(value):
    return value.keys() == SPREAD and 0 < value['min'] <= value['median'] <= value['max']


def test_data(capsys):
    result = measure(capsys, 'data', '--device', 'cpu', '--grid', '16', '--batch-size', '8', '--batches', '2',
                     '--one-hot-images', '4', '--repeats', '2')
    assert is_spread(result['images_per_second']) and is_spread(result['one_hot_images_per_second'])
    assert is_spread(result['ratio'])
    assert result['crop_difference'] < 1e-4


def test_the_one_hot_implementation_has_the_same_statistics():
    """Mean square of the model input over a batch, noise and all, of either implementation."""
    from token_augment import TrainAugment
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 40, (64, 16, 16), generator=g).to(torch.uint16)
    synonyms = torch.randint(0, 40, (40, 5), generator=g), torch.full((40,), 5)
    augment = TrainAugment(torch.randn(40, 8, generator=g), synonyms, 16, 14, torch.device('cpu'))
    ours, plain = augment(codes, g), benchmark.OneHot(augment)(codes)
    assert ours.shape == plain.shape
    assert ours.square().mean().item() == pytest.approx(plain.square().mean().item(), rel=0.1)


def test_train(capsys):
    result = measure(capsys, 'train', *MODEL, '--steps', '2', '--repeats', '2')
    for key in ('images_per_second', 'constant_images_per_second', 'data_to_constant', 'ms_a_step',
                'flops_utilisation'):
        assert is_spread(result[key]), key
    assert result['matmul_peak_tflops'] > 0 and result['peak_memory_mb'] > 0
    assert result['asked']['model'] == 'deit_tiny_token_32'


def test_flops_of_vit_b_are_those_in_the_literature():
    import timm
    with torch.device('cpu'):
        model = timm.create_model('deit_base_token_32', num_classes=1000)
    assert benchmark.forward_flops(model, 28) / 1e9 == pytest.approx(35, abs=0.5)


def test_start(capsys, tmp_path):
    words = ['start', '--images', '40', '--grid', '4', '--ranks', '2', '--repeats', '1', '--folder', str(tmp_path)]
    result = measure(capsys, *words)
    for state in ('cold_2', 'warm_2'):
        assert is_spread(result[state]['seconds']) and result[state]['rest']['median'] > result[state]['map']['median']
    assert (tmp_path / 'set-token.data.bin.gz').exists()  # kept for the next time


def test_tokenize(capsys):
    result = measure(capsys, 'tokenize', '--device', 'cpu', '--tokenizer', 'patch', '--images', '6', '--batch-size',
                     '4', '--image-size', '32', '--num-workers', '0', '--repeats', '1')
    for key in ('tokenizer_images_per_second', 'with_decoding_images_per_second'):
        assert result[key].keys() == {'fp32', 'bf16'} and all(map(is_spread, result[key].values()))


def test_eval(capsys):
    result = measure(capsys, 'eval', *MODEL, '--tokenizer', 'patch', '--images', '12', '--image-workers', '0',
                     '--repeats', '1')
    assert is_spread(result['tokens_images_per_second']) and is_spread(result['images_images_per_second'])


@pytest.mark.parametrize('words, message', [
    (['data', '--repeats', '0'], '--repeats 0'),
    (['data', '--modle', 'x'], 'no flag is called --modle'),
    (['train', '--batch-size', '3'], 'odd'),
])
def test_mistakes_are_one_line(words, message):
    with pytest.raises(InputError, match=message):
        benchmark.parse_args(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
def test_cuda_where_there_is_none():
    with pytest.raises(InputError, match='no CUDA device'):
        benchmark.main(benchmark.parse_args(['data', '--device', 'cuda']))
