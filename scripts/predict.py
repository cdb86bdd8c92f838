"""Name the classes of pictures, by a trained model.

    python scripts/predict.py output/run picture.jpg folder/with/pictures
    python scripts/predict.py output/run pictures.tar --output predictions.csv

What is named may be pictures, folders (all pictures in and below them), lists of paths (.txt), tar shards and parquet
files, see image_data/pictures.py; labels are not needed. The checkpoint says the rest: model, classes, codebook and
tokenizer; flags are for what it does not say, as of published ones.

Pictures are read, classified and written batch after batch, so any number will do. One that cannot be read is named on
standard error, left out, and counted at the end.
"""
import argparse
import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import atomic_path, check_writable
from flags import Parser, add_classifier_flags, classifier_options, add_max_pixels, integer
from image_data.pictures import open_pictures
from image_data.sources import OrientedImages, Source, load_images
from inference.classifier import Classifier, load_classifier
from models_seit import STEMS
from utils import InputError, device_of, device_of_rank, print0, run

MOST_WIDE = 60  # characters of a column of the table

Top = list[tuple[str, float]]  # classes and their probabilities, the most probable first


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add_classifier_flags(parser, STEMS)
    add = parser.add_group('pictures')
    add('pictures', nargs='+', metavar='PICTURES', help='pictures, folders, lists .txt, tar shards or parquet files')
    add('--output', default='', metavar='FILE', help='write to this file, .csv or .jsonl, and not on the terminal')
    add('--top-k', type=integer(1), default=5, metavar='K', help='how many classes of a picture are shown')
    add('--batch-size', type=integer(1), default=64, help='pictures that are classified at once')
    add('--num-workers', type=integer(), default=10,
        help='processes that decode pictures, at most as many as there are cores')
    add_max_pixels(add)
    args = parser.parse_args(argv)
    if args.output and Path(args.output).suffix.lower() not in LINES:
        raise InputError(f'--output {args.output}: give a name that ends in {" or ".join(LINES)}')
    return args


# ---------------------------------------------------------------- predictions

def predictions(classifier: Classifier, source: Source, top_k: int, batch_size: int, workers: int,
                max_pixels: int | None, skip_bad: bool) -> Iterator[tuple[str, Top | None]]:
    """Yield each picture of a source and its most probable classes, None for one that cannot be read.

    Raises:
        InputError: where a picture cannot be read, unless `skip_bad`.
    """
    device = device_of(classifier.model)
    source.exif_rotate = classifier.exif_rotate
    source.oriented = OrientedImages()
    batches = [range(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size)]
    images = load_images(source, batches, classifier.size, workers=workers if len(batches) > 1 else 0,
                         skip_bad=True if skip_bad else None, pin_memory=device.type == 'cuda', max_pixels=max_pixels,
                         prepare=lambda image, number, position: classifier.read(image))
    for batch in images:
        yield from ((source.names[i], None) for i, _ in batch.skipped)
        if not len(batch.indices):
            continue
        with torch.inference_mode():
            probabilities = classifier(batch.pixels.to(device, non_blocking=True)).cpu()
        if not probabilities.isfinite().all():
            raise InputError('the model gives probabilities that are not finite: its weights are damaged, or its '
                             'training went wrong')
        top = probabilities.topk(min(top_k, probabilities.shape[1]))
        for i, numbers, values in zip(batch.indices.tolist(), top.indices.tolist(), top.values.tolist()):
            yield source.names[i], [(classifier.classes[number], value) for number, value in zip(numbers, values)]


# ---------------------------------------------------------------- how they are written

def printable(text: str) -> str:
    """Text for a terminal: what is no character of it, such as a line break in a file's name, is escaped."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape', 'surrogatepass').decode() for c in text)


def row_of_table(name: str, top: Top, widths: tuple[int, int]) -> str:
    """A row of the table on the terminal."""
    (best, probability), *others = [(printable(label), value) for label, value in top]
    rest = ', '.join(f'{label} {100 * value:.1f}' for label, value in others)
    return f'{printable(name):<{widths[0]}}  {best:<{widths[1]}}  {100 * probability:5.1f} %  {rest}'.rstrip()


def csv_line(cells: Sequence[str]) -> str:
    """A line of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerow(cells)
    return text.getvalue()


def csv_header(top_k: int) -> str:
    """picture, class, probability, class_2, probability_2, and so on."""
    return csv_line(['picture', 'class', 'probability',
                     *(f'{name}_{n}' for n in range(2, top_k + 1) for name in ('class', 'probability'))])


def csv_row(name: str, top: Top) -> str:
    return csv_line([name, *(cell for label, value in top for cell in (label, f'{value:.6f}'))])


def json_row(name: str, top: Top) -> str:
    classes = [{'class': label, 'probability': round(value, 6)} for label, value in top]
    return json.dumps({'picture': name, **classes[0], 'top': classes}) + '\n'


LINES = {'.csv': (csv_header, csv_row), '.jsonl': (lambda top_k: '', json_row)}


@contextlib.contextmanager
def open_output(path: str, sources: Sequence[Source], classes: Sequence[str],
                top_k: int) -> Iterator[Callable[[str, Top], None]]:
    """Yield what writes a prediction, to a file that is there once all are written, or to the terminal.

    Raises:
        InputError: where the file cannot be written.
    """
    if path:
        header, row = LINES[Path(path).suffix.lower()]
        # names of files may be any bytes, and are written as those
        with atomic_path(path) as temporary, open(temporary, 'w', encoding='utf-8', errors='surrogateescape') as file:
            file.write(header(top_k))
            yield lambda name, top: file.write(row(name, top))
        return
    widths = tuple(min(MOST_WIDE, max(len(printable(text)) for text in texts))
                   for texts in (['picture', *(name for source in sources for name in source.names)],
                                 ['class', *classes]))
    print0(f'{"picture":<{widths[0]}}  {"class":<{widths[1]}}  probability' + (', and others in %' * (top_k > 1)))
    yield lambda name, top: print0(row_of_table(name, top, widths))


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> None:
    """Print or write the most probable classes of pictures."""
    if args.output:
        inputs = [path for path in (args.checkpoint, *args.pictures) if os.path.isfile(path)]
        check_writable(args.output, inputs=inputs)
    device = device_of_rank(args.device)
    sources = open_pictures(args.pictures)
    classifier = load_classifier(args.checkpoint, device, **classifier_options(args))
    top_k = min(args.top_k, len(classifier.classes))
    pictures = sum(map(len, sources))
    read = 0
    with open_output(args.output, sources, classifier.classes, top_k) as write:
        for source in sources:
            # a picture that is named alone is not left out: there would be nothing to show
            for name, top in predictions(classifier, source, top_k, args.batch_size, args.num_workers,
                                         args.max_image_pixels, skip_bad=pictures > 1):
                if top:
                    write(name, top)
                    read += 1
        if not read:
            raise InputError(f'none of the {pictures:,} pictures could be read')
    skipped = f', {pictures - read:,} that could not be read left out' if read < pictures else ''
    print0(f'{read:,} picture{"s" * (read > 1)}{skipped}' + (f': {args.output}' if args.output else ''))


if __name__ == '__main__':
    run(main, parse_args)
