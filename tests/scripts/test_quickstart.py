"""scripts/quickstart.sh removes only what it made. The training itself is not run here."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture
def quickstart(tmp_path):
    """Runs a copy of the script that ends where it would install; returns the process."""
    scripts = tmp_path / 'project' / 'scripts'
    scripts.mkdir(parents=True)
    shutil.copy(ROOT / 'scripts' / 'quickstart.sh', scripts)
    (scripts / 'venv.sh').write_text('echo installing\nexit 0\n')

    def run(output):
        environment = os.environ | {'SEIT_OUTPUT': str(output)}
        return subprocess.run(['bash', str(scripts / 'quickstart.sh')], env=environment, capture_output=True, text=True)
    return run


def refused(process, output):
    """Whether the script ended with one line that names the folder, before it installed anything."""
    return (process.returncode == 2 and process.stdout == '' and len(process.stderr.splitlines()) == 1
            and process.stderr.startswith(f'error: {output}: '))


def test_a_folder_with_files_of_others_is_refused_and_stays(quickstart, tmp_path):
    photos = tmp_path / 'my photos'
    (photos / 'sub').mkdir(parents=True)
    (photos / 'sub' / 'cat.jpg').write_bytes(b'cat')
    assert refused(quickstart(photos), photos)
    assert (photos / 'sub' / 'cat.jpg').read_bytes() == b'cat'
    assert [path.name for path in photos.iterdir()] == ['sub']


def test_a_folder_with_hidden_files_only_is_refused(quickstart, tmp_path):
    folder = tmp_path / 'home'
    folder.mkdir()
    (folder / '.bashrc').write_text('x')
    assert refused(quickstart(folder), folder)
    assert (folder / '.bashrc').read_text() == 'x'


def test_a_file_is_refused_and_stays(quickstart, tmp_path):
    file = tmp_path / 'notes.txt'
    file.write_text('x')
    assert refused(quickstart(file), file)
    assert file.read_text() == 'x'


def test_a_link_to_a_folder_of_others_is_refused(quickstart, tmp_path):
    photos = tmp_path / 'photos'
    photos.mkdir()
    (photos / 'cat.jpg').write_bytes(b'cat')
    link = tmp_path / 'link'
    link.symlink_to(photos)
    assert refused(quickstart(link), link)
    assert (photos / 'cat.jpg').exists()


@pytest.mark.parametrize('make', [False, True], ids=['missing', 'empty'])
def test_a_missing_or_empty_folder_is_taken_and_marked(quickstart, tmp_path, make):
    folder = tmp_path / 'new' / 'run'
    if make:
        folder.mkdir(parents=True)
    process = quickstart(folder)
    assert (process.returncode, process.stdout) == (0, 'installing\n'), process.stderr
    assert (folder / '.quickstart').is_file()


def test_only_its_own_files_are_removed_from_its_own_folder(quickstart, tmp_path):
    folder = tmp_path / 'run'
    assert quickstart(folder).returncode == 0
    (folder / 'tokens').mkdir()
    for name in ('tokens/png-label.txt', 'log.txt', 'best_checkpoint.pth', '.unsaved'):
        (folder / name).write_text('old')
    (folder / 'mine').mkdir()
    for name in ('mine/best_checkpoint.pth', 'tokens/my-label.txt', 'notes.txt'):
        (folder / name).write_text('precious')
    photos = tmp_path / 'photos'
    photos.mkdir()
    (photos / 'png-label.txt').write_text('precious')
    (folder / 'link').symlink_to(photos)
    process = quickstart(folder)
    assert process.returncode == 0, process.stderr
    left = {str(path.relative_to(folder)) for path in folder.rglob('*') if not path.is_dir()}
    assert left == {'.quickstart', '.lock', 'mine/best_checkpoint.pth', 'tokens/my-label.txt', 'notes.txt'}
    assert (photos / 'png-label.txt').read_text() == 'precious'


def test_a_folder_in_which_a_run_writes_is_refused_and_stays(quickstart, tmp_path):
    folder = tmp_path / 'run'
    assert quickstart(folder).returncode == 0
    (folder / 'log.txt').write_text('precious')
    hold = ('import fcntl, sys; file = open(sys.argv[1], "a"); fcntl.lockf(file, fcntl.LOCK_EX); '
            'print(1, flush=True); input()')
    with subprocess.Popen([sys.executable, '-c', hold, folder / '.lock'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as run:
        assert run.stdout.readline() == '1\n'
        assert refused(quickstart(folder), folder)
        run.kill()
    assert (folder / 'log.txt').read_text() == 'precious'
