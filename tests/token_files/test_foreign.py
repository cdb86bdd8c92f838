"""Token sets of other projects: each format made by hand, and what is refused."""
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from foreign_sets import codes_of, labels_of, write_folder, write_jsonl, write_parquet, write_safetensors
from helpers import fails, npy, open_codes, refused
from token_files.cache import cache_path, digest_of_codes, digest_path, labels_inside, labels_path
from token_files.cache import open_codes as open_files
from token_files.foreign import open_set
from token_files.token_file import expand_token_files, holds_foreign, open_token_file, open_token_files


def read(path, cache=''):
    """(codes, labels) of a set, each read twice: from the file, and then as it is found."""
    files = open_token_files(path)
    for _ in range(2):
        codes = open_files(files, cache)
        labels = labels_inside(files, cache)
    assert codes.dtype == np.uint16 and labels.dtype == np.int64
    return codes, labels


# ---------------------------------------------------------------- arrays

@pytest.mark.parametrize('dtype', ['u2', 'i2', 'i4', 'i8', 'u4', 'u8', 'u1', 'i1'])
@pytest.mark.parametrize('flat', [False, True])
def test_safetensors_of_any_integers(tmp_path, dtype, flat):
    codes = codes_of(high={'u1': 256, 'i1': 128}.get(dtype, 65536))
    stored = codes.astype(dtype if dtype != 'i2' else 'u2').view(dtype).reshape((6, 9) if flat else codes.shape)
    path = write_safetensors(tmp_path / 'a.safetensors', stored, labels_of().astype('i2'))
    for cache in '', 'none':
        found, labels = read(path, cache)
        assert found.tolist() == codes.reshape(6, 9).tolist() and labels.tolist() == labels_of().tolist()
    caches = [file.name for file in tmp_path.glob('*.codes-*.npy')]
    assert len(caches) == (0 if dtype in ('u2', 'i2') else 1)  # 16 bits are mapped as they lie


def test_negative_int16_are_the_codes_of_uint16(tmp_path):
    codes = np.array([[0, 1, 32767, 32768], [40000, 65535, 5, 63999]], np.uint16)
    path = write_safetensors(tmp_path / 'a.safetensors', codes.view(np.int16), np.array([0, 1], np.int16))
    found = open_codes(path)
    assert np.array_equal(found, codes) and isinstance(found, np.memmap) and found.filename == path


def test_the_digest_of_a_mapped_set_lies_in_the_cache(tmp_path):
    path = write_safetensors(tmp_path / 'a.safetensors', codes_of().astype('u2'), labels_of())
    twin = write_jsonl(tmp_path / 'b.jsonl', codes_of(), labels_of())
    digests = []
    for file in path, twin:
        files = open_token_files(file)
        digests.append(digest_of_codes(files, open_files(files, tmp_path / 'cache'), tmp_path / 'cache'))
        assert digest_path(cache_path(files, tmp_path / 'cache')).read_text().strip() == digests[-1]
    assert digests[0] == digests[1]
    assert not [file for file in tmp_path.iterdir() if 'codes-' in file.name]
    assert len([*(tmp_path / 'cache').glob('a.safetensors.*')]) == 1


def test_names_behind_the_path(tmp_path):
    other = codes_of(seed=1).astype('u2')
    path = tmp_path / 'a.safetensors'
    safetensors.numpy.save_file({'x': codes_of().astype('u2'), 'y': labels_of(), 'z': other}, path)
    found, labels = read(f'{path}#x+y')
    assert found.tolist() == codes_of().reshape(6, 9).tolist() and labels.tolist() == labels_of().tolist()
    files = open_token_files(f'{path}#z')
    assert open_files(files).tolist() == other.reshape(6, 9).tolist()
    assert cache_path(files) != cache_path(open_token_files(f'{path}#x+y'))
    fails(lambda: labels_inside(files), 'a.safetensors#z: holds no labels')
    fails(lambda: open_token_files(path), "no tensor 'indices' in it .there are x, y, z")
    fails(lambda: open_token_files(f'{path}#x+w'), "no tensor 'w'")
    for bad in '#x+', '#+y', '#x+y+z':
        fails(lambda: open_token_files(f'{path}{bad}'), 'write the names of codes and labels behind the path')


def test_names_behind_globs_and_lists(tmp_path):
    for i in range(3):
        write_safetensors(tmp_path / f'a-{i}.safetensors', codes_of(seed=i).astype('u2'), labels_of(), ('x', 'y'))
    paths = expand_token_files(f'{tmp_path}/a-*.safetensors#x+y')
    assert [str(path) for path in paths] == [f'{tmp_path}/a-{i}.safetensors#x+y' for i in range(3)]
    found, labels = read(f'{tmp_path}/a-[01].safetensors#x+y, {tmp_path}/a-2.safetensors#x+y')
    assert found.tolist() == np.concatenate([codes_of(seed=i).reshape(6, 9) for i in range(3)]).tolist()
    assert labels.tolist() == 3 * labels_of().tolist()
    named = write_safetensors(tmp_path / 'odd#name.safetensors', codes_of().astype('u2'), labels_of())
    assert read(named)[0].tolist() == codes_of().reshape(6, 9).tolist()
    (tmp_path / 'set#1').mkdir()
    for name in 'a-0.data.bin.gz', 'a-1.data.bin.gz', 'a.npz':
        (tmp_path / 'set#1' / name).touch()
    below = f'{tmp_path}/set#1'
    assert expand_token_files(f'{below}/a-*.data.bin.gz, {below}/a-1.data.bin.gz') == [
        Path(f'{below}/a-{i}.data.bin.gz') for i in (0, 1, 1)]
    assert expand_token_files(f'{below}/a-{{0..1}}.data.bin.gz') == [Path(f'{below}/a-{i}.data.bin.gz') for i in (0, 1)]
    assert expand_token_files(f'{below}/a*.npz#b/x+b/y') == [Path(f'{below}/a.npz#b/x+b/y')]
    assert holds_foreign(f'{below}/a*.npz') and not holds_foreign(f'{below}/a-*.gz')
    fails(lambda: open_token_files(f'{below}/b.data.bin.gz'), '/set#1/b.data.bin.gz: No such file')
    assert holds_foreign(f'{tmp_path}/a-*.safetensors#x+y') and not holds_foreign(f'{tmp_path}/b-*.npy')


@pytest.mark.parametrize('order', 'CF')
@pytest.mark.parametrize('dtype', ['<i2', '>i2', '<i8', '>u4'])
def test_npy(tmp_path, dtype, order):
    path = tmp_path / 'a.npy'
    codes = codes_of(high=32768)
    path.write_bytes(npy(np.asarray(codes.astype(dtype), order=order)))
    files = open_token_files(path)
    assert open_files(files, 'none').tolist() == open_files(files).tolist() == codes.reshape(6, 9).tolist()
    fails(lambda: labels_inside(files), 'a.npy: holds no labels that are known here; name a file of labels')


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    codes = codes_of().astype('u2')
    save(tmp_path / 'a.npz', indices=codes.view('i2'), labels=labels_of())
    save(tmp_path / 'b.npz', x=codes, y=labels_of().astype('u1'))
    for name in 'a.npz', 'b.npz#x+y':
        found, labels = read(tmp_path / name)
        assert np.array_equal(found, codes.reshape(6, 9)) and labels.tolist() == labels_of().tolist()


# ---------------------------------------------------------------- parquet, lines, folders

@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('kind', ['int16', 'int64', 'uint16', 'large', 'fixed'])
def test_parquet(tmp_path, nested, kind):
    pyarrow = pytest.importorskip('pyarrow')
    codes = codes_of(50, high=1024)
    integers = {'int16': pyarrow.int16(), 'uint16': pyarrow.uint16()}.get(kind, pyarrow.int64())
    wrap = {'large': pyarrow.large_list, 'fixed': lambda inner: pyarrow.list_(inner, 3 if nested else 9)}.get(
        kind, pyarrow.list_)
    column = wrap(wrap(integers)) if nested else wrap(integers)
    path = write_parquet(tmp_path / 'a.parquet', codes if nested else codes.reshape(50, 9), labels_of(50), column,
                         row_group_size=7)
    found, labels = read(path)
    assert found.tolist() == codes.reshape(50, 9).tolist() and labels.tolist() == labels_of(50).tolist()


def test_parquet_columns_of_other_names(tmp_path):
    path = write_parquet(tmp_path / 'a.parquet', codes_of(high=99), labels_of(), names=('codes', 'cls'))
    assert read(f'{path}#codes+cls')[1].tolist() == labels_of().tolist()
    fails(lambda: open_token_file(path), "column 'tokens' is not there .there are codes, cls.", '#codes.labels')


def test_json_lines(tmp_path, monkeypatch):
    monkeypatch.setattr('token_files.foreign.CODES_AT_ONCE', 20)  # two images at a time
    path = write_jsonl(tmp_path / 'a.jsonl', codes_of(7), labels_of(7))
    path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n', 2) + b'\n \n')
    found, labels = read(path)
    assert found.tolist() == codes_of(7).reshape(7, 9).tolist() and labels.tolist() == labels_of(7).tolist()
    kept = labels_path(cache_path(open_token_files(path)))
    assert np.load(kept).tolist() == labels.tolist()
    np.save(kept, labels[:3])
    fails(lambda: read(path), 'no cache of labels; delete it')


@pytest.mark.parametrize('views', [1, 2, 10])
def test_folders_of_npy(tmp_path, views):
    codes = codes_of(12 * views, 2, 16384).reshape(12, views, 4)
    path = write_folder(tmp_path, codes, labels_of(12))
    for spec in path, tmp_path:  # LlamaGen's programs are given the folder around it
        file = open_token_file(spec)
        assert (len(file), file.views, file.stream) == (12 * views, views, path)
    found, labels = read(path)
    assert found.tolist() == codes.reshape(-1, 4).tolist()  # 10.npy comes after 9.npy
    assert labels.tolist() == labels_of(12).repeat(views).tolist()
    before = cache_path(open_token_files(path))
    (path / '3.npy').write_bytes(npy(codes[2][None]))
    assert cache_path(open_token_files(path)) != before
    assert read(path)[0][3 * views].tolist() == codes[2, 0].tolist()
    assert not before.exists() and not labels_path(before).exists()


def test_labels_beside_are_not_needed_inside(tmp_path):
    path = write_folder(tmp_path, codes_of(3, 2, 9).reshape(3, 1, 4), labels_of(3))
    for file in path.with_name('imagenet24_labels').iterdir():
        file.unlink()
    files = open_token_files(path)
    assert len(open_files(files)) == 3
    fails(lambda: labels_inside(files), 'imagenet24_labels: has no 0.npy')


# ---------------------------------------------------------------- what is refused

def bad_arrays():
    good = codes_of().reshape(6, 9)
    yield 'no square', good[:, :8], 'no square grid'
    yield 'oblong', good.reshape(6, 9, 1), r'cannot be codes'
    yield 'flat', good.ravel(), 'cannot be codes'
    yield 'floats', good.astype('f4'), 'cannot be codes'
    yield 'booleans', good.astype(bool), 'cannot be codes'
    yield 'none', good[:0], 'no images'
    yield 'empty', good[:, :0], 'no square grid'
    yield 'negative', good - 1, 'image 0 has code -1; codes are from 0 to 65,535'
    yield 'large', good + 1, 'image 0 has code 65536'
    yield 'int8', -np.ones((2, 4), 'i1'), 'image 0 has code -1'


@pytest.mark.parametrize('ending', ['safetensors', 'npy', 'npz'])
@pytest.mark.parametrize('array, match', [pytest.param(*rest, id=name) for name, *rest in bad_arrays()])
def test_arrays_that_are_no_codes(tmp_path, array, match, ending):
    path = tmp_path / f'a.{ending}'
    array = np.ascontiguousarray(array)
    if ending == 'npy':
        path.write_bytes(npy(array))
    elif ending == 'npz':
        np.savez(path, indices=array)
    else:
        write_safetensors(path, array)
    match = match if array.size or ending != 'npy' else 'damaged|no images|no square'
    refused(path, open_codes, path, 'none', match=match)
    refused(path, open_codes, path, match=match)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize('labels, match', [
    (np.arange(5), '5 labels for 6 images'), (-np.ones(6, int), 'image 0 has class -1'),
    (np.full(6, 2 ** 40), 'has class 1099511627776'), (np.ones(6, 'f4'), 'where .N,. integers are expected|cannot be'),
    (np.ones((6, 1), int), 'where .N,. integers are expected|cannot be')])
@pytest.mark.parametrize('ending', ['safetensors', 'npz'])
def test_labels_that_are_none(tmp_path, labels, match, ending):
    path = tmp_path / f'a.{ending}'
    if ending == 'npz':
        np.savez(path, indices=codes_of(), labels=labels)
    else:
        write_safetensors(path, codes_of().astype('u2'), labels)
    refused(path, labels_inside, open_token_files(path), match=match)


def test_truncated_arrays(tmp_path):
    np.savez(tmp_path / 'a.npz', indices=codes_of())
    (tmp_path / 'a.npy').write_bytes(npy(codes_of()))
    write_safetensors(tmp_path / 'a.safetensors', codes_of().astype('u2'), labels_of())
    for name in 'a.npz', 'a.npy', 'a.safetensors':
        data = (tmp_path / name).read_bytes()
        for size in 0, 5, 60, len(data) - 200, len(data) - 1:
            (tmp_path / name).write_bytes(data[:size])
            refused(tmp_path / name, open_codes, tmp_path / name, 'none', match='fetch it again|damaged')
    (tmp_path / 'a.npy').write_bytes(npy(codes_of()) + b'\0')
    refused(tmp_path / 'a.npy', open_codes, tmp_path / 'a.npy', match='where its header says')


def test_no_code_in_a_file_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ('touch was-run',)
    bad = np.array([[Evil()]], object)
    np.save(tmp_path / 'a.npy', bad, allow_pickle=True)
    np.savez(tmp_path / 'a.npz', indices=bad)
    write_folder(tmp_path, codes_of(2, 2, 9).reshape(2, 1, 4), labels_of(2))
    np.save(tmp_path / 'imagenet24_codes/0.npy', bad, allow_pickle=True)
    for name in 'a.npy', 'a.npz', 'imagenet24_codes':
        refused(tmp_path / name, open_codes, tmp_path / name, match='damaged|plain array|no array')


def test_a_small_npz_cannot_claim_much(tmp_path):
    path = tmp_path / 'a.npz'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('indices.npy', npy(np.zeros((1000, 1024), 'u2')))
    data = bytearray(path.read_bytes())
    at = data.rindex(b'PK\1\2') + 24  # the size it says it has
    data[at:at + 4] = (1 << 31).to_bytes(4, 'little')
    path.write_bytes(data)
    refused(path, open_codes, path, match='claims')


@pytest.mark.parametrize('line, match', [
    (b'{"class_id": 1, "tokens": [1, 2', 'line 2 is no JSON .*cut'), (b'[1]', 'line 2 is not of the form'),
    (b'{"class_id": "1", "tokens": [1, 2, 3, 4]}', 'line 2 is not of the form'),
    (b'{"class_id": 1, "tokens": [1, 2, 3, 4.0]}', 'line 2 is not of the form'),
    (b'{"class_id": 1, "tokens": [1, 2, 3, true]}', 'line 2 is not of the form'),
    (b'{"class_id": 1}', 'line 2 is not of the form'), (b'{"class_id": 1, "tokens": []}', 'line 2 is not of the form'),
    (b'{"class_id": -1, "tokens": [1, 2, 3, 4]}', 'line 2 has class -1'),
    (b'{"class_id": 1, "tokens": [1, 2, 3]}', 'line 2 has 3 codes where those before have 4'),
    (b'{"class_id": 1, "tokens": [1, 2, 3, -4]}', 'image 1 has code -4'),
    (b'{"class_id": 1, "tokens": [1, 2, 3, 65536]}', 'image 1 has code 65536'),
    (b'{"class_id": 1, "tokens": [1, 2, 3, 99999999999999999999]}', 'beyond 65,535'),
    (b'\xff', 'line 2 is no JSON'), (b'[' * 100_000, 'line 2 is no JSON')])
def test_bad_lines(tmp_path, line, match):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(b'{"class_id": 1, "tokens": [1, 2, 3, 4]}\n' + line)
    refused(path, open_codes, path, match=match)
    assert [file.name for file in tmp_path.iterdir() if file.suffix == '.npy' and 'codes' in file.name] == []


def test_empty_lines_are_no_set(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(b'\n \n')
    refused(path, open_codes, path, match='0 lines')


@pytest.mark.parametrize('rows, match', [
    ([[1, 2, 3, 4], [1, 2, 3]], 'not all square grids of one size'), ([[1, 2], [1, 2]], 'no square grid'),
    ([[1, 2, 3, 4], None], 'empty cells'), ([[1, 2, 3, 4], [1, 2, 3, None]], 'empty cells'),
    ([[1, 2, 3, 4], [1, 2, 3, 70000]], 'image 1 has code 70000'), ([[], []], 'is of type list'),
    ([[[1, 2, 3, 4]], [[1, 2, 3, 4]]], 'not all square grids'), ([[[1, 2], [3, 4]], [[1, 2], [3]]], 'not all square'),
    ([[[1, 2], [3, 4]], [[1, 2], None]], 'empty cells'), ([1, 2], 'is of type int64'),
    ([[1.5] * 4] * 2, 'is of type list'), ([['a'] * 4] * 2, 'is of type list')])
def test_bad_columns(tmp_path, rows, match):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    path = tmp_path / 'a.parquet'
    parquet.write_table(pyarrow.table({'tokens': rows, 'label': [0, 1]}), path)
    refused(path, open_codes, path, 'none', match=match)


def test_bad_parquet_labels(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    path = tmp_path / 'a.parquet'
    for labels, match in (([0, None], 'empty or negative'), ([0, -1], 'empty or negative'), ([0., 1.], 'are integers')):
        parquet.write_table(pyarrow.table({'tokens': [[1]] * 2, 'label': labels}), path)
        refused(path, lambda: labels_inside(open_token_files(path)), match=match)
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    refused(path, open_codes, path, match='no readable parquet')


def test_bad_folders(tmp_path):
    codes = codes_of(3, 2, 9).reshape(3, 1, 4)
    path = write_folder(tmp_path / 'a', codes, labels_of(3))
    for array, match in ((codes[1], 'shape .1, 4., where'), (codes[1:2, :, :3], 'where the first file has'),
                         (codes[1:2].astype('f4'), 'integers are expected')):
        (path / '1.npy').write_bytes(npy(array))
        refused(path / '1.npy', open_codes, path, match=match)
    (path / '1.npy').unlink()
    fails(lambda: labels_inside(open_token_files(path), 'none'), '24_codes: has no 1.npy, but .*24_labels has')
    (path / '1.npy').write_bytes(npy(codes[1:2]))
    label = path.with_name('imagenet24_labels') / '2.npy'
    label.write_bytes(npy(np.array([1, 2])))
    fails(lambda: labels_inside(open_token_files(path), 'none'), r'2.npy: int64 of shape \(2,\)')
    label.write_bytes(npy(np.array([-2])))
    fails(lambda: labels_inside(open_token_files(path), 'none'), 'image 2 has class -2')
    (tmp_path / 'b').mkdir()
    refused(tmp_path / 'b', open_codes, tmp_path / 'b', match='no files 0.npy, 1.npy')
    write_folder(tmp_path / 'a', codes, labels_of(3), 'other48')
    fails(lambda: open_set(tmp_path / 'a'), 'holds imagenet24_codes and other48_codes; give one')


def test_paths_that_are_none(tmp_path):
    for name in 'a.safetensors', 'a.npy', 'a.npz#x+y', 'a.parquet', 'a.jsonl':
        fails(lambda: open_token_file(tmp_path / name), r'a\.\w+: No such file')
    (tmp_path / 'a.npy').write_bytes(npy(codes_of()))
    fails(lambda: open_token_file(f'{tmp_path}/a.npy#x'), 'holds no names to choose from')
    fails(lambda: open_token_file(f'{tmp_path}/a\0.npy'), 'is no name of a file')
    fails(lambda: open_token_file(tmp_path / 'a.txt'), 'of other projects NAME.safetensors')


def test_addresses_are_told_by_their_endings_and_nothing_is_fetched():
    assert holds_foreign('hf://datasets/a/b/x.safetensors#codes+classes') and holds_foreign('hf://a/b/x.jsonl, y')
    assert not holds_foreign('hf://datasets/a/b@main/x-token.data.bin.gz')
