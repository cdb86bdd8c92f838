"""The tables on photographs: rivals, groups of classes, and lines that are trained longer."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import ROOT, call, fails, smooth_images
from small_tables import TOY, Forked
from tables import figures, make, presets, report, rows

FILES = sorted((ROOT / 'docs' / 'photos').glob('*.json'))
FIRST_SENTENCE = ('tokens, compact', 'tokens latents-28x28, compact', 'full pixels', 'best codec at 500 bytes',
                  'best codec at 1,000 bytes', 'sample 20%')
WORDS = ['storage', '--preset', 'photos', '--data-path', 'data', '--output-dir', 'out']


def lines_of(*words):
    _, lines = make.planned('storage', make.parse_args([*WORDS, *words]))
    return {line.name: line for line in lines}


def lines_in(path):
    """The lines of a table, as report.py writes them."""
    text = report.markdown(json.loads(path.read_text()))
    return [line for line in text.splitlines() if line.startswith('| ') and not line.startswith('| ---')]


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_the_docs_have_the_numbers_of_the_files(path):
    text = (ROOT / 'docs' / 'results.md').read_text()
    missing = [line for line in lines_in(path) if line not in text]
    assert not missing and len(lines_in(path)) > 2


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_the_files_are_of_these_presets(path, tmp_path):
    """Of the same lines, flags and rates: what make.py writes with such a file alone is that file."""
    pytest.importorskip('matplotlib')
    table, preset = (json.loads(path.read_text())[key] for key in ('table', 'preset'))
    words = table, '--preset', preset, '--data-path', tmp_path, '--output-dir', tmp_path
    assert call(make, *words, '--report', '--results', path) == 0
    assert (tmp_path / table / 'results.json').read_text() == path.read_text()


def test_the_first_sentence_has_the_numbers_of_the_file():
    """README's, and that of the results: top-1 and bytes of each line that it names."""
    rows = json.loads((ROOT / 'docs' / 'photos' / 'storage.json').read_text())['rows']
    for name in ('README.md', 'docs/results.md'):
        text = ' '.join((ROOT / name).read_text().replace('*', '').split())
        for line in FIRST_SENTENCE:
            size, _ = figures.storage_of(rows[line], 'files')
            assert f'{rows[line]["mean"]:.1f} % in {size:,.0f} bytes' in text, (name, line)
        ends = [f'{rows[line]["mean"]:.1f}' for line in ('tokens, 24 epochs', 'full pixels, 24 epochs')]
        assert f'after 24 epochs {" and ".join(ends)} %' in text, name


def test_the_lines_of_the_first_table():
    lines = lines_of()
    alone = [name for name, line in lines.items() if 'group' not in line.facts and not name.startswith('search')]
    trained = [name for name in alone if not name.endswith(', compact')]
    assert {'full pixels', 'sample 20%', 'sample 4%', 'resize x0.286', 'JPEG q10', 'tokens', 'tokens 20%',
            'tokens latents-28x28', 'tokens vitvqgan-28x28', 'tokens convvqgan-28x28',
            'tokens patch-32x32'} <= set(trained)
    assert [name for name in trained if name.startswith('best codec')] == [
        'best codec at 500 bytes', 'best codec at 500 bytes, 24 epochs', 'best codec at 1,000 bytes',
        'best codec at 2,000 bytes', 'best codec at 4,000 bytes']
    assert len([name for name in trained if not name.endswith(' epochs')]) == 18
    assert {name for name in trained if name.endswith(', 24 epochs')} == {
        f'{name}, 24 epochs' for name in presets.PHOTOS.long_lines}
    for name in trained:
        for group in ('Imagenette', 'Imagewoof'):
            assert lines[f'{name} ({group})'].facts['of'] == name
    words = rows.flags_of(lines['tokens, 24 epochs'].runs[0].commands[0])
    assert words['--epochs'] == ['24'] and '--no-model-ema' in words
    searched = [line for name, line in lines.items() if name.startswith('search tokens')]
    sample = rows.flags_of(lines['sample 20%'].runs[0].commands[0])
    assert (sample['--epochs'], sample['--eval-freq']) == (['30'], ['30']), 'evaluated at its end'
    sample = rows.flags_of(lines['sample 20%, 24 epochs'].runs[0].commands[0])
    assert (sample['--epochs'], sample['--eval-freq'], '--eval-freq' in words) == (['120'], ['5'], False)
    searched = [rows.flags_of(line.runs[0].commands[0]) for line in searched]
    assert [(flags['--epochs'], flags['--eval-freq']) for flags in searched] == [(['3'], ['3'])] * 3


def test_seitpp_stands_beside_the_long_row_without_token_adapt():
    _, lines = make.planned('seitpp', make.parse_args(['seitpp', *WORDS[1:]]))
    runs = {line.name: line for line in lines if line.rate is None}
    assert list(runs) == ['tokens, 24 epochs', 'ColorAdapt', 'MTM network, from scratch',
                          'MTM network, from scratch, 6 epochs', 'pre-trained, equal epochs',
                          'pre-trained, published epochs']
    assert runs['tokens, 24 epochs'].runs[0].folder == lines_of()['tokens, 24 epochs'].runs[0].folder
    _, shorter = make.planned('seitpp', make.parse_args(['seitpp', *WORDS[1:], '--epochs', '8']))
    assert {line.name: (line.pretraining, line.epochs) for line in shorter if line.rate is None} == {
        'tokens': (0, 8), 'ColorAdapt': (0, 8), 'MTM network, from scratch': (0, 8),
        'MTM network, from scratch, 2 epochs': (0, 2), 'pre-trained, equal epochs': (6, 2),
        'pre-trained, published epochs': (8, 2)}
    assert not any(name.endswith(' epochs') for name in lines_of('--epochs', '8'))
    equal = runs['pre-trained, equal epochs']
    assert (equal.pretraining, equal.epochs) == (18, 6)
    for line in list(runs.values())[2:]:
        words = rows.flags_of(line.runs[0].commands[0])
        assert words['--tokenadapt-path'] == ['']
    few = rows.flags_of(runs['MTM network, from scratch, 6 epochs'].runs[0].commands[0])
    assert few['--warmup-epochs'] == ['1']
    assert {runs[name].epochs for name in ('tokens, 24 epochs', 'MTM network, from scratch')} == {24}


def test_robustness_is_of_the_first_images_of_each_class():
    plan, lines = make.planned('robustness', make.parse_args(['robustness', *WORDS[1:]]))
    names = [line.name for line in lines if line.rate is None]
    assert len(names) == 2 * (1 + 8 * 3) and 'tokens shot_noise 5' in names and 'pixels pixelate 3' in names
    for line in lines[:25]:
        assert 'corrupted' in line.runs[0].after
        assert rows.flags_of(line.runs[0].commands[0])['--data-path'] == ['out/corrupted']
    assert rows.flags_of(plan.rows['corrupted'].commands[0])['--images-per-class'] == ['25']


def test_the_curves_of_longer_training(tmp_path):
    pytest.importorskip('matplotlib')
    short = {'kind': 'tokens', 'mean': 30., 'sd': None, 'epochs': '10', 'top1': [30.]}
    longer = {**short, 'mean': 40., 'epochs': '40', 'longer': 8, 'curves': [[10., 20., 40.], [20., 30., 40.]]}
    results = {'title': 'T', 'preset': 'photos', 'rows': {'sample 20%': short, 'sample 20%, 8 epochs': longer,
                                                          'tokens, 8 epochs': {**longer, 'curves': [[]]}}}
    assert list(figures.long_lines(results)) == ['sample 20%, 8 epochs']
    figures.draw_long(results, tmp_path / 'long.png')
    assert (tmp_path / 'long.png').read_bytes().startswith(b'\x89PNG')


def test_all_is_trained_and_evaluated_in_one_precision():
    found = set()
    for table in ('storage', 'ablation', 'robustness', 'speed', 'seitpp', 'tokenizers'):
        plan, _ = make.planned(table, make.parse_args([table, *WORDS[1:]]))
        for command in (command for row in plan.rows.values() for command in row.commands):
            if command[0].startswith(('main_', 'evaluate_')):
                found.add((command[0], *rows.flags_of(command).get('--amp', ())))
    assert found == {(program, 'bf16') for program in (
        'main_seit.py', 'main_pixels.py', 'main_mtm_pretrain.py', 'main_mtm_finetune.py', 'evaluate_on_images.py')}


def test_the_columns_of_a_line_come_with_it():
    _, lines = make.planned('storage', make.parse_args(WORDS))
    names = [line.name for line in make.chosen_lines(lines, ['tokens', '*4%'])]
    assert names == [f'{name}{group}' for name in ('sample 4%', 'tokens')
                     for group in ('', ' (Imagenette)', ' (Imagewoof)')]


def test_groups_need_what_draws_reports(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    for split in ('train', 'val'):
        smooth_images(tmp_path / split, 2)
    words = ['storage', '--preset', 'photos', '--data-path', tmp_path, '--output-dir', tmp_path / 'out']
    fails(lambda: call(make, *words), 'plots need matplotlib: pip install')


def test_samples_of_the_large_preset_take_equal_steps():
    size = int(presets.PHOTOS_GPU.training[presets.PHOTOS_GPU.training.index('--batch-size') + 1])
    assert {10_000 * share // size / share for share in (1, *presets.PHOTOS_GPU.shares)} == {10_000 / size}


def test_other_presets_evaluate_each_epoch_as_before():
    _, lines = make.planned('storage', make.parse_args(['storage', '--preset', 'tiny', *WORDS[3:]]))
    assert not any('--eval-freq' in command for line in lines for row in line.runs.values() for command in row.commands)


def test_groups_are_all_classes_once():
    names = [name for group in presets.PHOTOS.groups.values() for name in group]
    assert len(names) == len(set(names)) == 20


def test_other_classes_are_refused_in_one_line(tmp_path):
    for split in ('train', 'val'):
        smooth_images(tmp_path / split, 2)
    words = ['storage', '--preset', 'photos', '--data-path', tmp_path, '--output-dir', tmp_path / 'out']
    fails(lambda: call(make, *words), 'train: its classes are not the 20 of this preset .such as ant')
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_groups_and_long_lines_from_end_to_end(tmp_path, monkeypatch):
    toy = replace(TOY, classes=None, images_per_class=None, epochs=2, groups={'A': ('ant', 'cat'), 'B': ('bee',)},
                  long_epochs=4, long_lines=('tokens',), rivals={500: ('jpeg', 16, 30)}, shares=(), token_shares=(),
                  sides=(), qualities=())
    monkeypatch.setitem(presets.PRESETS, 'photos', toy)
    monkeypatch.setattr(rows, 'start', lambda command, log, env: Forked(command, log))
    for split in ('train', 'val'):
        smooth_images(tmp_path / split, 5)
    words = ['storage', '--preset', 'photos', '--data-path', tmp_path, '--output-dir', tmp_path / 'out', '--device',
             'cpu', '--rows', 'tokens', 'tokens, 4 epochs']
    assert call(make, *words) == 0
    results = json.loads((tmp_path / 'out' / 'storage' / 'results.json').read_text())['rows']
    assert [name for name in results if 'compact' not in name] == [
        'tokens', 'tokens (A)', 'tokens (B)', 'tokens, 4 epochs', 'tokens, 4 epochs (A)', 'tokens, 4 epochs (B)']
    for name in ('tokens', 'tokens, 4 epochs'):  # a class has as many images as another
        parts = [results[f'{name} ({group})']['mean'] for group in 'AB']
        assert results[name]['mean'] == pytest.approx((2 * parts[0] + parts[1]) / 3, abs=0.01)
    assert [len(curve) for curve in results['tokens, 4 epochs']['curves']] == [4] and 'curves' not in results['tokens']
    assert results['tokens, 4 epochs']['curves'][0][-1] == results['tokens, 4 epochs']['mean']
    text = Path(tmp_path, 'out', 'storage', 'table.md').read_text()
    assert '| top-1 (seeds) | A | B | paper' in text and text.count('\n| tokens') == 3
    assert report.DASH in text
