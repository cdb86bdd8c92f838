"""One epoch of training and one evaluation."""
import contextlib
import math
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from samplers import in_order
from utils import InputError, is_main, rank, say, seed_step, world_size

AMP_DTYPE = {'bf16': torch.bfloat16, 'fp16': torch.float16}
LOG_EVERY = 50  # steps between readings of the loss; in between, the host never waits for the device


def autocast(device, amp):
    """Automatic mixed precision: `amp` is 'bf16', 'fp16' or 'off'."""
    if amp == 'off':
        return contextlib.nullcontext()
    return torch.autocast(device.type, AMP_DTYPE[amp])


def default_amp(device_type):
    """The published precision: 'fp16' on 'cuda', 'off' elsewhere."""
    return 'fp16' if device_type == 'cuda' else 'off'


def own_share(n, split):
    """Indices (m,) int64 of the images, of n, that this rank evaluates: its share with `split`, else all."""
    return in_order(n, world_size(), rank()) if split else in_order(n, 1, 0)


def sum_over_ranks(tensor):
    """Sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Progress:
    """A bar on a terminal, a plain line every LOG_EVERY steps elsewhere; rank 0 only."""

    def __init__(self, title, total, done=0):
        self.title, self.total, self.done = title, total, done
        self.terminal = sys.stdout.isatty()
        self.bar = tqdm(total=total, initial=done, desc=title, file=sys.stdout, leave=False,
                        disable=not (is_main() and self.terminal))

    def step(self, text=None):
        """Count a step; `text` is shown, and its steps are those on which the caller read the device."""
        self.done += 1
        self.bar.update()
        if text and self.terminal:
            self.bar.set_postfix_str(text)
        elif text:
            say(f'{self.title} [{self.done}/{self.total}] {text}')

    def close(self):
        self.bar.close()


def make_scaler(device, amp):
    """Gradient scaler: fp16's dynamic one, else one of constant scale 1.

    Either skips, on the device, the step of a gradient that is not finite; with a fused optimiser the host never waits.
    """
    if amp == 'fp16':
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1., growth_interval=1 << 30)


class LossMeter:
    """Sum and number of the finite losses, and the first step whose loss was not finite, all kept on the device.

    Args: state: of an earlier meter's `gather`, to go on from.
    """

    def __init__(self, device, state=None):
        self.total, self.count = torch.zeros(2) if state is None else state[rank()].clone()
        self.total, self.count = self.total.to(device), self.count.to(device)
        self.first_bad = torch.tensor(torch.inf, device=device)

    def gather(self):
        """(ranks, 2): sum and number of all ranks, on the CPU. Collective."""
        own = torch.stack([self.total, self.count])
        rows = [torch.empty_like(own) for _ in range(world_size())]
        if dist.is_initialized():
            dist.all_gather(rows, own)
        else:
            rows = [own]
        return torch.stack(rows).cpu()

    def update(self, loss, step):
        finite = loss.isfinite()
        self.total += torch.where(finite, loss, 0)
        self.count += finite
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=step))

    def read(self):
        """(this rank's mean loss, the first bad step on any rank or None): the host waits for the device."""
        bad = self.first_bad.clone()
        if dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MIN)
        total, count, bad = torch.stack([self.total, self.count, bad]).tolist()
        return total / max(count, 1), None if math.isinf(bad) else int(bad)


class NotFinite(InputError):
    """The loss or a gradient left the finite numbers. `step`: which of the epoch (for a gradient: at the latest)."""

    def __init__(self, what, epoch, step):
        super().__init__(f'{what} {step} of epoch {epoch} is not finite: lower --lr, lengthen --warmup-epochs or set '
                         '--clip-grad (or --on-nan skip); the checkpoints on disk are from before')
        self.step = step


def check_finite(meter, scaler, args, epoch, step):
    """Mean loss so far; with --on-nan stop, NotFinite for a loss or gradient that is not finite. Collective.

    With --on-nan skip a line says so instead; the step has changed no weight in either case.
    """
    mean, bad = meter.read()
    # a constant scale only ever shrinks, and only for a gradient that is not finite; fp16's does so all the time
    shrunk = args.amp != 'fp16' and scaler.get_scale() < 1
    if bad is None and not shrunk:
        return mean
    error = NotFinite('a gradient by step', epoch, step) if bad is None else NotFinite('the loss of step', epoch, bad)
    if args.on_nan == 'stop':
        raise error
    say(f'warning: skipped: {str(error).partition(":")[0]}')
    meter.first_bad.fill_(torch.inf)
    if shrunk:
        scaler.update(1.)
    return mean


def train_one_epoch(model, ema, optimizer, scaler, criterion, batches, steps, augment, mixup, generator, epoch, args,
                    device, start=0, meter=None, after_step=None):
    """Train on batches of (codes (B, g, g) uint16, labels (B,) int64) on `device`, numbered from `start` to `steps`.

    Args:
        model: the model, in DDP or bare, compiled or not; ema: timm's ModelEmaV3 of the bare model, or None.
        scaler: of `make_scaler`.
        augment: token_augment.TrainAugment; mixup: timm's Mixup or None; generator: torch.Generator on `device`.
        args: seed, amp, clip_grad, bce_loss, accum_iter, on_nan of the command line.
        meter: the LossMeter of an epoch that goes on; after_step: called with the number of batches done, after each
            step of the optimiser.
    The optimiser steps once every accum_iter batches; `start` and `steps` are multiples of it.
    Returns {'loss': mean over batches and ranks, 'lr': of the last step}.
    Raises NotFinite when the loss or a gradient stops being finite. Such a step changes no weight: it is masked on the
    device at once, and noticed when the loss is read, at the next logging step.
    """
    model.train()
    meter = meter or LossMeter(device)
    progress = Progress(f'epoch {epoch}', steps, start)
    for step, (codes, labels) in enumerate(batches, start):
        seed_step(args.seed, epoch, step, rank(), generator)
        x, targets = augment(codes, generator), labels
        if mixup:
            x, targets = mixup(x, labels)
        if args.bce_loss:
            targets = targets.gt(0).to(x.dtype)
        update = (step + 1) % args.accum_iter == 0
        waits = hasattr(model, 'no_sync') and not update  # DDP need not share what is only accumulated
        with model.no_sync() if waits else contextlib.nullcontext():
            with autocast(device, args.amp):
                loss = criterion(model(x), targets)
            scaler.scale(loss / args.accum_iter).backward()
        meter.update(loss.detach(), step)
        if update:
            optimizer_step(model, ema, optimizer, scaler, args.clip_grad)
        text = None
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            mean = check_finite(meter, scaler, args, epoch, step)
            text = f'loss {mean:.4f} lr {optimizer.param_groups[0]["lr"]:.3g}'
        progress.step(text)
        if update and after_step:
            after_step(step + 1)
    progress.close()
    loss = sum_over_ranks(meter.total / meter.count.clamp(min=1)).item() / world_size()
    return {'loss': loss, 'lr': optimizer.param_groups[0]['lr']}


def optimizer_step(model, ema, optimizer, scaler, clip_grad):
    """Clip, step, clear the gradients, and let the EMA follow."""
    if clip_grad:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if ema:
        ema.update(bare(model))


def bare(model):
    """The model inside DDP and torch.compile."""
    model = getattr(model, 'module', model)
    return getattr(model, '_orig_mod', model)


@torch.no_grad()
def evaluate(model, batches, transform, device, amp='off', split=False, name='', record=None):
    """Top-1, top-5 (%) and cross-entropy over all batches; prints `* Acc@1 … Acc@5 … loss …`.

    Args:
        model: bare, on `device`; it is left in eval mode.
        batches: yields codes (B, g, g) integers and labels (B,) int64, on `device`.
        transform: token_augment.EvalTransform.
        split: the ranks' batches are shares of one set, to be summed; otherwise each rank has the whole of it.
        name: marks the printed line, as in `* Acc@1 … (EMA)`.
        record: called with each batch's logits (B, classes) float32.
    Returns {'loss', 'acc1', 'acc5'}, floats, the same on all ranks.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    for codes, labels in batches:
        with autocast(device, amp):
            logits = model(transform(codes)).float()
        if record:
            record(logits)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        sums[:3] += torch.stack([F.cross_entropy(logits, labels, reduction='sum'), top[:, 0].sum(), top.sum()])
        sums[3] += len(labels)
    if split:
        sum_over_ranks(sums)
    if not sums[3]:
        raise InputError('no image is left to evaluate')
    loss, acc1, acc5 = (sums[:3] / sums[3] * torch.tensor([1, 100, 100], device=device)).tolist()
    say(f'* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.4f}' + (f' ({name})' if name else ''))
    return {'loss': loss, 'acc1': acc1, 'acc5': acc5}
