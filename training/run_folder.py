"""What a run leaves in --output-dir: checkpoints, log.txt, args.json, and a lock while it writes.

    checkpoint.pth, checkpoint_previous.pth      the newest two
    best_checkpoint.pth, best_ema_checkpoint.pth best top-1 of the model and of the EMA
    log.txt                                      a JSON line an epoch
    args.json                                    flags, versions, device
    wandb_id.txt, wandb/                         with --wandb, its run and its files
    .lock                                        locked by the process that writes here
    .unsaved                                     there until the first checkpoint is whole

Programs may name checkpoints otherwise, see CheckpointFiles. A run killed at any moment leaves a folder from which
`find_checkpoint` resumes it exactly: each file is written beside its name and renamed when it is whole, and the newest
checkpoint is renamed last. Begin with `RunFolder`; `find_checkpoint` is what the next start of the run asks.
"""
import contextlib
import json
import os
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fileio.files import (MAX_JSON_BYTES, check_writable, hold_folder, parse_json, read_bytes, remove_leftovers,
                          save_torch, write_text)
from training.checkpoints import TrainState, load_checkpoint
from utils import InputError, first_line, is_main, on_main, print0

COMPLETE = '.checkpoint.pth.new'  # the next newest, whole, about to be renamed
LOG = 'log.txt'
UNSAVED = '.unsaved'
WANDB_ID = 'wandb_id.txt'
MAX_ID_BYTES = 1000
SUMMARY = '.summary.json'  # behind the name of a checkpoint


# ---------------------------------------------------------------- names of checkpoints

@dataclass(frozen=True)
class CheckpointFiles:
    """The names of checkpoints; the defaults are those of main_seit.py.

    Attributes:
        newest: the newest first. Each save moves them on by one.
        best: the one of the best accuracy, of 'model' and 'ema'.
        every: periods in epochs; at the end of each there is a copy checkpoint-N.pth.
        keep_newest: whether the newest stays at the end of the run, when its last epoch has a copy.
        epochs: of the run, in programs that write a summary beside each checkpoint; else 0.
    """
    newest: tuple[str, ...] = ('checkpoint.pth', 'checkpoint_previous.pth')
    best: dict[str, str] = field(default_factory=lambda: {'model': 'best_checkpoint.pth',
                                                          'ema': 'best_ema_checkpoint.pth'})
    every: tuple[int, ...] = ()
    keep_newest: bool = True
    epochs: int = 0

    def copies(self, epoch: int, step: int, improved: Sequence[str]) -> list[str]:
        """The names of what is saved beside the newest, after `epoch` epochs and `step` batches."""
        names = [self.best[name] for name in improved if name in self.best]
        if step == 0 and any(epoch % number == 0 for number in self.every):
            names.append(f'checkpoint-{epoch}.pth')
        return names

    def newest_ends_with(self, epoch: int, copies: Sequence[str]) -> bool:
        """Whether the newest checkpoint, of `epoch`, is no more needed beside its copies."""
        return not self.keep_newest and epoch == self.epochs and f'checkpoint-{epoch}.pth' in copies


FILES = CheckpointFiles()


def checkpoint_files(periods: Sequence[str], epochs: int, has_best: bool = True) -> CheckpointFiles:
    """What --save-periods asks for.

    Args:
        periods: 'lastN' (the newest, and the N before), 'every_N_epochs' (copies) and 'best'.
        epochs: of the run.
        has_best: whether the program has an accuracy.

    Raises:
        InputError: for a period of another form.
    """
    last = [re.fullmatch(r'last(\d{0,3})', period) for period in periods]
    every = [re.fullmatch(r'every_([1-9]\d{0,8})_epochs?', period) for period in periods]
    for period, *matches in zip(periods, last, every):
        if not any(matches) and not (has_best and period == 'best'):
            kinds = "'last2', 'every_200_epochs'" + (" or 'best'" if has_best else '')
            raise InputError(f'--save-periods {period}: give words like {kinds}')
    before = max([int(match[1] or 0) for match in last if match], default=0)
    return CheckpointFiles(newest=('checkpoint-last.pth', *(f'checkpoint-last{n + 1}.pth' for n in range(before))),
                           best={'model': 'checkpoint-best.pth'} if 'best' in periods else {},
                           every=tuple(int(match[1]) for match in every if match), keep_newest=any(last),
                           epochs=epochs)


# ---------------------------------------------------------------- finding a checkpoint

def find_checkpoint(output_dir: str, resume: str, evaluating: bool = False,
                    outputs: Sequence[str] = (), files: CheckpointFiles = FILES) -> tuple[dict | None, str]:
    """The checkpoint that a run begins from. Collective: rank 0 looks, and all ranks take the same.

    Precedence: `resume` as a path or address; with 'auto' the newest in `output_dir`, or the one before where that is
    damaged (it is set aside as checkpoint_damaged.pth); otherwise none.

    Args:
        output_dir: '' for none.
        resume: --resume: '', 'auto', a path or an address.
        evaluating: nothing will be written to output_dir.
        outputs: names of files that the program makes of a run, which a new run must not replace.
        files: how the program names checkpoints.

    Returns:
        (checkpoint, its path), or (None, '').

    Raises:
        InputError: when there is none to evaluate, and when `output_dir` holds an earlier run that is not resumed:
            nothing is overwritten.
    """
    loaded = {}
    path = on_main(_path_to_begin_from, output_dir, resume, evaluating, loaded, outputs, files)
    return (loaded.get(path) or load_checkpoint(path), path) if path else (None, '')


def _path_to_begin_from(output_dir: str, resume: str, evaluating: bool, loaded: dict[str, dict],
                        outputs: Sequence[str], files: CheckpointFiles) -> str:
    """The path of the checkpoint to begin from, or ''. Rank 0 alone; what it had to load is put into `loaded`."""
    folder = Path(output_dir)
    if not evaluating and output_dir:
        _finish_renames(folder, files)
    earlier = _earlier_files(folder, files, outputs) if output_dir else []
    if resume == 'auto':
        candidates = [folder / name for name in files.newest if os.path.exists(folder / name)]
        if candidates:
            return _first_whole(candidates, evaluating, loaded)
        if evaluating:
            raise InputError(f'{output_dir}: no checkpoint to evaluate')
        if earlier:
            raise InputError(f'{earlier[0]}: an earlier run is here, but its {files.newest[0]} is not: give --resume '
                             'FILE to start from one of its files, or choose another --output-dir')
        return ''
    from_folder = resume and Path(resume).resolve().parent == folder.resolve()
    if earlier and not from_folder and not evaluating:
        raise InputError(f'{earlier[0]}: an earlier run is here; add --resume auto to resume it, or choose another '
                         '--output-dir')
    return resume


def _earlier_files(folder: Path, names: CheckpointFiles, outputs: Sequence[str] = ()) -> list[Path]:
    """The files of an earlier run that a new one would overwrite."""
    if os.path.exists(folder / UNSAVED) and not os.path.exists(folder / names.newest[0]):
        return []  # what is there was left by a run killed before its first checkpoint was whole
    files = [folder / name for name in (*names.newest, *names.best.values(), LOG, *outputs)]
    return [path for path in files if os.path.exists(path) and path.stat().st_size]


def _finish_renames(folder: Path, files: CheckpointFiles) -> None:
    """Do what a run killed between the renames of a save left undone."""
    if os.path.exists(folder / COMPLETE):
        _rename_newest(folder, files)


def _rename_newest(folder: Path, files: CheckpointFiles) -> None:
    """The complete checkpoint becomes the newest, others move on. Begun again after a kill, it ends the same way."""
    # The checkpoint is renamed last. As long as COMPLETE is there, the next start does what is left (_finish_renames);
    # were it renamed first, a kill before the summary's rename would leave a checkpoint with another one's summary.
    for end in (SUMMARY, ''):
        if not os.path.exists(folder / f'{COMPLETE}{end}'):
            continue
        names = [folder / f'{name}{end}' for name in files.newest]
        # up to the first free name: a kill between two renames has left one free, and those behind it have moved on
        free = next((i for i, path in enumerate(names) if not os.path.exists(path)), len(names) - 1)
        for i in range(free, 0, -1):
            os.replace(names[i - 1], names[i])
        os.replace(folder / f'{COMPLETE}{end}', names[0])


def _first_whole(candidates: list[Path], evaluating: bool, loaded: dict[str, dict]) -> str:
    """The first checkpoint that loads. A damaged one is set aside, so that it never replaces a good one."""
    for path in candidates:
        try:
            loaded[str(path)] = load_checkpoint(str(path))
            return str(path)
        except InputError as error:
            if path == candidates[-1]:
                raise
            print0(f'warning: {error}; taking the one before it')
            # a file that cannot be read now may be whole: only one that was read and is damaged is set aside
            if not evaluating and not isinstance(error.__context__, OSError | MemoryError):
                os.replace(path, path.with_name('checkpoint_damaged.pth'))
    return ''


# ---------------------------------------------------------------- writing

class RunFolder:
    """The output folder of a run that trains. Only rank 0 writes; the folder is locked until the process ends.

    Args:
        path: '' saves nothing.
        save_every: (N, 'steps') or (N, 'minutes') between checkpoints within an epoch, or None.
        outputs: names of further files that the program writes there.
        files: how checkpoints are named, and which are kept.

    Raises:
        InputError: on every rank, when another run writes there, or nobody can. Collective.
    """

    def __init__(self, path: str, save_every: tuple[float, str] | None = None, outputs: Sequence[str] = (),
                 files: CheckpointFiles = FILES):
        self.path = Path(path)
        self.saves = bool(path)
        self.record = {}
        self.save_every = save_every
        self.outputs = outputs
        self.files = files
        self.saved_at = time.monotonic()
        self.lock = None
        on_main(self._take)

    def _take(self) -> None:
        """Lock the folder, and remove what a run killed while it wrote has left."""
        if not self.saves:
            return
        self.lock = hold_folder(self.path)
        for name in (*self.files.newest, COMPLETE, *self.files.best.values(), LOG, 'args.json', *self.outputs):
            remove_leftovers(self.path, f'.{name}.*.tmp')

    def begin(self, args_json: dict[str, Any], record: dict[str, Any]) -> None:
        """The run is about to train: write args.json, and note what goes into its checkpoints.

        Args:
            args_json: flags as given, versions, device.
            record: kept in each checkpoint beside the state: 'args' (the flags as plain values) and 'classes'.
        """
        self.record = record
        on_main(self._begin, args_json)

    def _begin(self, args_json: dict[str, Any]) -> None:
        if self.saves:
            # what a run leaves that dies before its first checkpoint is no run: the same command may begin again
            if not _earlier_files(self.path, self.files):
                write_text(self.path / UNSAVED, '')
            write_text(self.path / 'args.json', json.dumps(args_json, indent=1) + '\n')

    def due(self, state: TrainState, accum_iter: int) -> bool:
        """Whether --save-every asks for a checkpoint now."""
        if not self.saves or not self.save_every:
            return False
        interval, unit = self.save_every
        if unit == 'steps':
            return state.step // accum_iter % interval == 0
        due = is_main() and time.monotonic() - self.saved_at >= 60 * interval
        if due:
            self.saved_at = time.monotonic()  # the ranks agree a step later: asked again by then, it is not due twice
        return due

    def save(self, state: TrainState, improved: Sequence[str] = (), stats: dict[str, Any] | None = None) -> None:
        """Write best checkpoints for the names in `improved` ('model', 'ema'), then the newest; keep the one before.

        Args:
            state: within an epoch, or at its end.
            improved: see above.
            stats: of the epoch that ended.

        Raises:
            InputError: for a full disk, say; what was on disk is then still there.
        """
        self.saved_at = time.monotonic()
        if not (self.saves and is_main()):
            return
        content = state.state_dict() | self.record
        copies = self.files.copies(state.epoch, state.step, improved)
        # copies first: once the newest is in place, nothing of this save may be missing
        for name in copies:
            save_torch(content, self.path / name)
            self._summarize(name, name, state, stats)
        self._summarize(COMPLETE, self.files.newest[0], state, stats)
        save_torch(content, self.path / COMPLETE)
        _rename_newest(self.path, self.files)
        (self.path / UNSAVED).unlink(missing_ok=True)
        if self.files.newest_ends_with(state.epoch, copies):
            for end in ('', SUMMARY):
                (self.path / f'{self.files.newest[0]}{end}').unlink(missing_ok=True)

    def _summarize(self, file: str, name: str, state: TrainState, stats: dict[str, Any] | None) -> None:
        """Where the program has summaries, write epoch and accuracy of the checkpoint `file`, to be called `name`."""
        if self.files.epochs:
            summary = {'epoch': f'{state.epoch}/{self.files.epochs}', 'step': state.step, **(stats or {}),
                       'checkpoint': name}
            write_text(self.path / f'{file}{SUMMARY}', json.dumps(summary) + '\n')

    def save_bad_step(self, error: Any, rank: int, seed: int, indices: list[int]) -> None:
        """Leave what is needed to replay the bad step of a rank (loss_meter.NotFinite) in bad_step_rankN.json."""
        if self.saves:
            bad = {'epoch': error.epoch, 'step': error.step, 'rank': rank, 'seed': seed, 'lr': error.lr,
                   'indices': indices}
            write_text(self.path / f'bad_step_rank{rank}.json', json.dumps(bad) + '\n')

    def advice(self) -> str:
        """What a stopped run tells the user."""
        return '--resume auto continues there' if self.saves else 'without --output-dir nothing is saved'


class RunLog:
    """`log.txt`: one JSON line an epoch. Lines of epochs that are to run (again) are dropped on opening.

    Args:
        folder: of the run; '' or another rank than 0 writes nothing.
        start_epoch: the first that is to run.
        tensorboard: write the scalars there for TensorBoard too.
        wandb: the project of Weights & Biases that gets them too; '' for none.
        config: what that run is shown with, such as flags.
    """

    def __init__(self, folder: str, start_epoch: int = 0, tensorboard: bool = False, wandb: str = '',
                 config: dict[str, Any] | None = None):
        self.path = Path(folder) / LOG if folder and is_main() else None
        self.board = None
        self.wandb = None
        on_main(self._open, start_epoch, tensorboard, wandb, config)

    def _open(self, start_epoch: int, tensorboard: bool, wandb: str, config: dict[str, Any] | None) -> None:
        if self.path is None:
            return
        # an epoch that was logged, but not saved, is trained again
        kept = [line for line in self._lines() if isinstance(line, dict) and type(line.get('epoch', -1)) is int
                and line.get('epoch', -1) < start_epoch] if start_epoch else []
        write_text(self.path, ''.join(json.dumps(line) + '\n' for line in kept))
        if tensorboard:
            self.board = _open_tensorboard(str(self.path.parent), start_epoch)
        if wandb:
            self.wandb = _open_wandb(self.path.parent, wandb, config)

    def _lines(self) -> Any:
        if not self.path.exists():
            return
        for line in read_bytes(self.path, MAX_JSON_BYTES).split(b'\n'):
            with contextlib.suppress(ValueError):  # a half line is what a crash leaves behind
                yield parse_json(line)

    def write(self, **values: Any) -> None:
        """Append a line, on disk when this returns. Raises InputError."""
        if self.path is None:
            return
        try:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(values) + '\n')
                file.flush()
                os.fsync(file.fileno())  # the epoch's checkpoint comes next, and shall never be there without its line
        except OSError as error:
            raise InputError(f'{self.path}: cannot be written ({error.strerror})') from None
        scalars = {key: value for key, value in values.items() if key.startswith(('train_', 'test_', 'ema_'))}
        if self.board:
            for key, value in scalars.items():
                self.board.add_scalar(key, value, values['epoch'])
            self.board.flush()
        if self.wandb:
            # an epoch that it has is dropped by it: one that is trained again gives the same numbers again
            self.wandb.log(scalars, step=values['epoch'])

    def close(self) -> None:
        """The run has ended: a process may train several, one after the other."""
        if self.wandb:
            with contextlib.suppress(Exception):  # the run is saved, whatever becomes of its curves
                self.wandb.finish()
        self.wandb = None


def _open_tensorboard(folder: str, start_epoch: int) -> Any:
    """A writer of events; those of epochs that are to run (again) are shown no more. Raises InputError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError('--tensorboard needs the tensorboard package: pip install tensorboard') from None
    return SummaryWriter(folder, purge_step=start_epoch)


def _open_wandb(folder: Path, project: str, config: dict[str, Any] | None) -> Any:
    """The run of Weights & Biases whose id stands in the folder, or a new one. Raises InputError."""
    try:
        import wandb
    except ImportError:
        raise InputError('--wandb needs the wandb package: pip install wandb') from None
    path = folder / WANDB_ID
    run_id = read_bytes(path, MAX_ID_BYTES).decode(errors='replace').strip() if path.exists() else ''
    if not re.fullmatch(r'\w{1,64}', run_id, re.ASCII):
        run_id = uuid.uuid4().hex[:12]
    write_text(path, f'{run_id}\n')  # first, so that no kill leaves a run whose name is lost
    try:
        return wandb.init(project=project, id=run_id, resume='allow', dir=str(folder), config=config,
                          allow_val_change=True,  # a resumed run may have other flags
                          name='/'.join(folder.absolute().parts[-2:])[-128:],
                          settings=wandb.Settings(console='off'))  # else it would take standard output over
    except Exception as error:  # no login, no network, no room: each is an error of another kind
        why = first_line(error).rstrip('.')
        raise InputError(f'--wandb {project}: {why}: log in by wandb login, or set WANDB_MODE=offline') from None


# ---------------------------------------------------------------- an evaluation as a file

def check_evaluation(path: str) -> None:
    """InputError, on rank 0, unless `write_evaluation` can write there: asked before the work. '' is nowhere."""
    if path and is_main():
        check_writable(path)


def write_evaluation(path: str, results: dict[str, Any]) -> None:
    """Write the numbers of an evaluation to a JSON file, on rank 0; '' for nowhere. Raises InputError."""
    if path and is_main():
        write_text(path, json.dumps(results) + '\n')
