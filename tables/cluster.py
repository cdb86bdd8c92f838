"""Rows as SLURM jobs, submitted through submitit; a job waits for those of the rows that its row needs.

A row's folder gets `job.json` with the job's number, and `slurm/` with submitit's files. When the time of a job is up,
or it is pre-empted, its program saves, and the job is queued again.
"""
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fileio.files import read_json, write_text
from tables.rows import ROOT, Row, blocked, is_done, run_rows, take
from utils import InputError, first_line

JOB = 'job.json'
SIGNAL = 'USR1'  # of SLURM, before a job's time is up: programs save on it
REQUEUES = 100  # of a job, at most, for lack of time
ALIVE = {'PENDING', 'RUNNING', 'SUSPENDED', 'REQUEUED', 'RESIZING', 'CONFIGURING', 'COMPLETING'}
UNKNOWN_SECONDS = 300  # so long the accounting may not know a job that was submitted
ONE_TASK = ('nodes', 'tasks_per_node', 'slurm_nodes', 'slurm_tasks_per_node', 'slurm_ntasks_per_node')


class RowJob:
    """What a job does: the commands of a row that are not done.

    Args:
        row: which.
        threads: of its programs.
        folder: from which its paths start.
    """

    def __init__(self, row: Row, threads: int, folder: str):
        self.row = row
        self.threads = threads
        self.folder = folder

    def __call__(self) -> None:
        os.chdir(self.folder)
        asked = []
        before = signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))
        try:
            outcome = run_rows([self.row], 1, self.threads, stopping=lambda: bool(asked))[self.row.name]
        finally:
            signal.signal(signal.SIGUSR1, before)
        if asked and outcome == 'stopped':
            signal.raise_signal(signal.SIGUSR1)  # all is saved: now submitit may queue the job again
        if outcome != 'done':
            raise RuntimeError(f'{self.row.name}: {outcome}')

    def checkpoint(self) -> Any:
        """Called by submitit: what is to run next time."""
        import submitit
        return submitit.helpers.DelayedSubmission(self)


# ---------------------------------------------------------------- submitit

def import_submitit() -> Any:
    """The package, told which signal ends a job. Raises InputError where it is not installed."""
    os.environ['SUBMITIT_PREEMPT_SIGNAL'] = SIGNAL  # for the jobs
    try:
        import submitit
    except ImportError:
        raise InputError('--cluster slurm needs the submitit package: pip install -r requirements-slurm.txt') from None
    submitit.JobEnvironment.USR_SIG = SIGNAL  # here, where it may have been imported before
    return submitit


def parameters_of(words: Iterable[str]) -> dict[str, Any]:
    """The parameters that NAME=VALUE words give, by AutoExecutor's names. Raises InputError."""
    parameters = {}
    for word in words:
        name, equals, text = word.partition('=')
        if not name or not equals:
            raise InputError(f'--slurm {word}: give NAME=VALUE, as in slurm_partition=gpu')
        try:
            parameters[name] = json.loads(text)
        except ValueError:  # a plain word
            parameters[name] = text
    if not {'timeout_min', 'slurm_time'} & parameters.keys():
        raise InputError('--slurm: has no timeout_min; give the minutes that a row may take at a time, as in '
                         'timeout_min=4320')
    for name in ONE_TASK:
        if parameters.get(name, 1) != 1:
            raise InputError(f'--slurm {name}={parameters[name]}: a row is one task, whose program starts the other '
                             'processes; leave it out')
    return parameters


def connect(parameters: dict[str, Any]) -> Any:
    """submitit, where it can submit jobs of these parameters. Raises InputError where it cannot."""
    submitit = import_submitit()
    for program in ('sbatch', 'srun', 'sacct'):
        if shutil.which(program) is None:
            raise InputError(f'--cluster slurm: {program} is not on the path; run this where jobs are submitted from')
    executor_of(submitit, Path('slurm'), parameters)
    return submitit


def executor_of(submitit: Any, folder: Path, parameters: dict[str, Any]) -> Any:
    """submitit's executor, with its files in a folder. Raises InputError for parameters that it does not take."""
    executor = submitit.AutoExecutor(folder, cluster='slurm', slurm_max_num_timeout=REQUEUES)
    try:
        executor.update_parameters(slurm_signal_delay_s=300, **parameters)
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise InputError(f'--slurm: {first_line(error)}') from None
    return executor


# ---------------------------------------------------------------- jobs

def ask_sacct(jobs: Sequence[str]) -> dict[str, str]:
    """The states of jobs, as in 'RUNNING', by number; those that the accounting does not know are left out.

    Raises:
        InputError: when it cannot be asked: jobs that run might be submitted twice.
    """
    if not jobs:
        return {}
    command = ['sacct', '-X', '-n', '-P', '-o', 'JobID,State', '-j', ','.join(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, errors='backslashreplace')
    if done.returncode:
        raise InputError(f'sacct ended with code {done.returncode} ({" ".join(done.stderr.split())[:200]}), so nobody '
                         'knows which rows run; try again')
    lines = [line.split('|') for line in done.stdout.splitlines() if '|' in line]
    return {job: state.split()[0] for job, state, *_ in lines if state}


def submit_rows(rows: Sequence[Row], words: Sequence[str], threads: int,
                before: dict[str, str] | None = None) -> dict[str, str]:
    """Submit what neither is done nor waits or runs of some rows, and wait for nothing.

    Args:
        rows: those that a row needs come before it.
        words: of --slurm.
        threads: of each row's programs.
        before: what became of rows in an earlier call, which are not submitted again.

    Returns:
        What became of each row, by name: 'done', 'queued', or why it cannot be submitted.

    Raises:
        InputError: when SLURM or its accounting cannot be asked.
    """
    parameters = parameters_of(words)
    submitit = connect(parameters)
    # the jobs import this module, from whatever folder and with PYTHONSAFEPATH
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    jobs = {row.name: read_json(row.folder / JOB) for row in rows if (row.folder / JOB).exists()}
    states = ask_sacct([job['job'] for job in jobs.values()])
    outcomes = dict(before or {})
    for row in rows:
        if row.name in outcomes:
            continue
        if is_done(row):
            outcomes[row.name] = 'done'
            continue
        state = state_of(jobs.get(row.name), states)
        if state in ALIVE:
            outcomes[row.name] = 'queued'
            print(f'{row.name}: job {jobs[row.name]["job"]} is {state.lower()}', flush=True)
            continue
        outcome = blocked(row, outcomes)
        if outcome not in (None, 'queued'):
            outcomes[row.name] = outcome
            continue
        waits_for = [jobs[name]['job'] for name in row.after if outcomes.get(name) == 'queued']
        try:
            jobs[row.name] = submit(submitit, row, parameters, waits_for, threads)
        except InputError as error:
            outcomes[row.name] = str(error)
            continue
        outcomes[row.name] = 'queued'
        again = f', which was {state.lower()}, again' if state else ''
        print(f'{row.name}: submitted as job {jobs[row.name]["job"]}{again}', flush=True)
    return outcomes


def state_of(job: dict[str, Any] | None, states: dict[str, str]) -> str:
    """The state of a row's last job; '' where it has none, or none that the accounting still knows."""
    if job is None:
        return ''
    if job['job'] not in states and time.time() - job['submitted'] < UNKNOWN_SECONDS:
        return 'PENDING'
    return states.get(job['job'], '')


def submit(submitit: Any, row: Row, parameters: dict[str, Any], waits_for: Sequence[str],
           threads: int) -> dict[str, Any]:
    """Submit a row, after other jobs; returns what JOB holds. Raises InputError."""
    lock = take(row)
    if lock is None:
        raise InputError(f'{row.folder}: another process is at work there; try again when it has ended')
    with lock:
        own = {'name': row.name.replace('/', '.')} | parameters
        if waits_for:  # a job whose dependency failed would wait for ever
            own['slurm_additional_parameters'] = {**parameters.get('slurm_additional_parameters', {}), 'dependency':
                                                  f'afterok:{":".join(waits_for)}', 'kill-on-invalid-dep': 'yes'}
        executor = executor_of(submitit, row.folder / 'slurm', own)
        try:
            job = executor.submit(RowJob(row, threads, os.getcwd()))
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise InputError(f'{row.name}: sbatch does not take it ({" ".join(str(error).split())[-200:]})') from None
        state = {'job': job.job_id, 'submitted': round(time.time())}
        write_text(row.folder / JOB, json.dumps(state) + '\n')
    return state
