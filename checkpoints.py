"""The state of a run, resuming it exactly, and starting from other weights."""
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.utils import ModelEmaV3
from torch import nn

from safe_load import load_torch
from utils import InputError, print0, world_size

# With another value of any of these, a resumed run has other batches or other augmentation.
EXACT = ('world_size', 'batch_size', 'accum_iter', 'seed', 'repeated_aug')
THIS_START = {'resume', 'eval', 'allow_inexact_resume', 'output_dir', 'world_size'}  # flags of a start, not of the run
WRAPPERS = ('module.', '_orig_mod.')  # what DDP and torch.compile put before the names of weights


@dataclass
class TrainState:
    """All that a run needs to resume. Random state is not among it: it is a function of (seed, epoch, step, rank).

    Attributes:
        model: bare: saved, averaged, evaluated.
        train_model: the same weights as the loop calls them: compiled, in DDP.
        optimizer, scheduler: timm's.
        scaler: of gradients; skips a step that is not finite, on the device.
        ema: timm's ModelEmaV3 of the model, or None.
        amp: 'bf16', 'fp16' or 'off'.
        epoch: the one in progress, or next.
        step: batches done in it, per rank.
        losses: (ranks, 2) sum and number of the losses so far in it (loss_meter.LossMeter), None at its start.
        best: top-1 (%) of the model and of the EMA.
    """
    model: nn.Module
    train_model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    amp: str = 'off'
    epoch: int = 0
    step: int = 0
    losses: torch.Tensor | None = None
    best: dict[str, float] = field(default_factory=lambda: {'model': 0., 'ema': 0.})

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint, in plain types: the published keys ('epoch' is the last one finished), and ours."""
        return {
            'model': self.model.state_dict(), 'model_ema': self.ema.module.state_dict() if self.ema else None,
            'optimizer': self.optimizer.state_dict(), 'lr_scheduler': self.scheduler.state_dict(),
            'scaler': self.scaler.state_dict() if self.amp == 'fp16' else {},  # otherwise its scale is a constant
            'epoch': self.epoch - 1, 'step': self.step, 'meter': self.losses, 'best_acc1': self.best['model'],
            'best_ema_acc1': self.best['ema'], 'world_size': world_size(),
        }


# ---------------------------------------------------------------- reading

def load_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint, ours or a published one, as a dict with 'model'. Raises InputError.

    What DDP and torch.compile put before the names of weights is taken off.
    """
    checkpoint = load_torch(path, 'a checkpoint')
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('model'), dict):
        raise InputError(f'{path}: not a checkpoint (no "model" in it)')
    for key in ('model', 'model_ema'):
        weights = checkpoint.get(key)
        if isinstance(weights, dict):
            checkpoint[key] = _without_wrappers(weights, path)
    return checkpoint


def _without_wrappers(weights: dict[str, Any], path: str) -> dict[str, Any]:
    for prefix in (*WRAPPERS, *WRAPPERS):  # in either order
        if weights and all(str(name).startswith(prefix) for name in weights):
            print0(f'{path}: names of weights begin with {prefix!r}, which is taken off')
            weights = {name[len(prefix):]: value for name, value in weights.items()}
    return weights


def saved_flags(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The flags of the run that wrote a checkpoint, {} where it does not say."""
    flags = checkpoint.get('args')
    flags = vars(flags) if isinstance(flags, Namespace) else flags
    return flags if isinstance(flags, dict) else {}


def progress_of(checkpoint: dict[str, Any] | None) -> dict[str, Any]:
    """Where the run that wrote a checkpoint was: what must be the same on all ranks."""
    return {f'{key} of the checkpoint': checkpoint.get(key) for key in ('epoch', 'step')} if checkpoint else {}


def load_weights(model: nn.Module, weights: dict[str, Any], path: str) -> None:
    """load_state_dict, with the keys that differ in a one-line InputError."""
    wanted = model.state_dict()
    shapes = {key: tuple(value.shape) if isinstance(value, torch.Tensor) and value.is_floating_point() else None
              for key, value in weights.items()}
    wrong = [f'{key}: {shapes[key]} for {tuple(wanted[key].shape)}' for key in wanted
             if key in weights and shapes[key] != wanted[key].shape]
    wrong += [f'{key}: missing' for key in wanted if key not in weights]
    wrong += [f'{str(key)[:80]}: unknown' for key in weights if key not in wanted]
    if wrong:
        more = f'; and {len(wrong) - 8} more' if len(wrong) > 8 else ''
        raise InputError(f'{path}: does not fit the model: {"; ".join(wrong[:8])}{more}')
    model.load_state_dict(dict(weights))  # plain: an OrderedDict of a file may carry attributes that torch trusts


# ---------------------------------------------------------------- resuming

def resume(state: TrainState, checkpoint: dict[str, Any], path: str, flags: dict[str, Any]) -> None:
    """Resume from a checkpoint, ours or a published one.

    One rule: hyperparameters are those of the command line; the file gives weights, EMA, the optimizer's moments and
    progress. A line is printed for each flag that differs from the run's.

    Args:
        state: of a new run with these flags; changed in place.
        checkpoint: of `load_checkpoint`.
        path: its name, for errors.
        flags: of the command line, by name.

    Raises:
        InputError: for flags under which the run is no longer the same (see EXACT), unless allow_inexact_resume is
            among them, and for a checkpoint that does not fit.
    """
    if not isinstance(checkpoint.get('optimizer'), dict) or type(checkpoint.get('epoch')) is not int:
        raise InputError(f'{path}: holds weights only; use --finetune to start from them, or --eval')
    before = {**saved_flags(checkpoint), 'world_size': checkpoint.get('world_size')}
    flags = {**flags, 'world_size': world_size()}
    compare_flags(before, flags, path)
    load_weights(state.model, checkpoint['model'], path)
    load_optimizer(state.optimizer, checkpoint['optimizer'], path)
    if state.ema and checkpoint.get('model_ema'):
        load_weights(state.ema.module, checkpoint['model_ema'], path)
    elif state.ema:
        print0(f'{path}: no EMA in it; it starts from the weights')
        state.ema.set(state.model)
    if state.amp == 'fp16' and checkpoint.get('scaler'):
        state.scaler.load_state_dict(checkpoint['scaler'])
    state.best = {'model': checkpoint.get('best_acc1', 0.), 'ema': checkpoint.get('best_ema_acc1', 0.)}
    state.epoch = checkpoint['epoch'] + 1
    state.step = checkpoint.get('step', 0)
    state.losses = checkpoint.get('meter') if before['world_size'] == flags['world_size'] else None
    now = flags['world_size'] * flags['batch_size']
    then = (before['world_size'] or flags['world_size']) * before.get('batch_size', flags['batch_size'])
    if state.step and then != now:  # an allowed, inexact resume: after about as many images
        state.step = state.step * then // (now * flags['accum_iter']) * flags['accum_iter']


def compare_flags(before: dict[str, Any], now: dict[str, Any], path: str) -> None:
    """Print the flags that differ from those of the run that wrote a checkpoint; InputError for some."""
    for key in now:
        if key in before and key not in THIS_START and before[key] != now[key]:
            print0(f'note: --{key.replace("_", "-")} is {now[key]}; the run that wrote {path} had {before[key]}')
    if before.get('opt', now['opt']) != now['opt']:
        raise InputError(f'{path}: was written with --opt {before["opt"]}, not {now["opt"]}; resume with the same, or '
                         'start from the weights with --finetune')
    inexact = [f'{key} {before[key]} -> {now[key]}' for key in EXACT
               if before.get(key) is not None and before[key] != now[key]]
    if inexact and not now['allow_inexact_resume']:
        raise InputError(f'{path}: the run that wrote it differs in {", ".join(inexact)}; resume it as it was, or add '
                         '--allow-inexact-resume')
    if inexact:
        print0(f'warning: {path} is resumed with {", ".join(inexact)}: batches, augmentation, the scaled learning rate '
               'and the mean loss of the epoch are no longer those of the uninterrupted run')


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], path: str) -> None:
    """Take the moments of a saved optimizer state; hyperparameters stay the optimizer's own. Raises InputError."""
    new = optimizer.state_dict()['param_groups']
    try:
        groups = saved['param_groups']
        if [len(group['params']) for group in groups] != [len(group['params']) for group in new]:
            raise ValueError('other parameter groups')
        merged = [{**ours, 'params': theirs['params']} for ours, theirs in zip(new, groups)]
        optimizer.load_state_dict({'state': saved['state'], 'param_groups': merged})
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f'{path}: its optimizer state does not fit ({error}); resume with the flags of the run that '
                         'wrote it') from None


# ---------------------------------------------------------------- starting from other weights

def load_pretrained(model: nn.Module, path: str) -> None:
    """--finetune: start from other weights. Raises InputError for weights of another architecture.

    A head or stem of another shape starts from scratch, distillation weights are left out, and position embeddings
    are resampled bicubically.
    """
    weights = dict(load_checkpoint(path)['model'])
    wanted = model.state_dict()
    for key in [key for key in weights if str(key).startswith(('dist_token', 'head_dist.'))]:
        print0(f'--finetune: {key} is left out: the model has no distillation token')
        del weights[key]
    for key in [key for key in wanted if key.startswith(('head.', 'patch_embed.'))]:
        shape = tuple(weights[key].shape) if isinstance(weights.get(key), torch.Tensor) else None
        if shape != wanted[key].shape:
            print0(f'--finetune: {key} starts from scratch (in the file: {shape or "none"})')
            weights[key] = wanted[key]
    if isinstance(weights.get('pos_embed'), torch.Tensor):
        weights['pos_embed'] = fit_positions(weights['pos_embed'], wanted['pos_embed'], path)
    load_weights(model, weights, path)


def fit_positions(positions: torch.Tensor, wanted: torch.Tensor, path: str) -> torch.Tensor:
    """Position embeddings (1, p + n, d) of p = 0, 1 or 2 prefix tokens, as (1, 1 + m, d) for a class token and m
    patches: a second prefix token is cut, a missing one is the model's own, and the grid is resampled.

    Raises:
        InputError: when the patches make no square grid.
    """
    if positions.shape == wanted.shape:
        return positions
    squares = [prefix for prefix in (1, 2, 0) if positions.ndim == 3 and positions.shape[1] > prefix
               and round((positions.shape[1] - prefix) ** 0.5) ** 2 == positions.shape[1] - prefix]
    if not squares or positions.shape[2] != wanted.shape[2]:
        raise InputError(f'{path}: position embeddings of shape {tuple(positions.shape)} do not fit '
                         f'{tuple(wanted.shape)}: the weights are of another model')
    prefix = squares[0]
    if prefix != 1:
        print0(f'--finetune: pos_embed has {prefix} prefix tokens; '
               + ('the first is taken' if prefix else "the class token's starts from scratch"))
    first = positions[:, :1] if prefix else wanted[:, :1]
    side = round((wanted.shape[1] - 1) ** 0.5)
    grid = torch.cat([first, positions[:, prefix:]], 1).float()
    return resample_abs_pos_embed(grid, [side, side], antialias=False)
