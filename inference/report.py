"""The report of an evaluation, a folder: accuracy of each class, which class is taken for which, the worst mistakes.

    classes.csv     each class: how many images, top-1, top-5 (%), and the class that it is most often taken for
    confusion.csv   of each class (a line) how many images were taken for each class (a column); confusion.png draws it
    mistakes.csv    the mistakes that the model was surest of; mistakes.png shows their images
    report.json     the numbers of it all, and the names of these files

`Report.record` counts on the device of the logits, and waits for nothing there. What is kept grows with the classes,
not with the images: a number for each pair of classes, and the twenty worst mistakes. Class numbers are the model's.
"""
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from fileio.figures import draw_sheet, printable, pyplot, save_figure, save_sheet
from fileio.files import check_writable, read_json, write_text
from image_tokenizer.tokenizers import check_codebook, decode_codes, load_tokenizer
from image_tokenizer.torchscript import is_torchscript
from token_files.made_with import file_of
from utils import InputError, gather, is_main, on_main, print0

MISTAKES = 20
MOST_CLASSES = 5000  # whose counts take 200 MB
INDEX = 'report.json'
FILES = ('classes.csv', 'confusion.csv', 'confusion.png', 'mistakes.csv', 'mistakes.png')
AVERAGED = 'ema_'  # begins the names of the files of averaged weights
SHEET_COLUMNS = 5

# of the picture of the confusion matrix
MOST_NUMBERED = 30  # classes whose counts can be written into the cells
MOST_NAMED = 120  # classes whose names can stand at the axes
LISTED = 15  # confusions that are listed beside it, where cells have no numbers
LONGEST_NAME = 24  # letters of a class name in it


class Mistake(NamedTuple):
    """An image that was taken for another class: its number in the set, and the probability that the model gave."""
    image: int
    label: int
    prediction: int
    probability: float


# ---------------------------------------------------------------- before the work

def check_report(folder: str) -> None:
    """InputError on every rank unless a report can be written to a folder, '' for none. Collective.

    An earlier report there may be replaced, files of something else may not.
    """
    if folder:
        on_main(_check, Path(folder))


def _check(folder: Path) -> None:
    pyplot()  # there is no confusion.png without it
    check_writable(folder / INDEX)
    reported = _reported(folder)
    for name in (*FILES, *(AVERAGED + name for name in FILES)):
        if os.path.lexists(folder / name) and name not in reported:
            raise InputError(f'{folder / name}: is there, and of no report: choose another folder for --report')


def _reported(folder: Path) -> set[str]:
    """The names of the files that an earlier report left in a folder. Raises InputError for another index."""
    if not os.path.lexists(folder / INDEX):
        return set()
    index = read_json(folder / INDEX)
    names = index.get('report_files') if isinstance(index, dict) else None
    if not isinstance(names, list):
        raise InputError(f'{folder / INDEX}: is there, and of no report: choose another folder for --report')
    return {name for name in names if name in FILES or str(name).removeprefix(AVERAGED) in FILES}


def class_names(classes: int, names: Sequence[str] | None, image_names: Sequence[str] | None = None,
                image_labels: np.ndarray | None = None, labels: np.ndarray | None = None) -> list[str]:
    """The name of each of a model's classes, '' where none is known: the checkpoint's, else those of the images.

    Args:
        classes: of the model.
        names: of the checkpoint, or None.
        image_names: of the images' classes, or None.
        image_labels, labels: (N,) int64, the images' own labels and what they are to the model, where these differ.
    """
    if names is None and image_names and image_labels is not None and not np.array_equal(image_labels, labels):
        names = [''] * classes
        for number, label in set(zip(image_labels.tolist(), labels.tolist())):
            names[label] = str(image_names[number])
    elif names is None:
        names = image_names or ()
    names = [str(name) for name in names[:classes]]
    return names + [''] * (classes - len(names))


def token_images(checkpoint: dict[str, Any], path: str, codebook: torch.Tensor,
                 codes_of: Callable[[np.ndarray], torch.Tensor]) -> Callable[[np.ndarray], torch.Tensor] | None:
    """What decodes tokens for `Report`: (n,) image numbers -> (n, 3, S, S) float32 in [0, 1].

    None, with a line that says why, where the checkpoint does not lead to a tokenizer that decodes; also on other
    ranks than 0, which draw nothing.

    Args:
        checkpoint, path: of the model, and its file.
        codebook: (K, d), on the CPU.
        codes_of: image numbers (n,) -> their codes (n, g, g).
    """
    if not is_main():
        return None
    try:
        file = file_of(checkpoint, 'tokenizer', path, 'no flag')
    except InputError:
        file = None  # its advice is of a flag that these programs lack
    try:
        if not file:
            raise InputError(f'the tokenizer that {path} names is not there' if file is None else
                             f'{path} names no tokenizer')
        if is_torchscript(file):
            raise InputError(f'{file} is a TorchScript program, which is not run for it')
        tokenizer = load_tokenizer(file)
        check_codebook(tokenizer, codebook, file)

        @torch.no_grad()
        def images_of(numbers: np.ndarray) -> torch.Tensor | None:
            return decode_codes(tokenizer, codebook, codes_of(numbers).flatten(1).long())

        if images_of(np.zeros(1, np.int64)) is None:
            raise InputError(f'{file} has no decoder')
    except InputError as error:
        print0(f'note: the report shows no images of mistakes: {error}')
        return None
    return images_of


# ---------------------------------------------------------------- counting

class Report:
    """Counts an evaluation, and writes what was counted to a folder; then another evaluation may follow.

    Args:
        folder: that `check_report` has passed.
        names: of the model's classes, '' where a class has none; as many as its logits.
        device: of the logits.
        distributed: the ranks evaluate parts of one set.
        subset: the classes that the model may choose among; None for all.
        images_of: (n,) int64 image numbers -> (n, 3, S, S) uint8, or float in [0, 1], for mistakes.png; None for none.
        image_names: of the images, for mistakes.csv; None for their numbers.

    Raises:
        InputError: for more than MOST_CLASSES classes.
    """

    def __init__(self, folder: str, names: Sequence[str], device: torch.device, distributed: bool = False,
                 subset: Sequence[int] | None = None,
                 images_of: Callable[[np.ndarray], torch.Tensor] | None = None,
                 image_names: Sequence[str] | None = None):
        if len(names) > MOST_CLASSES:
            raise InputError(f'--report: a table of {len(names):,} x {len(names):,} classes is too large; '
                             f'{MOST_CLASSES:,} are the most')
        self.folder = Path(folder)
        self.names = names
        self.device = device
        self.distributed = distributed
        self.subset = sorted(range(len(names)) if subset is None else subset)
        self.images_of = images_of
        self.image_names = image_names
        self.written = {}  # numbers of each evaluation that is done
        self._begin()

    def _begin(self) -> None:
        classes = len(self.names)
        self.seen = 0
        self.counts = torch.zeros(classes * classes, dtype=torch.int64, device=self.device)  # label by prediction
        self.top5 = torch.zeros(classes, dtype=torch.int64, device=self.device)
        # the worst mistakes so far: how sure the model was, -1 where there is none, and position, label, prediction
        self.sureness = torch.zeros(0, device=self.device)
        self.worst = torch.zeros(0, 3, dtype=torch.int64, device=self.device)

    def record(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: logits (B, classes) float32, labels (B,) int64, as `engine.evaluate` passes them."""
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # as the engine counts, ties too
        predictions = top[:, 0]
        self.counts.index_add_(0, labels * len(self.names) + predictions, torch.ones_like(labels))
        self.top5.index_add_(0, labels, (top == labels[:, None]).any(1).long())
        sureness = logits.softmax(1).gather(1, predictions[:, None])[:, 0].nan_to_num(0)
        positions = torch.arange(self.seen, self.seen + len(labels), device=self.device)
        self.seen += len(labels)
        self.sureness = torch.cat([self.sureness, torch.where(predictions == labels, -1, sureness)])
        self.worst = torch.cat([self.worst, torch.stack([positions, labels, predictions], 1)])
        # stable: of equally sure ones the first images, whatever the batches and the ranks
        self.sureness, order = self.sureness.sort(descending=True, stable=True)
        self.sureness, self.worst = self.sureness[:MISTAKES], self.worst[order[:MISTAKES]]

    def write(self, name: str, order: Sequence[int]) -> None:
        """Gather the counts of all ranks, write them on rank 0, and begin again. Collective. Raises InputError.

        Args:
            name: 'EMA' for averaged weights that were evaluated after the others, else ''.
            order: the numbers of this rank's images in the set, as they came.
        """
        if self.distributed and dist.is_initialized():
            dist.all_reduce(self.counts)
            dist.all_reduce(self.top5)
        mistakes = gather([Mistake(int(order[position]), label, prediction, sureness) for (position, label, prediction),
                           sureness in zip(self.worst.tolist(), self.sureness.tolist()) if sureness >= 0],
                          self.distributed)
        on_main(self._write, AVERAGED if name else '', mistakes)
        self._begin()

    # ------------------------------------------------------------ writing, on rank 0

    def _write(self, prefix: str, mistakes: list[Mistake]) -> None:
        classes = len(self.names)
        counts = self.counts.view(classes, classes).cpu().numpy()
        top5 = self.top5.cpu().numpy()
        mistakes = sorted(mistakes, key=lambda mistake: (-mistake.probability, mistake.image))[:MISTAKES]
        images = int(counts.sum())
        self.written[prefix] = {'images': images, 'acc1': 100 * int(counts.trace()) / images,
                                'acc5': 100 * int(top5.sum()) / images, 'mistakes': images - int(counts.trace())}
        before = _reported(self.folder)
        drawn = bool(self.images_of and mistakes)
        files = {start + name for start in self.written for name in FILES if drawn or name != FILES[-1]}
        # All names that are ours are noted before the first is written: killed within, the next run may replace them.
        self._write_index(before | files)
        write_text(self.folder / f'{prefix}classes.csv', self._classes_csv(counts, top5))
        write_text(self.folder / f'{prefix}confusion.csv', self._confusion_csv(counts))
        write_text(self.folder / f'{prefix}mistakes.csv', self._mistakes_csv(mistakes))
        save_figure(draw_confusion(counts[np.ix_(self.subset, self.subset)], [self.title(c) for c in self.subset],
                                   [str(c) for c in self.subset]), self.folder / f'{prefix}confusion.png')
        if drawn:
            self._write_sheet(self.folder / f'{prefix}mistakes.png', mistakes)
        for name in before - files:  # of an earlier report
            (self.folder / name).unlink(missing_ok=True)
        self._write_index(files)
        print0(f'report: {self.folder / (prefix + FILES[0])} and files beside it')

    def _write_index(self, files: Iterable[str]) -> None:
        numbers = {'ema' if prefix else 'model': stats for prefix, stats in self.written.items()}
        write_text(self.folder / INDEX, json.dumps({**numbers, 'report_files': sorted(files)}, indent=1) + '\n')

    def title(self, label: int) -> str:
        """A class for people: its name, or its number where it has none."""
        return printable(self.names[label]) or str(label)

    def _classes_csv(self, counts: np.ndarray, top5: np.ndarray) -> str:
        rows = [['class', 'name', 'images', 'top1', 'top5', 'taken_for', 'taken_for_name', 'taken_for_images']]
        for label in self.subset:
            images = int(counts[label].sum())
            percent = [f'{100 * int(right) / images:.3f}' if images else '' for right in (counts[label, label],
                                                                                          top5[label])]
            others = counts[label].copy()
            others[label] = 0
            other = int(others.argmax())
            mistaken = [other, self.names[other], others[other]] if others[other] else [''] * 3
            rows.append([label, self.names[label], images, *percent, *mistaken])
        return _csv(rows)

    def _confusion_csv(self, counts: np.ndarray) -> str:
        chosen = counts[:, self.subset]
        return _csv([['class', 'name', *self.subset],
                     *([label, self.names[label], *chosen[label].tolist()] for label in self.subset)])

    def _mistakes_csv(self, mistakes: list[Mistake]) -> str:
        rows = [['image', 'label', 'label_name', 'prediction', 'prediction_name', 'probability']]
        for image, label, prediction, probability in mistakes:
            rows.append([self.image_names[image] if self.image_names else image, label, self.names[label], prediction,
                         self.names[prediction], f'{probability:.6f}'])
        return _csv(rows)

    def _write_sheet(self, path: Path, mistakes: list[Mistake]) -> None:
        images = self.images_of(np.array([mistake.image for mistake in mistakes]))
        captions = [f'is {self.title(mistake.label)}\ntaken for {self.title(mistake.prediction)}\n'
                    f'at {100 * mistake.probability:.1f} %' for mistake in mistakes]
        images = images if images.is_floating_point() else images / 255
        save_sheet(draw_sheet(images[:, None], SHEET_COLUMNS, captions=captions), path)


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------- the picture of a confusion matrix

def draw_confusion(counts: np.ndarray, titles: Sequence[str], numbers: Sequence[str]) -> Any:
    """matplotlib's figure of a confusion matrix, its colors the part of each class's images (%).

    With up to 30 classes the counts stand in the cells, with up to 120 the names at the axes; beyond, cells are of two
    pixels, and the axes count the classes. What is confused most often is listed where the cells have no numbers.

    Args:
        counts: (C, C) int64, images of a class (row) that were taken for a class (column).
        titles: of the classes.
        numbers: of the classes, as short as can be.
    """
    plt = pyplot()
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.ticker import MaxNLocator
    classes = len(counts)
    part = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    if classes <= MOST_NUMBERED:
        side = max(4, (0.6 - 0.006 * classes) * classes)
    elif classes <= MOST_NAMED:
        side = 0.16 * classes
    else:
        side = min(20, max(10, 2 * classes / 120))  # figures have 120 pixels an inch
        part = _spread(part, max(1, classes // 1000))
    widths = [side + 2.5] + [6] * (classes > MOST_NUMBERED)
    height = side + (2 if classes <= MOST_NUMBERED else 3.2)
    figure, panels = plt.subplots(1, len(widths), figsize=(sum(widths), height), squeeze=False, layout='constrained',
                                  width_ratios=widths)
    panel = panels[0][0]
    # White is none. The color of a few images is one that can be seen, and the root lifts it from there.
    colors = LinearSegmentedColormap.from_list('', plt.get_cmap('Blues')(np.linspace(0.18, 1, 256)))
    image = panel.imshow(np.ma.masked_equal(part, 0), cmap=colors, norm=PowerNorm(0.5, 0, 100), interpolation='nearest')
    panel.set(xlabel='taken for', ylabel='class')
    figure.colorbar(image, ax=panel, shrink=0.6, aspect=40, pad=0.02, label="part of the class's images (%)",
                    ticks=[0, 5, 20, 50, 100], panchor=(0, 1))
    if classes <= MOST_NAMED:
        size = 9 if classes <= MOST_NUMBERED else 6.5
        panel.set_xticks(range(classes), map(_short, titles), rotation=90, fontsize=size, parse_math=False)
        panel.set_yticks(range(classes), map(_short, titles), fontsize=size, parse_math=False)
    else:  # of a subset, too, the numbers are the model's
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
            axis.set_major_formatter(lambda value, _: numbers[int(value)] if 0 <= value < classes else '')
    if classes <= MOST_NUMBERED:
        for row, column in zip(*np.nonzero(counts)):
            panel.text(column, row, f'{counts[row, column]:,}', ha='center', va='center', fontsize=8,
                       color='white' if part[row, column] > 25 else 'black')
    else:
        panels[0][1].axis('off')
        panels[0][1].text(0, 1, _listed(counts, titles), va='top', fontsize=10, linespacing=1.6, parse_math=False)
    return figure


def _spread(part: np.ndarray, far: int) -> np.ndarray:
    """Cells of one or two pixels cannot be seen: each takes the largest value of those up to so far from it."""
    for axis in (0, 1):
        padded = np.pad(part, [(far, far) if each == axis else (0, 0) for each in (0, 1)])
        part = np.lib.stride_tricks.sliding_window_view(padded, 2 * far + 1, axis).max(-1)
    return part


def _listed(counts: np.ndarray, titles: Sequence[str]) -> str:
    """Lines of text: what is confused most often, and how many of how many images."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    lines = ['most often:']
    for place in np.argsort(-wrong, axis=None, kind='stable')[:LISTED].tolist():
        row, column = divmod(place, len(counts))
        if wrong[row, column]:
            lines.append(f'{wrong[row, column]:,} of {counts[row].sum():,}:  {_short(titles[row])} '
                         f'\N{RIGHTWARDS ARROW} {_short(titles[column])}')
    return '\n'.join(lines) if len(lines) > 1 else 'no class is taken for another'


def _short(title: str) -> str:
    return title if len(title) <= LONGEST_NAME else f'{title[:LONGEST_NAME - 3]}...'
