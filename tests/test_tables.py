"""The scripts of tables/: every command parses with the real parsers; one table at a toy size, killed and resumed."""
import importlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import processes
from helpers import call, fails, make_images, read_log, save_image, smooth_images, tokenize
from tables import (ablation, choose_images, collect, count_bytes, draw_rows, presets, pretraining, report, robustness,
                    rows, seitpp, speed, storage, table as shared)
from tables.plan import Plan
from tables.rows import Program, Row, run_programs, run_rows

ROOT = Path(__file__).resolve().parent.parent
TABLES = {'storage': storage, 'ablation': ablation, 'robustness': robustness, 'speed': speed,
          'seitpp': seitpp, 'pretraining': pretraining}


def rows_of(table, preset, *flags):
    """The rows of a table as its command line plans them: those of the search, then all."""
    args = table.parse_args(['--preset', preset, '--data-path', 'data', '--output-dir', 'out', *flags])
    kind = pretraining.PretrainingOptions if table is pretraining else shared.Options
    options = kind(**vars(args) | ({'lrs': [1e-3]} if table is speed else {}))
    return shared.planned(table.lines, options)[1]


# ---------------------------------------------------------------- commands

@pytest.mark.parametrize('preset', list(presets.PRESETS))
@pytest.mark.parametrize('name', list(TABLES))
def test_every_command_parses(name, preset):
    parsed = set()
    for row in rows_of(TABLES[name], preset, '--device', 'cpu', '--seeds', '0', '1'):
        for command in row.commands:
            at = next(i for i, word in enumerate(command) if word.endswith('.py'))
            assert command[:at] in ((), ('torchrun', '--nproc_per_node=8'))
            program, *words = command[at:]
            assert (ROOT / program).exists(), program
            importlib.import_module(program.removesuffix('.py').replace('/', '.')).parse_args(words)
            parsed.add(program)
    assert {'main_seit.py', 'tables/count_bytes.py'} <= parsed
    assert ('main_pixels.py' in parsed) == (name not in ('ablation', 'seitpp'))
    assert ({'main_mtm_pretrain.py', 'main_mtm_finetune.py'} <= parsed) == (name == 'seitpp')


def test_rows_come_after_what_they_need():
    for name, table in TABLES.items():
        seen = set()
        for row in rows_of(table, 'tiny'):
            assert set(row.after) <= seen, (name, row.name)
            assert row.name not in seen
            seen.add(row.name)


def test_learning_rates_are_searched_for_tokens_and_for_pixels():
    rows = {row.name for row in rows_of(storage, 'tiny')}
    for line in 'tokens', 'full-pixels':
        assert {f'train/{line}/lr-{lr:g}-seed-0' for lr in presets.TINY.lrs['tokens']} <= rows


@pytest.mark.parametrize('preset', list(presets.PRESETS))
def test_pretraining_and_fine_tuning_take_the_epochs_that_the_table_says(preset):
    """As many as SeiT's in all, and 5/3 of them, of which a fifth is fine-tuning; equal fine-tuning."""
    plan = Plan(presets.PRESETS[preset], Path('data'), Path('out'), 'cpu', dict.fromkeys(presets.KINDS, 1e-3))
    lines = {line.name: line for line in seitpp.lines(plan, [0])}
    equal, published = lines['pre-trained, equal epochs'], lines['pre-trained, published epochs']
    whole = presets.PRESETS[preset].epochs // 3 * 3
    assert equal.pretraining + equal.epochs == whole == lines['tokens'].epochs // 3 * 3
    assert (published.pretraining + published.epochs) * 3 == whole * 5 and published.epochs == equal.epochs
    for line in equal, published:
        start = plan.rows[line.runs[0].after[-1]]
        assert flag(start, '--epochs') == str(line.pretraining) and flag(line.runs[0], '--epochs') == str(line.epochs)
        assert flag(line.runs[0], '--finetune').startswith(str(start.folder))
    if preset == 'imagenet':  # the published commands
        assert (published.pretraining, published.epochs, flag(start, '--warmup-epochs')) == (400, 100, '40')
        assert [flag(start, '--lr'), flag(start, '--accum-iter'), flag(line.runs[0], '--layer-decay')] == [
            '0.0024', '4', '0.65']


def flag(row, name):
    """The word after a flag of a row's only command."""
    [words] = row.commands
    return words[words.index(name) + 1]


def test_what_the_paper_says_stands_where_it_belongs():
    plan = Plan(presets.IMAGENET, Path('data'), Path('out'), 'auto', {'tokens': 7.5e-4, 'pixels': 5e-4})
    lines = {line.name: line for line in storage.lines(plan, [0])}
    assert {name: (line.paper, line.paper_size) for name, line in lines.items() if line.paper} == presets.PAPER
    published = lines['tokens'].runs[0].commands[0]
    assert published[:3] == ('torchrun', '--nproc_per_node=8', 'main_seit.py')
    assert {'data/tokens/imagenet1k-train-token.data.bin.gz', 'data/tokens/imagenet1k-val-label.txt',
            '--dist-eval'} <= set(published)
    assert len([line for line in lines.values() if line.paper is None]) == len(lines) - len(presets.PAPER) > 0


def test_a_run_sees_as_many_images_of_a_sample():
    plan = Plan(presets.TINY, Path('data'), Path('out'), 'cpu', {'tokens': 1e-3, 'pixels': 1e-3})
    assert [plan.epochs(share) for share in (1, 0.6, 0.2, 0.1)] == [(6, 1), (10, 2), (30, 5), (60, 10)]
    plan = Plan(presets.IMAGENET, Path('data'), Path('out'), 'cpu', {})
    assert plan.epochs(0.2) == (300, 5)


def test_a_dry_run_prints_what_a_shell_can_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ['--data-path', 'my data', '--output-dir', 'out', '--dry-run', '--rows', 'tokens', '--preset']
    assert call(ablation, *words, 'tiny') == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('# tokens: the search') and not (tmp_path / 'out').exists()
    commands = [shlex.split(line) for line in lines if not line.startswith('#')]
    assert {command[0] for command in commands} == {'mkdir', 'python'}
    programs = [command for command in commands if command[0] == 'python']
    assert all((tmp_path / command[1]).exists() for command in programs)
    chooses = next(command for command in programs if 'choose_images' in command[1])
    assert chooses[2:6] == ['--classes', '20', '--data-path', 'my data/train']
    assert call(ablation, *words, 'imagenet') == 0
    assert any(line.startswith('torchrun --nproc_per_node=8 ') for line in capsys.readouterr().out.splitlines())


def test_the_readme_has_the_commands_of_imagenet():
    text = (ROOT / 'tables' / 'README.md').read_text(encoding='utf-8').replace(' \\\n    ', ' ')
    args = storage.parse_args(['--preset', 'imagenet', '--data-path', 'imagenet', '--output-dir', 'output/paper',
                               '--device', 'cuda'])
    planned = shared.planned(storage.lines, shared.Options(**vars(args)))[1]
    for command in (command for row in planned for command in row.commands):
        assert shlex.join([*(() if command[0] == 'torchrun' else ['python']), *command]) in text
    for value, _ in presets.PAPER.values():
        assert f'| {value} |' in text


def test_mistakes_are_one_line(tmp_path):
    words = ['--data-path', tmp_path, '--output-dir', tmp_path / 'out', '--dry-run']
    fails(lambda: call(ablation, *words, '--rows', 'without hope'), "without hope: is none of 'tokens', 'without")
    fails(lambda: call(speed, *words, '--jobs', 2), 'one at a time')
    fails(lambda: call(speed, *words, '--lrs', 1e-3, 2e-3), 'one is enough')
    fails(lambda: call(count_bytes, '--data-path', tmp_path, '--codebook-path', 'x', '--output', 'x'), 'give --data')


# ---------------------------------------------------------------- rows

def stub(folder, name, text):
    """A program of Python in a folder; its path stands for one in this project."""
    (folder / f'{name}.py').write_text(text)
    return str(folder / f'{name}.py')


def test_a_failed_row_does_not_stop_others(tmp_path, capsys):
    good = stub(tmp_path, 'good', 'import os\nprint(os.environ["OMP_NUM_THREADS"])')
    bad = stub(tmp_path, 'bad', 'import sys\nprint("one")\nsys.exit("error: two")')
    stopped = stub(tmp_path, 'stopped', 'import sys\nsys.exit(75)')
    table = [Row('bad', tmp_path / 'bad', ((good,), (bad,), (good,))),
             Row('needs', tmp_path / 'n', ((good,),), ('bad',)),
             Row('stopped', tmp_path / 's', ((stopped,),)), Row('more', tmp_path / 'm', ((good,),), ('stopped',)),
             Row('good', tmp_path / 'good', ((good,), (good, 'x'))), Row('last', tmp_path / 'l', ((good,),), ('good',))]
    outcomes = run_rows(table, 2, 3)
    assert outcomes['bad'].startswith(f'{bad} ended with code 1 (two); see ')
    assert outcomes == outcomes | {'needs': 'needs bad, which failed', 'stopped': 'stopped', 'more': 'stopped',
                                   'good': 'done', 'last': 'done'}
    assert f'error: bad: {bad} ended with code 1' in capsys.readouterr().err
    assert (tmp_path / 'good' / rows.OUTPUT).read_text() == '3\n3\n'
    stub(tmp_path, 'bad', '')
    assert set(run_rows([row for row in table if row.name not in ('stopped', 'more')], 1, 3).values()) == {'done'}
    assert (tmp_path / 'bad' / rows.OUTPUT).read_text() == '3\none\nerror: two\n3\n'  # resumed at its second command
    assert run_rows(table[:1], 1, 3, {'bad': 'no'}) == {'bad': 'no'}


def test_a_folder_of_another_run_is_one_line(tmp_path):
    good = stub(tmp_path, 'good', '')
    row = Row('a', tmp_path / 'a', ((good, '--lr', '1'),))
    assert run_rows([row], 1, 1) == {'a': 'done'}
    other = Row('a', tmp_path / 'a', ((good, '--lr', '2'),))
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'log.txt').write_text('')
    outcomes = run_rows([other, Row('b', tmp_path / 'b', ((good,),)), Row('c', tmp_path / 'c', ((good,),))], 1, 1)
    assert outcomes['a'].startswith(f'{tmp_path / "a"}: holds results of another command 1; choose another')
    assert rows.is_done(row) and not rows.is_done(other)  # so that its results are not taken for the other's
    assert outcomes['b'].startswith(f'{tmp_path / "b"}: holds files, but no row.json') and outcomes['c'] == 'done'


def test_programs_are_started_by_torchrun_from_any_folder():
    words = rows.argument_list(('torchrun', '--nproc_per_node=8', 'main_seit.py', '--lr', '1'))
    assert words == [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=8', str(ROOT / 'main_seit.py'),
                     '--lr', '1']


# ---------------------------------------------------------------- one table from end to end

class Forked:
    """A program in a fork of a server that has imported the programs, in the place of a subprocess: starts at once."""

    def __init__(self, program):
        name, *words = program.command
        modules = {'scripts/fit_patch_tokenizer.py': 'fit_patch_tokenizer',
                   'scripts/build_synonyms.py': 'build_synonyms'}
        module = modules.get(name, name.removesuffix('.py').replace('/', '.'))
        program.log.parent.mkdir(parents=True, exist_ok=True)
        self.process = processes.Job(module, words, output=program.log).ranks[0]

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()

    def terminate(self):
        self.process.terminate()

    @property
    def returncode(self):
        return self.process.exitcode


TOY = replace(presets.TINY, classes=2, images_per_class=6, epochs=4,
              training=('--batch-size', '4', '--unscale-lr', '--warmup-lr', '1e-4', '--model-ema-decay', '0.9'),
              token_model=('deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2'),
              lrs={'tokens': (1e-3, 3e-3), 'pixels': (1e-3,)}, workers=0,
              tokenizers={'patch': presets.Tokenizer(32, 32, ('scripts/fit_patch_tokenizer.py', '--image-size', '32',
                                                              '--codes', '24'), 'tokenizer.pt')})
CHOSEN = ['tokens', 'patch stem']


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Images, and the words of the ablation at a toy size; `started` lists the rows' commands that are started."""
    smooth_images(tmp_path / 'data' / 'train')
    smooth_images(tmp_path / 'data' / 'val', 5)
    monkeypatch.setitem(presets.PRESETS, 'tiny', TOY)
    started = []

    def start(program, env):
        started.append(program.name)
        return Forked(program)

    monkeypatch.setattr(rows, 'start', start)
    words = ['--data-path', tmp_path / 'data', '--output-dir', tmp_path / 'out', '--device', 'cpu', '--jobs', 2,
             '--seeds', 0, 1, '--rows', *CHOSEN]
    return words, started


def stop_at(path):
    """Send this process SIGTERM, as a scheduler does, once a file is there."""
    def wait():
        while not path.exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.slow
def test_a_table_killed_resumed_and_collected(toy, tmp_path, capsys):
    words, started = toy
    out = tmp_path / 'out'
    first = out / 'train' / 'tokens' / 'lr-0.001-seed-0'
    stop_at(first / 'log.txt')
    assert call(ablation, *words) == 75
    assert 'the same command resumes it' in capsys.readouterr().out
    begun = list(started)
    assert 'train/tokens/lr-0.001-seed-0#1' in begun and not any('patch-stem' in name for name in begun)
    assert call(ablation, *words) == 0
    assert [line['epoch'] for line in read_log(first)] == [0, 1, 2, 3]
    done = started[len(begun):]
    assert not any(name.startswith(('chosen', 'tokenizers', 'tokens/')) for name in done)  # they were done before

    results = json.loads((out / 'ablation' / 'results.json').read_text())
    search = results['lrs']['tokens']['search']
    best = results['lrs']['tokens']['chosen']
    assert set(search) == {'0.001', '0.003'} and search[str(best)] == max(search.values())
    assert list(results['rows']) == CHOSEN
    for name, result in results['rows'].items():
        logs = [read_log(out / 'train' / name.replace(' ', '-') / f'lr-{best:g}-seed-{seed}')[-1] for seed in (0, 1)]
        assert result['seeds'] == [0, 1] and result['top1'] == [log['test_acc1'] for log in logs]
        assert result['ema_top1'] == [log['ema_test_acc1'] for log in logs]
        assert result['mean'] == pytest.approx(sum(result['top1']) / 2, abs=1e-3)
        assert result['bytes']['images'] == 12 and result['bytes']['without_headers'] > 0
    assert results['rows']['tokens']['paper'] == 74.0 and results['rows']['patch stem']['paper'] is None

    # nothing is repeated; a subset of rows and seeds keeps the others' results
    started.clear()
    assert call(ablation, *words[:-len(CHOSEN) - 4], '--seeds', 0, '--rows', 'tokens') == 0
    assert started == [] and json.loads((out / 'ablation' / 'results.json').read_text()) == results
    call(collect, out, '--output', tmp_path / 'all.md')
    text = (tmp_path / 'all.md').read_text()
    assert text == (out / 'ablation' / 'table.md').read_text()
    assert text.count('\n| ') == 4 and '(2) |' in text and f'| {report.DASH} |' in text and '| 74.0 |' in text
    fails(lambda: call(collect, out, '--output', tmp_path / 'b.md', '--curve', tmp_path / 'c.png'), 'is a table 1')

    # another table takes what is there, and evaluates it: images through the tokenizer are the tokens of the training
    assert call(robustness, *words[:-len(CHOSEN)], 'tokens clean') == 0
    assert sorted(started) == [f'evaluate/tokens/lr-{best:g}-seed-{seed}/clean#1' for seed in (0, 1)]
    clean = json.loads((out / 'robustness' / 'results.json').read_text())['rows']['tokens clean']
    assert clean['top1'] == results['rows']['tokens']['top1'] and clean['paper'] == 74.0


# ---------------------------------------------------------------- small programs, and the report

def test_images_are_chosen_by_links(tmp_path):
    smooth_images(tmp_path / 'in')
    words = ['--data-path', tmp_path / 'in', '--output-dir', tmp_path / 'out', '--classes', 2]
    call(choose_images, *words, '--images-per-class', 3)
    call(choose_images, *words, '--images-per-class', 3)
    found = sorted(path.relative_to(tmp_path / 'out') for path in (tmp_path / 'out').rglob('*.png'))
    assert [path.as_posix() for path in found] == [f'{name}/{i}.png' for name in ('ant', 'bee') for i in range(3)]
    assert all((tmp_path / 'out' / path).resolve() == tmp_path / 'in' / path for path in found)
    (tmp_path / 'out' / 'ant' / '0.png').unlink()
    (tmp_path / 'out' / 'ant' / '0.png').symlink_to(tmp_path / 'in' / 'ant' / '1.png')
    fails(lambda: call(choose_images, *words), 'is another image already')
    fails(lambda: call(choose_images, *words, '--classes', 4), 'has 3 classes, but --classes is 4$')
    words[3] = tmp_path / 'rest'
    call(choose_images, *words, '--images-per-class', 1, '--skip-classes', 1)
    found = sorted(path.relative_to(tmp_path / 'rest').as_posix() for path in (tmp_path / 'rest').rglob('*.png'))
    assert found == ['bee/0.png', 'cat/0.png']
    fails(lambda: call(choose_images, *words, '--skip-classes', 2), '--classes is 2 after --skip-classes 2$')


def test_bytes_of_images(tmp_path):
    for i in range(3):
        save_image(tmp_path / 'jpeg' / 'a' / f'{i}.jpg', i)
        save_image(tmp_path / 'png' / 'a' / f'{i}.png', i)
    for kind in ('jpeg', 'png'):
        call(count_bytes, '--data-path', tmp_path / kind, '--output', tmp_path / 'bytes.json')
        size = json.loads((tmp_path / 'bytes.json').read_text())
        assert size['images'] == 3
        assert size['files'] == sum(path.stat().st_size for path in tmp_path.glob(f'{kind}/a/*'))
        assert (size['without_headers'] is None) == (kind == 'png')
        if kind == 'jpeg':
            assert size['files'] / 4 < size['without_headers'] < size['files'] - 3 * 600


def result(kind, images, files, scan, *top1, paper=None):
    mean = sum(top1) / len(top1) if top1 else None
    return {'kind': kind, 'seeds': list(range(len(top1))), 'top1': list(top1), 'mean': mean,
            'sd': 0.5 if len(top1) > 1 else None, 'paper': paper, 'paper_size': '140 GB' if paper else None,
            'bytes': {'images': images, 'files': files, 'without_headers': scan}}


def test_the_curve_and_the_table_of_storage(tmp_path):
    pytest.importorskip('matplotlib')
    made = {'full pixels': result('pixels', 100, 200_000, 130_000, 38., 39., paper=81.8),
            'sample 60%': result('pixels', 60, 120_000, 78_000, 35.),
            'JPEG q8': result('pixels', 100, 86_000, 23_000, 33.),
            'tokens': result('tokens', 100, 23_700, 25_900, 29., 30.),
            'tokens 20%': result('tokens', 20, 4_740, 5_180, 20.),
            'tokens patch-8x8': result('tokens', 100, 6_000, 6_400), 'resize x0.5': result('pixels', 100, 9, None, 30.)}
    made['tokens patch-8x8']['failed'] = 'main_seit.py ended with code 2 (a | b); see x'
    results = {'table': 'storage', 'title': 'Storage', 'preset': 'tiny', 'full_bytes': made['full pixels']['bytes'],
               'lrs': {'tokens': {'chosen': 1e-3, 'search': {'0.001': 29.}}}, 'rows': made}
    folder = tmp_path / 'storage'
    report.write(results, folder)
    assert (folder / 'curve.png').read_bytes().startswith(b'\x89PNG')
    text = (folder / 'table.md').read_text()
    assert '| full pixels | 100 | 2,000 | 1.0 | 1,300 | 1.0 | 38.50 ± 0.50 (2) | 81.8 at 140 GB |' in text
    assert f'| sample 60% | 60 | 1,200 | 1.7 | 780 | 1.7 | 35.00 (1) | {report.DASH} |' in text
    assert f'| tokens | 100 | 237 | 8.4 | 259 | 5.0 | 29.50 ± 0.50 (2) | {report.DASH} |' in text
    assert f'| resize x0.5 | 100 | 0 | 22222.2 | {report.DASH} | {report.DASH} | 30.00 (1) |' in text
    assert '| failed |' in text and '\ntokens patch-8x8: main_seit.py ended' in text
    call(collect, folder / 'results.json', '--output', tmp_path / 'all.md', '--curve', tmp_path / 'curve.png')
    assert (tmp_path / 'curve.png').read_bytes() == (folder / 'curve.png').read_bytes()
    (tmp_path / 'x.json').write_text('{"table": "x"}')
    fails(lambda: call(collect, tmp_path / 'x.json', '--output', tmp_path / 'all.md'), 'no results of a table')
    results = json.loads((folder / 'results.json').read_text())
    (tmp_path / 'x.json').write_text(json.dumps({key: results[key] for key in results if key != 'full_bytes'}))
    fails(lambda: call(collect, tmp_path / 'x.json', '--output', tmp_path / 'all.md'), 'no results of a table')
    fails(lambda: call(collect, tmp_path, '--output', tmp_path / 'b.md', '--curve', tmp_path / 'b.txt.png') or call(
        collect, tmp_path / 'empty', '--output', tmp_path / 'b.md'), 'empty')


def test_the_tables_of_robustness_and_speed():
    facts = {'title': 'T', 'preset': 'tiny', 'full_bytes': None, 'lrs': {}}
    made = {'tokens clean': result('tokens', 4, 8, 8, 30.)} | {
        f'tokens gaussian_noise {severity}': result('tokens', 4, 8, 8, 30. - severity) for severity in (1, 2)}
    text = report.markdown({'table': 'robustness', 'rows': made, **facts})
    assert f'| tokens clean | 30.00 (1) |{f" {report.DASH} |" * 6}' in text
    assert '| 29.00 (1) | 28.00 (1) |' in text and '| 50.7 |' in text
    fast = result('tokens', 4, 1000, 8, 2000.)
    text = report.markdown({'table': 'speed', 'rows': {'tokens loader-bound': fast}, **facts})
    assert '| tokens loader-bound | 2,000 (1) | 250 | 0.50 |' in text


@pytest.mark.slow
def test_a_program_that_is_stopped_lets_no_other_start(tmp_path):
    good = stub(tmp_path, 'good', '')
    programs = [Program(str(i), (good,), tmp_path / 'log') for i in range(2)]
    assert run_programs(programs, 1, 1, stopping=lambda: True) == {}
    assert run_programs(programs, 1, 1) == {'0': 0, '1': 0}


# ---------------------------------------------------------------- pictures

def test_what_rows_keep_is_drawn(tmp_path):
    data = make_images(tmp_path)
    out = tokenize(data, tmp_path / 'out', source='val')
    words = ['--data-path', data / 'val', data / 'val', '--token-file', out / 'my-token.data.bin.gz',
             '--tokenizer-path', data / 'tok.pt', '--codebook-path', data / 'codebook.ckpt', '--images', 3,
             '--image-size', 16]
    call(draw_rows, *words, '--output', tmp_path / 'rows.png')
    with Image.open(tmp_path / 'rows.png') as sheet:
        pixels = np.asarray(sheet)[::2, ::2]
    assert pixels.shape == (3 * 18 + 2, 3 * 18 + 2, 3)
    lines = [pixels[2 + 18 * line:18 + 18 * line] for line in range(3)]
    assert np.array_equal(lines[0], lines[1]) and not np.array_equal(lines[1], lines[2])
    fails(lambda: call(draw_rows, '--data-path', data / 'train', *words[3:], '--output', tmp_path / 'b.png'),
          '45 images, but .* holds 9')
    assert not (tmp_path / 'b.png').exists()
