"""Pictures of a command line, without labels."""
import os

import numpy as np
import pytest

from helpers import encoded, fails, noise, save_image, tar_samples, write_parquet, write_tar
from image_data.decoding import IgnoredFiles
from image_data.pictures import open_pictures
from image_data.sources import load_images
from image_data.tar_shards import read_tar


def names(*arguments):
    return [name for source in open_pictures(list(map(str, arguments))) for name in source.names]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with pictures at its top, in class folders and deeper."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(('b.png', 'cat/a.jpg', 'cat/deep/er/c.png', 'dog/a.png')):
        save_image(tmp_path / 'photos' / name, i)
    (tmp_path / 'photos' / 'notes.md').write_text('x')
    return tmp_path


def test_a_folder_is_searched_with_all_below_it(here, capsys):
    os.symlink(here / 'photos', here / 'photos' / 'cat' / 'again')
    (here / 'photos' / '.hidden').mkdir()
    save_image(here / 'photos' / '.hidden' / 'x.png', 0)
    assert names('photos') == ['photos/b.png', 'photos/cat/a.jpg', 'photos/cat/deep/er/c.png', 'photos/dog/a.png']
    said = capsys.readouterr().out
    assert 'kinds that are not read left out: 1 (first: notes.md)' in said and 'links to folders' in said
    assert names(here / 'photos' / 'cat')[0] == str(here / 'photos' / 'cat' / 'a.jpg')
    (here / 'empty' / 'below').mkdir(parents=True)
    fails(lambda: names('empty'), 'empty: no pictures in it, nor in a folder below it')


def test_pictures_folders_and_lists_are_one_source_in_their_order(here):
    (here / 'lists').mkdir()
    save_image(here / 'my photo 3.png', 9)
    (here / 'lists' / 'list.txt').write_text('../photos/b.png\n\n  ../photos/dog/a.png\t4\n../my photo 3.png\n'
                                             '../my photo 3.png 12\n../photos/b.png \tgolden retriever\n/abs/x y\n')
    source, = open_pictures(['photos/dog', 'photos/b.png', 'lists/list.txt', './photos/cat/a.jpg'])
    listed = ['../photos/b.png', '../photos/dog/a.png', '../my photo 3.png', '../my photo 3.png', '../photos/b.png']
    assert source.names == ['photos/dog/a.png', 'photos/b.png', *(f'lists/{name}' for name in listed), '/abs/x y',
                            'photos/cat/a.jpg']
    batch = next(load_images(source, [range(9)], 8, skip_bad=True))
    assert batch.indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 8] and batch.skipped == [(7, 'No such file or directory')]
    assert len(source) == 9 and (source.labels == -1).all()


def test_a_glob_that_the_shell_left_is_matched(here):
    assert names('photos/*/a.*') == ['photos/cat/a.jpg', 'photos/dog/a.png']
    save_image(here / 'a, b.png', 0)
    assert names('a, b.png') == ['a, b.png']


def test_tars_with_labels_and_without(here):
    write_tar(here / 'a.tar', tar_samples(3))
    pair = [(name, encoded(noise(i))) for i, name in enumerate(('x/1.input.png', 'x/1.png', 'x/v2.0 final.jpg'))]
    write_tar(here / 'b.tar', [*pair, ('x/1.json', b'{"caption": "no label"}'), ('x/1.cls', b'dog'), ('x/n', b'')])
    first, second = open_pictures(['a.tar', 'b.tar', 'photos/b.png'])
    assert first.names == ['a.tar/0000.jpg', 'a.tar/0001.jpg', 'a.tar/0002.jpg', 'b.tar/x/1.input.png',
                           'b.tar/x/1.png', 'b.tar/x/v2.0 final.jpg']
    assert second.names == ['photos/b.png'] and first.data_path == 'a.tar b.tar'
    batch = next(load_images(first, [range(6)], 8))
    assert len(batch.indices) == 6 and (first.labels == -1).all()
    assert names('?.tar') == first.names
    ignored = IgnoredFiles()
    list(read_tar(here / 'b.tar', ignored, labeled=False))
    assert ignored.first == {IgnoredFiles.OTHER: 'b.tar/x/n'}
    write_tar(here / 'none.tar', [('x.txt', b'x')])
    fails(lambda: names('none.tar'), r'none.tar: no images in it \(first member: none.tar/x.txt\)')


def test_parquet_files_with_labels_and_without(here):
    pytest.importorskip('pyarrow')
    import pyarrow as pa
    from pyarrow import parquet
    rows = [(encoded(noise(i)), i) for i in range(3)]
    write_parquet(here / 'a.parquet', rows, ['x', 'y', 'z'])
    parquet.write_table(pa.table({'image': [data for data, _ in rows]}), here / 'b.parquet')
    source, = open_pictures(['a.parquet', 'b.parquet'])
    assert source.names == [f'{name}.parquet/{row}' for name in 'ab' for row in range(3)] and source.classes is None
    pixels = next(load_images(source, [range(6)], 8)).pixels
    assert np.array_equal(pixels[:3], pixels[3:]) and (source.labels == -1).all()
    parquet.write_table(pa.table({'picture': [b'']}), here / 'c.parquet')
    fails(lambda: names('c.parquet'), r"expected columns 'image' \(struct of bytes and path\), found picture")


@pytest.mark.parametrize('argument, content, message', [
    ('none.jpg', None, 'none.jpg: no such file or folder'), ('none', None, 'none: no such file or folder'),
    ('none.txt', None, 'none.txt: No such file'), ('x*.png', None, r'x\*.png: no file matches'),
    ('a.txt', b' \n\n', 'a.txt: no pictures in the list'), ('a.txt', b'a\0b.png', 'a.txt: is no list of paths'),
    ('a.txt', b'\xff\xfe', 'a.txt: no UTF-8 text'), ('a.tar', b'x', 'a.tar: no tar file')])
def test_mistakes_are_one_line(argument, content, message, here):
    if content is not None:
        (here / argument).write_bytes(content)
    fails(lambda: names('photos/b.png', argument), message)


def test_what_messages_call_a_source(here):
    for words, name in ((['photos'], 'photos'), (['photos/b.png'], 'pictures'), (['photos', 'photos/cat'],
                        'photos photos/cat'), (['photos/' + './' * 60 + 'b.png'], 'pictures')):
        assert open_pictures(words)[0].data_path == name
