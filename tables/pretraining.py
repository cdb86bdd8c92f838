"""Table 6: pre-training on tokens or pixels, then fine-tuning on others; from scratch; and frozen features.

Each line of fine-tuning and of training from scratch has a learning rate of its own, and a search of its own. That of
pre-training is given. A fine-tuning with a seed starts from the pre-training with that seed.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables.plan import BYTES, CHECKPOINT, PROBE, Images, Line, Plan, Tokens
from tables.presets import PRETRAINING_LINES, Pretraining
from tables.rows import Command, Row

PROBES = {'knn': 'neighbors', 'linear': 'linear probe'}
UNREAD = ('--token-synonym-dict',)  # flags of main_seit.py's files that probing does without


class PretrainingPlan(Plan):
    """The rows of pre-training, fine-tuning and probes. Learning rates are by line, which here is its own base line."""

    def __init__(self, sizes: Pretraining, data: Path, output: Path, device: str, lr: float | None = None):
        super().__init__(sizes.after, data, output, device)
        self.lrs = dict.fromkeys(sizes.lrs, lr) if lr else sizes.lrs
        self.search = sizes.search
        self.before = self.part('pretrain', sizes.before)
        # a part of the classes; else the images are those of the other tables
        self.after = self.part('finetune' if self.preset.classes else '', self.preset)

    def base_line(self, kind: str, seeds: Sequence[int], **facts: Any) -> Line:
        """The line of PRETRAINING_LINES that `kind` names."""
        before, now = PRETRAINING_LINES[kind]
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
        return Line(kind, kind, runs, files=self.files(before, data), epochs=self.after.preset.epochs,
                    pretraining=self.before.preset.epochs if before else 0, **facts)

    def files(self, before: str, data: Images | Tokens) -> dict[str, tuple[Row, str]]:
        """The bytes of what a line is trained on, and pre-trained on."""
        start = {'start_bytes': (data_of(self.before, before).row, BYTES)} if before else {}
        return {'bytes': (data.row, BYTES), **start}

    def pretrained(self, kind: str, seed: int) -> Row:
        """The pre-training on tokens or pixels."""
        data = data_of(self.before, kind)
        return self.before.train(kind, self.before.lrs[kind], seed, words_of(self.before, data), [data.row])

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
        return [Line(f'{words} of {kind}', '', runs, f'{probe} top1', self.files(kind, data),
                     pretraining=self.before.preset.epochs) for probe, words in PROBES.items()]


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


def lines(plan: PretrainingPlan, seeds: Sequence[int]) -> list[Line]:
    """The lines of the table."""
    probes = [line for kind in ('tokens', 'pixels') for line in plan.probe_lines(kind, seeds)]
    return [*(plan.base_line(name, seeds) for name in PRETRAINING_LINES), *probes]
