"""The check of token sets: it finds each kind of damage, and all that there is."""
import json
import re

import numpy as np
import pytest
import torch

from foreign_sets import codes_of, labels_of, write_jsonl, write_safetensors
from helpers import DIM, call, fails, make_images, tokenize
from scripts import verify_tokens
from token_files.token_file import write_set


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images'))


def verify(capsys, *line):
    """(exit code, lines) of verify_tokens.py."""
    capsys.readouterr()
    code = call(verify_tokens, *line)
    return code, capsys.readouterr().out.splitlines()


def test_published_files_are_right(golden, capsys):
    code, lines = verify(capsys, '--token-file', golden.folder / 'sample-token.data.bin.gz', '--label-file',
                         golden.folder / 'sample-label.txt')
    assert code == 0 and len(lines) == 1 and lines[0].startswith('right: ')


def test_all_problems_of_shards_are_found(data, tmp_path, capsys):
    out = tokenize(data, tmp_path / 'out', shard_size=20)
    line = ['--token-file', f'{out}/my-token-*.data.bin.gz', '--label-file', f'{out}/my-label-*.txt', '--codebook-path',
            data / 'codebook.ckpt', '--token-synonym-dict', out / 'synonyms.json']
    (out / 'synonyms.json').write_text(json.dumps({c: [(c + 1) % 40] for c in range(40)}))
    code, lines = verify(capsys, *line)
    assert code == 0 and lines == ['right: 45 images of 4x4 codes in 3 files (escaped-bytes)']

    (out / 'my-label-00000.txt').write_text('1\n')
    (out / 'my-token-00001.data.bin.gz').write_bytes(b'junk')
    (out / 'my-token-00002.json').write_text('{')
    (out / 'synonyms.json').write_text('{}')
    code, lines = verify(capsys, *line)
    assert code == 1 and lines[-1] == f'{len(lines) - 1} problems found'
    for said in ('my-label-00000.txt: 1 labels for the 20', 'my-label-00000.txt: 2 bytes', 'my-token-00001.*gzip',
                 'my-token-00001.data.bin.gz: 4 bytes', 'my-token-00002.json: not JSON', 'no synonyms for 40'):
        assert sum(bool(re.search(said, text)) for text in lines) == 1, (said, lines)


def test_a_manifest_that_says_other_things(data, tmp_path, capsys):
    out = tokenize(data, tmp_path / 'good')
    line = ['--token-file', out / 'my-token.data.bin.gz', '--label-file', out / 'my-label.txt']
    assert verify(capsys, *line)[0] == 0
    torch.save(torch.ones(40, DIM), tmp_path / 'other.ckpt')
    code, lines = verify(capsys, *line, '--codebook-path', tmp_path / 'other.ckpt')
    assert code == 1 and 'is not the codebook' in lines[0]
    said = json.loads((out / 'my-token.json').read_text())
    (out / 'my-token.json').write_text(json.dumps({**said, 'codes_used': 1, 'files': {}, 'classes': ['one']}))
    code, lines = verify(capsys, *line)
    assert code == 1 and len(lines) == 6
    (out / 'my-token.json').write_text(json.dumps({**said, 'codebook': 7}))
    code, lines = verify(capsys, *line, '--codebook-path', data / 'codebook.ckpt')
    assert code == 1 and 'is not the codebook' in lines[0]


def test_the_stream_is_checked_beside_a_damaged_index(data, tmp_path, capsys):
    out = tokenize(data, tmp_path)
    for name in ('my-token.index.npy.gz', 'my-token.data.bin.gz'):
        (out / name).write_bytes((out / name).read_bytes()[:-9])
    code, lines = verify(capsys, '--token-file', out / 'my-token.data.bin.gz', '--label-file', out / 'my-label.txt')
    assert code == 1 and lines[-1] == '3 problems found'
    assert sum('SHA-256' in text for text in lines) == 2 and 'my-token.index.npy.gz: damaged' in lines[0]


def make_set(folder, name, codes, manifest=None, labels=None):
    write_set(folder / f'{name}-token.data.bin.gz', [codes], len(codes), folder / f'{name}-label.txt',
              [0] * len(codes) if labels is None else labels)
    if manifest:
        (folder / f'{name}-token.json').write_text(json.dumps(manifest))


def test_shards_that_do_not_belong_together(tmp_path, capsys):
    make_set(tmp_path, 'a', np.zeros((3, 16), int), {'classes': ['ant', 'bee']})
    make_set(tmp_path, 'b', np.zeros((3, 4), int), {'classes': ['bee', 'ant']})
    code, lines = verify(capsys, '--token-file', tmp_path / '*-token.data.bin.gz', '--label-file',
                         tmp_path / '*-label.txt')
    assert code == 1 and lines[-1] == '2 problems found'
    assert 'shards of 4 and 16 codes an image' in lines[0] and "class 0 is 'bee'" in lines[1]


def test_codes_and_labels_beyond_what_there_is(tmp_path, capsys):
    make_set(tmp_path, 'a', np.full((3, 4), 9), {'classes': ['ant', 'bee']}, labels=[0, 1, 2])
    torch.save(torch.full((9, 2), torch.nan), tmp_path / 'codebook.ckpt')
    line = ['--token-file', tmp_path / 'a-token.data.bin.gz', '--label-file', tmp_path / 'a-label.txt',
            '--codebook-path', tmp_path / 'codebook.ckpt']
    code, lines = verify(capsys, *line)
    assert code == 1 and any('codebook.ckpt: its elements are not finite' in text for text in lines)
    torch.save(torch.ones(9, 2), tmp_path / 'codebook.ckpt')
    code, lines = verify(capsys, *line)
    assert code == 1 and lines[-1] == '2 problems found'
    for said in ('holds code 9, but .*codebook.ckpt has 9 rows',
                 'labels hold class 2, but .*a-token.json names 2'):
        assert sum(bool(re.search(said, text)) for text in lines) == 1, (said, lines)
    torch.save(torch.ones(10, 2), tmp_path / 'codebook.ckpt')
    (tmp_path / 'a-label.txt').write_text('0\n1\n1\n')
    assert verify(capsys, *line) == (0, ['right: 3 images of 2x2 codes in 1 file (escaped-bytes)'])


def test_what_cannot_be_asked(tmp_path):
    make_set(tmp_path, 'a', np.zeros((3, 4), int))
    tokens = tmp_path / 'a-token.data.bin.gz'
    labels = tmp_path / 'a-label.txt'
    fails(lambda: call(verify_tokens, '--token-file', tokens, '--label-file', f'{labels},{labels}'),
          '1 token files, but 2 label files')
    fails(lambda: call(verify_tokens, '--token-file', tokens, '--label-file', labels, '--token-synonym-dict', 'x'),
          '--token-synonym-dict: give --codebook-path too')
    fails(lambda: call(verify_tokens, '--token-file', tmp_path / '*.none', '--label-file', labels), 'no file matches')


# ---------------------------------------------------------------- the compact format

def test_compact_sets_are_verified(data, tmp_path, capsys):
    out = tokenize(data, tmp_path / 'out', shard_size=20, format='compact')
    line = ['--token-file', f'{out}/my-token-*.data.bin', '--label-file', f'{out}/my-label-*.txt', '--codebook-path',
            data / 'codebook.ckpt']
    assert verify(capsys, *line) == (0, ['right: 45 images of 4x4 codes in 3 files (compact)'])
    stream = out / 'my-token-00001.data.bin'
    content = stream.read_bytes()
    stream.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, lines = verify(capsys, *line)
    assert code == 1 and lines[-1] == '2 problems found'
    assert re.search('my-token-00001.data.bin: .*SHA-256', lines[0]) and 'block 0, of image 0' in lines[1]
    stream.write_bytes(content)
    torch.save(torch.ones(30, DIM), tmp_path / 'small.ckpt')
    code, lines = verify(capsys, *line[:-1], tmp_path / 'small.ckpt')
    assert code == 1 and any(re.search('holds code 3[0-9], but .*small.ckpt has 30 rows', text) for text in lines)


@pytest.mark.parametrize('damage, words', [
    (lambda model: model.unlink(), ['my-token.model.bin: No such file']),
    (lambda model: model.write_bytes(model.read_bytes()[:-1]),
     ['my-token.model.bin: is not the model that', 'my-token.model.bin: [0-9]+ bytes, SHA-256'])])
def test_a_damaged_model_is_named(data, tmp_path, capsys, damage, words):
    out = tokenize(data, tmp_path, format='compact')
    damage(out / 'my-token.model.bin')
    code, lines = verify(capsys, '--token-file', out / 'my-token.data.bin', '--label-file', out / 'my-label.txt')
    assert code == 1 and len(lines) == len(words) + 1, lines
    assert all(re.search(word, line) for word, line in zip(words, lines)), lines


def test_the_golden_compact_set_is_right(golden, capsys):
    folder = golden.folder / 'compact'
    assert verify(capsys, '--token-file', folder / 'golden-token.data.bin', '--label-file',
                  folder / 'golden-label.txt') == (0, ['right: 36 images of 16x16 codes in 1 file (compact)'])


def test_sets_of_others(tmp_path, capsys):
    path = write_safetensors(tmp_path / 'a.safetensors', codes_of(12, 3, 512).astype('i2'), labels_of(12))
    code, lines = verify(capsys, '--token-file', path, '--codebook-path', 'fsq:8,8,8')
    assert (code, lines) == (0, ['right: 12 images of 3x3 codes in 1 file (safetensors)'])
    code, lines = verify(capsys, '--token-file', path, '--codebook-path', 'fsq:8,8,5', '--views', '2')
    assert code == 1 and len(lines) == 3 and 'holds code 511, but fsq:8,8,5 has 320 rows' in lines[0] + lines[1]
    assert 'would be views of one image' in lines[0] + lines[1]
    path = write_jsonl(tmp_path / 'a.jsonl', codes_of(4, 2, 99), labels_of(4))
    path.write_bytes(path.read_bytes()[:-9])
    code, lines = verify(capsys, '--token-file', f'{path},{tmp_path / "no.npy"}')
    assert code == 1 and any('line 4 is no JSON' in line for line in lines) and any('no.npy: No such' in line
                                                                                  for line in lines)
    fails(lambda: verify(capsys, '--token-file', tmp_path / 'x.data.bin.gz'), '--label-file: give one')
