"""One encoded image: whether a name is one, decoding by PIL, and bytes without headers.

What PIL reads counts as an image, but for films, data of other sciences, and formats that need another program. Hidden
files and the folders that systems add are never images. Whatever PIL raises for a damaged file is a BadImage.
"""
import functools
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import PurePath

import numpy as np
import torch
from PIL import Image

from utils import first_line, print0

# Opened by PIL, but not read: data of other sciences, films, and what needs another program.
NOT_READ = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'WMF'}
# Folders that file managers, archivers and file systems add; some hold thumbnails.
SYSTEM_FOLDERS = {'__MACOSX', '@eaDir', '$RECYCLE.BIN', 'System Volume Information', 'lost+found'}

ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
UPRIGHT = 1  # its value for an image that is stored as it is to be seen
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}

# Longer sides are averaged over some of their pixels before they are resized, which bounds memory.
LONG_SIDE = 1 << 16


class BadImage(Exception):
    """An image that cannot be read; the message says why, on one line."""


# ---------------------------------------------------------------- names

@functools.cache
def image_formats() -> tuple[str, ...]:
    """The formats that PIL can read here, in the order it tries them."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_READ)


@functools.cache
def image_extensions() -> frozenset[str]:
    """The endings of images that PIL can read here, in lower case, as in '.jpg'."""
    formats = image_formats()
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image that PIL can read."""
    return PurePath(name).suffix.lower() in image_extensions()


def is_hidden(name: str) -> bool:
    """Whether any part of a relative path is hidden, or a folder that a system adds: never a class or an image."""
    return any(part in SYSTEM_FOLDERS or (part.startswith('.') and part not in ('.', '..'))
               for part in name.split('/'))


class IgnoredFiles:
    """Files and folders that a source does not read, counted by reason, and printed once."""
    HIDDEN = 'hidden names (such as .DS_Store) passed over'
    OTHER = 'files of kinds that are not read left out'
    LOOSE = 'images outside of class folders left out'
    SPECIAL = 'files that are no regular files left out'
    LINK = 'links to folders that are read already not followed'
    NO_IMAGE = 'samples without an image of a kind that is read left out'

    def __init__(self) -> None:
        self.counts = {}
        self.first = {}

    def add(self, reason: str, name: str) -> None:
        """Count one more file or folder."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, name)

    def report(self, data_path: str) -> None:
        """Print a line for each reason, on rank 0."""
        for reason, count in self.counts.items():
            print0(f'note: {data_path}: {reason}: {count:,} (first: {self.first[reason]})')


# ---------------------------------------------------------------- decoding

def decode_rgb(data: bytes, max_pixels: int | None = None, exif_rotate: bool = False) -> Image.Image:
    """The image of `decode_oriented`. Raises BadImage."""
    return decode_oriented(data, max_pixels, exif_rotate)[0]


def decode_oriented(data: bytes, max_pixels: int | None = None, exif_rotate: bool = False) -> tuple[Image.Image, int]:
    """An encoded image, decoded whole, in RGB, and its EXIF orientation, 1 to 8.

    Colors are converted as torchvision's loader does, by PIL's convert('RGB').

    Args:
        data: bytes of the file.
        max_pixels: larger images are refused; None for PIL's limit.
        exif_rotate: turn and mirror the image as its orientation says, as PIL's exif_transpose does; else ignore it.

    Raises:
        BadImage: for anything that is no whole image.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if max_pixels is not None:
            Image.MAX_IMAGE_PIXELS = None  # else PIL would refuse or warn by the limit it has
        with Image.open(io.BytesIO(data), formats=image_formats()) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise Image.DecompressionBombError(f'{image.width} x {image.height} pixels')
            pixels = image.convert('RGB')
            orientation = orientation_of(image)  # after decoding: PIL itself turns some kinds, and drops their tag
            if exif_rotate and orientation != UPRIGHT:
                pixels = pixels.transpose(TURNS[orientation])
            return pixels, orientation
    except Image.UnidentifiedImageError:
        raise BadImage('no image of a kind that is read' if data else 'an empty file') from None
    except Image.DecompressionBombError as error:
        raise BadImage(f'more pixels than are allowed, as in a decompression bomb ({first_line(error)}); allow them '
                       'with --max-image-pixels') from None
    except Exception as error:  # PIL raises nearly anything for damaged data
        # PIL's message has the address of the buffer, which would make each run's line another one
        why = re.sub(r'<_io\.BytesIO[^>]*>', 'it', ' '.join(str(error).split()))
        raise BadImage(why or type(error).__name__) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def upright(image: Image.Image) -> Image.Image:
    """An image turned and mirrored as its EXIF orientation says."""
    orientation = orientation_of(image)
    return image if orientation == UPRIGHT else image.transpose(TURNS[orientation])


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of a decoded image, 1 to 8: UPRIGHT where it has none, or one that cannot be read."""
    try:
        with warnings.catch_warnings():  # PIL warns of damaged tags
            warnings.simplefilter('ignore')
            orientation = image.getexif().get(ORIENTATION, UPRIGHT)
    except Exception:  # PIL raises nearly anything for damaged tags, with which the pixels may be whole
        return UPRIGHT
    return orientation if orientation in TURNS else UPRIGHT


def pixels_of(image: Image.Image) -> torch.Tensor:
    """An RGB image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resize_square(image: Image.Image, size: int) -> torch.Tensor:
    """An RGB image as (3, size, size) uint8, both sides resized bicubically.

    Divided by 255, these are the pixels of torchvision's Resize and ToTensor: the published preparation. Only sides of
    twice LONG_SIDE and more come out otherwise.
    """
    return pixels_of(image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=max(1, LONG_SIDE / size)))


def fit_sides(image: Image.Image, longest: int) -> Image.Image:
    """An image made smaller where its long side has more than `longest` pixels; others as they are."""
    if max(image.size) <= longest:
        return image
    size = [max(1, round(side * longest / max(image.size))) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)  # else a kernel may take gigabytes


def decode_image(data: bytes, size: int, max_pixels: int | None = None, exif_rotate: bool = False) -> torch.Tensor:
    """`resize_square` of `decode_rgb`: encoded bytes -> (3, size, size) uint8. Raises BadImage."""
    return resize_square(decode_rgb(data, max_pixels, exif_rotate), size)


# ---------------------------------------------------------------- bytes without headers

def bare_bytes(data: bytes) -> int | None:
    """Bytes of a JPEG, WebP or AVIF without what is the same in every such file.

    None for other kinds, and damaged ones.
    """
    if data[:4] == b'RIFF':
        return webp_bytes(data)
    return avif_bytes(data) if data[4:8] == b'ftyp' else scan_bytes(data)


def scan_bytes(data: bytes) -> int | None:
    """Bytes of a JPEG's entropy-coded scans, without the headers: what follows each SOS header up to the next marker.

    Of a JPEG with one scan, as PIL writes, that is all between the SOS header and EOI. None for another kind of file,
    and for a damaged one.
    """
    if data[:2] != b'\xff\xd8':
        return None
    total = 0
    position = 2
    while data[position:position + 1] == b'\xff' and data[position + 1:position + 2] != b'\xd9':
        if data[position + 1:position + 2] == b'\xff':  # markers may be preceded by any number of these
            position += 1
            continue
        # a marker segment has its length behind the marker; the scan's data behind its header have none
        start_of_scan = data[position + 1:position + 2] == b'\xda'
        header = int.from_bytes(data[position + 2:position + 4], 'big')
        position += 2 + max(header, 2)
        if start_of_scan:
            scan_begin = position
            position = data.find(b'\xff', position)
            # a stuffed zero and the restart markers D0 to D7 belong to the scan
            while 0 <= position < len(data) - 1 and (data[position + 1] == 0 or 0xd0 <= data[position + 1] <= 0xd7):
                position = data.find(b'\xff', position + 2)
            if position < 0:
                return None
            total += position - scan_begin
    return total if data[position:position + 2] == b'\xff\xd9' else None


def webp_bytes(data: bytes) -> int | None:
    """Bytes of a still WebP image's bitstreams: what its chunks VP8, VP8L and ALPH hold, without RIFF's headers.

    None for another kind of file, and for a damaged one.
    """
    if data[:4] != b'RIFF' or data[8:12] != b'WEBP':
        return None
    end = 8 + int.from_bytes(data[4:8], 'little')
    total = 0
    position = 12
    while position < end:
        size = int.from_bytes(data[position + 4:position + 8], 'little')
        if position + 8 + size > len(data):
            return None
        if data[position:position + 4] in (b'VP8 ', b'VP8L', b'ALPH'):
            total += size
        position += 8 + size + size % 2  # chunks begin at even bytes
    return total or None


def avif_bytes(data: bytes) -> int | None:
    """Bytes of a still AVIF image's coded items, which are AV1 bitstreams of pixels and alpha, without boxes.

    None for another kind of file, for films, for what the items do not tell, and for a damaged file.
    """
    try:
        boxes = {kind: (begin, end) for kind, begin, end in _boxes(data, 0, len(data))}
        if b'avif' not in data[slice(*boxes.get(b'ftyp', (0, 0)))] or b'moov' in boxes or b'meta' not in boxes:
            return None
        begin, end = boxes[b'meta']
        inner = {kind: data[begin:end] for kind, begin, end in _boxes(data, begin + 4, end)}
        coded = _av1_items(inner.get(b'iinf', b''))
        lengths = _item_lengths(inner.get(b'iloc', b''), {0: len(data), 1: len(inner.get(b'idat', b''))})
    except ValueError:
        return None
    return sum(lengths.get(item, 0) for item in coded) or None


def _boxes(data: bytes, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of ISO base media between two positions: kind, begin and end of the content. Raises ValueError."""
    while position < end:
        size = _uint(data, position, 4)
        header = 8
        if size == 1:  # the size stands behind the kind
            size = _uint(data, position + 8, 8)
            header = 16
        elif size == 0:  # the last box
            size = end - position
        if size < header or position + size > end:
            raise ValueError
        yield data[position + 4:position + 8], position + header, position + size
        position += size


def _av1_items(iinf: bytes) -> set[int]:
    """Numbers of the items that are AV1 images, from the content of a box `iinf`. Raises ValueError."""
    items = set()
    for _, begin, end in _boxes(iinf, 4 + (4 if _uint(iinf, 0, 1) else 2), len(iinf)):  # behind the number of items
        id_size = 4 if _uint(iinf, begin, 1) == 3 else 2
        kind = begin + 4 + id_size + 2  # behind the item's number there are two bytes of its protection
        if iinf[kind:min(kind + 4, end)] == b'av01':
            items.add(_uint(iinf, begin + 4, id_size))
    return items


def _item_lengths(iloc: bytes, room: dict[int, int]) -> dict[int, int]:
    """Bytes of each item, from the content of a box `iloc`.

    Args:
        iloc: the content.
        room: bytes of what extents may lie in, by its number: 0 the file, 1 the box `idat`.

    Raises:
        ValueError: for what is damaged, or lies elsewhere.
    """
    version = _uint(iloc, 0, 1)
    offset_size, length_size = divmod(_uint(iloc, 4, 1), 16)
    base_size, index_size = divmod(_uint(iloc, 5, 1), 16)
    if version == 0:
        index_size = 0
    if version > 2 or not length_size:  # without lengths an item is all of the file
        raise ValueError
    id_size = 4 if version == 2 else 2
    position = 6 + id_size
    lengths = {}
    for _ in range(_uint(iloc, 6, id_size)):
        item = _uint(iloc, position, id_size)
        position += id_size
        place = 0
        if version:
            place = _uint(iloc, position, 2) & 15
            position += 2
        position += 2  # of the file that holds the item: 0 for this one
        base = _uint(iloc, position, base_size)
        position += base_size
        lengths[item] = 0
        extents = _uint(iloc, position, 2)
        position += 2
        for _ in range(extents):
            offset = base + _uint(iloc, position + index_size, offset_size)
            length = _uint(iloc, position + index_size + offset_size, length_size)
            position += index_size + offset_size + length_size
            if not length or offset + length > room.get(place, 0):
                raise ValueError
            lengths[item] += length
    return lengths


def _uint(data: bytes, position: int, size: int) -> int:
    """A big-endian number of `size` bytes. Raises ValueError where the data ends before it does."""
    if position + size > len(data):
        raise ValueError
    return int.from_bytes(data[position:position + size], 'big')
