"""Sources of images, whole: every kind gives the same; and loading them in worker processes."""
import os
import re

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from fileio.labels import MAX_CLASS
from helpers import (as_list, as_parquet, as_tars, encoded, fails, held, noise, published_transform, run_python,
                     samples, save_image, tar_samples, write_parquet, write_tar)
from image_data import sources
from image_data.decoding import decode_image
from image_data.sources import load_images, open_source

SIZE = 16


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Four class folders with 45 images."""
    root = tmp_path_factory.mktemp('images')
    for i in range(45):
        save_image(root / f'class-{i % 4}' / f'{i:02d}.png', i)
    return root


# ---------------------------------------------------------------- kinds of sources

KINDS = {
    'tabs': as_list, 'spaces': lambda *args: as_list(*args, ' '), 'bom': lambda *args: as_list(*args, start='\ufeff'),
    'windows': lambda *args: as_list(*args, newline='\r\n'), 'cls': as_tars,
    'json': lambda *args: as_tars(*args, 'json'), 'parquet': as_parquet}


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_gives_the_same_images_and_labels(kind, data, tmp_path):
    folder = tmp_path / 'in put'
    folder.mkdir()
    source = open_source(KINDS[kind](data, folder))
    whole = open_source(data)
    assert len(source) == 45 == len(set(source.names)) and np.array_equal(source.labels, whole.labels)
    assert all(source.read(i) == whole.read(i) for i in range(45))
    assert source.encoded_bytes() == whole.encoded_bytes() == sum(os.path.getsize(path) for path, _ in samples(data))
    assert source.classes == (list('abcd') if kind == 'parquet' else None)
    assert source.digest() != whole.digest() and source.digest() == open_source(source.data_path).digest()
    assert [path.name for path in tmp_path.iterdir()] == ['in put']  # nothing was extracted


def test_folders_are_read_as_torchvision_reads_them(data):
    theirs = ImageFolder(data, published_transform(SIZE))
    source = open_source(data)
    assert source.classes == theirs.classes and source.labels.tolist() == theirs.targets
    batch, = load_images(source, [range(45)], SIZE)
    expected = torch.stack([image for image, _ in theirs])
    assert torch.equal(batch.pixels / torch.full((1,), 255.), expected)


def test_a_digest_tells_names_and_labels(data, tmp_path):
    digests = set()
    for text in ('a.png 1\nb.png 2', 'a.png 2\nb.png 1', 'b.png 2\na.png 1', 'a.png 1'):
        (tmp_path / 'l.txt').write_text(text)
        digests.add(open_source(tmp_path / 'l.txt').digest())
    assert len(digests) == 4


# ---------------------------------------------------------------- what is not a source

def test_bad_inputs_get_one_line(tmp_path):
    fails(lambda: open_source(tmp_path / 'none'), 'none: no such file or folder')
    fails(lambda: open_source(tmp_path / ('x' * 300)), 'no such file or folder')
    fails(lambda: open_source(f'{tmp_path}/*.tar'), r'\*.tar: no file matches')
    (tmp_path / 'empty').mkdir()
    fails(lambda: open_source(tmp_path / 'empty'), 'empty: no class folders')
    (tmp_path / 'half' / 'dogs').mkdir(parents=True)
    save_image(tmp_path / 'half' / 'cats' / 'a.png', 0)
    fails(lambda: open_source(tmp_path / 'half'), 'half:.*dogs')
    for name in ('a.zip', 'a.tar.gz', 'a'):
        (tmp_path / name).write_bytes(b'')
        fails(lambda: open_source(tmp_path / name), f'{name}: images come from')


@pytest.mark.parametrize('text, said', [
    (b'', 'no images'), (b'\n \n', 'no images'), (b'a.png 1\nb.png\n', "line 2 is not 'path label'"),
    (b'a.png -1', 'line 1'), (b'a.png cat', 'line 1'), (b'a.png\t', 'line 1'), (b'7', 'line 1'),
    (b'a.png 1.0', 'line 1'),
    (b'a.png 999999999', f'line 1: class 999999999 is not from 0 to {MAX_CLASS:,}'),
    (b'a.png 1\nb.png %d' % (MAX_CLASS + 1), f'line 2: class {MAX_CLASS + 1}'), (b'a.png ' + b'9' * 5000, 'line 1'),
    (b'a.png \xd9\xa1', 'line 1'), (b'\xe9.png 1', 'no UTF-8 text'), ('\ufeffa.png 1'.encode('utf-16'), 'no UTF-8')])
def test_bad_lists_get_one_line(text, said, tmp_path):
    (tmp_path / 'list.txt').write_bytes(text)
    fails(lambda: open_source(tmp_path / 'list.txt'), 'list.txt: ', said)


def test_lists(tmp_path):
    (tmp_path / 'list.txt').write_bytes('\ufeffa b.png 1\n/c\u2028d.png 2\r\ne.png\t1000000\n'.encode())
    source = open_source(tmp_path / 'list.txt')
    assert source.names == ['a b.png', '/c\u2028d.png', 'e.png'] and source.labels.tolist() == [1, 2, MAX_CLASS]
    fails(lambda: source.encoded_bytes(), 'a b.png: No such file')


@pytest.mark.parametrize('name', ['a[1]', 'a*', '{00..01}', 'a?b', '[1]b'])
def test_folders_whose_names_look_like_patterns(name, tmp_path):
    save_image(tmp_path / name / 'cat' / '0.png', 0)
    write_tar(tmp_path / name / 'x-00.tar', tar_samples(2))
    write_tar(tmp_path / name / 'x-01.tar', tar_samples(3))
    (tmp_path / name / 'l.txt').write_text('cat/0.png 0\n')
    assert open_source(tmp_path / name).names == ['cat/0.png']
    assert len(open_source(tmp_path / name / 'l.txt').read(0)) > 100
    assert len(open_source(tmp_path / name / 'x-00.tar')) == 2
    assert len(open_source(tmp_path / name / 'x-*.tar')) == len(open_source(tmp_path / name / 'x-{00..01}.tar')) == 5


def test_what_is_left_out_is_said(tmp_path, capsys):
    save_image(tmp_path / 'cat' / '0.png', 0)
    (tmp_path / 'cat' / 'x.heic').write_bytes(b'x')
    (tmp_path / '.ipynb_checkpoints').mkdir()
    open_source(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all(line.startswith(f'note: {tmp_path}: ') for line in said)
    assert '1 (first: .ipynb_checkpoints)' in said[0] and '1 (first: cat/x.heic)' in said[1]
    write_tar(tmp_path / 'a.tar', [*tar_samples(2), ('7.heic', b'x'), ('7.cls', b'1')])
    open_source(tmp_path / 'a.tar')
    line, = capsys.readouterr().out.splitlines()
    assert line.endswith('without an image of a kind that is read left out: 1 (first: a.tar/7.heic)')
    write_tar(tmp_path / 'a.tar', [('7.heic', b'x'), ('7.cls', b'1')])
    fails(lambda: open_source(tmp_path / 'a.tar'), r'a.tar: no images in it \(first member: a.tar/7.heic\)')


# ---------------------------------------------------------------- loading

@pytest.mark.parametrize('workers', [0, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 2))])
@pytest.mark.parametrize('kind', ['tabs', 'cls', 'parquet'])
def test_batches_come_in_order_from_every_source(kind, workers, data, tmp_path):
    source = open_source(KINDS[kind](data, tmp_path))
    order = np.random.default_rng(0).permutation(45)
    batches = [order[:7], [3], [], order[7:20].tolist(), range(30, 45)]
    state = torch.get_rng_state()
    got = list(load_images(source, batches, SIZE, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)
    reference, = load_images(open_source(data), [range(45)], SIZE)
    for batch, wanted in zip(got, batches, strict=True):
        assert batch.indices.tolist() == list(wanted) and batch.indices.dtype == np.int64
        assert torch.equal(batch.pixels, reference.pixels[list(wanted)]) and batch.pixels.dtype == torch.uint8
        assert batch.encoded_bytes.tolist() == [len(source.read(i)) for i in wanted] and batch.skipped == []
        assert batch.encoded_bytes.dtype == np.int64 and batch.pixels.shape[1:] == (3, SIZE, SIZE)


@pytest.fixture
def bad_source(tmp_path):
    """A list of 12 images, of which 1 is truncated, 5 no image, 6 missing, 7 a pipe, 8 a folder."""
    for i in range(12):
        save_image(tmp_path / f'{i}.png', i)
    (tmp_path / '1.png').write_bytes((tmp_path / '1.png').read_bytes()[:700])
    (tmp_path / '5.png').write_bytes(b'no image')
    for i in (6, 7, 8):
        (tmp_path / f'{i}.png').unlink()
    os.mkfifo(tmp_path / '7.png')
    (tmp_path / '8.png').mkdir()
    (tmp_path / 'list.txt').write_text(''.join(f'{i}.png {i}\n' for i in range(12)))
    return open_source(tmp_path / 'list.txt')


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_images_stop_or_are_skipped(bad_source, workers, capfd):
    batches = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9, 10, 11]]
    images = load_images(bad_source, batches, SIZE, workers=workers, skip_bad=False)
    fails(lambda: next(images), r'list.txt: 1.png is no readable image \(.*\): replace .* or add --skip-bad-images')
    got = list(load_images(bad_source, batches, SIZE, workers=workers, skip_bad=True))
    assert [batch.indices.tolist() for batch in got] == [[0, 2], [3, 4], [], [9, 10, 11]]
    assert [len(batch.pixels) for batch in got] == [2, 2, 0, 3] and got[2].pixels.shape == (0, 3, SIZE, SIZE)
    skipped = {i: why for batch in got for i, why in batch.skipped}
    assert list(skipped) == [1, 5, 6, 7, 8]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith('skipped')]
    assert lines == [f'skipped {i}.png: {why}' for i, why in skipped.items()]
    for i, why in ((5, 'no image of a kind'), (6, 'No such file'), (7, 'no regular file'), (8, 'no regular file')):
        assert why in skipped[i]


@pytest.fixture
def turned(tmp_path):
    """Class folders of 12 images, of which five have an orientation other than 1."""
    for i in range(12):
        path = tmp_path / 'turned' / f'class-{i % 3}' / f'{i:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(held(noise(i), 6 if i in (1, 4, 5, 8, 11) else 1))
    return tmp_path / 'turned'


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize('rotate, how', [(False, 'read as they are stored; --exif-rotate turns them'),
                                         (True, 'turned by it')])
def test_orientations_are_said_once_with_a_count(turned, capsys, workers, rotate, how):
    source = open_source(turned, rotate)
    for _ in range(2):  # two epochs
        batches = [[0, 3, 6], [9, 1, 1, 1], [4, 5, 2], [7, 8, 10, 11]]
        pixels = torch.cat([batch.pixels for batch in load_images(source, batches, SIZE, workers=workers)])
    note = [line for line in capsys.readouterr().out.splitlines() if 'EXIF' in line]
    assert note == [f'note: {turned}: 5 of the images read have an EXIF orientation other than 1, and are {how} '
                    '(first: class-1/01.png)']
    order = [0, 3, 6, 9, 1, 1, 1, 4, 5, 2, 7, 8, 10, 11]
    expected = [decode_image(source.read(i), SIZE, exif_rotate=rotate) for i in order]
    assert torch.equal(pixels, torch.stack(expected))


def test_images_that_are_upright_are_not_spoken_of(data, capsys):
    list(load_images(open_source(data), [[0, 1]], SIZE))
    assert 'EXIF' not in capsys.readouterr().out


def test_turned_images_are_another_set(turned):
    plain, rotated = open_source(turned), open_source(turned, True)
    assert plain.digest() != rotated.digest() and plain.content_digest() != rotated.content_digest()


def test_large_images_are_bad_unless_allowed(data):
    source = open_source(data)
    images = load_images(source, [[0]], SIZE, max_pixels=20 * 24 - 1)
    fails(lambda: next(images), 'class-0/00.png is no readable image .*--max-image-pixels.*: replace or remove it$')
    assert len(next(load_images(source, [[0]], SIZE, max_pixels=20 * 24)).indices) == 1


def test_a_tar_or_parquet_file_that_changes_under_the_run_gives_bad_images(tmp_path):
    path = write_tar(tmp_path / 'a.tar', tar_samples(3))
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:4000])
    batch, = load_images(source, [[0, 1, 2]], SIZE, skip_bad=True)
    assert 'the shard ends within it' in batch.skipped[-1][1]
    path = write_parquet(tmp_path / 'a.parquet', [(encoded(noise(0)), 0)])
    source = open_source(path)
    path.write_bytes(b'x')
    batch, = load_images(source, [[0]], SIZE, skip_bad=True)
    assert re.search('a.parquet: no readable parquet file', batch.skipped[0][1])


class DyingSource(sources.Source):
    """Its image 1 ends the process that reads it; image 2 is a mistake of the program."""
    data_path = 'in'
    names = ['a', 'b', 'c']
    labels = np.zeros(3, np.int64)

    def read(self, i):
        if i == 1:
            os._exit(1)
        if i == 2:
            raise RuntimeError('a bug')
        return encoded(noise(0))


@pytest.mark.slow
def test_a_worker_process_that_dies_is_one_line():
    fails(lambda: list(load_images(DyingSource(), [[0], [1]], SIZE, workers=1)),
          'in: a process that decodes images failed.*--num-workers')
    with pytest.raises(RuntimeError, match='a bug'):
        list(load_images(DyingSource(), [[2]], SIZE, workers=1))


@pytest.mark.slow
def test_shared_memory_that_runs_out_is_one_line(data, monkeypatch):
    def full(self):
        raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)')
    monkeypatch.setattr(torch.Tensor, 'share_memory_', full)
    fails(lambda: list(load_images(open_source(data), [[0]], SIZE, workers=1)),
          'a process that decodes images failed.*No space left.*--num-workers')


def test_a_nul_byte_in_a_list_is_one_line(tmp_path):
    (tmp_path / 'list.txt').write_text('a.png 0\nb\0.png 1\n')
    fails(lambda: open_source(tmp_path / 'list.txt'), "list.txt: line 2 is not 'path label'")


# ---------------------------------------------------------------- names of images

@pytest.mark.slow
@pytest.mark.parametrize('variables', [{'LC_ALL': 'C'}, {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}])
def test_names_of_images_are_read_whatever_the_locale_is(variables, tmp_path):
    save_image(tmp_path / 'x' / 'größe' / '日本.png', 0)
    (tmp_path / 'list.txt').write_text('x/größe/日本.png 3\n', encoding='utf-8')
    code = ('import sys\nfrom image_data.sources import load_images, open_source\nfor path in sys.argv[1:]:\n'
            '    source = open_source(path)\n    batch = next(load_images(source, [[0]], 8))\n'
            '    print(len(batch.indices), source.digest())')
    done = run_python(code, tmp_path / 'list.txt', tmp_path / 'x', env=variables)
    assert done.stdout.splitlines() == [f'1 {open_source(path).digest()}' for path in (tmp_path / 'list.txt',
                                                                                     tmp_path / 'x')], done.stderr


def shards(folder, kind, paths, bad=None):
    """Write shards of two images each; returns what --data-path takes."""
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        images = [b'' if number == bad else encoded(noise(2 * number + i)) for i in range(2)]
        if kind == 'tar':
            write_tar(folder / path, [member for i, image in enumerate(images)
                                      for member in ((f'{i}.png', image), (f'{i}.cls', b'%d' % i))])
        else:
            write_parquet(folder / path, [(image, i) for i, image in enumerate(images)])
    return ','.join(str(folder / path) for path in paths)


@pytest.mark.parametrize('kind', ['tar', 'parquet'])
@pytest.mark.parametrize('paths, names', [
    (('p/0', 'q/0'), ['p/0', 'q/0']), (('train/0', 'train2/0', 'train/1'), ['train/0', 'train2/0', 'train/1']),
    (('a/x/0', 'b/x/0', '0'), ['a/x/0', 'b/x/0', '0']), (('p/0', 'q/1'), ['0', '1'])])
def test_images_of_files_of_one_base_name_are_told_apart(kind, paths, names, tmp_path, monkeypatch):
    paths = [f'{path}.{kind}' for path in paths]
    source = open_source(shards(tmp_path / 'here', kind, paths))
    ending = '.png' if kind == 'tar' else ''
    assert source.names == [f'{name}.{kind}/{i}{ending}' for name in names for i in range(2)]
    # the same at another place, by relative names and a glob; another order of the files is another set
    (tmp_path / 'here').rename(tmp_path / 'there')
    monkeypatch.chdir(tmp_path / 'there')
    moved = open_source(','.join(paths))
    assert moved.names == source.names and moved.digest() == source.digest()
    assert open_source(','.join(reversed(paths))).digest() != source.digest()
    for i in range(len(source)):
        assert moved.read(i) == encoded(noise(i))


@pytest.mark.parametrize('kind', ['tar', 'parquet'])
def test_messages_name_the_folder_of_a_file_of_the_same_name(kind, tmp_path, capsys):
    spec = shards(tmp_path, kind, [f'p/0.{kind}', f'q/0.{kind}'], bad=1)
    source = open_source(spec)
    fails(lambda: list(load_images(source, [range(4)], 8)), rf': q/0.{kind}/0\S* is no readable image')
    list(load_images(source, [range(4)], 8, skip_bad=True))
    assert f'skipped q/0.{kind}/1' in capsys.readouterr().err
    if kind == 'tar':
        write_tar(tmp_path / 'q/0.tar', [('.x.png', b''), *tar_samples(1), ('y.txt', b'')])
        open_source(spec)
        output = capsys.readouterr().out
        assert '(first: q/0.tar/.x.png)' in output and '(first: q/0.tar/y.txt)' in output


def test_what_is_there_twice_is_numbered(tmp_path):
    image = encoded(noise(0)), b'0'
    members = [(f'{name}.{kind}', data) for name in ('a', 'b', 'a', 'b', 'a')
               for kind, data in zip(('png', 'cls'), image)]
    write_tar(tmp_path / 'x.tar', members)
    assert open_source(tmp_path / 'x.tar').names == ['x.tar/a.png', 'x.tar/b.png', 'x.tar/a.png#2', 'x.tar/b.png#2',
                                                    'x.tar/a.png#3']
    spec = shards(tmp_path, 'parquet', ['p/0.parquet', 'q/0.parquet'])
    assert open_source(f'{spec},{tmp_path}/p/0.parquet').names[2:] == ['q/0.parquet/0', 'q/0.parquet/1',
                                                                      'p/0.parquet/0#2', 'p/0.parquet/1#2']


def test_labels_of_lists_may_be_names_behind_a_tab(tmp_path):
    (tmp_path / 'list.txt').write_text('b.png\tdog\na 7.png\tblack cat\nc.png\tdog \n')
    source = open_source(tmp_path / 'list.txt')
    assert source.classes == ['black cat', 'dog'] and source.labels.tolist() == [1, 0, 1]
    assert source.names == ['b.png', 'a 7.png', 'c.png']
    (tmp_path / 'list.txt').write_text('b.png\tdog\na.png\t1\n')
    fails(lambda: open_source(tmp_path / 'list.txt'), "line 2: the label '1' is a number, and those before are not")
    (tmp_path / 'list.txt').write_text('b.png\t1\na.png\tdog\n')
    fails(lambda: open_source(tmp_path / 'list.txt'), "line 2: the label 'dog' is a name, and those before are not")
