"""A set of smaller images as class folders, and how a killed run of it is resumed.

    DIR/images/CLASS/NAME.jpg           the set
    DIR/manifest.json                   what the set is, written last
    DIR/.lock                           locked by the process that writes here
    DIR/.unfinished                     all of a set that is not finished

Images are cut into parts. Once its files are written, a part gets a record, and is not made again. When all parts are
there, the images are moved to DIR/images in one step: who sees that folder sees the whole set.
"""
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import features
from tqdm import tqdm

from fileio.files import (check_writable, expand_files, hold_folder, is_same_run, read_json, remove_leftovers,
                          write_text)
from fileio.stamps import Stamp, changed_since, check_stamp
from image_data.decoding import is_hidden
from image_data.shrinking import METHODS, Shrunk, ShrunkImages, sample_classes, shrink_images
from image_data.sources import Source, TarImages
from utils import InputError, print0

PART = 512  # images of a part: that many are made again after a kill, at most
WORK = '.unfinished'
IMAGES = 'images'
MANIFEST = 'manifest.json'
ADVICE = 'choose another --output-dir'


# ---------------------------------------------------------------- names

def class_folders(source: Source) -> dict[int, str]:
    """The name of the folder of each class that has images, by label.

    Classes without names, or with names that are not in alphabetical order, become 0000, 0001 and so on: labels stay.

    Raises:
        InputError: where class folders would give other labels, as a class among them has no images.
    """
    # Readers number folders in alphabetical order, so a class without a folder would shift all labels after it.
    labels = np.unique(source.labels).tolist()
    if labels[-1] != len(labels) - 1:
        gap = next(label for number, label in enumerate(labels) if number != label) - 1
        raise InputError(f'{source.data_path}: class {gap} has no images, so that class folders would give those after '
                         'it other numbers; number the classes without gaps')
    names = source.classes
    plain = names and names == sorted(set(names)) and not any(
        '/' in name or '\0' in name or is_hidden(name) or name in ('', '.', '..') for name in names)
    digits = max(4, len(str(labels[-1])))
    return {label: names[label] if plain else f'{label:0{digits}d}' for label in labels}


def image_names(source: Source, images: np.ndarray) -> list[str]:
    """CLASS/STEM of each image, none twice: the stem of the source's name, and where that is taken the number too."""
    folders = class_folders(source)
    names = []
    taken = set()
    for i in images.tolist():
        name = f'{folders[int(source.labels[i])]}/{PurePosixPath(source.names[i]).stem.lstrip(".") or "image"}'
        while name in taken:
            name += f'-{i}'
        taken.add(name)
        names.append(name)
    return names


def check_outside(output_dir: str, source: Source) -> None:
    """InputError when the output would be taken for a part of the source by the next run."""
    output = os.path.realpath(output_dir)
    if os.path.isdir(source.data_path):
        real_source = os.path.realpath(source.data_path)
        inside = output == real_source or output.startswith(os.path.join(real_source, ''))
    else:
        inside = isinstance(source, TarImages) and output in {
            os.path.realpath(path.parent) for path in expand_files(source.data_path)}
    if inside:
        raise InputError(f'--output-dir {output_dir}: lies in {source.data_path}, and would be taken for a part of it; '
                         'choose a folder outside')


# ---------------------------------------------------------------- the set on disk

def identify_run(source: Source, method: str, parameter: float | None, budget: dict[str, float],
                 seed: int, sides: list[int] | None = None) -> dict[str, Any]:
    """All that a set depends on, by names that an error can give.

    Args:
        source: of the images.
        method: of shrinking.METHODS.
        parameter: of the method; None where a budget decides.
        budget: {'total_bytes': ...} or {'bytes_per_image': ...}; {} without one.
        seed: of what is drawn.
        sides: that are searched, or the one that is taken; None to keep the images' sizes.
    """
    versions = {'PIL': PIL.__version__, **{name: features.version(name) for name in ('jpg', 'libjpeg_turbo', 'webp')}}
    # An earlier version also made tar shards, and sampled by scores. Their names stay, so that its sets are recognized.
    run_id = {'method': method, 'parameter': parameter, 'budget': budget or None, 'format': 'folder', 'scores': None,
              'seed': seed, 'images': source.digest(), 'versions': versions}
    if method == 'avif':  # others keep what they had, so that their sets are recognized
        versions['avif'] = features.version('avif')
    return run_id | ({'exif_rotate': True} if source.exif_rotate else {}) | ({'side': sides} if sides else {})


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
        run_id: all that the set depends on, of `identify_run`.
        stamp: of the files that hold the images.
    """

    def __init__(self, path: str, run_id: dict[str, Any], stamp: Stamp):
        self.path = Path(path)
        self.work = self.path / WORK
        self.run_id = run_id
        self.stamp = stamp
        self.lock = None

    def is_complete(self) -> bool:
        """Whether the set is there, which is printed.

        Raises:
            InputError: for another set, for one of images that were replaced since, and for one that lacks its images.
        """
        manifest = self.path / MANIFEST
        advice = f'{ADVICE}, or give the same flags and images again'
        if not is_same_run(manifest, self.run_id, advice, ignored=('versions',), field='run'):
            return False
        if not os.path.exists(self.path / IMAGES):
            raise InputError(f'{manifest}: the set is finished, but {IMAGES} is not there: fetch it again, or remove '
                             f'the rest of {self.path} to make it again')
        compared = check_stamp(self.stamp, read_json(manifest).get('source_sizes'), [manifest], str(self.path),
                               f'remove {IMAGES} and {MANIFEST} there, and give the same command again')
        print0(f'{self.path}: finished already ({compared})')
        return True

    def begun(self) -> dict[str, Any] | None:
        """What `begin` noted when this run began; None where it did not yet. Raises InputError for another run."""
        check_writable(self.path / MANIFEST, ADVICE)
        path = self.work / 'run.json'
        advice = f'give the same flags and images again to finish it, or remove {self.work}'
        if is_same_run(path, self.run_id, advice, field='run'):
            return read_json(path).get('noted')
        if os.path.exists(self.path / IMAGES):
            raise InputError(f'{self.path / IMAGES}: is there already; {ADVICE}, or remove it')
        return None

    def begin(self, noted: dict[str, Any]) -> None:
        """Hold the folder for this process, and write down which run it is. Raises InputError.

        Args:
            noted: what `begun` returns from now on: the parameter, and on how many images it was searched.
        """
        self.lock = hold_folder(self.path, ADVICE)
        if self.begun() is None:
            write_text(self.work / 'run.json', json.dumps({'run': self.run_id, 'noted': noted}, indent=1) + '\n')
        remove_leftovers(self.work, '.*.tmp')

    def _record_path(self, part: int) -> Path:
        return self.work / f'part-{part:06d}.json'

    def read_records(self, part: int) -> list[Record]:
        """The images of a part that is written. Raises InputError."""
        return [Record(*values) for values in read_json(self._record_path(part))]

    def is_written(self, part: int) -> bool:
        """Whether a part has its record, and its files are there. Raises InputError."""
        if not os.path.exists(self._record_path(part)):
            return False
        # Images are not flushed one by one, so a machine that went down may have the record and not the images.
        return all(_size(self.work / IMAGES / record.name) == record.size for record in self.read_records(part))

    def write_part(self, part: int, names: list[str], images: Iterator[Shrunk]) -> None:
        """Write the files of a part, then its record. Raises InputError.

        Args:
            part: its number.
            names: of its images, without endings.
            images: the next ones are those of the part.
        """
        records = []
        for name in names:
            image = next(images)
            if image.fitted:
                print0(f'note: {name}{image.ending}: longer than its format holds, and made as small as it does')
            path = self.work / IMAGES / (name + image.ending)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(image.data)
            except OSError as error:
                raise InputError(f'{path}: cannot be written ({error.strerror}); make room, or {ADVICE}') from None
            records.append(Record(name + image.ending, image.size, image.bare, image.psnr))
        write_text(self._record_path(part), json.dumps(records) + '\n')

    def has_manifest(self) -> bool:
        """Whether all is written, and only has to be moved to where it belongs."""
        return os.path.exists(self.work / MANIFEST)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write the manifest of a set all of whose parts are written; its 'run' is the run_id. Raises InputError."""
        write_text(self.work / MANIFEST, json.dumps(manifest, indent=1) + '\n')

    def finish(self) -> None:
        """Move a set that has its manifest to where it belongs. Raises InputError."""
        try:
            os.sync()  # once: to wait for the disk after each image would take longer than to make it
            # The manifest goes last: where it is, the images are. A rename is one step, so nobody sees half a set.
            for name in IMAGES, MANIFEST:
                if os.path.exists(self.work / name):  # else a run killed here has moved it
                    os.replace(self.work / name, self.path / name)
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


# ---------------------------------------------------------------- making the set

def write_set(folder: SetFolder, source: Source, noted: dict[str, Any], workers: int, max_pixels: int | None) -> None:
    """Make what is left of a set, and its manifest. Raises InputError.

    Args:
        folder: of the set, held by this process.
        source: of the images.
        noted: the 'parameter', and on how many images a budget's was searched, 'searched_images', or None; with sides
            the 'side' too. The manifest has all of it.
        workers: processes that make images smaller.
        max_pixels: larger images cannot be read; None for PIL's limit.
    """
    method = folder.run_id['method']
    images = np.arange(len(source))
    if method == 'sample':
        images = sample_classes(source.labels, noted['parameter'], folder.run_id['seed'])
    names = image_names(source, images)
    starts = range(0, len(images), PART)
    missing = [(part, slice(start, start + PART)) for part, start in enumerate(starts) if not folder.is_written(part)]
    if len(missing) < len(starts):
        print0(f'{folder.path}: resumed with {len(starts) - len(missing):,} of {len(starts):,} parts')
        if changed_since(folder.stamp, folder.work.glob('part-*.json')):
            print0(f'note: {folder.path}: images are newer than parts that are done, which stay as they are: if images '
                   f'of theirs were replaced, remove {folder.work} to start from scratch')
    to_make = [images[part_images] for _, part_images in missing]
    to_make = np.concatenate(to_make) if to_make else images[:0]
    smaller = shrink_images(ShrunkImages(source, to_make, method, noted['parameter'], max_pixels,
                                         side=noted.get('side')), workers)
    with tqdm(total=len(images), initial=len(images) - len(to_make), unit=' images', unit_scale=True,
              mininterval=0.1 if sys.stderr.isatty() else 60) as bar:
        for part, part_images in missing:
            folder.write_part(part, names[part_images], smaller)
            bar.update(len(names[part_images]))
    records = [record for part in range(len(starts)) for record in folder.read_records(part)]
    folder.write_manifest(make_manifest(folder.run_id, records, source, noted, folder.stamp.sizes))


def make_manifest(run_id: dict[str, Any], records: list[Record], source: Source,
                  noted: dict[str, Any], source_sizes: str) -> dict[str, Any]:
    """The manifest of a set: what it was made of, and the bytes and PSNR of its images. Raises InputError."""
    bare = [record.bare for record in records]
    total = sum(record.size for record in records)
    return {'method': run_id['method'], **noted, 'budget': run_id['budget'], 'images': len(records),
            'bytes_per_image': total / len(records), 'total_bytes': total,
            'scan_bytes_per_image': None if None in bare else sum(bare) / len(bare),
            'psnr': math.fsum(record.psnr for record in records) / len(records),
            'encoder': METHODS[run_id['method']].encoder, 'format': run_id['format'],
            'source': source.data_path, 'source_images': len(source),
            'source_bytes_per_image': source.encoded_bytes() / len(source), 'classes': source.classes,
            'seed': run_id['seed'], 'scores': run_id['scores'], 'versions': run_id['versions'], 'run': run_id,
            'source_sizes': source_sizes, 'files': [IMAGES]}
