"""Rows of a table: commands that run one after another in a folder of their own, and what says that they are done.

A row's folder holds `row.json`, its commands; `done.json`, how many of them are done; `output.txt`, what they print;
and what they write. A command that somebody ran by hand counts too: its result is there. One process at a time works on
a row, and several may work in one output folder.
"""
import difflib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fileio.files import lock_file, read_bytes, read_json, write_text
from training.preemption import REQUEUE
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
MAX_LOG_BYTES = 1 << 26  # of a program's output
ROW = 'row.json'
DONE = 'done.json'
OUTPUT = 'output.txt'
LOG = 'log.txt'  # of a training, as run_folder.py has it, which a job need not wait for: it imports timm
LOCK = 'row.lock'  # a training locks a file of its own in the same folder
HOME = '$OUTPUT'  # the output folder, in ROW: it may be moved, and be spelled in several ways
LAUNCHER = 'torchrun'  # the first word of a command on several processes; its flags follow, then the program
# What a program without --output leaves in --output-dir, last of all, but for those that train.
RESULTS = {'tables/choose_images.py': 'chosen.json', 'scripts/shrink_images.py': 'manifest.json',
           'scripts/fit_patch_tokenizer.py': 'codebook.ckpt', 'scripts/fit_latent_tokenizer.py': 'codebook.ckpt',
           'tokenize_images.py': '{name}-token.json',
           'scripts/convert_tokens.py': '{stem}.json'}

PATH_FLAGS = {'--data-path', '--train-path', '--val-path', '--output-dir', '--output'}  # of images and of results
ELSEWHERE = {'--output-dir', '--resume', '--device', '--num-workers'}  # flags that the results do not depend on

Command = tuple[str, ...]  # a program's path from the root, and its words


@dataclass(frozen=True)
class Row:
    """Commands that run one after another, and the folder that is theirs.

    Attributes:
        name: the folder's path from the output folder.
        folder: holds what the module's docstring says.
        commands: the same words mean the same result.
        after: names of rows that must be done before.
    """
    name: str
    folder: Path
    commands: tuple[Command, ...]
    after: tuple[str, ...] = ()


# ---------------------------------------------------------------- commands

def program_at(command: Command) -> int:
    """Where in a command its program stands: after the launcher and its flags, if any."""
    return next(i for i, word in enumerate(command) if word.endswith('.py'))


def argument_list(command: Command) -> list[str]:
    """The words with which to start a command from any folder."""
    at = program_at(command)
    launch = ['-m', 'torch.distributed.run', *command[1:at]] if command[0] == LAUNCHER else []
    return [sys.executable, *launch, str(ROOT / command[at]), *command[at + 1:]]


def shell_line(command: Command) -> str:
    """A command as one types it in this folder."""
    at = program_at(command)
    return shlex.join([*(command[:at] or ['python']), os.path.relpath(ROOT / command[at]), *command[at + 1:]])


def start(command: Command, log: Path, env: dict[str, str]) -> subprocess.Popen:
    """Start a command in the environment `env`; its output is appended to a file."""
    with open(log, 'ab') as file:
        return subprocess.Popen(argument_list(command), env=env, stdin=subprocess.DEVNULL, stdout=file,
                                stderr=subprocess.STDOUT)


def why_failed(command: Command, code: int, log: Path) -> str:
    """One line about a command that ended with this exit code: the last line that it printed."""
    lines = read_bytes(log, MAX_LOG_BYTES).decode(errors='replace').split('\n')
    last = next((line for line in reversed(lines) if line.strip()), '').removeprefix('error: ')
    return f'{command[program_at(command)]} ended with code {code} ({last[:300]}); see {log}'


def flags_of(command: Command) -> dict[str, list[str]]:
    """The words after each flag of a command's program; of a flag that is given twice, the last."""
    flags = {}
    for word in command[program_at(command) + 1:]:
        if word.startswith('--'):
            values = flags[word] = []
        elif flags:
            values.append(word)
    return flags


# ---------------------------------------------------------------- is it the same row

def is_path(word: str, flag: str) -> bool:
    """Whether the word after a flag is a path; one without a slash may be, as `train` is where the data are in `.`."""
    return os.sep in word or flag in PATH_FLAGS


def plain(word: str, home: str, flag: str = '') -> str:
    """A word of a command in one spelling: paths below the output folder `home` begin with HOME, others at the root.

    `flag` is the word before it.
    """
    if word.startswith(HOME) or not is_path(word, flag):
        return word
    path = os.path.realpath(word)
    return HOME + path[len(home):] if path.startswith(home + os.sep) else path


def home_of(row: Row) -> str:
    """The output folder of a row."""
    return os.path.realpath(row.folder.parents[row.name.count('/')])


def plain_commands(commands: Iterable[Sequence[str]], home: str) -> dict[str, list[str]]:
    """Commands as ROW holds them."""
    plain_words = {}
    for number, command in enumerate(commands, 1):
        at = program_at(command) + 1
        plain_words[f'command {number}'] = [*command[:at], *(plain(word, home, flag) for flag, word in
                                                             zip(command[at - 1:], command[at:]))]
    return plain_words


def check_row(row: Row) -> None:
    """InputError where a row's folder holds the run of other commands, with the words that differ. Writes nothing."""
    path = row.folder / ROW
    home = home_of(row)
    if path.exists():
        before = read_json(path)
        if not isinstance(before, dict) or not all(isinstance(words, list) and any(
                str(word).endswith('.py') for word in words) for words in before.values()):
            raise InputError(f'{path}: is damaged; remove {row.folder}, and it is made again')
        before = plain_commands([list(map(str, words)) for words in before.values()], home)
        differing = difference([word for words in before.values() for word in words],
                               [word for words in plain_commands(row.commands, home).values() for word in words])
    else:
        differing = [text for command in row.commands for text in flags_that_differ(row.folder, flags_of(command))]
    if differing:
        raise InputError(f'{row.folder}: holds the run of another command: {"; ".join(differing)}; choose another '
                         '--output-dir, or remove that folder')


def difference(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """The words that differ between two lists, each with the flag that it belongs to."""
    texts = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, before, now, autojunk=False).get_opcodes():
        if tag == 'equal':
            continue
        if min(a, c) and now[c - 1].startswith('--') and before[a - 1] == now[c - 1]:
            a, c = a - 1, c - 1
        texts.append(f'{shlex.join(before[a:b]) or "nothing"} there, {shlex.join(now[c:d]) or "nothing"} here')
    return texts


def flags_that_differ(folder: Path, flags: dict[str, list[str]]) -> list[str]:
    """The flags of a command with which the run in its folder was not made, as its args.json says; [] without one."""
    path = folder / 'args.json'
    made = read_json(path) if path.exists() and flags.get('--output-dir', ['']) == [str(folder)] else {}
    texts = []
    for flag, words in flags.items():
        value = made.get(flag[2:].replace('-', '_'))
        if len(words) != 1 or not isinstance(value, str | int | float) or isinstance(value, bool):
            continue
        if not isinstance(value, str):
            same = value == float(words[0])
        elif is_path(value, flag):  # from where that run was started, which runs of before do not say
            there = os.path.join(str(made.get('started_in') or ''), value)
            same = os.path.realpath(there) == os.path.realpath(words[0])
        else:
            same = value == words[0]
        if not same and flag not in ELSEWHERE:
            texts.append(f'{flag} {value} there, {flag} {words[0]} here')
    return texts


# ---------------------------------------------------------------- what is done

def commands_done(row: Row) -> int:
    """How many of a row's commands are done: as DONE says, and then as the results of those run by hand show."""
    path = row.folder / DONE
    done = read_json(path) if path.exists() else 0
    if type(done) is not int or not 0 <= done <= len(row.commands):
        raise InputError(f'{path}: is damaged; remove {row.folder}, and it is made again')
    while done < len(row.commands) and has_result(row.commands[done]):
        done += 1
    return done


def has_result(command: Command) -> bool:
    """Whether what a command leaves at its end is there, whoever ran it."""
    flags = {flag: words[0] for flag, words in flags_of(command).items() if words}
    if '--output' in flags:
        return Path(flags['--output']).exists()
    if '--output-dir' not in flags:
        return False
    folder = Path(flags['--output-dir'])
    program = command[program_at(command)]
    if program in RESULTS:
        stem = Path(flags.get('--token-file', '')).name.partition('.')[0]
        return (folder / RESULTS[program].format(name=flags.get('--name'), stem=stem)).exists()
    if program == 'main_continual.py':
        if '--tokenize-only' in command:
            return (folder / 'synonyms.json').exists()
        from continual.results import RUN, read_results
        lines = read_results(str(folder))
        return bool(lines) and lines[-1]['classes'] == read_json(folder / RUN)['classes']
    if '--epochs' not in flags or final_line(folder, int(flags['--epochs'])) is None:
        return False
    # the log's last line comes before the last checkpoint: a run killed between the two is not done
    logged = (folder / LOG).stat().st_mtime_ns
    return any(path.stat().st_mtime_ns >= logged for path in folder.glob('checkpoint*.pth'))


def is_done(row: Row) -> bool:
    """Whether a row's folder holds this row, and all its commands are done."""
    try:
        check_row(row)
        return commands_done(row) == len(row.commands)
    except InputError:  # said where the row is run
        return False


def final_line(folder: Path, epochs: int) -> dict[str, Any] | None:
    """The line of a run's log.txt on its last epoch; None where the run has not come there."""
    lines = log_lines(folder)
    return lines[-1] if lines and lines[-1].get('epoch') == epochs - 1 else None


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.txt, in order."""
    path = folder / LOG
    lines = []
    for text in read_bytes(path, MAX_LOG_BYTES).split(b'\n') if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:  # a half line, or none
            continue
    return [line for line in lines if isinstance(line, dict)]


# ---------------------------------------------------------------- running

def take(row: Row) -> IO | None:
    """Take a row's folder for this process, until what is returned is closed; None where another process has it.

    Raises:
        InputError: when the folder holds the run of another command, or cannot be written.
    """
    check_row(row)
    try:
        row.folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(row.folder / LOCK)
    except BlockingIOError:
        return None
    except OSError as error:
        raise InputError(f'{row.folder}: cannot be written ({error.strerror}); choose another --output-dir') from None
    if not (row.folder / ROW).exists():
        write_text(row.folder / ROW, json.dumps(plain_commands(row.commands, home_of(row)), indent=1) + '\n')
    return lock


def blocked(row: Row, outcomes: dict[str, str]) -> str | None:
    """Why a row cannot be run after what became of those that it needs; None where it can."""
    for name in row.after:
        became = outcomes.get(name, 'done')
        if became in ('stopped', 'queued'):
            return became
        if became != 'done':
            return f'needs {name}, which failed'
    return None


class Turn:
    """A row that is run here, command after command, from the first one that is not done.

    Args:
        row: which.
        lock: of its folder; held until the row ends.
        env: environment of its commands.
    """

    def __init__(self, row: Row, lock: IO, env: dict[str, str]):
        self.row = row
        self.lock = lock
        self.env = env
        self.number = commands_done(row)
        self.process = None
        self.start_next()

    def start_next(self) -> None:
        """Start the command whose turn it is, if there is one left."""
        if self.number < len(self.row.commands):
            self.process = start(self.row.commands[self.number], self.row.folder / OUTPUT, self.env)

    def outcome(self, stopping: bool) -> str | None:
        """What became of the row: 'done', 'stopped', or why it failed; None while it runs. No more is started once
        `stopping` is true."""
        while self.number < len(self.row.commands):
            code = self.process.poll()
            if code is None:
                return None
            command = self.row.commands[self.number]
            if code == REQUEUE or (code and stopping):
                return 'stopped'
            if code:
                return why_failed(command, code, self.row.folder / OUTPUT)
            self.number += 1
            write_text(self.row.folder / DONE, f'{self.number}\n')
            print(f'{self.row.name}: {self.number} of {len(self.row.commands)} commands done', flush=True)
            if stopping and self.number < len(self.row.commands):
                return 'stopped'
            self.start_next()
        return 'done'


def run_rows(rows: Sequence[Row], jobs: int, threads: int, before: dict[str, str] | None = None,
             stopping: Callable[[], bool] = lambda: False) -> dict[str, str]:
    """Run what is not done of some rows, each after those that it needs. One that fails does not stop the others.

    Args:
        rows: those that a row needs come before it, or are done.
        jobs: rows that run at a time.
        threads: of each.
        before: what became of rows in an earlier call, which are not tried again.
        stopping: asked while waiting; once it is true, those that run get SIGTERM, and no more are started.

    Returns:
        What became of each row, now or before, by name: 'done', 'stopped' (by a signal: the same command resumes it),
        or why it failed.
    """
    outcomes = dict(before or {})
    waiting = {row.name: row for row in rows if row.name not in outcomes}
    running = {}
    busy = set()  # rows that another process has, of which it was said
    env = {**os.environ, 'OMP_NUM_THREADS': str(threads)}

    def begin(row: Row) -> str | None:
        """Start a row, unless another process has it; returns what became of it where that is known already."""
        outcome = 'done' if is_done(row) else blocked(row, outcomes)
        if outcome:
            return outcome
        lock = take(row)
        if lock:
            running[row.name] = Turn(row, lock, env)
        elif row.name not in busy:
            busy.add(row.name)
            print(f'{row.name}: another process is at work on it; waiting for its end', flush=True)
        return None

    stopped = False
    try:
        while waiting or running:
            if stopping() and not stopped:
                stopped = True
                for turn in running.values():
                    turn.process.terminate()
            for name, row in list(waiting.items()):
                if stopped:
                    outcomes[name] = 'done' if is_done(row) else blocked(row, outcomes) or 'stopped'
                elif len(running) < jobs and not (waiting.keys() | running.keys()) & set(row.after):
                    try:
                        outcome = begin(row)
                    except InputError as error:
                        outcome = str(error)
                    if outcome:
                        outcomes[name] = outcome
                if name in outcomes or name in running:
                    del waiting[name]
            for name, turn in list(running.items()):
                outcome = turn.outcome(stopped)
                if outcome:
                    outcomes[name] = outcome
                    running.pop(name).lock.close()
                    if outcome not in ('done', 'stopped'):
                        print(f'error: {name}: {outcome}', file=sys.stderr, flush=True)
            time.sleep(0.1 if running or waiting else 0)
    finally:
        for turn in running.values():  # this program was interrupted
            turn.process.terminate()
        for turn in running.values():
            turn.process.wait()
            turn.lock.close()
    return outcomes


def failures_of(names: Iterable[str], outcomes: dict[str, str]) -> dict[str, str]:
    """Of rows of these names, in their order, why those that failed did.

    Args:
        names: of rows.
        outcomes: what became of rows; one that is not there was done before.
    """
    became = {name: outcomes.get(name, 'done') for name in names}
    return {name: outcome for name, outcome in became.items() if outcome not in ('done', 'stopped', 'queued')}
