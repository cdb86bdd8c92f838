"""Convert token sets between the published format and the compact one, and check that every code is the same.

    python scripts/convert_tokens.py --token-file tokens/x-train-token.data.bin.gz --format compact --output-dir compact
    python scripts/convert_tokens.py --token-file 'tokens/imagenet1k-train-token-*.data.bin' --format published \\
        --output-dir published

Shards are converted together, and compact ones get one model. Labels (beside a token file, with 'label' in place of
'token' and .txt, unless --label-file says where) are copied. The files appear in --output-dir when all of them are
written, read again and compared. See docs/token_format.md.
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
from fileio.files import check_writable, expand_files, lock_file, write_text
from fileio.labels import write_labels
from flags import Parser
from token_files import compact
from token_files.compact import write_compact, write_model
from token_files.context_model import fit
from token_files.published import index_path, write_stream
from token_files.token_codecs import MAX_CODES, codec_for
from token_files.token_file import (TokenFile, bytes_on_disk, decode, files_of_manifest, labels_of, manifest_path,
                                    manifest_text, open_token_file)
from utils import InputError, print0, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--token-file', required=True, metavar='FILE', help='a path, a glob or a comma-separated list of shards')
    add('--label-file', metavar='FILE', help='as many, in the same order (default: those beside the token files)')
    add('--format', required=True, choices=('published', 'compact'))
    add('--output-dir', required=True, metavar='DIR')
    return parser.parse_args(argv)


# ---------------------------------------------------------------- what is converted

@dataclass
class Shard:
    """A token set that is converted.

    Attributes:
        file: the old set.
        labels: (N,) int64, or None.
        stream: name of the new stream.
        used: (65536,) bool, the codes that occur, when they have been counted.
        digest: SHA-256 of the codes, likewise.
        n: codes an image, likewise.
    """
    file: TokenFile
    labels: np.ndarray | None
    stream: str
    used: np.ndarray
    digest: str = ''
    n: int = 0

    def codes(self) -> Iterator[np.ndarray]:
        """Yield the codes (m, n) uint16, run after run, and count them on the way. Raises InputError."""
        digest = hashlib.sha256()
        for _, codes in decode(self.file):
            self.used[codes] = True
            self.n = codes.shape[1]
            digest.update(codes.astype('<u2').tobytes())
            yield codes
        self.digest = digest.hexdigest()


def label_name(stream: str) -> str:
    """Name of the labels of a stream, as tokenize_images.py has it."""
    return re.sub(r'data\.bin(\.gz)?$', 'txt', stream.replace('-token', '-label'))


def model_name(stream: str) -> str:
    """Name of the model of compact shards, from the name of the first."""
    return re.sub(r'(-\d+)?\.data\.bin$', '.model.bin', stream)


def open_shards(args: argparse.Namespace) -> list[Shard]:
    """The sets to convert, with their labels. Raises InputError where they are unreadable, or of one name."""
    files = [open_token_file(path) for path in expand_files(args.token_file)]
    if args.label_file:
        paths = expand_files(args.label_file)
        if len(paths) != len(files):
            raise InputError(f'{len(files)} token files, but {len(paths)} label files: give one for each')
    else:
        beside = [file.stream.with_name(label_name(file.stream.name)) for file in files]
        paths = [path if path.exists() else None for path in beside]
    ending = 'data.bin' if args.format == 'compact' else 'data.bin.gz'
    shards = [Shard(file, labels_of(file, path) if path else None,
                    re.sub(r'data\.bin(\.gz)?$', ending, file.stream.name), np.zeros(MAX_CODES, bool))
              for file, path in zip(files, paths)]
    names = [shard.stream for shard in shards]
    if len(set(names)) < len(names):
        raise InputError(f'{args.token_file}: two files have one name; convert them one by one, to two folders')
    return shards


# ---------------------------------------------------------------- writing

def write_shards(shards: Sequence[Shard], folder: Path, format_name: str) -> list[Path]:
    """Write the files of all sets into a folder; returns their paths, manifests last. Raises InputError."""
    for shard in shards:
        shard.file.check_content()
    model_file = folder / model_name(shards[0].stream)
    if format_name == 'compact':
        model = fit(same_grids(shards), sum(len(shard.file) for shard in shards))
        identity = write_model(model, model_file)
    else:
        largest = max(int(codes.max()) for codes in same_grids(shards))
        codec = codec_for(max(largest + 1, *(stated_codes(shard.file) for shard in shards)))
    written, manifests = [], []
    for shard in shards:
        stream = folder / shard.stream
        if format_name == 'compact':
            write_compact(stream, shard.codes(), len(shard.file), model, identity)
            second, more = model_file, {'format': compact.NAME, 'model': model_file.name}
        else:
            write_stream(stream, shard.codes(), codec)
            second, more = index_path(stream), {'format': codec.name}
        files = [stream, second]
        if shard.labels is not None:
            files.append(folder / label_name(shard.stream))
            write_labels(files[-1], shard.labels)
        manifest = new_manifest(shard, more | {'files': files_of_manifest(files)})
        write_text(manifest_path(stream), manifest_text(manifest))
        compare(shard, stream)
        written += [path for path in files if path not in written]
        manifests.append(manifest_path(stream))
        print0(f'{shard.file.stream}: {len(shard.file):,} images compared, all codes are the same')
    return written + manifests


def same_grids(shards: Sequence[Shard]) -> Iterator[np.ndarray]:
    """Yield the codes of all sets, run after run. Raises InputError where their grids differ."""
    n = None
    for shard in shards:
        for codes in shard.codes():
            n = n or codes.shape[1]
            if codes.shape[1] != n:
                raise InputError(f'{shard.file.stream}: {codes.shape[1]} codes an image, where '
                                 f'{shards[0].file.stream} has {n}: they are no shards of one set')
            yield codes


def stated_codes(file: TokenFile) -> int:
    """Rows of the codebook that the manifest states, as far as token files hold them; else 0."""
    codes = file.manifest.get('codes')
    return codes if type(codes) is int and codes <= MAX_CODES else 0


def new_manifest(shard: Shard, more: dict[str, Any]) -> dict[str, Any]:
    """What the old manifest says, with what the new format changes; what a set without one does not say, is counted."""
    old = {key: value for key, value in shard.file.manifest.items() if key not in ('format', 'model', 'files')}
    counted = {'images': len(shard.file), 'grid': math.isqrt(shard.n), 'codes': int(shard.used.nonzero()[0][-1]) + 1,
               'codes_used': int(shard.used.sum())}
    if isinstance(old.get('run'), dict):  # which tokenize_images.py knows its sets by
        named = {'format': compact.NAME} if more['format'] == compact.NAME else {}
        old['run'] = {key: value for key, value in old['run'].items() if key != 'format'} | named
    return counted | old | more


def compare(shard: Shard, stream: Path) -> None:
    """Read a new set again, and compare it with the old one. Raises RuntimeError where they differ."""
    again = Shard(open_token_file(stream), None, '', np.zeros(MAX_CODES, bool))
    for _ in again.codes():
        pass
    if again.digest != shard.digest:
        raise RuntimeError(f'{stream}: does not hold the codes of {shard.file.stream}: please report this')


def check_free(shards: Sequence[Shard], folder: Path, format_name: str) -> None:
    """InputError where a file that will be written is there."""
    for shard in shards:
        stream = folder / shard.stream
        second = folder / model_name(shards[0].stream) if format_name == 'compact' else index_path(stream)
        for path in stream, second, manifest_path(stream), folder / label_name(shard.stream):
            if os.path.lexists(path):
                raise InputError(f'{path}: is there already; choose another --output-dir')


def main(args: argparse.Namespace) -> None:
    shards = open_shards(args)
    folder = Path(args.output_dir)
    check_free(shards, folder, args.format)
    work = folder / f'.{shards[0].stream}.converting'
    check_writable(work / 'lock', 'choose another --output-dir')
    try:
        lock = lock_file(work / 'lock')
    except BlockingIOError:
        raise InputError(f'{work}: another process is at work on this; wait for it') from None
    new = work / 'files'
    shutil.rmtree(new, ignore_errors=True)  # of a killed run
    try:
        written = write_shards(shards, new, args.format)
        for path in written:
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock:
            lock.close()
    before = bytes_on_disk(shard.file for shard in shards)
    after = bytes_on_disk(open_token_file(folder / shard.stream) for shard in shards)
    images = sum(len(shard.file) for shard in shards)
    labels = '' if all(shard.labels is not None for shard in shards) else '; no labels were found to go with them'
    print0(f'{images:,} images, {before:,} bytes before, {after:,} bytes now ({after / images:.1f} an image, '
           f'{after / before - 1:+.1%}): {folder}{labels}')


if __name__ == '__main__':
    run(main, parse_args)
