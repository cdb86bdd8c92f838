"""Convert token sets to the published format or the compact one, and check that every code is the same.

    python scripts/convert_tokens.py --token-file tokens/x-train-token.data.bin.gz --format compact --output-dir compact
    python scripts/convert_tokens.py --token-file 'tokens/imagenet1k-train-token-*.data.bin' --format published \\
        --output-dir published
    python scripts/convert_tokens.py --token-file imagenet_di8x8_val.safetensors --format compact --output-dir compact

Sets of other projects are read too (docs/token_format.md); of several views of an image the first is kept. Shards are
converted together, and compact ones get one model. Labels (beside a token file, with 'label' in place of 'token' and
.txt, or inside a set of another project, unless --label-file says where) are copied. The files appear in --output-dir
when all of them are written, read again and compared. See docs/token_format.md.
"""
import argparse
import hashlib
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import expand_files, hold_folder
from fileio.hub import fetch_beside
from flags import Parser, views
from token_files.made_with import entry_of, find, seen_from
from token_files.token_file import (FORMATS, MAX_CODES, TokenFile, bytes_on_disk, decode, format_for, labels_of,
                                    largest_grid, open_token_file, open_token_files, paths_beside, stream_ending,
                                    write_model, write_set)
from token_files.views import Images, check_classes, group_images
from utils import InputError, print0, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--token-file', required=True, metavar='FILE',
        help='the set: a path, a glob or a comma-separated list of shards')
    add('--label-file', metavar='FILE',
        help='label files in the order of the token files; default: those beside them, or the labels inside')
    add('--views', type=views, metavar='V[:B]',
        help='the set holds each image V times, as in main_seit.py (default: as the files say)')
    add('--all-views', action='store_true', help='keep all views, as rows of their own; default: the first')
    add('--format', required=True, choices=FORMATS, help='the format to write')
    add('--output-dir', required=True, metavar='DIR', help='folder of the new files')
    return parser.parse_args(argv)


# ---------------------------------------------------------------- what is converted

@dataclass
class Shard:
    """A token set that is converted.

    Attributes:
        file: the old set.
        labels: (N,) int64 of the images, or None.
        images: which of its rows are kept, in their first view; None for all.
        stream: name of the new stream.
        largest: its largest code, as `read_all` leaves it.
        digest: SHA-256 of its codes, as `read_all` leaves it.
    """
    file: TokenFile
    labels: np.ndarray | None
    images: Images | None
    stream: str
    largest: int = 0
    digest: str = ''

    def __len__(self) -> int:
        """Number of images that are kept."""
        return len(self.images.first) if self.images else len(self.file)

    def codes(self) -> Iterator[np.ndarray]:
        """Yield the codes (m, n) uint16, run after run. Raises InputError."""
        if not self.images:
            yield from (codes for _, codes in decode(self.file))
            return
        kept = np.zeros(len(self.file), bool)
        kept[self.images.first] = True  # first views stand in the order of the images
        for first, codes in decode(self.file):
            chosen = codes[kept[first:first + len(codes)]]
            if len(chosen):
                yield chosen


def label_name(stream: str) -> str:
    """Name of the labels of a stream, as tokenize_images.py has it."""
    return re.sub(r'data\.bin(\.gz)?$', 'txt', stream.replace('-token', '-label'))


def open_shards(args: argparse.Namespace) -> list[Shard]:
    """The sets to convert, with their labels. Raises InputError where they are unreadable, or of one name."""
    files = open_token_files(args.token_file)
    if args.label_file:
        paths = expand_files(args.label_file)
        if len(paths) != len(files):
            raise InputError(f'{len(files)} token files, but {len(paths)} label files: give one for each')
    else:
        beside = [file.stream.with_name(label_name(file.stream.name)) for file in files]
        for path in beside:
            fetch_beside(path)
        paths = [path if path.exists() and not file.is_foreign else None for file, path in zip(files, beside)]
    ending = stream_ending(args.format)
    shards = [open_shard(file, path, args.views, args.all_views, ending) for file, path in zip(files, paths)]
    names = [shard.stream for shard in shards]
    if len(set(names)) < len(names):
        raise InputError(f'{args.token_file}: two files have one name; convert them one by one, to two folders')
    return shards


def open_shard(file: TokenFile, label_file: Path | None, views: tuple[int, int] | None, all_views: bool,
               ending: str) -> Shard:
    """What is converted of a token file. Raises InputError."""
    labels = None
    if label_file or (file.is_foreign and file.content.read_labels):
        labels = labels_of(file, label_file)
    images = group_images([file], views)
    if images and labels is not None:
        check_classes(images, labels, file.name)
    if images and all_views:
        print0(f'{file.name}: all {images.views} views of its {len(images.first):,} images are kept, each as a row')
        images = None
    elif images:
        print0(f'{file.name}: of {images.views} views of its {len(images.first):,} images the first is kept; '
               '--all-views keeps all')
        labels = None if labels is None else labels[images.first]
    if file.is_foreign:
        stream = f'{re.sub("_codes$", "", file.stream.name.removesuffix(file.stream.suffix))}-token.{ending}'
    else:
        stream = re.sub(r'data\.bin(\.gz)?$', ending, file.stream.name)
    return Shard(file, labels, images, stream)


def check_free(shards: Sequence[Shard], folder: Path, format_name: str) -> None:
    """InputError where a file that will be written is there."""
    for shard in shards:
        stream = folder / shard.stream
        for path in stream, *paths_beside(stream, format_name), folder / label_name(shard.stream):
            if os.path.lexists(path):
                raise InputError(f'{path}: is there already; choose another --output-dir')


def read_all(shards: Sequence[Shard]) -> int:
    """Read all codes once, and note of each set what the new one must hold.

    Returns:
        Codes on a side.

    Raises:
        InputError: for damaged sets, and grids that are not the same.
    """
    n = None
    for shard in shards:
        shard.file.check_content()
        digest = hashlib.sha256()
        for codes in shard.codes():
            n = n or codes.shape[1]
            if codes.shape[1] != n:
                raise InputError(f'{shard.file.stream}: {codes.shape[1]} codes an image, where '
                                 f'{shards[0].file.stream} has {n}: they are no shards of one set')
            shard.largest = max(shard.largest, int(codes.max()))
            # of the codes and not of the file, in one byte order: so it can be compared across formats
            digest.update(codes.astype('<u2').tobytes())
        shard.digest = digest.hexdigest()
    return math.isqrt(n)


# ---------------------------------------------------------------- writing

def write_shards(shards: Sequence[Shard], folder: Path, format_name: str, goal: Path) -> None:
    """Write the files of all sets into a folder, and compare what they hold. Raises InputError.

    Args:
        goal: the folder that they are to lie in at last.
    """
    grid_size = read_all(shards)
    if grid_size > largest_grid(format_name):
        raise InputError(f'{shards[0].file.stream}: {grid_size} codes on a side; --format {format_name} holds '
                         f'{largest_grid(format_name)} at most')
    # The rows of the codebook count too, not only the codes that occur, so that all splits get one format.
    name = format_for(format_name, max(max(shard.largest + 1, codebook_rows(shard.file)) for shard in shards))
    all_codes = (codes for shard in shards for codes in shard.codes())
    images = sum(map(len, shards))
    model = write_model(folder / shards[0].stream, name, all_codes, images)
    for shard in shards:
        kept = entries_to_keep(shard.file, format_name, goal)
        manifest = {'codes': shard.largest + 1} | kept | {'format': name} | model
        write_set(folder / shard.stream, shard.codes(), len(shard), folder / label_name(shard.stream),
                  shard.labels, manifest)
        compare(shard, folder / shard.stream)
        print0(f'{shard.file.stream}: {len(shard):,} images compared, all codes are the same')


def codebook_rows(file: TokenFile) -> int:
    """Rows of the codebook that the manifest states, as far as token files hold them; else 0."""
    codes = file.manifest.get('codes')
    return codes if type(codes) is int and codes <= MAX_CODES else 0


def entries_to_keep(file: TokenFile, format_name: str, goal: Path) -> dict[str, Any]:
    """What the manifest says, but for its format and files; paths start from the folder `goal`."""
    entries = {key: value for key, value in file.manifest.items() if key not in ('format', 'model', 'files')}
    if file.is_foreign and file.classes:
        entries['classes'] = file.classes
    if entry_of(entries, 'tokenizer'):
        entries['tokenizer'] = {**entries['tokenizer'], 'path': find(entries['tokenizer'], file.stream.parent)}
        entries = seen_from(entries, goal)
    if isinstance(entries.get('run'), dict):  # tokenize_images.py recognizes a finished set by this entry
        run_id = {key: value for key, value in entries['run'].items() if key != 'format'}
        entries['run'] = run_id if format_name == 'published' else run_id | {'format': format_name}
    return entries


def compare(shard: Shard, stream: Path) -> None:
    """RuntimeError unless a new set has the codes of the old one."""
    digest = hashlib.sha256()
    for _, codes in decode(open_token_file(stream)):
        digest.update(codes.astype('<u2').tobytes())
    if digest.hexdigest() != shard.digest:
        raise RuntimeError(f'{stream}: does not hold the codes of {shard.file.stream}: please report this')


def main(args: argparse.Namespace) -> None:
    shards = open_shards(args)
    folder = Path(args.output_dir)
    check_free(shards, folder, args.format)
    work = folder / f'.{shards[0].stream}.converting'
    lock = hold_folder(work, 'choose another --output-dir', name='lock')
    # Everything is written and compared in a hidden folder, then moved: a kill leaves the output folder as it was.
    new = work / 'files'
    shutil.rmtree(new, ignore_errors=True)  # of a killed run
    try:
        write_shards(shards, new, args.format, folder)
        # streams last: whoever sees one sees its index or model, its labels and its manifest too
        for path in sorted(new.iterdir(), key=lambda path: 'data.bin' in path.name):
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.close()
    before = bytes_on_disk(shard.file for shard in shards)
    after = bytes_on_disk(open_token_file(folder / shard.stream) for shard in shards)
    images = sum(map(len, shards))
    labels = '' if all(shard.labels is not None for shard in shards) else '; no labels were found to go with them'
    print0(f'{images:,} images, {before:,} bytes before, {after:,} bytes now ({after / images:.1f} an image, '
           f'{after / before - 1:+.1%}): {folder}{labels}')


if __name__ == '__main__':
    run(main, parse_args)
