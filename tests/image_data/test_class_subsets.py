"""Subsets of a model's classes: ImageNet's, files, and images that do or do not have them."""
import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo

from helpers import fails
from image_data import class_subsets
from image_data.class_subsets import OnlyClasses, check_classes, map_labels, match_classes, read_classes
from image_data.sources import Source

SYNSETS = ImageNetInfo('imagenet-1k').label_names()


def images_of(classes, labels=None):
    """A source that has labels and class names, and no images; without labels, one image a class."""
    source = Source()
    source.data_path = 'images'
    source.labels_from = 'somewhere'
    source.classes = classes
    source.labels = np.arange(len(classes)) if labels is None else np.array(labels)
    return source


# ---------------------------------------------------------------- which classes

@pytest.mark.parametrize('value, count, first, last', [
    ('imagenet-r', 200, [1, 2, 4, 6, 8], [980, 981, 983, 988]), ('imagenet-a', 200, [6, 11, 13, 15, 17], [987, 988]),
    ('imagenet', 1000, [0, 1, 2], [998, 999])])
def test_the_subsets_of_imagenet(value, count, first, last):
    subset = read_classes(value, None, 1000, 'vit.ckpt')
    assert len(subset) == count == len(set(subset.indices)) and subset.indices == sorted(subset.indices)
    assert subset.indices[:len(first)] == first and set(last) <= set(subset.indices[-20:])
    assert subset.names == [SYNSETS[index] for index in subset.indices]
    by_name = read_classes(value, SYNSETS[::-1], 1000, 'vit.ckpt')  # a model that has them in another order
    assert by_name.names == subset.names and by_name.indices == [999 - index for index in subset.indices]
    source = images_of(subset.names)
    assert map_labels(subset, source).tolist() == subset.indices
    assert map_labels(by_name, source).tolist() == by_name.indices


def test_files_hold_names_or_numbers(tmp_path):
    path = str(tmp_path / 'classes.txt')
    names = ['cat', 'dog', '7', 'hen']

    def read(text, names=names, count=4):
        (tmp_path / 'classes.txt').write_bytes(text)
        return read_classes(path, names, count, 'vit.ckpt')
    subset = read(b'\xef\xbb\xbfhen\r\n\r\n 1 \r\n7\r\n')  # '7' is a name
    assert (subset.indices, subset.names) == ([3, 1, 2], ['hen', 'dog', '7'])
    assert read(b'2\n0\n', None).names is None and read(b'2\n0\n', list('0123')).names is None
    assert read(f'{SYNSETS[5]}\n9\n'.encode(), None, 1000).indices == [5, 9]
    for text, message in ((b'cat\nfox', "vit.ckpt has no class 'fox', only 4 others"), (b'4', "no class '4'"),
                          (b'-1', "no class '-1'"), (b'9' * 5000, 'no class'), (b'cat\n0', "class '0' is in it twice"),
                          (b' \n', 'no classes in it'), (b'\xff', 'classes.txt: no UTF-8 text')):
        fails(lambda: read(text), message)
    fails(lambda: read(b'cat', None), "no class 'cat', only 4 without names")
    fails(lambda: read_classes(str(tmp_path), None, 4, 'vit.ckpt'), 'Is a directory')
    fails(lambda: read_classes('imagenet-r', names, 4, 'vit.ckpt'), "vit.ckpt has no class 'n01443537'")


def test_a_timm_without_the_table_is_one_line(monkeypatch):
    monkeypatch.setitem(class_subsets.KNOWN, 'imagenet-r', 'none.txt')
    fails(lambda: read_classes('imagenet-r', None, 1000, 'vit.ckpt'), 'imagenet-r: timm .* has no none.txt')


# ---------------------------------------------------------------- their images

def test_labels_are_mapped_by_name_or_else_in_order(tmp_path, capsys):
    (tmp_path / 'c').write_text('hen\ncat\n')
    subset = read_classes(str(tmp_path / 'c'), ['cat', 'dog', 'fox', 'hen'], 4, 'vit.ckpt')
    assert map_labels(subset, images_of(['cat', 'hen'], [0, 1, 1, 0])).tolist() == [0, 3, 3, 0]
    assert not capsys.readouterr().out
    for classes in (None, ['0', '1'], ['00', '01']):  # which do not tell
        assert map_labels(subset, images_of(classes, [0, 1, 1])).tolist() == [3, 0, 0]
        assert 'note: images: its labels are taken as the classes of' in capsys.readouterr().out
    for classes, labels, message in (
            (['cat', 'dog'], None, "1 are missing .first: 'hen'. and 1 are not of it .first: 'dog'"),
            (['cat'], None, 'the 2 of --classes .*: 1 are missing'), (['cat', 'dog', 'hen'], None, ': 1 are not of it'),
            (['0', '1', '10'], None, '2 are missing'), (None, [0, 2], 'images: 3 classes .* is 2: number the labels'),
            (None, [0, 0], '1 classes'), (['0', '1', '2'], [0, 1], '3 classes')):
        fails(lambda: map_labels(subset, images_of(classes, labels)), message)


def test_images_are_matched_with_all_classes_or_with_some(capsys):
    source = images_of(['cat', 'dog'], [1, 0])
    labels, count, chosen = match_classes(source, ['cat', 'dog', 'hen'], 3, 'vit.ckpt')
    assert labels is source.labels and count == 2 and chosen is None
    assert 'has 2 classes and the model 3' in capsys.readouterr().out
    sketch = images_of(SYNSETS)
    labels, count, chosen = match_classes(sketch, None, 1000, 'vit.ckpt', 'imagenet')
    assert labels.tolist() == chosen == list(range(1000)) and count == 1000
    fails(lambda: match_classes(images_of(SYNSETS[:200]), None, 1000, 'vit.ckpt', 'imagenet-r'), 'are missing')
    fails(lambda: check_classes(source, None, 1, 'vit.ckpt'), 'images: 2 classes, but the model has 1')


# ---------------------------------------------------------------- the model

def test_a_model_chooses_only_among_the_classes():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 10)
    x = torch.randn(64, 5)
    chosen = [7, 2, 4]
    logits = OnlyClasses(model, chosen, 10)(x)
    assert set(logits.argmax(1).tolist()) == set(chosen)
    torch.testing.assert_close(logits[:, chosen].softmax(1), model(x)[:, chosen].softmax(1))
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, torch.full((64,), 2)),
                               torch.nn.functional.cross_entropy(model(x)[:, chosen], torch.full((64,), 1)))
