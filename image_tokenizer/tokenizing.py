"""Tokenizing a set of images: from a source of images, a tokenizer and a codebook to token files and their manifest.

`tokenize` is the door. The images are cut into parts (token_files/parts.py), and each rank takes every n-th part. A
part is a file on disk as soon as its codes are known, so a run that is killed at any moment resumes at the first part
that is missing. When the last part is there, rank 0 writes the token files from all of them.

The manifest says what the codes depend on. A run with another tokenizer, codebook, precision, or list of images
therefore never continues this one, nor overwrites its files.
"""
import contextlib
import datetime
import hashlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from fileio.files import atomic_path, identity
from fileio.stamps import Stamp
from fileio.torch_files import digest_of
from image_data.sources import ImageBatch, Source, load_images
from image_tokenizer.tokenizers import (check_codes, check_sizes, compile_tokenizer, encode_images, gives_codes,
                                        load_tokenizer)
from token_files.codebook import load_codebook
from token_files.made_with import identity_of_codebook, identity_of_tokenizer, seen_from
from token_files.parts import FinishedCodes, OutputFiles, PartsFolder, remaining_parts, write_sets
from token_files.token_file import MAX_CODES, format_for, largest_grid
from utils import InputError, check_same_on_all_ranks, is_main, on_main, print0, rank, world_size


@dataclass(frozen=True)
class EncodingOptions:
    """What the codes of an image depend on, beside the image and the kind of device.

    Attributes:
        tokenizer_path: of any kind that `load_tokenizer` reads.
        image_size: images are resized to this many pixels, both sides.
        codebook_path: None for the tokenizer's own codebook, which is then written beside the tokens.
        code_path: the folder of a pickled tokenizer's code, which is then run.
        batch_size: images a batch; another may change a few codes, by rounding.
        amp: 'off' or 'bf16'.
        compiled: use torch.compile, which may change a few codes, by rounding.
        limit_codes: keep and renumber only the codes in use, and write their rows as the codebook.
        allow_torchscript: whether a tokenizer may be a TorchScript program, which is then run.
    """
    tokenizer_path: str | Path
    image_size: int
    codebook_path: str | Path | None = None
    code_path: str | Path | None = None
    batch_size: int = 64
    amp: str = 'off'
    compiled: bool = False
    limit_codes: bool = False
    allow_torchscript: bool = False


def tokenize(source: Source, output: OutputFiles, options: EncodingOptions, device: torch.device,
             workers: int | None = None, skip_bad: bool | None = None, max_pixels: int | None = None) -> None:
    """Tokenize all images of a source into token files, and print what was made. Collective.

    An interrupted run resumes; a complete one is left alone.

    Args:
        source: of the images.
        output: the folder, names and format of the token files.
        options: what the codes depend on.
        device: of the tokenizer.
        workers: processes that decode images, on each rank; None for as many as there are cores.
        skip_bad: leave out images that cannot be read, instead of stopping at one; None where the program has no flag
            for it.
        max_pixels: larger images count as unreadable; None for PIL's limit.

    Raises:
        InputError: for files that do not belong together, images that cannot be read, and an output folder that holds
            another run or cannot be written.
    """
    # torch lets convolutions round to TF32 by default. Codes of a set must not depend on such a setting.
    torch.backends.cudnn.allow_tf32 = False

    # what goes in
    check_folder(source.data_path, output.folder, source.classes, output.folder_flag)
    tokenizer, codebook = load_models(options.tokenizer_path, options.code_path, options.codebook_path,
                                      options.image_size, options.limit_codes, options.allow_torchscript)
    check_grid(output.format, options.image_size // tokenizer.patch_size)
    parts = PartsFolder(output.parts_folder, len(source), options.batch_size)
    run_id = identify_run(source, output, options, parts, codebook, device)
    # nodes may have copies of the images, of which one is stale
    check_same_on_all_ranks(run_id | ({'images': source.content_digest()} if world_size() > 1 else {}))

    # what is to do
    stamp = source.stamp() if is_main() else None  # before any image is read
    missing_parts = on_main(remaining_parts, output, parts, run_id, options.codebook_path is None, stamp)
    if missing_parts is None:
        return
    print0(f'{len(source):,} images, labels from {source.labels_from}; '
           f'{len(parts) - len(missing_parts)} of {len(parts)} parts done')

    # images to codes
    kind = getattr(tokenizer, 'kind', type(tokenizer).__name__)
    tokenizer = tokenizer.to(device)
    if options.compiled:
        tokenizer = compile_tokenizer(tokenizer)
    encoder = Encoder(tokenizer, codebook.to(device), options.amp, options.tokenizer_path)
    rank_parts = missing_parts[rank()::world_size()]  # every n-th one, so that ranks end at about the same time
    batches = [batch for part in rank_parts for batch in parts.batches(part)]
    images = load_images(source, batches, options.image_size, workers=workers,
                         skip_bad=skip_bad, pin_memory=device.type == 'cuda', max_pixels=max_pixels)
    total = sum(len(batch) for part in missing_parts for batch in parts.batches(part))
    with progress_bar(total, sum(map(len, batches))) as advance:
        for part in rank_parts:
            encode_part(parts, part, images, encoder, advance)
    wait_for_all()

    # codes to files: only now, since new code numbers (--limit-codes) and the compact model need all codes
    if is_main():
        finished = FinishedCodes(parts)
        check_skipped(finished, source, skip_bad)
        print0(finish(source, output, options, finished, codebook, kind, run_id, stamp))
        parts.remove()


# ---------------------------------------------------------------- what goes in

def load_models(tokenizer_path: str | Path, code_path: str | Path | None, codebook_path: str | Path | None,
                image_size: int, limit_codes: bool,
                allow_torchscript: bool = False) -> tuple[nn.Module, torch.Tensor]:
    """Tokenizer and codebook (K, d) float32, on the CPU, that fit each other and the image size. Raises InputError."""
    tokenizer = load_tokenizer(tokenizer_path, code_path, allow_torchscript)
    source = codebook_path or tokenizer_path
    codebook = load_codebook(codebook_path) if codebook_path else getattr(tokenizer, 'codebook', None)
    if codebook is None:
        raise InputError(f'{tokenizer_path}: has no codebook of its own: give one to --codebook-path')
    check_codes(tokenizer, codebook, source)
    if limit_codes and gives_codes(tokenizer) and tokenizer.codebook is None:
        # an evaluation compares codebooks to see that codes were renumbered, and this tokenizer has none to compare
        raise InputError(f'{tokenizer_path}: gives codes and has no codebook, so that other numbers for its codes '
                         'would go unnoticed later: leave out --limit-codes of tokenize_images.py')
    if len(codebook) > MAX_CODES and not limit_codes:
        raise InputError(f'{source}: {len(codebook)} codes, but token files hold {MAX_CODES}: tokenize_images.py '
                         '--limit-codes keeps those in use')
    check_sizes(image_size, tokenizer.patch_size)
    return tokenizer, codebook


def check_grid(format_name: str, grid_size: int) -> None:
    """InputError for a token grid that the format does not hold."""
    largest = largest_grid(format_name)
    if grid_size > largest:
        raise InputError(f'the format {format_name} holds grids of up to {largest} codes on a side, not {grid_size}: '
                         'choose a smaller --image-size, or another format')


def check_folder(data_path: str, output_dir: str | Path, classes: list[str] | None,
                 flag: str = '--output-dir') -> None:
    """InputError when the output folder, of a flag, would be taken for a class of the images by the next run."""
    images = os.path.realpath(data_path)
    output = os.path.realpath(output_dir)
    if not classes or not os.path.isdir(images) or not output.startswith(os.path.join(images, '')):
        return
    first = Path(output).relative_to(images).parts[0]
    if first not in classes and not first.startswith('.') and not list(Path(images).glob('*.parquet')):
        raise InputError(f'{flag} {output_dir}: lies among the class folders of {data_path}, and would be taken '
                         f'for a class; choose a folder outside, or {data_path} itself')


# ---------------------------------------------------------------- what tells one run from another

def torch_bytes(tensor: torch.Tensor) -> bytes:
    """What torch.save writes for a tensor; the same as files.save_torch makes."""
    buffer = io.BytesIO()
    torch.save(tensor.clone(), buffer)
    return buffer.getvalue()


def identify_run(source: Source, output: OutputFiles, options: EncodingOptions, parts: PartsFolder,
                 codebook: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """All that the token files depend on, as the manifest has it. Raises InputError for files that cannot be read."""
    if options.codebook_path:
        codebook_id = identity_of_codebook(options.codebook_path)
    else:
        codebook_id = {'file': output.codebook.name, 'sha256': hashlib.sha256(torch_bytes(codebook)).hexdigest()}
    precision = 'fp32' if options.amp == 'off' else options.amp
    if options.compiled:
        precision += ' compiled'
    run_id = {'source': source.digest(), 'tokenizer': identity_of_tokenizer(options.tokenizer_path),
              'codebook': codebook_id, 'image_size': options.image_size, 'batch_size': options.batch_size,
              'part_batches': parts.size // parts.batch_size, 'precision': precision, 'device': device.type,
              'limit_codes': options.limit_codes, 'shard_size': output.shard_size}
    if output.format != 'published':  # manifests from before there was another format say nothing of it
        run_id['format'] = output.format
    if source.exif_rotate:  # nor of turning images, which none was before
        run_id['exif_rotate'] = True
    return run_id


# ---------------------------------------------------------------- images to codes

class Encoder:
    """Pixels to codes, on the device of `tokenizer` and `codebook` (K, d).

    Args:
        amp: 'off' or 'bf16'.
        path: of the tokenizer, for errors.
    """

    def __init__(self, tokenizer: nn.Module, codebook: torch.Tensor, amp: str, path: str | Path):
        self.tokenizer = tokenizer
        self.codebook = codebook
        self.amp = amp
        self.path = path

    @torch.inference_mode()
    def codes(self, pixels: torch.Tensor, amp: str) -> torch.Tensor:
        """(B, 3, S, S) uint8 on any device -> (B, n) int32 on the device; -1 where features are not finite."""
        features, codes = encode_images(self.tokenizer, self.codebook, pixels, amp)
        return codes.int() if features is None else torch.where(features.isfinite().all(-1), codes.int(), -1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.codes(pixels, self.amp)

    def agreement(self, pixels: torch.Tensor) -> float:
        """The fraction of codes that fp32 gives too."""
        return float((self.codes(pixels, self.amp) == self.codes(pixels, 'off')).float().mean())


def encode_part(parts: PartsFolder, part: int, images: Iterator[ImageBatch], encoder: Encoder,
                advance: Callable[[int], None]) -> None:
    """Make one part, and write it.

    Args:
        parts: of the run.
        part: its number.
        images: its next batches are those of the part.
        encoder: images to codes.
        advance: called with the number of images of each batch that is done.

    Raises:
        InputError: for an image that cannot be read, features that are not finite, a part that cannot be written.
    """
    batches = parts.batches(part)
    codes = []  # they stay on the device until the part ends, so that the next batch need not wait for a copy
    good = []
    sizes = []
    extra = {'agreement': math.nan} if part == 0 and encoder.amp != 'off' else {}
    for batch in batches:
        loaded = next(images)
        good.append(np.isin(batch, loaded.indices))
        sizes.append(loaded.encoded_bytes)
        if len(loaded.indices):
            codes.append(encoder(loaded.pixels))
            if math.isnan(extra.get('agreement', 0)):  # measured on the first batch that has an image
                extra['agreement'] = encoder.agreement(loaded.pixels)
        advance(len(batch))
    codes = torch.cat(codes).cpu().numpy() if codes else np.zeros((0, 0), np.int32)
    if (codes < 0).any():
        advice = '' if encoder.amp == 'off' else ', or try --amp off'
        raise InputError(f'{encoder.path}: gives features that are not finite for images {batches[0].start} to '
                         f'{batches[-1].stop - 1}: a damaged tokenizer{advice}')
    used = np.zeros(len(encoder.codebook), bool)
    used[codes] = True
    parts.write(part, codes=codes.astype(np.uint16 if len(encoder.codebook) <= MAX_CODES else np.int32),
                sizes=np.concatenate(sizes), good=np.concatenate(good), used=used.nonzero()[0], **extra)


@contextlib.contextmanager
def progress_bar(total: int, rank_total: int) -> Iterator[Callable[[int], None]]:
    """Show progress on rank 0: a bar on a terminal, a line a minute in a log.

    Args:
        total: images to do on all ranks.
        rank_total: images of this rank. Rank 0 scales what it has done, since ranks keep about in step.

    Yields:
        A function to call with the number of images done.
    """
    with tqdm(total=total, unit=' images', unit_scale=True, disable=not (is_main() and total),
              mininterval=0.1 if sys.stderr.isatty() else 60) as bar:
        yield lambda images: bar.update(images * total / rank_total)


def wait_for_all() -> None:
    """A barrier without time limit: slow nodes may lag by hours, which NCCL would take for a hang."""
    if dist.is_initialized():
        dist.barrier(group=dist.new_group(backend='gloo', timeout=datetime.timedelta(days=30)))


# ---------------------------------------------------------------- codes to files

def check_skipped(finished: FinishedCodes, source: Source, skip_bad: bool | None) -> None:
    """InputError when no image is left, or images were skipped that now are not to be."""
    bad = np.flatnonzero(~finished.good)
    if len(bad) and not skip_bad:
        advice = 'add --skip-bad-images again, or ' if skip_bad is False else ''
        raise InputError(f'{finished.parts.folder}: {len(bad)} images were skipped before (first: '
                         f'{source.names[bad[0]]}): {advice}delete that folder to start from scratch')
    if len(bad) == len(finished.good):
        raise InputError(f'{source.data_path}: none of the {len(bad)} images can be read')


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


def finish(source: Source, output: OutputFiles, options: EncodingOptions, finished: FinishedCodes,
           codebook: torch.Tensor, kind: str, run_id: dict[str, Any], stamp: Stamp) -> str:
    """Write the final files from the parts; returns the line that says what was made. Raises InputError.

    `kind`: of the tokenizer. It follows from its file, so that runs are told apart without it.
    """
    new_codes = None
    codebook_id = run_id['codebook']
    if options.limit_codes:
        codebook, new_codes = limited_codebook(codebook, finished.used, source.data_path)
    if options.limit_codes or not options.codebook_path:
        codebook_id = write_codebook(codebook, output.codebook)
    name = format_for(output.format, len(codebook))
    grid = finished.grid_size()
    skipped = int((~finished.good).sum())
    manifest = {'format': name, 'grid': grid, 'codes': len(codebook), 'image_size': options.image_size,
                'classes': source.classes, 'labels_from': source.labels_from, 'skipped_in_run': skipped,
                'precision': run_id['precision'],
                'tokenizer': run_id['tokenizer'] | {'kind': kind, 'path': str(options.tokenizer_path)},
                'codebook': codebook_id | {'values_sha256': digest_of(codebook.float())},
                'run': run_id, 'source_sizes': stamp.sizes}
    manifest = seen_from(manifest, output.folder)
    if source.exif_rotate:
        manifest['exif_rotate'] = True
    if options.limit_codes:
        manifest['kept_codes'] = finished.used.tolist()
    notes = f'{skipped} bad images skipped, ' if skipped else ''
    if options.amp != 'off':
        manifest['agreement_with_fp32'] = finished.agreement()
        if manifest['agreement_with_fp32'] is not None:
            notes += f'{manifest["agreement_with_fp32"]:.4%} of codes agree with fp32, '

    labels = source.labels[finished.good]
    stored = write_sets(output, finished, labels, new_codes, manifest)
    pattern = str(output.token_file(0)).replace('-token-00000', '-token-*')
    return (f'{len(labels):,} images of {grid}x{grid} codes, {len(finished.used)} of {len(codebook)} codes in use, '
            f'{notes}{stored:,} bytes ({stored / len(labels):.0f} an image, of '
            f'{finished.sizes.sum() / len(labels):.0f} before): {pattern}')
