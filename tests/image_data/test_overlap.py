"""Validation images that are training images, in every form that images come in."""
import os
import shutil

import pytest

import main_pixels
from helpers import as_list, as_parquet, as_tars, call, save_image, write_parquet
from image_data.overlap import note_shared_images
from image_data.sources import open_source

SMALL = ['--device', 'cpu', '--model', 'deit_tiny_patch16_224', '--model-kwargs', 'depth=1', 'embed_dim=32',
         'num_heads=2', '--input-size', 32, '--batch-size', 6, '--num-workers', 0, '--epochs', 1, '--warmup-epochs', 0]


@pytest.fixture
def data(tmp_path):
    """Class folders class0 to class3 of ten images each, whose names are alike."""
    for seed in range(40):
        save_image(tmp_path / 'data' / f'class{seed // 10}' / f'{seed % 10}.png', seed)
    return tmp_path / 'data'


def noted(train, val, capsys):
    """What is said about two sets, '' for nothing."""
    capsys.readouterr()
    sources = open_source(train), open_source(val)
    capsys.readouterr()
    note_shared_images(*sources)
    return capsys.readouterr().out


@pytest.mark.parametrize('form', [as_list, as_tars, as_parquet])
def test_the_same_files_by_another_spelling(form, data, tmp_path, capsys, monkeypatch):
    (tmp_path / 'here').mkdir()
    path = form(data, tmp_path / 'here')
    said = f'note: {path}: 40 of its 40 images are training images of {path} too, such as '
    assert noted(path, path, capsys).startswith(said)
    (tmp_path / 'link').symlink_to(tmp_path)
    other = str(path).replace(str(tmp_path), str(tmp_path / 'link'))
    assert ' 40 of its 40 images ' in noted(path, other, capsys)
    monkeypatch.chdir(tmp_path.parent)
    other = os.path.join('.', str(path).replace(str(tmp_path.parent) + os.sep, ''))
    assert ' 40 of its 40 images ' in noted(other, path, capsys)


def test_a_part_of_them_links_and_another_form(data, tmp_path, capsys):
    listed = as_list(data, tmp_path)
    assert '40 of its 40 images' in noted(listed, data, capsys) and '40 of its 40' in noted(data, listed, capsys)
    for label in range(4):
        save_image(tmp_path / 'val' / f'class{label}' / 'new.png', 100 + label)
    assert noted(data, tmp_path / 'val', capsys) == ''
    os.link(data / 'class1' / '3.png', tmp_path / 'val' / 'class1' / 'other.png')
    (tmp_path / 'val' / 'class2' / 'x.png').symlink_to(data / 'class0' / '0.png')
    assert noted(data, tmp_path / 'val', capsys) == (
        f'note: {tmp_path / "val"}: 2 of its 6 images are training images of {data} too, such as class1/other.png: '
        'results on these say nothing of other images\n')


def test_copies(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / 'copy')
    said = noted(data, tmp_path / 'copy', capsys)
    assert ': some of its 40 images are training images ' in said
    shutil.copytree(data / 'class3', tmp_path / 'part' / 'class3')
    for label in range(3):
        save_image(tmp_path / 'part' / f'class{label}' / '0.png', 200 + label)
    assert 'such as class3/' in noted(data, tmp_path / 'part', capsys)
    for name, form in (('tars', as_tars), ('parquet', as_parquet)):
        for folder in (tmp_path / name, tmp_path / f'{name} copy'):
            folder.mkdir()
        path = str(form(data, tmp_path / name))
        shutil.copytree(tmp_path / name, tmp_path / f'{name} copy', dirs_exist_ok=True)
        copy = path.replace(str(tmp_path / name), str(tmp_path / f'{name} copy'))
        assert 'some of its 40 images' in noted(path, copy, capsys)


def test_other_images_of_the_same_names_and_sizes_are_no_copies(data, tmp_path, capsys):
    for seed in range(40):
        save_image(tmp_path / 'bmp' / f'class{seed // 10}' / f'{seed % 10}.bmp', seed)
        save_image(tmp_path / 'val' / f'class{seed // 10}' / f'{seed % 10}.bmp', seed + 40)
    assert noted(tmp_path / 'bmp', tmp_path / 'val', capsys) == ''
    (tmp_path / 'val' / 'class0' / '0.bmp').unlink()
    (tmp_path / 'val' / 'class0' / '0.bmp').symlink_to(tmp_path / 'gone.bmp')
    assert noted(tmp_path / 'bmp', tmp_path / 'val', capsys) == ''
    first = write_parquet(tmp_path / 'a.parquet', [((data / 'class0' / '0.png').read_bytes(), 0)])
    assert noted(data, first, capsys) == ''


def test_a_training_says_it_once(data, capsys):
    call(main_pixels, *SMALL, '--train-path', data, '--val-path', f'{data}/')
    assert capsys.readouterr().out.count(' are training images of ') == 1
    call(main_pixels, *SMALL, '--train-path', data, '--no-eval')
    assert 'training images of' not in capsys.readouterr().out
