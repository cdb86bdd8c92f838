"""The comparison of backbones: its numbers in the docs, its arms, and a comparison in small."""
import json

import pytest

import main_pixels
import main_seit
from benchmarks.backbones import gmac
from helpers import ROOT, call, fails, make_data, smooth_images
from models_seit import create_model
from tables import backbone_search
from token_files.token_file import open_token_file

FILES = sorted((ROOT / 'docs' / 'backbones').glob('*.json'))


def test_the_docs_have_the_numbers_of_the_files(capsys):
    call(backbone_search, '--report', *FILES)
    rows = capsys.readouterr().out.splitlines()
    text = (ROOT / 'docs' / 'backbones.md').read_text()
    assert FILES and len(rows) > 2 * len(FILES) and all(row in text for row in rows)


def test_arms_are_commands_of_models_of_equal_compute():
    arms = backbone_search.arms()
    programs = {'main_seit.py': main_seit, 'main_pixels.py': main_pixels}
    images = ['--train-path', 'x', '--val-path', 'x']
    sizes = {}
    for name, (program, flags) in arms.items():
        args = programs[program].parse_args([*flags, *(images if program == 'main_pixels.py' else [])])
        if program == 'main_seit.py' and 'fast' not in name:
            sizes[name] = gmac(create_model(args.model, args.model_kwargs, 20, 8, 32, args.stem), (32, 8, 8))
    assert len(arms) == 8 and max(sizes.values()) < 1.2 * sizes['ViT, tokens'] and min(sizes.values()) > 0.01


def test_a_comparison_resumes_and_is_told(tmp_path, monkeypatch, capsys):
    make_data(tmp_path)
    smooth_images(tmp_path / 'images' / 'train')
    smooth_images(tmp_path / 'images' / 'val', per_class=4)[0].unlink()
    called = []

    def train(program, data, words, evaluate=True):
        called.append((program, words))
        assert set(data.halves) == {'even', 'odd'} and (evaluate or '--epochs 1' in ' '.join(words))
        # the ViT's best is the second rate, RegNet's the largest of all on pixels
        rate = float(words[words.index('--lr') + 1])
        even = rate if program == 'main_pixels.py' and 'regnetx_002' in words else -abs(rate - 1e-3)
        return {'seconds': 1, 'images_per_second': 100. + len(called), 'even': even, 'odd': 40.}
    monkeypatch.setattr(backbone_search, 'train', train)
    # compact sets, which it is for, have no .gz
    monkeypatch.setattr('tables.recipe_search.open_token_file', lambda path: open_token_file(f'{path}.gz'))
    words = ['--tokens', tmp_path, '--images', tmp_path / 'images', '--input-size', 64, '--output', tmp_path / 'r.json']
    call(backbone_search, *words)
    assert len(called) == 8 * (4 + 2) + 2
    assert sum(program == 'main_pixels.py' for program, _ in called) == 3 * 6 + 2
    best = json.loads((tmp_path / 'r.json').read_text())['best']
    assert best.pop('RegNet, pixels') == '1.6e-2' and set(best.values()) == {'1e-3'}
    call(backbone_search, *words)
    assert len(called) == 50, 'nothing is run twice'
    call(backbone_search, *words, '--speed', 3)
    assert len(called) == 50 + 24
    line = next(line for line in capsys.readouterr().out.splitlines()[::-1] if line.startswith('| ViT, tokens'))
    assert line.endswith('| 3 | 40.0 (40.0 to 40.0) | 159 (151 to 167) |')
    lists = [(tmp_path / 'r.work' / f'{half}.txt').read_text().splitlines() for half in ('even', 'odd')]
    assert [len(lines) for lines in lists] == [6, 5]
    assert len(json.loads((tmp_path / 'r.json').read_text())['runs']) == 50


def test_other_images_than_those_of_the_tokens_are_refused(tmp_path, monkeypatch):
    make_data(tmp_path)
    for split in ('train', 'val'):
        smooth_images(tmp_path / 'images' / split, per_class=2)
    monkeypatch.setattr('tables.recipe_search.open_token_file', lambda path: open_token_file(f'{path}.gz'))
    words = ['--tokens', tmp_path, '--images', tmp_path / 'images', '--input-size', 64, '--output', tmp_path / 'r.json']
    fails(lambda: call(backbone_search, *words), 'images: has 6 images, but .* 24: name those that the tokens')
    fails(lambda: call(backbone_search, *words, '--rates', 'abc'), '--rates')


@pytest.mark.parametrize('words', [[], ['--tokens', 'x', '--images', 'a', '--input-size', '64']])
def test_what_is_missing_is_named(words):
    fails(lambda: backbone_search.parse_args(words), '--output: give|--output', 'or --report FILE.json')
