"""Batches of tokens and labels, shards as one set, and what does not fit together."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from foreign_sets import codes_of, labels_of, write_folder, write_jsonl, write_safetensors
from helpers import (codes_of_kind, fails, make_checked_set, make_compact_set, make_set, make_shards, make_wide_set,
                     npy, refused, write_manifest, write_raw_set)
from samplers import draw_views, shuffled
from token_dataset import (TokenDataset, choose_data_device, facts_of, labels_by_file, note_shared_files,
                           open_splits)
from token_files.codebook import load_codebook
from token_files.published import companion_path
from token_files.token_file import manifest_path

CPU = torch.device('cpu')


# ---------------------------------------------------------------- batches

def test_batches_come_in_order_and_whole(tmp_path):
    files, x, y = make_set(tmp_path, n=23)
    data = TokenDataset(*files, 391)
    assert (len(data), data.grid_size, data.classes) == (23, 4, None)
    indices = np.random.default_rng(1).permutation(23)
    got = list(data.batches(indices, 5, CPU))
    assert [len(c) for c, _ in got] == [5, 5, 5, 5, 3]
    assert got[0][0].dtype == torch.uint16 and got[0][0].shape == (5, 4, 4)
    assert np.array_equal(torch.cat([c for c, _ in got]).numpy().reshape(23, 16), x[indices])
    assert np.array_equal(torch.cat([labels for _, labels in got]).numpy(), y[indices])


def test_resident_and_moved_batches_equal_mapped_ones(tmp_path):
    files, *_ = make_set(tmp_path, n=23, codes=510)
    data = TokenDataset(*files, 510)
    indices = np.random.default_rng(1).permutation(23)[:17]
    mapped = list(data.batches(indices, 5, CPU))
    moved = list(data._moved_batches([indices[i:i + 5] for i in range(0, 17, 5)], CPU, False))
    data.keep_on(CPU)
    resident = list(data.batches(indices, 5, CPU))
    for other in (moved, resident):
        assert len(other) == len(mapped)
        for (a, la), (b, lb) in zip(mapped, other):
            assert a.dtype == b.dtype and torch.equal(a.int(), b.int()) and torch.equal(la, lb)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_batches_on_cuda_equal_mapped_ones(tmp_path):
    files, *_ = make_set(tmp_path, n=23, codes=510)
    indices = np.arange(23)[::-1].copy()
    gpu = torch.device('cuda', 0)
    data = TokenDataset(*files, 510)
    results = [list(data.batches(indices, 5, gpu, pin)) for pin in (False, True)]
    data.keep_on(gpu)
    results.append(list(data.batches(indices, 5, gpu)))
    mapped = list(TokenDataset(*files, 510).batches(indices, 5, CPU))
    for got in results:
        assert len(got) == len(mapped)
        for (a, la), (b, lb) in zip(mapped, got):
            assert a.is_cuda is False and b.is_cuda and torch.equal(a.int(), b.int().cpu())
            assert torch.equal(la, lb.cpu())


# ---------------------------------------------------------------- shards

def test_shards_read_as_one_set(tmp_path):
    files, x, y = make_shards(tmp_path)
    tokens = f'{tmp_path}/s-*-token.data.bin.gz'
    labels = f'{tmp_path}/s-*-label.txt'
    for cache in ('none', tmp_path / 'cache'):
        data = TokenDataset(tokens, labels, 391, cache)
        assert np.array_equal(data.codes, x) and np.array_equal(data.labels, y)
    assert data.bytes_on_disk() == sum(p.stat().st_size for f, _ in files for p in (f, companion_path(f)))
    data = TokenDataset(','.join(str(f) for f, _ in files[::-1]), ', '.join(str(f) for _, f in files[::-1]), 391)
    assert np.array_equal(data.codes, np.r_[x[9:], x[5:9], x[:5]])  # a list keeps its order


def test_shards_of_both_formats_read_together(tmp_path):
    (a, la), x, _ = make_set(tmp_path)
    (b, lb), w = make_wide_set(tmp_path)
    assert np.array_equal(TokenDataset(f'{a},{b}', f'{la},{lb}', 8192).codes, np.r_[x, w])


def test_a_compact_set_reads_like_its_published_twin(tmp_path):
    (tokens, labels), x, y = make_set(tmp_path, n=23)
    files = make_compact_set(tmp_path, x, y, name='c', checked=True, classes=['cat', 'dog'])
    data, twin = TokenDataset(*files, 391), TokenDataset(tokens, labels, 391)
    assert np.array_equal(data.codes, twin.codes) and np.array_equal(data.labels, twin.labels)
    assert data.codes.dtype == twin.codes.dtype and (data.grid_size, data.classes) == (4, ['cat', 'dog'])
    assert data.bytes_on_disk() == sum(path.stat().st_size for path in tmp_path.glob('c-*.bin'))
    indices = np.random.default_rng(1).permutation(23)
    for (a, la), (b, lb) in zip(data.batches(indices, 5, CPU), twin.batches(indices, 5, CPU)):
        assert a.dtype == b.dtype and torch.equal(a, b) and torch.equal(la, lb)


def test_shards_of_all_formats_read_together(tmp_path):
    (a, la), x, _ = make_set(tmp_path)
    (b, lb), w = make_wide_set(tmp_path)
    c, lc = make_compact_set(tmp_path, codes_of_kind('copied', 9, 4), name='c')
    assert np.array_equal(TokenDataset(f'{a},{c},{b}', f'{la},{lc},{lb}', 8192).codes,
                          np.r_[x, codes_of_kind('copied', 9, 4), w])


def test_a_codebook_too_small_for_a_compact_set(tmp_path):
    x = codes_of_kind('gaps', 9, 4)
    files = make_compact_set(tmp_path, x)
    for cache in 'none', '':
        fails(lambda: TokenDataset(*files, int(x.max()), cache), f'{files[0]}: holds code {x.max()}, but the codebook')
        assert np.array_equal(TokenDataset(*files, int(x.max()) + 1, cache).codes, x)


def test_labels_of_a_compact_set_are_compared(tmp_path):
    files = make_compact_set(tmp_path, codes_of_kind('copied', 9, 4), checked=True)
    files[1].write_text('1\n' * 9)
    fails(lambda: TokenDataset(*files, 400, 'none'), 'a-label.txt', 'changed or damaged')
    files = make_compact_set(tmp_path, codes_of_kind('copied', 9, 4))
    files[1].write_text('1\n' * 8)
    fails(lambda: TokenDataset(*files, 400, 'none'), '8 labels for the 9 images of .*a-token.data.bin')


def test_bad_shards_are_named(tmp_path):
    files, x, y = make_shards(tmp_path)
    tokens = f'{tmp_path}/s-*-token.data.bin.gz'
    labels = f'{tmp_path}/s-*-label.txt'

    def load(codebook_size=391):
        return TokenDataset(tokens, labels, codebook_size, 'none')
    fails(lambda: TokenDataset(f'{tmp_path}/t-*-token.data.bin.gz', labels, 391), r't-\*.*no file matches')
    fails(lambda: TokenDataset(tokens, files[0][1], 391), '3 token files', '1 label files')
    shard = ([0] * 5 + [1] * 4 + [2] * 3)[int(x.max(1).argmax())]
    fails(lambda: load(int(x.max())), f's-{shard}-token.*holds code {x.max()}')
    files[1][1].write_text('1\n')
    files[2][1].write_text('1\n' * 6)  # as many labels as images in all, but not in each
    fails(load, r's-1-label.txt: 1 labels for the 4 images of .*s-1-token')
    files[1][1].write_text('1\n' * 4)
    files[2][1].write_text('1\n' * 3)
    make_set(tmp_path, 4, grid=5, name='s-1')
    fails(load, 's-1-token.*25 codes.*s-0-token.*16')
    files[1][0].write_bytes(b'junk')
    fails(load, 's-1-token', 'gzip')


@pytest.mark.parametrize('name', ['a[1]', 'a*b', 'a{0..1}b', 'a?'])
def test_folders_whose_names_look_like_patterns(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    _, x, y = make_shards(folder)
    for tokens, labels in ((f'{folder}/s-*-token.data.bin.gz', f'{folder}/s-*-label.txt'),
                           (f'{folder}/s-{{0..2}}-token.data.bin.gz', f'{folder}/s-{{0..2}}-label.txt'),
                           (','.join(f'{folder}/s-{i}-token.data.bin.gz' for i in range(3)),
                            ','.join(f'{folder}/s-{i}-label.txt' for i in range(3)))):
        data = TokenDataset(tokens, labels, 391)
        assert np.array_equal(data.codes, x) and np.array_equal(data.labels, y)
    one = TokenDataset(f'{folder}/s-1-token.data.bin.gz', f'{folder}/s-1-label.txt', 391)
    assert np.array_equal(one.codes, x[5:9])


# ---------------------------------------------------------------- class names

def named_shards(folder, *classes):
    """One shard for each list of class names; None leaves the manifest out, 0 the names."""
    files, *_ = make_shards(folder, [3] * len(classes))
    for (tokens, labels), names in zip(files, classes):
        if names is not None:
            write_manifest(tokens, labels, **({'classes': names} if names else {}))
    return f'{folder}/s-*-token.data.bin.gz', f'{folder}/s-*-label.txt'


@pytest.mark.parametrize('classes, expected', [
    ([['cat', 'dog'], ['cat', 'dog']], ['cat', 'dog']), ([None, ['cat', 'dog']], ['cat', 'dog']),
    ([['cat', 'dog'], 0, None], ['cat', 'dog']), ([None, 0], None)])
def test_shards_that_agree_on_classes(tmp_path, classes, expected):
    assert TokenDataset(*named_shards(tmp_path, *classes), 391, 'none').classes == expected


@pytest.mark.parametrize('first, second, words', [
    (['cat', 'dog'], ['dog', 'cat'], "class 0 is 'dog', but in .*s-0-token.* it is 'cat'"),
    (['cat', 'dog'], ['cat'], "class 1 is missing, but in .*s-0-token.* it is 'dog'"),
    (['cat'], ['cat', 'missing'], "class 1 is 'missing', but in .*s-0-token.* it is missing"),
    (['café'], ['cafe\u0301'], r"class 0 is 'cafe\\u0301', but in .* it is 'caf\\xe9'"),
    (['cat'], ['Cat'], "class 0 is 'Cat'"), (['cat', ''], ['cat', ' '], "class 1 is ' '")])
def test_shards_that_differ_in_classes_are_refused(tmp_path, first, second, words):
    spec = named_shards(tmp_path, first, second)
    fails(lambda: TokenDataset(*spec, 391, 'none'), 's-1-token.data.bin.gz: ' + words, 'would mean other classes')


# ---------------------------------------------------------------- labels, checksums, codebooks

def test_bad_labels_and_codebooks(tmp_path):
    (tokens, labels), x, _ = make_set(tmp_path)

    def load():
        return TokenDataset(tokens, labels, 391, 'none')
    fails(lambda: TokenDataset(tokens, labels, int(x.max()), 'none'), tokens.name, f'code {x.max()}')
    good = labels.read_text()
    labels.write_text(good + '3\n')
    fails(load, labels.name, '13 labels', '12 images')
    labels.write_text(good.replace('\n', '\ncat\n', 1))
    fails(load, labels.name, 'line 2', 'cat')
    labels.write_text(good + '\n')
    assert len(load()) == 12
    labels.write_text('-1\n' + good)
    fails(load, labels.name, 'line 1: class -1 is not from 0')
    labels.write_text('9' * 30 + '\n')
    fails(load, labels.name)
    labels.write_text('')
    fails(load, labels.name, 'no labels')
    labels.write_bytes(b'\xff\xfe')
    fails(load, labels.name)
    labels.unlink()
    fails(load, labels.name, 'o such file')


@pytest.mark.parametrize('cache', ['', 'none'])
@pytest.mark.parametrize('damage', ['stream', 'index', 'labels'])
def test_what_differs_from_its_manifest_is_refused(tmp_path, cache, damage):
    path, labels = make_checked_set(tmp_path)
    assert len(TokenDataset(path, labels, 256, cache)) == 2
    if damage == 'labels':
        labels.write_text('0\n2\n')
    else:  # right in structure, but other codes
        write_raw_set(tmp_path, *((b'\1' * 8, [0, 4, 8]) if damage == 'stream' else (bytes(8), [0, 1, 8])))
    bad = {'stream': path, 'index': companion_path(path), 'labels': labels}[damage]
    refused(bad, TokenDataset, path, labels, 256, cache, match='changed or damaged, fetch or make it again')


def test_line_endings_of_labels_under_a_manifest(tmp_path):
    path, labels = make_checked_set(tmp_path)
    labels.write_bytes(b'0\r\n1\r\n')
    fails(lambda: TokenDataset(path, labels, 256), str(labels), 'changed or damaged')
    manifest_path(path).unlink()  # nothing says that they were others
    assert TokenDataset(path, labels, 256).labels.tolist() == [0, 1]


def test_labels_of_the_users_own_are_allowed(tmp_path):
    path, _ = make_checked_set(tmp_path)
    (tmp_path / 'mine').write_text('5\n6\n')
    assert TokenDataset(path, tmp_path / 'mine', 256).labels.tolist() == [5, 6]


def test_a_cache_of_another_length_is_refused(tmp_path):
    files, *_ = make_set(tmp_path)
    data = TokenDataset(*files, 391)
    Path(data.codes.filename).write_bytes(npy(np.zeros((11, 16), np.uint16)))
    fails(lambda: TokenDataset(*files, 391), 'its cache holds 11 images, its index 12', 'delete the cache')


def test_the_demo_set_reads(golden):
    demo = golden.folder.parent.parent / 'demo'
    codebook = load_codebook(demo / 'codebook.ckpt')
    data = TokenDataset(demo / 'fashion-val-token.data.bin', demo / 'fashion-val-label.txt', len(codebook), 'none')
    manifest = json.loads((demo / 'fashion-val-token.json').read_text())
    assert len(data) == manifest['images'] and data.grid_size == manifest['grid']
    assert data.classes == manifest['classes']


# ---------------------------------------------------------------- validation sets that are trained on

def test_token_files_that_are_trained_on_are_named(tmp_path, capsys):
    """A file by another path, a link, and among shards; an equal one by its manifest; nothing of others."""
    (first, second, third), *_ = make_shards(tmp_path)
    open_splits({'train': first, 'val': first}, torch.zeros(391, 32), '', 'none', 4, CPU)
    note = f'note: {first[0]}: its images are those of {first[0]}, which is trained on: results on them say nothing'
    assert capsys.readouterr().out.count(note) == 1
    train = TokenDataset(f'{first[0]},{second[0]}', f'{first[1]},{second[1]}', 391, 'none')
    (tmp_path / 'link').mkdir()
    for path in (second[0], companion_path(second[0])):
        os.link(path, tmp_path / 'link' / path.name)
    linked = tmp_path / 'link' / second[0].name
    val = TokenDataset(f'{third[0]},{linked}', f'{third[1]},{second[1]}', 391, 'none')
    note_shared_files(train, val)
    assert [line[:len(str(linked)) + 8] for line in capsys.readouterr().out.splitlines()] == [f'note: {linked}: ']
    note_shared_files(train, TokenDataset(*third, 391, 'none'))
    assert not capsys.readouterr().out


def test_copies_of_token_files_are_known_by_their_manifests(tmp_path, capsys):
    (tmp_path / 'a').mkdir()
    path, labels = make_checked_set(tmp_path / 'a')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    train = TokenDataset(path, labels, 256, 'none')
    note_shared_files(train, TokenDataset(tmp_path / 'b' / path.name, labels, 256, 'none'))
    assert f'note: {tmp_path / "b" / path.name}: its images are those of {path}, ' in capsys.readouterr().out


# ---------------------------------------------------------------- sets of others

def test_labels_inside_and_beside(tmp_path):
    path = write_safetensors(tmp_path / 'a.safetensors', codes_of().astype('u2'), labels_of())
    data = TokenDataset(str(path), '', 65536)
    assert data.labels.tolist() == labels_of().tolist() and (len(data), data.grid_size, data.views) == (6, 3, 1)
    assert isinstance(data.codes, np.memmap) and data.codes.filename == path
    codes, labels = data.batch([4, 1])
    assert codes.dtype == torch.uint16 and codes.tolist() == codes_of()[[4, 1]].tolist() and labels.tolist() == [0, 1]
    (tmp_path / 'labels.txt').write_text('7\n' * 6)
    assert TokenDataset(str(path), str(tmp_path / 'labels.txt'), 65536).labels.tolist() == [7] * 6
    assert TokenDataset(str(path), None, 65536).labels.tolist() == [0] * 6
    fails(lambda: TokenDataset(str(path), '', 65535), 'holds code 65535, but the codebook has 65535 rows')
    (tmp_path / 'labels.txt').write_text('7\n' * 5)
    fails(lambda: TokenDataset(str(path), str(tmp_path / 'labels.txt'), 65536), '5 labels for the 6 images')
    files, *_ = make_set(tmp_path)
    fails(lambda: TokenDataset(str(files[0]), '', 391, 'none'), 'its labels are in a file of their own; name that')


@pytest.mark.parametrize('resident', [False, True])
@pytest.mark.parametrize('views, rows', [((2, 1), [[0, 2, 4], [1, 3, 5]]), ((2, 2), [[0, 1, 4], [2, 3, 5]])])
def test_a_view_of_each_image(tmp_path, views, rows, resident):
    rows = np.array(rows)
    labels = np.zeros(6, int)
    labels[rows] = [3, 1, 2]
    path = write_jsonl(tmp_path / 'a.jsonl', codes_of(), labels)
    data = TokenDataset(str(path), '', 65536, views=views)
    if resident:
        data.keep_on(CPU)
    assert (len(data), data.views, data.labels.tolist()) == (3, 2, [3, 1, 2])
    drawn = np.array([1, 0, 1])
    for chosen, which in (None, [0, 0]), (drawn, [1, 1]):
        (codes, found), = data.batches(np.array([2, 0]), 5, CPU, views=chosen)
        expected = [codes_of()[rows[view, image]].tolist() for view, image in zip(which, [2, 0])]
        assert codes.tolist() == expected and found.tolist() == [2, 3]
    wrong = (2, 2) if views == (2, 1) else (2, 1)
    for label_file in '', None:  # pre-training looks at classes for this alone
        fails(lambda: TokenDataset(str(path), label_file, 65536, views=wrong), 'would be views of one image')
    fails(lambda: TokenDataset(str(path), '', 65536, views=(4, 1)), 'its 6 rows are no images of 4 views')


def test_views_of_folders_are_known(tmp_path):
    codes = codes_of(12 * 10, 2, 999).reshape(12, 10, 4)
    path = write_folder(tmp_path, codes, labels_of(12))
    data = TokenDataset(str(path), '', 999)
    assert (len(data), data.views, data.labels.tolist()) == (12, 10, labels_of(12).tolist())
    views = draw_views(12, 10, 0, 3)
    got = torch.cat([codes for codes, _ in data.batches(np.arange(12), 5, CPU, views=views)])
    assert got.reshape(12, 4).tolist() == [codes[i, view].tolist() for i, view in enumerate(views)]
    # on two ranks each image has the view that it has on one
    parts = [shuffled(12, 2, rank, 0, 3) for rank in range(2)]
    for part in parts:
        (found, _), = data.batches(part, 12, CPU, views=views)
        assert found.tolist() == got[part].tolist()


def test_images_are_held_out_with_all_their_views(tmp_path):
    path = write_folder(tmp_path, codes_of(20, 2, 999).reshape(10, 2, 4), labels_of(10))
    train, val = TokenDataset(str(path), '', 999).split(0.3)
    assert (len(train), len(val), train.views, val.views) == (7, 3, 2, 2) and train.codes is val.codes
    rows = [set(data.rows(np.arange(len(data)), np.full(len(data), view)).tolist()) for data in (train, val)
            for view in range(2)]
    assert sum(map(len, rows)) == 20 and set().union(*rows) == set(range(20))
    assert rows[2] == {4, 8, 16} and rows[3] == {5, 9, 17} and val.labels.tolist() == labels_of(10)[[2, 4, 8]].tolist()


def test_splits_of_one_file(tmp_path, capsys):
    path = str(write_safetensors(tmp_path / 'a.safetensors', codes_of(20).astype('u2'), labels_of(20)))
    files = {'train': (path, ''), 'val': (path, '')}
    data = open_splits(files, torch.zeros(65536, 4), '', '', 2, CPU, None, 0.1)
    assert (len(data['train']), len(data['val'])) == (18, 2)
    out = capsys.readouterr().out
    assert f'{path}: 2 of its 20 images are held out' in out and 'train: 18 images of' in out and 'val: 2 images' in out
    assert 'note:' not in out
    labels, = labels_by_file(data).values()
    assert sorted(labels.tolist()) == sorted(labels_of(20).tolist())
    facts = facts_of(data, torch.zeros(2, 2))
    assert facts['training tokens'] == facts['validation tokens'] and facts['training images'] == 18
    only = open_splits({'val': files['val']}, torch.zeros(65536, 4), '', '', 2, CPU, None, 0.1)
    assert only['val'].labels.tolist() == data['val'].labels.tolist()
    choose_data_device(data, 'cpu', CPU)
