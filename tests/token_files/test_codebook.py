"""The codebook: golden codes, the nearest rows against a slow search, and files that are none."""
import json

import numpy as np
import pytest
import torch

from helpers import fails, refused
from token_files import codebook as cb
from twins import slow_nearest_codes

# ---------------------------------------------------------------- codes

def test_golden_codes(golden):
    arrays = golden('quantize.npz')
    codes = cb.quantize(torch.from_numpy(arrays['features']), torch.from_numpy(arrays['codebook']))
    assert codes.dtype == torch.int64
    assert np.array_equal(codes.view(arrays['indices'].shape).numpy(), arrays['indices'])


def test_quantize_finds_the_nearest_direction_and_the_lowest_of_equals():
    codebook = torch.tensor([[0., 2.], [3., 0.], [0., 5.], [-1., 0.]])
    features = torch.tensor([[[0.1, 9.], [7., 0.2]], [[-3., 0.1], [1e-3, 1.]]])
    assert cb.quantize(features, codebook).tolist() == [[0, 1], [3, 0]]
    assert cb.quantize(codebook[2], codebook).shape == () and cb.quantize(codebook[2], codebook) == 0


@pytest.mark.parametrize('top_k', [1, 5, 29])
def test_nearest_codes_against_a_slow_search(top_k):
    codebook = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    codebook[7] = codebook[3]  # as near to all others as 3 is
    found = cb.nearest_codes(codebook, top_k)
    assert found.shape == (30, top_k) and found.tolist() == slow_nearest_codes(codebook, top_k)


def test_a_code_is_never_its_own_synonym_and_ties_go_to_the_lowest_code():
    codebook = torch.tensor([[1., 0], [2, 0], [4, 0], [0, 1], [0, 0]])  # three equal directions, and a row of zeros
    assert cb.nearest_codes(codebook, 4).tolist() == [
        [1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3]]


@pytest.mark.parametrize('rows, top_k', [(9, 1), (30, 5), (30, 29), (101, 7)])
def test_large_codebooks_go_in_blocks(rows, top_k, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    codebook = torch.randn(rows, 4, generator=generator)
    codebook[7] = codebook[3] * 2  # one direction: rounding decides which is found
    features = torch.cat([torch.randn(50, 4, generator=generator), codebook])
    canonical = torch.arange(rows).where(torch.arange(rows) != 7, 3)
    small = canonical[cb.quantize(features, codebook)], cb.nearest_codes(codebook, top_k)
    monkeypatch.setattr(cb, 'SMALL_CODEBOOK', 8)
    for block, numbers in ((2, 1), (7, 64), (rows, 1 << 20)):
        monkeypatch.setattr(cb, 'ROWS_AT_ONCE', block)
        monkeypatch.setattr(cb, 'NUMBERS_AT_ONCE', numbers)
        assert torch.equal(canonical[cb.quantize(features, codebook)], small[0])
        assert torch.equal(cb.nearest_codes(codebook, top_k), small[1])


def test_ties_of_large_codebooks_go_to_the_lowest_code(monkeypatch):
    monkeypatch.setattr(cb, 'SMALL_CODEBOOK', 2)
    codebook = torch.tensor([[1., 0], [2, 0], [4, 0], [0, 1], [0, 0]])
    assert cb.nearest_codes(codebook, 4).tolist() == [
        [1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3]]


# ---------------------------------------------------------------- files

def test_a_codebook_is_read_as_float32(tmp_path):
    path = tmp_path / 'codebook.ckpt'
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        torch.save(torch.nn.Parameter(torch.arange(12.).view(4, 3).to(dtype)), path)
        codebook = cb.load_codebook(path)
        assert codebook.dtype == torch.float32 and not codebook.requires_grad
        assert codebook.tolist() == torch.arange(12.).view(4, 3).tolist()


def test_files_that_are_no_codebook(tmp_path):
    path = tmp_path / 'codebook.ckpt'
    for value in (torch.zeros(3), torch.zeros(3, 3, dtype=torch.int64), {'a': 1}, torch.zeros(3, 3).cfloat(), None):
        torch.save(value, path)
        fails(lambda: cb.load_codebook(path), 'codebook.ckpt', 'expected a float tensor')
    path.write_bytes(b'junk')
    fails(lambda: cb.load_codebook(path), 'codebook.ckpt')
    path.write_bytes(b'')
    fails(lambda: cb.load_codebook(path), 'codebook.ckpt')
    fails(lambda: cb.load_codebook(tmp_path / 'none.ckpt'), 'none.ckpt', 'o such file')


def test_synonyms_become_a_table(tmp_path):
    path = tmp_path / 'synonyms.json'
    path.write_text(json.dumps({str(c): [(c + 1) % 8, (c + 2) % 8] for c in range(8)}))
    table, count = cb.load_synonyms(path, 8, 5)
    assert table.shape == (8, 5) and table[3, :2].tolist() == [4, 5] and count.tolist() == [2] * 8
    assert table[3, 2:].tolist() == [3, 3, 3]
    assert cb.load_synonyms(path, 8, 1)[0].tolist() == [[(c + 1) % 8] for c in range(8)]


def test_bad_synonyms(tmp_path):
    path = tmp_path / 'synonyms.json'
    good = {str(c): [(c + 1) % 8, (c + 2) % 8] for c in range(8)}
    for bad, words in (({**good, '3': []}, 'no synonyms for 1 of 8'), ({**good, '3': [8]}, 'code 3'),
                       ({**good, '3': ['1']}, 'code 3'), ({**good, '3': [True]}, 'code 3'),
                       ({**good, '3': 1}, 'code 3'), ({**good, '3': [-1]}, 'code 3'), ({**good, '3': [1.0]}, 'code 3'),
                       ([], 'an object')):
        path.write_text(json.dumps(bad))
        fails(lambda: cb.load_synonyms(path, 8, 5), 'synonyms.json', words)
    path.write_text(json.dumps({k: good[k] for k in '01234'}))
    fails(lambda: cb.load_synonyms(path, 8, 5), 'no synonyms for 3 of 8', 'first: 5')
    path.write_text('{')
    fails(lambda: cb.load_synonyms(path, 8, 5), 'synonyms.json', 'not JSON')


@pytest.mark.parametrize('text', [b'[' * 1_000_000, b'{"a":' * 100_000, b'9' * 5000, b'[' + b'0,' * (1 << 24) + b'0]',
                                  b'\xff', b'\0', b''])
def test_synonyms_that_are_json_bombs(tmp_path, text):
    path = tmp_path / 'synonyms.json'
    path.write_bytes(text)
    refused(path, cb.load_synonyms, path, 4, 2, match='not JSON|more than')


# ---------------------------------------------------------------- synonyms made at the start

def test_synonyms_made_from_a_codebook(tmp_path, monkeypatch, capsys):
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    table, count = cb.made_synonyms(rows, 'x.ckpt', 5, tmp_path)
    assert torch.equal(table, cb.nearest_codes(rows, 5)) and count.tolist() == [5] * 20
    assert capsys.readouterr().out == 'synonyms: 5 for each code are made from x.ckpt\n'
    assert not any(tmp_path.iterdir())  # they took no time
    assert cb.made_synonyms(rows[:3], 'x.ckpt', 5, None)[1].tolist() == [2] * 3
    fails(lambda: cb.made_synonyms(rows[:1], 'x.ckpt', 5, None), 'x.ckpt: a codebook of one row has no synonyms')


def test_synonyms_of_large_codebooks_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cb, 'SMALL_CODEBOOK', 10)
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    table, _ = cb.made_synonyms(rows, 'x.ckpt', 5, tmp_path)
    kept, = tmp_path.iterdir()
    for content, said in ((None, f'synonyms: {kept}, made from x.ckpt'), (b'damaged', 'are made from x.ckpt')):
        if content:
            kept.write_bytes(content)
        capsys.readouterr()
        assert torch.equal(cb.made_synonyms(rows, 'x.ckpt', 5, tmp_path)[0], table)
        assert said in capsys.readouterr().out
    cb.made_synonyms(rows + 1, 'x.ckpt', 5, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
