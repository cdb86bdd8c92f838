"""Runs that are killed, stopped or starved of disk: nothing is lost, and what is resumed is exact."""
import contextlib
import json
import os
import signal
import time

import numpy as np
import pytest
import torch

import engine
import processes
import recipe
import tokenize_images
from helpers import SMALL, call, free_port, make_data, open_codes, read_log, run_here, states
from processes import Job
from samplers import shuffled
from token_files.token_file import write_set
from training import checkpoints
from training.loss_meter import NotFinite
from training.preemption import REQUEUE
from utils import InputError

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'), n=96)


def flags(data, folder, *more):
    """A command line of 12 steps an epoch, two epochs."""
    return [*SMALL, *data, '--epochs', 2, '--drop-path', 0.3, '--warmup-epochs', 0, '--dist-eval', '--save-every', 2,
            '--output-dir', folder, '--resume', 'auto', *more]


def job(words, size=1, output=os.devnull):
    return Job('main_seit', words, size, output)


def wait_for(ready, seconds=60):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.002)


# ---------------------------------------------------------------- killed and stopped

RUNS = {'alone': (1, ['--batch-size', 8]), 'accumulating': (1, ['--batch-size', 4, '--accum-iter', 3]),
        'two': (2, ['--batch-size', 4]), 'four': (4, ['--batch-size', 2])}


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """A function of a name in RUNS that gives the folder of the undisturbed run."""
    done = {}

    def folder(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            size, more = RUNS[name]
            assert job(flags(data, done[name], *more), size, done[name] / 'out').wait() == [0] * size
        return done[name]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_killed_three_times_equals_uninterrupted(data, whole, name, tmp_path):
    """The kills come when a first, a later and another checkpoint have just appeared, or are being written."""
    size, more = RUNS[name]
    for delay in 0, 0.05, 0.2:
        before = checkpoint_time(tmp_path)
        run = job(flags(data, tmp_path, *more), size)
        wait_for(lambda: checkpoint_time(tmp_path) != before)
        time.sleep(delay)
        run.kill()
    assert job(flags(data, tmp_path, *more), size).wait() == [0] * size
    assert not processes.training_differs(whole(name), tmp_path)


def checkpoint_time(folder):
    with contextlib.suppress(FileNotFoundError):
        return (folder / 'checkpoint.pth').stat().st_mtime_ns


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on_exactly(data, whole, number, tmp_path):
    words = flags(data, tmp_path, *RUNS['two'][1])
    run = job(words, 2, tmp_path / 'out')
    wait_for((tmp_path / 'checkpoint.pth').exists)
    run.signal(number, rank=1)
    assert run.wait(300) == [REQUEUE] * 2
    assert '--resume auto continues there' in (tmp_path / 'out').read_text()
    assert states(tmp_path / 'checkpoint.pth')['step'] > 0
    assert job(words, 2, tmp_path / 'out').wait() == [0, 0]
    assert not processes.training_differs(whole('two'), tmp_path)


def test_a_stop_before_the_first_checkpoint_saves_though_no_minute_is_over(data, tmp_path, monkeypatch):
    seed_step = engine.seed_step

    def signaled(seed, epoch, step, *words):
        if (epoch, step) == (0, 3):
            signal.raise_signal(signal.SIGTERM)
        seed_step(seed, epoch, step, *words)
    monkeypatch.setattr(engine, 'seed_step', signaled)
    assert run_here(*flags(data, tmp_path, '--save-every', '60m')) == REQUEUE
    assert states(tmp_path / 'checkpoint.pth')['step'] == 4 and not (tmp_path / '.unsaved').exists()


@pytest.mark.slow
def test_torchrun_restarts_by_itself_after_a_rank_died(data, whole, tmp_path):
    words = [str(word) for word in flags(data, tmp_path, *RUNS['two'][1])]
    launcher = processes.torchrun(['--nproc-per-node=2', '--max-restarts=1', f'--master-port={free_port()}'],
                                words, tmp_path / 'out')
    try:
        wait_for((tmp_path / 'checkpoint.pth').exists, 120)
        os.kill(processes.workers(launcher)[1], signal.SIGKILL)
        assert launcher.wait(120) == 0, (tmp_path / 'out').read_text()
    finally:
        processes.kill_all(launcher)
    assert 'resumed at epoch' in (tmp_path / 'out').read_text()
    assert not processes.training_differs(whole('two'), tmp_path)


# ---------------------------------------------------------------- resuming a copy

@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of a finished run of one process."""
    folder = tmp_path / 'run'
    folder.mkdir()
    for path in whole('alone').iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.slow
def test_a_half_line_and_a_repeated_epoch_leave_the_log(data, stopped, whole):
    os.replace(stopped / 'checkpoint_previous.pth', stopped / 'checkpoint.pth')  # of the last epoch's step 10
    with open(stopped / 'log.txt', 'a') as file:
        file.write('{"epoch": 1, "train_loss": 9}\n{"epo')
    run_here(*flags(data, stopped, *RUNS['alone'][1]))
    assert processes.log_lines(stopped) == processes.log_lines(whole('alone'))


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_and_the_run_ends_the_same(data, stopped, whole, capsys):
    (stopped / 'checkpoint.pth').write_bytes(b'')
    run_here(*flags(data, stopped, *RUNS['alone'][1]))
    assert 'checkpoint_previous.pth: resumed at epoch 1, step 10' in capsys.readouterr().out
    assert not processes.training_differs(whole('alone'), stopped)


# ---------------------------------------------------------------- another number of processes

@pytest.mark.slow
def test_another_world_size_is_refused_or_allowed_with_a_warning(data, stopped, tmp_path):
    os.replace(stopped / 'checkpoint_previous.pth', stopped / 'checkpoint.pth')
    words = flags(data, stopped, *RUNS['alone'][1])
    assert job(words, 2, tmp_path / 'out').wait() == [2, 2]
    line, = (line for line in (tmp_path / 'out').read_text().splitlines() if 'error' in line)
    assert 'world_size 1 -> 2' in line and '--allow-inexact-resume' in line
    assert job([*words, '--allow-inexact-resume'], 2, tmp_path / 'out').wait() == [0, 0]
    output = (tmp_path / 'out').read_text()
    assert 'warning: ' in output and 'no longer those of the uninterrupted run' in output
    assert 'resumed at epoch 1, step 5' in output  # as many images as 10 steps alone
    assert [line['epoch'] for line in read_log(stopped)] == [0, 1]


# ---------------------------------------------------------------- losses that are not finite

@pytest.fixture
def bad_step(monkeypatch):
    """The loss of step 5 of epoch 0 is not a number."""
    seed_step = engine.seed_step
    steps = []

    def noted(seed, epoch, step, *words):
        steps.append((epoch, step))
        seed_step(seed, epoch, step, *words)
    monkeypatch.setattr(engine, 'seed_step', noted)

    def criterion(logits, targets):
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return loss * torch.nan if steps[-1] == (0, 5) else loss
    monkeypatch.setattr(recipe, 'make_loss', lambda args, classes: (None, criterion))


def test_a_bad_loss_stops_with_what_replays_it_and_saves_nothing_more(data, bad_step, tmp_path):
    words = [*flags(data, tmp_path, *RUNS['alone'][1])]
    with pytest.raises(NotFinite, match='loss of step 5 of epoch 0 is not finite'):
        run_here(*words)
    assert states(tmp_path / 'checkpoint.pth')['step'] == 4
    record = json.loads((tmp_path / 'bad_step_rank0.json').read_text())
    order = shuffled(96, 1, 0, 0, 0)
    assert record['indices'] == order[40:48].tolist()
    assert (record['epoch'], record['step'], record['rank'], record['seed']) == (0, 5, 0, 0) and record['lr'] > 0


def test_skipping_a_bad_loss_goes_on(data, bad_step, tmp_path, capsys):
    run_here(*flags(data, tmp_path, *RUNS['alone'][1], '--on-nan', 'skip'))
    assert capsys.readouterr().out.count('warning: skipped: the loss of step 5 of epoch 0') == 1
    assert len(read_log(tmp_path)) == 2 and all(np.isfinite(line['train_loss']) for line in read_log(tmp_path))
    assert all(value.isfinite().all() for value in states(tmp_path / 'checkpoint.pth')['model'].values())


# ---------------------------------------------------------------- a full disk

def fill(folder, leave):
    """Take all the space of a disk but `leave` bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with open(folder / 'filler', 'wb') as file:
        file.write(bytes(max(0, free - leave)))


def hidden(folder):
    return [path.name for path in folder.rglob('.*') if path.is_file()]


@pytest.mark.slow
def test_full_disk_while_saving(data, small_disk, tmp_path):
    folder = small_disk(64 << 20)
    words = flags(data, folder, *RUNS['alone'][1])
    run_here(*words)
    size = (folder / 'checkpoint.pth').stat().st_size
    for part in 0.1, 0.5, 0.95:
        fill(folder, int(part * size))
        run = job([*words, '--epochs', 3], output=tmp_path / 'out')
        assert run.wait(60) == [2]
        lines = (tmp_path / 'out').read_text().splitlines()
        assert lines[-1].startswith('error: ') and 'cannot be written' in lines[-1]
        assert not any('Traceback' in line for line in lines)
        assert hidden(folder) == ['.lock']
        checkpoints.load_checkpoint(folder / 'checkpoint.pth')
        (folder / 'filler').unlink()
    run_here(*words, '--epochs', 3)
    assert [line['epoch'] for line in read_log(folder)] == [0, 1, 2]


@pytest.mark.slow
def test_full_disk_while_decoding_and_tokenizing(data, small_disk, tmp_path):
    folder = small_disk(1 << 20)
    codes = np.random.default_rng(0).integers(0, 391, (2000, 64))
    tokens = tmp_path / 'big-token.data.bin.gz'
    write_set(tokens, [codes], len(codes))
    fill(folder, 100_000)
    with pytest.raises(InputError, match='cannot be written .No space left'):
        open_codes(tokens, folder)
    assert not hidden(folder)
    (folder / 'filler').unlink()
    assert np.array_equal(open_codes(tokens, folder), codes)
    words = processes.tokenize_words(['--batch-size', 10], folder / 'tokens')
    fill(folder, 12_000)
    with pytest.raises(InputError, match='cannot be written .No space left'):
        call(tokenize_images, *words)
    assert not [name for name in hidden(folder) if name.endswith('.tmp')]
    (folder / 'filler').unlink()
    call(tokenize_images, *words)  # resumes where it stopped
    call(tokenize_images, *processes.tokenize_words(['--batch-size', 10], tmp_path / 'tokens'))
    assert not processes.tokens_differ(tmp_path / 'tokens', folder / 'tokens')
