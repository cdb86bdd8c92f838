"""Results of class-incremental runs as JSON and Markdown, and two figures."""
import json
import operator
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from continual.results import read_results
from fileio.figures import pyplot, save_figure
from fileio.files import write_text
from tables.report import DASH, RESULTS, TABLE, mean_and_sd, row_of, spread
from tables.rows import failures_of, is_done
from utils import InputError

NAME = 'continual'  # of the table, and of its folder
KEYS = {'table', 'title', 'preset', 'policy', 'epochs', 'lrs', 'rows'}  # of results
TASKS_FIGURE = 'tasks.png'
BYTES_FIGURE = 'bytes.png'
# columns, in percent
MEASURES = {'average': 'average incremental (seeds)', 'last': 'last', 'old': 'old classes', 'old_stored': 'as stored',
            'new': 'new classes', 'new_stored': 'as stored', 'forgetting': 'forgetting'}
STYLES = {'joint': ':', 'fine-tuning': '--'}  # of lines without a memory; others are solid


# ---------------------------------------------------------------- results

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


def line_result(line: Any, outcomes: dict[str, str]) -> dict[str, Any] | None:
    """The result of a line over the seeds that are done; None where nothing is known of it.

    Args:
        line: with arm, kind, memory, and runs: rows by seed.
        outcomes: what became of rows, by name.
    """
    runs = {seed: read_results(str(row.folder)) for seed, row in line.runs.items() if is_done(row)}
    failed = list(failures_of([row.name for row in line.runs.values()], outcomes).values())
    if not runs and not failed:
        return None
    ends = [tasks[-1] for tasks in runs.values()]
    result = {'arm': line.arm, 'kind': line.kind, 'memory': line.memory, 'seeds': list(runs)}
    found = [measures_of(lines) for lines in runs.values()]
    for name in MEASURES:
        values = [measures[name] for measures in found if name in measures]
        result[name] = {'seeds': values, **mean_and_sd(values)}
    if ends:
        result['classes'] = [task['classes'] for task in next(iter(runs.values()))]
        result['accuracy'] = [[task['test_acc1'] for task in tasks] for tasks in runs.values()]
        result |= {key: ends[0][key] for key in ('memory_images', 'memory_bytes', 'tokenizer', 'tokenizer_bytes',
                                                 'codebook_bytes', 'steps')}
    return result | ({'failed': failed[0]} if failed else {})


def write(lines: Sequence[Any], outcomes: dict[str, str], facts: dict[str, Any], folder: Path) -> None:
    """Write RESULTS, TABLE and the figures into a folder. Prints the table. Raises InputError."""
    rows = {line.name: result for line in lines if (result := line_result(line, outcomes))}
    results = {'table': NAME, 'title': f'Class-incremental learning, {facts["protocol"]}', **facts, 'rows': rows}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULTS, json.dumps(results, indent=1) + '\n')
    text = markdown(results)
    write_text(folder / TABLE, text)
    print(text)
    if any('accuracy' in result for result in rows.values()):
        try:
            draw_tasks(results, folder / TASKS_FIGURE)
            draw_bytes(results, folder / BYTES_FIGURE)
        except InputError as error:  # the numbers are there
            print(f'note: the figures are left out: {error}')


def markdown(results: dict[str, Any]) -> str:
    """The table with its title and notes."""
    head = ['new task, memory', 'bytes of memory', 'images held', *MEASURES.values(), 'tokenizer and codebook, bytes']
    lines = []
    for name, result in results['rows'].items():
        cells = [name]
        held = 'accuracy' in result
        cells += [f'{result[key]:,}' if held and result['memory'] else DASH for key in ('memory_bytes',
                                                                                        'memory_images')]
        cells += [spread({**result[key], 'failed': ''} if 'failed' in result else result[key], 1) for key in MEASURES]
        extra = (result['tokenizer_bytes'] or 0) + (result['codebook_bytes'] or 0) if held else 0
        lines.append([*cells, f'{extra:,}' if extra else DASH])
    text = [f'## {results["title"]} ({results["preset"]})', '', row_of(head),
            row_of(['---', *['---:'] * (len(head) - 1)]), *map(row_of, lines), '',
            f'{results["epochs"]} epochs of the new task\'s images a task, in all rows. Memory: {results["policy"]}; '
            'its bytes are data, labels and index at the end, of the first seed. Old classes, new classes: after the '
            'last task; as stored: their validation images as the memory would give them back. Learning rates: '
            + '; '.join(f'{kind} {rate:g}' for kind, rate in results['lrs'].items()) + '.']
    text += [f'\n{name}: {" ".join(result["failed"].split())}' for name, result in results['rows'].items()
             if 'failed' in result]
    return '\n'.join(text) + '\n'


# ---------------------------------------------------------------- figures

def style_of(result: dict[str, Any]) -> dict[str, Any]:
    """How the line of an arm is drawn."""
    return {'linestyle': STYLES.get(result['arm'].rpartition(', ')[2], '-'), 'label': result['arm']}


def colors_of(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """A color for each arm, the same in all panels and figures; gray for tokens without a memory, black for pixels."""
    held = dict.fromkeys(row['arm'] for row in rows.values() if row['memory'])
    bounds = {row['arm']: 'gray' if row['kind'] == 'tokens' else 'black' for row in rows.values() if not row['memory']}
    return bounds | {arm: f'C{number % 10}' for number, arm in enumerate(held)}


def memories_of(rows: dict[str, dict[str, Any]]) -> list[int]:
    """The memories of lines, in bytes, rising."""
    return sorted({row['memory'] for row in rows.values() if row['memory']})


def draw_tasks(results: dict[str, Any], path: Path) -> None:
    """Draw accuracy on all classes seen against their number, a panel a memory. Raises InputError."""
    plt = pyplot()
    rows = {name: row for name, row in results['rows'].items() if 'accuracy' in row}
    colors = colors_of(rows)
    memories = memories_of(rows) or [0]
    figure, panels = plt.subplots(1, len(memories), figsize=(1 + 5 * len(memories), 5), sharey=True, squeeze=False,
                                  layout='constrained')
    for panel, memory in zip(panels[0], memories):
        for row in rows.values():
            if row['memory'] in (0, memory):
                means = [statistics.mean(values) for values in zip(*row['accuracy'])]
                deviations = [statistics.stdev(values) if len(values) > 1 else 0 for values in zip(*row['accuracy'])]
                panel.errorbar(row['classes'], means, yerr=deviations, marker='.', capsize=2, color=colors[row['arm']],
                               **style_of(row))
        panel.set(title=f'{memory / 1e6:g} MB of memory', xlabel='classes seen')
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel('top-1 on all classes seen (%)')
    handles = {label: handle for panel in panels[0] for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), fontsize=8, ncols=4, loc='outside lower center')
    figure.suptitle(f'{results["title"]} ({results["preset"]})')
    save_figure(figure, path)


def draw_bytes(results: dict[str, Any], path: Path) -> None:
    """Draw average incremental accuracy against bytes of memory. Raises InputError."""
    plt = pyplot()
    rows = {name: row for name, row in results['rows'].items() if 'accuracy' in row}
    colors = colors_of(rows)
    figure, panel = plt.subplots(figsize=(8, 5.5), layout='constrained')
    arms = {}
    for row in rows.values():
        arms.setdefault(row['arm'], []).append(row)
    for arm, points in arms.items():
        style = style_of(points[0])
        if not points[0]['memory']:
            panel.axhline(points[0]['average']['mean'], color=colors[arm], **style)
            continue
        points = sorted(points, key=lambda row: row['memory_bytes'])
        panel.errorbar([row['memory_bytes'] for row in points], [row['average']['mean'] for row in points],
                       yerr=[row['average']['sd'] or 0 for row in points], marker='o', capsize=3, color=colors[arm],
                       **style)
        for row in points:
            panel.annotate(f'{row["memory_images"]:,}', (row['memory_bytes'], row['average']['mean']), xytext=(4, 4),
                           textcoords='offset points', fontsize=7)
    panel.set(xscale='log', xlabel='memory: data, labels and index (without the tokenizer)',
              ylabel='average incremental top-1 (%)', title=f'{results["title"]} ({results["preset"]}); labels: images')
    memories = memories_of(rows)
    panel.set_xticks(memories, [f'{memory / 1e6:g} MB' for memory in memories])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    figure.legend(fontsize=8, ncols=3, loc='outside lower center')
    save_figure(figure, path)
