"""Token files: golden bytes, round trips, the cache, and what bad files get."""
import gzip
import io
import json
import os
import re

import numpy as np
import pytest
import torch

import token_dataset as td
from utils import InputError


def make_set(folder, n=12, grid=4, codes=391, name='a', seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, codes, (n, grid * grid)).astype(np.uint16)
    y = rng.integers(0, 10, n)
    files = folder / f'{name}-token.data.bin.gz', folder / f'{name}-label.txt'
    td.write_tokens(*files, x, y)
    return files, x, y


def rewrite(token_file, stream=None, index=None):
    """Replace the stream or the index of a token file."""
    if stream is not None:
        token_file.write_bytes(td.gzip_bytes(bytes(stream)))
    if index is not None:
        npy = io.BytesIO()
        np.save(npy, index)
        td.index_path(token_file).write_bytes(td.gzip_bytes(npy.getvalue()))


def parts(token_file):
    return bytearray(gzip.decompress(token_file.read_bytes())), td.read_index(token_file)


def slow_decode(stream):
    out, i = [], 0
    while i < len(stream):
        if stream[i] == 255:
            out.append(255 + stream[i + 1])
            i += 2
        else:
            out.append(stream[i])
            i += 1
    return out


# ---------------------------------------------------------------- format

def test_golden_file_reads(golden):
    z = golden('codec.npz')
    codes = td.open_codes(golden.folder / 'sample-token.data.bin.gz', cache='none')
    assert codes.dtype == np.uint16 and np.array_equal(codes, z['tokens'])
    assert np.array_equal(td.read_labels(golden.folder / 'sample-label.txt'), z['labels'])


def test_golden_file_is_written_byte_for_byte(golden, tmp_path):
    z = golden('codec.npz')
    td.write_tokens(tmp_path / 'sample-token.data.bin.gz', tmp_path / 'sample-label.txt', z['tokens'], z['labels'])
    for name in ('sample-token.data.bin.gz', 'sample-token.index.npy.gz'):
        assert gzip.decompress((tmp_path / name).read_bytes()) == \
            gzip.decompress((golden.folder / name).read_bytes()), name
    assert (tmp_path / 'sample-label.txt').read_bytes() == (golden.folder / 'sample-label.txt').read_bytes()


@pytest.mark.parametrize('codes', [1, 255, 256, 391, 510])
def test_round_trip_against_slow_decoder(codes):
    x = np.random.default_rng(codes).integers(0, codes, (20, 64))
    stream, index = td.encode_codes(x)
    assert slow_decode(stream.tolist()) == x.ravel().tolist()
    decoded, _ = td.decode_stream(stream)
    assert np.array_equal(decoded.reshape(x.shape), x)
    assert [slow_decode(stream[a:b].tolist()) for a, b in zip(index, index[1:])] == x.tolist()


def test_codes_beyond_the_format_are_refused():
    with pytest.raises(ValueError, match='0 to 509'):
        td.encode_codes(np.array([[510]]))


def test_equal_content_gives_equal_files(tmp_path):
    (tmp_path / 'one').mkdir()
    (tmp_path / 'two').mkdir()
    (a, la), *_ = make_set(tmp_path / 'one', name='first')
    (b, lb), *_ = make_set(tmp_path / 'two', name='second')
    assert a.read_bytes() == b.read_bytes() and la.read_bytes() == lb.read_bytes()


def test_many_chunks_decode_like_one(tmp_path, monkeypatch):
    (tokens, _), x, _ = make_set(tmp_path, n=50)
    monkeypatch.setattr(td, 'CHUNK_BYTES', 70)  # about three images, and not a whole number of them
    assert np.array_equal(td.open_codes(tokens, 'none'), x)
    monkeypatch.setattr(td, 'CHUNK_BYTES', 1)  # less than one image
    assert np.array_equal(td.open_codes(tokens, 'none'), x)


# ---------------------------------------------------------------- dataset and cache

def test_batches_come_in_order_and_whole(tmp_path):
    files, x, y = make_set(tmp_path, n=23)
    data = td.TokenDataset(*files, 391)
    assert (len(data), data.grid) == (23, 4)
    indices = np.random.default_rng(1).permutation(23)
    got = list(data.batches(indices, 5, torch.device('cpu')))
    assert [len(c) for c, _ in got] == [5, 5, 5, 5, 3]
    assert got[0][0].dtype == torch.uint16 and got[0][0].shape == (5, 4, 4)
    assert np.array_equal(torch.cat([c for c, _ in got]).numpy().reshape(23, 16), x[indices])
    assert np.array_equal(torch.cat([l for _, l in got]).numpy(), y[indices])
    assert len(list(data.batches(indices, 5, torch.device('cpu'), drop_last=True))) == 4


def test_cache_is_reused_and_a_changed_source_never_served_stale(tmp_path):
    files, x, _ = make_set(tmp_path, seed=0)
    cache = tmp_path / 'cache'
    assert np.array_equal(td.open_codes(files[0], cache), x)
    first, = cache.iterdir()
    stat = first.stat()
    td.open_codes(files[0], cache)
    assert [*cache.iterdir()] == [first] and first.stat() == stat
    times = files[0].stat()
    _, x2, _ = make_set(tmp_path, seed=1)  # another content under the same name ...
    os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))  # ... and the same time
    assert np.array_equal(td.open_codes(files[0], cache), x2)
    second, = cache.iterdir()  # the stale one is gone
    assert second != first


def test_two_files_of_one_name_share_a_cache_folder(tmp_path):
    for folder in ('p', 'q'):
        (tmp_path / folder).mkdir()
    (a, _), xa, _ = make_set(tmp_path / 'p', seed=0)
    (b, _), xb, _ = make_set(tmp_path / 'q', seed=1)
    for _ in range(2):
        assert np.array_equal(td.open_codes(a, tmp_path / 'c'), xa)
        assert np.array_equal(td.open_codes(b, tmp_path / 'c'), xb)
    assert len([*(tmp_path / 'c').iterdir()]) == 2


def test_a_failed_decode_leaves_nothing_behind(tmp_path):
    (tokens, _), *_ = make_set(tmp_path)
    stream, _ = parts(tokens)
    rewrite(tokens, stream=stream[:-1])
    with pytest.raises(InputError):
        td.open_codes(tokens, tmp_path / 'cache')
    assert [*(tmp_path / 'cache').iterdir()] == []


# ---------------------------------------------------------------- bad files: one line that names the file

def fails(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert '\n' not in message
    for word in words:
        assert re.search(word, message), message


def test_bad_streams(tmp_path):
    (tokens, labels), x, _ = make_set(tmp_path)
    stream, index = parts(tokens)
    load = lambda: td.TokenDataset(tokens, labels, 391, 'none')  # noqa: E731
    name = tokens.name

    fails(lambda: td.TokenDataset(tmp_path / 'no.data.bin.gz', labels, 391), 'no.data.bin.gz|no.index', 'o such file')
    fails(lambda: td.TokenDataset(tmp_path / 'odd.gz', labels, 391), 'odd.gz', 'NAME.data.bin.gz')
    tokens.write_bytes(tokens.read_bytes()[:-20])
    fails(load, name, 'truncated')
    tokens.write_bytes(b'no gzip at all')
    fails(load, name, 'gzip')
    rewrite(tokens, stream=stream[:-3])
    fails(load, name, 'ends at byte')
    rewrite(tokens, stream=stream + b'\0')
    fails(load, name, 'goes on')

    escaped = bytearray(stream)
    escaped[index[4] - 1] = 255
    rewrite(tokens, stream=escaped)
    fails(load, name, 'dangling escape')
    escaped = bytearray(stream)
    escaped[-1] = 255
    rewrite(tokens, stream=escaped)
    fails(load, name, 'dangling escape')
    rewrite(tokens, stream=bytes(16 * 6 + 15 + 16 * 5), index=np.r_[np.arange(7) * 16, 111 + np.arange(6) * 16])
    fails(load, name, 'image 6 has 15 codes')
    rewrite(tokens, stream=bytes(12 * 12), index=np.arange(13) * 12)
    fails(load, name, '12 codes', 'no square')


def test_bad_indices(tmp_path):
    (tokens, labels), *_ = make_set(tmp_path)
    stream, index = parts(tokens)
    load = lambda: td.TokenDataset(tokens, labels, 391, 'none')  # noqa: E731
    name = td.index_path(tokens).name
    swapped = index.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    for bad, words in ((swapped, 'do not rise'), (index + 1, 'do not rise'), (index.astype(float), 'integer offsets'),
                       (index[:, None], 'integer offsets'), (index[:1], 'integer offsets')):
        rewrite(tokens, index=bad)
        fails(load, name, words)
    td.index_path(tokens).write_bytes(td.gzip_bytes(b'not numpy'))
    fails(load, name, 'not a .npy')
    rewrite(tokens, index=np.array([{}], dtype=object))  # a pickle inside a .npy
    fails(load, name, 'not a .npy')
    rewrite(tokens, index=index[:-1])
    fails(load, tokens.name, 'goes on after')
    td.index_path(tokens).unlink()
    fails(load, name, 'o such file')


def test_bad_labels_and_codebooks(tmp_path):
    (tokens, labels), x, _ = make_set(tmp_path)
    load = lambda: td.TokenDataset(tokens, labels, 391, 'none')  # noqa: E731
    fails(lambda: td.TokenDataset(tokens, labels, int(x.max()), 'none'), tokens.name, f'code {x.max()}')
    good = labels.read_text()
    labels.write_text(good + '3\n')
    fails(load, labels.name, '13 labels', '12 images')
    labels.write_text(good.replace('\n', '\ncat\n', 1))
    fails(load, labels.name, 'line 2', 'cat')
    labels.write_text(good + '\n')
    fails(load, labels.name, 'line 13')
    labels.write_text('-1\n' + good)
    fails(load, labels.name, 'negative')
    labels.write_text('9' * 30 + '\n')
    fails(load, labels.name)
    labels.write_text('')
    fails(load, labels.name, 'no labels')
    labels.write_bytes(b'\xff\xfe')
    fails(load, labels.name)
    labels.unlink()
    fails(load, labels.name, 'o such file')

    path = tmp_path / 'codebook.ckpt'
    for value in (torch.zeros(3), torch.zeros(3, 3, dtype=torch.int64), {'a': 1}):
        torch.save(value, path)
        fails(lambda: td.load_codebook(path), 'codebook.ckpt', 'expected a float tensor')
    path.write_bytes(b'junk')
    fails(lambda: td.load_codebook(path), 'codebook.ckpt')
    path.write_bytes(b'')
    fails(lambda: td.load_codebook(path), 'codebook.ckpt')
    fails(lambda: td.load_codebook(tmp_path / 'none.ckpt'), 'none.ckpt', 'o such file')


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ('/tmp/seit-test-code-ran',)


def test_no_file_runs_code(tmp_path):
    torch.save(RunsCode(), tmp_path / 'codebook.ckpt')
    fails(lambda: td.load_codebook(tmp_path / 'codebook.ckpt'), 'refused', 'mkdir')
    assert not os.path.exists('/tmp/seit-test-code-ran')


def test_bad_synonyms(tmp_path):
    path = tmp_path / 'synonyms.json'
    good = {str(c): [(c + 1) % 8, (c + 2) % 8] for c in range(8)}
    path.write_text(json.dumps(good))
    table, count = td.load_synonyms(path, 8, 5)
    assert table.shape == (8, 5) and table[3, :2].tolist() == [4, 5] and count.tolist() == [2] * 8
    assert td.load_synonyms(path, 8, 1)[0].tolist() == [[(c + 1) % 8] for c in range(8)]
    for bad, words in (({**good, '3': []}, 'no synonyms for 1 of 8'), ({**good, '3': [8]}, 'code 3'),
                       ({**good, '3': ['1']}, 'code 3'), ({**good, '3': [True]}, 'code 3'),
                       ({**good, '3': 1}, 'code 3'), ([], 'an object')):
        path.write_text(json.dumps(bad))
        fails(lambda: td.load_synonyms(path, 8, 5), 'synonyms.json', words)
    path.write_text(json.dumps({k: good[k] for k in '01234'}))
    fails(lambda: td.load_synonyms(path, 8, 5), 'no synonyms for 3 of 8', 'first: 5')
    path.write_text('{')
    fails(lambda: td.load_synonyms(path, 8, 5), 'synonyms.json', 'not JSON')
