"""One epoch of training and one evaluation."""
import contextlib
import math
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from utils import InputError, is_main, rank, say, seed_step, world_size

AMP_DTYPE = {'bf16': torch.bfloat16, 'fp16': torch.float16}
LOG_EVERY = 50  # steps between readings of the loss; in between, the host never waits for the device


def autocast(device, amp):
    """Automatic mixed precision: `amp` is 'bf16', 'fp16' or 'off'."""
    if amp == 'off':
        return contextlib.nullcontext()
    return torch.autocast(device.type, AMP_DTYPE[amp])


def sum_over_ranks(tensor):
    """Sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Progress:
    """A bar on a terminal, a plain line every LOG_EVERY steps elsewhere; rank 0 only."""

    def __init__(self, title, total):
        self.title, self.total, self.done = title, total, 0
        self.terminal = sys.stdout.isatty()
        self.bar = tqdm(total=total, desc=title, file=sys.stdout, leave=False,
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


def train_one_epoch(model, ema, optimizer, scaler, criterion, batches, steps, augment, mixup, generator, epoch, args,
                    device):
    """Train for `steps` batches of (codes (B, g, g) uint16, labels (B,) int64) on `device`.

    Args:
        model: the model, in DDP or bare; ema: timm's ModelEmaV3 of the bare model, or None.
        scaler: torch.amp.GradScaler, disabled unless fp16.
        augment: token_augment.TrainAugment; mixup: timm's Mixup or None; generator: torch.Generator on `device`.
        args: seed, amp, clip_grad, bce_loss of the command line.
    Returns {'loss': mean over steps and ranks, 'lr': of the last step}.
    Raises InputError when the loss stops being finite; weights are then useless and must not be saved.
    """
    model.train()
    bare = getattr(model, 'module', model)
    total = torch.zeros((), device=device)
    progress = Progress(f'epoch {epoch}', steps)
    for step, (codes, labels) in enumerate(batches):
        seed_step(args.seed, epoch, step, rank(), generator)
        x, targets = augment(codes, generator), labels
        if mixup:
            x, targets = mixup(x, labels)
        if args.bce_loss:
            targets = targets.gt(0).to(x.dtype)
        with autocast(device, args.amp):
            loss = criterion(model(x), targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        if ema:
            ema.update(bare)
        total += loss.detach()
        text = None
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            mean = total.item() / (step + 1)
            if not math.isfinite(mean):
                raise InputError(f'the loss became {mean} by step {step + 1} of epoch {epoch}: lower --lr, lengthen '
                                 '--warmup-epochs or set --clip-grad; the checkpoints on disk are from before')
            text = f'loss {mean:.4f} lr {optimizer.param_groups[0]["lr"]:.3g}'
        progress.step(text)
    progress.close()
    loss = sum_over_ranks(total / steps).item() / world_size()
    return {'loss': loss, 'lr': optimizer.param_groups[0]['lr']}


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
        sums += torch.stack([F.cross_entropy(logits, labels, reduction='sum'), top[:, 0].sum(), top.sum(),
                             torch.tensor(len(labels), device=device)]).double()
    if split:
        sum_over_ranks(sums)
    if not sums[3]:
        raise InputError('no image is left to evaluate')
    loss, acc1, acc5 = (sums[:3] / sums[3] * torch.tensor([1, 100, 100], device=device)).tolist()
    say(f'* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.4f}' + (f' ({name})' if name else ''))
    return {'loss': loss, 'acc1': acc1, 'acc5': acc5}
