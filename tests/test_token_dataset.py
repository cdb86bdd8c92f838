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


def test_runs_of_images_are_written_like_one_array(tmp_path):
    (tokens, labels), x, y = make_set(tmp_path, n=50)
    stream, index = td.encode_codes(x)
    assert tokens.read_bytes() == td.gzip_bytes(stream.tobytes())
    runs = tmp_path / 'runs-token.data.bin.gz'
    td.write_tokens(runs, tmp_path / 'runs-label.txt', (x[i:i + 7] for i in range(0, 50, 7)), y)
    assert np.array_equal(td.read_index(runs), index) and gzip.decompress(runs.read_bytes()) == stream.tobytes()


# ---------------------------------------------------------------- 16-bit codes and the card that says so

def make_wide_set(folder, n=12, grid=4, codes=8192, name='w', **card):
    x = np.random.default_rng(1).integers(0, codes, (n, grid * grid))
    x[0, 0] = codes - 1
    files = folder / f'{name}-token.data.bin.gz', folder / f'{name}-label.txt'
    td.write_tokens(*files, x, np.zeros(n, int), td.UINT16)
    td.card_path(files[0]).write_text(json.dumps({'format': td.UINT16, **card}))
    return files, x


@pytest.mark.parametrize('codes', [511, 65536])
def test_16_bit_codes_round_trip(tmp_path, codes, monkeypatch):
    files, x = make_wide_set(tmp_path, codes=codes, images=12, grid=4)
    assert gzip.decompress(files[0].read_bytes()) == x.astype('<u2').tobytes()
    assert np.array_equal(td.read_index(files[0]), np.arange(13) * 32)  # offsets stay in bytes
    assert np.array_equal(td.TokenDataset(*files, codes, tmp_path / 'cache').codes, x)
    monkeypatch.setattr(td, 'CHUNK_BYTES', 70)
    assert np.array_equal(td.open_codes(files[0], 'none'), x)
    with pytest.raises(ValueError, match='0 to 65535'):
        td.encode_uint16(np.array([[65536]]))


def test_formats_by_size_of_the_codebook():
    assert [td.format_for(k) for k in (1, 510, 511, 8192)] == [td.BYTES, td.BYTES, td.UINT16, td.UINT16]


def test_the_card_is_checked_and_its_format_part_of_the_cache(tmp_path):
    files, x = make_wide_set(tmp_path)
    card = td.card_path(files[0])
    assert card.name == 'w-token.json'
    load = lambda: td.TokenDataset(*files, 8192, tmp_path / 'cache')  # noqa: E731
    load()
    for text, words in (('{', 'not JSON'), ('[]', 'no object'), ('{"format": "uint32"}', 'uint32.*escaped-bytes'),
                        ('{"format": ["uint16-le"]}', 'none of the token formats'),
                        ('{"format": "uint16-le", "images": 13}', 'says images 13.*has 12'),
                        ('{"format": "uint16-le", "grid": 32}', 'says grid 32.*has 4'),
                        ('{"grid": 4}', 'escape|codes')):  # no format: the published one, which this is not
        card.write_text(text)
        for cached in [*(tmp_path / 'cache').iterdir()] if 'uint16' in text else []:
            cached.unlink()
        fails(load, words)
    card.unlink()
    fails(load, 'w-token.data.bin.gz', 'escape|codes')
    card.write_text('{"format": "uint16-le"}')
    td.write_tokens(*files, x % 300, np.zeros(12, int))  # escaped bytes under a card of 16-bit codes
    fails(load, 'w-token.data.bin.gz', 'odd number|codes')


# ---------------------------------------------------------------- shards

def make_shards(folder, sizes=(5, 4, 3), **kwargs):
    """Three shards, named out of order, and what they hold together in the order of their names."""
    sets = [make_set(folder, n, name=f's-{i}', seed=i, **kwargs) for i, n in reversed([*enumerate(sizes)])][::-1]
    return [files for files, *_ in sets], *(np.concatenate([s[i] for s in sets]) for i in (1, 2))


def test_shards_read_as_one_set(tmp_path):
    files, x, y = make_shards(tmp_path)
    tokens, labels = f'{tmp_path}/s-*-token.data.bin.gz', f'{tmp_path}/s-*-label.txt'
    for cache in ('none', tmp_path / 'cache'):
        data = td.TokenDataset(tokens, labels, 391, cache)
        assert np.array_equal(data.codes, x) and np.array_equal(data.labels, y)
    assert len([*(tmp_path / 'cache').iterdir()]) == 1  # one file for all
    assert data.bytes_on_disk() == sum(p.stat().st_size for f, _ in files for p in (f, td.index_path(f)))
    data = td.TokenDataset(','.join(str(f) for f, _ in files[::-1]), ', '.join(str(f) for _, f in files[::-1]), 391)
    assert np.array_equal(data.codes, np.r_[x[9:], x[5:9], x[:5]])  # a list keeps its order
    make_set(tmp_path, 4, name='s-1', seed=9)  # a changed shard is never served stale
    assert not np.array_equal(td.open_codes(tokens, tmp_path / 'cache'), x)
    assert len([*(tmp_path / 'cache').iterdir()]) == 1


def test_shards_of_both_formats_read_together(tmp_path):
    (a, la), x, _ = make_set(tmp_path)
    (b, lb), w = make_wide_set(tmp_path)
    assert np.array_equal(td.TokenDataset(f'{a},{b}', f'{la},{lb}', 8192).codes, np.r_[x, w])


def test_bad_shards_are_named(tmp_path):
    files, x, y = make_shards(tmp_path)
    tokens, labels = f'{tmp_path}/s-*-token.data.bin.gz', f'{tmp_path}/s-*-label.txt'
    load = lambda k=391: td.TokenDataset(tokens, labels, k, 'none')  # noqa: E731
    fails(lambda: td.TokenDataset(f'{tmp_path}/t-*-token.data.bin.gz', labels, 391), r't-\*.*no file matches')
    fails(lambda: td.TokenDataset(tokens, files[0][1], 391), '3 token files', '1 label files')
    shard = ([0] * 5 + [1] * 4 + [2] * 3)[int(x.max(1).argmax())]
    fails(lambda: load(int(x.max())), f's-{shard}-token.*holds code {x.max()}')
    files[1][1].write_text('1\n')
    files[2][1].write_text('1\n' * 6)  # as many labels as images in all, but not in each
    fails(load, r's-1-label.txt: 1 labels for the 4 images of .*s-1-token')
    make_set(tmp_path, 4, grid=5, name='s-1')
    fails(load, 's-1-token.*25 codes.*s-0-token.*16')
    files[1][0].write_bytes(b'junk')
    fails(load, 's-1-token', 'gzip')


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
    assert np.array_equal(torch.cat([labels for _, labels in got]).numpy(), y[indices])


def test_resident_and_travelling_batches_equal_mapped_ones(tmp_path):
    files, *_ = make_set(tmp_path, n=23, codes=510)
    data = td.TokenDataset(*files, 510)
    indices = np.random.default_rng(1).permutation(23)[:17]
    cpu = torch.device('cpu')
    mapped = list(data.batches(indices, 5, cpu))
    travelled = list(data._travelling_batches([indices[i:i + 5] for i in range(0, 17, 5)], cpu, False))
    data.keep_on(cpu)
    resident = list(data.batches(indices, 5, cpu))
    for other in (travelled, resident):
        assert len(other) == len(mapped)
        for (a, la), (b, lb) in zip(mapped, other):
            assert a.dtype == b.dtype and torch.equal(a.int(), b.int()) and torch.equal(la, lb)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_batches_on_cuda_equal_mapped_ones(tmp_path):
    files, *_ = make_set(tmp_path, n=23, codes=510)
    indices, gpu = np.arange(23)[::-1].copy(), torch.device('cuda', 0)
    data = td.TokenDataset(*files, 510)
    results = [list(data.batches(indices, 5, gpu, pin)) for pin in (False, True)]
    data.keep_on(gpu)
    results.append(list(data.batches(indices, 5, gpu)))
    for got in results:
        for (a, la), (b, lb) in zip(data_on_cpu(files, indices), got):
            assert a.is_cuda is False and b.is_cuda and torch.equal(a.int(), b.int().cpu())
            assert torch.equal(la, lb.cpu())


def data_on_cpu(files, indices):
    return td.TokenDataset(*files, 510).batches(indices, 5, torch.device('cpu'))


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
