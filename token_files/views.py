"""Which rows of a token set are views of one image, and which images are held out.

Sets of others may hold an image several times: itself and its mirror image, or ten crops. A training draws one view of
an image in each epoch (samplers.draw_views), an evaluation reads the first. All views are of one class.
"""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from token_files.token_file import TokenFile
from utils import InputError


class Images(NamedTuple):
    """The rows of images in a set.

    Attributes:
        first: (N,) int64 row of the first view of each image.
        step: (N,) int64 rows from one view of it to the next.
        views: of each image.
    """
    first: np.ndarray
    step: np.ndarray
    views: int

    def rows(self, images: np.ndarray, views: np.ndarray | int = 0) -> np.ndarray:
        """The rows (m,) int64 of some images (m,), each in the view that is asked for."""
        return self.first[images] + views * self.step[images]

    def only(self, images: np.ndarray) -> 'Images':
        """Some of the images alone."""
        return Images(self.first[images], self.step[images], self.views)


def group_images(files: Sequence[TokenFile], views: tuple[int, int] | None) -> Images | None:
    """The images in the rows of token files, None where each row is an image.

    Args:
        files: the shards of one set; no image has views in two of them.
        views: how many views an image has, and how many images make a batch whose first views are followed by their
            second ones and so on; the last batch of a file may be smaller. (2, 1) are pairs of rows. None for what the
            files say.

    Raises:
        InputError: for a number of rows that is no multiple of the views, and views that contradict the files.
    """
    said = {file.views for file in files}
    if len(said) > 1:
        raise InputError(f'{files[0].name} and others: {" and ".join(map(str, sorted(said)))} views of an image: they '
                         'are no shards of one set')
    in_files = said.pop()
    count, batch = views or (in_files, 1)
    if in_files > 1 and (count, batch) != (in_files, 1):
        raise InputError(f'{files[0].name}: has {in_files} views of each image, as its files say; give no other number')
    if count == 1:
        return None
    first = []
    step = []
    start = 0
    for file in files:
        if len(file) % count:
            raise InputError(f'{file.name}: its {len(file)} rows are no images of {count} views each')
        images = np.arange(len(file) // count)
        batches = images // batch
        sizes = np.minimum(batch, len(images) - batches * batch)
        first.append(start + batches * batch * count + images % batch)
        step.append(sizes)
        start += len(file)
    return Images(np.concatenate(first), np.concatenate(step), count)


def check_classes(images: Images, labels: np.ndarray, name: str) -> None:
    """InputError unless the views of each image have one class, by labels (rows,) of a set."""
    everywhere = np.arange(len(images.first))
    for view in range(1, images.views):
        wrong = labels[images.rows(everywhere, view)] != labels[images.first]
        if wrong.any():
            image = int(np.argmax(wrong))
            rows = int(images.first[image]), int(images.rows(image, view))
            raise InputError(f'{name}: rows {rows[0]} and {rows[1]} would be views of one image, but are of classes '
                             f'{labels[rows[0]]} and {labels[rows[1]]}: its views are grouped otherwise')


def held_out(images: int, share: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The images that are trained on, and those held out: rising (m,) int64 each.

    Which ones depends on their number and on the share alone: numpy's RandomState is the same in all its versions.
    Raises InputError for a share that leaves one of the two without any.
    """
    count = round(share * images)
    if not 0 < count < images:
        raise InputError(f'{name}: a share of {share:g} of its {images:,} images holds {count} out, and must hold out '
                         'some, and not all')
    order = np.random.RandomState(0).permutation(images)
    return np.sort(order[count:]).astype(np.int64), np.sort(order[:count]).astype(np.int64)
