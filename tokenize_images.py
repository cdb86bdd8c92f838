"""Tokenize images into the three published files and a JSON manifest.

    python tokenize_images.py --data-path IMAGES/train --name my-train --output-dir tokens \\
        --tokenizer-path tokens/tokenizer.pt --codebook-path tokens/codebook.ckpt --image-size 64
    torchrun --nproc_per_node=8 tokenize_images.py --data-path 'train-{000..146}.tar' ...

Writes NAME-token.data.bin.gz, NAME-token.index.npy.gz, NAME-label.txt and NAME-token.json; with --shard-size each shard
is such a set, of NAME-token-00000 and so on; with --format compact the first two are NAME-token.data.bin and
NAME-token.model.bin, a third smaller (token_files/compact.py). For --data-path and where labels come from see
image_data/sources.py: class folders (label: the folder's number in alphabetical order), a list file of 'path label'
lines, tar shards (.cls, or .json's 'label', beside the image), parquet files (column 'label').

Killed at any moment, the same command resumes where it stopped (token_files/parts.py). On one machine the files are the
same, byte for byte, for any number of processes and interruptions (on CPUs: for the same OMP_NUM_THREADS, which
torchrun sets to 1). An image that stopped the run may be mended or replaced under its name before the command is given
again.
"""
import argparse
import contextlib
import datetime
import hashlib
import io
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # ours come first, under PYTHONSAFEPATH=1 too
from fileio.files import atomic_path, download, is_address, sha256
from flags import Parser, add_max_pixels, integer
from image_data.sources import ImageBatch, Source, load_images, open_source
from image_tokenizer.tokenizers import check_codebook, encode_images, load_tokenizer
from token_files import parts
from token_files.codebook import load_codebook
from token_files.parts import FinishedParts, Output, Parts, plan, write_sets
from token_files.token_file import FORMATS, MAX_CODES, format_for, largest_grid
from utils import (InputError, check_same_on_all_ranks, cores, init_distributed, is_main, on_main, print0, rank, run,
                   world_size)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    group = parser.add_argument_group('files')
    add = group.add_argument
    add('--data-path', required=True, metavar='PATH',
        help="class folders of images (labels: folders in alphabetical order); a .txt list of 'path label' lines; "
             ".tar shards, as a glob, x-{000..146}.tar or comma list (labels: members .cls, or .json's 'label'); "
             "or .parquet files, a folder of them or a glob (labels: column 'label')")
    add('--name', required=True, help='first part of the file names, as in imagenet1k-train')
    add('--output-dir', required=True, metavar='DIR')
    add('--tokenizer-path', required=True, metavar='FILE')
    add('--tokenizer-code-path', metavar='DIR', help="a pickled tokenizer's code, which is then run")
    add('--codebook-path', metavar='FILE', help="default: the tokenizer's own, also written to DIR/codebook.ckpt")
    add('--limit-codes', action='store_true',
        help='keep and renumber only the codes in use, and write that codebook to DIR/codebook.ckpt (training split)')
    add('--format', choices=FORMATS, default='published',
        help="published: the paper's files, which other programs read; compact: a third smaller (docs/token_format.md)")
    add('--shard-size', type=integer(), default=0, metavar='N', help='images to a numbered shard; 0: one set of files')
    add('--skip-bad-images', action='store_true', help='leave out unreadable images, instead of stopping at one')
    add_max_pixels(add)

    group = parser.add_argument_group('computation')
    add = group.add_argument
    add('--image-size', type=integer(1), default=256, help='images are resized to this, both sides')
    add('--batch-size', type=integer(1), default=64, help='per process; another may change a few codes, by rounding')
    add('--amp', choices=('off', 'bf16'), default='off',
        help='off: fp32; bf16: faster, and how many codes agree with fp32 is reported')
    add('--compile', action='store_true', help='torch.compile the tokenizer; may change a few codes, by rounding')
    add('--num-workers', type=integer(), default=cores(), help='processes that decode images, per rank')
    add('--device', default='auto', help='auto (CUDA where there is one), cuda or cpu')
    args = parser.parse_args(argv)
    if not args.name or args.name != Path(args.name).name or args.name.startswith('.'):
        raise InputError(f'--name {args.name}: give a plain word, as in imagenet1k-train, and folders to --output-dir')
    return args


# ---------------------------------------------------------------- what is asked for

def load_models(tokenizer_path: str, code_path: str | None, codebook_path: str | None, image_size: int,
                limit_codes: bool) -> tuple[nn.Module, torch.Tensor]:
    """Tokenizer and codebook (K, d) float32, on the CPU, that fit each other and the image size. Raises InputError."""
    tokenizer = load_tokenizer(tokenizer_path, code_path)
    source = codebook_path or tokenizer_path
    codebook = load_codebook(codebook_path) if codebook_path else getattr(tokenizer, 'codebook', None)
    if codebook is None:
        raise InputError(f'{tokenizer_path}: has no codebook of its own: give one to --codebook-path')
    check_codebook(tokenizer, codebook, source)
    if len(codebook) > MAX_CODES and not limit_codes:
        raise InputError(f'{source}: {len(codebook)} codes, but token files hold {MAX_CODES}: add --limit-codes, which '
                         'keeps those in use')
    patch = tokenizer.patch_size
    if image_size % patch:
        near = max(patch, image_size // patch * patch)
        raise InputError(f'--image-size {image_size}: patches of {patch} do not divide it; choose {near} or '
                         f'{near + patch}')
    return tokenizer, codebook


def check_grid(format_name: str, grid: int) -> None:
    """InputError for a token grid that the format does not hold."""
    largest = largest_grid(format_name)
    if grid > largest:
        raise InputError(f'--format {format_name} holds grids of up to {largest} codes on a side, not {grid}: choose a '
                         'smaller --image-size, or another --format')


def identity(path: str | Path) -> dict[str, str]:
    """Name and checksum of a file, or of what an address gives. Raises InputError."""
    if is_address(path):
        with tempfile.TemporaryDirectory() as folder:
            return identity(download(path, folder))
    return {'file': Path(path).name, 'sha256': sha256(path)}


def torch_bytes(tensor: torch.Tensor) -> bytes:
    """What torch.save writes for a tensor; the same as files.save_torch makes."""
    buffer = io.BytesIO()
    torch.save(tensor.clone(), buffer)
    return buffer.getvalue()


def identify_run(args: argparse.Namespace, source: Source, codebook: torch.Tensor,
                 device: torch.device) -> dict[str, Any]:
    """All that the codes depend on, as the values of the manifest that tell one run from another."""
    if args.codebook_path:
        codebook_id = identity(args.codebook_path)
    else:
        codebook_id = {'file': 'codebook.ckpt', 'sha256': hashlib.sha256(torch_bytes(codebook)).hexdigest()}
    precision = 'fp32' if args.amp == 'off' else args.amp
    if args.compile:
        precision += ' compiled'
    run_id = {'source': source.digest(), 'tokenizer': identity(args.tokenizer_path), 'codebook': codebook_id,
              'image_size': args.image_size, 'batch_size': args.batch_size, 'part_batches': parts.PART_BATCHES,
              'precision': precision, 'device': device.type, 'limit_codes': args.limit_codes,
              'shard_size': args.shard_size}
    if args.format != 'published':  # whose manifests stay as they were before there was another
        run_id['format'] = args.format
    return run_id


def check_folder(data_path: str, output_dir: str, classes: list[str] | None) -> None:
    """InputError when the output folder would be taken for a class of the images by the next run."""
    images = os.path.realpath(data_path)
    output = os.path.realpath(output_dir)
    if not classes or not os.path.isdir(images) or not output.startswith(os.path.join(images, '')):
        return
    first = Path(output).relative_to(images).parts[0]
    if first not in classes and not first.startswith('.') and not list(Path(images).glob('*.parquet')):
        raise InputError(f'--output-dir {output_dir}: lies among the class folders of {data_path}, and would be taken '
                         f'for a class; choose a folder outside, or {data_path} itself')


# ---------------------------------------------------------------- images to codes

class Encoder:
    """Pixels to codes on a device.

    Args:
        tokenizer: on the device.
        codebook: (K, d), on the device.
        amp: 'off' or 'bf16'.
        path: of the tokenizer, for errors.
    """

    def __init__(self, tokenizer: nn.Module, codebook: torch.Tensor, amp: str, path: str):
        self.tokenizer = tokenizer
        self.codebook = codebook
        self.amp = amp
        self.path = path

    @torch.inference_mode()
    def codes(self, pixels: torch.Tensor, amp: str) -> torch.Tensor:
        """(B, 3, S, S) uint8 on any device -> (B, n) int32 on the device; -1 where features are not finite."""
        features, codes = encode_images(self.tokenizer, self.codebook, pixels, amp)
        return torch.where(features.isfinite().all(-1), codes.int(), -1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.codes(pixels, self.amp)

    def agreement(self, pixels: torch.Tensor) -> float:
        """Share of codes that are the same in the precision chosen and in fp32."""
        return float((self.codes(pixels, self.amp) == self.codes(pixels, 'off')).float().mean())


def encode_part(parts: Parts, part: int, images: Iterator[ImageBatch], encoder: Encoder,
                advance: Callable[[int], None]) -> None:
    """Make one part.

    Args:
        parts: of the run.
        part: its number.
        images: the next batches are those of the part.
        encoder: images to codes.
        advance: called with the size of each batch that is done.

    Raises:
        InputError: for an image that cannot be read, features that are not finite, a part that cannot be written.
    """
    batches = parts.batches(part)
    codes = []  # on the device until the part ends, so that nothing waits for it
    good = []
    sizes = []
    extra = {'agreement': math.nan} if part == 0 and encoder.amp != 'off' else {}
    for batch in batches:
        loaded = next(images)
        good.append(np.isin(batch, loaded.indices))
        sizes.append(loaded.encoded_bytes)
        if len(loaded.indices):
            codes.append(encoder(loaded.pixels))
            if math.isnan(extra.get('agreement', 0)):  # of the first batch
                extra['agreement'] = encoder.agreement(loaded.pixels)
        advance(len(batch))
    codes = torch.cat(codes).cpu().numpy() if codes else np.zeros((0, 0), np.int32)
    if (codes < 0).any():
        raise InputError(f'{encoder.path}: gives features that are not finite for images {batches[0].start} to '
                         f'{batches[-1].stop - 1}: a damaged tokenizer, or try --amp off')
    used = np.zeros(len(encoder.codebook), bool)
    used[codes] = True
    parts.write(part, codes=codes.astype(np.uint16 if len(encoder.codebook) <= MAX_CODES else np.int32),
                sizes=np.concatenate(sizes), good=np.concatenate(good), used=used.nonzero()[0], **extra)


@contextlib.contextmanager
def progress_bar(total: int, rank_total: int) -> Iterator[Callable[[int], None]]:
    """Show progress on rank 0; yields a function to call with the number of images done.

    On a terminal a bar; in a log a line a minute. It counts this rank's images for all, which keep in step.

    Args:
        total: images to do on all ranks.
        rank_total: images of this rank.
    """
    with tqdm(total=total, unit=' images', unit_scale=True, disable=not (is_main() and total),
              mininterval=0.1 if sys.stderr.isatty() else 60) as bar:
        yield lambda images: bar.update(images * total / rank_total)


def wait_for_all() -> None:
    """A barrier without time limit: slow nodes may lag by hours, which NCCL would take for a hang."""
    if dist.is_initialized():
        dist.barrier(group=dist.new_group(backend='gloo', timeout=datetime.timedelta(days=30)))


# ---------------------------------------------------------------- codes to files

def check_skipped(finished: FinishedParts, source: Source, data_path: str, skip_bad: bool) -> None:
    """InputError when no image is left, or images were skipped that now are not to be."""
    bad = np.flatnonzero(~finished.good)
    if len(bad) and not skip_bad:
        raise InputError(f'{finished.parts.folder}: {len(bad)} images were skipped before (first: '
                         f'{source.names[bad[0]]}): add --skip-bad-images again, or delete that folder to start from '
                         'scratch')
    if len(bad) == len(finished.good):
        raise InputError(f'{data_path}: none of the {len(bad)} images can be read')


def limited_codebook(codebook: torch.Tensor, used: np.ndarray, data_path: str) -> tuple[torch.Tensor, np.ndarray]:
    """The rows in use, and a table from old codes to new ones. Raises InputError where too many are in use."""
    if len(used) > MAX_CODES:
        raise InputError(f'{data_path}: {len(used)} codes are in use, but token files hold {MAX_CODES}: choose a '
                         'smaller codebook')
    new_codes = np.zeros(len(codebook), np.int64)
    new_codes[used] = np.arange(len(used))
    return codebook[torch.from_numpy(used)], new_codes


def write_codebook(codebook: torch.Tensor, path: Path) -> dict[str, str]:
    """Write a codebook; returns its identity. Raises InputError."""
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(torch_bytes(codebook))
    return identity(path)


def finish(args: argparse.Namespace, source: Source, finished: FinishedParts, codebook: torch.Tensor,
           run_id: dict[str, Any]) -> str:
    """Write the final files from the parts; returns the line that says what was made. Raises InputError."""
    output = Output(Path(args.output_dir), args.name, args.shard_size, args.format)
    check_skipped(finished, source, args.data_path, args.skip_bad_images)
    new_codes = None
    codebook_id = run_id['codebook']
    if args.limit_codes:
        codebook, new_codes = limited_codebook(codebook, finished.used, args.data_path)
    if args.limit_codes or not args.codebook_path:
        codebook_id = write_codebook(codebook, output.codebook)
    name = format_for(output.format, len(codebook))
    grid = finished.grid_size()
    skipped = int((~finished.good).sum())
    manifest = {'format': name, 'grid': grid, 'codes': len(codebook), 'image_size': args.image_size,
                'classes': source.classes, 'labels_from': source.labels_from, 'skipped_in_run': skipped,
                'precision': run_id['precision'], 'tokenizer': run_id['tokenizer'], 'codebook': codebook_id,
                'run': run_id}
    if args.limit_codes:
        manifest['kept_codes'] = finished.used.tolist()
    notes = f'{skipped} bad images skipped, ' if skipped else ''
    if args.amp != 'off':
        manifest['agreement_with_fp32'] = finished.agreement()
        if manifest['agreement_with_fp32'] is not None:
            notes += f'{manifest["agreement_with_fp32"]:.4%} of codes agree with fp32, '

    labels = source.labels[finished.good]
    stored = write_sets(output, finished, labels, new_codes, manifest)
    pattern = str(output.token_file(0)).replace('-token-00000', '-token-*')
    return (f'{len(labels):,} images of {grid}x{grid} codes, {len(finished.used)} of {len(codebook)} codes in use, '
            f'{notes}{stored:,} bytes ({stored / len(labels):.0f} an image, of '
            f'{finished.sizes.sum() / len(labels):.0f} before): {pattern}')


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> None:
    device = init_distributed(args.device)
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions; fp32 is to mean fp32

    # what goes in
    source = open_source(args.data_path)
    check_folder(args.data_path, args.output_dir, source.classes)
    tokenizer, codebook = load_models(args.tokenizer_path, args.tokenizer_code_path, args.codebook_path,
                                      args.image_size, args.limit_codes)
    check_grid(args.format, args.image_size // tokenizer.patch_size)
    run_id = identify_run(args, source, codebook, device)
    check_same_on_all_ranks(run_id)

    # what is to do
    output = Output(Path(args.output_dir), args.name, args.shard_size, args.format)
    parts = Parts(output.parts_folder, len(source), args.batch_size)
    todo = on_main(plan, output, parts, run_id, args.codebook_path is None)
    if todo is None:
        print0(f'{args.output_dir}: {args.name} is complete already, nothing to do')
        return
    print0(f'{len(source):,} images, labels from {source.labels_from}; '
           f'{len(parts) - len(todo)} of {len(parts)} parts done')

    # images to codes
    tokenizer = tokenizer.to(device)
    if args.compile:
        tokenizer = torch.compile(tokenizer)
    encoder = Encoder(tokenizer, codebook.to(device), args.amp, args.tokenizer_path)
    rank_parts = todo[rank()::world_size()]
    batches = [batch for part in rank_parts for batch in parts.batches(part)]
    images = load_images(source, batches, args.image_size,
                         workers=args.num_workers, skip_bad=args.skip_bad_images,
                         pin_memory=device.type == 'cuda', max_pixels=args.max_image_pixels)
    total = sum(len(batch) for part in todo for batch in parts.batches(part))
    with progress_bar(total, sum(map(len, batches))) as advance:
        for part in rank_parts:
            encode_part(parts, part, images, encoder, advance)
    wait_for_all()

    # codes to files
    if is_main():
        print0(finish(args, source, FinishedParts(parts), codebook, run_id))
        parts.remove()


if __name__ == '__main__':
    run(main, parse_args)
