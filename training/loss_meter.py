"""The loss of an epoch without waiting for the device: its mean, bad steps, and what is shown of it.

Asking a GPU for a loss makes the host wait until all work before it is done. So `LossMeter` adds losses up on the
device, and remembers there which step was the first bad one; `check_finite` reads both at logging steps.
"""
import math
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from training.checkpoints import TrainState
from utils import InputError, is_main, print0, rank, world_size


class NotFinite(InputError):
    """Loss or gradient is NaN or infinite, at `step` of the epoch; a gradient at the latest, since the last reading."""
    exit_code = 3

    def __init__(self, what: str, epoch: int, step: int, lr: float):
        super().__init__(f'{what} {step} of epoch {epoch} is not finite: lower --lr, lengthen --warmup-epochs or set '
                         '--clip-grad (or --on-nan skip); the checkpoints on disk are from before')
        self.epoch = epoch
        self.step = step
        self.lr = lr


class LossMeter:
    """Sum and number of the finite losses, and the first step whose loss was not finite, all kept on the device.

    Args:
        device: where the losses are.
        losses: (ranks, 2) of an earlier meter's `gather`, to resume from.
    """

    def __init__(self, device: torch.device, losses: torch.Tensor | None = None):
        sums = torch.zeros(2) if losses is None else losses[rank()]
        self.total, self.count = sums.clone().to(device)
        self.first_bad = torch.tensor(torch.inf, device=device)

    def update(self, loss: torch.Tensor, step: int) -> None:
        """Add the loss () of a step."""
        finite = loss.isfinite()
        self.total += torch.where(finite, loss, 0)
        self.count += finite
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=step))  # steps only rise

    def read(self) -> tuple[float, int | None]:
        """(this rank's mean loss, the first bad step on any rank or None): the host waits for the device."""
        # ranks must agree that a step was bad, or one would stop while the others wait for its gradients
        bad = self.first_bad.clone()
        if dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MIN)
        total, count, bad = torch.stack([self.total, self.count, bad]).tolist()
        return total / max(count, 1), None if math.isinf(bad) else int(bad)

    def gather(self) -> torch.Tensor:
        """(ranks, 2): sum and number of all ranks, on the CPU. Collective."""
        sums = torch.stack([self.total, self.count])
        rows = [torch.empty_like(sums) for _ in range(world_size())]
        if dist.is_initialized():
            dist.all_gather(rows, sums)
        else:
            rows = [sums]
        return torch.stack(rows).cpu()

    def mean(self) -> float:
        """Mean loss over batches and ranks. Collective."""
        rows = self.gather()
        return float((rows[:, 0] / rows[:, 1].clamp(min=1)).mean())


def check_finite(meter: LossMeter, state: TrainState, step: int, on_nan: str) -> float:
    """Mean loss so far; NotFinite where a loss or gradient was NaN or infinite. Collective.

    With `on_nan` 'skip' a line says so instead; the step has changed no weight in either case.
    """
    mean, bad = meter.read()
    # The constant scale, 1, only shrinks at a gradient that is not finite (recipe.make_scaler). fp16's begins at 65,536
    # and shrinks in ordinary training; below 1 no scale is left that would help.
    shrunk = state.scaler.get_scale() < 1
    if bad is None and not shrunk:
        return mean
    what, at = ('a gradient by step', step) if bad is None else ('the loss of step', bad)
    if on_nan == 'stop':
        raise NotFinite(what, state.epoch, at, state.optimizer.param_groups[-1]['lr'])
    print0(f'warning: skipped: {what} {at} of epoch {state.epoch} is not finite')
    meter.first_bad.fill_(torch.inf)  # the next reading shall report the next bad step
    if shrunk and state.amp != 'fp16':
        state.scaler.update(1.)
    return mean


class Progress:
    """A bar on a terminal, a plain line every LOG_EVERY steps elsewhere; rank 0 only."""

    def __init__(self, title: str, total: int, done: int = 0):
        self.title = title
        self.total = total
        self.done = done
        self.terminal = sys.stdout.isatty()
        self.bar = tqdm(total=total, initial=done, desc=title, file=sys.stdout, leave=False,
                        disable=not (is_main() and self.terminal))

    def step(self, text: str | None = None) -> None:
        """Count a step and show `text`."""
        self.done += 1
        self.bar.update()
        if text and self.terminal:
            self.bar.set_postfix_str(text)
        elif text:
            print0(f'{self.title} [{self.done}/{self.total}] {text}')
