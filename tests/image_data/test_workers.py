"""How many processes decode, where shared memory is small and temporary folders have long names."""
import collections
import os
import tempfile
from multiprocessing import current_process

import pytest

from helpers import save_image
from image_data import workers
from image_data.sources import load_images, open_source
from image_data.workers import PREFETCH, choose_socket_folder, plan_workers

MIB = 1 << 20
Usage = collections.namedtuple('Usage', 'total used free')


@pytest.fixture
def many_cores(monkeypatch):
    monkeypatch.setattr(workers, 'cores', lambda: 8)


def room(monkeypatch, bytes_free):
    monkeypatch.setattr(workers.shutil, 'disk_usage', lambda path: Usage(0, 0, bytes_free))


@pytest.mark.parametrize('free, workers, expected', [
    (10_000, 4, (4, PREFETCH)), (10_000, 0, (0, 0)), (10_000, 20, (8, PREFETCH)), (100, 8, (5, 1)), (64, 2, (2, 1)),
    (64, 8, (2, 1)), (100, 2, (2, 2)), (45, 2, (1, 1)), (30, 2, (0, 0)), (0, 2, (0, 0))])
def test_batches_in_flight_fit_into_shared_memory(free, workers, expected, many_cores, monkeypatch, capsys):
    room(monkeypatch, free * MIB)
    batch_bytes = 64 * 3 * 256 * 256  # 12 MiB
    assert plan_workers(workers, batch_bytes) == expected
    processes, ahead = expected
    assert (processes * ahead + 2) * batch_bytes <= free * MIB or not processes
    assert ('/dev/shm has little room' in capsys.readouterr().out) == (processes < min(workers, 8))


def test_ranks_of_a_node_divide_its_shared_memory(many_cores, monkeypatch):
    room(monkeypatch, 1000)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert workers.shared_memory() == 225


def test_without_shared_memory_no_processes(many_cores, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(workers, 'SHARED_MEMORY', str(tmp_path / 'none'))
    assert plan_workers(4, 100) == (0, 0)
    assert 'none has little room: 0 instead of 4' in capsys.readouterr().out


@pytest.fixture
def fresh_process(monkeypatch):
    """As in a process that has not chosen a folder for its sockets yet."""
    monkeypatch.delitem(current_process()._config, 'tempdir', raising=False)
    monkeypatch.setattr(tempfile, 'tempdir', None)
    yield
    current_process()._config.pop('tempdir', None)


@pytest.mark.slow
@pytest.mark.parametrize('length', [10, 60, 90, 120, 240])
def test_temporary_folders_of_every_length(length, tmp_path, fresh_process, many_cores, monkeypatch):
    folder = tmp_path / ('t' * max(1, length - len(str(tmp_path)) - 1))
    folder.mkdir()
    monkeypatch.setenv('TMPDIR', str(folder))
    for i in range(6):
        save_image(tmp_path / 'in' / f'{i % 2}' / f'{i}.png', i)
    source = open_source(tmp_path / 'in')
    batches = list(load_images(source, [[0, 1, 2], [3, 4, 5]], 16, workers=2))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5]]
    assert tempfile.gettempdir() == str(folder) and len(current_process()._config['tempdir']) < 90


def test_where_no_folder_takes_sockets_there_are_no_processes(many_cores, monkeypatch, capsys):
    monkeypatch.setattr(workers, '_can_bind', lambda folder: False)
    assert not choose_socket_folder()
    assert plan_workers(4, 100) == (0, 0)
    assert 'note: no temporary folder takes the sockets' in capsys.readouterr().out


def test_what_was_tried_is_removed(tmp_path, fresh_process, monkeypatch):
    monkeypatch.setattr(workers.multiprocessing.util, 'get_temp_dir', lambda: os.fspath(tmp_path))
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    assert workers._takes_sockets(str(tmp_path)) == (len(str(tmp_path)) < 76)
    assert not list(tmp_path.iterdir())
