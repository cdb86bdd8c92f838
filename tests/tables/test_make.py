"""tables/make.py: every command parses with the real parsers; one table at a toy size, killed and resumed."""
import importlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import processes
from docs import draw_rows
from helpers import call, fails, make_images, read_log, save_image, smooth_images, tokenize
from small_tables import TOY, Forked
from tables import choose_images, count_bytes, figures, make, presets, report, rows
from tables.plan import Plan
from tables.rows import Row, run_rows
from token_files.codebook import load_codebook
from token_files.token_file import bytes_on_disk, open_token_file
from training.run_info import run_record

ROOT = Path(__file__).resolve().parent.parent.parent
TABLES = [name for name in make.TABLES if name != 'continual']  # which test_continual_table.py is about


def rows_of(table, preset, *flags):
    """The rows of a table as its command line plans them, those of the search too."""
    words = [table, '--preset', preset, '--data-path', 'data', '--output-dir', 'out', '--rows', '*', *flags]
    return make.rows_of(table, make.parse_args(words))


# ---------------------------------------------------------------- commands

@pytest.mark.parametrize('preset', list(presets.PRESETS))
@pytest.mark.parametrize('name', TABLES)
def test_every_command_parses(name, preset):
    if preset not in make.TABLES[name].presets:
        pytest.skip('the table has no such preset')
    parsed = set()
    for row in rows_of(name, preset, '--device', 'cpu', '--seeds', '0', '1'):
        for command in row.commands:
            at = rows.program_at(command)
            assert command[:at] in ((), ('torchrun', '--nproc_per_node=8'))
            program, *words = command[at:]
            assert (ROOT / program).exists(), program
            importlib.import_module(program.removesuffix('.py').replace('/', '.')).parse_args(words)
            parsed.add(program)
            assert not rows.has_result(command)  # which looks into what the program says that it writes
    assert {'main_seit.py', 'tables/count_bytes.py'} <= parsed
    assert ('main_pixels.py' in parsed) == (name not in ('ablation', 'seitpp', 'tokenizers'))
    assert ({'main_mtm_pretrain.py', 'main_mtm_finetune.py'} <= parsed) == (name == 'seitpp')
    assert ({'benchmarks/encode.py', 'scripts/inspect_tokens.py'} <= parsed) == (name == 'tokenizers')


def test_rows_come_after_what_they_need():
    for name in TABLES:
        seen = set()
        for row in rows_of(name, 'tiny'):
            assert set(row.after) <= seen, (name, row.name)
            assert row.name not in seen
            seen.add(row.name)


def test_the_search_is_rows_like_others():
    searched = [row.name for row in rows_of('storage', 'tiny', '--rows', 'search *')]
    names = {f'train/{line}/lr-{lr:g}-seed-0' for line in ('tokens', 'full-pixels')
             for lr in presets.TINY.search['tokens']}
    assert {name for name in searched if name.startswith('train/')} == names
    args = make.parse_args(['storage', '--data-path', 'data', '--output-dir', 'out', '--seeds', '1'])
    trained = [row.name for row in make.rows_of('storage', args) if row.name.startswith('train/')]
    assert all(name.endswith('/lr-0.0005-seed-1') for name in trained)  # the preset's, and no search
    for preset in (*presets.PRESETS.values(), *presets.PRETRAINING.values()):  # which was found by it
        assert all(preset.lrs[kind] in rates for kind, rates in preset.search.items())
    assert [row.name for row in rows_of('seitpp', 'tiny', '--lr', '0.1', '--rows', 'ColorAdapt')][-1].endswith(
        'ColorAdapt/lr-0.1-seed-0')


@pytest.mark.parametrize('preset', list(presets.PRESETS))
def test_pretraining_and_fine_tuning_take_the_epochs_that_the_table_says(preset):
    """As many as SeiT's in all, and four times those of fine-tuning before it, as published; equal fine-tuning."""
    plan = Plan(presets.PRESETS[preset], Path('data'), Path('out'), 'cpu')
    lines = {line.name: line for line in make.seitpp(plan, [0])}
    equal, published = lines['pre-trained, equal epochs'], lines['pre-trained, published epochs']
    base, = (line for name, line in lines.items() if name.startswith('tokens'))
    part = presets.PRESETS[preset].masked.tuning_part
    assert equal.pretraining + equal.epochs == base.epochs // part * part and equal.epochs == base.epochs // part
    assert published.pretraining == 4 * published.epochs and published.epochs == equal.epochs
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
    plan = Plan(presets.IMAGENET, Path('data'), Path('out'), 'auto')
    lines = {line.name: line for line in make.storage(plan, [0])}
    assert {name: (line.paper, line.paper_size) for name, line in lines.items() if line.paper} == presets.PAPER
    published = lines['tokens'].runs[0].commands[0]
    assert published[:3] == ('torchrun', '--nproc_per_node=8', 'main_seit.py')
    assert {'data/tokens/imagenet1k-train-token.data.bin.gz', 'data/tokens/imagenet1k-val-label.txt',
            '--dist-eval'} <= set(published)
    assert len([line for line in lines.values() if line.paper is None]) == len(lines) - len(presets.PAPER) > 0


def test_a_run_sees_as_many_images_of_a_sample():
    plan = Plan(presets.TINY, Path('data'), Path('out'), 'cpu')
    assert [plan.epochs(share) for share in (1, 0.6, 0.2, 0.1)] == [(6, 1), (10, 2), (30, 5), (60, 10)]
    plan = Plan(presets.IMAGENET, Path('data'), Path('out'), 'cpu')
    assert plan.epochs(0.2) == (300, 5)


def test_a_dry_run_prints_what_a_shell_can_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ['ablation', '--data-path', 'my data', '--output-dir', 'out', '--dry-run', '--rows', 'tokens', '--preset']
    assert call(make, *words, 'tiny') == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '# tokenizers/vitvqgan-16x16' and not (tmp_path / 'out').exists()
    commands = [shlex.split(line) for line in lines if not line.startswith('#')]
    assert {command[0] for command in commands} == {'mkdir', 'python'}
    programs = [command for command in commands if command[0] == 'python']
    assert all((tmp_path / command[1]).exists() for command in programs)
    chooses = next(command for command in programs if 'choose_images' in command[1])
    assert chooses[2:6] == ['--classes', '20', '--data-path', 'my data/train']
    assert call(make, *words, 'imagenet') == 0
    assert any(line.startswith('torchrun --nproc_per_node=8 ') for line in capsys.readouterr().out.splitlines())


def test_all_is_every_table_of_the_preset(capsys):
    words = ['all', '--data-path', 'data', '--output-dir', 'out', '--device', 'cpu', '--dry-run', '--preset']
    assert call(make, *words, 'tiny') == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith('# ')]
    assert len(printed) == len(set(printed))  # what tables share stands there once
    args = make.parse_args([*words, 'tiny'])
    assert set(printed) == {f'# {row.name}' for name in make.TABLES for row in make.rows_of(name, args)}
    assert call(make, *words, 'imagenet') == 0
    assert '# continual/' not in capsys.readouterr().out  # which has no such preset


def test_the_readme_has_the_commands_of_imagenet():
    text = (ROOT / 'tables' / 'README.md').read_text(encoding='utf-8').replace(' \\\n    ', ' ')
    args = make.parse_args(['storage', '--preset', 'imagenet', '--data-path', 'imagenet', '--output-dir',
                            'output/paper', '--device', 'cuda'])
    for command in (command for row in make.rows_of('storage', args) for command in row.commands):
        assert shlex.join([*(() if command[0] == 'torchrun' else ['python']), *command]) in text
    for value, _ in presets.PAPER.values():
        assert f'| {value} |' in text


def test_mistakes_are_one_line(tmp_path):
    smooth_images(tmp_path / 'data' / 'train')
    smooth_images(tmp_path / 'data' / 'val', 5)
    words = ['--data-path', tmp_path / 'data', '--output-dir', tmp_path / 'out']
    fails(lambda: call(make, 'ablation', *words, '--rows', 'without hope'), "hope: is none of 'tokens', 'without")
    fails(lambda: call(make, 'speed', *words, '--jobs', 2), 'one at a time')
    fails(lambda: call(make, 'continual', *words, '--preset', 'imagenet'), 'imagenet: continual has tiny, b10-inc10')
    fails(lambda: call(make, 'storage', *words, '--preset', 'b50-inc5'), 'b50-inc5: storage has imagenet, tiny')
    fails(lambda: call(make, 'storage', *words, '--memories', 100), '--memories: is for the table continual')
    fails(lambda: call(make, 'storage', *words, '--slurm', 'timeout_min=1'), 'needs --cluster slurm')
    fails(lambda: call(make, 'tokenizers', *words, '--tokenizer', 'a/b', 'x', 'y', 8, 2), 'plain word of its own')
    fails(lambda: call(make, 'tokenizers', *words, '--tokenizer', 'a', 'x', 'y', 8, 'z'), "a: 'z' is not a whole")
    fails(lambda: call(count_bytes, '--data-path', tmp_path, '--codebook-path', 'x', '--output', 'x'), 'give --data')
    # overrides that the data cannot meet
    fails(lambda: call(make, 'storage', *words), 'train: has 3 classes, but 20 are taken; give a smaller --classes')
    fails(lambda: call(make, 'pretraining', *words, '--classes', 4), 'train: has 3 classes, but 4 are taken')
    fails(lambda: call(make, 'pretraining', *words, '--classes', 1), 'give 2 or more')
    fails(lambda: call(make, 'storage', *words, '--classes', 3, '--images-per-class', 9),
          'train: the class ant has 8 images, but --images-per-class is 9')
    fails(lambda: call(make, 'storage', *words, '--preset', 'tiny-gpu', '--images-per-class', 9), 'give --classes too')
    assert not (tmp_path / 'out').exists()


def test_sizes_override_a_preset():
    """Published tokens are of all classes; a tokenizer's training holds out what a small folder has."""
    found = {row.name: row for row in rows_of('seitpp', 'tiny', '--classes', '3', '--images-per-class', '7', '--epochs',
                                              '1', '--rows', 'ColorAdapt*', 'pre-trained, p*')}
    chooses = found['chosen'].commands
    assert [rows.flags_of(command)['--classes'] for command in chooses] == [['3'], ['3']]
    assert rows.flags_of(chooses[0])['--images-per-class'] == ['7']
    for name, row in found.items():
        words = [word for command in row.commands for word in command]
        assert '--val-images' not in words
        if name.startswith('train/'):
            assert flag(row, '--epochs') in ('1', '4') and flag(row, '--warmup-epochs') == '1'
    names = [row.name for row in rows_of('ablation', 'imagenet', '--classes', '3', '--rows', 'tokens')]
    assert names[:2] == ['chosen', 'tokens/vitvqgan-32x32']
    before, after = (plan.preset for plan in (lambda plan: (plan.before, plan.after))(make.plan_of(
        'pretraining', make.parse_args(['pretraining', '--data-path', 'd', '--output-dir', 'o', '--classes', '3']))))
    assert (before.classes, after.skip_classes, after.classes) == (1, 1, 2)
    protocol = presets.PROTOCOLS['tiny'].with_sizes(3, None, 1)
    assert (protocol.base, protocol.increment, protocol.preset.classes, protocol.preset.epochs) == (1, 1, 3, 1)


# ---------------------------------------------------------------- rows

def stub(folder, name, text):
    """A program of Python in a folder; its path stands for one in this project."""
    (folder / f'{name}.py').write_text(text)
    return str(folder / f'{name}.py')


@pytest.mark.slow
def test_a_failed_row_does_not_stop_others(tmp_path, capsys):
    good = stub(tmp_path, 'good', 'import os\nprint(os.environ["OMP_NUM_THREADS"])')
    bad = stub(tmp_path, 'bad', 'import sys\nprint("one")\nsys.exit("error: two")')
    stopped = stub(tmp_path, 'stopped', 'import sys\nsys.exit(75)')
    table = [Row('bad', tmp_path / 'bad', ((good,), (bad,), (good,))),
             Row('needs', tmp_path / 'needs', ((good,),), ('bad',)),
             Row('stopped', tmp_path / 'stopped', ((stopped,),)),
             Row('more', tmp_path / 'more', ((good,),), ('stopped',)),
             Row('good', tmp_path / 'good', ((good,), (good, 'x'))),
             Row('last', tmp_path / 'last', ((good,),), ('good',))]
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


@pytest.mark.slow
def test_a_folder_of_another_command_is_one_line(tmp_path):
    good = stub(tmp_path, 'good', '')
    row = Row('a', tmp_path / 'a', ((good, '--lr', '1', '--seed', '0'),))
    assert run_rows([row], 1, 1) == {'a': 'done'}
    other = Row('a', tmp_path / 'a', ((good, '--lr', '2', '--seed', '0', '--new'),))
    outcomes = run_rows([other, Row('c', tmp_path / 'c', ((good,),))], 1, 1)
    assert outcomes['a'] == (f'{tmp_path / "a"}: holds the run of another command: --lr 1 there, --lr 2 here; nothing '
                             'there, --new here; choose another --output-dir, or remove that folder')
    assert rows.is_done(row) and not rows.is_done(other)  # so that its results are not taken for the other's
    assert outcomes['c'] == 'done'
    (tmp_path / 'a' / rows.ROW).write_text('{"command 1": ["x"]}')
    fails(lambda: rows.check_row(row), 'row.json: is damaged; remove .*a, and it is made again')


def test_a_folder_under_another_spelling_is_the_same(tmp_path, monkeypatch):
    """Relative, by a link, with a slash, from elsewhere; as rows were written before, and after a move."""
    def row_in(output, data='data'):
        words = ('main_seit.py', '--data-path', f'{data}/train', '--output-dir', f'{output}/train/x', '--lr', '1')
        return Row('train/x', Path(output, 'train', 'x'), (words,))

    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data' / 'train').mkdir(parents=True)
    rows.take(row_in('out')).close()
    stored = json.loads((tmp_path / 'out' / 'train' / 'x' / rows.ROW).read_text())
    assert stored['command 1'][-3] == '$OUTPUT/train/x'
    (tmp_path / 'link').symlink_to('out')
    for output in ('out/', 'link', tmp_path / 'out', tmp_path / 'link', '../' + tmp_path.name + '/out'):
        rows.check_row(row_in(output))
        rows.check_row(row_in(output, tmp_path / 'data'))
    fails(lambda: rows.check_row(row_in('out', 'other')), 'data/train there, --data-path .*other/train here')
    (tmp_path / 'out').rename(tmp_path / 'moved')
    monkeypatch.chdir(tmp_path / 'data')
    rows.check_row(row_in('../moved', '../data'))
    monkeypatch.chdir(tmp_path)
    old = row_in('moved')
    (old.folder / rows.ROW).write_text(json.dumps({'command 1': old.commands[0]}))
    (old.folder / rows.DONE).write_text('1\n')
    assert rows.is_done(row_in(tmp_path / 'moved'))


@pytest.mark.parametrize('begun', [0, 3, 4])
def test_every_spelling_of_both_folders_is_the_same(begun, tmp_path, monkeypatch):
    """From the folder of the data or of the output itself too, where paths have no slash."""
    (tmp_path / 'home' / 'data' / 'train').mkdir(parents=True)
    (tmp_path / 'home' / 'out').mkdir()
    (tmp_path / 'link').symlink_to('home')
    spellings = [('.', 'home/data', 'home/out'), ('home', './data/', 'out/.'), ('home', 'data/../data', 'out/../out'),
                 ('home/data', '.', '../out'), ('home/out', '../data', '.'), ('.', 'link/data', 'link/../home/out'),
                 ('home', tmp_path / 'link' / 'data', f'{tmp_path}/link/out/')]

    def all_rows(start, data, output):
        monkeypatch.chdir(tmp_path / start)
        return [row for table in make.TABLES for row in make.rows_of(table, make.parse_args(
            [table, '--preset', 'tiny', '--data-path', str(data), '--output-dir', str(output)]))]

    for row in all_rows(*spellings[begun]):
        rows.take(row).close()
    for spelling in spellings:
        for row in all_rows(*spelling):
            rows.check_row(row)
    (tmp_path / 'home' / 'more' / 'train').mkdir(parents=True)
    fails(lambda: [rows.check_row(row) for row in all_rows('home/more', '.', '../out')], 'holds the run of another com')


def test_a_run_by_hand_from_another_folder_is_the_same(tmp_path, monkeypatch):
    """args.json says where its paths start."""
    folder = tmp_path / 'out' / 'train' / 'x'
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'out')
    made = run_record({'train_path': '../data/train', 'opt': 'lamb'}, torch.device('cpu'))
    (folder / 'args.json').write_text(json.dumps(made))
    for start, path in ((tmp_path, 'data/train'), (tmp_path / 'out' / 'train', '../../data/train/')):
        monkeypatch.chdir(start)
        words = ('main_pixels.py', '--train-path', path, '--opt', 'lamb', '--output-dir', str(folder))
        rows.check_row(Row('train/x', folder, (words,)))
    words = ('main_pixels.py', '--train-path', '../data/train', '--opt', 'lamb', '--output-dir', str(folder))
    fails(lambda: rows.check_row(Row('train/x', folder, (words,))), '--train-path .* there, --train-path .* here')
    monkeypatch.setattr(os, 'getcwd', lambda: (_ for _ in ()).throw(FileNotFoundError))
    assert run_record({}, torch.device('cpu'))['started_in'] is None


def test_what_was_run_by_hand_is_done(tmp_path, monkeypatch):
    """Each kind of command leaves what says so; a run of other flags is refused, and one that is cut off resumes."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'out' / 'train' / 'x'
    folder.mkdir(parents=True)
    words = ('main_seit.py', '--epochs', '2', '--lr', '0.5', '--model-kwargs', 'depth=1', '--output-dir', str(folder))
    row = Row('train/x', folder, (('tables/count_bytes.py', '--output', str(folder / 'bytes.json')), words))
    assert rows.commands_done(row) == 0
    (folder / 'bytes.json').write_text('{}')
    (folder / 'args.json').write_text(json.dumps({'epochs': 2, 'lr': 0.5, 'output_dir': 'x', 'eval': False}))
    (folder / 'log.txt').write_text('{"epoch": 0}\n{"epoch": 1}\n')
    assert rows.commands_done(row) == 1 and not rows.is_done(row)  # it was killed before the last checkpoint
    (folder / 'checkpoint.pth').write_text('')
    assert rows.is_done(row)
    assert not rows.has_result((*words[:2], '3', *words[3:]))
    (folder / 'args.json').write_text(json.dumps({'epochs': 2, 'lr': 0.25}))
    fails(lambda: rows.check_row(row), 'x: holds the run of another command: --lr 0.25 there, --lr 0.5 here; choose')
    tokenize = ('tokenize_images.py', '--name', 'val', '--output-dir', 'out')
    convert = ('scripts/convert_tokens.py', '--token-file', 'a/train-token.data.bin.gz', '--output-dir', 'out')
    task = ('main_continual.py', '--epochs', '1', '--output-dir', 'out')
    for command, file, text in ((tokenize, 'val-token.json', ''), (convert, 'train-token.json', ''),
                                ((*task, '--tokenize-only'), 'synonyms.json', '')):
        assert not rows.has_result(command)
        (tmp_path / 'out' / file).write_text(text)
        assert rows.has_result(command)
    (tmp_path / 'out' / 'run.json').write_text('{"classes": 4}')
    lines = [json.dumps({'task': task, 'classes': 2 * task + 2, 'test_acc1': 1, 'test_task_acc1': [1] * (task + 1)})
             for task in range(2)]
    for count in (1, 2):
        (tmp_path / 'out' / 'results.jsonl').write_text('\n'.join(lines[:count]) + '\n')
        assert rows.has_result(task) == (count == 2)


@pytest.mark.slow
def test_two_processes_share_a_folder(tmp_path, capsys):
    """A row that another process has is waited for; the others are run."""
    slow = stub(tmp_path, 'slow', 'import sys, time\nprint(sys.argv[1], flush=True)\ntime.sleep(2)')
    table = [Row('a', tmp_path / 'out' / 'a', ((slow, '1'),)), Row('b', tmp_path / 'out' / 'b', ((slow, '2'),)),
             Row('c', tmp_path / 'out' / 'c', ((slow, '3'),), ('a',))]
    with processes.context().Pool(1) as pool:
        first = pool.apply_async(run_rows, (table[:1], 1, 1))
        while not (table[0].folder / rows.OUTPUT).exists():
            time.sleep(0.01)
        assert run_rows(table, 2, 1) == {'a': 'done', 'b': 'done', 'c': 'done'}
        assert first.get() == {'a': 'done'}
    for row in table:
        assert (row.folder / rows.OUTPUT).read_text() == f'{row.commands[0][1]}\n'  # once each
    assert capsys.readouterr().out.count('a: another process is at work on it; waiting for its end') == 1


def test_programs_are_started_by_torchrun_from_any_folder():
    words = rows.argument_list(('torchrun', '--nproc_per_node=8', 'main_seit.py', '--lr', '1'))
    assert words == [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=8', str(ROOT / 'main_seit.py'),
                     '--lr', '1']


# ---------------------------------------------------------------- one table from end to end

CHOSEN = ['tokens', 'patch stem']


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Images, and the words of the ablation at a toy size; `started` lists the rows' commands that are started."""
    smooth_images(tmp_path / 'data' / 'train')
    smooth_images(tmp_path / 'data' / 'val', 5)
    monkeypatch.setitem(presets.PRESETS, 'tiny', TOY)
    started = []

    def start(command, log, env):
        started.append(log.parent.relative_to(tmp_path / 'out').as_posix())
        return Forked(command, log)

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
    first = out / 'train' / 'tokens' / 'lr-0.003-seed-0'
    stop_at(first / 'log.txt')
    assert call(make, 'ablation', *words) == 75
    assert 'the same command resumes it' in capsys.readouterr().out
    begun = list(started)
    assert first.relative_to(out).as_posix() in begun
    assert call(make, 'ablation', *words) == 0
    assert [line['epoch'] for line in read_log(first)] == [0, 1, 2, 3]
    done = started[len(begun):]
    assert not any(name.startswith(('chosen', 'tokenizers', 'tokens/')) for name in done)  # they were done before
    assert call(make, 'ablation', *words[:-len(CHOSEN)], 'search *') == 0

    results = json.loads((out / 'ablation' / 'results.json').read_text())
    assert results['lrs']['tokens']['chosen'] == 0.003 and set(results['lrs']['tokens']['search']) == {'0.001', '0.003'}
    assert list(results['rows']) == CHOSEN
    assert results['lrs']['tokens']['search']['0.003'] == results['rows']['tokens']['top1'][0]
    for name, result in results['rows'].items():
        logs = [read_log(out / 'train' / name.replace(' ', '-') / f'lr-0.003-seed-{seed}')[-1] for seed in (0, 1)]
        assert result['seeds'] == [0, 1] and result['top1'] == [log['test_acc1'] for log in logs]
        assert result['ema_top1'] == [log['ema_test_acc1'] for log in logs]
        assert result['mean'] == pytest.approx(sum(result['top1']) / 2, abs=1e-3)
        assert result['bytes']['images'] == 12 and result['bytes']['without_headers'] > 0
    assert results['rows']['tokens']['paper'] == 74.0 and results['rows']['patch stem']['paper'] is None

    # nothing is repeated, also under another spelling; a subset of rows and seeds keeps the others' results
    started.clear()
    (tmp_path / 'link').symlink_to('out')
    few = [*words[:-len(CHOSEN) - 4], '--seeds', 0, '--rows', 'tokens']
    assert call(make, 'ablation', *few[:3], tmp_path / 'link', *few[4:]) == 0
    assert started == [] and json.loads((out / 'ablation' / 'results.json').read_text()) == results
    assert call(make, 'all', *words[:-len(CHOSEN) - 1], '--report') == 0 and started == []
    text = (out / 'ablation' / 'table.md').read_text()
    assert text in (out / 'tables.md').read_text()
    assert text.count('\n| ') == 4 and '(2) |' in text and f'| {report.DASH} |' in text and '| 74.0 |' in text
    assert 'Learning rates: tokens 0.003 (top-1 of the search, 4 epochs each: 0.001: ' in text
    assert not (out / 'speed').exists()  # of which nothing is done

    # another table takes what is there, and evaluates it: images through the tokenizer are the tokens of the training
    assert call(make, 'robustness', *words[:-len(CHOSEN)], 'tokens clean') == 0
    assert sorted(started) == [f'evaluate/tokens/lr-0.003-seed-{seed}/clean' for seed in (0, 1)]
    clean = json.loads((out / 'robustness' / 'results.json').read_text())['rows']['tokens clean']
    assert clean['top1'] == pytest.approx(results['rows']['tokens']['top1']) and clean['paper'] == 74.0

    # by hand, without the runner: the row is done all the same
    started.clear()
    args = make.parse_args(['robustness', *map(str, words[:-len(CHOSEN)]), 'tokens contrast 2'])
    row = next(row for row in make.rows_of('robustness', args) if 'contrast' in row.name)
    row.folder.mkdir(parents=True)
    call(importlib.import_module('evaluate_on_images'), *row.commands[0][1:])
    assert call(make, 'robustness', *words[:-len(CHOSEN)], 'tokens contrast 2') == 0
    assert started == ['evaluate/tokens/lr-0.003-seed-1/contrast-2']


@pytest.mark.slow
def test_tokenizers_are_judged(toy, tmp_path):
    """The preset's, and one that the user has; trained rows are shared with table 1."""
    words, started = toy
    out = tmp_path / 'out'
    assert call(make, 'tokenizers', *words[:-len(CHOSEN)], 'patch') == 0
    made = out / 'tokenizers' / 'patch'
    mine = ['--tokenizer', 'mine', made / 'tokenizer.pt', made / 'codebook.ckpt', 16, 2]
    assert call(make, 'tokenizers', *words[:-len(CHOSEN) - 1], *mine) == 0
    results = json.loads((out / 'tokenizers' / 'results.json').read_text())['rows']
    assert list(results) == ['patch', 'mine']
    assert 'train/tokens/lr-0.003-seed-1' in started and 'train/tokens-mine/lr-0.003-seed-1' in started
    for result, grid in zip(results.values(), (4, 2)):
        assert (result['codes']['grid'], result['codes']['codes'], result['codes']['images']) == (grid, 24, 12)
        assert result['quality']['images'] == 10 and result['quality']['quality_size'] == 16
        assert 10 < result['quality']['psnr'] < 100 and 0 < result['quality']['ssim'] < 1
        assert result['speed']['tokenizer_images_per_second']['fp32']['median'] > 0
        assert len(result['top1']) == 2
    text = (out / 'tokenizers' / 'table.md').read_text()
    quality = results['mine']['quality']
    assert f'| mine | 2x2 | {results["mine"]["codes"]["entropy_bits"]:.2f} | ' in text
    assert f'| {quality["psnr"]:.2f} | {quality["ssim"]:.3f} | ' in text


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
    fails(lambda: call(choose_images, *words, '--skip-classes', 3), '--skip-classes leaves none$')


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


def test_bytes_of_tokens_are_with_their_codebook(tmp_path):
    data = make_images(tmp_path)
    out = tokenize(data, tmp_path / 'out', source='val')
    stream = out / 'my-token.data.bin.gz'
    words = ['--token-file', stream, '--codebook-path', data / 'codebook.ckpt', '--output', tmp_path / 'bytes.json']
    call(count_bytes, *words)
    size = json.loads((tmp_path / 'bytes.json').read_text())
    rows_of_codes = load_codebook(data / 'codebook.ckpt').nbytes
    assert size['files'] == bytes_on_disk([open_token_file(stream)]) + rows_of_codes
    assert rows_of_codes < size['without_headers'] <= size['files']


def test_seeds_of_longer_runs_are_found(tmp_path):
    for name in ('train/tokens/lr-0.001-seed-1', 'train/24-epochs/tokens/lr-0.001-seed-2',
                 'after/train/tokens/lr-1-seed-3', 'continual/a/b/seed-4'):
        (tmp_path / name).mkdir(parents=True)
    assert report.seeds_on_disk(tmp_path) == {1, 2, 3, 4}


def result(kind, images, files, scan, *top1, paper=None):
    mean = sum(top1) / len(top1) if top1 else None
    return {'kind': kind, 'seeds': list(range(len(top1))), 'top1': list(top1), 'mean': mean,
            'sd': 0.5 if len(top1) > 1 else None, 'paper': paper, 'paper_size': '140 GB' if paper else None,
            'bytes': {'images': images, 'files': files, 'without_headers': scan},
            'full_bytes': {'images': 100, 'files': 200_000, 'without_headers': 130_000}}


def test_the_curve_and_the_table_of_storage(tmp_path):
    pytest.importorskip('matplotlib')
    made = {'full pixels': result('pixels', 100, 200_000, 130_000, 38., 39., paper=81.8),
            'sample 60%': result('pixels', 60, 120_000, 78_000, 35.),
            'JPEG q8': result('pixels', 100, 86_000, 23_000, 33.),
            'tokens': result('tokens', 100, 23_700, 25_900, 29., 30.),
            'tokens 20%': result('tokens', 20, 4_740, 5_180, 20.),
            'tokens patch-8x8': result('tokens', 100, 6_000, 6_400), 'resize x0.5': result('pixels', 100, 9, None, 30.)}
    made['tokens patch-8x8']['failed'] = 'main_seit.py ended with code 2 (a | b); see x'
    results = {'table': 'storage', 'title': 'Storage', 'preset': 'tiny',
               'lrs': {'tokens': {'chosen': 1e-3, 'search': {'0.001': 29.}, 'epochs': 3}}, 'rows': made}
    folder = tmp_path / 'storage'
    report.write(results, folder)
    assert (folder / 'curve.png').read_bytes().startswith(b'\x89PNG')
    assert [point[1:4] for point in figures.points(results, 'files')][:2] == [
        ('full pixels', 2000, 1), ('sample 60%', 1200, pytest.approx(5 / 3))]
    assert [name for name, *_ in figures.frontier(results, 'files')] == [
        'resize x0.5', 'JPEG q8', 'sample 60%', 'full pixels']
    text = (folder / 'table.md').read_text()
    assert 'as files, than resize x0.5 (30.00 in 0 bytes), JPEG q8 (33.00 in 860 bytes), sample 60%' in text
    assert '| full pixels | 100 | 2,000 | 1.0 | 1,300 | 1.0 | 38.50 ± 0.50 (2) | 81.8 at 140 GB |' in text
    assert f'| sample 60% | 60 | 1,200 | 1.7 | 780 | 1.7 | 35.00 (1) | {report.DASH} |' in text
    assert f'| tokens | 100 | 237 | 8.4 | 259 | 5.0 | 29.50 ± 0.50 (2) | {report.DASH} |' in text
    assert f'| resize x0.5 | 100 | 0 | 22222.2 | {report.DASH} | {report.DASH} | 30.00 (1) |' in text
    assert '| failed |' in text and '\ntokens patch-8x8: main_seit.py ended' in text
    assert 'Learning rates: tokens 0.001 (top-1 of the search, 3 epochs each: 0.001: 29.00).' in text
    assert json.loads((folder / 'results.json').read_text()) == results


def test_the_tables_of_robustness_and_speed():
    facts = {'title': 'T', 'preset': 'tiny', 'lrs': {}}
    made = {'tokens clean': result('tokens', 4, 8, 8, 30.)} | {
        f'tokens gaussian_noise {severity}': result('tokens', 4, 8, 8, 30. - severity) | {'severity': severity}
        for severity in (1, 2)}
    text = report.markdown({'table': 'robustness', 'rows': made, **facts})
    assert f'| tokens clean | 30.00 (1) |{f" {report.DASH} |" * 4}' in text
    assert f'| tokens gaussian_noise | {report.DASH} | 29.00 (1) | 28.00 (1) | 28.50 | 50.7 |' in text
    made |= {f'tokens contrast {severity}': result('tokens', 4, 8, 8, 20. - severity) | {'severity': severity}
             for severity in (1, 2)}
    text = report.markdown({'table': 'robustness', 'rows': made, **facts})
    assert f'| tokens, mean of corruptions | {report.DASH} | 24.00 | 23.00 | 23.50 |' in text
    made |= {'pixels contrast 1': result('pixels', 4, 8, 8, 9.) | {'severity': 1}}
    del made['tokens contrast 2']
    text = report.markdown({'table': 'robustness', 'rows': made, **facts})
    dashes = f' {report.DASH} |'
    assert f'| tokens, mean of corruptions |{dashes} 24.00 |{3 * dashes}' in text, 'no mean of some'
    assert f'| pixels, mean of corruptions |{5 * dashes}' in text, 'nor of others than tokens have'
    fast = result('tokens', 4, 1000, 8, 2000.)
    text = report.markdown({'table': 'speed', 'rows': {'tokens loader-bound': fast}, **facts})
    assert '| tokens loader-bound | 2,000 (1) | 250 | 0.50 |' in text


@pytest.mark.slow
def test_a_signal_lets_no_row_start(tmp_path):
    good = stub(tmp_path, 'good', '')
    table = [Row(str(i), tmp_path / str(i), ((good,),)) for i in range(2)]
    assert run_rows(table, 1, 1, stopping=lambda: True) == {'0': 'stopped', '1': 'stopped'}
    assert run_rows(table, 1, 1) == {'0': 'done', '1': 'done'}


# ---------------------------------------------------------------- pictures

def test_what_rows_keep_is_drawn(tmp_path):
    data = make_images(tmp_path)
    out = tokenize(data, tmp_path / 'out', source='val')
    words = ['--data-path', data / 'val', data / 'val', '--token-file', out / 'my-token.data.bin.gz',
             '--tokenizer-path', data / 'tok.pt', '--codebook-path', data / 'codebook.ckpt', '--images', 3,
             '--image-size', 16]
    call(draw_rows, *words, '--output', tmp_path / 'rows.png')
    with Image.open(tmp_path / 'rows.png') as sheet:
        pixels = np.asarray(sheet)[-3 * 99 - 3:, -3 * 99:]  # of 16 pixels, six times as large, below a line of titles
        assert sheet.height == 22 + 3 * 99
    lines = [pixels[99 * line:99 * line + 96] for line in range(3)]
    assert np.array_equal(lines[0], lines[1]) and not np.array_equal(lines[1], lines[2])
    call(draw_rows, *words, '--output', tmp_path / 'named.png', '--titles', 'a', 'b', 'c')
    assert (tmp_path / 'named.png').read_bytes() != (tmp_path / 'rows.png').read_bytes()
    fails(lambda: call(draw_rows, *words, '--output', tmp_path / 'b.png', '--titles', 'a'), '--titles: 1 for 3 lines')
    fails(lambda: call(draw_rows, '--data-path', data / 'train', *words[2:], '--output', tmp_path / 'b.png'),
          '9 images, but .* has 45')
    fails(lambda: call(draw_rows, '--data-path', data / 'train', *words[3:], '--output', tmp_path / 'b.png'),
          '9 images, but --data-path has 45')
    fails(lambda: call(draw_rows, *words, '--tokenizer-path', 'a', 'b', '--output', tmp_path / 'b.png'),
          '--tokenizer-path: 2 for 1 --token-file')
    (out / 'my-token.json').unlink()  # which says what codebook it is
    torch.save(torch.rand(2, load_codebook(data / 'codebook.ckpt').shape[1]), tmp_path / 'small.ckpt')
    torch.save(torch.rand(600, 5), tmp_path / 'wide.ckpt')
    for name, said in (('small', 'holds code'), ('wide', 'rows of 5 elements')):
        fails(lambda: call(draw_rows, *words[:-6], '--codebook-path', tmp_path / f'{name}.ckpt', '--output',
                           tmp_path / 'b.png'), said)
    # two token sets, and one image
    more = ['--token-file', words[4], words[4], '--tokenizer-path', words[6], words[6], '--codebook-path', words[8],
            words[8], '--images', 1, '--titles', 'as it is', 'again', 'tokens', 'other tokens']
    call(draw_rows, *words, *more, '--output', tmp_path / 'one.png')
    with Image.open(tmp_path / 'one.png') as sheet:
        assert sheet.width > 4 * 96 and sheet.height < 2 * 96
    assert not (tmp_path / 'b.png').exists()
