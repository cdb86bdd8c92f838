"""Files: names and patterns, limits, whole or not at all, locks, downloads."""
import contextlib
import errno
import hashlib
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from fileio import files
from helpers import fails, forked, no_space, refused, torch_bytes
from token_files.codebook import load_codebook
from utils import InputError

# ---------------------------------------------------------------- names

@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder to work in, with names that look like lists and patterns."""
    for path in ('p/x1', 'p/x2', 'p/x10', 'p/w[1]', 'p/w1', 'p/k,l', 'a,b/y1', 'c[1]/z', 'c[1]/s1/q',
                 'c[1]/s2/q', 'c1/z', 'n{1..2}/e0', 'n{1..2}/e1'):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('spec, expected', [
    ('p/x1', ['p/x1']), ('p/x*', ['p/x1', 'p/x10', 'p/x2']), ('p/x2,p/x1', ['p/x2', 'p/x1']),
    ('p/x2, p/x1 ,', ['p/x2', 'p/x1']), ('p/x?,p/x10', ['p/x1', 'p/x2', 'p/x10']), ('*/z', ['c1/z', 'c[1]/z']),
    ('p/x{1..2}', ['p/x1', 'p/x2']), ('no/a-{08..10}.tar', ['no/a-08.tar', 'no/a-09.tar', 'no/a-10.tar']),
    ('no/{0..1}-{0..1}', ['no/0-0', 'no/0-1', 'no/1-0', 'no/1-1']), ('no/such', ['no/such']),
    ('no/such,p/x1', ['no/such', 'p/x1']),
    ('c[1]/z', ['c[1]/z']), ('c[1]/*', ['c[1]/s1', 'c[1]/s2', 'c[1]/z']), ('c[1]/s*/q', ['c[1]/s1/q', 'c[1]/s2/q']),
    ('c[1]/s{1..2}/q', ['c[1]/s1/q', 'c[1]/s2/q']), ('c[1]/s[12]/q', ['c[1]/s1/q', 'c[1]/s2/q']),
    ('c[12]/z', ['c1/z']), ('p/w[1]', ['p/w[1]']), ('p/w[1],p/x1', ['p/w[1]', 'p/x1']), ('p/w[12]', ['p/w1']),
    ('p/k,l', ['p/k,l']), ('a,b/y1', ['a,b/y1']), ('a?b/y*', ['a,b/y1']),
    ('n{1..2}/e{0..1}', ['n{1..2}/e0', 'n{1..2}/e1']), ('n{1..2}/*', ['n{1..2}/e0', 'n{1..2}/e1']),
    ('./p/../p/x1', ['p/../p/x1']), ('../{}/p/x[12]', ['../{}/p/x1', '../{}/p/x2'])])
def test_expand_files(tree, spec, expected):
    assert [str(path) for path in files.expand_files(spec.format(tree.name) if '{}' in spec else spec)] == \
        [path.format(tree.name) if '{}' in path else path for path in expected]
    assert all(isinstance(path, Path) for path in files.expand_files(tree / 'p/x1'))


@pytest.mark.parametrize('spec, words', [('p/q*', r'p/q\*: no file matches'), ('p/x1,q[0]', r'q\[0\]: no file matches'),
                                         ('', "'' names no file"), (' , ', 'names no file')])
def test_names_that_match_nothing(tree, spec, words):
    fails(lambda: files.expand_files(spec), words)


def test_a_long_list_of_missing_files_is_quick(tree):
    names = [f'missing/{i}.tar' for i in range(3000)]
    assert [str(path) for path in files.expand_files(','.join(names))] == names


# ---------------------------------------------------------------- reading

def test_read_bytes_within_a_limit(tmp_path):
    path = tmp_path / 'a'
    path.write_bytes(b'12345')
    assert files.read_bytes(path, 5) == b'12345'
    fails(lambda: files.read_bytes(path, 4), f'{path}: more than 4 bytes')
    fails(lambda: files.read_bytes(tmp_path / 'no', 4), 'no: No such file')
    fails(lambda: files.read_bytes(tmp_path, 4), 'Is a directory')


def test_read_json(tmp_path, monkeypatch):
    path = tmp_path / 'a.json'
    path.write_text('{"ä": [1, null]}', encoding='utf-8')
    assert files.read_json(path) == {'ä': [1, None]}
    for text in (b'[' * 1_000_000, b'{"a":' * 100_000, b'9' * 5000, b'\xff', b'\0', b'', b'{', 'ü'.encode('latin-1')):
        path.write_bytes(text)
        refused(path, files.read_json, path, match='not JSON')
    monkeypatch.setattr(files, 'MAX_JSON_BYTES', 10)
    path.write_bytes(b'[' + b'0,' * 10 + b'0]')
    fails(lambda: files.read_json(path), 'more than 10 bytes')


def test_sha256(tmp_path):
    data = os.urandom(3_000_000)
    (tmp_path / 'a').write_bytes(data)
    assert files.sha256(tmp_path / 'a') == hashlib.sha256(data).hexdigest()
    fails(lambda: files.sha256(tmp_path / 'no'), 'no: No such file')


# ---------------------------------------------------------------- writing

def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'deep' / 'er' / 'a.txt'
    files.write_text(path, 'old')
    assert os.listdir(path.parent) == ['a.txt']
    with pytest.raises(ZeroDivisionError), files.atomic_path(path) as temporary:
        Path(temporary).write_text('half')
        assert path.read_text() == 'old' and Path(temporary).parent == path.parent
        raise ZeroDivisionError
    assert path.read_text() == 'old' and os.listdir(path.parent) == ['a.txt']
    with files.atomic_path(path) as temporary:
        Path(temporary).write_text('new')
    assert path.read_text() == 'new' and os.listdir(path.parent) == ['a.txt']


def test_what_is_written_has_the_rights_of_other_files(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / 'a', '')
    finally:
        os.umask(before)
    assert (tmp_path / 'a').stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize('number', [errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EROFS, errno.ENOSYS])
def test_a_mount_that_refuses_chmod(tmp_path, monkeypatch, number):
    """CIFS and some FUSE file systems: the rights of a file are no reason not to write it."""
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, 'chmod', refuse)
    files.write_text(tmp_path / 'a.txt', 'text')
    files.save_torch([1], tmp_path / 'a.pth')
    assert (tmp_path / 'a.txt').read_text() == 'text' and sorted(os.listdir(tmp_path)) == ['a.pth', 'a.txt']


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))
    for name in 'flock', 'lockf':
        monkeypatch.setattr(files.fcntl, name, refuse)
    files.write_text(tmp_path / 'a', 'text')
    (tmp_path / '.a.x.tmp').write_text('of whom?')
    files.remove_leftovers(tmp_path, '.a.*.tmp')
    assert sorted(os.listdir(tmp_path)) == ['.a.x.tmp', 'a']
    files.hold_folder(tmp_path / 'folder', wait=1).close()


@pytest.mark.parametrize('where, words', [
    ('file/a', 'cannot be written'), ('file/b/a', 'cannot be written'), ('folder', 'a folder is there'),
    ('x' * 300, 'File name too long'), ('x' * 245, 'File name too long'), ('x' * 300 + '/a', 'File name too long'),
    ('/proc/nowhere/a', 'cannot be written')])
def test_what_cannot_be_written_is_said_before_and_when_it_is(tmp_path, where, words):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder').mkdir()
    path = tmp_path / where
    fails(lambda: files.check_writable(path), str(path), words, 'choose another folder or name')
    fails(lambda: files.check_writable(path, 'do this'), '; do this$')
    fails(lambda: files.write_text(path, 'x'), str(path), words, 'choose another folder')
    fails(lambda: files.save_torch([], path), str(path), words)
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder'] and not os.listdir(tmp_path / 'folder')


@pytest.mark.parametrize('number', [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(files.tempfile, 'mkstemp', refuse)
    for write in files.check_writable, lambda path: files.write_text(path, ''):
        fails(lambda: write(tmp_path / 'a'), f'cannot be written .{os.strerror(number)}', 'choose another folder')


def test_check_writable_leaves_what_is_there(tmp_path):
    files.check_writable(tmp_path / 'new' / 'a')
    assert os.listdir(tmp_path / 'new') == []
    (tmp_path / 'a').write_text('old')
    files.check_writable(tmp_path / 'a')
    assert (tmp_path / 'a').read_text() == 'old' and sorted(os.listdir(tmp_path)) == ['a', 'new']


def test_names_that_are_not_utf8_are_written_escaped(tmp_path):
    files.write_text(tmp_path / 'a', os.fsdecode(b'caf\xe9.jpg') + ' ü')
    assert (tmp_path / 'a').read_bytes() == b'caf\\udce9.jpg \xc3\xbc'


@pytest.mark.parametrize('limit', [0, 1000, 50_000])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, limit):
    path = tmp_path / 'file.pth'
    files.save_torch({'weights': torch.zeros(10)}, path)
    before = path.read_bytes()
    with no_space(limit):
        fails(lambda: files.save_torch({'weights': torch.zeros(100_000)}, path), 'file.pth: cannot be written')
        fails(lambda: files.write_text(path, 'x' * 100_000), 'file.pth: cannot be written .File too large', 'choose')
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['file.pth']


def test_equal_values_give_equal_torch_files(tmp_path):
    for name in 'a', 'b':
        files.save_torch({'x': torch.arange(3), 'y': [1, 'z']}, tmp_path / name)
    assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()
    assert torch.load(tmp_path / 'a')['y'] == [1, 'z']


# ---------------------------------------------------------------- what killed processes leave, and living ones hold

@pytest.mark.slow
def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path):
    def write(ready):
        with files.atomic_path(tmp_path / 'a.npy') as temporary:
            Path(temporary).write_bytes(bytes(1000))
            ready()
            time.sleep(100)
    with forked(write):
        left, = tmp_path.iterdir()
        files.remove_leftovers(tmp_path, '.a.npy.*.tmp')
        assert left.exists()
    files.remove_leftovers(tmp_path, '.b.npy.*.tmp')
    assert left.exists()
    files.remove_leftovers(tmp_path, '.a.npy.*.tmp')
    assert not left.exists()
    files.remove_leftovers(tmp_path / 'nowhere', '*')


@pytest.mark.slow
def test_a_lock_has_one_holder_and_ends_with_it(tmp_path):
    path = tmp_path / 'lock'

    def hold(ready):
        lock = files.lock_file(path)
        if not lock.closed:
            ready()
        time.sleep(100)
    with forked(hold), pytest.raises(BlockingIOError, match='lock is locked'):
        files.lock_file(path)
    lock = files.lock_file(path)

    def try_lock(ready):
        with contextlib.suppress(BlockingIOError):
            files.lock_file(path)
            return
        ready()
        time.sleep(100)
    with forked(try_lock):  # a child does not keep its parent's lock, nor get it
        lock.close()
    files.lock_file(path).close()
    with pytest.raises(FileNotFoundError):
        files.lock_file(tmp_path / 'no' / 'lock')


@pytest.mark.slow
def test_a_folder_has_one_holder_and_another_waits(tmp_path):
    def hold(ready, seconds=100):
        with files.hold_folder(tmp_path / 'a' / 'b'):
            ready()
            time.sleep(seconds)

    def fails_now(wait):
        fails(lambda: files.hold_folder(tmp_path / 'a' / 'b', 'do this', wait),
              'a/b: another process is at work there; wait until it ends, or do this$')
    with forked(hold):
        fails_now(0)
    files.hold_folder(tmp_path / 'a' / 'b').close()
    with forked(hold):
        fails_now(0.1)
    with forked(lambda ready: hold(ready, 0.3)), files.hold_folder(tmp_path / 'a' / 'b', wait=60), \
            forked(lambda ready: (fails_now(0), ready())):
        pass
    (tmp_path / 'file').write_text('')
    fails(lambda: files.hold_folder(tmp_path / 'file', 'do this'), 'file: cannot be written', 'do this')


def test_whether_it_is_the_same_run(tmp_path):
    path = tmp_path / 'out' / 'run.json'
    made_of = {'seed': 1, 'data': ['a', (2, 3)]}
    assert not files.is_same_run(path, made_of, 'x')
    files.check_same(path, made_of)
    before = path.read_bytes()
    files.check_same(path, made_of)
    assert files.is_same_run(path, made_of | {'seed': 2}, 'x', ignored=('seed',)) and path.read_bytes() == before
    others = [({'seed': 2}, 'seed, data'), (made_of | {'size': 3}, 'size'), ({'data': made_of['data']}, 'seed')]
    for other, names in others:
        fails(lambda: files.check_same(path, other, '--folder'), f'out: holds results of another {names}; choose '
              'another --folder, or remove that folder$')
        fails(lambda: files.is_same_run(path, other, 'do this'), f'out: holds results of another {names}; do this$')
    files.write_text(path, '{"run": {"seed": 1, "data": ["a", [2, 3]]}, "size": 9}')
    assert files.is_same_run(path, made_of, 'x', field='run')
    fails(lambda: files.is_same_run(path, made_of, 'x', field='of'), 'another seed, data; x')
    files.write_text(path, '[]')
    fails(lambda: files.is_same_run(path, made_of, 'x', field='run'), 'another seed, data; x')


# ---------------------------------------------------------------- the web

@pytest.fixture
def server():
    """(address of a codebook on this machine, its SHA-256)."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if 'gone' not in self.path else 404)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass
    data = torch_bytes(torch.ones(2, 2))
    served = HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{served.server_port}/codebook.ckpt', hashlib.sha256(data).hexdigest()
    served.shutdown()
    served.server_close()


def test_downloads_are_compared_with_the_hash_of_their_address(server, tmp_path):
    url, right = server
    for address in url, f'{url}#sha256={right}':
        assert load_codebook(address).tolist() == [[1, 1], [1, 1]]
    path = files.download(url, tmp_path)
    assert path == str(tmp_path / 'codebook.ckpt') and files.sha256(path) == right
    refused(url, load_codebook, f'{url}#sha256={"0" * 64}', match=f'has SHA-256 {right}')
    for fragment in 'sha256=12', 'md5=' + '0' * 64, 'x':
        refused(url, load_codebook, f'{url}#{fragment}', match='64 hexadecimal digits')


def test_downloads_that_fail(server, tmp_path):
    url, _ = server
    gone = url.replace('codebook', 'gone')
    fails(lambda: files.download(gone, tmp_path), f'{gone}: cannot be fetched', '404')
    fails(lambda: files.download('http://127.0.0.1:9/x', tmp_path), 'http://127.0.0.1:9/x: cannot be fetched')
    fails(lambda: files.download('http://[::1/x', tmp_path), 'cannot be fetched')
    assert os.listdir(tmp_path) == []


def test_addresses():
    assert files.is_address('http://a/b') and files.is_address('https://a/b')
    assert not any(map(files.is_address, ['a/b', 'ftp://a/b', 'http:/a', Path('http://a')]))


# ---------------------------------------------------------------- what an output must not replace

def test_an_output_that_is_read_is_refused(tmp_path):
    (tmp_path / 'in').write_text('x')
    (tmp_path / 'link').symlink_to(tmp_path / 'in')
    for output in ('in', 'link', f'../{tmp_path.name}/in'):
        with pytest.raises(InputError, match='would be replaced by the output'):
            files.check_writable(tmp_path / output, inputs=[tmp_path / 'other', tmp_path / 'in'])
    files.check_writable(tmp_path / 'out', inputs=[tmp_path / 'in'])


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for action in (files.check_writable, lambda path: files.write_text(path, 'x')):
        with pytest.raises(InputError, match='pipe: cannot be written .a device, pipe or socket is there'):
            action(tmp_path / 'pipe')
    assert (tmp_path / 'pipe').is_fifo()


def test_what_a_link_points_to_is_written(tmp_path):
    (tmp_path / 'target').write_text('old')
    (tmp_path / 'link').symlink_to('target')
    files.write_text(tmp_path / 'link', 'new')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'target').read_text() == 'new'


def test_braces_that_count_too_far_are_refused_at_once():
    with pytest.raises(InputError, match='counts 1,000,000,000 files'):
        files.expand_files('x-{0..999999999}.tar')
