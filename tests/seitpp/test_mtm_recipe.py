"""The schedule of masked-token training against the published learning rates."""
import pytest
import torch

from seitpp.mtm_recipe import StepCosine


def schedule(lr, epochs, warmup_epochs, min_lr, batches, steps=None, scales=(1.,)):
    groups = [{'params': [torch.nn.Parameter(torch.zeros(1))], 'lr_scale': scale} for scale in scales]
    optimizer = torch.optim.AdamW(groups, lr)
    return optimizer, StepCosine(optimizer, epochs, warmup_epochs, min_lr, batches, steps or batches)


@pytest.mark.parametrize('name', ['pretrain README', 'finetune README', 'finetune defaults'])
def test_learning_rates_are_the_published_ones(golden, name):
    expected = golden('seitpp/lr_schedule.json')[name]
    batches = 2502 if name == 'finetune defaults' else 1251  # of ImageNet's epoch, 64 or 128 images on each of 8 GPUs
    optimizer, scheduler = schedule(expected['lr'], expected['epochs'], expected['warmup_epochs'], expected['min_lr'],
                                    batches, scales=expected.get('scales', [1.]))
    for epoch, lr in expected['points']:
        scheduler.step_update(epoch * batches)  # the points lie between batches too
        assert [group['lr'] for group in optimizer.param_groups] == pytest.approx(
            lr if isinstance(lr, list) else [lr], abs=1e-12), epoch


def test_batches_that_make_no_whole_step_count_for_the_time():
    """1251 batches are 312 steps of 4, and 3 batches that are left out: the next epoch still begins at 1."""
    _, whole = schedule(1., 10, 5, 0., 1251)
    optimizer, used = schedule(1., 10, 5, 0., 1251, 1248)
    for epoch, batch in ((0, 4), (0, 1244), (1, 0), (3, 400), (7, 1000)):
        used.step_update(epoch * 1248 + batch)
        lr = optimizer.param_groups[0]['lr']
        whole.step_update(epoch * 1251 + batch)
        assert lr == whole.optimizer.param_groups[0]['lr']
    used.step(3)  # what the engine calls at the start of an epoch changes nothing
    assert optimizer.param_groups[0]['lr'] == lr


@pytest.mark.parametrize('epochs, warmup', [(2, 40), (5, 5), (6, 5), (3, 0)])
def test_short_runs(epochs, warmup, caplog):
    optimizer, scheduler = schedule(1., epochs, warmup, 0.1, 1)
    for epoch in range(epochs):
        scheduler.step_update(epoch)
        lr = optimizer.param_groups[0]['lr']
        assert lr == pytest.approx(epoch / warmup if epoch < warmup else lr) and 0 <= lr <= 1
    assert not caplog.records  # timm warns of a cosine of one step
