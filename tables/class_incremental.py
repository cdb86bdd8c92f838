"""Table 7: class-incremental learning with a memory of so many bytes, of tokens, pixels, small pixels or JPEGs.

The tokenizer is fitted on the first task's images alone, once for all rows. Every row takes the same steps.
docs/continual.md says what is compared.
"""
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables.plan import Line, Plan
from tables.presets import Protocol
from tables.rows import Row

NAME = 'continual'  # of the table, and of its folder
PROGRAM = 'main_continual.py'


def arms_of(protocol: Protocol) -> dict[str, tuple[str, tuple[str, ...] | None]]:
    """By name, what an arm trains on, and the flags of its memory, without the bytes; None for an arm without."""
    arms = {'tokens, fine-tuning': ('tokens', None), 'pixels, fine-tuning': ('pixels', None),
            'tokens, joint': ('tokens', None), 'pixels, joint': ('pixels', None),
            'tokens, replay of tokens': ('tokens', ('tokens',)), 'pixels, replay of pixels': ('pixels', ('pixels',))}
    arms |= {f'pixels, replay of JPEG q{quality}': ('pixels', ('jpeg', '--memory-quality', str(quality)))
             for quality in protocol.qualities}
    arms |= {f'pixels, replay of {side} pixels': ('pixels', ('resize', '--memory-side', str(side)))
             for side in protocol.sides}
    return arms | {'pixels, replay of tokens': ('pixels', ('tokens',))}


class TasksPlan(Plan):
    """The rows of a protocol.

    Args:
        protocol: see there.
        data, output, device, lr: as of Plan.
        memories: in bytes; None for the protocol's.
        policy: of the memories.
    """

    def __init__(self, protocol: Protocol, data: Path, output: Path, device: str, lr: float | None = None,
                 memories: Sequence[int] | None = None, policy: str = 'balanced'):
        super().__init__(protocol.preset, data, output, device)
        self.lrs = dict.fromkeys(protocol.lrs, lr) if lr else protocol.lrs
        self.search = {}
        self.protocol = protocol
        self.memories = sorted(set(memories or protocol.memories))
        self.policy = ('--memory-policy', policy)

    @property
    def name(self) -> str:
        """Of the protocol, as the field has it: the first task's classes, and the others'."""
        return f'B{self.protocol.base}-Inc{self.protocol.increment}'

    def task_words(self) -> tuple[Any, ...]:
        """The program, and the flags of images and tasks."""
        return (*self.preset.launcher, PROGRAM, '--train-path', self.split('train'), '--val-path', self.split('val'),
                '--base-classes', self.protocol.base, '--inc-classes', self.protocol.increment)

    def first_task_tokens(self) -> tuple[Row, tuple[Any, ...]]:
        """The row that makes the tokens, and the flags that use them."""
        name = f'tokens/first-{self.protocol.base}-classes'
        folder = self.output / name
        flags = ('--tokenizer-from-task', 0, '--image-size', self.protocol.image_size, '--tokens-dir', folder)
        make = (*self.task_words(), *flags, '--tokenize-only', '--output-dir', folder, *self.device)
        return self.row(name, [make], self.chosen()), flags

    def line(self, arm: str, memory: int, seeds: Sequence[int]) -> Line:
        """The line of an arm, with so many bytes of memory."""
        kind, flags = arms_of(self.protocol)[arm]
        training = self.preset.tokens if kind == 'tokens' else (*self.preset.pixels, *self.workers)
        model = self.preset.token_model if kind == 'tokens' else self.preset.pixel_model
        words = (*self.task_words(), '--new', kind, '--model', *model, '--epochs', self.preset.epochs,
                 '--warmup-epochs', self.preset.warmup_epochs, *self.preset.training, *training, '--lr',
                 f'{self.lrs[kind]:g}')
        after = self.chosen()
        if kind == 'tokens':
            words += ('--input-size', self.protocol.input_size)
        if 'tokens' in (kind, *(flags or ())):
            row, tokens = self.first_task_tokens()
            words += tokens
            after = (*after, row)
        if flags:
            words += ('--memory', *flags, '--memory-bytes', memory, *self.policy)
            if flags[0] not in (kind, 'pixels'):  # stored images differ from new ones
                words += ('--eval-stored',)
        elif arm.endswith('joint'):
            words += ('--joint',)
        name = re.sub('[, ]+', '-', arm) + (f'-{memory}-{self.policy[1]}' if flags else '')
        runs = {}
        for seed in seeds:
            folder = f'{NAME}/{self.name}/{name}/seed-{seed}'
            end = ('--seed', seed, *self.device, '--output-dir', self.output / folder, '--resume', 'auto')
            runs[seed] = self.row(folder, [(*words, *end)], after)
        memory = memory if flags else 0
        return Line(f'{arm}, {memory / 1e6:.10g} MB' if memory else arm, kind, runs, 'tasks',
                    facts={'arm': arm, 'memory': memory})


def lines(plan: TasksPlan, seeds: Sequence[int]) -> list[Line]:
    """All lines of the table: arms without a memory, then the others for each memory."""
    arms = arms_of(plan.protocol)
    return [plan.line(arm, 0, seeds) for arm, (_, flags) in arms.items() if not flags] + [
        plan.line(arm, memory, seeds) for memory in plan.memories for arm, (_, flags) in arms.items() if flags]
