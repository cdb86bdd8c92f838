"""The search for the small recipe: its numbers in the docs, its trials, and a search in small."""
import json

import pytest

from helpers import ROOT, call, fails, make_data
from tables import recipe_search
from token_files.token_file import open_token_file

FILES = sorted((ROOT / 'docs' / 'recipe_search').glob('*.json'))
DONE = [path for path in FILES if f'{recipe_search.RECIPE}, seed 2' in json.loads(path.read_text())['runs']]


def test_the_docs_have_the_numbers_of_the_files(capsys):
    assert DONE == FILES and len(FILES) == 7
    call(recipe_search, '--report', *DONE)
    rows = capsys.readouterr().out.splitlines()
    text = (ROOT / 'docs' / 'results.md').read_text()
    assert len(rows) == 2 + len(DONE) and all(row in text for row in rows)


def test_there_are_twelve_trials_that_differ():
    trials = recipe_search.trials()
    assert len(trials) == 12 == len({tuple(words) for words in trials.values()})
    for path in FILES:
        runs = json.loads(path.read_text())['runs']
        assert {name.rpartition(', seed')[0] for name in runs} <= {*trials, recipe_search.RECIPE}


def test_a_search_resumes_and_is_told(tmp_path, monkeypatch, capsys):
    make_data(tmp_path)
    called = []

    def train(program, tokens, words):
        assert program == 'main_seit.py' and set(tokens.halves) == {'even', 'odd'}
        assert (tokens.facts['images'], tokens.facts['validation images']) == (24, 11)
        called.append(words)
        return {'even': 50 + len(called) % 7, 'odd': 40., 'seconds': 1}
    monkeypatch.setattr(recipe_search, 'train', train)
    # compact sets, which it is for, have no .gz
    monkeypatch.setattr(recipe_search, 'open_token_file', lambda path: open_token_file(f'{path}.gz'))
    words = ['--tokens', tmp_path, '--train', 'train', '--val', 'val', '--input-size', 64, '--output',
             tmp_path / 'r.json']
    call(recipe_search, *words)
    assert len(called) == 12 + 2 + 3 and all(flags[:2] == ['--recipe', 'small'] for flags in called)
    assert '| r | 24 | its own | ' in capsys.readouterr().out
    call(recipe_search, *words)
    assert len(called) == 17, 'nothing is run twice'
    fails(lambda: call(recipe_search, *words, '--epochs', 3), 'r.json: is of epochs None, not 3: choose')
    make_data(tmp_path, seed=1)
    fails(lambda: call(recipe_search, *words), 'r.json: is of validation codes')


def test_what_is_no_search_is_not_told(tmp_path):
    (tmp_path / 'r.json').write_text('[]')
    fails(lambda: call(recipe_search, '--report', tmp_path / 'r.json'), 'r.json: holds no results of a search')
    fails(lambda: call(recipe_search, '--report', ROOT / 'docs' / 'backbones' / 'tiny20x500.json'), 'no best trial')


@pytest.mark.parametrize('words', [[], ['--tokens', 'x', '--train', 'a', '--val', 'b', '--input-size', '64']])
def test_what_is_missing_is_named(words):
    fails(lambda: recipe_search.parse_args(words), '--output: give|--output', 'or --report FILE.json')
