"""tables/class_incremental.py: its commands parse; results and figures of runs that are done; mistakes."""
import importlib
import json
from pathlib import Path

import pytest

from helpers import call, fails
from tables import class_incremental, make, rows
from tables.class_incremental import TasksPlan
from tables.presets import PROTOCOLS
from tables.report import DASH, measures_of

ROOT = Path(__file__).resolve().parent.parent.parent


def plan_of(preset):
    return TasksPlan(PROTOCOLS[preset], Path('data'), Path('out'), 'cpu', memories=[250_000, 1_000_000])


@pytest.mark.parametrize('preset', list(PROTOCOLS))
def test_every_command_parses(preset):
    plan = plan_of(preset)
    lines = class_incremental.lines(plan, [0, 1])
    assert len({line.name for line in lines}) == len(lines) == 4 + 2 * 7
    steps = set()
    for row in plan.rows.values():
        assert set(row.after) <= set(plan.rows)
        for program, *words in row.commands:
            args = importlib.import_module(program.removesuffix('.py').replace('/', '.')).parse_args(words)
            if program == class_incremental.PROGRAM and not args.tokenize_only:
                steps.add((args.epochs, args.batch_size, args.base_classes, args.inc_classes, args.order_seed,
                           args.replay_share))
    assert len(steps) == 1  # of all arms
    tokens = {row.after[-1] for row in plan.rows.values() if '--tokenizer-from-task' in row.commands[0]
              and '--tokenize-only' not in row.commands[0]}
    assert tokens == {f'tokens/first-{PROTOCOLS[preset].base}-classes'}


def done(line, seed, accuracy):
    """Leave what a run of a line that is done leaves."""
    row = line.runs[seed]
    rows.take(row).close()
    (row.folder / rows.DONE).write_text(f'{len(row.commands)}\n')
    arm, memory = line.facts.values()
    tokens = 'tokens' in arm
    (row.folder / 'results.jsonl').write_text(''.join(json.dumps({
        'task': task, 'classes': 4 * task + 4, 'test_acc1': value, 'average_acc1': value + 10, 'steps': 60,
        'test_task_acc1': [value / 2] * task + [90.], **({'test_stored_task_acc1': [value] * (task + 1)} if 'JPEG' in
                                                        arm else {}),
        'forgetting': None if task == 0 else 50 - value, 'memory_images': memory // 300,
        'memory_bytes': memory - 7 if memory else 0, 'tokenizer': 'none', 'tokenizer_bytes': 77_000 if tokens
        else None, 'codebook_bytes': 51_000 if tokens else None}) + '\n' for task, value in enumerate(accuracy)))


def test_results_and_figures(tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make, 'check_data', lambda *_: None)
    lines = {line.name: line for line in class_incremental.lines(plan_of('tiny'), [0, 1])}
    done(lines['tokens, fine-tuning'], 0, [40., 10.])
    for seed in (0, 1):
        done(lines['tokens, replay of tokens, 0.25 MB'], seed, [40., 20. + seed])
    done(lines['tokens, replay of tokens, 1 MB'], 0, [40., 30.])
    done(lines['pixels, replay of JPEG q8, 1 MB'], 0, [40., 30.])
    started = []
    monkeypatch.setattr(make, 'run_rows', lambda rows, *_: started.append([row.name for row in rows]) or {
        row.name: 'done' if 'tokens-replay' in row.name else 'main_continual.py ended with code 2 (a | b)'
        for row in rows})
    words = ['continual', '--data-path', 'data', '--output-dir', 'out', '--device', 'cpu', '--memories',
             '0.25e6', '1e6', '--rows']
    assert call(make, *words, 'tokens, replay of tokens*', 'pixels, joint') == 1
    assert started[0][0] == 'chosen' and started[0][-1].endswith('seed-0')
    text = Path('out', 'continual', 'table.md').read_text()
    assert ('| tokens, replay of tokens, 0.25 MB | 249,993 | 833 | 30.5 ± 0.7 (2) | 20.5 ± 0.7 (2) | 10.2 ± 0.4 (2) | '
            f'{DASH} | 90.0 ± 0.0 (2) | {DASH} | 29.5 ± 0.7 (2) | 128,000 |') in text
    assert (f'| tokens, fine-tuning | {DASH} | {DASH} | 20.0 (1) | 10.0 (1) | 5.0 (1) | {DASH} | 90.0 (1) | {DASH} | '
            '40.0 (1) | 128,000 |') in text
    assert '| 30.0 (1) | 15.0 (1) | 30.0 (1) | 90.0 (1) | 30.0 (1) | 20.0 (1) |' in text  # JPEGs, also as stored
    assert '| pixels, joint | ' in text and '\npixels, joint: main_continual.py ended' in text
    results = json.loads(Path('out', 'continual', 'results.json').read_text())
    assert results['rows']['tokens, replay of tokens, 0.25 MB']['accuracy'] == [[40., 20.], [40., 21.]]
    assert results['lrs'] == {kind: {'chosen': 5e-4, 'search': {}, 'epochs': 6} for kind in ('tokens', 'pixels')}
    assert 'Learning rates: tokens 0.0005; pixels 0.0005.' in text and '(tiny)' in text.splitlines()[0]
    for name in ('tasks.png', 'bytes.png'):
        assert Path('out', 'continual', name).read_bytes().startswith(b'\x89PNG')


def test_old_and_new_classes():
    """Old ones are weighed by how many of them a task has; a single task has none."""
    lines = [{'classes': 6, 'test_acc1': 50., 'test_task_acc1': [50.], 'average_acc1': 50., 'forgetting': None},
             {'classes': 8, 'test_acc1': 40., 'test_task_acc1': [30., 70.], 'average_acc1': 45., 'forgetting': 20.},
             {'classes': 10, 'test_acc1': 30., 'test_task_acc1': [10., 50., 80.], 'average_acc1': 40.,
              'forgetting': 20., 'test_stored_task_acc1': [30., 70., 60.]}]
    assert measures_of(lines) == {'average': 40., 'last': 30., 'forgetting': 20., 'old': 20., 'new': 80.,
                                  'old_stored': 40., 'new_stored': 60.}
    assert measures_of(lines[:1]) == {'average': 50., 'last': 50., 'new': 50.}


def test_a_dry_run_and_mistakes(tmp_path, capsys):
    words = ['continual', '--data-path', tmp_path, '--output-dir', tmp_path / 'out']
    assert call(make, *words, '--dry-run', '--rows', 'pixels, replay of JPEG q8, 1 MB') == 0
    printed = capsys.readouterr().out
    assert printed.count('main_continual.py') == 1 and '--memory jpeg --memory-quality 8' in printed
    assert '--memory-bytes 1000000' in printed and not (tmp_path / 'out').exists()
    fails(lambda: call(make, *words, '--rows', 'WebP*'), "--rows WebP.: is none of 'tokens, fine-tuning'")
    fails(lambda: call(make, *words), 'has no folder train/')
    fails(lambda: call(make, *words, '--memories', '0.5'), 'whole number of bytes')
