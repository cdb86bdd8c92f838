"""The output folder of a run: what it keeps, what it refuses, and what a killed run leaves."""
import errno
import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers import ROOT, Killed, clean_environment, contents, fails, read_log, states
from small_training import small
from training import run_folder
from training.run_folder import CheckpointFiles, RunFolder, RunLog, checkpoint_files, find_checkpoint
from utils import InputError


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('finished')
    small(folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the folder of a run of two epochs."""
    copy = tmp_path / 'run'
    copy.mkdir()
    for path in finished.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


# ---------------------------------------------------------------- an earlier run

def test_run_folders_are_not_overwritten(folder, tmp_path):
    torch.save({'model': states(folder / 'checkpoint.pth')['model']}, tmp_path / 'weights.pth')
    before = contents(folder)
    fails(lambda: find_checkpoint(str(folder), ''), 'an earlier run is here; add --resume auto')
    for resume in (tmp_path / 'weights.pth', tmp_path / 'gone.pth'):  # another run's checkpoint must not replace it
        fails(lambda resume=resume: find_checkpoint(str(folder), str(resume)), 'an earlier run is here')
    assert contents(folder) == before


@pytest.mark.parametrize('removed', [
    ['checkpoint.pth', 'checkpoint_previous.pth'],
    ['checkpoint.pth', 'checkpoint_previous.pth', 'best_checkpoint.pth', 'best_ema_checkpoint.pth'],
    ['checkpoint.pth', 'checkpoint_previous.pth', 'log.txt', '.lock', 'args.json']])
@pytest.mark.parametrize('resume', ['', 'auto'])
def test_what_is_left_of_an_earlier_run_is_not_overwritten(folder, removed, resume):
    for name in removed:
        (folder / name).unlink()
    before = contents(folder)
    fails(lambda: find_checkpoint(str(folder), resume), 'an earlier run is here')
    assert before.items() <= contents(folder).items()


def test_a_file_of_the_own_folder_resumes(folder, capsys):
    best = states(folder / 'best_checkpoint.pth')['epoch']
    for name in ('checkpoint.pth', 'checkpoint_previous.pth'):
        (folder / name).unlink()
    small(folder, '--epochs', best + 2, '--resume', folder / 'best_checkpoint.pth')
    assert f'best_checkpoint.pth: resumed at epoch {best + 1}, step 0' in capsys.readouterr().out
    assert [line['epoch'] for line in read_log(folder)] == list(range(best + 2))


def test_a_run_killed_before_its_first_checkpoint_starts_from_scratch(tmp_path):
    """It leaves a log line and a best checkpoint, if it dies just before checkpoint.pth is whole."""
    small(tmp_path, '--epochs', 1)
    assert not (tmp_path / '.unsaved').exists()
    (tmp_path / 'checkpoint.pth').unlink()
    (tmp_path / '.unsaved').touch()
    small(tmp_path, '--epochs', 1, '--resume', 'auto')
    assert (tmp_path / 'checkpoint.pth').exists() and len(read_log(tmp_path)) == 1


# ---------------------------------------------------------------- damage and kills

def truncate(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b'')


@pytest.mark.parametrize('damage', [truncate, flip, empty])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_set_aside(folder, damage, capsys):
    damage(folder / 'checkpoint.pth')
    checkpoint, path = find_checkpoint(str(folder), 'auto')
    output = capsys.readouterr().out
    assert 'warning: ' in output and 'checkpoint.pth' in output and 'taking the one before it' in output
    assert path == str(folder / 'checkpoint_previous.pth') and checkpoint['epoch'] == 0
    assert (folder / 'checkpoint_damaged.pth').exists() and not (folder / 'checkpoint.pth').exists()


@pytest.mark.parametrize('damage', [truncate, flip, empty])
@pytest.mark.parametrize('step', ['newest to previous', 'new to newest'])
def test_a_damaged_newest_and_a_kill_at_a_rename_leave_a_good_one(folder, damage, step, monkeypatch):
    """A save is cut off before its first or its second rename; what it saved is whole, and is found.

    The damaged one is set aside, so the first save, of epoch 1, has only one rename.
    """
    damage(folder / 'checkpoint.pth')
    replace = os.replace

    def killed(source, target):
        names = os.path.basename(source), os.path.basename(target)
        moment = {('checkpoint.pth', 'checkpoint_previous.pth'): 'newest to previous',
                  ('.checkpoint.pth.new', 'checkpoint.pth'): 'new to newest'}.get(names)
        if moment == step:
            raise Killed
        replace(source, target)
    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(Killed):
        small(folder, '--epochs', 3, '--resume', 'auto')
    monkeypatch.undo()
    checkpoint, path = find_checkpoint(str(folder), 'auto')
    assert checkpoint['epoch'] == (2 if step == 'newest to previous' else 1)
    assert path == str(folder / 'checkpoint.pth')


def test_two_damaged_checkpoints_are_an_error(folder):
    truncate(folder / 'checkpoint.pth')
    empty(folder / 'checkpoint_previous.pth')
    with pytest.raises(InputError, match='checkpoint_previous.pth: ') as error:
        find_checkpoint(str(folder), 'auto')
    assert '\n' not in str(error.value)


def test_renames_left_undone_are_done(folder):
    os.replace(folder / 'checkpoint.pth', folder / '.checkpoint.pth.new')
    os.replace(folder / 'checkpoint_previous.pth', folder / 'checkpoint.pth')
    checkpoint, path = find_checkpoint(str(folder), 'auto')
    assert checkpoint['epoch'] == 1 and path == str(folder / 'checkpoint.pth')
    assert states(folder / 'checkpoint_previous.pth')['epoch'] == 0
    assert not (folder / '.checkpoint.pth.new').exists()


def test_what_a_killed_run_left_is_removed(tmp_path):
    names = ['..checkpoint.pth.new.abc.tmp', '.best_checkpoint.pth.abc.tmp', '.log.txt.abc.tmp', '.args.json.x.tmp']
    for name in names:
        (tmp_path / name).write_bytes(b'half')
    (tmp_path / 'mine.tmp').write_bytes(b'stays')
    RunFolder(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ['.lock', 'mine.tmp']


# ---------------------------------------------------------------- two runs

HOLD = """import sys
from training.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
print('locked', flush=True)
input()"""


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_until_the_first_ends_however_it_ends(tmp_path):
    first = subprocess.Popen([sys.executable, '-c', HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True, cwd=ROOT, env=clean_environment())
    assert first.stdout.readline() == 'locked\n'
    with pytest.raises(InputError, match='another process is at work there'):
        RunFolder(str(tmp_path))
    first.kill()
    first.wait()
    RunFolder(str(tmp_path))


@pytest.mark.parametrize('code', [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_still_trains(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr('fcntl.lockf', refuse)
    monkeypatch.setattr('fcntl.flock', refuse)
    folder = RunFolder(str(tmp_path))
    folder.begin({'lr': 1}, {'args': {}})
    assert json.loads((tmp_path / 'args.json').read_text()) == {'lr': 1}


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / 'file').write_text('x')
    for place in (tmp_path / 'file', tmp_path / 'file' / 'below', tmp_path / ('n' * 300)):
        fails(lambda place=place: small(place), 'cannot be written .*; choose another --output-dir')


# ---------------------------------------------------------------- the log

def test_a_log_drops_lines_that_run_again_and_half_lines(tmp_path):
    lines = '{"epoch": 0, "a": 1}\n[1]\nnull\n{"epoch": "x"}\n{"epoch": 1}\n{"epo'
    (tmp_path / 'log.txt').write_text(lines)
    log = RunLog(str(tmp_path), 1)
    assert read_log(tmp_path) == [{'epoch': 0, 'a': 1}]
    log.write(epoch=1, b=2)
    assert read_log(tmp_path) == [{'epoch': 0, 'a': 1}, {'epoch': 1, 'b': 2}]


def test_a_log_line_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    log = RunLog(str(tmp_path))

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(InputError, match='log.txt: cannot be written .No space left'):
        log.write(epoch=0)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder('')
    folder.begin({}, {})
    RunLog('').write(epoch=0)
    assert folder.advice() == 'without --output-dir nothing is saved' and not os.listdir(tmp_path)


def test_due_by_steps_counts_steps_of_the_optimizer(tmp_path):
    class State:
        step = 0
    folder = RunFolder(str(tmp_path), (2, 'steps'))
    due = []
    for step in range(3, 19, 3):  # batches, three to a step
        State.step = step
        due.append(folder.due(State, 3))
    assert due == [False, True, False, True, False, True]
    assert not RunFolder('', (1, 'steps')).due(State, 1)
    minutes = RunFolder(str(tmp_path), (1., 'minutes'))
    assert not minutes.due(State, 1)
    minutes.saved_at -= 61
    assert minutes.due(State, 1)


def test_the_module_states_the_files_it_writes(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {'checkpoint.pth', 'checkpoint_previous.pth', 'best_checkpoint.pth', 'best_ema_checkpoint.pth',
                     'log.txt', 'args.json', '.lock'}
    assert all(name in run_folder.__doc__ for name in names)


def test_a_whole_first_checkpoint_is_kept_though_its_mark_is_left(tmp_path):
    """The run was killed after the renames of its first save, before the mark was removed."""
    small(tmp_path, '--epochs', 1)
    (tmp_path / '.unsaved').touch()
    fails(lambda: small(tmp_path, '--epochs', 1), 'an earlier run is here')


def test_a_checkpoint_of_minutes_is_not_due_twice(tmp_path):
    """With several ranks the answer comes a step later, and the question is asked again until then."""
    class State:
        step = 1
    folder = RunFolder(str(tmp_path), (1., 'minutes'))
    folder.saved_at -= 61
    assert folder.due(State, 1) and not folder.due(State, 1)


def test_a_checkpoint_that_cannot_be_read_now_is_not_set_aside(folder, monkeypatch, capsys):
    load = run_folder.load_checkpoint

    def failing(path):
        if str(path) == str(folder / 'checkpoint.pth'):
            try:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            except OSError:
                raise InputError(f'{path}: cannot read a checkpoint') from None
        return load(path)
    monkeypatch.setattr(run_folder, 'load_checkpoint', failing)
    _, path = find_checkpoint(str(folder), 'auto')
    assert path.endswith('checkpoint_previous.pth') and (folder / 'checkpoint.pth').exists()
    assert 'taking the one before it' in capsys.readouterr().out


def board_of(folder):
    """What TensorBoard shows of a folder: (epoch, value) of its train_loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder), {'scalars': 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars('train_loss')]


@pytest.mark.parametrize('start', [0, 1, 2, 3])
def test_tensorboard_drops_epochs_that_run_again(start, tmp_path):
    """From the start, from an earlier checkpoint, from the newest, and after an epoch that was saved."""
    pytest.importorskip('tensorboard')
    def logged(number, start_epoch, losses):
        log = RunLog(str(tmp_path), start_epoch, True)
        for epoch, loss in enumerate(losses, start_epoch):
            log.write(epoch=epoch, train_loss=loss)
        log.board.close()
        path, = tmp_path.glob('events.*')
        path.rename(tmp_path / f'{number}-events.out.tfevents.x')  # as if started seconds later, which names begin with

    logged(0, 0, [0., 1., 2.])
    for number, again in ((1, 10.), (2, 20.)):  # resumed twice
        logged(number, start, [again])
        assert board_of(tmp_path) == [*((epoch, epoch) for epoch in range(start)), (start, again)]
        assert [line['epoch'] for line in read_log(tmp_path)] == list(range(start + 1))


def test_tensorboard_that_is_missing_is_an_error_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(InputError, match='pip install tensorboard'):
        RunLog(str(tmp_path), 0, True)


FAKE_WANDB = """
import json, os
RUNS = []
Settings = dict
class Run:
    def __init__(self, **options):
        self.options, self.lines, self.finished = options, [], False
    def log(self, values, step):
        self.lines.append((step, values))
    def finish(self):
        self.finished = True
def init(**options):
    if os.environ.get('WANDB_MODE') != 'offline':
        raise ConnectionError('no login\\nat all')
    RUNS.append(Run(**options))
    return RUNS[-1]
"""


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    """A module wandb that keeps what it is told."""
    folder = tmp_path / 'packages'
    folder.mkdir()
    (folder / 'wandb.py').write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setitem(sys.modules, 'wandb', None)  # what is there now comes back at the end
    del sys.modules['wandb']
    return importlib.import_module('wandb')


def test_wandb_gets_the_scalars_of_each_epoch_in_one_run(fake_wandb, tmp_path):
    folder = tmp_path / 'out' / 'run'
    with pytest.raises(Killed):
        small(folder, '--wandb', '--kill-before', 1, 2)
    assert small(folder, '--wandb', '--resume', 'auto') == 0
    first, second = fake_wandb.RUNS
    assert first.options['project'] == 'seit' and first.options['name'] == 'out/run'
    assert first.options['config']['lr'] == 0.1 and first.options['dir'] == str(folder)
    assert first.options['id'] == second.options['id'] == (folder / 'wandb_id.txt').read_text().strip()
    assert second.options['resume'] == 'allow' and first.finished and second.finished
    lines = [*first.lines, *second.lines]
    assert [step for step, _ in lines] == [0, 1]
    for (_, scalars), logged in zip(lines, read_log(folder)):
        assert scalars == {key: value for key, value in logged.items() if key in scalars}
        assert {'train_loss', 'train_lr', 'test_acc1', 'ema_test_acc1'} <= scalars.keys()
        assert not {'epoch_time', 'best_acc1', 'n_parameters'} & scalars.keys()


def test_runs_of_one_process_are_runs_of_their_own_for_wandb(fake_wandb, tmp_path):
    for name in 'ab':
        small(tmp_path / name, '--epochs', 1, '--wandb', 'mine')
    first, second = fake_wandb.RUNS
    assert first.options['id'] != second.options['id'] and first.options['project'] == 'mine'
    small(tmp_path / 'c', '--epochs', 1)
    assert len(fake_wandb.RUNS) == 2


def test_a_damaged_name_of_a_wandb_run_is_made_again(fake_wandb, tmp_path):
    (tmp_path / 'wandb_id.txt').write_bytes(b'../\xff')
    RunLog(str(tmp_path), wandb='seit').close()
    assert fake_wandb.RUNS[0].options['id'] == (tmp_path / 'wandb_id.txt').read_text().strip() != '../'


def test_what_wandb_refuses_is_one_line(fake_wandb, tmp_path, monkeypatch):
    monkeypatch.delenv('WANDB_MODE')
    fails(lambda: RunLog(str(tmp_path), wandb='seit'),
          '^--wandb seit: no login: log in by wandb login, or set WANDB_MODE=offline$')
    monkeypatch.setitem(sys.modules, 'wandb', None)
    fails(lambda: RunLog(str(tmp_path), wandb='seit'), '^--wandb needs the wandb package: pip install wandb$')


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    small(tmp_path, '--epochs', 1, '--wandb')
    small(tmp_path, '--epochs', 2, '--wandb', '--resume', 'auto')
    name = (tmp_path / 'wandb_id.txt').read_text().strip()
    files = list(tmp_path.glob(f'wandb/offline-run-*-{name}/run-{name}.wandb'))
    assert files and all(path.stat().st_size for path in files)


# ---------------------------------------------------------------- which checkpoints are kept

class State(SimpleNamespace):
    """Of a checkpoint what the folder reads: epochs done, batches of the next."""

    def state_dict(self):
        return {'model': {}, 'epoch': self.epoch - 1, 'step': self.step}


def inside(folder):
    """The epoch in each checkpoint."""
    return {path.name: torch.load(path)['epoch'] for path in folder.glob('checkpoint*.pth')}


@pytest.mark.parametrize('periods', ['last2 every_2_epochs', 'last2 best', 'every_2_epochs only'])
def test_files_are_the_published_ones(golden, tmp_path, periods):
    expected = golden('seitpp/checkpoint_files.json')[periods]
    epochs = len(expected['after each epoch, file: epoch inside'])
    files = checkpoint_files([word for word in periods.split() if word != 'only'], epochs)
    folder = RunFolder(str(tmp_path), files=files)
    for epoch, names in enumerate(expected['after each epoch, file: epoch inside']):
        improved = names.get('checkpoint-best.pth', epoch) == epoch  # the golden run's best were after epochs 0 and 2
        folder.save(State(epoch=epoch + 1, step=0), ['model'] if improved else [], {'train_loss': float(epoch)})
        assert inside(tmp_path) == names
    summaries = {path.name for path in tmp_path.glob('*.summary.json')}
    assert summaries == set(expected['summary files at the end'])
    for name, epoch in inside(tmp_path).items():
        summary = json.loads((tmp_path / f'{name}.summary.json').read_text())
        assert summary['epoch'] == f'{epoch + 1}/{epochs}' and summary['train_loss'] == epoch


def test_a_run_without_a_copy_of_its_last_epoch_keeps_the_newest(tmp_path):
    folder = RunFolder(str(tmp_path), files=checkpoint_files(['every_2_epochs'], 3))
    for epoch in range(3):
        folder.save(State(epoch=epoch + 1, step=0))
    assert inside(tmp_path) == {'checkpoint-2.pth': 1, 'checkpoint-last.pth': 2}


def test_within_an_epoch_there_are_no_copies(tmp_path):
    files = checkpoint_files(['last1', 'every_1_epochs'], 4)
    folder = RunFolder(str(tmp_path), files=files)
    folder.save(State(epoch=1, step=0))
    folder.save(State(epoch=1, step=3))
    assert inside(tmp_path) == {'checkpoint-1.pth': 0, 'checkpoint-last.pth': 0, 'checkpoint-last1.pth': 0}
    checkpoint, path = find_checkpoint(str(tmp_path), 'auto', files=files)
    assert checkpoint['step'] == 3 and path == str(tmp_path / 'checkpoint-last.pth')


@pytest.mark.parametrize('renames', range(6))
def test_a_kill_between_renames_loses_nothing(tmp_path, monkeypatch, renames):
    """Saves move three files and their summaries; whenever that is cut off, the next start ends it the same way."""
    from training import run_folder
    files = checkpoint_files(['last2'], 9)
    folder = RunFolder(str(tmp_path), files=files)
    for epoch in range(3):
        folder.save(State(epoch=epoch + 1, step=0))
    replace = run_folder.os.replace
    left = [renames]

    def killed(source, target):
        names = os.path.basename(source), os.path.basename(target)
        if 'checkpoint' in names[0] and not names[0].endswith('.tmp'):
            if not left[0]:
                raise Killed
            left[0] -= 1
        replace(source, target)
    monkeypatch.setattr(run_folder.os, 'replace', killed)
    with pytest.raises(Killed):
        folder.save(State(epoch=4, step=0))
    monkeypatch.undo()
    checkpoint, _ = find_checkpoint(str(tmp_path), 'auto', files=files)
    assert checkpoint['epoch'] == 3
    names = files.newest
    assert inside(tmp_path) == {names[0]: 3, names[1]: 2, names[2]: 1}
    for place, name in enumerate(names):
        assert json.loads((tmp_path / f'{name}.summary.json').read_text())['epoch'] == f'{4 - place}/9'


@pytest.mark.parametrize('period', ['last-1', 'first', 'every_0_epochs', 'every_2', 'best_2', ''])
def test_other_words_are_refused(period):
    fails(lambda: checkpoint_files(['last2', period], 4), "--save-periods.*: give words like 'last2'")


def test_best_needs_an_accuracy():
    fails(lambda: checkpoint_files(['best'], 4, has_best=False), "best: give words like 'last2', 'every_200_epochs'$")
    assert checkpoint_files(['best'], 4).newest == ('checkpoint-last.pth',)
    assert not checkpoint_files(['last'], 4).best
    assert CheckpointFiles().newest == ('checkpoint.pth', 'checkpoint_previous.pth')
