"""A set of images that is being written: names, class folders or tar shards, and how a killed run is resumed.

    DIR/images/CLASS/NAME.jpg           class folders, or
    DIR/images-000000.tar               shards with members CLASS/NAME.jpg and CLASS/NAME.cls
    DIR/manifest.json                   what the set is, written last
    DIR/.lock                           locked by the process that writes here
    DIR/.unfinished                     all of a set that is not finished

Images are cut into parts. Once its files are written, a part gets a record, and is not made again. When all are there,
they are moved to their place: who sees DIR/images sees the whole set.
"""
import contextlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fileio.files import atomic_path, check_writable, lock_file, read_json, remove_leftovers, write_text
from image_data.decoding import is_hidden
from image_data.shrinking import Shrunk
from image_data.sources import Source
from utils import InputError

PART = {'folder': 512, 'tar': 10_000}  # images lost if killed, at most, by format; those of a tar are a shard
WORK = '.unfinished'
CHOOSE = 'choose another --output-dir'


# ---------------------------------------------------------------- names

def class_folders(source: Source, file_format: str) -> dict[int, str]:
    """The name of the folder of each class that has images, by label.

    Raises:
        InputError: where class folders would give other labels, as a class among them has no images.
    """
    labels = np.unique(source.labels).tolist()
    if file_format == 'folder' and labels[-1] != len(labels) - 1:
        gap = next(label for place, label in enumerate(labels) if place != label) - 1
        raise InputError(f'{source.data_path}: class {gap} has no images, so that class folders would give those after '
                         'it other numbers; add --format tar, which keeps labels')
    names = source.classes
    plain = names and names == sorted(set(names)) and not any(
        '/' in name or '\0' in name or is_hidden(name) or name in ('', '.', '..') for name in names)
    digits = max(4, len(str(labels[-1])))
    return {label: names[label] if plain else f'{label:0{digits}d}' for label in labels}


def image_names(source: Source, images: np.ndarray, file_format: str) -> list[str]:
    """CLASS/STEM of each image, none twice: the stem of the source's name.

    Where two of a class share one, the later gets its number in the source too. A tar's keys end at the first dot, so
    that dots become underscores there.
    """
    folders = class_folders(source, file_format)
    names = []
    taken = set()
    for i in images.tolist():
        stem = PurePosixPath(source.names[i]).stem.lstrip('.') or 'image'
        if file_format == 'tar':
            stem = stem.replace('.', '_')
        name = f'{folders[int(source.labels[i])]}/{stem}'
        while name in taken:
            name += f'-{i}'
        taken.add(name)
        names.append(name)
    return names


# ---------------------------------------------------------------- the set on disk

class Record(NamedTuple):
    """What is noted of an image that is written: name in the set, bytes, bytes without headers, PSNR in dB."""
    name: str
    size: int
    bare: int | None
    psnr: float


class SetFolder:
    """The folder of a set. Until all is done, everything lies in DIR/.unfinished, where finished parts are noted.

    Args:
        path: of the set.
        file_format: 'folder' or 'tar'.
        run_id: all that the set depends on.
    """

    def __init__(self, path: str, file_format: str, run_id: dict[str, Any]):
        self.path = Path(path)
        self.work = self.path / WORK
        self.file_format = file_format
        self.run_id = run_id
        self.lock = None

    def is_complete(self) -> bool:
        """Whether the set is there. Raises InputError for another set, and for one that lacks files."""
        manifest = self.path / 'manifest.json'
        if not os.path.exists(manifest):
            return False
        stated = read_json(manifest)
        self._check_same(stated, manifest, f'{CHOOSE}, or give the same flags and images again', 'versions')
        missing = [name for name in stated.get('files', []) if not os.path.exists(self.path / name)]
        if missing:
            raise InputError(f'{manifest}: the set is finished, but {missing[0]} is not there: fetch it again, or '
                             f'remove the rest of {self.path} to make it again')
        return True

    def begun(self) -> Any:
        """What `begin` noted when this run began; None where it did not yet. Raises InputError for another run."""
        path = self.work / 'run.json'
        check_writable(self.path / 'manifest.json', CHOOSE)
        if not os.path.exists(path):
            existing = [*self.path.glob('images-*.tar'), *self.path.glob('images')]
            if existing:
                raise InputError(f'{existing[0]}: is there already; {CHOOSE}, or remove it')
            return None
        stated = read_json(path)
        self._check_same(stated, path, f'give the same flags and images again to finish it, or remove {self.work}')
        return stated.get('noted')

    def begin(self, noted: Any) -> None:
        """Lock the folder for this process, and write down which run it is. Raises InputError.

        Args:
            noted: a JSON value for `begun`.
        """
        try:
            self.lock = lock_file(self.path / '.lock')
        except BlockingIOError:
            raise InputError(f'{self.path}: another process is writing this set; wait for it, or {CHOOSE}') from None
        except OSError as error:
            raise InputError(f'{self.path}: cannot be locked ({error.strerror}); {CHOOSE}') from None
        if self.begun() is None:
            write_text(self.work / 'run.json', json.dumps({'run': self.run_id, 'noted': noted}, indent=1) + '\n')
        remove_leftovers(self.work, '.*.tmp')

    def _check_same(self, stated: Any, path: Path, advice: str, *ignored: str) -> None:
        before = stated.get('run') if isinstance(stated, dict) else None
        before = before if isinstance(before, dict) else {}
        differs = [key for key in self.run_id if key not in ignored and before.get(key) != self.run_id[key]]
        if differs:
            raise InputError(f'{path}: is of another set, which differs in {", ".join(differs)}: {advice}')

    def _record_path(self, part: int) -> Path:
        return self.work / f'part-{part:06d}.json'

    def shard(self, part: int) -> str:
        """The file name of the tar shard of a part."""
        return f'images-{part:06d}.tar'

    def outputs(self, parts: int) -> list[str]:
        """What a set of so many parts has beside its manifest, as names in the folder."""
        return ['images'] if self.file_format == 'folder' else [self.shard(part) for part in range(parts)]

    def read_records(self, part: int) -> list[Record]:
        """The images of a part that is written. Raises InputError."""
        return [Record(*values) for values in read_json(self._record_path(part))]

    def is_written(self, part: int) -> bool:
        """Whether a part has its record, and its files are there. Raises InputError."""
        if not os.path.exists(self._record_path(part)):
            return False
        if self.file_format == 'tar':
            return os.path.exists(self.work / self.shard(part))
        # a machine that went down may have lost what was not on disk yet
        return all(_size(self.work / 'images' / record.name) == record.size for record in self.read_records(part))

    def write_part(self, part: int, names: list[str], labels: np.ndarray, images: Iterator[Shrunk]) -> None:
        """Write the files of a part, then its record. Raises InputError.

        Args:
            part: its number.
            names: of its images, without endings.
            labels: of its images.
            images: the next ones are those of the part.
        """
        records = []
        with self._writer(part) as write:
            for name, label in zip(names, labels.tolist()):
                image = next(images)
                write(name, image.ending, label, image.data)
                records.append(Record(name + image.ending, image.size, image.bare, image.psnr))
        write_text(self._record_path(part), json.dumps(records) + '\n')

    @contextlib.contextmanager
    def _writer(self, part: int) -> Iterator[Callable[[str, str, int, bytes], None]]:
        """Yields a function of name, ending, label and data that writes an image."""
        def write_file(name: str, ending: str, label: int, data: bytes) -> None:
            path = self.work / 'images' / (name + ending)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            except OSError as error:
                raise InputError(f'{path}: cannot be written ({error.strerror}); make room, or choose another '
                                 '--output-dir') from None

        def add_sample(name: str, ending: str, label: int, data: bytes) -> None:
            for member, content in ((name + ending, data), (f'{name}.cls', b'%d' % label)):
                info = tarfile.TarInfo(member)  # owner, time and mode are tarfile's constants
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

        if self.file_format == 'folder':
            yield write_file
            return
        with atomic_path(self.work / self.shard(part)) as temporary, \
                tarfile.open(temporary, 'w', format=tarfile.GNU_FORMAT) as tar:
            yield add_sample

    def has_manifest(self) -> bool:
        """Whether all is written, and only has to be moved to its place."""
        return os.path.exists(self.work / 'manifest.json')

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write the manifest of a set all of whose parts are written; with 'run' and 'files'. Raises InputError."""
        write_text(self.work / 'manifest.json', json.dumps(manifest, indent=1) + '\n')

    def finish(self) -> None:
        """Move a set that has its manifest to its place. Raises InputError."""
        manifest = self.work / 'manifest.json'
        names = read_json(manifest)['files']
        try:
            os.sync()  # once: an image alone would wait for the disk longer than it takes to make it
            for name in names:
                if os.path.exists(self.work / name):  # else a run killed here has moved it
                    os.replace(self.work / name, self.path / name)
            os.replace(manifest, self.path / 'manifest.json')
        except OSError as error:
            raise InputError(f'{error.filename}: cannot be moved to {self.path} ({error.strerror})') from None
        self.remove_leftovers()
        if self.lock:
            self.lock.close()

    def remove_leftovers(self) -> None:
        """Remove what a run that is complete has left."""
        shutil.rmtree(self.work, ignore_errors=True)


def _size(path: Path) -> int | None:
    """Bytes of a file; None where it is not there."""
    return path.stat().st_size if os.path.exists(path) else None
