"""Which checkpoints a run keeps, and under what names: --save-periods of the programs for masked tokens."""
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from utils import InputError

SUMMARY = '.summary.json'  # behind the name of a checkpoint


@dataclass(frozen=True)
class CheckpointFiles:
    """The names of checkpoints; the defaults are those of main_seit.py.

    Attributes:
        newest: the newest first. Each save moves them on by one.
        best: the one of the best accuracy, of 'model' and 'ema'.
        every: numbers of epochs; after each so many there is a copy checkpoint-N.pth.
        keep_newest: also at the end of the run, when its last epoch has a copy.
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


def checkpoint_files(periods: Sequence[str], epochs: int, has_best: bool = True) -> CheckpointFiles:
    """What --save-periods asks for.

    Args:
        periods: 'lastN' (the newest, and the N before), 'every_N_epochs' (copies) and 'best'.
        epochs: of the run.
        has_best: whether the program has an accuracy.

    Raises:
        InputError: for other words.
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
