"""What the scripts of the tables share: their flags, the search for learning rates, running the rows, the results."""
import fnmatch
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fileio.files import lock_file, read_json
from flags import SEED, Parser, integer, number
from tables import report
from tables.plan import BYTES, MANIFEST, PROBE, Line, Plan, needed
from tables.presets import PRESETS
from tables.rows import OUTPUT, Row, failures_of, final_line, is_done, printed_accuracy, run_rows, shell_line, take
from training.preemption import REQUEUE, StopSignal
from utils import InputError, cores

TRAININGS = ('train/*/lr-*-seed-*', '*/train/*/lr-*-seed-*')  # their folders in an output folder
SEARCH_SEED = 0  # whatever --seeds says: else another order of seeds would choose another learning rate
LinesOf = Callable[[Plan, Sequence[int]], list[Line]]


@dataclass(frozen=True)
class Options:
    """The flags of `add_table_flags`, as they were given."""
    preset: str
    data_path: str
    output_dir: str
    rows: list[str]
    seeds: list[int]
    lrs: list[float] | None
    dry_run: bool
    jobs: int
    threads: int
    device: str

    def plan(self, lrs: dict[str, float]) -> Plan:
        """A plan with these learning rates."""
        return Plan(PRESETS[self.preset], Path(self.data_path), Path(self.output_dir), self.device, lrs)

    def rates(self) -> dict[str, list[float]]:
        """Learning rates to try, by kind."""
        return {kind: list(dict.fromkeys(self.lrs or rates)) for kind, rates in PRESETS[self.preset].lrs.items()}


def add_table_flags(parser: Parser) -> None:
    """The flags that all tables have."""
    add = parser.add_argument
    add('--preset', default='tiny', choices=list(PRESETS),
        help="tiny: two CPU cores; tiny-gpu: one GPU; imagenet: the paper's, eight GPUs")
    add('--data-path', required=True, metavar='DIR', help='train/ and val/ with a folder of images for every class; '
        'for imagenet also tokens/ (the published token files) and weights/tokenizer.ckpt')
    add('--output-dir', required=True, metavar='DIR', help='for all rows and results; tables may share it, and then '
        'share what they have in common')
    add('--rows', nargs='+', default=[], metavar='NAME', help="lines of the table, as '*' or 'JPEG*'; default: all")
    add('--seeds', type=SEED, nargs='+', default=[0])
    add('--lrs', type=number(1e-12), nargs='+',
        help=f"learning rates to try with seed {SEARCH_SEED}, for tokens and for pixels each; default: the preset's")
    add_run_flags(add)


def add_run_flags(add: Callable) -> None:
    """How rows are run, added by a parser's add_argument."""
    add('--dry-run', action='store_true', help='print the commands, and run nothing')
    add('--jobs', type=integer(1), default=1, help='rows at a time, each with --threads')
    add('--threads', type=integer(1), default=max(1, cores() // 2), help='of a program on the CPU')
    add('--device', default='auto', help='auto (CUDA where there is one), cuda, cuda:N or cpu')


def run_table(name: str, title: str, lines_of: LinesOf, options: Options) -> int:
    """Run the rows of a table, or print their commands; write its results.

    Args:
        name: of the table's folder below --output-dir.
        title: of the table.
        lines_of: (plan, seeds) -> the lines.
        options: the command line.

    Returns:
        The exit code: 1 where a row failed, 75 where a signal stopped it, else 0.

    Raises:
        InputError: for a line that the table does not have, or an output folder that cannot be used.
    """
    if options.dry_run:
        plan, rows = planned(lines_of, options)
        print_commands(rows, [kind for kind in kinds_of(lines_of(plan, options.seeds), options)
                              if 1 < len(options.rates()[kind]) > len(best_rate(options, kind)[1])])
        return 0
    check_data(options.data_path)
    with take_folder(Path(options.output_dir)), StopSignal() as stop:
        plan, rows = planned(lines_of, options, searching=True)
        outcomes = run_taken(rows, options.jobs, options.threads, stop)
        if not stop.received:
            plan, rows = planned(lines_of, options)
            outcomes = run_taken(rows, options.jobs, options.threads, stop, outcomes)
        write_results(name, title, lines_of, options, plan, outcomes)
    return exit_code(outcomes, stop)


def check_data(data_path: str) -> None:
    """InputError for a --data-path without train/ and val/."""
    for split in ('train', 'val'):
        if not Path(data_path, split).is_dir():
            raise InputError(f'{data_path}: has no folder {split}/; give one with train/ and val/')


def run_taken(rows: Sequence[Row], jobs: int, threads: int, stop: StopSignal,
              before: dict[str, str] | None = None) -> dict[str, str]:
    """`run_rows`, until a signal. A folder of another run is an InputError, before anything is run or written."""
    for row in rows:
        if row.folder.exists():
            take(row)
    return run_rows(rows, jobs, threads, before, lambda: stop.received)


def exit_code(outcomes: dict[str, str], stop: StopSignal) -> int:
    """Print what failed, or that a signal stopped it; returns 1, 75, or 0."""
    failed = failures_of(outcomes, outcomes)
    for row, outcome in failed.items():
        print(f'error: {row}: {outcome}', file=sys.stderr, flush=True)
    if stop.received or 'stopped' in outcomes.values():
        print('stopped by a signal; the same command resumes it', flush=True)
        return REQUEUE
    return int(bool(failed))


def take_folder(folder: Path) -> Any:
    """Take the output folder for this process, as a context. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locked = lock_file(folder / '.lock')
    except BlockingIOError:
        raise InputError(f'{folder}: another table is being made there; wait, or choose another --output-dir') from None
    except OSError as error:
        raise InputError(f'{folder}: --output-dir cannot be written ({error.strerror})') from None
    return locked or open(folder / '.lock', 'rb')


# ---------------------------------------------------------------- which rows

def planned(lines_of: LinesOf, options: Options, searching: bool = False) -> tuple[Plan, list[Row]]:
    """The plan with the learning rates known so far, and the rows to run.

    Args:
        lines_of, options: of the table.
        searching: only the rows of the search for learning rates; otherwise all.
    """
    rates = options.rates()
    plan = options.plan({kind: found[0] for kind, found in rates.items()})
    search = [rows for kind in kinds_of(lines_of(plan, options.seeds), options) if len(rates[kind]) > 1
              for _, rows in search_rows(options, kind).values()]
    if searching:
        return plan, merged(search)
    plan = options.plan({kind: best_rate(options, kind)[0] for kind in rates})
    lines = chosen_lines(lines_of(plan, options.seeds), options.rows)
    wanted = [row for line in lines for row in [line.full, line.start, line.data, *line.runs.values()] if row]
    return plan, merged([*search, needed(plan.rows, wanted)])


def kinds_of(lines: list[Line], options: Options) -> list[str]:
    """The kinds of the lines that are asked for, each of which has a learning rate."""
    return sorted({line.kind for line in chosen_lines(lines, options.rows) if line.kind}, reverse=True)


def merged(lists: Any) -> list[Row]:
    """Rows of several lists, each once."""
    return list({row.name: row for rows in lists for row in rows}.values())


def chosen_lines(lines: list[Any], patterns: Sequence[str]) -> list[Any]:
    """The lines, by their names, that a pattern fits, or all without patterns. InputError for one that fits none."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(line.name, pattern) for line in lines):
            names = ', '.join(repr(line.name) for line in lines)
            raise InputError(f'--rows {pattern}: is none of {names}')
    return [line for line in lines
            if not patterns or any(fnmatch.fnmatchcase(line.name, pattern) for pattern in patterns)]


def search_rows(options: Options, kind: str) -> dict[float, tuple[Line, list[Row]]]:
    """By learning rate, the search: the base line of a kind with SEARCH_SEED, and its rows."""
    rows = {}
    for rate in options.rates()[kind]:
        plan = options.plan({kind: rate})
        line = plan.base_line(kind, [SEARCH_SEED])
        rows[rate] = line, needed(plan.rows, line.runs.values())
    return rows


def best_rate(options: Options, kind: str) -> tuple[float, dict[float, float]]:
    """The learning rate of a kind, the first one until runs of the search are done; and the top-1 of those.

    The search looks at the validation images that the results are of, for tokens and pixels alike.
    """
    rates = options.rates()[kind]
    top1 = {}
    if len(rates) > 1:
        for rate, (line, _) in search_rows(options, kind).items():
            row = line.runs[SEARCH_SEED]
            log = final_line(row.folder, line.epochs) if is_done(row) else None
            if log:
                top1[rate] = log['test_acc1']
    return max(top1, key=top1.get) if top1 else rates[0], top1


def print_commands(rows: Sequence[Row], searched: Sequence[str]) -> None:
    """Print the commands of rows so that a shell can run them.

    Args:
        rows: in order.
        searched: kinds whose learning rate is not known yet.
    """
    for kind in searched:
        print(f'# {kind}: the search for the learning rate is not done, so the first one stands below')
    for row in rows:
        state = ' (done)' if is_done(row) else ''
        print(f'# {row.name}{state}')
        print(f'mkdir -p {shlex.quote(str(row.folder))}')
        for command in row.commands:
            print(shell_line(command))


# ---------------------------------------------------------------- results

def seeds_on_disk(output: Path, folders: Sequence[str]) -> set[int]:
    """The seeds of runs in an output folder, whoever asked for them; `folders` are patterns of theirs."""
    paths = (path for pattern in folders for path in output.glob(pattern))
    found = (re.search(r'(?:^|-)seed-(\d+)$', path.name) for path in paths)
    return {int(match[1]) for match in found if match}


def value_of(line: Line, row: Row) -> tuple[float | None, dict[str, Any]]:
    """What a run's measure is, and the last line of its log. None where the run is not done."""
    if not is_done(row):
        return None, {}
    if line.measure == 'printed top1':
        return printed_accuracy(row.folder / OUTPUT), {}
    if line.measure in ('knn top1', 'linear top1'):
        return read_json(row.folder / PROBE)[line.measure.split()[0]]['acc1'], {}
    log = final_line(row.folder, line.epochs) or {}
    return log.get('test_acc1' if line.measure == 'top1' else 'images_per_second_time'), log


def line_result(line: Line, outcomes: dict[str, str]) -> dict[str, Any] | None:
    """The result of a line over the seeds that are done; None where nothing is known of it."""
    values = {seed: value_of(line, row) for seed, row in line.runs.items()}
    done = {seed: value for seed, value in values.items() if value[0] is not None}
    failed = list(failures_of([row.name for row in line.runs.values()], outcomes).values())
    if not done and not failed:
        return None
    numbers = [value for value, _ in done.values()]
    result = {'kind': line.kind, 'seeds': list(done), line.measure.split()[-1]: numbers, **report.mean_and_sd(numbers),
              'epochs': f'{line.pretraining} + {line.epochs}' if line.pretraining else str(line.epochs),
              'paper': line.paper, 'paper_size': line.paper_size}
    averaged = [log.get('ema_test_acc1') for _, log in done.values()]
    if None not in averaged and averaged and line.measure == 'top1':
        result['ema_top1'] = averaged
    if failed:
        result['failed'] = failed[0]
    size = line.data.folder / BYTES
    manifest = line.data.folder / MANIFEST
    if manifest.exists():
        result['psnr'] = read_json(manifest).get('psnr')
    start = line.start and line.start.folder / BYTES
    if start:
        result['start_bytes'] = read_json(start) if start.exists() else None
    return result | {'bytes': read_json(size) if size.exists() else None}


def write_results(name: str, title: str, lines_of: LinesOf, options: Options, plan: Plan,
                  outcomes: dict[str, str]) -> None:
    """Write results.json, table.md and, for bytes against accuracy, curve.png into the table's folder."""
    seeds = sorted(seeds_on_disk(plan.output, TRAININGS) | set(options.seeds))
    planned_lines = lines_of(plan, seeds)
    kinds = dict.fromkeys(line.kind for line in planned_lines if line.kind)
    lines = {line.name: line_result(line, outcomes) for line in planned_lines}
    full = plan.full().row.folder / BYTES
    results = {'table': name, 'title': title, 'preset': options.preset,
               'lrs': {kind: {'chosen': rate, 'search': dict(zip(map(str, top1), top1.values()))}
                       for kind in kinds for rate, top1 in [best_rate(options, kind)]},
               'full_bytes': read_json(full) if full.exists() else None,
               'rows': {line: result for line, result in lines.items() if result}}
    report.write(results, plan.output / name)
