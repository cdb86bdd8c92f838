"""The figures of tables: storage against accuracy, and of continual learning accuracy against classes and bytes."""
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fileio.figures import label_points, pyplot, save_figure

COMPACT = ', compact'  # ends the names of lines whose tokens are stored so
LEGEND = {'full': 'full pixels', 'best': 'best codec'}
COUNTS = {'files': 'as files', 'without_headers': 'without headers'}
STYLES = {'joint': ':', 'fine-tuning': '--'}  # of lines of continual learning without a memory; others are solid


# ---------------------------------------------------------------- storage against accuracy

def storage_of(result: dict[str, Any], count: str) -> tuple[float, float] | None:
    """Bytes for an image of the whole training set, and how many times less than full pixels; None where not known."""
    full = result['full_bytes']
    size = result['bytes']
    if not full or not size or size[count] is None or full[count] is None:
        return None
    return size[count] / full['images'], full[count] / size[count]


def points(results: dict[str, Any], count: str) -> list[tuple[str, str, float, float, float, float]]:
    """(family, name, bytes, ratio, top-1, sd) of the lines of table 1 that are known; a count is a key of COUNTS."""
    found = []
    for name, result in results['rows'].items():
        if 'group' in result or result.get('longer'):  # columns of their lines; another figure's
            continue
        size = storage_of(result, count)
        if size and result['mean'] is not None:
            base = name.removesuffix(COMPACT)
            family = 'tokens' if result['kind'] == 'tokens' else name.split()[0]
            if base.startswith('tokens ') and not base.endswith('%'):
                family = 'other tokens'
            family += name[len(base):]
            found.append((family, name, *size, result['mean'], result['sd'] or 0.))
    return found


def frontier(results: dict[str, Any], count: str) -> list[tuple[str, float, float]]:
    """(name, bytes, top-1) of the lines of table 1 that no other beats with as few bytes, rising; as `points`."""
    best = []
    for _, name, size, _, top1, _ in sorted(points(results, count), key=lambda point: (point[2], -point[4])):
        if not best or top1 > best[-1][2]:
            best.append((name, size, top1))
    return best


def draw_curve(results: dict[str, Any], path: Path) -> None:
    """Draw bytes against top-1 of table 1, twice: as files and without headers, each with its frontier.

    Raises InputError.
    """
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout='constrained')
    names = dict.fromkeys(family for count in COUNTS for family, *_ in points(results, count) if family != 'full')
    colors = {family: f'C{number % 10}' for number, family in enumerate(names)} | {'full': 'black'}
    labels = []
    for panel, (count, words) in zip(panels, COUNTS.items()):
        panel.set_xscale('log')
        families = {}
        for family, *point in points(results, count):
            families.setdefault(family, []).append(point)
        whole = families.get('full', [])
        best = frontier(results, count)
        panel.step([size for _, size, _ in best], [top1 for *_, top1 in best], where='post', color='0.7', linewidth=6,
                   zorder=0, label='no other is better in as few bytes')
        names = {(size, top1): name for name, size, top1 in best}
        texts = []
        for family, of_family in families.items():
            alone = family.startswith(('full', 'other'))
            # curves of pixels end at full pixels, of which the rows are parts
            curve = sorted(of_family if alone or 'tokens' in family else of_family + whole, key=_bytes)
            _, sizes, _, top1, deviations = zip(*curve)
            panel.errorbar(sizes, top1, yerr=deviations, marker='*' if family == 'full' else 'o', capsize=3,
                           markersize=11 if family == 'full' else 6, color=colors[family],
                           zorder=5 if family == 'full' else 2, label=LEGEND.get(family, family),
                           linestyle='none' if alone else '-')
            texts += [((size, accuracy), f'{names.get((size, accuracy), "")} {ratio:.1f}x'.strip(), colors[family])
                      for _, size, ratio, accuracy, _ in of_family]
        panel.set(title=f'bytes {words}', xlabel='bytes of the training set, for each image of the full one')
        panel.margins(0.07)
        panel.grid(alpha=0.3, which='both')
        labels.append((panel, texts))
    panels[0].set_ylabel('top-1 (%)')
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    # below the panels: within, it covers points
    figure.legend(handles.values(), handles.keys(), ncols=4, loc='outside lower center')
    figure.suptitle(f'{results["title"]} ({results["preset"]}); labels: how many times less than full pixels, and '
                    'names on the frontier')
    for panel, texts in labels:
        if texts:
            label_points(panel, *zip(*texts))
    save_figure(figure, path)


def draw_long(results: dict[str, Any], path: Path) -> None:
    """Draw top-1 against epochs of the lines of table 1 that are trained longer, and where the short ones end.

    The epochs of fewer images are counted as those of all, by steps. Raises InputError.
    """
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(9, 6), layout='constrained')
    rows = results['rows']
    for number, (name, result) in enumerate(long_lines(results).items()):
        means = [statistics.mean(values) for values in zip(*result['curves'])]
        epochs = [result['longer'] * step / len(means) for step in range(1, len(means) + 1)]
        base = name.rpartition(', ')[0]
        panel.plot(epochs, means, color=f'C{number}', marker='.', label=f'{base}: {means[-1]:.1f} %')
        short = rows.get(base)
        if short and short['mean'] is not None:
            # in the same epochs: a short line of fewer images has as many times more of them
            end = int(short['epochs']) * result['longer'] / int(result['epochs'])
            panel.errorbar([end], [short['mean']], yerr=short['sd'], color=f'C{number}', marker='D', capsize=3)
    panel.set(xlabel='epochs, counted in steps of those of all images', ylabel='top-1 (%)',
              title=f'{results["title"]} ({results["preset"]}): longer training; diamonds: the short runs end')
    panel.grid(alpha=0.3)
    panel.legend()
    save_figure(figure, path)


def long_lines(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The lines of table 1 that are trained longer and have results, by name."""
    return {name: row for name, row in results['rows'].items() if row.get('curves') and any(row['curves'])}


def _bytes(point: Sequence[Any]) -> float:
    return point[1]


# ---------------------------------------------------------------- continual learning

def style_of(result: dict[str, Any]) -> dict[str, Any]:
    """How the line of an arm is drawn."""
    return {'linestyle': STYLES.get(result['arm'].rpartition(', ')[2], '-'), 'label': result['arm']}


def colors_of(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """A color for each arm, the same in all panels and figures; gray for tokens without a memory, black for pixels."""
    held = dict.fromkeys(row['arm'] for row in rows.values() if row['memory'])
    bounds = {row['arm']: 'gray' if row['kind'] == 'tokens' else 'black' for row in rows.values() if not row['memory']}
    return bounds | {arm: f'C{number % 10}' for number, arm in enumerate(held)}


def learned(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The lines of continual learning that have results, by name."""
    return {name: row for name, row in results['rows'].items() if 'accuracy' in row}


def memories_of(rows: dict[str, dict[str, Any]]) -> list[int]:
    """The memories of lines, in bytes, rising."""
    return sorted({row['memory'] for row in rows.values() if row['memory']})


def draw_tasks(results: dict[str, Any], path: Path) -> None:
    """Draw accuracy on all classes seen against their number, a panel a memory. Raises InputError."""
    plt = pyplot()
    rows = learned(results)
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
    rows = learned(results)
    colors = colors_of(rows)
    figure, panel = plt.subplots(figsize=(9, 6.5), layout='constrained')
    arms = {}
    for row in rows.values():
        arms.setdefault(row['arm'], []).append(row)
    texts = []
    for arm, points in arms.items():
        style = style_of(points[0])
        if not points[0]['memory']:
            panel.axhline(points[0]['average']['mean'], color=colors[arm], **style)
            continue
        points = sorted(points, key=lambda row: row['memory_bytes'])
        panel.errorbar([row['memory_bytes'] for row in points], [row['average']['mean'] for row in points],
                       yerr=[row['average']['sd'] or 0 for row in points], marker='o', capsize=3, color=colors[arm],
                       **style)
        texts += [((row['memory_bytes'], row['average']['mean']), f'{row["memory_images"]:,}', colors[arm])
                  for row in points]
    panel.set(xscale='log', xlabel='memory: data, labels and index (without the tokenizer)',
              ylabel='average incremental top-1 (%)', title=f'{results["title"]} ({results["preset"]}); labels: images')
    memories = memories_of(rows)
    panel.set_xticks(memories, [f'{memory / 1e6:g} MB' for memory in memories])
    panel.minorticks_off()
    panel.margins(0.1, 0.05)
    panel.grid(alpha=0.3)
    figure.legend(fontsize=8, ncols=3, loc='outside lower center')
    if texts:
        label_points(panel, *zip(*texts), size=7)
    save_figure(figure, path)


# By table: its figures, with whether there is something to draw and what draws it, (results, path).
FIGURES: dict[str, dict[str, tuple[Callable, Callable]]] = {
    'storage': {'curve.png': (lambda results: len({point[2] for point in points(results, 'files')}) > 1, draw_curve),
                'long.png': (long_lines, draw_long)},
    'continual': {'tasks.png': (learned, draw_tasks), 'bytes.png': (learned, draw_bytes)},
}
