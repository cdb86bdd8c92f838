"""The report of an evaluation."""
import numpy as np

from inference.report import class_names


def test_names_are_the_checkpoints_else_those_of_the_images():
    labels = np.array([0, 1, 1])
    assert class_names(3, ['a', 'b', 'c'], ['x', 'y'], labels, labels) == ['a', 'b', 'c']
    assert class_names(3, None, ['x', 'y', 'z'], labels, labels) == ['x', 'y', 'z']  # also of a class without images
    assert class_names(3, None, ['x', 'y'], labels, np.array([2, 0, 0])) == ['y', '', 'x']  # a subset's own order
    assert class_names(3, ['a', 'b']) == ['a', 'b', ''] and class_names(2, None) == ['', '']
