"""How a replay memory stores an image, as pixels, fewer pixels, a JPEG or codes, and how images come back from it.

    pixels   RGB as it is, 3 bytes a pixel, without any header: its sides are in the sample's index
    resize   the same, after the short side was brought down to --memory-side where it is longer
    jpeg     a JPEG of --memory-quality with its headers, as scripts/shrink_images.py makes it
    tokens   codes as the published format has them (token_files/published.py), each image on its own

Samples of a memory come and go one by one, so each is stored alone. The compact format (token_files/compact.py) has a
model of a whole set of images, and saves less for a few at a time.

`PixelStore` and `TokenStore` make samples of images and images of samples; the functions `join_*` put what a memory
holds behind the new task's images.
"""
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from continual.memory import Sample
from image_data.dataset import ImageDataset
from image_data.decoding import BadImage, decode_rgb, fit_sides
from image_data.shrinking import shrink
from image_data.sources import Source
from image_tokenizer.tokenizers import decode_codes
from token_dataset import TokenDataset
from token_files.published import Codec, codec_for, encode
from utils import InputError

RAW = ('pixels', 'resize')
FORMS = (*RAW, 'jpeg', 'tokens')
DECODED_BATCH = 256  # images that the tokenizer decodes at a time, which bounds memory
LONGEST_SIDE = 0xffff  # of raw pixels, whose height and width share a sample's index
RESTORED = 2048  # images that are restored at a time: 400 MB of 256 x 256 pixels


# ---------------------------------------------------------------- to bytes

def length_of(form: str) -> Callable[[int], int]:
    """The function from a sample's index to the bytes of its data."""
    return _raw_length if form in RAW else int


def _raw_length(index: int) -> int:
    return 3 * (index >> 16) * (index & 0xffff)  # height and width, see store_image


def store_image(label: int, image: Image.Image, form: str, quality: int, side: int) -> Sample:
    """The sample of an RGB image. Raises BadImage where the form cannot hold it.

    A side that is longer than the form holds, as of a strip of 1 x 70,000 pixels, is brought down to what it holds.

    Args:
        image: at its original size.
        form: 'pixels', 'resize' or 'jpeg'.
        quality: of the JPEG.
        side: pixels of the short side, at most, with 'resize'.
    """
    if form == 'jpeg':
        data = shrink(image, 'jpeg', quality)
        return Sample(label, len(data), data)
    short = min(image.size)
    if form == 'resize' and short > side:
        image = image.resize([max(1, round(length * side / short)) for length in image.size],
                             Image.Resampling.BICUBIC)
    image = fit_sides(image, LONGEST_SIDE)
    return Sample(label, image.height << 16 | image.width, image.tobytes())


def store_codes(label: int, codes: np.ndarray, codec: Codec) -> Sample:
    """The sample of an image's codes (n,)."""
    stream, _ = encode(codec, codes[None])
    return Sample(label, len(stream), stream.tobytes())


# ---------------------------------------------------------------- and back

def image_file(sample: Sample, form: str) -> bytes:
    """The image of a sample as a file that PIL reads."""
    if form not in RAW:
        return sample.data
    # a PPM header in front of the pixels makes them a file, so that one reader is enough for all forms
    return b'P6 %d %d 255\n' % (sample.index & 0xffff, sample.index >> 16) + sample.data


def codes_of(samples: Sequence[Sample], codec: Codec, n: int) -> np.ndarray:
    """The codes (N, n) uint16 of samples of tokens."""
    stream = np.frombuffer(b''.join(sample.data for sample in samples), np.uint8)
    offsets = np.cumsum([0] + [len(sample.data) for sample in samples], dtype=np.int64)
    return codec.decode(stream, offsets)[0].reshape(-1, n) if samples else np.empty((0, n), np.uint16)


def decode_to_files(codes: np.ndarray, tokenizer: nn.Module, codebook: torch.Tensor, path: str) -> list[bytes]:
    """Images, as files that PIL reads, of codes (N, n): by the tokenizer's decoder.

    Args:
        tokenizer, codebook: on one device.
        path: of the tokenizer, for errors.

    Raises:
        InputError: for a tokenizer without a decoder.
    """
    files = []
    for part in torch.from_numpy(codes.astype(np.int64)).split(DECODED_BATCH):
        images = decode_codes(tokenizer, codebook, part)
        if images is None:
            raise InputError(f'{path}: has no decoder, which tokens in memory need beside pixels; choose --new tokens')
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        files += [b'P6 %d %d 255\n' % (image.shape[1], image.shape[0]) + image.tobytes() for image in pixels]
    return files


class TaskImages(Source):
    """Some images of a source, and then files from memory.

    Args:
        source: of the images.
        indices: (n,) of some of its images.
        labels: (n,) int64, of these images.
        files: encoded images.
        file_labels: (m,) int64, of the files.
    """

    def __init__(self, source: Source, indices: np.ndarray, labels: np.ndarray, files: Sequence[bytes] = (),
                 file_labels: Sequence[int] = ()):
        self.source = source
        self.indices = np.asarray(indices)
        self.files = files
        self.data_path = source.data_path
        self.classes = source.classes
        self.exif_rotate = source.exif_rotate
        self.oriented = source.oriented
        self.labels = np.concatenate([labels, np.asarray(file_labels, np.int64)])
        self.names = [source.names[i] for i in self.indices] + [f'memory/{number}' for number in range(len(files))]

    def read(self, i: int) -> bytes:
        """The encoded bytes of image i."""
        if i < len(self.indices):
            return self.source.read(int(self.indices[i]))
        return self.files[i - len(self.indices)]


def store_from(source: Source, i: int, store: Callable[[Image.Image], Sample],
               max_pixels: int | None = None) -> Sample:
    """The sample that `store` makes of image i of a source, in RGB. Raises InputError."""
    try:
        return store(decode_rgb(source.read(i), max_pixels, source.exif_rotate))
    except (OSError, BadImage) as error:
        raise InputError(f'{source.data_path}: {source.names[i]} cannot be read or stored ({error}): replace or remove '
                         'it') from None


class PixelStore:
    """Images of sets as they are stored in a memory of pixels, fewer pixels or JPEGs, and back.

    Args:
        images: by 'train' and 'val'; a sample has the label that its set has when it is stored.
        form, quality, side: as `store_image` has them.
    """

    def __init__(self, images: dict[str, ImageDataset], form: str, quality: int | None, side: int | None):
        self.images = images
        self.form = form
        self.quality = quality
        self.side = side

    def store(self, split: str, number: int) -> Sample:
        """The sample of an image of a set. Raises InputError."""
        data = self.images[split]
        label = int(data.labels[number])
        return store_from(data.source, number,
                          lambda image: store_image(label, image, self.form, self.quality, self.side), data.max_pixels)

    def restore(self, samples: Sequence[Sample]) -> list[bytes]:
        """The images of samples, as files that PIL reads."""
        return [image_file(sample, self.form) for sample in samples]


class TokenStore:
    """Images of sets as their codes in a memory of tokens, and back to pixels.

    Args:
        images: by 'train' and 'val'; a sample has the label that its set has when it is stored.
        codes: (N, n) of each set.
        tokenizer, codebook: on one device.
        path: of the tokenizer, for errors.
    """

    def __init__(self, images: dict[str, ImageDataset], codes: dict[str, np.ndarray], tokenizer: nn.Module,
                 codebook: torch.Tensor, path: str):
        self.images = images
        self.codes = codes
        self.tokenizer = tokenizer
        self.codebook = codebook
        self.path = path
        self.codec = codec_for(len(codebook))

    def store(self, split: str, number: int) -> Sample:
        """The sample of an image of a set."""
        return store_codes(int(self.images[split].labels[number]), self.codes[split][number], self.codec)

    def restore(self, samples: Sequence[Sample]) -> list[bytes]:
        """The images that the decoder makes of samples, as files that PIL reads. Raises InputError."""
        codes = codes_of(samples, self.codec, self.codes['train'].shape[1])
        return decode_to_files(codes, self.tokenizer, self.codebook, self.path)


# ---------------------------------------------------------------- with the new task's images

def join_tokens(data: TokenDataset, indices: np.ndarray, samples: Sequence[Sample], codec: Codec) -> TokenDataset:
    """A token set of some images (n,) of another set, and then of samples."""
    joined = copy.copy(data)
    joined.codes = np.concatenate([data.codes[indices], codes_of(samples, codec, data.codes.shape[1])])
    joined.labels = np.concatenate([data.labels[indices], [sample.label for sample in samples]]).astype(np.int64)
    joined.resident = None  # what lies on the GPU are the codes of the other set
    return joined


def join_images(data: ImageDataset, indices: np.ndarray, files: Sequence[bytes], labels: np.ndarray) -> ImageDataset:
    """A set of some images (n,) of another set, and then of encoded images with their labels."""
    joined = copy.copy(data)
    joined.source = TaskImages(data.source, indices, data.labels[indices], files, labels)
    joined.labels = joined.source.labels
    return joined


class StoredImages:
    """The images of a set as a memory gives them back: a model that replays a memory has seen old classes only so.

    Args:
        data: the set.
        split: what the store calls it.
        store: of the memory.
    """

    def __init__(self, data: ImageDataset, split: str, store: PixelStore | TokenStore):
        self.data = data
        self.split = split
        self.store = store

    def batches(self, indices: np.ndarray, *options: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As those of ImageDataset; RESTORED images at a time are held in working memory."""
        for start in range(0, len(indices), RESTORED):
            part = indices[start:start + RESTORED]
            files = self.store.restore([self.store.store(self.split, number) for number in part.tolist()])
            restored = join_images(self.data, part[:0], files, self.data.labels[part])
            yield from restored.batches(np.arange(len(part)), *options)
