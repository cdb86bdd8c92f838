"""Sizes and times by which a finished result sees that what it was made of was replaced."""
import os
import shutil

import pytest

from fileio.stamps import changed_since, check_stamp, stamp_of
from helpers import fails


@pytest.fixture
def paths(tmp_path):
    """Three files, and then one that is made of them."""
    files = [tmp_path / name for name in 'abc']
    for file in files:
        file.write_text(f'content of {file.name}')
    wait_for_the_clock(tmp_path)
    (tmp_path / 'result').write_text('x')
    wait_for_the_clock(tmp_path)
    return [*files, tmp_path / 'result']


def wait_for_the_clock(folder):
    """Until a new file is later than those that are there: times of files go by steps of some milliseconds."""
    latest = max(path.stat().st_ctime_ns for path in folder.iterdir())
    while (folder / 'clock').exists() is False or (folder / 'clock').stat().st_ctime_ns <= latest:
        (folder / 'clock').write_text('x')
    (folder / 'clock').unlink()


def compared(paths, sizes):
    *files, result = paths
    return check_stamp(stamp_of(files), sizes, [result], str(result), 'remove it')


def test_files_that_are_the_same(paths, capsys):
    sizes = stamp_of(paths[:3]).sizes
    assert compared(paths, sizes) == 'its images have the same names, labels and sizes, and are older'
    assert compared(paths, None) == 'its images have the same names and labels, and are older'
    assert not capsys.readouterr().out


@pytest.mark.parametrize('change', [
    lambda path: path.write_text('longer content'), lambda path: path.write_text(''), lambda path: path.unlink()])
def test_another_size_is_refused(paths, change):
    sizes = stamp_of(paths[:3]).sizes
    change(paths[1])
    fails(lambda: compared(paths, sizes), 'result was made of images that have changed since.*: remove it')


def test_sizes_of_two_files_that_changed_places_are_refused(paths):
    paths[0].write_text('x')
    sizes = stamp_of(paths[:3]).sizes
    paths[0].rename(paths[1])
    paths[0].write_text('content of b')
    fails(lambda: compared(paths, sizes), 'as other sizes show')


def replaced(path):
    path.write_text('content of X')


def replaced_with_its_time(path):
    stat = path.stat()
    path.write_text('content of X')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def moved_over_it(path):
    """By an older file."""
    shutil.copy2(path.parent / 'a', path.parent / 'new')
    os.replace(path.parent / 'new', path)


@pytest.mark.parametrize('change', [replaced, replaced_with_its_time, moved_over_it])
@pytest.mark.parametrize('kept', [True, False])
def test_another_time_is_noted(paths, change, kept, capsys):
    sizes = stamp_of(paths[:3]).sizes if kept else None
    change(paths[1])
    assert not compared(paths, sizes).endswith('older')
    assert 'result is older than its images: if they were replaced, and not only copied, remove it' in (
        capsys.readouterr().out)


def test_the_first_of_several_results_counts(paths):
    *files, result = paths
    replaced(files[0])
    wait_for_the_clock(result.parent)
    (result.parent / 'later').write_text('x')
    assert changed_since(stamp_of(files), [result.parent / 'later', result])
    assert not changed_since(stamp_of(files), [result.parent / 'later']) and not changed_since(stamp_of(files), [])
