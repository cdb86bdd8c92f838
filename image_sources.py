"""Encoded images and their labels from a folder, a list file, tar shards or parquet files, in a fixed order.

What --data-path may be, in which order the images come, and where their labels come from:

    DIR                     class folders of images; both in alphabetical order. The label is the number of the folder.
    LIST.txt                lines 'path label', cut at the tab or else at the last space; paths are relative to the
                            folder of the list. In the order of the lines.
    SHARD.tar               tar shards in the layout of webdataset: members KEY.jpg (or jpeg, png, webp) and KEY.cls,
                            an integer as text, or KEY.json, an object with an integer 'label'. In the order of the
                            archive. A path, a glob, 'x-{000..146}.tar' or a comma-separated list.
    FILE.parquet            as image sets on Hugging Face: a column 'image' of struct{bytes, path} and an integer
                            column 'label'. A path, a glob, a comma-separated list, or a folder, which gives all in it.

Tar shards are read in place, by offset: nothing is extracted. Parquet needs pyarrow (requirements-formats.txt).
"""
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from image_tokenizer import open_image_folder
from utils import InputError, RankError, expand_files, parse_json

TAR_IMAGES = 'jpg', 'jpeg', 'png', 'webp'
LABEL_BYTES = 1 << 20  # more is no label


class BadImage(Exception):
    """An image that cannot be read; the message says why, on one line."""


# ---------------------------------------------------------------- decoding

def decode_image(data, size):
    """Encoded image -> (3, size, size) uint8, both sides resized bicubically.

    Colours are converted as torchvision's loader does, by PIL's convert('RGB'), and EXIF rotation is ignored: after
    division by 255 the pixels are those of `image_transform`. Raises BadImage.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image = image.convert('RGB').resize((size, size), Image.Resampling.BICUBIC)
    except Exception as error:  # PIL raises nearly anything for damaged data, and an error of its own for bombs
        raise BadImage(' '.join(str(error).split()) or type(error).__name__) from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class DecodedImages(torch.utils.data.Dataset):
    """A source's images decoded, for a DataLoader.

    Item i is (pixels (3, size, size) uint8, bytes of the encoded image, '') or (zeros, 0, what is wrong with it).
    """

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            data = self.source.read(i)
            return decode_image(data, self.size), len(data), ''
        except OSError as error:
            why = error.strerror or str(error)
        except (BadImage, InputError) as error:
            why = str(error)
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0, why


def good_images(args, source, batch, problems):
    """(B,) bool: which images of a batch were read; a line on standard error names each of the others.

    Args: args: data_path, skip_bad_images; batch: indices into `source`; problems: what DecodedImages said of each.
    Raises RankError for an image that was not read, unless such are skipped.
    """
    for i, why in zip(batch, problems):
        if why and not args.skip_bad_images:
            raise RankError(f'{args.data_path}: {source.names[i]} is no readable image ({why}): replace or remove it, '
                            'or add --skip-bad-images')
        if why:
            tqdm.write(f'skipped {source.names[i]}: {why}', file=sys.stderr)
    return np.array([not why for why in problems])


# ---------------------------------------------------------------- sources

class Source:
    """Images in a fixed order. A subclass sets the attributes and has read(i), the encoded bytes of image i, which
    raises OSError, BadImage or InputError where they cannot be had.

    Attributes: names: list of str, the same wherever the set lies; labels (N,) int64; classes: list of str or None;
    labels_from: str.
    """
    classes = None

    def __len__(self):
        return len(self.names)

    def digest(self):
        """SHA-256 of names and labels: changes when the list of images does."""
        lines = hashlib.sha256()
        for name, label in zip(self.names, self.labels.tolist()):
            lines.update(f'{label} {name}\n'.encode(errors='surrogateescape'))
        return lines.hexdigest()


def open_source(data_path):
    """The Source that `data_path` names, see the module's docstring. Raises InputError."""
    path = Path(data_path)
    if path.is_dir():
        parquet = sorted(path.glob('*.parquet'))
        return ParquetImages(parquet) if parquet else FolderImages(path)
    files = expand_files(data_path)
    kinds = {file.suffix.lower() for file in files}
    if kinds == {'.txt'} and len(files) == 1:
        return ListedImages(files[0])
    if kinds == {'.tar'}:
        return TarImages(files)
    if kinds == {'.parquet'}:
        return ParquetImages(files)
    if not files[0].exists():
        raise InputError(f'{files[0]}: no such file or folder')
    raise InputError(f'{data_path}: images come from a folder of class folders, a list file .txt, .tar shards '
                     '(uncompressed) or .parquet files, one kind at a time')


class FolderImages(Source):
    """Class folders of images, as torchvision's ImageFolder finds them."""
    labels_from = 'class folders in alphabetical order'

    def __init__(self, path):
        folder = open_image_folder(path, None)
        self.path, self.classes = path, folder.classes
        self.names = [name[len(os.path.join(path, '')):] for name, _ in folder.samples]
        self.labels = np.array(folder.targets, np.int64)

    def read(self, i):
        return (self.path / self.names[i]).read_bytes()


class ListedImages(Source):
    """A text file of paths and labels."""
    labels_from = 'the list file'

    def __init__(self, path):
        try:
            lines = path.read_text(encoding='utf-8').splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f'{path}: {getattr(error, "strerror", None) or error}') from None
        self.path, self.names, labels = path.parent, [], []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name, _, label = line.rstrip().rpartition('\t' if '\t' in line else ' ')
            if not name.strip() or not re.fullmatch(r'\d{1,9}', label):
                raise InputError(f"{path}: line {number} is not 'path label' with an integer label from 0: "
                                 f'{line[:60]!r}')
            self.names.append(name.strip())
            labels.append(int(label))
        self.labels = np.array(labels, np.int64)
        if not labels:
            raise InputError(f'{path}: no images in the list')

    def read(self, i):
        return (self.path / self.names[i]).read_bytes()


class TarImages(Source):
    """Tar shards in webdataset's layout, read by offset."""
    labels_from = "the members .cls, or .json's 'label', of the tar shards"

    def __init__(self, paths):
        self.paths, self.names, labels, places = paths, [], [], []
        for number, path in enumerate(paths):
            found = len(labels)
            for image, label in read_tar(path):
                self.names.append(f'{path.name}/{image.name}')
                labels.append(label)
                places.append((number, image.offset_data, image.size))
            if len(labels) == found:
                raise InputError(f'{path}: no images ({", ".join(TAR_IMAGES)}) in it')
        self.labels, self.places = np.array(labels, np.int64), np.array(places, np.int64)

    def read(self, i):
        number, offset, size = self.places[i].tolist()
        with open(self.paths[number], 'rb') as file:
            file.seek(offset)
            return file.read(size)


def read_tar(path):
    """Yield (image member, label) of a tar shard. Raises InputError."""
    current, image, labels = None, None, {}
    for key, extension, member, label in read_members(path):
        if key != current:
            yield from complete(path, current, image, labels)
            current, image, labels = key, None, {}
        if extension in TAR_IMAGES:
            if image:
                raise InputError(f'{path}: {image.name} and {member.name} are two images of one name; rename one')
            image = member
        elif label is not None:
            labels[extension] = label
    yield from complete(path, current, image, labels)


def complete(path, key, image, labels):
    """The (image, label) of a sample, if it has an image. Raises InputError when it lacks the label."""
    if image and not labels:
        raise InputError(f"{path}: {key} has no label: a member {key}.cls with an integer, or {key}.json with an "
                         "integer 'label', must stand next to the image")
    if image:
        yield image, labels.get('cls', labels.get('json'))


def read_members(path):
    """Yield (key, extension, member, label or None) of the files in a tar. Raises InputError."""
    try:
        with tarfile.open(path, 'r:') as tar:
            for member in tar:
                tar.members = []  # it would keep them all
                if member.size < 0:  # tarfile would go round in circles
                    raise InputError(f'{path}: {member.name} claims a negative size: damaged; fetch it again')
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise InputError(f'{path}: {member.name} is a link or another special member; pack plain files')
                folder, _, name = member.name.rpartition('/')
                stem, _, extension = name.partition('.')
                extension = extension.lower()
                label = read_label(path, tar, member, extension) if extension in ('cls', 'json') else None
                yield f'{folder}/{stem}' if folder else stem, extension, member, label
    except OSError as error:
        raise InputError(f'{path}: {error.strerror or error}') from None
    except tarfile.TarError as error:
        raise InputError(f'{path}: no tar file, compressed, or truncated ({error}); fetch it again, or unpack '
                         'a .tar.gz with gunzip') from None


def read_label(path, tar, member, extension):
    """The integer in a .cls or .json member; None for a .json without 'label'. Raises InputError."""
    data = tar.extractfile(member).read() if member.size <= LABEL_BYTES else b''
    try:
        label = int(data) if extension == 'cls' else parse_json(data)
    except ValueError:
        label = None
    if isinstance(label, dict):
        if 'label' not in label:
            return None
        label = label['label']
    if type(label) is not int or not 0 <= label < 10 ** 9:
        raise InputError(f'{path}: {member.name} holds no integer label from 0')
    return label


class ParquetImages(Source):
    """Parquet files with columns 'image' (struct{bytes, path}) and 'label' (integers)."""
    labels_from = "the column 'label' of the parquet files"

    def __init__(self, paths):
        self.paths, self.names, labels, groups = paths, [], [], []
        for number, path in enumerate(paths):
            file = open_parquet(path)
            own = read_column(path, file, 'label')
            if None in own or min(own, default=0) < 0:
                raise InputError(f"{path}: column 'label' has empty or negative labels: a test set without labels?")
            labels += own
            self.names += [f'{path.name}/{row}' for row in range(len(own))]
            groups += [(number, group, row) for group in range(file.num_row_groups)
                       for row in range(file.metadata.row_group(group).num_rows)]
            self.classes = class_names(file) or self.classes
        if not labels:
            raise InputError(f'{paths[0]}: no images in it')
        self.labels, self.places = np.array(labels, np.int64), np.array(groups, np.int64)
        self.group = None  # (file, row group, its images): the one read last, as images are asked for in order

    def read(self, i):
        number, group, row = self.places[i].tolist()
        if self.group is None or self.group[:2] != (number, group):
            path = self.paths[number]
            self.group = number, group, read_column(path, open_parquet(path), 'image', [group])
        image = self.group[2][row]
        data = image.get('bytes') if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            raise BadImage('holds no encoded image')
        return data


def open_parquet(path):
    """The pyarrow ParquetFile at `path`, with the columns that are needed. Raises InputError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f'parquet files need pyarrow ({error}): pip install -r requirements-formats.txt') from None
    try:
        file = parquet.ParquetFile(path, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        why = getattr(error, 'strerror', None) or str(error).splitlines()[0]
        raise InputError(f'{path}: no readable parquet file ({why})') from None
    types = {field.name: field.type for field in file.schema_arrow}
    if 'image' not in types or not pyarrow.types.is_integer(types.get('label', pyarrow.null())):
        raise InputError(f"{path}: expected columns 'image' (struct of bytes and path) and 'label' (integers), found "
                         f'{", ".join(map(str, types))}')
    return file


def read_column(path, file, name, groups=None):
    """One column of an open parquet file, or of some of its row groups, as a list. Raises InputError."""
    import pyarrow
    groups = range(file.num_row_groups) if groups is None else groups
    try:  # without threads: loader processes are forks, in which pyarrow's threads do not run
        return file.read_row_groups(list(groups), columns=[name], use_threads=False).column(name).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f'{path}: damaged parquet file ({str(error).splitlines()[0]}); fetch it again') from None


def class_names(file):
    """Class names that Hugging Face's datasets library leaves in a parquet file, or None."""
    try:
        info = json.loads(file.schema_arrow.metadata[b'huggingface'])
        names = info['info']['features']['label']['names']
    except (TypeError, KeyError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
