"""Rows of a table: programs run in turn in a folder for each row; a row that is done is not repeated."""
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fileio.files import check_same, read_bytes, read_json, write_text
from training.preemption import REQUEUE
from training.run_folder import LOG
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
MAX_LOG_BYTES = 1 << 26  # of a program's output
ROW = 'row.json'  # in a row's folder: its commands
DONE = 'done.json'  # how many of them are done
OUTPUT = 'output.txt'  # what they print
LAUNCHER = 'torchrun'  # the first word of a command on several processes; its flags follow, then the program

Command = tuple[str, ...]  # a program's path from the root, and its words


@dataclass(frozen=True)
class Program:
    """A command to run.

    Attributes:
        name: of its own.
        command: program and words.
        log: file to which its output is appended.
        after: names of programs that must have ended well before; those that are not among the others have.
    """
    name: str
    command: Command
    log: Path
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """Commands that run one after another, and the folder that is theirs.

    Attributes:
        name: of its own.
        folder: holds ROW, DONE and OUTPUT, and what the commands write.
        commands: the same words mean the same result.
        after: names of rows that must be done before.
    """
    name: str
    folder: Path
    commands: tuple[Command, ...]
    after: tuple[str, ...] = ()


# ---------------------------------------------------------------- programs

def argument_list(command: Command) -> list[str]:
    """The words with which to start a command from any folder."""
    words = [str(word) for word in command]
    start = [sys.executable]
    if words[0] == LAUNCHER:
        at = next(i for i, word in enumerate(words) if word.endswith('.py'))
        start += ['-m', 'torch.distributed.run', *words[1:at]]
        words = words[at:]
    return [*start, str(ROOT / words[0]), *words[1:]]


def shell_line(command: Command) -> str:
    """A command as one types it in this folder."""
    words = [str(word) for word in command]
    at = next(i for i, word in enumerate(words) if word.endswith('.py'))
    start = words[:at] or ['python']
    return shlex.join([*start, os.path.relpath(ROOT / words[at]), *words[at + 1:]])


def last_line(log: Path) -> str:
    """The last line with text of a program's output, without 'error: '."""
    lines = read_bytes(log, MAX_LOG_BYTES).decode(errors='replace').split('\n')
    return next((line for line in reversed(lines) if line.strip()), '').removeprefix('error: ')


def why_failed(program: Program, code: int) -> str:
    """One line about a program that ended with this exit code."""
    name = next(str(word) for word in program.command if str(word).endswith('.py'))
    return f'{name} ended with code {code} ({last_line(program.log)[:300]}); see {program.log}'


def run_programs(programs: Sequence[Program], jobs: int, threads: int,
                 ended: Callable[[Program, int], None] = lambda program, code: None,
                 stopping: Callable[[], bool] = lambda: False) -> dict[str, int]:
    """Run programs, some at a time. One that fails does not stop those that do not depend on it.

    Args:
        programs: in the order in which they start.
        jobs: how many run at a time.
        threads: of each.
        ended: called with each that ended, and its exit code.
        stopping: asked while waiting; once it is true, those that run get SIGTERM, and no more are started.

    Returns:
        The exit codes of those that were started, by name.
    """
    waiting = list(programs)
    running = {}
    codes = {}
    stopped = False
    env = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
    try:
        while waiting or running:
            if stopping() and not stopped:
                stopped = True
                waiting = []
                for process in running.values():
                    process.terminate()
            open_names = {program.name for program in [*waiting, *running]}
            ready = [program for program in waiting if not open_names & set(program.after)]
            if ready and len(running) < jobs:
                program = ready[0]
                waiting.remove(program)
                if all(codes.get(name, 0) == 0 for name in program.after):
                    running[program] = start(program, env)
                else:
                    codes[program.name] = None  # so that those after it do not start either
                continue
            over = [program for program, process in running.items() if process.poll() is not None]
            for program in over:
                codes[program.name] = running.pop(program).returncode
                ended(program, codes[program.name])
            if not over:
                time.sleep(0.1)
    finally:
        for process in running.values():  # this program was interrupted
            process.terminate()
        for process in running.values():
            process.wait()
    return {name: code for name, code in codes.items() if code is not None}


def start(program: Program, env: dict[str, str]) -> subprocess.Popen:
    """Start a program in the environment `env`."""
    program.log.parent.mkdir(parents=True, exist_ok=True)
    with open(program.log, 'ab') as file:
        return subprocess.Popen(argument_list(program.command), env=env, stdin=subprocess.DEVNULL, stdout=file,
                                stderr=subprocess.STDOUT)


# ---------------------------------------------------------------- rows

def take(row: Row) -> int:
    """Take a row's folder for it; returns how many of its commands are done.

    Raises:
        InputError: when the folder holds another row's run, or something else.
    """
    if not (row.folder / ROW).exists() and row.folder.is_dir() and any(row.folder.iterdir()):
        raise InputError(f'{row.folder}: holds files, but no {ROW} that says of which row; choose another '
                         '--output-dir, or remove that folder')
    try:
        row.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'{row.folder}: cannot be made ({error.strerror}); choose another --output-dir') from None
    check_same(row.folder / ROW, definition_of(row))
    path = row.folder / DONE
    done = read_json(path) if path.exists() else 0
    if type(done) is not int or not 0 <= done <= len(row.commands):
        raise InputError(f'{path}: is damaged; remove {row.folder}, and it is made again')
    return done


def definition_of(row: Row) -> dict[str, list[str]]:
    """What ROW says of a row."""
    return {f'command {number}': list(map(str, command)) for number, command in enumerate(row.commands, 1)}


def is_done(row: Row) -> bool:
    """Whether a row's folder holds this row, and all its commands are done."""
    files = row.folder / ROW, row.folder / DONE
    return all(path.exists() for path in files) and [read_json(path) for path in files] == [
        definition_of(row), len(row.commands)]


def run_rows(rows: Sequence[Row], jobs: int, threads: int, before: dict[str, str] | None = None,
             stopping: Callable[[], bool] = lambda: False) -> dict[str, str]:
    """Run what is not done of some rows, each after those that it needs.

    Args:
        rows: those that a row needs come before it.
        jobs, threads, stopping: see `run_programs`.
        before: what became of rows in an earlier call: those that failed are not tried again.

    Returns:
        What became of each row, now or before, by name: 'done', 'stopped' (by a signal: the same command resumes it),
        or why it failed.
    """
    rows_by_name = {row.name: row for row in rows}
    outcomes = dict(before or {})
    programs = []
    for row in rows:
        if outcomes.get(row.name, 'done') != 'done':
            continue
        failed = next((name for name in row.after if outcomes.get(name, 'done') != 'done'), None)
        try:
            done = take(row)
        except InputError as error:
            outcomes[row.name] = str(error)
            continue
        if failed:
            outcomes[row.name] = f'needs {failed}, which failed'
            continue
        outcomes[row.name] = 'done'
        after = tuple(f'{name}#{len(rows_by_name[name].commands)}' for name in row.after)
        for number, command in enumerate(row.commands, 1):
            if number > done:
                programs.append(Program(f'{row.name}#{number}', command, row.folder / OUTPUT, after))
            after = (f'{row.name}#{number}',)

    def ended(program: Program, code: int) -> None:
        name, _, number = program.name.rpartition('#')
        if code == 0:
            row = rows_by_name[name]
            write_text(row.folder / DONE, f'{number}\n')
            print(f'{name}: {number} of {len(row.commands)} commands done', flush=True)
        elif code == REQUEUE or stopping():
            outcomes[name] = 'stopped'
        else:
            outcomes[name] = why_failed(program, code)
            print(f'error: {name}: {outcomes[name]}', file=sys.stderr, flush=True)

    run_programs(programs, jobs, threads, ended, stopping)
    for row in rows:  # what was not started
        if outcomes[row.name] == 'done' and not is_done(row):
            failed = next(iter(failures_of(row.after, outcomes)), None)
            outcomes[row.name] = f'needs {failed}, which failed' if failed else 'stopped'
    return outcomes


def failures_of(names: Iterable[str], outcomes: dict[str, str]) -> dict[str, str]:
    """Of rows of these names, in their order, why those that failed did.

    Args:
        names: of rows.
        outcomes: what became of rows; one that is not there was done before.
    """
    became = {name: outcomes.get(name, 'done') for name in names}
    return {name: outcome for name, outcome in became.items() if outcome not in ('done', 'stopped')}


# ---------------------------------------------------------------- results

def final_line(folder: Path, epochs: int) -> dict[str, Any] | None:
    """The line of a run's log.txt on its last epoch; None where the run has not come there."""
    path = folder / LOG
    if not path.exists():
        return None
    for text in reversed(read_bytes(path, MAX_LOG_BYTES).split(b'\n')):
        try:
            line = json.loads(text)
        except ValueError:  # a half line, or none
            continue
        return line if isinstance(line, dict) and line.get('epoch') == epochs - 1 else None
    return None


def printed_accuracy(log: Path) -> float | None:
    """Top-1 of the last line '* Acc@1 ... loss ...' that is not of the EMA; None where there is none."""
    text = read_bytes(log, MAX_LOG_BYTES).decode(errors='replace')
    found = re.findall(r'^\* Acc@1 ([\d.]+) Acc@5 [\d.]+ loss \S+$', text, re.MULTILINE)
    return float(found[-1]) if found else None
