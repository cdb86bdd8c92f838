"""Label files, and whether two sets of labels mean the same classes."""
import numpy as np
import pytest

from fileio.labels import check_class_names, name_labels, read_labels, spread
from helpers import fails

# ---------------------------------------------------------------- label files

@pytest.mark.parametrize('text', [b'1\n2\n3\n', b'1\n2\n3', b'1\r\n2\r\n3\r\n', b'\xef\xbb\xbf1\n2\n3\n',
                                  b'1\n2\n3\n\n', b'1\n2\n3\n\n\n \t\r\n', b' 1\n+2 \n03\t\n'])
def test_labels_read(tmp_path, text):
    """With a byte-order mark, Windows's line endings, blank last lines."""
    (tmp_path / 'labels').write_bytes(text)
    labels = read_labels(tmp_path / 'labels')
    assert labels.dtype == np.int64 and labels.tolist() == [1, 2, 3]


@pytest.mark.parametrize('text, words', [
    (b'1\ncat\n', "line 2 is not an integer class: 'cat'"), (b'1\n1_0\n', "line 2 .*'1_0'"),
    (b'9' * 18 + b'\n' + b'9' * 19, 'line 2'), (b'9223372036854775807\nx', 'line 1'), (b'1\n\n2', 'line 2'),
    (b'\n1\n', 'line 1'), (b'\xff\n', 'line 1'), (b'\xff\xfe', 'line 1'), (b'1 2\n', 'line 1'), (b'1.0\n', 'line 1'),
    (b'nan\n', 'line 1'), (b'', 'no labels'), (b'\n\n', 'no labels'), (b' \r\n', 'no labels'),
    (b'\xef\xbb\xbf', 'no labels'), ('١\n'.encode(), 'line 1'), (b'1\r2\r3\r', 'line 1')])
def test_labels_that_are_no_classes(tmp_path, text, words):
    (tmp_path / 'labels').write_bytes(text)
    fails(lambda: read_labels(tmp_path / 'labels'), str(tmp_path / 'labels'), words)


@pytest.mark.parametrize('label', ['-1', '1000001', '999999999', '9' * 18])
def test_labels_out_of_range(tmp_path, label):
    """An id is no class number: the head of the model has one output for each."""
    (tmp_path / 'labels').write_text(f'0\n1000000\n{label}\n2\n')
    fails(lambda: read_labels(tmp_path / 'labels'), f'line 3: class {label} is not from 0 to 1,000,000')


def test_labels_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr('fileio.labels.MAX_LABEL_BYTES', 10)
    (tmp_path / 'labels').write_bytes(b'1\n' * 6)
    fails(lambda: read_labels(tmp_path / 'labels'), str(tmp_path / 'labels'), 'more than 10 bytes')
    fails(lambda: read_labels(tmp_path), str(tmp_path), 'directory')
    fails(lambda: read_labels(tmp_path / 'none'), 'none: No such file')


# ---------------------------------------------------------------- class names

@pytest.mark.parametrize('names, others, differ', [
    (['0', '1'], ['cat', 'dog'], False), (['cat', 'dog'], ['00', '01'], False), (['0', '1', '2'], ['0', '1'], False),
    (['0', '1'], ['1', '0'], True), (['0', '2'], ['0', '1'], True), (['cat', 'dog'], ['0', '2'], True)])
def test_folders_called_by_their_labels_name_no_class(names, others, differ):
    if differ:
        fails(lambda: check_class_names(names, others, 'a', 'b'), '^b: class .* but in a it is ')
    else:
        check_class_names(names, others, 'a', 'b')


def test_class_names_where_one_side_knows_none():
    check_class_names(None, ['cat'], 'a', 'b')
    check_class_names(['cat'], None, 'a', 'b')
    check_class_names([], [], 'a', 'b')
    fails(lambda: check_class_names(['x'], [], 'our.json', 'their.json'), 'their.json: class 0 is missing.*our.json')


# ---------------------------------------------------------------- what pictures show

@pytest.mark.parametrize('labels, count, chosen', [
    ([0, 0, 0, 1, 1, 2], 3, [0, 3, 5]), ([0, 0, 0, 1, 1, 2], 5, [0, 1, 3, 4, 5]), ([0, 0, 0, 1, 1, 2], 9, range(6)),
    ([5, 1, 5, 1, 9], 2, [1, 4]), ([3, 3, 3], 2, [0, 1]), (None, 3, [0, 2, 5]), (None, 1, [0]), ([7] * 6, 1, [0])])
def test_images_to_show_are_of_as_many_classes_as_can_be(labels, count, chosen):
    found = spread(None if labels is None else np.array(labels), len(labels or range(6)), count)
    assert found.dtype == np.int64 and found.tolist() == list(chosen)


def test_labels_have_the_names_of_their_classes():
    assert name_labels(np.array([1, 0, 2]), ['ant', 'bee']) == ['bee', 'ant', '2']
    assert name_labels(np.array([1]), None) == ['1'] and name_labels(None, ['ant']) == []
