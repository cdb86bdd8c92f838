"""Parquet files: columns, labels and class names that are refused, and files that are no one set."""
import sys

import pytest

from fileio.labels import MAX_CLASS
from helpers import encoded, fails, noise, write_parquet
from image_data.parquet_files import split_of
from image_data.sources import open_source

pa = pytest.importorskip('pyarrow')
IMAGE = [{'bytes': b'x', 'path': 'a'}]


def write(path, columns):
    from pyarrow import parquet
    parquet.write_table(pa.table(columns), path)
    return path


def rows(count, first=0):
    return [(encoded(noise(first + i)), i % 3) for i in range(count)]


@pytest.mark.parametrize('columns, said', [
    ({'img': IMAGE, 'label': [1]}, "expected columns 'image'.*found img, label"),
    ({'image': IMAGE, 'fine_label': [1]}, 'expected columns.*found image, fine_label'),
    ({'image': IMAGE, 'label': ['cat']}, "column 'label' is of type string"),
    ({'image': IMAGE, 'label': [1.0]}, "column 'label' is of type double"),
    ({'image': IMAGE, 'label': [True]}, "column 'label' is of type bool"),
    ({'image': IMAGE, 'label': [None]}, "column 'label' is of type null"),
    ({'image': IMAGE, 'label': [[1]]}, "column 'label' is of type list"),
    ({'image': IMAGE, 'label': pa.array(['a']).dictionary_encode()}, "column 'label' is of type dictionary"),
    ({'image': ['a.png'], 'label': [1]}, "column 'image' is of type string"),
    ({'image': [{'path': 'a.png'}], 'label': [1]}, "column 'image' is of type struct"),
    ({'image': [{'bytes': 'text'}], 'label': [1]}, "column 'image' is of type struct"),
    ({'image': IMAGE, 'label': [-1]}, 'empty or negative'),
    ({'image': IMAGE * 2, 'label': [1, None]}, 'empty or negative'),
    ({'image': IMAGE, 'label': [MAX_CLASS + 1]}, f'class {MAX_CLASS + 1}, which is not from 0 to {MAX_CLASS:,}'),
    ({'image': IMAGE, 'label': pa.array([2 ** 64 - 1], pa.uint64())}, 'class 18446744073709551615'),
    ({'image': pa.array([], pa.struct([('bytes', pa.binary())])), 'label': pa.array([], pa.int64())}, 'no images')])
def test_columns_that_are_no_images_and_labels(columns, said, tmp_path):
    fails(lambda: open_source(write(tmp_path / 'a.parquet', columns)), 'a.parquet: ', said)


@pytest.mark.parametrize('kind', [pa.int8(), pa.uint8(), pa.int32(), pa.uint64()])
def test_integers_of_every_width(kind, tmp_path):
    source = open_source(write(tmp_path / 'a.parquet', {'image': IMAGE * 2, 'label': pa.array([5, 0], kind)}))
    assert source.labels.tolist() == [5, 0] and source.read(0) == b'x'


@pytest.mark.parametrize('kind', [pa.binary(), pa.large_binary()])
def test_images_may_be_plain_bytes(kind, tmp_path):
    source = open_source(write(tmp_path / 'a.parquet', {'image': pa.array([b'abc'], kind), 'label': [0]}))
    assert source.read(0) == b'abc' and source.encoded_bytes() == 3


def test_files_that_are_no_parquet(tmp_path, monkeypatch):
    path = tmp_path / 'a.parquet'
    path.write_bytes(b'PAR1 junk')
    fails(lambda: open_source(path), 'a.parquet: no readable parquet')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    fails(lambda: open_source(path), 'pip install -r requirements-formats.txt')


def test_row_groups_are_read_as_they_are_asked_for(tmp_path):
    expected = rows(10)
    source = open_source(write_parquet(tmp_path / 'a.parquet', expected, row_group_size=3))
    for i in (0, 9, 4, 4, 1):
        assert source.read(i) == expected[i][0]
    assert source.encoded_bytes() == sum(len(data) for data, _ in expected)


# ---------------------------------------------------------------- class names

@pytest.mark.parametrize('other', [['z', 'y', 'x'], ['x', 'y'], ['x', 'y', 'z', 'w'], ['x', 'y', 'Z'],
                                   ['x', 'y', 'z ']])
def test_class_names_that_conflict(other, tmp_path):
    write_parquet(tmp_path / 'a.parquet', rows(2), ['x', 'y', 'z'])
    write_parquet(tmp_path / 'b.parquet', rows(2), other)
    for spec in (tmp_path, f'{tmp_path}/*.parquet', f'{tmp_path}/a.parquet,{tmp_path}/b.parquet'):
        fails(lambda: open_source(spec), 'b.parquet: class [0-3] is', 'in .*a.parquet it is')


def test_class_names_of_another_unicode_form_conflict(tmp_path):
    write_parquet(tmp_path / 'a.parquet', rows(1), ['caf\u00e9'])
    write_parquet(tmp_path / 'b.parquet', rows(1), ['cafe\u0301'])
    fails(lambda: open_source(tmp_path), r"class 0 is 'cafe\\u0301'")


def test_class_names_that_agree_or_lack(tmp_path, capsys):
    write_parquet(tmp_path / 'a.parquet', rows(2))
    write_parquet(tmp_path / 'b.parquet', rows(3), ['x', 'y', 'z'])
    write_parquet(tmp_path / 'c.parquet', rows(3), ['x', 'y', 'z'])
    source = open_source(tmp_path)
    assert source.classes == ['x', 'y', 'z'] and source.labels.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert 'note: ' in capsys.readouterr().out


def test_a_label_beyond_the_class_names(tmp_path):
    write_parquet(tmp_path / 'a.parquet', rows(3), ['x', 'y'])
    fails(lambda: open_source(tmp_path), "a.parquet: column 'label' has class 2, which is not from 0 to 1")


# ---------------------------------------------------------------- several files in a folder

@pytest.mark.parametrize('name, split', [
    ('train-00000-of-00005.parquet', 'train'), ('test-00000-of-00001.parquet', 'test'), ('Validation.parquet',
                                                                                       'validation'),
    ('val_3.parquet', 'validation'), ('cifar10-train.parquet', 'train'), ('train2017.parquet', 'train'),
    ('extra-00000-of-00002.parquet', 'extra'), ('0000.parquet', None), ('latest.parquet', None),
    ('trained.parquet', None)])
def test_splits_by_name(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize('names', [('train-0.parquet', 'test-0.parquet'), ('train.parquet', 'validation.parquet'),
                                   ('a-val.parquet', 'a-train.parquet', 'x.parquet'),
                                   ('train-00000-of-00001.parquet', 'extra-00000-of-00001.parquet')])
def test_several_splits_in_one_folder(names, tmp_path):
    for name in names:
        write_parquet(tmp_path / name, rows(1))
    fails(lambda: open_source(tmp_path), 'parquet files of several splits', r"as a glob: '.*\*.*parquet'")
    assert len(open_source(f'{tmp_path}/*.parquet')) == len(names)  # asked for


def test_several_files_of_one_split_are_one_set_and_said_to_be(tmp_path, capsys):
    for i in range(3):
        write_parquet(tmp_path / f'train-{i:05d}-of-00003.parquet', rows(1))
    (tmp_path / '._train-00000-of-00003.parquet').write_bytes(b'x')
    assert len(open_source(tmp_path)) == 3
    assert '3 parquet files are read as one set (train-00000' in capsys.readouterr().out


def test_parquet_beside_class_folders(tmp_path):
    write_parquet(tmp_path / 'metadata.parquet', rows(1))
    (tmp_path / 'logs').mkdir()
    (tmp_path / 'logs' / 'x.txt').write_text('')
    assert len(open_source(tmp_path)) == 1
    (tmp_path / 'cat').mkdir()
    noise(0).save(tmp_path / 'cat' / '0.png')
    fails(lambda: open_source(tmp_path), 'holds parquet files .metadata.parquet. and class folders',
          r'glob, .*\*.parquet')
