"""One token set on disk: golden bytes, what its manifest states, and what bad and hostile files get."""
import errno
import gzip
import inspect
import io
import json
import os

import numpy as np
import pytest

from fileio.files import sha256
from fileio.labels import read_labels
from helpers import (failing_open, fails, make_checked_set, make_set, make_wide_set, npy, open_codes, refused, rewrite,
                     unpack, write_raw_set)
from token_files import compact, published as bs, token_file as tf
from token_files.prefetching import prefetch
from token_files.published import PUBLISHED, encode

# ---------------------------------------------------------------- reading and writing


def test_golden_file_reads(golden):
    z = golden('codec.npz')
    path = golden.folder / 'sample-token.data.bin.gz'
    file = tf.open_token_file(path)
    assert (len(file), file.manifest, file.format, file.classes) == (len(z['tokens']), {}, PUBLISHED.name, None)
    assert tf.bytes_on_disk([file]) == sum(p.stat().st_size for p in (path, bs.companion_path(path)))
    (first, codes), = tf.decode(file)
    assert first == 0 and codes.dtype == np.uint16 and np.array_equal(codes, z['tokens'])
    assert np.array_equal(read_labels(golden.folder / 'sample-label.txt'), z['labels'])


def test_golden_file_is_written_byte_for_byte(golden, tmp_path):
    z = golden('codec.npz')
    tf.write_set(tmp_path / 'sample-token.data.bin.gz', [z['tokens']], 64, tmp_path / 'sample-label.txt', z['labels'])
    assert len([*tmp_path.iterdir()]) == 3  # and no manifest
    for name in ('sample-token.data.bin.gz', 'sample-token.index.npy.gz'):
        assert gzip.decompress((tmp_path / name).read_bytes()) == \
            gzip.decompress((golden.folder / name).read_bytes()), name
    assert (tmp_path / 'sample-label.txt').read_bytes() == (golden.folder / 'sample-label.txt').read_bytes()


def test_equal_content_gives_equal_files(tmp_path):
    (tmp_path / 'one').mkdir()
    (tmp_path / 'two').mkdir()
    (a, la), *_ = make_set(tmp_path / 'one', name='first')
    (b, lb), *_ = make_set(tmp_path / 'two', name='second')
    assert a.read_bytes() == b.read_bytes() and la.read_bytes() == lb.read_bytes()
    assert bs.companion_path(a).read_bytes() == bs.companion_path(b).read_bytes()


def test_many_chunks_decode_like_one(tmp_path, monkeypatch):
    (tokens, _), x, _ = make_set(tmp_path, n=50)
    monkeypatch.setattr(bs, 'CHUNK_BYTES', 70)  # about three images, and not a whole number of them
    assert np.array_equal(open_codes(tokens, 'none'), x)
    monkeypatch.setattr(bs, 'CHUNK_BYTES', 1)  # less than one image
    assert np.array_equal(open_codes(tokens, 'none'), x)
    starts = [first for first, _ in tf.decode(tf.open_token_file(tokens))]
    assert starts == list(range(50))


def test_runs_of_images_are_written_like_one_array(tmp_path):
    (tokens, labels), x, y = make_set(tmp_path, n=50)
    stream, index = encode(PUBLISHED, x)
    assert tokens.read_bytes() == bs.gzip_bytes(stream.tobytes())
    runs = tmp_path / 'runs-token.data.bin.gz'
    tf.write_set(runs, (x[i:i + 7] for i in range(0, 50, 7)), 50, tmp_path / 'runs-label.txt', y)
    assert np.array_equal(tf.open_token_file(runs).content.index, index)
    assert gzip.decompress(runs.read_bytes()) == stream.tobytes()


@pytest.mark.parametrize('codes', [511, 65536])
def test_16_bit_codes_round_trip(tmp_path, codes, monkeypatch):
    files, x = make_wide_set(tmp_path, codes=codes, images=12, grid=4)
    assert gzip.decompress(files[0].read_bytes()) == x.astype('<u2').tobytes()
    assert np.array_equal(tf.open_token_file(files[0]).content.index, np.arange(13) * 32)  # offsets stay in bytes
    assert np.array_equal(open_codes(files[0], tmp_path / 'cache'), x)
    monkeypatch.setattr(bs, 'CHUNK_BYTES', 70)
    assert np.array_equal(open_codes(files[0], 'none'), x)
    with pytest.raises(ValueError, match='0 to 65535'):
        tf.write_set(files[0], [np.array([[65536]])], 1, manifest={'format': 'uint16-le'})


def test_several_gzip_members_are_one_stream(tmp_path):
    (tokens, _), x, _ = make_set(tmp_path)
    stream, index = unpack(tokens)
    parts = [bytes(stream[:index[5]]), bytes(stream[index[5]:])]
    tokens.write_bytes(b''.join(map(bs.gzip_bytes, parts)))
    assert np.array_equal(open_codes(tokens, 'none'), x)


def test_names_of_the_files_of_a_set(tmp_path):
    for make_name in bs.companion_path, tf.manifest_path:
        fails(lambda: make_name(tmp_path / 'odd.gz'), 'odd.gz', 'NAME.data.bin.gz')
    assert bs.companion_path('x/a-token.data.bin.gz').as_posix() == 'x/a-token.index.npy.gz'
    assert tf.manifest_path('x/a-token.data.bin.gz').as_posix() == 'x/a-token.json'
    for name in ('a-token.data.bin', 'a-token-00012.data.bin'):
        assert compact.companion_path(f'x/{name}').as_posix() == 'x/a-token.model.bin'
    fails(lambda: compact.companion_path(tmp_path / 'a.data.bin.gz'), 'a.data.bin.gz', 'is named NAME.data.bin')


def test_prefetch_keeps_the_order_and_passes_errors_on():
    assert list(prefetch(lambda x: x * x, range(5))) == [0, 1, 4, 9, 16]
    assert list(prefetch(str, [])) == []
    seen = []
    with pytest.raises(ZeroDivisionError):
        for value in prefetch(lambda x: 1 / x, [1, 2, 0, 4]):
            seen.append(value)
    assert seen == [1, 0.5]


@pytest.mark.parametrize('name', tf.NAMES)
def test_the_manifest_says_what_was_counted(tmp_path, name):
    codes = np.random.default_rng(0).integers(0, 300, (9, 16))
    path = tmp_path / f'a-token-00003.{tf.stream_ending(name)}'
    labels = tmp_path / 'a-label.txt'
    more = tf.write_model(path, name, [codes], 9)
    files = tf.write_set(path, np.split(codes, [4]), 9, labels, range(9), {'format': name, 'grid': 4.0, 'x': 1, **more})
    file = tf.open_token_file(path)
    assert (file.format, file.files) == (name, files) == (name, (path, tf.paths_beside(path, name)[0]))
    assert [*file.manifest] == ['format', 'images', 'grid', 'codes_used', 'x', *more, 'files']
    assert file.manifest['images'] == 9 and file.manifest['codes_used'] == len(np.unique(codes))
    assert type(file.manifest['grid']) is float  # what the manifest said stays
    assert [*file.manifest['files']] == [path.name for path in (*files, labels)]
    file.check_content()
    file.check_checksums(labels)
    assert np.array_equal(open_codes(path, 'none'), codes) and read_labels(labels).tolist() == [*range(9)]


@pytest.mark.parametrize('name', tf.NAMES)
@pytest.mark.parametrize('images', [8, 10])
def test_another_number_of_images_leaves_nothing(tmp_path, name, images):
    codes = np.arange(144).reshape(9, 16)
    path = tmp_path / f'a.{tf.stream_ending(name)}'
    manifest = {'format': name, **tf.write_model(path, name, [codes], 9)}
    before = [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match=f'9 images, where {images} were to be written'):
        tf.write_set(path, [codes], images, tmp_path / 'a.txt', [0] * 9, manifest)
    assert [*tmp_path.iterdir()] == before


def test_formats_by_the_size_of_the_codebook():
    names = [[tf.format_for(name, size) for size in (1, 510, 511, 65536)] for name in tf.FORMATS]
    assert names == [['escaped-bytes'] * 2 + ['uint16-le'] * 2, ['compact'] * 4]
    for name in tf.FORMATS:
        fails(lambda: tf.format_for(name, 65537), '65537 codes are more than token files hold .65536')


def test_both_formats_have_the_same_names():
    """Else token_file.py could not take one for the other."""
    for name in ('format_for', 'companion_path', 'open_stream', 'write_model', 'write_stream'):
        one, other = (inspect.signature(getattr(module, name)) for module in (bs, compact))
        assert [*one.parameters] == [*other.parameters], name
    assert bs.MAX_CODES == compact.MAX_CODES == tf.MAX_CODES
    assert [tf.largest_grid(name) for name in tf.FORMATS] == [1448, 256]
    assert [tf.stream_ending(name) for name in tf.FORMATS] == ['data.bin.gz', 'data.bin']


def test_the_largest_published_grid_is_read(tmp_path):
    """And one more is refused when it is read, so nothing may write it."""
    for grid in (1448, 1449):
        path = write_raw_set(tmp_path, bytes(grid ** 2), [0, grid ** 2])
        if grid == tf.largest_grid('published'):
            assert open_codes(path, 'none').shape == (1, grid ** 2)
        else:
            fails(lambda: open_codes(path, 'none'), 'image 0 has more than 2,097,152 bytes')


# ---------------------------------------------------------------- the manifest

@pytest.mark.parametrize('text, words', [
    ('{', 'not JSON'), ('[]', 'no JSON object'), ('{"format": "uint32"}', 'uint32.*escaped-bytes'),
    ('{"format": ["uint16-le"]}', 'none of the token formats'), ('{"format": null}', 'none of the token formats'),
    ('{"format": "uint16-le", "images": 13}', 'says images 13.*has 12'),
    ('{"format": "uint16-le", "grid": 32}', 'says grid 32.*has 4'),
    ('{"format": "uint16-le", "files": []}', "'files' is no object")])
def test_a_wrong_manifest_is_named(tmp_path, text, words):
    (tokens, _), _ = make_wide_set(tmp_path)
    manifest = tf.manifest_path(tokens)
    assert manifest.name == 'w-token.json'
    manifest.write_text(text)
    fails(lambda: open_codes(tokens, 'none'), 'w-token.json', words)


def test_codes_of_another_format_than_the_manifest_says(tmp_path):
    files, x = make_wide_set(tmp_path)
    manifest = tf.manifest_path(files[0])
    for text in ('{"grid": 4}', None):  # no format: the published one, which this is not
        if text is None:
            manifest.unlink()
        else:
            manifest.write_text(text)
        fails(lambda: open_codes(files[0], 'none'), 'w-token.data.bin.gz', 'escape|codes')
    manifest.write_text('{"format": "uint16-le"}')
    tf.write_set(files[0], [x % 300], 12)  # escaped bytes under a manifest of 16-bit codes
    fails(lambda: open_codes(files[0], 'none'), 'w-token.data.bin.gz', 'odd number|codes')


def test_class_names_are_a_list(tmp_path):
    path, _ = make_checked_set(tmp_path)
    for classes, expected in ((['cat', 'dog'], ['cat', 'dog']), ('cat', None), ({'cat': 0}, None), (None, None)):
        tf.manifest_path(path).write_text(json.dumps({'classes': classes}))
        assert tf.open_token_file(path).classes == expected


def test_a_manifest_of_another_set_is_refused(tmp_path):
    path, _ = make_checked_set(tmp_path)
    manifest = tf.manifest_path(path)
    manifest.write_text(manifest.read_text().replace('a.data', 'b.data'))
    fails(lambda: open_codes(path), str(manifest), 'says nothing of a.data.bin.gz')


def test_checksums_are_compared(tmp_path):
    path, labels = make_checked_set(tmp_path)
    file = tf.open_token_file(path)
    for part in path, bs.companion_path(path), labels:
        file.check_checksums(part)
        whole = part.read_bytes()
        part.write_bytes(whole + b'\0')
        fails(lambda: file.check_checksums(part), str(part), 'changed or damaged, fetch or make it again')
        part.write_bytes(whole)


@pytest.mark.parametrize('stated', [None, 5, 'x', [], {}, {'sha256': None}])
def test_a_checksum_of_any_json_is_compared(tmp_path, stated):
    path, labels = make_checked_set(tmp_path)
    manifest = json.loads(tf.manifest_path(path).read_text())
    manifest['files']['labels'] = stated
    tf.manifest_path(path).write_text(json.dumps(manifest))
    fails(lambda: tf.open_token_file(path).check_checksums(labels), 'changed or damaged|says nothing of labels')


@pytest.mark.parametrize('text', [b'[' * 1_000_000, b'{"a":' * 100_000, b'9' * 5000, b'[' + b'0,' * (1 << 24) + b'0]',
                                  b'\xff', b'\0', b''])
def test_json_bombs(tmp_path, text):
    path = write_raw_set(tmp_path, bytes(8), [0, 4, 8])
    tf.manifest_path(path).write_bytes(text)
    refused(tf.manifest_path(path), open_codes, path, match='not JSON|more than')


def test_long_values_of_a_manifest_are_not_printed_whole(tmp_path):
    path = write_raw_set(tmp_path, bytes(8), [0, 4, 8])
    for manifest in ({'format': 'x' * 10_000}, {'images': json.loads('[' * 900 + ']' * 900)},
                     {'grid': ['\n'] * 10_000}):
        tf.manifest_path(path).write_text(json.dumps(manifest))
        refused(tf.manifest_path(path), open_codes, path, match='none of the|says')


# ---------------------------------------------------------------- bad streams and indices

def test_files_that_are_not_there_or_no_gzip(tmp_path):
    (tokens, labels), *_ = make_set(tmp_path)

    def load():
        return open_codes(tokens, 'none')
    fails(lambda: open_codes(tmp_path / 'no.data.bin.gz'), 'no.data.bin.gz', 'o such file')
    fails(lambda: open_codes(tmp_path / 'odd.gz'), 'odd.gz', 'NAME.data.bin.gz')
    tokens.write_bytes(tokens.read_bytes()[:-20])
    fails(load, tokens.name, 'truncated')
    tokens.write_bytes(b'no gzip at all')
    fails(load, tokens.name, 'gzip')
    bs.companion_path(tokens).unlink()
    fails(load, bs.companion_path(tokens).name, 'o such file')
    tokens.unlink()
    tokens.mkdir()
    rewrite(tokens, index=np.arange(3))
    fails(load, tokens.name, 'directory')


@pytest.mark.parametrize('number', [errno.EACCES, errno.EIO, errno.EMFILE])
def test_files_that_cannot_be_read(tmp_path, monkeypatch, number):
    (tokens, labels), *_ = make_set(tmp_path)
    tf.manifest_path(tokens).write_text('{}')
    for path in tokens, bs.companion_path(tokens), tf.manifest_path(tokens), labels:
        with monkeypatch.context() as patch:
            failing_open(patch, path, number)
            fails(lambda: (open_codes(tokens, 'none'), read_labels(labels)), f'{path}: {os.strerror(number)}')


def test_bad_streams(tmp_path):
    (tokens, _), *_ = make_set(tmp_path)
    stream, index = unpack(tokens)
    name = tokens.name

    def load():
        return open_codes(tokens, 'none')
    rewrite(tokens, stream=stream[:-3])
    fails(load, name, 'ends at byte')
    rewrite(tokens, stream=stream + b'\0')
    fails(load, name, 'goes on')
    escaped = bytearray(stream)
    escaped[index[4] - 1] = 255
    rewrite(tokens, stream=escaped)
    fails(load, name, 'image 3 has a dangling escape')
    escaped = bytearray(stream)
    escaped[-1] = 255
    rewrite(tokens, stream=escaped)
    fails(load, name, 'image 11 has a dangling escape')
    rewrite(tokens, stream=bytes(16 * 6 + 15 + 16 * 5), index=np.r_[np.arange(7) * 16, 111 + np.arange(6) * 16])
    fails(load, name, 'image 6 has 15 codes')
    rewrite(tokens, stream=bytes(12 * 12), index=np.arange(13) * 12)
    fails(load, name, '12 codes', 'no square')


def test_bad_images_are_numbered_in_later_chunks_too(tmp_path, monkeypatch):
    (tokens, _), *_ = make_set(tmp_path)
    stream, index = unpack(tokens)
    stream[index[9] - 1] = 255
    rewrite(tokens, stream=stream)
    monkeypatch.setattr(bs, 'CHUNK_BYTES', 70)
    fails(lambda: open_codes(tokens, 'none'), 'image 8 has a dangling escape')


def test_bad_indices(tmp_path):
    (tokens, _), *_ = make_set(tmp_path)
    stream, index = unpack(tokens)
    name = bs.companion_path(tokens).name

    def load():
        return open_codes(tokens, 'none')
    swapped = index.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    for bad, words in ((swapped, 'do not rise'), (index + 1, 'do not rise'), (index.astype(float), 'integer offsets'),
                       (index[:, None], 'integer offsets'), (index[:1], 'integer offsets')):
        rewrite(tokens, index=bad)
        fails(load, name, words)
    bs.companion_path(tokens).write_bytes(bs.gzip_bytes(b'not numpy'))
    fails(load, name, 'not a .npy')
    rewrite(tokens, index=np.array([{}], dtype=object))  # a pickle inside a .npy
    fails(load, name, 'not a .npy')
    rewrite(tokens, index=index[:-1])
    fails(load, tokens.name, 'goes on after')
    rewrite(tokens, index=index.astype('>u4'))
    assert np.array_equal(tf.open_token_file(tokens).content.index, index)


# ---------------------------------------------------------------- what files claim

def header(text):
    """A .npy of a header and nothing else."""
    return b'\x93NUMPY\x01\x00' + len(text).to_bytes(2, 'little') + text.encode()


@pytest.mark.parametrize('index, match', [
    (npy(np.arange(3)) + bytes(1 << 26), 'unpacks to more than'),
    (header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,)}\n"), 'not a .npy array'),
    (header("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}\n"), 'not a .npy array'),
    (header("{'descr': '<i8', 'fortran_order': False, 'shape': (1e9,)}\n"), 'not a .npy array'),
    (header('(' * 5000), 'not a .npy array'),
    (header("{'descr': '<i8', 'fortran_order': False,\n 'shape'"), 'not a .npy array'),
    (b'', 'not a .npy array'),
    (npy(np.array([0, 2 ** 63 + 5], np.uint64)), 'do not rise'),
    (npy(np.array([0, 2 ** 62])), 'more than 2,097,152 bytes'),
])
def test_index_claims_too_much(tmp_path, index, match):
    path = write_raw_set(tmp_path, bytes(16), index)
    refused(bs.companion_path(path), open_codes, path, 'none', match=match)


def test_npz_is_no_index(tmp_path):
    file = io.BytesIO()
    np.savez(file, np.arange(3))
    path = write_raw_set(tmp_path, bytes(2), file.getvalue())
    refused(bs.companion_path(path), tf.open_token_file, path, match='not a .npy array')


def test_stream_bomb_is_read_only_as_far_as_its_index_says(tmp_path):
    path = write_raw_set(tmp_path, bytes(1 << 28), [0, 4, 8])
    refused(path, open_codes, path, 'none', match='goes on after byte 8')


def test_index_says_more_bytes_than_gzip_can_hold(tmp_path):
    path = write_raw_set(tmp_path, bytes(64), np.arange(1 << 12) << 20)
    refused(path, open_codes, path, 'none', match='no gzip of its size unpacks to')


def test_one_large_image_does_not_make_all_large(tmp_path, monkeypatch):
    """100,000 images as large as the first would take 200 GB."""
    monkeypatch.setattr(bs, 'CHUNK_BYTES', 1 << 20)
    path = write_raw_set(tmp_path, bytes((1 << 20) + 100_000), np.concatenate([[0], (1 << 20) + np.arange(100_001)]))
    for cache in 'none', '':
        refused(path, open_codes, path, cache, match='are more than the 1148576 bytes')
    assert not list(tmp_path.glob('*.npy')) and not list(tmp_path.glob('.*'))


def test_checksum_of_what_is_written(tmp_path):
    (tokens, labels), x, y = make_set(tmp_path)
    before = [sha256(path) for path in (tokens, bs.companion_path(tokens), labels)]
    tf.write_set(tokens, [x], 12, labels, list(y))  # labels of any integers
    assert [sha256(path) for path in (tokens, bs.companion_path(tokens), labels)] == before
