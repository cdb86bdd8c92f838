"""Results of tables as JSON and Markdown, and the curve of storage against accuracy."""
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fileio.figures import pyplot, save_figure
from fileio.files import write_text
from tables.presets import PAPER_CORRUPTIONS
from utils import InputError

RESULTS = 'results.json'
TABLE = 'table.md'
CURVE = 'curve.png'
DASH = '\N{EM DASH}'
COMPACT = ', compact'  # ends the names of lines whose tokens are stored so
KEYS = {'table', 'title', 'preset', 'lrs', 'full_bytes', 'rows'}  # of results
COUNTS = {'files': 'as files', 'without_headers': 'without headers'}


# ---------------------------------------------------------------- writing

def mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    """'mean' and 'sd' of a measure over seeds; None of too few."""
    return {'mean': round(statistics.mean(values), 3) if values else None,
            'sd': round(statistics.stdev(values), 3) if len(values) > 1 else None}


def write(results: dict[str, Any], folder: Path) -> None:
    """Write RESULTS and TABLE, and CURVE for table 1, into a folder. Prints the table. Raises InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULTS, json.dumps(results, indent=1) + '\n')
    text = markdown(results)
    write_text(folder / TABLE, text)
    print(text)
    if results['table'] == 'storage' and points(results, 'files'):
        try:
            draw_curve(results, folder / CURVE)
        except InputError as error:  # the numbers are there; tables/collect.py draws them later
            print(f'note: {CURVE} is left out: {error}')


# ---------------------------------------------------------------- Markdown

def markdown(results: dict[str, Any]) -> str:
    """A table with its title and notes."""
    head, lines, note = MARKDOWN[results['table']](results)
    text = [f'## {results["title"]} ({results["preset"]})', '', row_of(head),
            row_of(['---', *['---:'] * (len(head) - 1)]), *map(row_of, lines), '', note, '', rates(results)]
    failed = {name: result['failed'] for name, result in results['rows'].items() if 'failed' in result}
    text += [f'\n{name}: {" ".join(why.split())}' for name, why in failed.items()]
    return '\n'.join(text).rstrip() + '\n'


def row_of(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f'| {" | ".join(cell.replace("|", "/") for cell in cells)} |'


def rates(results: dict[str, Any]) -> str:
    """A sentence about the learning rates."""
    parts = []
    for kind, found in results['lrs'].items():
        tried = ', '.join(f'{rate}: {top1:.2f}' for rate, top1 in found['search'].items())
        parts.append(f'{kind} {found["chosen"]:g}' + (f' (top-1 of the search: {tried})' if tried else ''))
    return f'Learning rates: {"; ".join(parts)}.'


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


def storage_of(results: dict[str, Any], result: dict[str, Any], count: str) -> tuple[float, float] | None:
    """Bytes for an image of the whole training set, and how many times less than full pixels; None where not known."""
    full = results['full_bytes']
    size = result['bytes']
    if not full or not size or size[count] is None or full[count] is None:
        return None
    return size[count] / full['images'], full[count] / size[count]


def storage_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Head, lines and note of table 1."""
    head = ['', 'images', 'bytes as files', 'ratio', 'bytes without headers', 'ratio', 'top-1 (seeds)',
            'paper, ImageNet-1k']
    lines = []
    for name, result in results['rows'].items():
        cells = [name, f'{result["bytes"]["images"]:,}' if result['bytes'] else DASH]
        for count in COUNTS:
            size = storage_of(results, result, count)
            cells += [f'{size[0]:,.0f}', f'{size[1]:.1f}'] if size else [DASH, DASH]
        lines.append([*cells, spread(result), paper_of(result)])
    return head, lines, ('Bytes of the whole training set, for each image of the full one. Without headers: the scans '
                         'of JPEGs, the entropy of single codes of tokens, the coded words and the model of compact '
                         'ones. Top-1 is of the last epoch.')


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
    """Head, lines and note of table 3: a line for each corruption, a column for each severity."""
    rows = results['rows']
    names = list(dict.fromkeys(name.rstrip('12345 ') for name in rows))
    lines = []
    for name in names:
        severities = [rows.get(f'{name} {severity}') for severity in range(1, 6)]
        kind, _, corruption = name.partition(' ')
        paper = paper_of(rows[name]) if name in rows else DASH
        if kind == 'tokens':
            paper = PAPER_CORRUPTIONS.get(corruption, paper)
        lines.append([name, spread(rows.get(name)), *map(spread, severities), paper])
    return (['', 'top-1 (seeds)', *map(str, range(1, 6)), 'paper, ImageNet-1k'], lines,
            "Columns 1 to 5 are severities. Of which severity the paper's numbers for noise and blur are, and which "
            'blur it was, is not known to us.')


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
    return (['', 'epochs', 'top-1 (seeds)', 'paper, ImageNet-1k'], lines,
            'All but the first have ColorAdapt, all but the first two TokenAdapt. Published: 400 + 100 epochs, against '
            '300.')


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


MARKDOWN: dict[str, Callable] = {'storage': storage_table, 'ablation': ablation_table, 'robustness': robustness_table,
                                 'speed': speed_table, 'seitpp': seitpp_table, 'pretraining': pretraining_table}


# ---------------------------------------------------------------- the curve

def points(results: dict[str, Any], count: str) -> list[tuple[str, str, float, float, float, float]]:
    """(family, name, bytes, ratio, top-1, sd) of the lines of table 1 that are known; a count is a key of COUNTS."""
    found = []
    for name, result in results['rows'].items():
        size = storage_of(results, result, count)
        if size and result['mean'] is not None:
            base = name.removesuffix(COMPACT)
            family = 'tokens' if result['kind'] == 'tokens' else name.split()[0]
            if base.startswith('tokens ') and not base.endswith('%'):
                family = 'other tokens'
            family += name[len(base):]
            found.append((family, name, *size, result['mean'], result['sd'] or 0.))
    return found


def draw_curve(results: dict[str, Any], path: Path) -> None:
    """Draw bytes against top-1 of table 1, twice: as files and without headers. Raises InputError."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout='constrained')
    for panel, (count, words) in zip(panels, COUNTS.items()):
        panel.set_xscale('log')
        families = {}
        for family, *point in points(results, count):
            families.setdefault(family, []).append(point)
        whole = families.get('full', [])
        for family, of_family in families.items():
            curve = sorted(of_family if family in ('full', 'other') else of_family + whole, key=_bytes)
            if 'tokens' in family:
                curve = sorted(of_family, key=_bytes)
            names, sizes, ratios, top1, deviations = zip(*curve)
            panel.errorbar(sizes, top1, yerr=deviations, marker='o', capsize=3, label=family.replace('full', 'full '
                           'pixels'), linestyle='none' if family.startswith(('full', 'other')) else '-')
            for _, size, ratio, accuracy, _ in of_family:
                panel.annotate(f'{ratio:.1f}x', (size, accuracy), xytext=(4, 4), textcoords='offset points', fontsize=8)
        panel.set(title=f'bytes {words}', xlabel='bytes of the training set, for each of its images')
        panel.grid(alpha=0.3, which='both')
        panel.legend()
    panels[0].set_ylabel('top-1 (%)')
    figure.suptitle(f'{results["title"]} ({results["preset"]}); labels: how many times less than full pixels')
    save_figure(figure, path)


def _bytes(point: Sequence[Any]) -> float:
    return point[1]
