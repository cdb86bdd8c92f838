"""The loss of an epoch, and steps that are not finite."""
import pytest
import torch

from training.loss_meter import LossMeter, NotFinite
from small_training import CPU, synthetic_batches, tiny_model, train


@pytest.mark.parametrize('flags', [[], ['--accum-iter', '2']])
def test_a_bad_step_changes_no_weight_and_is_reported_with_its_number(flags):
    good = list(synthetic_batches(4))
    before = []
    model = tiny_model()

    def augment(codes, generator):
        x = torch.randn(len(codes), 32, 8, 8, generator=generator)
        before.append({k: v.clone() for k, v in model.state_dict().items()})
        return x * torch.nan if len(before) == 3 else x
    with pytest.raises(NotFinite, match='the loss of step 2 of epoch 0') as error:
        train(good, 4, ['--cutmix', '0', *flags], model=model, augment=augment)
    assert error.value.exit_code == 3 and (error.value.epoch, error.value.step) == (0, 2)
    after = model.state_dict()
    assert all(torch.isfinite(v).all() for v in after.values())
    if not flags:
        assert all(torch.equal(before[2][k], before[3][k]) for k in after)  # step 2 left no trace
        assert not all(torch.equal(before[3][k], after[k]) for k in after)  # step 3 trained on


def test_a_gradient_that_is_not_finite_is_noticed():
    model = tiny_model()
    model.head.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(NotFinite, match='a gradient by step 1'):
        train(synthetic_batches(2), 2, model=model)


def test_skipping_goes_on_and_says_so(capsys):
    model = tiny_model()
    calls = []

    def explode_once(grad):
        calls.append(1)
        return grad * torch.inf if len(calls) == 1 else grad
    model.head.weight.register_hook(explode_once)
    state, result = train(synthetic_batches(2), 2, ['--on-nan', 'skip'], model=model)
    assert capsys.readouterr().out.count('warning: skipped: a gradient by step 1 of epoch 0 is not finite') == 1
    assert result is not None and state.scaler.get_scale() == 1.


def test_the_mean_is_over_finite_losses_and_resumes():
    meter = LossMeter(CPU)
    for step, loss in enumerate([1., 2., float('inf')]):
        meter.update(torch.tensor(loss), step)
    assert meter.read() == (1.5, 2)
    resumed = LossMeter(CPU, meter.gather())
    resumed.update(torch.tensor(6.), 3)
    assert resumed.read() == (3., None) and resumed.mean() == 3.
