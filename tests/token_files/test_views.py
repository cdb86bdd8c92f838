"""Rows that are views of one image, and images that are held out."""

import numpy as np
import pytest

from helpers import fails
from samplers import draw_views
from token_files.views import check_classes, group_images, held_out



class Rows:
    def __init__(self, rows, views=1, name='a.jsonl'):
        self.rows, self.views, self.name = rows, views, name

    def __len__(self):
        return self.rows


def rows_of(images):
    everywhere = np.arange(len(images.first))
    return [images.rows(everywhere, view).tolist() for view in range(images.views)]


def test_rows_that_follow_each_other():
    assert group_images([Rows(6)], None) is None and group_images([Rows(6)], (1, 1)) is None
    assert rows_of(group_images([Rows(6)], (2, 1))) == [[0, 2, 4], [1, 3, 5]]
    assert rows_of(group_images([Rows(6)], (3, 1))) == [[0, 3], [1, 4], [2, 5]]
    assert rows_of(group_images([Rows(4, 2), Rows(2, 2)], None)) == [[0, 2, 4], [1, 3, 5]]  # as the files say
    assert rows_of(group_images([Rows(20, 10)], (10, 1)))[9] == [9, 19]


def test_batches_of_originals_and_then_of_flips():
    assert rows_of(group_images([Rows(6)], (2, 3))) == [[0, 1, 2], [3, 4, 5]]
    assert rows_of(group_images([Rows(10)], (2, 3))) == [[0, 1, 2, 6, 7], [3, 4, 5, 8, 9]]  # the last is shorter
    assert rows_of(group_images([Rows(4)], (2, 128))) == [[0, 1], [2, 3]]
    # each file ends with a batch that may be shorter
    assert rows_of(group_images([Rows(8), Rows(6)], (2, 3))) == [[0, 1, 2, 6, 8, 9, 10], [3, 4, 5, 7, 11, 12, 13]]
    assert rows_of(group_images([Rows(9)], (3, 2))) == [[0, 1, 6], [2, 3, 7], [4, 5, 8]]


@pytest.mark.parametrize('sets, views, match', [
    ([Rows(7)], (2, 1), 'its 7 rows are no images of 2 views'), ([Rows(3), Rows(3)], (2, 1), 'its 3 rows'),
    ([Rows(4, 2)], (4, 1), 'has 2 views of each image, as its files say'), ([Rows(4, 2)], (2, 2), 'has 2 views'),
    ([Rows(4, 2), Rows(4)], None, '1 and 2 views of an image: they are no shards')])
def test_what_cannot_be_grouped(sets, views, match):
    fails(lambda: group_images(sets, views), match)


def test_views_are_of_one_class():
    labels = np.array([0, 1, 0, 1, 2, 2])
    check_classes(group_images([Rows(6)], (2, 2)), labels, 'a')
    fails(lambda: check_classes(group_images([Rows(6)], (2, 1)), labels, 'a'),
          'a: rows 0 and 1 would be views of one image, but are of classes 0 and 1')


def test_drawn_views_are_a_function_of_seed_epoch_and_image():
    drawn = draw_views(1000, 10, 3, 5)
    assert np.array_equal(drawn, draw_views(1000, 10, 3, 5)) and drawn.dtype == np.int64
    assert np.bincount(drawn, minlength=10).min() > 60 and drawn.max() == 9
    for other in (4, 5), (3, 6):
        assert (draw_views(1000, 10, *other) == drawn).mean() < 0.2
    assert draw_views(1000, 1, 3, 5) is None


def test_held_out_images():
    train, val = held_out(1000, 0.02, 'a')
    assert (len(train), len(val)) == (980, 20) and np.array_equal(np.sort(np.r_[train, val]), np.arange(1000))
    assert np.array_equal(val, held_out(1000, 0.02, 'a')[1]) and (np.diff(val) > 0).all()
    # a rule that must never change: results would be on images that were trained on
    assert held_out(10, 0.3, 'a')[1].tolist() == [2, 4, 8]
    for images, share in ((10, 0.01), (1, 0.5), (10, 0.99)):
        fails(lambda: held_out(images, share, 'a'), 'a: a share of', 'must hold out some, and not all')
