"""The decoded file that a node shares: made once, never stale, never half; what a system refuses is said."""
import builtins
import errno
import gzip
import itertools
import mmap
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from fileio.torch_files import digest_of
from helpers import (codes_of_kind, failing_open, fails, in_child, make_compact_set, make_set, make_shards,
                     make_wide_set, no_space, npy, open_codes, refused, rewrite, unpack, write_raw_set)
from token_files import cache as token_cache
from token_files.published import companion_path
from token_files.token_file import open_token_file, write_set


def cached(folder):
    """The one file in a cache folder."""
    file, = folder.glob('*.npy')
    return file


# ---------------------------------------------------------------- names and reuse

def test_cache_is_reused_and_a_changed_source_never_served_stale(tmp_path):
    files, x, _ = make_set(tmp_path, seed=0)
    cache = tmp_path / 'cache'
    assert np.array_equal(open_codes(files[0], cache), x)
    first = cached(cache)
    stat = first.stat()
    open_codes(files[0], cache)
    assert [*cache.glob('*.npy')] == [first] and first.stat() == stat
    times = files[0].stat()
    _, x2, _ = make_set(tmp_path, seed=1)  # another content under the same name ...
    os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))  # ... and the same time
    assert np.array_equal(open_codes(files[0], cache), x2)
    assert cached(cache) != first  # the stale one is gone


def test_two_files_of_one_name_share_a_cache_folder(tmp_path):
    for folder in ('p', 'q'):
        (tmp_path / folder).mkdir()
    (a, _), xa, _ = make_set(tmp_path / 'p', seed=0)
    (b, _), xb, _ = make_set(tmp_path / 'q', seed=1)
    for _ in range(2):
        assert np.array_equal(open_codes(a, tmp_path / 'c'), xa)
        assert np.array_equal(open_codes(b, tmp_path / 'c'), xb)
    assert len([*(tmp_path / 'c').glob('*.npy')]) == len([*(tmp_path / 'c').glob('*.sha256')]) == 2


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path / 'caf') + b'\xe9'))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip('this file system takes UTF-8 alone')
    files, x, _ = make_set(folder)
    assert np.array_equal(open_codes(files[0]), x) and np.array_equal(open_codes(files[0], tmp_path / 'cache'), x)


def test_the_name_is_what_it_always_was(tmp_path, monkeypatch):
    """Built caches stay valid: names of published caches, for files of a fixed place and time."""
    monkeypatch.setattr(Path, 'absolute', lambda path: Path('/sets') / path.name)
    monkeypatch.setattr(token_cache, '_fingerprint', lambda path: (len(path.name), 17, '0123456789abcdef'))
    files, _, _ = make_set(tmp_path, name='imagenet1k-val')
    wide, _ = make_wide_set(tmp_path, name='wide')
    one, other = open_token_file(files[0]), open_token_file(wide[0])
    assert str(token_cache.cache_path([one])) == '/sets/imagenet1k-val-token.81af2022.codes-f445322f1881599e.npy'
    assert str(token_cache.cache_path([one, other], 'c')) == \
        'c/imagenet1k-val-token.4fe43648.codes-46d1644e0734b146.npy'


def test_an_older_cache_of_the_same_files_is_removed_and_no_other(tmp_path):
    cache = tmp_path / 'cache'
    (a, _), *_ = make_set(tmp_path, name='a[1]', seed=0)  # a name that a glob would read as another
    (b, _), *_ = make_set(tmp_path, name='a1', seed=0)
    open_codes(a, cache)
    open_codes(b, cache)
    assert len([*cache.glob('*.npy')]) == len([*cache.glob('*.sha256')]) == 2
    make_set(tmp_path, name='a[1]', seed=1)
    open_codes(a, cache)
    assert sorted(path.name.split('.')[0] for path in cache.glob('*.sha256')) == ['a1-token', 'a[1]-token']


def test_a_warm_opening_reads_manifest_and_index_once(tmp_path, monkeypatch):
    (tokens, _), _ = make_wide_set(tmp_path)
    x = open_codes(tokens, tmp_path / 'cache')
    opened = []

    def watch(module, name):
        real = getattr(module, name)

        def watched(file, *args, **kwargs):
            opened.append((f'{module.__name__}.{name}', Path(str(file)).name))
            return real(file, *args, **kwargs)
        monkeypatch.setattr(module, name, watched)
    watch(builtins, 'open')
    watch(gzip, 'open')
    file = open_token_file(tokens)
    assert opened == [('builtins.open', 'w-token.json'), ('gzip.open', 'w-token.index.npy.gz'),
                      ('builtins.open', 'w-token.index.npy.gz')]  # the last by gzip
    opened.clear()
    assert np.array_equal(token_cache.open_codes([file], tmp_path / 'cache'), x)
    read = [name for kind, name in opened if kind == 'gzip.open' or name.endswith('.json')]
    assert read == []  # of stream and index only the last eight bytes, of the cache its header
    assert [name for _, name in opened if 'token.' in name and 'codes' not in name] == [
        'w-token.data.bin.gz', 'w-token.index.npy.gz']


def test_none_leaves_no_file(tmp_path):
    (tokens, _), x, _ = make_set(tmp_path)
    before = sorted(tmp_path.iterdir())
    codes = open_codes(tokens, 'none')
    assert np.array_equal(codes, x) and not isinstance(codes, np.memmap) and sorted(tmp_path.iterdir()) == before


def test_the_cache_is_mapped_read_only(tmp_path):
    (tokens, _), *_ = make_set(tmp_path)
    codes = open_codes(tokens)
    assert isinstance(codes, np.memmap) and not codes.flags.writeable


# ---------------------------------------------------------------- the digest beside it

def digest_in(folder, token_file, cache):
    files = [open_token_file(token_file)]
    return token_cache.digest_of_codes(files, token_cache.open_codes(files, cache), cache)


def test_the_digest_is_kept_beside_the_cache(tmp_path, monkeypatch):
    (tokens, _), codes, _ = make_set(tmp_path / 'a', codes=300)
    digest = digest_of(codes.astype(np.uint16))
    assert digest_in(tmp_path, tokens, tmp_path / 'cache') == digest
    kept, = (tmp_path / 'cache').glob('*.sha256')
    assert kept.read_text() == digest + '\n'
    with monkeypatch.context() as patch:  # a second start does not read the codes for it
        patch.setattr(token_cache, 'digest_of', None)
        assert digest_in(tmp_path, tokens, tmp_path / 'cache') == digest
    for content in ('', 'x', digest[1:], '\xff'):  # of a cache of before, or damaged
        kept.write_bytes(content.encode('latin-1'))
        assert digest_in(tmp_path, tokens, tmp_path / 'cache') == digest == kept.read_text().strip()
    kept.unlink()
    with monkeypatch.context() as patch:  # a cache that this user may only read
        patch.setattr(token_cache, 'write_text', no_permission)
        assert digest_in(tmp_path, tokens, tmp_path / 'cache') == digest
    assert not kept.exists()
    assert digest_in(tmp_path, tokens, 'none') == digest


def no_permission(path, text):
    raise token_cache.InputError(f'{path}: cannot be written (Permission denied)')


def test_the_digest_is_of_codes_whatever_their_format(tmp_path):
    codes = np.random.default_rng(0).integers(0, 300, (40, 64))
    digests = set()
    for name, form in (('p', 'escaped-bytes'), ('u', 'uint16-le')):
        path = tmp_path / f'{name}-token.data.bin.gz'
        write_set(path, [codes], 40, manifest={'format': form})
        digests.add(digest_in(tmp_path, path, tmp_path / 'cache'))
    compact, _ = make_compact_set(tmp_path / 'compact', codes)
    digests.add(digest_in(tmp_path, compact, tmp_path / 'cache'))
    assert len(digests) == 1
    codes[7, 5] ^= 1
    write_set(path, [codes], 40, manifest={'format': 'uint16-le'})
    assert digest_in(tmp_path, path, tmp_path / 'cache') not in digests


# ---------------------------------------------------------------- shards

def test_a_changed_shard_is_never_served_stale(tmp_path):
    _, x, _ = make_shards(tmp_path)
    tokens = f'{tmp_path}/s-*-token.data.bin.gz'
    for cache in 'none', tmp_path / 'cache':
        assert np.array_equal(open_codes(tokens, cache), x)
    cached(tmp_path / 'cache')  # one file for all
    make_set(tmp_path, 4, name='s-1', seed=9)
    assert not np.array_equal(open_codes(tokens, tmp_path / 'cache'), x)
    cached(tmp_path / 'cache')


def test_shards_of_both_formats_read_together(tmp_path):
    (a, _), x, _ = make_set(tmp_path)
    (b, _), w = make_wide_set(tmp_path)
    assert np.array_equal(open_codes(f'{a},{b}'), np.r_[x, w])


def test_shards_of_different_grids_are_refused(tmp_path):
    make_shards(tmp_path)
    make_set(tmp_path, 4, grid=5, name='s-1')
    fails(lambda: open_codes(f'{tmp_path}/s-*-token.data.bin.gz'), 's-1-token.*25 codes.*s-0-token.*16')
    assert not [*tmp_path.glob('*.npy')]


# ---------------------------------------------------------------- failures leave nothing

def test_a_failed_decode_leaves_nothing_behind(tmp_path):
    (tokens, _), *_ = make_set(tmp_path)
    stream, _ = unpack(tokens)
    rewrite(tokens, stream=stream[:-1])
    fails(lambda: open_codes(tokens, tmp_path / 'cache'), 'ends at byte')
    assert [*(tmp_path / 'cache').iterdir()] == []


def big_set(folder):
    codes = np.random.default_rng(0).integers(0, 391, (2000, 64))
    write_set(folder / 'big-token.data.bin.gz', [codes], len(codes))
    return folder / 'big-token.data.bin.gz', codes


@pytest.mark.slow
def test_full_disk_while_decoding(small_disk, tmp_path):
    folder = small_disk(200_000)
    tokens, codes = big_set(tmp_path)
    fails(lambda: open_codes(tokens, folder), 'cannot be written .No space left', '--token-cache')
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize('limit', [0, 1000, 200_000])
def test_a_file_that_cannot_grow_while_decoding(tmp_path, limit):
    tokens, codes = big_set(tmp_path)
    with no_space(limit):
        fails(lambda: open_codes(tokens, tmp_path / 'cache'), 'cannot be written .File too large', '--token-cache')
    assert [*(tmp_path / 'cache').iterdir()] == []
    assert np.array_equal(open_codes(tokens, tmp_path / 'cache'), codes)


@pytest.mark.parametrize('number', [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_fallocate(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, 'posix_fallocate', refuse)
    (tokens, _), x, _ = make_set(tmp_path)
    assert np.array_equal(open_codes(tokens), x)


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_space_that_fallocate_refuses(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, 'posix_fallocate', refuse)
    (tokens, _), *_ = make_set(tmp_path)
    fails(lambda: open_codes(tokens, tmp_path / 'c'), 'cannot be written', '--token-cache')
    assert [*(tmp_path / 'c').iterdir()] == []


def killed_decoding(files, allocate, device):
    """Instead of decode_into."""
    allocate((12000, 64))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_what_a_killed_decoding_left_is_removed_by_the_next(tmp_path, monkeypatch):
    (tokens, _), x, _ = make_set(tmp_path, name='a[1]')
    cache = tmp_path / 'cache'
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, 'decode_into', killed_decoding)
        assert in_child(lambda: open_codes(tokens, cache)) == (-signal.SIGKILL, '')
    left, = cache.iterdir()
    assert left.name.endswith('.tmp') and left.stat().st_size > 12000 * 64 * 2
    other = cache / f'.other{left.name}'  # of another set
    other.write_bytes(b'')
    assert np.array_equal(open_codes(tokens, cache), x)
    assert other.exists() and not left.exists()
    left.write_bytes(b'')  # and by one that finds a whole cache, as when another process made it
    open_codes(tokens, cache)
    assert not left.exists()


def test_what_a_living_process_writes_stays(tmp_path):
    """Two nodes that share a folder may decode the same set at once."""
    (tokens, _), x, _ = make_set(tmp_path)
    file = open_token_file(tokens)
    path = token_cache.cache_path([file])
    with token_cache.atomic_path(path) as temporary:
        assert np.array_equal(open_codes(tokens), x)
        assert os.path.exists(temporary)
        Path(temporary).write_bytes(npy(x))
    assert np.array_equal(open_codes(tokens), x)


# ---------------------------------------------------------------- caches that cannot be read or written

def test_a_damaged_cache_is_refused(tmp_path):
    path = write_raw_set(tmp_path, bytes(8), [0, 4, 8])
    assert open_codes(path).shape == (2, 4)
    cache = next(tmp_path.glob('*.npy'))
    whole = cache.read_bytes()
    for content in whole[:-1], whole[:60], b'', b'junk', b'PK\3\4' + whole, whole.replace(b'<u2', b'<i4'):
        cache.write_bytes(content)
        refused(cache, open_codes, path, match='(damaged|no) cache.*delete it')
    cache.write_bytes(npy(np.zeros((0, 4), np.uint16)))
    refused(cache, open_codes, path, match='(damaged|no) cache.*delete it')
    cache.write_bytes(npy(np.array([{}])))
    refused(cache, open_codes, path, match='damaged cache.*delete it')


SYSTEM = [errno.EACCES, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENODEV, errno.EPERM, errno.EINVAL, errno.EIO,
          errno.ESTALE]


@pytest.mark.parametrize('number', SYSTEM)
def test_a_cache_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch, number):
    """Another user's, say."""
    (tokens, _), *_ = make_set(tmp_path)
    open_codes(tokens, tmp_path / 'cache')
    path = cached(tmp_path / 'cache')
    with monkeypatch.context() as patch:
        failing_open(patch, path, number)
        with pytest.raises(token_cache.InputError) as caught:
            open_codes(tokens, tmp_path / 'cache')
    message = str(caught.value)
    assert str(path) in message and os.strerror(number) in message and '--token-cache' in message
    assert 'damaged' not in message and 'delete' not in message
    assert path.exists()


@pytest.mark.parametrize('number', SYSTEM)
def test_a_cache_that_cannot_be_mapped_is_not_called_damaged(tmp_path, monkeypatch, number):
    """Some network file systems have no maps."""
    (tokens, _), *_ = make_set(tmp_path)
    open_codes(tokens, tmp_path / 'cache')

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(mmap, 'mmap', refuse)
    with pytest.raises(token_cache.InputError, match='--token-cache') as caught:
        open_codes(tokens, tmp_path / 'cache')
    assert os.strerror(number) in str(caught.value) and 'damaged' not in str(caught.value)
    (tmp_path / 'new').mkdir()
    fails(lambda: open_codes(tokens, tmp_path / 'new'), os.strerror(number), '--token-cache')  # while decoding
    assert [*(tmp_path / 'new').iterdir()] == []


@pytest.mark.parametrize('make', ['file', 'below a file', 'proc'])
def test_a_cache_folder_that_cannot_be_written(tmp_path, make):
    (tokens, _), *_ = make_set(tmp_path)
    (tmp_path / 'file').write_text('')
    folder = {'file': tmp_path / 'file', 'below a file': tmp_path / 'file' / 'x', 'proc': '/proc/nowhere'}[make]
    fails(lambda: open_codes(tokens, folder), 'cannot be written', 'choose another folder with --token-cache')


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason='only root can be somebody else')
def test_a_cache_of_another_user(tmp_path):
    shared = tmp_path / 'shared'
    shared.mkdir()
    (tokens, _), *_ = make_set(shared)
    open_codes(tokens, shared)
    cache = next(shared.glob('*.npy'))
    cache.chmod(0o600)
    shared.chmod(0o777)
    for folder in itertools.takewhile(lambda folder: folder != Path(tempfile.gettempdir()), shared.parents):
        folder.chmod(0o755)
    (shared / 'private').mkdir(mode=0o700)

    def messages():
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)
        return '\n'.join(message_of(open_codes, tokens, folder) for folder in (shared, shared / 'private'))
    code, text = in_child(messages)
    assert code == 0, text
    readable, private = text.splitlines()
    assert 'cannot be mapped (Permission denied)' in readable and '--token-cache' in readable
    assert 'cannot be written (Permission denied)' in private and '--token-cache' in private
    assert 'damaged' not in text


def message_of(action, *args):
    with pytest.raises(token_cache.InputError) as caught:
        action(*args)
    return str(caught.value)


def test_memory_that_is_not_there(monkeypatch, tmp_path):
    def refuse(*_):
        raise MemoryError
    (tokens, _), *_ = make_set(tmp_path)
    monkeypatch.setattr(np, 'empty', refuse)
    fails(lambda: token_cache.in_memory((1 << 40, 1024)), 'do not fit into memory: use a cache')


def test_a_source_that_vanishes(tmp_path):
    (tokens, _), *_ = make_set(tmp_path)
    file = open_token_file(tokens)
    companion_path(tokens).unlink()
    fails(lambda: token_cache.open_codes([file]), 'a-token.index.npy.gz: No such file')
    tokens.unlink()
    fails(lambda: token_cache.open_codes([file]), 'a-token.data.bin.gz: No such file')


def test_times_are_part_of_the_name(tmp_path):
    (tokens, _), *_ = make_set(tmp_path)
    file = open_token_file(tokens)
    before = token_cache.cache_path([file])
    os.utime(tokens, (time.time() - 100,) * 2)
    assert token_cache.cache_path([file]) != before


def test_the_name_of_a_compact_cache_changes_with_the_model(tmp_path):
    path, _ = make_compact_set(tmp_path, codes_of_kind('copied', 9, 4))
    model = tmp_path / 'a-token.model.bin'
    x = open_codes(path)
    before, = tmp_path.glob('*.npy')
    assert before.name.startswith('a-token.') and before == token_cache.cache_path([open_token_file(path)])
    stat = model.stat()
    data = model.read_bytes()
    file = open_token_file(path)
    model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size and time, but other bytes
    assert token_cache.cache_path([file]) != before
    fails(lambda: open_codes(path), 'a-token.model.bin: is not the model')
    model.write_bytes(data)
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10 ** 9))
    assert token_cache.cache_path([file]) != before
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert token_cache.cache_path([file]) == before
    make_compact_set(tmp_path, codes_of_kind('copied', 9, 4, 1))  # another set under the same names
    other = open_codes(path)
    assert np.array_equal(other, codes_of_kind('copied', 9, 4, 1)) and not np.array_equal(other, x)
    assert len([*tmp_path.glob('*.npy')]) == 1 and not before.exists()


def test_a_compact_set_that_vanishes(tmp_path):
    path, _ = make_compact_set(tmp_path, codes_of_kind('copied', 9, 4))
    file = open_token_file(path)
    (tmp_path / 'a-token.model.bin').unlink()
    fails(lambda: token_cache.open_codes([file]), 'a-token.model.bin: No such file')
    path.unlink()
    fails(lambda: token_cache.open_codes([file]), 'a-token.data.bin: No such file')
