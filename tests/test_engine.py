"""The training loop: host synchronisation, bad steps, accumulation, compilation."""
import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import main_seit
from token_augment import TrainAugment
from utils import InputError, seed_step

CPU = torch.device('cpu')
WAITS = ('aten._local_scalar_dense', 'aten.nonzero', 'aten.masked_select', 'aten.is_nonzero', 'aten.equal')


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return timm.create_model('deit_tiny_token_32', depth=2, embed_dim=32, num_heads=2, num_classes=5, img_size=8,
                             drop_path_rate=0.2)


def synthetic_batches(count, size=8, device=CPU):
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        codes = torch.randint(0, 20, (size, 10, 10), generator=g).to(torch.uint16)
        yield codes.to(device), torch.randint(0, 5, (size,), generator=g).to(device)


def train(batches, steps, flags=(), device=CPU, model=None, augment=None):
    """Run the real loop with everything on; returns (model, ema, result)."""
    args = main_seit.parse_args(['--lr', '1e-3', '--clip-grad', '1', '--amp', 'off', *flags])
    model = (model or tiny_model()).to(device)
    ema = ModelEmaV3(model, decay=0.9)
    codebook = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    synonyms = torch.randint(0, 20, (20, 5)), torch.full((20,), 5)
    augment = augment or TrainAugment(codebook, synonyms, 10, 8, device, erase_prob=0.2)
    optimizer = main_seit.make_optimizer(args, model)
    mixup, criterion = main_seit.make_loss(args, 5)
    scaler = engine.make_scaler(device, args.amp)
    result = engine.train_one_epoch(model, ema, optimizer, scaler, criterion, batches, steps, augment,
                                    mixup, torch.Generator(device), 0, args, device)
    return model, ema, result


# ---------------------------------------------------------------- the host does not wait

class CountWaits(TorchDispatchMode):
    """Counts the operations for which the host would wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(WAITS)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_on_logging_steps_only(monkeypatch):
    monkeypatch.setattr(engine, 'LOG_EVERY', 3)
    reads, waits, counter = [], [], CountWaits()
    read = engine.LossMeter.read
    monkeypatch.setattr(engine.LossMeter, 'read', lambda meter: reads.append(round(meter.count.item())) or read(meter))

    def watched():
        for batch in synthetic_batches(8):
            waits.append(counter.count)  # so far, before each step
            yield batch
    with counter:
        train(watched(), 8)
    assert reads == [3, 6, 8]
    per_step = np.diff(waits)
    assert [step + 1 for step, count in enumerate(per_step) if count] == [3, 6], per_step


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('flags', [['--amp', 'off'], ['--amp', 'fp16'], ['--amp', 'bf16', '--accum-iter', '2']])
def test_cuda_never_synchronises_between_logging_steps(flags):
    device = torch.device('cuda')
    ready = list(synthetic_batches(12, device=device))

    def watched():
        for step, batch in enumerate(ready):
            torch.cuda.set_sync_debug_mode('error' if step > 1 else 'default')
            yield batch
        torch.cuda.set_sync_debug_mode('default')
    try:
        train(watched(), 100, flags, device)  # never reaches a logging step
    finally:
        torch.cuda.set_sync_debug_mode('default')


# ---------------------------------------------------------------- bad steps

@pytest.mark.parametrize('flags', [[], ['--accum-iter', '2']])
def test_a_bad_step_changes_no_weight_and_is_reported_with_its_number(flags):
    good = list(synthetic_batches(4))
    before = []
    model = tiny_model()

    def augment(codes, generator):
        x = torch.randn(len(codes), 32, 8, 8, generator=generator)
        before.append({k: v.clone() for k, v in model.state_dict().items()})
        return x * torch.nan if len(before) == 3 else x
    with pytest.raises(InputError, match='the loss of step 2 of epoch 0'):
        train(good, 4, ['--cutmix', '0', *flags], model=model, augment=augment)
    after = model.state_dict()
    assert all(torch.isfinite(v).all() for v in after.values())
    if not flags:
        assert all(torch.equal(before[2][k], before[3][k]) for k in after)  # step 2 left no trace
        assert not all(torch.equal(before[3][k], after[k]) for k in after)  # step 3 trained on


def test_a_gradient_that_is_not_finite_is_noticed():
    model = tiny_model()
    model.head.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(InputError, match='a gradient by step 1'):
        train(synthetic_batches(2), 2, model=model)


# ---------------------------------------------------------------- same results

def test_accumulation_equals_a_large_batch():
    x, y = torch.randn(16, 32, 8, 8), torch.randint(0, 5, (16,))
    results = []
    for pieces in (1, 4):
        model = timm.create_model('deit_tiny_token_32', depth=1, embed_dim=32, num_heads=2, num_classes=5, img_size=8)
        model.load_state_dict(tiny_state(model))
        batches = list(zip(x.chunk(pieces), y.chunk(pieces))) * 2
        flags = ['--cutmix', '0', '--accum-iter', str(pieces)]
        results.append(train(batches, len(batches), flags, model=model, augment=lambda codes, generator: codes))
    (a, ema_a, r_a), (b, ema_b, r_b) = results
    assert r_a['loss'] == pytest.approx(r_b['loss'], abs=1e-5)
    for one, two in ((a, b), (ema_a.module, ema_b.module)):
        for key, value in one.state_dict().items():
            torch.testing.assert_close(value, two.state_dict()[key], atol=2e-5, rtol=1e-4)


def tiny_state(model):
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(v.shape, generator=g) * 0.02 + k.endswith('norm.weight')
            for k, v in model.state_dict().items()}


def test_compiled_equals_eager():
    """The model and the crop under torch.compile, within rounding."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(4))
    except Exception as error:  # no C++ compiler here, say
        pytest.skip(f'torch.compile does not work here: {type(error).__name__}')
    model = tiny_model().eval()
    augment = TrainAugment(torch.randn(20, 32), None, 10, 8, CPU, rc_prob=0)
    (codes, _), = synthetic_batches(1)

    def augmented():
        g = torch.Generator()
        seed_step(3, 0, 0, 0, g)
        return augment(codes, g)
    eager = augmented()
    augment.crop = torch.compile(augment.crop)
    compiled = augmented()
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(compiled), model(eager), atol=1e-4, rtol=0)
    torch.set_flush_denormal(False)  # what torch 2.5 compiles turns it on, for all tests to come


def test_bare_model():
    model = torch.nn.Linear(2, 2)
    assert engine.bare(model) is model
    assert engine.bare(torch.compile(model)) is model
