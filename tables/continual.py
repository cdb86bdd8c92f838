"""Table 7: class-incremental learning with a memory of so many bytes, of tokens, pixels, small pixels or JPEGs.

    python tables/continual.py --preset tiny --data-path DATA --output-dir output/tables --device cpu --dry-run

The tokenizer is fitted on the first task's images alone, once for all rows. Every row takes the same steps. Writes
results.json, table.md, tasks.png (accuracy against classes seen) and bytes.png (average incremental accuracy against
bytes of memory). docs/continual.md says what is compared.
"""
import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flags import SEED, Parser, byte_count
from tables import continual_report
from tables.plan import Plan, needed
from tables.presets import IMAGENET, TINY, Preset
from tables.rows import Row
from tables.table import (add_run_flags, check_data, chosen_lines, exit_code, print_commands, run_taken, seeds_on_disk,
                          take_folder)
from training.preemption import StopSignal
from utils import run

PROGRAM = 'main_continual.py'
RUNS = f'{continual_report.NAME}/*/*/seed-*'  # their folders in --output-dir


@dataclass(frozen=True)
class Protocol:
    """A class-incremental protocol, and what is compared under it.

    Attributes:
        preset: images, models and flags of training; its epochs are those of a task.
        base: classes of the first task.
        increment: classes of each later task.
        lrs: learning rates on tokens and on pixels.
        image_size: pixels on a side that images are resized to, to be tokenized.
        input_size: main_seit.py's, 8 pixels to a code.
        qualities: of JPEGs in memory.
        sides: of small pixels in memory.
        memories: in bytes.
    """
    preset: Preset
    base: int
    increment: int
    lrs: dict[str, float]
    image_size: int
    input_size: int
    qualities: tuple[int, ...]
    sides: tuple[int, ...]
    memories: tuple[int, ...] = (250_000, 1_000_000, 4_000_000)


# The learning rates of `tiny` are those that the search of table 1 found for its images and models.
TINY_TASKS = Protocol(TINY, 4, 4, {'tokens': 5e-4, 'pixels': 5e-4}, 128, 128, qualities=(50, 8), sides=(32, 16))
B10_INC10 = Protocol(
    replace(IMAGENET, epochs=170, launcher=(), training=('--batch-size', '128'),
            token_model=('deit_small_token_32',), pixel_model=('deit_small_patch16_224',),
            pixels=(*IMAGENET.pixels, '--no-repeated-aug')),
    10, 10, {'tokens': 7.5e-4, 'pixels': 5e-4}, 256, 224, qualities=(50, 10), sides=(112, 56))
PROTOCOLS = {'tiny': TINY_TASKS, 'b10-inc10': B10_INC10, 'b50-inc5': replace(B10_INC10, base=50, increment=5)}


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        arm: what is trained on and remembered.
        kind: 'tokens' or 'pixels'.
        memory: bytes, 0 for an arm without.
        runs: rows by seed.
    """
    arm: str
    kind: str
    memory: int
    runs: dict[int, Row]

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f'{self.arm}, {self.memory / 1e6:.10g} MB' if self.memory else self.arm


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add('--preset', default='tiny', choices=list(PROTOCOLS),
        help='tiny: 20 classes of 64 pixels in five tasks, two CPU cores; b10-inc10 and b50-inc5: 100 classes of DATA, '
        'as of ImageNet, one GPU')
    add('--data-path', required=True, metavar='DIR', help='train/ and val/ with a folder of images for every class')
    add('--output-dir', required=True, metavar='DIR', help='for all rows and results')
    add('--rows', nargs='+', default=[], metavar='NAME', help="lines, as 'tokens*' or '*1 MB'; default: all")
    add('--seeds', type=SEED, nargs='+', default=[0])
    add('--memories', type=byte_count, nargs='+', metavar='BYTES', help="as in 1e6; default: the preset's")
    add('--memory-policy', default='balanced', choices=['balanced', 'reservoir'])
    add_run_flags(add)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- the rows

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
        policy: of the memories.
        data, output, device: as of Plan.
    """

    def __init__(self, protocol: Protocol, policy: str, data: Path, output: Path, device: str):
        super().__init__(protocol.preset, data, output, device, protocol.lrs)
        self.protocol = protocol
        self.policy = ('--memory-policy', policy)

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
        protocol = f'B{self.protocol.base}-Inc{self.protocol.increment}'
        name = re.sub('[, ]+', '-', arm) + (f'-{memory}-{self.policy[1]}' if flags else '')
        runs = {}
        for seed in seeds:
            folder = f'{continual_report.NAME}/{protocol}/{name}/seed-{seed}'
            end = ('--seed', seed, *self.device, '--output-dir', self.output / folder, '--resume', 'auto')
            runs[seed] = self.row(folder, [(*words, *end)], after)
        return Line(arm, kind, memory if flags else 0, runs)


def lines_of(plan: TasksPlan, memories: Sequence[int], seeds: Sequence[int]) -> list[Line]:
    """All lines of the table: arms without a memory, then the others for each memory."""
    arms = arms_of(plan.protocol)
    return [plan.line(arm, 0, seeds) for arm, (_, flags) in arms.items() if not flags] + [
        plan.line(arm, memory, seeds) for memory in memories for arm, (_, flags) in arms.items() if flags]


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> int:
    """Run the rows, or print their commands; write the results. Returns the exit code."""
    protocol = PROTOCOLS[args.preset]
    memories = sorted(set(args.memories or protocol.memories))
    plan = TasksPlan(protocol, args.memory_policy, Path(args.data_path), Path(args.output_dir), args.device)
    lines = chosen_lines(lines_of(plan, memories, args.seeds), args.rows)
    rows = needed(plan.rows, [row for line in lines for row in line.runs.values()])
    if args.dry_run:
        print_commands(rows, [])
        return 0
    check_data(args.data_path)
    with take_folder(plan.output), StopSignal() as stop:
        outcomes = run_taken(rows, args.jobs, args.threads, stop)
        lines = lines_of(plan, memories, sorted(seeds_on_disk(plan.output, [RUNS]) | set(args.seeds)))
        facts = {'preset': args.preset, 'protocol': f'B{protocol.base}-Inc{protocol.increment}',
                 'policy': args.memory_policy, 'epochs': protocol.preset.epochs, 'lrs': protocol.lrs}
        continual_report.write(lines, outcomes, facts, plan.output / continual_report.NAME)
    return exit_code(outcomes, stop)


if __name__ == '__main__':
    run(main, parse_args)
