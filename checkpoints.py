"""Checkpoints: what a run is made of, kept so that it goes on exactly where it stopped."""
import contextlib
import datetime
import math
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from utils import InputError, is_main, load_torch, save_torch, say, world_size

REQUEUE = 75  # exit code of a run that a signal stopped after saving (EX_TEMPFAIL: try again)
NEWEST, PREVIOUS = 'checkpoint.pth', 'checkpoint_previous.pth'
# With another value of any of these, a run goes on with other batches or other augmentation.
EXACT = ('world_size', 'batch_size', 'accum_iter', 'seed', 'repeated_aug')


# ---------------------------------------------------------------- reading

def load_checkpoint(path):
    """A checkpoint, ours or a published one, as a dict with 'model'. Raises InputError."""
    checkpoint = load_torch(path, 'a checkpoint')
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('model'), dict):
        raise InputError(f'{path}: not a checkpoint (no "model" in it)')
    return checkpoint


def load_weights(model, state, path):
    """load_state_dict, with the keys that differ in a one-line InputError."""
    own = model.state_dict()
    shapes = {key: tuple(value.shape) if isinstance(value, torch.Tensor) and value.is_floating_point() else None
              for key, value in state.items()}
    wrong = [f'{key}: {shapes[key]} for {tuple(own[key].shape)}' for key in own
             if key in state and shapes[key] != own[key].shape]
    wrong += [f'{key}: missing' for key in own if key not in state]
    wrong += [f'{str(key)[:80]}: unknown' for key in state if key not in own]
    if wrong:
        raise InputError(f'{path}: does not fit the model: ' + '; '.join(wrong[:8])
                         + (f'; and {len(wrong) - 8} more' if len(wrong) > 8 else ''))
    model.load_state_dict(dict(state))  # plain: an OrderedDict of a file may carry attributes that torch trusts


def find_checkpoint(args):
    """(checkpoint to continue from or evaluate, its path), or (None, '').

    `--resume auto` takes the newest of --output-dir, or the one before where that is damaged. Without --resume an
    earlier run in --output-dir is an InputError: nothing is overwritten.
    """
    found = [Path(args.output_dir) / name for name in (NEWEST, PREVIOUS)] if args.output_dir else []
    found = [path for path in found if path.exists()]
    if args.resume != 'auto':
        if found and not args.resume and not args.eval:
            raise InputError(f'{found[0]}: an earlier run is here; add --resume auto to continue it, or choose another '
                             '--output-dir')
        return (load_checkpoint(args.resume), args.resume) if args.resume else (None, '')
    if args.eval and not found:
        raise InputError(f'{args.output_dir}: no checkpoint to evaluate')
    for path in found:
        try:
            return load_checkpoint(path), str(path)
        except InputError as error:
            if path == found[-1]:
                raise
            say(f'warning: {error}; taking the one before it')
    return None, ''


def check_exact(args, checkpoint, path):
    """Refuse to continue with flags under which the run is no longer the same, unless --allow-inexact-resume."""
    before = checkpoint.get('args')
    before = before if isinstance(before, dict) else {}
    before = {**before, 'world_size': checkpoint.get('world_size')}
    now = {**vars(args), 'world_size': world_size()}
    differs = [f'{key} {before[key]} -> {now[key]}' for key in EXACT
               if before.get(key) is not None and before[key] != now[key]]
    if not differs:
        return
    if not args.allow_inexact_resume:
        raise InputError(f'{path}: the run that wrote it differs in {", ".join(differs)}; resume it as it was, or add '
                         '--allow-inexact-resume')
    say(f'warning: {path} is continued with {", ".join(differs)}: batches, augmentation, the scaled learning rate '
        'and the mean loss of the epoch are no longer those of the uninterrupted run')


# ---------------------------------------------------------------- the state of a run

@dataclass
class TrainState:
    """All that a run needs to go on. Random state is not among it: it is a function of (seed, epoch, step, rank).

    epoch: the one in progress, or next; step: batches done in it, per rank; meter: the loss so far in it
    (engine.LossMeter.gather), None at its start; best: top-1 (%) of the model and of the EMA.
    """
    model: torch.nn.Module
    ema: object
    optimizer: torch.optim.Optimizer
    scheduler: object
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    meter: dict = None
    best: dict = field(default_factory=lambda: {'model': 0., 'ema': 0.})

    def state_dict(self, args):
        """The checkpoint, in plain types: the published keys ('epoch' is the last one finished), and ours."""
        return {
            'model': self.model.state_dict(), 'model_ema': self.ema.module.state_dict() if self.ema else None,
            'optimizer': self.optimizer.state_dict(), 'lr_scheduler': self.scheduler.state_dict(),
            'scaler': self.scaler.state_dict() if args.amp == 'fp16' else {},  # otherwise its scale is a constant
            'epoch': self.epoch - 1, 'step': self.step, 'meter': self.meter, 'best_acc1': self.best['model'],
            'best_ema_acc1': self.best['ema'], 'world_size': world_size(), 'args': vars(args),
        }

    def load(self, checkpoint, path, args):
        """Continue from a checkpoint, ours or a published one. Raises InputError."""
        load_weights(self.model, checkpoint['model'], path)
        if not isinstance(checkpoint.get('optimizer'), dict) or type(checkpoint.get('epoch')) is not int:
            raise InputError(f'{path}: holds weights only; use --finetune to start from them, or --eval')
        try:
            self.optimizer.load_state_dict(checkpoint['optimizer'])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f'{path}: its optimiser state does not fit ({error}); resume with the flags of the run '
                             'that wrote it') from None
        if self.ema and checkpoint.get('model_ema'):
            load_weights(self.ema.module, checkpoint['model_ema'], path)
        elif self.ema:
            say(f'{path}: no EMA in it; it starts anew from the weights')
            self.ema.set(self.model)
        if args.amp == 'fp16' and checkpoint.get('scaler'):
            self.scaler.load_state_dict(checkpoint['scaler'])
        self.best = {'model': checkpoint.get('best_acc1', 0.), 'ema': checkpoint.get('best_ema_acc1', 0.)}
        self.epoch, self.step, self.meter = checkpoint['epoch'] + 1, checkpoint.get('step', 0), checkpoint.get('meter')
        if checkpoint.get('world_size') != world_size():
            self.meter = None
        if self.step and checkpoint['world_size'] * checkpoint['args']['batch_size'] != world_size() * args.batch_size:
            # an allowed, inexact resume: go on after about as many images
            images = self.step * checkpoint['world_size'] * checkpoint['args']['batch_size']
            batch = world_size() * args.batch_size * args.accum_iter
            self.step = images // batch * args.accum_iter


class Checkpoints:
    """The files of --output-dir: the newest two checkpoints, and the best. Only rank 0 writes."""

    def __init__(self, args):
        self.args, self.folder = args, Path(args.output_dir)
        self.writing = bool(args.output_dir) and is_main()
        self.saved = time.monotonic()
        if self.writing:  # what a run killed while it wrote has left
            for path in [*self.folder.glob('.*checkpoint.pth*.tmp'), self.folder / f'.{NEWEST}.new']:
                path.unlink(missing_ok=True)

    def due(self, state):
        """Whether --save-every asks for a checkpoint now."""
        every = self.args.save_every
        if not self.args.output_dir or not every:
            return False
        if every[1] == 'steps':
            return state.step // self.args.accum_iter % every[0] == 0
        return is_main() and time.monotonic() - self.saved >= 60 * every[0]

    def save(self, state, improved=()):
        """Write best checkpoints for the names in `improved` ('model', 'ema'), then the newest; keep the one before.

        Raises InputError (a full disk, say); what was on disk is then still there.
        """
        self.saved = time.monotonic()
        if not self.writing:
            return
        content = state.state_dict(self.args)
        for name, file in (('model', 'best_checkpoint.pth'), ('ema', 'best_ema_checkpoint.pth')):
            if name in improved:
                save_torch(content, self.folder / file)
        newest, temporary = self.folder / NEWEST, self.folder / f'.{NEWEST}.new'
        save_torch(content, temporary)
        with contextlib.suppress(FileNotFoundError):
            os.replace(newest, self.folder / PREVIOUS)
        os.replace(temporary, newest)


# ---------------------------------------------------------------- agreeing and stopping

class Vote:
    """Ranks agree, once a step, whether any of them wishes something, without waiting for a GPU.

    The ballots of a step travel while the next is computed, so that with several ranks the answer is a step late, and
    the same on all.
    """

    def __init__(self, minutes=10):
        wait = datetime.timedelta(minutes=minutes)
        self.group = dist.new_group(backend='gloo', timeout=wait) if dist.is_initialized() else None
        self.work = None

    def __call__(self, *wishes):
        """A list of bools: what any rank wished, in its last call (alone: in this one)."""
        ballot = torch.tensor(wishes, dtype=torch.int32)
        if self.group is None:
            return ballot.bool().tolist()
        answer = [False] * len(wishes)
        if self.work:
            self.work[0].wait()
            answer = self.work[1].bool().tolist()
        self.work = dist.all_reduce(ballot, dist.ReduceOp.MAX, self.group, async_op=True), ballot
        return answer


class StopSignal:
    """SIGTERM and SIGUSR1 (what SLURM and torchrun send) ask for a stop at the next step; the second stops at once.

    Attribute `received`: whether one came. Use as a context; the handlers before are put back.
    """
    SIGNALS = signal.SIGTERM, signal.SIGUSR1

    def __init__(self):
        self.received, self.since = False, math.inf

    def _handle(self, number, frame):
        # launchers may pass one request on twice, at the same moment
        if self.received and time.monotonic() - self.since > 1:
            os._exit(128 + number)
        if not self.received:
            self.received, self.since = True, time.monotonic()

    def __enter__(self):
        self.before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
