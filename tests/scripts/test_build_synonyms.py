"""Synonyms against a slow obvious version."""
import json
import math

import pytest
import torch

from helpers import call, contents, fails
from scripts import build_synonyms
from token_files.codebook import load_synonyms


@pytest.fixture
def codebook(tmp_path):
    """60 rows of 8, saved; their lengths must not matter."""
    lengths = torch.linspace(0.1, 10, 60)[:, None]
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) * lengths
    torch.save(rows, tmp_path / 'codebook.ckpt')
    return rows


def slow_nearest(codebook, top_k):
    """Loops over pairs of rows, in Python's own floats."""
    rows = codebook.tolist()
    lists = []
    for i, a in enumerate(rows):
        cosine = {j: math.fsum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)
                  for j, b in enumerate(rows) if j != i}
        lists.append(sorted(cosine, key=lambda j: (-cosine[j], j))[:top_k])
    return lists


def build(folder, *words, output='s.json'):
    call(build_synonyms, '--codebook-path', folder / 'codebook.ckpt', '--output', folder / output, *words)


def test_synonyms_are_the_nearest_rows_by_cosine(codebook, tmp_path):
    build(tmp_path, '--top-k', 7)
    lists = json.loads((tmp_path / 's.json').read_text())
    assert list(lists) == [str(code) for code in range(60)]
    assert list(lists.values()) == slow_nearest(codebook, 7)
    table, count = load_synonyms(tmp_path / 's.json', 60, 5)  # training reads it
    assert table.tolist() == [row[:5] for row in slow_nearest(codebook, 7)] and (count == 5).all()


def test_five_synonyms_unless_told_otherwise(codebook, tmp_path):
    build(tmp_path)
    assert {len(row) for row in json.loads((tmp_path / 's.json').read_text()).values()} == {5}


def test_top_k_beyond_the_codebook_is_refused(codebook, tmp_path):
    fails(lambda: build(tmp_path, '--top-k', 60), '60 synonyms of each code: choose 1 to 59, .*codebook.ckpt')
    fails(lambda: build(tmp_path, '--top-k', 0), '--top-k: 0: give a value of 1 or more')
    assert contents(tmp_path).keys() == {'codebook.ckpt'}


def test_a_codebook_that_is_not_finite_is_refused(codebook, tmp_path):
    codebook[3, 2] = torch.nan
    torch.save(codebook, tmp_path / 'codebook.ckpt')
    fails(lambda: build(tmp_path), 'codebook.ckpt: its elements are not finite')


def test_an_output_that_cannot_be_written_is_refused_before_the_work(codebook, tmp_path, monkeypatch):
    monkeypatch.setattr('token_files.codebook.nearest_codes', None)
    for output in ('codebook.ckpt/s.json', 'n' * 250, '.'):
        fails(lambda: build(tmp_path, output=output), 'cannot be written')
    assert contents(tmp_path).keys() == {'codebook.ckpt'}
