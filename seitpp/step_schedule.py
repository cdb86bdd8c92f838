"""The learning rate of masked-token training: a line from 0, then a cosine, set for each step (MAE's schedule)."""
from timm.scheduler import CosineLRScheduler
from torch.optim import Optimizer


class StepCosine(CosineLRScheduler):
    """timm's cosine, as a function of the epoch with its fraction, epoch + batch / batches.

    The engine counts the batches that make whole steps; the published program divides by all batches of an epoch.

    Args:
        optimizer: its groups may have an `lr_scale`.
        epochs: in all, the warm-up's too.
        warmup_epochs: from 0 to the optimizer's learning rate.
        min_lr: at the end.
        batches: in an epoch.
        steps: of these, the ones that are used: what `step_update` counts.
    """

    def __init__(self, optimizer: Optimizer, epochs: int, warmup_epochs: int, min_lr: float, batches: int, steps: int):
        cosine = (epochs - warmup_epochs) * batches
        super().__init__(optimizer, max(cosine, 2), min_lr, warmup_t=warmup_epochs * batches, warmup_prefix=True,
                         t_in_epochs=False)
        self.batches = batches
        self.steps = steps

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        epoch, batch = divmod(num_updates, self.steps)
        super().step_update(epoch * self.batches + batch, metric)
