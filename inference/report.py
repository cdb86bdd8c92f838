"""What an evaluation says to people: the names of classes."""
from collections.abc import Sequence

import numpy as np


def class_names(classes: int, names: Sequence[str] | None, image_names: Sequence[str] | None = None,
                image_labels: np.ndarray | None = None, labels: np.ndarray | None = None) -> list[str]:
    """The name of each of a model's classes, '' where none is known: the checkpoint's, else those of the images.

    Args:
        classes: of the model.
        names: of the checkpoint, or None.
        image_names: of the images' classes, or None.
        image_labels, labels: (N,) int64, the images' own labels and what they are to the model, where these differ.
    """
    if names is None and image_names and image_labels is not None and not np.array_equal(image_labels, labels):
        names = [''] * classes
        for number, label in set(zip(image_labels.tolist(), labels.tolist())):
            names[label] = str(image_names[number])
    elif names is None:
        names = image_names or ()
    names = [str(name) for name in names[:classes]]
    return names + [''] * (classes - len(names))
