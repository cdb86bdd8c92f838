"""A tokenizing run on disk: its finished parts, which make it resumable, and the token sets made of them.

Images are cut into parts of a fixed number of fixed batches. Each finished part is one file in DIR/.NAME.parts, written
whole or not at all. When all are there, the token sets are written and the folder of parts is removed.

`remaining_parts` begins: it refuses to overwrite another run, and says which parts are missing. `PartsFolder` writes
and reads them, `FinishedCodes` shows all as one array, and `write_sets` makes the final files, whose names are
`OutputFiles`'. Batches are fixed, since a code may depend on the batch that its image was in (by rounding).
"""
import glob
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fileio.files import (atomic_path, check_writable, hold_folder, is_same_run, read_json, remove_leftovers, sha256,
                          write_text)
from fileio.stamps import Stamp, changed_since, check_stamp
from token_files.token_file import paths_beside, stream_ending, write_model, write_set
from utils import InputError, print0

# Batches lost if killed. Few enough that all ranks have parts, many enough that writing hides behind encoding.
PART_BATCHES = 16
RUN = 'run.json'  # in the folder of parts: everything that the codes depend on


# ---------------------------------------------------------------- names

@dataclass(frozen=True)
class OutputFiles:
    """Where a run writes.

    Attributes:
        folder: of the token sets.
        name: first part of their file names.
        shard_size: images in a numbered shard; 0 for one set without a number.
        format: as --format names it.
        name_flag, folder_flag: by which the user chooses name and folder, for errors; '' where the program does.
    """
    folder: Path
    name: str
    shard_size: int = 0
    format: str = 'published'
    name_flag: str = '--name'
    folder_flag: str = '--output-dir'

    @property
    def elsewhere(self) -> str:
        """What the user can do about files of this name that are in the way."""
        return f'choose another {" or ".join(filter(None, (self.name_flag, self.folder_flag)))}'

    @property
    def parts_folder(self) -> Path:
        """Folder of the finished parts; hidden, so that no folder of images takes it for a class."""
        return self.folder / f'.{self.name}.parts'

    @property
    def codebook(self) -> Path:
        """Path of the codebook, where the run writes one."""
        return self.folder / 'codebook.ckpt'

    def token_file(self, shard: int) -> Path:
        """Path of the stream of a shard."""
        return self.folder / f'{self.name}-token{self._number(shard)}.{stream_ending(self.format)}'

    def label_file(self, shard: int) -> Path:
        """Path of the labels of a shard."""
        return self.folder / f'{self.name}-label{self._number(shard)}.txt'

    def _number(self, shard: int) -> str:
        return f'-{shard:05d}' if self.shard_size else ''

    def existing(self) -> list[Path]:
        """The files that token sets of this name have in the folder, sorted. Raises InputError."""
        names = re.compile(re.escape(self.name) + r'-(token(-\d+)?\.(data\.bin(\.gz)?|index\.npy\.gz|model\.bin|json)'
                                                  r'|label(-\d+)?\.txt)')
        if not os.path.isdir(self.folder):
            return []
        try:
            return sorted(path for path in self.folder.iterdir() if names.fullmatch(path.name))
        except OSError as error:
            raise InputError(f'{self.folder}: {error.strerror}') from None

    def manifests(self) -> list[Path]:
        """The manifests among the files of `existing`."""
        return [path for path in self.existing() if path.suffix == '.json']

    def is_complete(self, run_id: dict[str, Any], images: int, codebook_of_tokenizer: bool) -> bool:
        """Whether all files of the run `run_id`, of so many images, are there; for the flag see `remaining_parts`.

        Raises:
            InputError: for a manifest that cannot be read, and for a finished run that lacks files.
        """
        manifests = [read_json(path) for path in self.manifests()]
        if not any(isinstance(manifest, dict) and manifest.get('run') == run_id for manifest in manifests):
            return False
        is_whole = all(self._is_whole(manifest, run_id) for manifest in manifests)
        if is_whole:
            image_count = sum(manifest['images'] for manifest in manifests) + manifests[0].get('skipped_in_run', 0)
            is_whole = image_count == images
        if not is_whole or ((codebook_of_tokenizer or run_id['limit_codes']) and not self.codebook.exists()):
            raise InputError(f'{self.folder}: a finished run of {self.name} is there, but files of it are missing or '
                             f'changed: fetch them again, or remove {self.name}-token* and {self.name}-label* there')
        return True

    def _is_whole(self, manifest: Any, run_id: dict[str, Any]) -> bool:
        if not isinstance(manifest, dict) or manifest.get('run') != run_id:
            return False
        files = manifest.get('files')
        if not isinstance(files, dict) or type(manifest.get('images')) is not int:
            return False
        return all(isinstance(entry, dict) and (self.folder / name).exists()
                   and (self.folder / name).stat().st_size == entry.get('bytes') for name, entry in files.items())

    def check_free(self, run_id: dict[str, Any], codebook_of_tokenizer: bool) -> None:
        """InputError when a run that begins would overwrite files of another. Arguments: see `remaining_parts`."""
        existing = self.existing()
        if existing:
            raise InputError(f'{existing[0]}: belongs to another run: {self.elsewhere}, or remove '
                             f'{self.name}-token* and {self.name}-label* there')
        if not os.path.exists(self.codebook):
            return
        if run_id['limit_codes']:
            raise InputError(f'{self.codebook}: a codebook is there, which this run would overwrite: choose another '
                             f'{self.folder_flag}, or drop --limit-codes to quantize against it')
        if codebook_of_tokenizer and sha256(self.codebook) != run_id['codebook']['sha256']:
            raise InputError(f'{self.codebook}: a codebook is there, which this run would overwrite: choose another '
                             f'{self.folder_flag}')

    def check_writable(self, images: int, codebook: bool) -> None:
        """InputError unless the final files can be written, called before the work that ends in them.

        Args:
            images: of the run; names of the last shard are the longest.
            codebook: whether the run writes one.
        """
        last = max(0, math.ceil(images / self.shard_size) - 1) if self.shard_size else 0
        tokens = self.token_file(last)
        for path in (tokens, *paths_beside(tokens, self.format), self.label_file(last)):
            check_writable(path, f'{self.elsewhere}, of a shorter path')
        if codebook:
            check_writable(self.codebook, f'choose another {self.folder_flag}')

    def remove_leftovers(self) -> None:
        """Remove what killed runs left; temporary files that a living process writes stay."""
        shutil.rmtree(_retired(self.parts_folder), ignore_errors=True)
        name = glob.escape(self.name)
        # each pattern ends where the name does: 'my' must not take files of 'my-train'
        for pattern in (f'{name}-token.*', f'{name}-token-*', f'{name}-label.txt', f'{name}-label-*',
                        self.codebook.name):
            remove_leftovers(self.folder, f'.{pattern}.*.tmp')
        remove_leftovers(self.parts_folder, '.*.tmp')


def _retired(folder: Path) -> Path:
    """The name that a folder of parts gets when its run is complete."""
    return folder.with_name(folder.name + '-done')


# ---------------------------------------------------------------- parts

class PartsFolder:
    """The cut of a run's images into parts and batches, and the folder of the finished parts.

    Args:
        folder: of the parts.
        images: of the run.
        batch_size: in images. A batch lies within one part.
    """

    def __init__(self, folder: Path, images: int, batch_size: int):
        self.folder = folder
        self.images = images
        self.batch_size = batch_size
        self.size = PART_BATCHES * batch_size
        self.lock = None

    def __len__(self) -> int:
        return math.ceil(self.images / self.size)

    def path(self, part: int) -> Path:
        """Path of a part."""
        return self.folder / f'{part:06d}.npz'

    def batches(self, part: int) -> list[range]:
        """The batches of a part, as ranges of images."""
        end = min((part + 1) * self.size, self.images)
        return [range(start, min(start + self.batch_size, end))
                for start in range(part * self.size, end, self.batch_size)]

    def finished(self) -> list[Path]:
        """The paths of the parts that are made."""
        return [path for part in range(len(self)) if (path := self.path(part)).exists()]

    def unfinished(self) -> list[int]:
        """The parts still to be made."""
        return [part for part in range(len(self)) if not self.path(part).exists()]

    def is_begun(self, run_id: dict[str, Any]) -> bool:
        """Whether the folder holds parts of the run `run_id`. Raises InputError when it holds another run's."""
        return is_same_run(self.folder / RUN, run_id, 'give the same inputs and options to finish that run, or delete '
                           'the folder to start from scratch')

    def begin(self, run_id: dict[str, Any], advice: str) -> None:
        """Hold the folder for this process, and note what the run is. Raises InputError, with the advice."""
        self.lock = hold_folder(self.folder, advice, name='lock')
        write_text(self.folder / RUN, json.dumps(run_id, indent=1) + '\n')

    def write(self, part: int, **arrays: np.ndarray) -> None:
        """Write a finished part. Raises InputError."""
        with atomic_path(self.path(part)) as temporary, open(temporary, 'wb') as file:
            np.savez(file, **arrays)

    def read(self, part: int, name: str) -> np.ndarray:
        """One array of a finished part. Raises InputError."""
        path = self.path(part)
        try:
            with np.load(path) as arrays:
                return arrays[name]
        except FileNotFoundError:
            raise InputError(f'{path}: another rank made it, but it is not here: all nodes must share the '
                             'folder') from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise InputError(f'{path}: damaged; delete it and start the same command again') from None

    def remove(self) -> None:
        """Remove the folder of a complete run."""
        # A folder that is half removed would look like a run to resume. One rename takes it away whole; a kill during
        # the removal leaves a folder that the next run clears.
        self.folder.rename(_retired(self.folder))
        self.lock.close()
        shutil.rmtree(_retired(self.folder), ignore_errors=True)


def remaining_parts(output: OutputFiles, parts: PartsFolder, run_id: dict[str, Any], codebook_of_tokenizer: bool,
                    stamp: Stamp) -> list[int] | None:
    """What is left to do of a run, whose folder of parts is made, and locked for this process.

    Args:
        output: where the run writes.
        parts: of the run.
        run_id: all that the codes depend on; with 'codebook' and 'limit_codes'.
        codebook_of_tokenizer: whether the codebook comes from the tokenizer's file, so that the run writes it.
        stamp: of the files that hold the images.

    Returns:
        The parts still to be made, or None when the run's files are all there, which is printed.

    Raises:
        InputError: the output folder holds files of another run, or of images that were replaced since, or cannot be
            written.
    """
    # The order matters. A run that has parts is resumed even if some of its final files are there: it was killed while
    # they were written. Only a run without parts may be complete, or meet files of another.
    output.remove_leftovers()
    begun = parts.is_begun(run_id)
    if not begun and output.is_complete(run_id, parts.images, codebook_of_tokenizer):
        manifests = output.manifests()
        compared = check_stamp(stamp, read_json(manifests[0]).get('source_sizes'), manifests,
                               f'{output.folder}: {output.name}', f'remove {output.name}-token* and {output.name}-'
                               'label* there, and give the same command again')
        print0(f'{output.folder}: {output.name} is complete already, nothing to do ({compared})')
        return None
    if not begun:
        output.check_free(run_id, codebook_of_tokenizer)
    elif changed_since(stamp, parts.finished()):
        # an image that stopped the run was mended, say; those of finished parts are not read again
        print0(f'note: {parts.folder}: images are newer than parts that are done, which stay as they are: if images '
               'of theirs were replaced, delete the folder to start from scratch')
    output.check_writable(parts.images, codebook=run_id['limit_codes'] or codebook_of_tokenizer)
    parts.begin(run_id, output.elsewhere)
    return parts.unfinished()


class FinishedCodes:
    """All finished parts as one array of codes, which is never in memory whole. Images that were skipped are left out.

    Args:
        parts: all of them finished.

    Attributes:
        good: (all images,) bool, those that were read.
        sizes: (good images,) int64, bytes of the encoded images.
        used: (codes,) int64, the codes in use, rising.
    """

    def __init__(self, parts: PartsFolder):
        self.parts = parts
        good = self._all('good')
        self.good = np.concatenate(good)
        self.sizes = np.concatenate(self._all('sizes'))
        self.used = np.unique(np.concatenate(self._all('used')))
        self.starts = np.cumsum([0] + [int(mask.sum()) for mask in good])  # of each part, among good images
        self.latest = None  # (part, its codes): several small shards come from one part, which is read once

    def _all(self, name: str) -> list[np.ndarray]:
        return [self.parts.read(part, name) for part in range(len(self.parts))]

    def agreement(self) -> float | None:
        """The fraction of the first batch's codes that fp32 gives too; None where no image of it could be read."""
        agreement = float(self.parts.read(0, 'agreement'))
        return None if math.isnan(agreement) else agreement

    def grid_size(self) -> int:
        """Side of the token grid."""
        first = next(self.runs(0, 1))
        return math.isqrt(first.shape[1])

    def runs(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Yield the codes of good images first to last - 1, (m, n) integers at a time."""
        part = int(np.searchsorted(self.starts, first, side='right')) - 1
        while part < len(self.parts) and self.starts[part] < last:
            start = max(first - self.starts[part], 0)
            if self.starts[part + 1] > self.starts[part]:  # else all its images were skipped
                yield self._codes(part)[start:last - self.starts[part]]
            part += 1

    def _codes(self, part: int) -> np.ndarray:
        if self.latest is None or self.latest[0] != part:
            self.latest = part, self.parts.read(part, 'codes')
        return self.latest[1]


# ---------------------------------------------------------------- token sets

def write_sets(output: OutputFiles, finished: FinishedCodes, labels: np.ndarray, new_codes: np.ndarray | None,
               manifest: dict[str, Any]) -> int:
    """Write the token sets of a run, each with its manifest. Raises InputError.

    Args:
        output: their names.
        finished: the codes.
        labels: (good images,) integers.
        new_codes: (codes,) what the finished parts' codes become; None for no change.
        manifest: what all manifests say, 'format' too.

    Returns:
        Bytes of streams and what belongs to them, once each.
    """
    def runs(first: int, last: int) -> Iterator[np.ndarray]:
        return (codes if new_codes is None else new_codes[codes] for codes in finished.runs(first, last))

    manifest = manifest | write_model(output.token_file(0), manifest['format'], runs(0, len(labels)), len(labels))
    size = output.shard_size or len(labels)
    stored = {}
    for shard, first in enumerate(range(0, len(labels), size)):
        of_shard = labels[first:first + size]
        source_bytes = int(finished.sizes[first:first + size].sum())
        files = write_set(output.token_file(shard), runs(first, first + size), len(of_shard), output.label_file(shard),
                          of_shard, manifest | {'source_bytes': source_bytes})
        stored |= {path: path.stat().st_size for path in files}
    return sum(stored.values())
