"""Results of tables: read from the folders of rows that are done, and written as JSON, Markdown and figures."""
import json
import operator
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from continual.results import read_results
from fileio.files import read_json, write_text
from tables.figures import COMPACT, COUNTS, FIGURES, frontier, storage_of
from tables.plan import EVALUATION, PROBE, Line
from tables.presets import PAPER_CORRUPTIONS
from tables.rows import Row, failures_of, final_line, is_done, log_lines
from utils import InputError

RESULTS = 'results.json'
TABLE = 'table.md'
DASH = '\N{EM DASH}'
PER_SEED = ('top1', 'curves', 'ema_top1')  # lists of a line's result; first the measure
# Of continual learning: columns, in percent.
MEASURES = {'average': 'average incremental (seeds)', 'last': 'last', 'old': 'old classes', 'old_stored': 'as stored',
            'new': 'new classes', 'new_stored': 'as stored', 'forgetting': 'forgetting'}


# ---------------------------------------------------------------- reading

def seeds_on_disk(output: Path) -> set[int]:
    """The seeds of runs in an output folder, whoever asked for them."""
    # those of other epochs, and of other images, stand a folder lower
    patterns = 'train/*/lr-*-seed-*', 'train/*/*/lr-*-seed-*', '*/train/*/lr-*-seed-*', 'continual/*/*/seed-*'
    found = (re.search(r'(?:^|-)seed-(\d+)$', path.name) for pattern in patterns for path in output.glob(pattern))
    return {int(match[1]) for match in found if match}


def mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    """'mean' and 'sd' of a measure over seeds; None of too few."""
    return {'mean': round(statistics.mean(values), 3) if values else None,
            'sd': round(statistics.stdev(values), 3) if len(values) > 1 else None}


def value_of(line: Line, row: Row) -> tuple[float, dict[str, Any]]:
    """What a run's measure is, and the last line of its log, if it has one. The run is done."""
    kind, _, value = line.measure.rpartition(' ')
    if kind == 'evaluated':
        return read_json(row.folder / EVALUATION)['acc1'], {}
    if kind:
        return read_json(row.folder / PROBE)[kind]['acc1'], {}
    log = final_line(row.folder, line.epochs)
    return log['test_acc1' if value == 'top1' else 'images_per_second_time'], log


def line_result(line: Line, outcomes: dict[str, str]) -> dict[str, Any] | None:
    """The result of a line over the seeds that are done; None where nothing is known of it."""
    done = {seed: row for seed, row in line.runs.items() if is_done(row)}
    failed = list(failures_of([row.name for row in line.rows], outcomes).values())
    if not done and not failed:
        return None
    result = {'kind': line.kind, 'seeds': list(done), **line.facts}
    if line.measure == 'tasks':
        result |= tasks_result([read_results(str(row.folder)) for row in done.values()])
    else:
        result |= numbers_result(line, [value_of(line, row) for row in done.values()])
        if 'longer' in line.facts:
            result['curves'] = [top1_by_epoch(row) for row in done.values()]
        for name, (row, file) in line.files.items():
            path = row.folder / file
            result[name] = read_json(path) if path.exists() else None
    return result | ({'failed': failed[0]} if failed else {})


def top1_by_epoch(row: Row) -> list[float]:
    """Top-1 at each evaluation of a run, of which an interrupted one may have logged some twice."""
    return list({log['epoch']: log['test_acc1'] for log in log_lines(row.folder) if 'test_acc1' in log}.values())


def numbers_result(line: Line, values: Sequence[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """Measure and log of each seed, as results hold them."""
    numbers = [value for value, _ in values]
    result = {line.measure.split()[-1]: numbers, **mean_and_sd(numbers),
              'epochs': epochs_of(line),
              'paper': line.paper, 'paper_size': line.paper_size}
    averaged = [log.get('ema_test_acc1') for _, log in values]
    if averaged and None not in averaged and line.measure == 'top1':
        result['ema_top1'] = averaged
    return result


def epochs_of(line: Line) -> str:
    """The epochs of a line, as results hold them."""
    return f'{line.pretraining} + {line.epochs}' if line.pretraining else str(line.epochs)


def tasks_result(runs: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """The lines of the tasks of each seed's run, as results hold them."""
    result = {}
    found = [measures_of(lines) for lines in runs]
    for name in MEASURES:
        values = [measures[name] for measures in found if name in measures]
        result[name] = {'seeds': values, **mean_and_sd(values)}
    if runs:
        result['classes'] = [task['classes'] for task in runs[0]]
        result['accuracy'] = [[task['test_acc1'] for task in tasks] for tasks in runs]
        result |= {key: runs[0][-1][key] for key in ('memory_images', 'memory_bytes', 'tokenizer', 'tokenizer_bytes',
                                                     'codebook_bytes', 'steps')}
    return result


def measures_of(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The MEASURES at the end of a run, from a line for each task. New classes are those of the last one."""
    end = lines[-1]
    measures = {'average': end['average_acc1'], 'last': end['test_acc1']}
    seen = [0, *(line['classes'] for line in lines)]
    sizes = [after - before for before, after in zip(seen, seen[1:])]
    for form, key in (('', 'test_task_acc1'), ('_stored', 'test_stored_task_acc1')):
        if key in end:
            *old, measures[f'new{form}'] = end[key]
            if old:
                measures[f'old{form}'] = sum(map(operator.mul, old, sizes)) / seen[-2]
    return measures | ({'forgetting': end['forgetting']} if len(lines) > 1 else {})


def search_results(lines: Iterable[Line]) -> dict[str, dict[str, float]]:
    """Top-1 by learning rate of the lines of the search that are done, by kind."""
    found = {}
    for line in lines:
        for row in line.runs.values():
            if is_done(row):
                found.setdefault(line.kind, {})[str(line.rate)] = value_of(line, row)[0]
    return found


# ---------------------------------------------------------------- results of other machines

def with_results(results: dict[str, Any], path: Path, epochs: dict[str, str]) -> dict[str, Any]:
    """A table's results with what another machine has of the same table: lines, seeds and rates that are not here.

    Args:
        results: as `write` takes them, with every line of the table, which may be None.
        path: RESULTS of the other one.
        epochs: of each line of the table, as results hold them.

    Raises:
        InputError: that file is of other rates, epochs, lines or numbers of images, or of another table, or damaged.
    """
    more = read_json(path)
    try:
        return _merged(results, more, path, epochs)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        raise InputError(f'{path}: is damaged; give a {RESULTS} as this program wrote it') from None


def _merged(results: dict[str, Any], more: Any, path: Path, epochs: dict[str, str]) -> dict[str, Any]:
    facts = ('table', 'preset', 'flags')
    if (not isinstance(more, dict) or [more.get(key) for key in facts] != [results[key] for key in facts]
            or not all(isinstance(more.get(key), dict) for key in ('rows', 'lrs'))):
        raise InputError(f'{path}: is no {RESULTS} of the table {results["table"]} with --preset {results["preset"]}, '
                         'trained with the same flags')
    rows = dict(results['rows'])
    for name, other in more['rows'].items():
        if name not in rows:
            raise InputError(f'{path}: has a line that this table has not: {name}')
        if other['epochs'] != epochs[name]:
            raise InputError(f'{path}: {name} is of {other["epochs"]} epochs there, of {epochs[name]} here')
        if any(len(other[key]) != len(other['seeds']) for key in PER_SEED if key in other):
            raise ValueError(name)
        mine = rows[name]
        counts = [row['bytes']['images'] for row in (mine, other) if row and row.get('bytes')]
        if len(set(counts)) > 1:
            raise InputError(f'{path}: {name} is of {counts[1]:,} images there, of {counts[0]:,} here')
        rows[name] = with_seeds(mine, other) if mine else other
    lrs = {}
    for kind, rate in results['lrs'].items():
        there = more['lrs'].get(kind, rate)
        if there['search'] and there['epochs'] != rate['epochs']:
            raise InputError(f'{path}: the search of {kind} is of {there["epochs"]} epochs there, of {rate["epochs"]} '
                             'here')
        if there['chosen'] != rate['chosen']:
            raise InputError(f'{path}: {kind} have the learning rate {there["chosen"]:g} there, {rate["chosen"]:g} '
                             'here')
        search = there['search'] | rate['search']
        lrs[kind] = rate | {'search': {key: search[key] for key in sorted(search, key=float)}}
    return results | {'rows': rows, 'lrs': lrs}


def with_seeds(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The result of a line of numbers with the seeds of another result that it lacks; `mine` wins."""
    measure = PER_SEED[0]
    missing = [at for at, seed in enumerate(other['seeds']) if seed not in mine['seeds']]
    merged = dict(mine)
    if missing:
        order = sorted([*mine['seeds'], *(other['seeds'][at] for at in missing)])
        for key in ('seeds', *PER_SEED):
            if key in mine and key in other:
                by_seed = dict(zip(other['seeds'], other[key])) | dict(zip(mine['seeds'], mine[key]))
                merged[key] = [by_seed[seed] for seed in order]
            else:  # known of some seeds alone
                merged.pop(key, None)
        merged |= mean_and_sd(merged[measure])
    return merged | {key: other[key] for key in other
                     if merged.get(key) is None and key not in (*PER_SEED, 'failed')}


# ---------------------------------------------------------------- writing

def write(results: dict[str, Any], folder: Path) -> None:
    """Write RESULTS, TABLE and the table's figures into a folder. Prints the table. Raises InputError."""
    write_text(folder / RESULTS, json.dumps(results, indent=1) + '\n')
    text = markdown(results)
    write_text(folder / TABLE, text)
    print(text)
    for name, (something, draw) in FIGURES.get(results['table'], {}).items():
        if not something(results):
            continue
        try:
            draw(results, folder / name)
        except InputError as error:  # the numbers are there
            print(f'note: {name} is left out: {error}')


# ---------------------------------------------------------------- Markdown

def markdown(results: dict[str, Any]) -> str:
    """A table with its title and notes."""
    head, lines, note = MARKDOWN[results['table']](results)
    text = [f'## {results["title"]} ({results["preset"]})', '', row_of(head),
            row_of(['---', *['---:'] * (len(head) - 1)]), *map(row_of, lines), '', note, '', rates(results)]
    text += [f'\n{name}: {" ".join(result["failed"].split())}' for name, result in results['rows'].items()
             if 'failed' in result]
    return '\n'.join(text).rstrip() + '\n'


def row_of(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f'| {" | ".join(cell.replace("|", "/") for cell in cells)} |'


def rates(results: dict[str, Any]) -> str:
    """A sentence about the learning rates."""
    parts = []
    for kind, found in results['lrs'].items():
        tried = ', '.join(f'{rate}: {top1:.2f}' for rate, top1 in found['search'].items())
        search = f' (top-1 of the search, {found["epochs"]} epochs each: {tried})' if tried else ''
        parts.append(f'{kind} {found["chosen"]:g}{search}')
    return f'Learning rates: {"; ".join(parts)}.' if parts else ''


def spread(result: dict[str, Any] | None, digits: int = 2) -> str:
    """Mean ± standard deviation (seeds)."""
    if not result or result['mean'] is None:
        return 'failed' if result and 'failed' in result else DASH
    deviation = '' if result['sd'] is None else f' ± {result["sd"]:,.{digits}f}'
    return f'{result["mean"]:,.{digits}f}{deviation} ({len(result["seeds"])})'


def paper_of(result: dict[str, Any]) -> str:
    """The paper's value and storage, or a dash where nobody here could find it."""
    if result['paper'] is None:
        return DASH
    size = f' at {result["paper_size"]}' if result['paper_size'] else ''
    return f'{result["paper"]:.1f}{size}'


def storage_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Head, lines and note of table 1."""
    head = ['', 'images', 'bytes as files', 'ratio', 'bytes without headers', 'ratio', 'top-1 (seeds)',
            'paper, ImageNet-1k']
    lines = []
    groups = list(dict.fromkeys(result['group'] for result in results['rows'].values() if 'group' in result))
    head[-1:-1] = groups
    for name, result in results['rows'].items():
        if 'group' in result:  # a column of its line
            continue
        cells = [name, f'{result["bytes"]["images"]:,}' if result['bytes'] else DASH]
        for count in COUNTS:
            size = storage_of(result, count)
            cells += [f'{size[0]:,.0f}', f'{size[1]:.1f}'] if size else [DASH, DASH]
        of_groups = [spread(results['rows'].get(f'{name.removesuffix(COMPACT)} ({group})')) for group in groups]
        lines.append([*cells, spread(result), *of_groups, paper_of(result)])
    note = ('Bytes of the whole training set, of tokens with the codebook, for each image of the full one. Without '
            'headers: the coded data of images, the entropy of single codes of tokens or the .gz where that is less, '
            'the coded words and the model of compact ones. Top-1 is of the last epoch.')
    best = [f'{name} ({top1:.2f} in {size:,.0f} bytes)' for name, size, top1 in frontier(results, 'files')]
    return head, lines, note + (f' No other line is better in as few bytes, as files, than {", ".join(best)}.'
                                if len(best) > 1 else '')


def ablation_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Head, lines and note of table 2."""
    base = results['rows'].get('tokens', {}).get('mean')
    lines = []
    for name, result in results['rows'].items():
        known = base is not None and result['mean'] is not None and name != 'tokens'
        lines.append([name.replace('tokens', 'base recipe'), spread(result),
                      f'{result["mean"] - base:+.2f}' if known else '', paper_of(result)])
    return (['', 'top-1 (seeds)', 'against the base', 'paper, ImageNet-1k'], lines,
            'The base recipe has synonyms, swaps, crops, embedding noise and CutMix, and a Stem-adaptor.')


def robustness_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Head, lines and note of table 3: a line for each corruption, a column for each severity, and their means."""
    rows = results['rows']
    corrupted = {name: row for name, row in rows.items() if 'severity' in row}
    severities = sorted({row['severity'] for row in corrupted.values()})
    lines = []
    for name in dict.fromkeys(name.removesuffix(f' {row.get("severity")}') for name, row in rows.items()):
        kind, _, corruption = name.partition(' ')
        found = [rows.get(f'{name} {severity}') for severity in severities]
        paper = paper_of(rows[name]) if name in rows else DASH
        if kind == 'tokens':
            paper = PAPER_CORRUPTIONS.get(corruption, paper)
        lines.append([name, spread(rows.get(name)), *map(spread, found), mean_of(found), paper])
    names = {name.removesuffix(f' {row["severity"]}').partition(' ')[2] for name, row in corrupted.items()}
    for kind in dict.fromkeys(row['kind'] for row in rows.values()):
        # a dash where one is not known: a mean of some corruptions would be compared with one of others
        columns = [[rows.get(f'{kind} {name} {severity}') for name in names] for severity in severities]
        lines.append([f'{kind}, mean of corruptions', DASH, *map(mean_of, columns), mean_of(sum(columns, [])), DASH])
    return (['', 'top-1 (seeds)', *map(str, severities), 'mean', 'paper, ImageNet-1k'], lines,
            f"Columns {', '.join(map(str, severities))} are severities. Of which severity the paper's numbers for "
            'noise and blur are, and which blur it was, is not known to us.')


def mean_of(results: Sequence[dict[str, Any] | None]) -> str:
    """The mean top-1 of some lines; a dash where one is not known."""
    values = [result and result['mean'] for result in results]
    return f'{statistics.mean(values):.2f}' if values and None not in values else DASH


def speed_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Head, lines and note of table 4."""
    lines = []
    for name, result in results['rows'].items():
        size = result['bytes'] and result['bytes']['files'] / result['bytes']['images']
        read_rate = DASH if result['mean'] is None or not size else f'{result["mean"] * size / 1e6:,.2f}'
        lines.append([name, spread(result, 0), f'{size:,.0f}' if size else DASH, read_rate])
    return (['', 'images/s (runs)', 'bytes an image, as files', 'MB/s'], lines,
            'Training alone, the second epoch. MB/s is the product. Tokens are decoded once, to two bytes a code in a '
            'memory map, which is what training reads.')


def seitpp_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Head, lines and note of table 5."""
    lines = [[name.replace('tokens', 'SeiT'), result['epochs'], spread(result), paper_of(result)]
             for name, result in results['rows'].items()]
    adapted = 'all but the first two' if results['token_adapt'] else 'none'
    return (['', 'epochs', 'top-1 (seeds)', 'paper, ImageNet-1k'], lines,
            f'All but the first have ColorAdapt, {adapted} TokenAdapt. Published: 400 + 100 epochs, against 300.')


def pretraining_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Head, lines and note of table 6."""
    lines = []
    for name, result in results['rows'].items():
        sizes = [f'{size["images"]:,} in {size["files"] / 1e6:,.2f} MB' if size else DASH
                 for size in (result.get('start_bytes'), result['bytes'])]
        lines.append([name, *sizes, result['epochs'], spread(result), paper_of(result)])
    return (['', 'pre-training images', 'images', 'epochs', 'top-1 (seeds)', 'paper, ImageNet-1k'], lines,
            'Fine-tuned, and trained from scratch, for as many epochs. Neighbors and linear probe: of the frozen '
            'features of the pre-trained model, on the images that others are fine-tuned on. Bytes as files. Top-1 is '
            'of the last epoch.')


def continual_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Head, lines and note of table 7."""
    head = ['new task, memory', 'bytes of memory', 'images held', *MEASURES.values(), 'tokenizer and codebook, bytes']
    lines = []
    for name, result in results['rows'].items():
        held = 'accuracy' in result
        cells = [name, *(f'{result[key]:,}' if held and result['memory'] else DASH
                         for key in ('memory_bytes', 'memory_images'))]
        cells += [spread({**result[key], 'failed': ''} if 'failed' in result else result[key], 1) for key in MEASURES]
        extra = (result['tokenizer_bytes'] or 0) + (result['codebook_bytes'] or 0) if held else 0
        lines.append([*cells, f'{extra:,}' if extra else DASH])
    return head, lines, (f'{results["epochs"]} epochs of the new task\'s images a task, in all rows. Memory: '
                         f'{results["policy"]}; its bytes are data, labels and index at the end, of the first seed. '
                         'Old classes, new classes: after the last task; as stored: their validation images as the '
                         'memory would give them back.')


def tokenizers_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Head, lines and note of the table of tokenizers."""
    head = ['', 'codes', 'bits a code', 'bytes (entropy)', 'bytes on disk', 'PSNR', 'SSIM', 'codes used', 'images/s',
            'top-1 (seeds)']
    lines = []
    for name, result in results['rows'].items():
        codes, quality, speed = (result.get(key) for key in ('codes', 'quality', 'speed'))
        cells = [DASH] * 8
        if codes:
            size = codes['bytes_per_image']
            cells[:4] = [f'{codes["grid"]}x{codes["grid"]}', f'{codes["entropy_bits"]:.2f}', f'{size["entropy"]:,.0f}',
                         f'{size["stored"]:,.0f}']
            cells[6] = f'{codes["codes_used"] / codes["codes"]:.1%}'
        if quality and quality['psnr'] is not None:
            cells[4:6] = [f'{quality["psnr"]:.2f}', f'{quality["ssim"]:.3f}']
        if speed:
            cells[7] = f'{speed["tokenizer_images_per_second"]["fp32"]["median"]:,.0f}'
        lines.append([name, *cells, spread(result)])
    return head, lines, ('Bytes are of a training image. PSNR and SSIM are means over the validation images, compared '
                         'at one size. Images a second: of the tokenizer alone, in float32. Top-1 is of the last '
                         'epoch.')


MARKDOWN: dict[str, Callable] = {
    'storage': storage_table, 'ablation': ablation_table, 'robustness': robustness_table, 'speed': speed_table,
    'seitpp': seitpp_table, 'pretraining': pretraining_table, 'continual': continual_table,
    'tokenizers': tokenizers_table}
