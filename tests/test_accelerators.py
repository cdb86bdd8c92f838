"""Other accelerators than CUDA: no float64 on them, no CUDA-only settings. None is here, so meta stands for one."""
import ast
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import engine
import recipe
import small_training
from continual.results import evaluate_seen
from continual.tasks import make_tasks
from helpers import fails
from image_tokenizer.vq_start import components_of, least_squares
from seitpp.models_mtm import MaskRatio, masks_of
from token_dataset import TokenDataset
from training.run_info import device_name
from utils import CPU, device_of_sums, uniform_float64

ROOT = Path(__file__).resolve().parent.parent
META = torch.device('meta')
# (file, function) of all that computes in float64: why it is not on an accelerator
FLOAT64 = {
    ('continual/results.py', 'evaluate_seen'): 'device_of_sums', ('engine.py', 'evaluate'): 'device_of_sums',
    ('image_tokenizer/kmeans.py', 'seed_rows'): 'device_of_sums',
    ('image_tokenizer/patch_fit.py', 'fit_pca'): 'on the CPU',
    ('image_tokenizer/vq_start.py', 'components_of'): 'device_of_sums',
    ('image_tokenizer/vq_start.py', 'least_squares'): 'device_of_sums',
    ('image_tokenizer/vq_training.py', 'evaluate_tokenizer'): 'device_of_sums',
    ('image_tokenizer/vq_training.py', 'perplexity'): 'of counts of evaluate_tokenizer',
    ('scripts/inspect_masked_tokens.py', 'main'): 'on the CPU', ('scripts/probe.py', 'accuracies'): 'on the CPU',
    ('seitpp/models_mtm.py', 'masks_of'): 'device_of_sums',
    ('seitpp/token_adapt_training.py', 'evaluate_token_adapt'): 'device_of_sums',
    ('token_augment.py', 'swap_table'): 'on the CPU', ('token_files/codebook.py', 'nearest_codes'): 'on the CPU',
    ('token_files/codebook_sources.py', 'deviation'): 'on the CPU',
    ('token_files/codebook_sources.py', 'fit_rows'): 'on the CPU',
    ('token_files/codebook_sources.py', 'unit_rows'): 'on the CPU',
    ('utils.py', 'uniform_float64'): 'device_of_sums'}


def uses_of_float64(tree):
    """The functions of a module that name torch's float64 or double."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and any(
                isinstance(node, ast.Attribute) and ast.unparse(node) in ('torch.float64', 'torch.double')
                or isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'double'
                for node in ast.walk(function)):
            yield function.name, ast.unparse(function)


def test_float64_is_computed_where_every_accelerator_can():
    found = {}
    for path in [*ROOT.glob('*.py'), *ROOT.glob('*/*.py')]:
        if path.parent.name not in ('tests', 'benchmarks', '.venv', 'tables'):
            name = path.relative_to(ROOT).as_posix()
            found |= {(name, function): text for function, text in uses_of_float64(ast.parse(path.read_text()))}
    assert sorted(found.keys() ^ FLOAT64.keys()) == []
    assert [key for key, why in FLOAT64.items() if why == 'device_of_sums' and why not in found[key]] == []


class Accelerator(TorchDispatchMode):
    """Lets meta be an accelerator without float64: a copy to the CPU gives any numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device == META and kwargs.get('device') == CPU:
            return torch.rand(args[0].shape).to(kwargs.get('dtype') or args[0].dtype)
        results = func(*args, **kwargs)
        for value in tree_flatten(results)[0]:
            if isinstance(value, torch.Tensor) and value.device == META and value.dtype == torch.float64:
                raise TypeError(f'{func}: float64 on an accelerator')
        return results


def test_the_accelerator_of_these_tests_has_no_float64():
    with Accelerator():
        assert torch.ones(2, device=META).cpu().double().dtype == torch.float64
        with pytest.raises(TypeError):
            torch.ones(2, device=META).double()


def test_evaluations_keep_sums_in_float64_on_the_host():
    model = torch.nn.Linear(6, 5).to(META)
    batches = [(torch.zeros(4, 6, device=META), torch.zeros(4, dtype=torch.int64, device=META))]
    with Accelerator():
        assert engine.evaluate(model, batches, lambda x: x).keys() == {'loss', 'acc1', 'acc5'}


def test_accuracies_of_tasks_are_counted_on_the_host():
    tasks = make_tasks(4, 2, 2, 0)
    model = torch.nn.Linear(6, 4).to(META)
    batches = [(torch.zeros(4, 6, device=META), torch.zeros(4, dtype=torch.int64, device=META))]
    with Accelerator():
        stats = evaluate_seen(model, tasks, 1, np.array([0, 1, 2, 3]), batches, prepare=lambda x: x)
    assert len(stats['task_acc1']) == 2


def test_fits_by_least_squares_are_made_on_the_host():
    with Accelerator():
        x = torch.zeros(9, 3, device=META)
        assert least_squares([(x, x)]).device == META
        pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=META)
        assert components_of([pixels], 4, 5)(torch.zeros(7, 48, device=META)).device == META


def test_masks_need_no_float64_on_the_device():
    with Accelerator():
        masks = masks_of(torch.zeros(2, 16, device=META), torch.tensor(0.5, dtype=torch.float64), 0.25)
    assert masks.seen.shape == (2, 12) and masks.masked.device == META


def test_float64_numbers_are_drawn_on_the_device_where_it_has_them():
    first, second = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert torch.equal(uniform_float64((4,), first), torch.rand(4, dtype=torch.float64, generator=second))
    assert device_of_sums(CPU) == CPU and device_of_sums(torch.device('mps', 0)) == CPU
    assert device_of_sums(torch.device('cuda', 1)) == torch.device('cuda', 1)
    # as on a device without: from float32
    drawn = types.SimpleNamespace(device=META)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'rand', lambda shape, generator, device: torch.full(shape, 0.25))  # float32
        ratio = MaskRatio().draw(drawn)
        assert ratio.dtype == torch.float64 and ratio.device == CPU


def test_fused_optimizers_are_left_to_cpu_and_cuda():
    args = small_training.parse_args([])
    model = torch.nn.Linear(2, 2)
    assert recipe.make_optimizer(args, model).defaults['fused']
    assert not recipe.make_optimizer(args, model.to(META)).defaults['fused']
    assert device_name(META) == 'meta' and device_name(CPU).startswith('CPU')


def test_batches_for_other_accelerators_are_not_pinned_and_are_int32(monkeypatch):
    data = object.__new__(TokenDataset)
    data.images = None
    data.codes, data.labels = np.zeros((5, 4), np.uint16), np.zeros(5, np.int64)
    data.grid_size, data.resident = 2, None
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda *_: fails(lambda: None, 'pinned'))
    batches = list(data.batches(np.arange(5), 3, META, pin_memory=True))
    assert [tuple(codes.shape) for codes, _ in batches] == [(3, 2, 2), (2, 2, 2)]
    assert all(codes.dtype == torch.int32 and labels.device == META for codes, labels in batches)
