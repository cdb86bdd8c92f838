"""Token sets from one format into the other and back, and what bad input gets."""
import gzip
import json
import os

import numpy as np
import pytest

from fileio.labels import read_labels
from foreign_sets import codes_of, labels_of, write_folder, write_jsonl, write_safetensors
from helpers import ROOT, call, contents, fails, make_checked_set, make_set, make_shards, make_wide_set, open_codes
from scripts import convert_tokens
from token_files import compact
from token_files.token_file import open_token_file

DEMO = ROOT / 'demo'


def convert(token_file, output, name, *words):
    return call(convert_tokens, '--token-file', token_file, '--format', name, '--output-dir', output, *words)


def test_the_demo_goes_there_and_back(tmp_path):
    """The demo is stored compact; published and compact again, it has the same bytes."""
    token_file = DEMO / 'fashion-val-token.data.bin'
    convert(token_file, tmp_path / 'published', 'published')
    published = tmp_path / 'published' / 'fashion-val-token.data.bin.gz'
    assert np.array_equal(open_codes(published, 'none'), open_codes(token_file, 'none'))
    convert(published, tmp_path / 'compact', 'compact')
    made = contents(tmp_path / 'compact')
    names = ('token.data.bin', 'token.model.bin', 'token.json', 'label.txt')
    assert set(made) == {f'fashion-val-{end}' for end in names}
    before, manifest = (json.loads(path.read_text()) for path in (
        DEMO / 'fashion-val-token.json', tmp_path / 'compact' / 'fashion-val-token.json'))
    path = manifest['tokenizer'].pop('path')  # seen from the folder of the manifest
    assert os.path.samefile(tmp_path / 'compact' / path, DEMO / before['tokenizer'].pop('path'))
    assert manifest == before
    assert all(made[name] == (DEMO / name).read_bytes() for name in made if not name.endswith('.json'))
    manifest = json.loads((tmp_path / 'published' / 'fashion-val-token.json').read_text())
    assert manifest['format'] == 'escaped-bytes' and 'model' not in manifest and 'format' not in manifest['run']
    assert manifest['classes'] == json.loads(made['fashion-val-token.json'])['classes']


@pytest.mark.parametrize('make', [make_checked_set, lambda folder: make_set(folder)[0],
                                  lambda folder: make_wide_set(folder)[0]])
def test_sets_of_all_kinds(tmp_path, make):
    path, labels = make(tmp_path)
    convert(path, tmp_path / 'compact', 'compact', '--label-file', labels)
    name = path.name.replace('.gz', '')
    file = open_token_file(tmp_path / 'compact' / name)
    assert isinstance(file.content, compact.Stream) and file.format == 'compact'
    assert np.array_equal(open_codes(file.stream, 'none'), open_codes(path, 'none'))
    back = tmp_path / 'back'
    convert(file.stream, back, 'published')
    assert gzip.decompress((back / path.name).read_bytes()) == gzip.decompress(path.read_bytes())
    assert np.array_equal(open_codes(back / path.name, 'none'), open_codes(path, 'none'))


def test_shards_share_one_model(tmp_path):
    _, codes, _ = make_shards(tmp_path)
    convert(tmp_path / 's-*-token.data.bin.gz', tmp_path / 'compact', 'compact')
    assert len(list((tmp_path / 'compact').glob('*.model.bin'))) == 1
    assert np.array_equal(open_codes(tmp_path / 'compact' / '*.data.bin', 'none'), codes)
    files = [open_token_file(path) for path in sorted((tmp_path / 'compact').glob('*.data.bin'))]
    assert len({file.content.model_path for file in files}) == 1 and [len(file) for file in files] == [5, 4, 3]


def test_a_killed_conversion_leaves_no_set(tmp_path, monkeypatch):
    (path, labels), *_ = make_set(tmp_path)
    output = tmp_path / 'out'
    monkeypatch.setattr(convert_tokens, 'compare', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(path, output, 'compact')
    assert not contents(output)
    work = output / f'.{path.name[:-3]}.converting' / 'files'
    work.mkdir(parents=True)
    (work / 'rest').write_text('of a process that was killed at once')
    monkeypatch.undo()
    convert(path, output, 'compact')
    assert not list(output.glob('.*')) and np.array_equal(open_codes(output / path.name[:-3], 'none'),
                                                          open_codes(path, 'none'))


def test_a_difference_is_found(tmp_path, monkeypatch):
    (path, _), *_ = make_set(tmp_path)
    write = convert_tokens.write_set
    monkeypatch.setattr(convert_tokens, 'write_set', lambda path, codes, *rest: write(
        path, (run[::-1] for run in codes), *rest))
    with pytest.raises(RuntimeError, match='does not hold the codes'):
        convert(path, tmp_path / 'out', 'compact')
    assert not contents(tmp_path / 'out')


def test_mistakes_get_one_line(tmp_path):
    (path, labels), *_ = make_set(tmp_path)
    output = tmp_path / 'out'
    convert(path, output, 'compact', '--label-file', labels)
    before = contents(output)
    fails(lambda: convert(path, output, 'compact'), 'is there already', 'another --output-dir')
    assert contents(output) == before
    fails(lambda: convert(f'{path},{path}', tmp_path / 'b', 'compact'), 'two files have one name')
    fails(lambda: convert(path, tmp_path / 'b', 'compact', '--label-file', f'{labels},{labels}'), '2 label files')
    short = tmp_path / 'short'
    short.write_text('1\n')
    fails(lambda: convert(path, tmp_path / 'b', 'compact', '--label-file', short), '1 labels for the 12 images')
    (other, _), *_ = make_set(tmp_path, grid=2, name='b')
    fails(lambda: convert(f'{path},{other}', tmp_path / 'b', 'compact'), 'no shards of one set')
    (large, _), *_ = make_set(tmp_path, n=1, grid=257, name='large')
    fails(lambda: convert(large, tmp_path / 'b', 'compact'), str(large), '257 codes on a side.*compact holds 256')
    path.write_bytes(path.read_bytes()[:-9])
    fails(lambda: convert(path, tmp_path / 'b', 'compact'), str(path), 'damaged or truncated')
    assert not (tmp_path / 'b').exists() or not contents(tmp_path / 'b')


# ---------------------------------------------------------------- sets of others

@pytest.mark.parametrize('format_name', ['compact', 'published'])
def test_sets_of_others(tmp_path, format_name, capsys):
    codes = codes_of(12, 3, 1024)
    made = {'a': write_safetensors(tmp_path / 'a.safetensors', codes.astype('i2'), labels_of(12)),
            'b': write_jsonl(tmp_path / 'b.jsonl', codes, labels_of(12)),
            'x24': write_folder(tmp_path, codes.reshape(12, 1, 9), labels_of(12), 'x24')}
    for name, path in made.items():
        convert(path, tmp_path / 'out', format_name)
        new = tmp_path / f'out/{name}-token.data.bin{".gz" if format_name == "published" else ""}'
        assert np.array_equal(open_codes(new, 'none'), codes.reshape(12, 9))
        assert read_labels(tmp_path / f'out/{name}-label.txt').tolist() == labels_of(12).tolist()
        assert 'view' not in capsys.readouterr().out


def test_the_first_view_is_kept_or_all(tmp_path, capsys):
    codes = codes_of(12 * 3, 2, 999).reshape(12, 3, 4)
    path = write_folder(tmp_path, codes, labels_of(12))
    convert(path, tmp_path / 'first', 'compact')
    assert 'of 3 views of its 12 images the first is kept; --all-views keeps all' in capsys.readouterr().out
    new = tmp_path / 'first/imagenet24-token.data.bin'
    assert np.array_equal(open_codes(new, 'none'), codes[:, 0]) and len(read_labels(
        tmp_path / 'first/imagenet24-label.txt')) == 12
    convert(path, tmp_path / 'all', 'compact', '--all-views')
    new = tmp_path / 'all/imagenet24-token.data.bin'
    assert np.array_equal(open_codes(new, 'none'), codes.reshape(36, 4))
    assert read_labels(tmp_path / 'all/imagenet24-label.txt').tolist() == labels_of(12).repeat(3).tolist()
    pairs = write_jsonl(tmp_path / 'b.jsonl', codes_of(6, 2, 99), np.array([1, 2, 1, 2, 3, 3]))
    convert(pairs, tmp_path / 'b', 'published', '--views', '2:2')
    assert np.array_equal(open_codes(tmp_path / 'b/b-token.data.bin.gz', 'none'),
                          codes_of(6, 2, 99).reshape(6, 4)[[0, 1, 4]])
    assert read_labels(tmp_path / 'b/b-label.txt').tolist() == [1, 2, 3]
    fails(lambda: convert(pairs, tmp_path / 'c', 'published', '--views', '2'), 'would be views of one image')
    assert not (tmp_path / 'c').exists()


def test_a_bad_set_of_others_leaves_nothing(tmp_path):
    path = write_jsonl(tmp_path / 'a.jsonl', codes_of(6, 2, 99), labels_of())
    path.write_bytes(path.read_bytes()[:-9])
    fails(lambda: convert(path, tmp_path / 'out', 'compact'), 'a.jsonl: line 6 is no JSON')
    np.save(tmp_path / 'b.npy', codes_of(6, 2, 70000))
    fails(lambda: convert(tmp_path / 'b.npy', tmp_path / 'out', 'compact'), 'image 0 has code 69999')
    assert not (tmp_path / 'out').exists() or not any((tmp_path / 'out').iterdir())
