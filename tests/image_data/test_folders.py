"""Class folders: the order of ImageFolder; hidden names, other kinds, links and pipes."""
import os
import socket

import pytest
from torchvision.datasets import ImageFolder

from helpers import fails, save_image
from image_data.decoding import IgnoredFiles
from image_data.folders import holds_class_folders, read_folder, read_regular_file


def read(root):
    """(classes, names, labels) of a folder, and what was left out by reason."""
    ignored = IgnoredFiles()
    return *read_folder(root, ignored), ignored.counts


def make(root, *names):
    """Images (or other files) in a folder; returns it."""
    for seed, name in enumerate(names):
        if name.endswith(('.png', '.PNG', '.jpg', '.bmp', '.gif')):
            save_image(root / name, seed) if name[-4:] != '.PNG' else (root / name).write_bytes(b'x')
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b'x')
    return root


def test_the_order_is_that_of_torchvision(tmp_path):
    make(tmp_path, 'b/2.png', 'b/10.png', 'B/1.png', 'a-b/1.png', 'a/z.png', 'a/sub/1.png', 'a/sub-1/1.png',
         'a/sub/deep/0.jpg', 'a/Z.jpg', 'é/1.png', 'a b/1.png', 'top.txt', 'a/é.png', 'a/s/1.png', '10/1.png',
         '9/1.png', 'b/3.PNG')
    os.symlink(make(tmp_path.parent / 'elsewhere', 'x/1.png', 'x/y/2.png', '0.png'), tmp_path / 'linked')
    os.symlink(tmp_path.parent / 'elsewhere' / 'x', tmp_path / 'b' / 'more')
    theirs = ImageFolder(tmp_path)
    classes, names, labels, ignored = read(tmp_path)
    assert classes == theirs.classes and labels == theirs.targets and not ignored
    assert [os.path.join(tmp_path, name) for name in names] == [path for path, _ in theirs.samples]


def test_hidden_names_are_no_classes_and_no_images(tmp_path):
    make(tmp_path, 'a/0.png', 'b/0.png', '.ipynb_checkpoints/0-checkpoint.png', 'a/.ipynb_checkpoints/0.png',
         '__MACOSX/a/._0.png', 'a/._0.png', 'b/.DS_Store', '.DS_Store', '.x.parts/000000.npz', 'b/@eaDir/0.png',
         'a/.hidden.png')
    classes, names, labels, ignored = read(tmp_path)
    assert (classes, names, labels) == (['a', 'b'], ['a/0.png', 'b/0.png'], [0, 1])
    assert ignored == {IgnoredFiles.HIDDEN: 9}


def test_other_kinds_are_read_where_pil_reads_them_and_else_counted(tmp_path):
    make(tmp_path, 'a/0.png', 'a/1.gif', 'a/2.bmp', 'b/0.heic', 'b/boxes.txt', 'b/0.png', 'loose.png', 'README.md')
    _, names, _, ignored = read(tmp_path)
    assert names == ['a/0.png', 'a/1.gif', 'a/2.bmp', 'b/0.png']
    assert ignored == {IgnoredFiles.OTHER: 2, IgnoredFiles.LOOSE: 1}


@pytest.mark.parametrize('files, message', [
    ((), 'in: no class folders of images in it$'),
    (('a.png', 'b.png', 'c.jpg'), r'in: no class folders.*files \(.png, .jpg\).*a folder for each class'),
    (('.a/0.png',), 'in: no class folders'),
    (('a/0.png', 'b/x.txt', 'b/y.txt', 'b/z.pdf'), r'the class folder b holds no images \(it has .txt, .pdf files\)'),
    (('a/0.png', 'b/.DS_Store'), 'the class folder b holds no images, it is empty; remove it')])
def test_folders_without_images_are_named_with_what_is_in_them(files, message, tmp_path):
    (tmp_path / 'in').mkdir()
    make(tmp_path / 'in', *files)
    fails(lambda: read(tmp_path / 'in'), message)


def test_an_empty_class_folder_is_named(tmp_path):
    for name in ('cat', 'dog'):
        (tmp_path / 'one' / name).mkdir(parents=True)
    fails(lambda: read(tmp_path / 'one'), 'one: the class folder cat holds no images, it is empty; remove it')
    make(tmp_path, 'one/cat/0.png')
    fails(lambda: read(tmp_path / 'one'), 'the class folder dog holds no images, it is empty')


@pytest.mark.parametrize('link, target', [('a/loop', '.'), ('a/loop', '..'), ('a/loop', '../..'), ('loop', '.'),
                                          ('loop', '..'), ('a/to-b', '../b'), ('b-again', 'b'), ('a/sub/up', '..'),
                                          ('a/sub/loop', '.'), ('a/root', '/'), ('a/same', 'sub')])
def test_links_to_what_is_read_already_are_not_followed(link, target, tmp_path):
    make(tmp_path / 'in', 'a/0.png', 'a/sub/1.png', 'b/2.png')
    make(tmp_path, 'val/a/3.png')  # beside it: no part of the set
    os.symlink(target, tmp_path / 'in' / link)
    classes, names, _, ignored = read(tmp_path / 'in')
    assert (classes, names) == (['a', 'b'], ['a/0.png', 'a/sub/1.png', 'b/2.png'])
    assert ignored == {IgnoredFiles.LINK: 1}


def test_loops_outside_of_the_folder_end_too(tmp_path):
    make(tmp_path / 'store', 'x/0.png')
    os.symlink('..', tmp_path / 'store' / 'x' / 'up')
    make(tmp_path / 'in', 'a/1.png')
    os.symlink(tmp_path / 'store', tmp_path / 'in' / 'a' / 'more')
    os.symlink(tmp_path / 'store', tmp_path / 'in' / 'a' / 'twice')
    _, names, _, ignored = read(tmp_path / 'in')
    assert names == ['a/1.png', 'a/more/x/0.png'] and ignored == {IgnoredFiles.LINK: 2}


def test_links_to_files_and_to_hidden_stores_are_followed(tmp_path):
    make(tmp_path / 'in', '.store/a/0.png', '.store/1.png', 'b/2.png')
    os.symlink('.store/a', tmp_path / 'in' / 'a')
    os.symlink('../.store/1.png', tmp_path / 'in' / 'b' / '1.png')
    classes, names, _, _ = read(tmp_path / 'in')
    assert (classes, names) == (['a', 'b'], ['a/0.png', 'b/1.png', 'b/2.png'])


def test_a_link_to_nothing_is_an_image_that_cannot_be_read_or_a_class_that_lacks(tmp_path):
    make(tmp_path / 'in', 'a/0.png', 'b/1.png')
    os.symlink('gone.png', tmp_path / 'in' / 'a' / '1.png')
    os.symlink('2.png', tmp_path / 'in' / 'a' / '2.png')  # to itself
    assert read(tmp_path / 'in')[1] == ['a/0.png', 'a/1.png', 'a/2.png', 'b/1.png']
    os.symlink('/mnt/gone', tmp_path / 'in' / 'c')
    fails(lambda: read(tmp_path / 'in'), 'in: c is a link to nothing')


def test_pipes_and_sockets_are_no_images(tmp_path):
    make(tmp_path, 'a/0.png')
    os.mkfifo(tmp_path / 'a' / '1.png')
    os.mkfifo(tmp_path / 'a' / 'pipe')
    os.symlink('1.png', tmp_path / 'a' / '2.png')
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / 'a' / '3.png'))
    _, names, _, ignored = read(tmp_path)
    assert names == ['a/0.png'] and ignored == {IgnoredFiles.SPECIAL: 3, IgnoredFiles.OTHER: 1}


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / '1.png')
    for path in (tmp_path / '1.png', tmp_path, tmp_path / 'none.png'):
        with pytest.raises(OSError):
            read_regular_file(path)
    (tmp_path / 'a.png').write_bytes(b'x')
    assert read_regular_file(tmp_path / 'a.png') == b'x'


def test_a_folder_that_cannot_be_read_stops_the_run(tmp_path, monkeypatch):
    make(tmp_path, 'a/0.png', 'b/0.png')
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == 'b':
            raise PermissionError(13, 'Permission denied')
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refusing)
    fails(lambda: read(tmp_path), 'b: Permission denied')


def test_whether_there_are_class_folders(tmp_path):
    assert not holds_class_folders(make(tmp_path / 'x', 'a.png', 'logs/x.txt', '.b/0.png'))
    assert holds_class_folders(make(tmp_path / 'x', 'logs/0.png'))
