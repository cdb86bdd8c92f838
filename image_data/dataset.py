"""Images a whole batch at a time: with labels, augmented, for classifiers; without labels, as they are, for tokenizers.

ImageDataset is the pixel twin of TokenDataset. Worker processes decode and augment; uint8 pixels travel to the device,
and are normalized there. The augmentation of an image is a function of (seed, epoch, its number, which of its copies),
so a resumed run repeats it exactly, whatever the number of processes.

Images are some of a source's; `hold_out` keeps some of them from training. In which order they come, programs decide.
"""
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torch import nn

from fileio.torch_files import digest_of
from image_data.overlap import note_shared_images
from image_data.sources import ImageBatch, Source, load_images, open_source
from utils import InputError, print0

# Before an image is resized for evaluation, its long side is cut to so many short ones: the ends would be cropped off
# anyway, and take gigabytes until then.
LONGEST_RATIO = 32
HELD_OUT = 1000  # images that are held out unless the user says how many, where a tenth of all would be more


class ImageDataset:
    """Images and their classes, fetched whole batches at a time.

    Args:
        data_path: images, as in image_data/sources.py.
        size: S, pixels on a side of what is yielded.
        transform: RGB image -> (3, S, S) uint8, of `train_transform` or `eval_transform`.
        workers: processes that decode.
        max_pixels: larger images are an InputError; None for PIL's limit.
        exif_rotate: turn images as their EXIF orientation says.

    Attributes:
        source: the Source.
        labels: (N,) int64.
        classes: names in the order of the labels, where the source has them, else None.
    """

    def __init__(self, data_path: str, size: int, transform: Callable[[Image.Image], Any], workers: int = 0,
                 max_pixels: int | None = None, exif_rotate: bool = False):
        self.source = open_source(data_path, exif_rotate)
        self.labels = self.source.labels
        self.classes = self.source.classes
        self.size = size
        self.transform = transform
        self.workers = workers
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, indices: np.ndarray, batch_size: int, device: torch.device, pin_memory: bool = False,
                draws: np.ndarray | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield pixels (B, 3, S, S) uint8 and labels (B,) int64 on `device`, batch after batch.

        Args:
            indices: (n,) of the images.
            batch_size: the last batch may be smaller.
            device: of the batches.
            pin_memory: copy to a GPU from page-locked memory.
            draws: (n, k) integers of 0 or more, what the transform of each image is seeded by; None seeds nothing.

        Raises:
            InputError: naming an image that cannot be read.
        """
        slices = [indices[start:start + batch_size] for start in range(0, len(indices), batch_size)]

        # Runs in a worker process. timm's transforms draw from global generators, so these are seeded for each image:
        # what one image draws does not depend on which process decodes it, or on what was decoded before.
        def prepare(image: Image.Image, number: int, position: int) -> torch.Tensor:
            if draws is not None:
                seed_transform(draws[number * batch_size + position])
            return torch.as_tensor(self.transform(image))  # older versions of timm give an array

        pinned = pin_memory and device.type == 'cuda'
        for batch in load_images(self.source, slices, self.size, workers=self.workers, max_pixels=self.max_pixels,
                                 pin_memory=pinned, prepare=prepare):
            labels = torch.from_numpy(self.labels[batch.indices])
            yield batch.pixels.to(device, non_blocking=pinned), labels.to(device)


def seed_transform(draw: np.ndarray) -> None:
    """Seed what timm's and torchvision's transforms draw from: Python's, numpy's and torch's generator of the CPU."""
    seeds = np.random.SeedSequence(draw.tolist()).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])


# ---------------------------------------------------------------- transforms

def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's posterize, which at magnitude 10 asks for 0 bits: new Pillows refuse that, old ones made black of it."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else image.point(lambda _: 0)


# timm looks operations up by name, so that is where the mended one goes.
auto_augment.NAME_TO_OP.update({name: posterize for name, operation in auto_augment.NAME_TO_OP.items()
                                if operation is auto_augment.posterize})


def train_transform(size: int, min_area: float, hflip: float, color_jitter: float, policy: str) -> Callable:
    """timm's training transform, RGB image -> (3, size, size) uint8: random-resized crop, flip, and color.

    Args:
        size: side of the result.
        min_area: smallest area of the crop, as a part of the image's.
        hflip: part of the images that are mirrored.
        color_jitter: its strength. timm leaves it out where there is a policy, as DeiT did.
        policy: timm's name of a policy, such as rand-m9-mstd0.5-inc1 (RandAugment); '' for none.

    Raises:
        InputError: for a policy that timm does not know.
    """
    try:
        return create_transform(size, is_training=True, use_prefetcher=True, scale=(min_area, 1), hflip=hflip,
                                color_jitter=color_jitter or None, auto_augment=policy or None,
                                interpolation='bicubic')
    except (AssertionError, LookupError, ValueError) as error:
        raise InputError(f'--aa {policy}: is no policy of timm ({error or type(error).__name__}); DeiT has '
                         'rand-m9-mstd0.5-inc1') from None


def eval_transform(size: int, crop_ratio: float) -> Callable:
    """timm's transform, RGB image -> (3, size, size) uint8: short side to size / crop_ratio, bicubic; center crop."""
    transform = create_transform(size, is_training=False, use_prefetcher=True, crop_pct=crop_ratio,
                                 interpolation='bicubic')
    transform.transforms.insert(0, middle)
    return transform


def middle(image: Image.Image) -> Image.Image:
    """The middle of an image whose long side has more than LONGEST_RATIO short sides; others as they are."""
    longest = LONGEST_RATIO * min(image.size)
    # half of what is cut goes from each end, so an odd pixel stays
    left, top = (max(0, side - longest) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


class Normalize(nn.Module):
    """Pixels (B, 3, S, S) uint8 -> float32, minus ImageNet's mean, divided by its deviation."""

    def __init__(self, device: torch.device):
        super().__init__()
        for name, values in (('mean', IMAGENET_DEFAULT_MEAN), ('std', IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(values, device=device).view(3, 1, 1) * 255, persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.float() - self.mean) / self.std


def random_erasing(probability: float, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """timm's random erasing with noise for each pixel, of normalized batches, as DeiT has it.

    It draws from Python's and torch's global generators, which the engine seeds for each step.
    """
    return RandomErasing(probability, mode='pixel', device=device)


@dataclass(frozen=True)
class Images:
    """Some of a source's images, without their labels, as batches of pixels.

    Attributes:
        source: of the images.
        numbers: (N,) int64, which images of the source, rising.
        size: S, side of the pixels that are yielded; both sides of an image are resized to it.
        batch_size: the last batch may be smaller.
        device: of the batches.
        workers: processes that decode.
        skip_bad: leave images that cannot be read out, instead of an InputError.
        max_pixels: larger images cannot be read; None for PIL's limit.
    """
    source: Source
    numbers: np.ndarray
    size: int
    batch_size: int
    device: torch.device
    workers: int = 0
    skip_bad: bool = False
    max_pixels: int | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, numbers: np.ndarray, fill: bool = False) -> Iterator[torch.Tensor]:
        """Yield pixels (B, 3, S, S) uint8 on the device, of the images of these numbers (M,) in the source.

        Args:
            numbers: of the images.
            fill: yield as many batches as the numbers make, as a training needs them, whose ranks make their steps
                together. Without it a batch is left out when none of its images can be read.

        Raises:
            InputError: for an image that cannot be read; with `skip_bad` only where a batch is to be filled and no
                image can be read.
        """
        batches = [numbers[first:first + self.batch_size] for first in range(0, len(numbers), self.batch_size)]
        pin_memory = self.device.type == 'cuda'
        for batch in load_images(self.source, batches, self.size, workers=self.workers, skip_bad=self.skip_bad,
                                 pin_memory=pin_memory, max_pixels=self.max_pixels):
            if len(batch.indices):
                yield batch.pixels.to(self.device, non_blocking=pin_memory)
            elif fill:
                other = self.next_readable(batch.skipped[-1][0])  # the same one in a resumed run
                print0(f'note: {self.source.data_path}: none of the {len(batch.skipped)} images of a batch can be '
                       f'read; {self.source.names[other.indices[0]]} takes their place')
                yield other.pixels.to(self.device)

    def next_readable(self, number: int) -> ImageBatch:
        """The first image behind `number` that can be read. Raises InputError where none can."""
        order = np.roll(self.numbers, -np.searchsorted(self.numbers, number, 'right'))
        for batch in load_images(self.source, order[:, None], self.size, skip_bad=True, max_pixels=self.max_pixels):
            if len(batch.indices):
                return batch
        raise InputError(f'{self.source.data_path}: none of its {len(self)} images can be read')


def facts_of(images: Images, held_out: Images) -> dict[str, Any]:
    """What ranks, and a resumed run, must have the same: SHA-256 of which images are trained on and which held out."""
    facts = {f'{name} images': digest_of([part.source.content_digest(), part.numbers])
             for name, part in (('training', images), ('held-out', held_out))}
    return facts | {'EXIF rotation': images.source.exif_rotate}


def hold_out(data_path: str, val_path: str, val_images: int | None, seed: int, exif_rotate: bool = False,
             **reading: Any) -> tuple[Images, Images]:
    """The images that are trained on, and those held out: none is in both.

    Args:
        data_path: images, as in image_data/sources.py.
        val_path: of the images that are held out; '' for some of `data_path`.
        val_images: how many are held out, drawn at random; None for a tenth, 1,000 at most.
        seed: of the draw.
        exif_rotate: turn images as their EXIF orientation says.
        reading: what else an `Images` takes, such as its size and batch size.

    Raises:
        InputError: for images that cannot be found, or are too few.
    """
    source = open_source(data_path, exif_rotate)
    val_source = open_source(val_path, exif_rotate) if val_path else source
    if val_path:
        note_shared_images(source, val_source)
    count = val_images or min(HELD_OUT, max(1, len(val_source) // 10))
    if count > len(val_source) or (not val_path and count == len(source)):
        raise InputError(f'{val_path or data_path}: of its {len(val_source)} images {count} cannot be held out and '
                         'leave some to train on: give a smaller --val-images')
    order = torch.randperm(len(val_source), generator=torch.Generator().manual_seed(seed)).numpy()
    training_numbers = np.arange(len(source)) if val_path else np.sort(order[count:])
    # In order, because a parquet file is read by row groups of thousands of images: in any other order, each image
    # would read its group again.
    held_out = np.sort(order[:count])
    images, held_out_images = Images(source, training_numbers, **reading), Images(val_source, held_out, **reading)
    if held_out_images.skip_bad:
        held_out_images.next_readable(-1)  # now, and not when an epoch has been trained and there is none to evaluate
    return images, held_out_images
