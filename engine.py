"""The training loop and the evaluation, for every program here.

`train` goes through the epochs: it trains one, evaluates, writes a line of the log and saves. `train_one_epoch` goes
through its batches. Between two logging steps the host never waits for the device, so a loss that is not finite is
masked on the device at once, and noticed when the loss is read. What differs between programs they give as functions:

    order_of(epoch)                     (n,) int64, the images that this rank sees in an epoch, batch after batch
    batches_of(indices, epoch, start)   batches on the device of these images, the first one number `start` of the epoch
    loss_of(model, batch, generator)    a scalar tensor
    evaluate_of(model, name)            {'loss', 'acc1', 'acc5', ...}; `name` is '' or 'EMA'
"""
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import distribute_bn
from torch import nn

from samplers import in_order
from training.checkpoints import TrainState, load_weights, note_average
from training.loss_meter import LossMeter, Progress, check_finite
from training.preemption import AnyRank, StopSignal
from training.run_folder import RunFolder, RunLog, check_evaluation, write_evaluation
from utils import (InputError, autocast, barrier, device_of, device_of_sums, keep_freed_memory, plain_attention,
                   print0, rank, seed_step, sum_over_ranks, world_size)

LOG_EVERY = 50  # steps between readings of the loss; in between, the host never waits for the device


@dataclass(frozen=True)
class StepOptions:
    """How training steps are made.

    Attributes:
        steps: batches of an epoch on each rank, a multiple of accum_iter.
        batch_size: images of a batch on each rank.
        seed: of everything random.
        accum_iter: batches whose gradients make one step of the optimizer.
        clip_grad: largest gradient norm, or None.
        on_nan: 'stop' or 'skip', when a loss or gradient is NaN or infinite.
        vote_minutes: how long a rank waits for another.
    """
    steps: int
    batch_size: int = 1
    seed: int = 0
    accum_iter: int = 1
    clip_grad: float | None = None
    on_nan: str = 'stop'
    vote_minutes: float = 10


# ---------------------------------------------------------------- training

def train_one_epoch(state: TrainState, batches: Iterable, loss_of: Callable, options: StepOptions,
                    after_step: Callable | None = None) -> dict[str, float] | None:
    """Train from batch number `state.step` of an epoch to its end.

    Args:
        state: changed in place.
        batches: on the device; the first is number `state.step` of the epoch.
        after_step: called with the LossMeter after each optimizer step; True leaves the epoch there.

    Returns:
        {'loss': mean over batches and ranks, 'lr': of the last step}, or None when `after_step` left the epoch.

    Raises:
        NotFinite: when the loss or a gradient is NaN or infinite. Such a step changes no weight: it is masked on the
            device at once, and noticed when the loss is read, at the next logging step.
    """
    model = state.train_model
    model.train()
    device = device_of(state.model)
    meter = LossMeter(device, state.losses)
    generator = torch.Generator(device)
    progress = Progress(f'epoch {state.epoch}', options.steps, state.step)
    for step, batch in enumerate(batches, state.step):
        # every step draws from a seed of its own, so a resumed run need not know what was drawn before
        seed_step(options.seed, state.epoch, step, rank(), generator)
        if step % options.accum_iter == 0:
            state.scheduler.step_update(state.epoch * options.steps + step)  # schedules by epochs do nothing here
        update = (step + 1) % options.accum_iter == 0
        no_reduce = hasattr(model, 'no_sync') and not update  # gradients are summed over ranks once an optimizer step
        with model.no_sync() if no_reduce else contextlib.nullcontext():
            with autocast(device, state.amp):
                loss = loss_of(model, batch, generator)
            with plain_attention(device, state.amp):
                state.scaler.scale(loss / options.accum_iter).backward()
        meter.update(loss.detach(), step)
        if update:
            optimizer_step(state, options.clip_grad)
        state.step = step + 1
        text = None
        # with --accum-iter, the first update at or behind a multiple of LOG_EVERY
        if update and (state.step % LOG_EVERY < options.accum_iter or state.step == options.steps):
            mean = check_finite(meter, state, step, options.on_nan)
            text = f'loss {mean:.4f} lr {state.optimizer.param_groups[-1]["lr"]:.3g}'
        progress.step(text)
        if update and after_step and after_step(meter):
            progress.bar.close()
            return None
    progress.bar.close()
    return {'loss': meter.mean(), 'lr': state.optimizer.param_groups[-1]['lr']}


def optimizer_step(state: TrainState, clip_grad: float | None) -> None:
    """Clip, step, clear the gradients, and let the EMA follow; no line of it asks the device for a value.

    The scaler skips the step of a gradient that is not finite inside the optimizer's kernel. The EMA then takes the
    unchanged weights once more, so it needs no look at whether the step was made.
    """
    if clip_grad:  # the norm is that of the true gradients, not of those scaled for fp16
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if state.ema:
        state.ema.update(state.model)


def train(state: TrainState, order_of: Callable, batches_of: Callable, loss_of: Callable, evaluate_of: Callable | None,
          folder: RunFolder, log: RunLog, epochs: int, options: StepOptions, eval_freq: int = 1) -> bool:
    """Epochs from `state.epoch` on: schedule, train, evaluate, log, save.

    Args:
        state: changed in place.
        order_of, batches_of, loss_of, evaluate_of: see the module's docstring; evaluate_of may be None.
        epochs: in all, those before `state.epoch` too.
        eval_freq: epochs from one evaluation to the next; the last epoch has one.

    Returns:
        False when a signal stopped it, after saving.
    """
    any_rank = AnyRank(options.vote_minutes)
    with StopSignal() as stop:

        def after_step(meter: LossMeter) -> bool:
            stopping, due = any_rank(stop.received, folder.due(state, options.accum_iter))
            # behind the last step the epoch is saved anyway, after its evaluation
            if state.step == options.steps or not (stopping or due):
                return False
            # nothing is saved unchecked: a bad step may lie between the last logging step and this one
            check_finite(meter, state, state.step - 1, options.on_nan)
            state.losses = meter.gather()
            folder.save(state)
            return stopping

        while state.epoch < epochs:
            began = time.monotonic()
            first = state.step
            # As published: timm sets epoch 0's rate when the schedule is made, and the loop asked for it again after
            # that epoch. So the first two epochs have the warm-up value, and the schedule lags by one epoch.
            state.scheduler.step(max(state.epoch - 1, 0))
            indices = order_of(state.epoch)[first * options.batch_size:options.steps * options.batch_size]
            batches = batches_of(indices, state.epoch, first)
            stats = train_one_epoch(state, batches, loss_of, options, after_step)
            if stats is None:
                barrier()  # no rank may end while rank 0 still writes the checkpoint
                print0(f'stopped by a signal after step {state.step} of epoch {state.epoch}; {folder.advice()}')
                return False
            speed = (options.steps - first) * options.batch_size * world_size() / (time.monotonic() - began)
            stats = {f'train_{key}': value for key, value in stats.items()}
            if evaluate_of and ((state.epoch + 1) % eval_freq == 0 or state.epoch + 1 == epochs):
                stats |= evaluate_models(state, evaluate_of)
            finish_epoch(state, stats, folder, log, {'epoch_time': round(time.monotonic() - began, 2),
                                                     'images_per_second_time': round(speed, 1)})
    return True


def evaluate_models(state: TrainState, evaluate_of: Callable) -> dict[str, float]:
    """Evaluate the model, then the EMA where there is one; returns log entries test_* and ema_test_*."""
    def agreed(model: nn.Module) -> nn.Module:
        """The model with rank 0's BatchNorm statistics, which checkpoints hold; each rank has gathered others."""
        if world_size() > 1:
            distribute_bn(model, world_size())
        return model

    stats = {f'test_{key}': value for key, value in evaluate_of(agreed(state.model), '').items()}
    if state.ema:
        home = device_of(state.ema.module)  # the host, with --model-ema-force-cpu
        averaged = state.ema.module.to(device_of(state.model))
        stats |= {f'ema_test_{key}': value for key, value in evaluate_of(agreed(averaged), 'EMA').items()}
        state.ema.module.to(home)
    return stats


def finish_epoch(state: TrainState, stats: dict[str, float], folder: RunFolder, log: RunLog,
                 times: dict[str, float]) -> None:
    """Take over the best accuracies, step on to the next epoch, then log and save the one that ended."""
    improved = []
    for name, key in (('model', 'test_acc1'), ('ema', 'ema_test_acc1')):
        # an accuracy of 0 counts as the first best, so that every run that evaluates has a best checkpoint
        if key in stats and (stats[key] > state.best[name] or not state.best[name]):
            improved.append(name)
            state.best[name] = stats[key]
    epoch = state.epoch
    state.epoch += 1
    state.step = 0
    state.losses = None
    # the log line first: a run killed between the two repeats the epoch, and its line is dropped then
    log.write(**stats, epoch=epoch, n_parameters=sum(p.numel() for p in state.model.parameters()),
              best_acc1=state.best['model'], best_ema_acc1=state.best['ema'], **times)
    folder.save(state, improved, stats)
    best = [f', best {title}Acc@1 {state.best[name]:.3f}'
            for name, title, key in (('model', '', 'test_acc1'), ('ema', 'EMA ', 'ema_test_acc1')) if key in stats]
    print0(f'epoch {epoch}: {times["epoch_time"]:.1f} s' + ''.join(best))


# ---------------------------------------------------------------- evaluation

def rank_indices(n: int, distributed: bool) -> np.ndarray:
    """Which of n images this rank evaluates, (m,) int64: its part of them when `distributed`, else all."""
    return in_order(n, world_size(), rank()) if distributed else in_order(n, 1, 0)


def evaluate_checkpoint(model: nn.Module, checkpoint: dict[str, Any], path: str, ema: bool,
                        evaluate_of: Callable, output: str = '') -> None:
    """Evaluate the weights of a checkpoint, and with `ema` its averaged ones where it has them. Raises InputError.

    With `output`, the numbers are written to that JSON file, too: those of the averaged ones under 'ema'.
    """
    check_evaluation(output)
    keep_freed_memory(device_of(model))
    if not ema:
        note_average(checkpoint, path, '; --model-ema evaluates those, too')
    results = {}
    for key, name in (('model', ''), ('model_ema', 'EMA')):
        if name == '' or (ema and checkpoint.get(key)):
            load_weights(model, checkpoint[key], path)
            stats = evaluate_of(model, name)
            results |= {'ema': stats} if name else stats
    write_evaluation(output, results)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable, prepare: Callable, *, amp: str = 'off', distributed: bool = False,
             name: str = '', record: Callable | None = None) -> dict[str, float]:
    """Top-1, top-5 (%) and cross-entropy over all batches; prints `* Acc@1 … Acc@5 … loss …`.

    Args:
        model: bare; it is left in eval mode.
        batches: inputs (B, ...) and labels (B,) int64, on the model's device.
        prepare: inputs -> what the model reads, such as token_augment.EvalTransform.
        distributed: the ranks' batches are parts of one set, to be summed; otherwise each rank has the whole set.
        name: marks the printed line, as in `* Acc@1 … (EMA)`.
        record: called with each batch's logits (B, classes) float32 and labels (B,).

    Returns:
        {'loss', 'acc1', 'acc5'}, the same on all ranks.
    """
    model.eval()
    device = device_of(model)
    # float64, because float32 stops counting single images at 16.8 million; loss, top-1, top-5, images
    sums = torch.zeros(4, dtype=torch.float64, device=device_of_sums(device))
    for inputs, labels in batches:
        with autocast(device, amp):
            logits = model(prepare(inputs)).float()
        if record:
            record(logits, labels)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        counted = torch.stack([F.cross_entropy(logits, labels, reduction='sum'), top[:, 0].sum(), top.sum()])
        sums[:3] += counted.to(sums.device)
        sums[3] += len(labels)
    if distributed:
        sum_over_ranks(sums)
    if not sums[3]:
        raise InputError('no image is left to evaluate')
    loss, acc1, acc5 = (sums[:3] / sums[3] * torch.tensor([1, 100, 100], device=sums.device)).tolist()
    print0(f'* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.4f}' + (f' ({name})' if name else ''))
    return {'loss': loss, 'acc1': acc1, 'acc5': acc5}
