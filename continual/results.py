"""What a run of tasks leaves in --output-dir, and how it is evaluated.

    run.json             what cannot change when it resumes: tasks, memory, images, tokenizer
    results.jsonl        a JSON line a task that is done
    task-0, task-1, ...  each a run folder (training/run_folder.py), with memory.npz: what the next task replays
    tokens               tokenizer and token files, where they are made here and have no other --tokens-dir

A task is done when its line is in results.jsonl, which is written after everything else of the task. So a run that
resumes counts the lines, and repeats the evaluation and the filling of the memory of a task without one.
"""
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from continual.forms import length_of
from continual.memory import ReplayMemory, load_memory
from continual.tasks import Tasks, average_incremental, forgetting
from engine import evaluate
from fileio.files import MAX_JSON_BYTES, parse_json, read_bytes, write_text
from image_data.class_subsets import OnlyClasses
from training.run_folder import FILES
from utils import InputError, device_of, device_of_sums, sum_over_ranks

RUN = 'run.json'
RESULTS = 'results.jsonl'
MEMORY = 'memory.npz'
DIGEST_BATCH = 4096  # images that are digested at a time, which bounds memory


def digest_of(codes: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of the codes (N, n) and labels (N,) of a token set."""
    digest = hashlib.sha256(labels.tobytes())
    for start in range(0, len(codes), DIGEST_BATCH):
        digest.update(np.ascontiguousarray(codes[start:start + DIGEST_BATCH]))
    return digest.hexdigest()


def task_folder(folder: str, task: int) -> Path:
    """The run folder of a task."""
    return Path(folder, f'task-{task}')


def check_new(folder: str, resumed: bool) -> None:
    """InputError where a run is in the folder and is not resumed, or cannot be."""
    earlier = [path for path in (Path(folder, RUN), Path(folder, RESULTS), task_folder(folder, 0) / FILES.newest[0])
               if path.exists()]
    if earlier and not resumed:
        raise InputError(f'{earlier[0]}: an earlier run is here; add --resume auto to resume it, or choose another '
                         '--output-dir')
    if earlier and earlier[0].name != RUN:
        raise InputError(f'{earlier[0]}: is of an earlier run, but its {RUN}, which says what it was, is gone; choose '
                         'another --output-dir')


def open_memory(folder: str, task: int, form: str, limit: int | None) -> ReplayMemory:
    """The memory that a task begins with, of a form or 'none'. Raises InputError."""
    if task == 0 or form == 'none':
        return ReplayMemory(limit or 0)
    return load_memory(task_folder(folder, task - 1) / MEMORY, length_of(form))


def read_results(folder: str) -> list[dict[str, Any]]:
    """The lines of the tasks that are done. Raises InputError."""
    path = Path(folder, RESULTS)
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(read_bytes(path, MAX_JSON_BYTES).splitlines()):
        try:
            lines.append(parse_json(text))
            _check_line(lines[-1], number)
        except ValueError as error:
            raise InputError(f'{path}: line {number + 1} is damaged ({error}); remove the lines from there on, and '
                             'their tasks are evaluated again') from None
    return lines


def _check_line(line: Any, task: int) -> None:
    """ValueError for a line that is not that of a task."""
    if not isinstance(line, dict) or line.get('task') != task:
        raise ValueError(f'is not of task {task}')
    task_accuracies = line.get('test_task_acc1')
    numbers = [line.get('test_acc1'), *(task_accuracies if isinstance(task_accuracies, list) else ())]
    if len(numbers) != task + 2 or not all(isinstance(value, int | float) for value in numbers):
        raise ValueError('its accuracies are not numbers, one for each task')


def add_result(lines: list[dict[str, Any]], line: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines with that of the task that ended, to which the measures over tasks are added."""
    lines = [*lines, line]
    measures = {'average_acc1': average_incremental([done['test_acc1'] for done in lines]),
                'forgetting': forgetting([done['test_task_acc1'] for done in lines])}
    return [*lines[:-1], line | measures]


def write_results(folder: str, lines: list[dict[str, Any]]) -> None:
    """Write RESULTS, whole. Raises InputError."""
    write_text(Path(folder, RESULTS), ''.join(json.dumps(line) + '\n' for line in lines))


def evaluate_seen(model: nn.Module, tasks: Tasks, task: int, positions: np.ndarray, batches: Iterable,
                  **options: Any) -> dict[str, Any]:
    """Top-1 (%) among the classes seen after a task.

    Args:
        model: with outputs for all classes.
        positions: (n,) in the order of classes, of this rank's validation images, none of a class to come.
        batches: of these images.
        **options: of `engine.evaluate`; `distributed` where the ranks' images are parts of one set.

    Returns:
        'acc1' over all images, and 'task_acc1', a list of the accuracies over the images of each task.
    """
    predictions = [torch.empty(0, dtype=torch.int64, device=device_of(model))]  # a rank may have no image
    scored = OnlyClasses(model, list(range(tasks.ends[task])), len(tasks.order)).to(device_of(model))
    stats = evaluate(scored, batches, record=lambda logits, _: predictions.append(logits.argmax(1)), **options)
    right = torch.cat(predictions) == torch.from_numpy(positions).to(device_of(model))
    of_task = torch.from_numpy(np.searchsorted(tasks.ends, positions, side='right')).to(device_of(model))
    home = device_of_sums(device_of(model))
    counts = torch.zeros(2, task + 1, dtype=torch.float64, device=home)
    counts.index_add_(1, of_task.to(home), torch.stack([right, torch.ones_like(right)]).to(home).double())
    if options.get('distributed'):
        sum_over_ranks(counts)
    return {'acc1': stats['acc1'], 'task_acc1': (100 * counts[0] / counts[1]).tolist()}
