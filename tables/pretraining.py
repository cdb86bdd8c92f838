"""Table 6: pre-training on tokens or pixels, then fine-tuning on others; from scratch; and frozen features.

    python tables/pretraining.py --preset tiny --data-path DATA --output-dir output/tables --device cpu
    python tables/pretraining.py --preset imagenet --data-path DATA --output-dir output/tables --dry-run

Learning rates of fine-tuning and of training from scratch are searched for each line by itself, with seed 0. That of
pre-training is given. A fine-tuning with a seed starts from the pre-training with that seed.
"""
import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flags import Parser
from tables.plan import CHECKPOINT, PROBE, Images, Line, Plan, Tokens
from tables.presets import PRETRAINING
from tables.rows import Command, Row
from tables.table import Options, add_table_flags, run_table
from utils import run

# What each line is pre-trained on, '' for nothing, and trained on.
LINES = {
    'tokens to tokens': ('tokens', 'tokens'),
    'tokens to pixels': ('tokens', 'pixels'),
    'pixels to pixels': ('pixels', 'pixels'),
    'tokens from scratch': ('', 'tokens'),
    'pixels from scratch': ('', 'pixels'),
}
PROBES = {'knn': 'neighbors', 'linear': 'linear probe'}
UNREAD = ('--token-synonym-dict',)  # flags of main_seit.py's files that probing does without


class PretrainingPlan(Plan):
    """The rows of pre-training, fine-tuning and probes. Learning rates are by line, which here is its own base line."""

    def __init__(self, preset: str, *args: Any):
        super().__init__(PRETRAINING[preset].after, *args)
        self.before = self.part('pretrain', PRETRAINING[preset].before)
        # a part of the classes; else the images are those of the other tables
        self.after = self.part('finetune' if self.preset.classes else '', self.preset)

    def base_line(self, kind: str, seeds: Sequence[int], **facts: Any) -> Line:
        """The line of LINES that `kind` names."""
        before, now = LINES[kind]
        data = data_of(self.after, now)
        runs = {}
        for seed in seeds:
            words = words_of(self.after, data)
            after = [data.row]
            if before:
                start = self.pretrained(before, seed)
                words = (*words, '--finetune', start.folder / CHECKPOINT)
                after.append(start)
            runs[seed] = self.after.train(kind, self.lrs[kind], seed, words, after)
        start = data_of(self.before, before).row if before else None
        return Line(kind, kind, runs, data.row, epochs=self.after.preset.epochs, start=start,
                    pretraining=self.before.preset.epochs if before else 0, **facts)

    def pretrained(self, kind: str, seed: int) -> Row:
        """The pre-training on tokens or pixels."""
        data = data_of(self.before, kind)
        lr = self.before.preset.lrs[kind][0]
        return self.before.train(kind, lr, seed, words_of(self.before, data), [data.row])

    def probe_lines(self, kind: str, seeds: Sequence[int]) -> list[Line]:
        """The lines of the frozen features of a pre-training, on the images that others are fine-tuned on."""
        data = data_of(self.after, kind)
        runs = {}
        for seed in seeds:
            start = self.pretrained(kind, seed)
            name = f'probe/{kind}/{start.folder.name}'
            command = ('scripts/probe.py', '--checkpoint', start.folder / CHECKPOINT, *probe_flags(self.after, data),
                       *self.device, '--output', self.after.output / name / PROBE)
            runs[seed] = self.after.row(name, [command], [start, data.row])
        facts = {'pretraining': self.before.preset.epochs, 'start': data_of(self.before, kind).row}
        return [Line(f'{words} of {kind}', '', runs, data.row, f'{probe} top1', **facts)
                for probe, words in PROBES.items()]


def data_of(plan: Plan, kind: str) -> Images | Tokens:
    """The training set of a kind, 'tokens' or 'pixels'."""
    return plan.main_tokens() if kind == 'tokens' else plan.full()


def words_of(plan: Plan, data: Images | Tokens) -> Command:
    """Program and flags of a training."""
    return plan.token_words(data) if isinstance(data, Tokens) else plan.pixel_words(data)


def probe_flags(plan: Plan, data: Images | Tokens) -> Command:
    """The flags of scripts/probe.py that name the data."""
    if isinstance(data, Images):
        return ('--train-path', str(data.path), '--val-path', str(data.val), *plan.workers)
    pairs = zip(data.flags[::2], data.flags[1::2])
    return tuple(word for pair in pairs if pair[0] not in UNREAD for word in pair)


@dataclass(frozen=True)
class PretrainingOptions(Options):
    """The command line of this table."""

    def plan(self, lrs: dict[str, float]) -> PretrainingPlan:
        """A plan with these learning rates, by line."""
        return PretrainingPlan(self.preset, Path(self.data_path), Path(self.output_dir), self.device, lrs)

    def rates(self) -> dict[str, list[float]]:
        """Learning rates to try, by line."""
        rates = PRETRAINING[self.preset].after.lrs
        return {line: list(dict.fromkeys(self.lrs or rates[now])) for line, (_, now) in LINES.items()}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__.splitlines()[0])
    add_table_flags(parser)
    return parser.parse_args(argv)


def lines(plan: PretrainingPlan, seeds: Sequence[int]) -> list[Line]:
    """The lines of the table."""
    probes = [line for kind in ('tokens', 'pixels') for line in plan.probe_lines(kind, seeds)]
    return [*(plan.base_line(name, seeds) for name in LINES), *probes]


def main(args: argparse.Namespace) -> int:
    """Make the table. Returns the exit code."""
    return run_table('pretraining', 'Storage-efficient pre-training', lines, PretrainingOptions(**vars(args)))


if __name__ == '__main__':
    run(main, parse_args)
