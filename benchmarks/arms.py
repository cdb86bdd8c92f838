"""What benchmarks/tokenizers.py compares: its images, the programs of an arm, their results, the table."""
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from benchmarks.common import spread
from fileio.files import atomic_path, write_text
from fileio.labels import check_class_names
from image_data.quality import psnr, ssim
from image_data.sources import FolderImages, Source, load_images, open_source
from image_tokenizer.tokenizers import encode_images, unit_range
from tables import rows
from tables.rows import Program, final_line, why_failed
from training.run_folder import LOG
from utils import InputError

BATCH = 64  # images decoded or encoded at a time
SAMPLE = 8  # images drawn
TITLE = 16  # pixels of a column's name
COLUMNS = ('name', 'grid', 'bits a code', 'bytes (entropy)', 'bytes on disk', 'PSNR', 'SSIM', 'codes used',
           'images/s', 'learning rate', 'top-1')


# ---------------------------------------------------------------- the images

def write_lists(train_path: str, val_path: str, classes: int, images_per_class: int, folder: Path) -> tuple[Path, Path]:
    """List files of the first classes, in alphabetical order: the first images of each, and all validation images.

    Args:
        train_path, val_path: folders of class folders, of the same classes.
        classes: how many.
        images_per_class: at most, of the training images.
        folder: for train.txt and val.txt, 'path label' lines.

    Raises:
        InputError: for another kind of source, too few classes, or classes that differ.
    """
    sources = [open_source(path) for path in (train_path, val_path)]
    for source in sources:
        if not isinstance(source, FolderImages):
            raise InputError(f'{source.data_path}: give a folder with a folder of images for every class')
        if len(source.classes) < classes:
            raise InputError(f'{source.data_path}: has {len(source.classes)} classes, but --classes is {classes}')
    check_class_names(*(source.classes[:classes] for source in sources), train_path, val_path)
    paths = folder / 'train.txt', folder / 'val.txt'
    for source, path, most in zip(sources, paths, (images_per_class, len(sources[1]))):
        chosen = np.concatenate([np.flatnonzero(source.labels == label)[:most] for label in range(classes)])
        home = os.path.realpath(source.folder)
        names = [os.path.relpath(os.path.join(home, source.names[i]), os.path.realpath(folder)) for i in chosen]
        write_text(path, ''.join(f'{name}\t{label}\n' for name, label in zip(names, source.labels[chosen].tolist())))
    return paths


# ---------------------------------------------------------------- programs

def run_programs(programs: Sequence[tuple[Sequence[Any], Path]], jobs: int, threads: int) -> None:
    """Run programs of this repository, some at a time; their output is appended to log files.

    Args:
        programs: (the program's path from the root and its words, log file) of each.
        jobs: how many run at a time.
        threads: of each.

    Raises:
        InputError: with the last line of a program that failed, when all have ended.
    """
    named = [Program(str(number), tuple(words), log) for number, (words, log) in enumerate(programs)]
    codes = rows.run_programs(named, jobs, threads)
    for program in named:
        if codes[program.name]:
            raise InputError(why_failed(program, codes[program.name]))


def train_seeds(folder: Path, command: Callable[[Path, float, int], list[str]], lrs: Sequence[float],
                seeds: Sequence[int], epochs: int, jobs: int, threads: int) -> dict[str, Any]:
    """Train one arm with each seed, at the learning rate that is best with the first; finished runs are not repeated.

    The search looks at the validation images that the result is of, for every arm alike.

    Args:
        folder: of the arm; a run's is below it.
        command: (output folder, learning rate, seed) -> the program and its words.
        lrs, seeds: to try.
        epochs: of a run.
        jobs, threads: see `run_programs`.

    Returns:
        The learning rate, accuracies of the search and of the seeds.

    Raises:
        InputError: when a run failed.
    """
    def accuracies(pairs: list[tuple[float, int]]) -> list[dict[str, float]]:
        folders = [folder / f'lr-{lr:g}-seed-{seed}' for lr, seed in pairs]
        run_programs([(command(output, *pair), output.with_suffix(output.suffix + '.log'))
                      for output, pair in zip(folders, pairs) if final_line(output, epochs) is None], jobs, threads)
        lines = [final_line(output, epochs) for output in folders]
        if None in lines:
            raise InputError(f'{folders[lines.index(None)]}: its {LOG} has no epoch {epochs - 1}')
        return lines

    search = [line['test_acc1'] for line in accuracies([(lr, seeds[0]) for lr in lrs])]
    lr = lrs[search.index(max(search))]
    lines = accuracies([(lr, seed) for seed in seeds])
    top1 = [line['test_acc1'] for line in lines]
    return {'lr': lr, 'search': dict(zip(map(str, lrs), search)), 'seeds': list(seeds), 'top1': top1,
            'top1_mean': round(statistics.mean(top1), 3),
            'top1_sd': round(statistics.stdev(top1), 3) if len(top1) > 1 else None,
            'ema_top1': [line.get('ema_test_acc1') for line in lines],
            'train_images_per_second': spread([line['images_per_second_time'] for line in lines])}


# ---------------------------------------------------------------- images and codes

def batches_of(count: int) -> list[range]:
    """Numbers below `count`, in order, cut into batches."""
    return [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]


def image_quality(source: Source, reconstruct: Callable[[Sequence[int]], torch.Tensor | None], sizes: Sequence[int],
                  workers: int) -> list[dict[str, float | None]]:
    """Mean PSNR and SSIM over the images of a source, at each of some sizes.

    The original is resized there directly, whatever the reconstruction's own size: one yardstick for all.

    Args:
        source: of the images.
        reconstruct: image numbers -> (B, 3, S, S) float in [0, 1], or None.
        sizes: pixels on a side, where both are compared.
        workers: processes that decode.

    Returns:
        {'psnr', 'ssim'} for each size; None in them where there is no reconstruction.
    """
    scores = [{'psnr': [], 'ssim': []} for _ in sizes]
    batches = batches_of(len(source))
    for batch, *loaded in zip(batches, *(load_images(source, batches, size, workers=workers) for size in sizes)):
        made = reconstruct(batch)
        if made is None:
            return [{'psnr': None, 'ssim': None} for _ in sizes]
        for size, images, score in zip(sizes, loaded, scores):
            original = unit_range(images.pixels).to(made.device)
            score['psnr'] += psnr(original, resized(made, size)).tolist()
            score['ssim'] += ssim(original, resized(made, size)).tolist()
    return [{name: round(statistics.mean(values), 4) for name, values in score.items()} for score in scores]


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """(B, 3, S, S) float in [0, 1] -> (B, 3, size, size), bicubic with antialias, as PIL does it."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode='bicubic', antialias=True, align_corners=False).clamp(0, 1)


def tokenizing_speed(source: Source, tokenizer: nn.Module, codebook: torch.Tensor, image_size: int,
                     repeats: int) -> dict[str, float]:
    """Images a second from files to codes in one process, decoding included: the spread over some batches.

    Tokenizer and codebook are on the device that is measured.
    """
    rates = []
    for number in range(repeats + 1):
        first = number * BATCH % max(1, len(source) - BATCH + 1)
        batch = range(first, min(first + BATCH, len(source)))
        began = time.perf_counter()
        pixels = next(load_images(source, [batch], image_size)).pixels
        with torch.inference_mode():
            encode_images(tokenizer, codebook, pixels)[1].cpu()  # waits for a GPU
        rates.append(len(batch) / (time.perf_counter() - began))
    return spread(rates[1:])  # the first is a warm-up


# ---------------------------------------------------------------- the pictures

def sampled(count: int) -> list[int]:
    """Numbers of the images that are drawn, from all over `count` of them."""
    return np.linspace(0, count - 1, min(SAMPLE, count)).round().astype(int).tolist()


def write_column(reconstruct: Callable[[Sequence[int]], torch.Tensor | None], count: int, size: int,
                 path: Path) -> None:
    """Draw some of `count` images, as in `image_quality`, one below the other. Raises InputError."""
    images = reconstruct(sampled(count))
    if images is not None:
        with atomic_path(path) as temporary:
            to_pil_image(make_grid(resized(images, size).cpu(), nrow=1, pad_value=1)).save(temporary, 'PNG')


def source_column(source: Source, size: int, path: Path) -> None:
    """Draw the same of the originals."""
    pixels = next(load_images(source, [sampled(len(source))], size)).pixels
    write_column(lambda _: unit_range(pixels), len(source), size, path)


def write_sheet(columns: dict[str, Path], path: Path) -> None:
    """Join columns that `write_column` drew, each below its name; those that are not there are left out.

    Raises:
        InputError: when it cannot be written.
    """
    pictures = {name: Image.open(column) for name, column in columns.items() if column.exists()}
    font = ImageFont.load_default(TITLE - 4)
    widths = [max(picture.width, math.ceil(font.getlength(name)) + 4) for name, picture in pictures.items()]
    sheet = Image.new('RGB', (sum(widths), TITLE + max(picture.height for picture in pictures.values())), 'white')
    left = 0
    for (name, picture), width in zip(pictures.items(), widths):
        ImageDraw.Draw(sheet).text((left + 2, 0), name, 'black', font)
        sheet.paste(picture, (left, TITLE))
        left += width
    with atomic_path(path) as temporary:
        sheet.save(temporary, 'PNG')


# ---------------------------------------------------------------- the table

def table(results: dict[str, dict[str, Any]]) -> str:
    """All arms as a Markdown table, a line each."""
    lines = [COLUMNS, ('---', *['---:'] * (len(COLUMNS) - 1))]
    lines += [(name, *cells(result)) for name, result in results.items()]
    notes = '\nBytes are of an image. Top-1 is of the last epoch, mean ± standard deviation (seeds).\n'
    return '\n'.join(f'| {" | ".join(row)} |' for row in lines) + '\n' + notes


def cells(result: dict[str, Any]) -> list[str]:
    """The cells of a result after its name."""
    def text(value: Any, form: str) -> str:
        return '–' if value is None else format(value, form)

    if 'failed' in result:
        reason = ' '.join(result['failed'].split()).replace('|', '/')
        return [f'failed: {reason}', *[''] * (len(COLUMNS) - 2)]
    speed = result['images_per_second']
    accuracy = f'{result["top1_mean"]:.2f} ± {text(result["top1_sd"], ".2f")} ({len(result["top1"])})'
    return [f'{result["grid"]}x{result["grid"]}', text(result['entropy_bits'], '.2f'),
            text(result['bytes']['entropy'], ',.0f'), text(result['bytes']['stored'], ',.0f'),
            text(result['psnr'], '.2f'), text(result['ssim'], '.3f'), text(result['codes_used_share'], '.1%'),
            text(speed['median'], ',.0f'), f'{result["lr"]:g}', accuracy]
