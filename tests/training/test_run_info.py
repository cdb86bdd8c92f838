"""Derived numbers."""
import pytest
import timm
import torch

from training.run_info import print_batch, print_model, print_recipe_batch


@pytest.mark.parametrize('batch_size, accum_iter, unscaled, words', [
    (64, 1, False, 'for an effective batch of 1024'), (1024, 1, False, None), (512, 1, False, 'this is 512'),
    (256, 4, False, None), (64, 1, True, 'is as given')])
def test_another_effective_batch_than_the_recipes_is_named(batch_size, accum_iter, unscaled, words, capsys):
    print_batch(batch_size, accum_iter, 100, 300, 1e-3)
    print_recipe_batch(batch_size * accum_iter, unscaled)
    output = capsys.readouterr().out
    assert f'= {batch_size * accum_iter}, {100 // accum_iter} steps an epoch' in output
    assert ('note: ' in output) == bool(words) and (words or '') in output


def test_print_model(capsys):
    model = timm.create_model('deit_tiny_token_32', num_classes=7)
    print_model('deit_tiny_token_32', model, torch.device('cpu'), 'off')
    output = capsys.readouterr().out
    assert 'M parameters, 7 classes' in output and 'amp off' in output and torch.__version__ in output


@pytest.mark.parametrize('capability, amp, noted', [('AVX2', 'bf16', True), ('AVX2', 'off', False),
                                                    ('AVX512', 'bf16', False), ('DEFAULT', 'bf16', False)])
def test_half_precision_that_the_cpu_has_no_instructions_for_is_noted(monkeypatch, capsys, capability, amp, noted):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    print_model('a', torch.nn.Linear(2, 3), torch.device('cpu'), amp)
    assert ('no AVX-512' in capsys.readouterr().out) == noted
