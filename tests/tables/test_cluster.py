"""tables/cluster.py: rows as jobs, with stand-ins for SLURM's programs that really run them."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import call, fails, smooth_images
from tables import choose_images, cluster, make, rows
from tables.rows import Row

pytest.importorskip('submitit')
WORDS = ['timeout_min=60', 'slurm_partition=gpu', 'gpus_per_node=8']

# A job is a folder in $SLURM_FAKE: its script, its state, and the number of the process group that runs it.
SLURM = """#!{python}
import os, re, signal, subprocess, sys, time
from pathlib import Path
home = Path(os.environ['SLURM_FAKE'])
name = Path(sys.argv[0]).name
words = sys.argv[1:]

def state(job, new=None):
    path = home / job / 'state'
    if new:
        (home / job / 'new').write_text(new)
        (home / job / 'new').rename(path)
    return path.read_text() if path.exists() else None

if name == 'sbatch':
    job = str(len(list(home.iterdir())) + 100)
    (home / job).mkdir()
    (home / job / 'script').write_text(Path(words[0]).read_text())
    state(job, 'PENDING')
    subprocess.Popen([sys.executable, __file__.replace('sbatch', 'slurmctld'), job], start_new_session=True,
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print('Submitted batch job ' + job)
elif name == 'slurmctld':  # one for a job
    job, = words
    script = (home / job / 'script').read_text()
    options = dict(re.findall(r'^#SBATCH --([\\w-]+)=(.*)$', script, re.M))
    kind, _, others = options.get('dependency', ':').partition(':')
    assert kind in ('', 'afterok') and (not kind or options['kill-on-invalid-dep'] == 'yes')
    for other in filter(None, others.split(':')):
        while state(other) in ('PENDING', 'RUNNING'):
            time.sleep(0.05)
        if state(other) != 'COMPLETED':
            state(job, 'CANCELLED by 0')
    while state(job) == 'PENDING' and (home / 'hold').exists():
        time.sleep(0.05)
    if state(job) == 'PENDING':
        env = dict(os.environ, SLURM_JOB_ID=job, SLURM_JOBID=job, SLURM_NTASKS='1', SLURM_JOB_NUM_NODES='1',
                   SLURM_PROCID='0', SLURM_LOCALID='0', SLURM_NODEID='0', SLURM_JOB_NODELIST='localhost')
        process = subprocess.Popen(['bash', str(home / job / 'script')], env=env, start_new_session=True)
        (home / job / 'group').write_text(str(process.pid))
        state(job, 'RUNNING')
        code = process.wait()
        (home / job / 'ended').write_text('')
        if state(job) == 'RUNNING':
            state(job, 'FAILED' if code else 'COMPLETED')
elif name == 'srun':
    while words and words[0].startswith('-'):
        option = words.pop(0)
        if option in ('--output', '--error') and words:
            sys.stdout.flush()
            handle = os.open(words.pop(0).replace('%t', '0').replace('%j', os.environ['SLURM_JOB_ID']),
                             os.O_WRONLY | os.O_CREAT)
            os.dup2(handle, 1 if option == '--output' else 2)
    os.execvp(words[0], words)
elif name == 'sacct':
    assert words[:-1] == ['-X', '-n', '-P', '-o', 'JobID,State', '-j'], words
    for job in words[-1].split(','):
        if state(job):
            print(job + '|' + state(job))
elif name == 'scancel':
    job, = words
    state(job, 'CANCELLED by 0')
    if (home / job / 'group').exists() and not (home / job / 'ended').exists():
        os.killpg(int((home / job / 'group').read_text()), signal.SIGTERM)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The stand-ins on the path, and the folder of their jobs."""
    programs, jobs = tmp_path / 'bin', tmp_path / 'jobs'
    programs.mkdir()
    jobs.mkdir()
    for name in ('sbatch', 'srun', 'sacct', 'scancel', 'slurmctld'):
        (programs / name).write_text(SLURM.replace('{python}', sys.executable))
        (programs / name).chmod(0o755)
    for name in [name for name in os.environ if name.startswith(('SLURM_', 'SUBMITIT_'))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('PATH', f'{programs}:{os.environ["PATH"]}')
    monkeypatch.setenv('SLURM_FAKE', str(jobs))
    monkeypatch.setenv('PYTHONPATH', '')
    monkeypatch.setenv('SUBMITIT_PREEMPT_SIGNAL', 'USR1')
    yield jobs
    for job in jobs.glob('[0-9]*'):
        subprocess.run(['scancel', job.name], check=False)


def stub(folder, name, text):
    (folder / f'{name}.py').write_text(text)
    return str(folder / f'{name}.py')


def job_of(row):
    return json.loads((row.folder / cluster.JOB).read_text())['job']


def settle(jobs, seconds=120):
    """Wait until no job waits or runs; returns their states by number."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = {job.name: (job / 'state').read_text().split()[0] for job in jobs.glob('[0-9]*')}
        if not set(states.values()) & cluster.ALIVE:
            return states
        time.sleep(0.1)
    raise AssertionError(states)


@pytest.mark.slow
def test_rows_are_jobs_after_one_another(tmp_path, slurm, monkeypatch, capsys):
    """One fails, one is cancelled while it runs: the same command submits these and what needs them, and no other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONSAFEPATH', '1')
    good = stub(tmp_path, 'good', 'import os, sys\nprint(os.environ["OMP_NUM_THREADS"], *sys.argv[1:])')
    bad = stub(tmp_path, 'bad', 'import sys\nsys.exit("error: two")')
    long = stub(tmp_path, 'long', 'import time\nprint("begun", flush=True)\ntime.sleep(600)')
    out = tmp_path / 'out'
    table = [Row('good', out / 'good', ((good, 'a'), (good, 'b'))),
             Row('bad', out / 'bad', ((good,), (bad,))), Row('long', out / 'long', ((long,),)),
             Row('after/bad', out / 'after' / 'bad', ((good, 'd'),), ('good', 'bad')),
             Row('after/long', out / 'after' / 'long', ((good, 'e'),), ('long',))]
    assert cluster.submit_rows(table, WORDS, 3) == {row.name: 'queued' for row in table}
    ids = {row.name: job_of(row) for row in table}
    script = (slurm / ids['after/bad'] / 'script').read_text()
    assert {f'#SBATCH --dependency=afterok:{ids["good"]}:{ids["bad"]}', '#SBATCH --kill-on-invalid-dep=yes',
            '#SBATCH --partition=gpu', '#SBATCH --gpus-per-node=8', '#SBATCH --job-name=after.bad',
            '#SBATCH --signal=USR1@300', '#SBATCH --time=60'} <= set(script.splitlines())
    while not (out / 'long' / rows.OUTPUT).exists() or not (out / 'long' / rows.OUTPUT).read_text():
        time.sleep(0.05)
    capsys.readouterr()
    assert cluster.submit_rows([table[2], table[4]], WORDS, 3) == {'long': 'queued', 'after/long': 'queued'}
    assert f'long: job {ids["long"]} is running\nafter/long: job {ids["after/long"]} is pending\n' in (
        capsys.readouterr().out)
    subprocess.run(['scancel', ids['long']], check=True)
    states = settle(slurm)
    while (lock := rows.take(table[2])) is None:  # its process may still be ending
        time.sleep(0.05)
    lock.close()
    assert {name: states[job] for name, job in ids.items()} == {
        'good': 'COMPLETED', 'bad': 'FAILED', 'long': 'CANCELLED', 'after/bad': 'CANCELLED', 'after/long': 'CANCELLED'}
    assert (out / 'good' / rows.OUTPUT).read_text() == '3 a\n3 b\n' and rows.is_done(table[0])
    assert not (out / 'after' / 'bad' / rows.OUTPUT).exists()

    stub(tmp_path, 'bad', 'print("mended")')
    stub(tmp_path, 'long', 'print("short")')
    assert cluster.submit_rows(table, WORDS, 3) == {row.name: 'queued' for row in table} | {'good': 'done'}
    assert f'bad: submitted as job {job_of(table[1])}, which was failed, again\n' in capsys.readouterr().out
    assert len(list(slurm.iterdir())) == 9
    script = (slurm / job_of(table[3]) / 'script').read_text()
    assert f'afterok:{job_of(table[1])}\n' in script  # and no job that is done
    settle(slurm)
    assert (out / 'bad' / rows.OUTPUT).read_text() == '3\nerror: two\nmended\n'  # from its second command on
    assert (out / 'after' / 'bad' / rows.OUTPUT).read_text() == '3 d\n'
    assert set(cluster.submit_rows(table, WORDS, 3).values()) == {'done'} and len(list(slurm.iterdir())) == 9


@pytest.mark.slow
def test_the_time_of_a_job_is_up(tmp_path, slurm, monkeypatch):
    """SLURM's signal lets the program save; then the job is queued again, and goes on where it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bin' / 'scontrol').write_text('#!/bin/sh\necho "$@" > "$0.new"; mv "$0.new" "$SLURM_FAKE/requeued"\n')
    (tmp_path / 'bin' / 'scontrol').chmod(0o755)
    program = stub(tmp_path, 'saves', 'import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (print('
                   '"saved", flush=True), sys.exit(75)))\nprint("begun", flush=True)\ntime.sleep(600)')
    row = Row('a', tmp_path / 'out' / 'a', ((program,),))
    assert cluster.submit_rows([row], WORDS, 1) == {'a': 'queued'}
    while not (row.folder / rows.OUTPUT).exists() or not (row.folder / rows.OUTPUT).read_text():
        time.sleep(0.05)
    group = int((slurm / job_of(row) / 'group').read_text())
    for process in processes_of(group):
        if 'submitit' in (process / 'cmdline').read_text():
            os.kill(int(process.name), signal.SIGUSR1)
    end = time.monotonic() + 60
    while not (slurm / 'requeued').exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert (slurm / 'requeued').read_text() == f'requeue {job_of(row)}\n'
    assert (row.folder / rows.OUTPUT).read_text() == 'begun\nsaved\n'


def processes_of(group):
    """The /proc folders of the processes of a session."""
    found = []
    for path in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (path / 'stat').read_text().rpartition(')')[2].split()[3] == str(group):
                found.append(path)
    return found


@pytest.mark.slow
def test_a_table_on_slurm(tmp_path, slurm, monkeypatch, capsys):
    """The program submits all and ends; given again, it reports what is done."""
    smooth_images(tmp_path / 'data' / 'train')
    smooth_images(tmp_path / 'data' / 'val', 5)
    monkeypatch.chdir(tmp_path)
    words = ['storage', '--data-path', 'data', '--output-dir', 'out', '--classes', 3, '--rows', 'tokens patch-8x8',
             '--cluster', 'slurm', '--slurm', *WORDS]
    (slurm / 'hold').write_text('')
    assert call(make, *words) == 0
    text = capsys.readouterr().out
    assert 'chosen: submitted as job 101\n' in text and 'train/tokens-patch-8x8/lr-0.0005-seed-0: submitted' in text
    found = make.rows_of('storage', make.parse_args(list(map(str, words))))
    row = next(row for row in found if row.name == 'chosen')
    needed = [row, *(row for row in found if row.name.startswith(('tokens/', 'train/')))]
    subprocess.run(['scancel', job_of(row)], check=True)
    (slurm / 'hold').unlink()
    states = settle(slurm)
    assert [states[job_of(row)] for row in needed] == ['CANCELLED'] * 3  # what needs it is not run
    for command in row.commands:
        call(choose_images, *command[1:])
    (slurm / 'hold').write_text('')
    assert call(make, *words) == 0
    assert 'chosen: ' not in capsys.readouterr().out  # which was done by hand


def test_mistakes_are_one_line(tmp_path, slurm, monkeypatch):
    words = ['storage', '--data-path', tmp_path, '--output-dir', tmp_path / 'out', '--cluster', 'slurm']
    for slurm_words, message in (
            ([], 'has no timeout_min; give the minutes'), (['timeout_min'], '--slurm timeout_min: give NAME=VALUE'),
            (['timeout_min=60', 'slurm_partitoin=x'], "--slurm: Unknown argument 'partitoin' for executor 'slurm'"),
            (['timeout_min=60', 'gpus=8'], "--slurm: .*'gpus'"), (['timeout_min=1h'], 'expected type'),
            (['timeout_min=60', 'tasks_per_node=8'], 'tasks_per_node=8: a row is one task')):
        fails(lambda slurm_words=slurm_words: call(make, *words, *(['--slurm', *slurm_words] if slurm_words else ())),
              message)
    words += ['--slurm', *WORDS]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'submitit', None)
        fails(lambda: call(make, *words), 'needs the submitit package: pip install -r requirements-slurm.txt')
    row = Row('a', tmp_path / 'out' / 'a', (('x.py',),))
    (tmp_path / 'bin' / 'sbatch').write_text('#!/bin/sh\necho "sbatch: error: invalid partition" >&2\nexit 1\n')
    assert 'sbatch does not take it (' in cluster.submit_rows([row], WORDS, 1)['a']
    assert not (row.folder / cluster.JOB).exists()
    (row.folder / cluster.JOB).write_text('{"job": "7", "submitted": 0}')
    (tmp_path / 'bin' / 'sacct').write_text('#!/bin/sh\necho "no database" >&2\nexit 1\n')
    fails(lambda: cluster.submit_rows([row], WORDS, 1), r'sacct ended with code 1 \(no database\)')
    (tmp_path / 'bin' / 'sbatch').unlink()
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
    fails(lambda: call(make, *words), 'sbatch is not on the path')


def test_a_job_that_the_accounting_does_not_know_yet_waits():
    now = time.time()
    assert cluster.state_of({'job': '7', 'submitted': now}, {}) == 'PENDING'
    assert cluster.state_of({'job': '7', 'submitted': now - 1000}, {}) == ''
    assert cluster.state_of({'job': '7', 'submitted': now}, {'7': 'FAILED'}) == 'FAILED'
    assert cluster.state_of(None, {}) == ''
