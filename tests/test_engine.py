"""The training loop: host synchronization, accumulation, compilation, golden steps, best accuracies."""
import numpy as np
import pytest
import timm
import torch
from timm.loss import SoftTargetCrossEntropy

import engine
import main_seit
import recipe
from engine import StepOptions
from small_training import CPU, CountWaits, synthetic_batches, tiny_model, train, whole_augment
from helpers import fill_golden
from training import loss_meter
from training.run_folder import RunFolder, RunLog
from utils import seed_step


# ---------------------------------------------------------------- golden steps

def test_four_training_steps_are_the_published_ones(golden):
    z = golden('train_steps.npz')
    seed = int(z['seed'])
    model = fill_golden(timm.create_model('deit_small_token_32', num_classes=10), seed)
    args = main_seit.parse_args(['--unscale-lr', '--lr', '1e-3', '--device', 'cpu', '--amp', 'off',
                                 '--model-ema-decay', '0.9', '--warmup-epochs', '0'])
    x = torch.from_numpy(np.random.default_rng(seed + 99).standard_normal((4, 4, 32, 28, 28)).astype(np.float32))
    targets = torch.from_numpy(z['targets'])
    state = recipe.make_state(args, model, CPU, (32, 28, 28), 1)
    criterion = SoftTargetCrossEntropy()
    losses = []

    def loss_of(model, batch, generator):
        loss = criterion(model(batch[0]), batch[1])
        losses.append(loss.item())
        return loss
    engine.train_one_epoch(state, zip(x, targets), loss_of, StepOptions(4))
    np.testing.assert_allclose(losses, z['losses'], atol=1e-4)
    with torch.no_grad():
        np.testing.assert_allclose(model.eval()(x[0]).numpy(), z['logits_after'], atol=1e-3)
        np.testing.assert_allclose(state.ema.module(x[0]).numpy(), z['ema_logits_after'], atol=1e-3)


# ---------------------------------------------------------------- the host does not wait


def test_the_host_waits_on_logging_steps_only(monkeypatch):
    monkeypatch.setattr(engine, 'LOG_EVERY', 3)
    reads, waits, counter = [], [], CountWaits()
    read = loss_meter.LossMeter.read
    monkeypatch.setattr(loss_meter.LossMeter, 'read',
                        lambda meter: reads.append(round(meter.count.item())) or read(meter))

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
def test_cuda_never_synchronizes_between_logging_steps(flags):
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
    (a, result_a), (b, result_b) = results
    assert result_a['loss'] == pytest.approx(result_b['loss'], abs=1e-5)
    for one, two in ((a.model, b.model), (a.ema.module, b.ema.module)):
        for key, value in one.state_dict().items():
            torch.testing.assert_close(value, two.state_dict()[key], atol=2e-5, rtol=1e-4)


def tiny_state(model):
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(v.shape, generator=g) * 0.02 + k.endswith('norm.weight')
            for k, v in model.state_dict().items()}


@pytest.mark.slow
def test_compiled_equals_eager():
    """The model and the crop under torch.compile, within rounding."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(4))
    except Exception as error:  # no C++ compiler here, say
        pytest.skip(f'torch.compile does not work here: {type(error).__name__}')
    model = tiny_model().eval()
    augment, crop = whole_augment(CPU)
    (codes, _), = synthetic_batches(1)

    def augmented():
        g = torch.Generator()
        seed_step(3, 0, 0, 0, g)
        return augment(codes, g)
    eager = augmented()
    crop.resample = torch.compile(crop.resample)
    compiled = augmented()
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(compiled), model(eager), atol=1e-4, rtol=0)
    torch.set_flush_denormal(False)  # what torch 2.5 compiles turns it on, for all tests to come


# ---------------------------------------------------------------- the loop over epochs

def small_run(folder, epochs, evaluate_of, flags=()):
    """engine.train on synthetic batches; returns (whether it finished, the state)."""
    args = main_seit.parse_args(['--no-model-ema', '--amp', 'off', '--epochs', str(epochs), *flags])
    state = recipe.make_state(args, tiny_model(), CPU, (32, 8, 8), 1)
    augment, _ = whole_augment(CPU)

    def loss_of(model, batch, generator):
        return torch.nn.functional.cross_entropy(model(augment(batch[0], generator)), batch[1])
    run_folder = RunFolder(folder, args.save_every)
    run_folder.begin({}, {'args': vars(args)})
    finished = engine.train(state, lambda epoch: np.arange(32),
                            lambda indices, epoch, start: list(synthetic_batches(4))[start:], loss_of, evaluate_of,
                            run_folder, RunLog(folder), epochs, StepOptions(4, 8))
    return finished, state


def test_a_best_checkpoint_is_kept_for_the_best_accuracy_and_for_a_first_zero(tmp_path):
    accuracies = iter([0., 30., 20.])
    finished, state = small_run(str(tmp_path), 3, lambda model, name: {'acc1': next(accuracies)})
    assert finished and state.best['model'] == 30. and state.epoch == 3
    assert torch.load(tmp_path / 'best_checkpoint.pth')['epoch'] == 1
    assert torch.load(tmp_path / 'checkpoint.pth')['epoch'] == 2
    finished, _ = small_run(str(tmp_path / 'zero'), 1, lambda model, name: {'acc1': 0.})
    assert (tmp_path / 'zero' / 'best_checkpoint.pth').exists()


def test_without_evaluation_and_without_a_folder(capsys):
    finished, state = small_run('', 1, None)
    assert finished and state.best == {'model': 0., 'ema': 0.}
    assert 'best' not in capsys.readouterr().out


def test_after_step_may_leave_an_epoch():
    state, result = train(synthetic_batches(8), 8, after_step=lambda meter: meter.count.item() == 3)
    assert result is None and state.step == 3


@pytest.mark.parametrize('n, distributed', [(7, False), (7, True)])
def test_own_share_alone_is_everything(n, distributed):
    assert engine.rank_indices(n, distributed).tolist() == list(range(n))


def test_evaluate_counts_by_hand(capsys):
    logits = torch.tensor([[3., 1, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]])
    labels = torch.tensor([0, 5, 6])
    model = torch.nn.Linear(1, 1)
    model.forward = lambda x: x
    recorded = []
    stats = engine.evaluate(model, [(logits[:2], labels[:2]), (logits[2:], labels[2:])], lambda x: x, name='EMA',
                            record=lambda *batch: recorded.append(batch))
    assert [[part.tolist() for part in parts] for parts in zip(*recorded)] == [
        [logits[:2].tolist(), logits[2:].tolist()], [[0, 5], [6]]]
    assert stats['acc1'] == pytest.approx(100 / 3) and stats['acc5'] == pytest.approx(200 / 3)
    assert stats['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    assert capsys.readouterr().out.startswith('* Acc@1 33.333 Acc@5 66.667 loss ')
