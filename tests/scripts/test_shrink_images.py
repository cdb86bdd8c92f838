"""Image sets at a storage budget: what methods do, what is kept, the search, resuming, and that sets read back."""
import io
import json
import os
import shutil
import signal
import time

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, features

from fileio.stamps import stamp_of
from helpers import (call, contents, encoded, fails, forked, held, limits, no_space, noise, odd_images, save_image,
                     smooth_images, tar_samples, write_parquet, write_tar)
from image_data import shrinking, shrunk_sets
from image_data.decoding import bare_bytes
from image_data.shrinking import Unreachable, largest_within, sample_classes
from image_data.sources import open_source
from scripts import shrink_images

pytestmark = pytest.mark.usefixtures('one_thread')
AVIF = pytest.mark.skipif('avif' not in features.get_supported(), reason='this Pillow has no AVIF')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Class folders ant, bee, cat of 8, 9 and 4 images: smooth ones, JPEGs of noise, and other sizes."""
    folder = tmp_path_factory.mktemp('source') / 'train'
    for path in smooth_images(folder)[-4:]:
        path.unlink()
    (folder / 'bee' / 'x.y.JPEG').write_bytes(encoded(noise(1, (30, 47)), 'JPEG', quality=50))
    return folder


def words(source, output, *more, method='jpeg', parameter=20, workers=0):
    size = [] if parameter is None else ['--parameter', parameter]
    return ['--data-path', source, '--output-dir', output, '--method', method, *size, '--num-workers', workers, *more]


def make(*args, **kwargs):
    """Make a set; returns its manifest."""
    line = words(*args, **kwargs)
    call(shrink_images, *line)
    return json.loads((args[1] / 'manifest.json').read_text())


def made_images(folder):
    """{CLASS/STEM: encoded bytes} of the images of a set."""
    return {path.relative_to(folder / 'images').with_suffix('').as_posix(): path.read_bytes()
            for path in (folder / 'images').rglob('*') if path.is_file()}


def visible(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- methods

def expected(image, method, parameter):
    """What a method makes of a PIL image, in the words of the issue."""
    image = image.convert('RGB')
    if method == 'resize':
        small = image.resize([max(1, int(side * parameter + 0.5)) for side in image.size], Image.Resampling.BICUBIC)
        return encoded(small, 'JPEG', quality=95, optimize=True)
    if method == 'avif':
        return encoded(image, 'AVIF', quality=parameter, speed=6, codec='aom', max_threads=1)
    return encoded(image, method.upper(), quality=parameter, optimize=True)  # which WebP does not have


@pytest.mark.parametrize('method, parameter', [('resize', 0.37), ('resize', 1), ('jpeg', 8), ('webp', 0),
                                               pytest.param('avif', 30, marks=AVIF)])
def test_methods(images, tmp_path, method, parameter):
    manifest = make(images, tmp_path / 'out', method=method, parameter=parameter)
    source = open_source(images)
    made = made_images(tmp_path / 'out')
    assert len(made) == len(source) == manifest['images'] == 21
    bare = []
    distances = []
    for name in source.names:
        before = Image.open(images / name).convert('RGB')
        data = made[name.rpartition('.')[0]]
        assert data == expected(before, method, parameter)
        bare.append(bare_bytes(data))
        after = Image.open(io.BytesIO(data)).resize(before.size, Image.Resampling.BICUBIC)
        error = np.square(np.asarray(before) / 255 - np.asarray(after) / 255).mean()
        distances.append(-10 * np.log10(error))
    assert manifest['bytes_per_image'] * 21 == pytest.approx(manifest['total_bytes'])
    assert manifest['total_bytes'] == sum(map(len, made.values()))
    assert manifest['scan_bytes_per_image'] == pytest.approx(np.mean(bare))
    assert manifest['psnr'] == pytest.approx(np.mean(distances), abs=1e-3)
    assert manifest['source_bytes_per_image'] == pytest.approx(np.mean([len(source.read(i)) for i in range(21)]))
    assert {key: manifest[key] for key in ('method', 'parameter', 'source', 'seed', 'scores', 'classes')} == {
        'method': method, 'parameter': parameter, 'source': str(images), 'seed': 0, 'scores': None,
        'classes': ['ant', 'bee', 'cat']}
    assert 'side' not in manifest and 'side' not in manifest['run']
    back = open_source(tmp_path / 'out' / 'images')
    assert back.classes == source.classes and back.labels.tolist() == source.labels.tolist()
    assert visible(tmp_path / 'out') == ['.lock', 'images', 'manifest.json']


def test_unusual_images_become_rgb(tmp_path):
    for name, data in odd_images().items():  # some share a stem
        (tmp_path / 'in' / name).mkdir(parents=True)
        (tmp_path / 'in' / name / name).write_bytes(data)
    make(tmp_path / 'in', tmp_path / 'out')
    made = made_images(tmp_path / 'out')
    for name, data in odd_images().items():
        stem = name.rpartition('.')[0]
        assert made[f'{name}/{stem}'] == expected(Image.open(io.BytesIO(data)), 'jpeg', 20)


@pytest.mark.parametrize('form', ['folder', 'tar'])
def test_a_set_of_images_that_were_replaced_is_not_finished(form, tmp_path, capsys):
    for seed in range(6):
        save_image(tmp_path / 'in' / f'class{seed % 2}' / f'{seed}.png', seed)
    path = tmp_path / 'in' if form == 'folder' else write_tar(tmp_path / 'in.tar', tar_samples(6))
    make(path, tmp_path / 'out')
    capsys.readouterr()
    make(path, tmp_path / 'out')
    assert 'finished already (its images have the same names, labels and sizes, and are older)' in (
        capsys.readouterr().out)
    save_image(tmp_path / 'in' / 'class1' / '3.png', 9, (20, 25))
    if form == 'tar':
        write_tar(path, tar_samples(6, kind='PNG'))
    fails(lambda: make(path, tmp_path / 'out'), 'out was made of images that have changed since', 'remove images and m')
    manifest = json.loads((tmp_path / 'out' / 'manifest.json').read_text())
    del manifest['source_sizes']  # as sets of before have none
    (tmp_path / 'out' / 'manifest.json').write_text(json.dumps(manifest))
    make(path, tmp_path / 'out')
    assert 'finished already (its images have the same names and labels' in capsys.readouterr().out


@pytest.mark.parametrize('method, parameter, sizes', [('webp', 50, (16383, 16000)), ('jpeg', 50, (65500, 16000)),
                                                      pytest.param('avif', 50, (32768, 16000), marks=AVIF),
                                                      ('resize', 0.99, (65500, 15840)), ('resize', 0.5, (35000, 8000))])
def test_a_side_that_no_format_holds_is_brought_down_and_said(tmp_path, capsys, method, parameter, sizes):
    for number, size in enumerate([(1, 70000), (16000, 2)]):
        (tmp_path / 'in' / 'a').mkdir(parents=True, exist_ok=True)
        Image.new('RGB', size, (9, 9, 9)).save(tmp_path / 'in' / 'a' / f'{number}.png')
    manifest = make(tmp_path / 'in', tmp_path / 'out', method=method, parameter=parameter)
    made = made_images(tmp_path / 'out')
    assert [max(Image.open(io.BytesIO(made[f'a/{number}'])).size) for number in range(2)] == list(sizes)
    assert manifest['psnr'] > 30  # against the source at its size
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith('note: ')]
    assert len(notes) == (sizes[0] != 35000) and all('a/0.' in note and 'longer than its format' in note
                                                     for note in notes)


# ---------------------------------------------------------------- sampling

def test_a_share_of_each_class_is_kept_unchanged(images, tmp_path):
    source = open_source(images)
    kept = {}
    for share, counts in ((0.1, [1, 1, 1]), (0.5, [4, 5, 2]), (1, [8, 9, 4])):
        for seed in (0, 1):
            out = tmp_path / f'{share}-{seed}'
            manifest = make(images, out, '--seed', seed, method='sample', parameter=share)
            made = contents(out / 'images')
            assert made.items() <= {name: source.read(i) for i, name in enumerate(source.names)}.items()
            assert np.bincount(open_source(out / 'images').labels).tolist() == counts
            assert manifest['psnr'] == 100 and manifest['scan_bytes_per_image'] is None  # there are PNGs among them
            kept[share, seed] = set(made)
    assert kept[0.1, 0] < kept[0.5, 0] < kept[1, 0] and kept[0.5, 0] != kept[0.5, 1]


def test_a_sample_equals_a_loop():
    labels = np.random.default_rng(0).integers(0, 7, 500) * 3
    order = torch.randperm(500, generator=torch.Generator().manual_seed(5)).tolist()
    for fraction in (0.001, 0.25, 0.777, 1):
        slow = []
        for label in set(labels.tolist()):
            of_class = [i for i in order if labels[i] == label]
            slow += of_class[:max(1, int(len(of_class) * fraction + 0.5))]
        assert sample_classes(labels, fraction, 5).tolist() == sorted(slow)


# ---------------------------------------------------------------- budgets

@pytest.mark.parametrize('lowest, highest', [(0, 100), (1, 95), (3, 3)])
def test_the_search_finds_the_largest_within(lowest, highest):
    values = dict(zip(range(lowest, highest + 1), np.sort(np.random.default_rng(0).integers(0, 50, 101)).tolist()))
    for budget in range(-1, 60):
        within = [number for number, value in values.items() if value <= budget]
        if within:
            assert largest_within(lowest, highest, values.get, budget) == within[-1]
        else:
            with pytest.raises(Unreachable) as caught:
                largest_within(lowest, highest, values.get, budget)
            assert (caught.value.least, caught.value.most) == (values[lowest], values[highest])


def totals(images, method, parameters, folder):
    return {parameter: make(images, folder / f'{method}-{parameter}', method=method,
                            parameter=parameter)['total_bytes'] for parameter in parameters}


@pytest.mark.parametrize('method, parameters', [
    ('jpeg', (40, 41)), ('webp', (62, 63)), ('resize', (0.5, 0.6)), ('sample', (0.4, 0.6))])
def test_a_budget_is_kept_and_used(images, tmp_path, method, parameters, capsys):
    if method == 'resize':  # smooth images take the same bytes at any size
        images = tmp_path / 'noise'
        for number in range(21):
            save_image(images / f'class-{number % 3}' / f'{number}.png', number, (40, 40))
    small, large = totals(images, method, parameters, tmp_path).values()
    assert small < large
    total = make(images, tmp_path / 'total', '--total-bytes', large - 1, method=method, parameter=None)
    per_image = make(images, tmp_path / 'mean', '--bytes-per-image', (large - 1) / 21, method=method, parameter=None)
    assert small <= total['total_bytes'] < large and total['searched_images'] == 21
    assert parameters[0] <= total['parameter'] < parameters[1] and total['parameter'] == per_image['parameter']
    assert contents(tmp_path / 'total' / 'images') == contents(tmp_path / 'mean' / 'images')
    if method in ('jpeg', 'webp'):
        assert contents(tmp_path / 'total' / 'images') == contents(tmp_path / f'{method}-{parameters[0]}' / 'images')
    else:  # one step more does not fit
        more = totals(images, method, [total['parameter'] + 0.001], tmp_path)
        assert set(more.values()) > {large - 1} or min(more.values()) >= large
    capsys.readouterr()
    make(images, tmp_path / 'all', '--total-bytes', 10 ** 7, method=method, parameter=None)
    assert 'keeps within the budget' in capsys.readouterr().out


def test_a_budget_that_cannot_be_reached(images, tmp_path):
    least, most = totals(images, 'jpeg', (1, 95), tmp_path).values()
    fails(lambda: make(images, tmp_path / 'out', '--total-bytes', least - 1, parameter=None),
          f'--total-bytes .*reaches {least:,}.0 to {most:,}.0 bytes in all')
    fails(lambda: make(images, tmp_path / 'out', '--bytes-per-image', 9, parameter=None),
          f'--bytes-per-image 9: .*reaches {least / 21:,.1f} to {most / 21:,.1f} bytes an image')
    assert make(images, tmp_path / 'out', '--total-bytes', least, parameter=None)['parameter'] == 2  # the same as 1


@pytest.mark.slow
def test_a_large_set_is_searched_on_some_of_its_images(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shrinking, 'SEARCHED', 5)
    tight = make(images, tmp_path / 'out', '--bytes-per-image', 900, parameter=None, workers=2)
    assert tight['searched_images'] == 5
    sizes = [len(data) for data in made_images(tmp_path / 'out').values()]
    assert tight['bytes_per_image'] == pytest.approx(np.mean(sizes))
    assert ('exceed it by' in capsys.readouterr().out) == (np.mean(sizes) > 900)


# ---------------------------------------------------------------- sides

def test_a_side_beside_a_parameter(images, tmp_path, capsys):
    manifest = make(images, tmp_path / 'out', '--side', 25)
    assert manifest['side'] == 25 and manifest['run']['side'] == [25] and 'searched_sides' not in manifest
    assert 'jpeg 20, side 25: 21 images' in capsys.readouterr().out
    made = made_images(tmp_path / 'out')
    assert Image.open(io.BytesIO(made['ant/0'])).size == (25, 25)
    assert Image.open(io.BytesIO(made['bee/x.y'])).size == (39, 25)  # of 47 x 30
    whole = made_images(tmp_path / 'whole') if make(images, tmp_path / 'whole') else None
    same = made_images(tmp_path / 'same') if make(images, tmp_path / 'same', '--side', 64) else None
    assert whole == same != made
    fails(lambda: make(images, tmp_path / 'out'), 'results of another side; choose')
    fails(lambda: make(images, tmp_path / 'out', '--side', 24), 'another side;')
    fails(lambda: make(images, tmp_path / 'out', '--side', 25, method='webp'), 'another method')


def test_the_side_of_the_best_psnr_is_taken(images, tmp_path, capsys):
    budget = ['--bytes-per-image', 320]
    manifest = make(images, tmp_path / 'out', *budget, '--side', 10, 40, 26, 40, parameter=None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('jpeg, side ')]
    assert [line.split(':')[0] for line in lines] == ['jpeg, side 40', 'jpeg, side 26', 'jpeg, side 10']
    found = manifest['searched_sides']
    assert [side['side'] for side in found] == [40, 26, 10] and manifest['run']['side'] == [40, 26, 10]
    assert manifest['searched_images'] == manifest['compared_images'] == 21
    left_out = [side for side in found if side['parameter'] is None]
    assert left_out and all(side['bytes_per_image'] > 320 and side['psnr'] is None for side in left_out)
    assert sum('left out' in line for line in lines) == len(left_out)
    best = max((side for side in found if side['psnr']), key=lambda side: side['psnr'])
    assert (manifest['side'], manifest['parameter']) == (best['side'], best['parameter'])
    assert manifest['psnr'] == pytest.approx(best['psnr']) and manifest['bytes_per_image'] == best['bytes_per_image']
    alone = make(images, tmp_path / 'alone', '--side', best['side'], parameter=best['parameter'])
    assert contents(tmp_path / 'alone' / 'images') == contents(tmp_path / 'out' / 'images')
    assert alone['psnr'] == manifest['psnr']
    make(images, tmp_path / 'out', *budget, '--side', 40, 26, 10, parameter=None)  # the same sides
    assert 'finished already' in capsys.readouterr().out


def test_a_budget_that_no_side_reaches(images, tmp_path):
    least = totals(images, 'jpeg', [1], tmp_path)[1]
    fails(lambda: make(images, tmp_path / 'out', '--total-bytes', least - 1, '--side', 50, parameter=None),
          f'--total-bytes .*--method jpeg takes {least:,}.0 bytes in all at least, with --side 50', 'budget of')
    fails(lambda: make(images, tmp_path / 'out', '--bytes-per-image', 9, '--side', 9, 50, parameter=None),
          r'--bytes-per-image 9: .* takes \d+\.\d bytes an image at least, with --side 9,')
    assert not (tmp_path / 'out' / '.unfinished').exists()


def test_a_resumed_run_does_not_search_again(images, tmp_path, monkeypatch):
    flags = ['--bytes-per-image', 320, '--side', 26, 10]
    make(images, tmp_path / 'whole', *flags, parameter=None)
    with monkeypatch.context() as patch:
        patch.setattr(shrunk_sets.SetFolder, 'write_part', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(images, tmp_path / 'out', *flags, parameter=None)
    fails(lambda: make(images, tmp_path / 'out', *flags[:4], parameter=None), 'another side; give the same flags')
    monkeypatch.setattr(shrink_images, 'search_sides', lambda *_: 1 / 0)
    make(images, tmp_path / 'out', *flags, parameter=None)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


@AVIF
def test_a_codec_that_this_pillow_lacks(images, tmp_path, monkeypatch):
    parts = {'method': 'avif', 'parameter': 30}
    assert make(images, tmp_path / 'done', '--side', 9, **parts)['versions']['avif'] == features.version('avif')
    monkeypatch.setattr(features, 'check', lambda _: False)
    fails(lambda: make(images, tmp_path / 'out', **parts), '--method avif: this Pillow, .*, lacks libavif; install')
    assert not (tmp_path / 'out').exists()
    make(images, tmp_path / 'done', '--side', 9, **parts)  # what is finished needs none


# ---------------------------------------------------------------- sources and outputs

def labeled(source):
    """The images of a source as sorted (encoded bytes, label)."""
    return sorted((source.read(i), label) for i, label in enumerate(source.labels.tolist()))


def test_sources_without_class_names_keep_their_labels(tmp_path):
    """Tar shards whose keys repeat, and parquet rows, whose names are no file names."""
    for shard in range(2):
        write_tar(tmp_path / f'in-{shard}.tar', tar_samples(13, prefix='x/'))
    source = f'{tmp_path}/in-{{0..1}}.tar'
    make(source, tmp_path / 'out', method='sample', parameter=1)
    assert labeled(open_source(tmp_path / 'out' / 'images')) == labeled(open_source(source))
    assert visible(tmp_path / 'out' / 'images') == ['0000', '0001', '0002']
    assert visible(tmp_path / 'out' / 'images' / '0002') == sorted(
        [f'{i:04d}.jpg' for i in (2, 5, 8, 11)] + [f'{i:04d}-{13 + i}.jpg' for i in (2, 5, 8, 11)])


@pytest.mark.parametrize('names, folders', [(['a', 'b', 'c'], ['a', 'b', 'c']), (['c', 'a', 'b'], None),
                                            (['a', 'b/c', 'd'], None), (['.a', 'b', 'c'], None)])
def test_class_names_become_folders_where_labels_stay(tmp_path, names, folders):
    rows = [(encoded(noise(i), 'JPEG' if i % 2 else 'PNG'), i % 3) for i in range(7)]
    write_parquet(tmp_path / 'in.parquet', rows, names)
    manifest = make(tmp_path / 'in.parquet', tmp_path / 'out', method='sample', parameter=1)
    assert visible(tmp_path / 'out' / 'images') == (folders or ['0000', '0001', '0002'])
    assert labeled(open_source(tmp_path / 'out' / 'images')) == sorted(rows) and manifest['classes'] == names


def test_what_class_folders_cannot_hold(images, tmp_path):
    lines = [f'train/{name}\t{2 * label}\n' for name, label in zip(
        open_source(images).names, open_source(images).labels.tolist())]
    (tmp_path / 'list.txt').write_text(''.join(lines))
    os.symlink(images, tmp_path / 'train')
    fails(lambda: make(tmp_path / 'list.txt', tmp_path / 'out'), 'class 1 has no images', 'without gaps')
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'in').mkdir()
    write_tar(tmp_path / 'in' / 'x.tar', tar_samples(2))
    fails(lambda: make(tmp_path / 'in' / '*.tar', tmp_path / 'in'), 'lies in')
    fails(lambda: make(tmp_path / 'train', images / 'small'), 'lies in')


# ---------------------------------------------------------------- resuming

@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_bytes(images, tmp_path, monkeypatch):
    monkeypatch.setattr(shrinking, 'CHUNK', 3)
    monkeypatch.setattr(shrunk_sets, 'PART', 4)
    for workers in (0, 2):
        make(images, tmp_path / str(workers), method='resize', parameter=0.7, workers=workers)
    assert contents(tmp_path / '0') == contents(tmp_path / '2')


@pytest.mark.slow
@pytest.mark.parametrize('moment, flags', [
    ('write_bytes', []), ('write_text', []), ('write_text', ['--side', 30, 18]), ('replace', []), ('rmtree', [])])
def test_a_run_killed_at_any_moment_resumes(images, tmp_path, monkeypatch, moment, flags):
    """Killed at each call of a kind in turn; each time the same command resumes, until it is through."""
    monkeypatch.setattr(shrunk_sets, 'PART', 6)
    flags = ['--total-bytes', 15_000, *flags]
    make(images, tmp_path / 'whole', *flags, parameter=None)
    owner = {'write_bytes': shrunk_sets.Path, 'write_text': shrunk_sets, 'replace': shrunk_sets.os,
             'rmtree': shrunk_sets.shutil}[moment]
    real = getattr(owner, moment)
    for kill_at in range(1, 60, 4 if moment == 'write_bytes' else 1):
        calls = []

        def dies(*args, **kwargs):
            calls.append(args)
            if len(calls) == kill_at:
                os._exit(9)
            return real(*args, **kwargs)
        pid = os.fork()
        if not pid:
            setattr(owner, moment, dies)
            make(images, tmp_path / 'out', *flags, parameter=None)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9)
        if code == 0:
            break
        if not (tmp_path / 'out' / 'manifest.json').exists() and moment not in ('replace', 'rmtree'):
            assert not list((tmp_path / 'out').glob('images*'))  # nobody sees a part of a set
    assert code == 0
    make(images, tmp_path / 'out', *flags, parameter=None)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


def test_a_finished_set_is_left_alone(images, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'out'
    make(images, out)
    before = {path: path.stat().st_mtime_ns for path in sorted(out.rglob('*'))}
    monkeypatch.setattr(PIL, '__version__', '0.0')  # no reason to make it again
    make(images, out, workers=1)
    assert 'finished already' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in sorted(out.rglob('*'))} == before
    fails(lambda: make(images, out, '--seed', 1, parameter=21),
          'out: holds results of another parameter, seed; choose another', 'same flags')
    shutil.rmtree(out / 'images')
    fails(lambda: make(images, out), 'images is not there')


def test_an_unfinished_set_takes_only_its_own_flags(images, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    monkeypatch.setattr(shrunk_sets, 'PART', 6)
    with monkeypatch.context() as patch:
        patch.setattr(shrunk_sets.SetFolder, 'write_manifest', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(images, out)
    assert visible(out) == ['.lock', '.unfinished']
    fails(lambda: make(images, out, method='webp'), 'another method; give the same flags .* to finish it')
    with monkeypatch.context() as patch:
        patch.setattr(PIL, '__version__', '0.0')  # its encoders may give other bytes
        fails(lambda: make(images, out), 'another versions;')
    lost = out / '.unfinished' / 'images' / 'ant' / '2.jpg'
    lost.write_bytes(b'')  # as a machine that went down may leave it
    make(images, out)
    make(images, tmp_path / 'whole')
    assert contents(out) == contents(tmp_path / 'whole')


@pytest.mark.slow
def test_one_writer_at_a_time(images, tmp_path):
    def hold(ready):
        folder = shrunk_sets.SetFolder(str(tmp_path / 'out'), {}, stamp_of([]))
        folder.begin({'parameter': 1})
        ready()
        time.sleep(60)
    with forked(hold):
        (tmp_path / 'out' / '.unfinished' / 'run.json').unlink()
        fails(lambda: make(images, tmp_path / 'out'), 'another process is at work there')
    make(images, tmp_path / 'out')


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize('flags, pattern', [
    (['--parameter', 96], '--parameter 96: jpeg takes a whole number from 1 to 95'),
    (['--parameter', 7.5], 'whole number'), (['--parameter', 3, '--total-bytes', 9], 'not allowed with'),
    ([], 'required'), (['--parameter', 9, '--side', 0], '--side: 0'), (['--parameter', 9, '--side'], '--side: expect'),
    (['--parameter', 9, '--side', 20, 30], '--side 20 30: with --parameter give one')])
def test_flags_that_cannot_be(flags, pattern):
    fails(lambda: shrink_images.parse_args(['--data-path', 'a', '--output-dir', 'b', '--method', 'jpeg',
                                            *map(str, flags)]), pattern)


@pytest.mark.parametrize('method', ['sample', 'resize'])
def test_methods_without_a_side(images, tmp_path, method):
    fails(lambda: make(images, tmp_path / 'out', '--side', 20, method=method, parameter=0.5),
          f'--side 20: --method {method} has no side; jpeg, webp, avif have')


@pytest.mark.parametrize('method, parameter', [('sample', 0), ('sample', 1.1), ('resize', 0), ('webp', 101),
                                               ('avif', 101), ('avif', 7.5)])
def test_parameters_that_cannot_be(images, tmp_path, method, parameter):
    fails(lambda: make(images, tmp_path / 'out', method=method, parameter=parameter), f'--parameter {parameter}')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize('method, parameter', [('jpeg', 90), ('webp', 90), ('resize', 1)])
def test_turned_images_are_upright_and_have_no_orientation(tmp_path, capsys, workers, method, parameter):
    for i in range(3):
        path = tmp_path / 'in' / 'a' / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(held(noise(i, (16, 40)), (1, 6, 8)[i], 'JPEG'))
    kinds = {'method': method, 'parameter': parameter, 'workers': workers}
    plain = make(tmp_path / 'in', tmp_path / 'plain', **kinds)
    note, = (line for line in capsys.readouterr().out.splitlines() if 'EXIF' in line)
    assert ': 2 of the images read have an EXIF orientation other than 1' in note
    turned = make(tmp_path / 'in', tmp_path / 'turned', '--exif-rotate', **kinds)
    assert turned['run']['exif_rotate'] is True and 'exif_rotate' not in plain['run']
    for folder, sizes in (('plain', [(40, 16)] * 3), ('turned', [(40, 16), (16, 40), (16, 40)])):
        made = [Image.open(io.BytesIO(data)) for _, data in sorted(made_images(tmp_path / folder).items())]
        assert [image.size for image in made] == sizes and not any(0x0112 in image.getexif() for image in made)
    fails(lambda: make(tmp_path / 'in', tmp_path / 'plain', '--exif-rotate', **kinds), 'plain')


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_that_cannot_be_read(images, tmp_path, workers):
    shutil.copytree(images, tmp_path / 'in')
    bad = tmp_path / 'in' / 'bee' / '3.png'
    good = bad.read_bytes()
    bad.write_bytes(good[:200])
    fails(lambda: make(tmp_path / 'in', tmp_path / 'out', workers=workers), 'bee/3.png is no readable image')
    bad.write_bytes(good)  # mended: the same command resumes
    make(tmp_path / 'in', tmp_path / 'out', workers=workers)
    fails(lambda: make(images, tmp_path / 'small', '--max-image-pixels', 1500, workers=workers), 'max-image-pixels')


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run(images, tmp_path, monkeypatch):
    monkeypatch.setattr(shrinking.ShrunkImages, '_shrink', lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with limits():
        fails(lambda: make(images, tmp_path / 'out', workers=1), 'a process that decodes images failed')


def test_a_full_disk(images, tmp_path):
    with no_space(1000):
        fails(lambda: make(images, tmp_path / 'out', parameter=95), 'cannot be written')
    make(images, tmp_path / 'out', parameter=95)
    assert (tmp_path / 'out' / 'manifest.json').exists()


def test_a_folder_that_holds_images_already(images, tmp_path):
    (tmp_path / 'out' / 'images').mkdir(parents=True)
    fails(lambda: make(images, tmp_path / 'out'), 'is there already')
