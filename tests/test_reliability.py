"""Runs that are killed, stopped, starved of disk or given damaged files: nothing is lost, and what goes on is exact."""
import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import checkpoints
import main_seit
import token_dataset
import tokenize_images
import torture
import utils
from conftest import ROOT
from test_main_seit import SMALL, make_data, read_log, run_here, states
from utils import InputError


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'), n=96)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """As in the processes that are started here: on a CPU, rounding depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flags(data, folder, *more):
    """A command line of 12 steps an epoch, two epochs."""
    return [*SMALL, *data, '--epochs', 2, '--drop-path', 0.3, '--warmup-epochs', 0, '--dist-eval', '--save-every', 2,
            '--output-dir', folder, '--resume', 'auto', *more]


def job(words, size=1, output=os.devnull):
    return torture.Job('main_seit', words, size, output)


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
    assert not torture.training_differs(whole(name), tmp_path)


def checkpoint_time(folder):
    with contextlib.suppress(FileNotFoundError):
        return (folder / 'checkpoint.pth').stat().st_mtime_ns


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on_exactly(data, whole, number, tmp_path):
    words = flags(data, tmp_path, *RUNS['two'][1])
    run = job(words, 2, tmp_path / 'out')
    wait_for((tmp_path / 'checkpoint.pth').exists)
    run.signal(number, rank=1)
    assert run.wait(60) == [checkpoints.REQUEUE] * 2
    assert '--resume auto continues there' in (tmp_path / 'out').read_text()
    assert states(tmp_path / 'checkpoint.pth')['step'] > 0
    assert job(words, 2, tmp_path / 'out').wait() == [0, 0]
    assert not torture.training_differs(whole('two'), tmp_path)


def test_the_second_signal_stops_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, '_exit', codes.append)
    with checkpoints.StopSignal() as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)  # a launcher's copy of the same request
        assert stop.received and not codes
        stop.since -= 2
        signal.raise_signal(signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stop_before_the_first_checkpoint_and_with_minutes(data, tmp_path):
    words = flags(data, tmp_path, '--save-every', '60m')
    run = job(words, output=tmp_path / 'out')
    wait_for((tmp_path / 'log.txt').exists)
    run.signal(signal.SIGTERM)
    assert run.wait(60) in ([checkpoints.REQUEUE], [-signal.SIGTERM])


def test_torchrun_restarts_by_itself_after_a_rank_died(data, whole, tmp_path):
    words = [str(word) for word in flags(data, tmp_path, *RUNS['two'][1])]
    launcher = torture.torchrun(['--nproc-per-node=2', '--max-restarts=1', f'--master-port={torture.free_port()}'],
                                words, tmp_path / 'out')
    try:
        wait_for((tmp_path / 'checkpoint.pth').exists, 120)
        os.kill(torture.workers(launcher)[1], signal.SIGKILL)
        assert launcher.wait(120) == 0, (tmp_path / 'out').read_text()
    finally:
        torture.kill_all(launcher)
    assert 'continuing at epoch' in (tmp_path / 'out').read_text()
    assert not torture.training_differs(whole('two'), tmp_path)


# ---------------------------------------------------------------- damaged files

@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of a finished run of one process."""
    folder = tmp_path / 'run'
    folder.mkdir()
    for path in whole('alone').iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b'')


@pytest.mark.parametrize('damage', [truncate, flip, empty])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(data, whole, stopped, damage, capsys):
    damage(stopped / 'checkpoint.pth')
    run_here(*flags(data, stopped, *RUNS['alone'][1]))
    output = capsys.readouterr().out
    assert 'warning: ' in output and 'checkpoint.pth' in output and 'taking the one before it' in output
    assert 'checkpoint_previous.pth: continuing at epoch 1, step 10' in output
    assert not torture.training_differs(whole('alone'), stopped)


def test_two_damaged_checkpoints_are_an_error(data, stopped):
    truncate(stopped / 'checkpoint.pth'), empty(stopped / 'checkpoint_previous.pth')
    with pytest.raises(InputError, match='checkpoint_previous.pth: ') as error:
        run_here(*flags(data, stopped, *RUNS['alone'][1]))
    assert '\n' not in str(error.value)


def test_a_half_line_and_a_repeated_epoch_leave_the_log(data, stopped, whole):
    os.replace(stopped / 'checkpoint_previous.pth', stopped / 'checkpoint.pth')  # of the last epoch's step 10
    with open(stopped / 'log.txt', 'a') as file:
        file.write('{"epoch": 1, "train_loss": 9}\n{"epo')
    run_here(*flags(data, stopped, *RUNS['alone'][1]))
    assert torture.log_lines(stopped) == torture.log_lines(whole('alone'))


def test_what_a_killed_run_left_is_removed(data, stopped):
    names = '..checkpoint.pth.new.abc.tmp', '.best_checkpoint.pth.abc.tmp', '.checkpoint.pth.new'
    for name in names:
        (stopped / name).write_bytes(b'half')
    run_here(*flags(data, stopped, *RUNS['alone'][1]))
    assert not [name for name in names if (stopped / name).exists()]


# ---------------------------------------------------------------- another number of processes

def test_another_world_size_is_refused_or_allowed_with_a_warning(data, stopped, tmp_path):
    os.replace(stopped / 'checkpoint_previous.pth', stopped / 'checkpoint.pth')
    words = flags(data, stopped, *RUNS['alone'][1])
    assert job(words, 2, tmp_path / 'out').wait() == [2, 2]
    line, = (line for line in (tmp_path / 'out').read_text().splitlines() if 'error' in line)
    assert 'world_size 1 -> 2' in line and '--allow-inexact-resume' in line
    assert job([*words, '--allow-inexact-resume'], 2, tmp_path / 'out').wait() == [0, 0]
    output = (tmp_path / 'out').read_text()
    assert 'warning: ' in output and 'no longer those of the uninterrupted run' in output
    assert 'continuing at epoch 1, step 5' in output  # as many images as 10 steps alone
    assert [line['epoch'] for line in read_log(stopped)] == [0, 1]


@pytest.mark.parametrize('more', [['--seed', 1], ['--batch-size', 4], ['--accum-iter', 2], ['--repeated-aug']])
def test_other_flags_that_change_the_run_are_refused(data, stopped, more):
    with pytest.raises(InputError, match='--allow-inexact-resume'):
        run_here(*flags(data, stopped, *RUNS['alone'][1], *more))


# ---------------------------------------------------------------- losses that are not finite

@pytest.fixture
def bad_step(monkeypatch):
    """The loss of step 5 of epoch 0 is not a number."""
    seed = main_seit.train_one_epoch.__globals__['seed_step']
    now = []
    monkeypatch.setitem(main_seit.train_one_epoch.__globals__, 'seed_step',
                        lambda *words: now.append(words[1:3]) or seed(*words))

    class Criterion(torch.nn.Module):
        def forward(self, logits, targets):
            loss = torch.nn.functional.cross_entropy(logits, targets)
            return loss * torch.nan if now[-1] == (0, 5) else loss
    monkeypatch.setattr(main_seit, 'make_loss', lambda args, classes: (None, Criterion()))


def test_a_bad_loss_stops_with_what_replays_it_and_saves_nothing_more(data, bad_step, tmp_path):
    words = [*flags(data, tmp_path, *RUNS['alone'][1])]
    with pytest.raises(InputError, match='loss of step 5 of epoch 0 is not finite'):
        run_here(*words)
    assert states(tmp_path / 'checkpoint.pth')['step'] == 4
    record = json.loads((tmp_path / 'bad_step_rank0.json').read_text())
    order = main_seit.shuffled(96, 1, 0, 0, 0)
    assert record['indices'] == order[40:48].tolist()
    assert (record['epoch'], record['step'], record['rank'], record['seed']) == (0, 5, 0, 0) and record['lr'] > 0


def test_skipping_a_bad_loss_goes_on(data, bad_step, tmp_path, capsys):
    run_here(*flags(data, tmp_path, *RUNS['alone'][1], '--on-nan', 'skip'))
    assert capsys.readouterr().out.count('warning: skipped: the loss of step 5 of epoch 0') == 1
    assert len(read_log(tmp_path)) == 2 and all(np.isfinite(line['train_loss']) for line in read_log(tmp_path))
    assert all(value.isfinite().all() for value in states(tmp_path / 'checkpoint.pth')['model'].values())


# ---------------------------------------------------------------- a full disk

@pytest.fixture
def small_disk(tmp_path):
    """A function of bytes: a folder on a disk of that size."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = []

    def make(size):
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], capture_output=True)
        if done.returncode == 0:
            mounted.append(folder)
            print('full disk: a tmpfs')
            return folder
        pytest.skip('no rights to mount a tmpfs; the writes that fail below run instead')
    yield make
    if mounted:
        subprocess.run(['umount', '-l', folder], check=True)


def fill(folder, leave):
    """Take all the space of a disk but `leave` bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with open(folder / 'filler', 'wb') as file:
        file.write(bytes(max(0, free - leave)))


def hidden(folder):
    return [path.name for path in folder.rglob('.*') if path.is_file()]


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
        assert not hidden(folder)
        checkpoints.load_checkpoint(folder / 'checkpoint.pth')
        (folder / 'filler').unlink()
    run_here(*words, '--epochs', 3)
    assert [line['epoch'] for line in read_log(folder)] == [0, 1, 2]


def test_full_disk_while_decoding_and_tokenising(data, small_disk, tmp_path):
    folder = small_disk(1 << 20)
    codes = np.random.default_rng(0).integers(0, 391, (2000, 64))
    tokens, labels = tmp_path / 'big-token.data.bin.gz', tmp_path / 'big-label.txt'
    token_dataset.write_tokens(tokens, labels, codes, np.zeros(len(codes), int))
    fill(folder, 100_000)
    with pytest.raises(InputError, match='cannot be written .No space left'):
        token_dataset.open_codes(tokens, folder)
    assert not hidden(folder)
    (folder / 'filler').unlink()
    assert np.array_equal(token_dataset.open_codes(tokens, folder), codes)
    words = torture.tokenise_words(['--batch-size', 10], folder / 'tokens')
    fill(folder, 12_000)
    with pytest.raises(InputError, match='cannot be written .No space left'):
        tokenise(words)
    assert not [name for name in hidden(folder) if name.endswith('.tmp')]
    (folder / 'filler').unlink()
    tokenise(words)  # goes on where it stopped
    tokenise(torture.tokenise_words(['--batch-size', 10], tmp_path / 'tokens'))
    assert not torture.tokens_differ(tmp_path / 'tokens', folder / 'tokens')


def tokenise(words):
    tokenize_images.main(tokenize_images.get_args_parser().parse_args([str(word) for word in words]))


@contextlib.contextmanager
def no_space(limit):
    """Files cannot grow beyond `limit` bytes: without rights to mount a disk, writes fail in the same places."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize('limit', [0, 1000, 50_000])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, limit):
    print('full disk: RLIMIT_FSIZE')
    path = tmp_path / 'file.pth'
    utils.save_torch({'weights': torch.zeros(10)}, path)
    before = path.read_bytes()
    with no_space(limit), pytest.raises(InputError, match='file.pth: cannot be written') as error:
        utils.save_torch({'weights': torch.zeros(100_000)}, path)
    assert '\n' not in str(error.value) and path.read_bytes() == before and os.listdir(tmp_path) == ['file.pth']


def test_a_log_line_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    log = utils.RunLog(tmp_path / 'log.txt')

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(InputError, match='log.txt: cannot be written .No space left'):
        log.write(epoch=0)


# ---------------------------------------------------------------- clusters

def sbatch(folder, code, *words):
    """Run the batch script with a srun that ends with `code`; returns what srun and scontrol were given."""
    calls = folder / 'calls'
    for name, end in ('srun', code), ('scontrol', 0):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\nexit {end}\n')
        (folder / name).chmod(0o755)
    env = {**os.environ, 'PATH': f'{folder}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '17', 'SLURM_SUBMIT_DIR': str(ROOT)}
    done = subprocess.run(['bash', ROOT / 'scripts' / 'slurm_train.sbatch', *words], env=env, capture_output=True)
    return done.returncode, calls.read_text().splitlines()


def test_the_batch_script_requeues_on_75_alone(tmp_path):
    script = ROOT / 'scripts' / 'slurm_train.sbatch'
    assert subprocess.run(['bash', '-n', script]).returncode == 0
    assert '#SBATCH --signal=USR1@' in script.read_text()
    code, calls = sbatch(tmp_path, checkpoints.REQUEUE, '--output-dir', 'a b')
    assert calls[0].endswith('main_seit.py --save-every 30m --output-dir a b --resume auto')
    assert (code, calls[1:]) == (0, ['scontrol requeue 17'])
    (tmp_path / 'calls').unlink()
    code, calls = sbatch(tmp_path, 1)
    assert code == 1 and len(calls) == 1


def test_submitit_is_optional_and_its_arguments_are_checked(monkeypatch):
    import run_with_submitit
    monkeypatch.setitem(sys.modules, 'submitit', None)
    own, words = run_with_submitit.split_words(['--nodes', '2', '--hours', '1.5', '--', '--output_dir', 'x'])
    assert (own.nodes, own.hours, words) == (2, 1.5, ['--output_dir', 'x'])
    with pytest.raises(InputError, match='pip install submitit'):
        run_with_submitit.main(own, words)
    parameters = run_with_submitit.slurm_parameters(own)
    assert parameters['nodes'] == 2 and parameters['tasks_per_node'] == own.gpus and parameters['timeout_min'] == 90
    with pytest.raises(InputError, match='--output-dir'):
        run_with_submitit.main(own, ['--epochs', '3'])


def test_submitit_gets_the_signal_back_once_all_is_saved(monkeypatch, tmp_path):
    import run_with_submitit
    seen = []

    def stopped(args):
        assert args.resume == 'auto'
        sys.exit(checkpoints.REQUEUE)
    monkeypatch.setattr(main_seit, 'main', stopped)
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append('requeue'))
    try:
        run_with_submitit.Training(['--output-dir', str(tmp_path), '--device', 'cpu'])()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == ['requeue']
