"""Compact token sets on disk: what is written is read, by ranges too, and what is damaged is named."""
import builtins
import errno
import hashlib
import json
import os

import numpy as np
import pytest

pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fileio.labels import read_labels
from helpers import (CODE_KINDS, codes_of_kind, failing_open, fails, make_compact_set, no_space, open_codes, packed,
                     refused, structured)
from token_files import compact
from token_files.compact import HEADER, LEAST_WORDS, write_model, write_stream
from token_files.token_file import manifest_path, open_token_file, write_set
from twins import slow_decode_compact
from utils import InputError

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])
CODES = {'kind': st.sampled_from(CODE_KINDS), 'images': st.integers(1, 20), 'grid': st.integers(1, 6),
         'seed': st.integers(0, 2 ** 32)}


def decoded(path):
    """All codes of a compact stream, run after run."""
    runs = list(open_token_file(path).content.decode())
    assert [first for first, _ in runs] == np.cumsum([0] + [len(codes) for _, codes in runs])[:-1].tolist()
    return np.concatenate([codes for _, codes in runs])


def model_of(token_file):
    """Path of the model beside a token file of `make_compact_set`."""
    return token_file.with_name(token_file.name.replace('data.bin', 'model.bin'))


def slow(token_file):
    return slow_decode_compact(token_file.read_bytes(), model_of(token_file).read_bytes(), compact.BLOCK_CODES)


def words_begin(content):
    """Offset of the words of a stream."""
    return HEADER.itemsize + 4 * len(content.lengths)


def rewrite_header(token_file, **values):
    """Change fields of the header of a stream."""
    data = bytearray(token_file.read_bytes())
    header = np.frombuffer(data, HEADER, 1)
    for name, value in values.items():
        header[name] = value
    token_file.write_bytes(data)


def bad(token_file, *patterns, says=None):
    """The set is refused by one line that names the file `says`, or the stream; and by the slow reader."""
    assert slow(token_file) is None
    for pattern in patterns:
        refused(says or token_file, open_codes, token_file, 'none', match=pattern)
    fails(lambda: open_codes(token_file, token_file.parent / 'cache'))
    assert not [*(token_file.parent / 'cache').glob('*')]


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of 256 codes: decoding takes a step for each."""
    monkeypatch.setattr(compact, 'BLOCK_CODES', 256)


# ---------------------------------------------------------------- there and back

@SETTINGS
@given(**CODES)
def test_what_is_written_is_read(tmp_path, kind, images, grid, seed):
    codes = codes_of_kind(kind, images, grid, seed)
    path, _ = make_compact_set(tmp_path, codes)
    got = decoded(path)
    assert got.dtype == np.uint16 and np.array_equal(got, codes)
    assert slow(path) == codes.tolist()
    content = open_token_file(path).content
    assert len(content) == images and (content.grid, content.files) == (grid, (path, model_of(path)))


@pytest.mark.parametrize('codes', [
    np.array([[65535]]), np.zeros((1, 9), int), np.zeros((5000, 1), int), np.arange(65536).reshape(64, 1024),
    np.arange(4097)[:, None] % 3], ids=['one code', 'zeros', 'of 1x1', 'all codes', 'one more than a block'])
def test_the_least_and_the_largest(tmp_path, codes):
    path, _ = make_compact_set(tmp_path, codes)
    assert np.array_equal(open_codes(path, tmp_path / 'cache'), codes)


def test_the_largest_grid(tmp_path):
    codes = np.full((2, 256 ** 2), 7)
    content = open_token_file(make_compact_set(tmp_path, codes)[0]).content
    assert (content.grid, len(content), content.block_images) == (256, 2, 1)


def test_grids_that_are_too_large_leave_nothing(tmp_path):
    codes = np.zeros((1, 257 ** 2), int)
    model = write_model(tmp_path / 'a.data.bin', [codes], 1)
    with pytest.raises(ValueError, match='grids of 257x257 codes; the format compact holds 256x256'):
        write_stream(tmp_path / 'a.data.bin', [codes], 1, model)
    assert [path.name for path in tmp_path.iterdir()] == ['a.model.bin']


@settings(SETTINGS, max_examples=15)
@given(**CODES, cuts=st.lists(st.integers(0, 20), max_size=5), at_a_time=st.sampled_from([1, 200, 5000, 1 << 22]))
def test_the_same_bytes_however_codes_come(tmp_path, monkeypatch, kind, images, grid, seed, cuts, at_a_time):
    codes = codes_of_kind(kind, images, grid, seed)
    path, _ = make_compact_set(tmp_path, codes)
    runs = np.split(codes, sorted(cut for cut in cuts if cut <= images))
    with monkeypatch.context() as patch:
        patch.setattr(compact, 'ENCODE_CODES', at_a_time)
        patch.setattr(compact, 'BLOCK_CODES', 100)
        again = [tmp_path / f'{i}.data.bin' for i in range(3)]
        for name, part in zip(again, ([codes], runs, [one.astype(np.uint16) for one in runs])):
            write_stream(name, iter(part), images, write_model(name, iter(part), images))
        assert again[0].read_bytes() == again[1].read_bytes() == again[2].read_bytes()
    write_stream(again[0], runs, images, write_model(again[0], runs, images))
    assert again[0].read_bytes() == path.read_bytes()
    assert model_of(again[0]).read_bytes() == model_of(path).read_bytes()


@pytest.mark.parametrize('threads', [1, 2, 5])
@pytest.mark.parametrize('at_a_time', [1, 600, 1 << 24])
def test_threads_and_runs_change_nothing(short_blocks, tmp_path, monkeypatch, threads, at_a_time):
    codes = codes_of_kind('copied', 75, 4)
    path, _ = make_compact_set(tmp_path, codes)
    monkeypatch.setattr(compact, 'cores', lambda: threads)
    monkeypatch.setattr(compact, 'DECODE_CODES', at_a_time)
    assert np.array_equal(decoded(path), codes)


def test_every_range_of_blocks_is_that_part_of_all(short_blocks, tmp_path):
    codes = codes_of_kind('gaps', 75, 4)
    content = open_token_file(make_compact_set(tmp_path, codes)[0]).content
    assert len(content.lengths) == 5 and content.block_images == 16
    ends = content.model.ends()
    for first in range(5):
        for last in range(first + 1, 6):
            expected = codes[16 * first:16 * last]
            assert np.array_equal(content.decode_blocks(first, last), expected)
            assert np.array_equal(content.decode_blocks(first, last, ends), expected)


def test_a_block_is_decoded_from_its_own_bytes(short_blocks, tmp_path, monkeypatch):
    codes = codes_of_kind('copied', 75, 4)
    path, _ = make_compact_set(tmp_path, codes)
    content = open_token_file(path).content
    data = bytearray(path.read_bytes())
    begin = words_begin(content) + 4 * int(content.lengths[:3].sum())
    end = begin + 4 * int(content.lengths[3])
    path.write_bytes(bytes(begin) + data[begin:end] + bytes(len(data) - end))  # all the rest is lost
    touched = []

    class Noted:
        def __init__(self, *words):
            self.file = builtins.open(*words)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, place):
            return self.file.seek(place)

        def read(self, size):
            touched.append((self.file.tell(), size))
            return self.file.read(size)
    monkeypatch.setattr(compact, 'open', Noted, raising=False)
    assert np.array_equal(content.decode_blocks(3, 4), codes[48:64])
    assert touched == [(begin, end - begin)]


def test_shards_share_a_model(tmp_path):
    codes = structured(90)
    manifest = {'format': 'compact', **write_model(tmp_path / 'all-00000.data.bin', [codes], 90)}
    assert manifest['model'] == 'all.model.bin'
    for shard, part in enumerate(np.split(codes, (50, 80))):
        write_set(tmp_path / f'all-{shard:05d}.data.bin', [part], len(part), manifest=manifest)
    assert np.array_equal(open_codes(f'{tmp_path}/*.data.bin', 'none'), codes)
    assert not any('.tmp' in path.name for path in tmp_path.iterdir())


def test_what_a_stream_costs_beside_its_codes(tmp_path):
    """Header, 4 bytes of index and a state of 8 bytes a block; an image of 16x16 or 32x32 codes: 0.25 or 1 of index."""
    for grid, images in ((16, 64), (32, 16)):
        path, _ = make_compact_set(tmp_path, np.full((images, grid ** 2), 7))
        assert path.stat().st_size == HEADER.itemsize + 4 * (4 + LEAST_WORDS * 4) == 80


# ---------------------------------------------------------------- the golden set

def test_the_golden_set_is_read_as_ever(golden, tmp_path):
    folder = golden.folder / 'compact'
    path = folder / 'golden-token.data.bin'
    codes = golden('compact/codes.npz')['codes']
    assert codes.shape == (36, 256) and codes.max() == 65535
    assert np.array_equal(open_codes(path, tmp_path), codes) and np.array_equal(decoded(path), codes)
    assert slow(path) == codes.tolist()
    assert read_labels(folder / 'golden-label.txt').tolist() == [image % 5 for image in range(36)]
    file = open_token_file(path)
    for name in json.loads(file.manifest_path.read_text())['files']:
        file.check_checksums(folder / name)
    assert [len(table) for table in file.content.model.tables] == [8, 8] and len(file.content.lengths) == 3


# ---------------------------------------------------------------- damaged streams

@pytest.fixture
def whole(short_blocks, tmp_path):
    """A set of three blocks, of 16 images of 4x4 codes each, the last of 8: (token file, codes)."""
    codes = codes_of_kind('copied', 40, 4)
    return make_compact_set(tmp_path, codes)[0], codes


def test_a_damaged_block_is_named(whole):
    path, _ = whole
    content = open_token_file(path).content
    data = path.read_bytes()
    for block in range(3):
        place = words_begin(content) + 4 * int(content.lengths[:block].sum()) + 10
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1:])
        bad(path, f'block {block}, of image {16 * block} and those after it, does not end in the state')
        others = [number for number in range(3) if number != block]
        for number in others:
            assert len(content.decode_blocks(number, number + 1)) == (8 if number == 2 else 16)


def test_the_block_is_numbered_in_later_runs_too(whole, monkeypatch):
    path, _ = whole
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    monkeypatch.setattr(compact, 'DECODE_CODES', 1)
    bad(path, 'block 2, of image 32')


def test_every_damaged_bit_of_header_and_index_is_found(short_blocks, tmp_path):
    path, _ = make_compact_set(tmp_path, codes_of_kind('copied', 40, 3))  # two blocks
    data = path.read_bytes()
    for place in range(words_begin(open_token_file(path).content)):
        for bit in range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1:])
            with pytest.raises(InputError) as caught:
                open_codes(path, 'none')
            assert str(path) in str(caught.value) and '\n' not in str(caught.value)
            assert slow(path) is None


def test_streams_that_are_truncated_or_longer(whole):
    path, _ = whole
    data = path.read_bytes()
    for size in range(HEADER.itemsize):
        path.write_bytes(data[:size])
        bad(path, 'does not begin as a compact stream does; it is damaged or truncated, fetch or make it again')
    for size in (HEADER.itemsize, 40, 67):
        path.write_bytes(data[:size])
        bad(path, f'{size} bytes are too few for the 3 blocks its header says')
    for size in (68, 100, len(data) - 4, len(data) - 1):
        path.write_bytes(data[:size])
        bad(path, f'{size:,} bytes, which are not what its index of 3 blocks says')
    for more in (b'\0', bytes(4), data):
        path.write_bytes(data + more)
        bad(path, 'bytes, which are not what its index of 3 blocks says')
    path.write_bytes(b'')
    bad(path, 'does not begin')


def test_headers_that_cannot_be(whole):
    path, _ = whole
    data = path.read_bytes()
    for values, match in (({'magic': b'SeiTcmp2'}, 'does not begin as'), ({'images': 0}, '0 images of 4x4'),
                          ({'images': (1 << 27) + 1}, '134217729 images'), ({'grid': 0}, 'of 0x0 codes'),
                          ({'grid': 257, 'block_images': 1}, 'of 257x257 codes'),
                          ({'block_images': 15}, 'blocks of 15'), ({'block_images': 0}, 'blocks of 0'),
                          ({'grid': 5}, '5x5 codes in blocks of 16'),
                          ({'images': 1 << 27}, 'too few for the 8,388,608 blocks'), ({'images': 49}, 'not what its'),
                          ({'images': 32}, 'not what its index of 2 blocks says'), ({'images': 41}, 'block 2, of'),
                          ({'images': 39}, 'block 2, of image 32'),
                          ({'grid': 8, 'block_images': 4}, 'too few|index of')):
        path.write_bytes(data)
        rewrite_header(path, **values)
        bad(path, match)


def test_an_index_that_disagrees(whole):
    path, _ = whole
    data = path.read_bytes()
    index = np.frombuffer(data, '<u4', 3, HEADER.itemsize).astype(np.int64)
    for change, match in (((1, 0, 0), 'not what its index'), ((-1, 0, 1), 'block 0, of image 0'),
                          ((0, 5, -5), 'block 1, of image 16'), ((2 - index[0], index[0] - 2, 0), 'block 0'),
                          ((1 - index[0], index[0] - 1, 0), 'not what its index')):
        changed = (index + change).astype('<u4').tobytes()
        path.write_bytes(data[:HEADER.itemsize] + changed + data[HEADER.itemsize + 12:])
        bad(path, match)


def test_blocks_that_changed_places_are_found_by_the_checksum_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(compact, 'BLOCK_CODES', 16)
    codes = np.array([[0] * 8 + [1] * 8, [1] * 8 + [0] * 8])
    path, _ = make_compact_set(tmp_path, codes, checked=True)
    assert open_token_file(path).content.lengths.tolist() == [2, 2]
    data = path.read_bytes()
    path.write_bytes(data[:-16] + data[-8:] + data[-16:-8])
    assert np.array_equal(decoded(path), codes[::-1])
    refused(path, open_codes, path, 'none', match='changed or damaged')


def test_another_number_of_images_of_one_code_is_found_by_the_manifest_alone(tmp_path):
    path, _ = make_compact_set(tmp_path, np.full((40, 64), 7), images=40)
    rewrite_header(path, images=41)
    assert len(slow(path)) == 41
    refused(path, open_codes, path, 'none', match='says images 40, but .* has 41')


def test_checksums_find_every_damaged_byte(tmp_path):
    path, labels = make_compact_set(tmp_path, codes_of_kind('copied', 20, 4), checked=True)
    for part in path, model_of(path):
        data = part.read_bytes()
        for place in range(0, len(data), 5):
            part.write_bytes(data[:place] + bytes([data[place] ^ 128]) + data[place + 1:])
            fails(lambda: open_codes(path, 'none'), str(part))
        part.write_bytes(data)
    top = words_begin(open_token_file(path).content) + 3  # the bit that decoding does not look at
    data = path.read_bytes()
    path.write_bytes(data[:top] + bytes([data[top] ^ 128]) + data[top + 1:])
    refused(path, open_codes, path, 'none', match='SHA-256.*changed or damaged')


def test_a_stream_that_is_cut_short_while_it_is_read(whole):
    path, _ = whole
    content = open_token_file(path).content
    path.write_bytes(path.read_bytes()[:-4])
    fails(lambda: content.decode_blocks(0, 3), f'{path}: was cut short while it was read')
    path.unlink()
    fails(lambda: content.decode_blocks(0, 3), f'{path}: No such file')


@pytest.mark.parametrize('number', [errno.EACCES, errno.EIO, errno.EMFILE])
def test_files_that_cannot_be_read(whole, monkeypatch, number):
    path, _ = whole
    for part in path, model_of(path), manifest_path(path):
        with monkeypatch.context() as patch:
            failing_open(patch, part, number)
            fails(lambda: open_codes(path, 'none'), f'{part}: {os.strerror(number)}')


# ---------------------------------------------------------------- models and manifests

def test_models_that_do_not_belong_to_a_stream(whole, tmp_path):
    path, _ = whole
    model = model_of(path)
    data = model.read_bytes()
    other, _ = make_compact_set(tmp_path, codes_of_kind('copied', 40, 4, 1), name='other')
    for content in (model_of(other).read_bytes(), data[:-1], data + b'\0', b'', bytes([data[0] ^ 1]) + data[1:]):
        model.write_bytes(content)
        bad(path, f'is not the model that {path} was encoded with: it is damaged, or of another set', says=model)
    model.unlink()
    fails(lambda: open_codes(path, 'none'), f'{model}: No such file')
    model.mkdir()
    fails(lambda: open_codes(path, 'none'), f'{model}: Is a directory')


def test_a_model_that_is_none_though_the_stream_names_it(whole):
    path, _ = whole
    for data, match in ((b'no model at all, but a long one', 'its checksum is wrong'),
                        (packed(bytes(13)), 'codes or groups are not as its header'),
                        (packed(b'', codes=1 << 30, symbols=1 << 30), 'impossible sizes')):
        model_of(path).write_bytes(data)
        rewrite_header(path, model=np.void(hashlib.sha256(data).digest()[:16]))
        bad(path, f'no context model: .*{match}.*; fetch or make it again', says=model_of(path))


def test_a_model_that_is_too_long(whole, monkeypatch):
    path, _ = whole
    monkeypatch.setattr(compact, 'MAX_MODEL_BYTES', 100)
    fails(lambda: open_codes(path, 'none'), str(model_of(path)), 'more than 100 bytes')


@pytest.mark.parametrize('name', [None, '', 5, ['a'], {}, True, '/etc/passwd', '../a-token.model.bin', 'x/y', './a',
                                  '.', '..', 'a\0b', 'a\nb', '\ud800', 'a\u2028b', 'x' * 256, 'x' * 100_000])
def test_a_manifest_that_names_no_file(whole, name):
    path, _ = whole
    manifest_path(path).write_text(json.dumps({'format': 'compact', 'model': name}))
    refused(manifest_path(path), open_codes, path, 'none', match="'model' is .*, no name of a file; fetch or make")


def test_manifests_that_are_of_another_set(whole):
    path, _ = whole
    right = {'format': 'compact', 'model': model_of(path).name}
    for changed, match in (({'images': 41}, 'says images 41.* has 40'), ({'grid': 5}, 'says grid 5.* has 4'),
                           ({'files': {}}, 'says nothing of a-token.data.bin'), ({'files': 5}, "'files' is no object")):
        manifest_path(path).write_text(json.dumps({**right, **changed}))
        refused(manifest_path(path), open_codes, path, 'none', match=match)
    manifest_path(path).write_text('{"format": "compact"}')
    refused(manifest_path(path), open_codes, path, 'none', match="'model' is None, no name of a file")


def test_a_model_under_a_name_of_its_own(whole):
    path, codes = whole
    for name in ('m', 'mödel ,*?[1]', '.hidden', 'x' * 255 if len(os.fsencode(path)) < 3000 else 'x'):
        model = model_of(path).rename(path.with_name('a-token.model.bin'))
        model.rename(path.with_name(name))
        manifest_path(path).write_text(json.dumps({'format': 'compact', 'model': name}))
        assert np.array_equal(open_codes(path, 'none'), codes)
        path.with_name(name).rename(model_of(path))


def test_a_compact_stream_without_its_manifest(whole):
    path, _ = whole
    manifest_path(path).unlink()
    fails(lambda: open_codes(path, 'none'), f'{path}: is compact.*a-token.json.*is not there')


def test_a_manifest_of_another_format_beside_a_compact_stream(whole):
    path, _ = whole
    manifest_path(path).write_text('{"format": "escaped-bytes"}')
    fails(lambda: open_codes(path, 'none'), 'a-token.index.npy')


# ---------------------------------------------------------------- bounds, and failures that leave nothing

def test_files_that_claim_much_are_refused_for_their_size(whole):
    path, _ = whole
    header = np.array([(b'SeiTcmp1', 1 << 27, 256, 1, bytes(16))], HEADER).tobytes()
    path.write_bytes(header + bytes(1 << 20))
    bad(path, 'too few for the 134,217,728 blocks')
    header = np.array([(b'SeiTcmp1', 4000, 256, 1, bytes(16))], HEADER).tobytes()
    path.write_bytes(header + b'\xff' * 48_000)
    bad(path, 'not what its index of 4,000 blocks says')


def test_decoding_takes_memory_for_a_part_at_a_time(tmp_path, monkeypatch):
    """1.6 GB of codes in 2.4 MB, of which the first damaged block ends the work."""
    monkeypatch.setattr(compact, 'DECODE_CODES', 1 << 20)
    path, _ = make_compact_set(tmp_path, np.full((1, 4096), 7))
    model, block = path.read_bytes()[16:32], path.read_bytes()[-8:]
    header = np.array([(b'SeiTcmp1', 200_000, 64, 1, model)], HEADER).tobytes()
    index = np.full(200_000, 2, '<u4').tobytes()
    path.write_bytes(header + index + block * 300 + bytes(8) + block * 199_699)
    refused(path, decoded, path, match='block 300, of image 300')


def test_a_code_that_the_model_lacks_leaves_nothing(tmp_path):
    model = write_model(tmp_path / 'a.data.bin', [np.array([[1, 2, 3, 4]])], 1)
    with pytest.raises(ValueError, match='code 9 is none that the model was fitted to'):
        write_stream(tmp_path / 'a.data.bin', [np.array([[1, 9, 3, 4]])], 1, model)
    assert [path.name for path in tmp_path.iterdir()] == ['a.model.bin']


@pytest.mark.parametrize('limit', [0, 100, 3000])
def test_files_that_cannot_grow_leave_nothing(tmp_path, limit):
    codes = codes_of_kind('random', 40, 16)
    path = tmp_path / 'a.data.bin'
    model = write_model(path, [codes], 40)
    size = model_of(path).stat().st_size
    with no_space(limit):
        fails(lambda: write_stream(path, [codes], 40, model), 'a.data.bin: cannot be')
        assert [path.name for path in tmp_path.iterdir()] == ['a.model.bin']
        if limit < size:
            model_of(path).unlink()
            fails(lambda: write_model(path, [codes], 40), 'a.model.bin: cannot be written')
            assert not [*tmp_path.iterdir()]


def test_a_damaged_set_leaves_no_cache(whole):
    path, codes = whole
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    fails(lambda: open_codes(path), 'block 2')
    assert not [*path.parent.glob('*.npy')] and not [*path.parent.glob('.*')]
    path.write_bytes(data)
    with no_space(1000):
        fails(lambda: open_codes(path), 'cannot be written .File too large')
    assert not [*path.parent.glob('*.npy')] and not [*path.parent.glob('.*')]
    assert np.array_equal(open_codes(path), codes)
