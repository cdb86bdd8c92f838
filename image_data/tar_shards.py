"""Tar shards in the layout of webdataset: where the images lie, and their labels. Nothing is extracted.

Members KEY.jpg and KEY.cls, or KEY.json with an integer 'label', stand next to each other and make a sample. Python's
tarfile takes a damaged header for the end of an archive; here the end must look like one.
"""
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fileio.files import parse_json
from fileio.labels import MAX_CLASS
from image_data.decoding import IgnoredFiles, image_extensions, is_hidden, is_image
from utils import InputError

LABELS = 'cls', 'json'  # endings of the members that hold them
LABEL_BYTES = 1 << 20  # more is no label
USUAL_IMAGES = 'jpg', 'jpeg', 'png', 'webp'  # of a sample's images the one of these is taken
BLOCK = tarfile.BLOCKSIZE
END_MARK = 2 * BLOCK  # bytes of zeros
MAX_END = END_MARK + tarfile.RECORDSIZE  # with what pads it to a whole record


class TarImage(NamedTuple):
    """An image in a tar shard: member name, where its bytes begin in the file, how many they are, and label or -1."""
    name: str
    offset: int
    size: int
    label: int


def read_tar(path: Path, ignored: IgnoredFiles, shard: str = '', labeled: bool = True) -> Iterator[TarImage]:
    """Yield the images of a tar shard in its order; what is not one is added to `ignored`. Raises InputError.

    Args:
        path: of the shard.
        ignored: is added to.
        shard: what the shard is called there; '' for the name of its file.
        labeled: without it every member that is an image is one, whatever stands next to it, and has the label -1.
    """
    shard = shard or path.name
    if not labeled:
        for member in _members(path, ignored, shard, labeled):
            if is_image(member.info.name):
                yield TarImage(member.info.name, member.info.offset_data, member.info.size, -1)
            elif member.extension not in LABELS:
                ignored.add(IgnoredFiles.OTHER, f'{shard}/{member.info.name}')
        return
    # webdataset's rule: a sample is a run of members that share the path up to the first dot of the file name
    key = None
    members = []
    for member in _members(path, ignored, shard, labeled):
        folder, _, name = member.info.name.rpartition('/')
        stem = name.partition('.')[0]
        if (folder, stem) != key:
            yield from _sample(path, members, ignored, shard)
            key = folder, stem
            members = []
        members.append(member)
    yield from _sample(path, members, ignored, shard)


class _Member(NamedTuple):
    """A regular file in a tar: its ending in lower case without the first dot, and the label if it holds one."""
    info: tarfile.TarInfo
    extension: str
    label: int | None


def _sample(path: Path, members: list[_Member], ignored: IgnoredFiles, shard: str) -> Iterator[TarImage]:
    """The image of a sample, if it has one. Raises InputError when it lacks the label, or has several images."""
    images = [member for member in members if '.' + member.extension in image_extensions()]
    usual = [member for member in images if member.extension in USUAL_IMAGES]
    candidates = usual or images
    if len(candidates) > 1:
        raise InputError(f'{path}: {candidates[0].info.name} and {candidates[1].info.name} are two images of one name; '
                         'rename one')
    if not candidates:
        if members:
            others = [member for member in members if member.extension not in LABELS]
            ignored.add(IgnoredFiles.NO_IMAGE, f'{shard}/{(others or members)[0].info.name}')
        return
    for member in images:
        if member is not candidates[0]:
            ignored.add(IgnoredFiles.OTHER, f'{shard}/{member.info.name}')
    labels = {member.extension: member.label for member in members if member.label is not None}
    image = candidates[0].info
    if not labels:
        key = image.name[:-len(candidates[0].extension) - 1]
        raise InputError(f"{path}: {key} has no label: a member {key}.cls with an integer, or {key}.json with an "
                         "integer 'label', must stand next to the image")
    yield TarImage(image.name, image.offset_data, image.size, labels.get('cls', labels.get('json')))


def _members(path: Path, ignored: IgnoredFiles, shard: str, labeled: bool) -> Iterator[_Member]:
    """Yield the regular files in a tar, hidden ones left out, with their labels if `labeled`. Raises InputError."""
    offset = 0
    try:
        with tarfile.open(path, 'r:') as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # tarfile would keep them all: a shard has thousands, a set millions
                if info.size < 0:  # tarfile would go back, and read the same headers for ever
                    raise InputError(f'{path}: {info.name} claims a negative size: damaged; fetch it again')
                offset = tar.offset
                if is_hidden(info.name):
                    ignored.add(IgnoredFiles.HIDDEN, f'{shard}/{info.name}')
                elif not info.isdir():
                    yield _member(path, tar, info, labeled)
            offset = tar.offset
        check_end(path, offset)
    except OSError as error:
        raise InputError(f'{path}: {error.strerror or error}') from None
    except tarfile.TarError as error:
        if offset:
            raise InputError(f'{path}: damaged or truncated at byte {offset:,} ({error}); fetch it again') from None
        raise InputError(f'{path}: no tar file, compressed, or truncated ({error}); fetch it again, or unpack '
                         'a .tar.gz with gunzip') from None


def _member(path: Path, tar: tarfile.TarFile, info: tarfile.TarInfo, labeled: bool) -> _Member:
    """A member that is not hidden and no folder. Raises InputError unless it is a plain file."""
    if not info.isreg() or info.issparse():
        raise InputError(f'{path}: {info.name} is a link or another special member; pack plain files')
    extension = PurePosixPath(info.name).name.partition('.')[2].lower()
    label = _read_label(path, tar, info, extension) if labeled and extension in LABELS else None
    return _Member(info, extension, label)


def check_end(path: Path, offset: int) -> None:
    """InputError unless a tar ends at byte `offset` as tars do: two blocks of zeros, padded to a record.

    Raises:
        InputError: where a header cannot be read, the end mark lacks, or anything follows it.
    """
    with open(path, 'rb') as file:
        file.seek(offset)
        rest = file.read(MAX_END + 1)
        size = os.fstat(file.fileno()).st_size
    data = len(rest) - len(rest.lstrip(b'\0'))  # the first byte that is no zero
    if data < min(len(rest), BLOCK):
        raise InputError(f'{path}: damaged at byte {offset:,}: no header of a member can be read there, and '
                         f'{size - offset:,} bytes follow; fetch it again')
    if data < len(rest):
        raise InputError(f'{path}: has an end, or a damaged header, at byte {offset:,}, but more data at byte '
                         f'{(offset + data) // BLOCK * BLOCK:,}: damaged, or archives one after the other; fetch it '
                         'again, or give each archive as a shard of its own')
    if len(rest) < END_MARK:
        raise InputError(f'{path}: ends at byte {size:,} without the end mark of a tar: truncated between two '
                         'members; fetch it again')
    if len(rest) > MAX_END:
        raise InputError(f'{path}: only zeros from byte {offset:,} on, {size - offset:,} of them, where the end of a '
                         f'tar has {MAX_END:,} at most: damaged, or a download that was not finished; fetch it again, '
                         'or pack it again if it is whole')


def _read_label(path: Path, tar: tarfile.TarFile, info: tarfile.TarInfo, extension: str) -> int | None:
    """The integer in a .cls or .json member; None for a .json without 'label'. Raises InputError."""
    data = tar.extractfile(info).read() if info.size <= LABEL_BYTES else b''
    try:
        label = int(data) if extension == 'cls' and b'_' not in data else parse_json(data)
    except ValueError:
        label = None
    if isinstance(label, dict):
        if 'label' not in label:
            return None
        label = label['label']
    if type(label) is not int or not 0 <= label <= MAX_CLASS:
        raise InputError(f'{path}: {info.name} holds no integer label from 0 to {MAX_CLASS:,}')
    return label
