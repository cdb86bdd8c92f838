"""Check token sets, downloaded or made: streams, indices, labels, manifests with checksums, codebook, synonyms.

    python scripts/verify_tokens.py --token-file tokens/my-train-token.data.bin.gz \\
        --label-file tokens/my-train-label.txt --codebook-path tokens/codebook.ckpt \\
        --token-synonym-dict tokens/synonyms.json

Files may be globs or comma-separated lists, as in training, and sets of other projects (docs/token_format.md). Prints
one line when all is right; else every problem found, one a line, and exits with 1. Nothing is written.
"""
import argparse
import math
import reprlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import expand_files
from fileio.labels import check_class_names, read_labels
from flags import Parser, views
from token_files.codebook import load_codebook, load_synonyms
from token_files.foreign import is_foreign
from token_files.made_with import entry_of, is_codebook_of
from token_files.token_file import (MAX_CODES, TokenFile, check_checksums, decode, expand_token_files, holds_foreign,
                                    labels_of, manifest_path, open_token_file, read_manifest)
from token_files.views import check_classes, group_images
from utils import InputError, print0, run

MAX_SYNONYMS = 5  # of each code, which training reads


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--token-file', required=True, metavar='FILE', help='the token files: a path, a glob or a comma-separated list')
    add('--label-file', metavar='FILE', help='as many label files, in the same order (default: the labels inside, as '
        'sets of other projects have them)')
    add('--views', type=views, metavar='V[:B]', help='the set holds each image V times, as in main_seit.py')
    add('--codebook-path', metavar='FILE', help='the codebook, to check it and the codes')
    add('--token-synonym-dict', metavar='FILE', help='the synonyms, to check them; needs --codebook-path')
    args = parser.parse_args(argv)
    if not args.label_file and not holds_foreign(args.token_file):
        raise InputError('--label-file: give one, the labels of these token files are in files of their own')
    if args.token_synonym_dict and not args.codebook_path:
        raise InputError('--token-synonym-dict: give --codebook-path too, synonyms are of its rows')
    return args


class Problems(list):
    """What is wrong, a line each."""

    def attempt(self, check: Callable, *args: Any) -> Any:
        """check(*args), or None when it raises an InputError, which is then noted."""
        try:
            return check(*args)
        except InputError as error:
            if str(error) not in self:  # several readers meet the same
                self.append(str(error))


class Codebook(NamedTuple):
    """A codebook and where it is."""
    path: str
    rows: torch.Tensor


class StreamSummary(NamedTuple):
    """What a token file holds."""
    images: int
    codes_an_image: int
    largest: int
    codes_used: int


def read_stream(file: TokenFile) -> StreamSummary:
    """Decode all images of a token file. Raises InputError."""
    used = np.zeros(MAX_CODES, bool)
    for _, codes in decode(file):
        used[codes] = True
    return StreamSummary(len(file), codes.shape[1], int(used.nonzero()[0][-1]), int(used.sum()))


def check_files(paths: Sequence[Path], manifest: dict[str, Any], path: Path, problems: Problems) -> None:
    """Compare files of a set with the sizes and checksums in its manifest, at `path`, where it has them."""
    if 'files' not in manifest:
        return
    for file in paths:
        if file.exists():
            problems.attempt(check_checksums, file, manifest, path)


def check_manifest(file: TokenFile, summary: StreamSummary, labels: np.ndarray | None, codebook: Codebook | None,
                   problems: Problems) -> None:
    """Compare what the manifest says with what the files hold."""
    path = file.manifest_path
    recorded = file.manifest.get('codes_used', summary.codes_used)
    if recorded != summary.codes_used:
        problems.append(f'{path}: says codes_used {reprlib.repr(recorded)}, but {summary.codes_used} are')
    if codebook and 'codebook' in file.manifest:
        entry = entry_of(file.manifest, 'codebook')
        if not entry or not is_codebook_of(entry, codebook.rows, codebook.path):
            problems.append(f'{codebook.path}: is not the codebook that {path} names by its SHA-256')
    if file.classes and labels is not None and labels.max() >= len(file.classes):
        problems.append(f'{file.stream}: its labels hold class {labels.max()}, but {path} names {len(file.classes)} '
                        'classes')


def check_set(token_file: Path, label_file: Path | None, codebook: Codebook | None, views: tuple[int, int] | None,
              problems: Problems) -> tuple[TokenFile | None, StreamSummary | None]:
    """Check one set, and note its problems.

    Returns:
        The token file and what it holds, each None where it is unreadable.
    """
    labels = problems.attempt(read_labels, label_file) if label_file else None
    file = problems.attempt(open_token_file, token_file)
    if file is None and is_foreign(token_file):
        return None, None
    if file is None:
        manifest = problems.attempt(read_manifest, token_file)
        if manifest:  # its checksums tell which files are damaged
            named = (token_file.with_name(name) for name in manifest.get('files', {}))
            paths = {token_file, *filter(None, [label_file]), *named}
            check_files(sorted(paths), manifest, manifest_path(token_file), problems)
        return None, None
    if file.manifest:
        check_files([*file.files, *filter(None, [label_file])], file.manifest, file.manifest_path, problems)
    if not label_file:
        labels = problems.attempt(labels_of, file, None)
    images = problems.attempt(group_images, [file], views)
    summary = problems.attempt(read_stream, file)
    if labels is not None and len(labels) != len(file):
        problems.append(f'{label_file}: {len(labels)} labels for the {len(file)} images of {token_file}')
    elif images and labels is not None:
        problems.attempt(check_classes, images, labels, file.name)
    if summary is None:
        return file, None
    if codebook and summary.largest >= len(codebook.rows):
        problems.append(f'{token_file}: holds code {summary.largest}, but {codebook.path} has {len(codebook.rows)} '
                        'rows')
    if file.manifest:
        check_manifest(file, summary, labels, codebook, problems)
    return file, summary


def check_shards(files: list[TokenFile], summary: list[StreamSummary], token_file: str, problems: Problems) -> None:
    """Check that sets are shards of one: grids of one size, and class names in one order."""
    sizes = sorted({one.codes_an_image for one in summary})
    if len(sizes) > 1:
        problems.append(f'{token_file}: shards of {" and ".join(map(str, sizes))} codes an image: they are no shards '
                        'of one set')
    named = [file for file in files if file.classes]
    for file in named[1:]:
        problems.attempt(check_class_names, named[0].classes, file.classes, named[0].stream, file.stream)


def read_codebook(path: str, synonyms: str | None, problems: Problems) -> Codebook | None:
    """Check a codebook, and the synonyms that belong to it; None where it is unreadable."""
    rows = problems.attempt(load_codebook, path)
    if rows is None:
        return None
    if synonyms:
        problems.attempt(load_synonyms, synonyms, len(rows), MAX_SYNONYMS)
    return Codebook(path, rows)


def main(args: argparse.Namespace) -> int:
    token_files = expand_token_files(args.token_file)
    label_files = expand_files(args.label_file) if args.label_file else [None] * len(token_files)
    if len(token_files) != len(label_files):
        raise InputError(f'{len(token_files)} token files, but {len(label_files)} label files: give one for each')
    problems = Problems()
    codebook = read_codebook(args.codebook_path, args.token_synonym_dict, problems) if args.codebook_path else None
    sets = [check_set(*pair, codebook, args.views, problems) for pair in zip(token_files, label_files)]
    # what can be read is still checked together, so that one run names all problems
    files = [file for file, _ in sets if file]
    summary = [one for _, one in sets if one]
    check_shards(files, summary, args.token_file, problems)
    if problems:
        print0('\n'.join(problems))
        print0(f'{len(problems)} problem{"" if len(problems) == 1 else "s"} found')
        return 1
    grid = math.isqrt(summary[0].codes_an_image)
    print0(f'right: {sum(one.images for one in summary):,} images of {grid}x{grid} codes in {len(files)} '
           f'file{"" if len(files) == 1 else "s"} ({", ".join(sorted({file.format for file in files}))})')
    return 0


if __name__ == '__main__':
    run(main, parse_args)
