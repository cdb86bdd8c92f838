"""Report what is in a token set: codes in use, their entropy, bytes an image; draw images beside their reconstruction.

    python scripts/inspect_tokens.py --token-file tokens/my-train-token.data.bin.gz \\
        --label-file tokens/my-train-label.txt --codebook-path tokens/codebook.ckpt \\
        --tokenizer-path tokens/tokenizer.pt --data-path IMAGES/train --output sheet.png
    python scripts/inspect_tokens.py --token-file tokens/my-val-token.data.bin.gz \\
        --codebook-path tokens/codebook.ckpt --tokenizer-path tokens/tokenizer.pt --data-path IMAGES/val \\
        --quality --output quality.json

Prints text for people, then one JSON line. The codes are decoded in memory (2 bytes each); no cache is written.
--data-path is what the tokens were made from, as in tokenize_images.py: class folders, a list, tar shards or parquet.
--quality adds the means of PSNR and SSIM over all images. Original and reconstruction are compared at --quality-size
pixels on a side: the original is resized there directly, the reconstruction from its own size, so that tokenizers of 64
and of 128 pixels have one yardstick. That costs, too: 64 -> 128 -> 64 alone has 33 dB. Equal images have 100 dB.
"""
import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.figures import draw_sheet, picture_format, save_sheet, square_columns
from fileio.files import check_writable, expand_files, write_text
from fileio.labels import name_labels, read_labels, spread
from flags import DEVICE_HELP, Parser, add_allow_torchscript, add_exif_rotate, add_max_pixels, integer
from image_data.quality import psnr, ssim
from image_data.sources import Source, load_images, open_source, source_images
from image_tokenizer.tokenizers import check_codebook, decode_codes, load_tokenizer, unit_range
from token_files.cache import labels_inside, open_codes
from token_files.codebook import load_codebook
from token_files.made_with import check_made_with, note_rotation
from token_files.token_file import TokenFile, bytes_per_image, count_uses, entropy_bits, open_token_files
from utils import InputError, cores, device_of_rank, print0, run

BATCH = 64  # images decoded at a time
PATCH_SIZE = 8  # pixels a code covers where no tokenizer says so (the published one)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError for values that cannot be."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--token-file', required=True, metavar='FILE', help='NAME.data.bin.gz, a glob of shards, or a set of another '
        'project (docs/token_format.md)')
    add('--codebook-path', required=True, metavar='FILE', help='the codebook of the tokens')
    add('--label-file', metavar='FILE', help='labels of the images: adds the number of images of each class, and the '
        'contact sheet shows images of different classes')
    add('--data-path', metavar='PATH', help='the images that the tokens were made from (class folders, a list file '
        '.txt, tar shards or parquet files: see image_data/sources.py): adds their bytes')
    add('--tokenizer-path', metavar='FILE', help='reconstructs the images, where it has a decoder')
    add_allow_torchscript(add)
    add('--quality', action='store_true', help='adds PSNR and SSIM; needs --data-path and --tokenizer-path')
    add('--quality-size', type=integer(11), metavar='N',
        help='pixels on a side at which they are compared; default: those of the reconstruction')
    add('--output', metavar='FILE', help='FILE.json: the JSON line; FILE.png, .jpg or .webp: a contact sheet of '
        'source images and reconstructions, whichever there are')
    add('--images', type=integer(1), default=16, help='on the contact sheet, of different classes where --data-path or '
        '--label-file tells them')
    add_max_pixels(add)
    add_exif_rotate(add)
    add('--num-workers', type=integer(), default=cores(), help='processes that decode images for --quality')
    add('--device', default='cpu', help=f'that reconstructs for --quality: {DEVICE_HELP}')
    args = parser.parse_args(argv)
    if args.quality and not (args.data_path and args.tokenizer_path):
        raise InputError('--quality compares images with their reconstruction: give --data-path and --tokenizer-path')
    return args


# ---------------------------------------------------------------- numbers


def summarize(files: Sequence[TokenFile], source: Source | None, codes: np.ndarray,
              counts: np.ndarray) -> dict[str, Any]:
    """What the token set holds, as plain values. Args: as in `bytes_per_image`, with codes (N, n)."""
    images, n = codes.shape
    return {'images': images, 'grid': math.isqrt(n), 'codes': len(counts), 'codes_used': int((counts > 0).sum()),
            'entropy_bits': round(entropy_bits(counts), 4), 'most_bits': round(math.log2(len(counts)), 4),
            'bytes_per_image': bytes_per_image(files, codes.shape, counts, source.encoded_bytes() if source else None),
            'code_counts': counts.tolist()}


def labels_of_images(label_file: str, images: int) -> np.ndarray:
    """The (N,) int64 labels of one or more files. Raises InputError unless there is one for each image."""
    labels = np.concatenate([read_labels(file) for file in expand_files(label_file)])
    if len(labels) != images:
        raise InputError(f'{label_file}: {len(labels)} labels for {images} images; give the labels of this token file')
    return labels


def count_classes(labels: np.ndarray) -> dict[int, int]:
    """Images of each class, {class: count}, by labels (N,) int64."""
    classes, counts = np.unique(labels, return_counts=True)
    return dict(zip(classes.tolist(), counts.tolist()))


# ---------------------------------------------------------------- reconstructions

def open_tokenizer(args: argparse.Namespace, codebook: torch.Tensor) -> nn.Module:
    """The tokenizer of --tokenizer-path. Raises InputError where the codebook cannot be its own."""
    tokenizer = load_tokenizer(args.tokenizer_path, allow_torchscript=args.allow_torchscript)
    check_codebook(tokenizer, codebook, args.codebook_path)
    return tokenizer


def image_quality(source: Source, codes: np.ndarray, tokenizer: nn.Module, codebook: torch.Tensor, size: int | None,
                  workers: int, max_pixels: int | None) -> dict[str, float | None]:
    """Means of PSNR and SSIM over all images; None where the tokenizer has no decoder.

    Args:
        source, codes: the images, and their codes (N, n) uint16.
        tokenizer, codebook: on one device.
        size: pixels on a side at which they are compared; None for those of the reconstruction.
        workers: processes that decode images.
        max_pixels: larger images are an InputError.
    """
    own_size = tokenizer.patch_size * math.isqrt(codes.shape[1])
    size = size or own_size
    batches = [range(first, min(first + BATCH, len(codes))) for first in range(0, len(codes), BATCH)]
    scores = {'psnr': [], 'ssim': []}
    for batch, images in zip(batches, load_images(source, batches, size, workers=workers, max_pixels=max_pixels)):
        made = decode_codes(tokenizer, codebook, torch.from_numpy(codes[batch.start:batch.stop].astype(np.int64)))
        if made is None:
            return {'quality_size': size, 'psnr': None, 'ssim': None}
        if own_size != size:  # as PIL does it
            made = F.interpolate(made, (size, size), mode='bicubic', antialias=True, align_corners=False).clamp(0, 1)
        original = unit_range(images.pixels).to(made.device)
        scores['psnr'] += psnr(original, made).tolist()
        scores['ssim'] += ssim(original, made).tolist()
    return {'quality_size': size, **{name: round(statistics.mean(values), 4) for name, values in scores.items()}}


# ---------------------------------------------------------------- text

def histogram(counts: np.ndarray) -> list[str]:
    """Lines of text: the part of all codes that each tenth of the codebook has, most used first."""
    ranked = np.sort(counts)[::-1]
    lines = []
    first = 1
    for part in np.array_split(ranked, min(10, len(ranked))):
        fraction = part.sum() / ranked.sum()
        last = first + len(part) - 1
        lines.append(f'  {f"{first}-{last}":>9} {fraction:6.1%} {"#" * round(50 * fraction)}')
        first = last + 1
    return lines


def describe(summary: dict[str, Any]) -> list[str]:
    """The lines for people."""
    size = summary['bytes_per_image']
    entropy = summary['entropy_bits']
    most = summary['most_bits']
    ratio = f' of {most:.2f} ({entropy / most:.1%})' if most else ''
    lines = [f'{summary["images"]:,} images of {summary["grid"]}x{summary["grid"]} codes, {summary["codes_used"]} of '
             f'{summary["codes"]} codes in use',
             f'entropy: {entropy:.2f} bits a code{ratio}',
             f'bytes an image: {size["raw"]:,.0f} as a byte stream, {size["stored"]:,.0f} on disk, '
             f'{size["fixed"]:,.0f} at log2(codes) bits a code, {size["entropy"]:,.0f} at the entropy']
    if 'source' in size:
        lines.append(f'source images: {size["source"]:,.0f} bytes an image, '
                     f'{size["source"] / size["stored"]:.1f} times the tokens on disk')
    if 'class_counts' in summary:
        counts = summary['class_counts'].values()
        lines.append(f'labels: {len(counts)} classes of {min(counts):,} to {max(counts):,} images')
    if summary.get('psnr') is not None:
        lines.append(f'reconstruction: PSNR {summary["psnr"]:.2f} dB, SSIM {summary["ssim"]:.3f}, at '
                     f'{summary["quality_size"]} pixels')
    lines.append('codes by rank of use, most used first, and their share:')
    return lines + histogram(np.array(summary['code_counts']))


# ---------------------------------------------------------------- pictures


def contact_sheet(args: argparse.Namespace, codes: np.ndarray, codebook: torch.Tensor, source: Source | None,
                  labels: np.ndarray | None, names: list[str] | None) -> Image.Image:
    """Images of different classes: each one's source beside its reconstruction, whichever of them there are.

    Args:
        codes: (N, n) uint16.
        codebook: (K, d).
        source: of the images, where it is known.
        labels: (N,) int64, where they are known.
        names: of the classes, where they are known.
    """
    chosen = spread(labels, len(codes), args.images)
    grid_size = math.isqrt(codes.shape[1])
    patch_size = PATCH_SIZE
    parts = {}
    if args.tokenizer_path:
        tokenizer = open_tokenizer(args, codebook)
        patch_size = tokenizer.patch_size
        parts['tokens'] = decode_codes(tokenizer, codebook, torch.from_numpy(codes[chosen].astype(np.int64)))
    if source:
        parts = {'image': source_images(source, chosen, patch_size * grid_size, args.max_image_pixels)} | parts
    parts = {title: part for title, part in parts.items() if part is not None}
    if not parts:
        raise InputError('--output: nothing to draw; give --data-path, or a --tokenizer-path that has a decoder')
    return draw_sheet(torch.stack(list(parts.values()), 1), square_columns(len(chosen), len(parts)), list(parts),
                      name_labels(None if labels is None else labels[chosen], names))


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> None:
    codebook = load_codebook(args.codebook_path)
    files = open_token_files(args.token_file)
    check_made_with(files, codebook, args.codebook_path, args.tokenizer_path or '')
    if args.output:
        if not args.output.endswith('.json'):
            picture_format(args.output)  # raises for another ending, before the work
        inputs = [args.codebook_path, args.label_file, args.tokenizer_path, args.data_path]
        check_writable(args.output, inputs=[*filter(None, inputs), *(file.stream for file in files)])
    source = open_source(args.data_path, args.exif_rotate) if args.data_path else None
    if source:
        note_rotation(files, args.exif_rotate)
    codes = open_codes(files, cache='none')
    counts = count_uses(codes, len(codebook), args.token_file)
    if source and len(source) != len(codes):
        raise InputError(f'{args.data_path}: {len(source)} images, but {args.token_file} holds {len(codes)}; give the '
                         'images that the tokens were made from')
    summary = summarize(files, source, codes, counts)
    labels = source.labels if source else None
    if args.label_file or all(file.is_foreign and file.content.read_labels for file in files):
        labels = labels_of_images(args.label_file, len(codes)) if args.label_file else labels_inside(files, 'none')
        summary['class_counts'] = count_classes(labels)
    if args.quality:
        device = device_of_rank(args.device)
        summary |= image_quality(source, codes, open_tokenizer(args, codebook).to(device), codebook.to(device),
                                 args.quality_size, args.num_workers, args.max_image_pixels)
    print0('\n'.join(describe(summary)))
    if args.output and args.output.endswith('.json'):
        write_text(args.output, json.dumps(summary) + '\n')
    elif args.output:
        names = files[0].classes or (source.classes if source else None)
        save_sheet(contact_sheet(args, codes, codebook, source, labels, names), args.output)
        print0(f'contact sheet: {args.output}')
    print0(json.dumps(summary))


if __name__ == '__main__':
    run(main, parse_args)
