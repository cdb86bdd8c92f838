"""main_continual.py: arms, resuming within a task and across a border, two processes, mistakes."""
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from continual import results as task_results, task_tokens
from scripts import fit_patch_tokenizer
import main_continual
import tokenize_images
from continual.forms import length_of
from continual.memory import load_memory
from continual.results import evaluate_seen
from continual.tasks import make_tasks
from fileio.labels import read_labels, write_labels
from helpers import (ROOT, Killed, accuracy_lines, before_step, call, clean_environment, fails, make_data, send_signal,
                     states, two_processes, without_times)
from processes import training_differs

SMALL = ['--device', 'cpu', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2', '--batch-size', 8, '--epochs',
         2, '--warmup-epochs', 0, '--base-classes', 2, '--inc-classes', 2]
TOKENS = [*SMALL, '--new', 'tokens', '--model', 'deit_tiny_token_32', '--input-size', 64]
PIXELS = [*SMALL, '--new', 'pixels', '--model', 'deit_tiny_patch16_224', '--input-size', 32, '--num-workers', 0]
MEMORY = ['--memory', 'tokens', '--memory-bytes', 2000]
JPEG = ['--memory', 'jpeg', '--memory-bytes', '1e4', '--memory-quality', 20]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """train/ and val/ with six classes of images whose color tells the class."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64][..., None] / 64
    for split, count in (('train', 8), ('val', 3)):
        for label, number in itertools.product(range(6), range(count)):
            waves = np.sin(y * rng.uniform(1, 9, 3) + x * rng.uniform(1, 9, 3))
            color = 60 * (np.arange(3) == label % 3) * (1 if label < 3 else -1)
            path = folder / split / f'class-{label}' / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((127 + 60 * waves + color).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope='module')
def paths(images):
    return ['--train-path', images / 'train', '--val-path', images / 'val']


@pytest.fixture(scope='module')
def made(paths, tmp_path_factory):
    """Flags of a tokenizer that is fitted on the first task, its tokens made."""
    folder = tmp_path_factory.mktemp('tokens')
    flags = ['--tokenizer-from-task', 0, '--image-size', 64, '--tokens-dir', folder]
    assert call(main_continual, *TOKENS, *paths, *flags, '--tokenize-only', '--output-dir', folder / 'none') == 0
    assert not (folder / 'none').exists()
    return flags


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """Flags of token sets of six classes, which their codes tell."""
    return make_data(tmp_path_factory.mktemp('sets'), n=96, classes=6)


def results(folder):
    return [json.loads(line) for line in (folder / 'results.jsonl').read_text().splitlines()]


# ---------------------------------------------------------------- what a run leaves

def check_results(folder, limit, classes=(2, 4, 6)):
    lines = results(folder)
    assert [line['classes'] for line in lines] == list(classes)
    for task, line in enumerate(lines):
        assert len(line['test_task_acc1']) == task + 1
        assert line['memory_bytes'] <= limit
        assert (line['forgetting'] is None) == (task == 0)
    assert lines[-1]['average_acc1'] == pytest.approx(sum(line['test_acc1'] for line in lines) / len(lines))
    return lines


@pytest.mark.parametrize('memory', [
    ['pixels', '--memory-bytes', 1e5], ['resize', '--memory-bytes', 3e4, '--memory-side', 24],
    ['jpeg', '--memory-bytes', 1e4, '--memory-quality', 20, '--memory-policy', 'reservoir'],
    ['tokens', '--memory-bytes', 1500], ['none'], ['none', '--joint']], ids=lambda words: f'{words[0]}{len(words)}')
def test_arms_of_pixels_take_equal_steps(paths, made, tmp_path, memory):
    out = tmp_path / 'out'
    more = made if memory[0] == 'tokens' else []
    assert call(main_continual, *PIXELS, *paths, *more, '--memory', *memory, '--output-dir', out) == 0
    lines = check_results(out, float(memory[2]) if len(memory) > 2 else 0)
    assert [line['steps'] for line in lines] == [2 * (16 // 8)] * 3
    assert (out / 'task-2' / 'memory.npz').exists() == (memory[0] != 'none')
    if memory[0] != 'none':
        kept = load_memory(out / 'task-2' / 'memory.npz', length_of(memory[0]))
        assert kept.size == lines[-1]['memory_bytes'] and len(kept) == lines[-1]['memory_images'] > 2
        if 'reservoir' not in memory:
            least, most = lines[-1]['memory_images_per_class']
            assert most - least <= 1
    assert lines[-1]['tokenizer'] == ('fitted on task 0' if more else 'none')
    assert (lines[-1]['tokenizer_bytes'] or 0) > (10_000 if more else -1)


def test_validation_images_as_stored(paths, made, tmp_path, capsys):
    """Those that a form keeps whole are judged as they are; others differ, and nothing else of the run does."""
    lines, printed = {}, {}
    for name, flags in (('whole', ['--memory', 'resize', '--memory-bytes', '1e5', '--memory-side', 64]),
                        ('jpeg', JPEG), ('tokens', [*MEMORY, *made])):
        flags = [*PIXELS, *paths, *flags, '--output-dir']
        assert call(main_continual, *flags, tmp_path / name, '--eval-stored') == 0
        lines[name] = results(tmp_path / name)
        found = accuracy_lines(capsys.readouterr().out)
        printed[name] = [line.removesuffix(' (stored)') for line in found]
        assert [line.endswith(' (stored)') for line in found] == [False, True] * 3
    for line in lines['whole']:
        assert [line[f'test_stored_{key}'] for key in ('acc1', 'task_acc1')] == [
            line[f'test_{key}'] for key in ('acc1', 'task_acc1')]
    assert printed['whole'][::2] == printed['whole'][1::2]
    for name in ('jpeg', 'tokens'):
        assert all(one != other for one, other in zip(printed[name][::2], printed[name][1::2]))
        assert [len(line['test_stored_task_acc1']) for line in lines[name]] == [1, 2, 3]
    call(main_continual, *flags, tmp_path / 'plain')  # of tokens
    stripped = [{key: value for key, value in line.items() if 'stored' not in key} for line in lines['tokens']]
    assert without_times(stripped) == without_times(results(tmp_path / 'plain'))


def test_the_tokenizer_sees_the_first_task_only(images, made, tmp_path):
    """It is that of a list of the first task's images; and the tokens are of all, in the order of the images."""
    first = sorted(f'class-{label}' for label in make_tasks(6, 2, 2).order[:2])
    lines = [f'{path} 0' for name in first for path in sorted((images / 'train' / name).iterdir())]
    (tmp_path / 'list.txt').write_text('\n'.join(lines))
    call(fit_patch_tokenizer, '--data-path', tmp_path / 'list.txt', '--image-size', 64, '--output-dir', tmp_path)
    for name in ('tokenizer.pt', 'codebook.ckpt'):
        assert (tmp_path / name).read_bytes() == (made[-1] / name).read_bytes()
    assert read_labels(made[-1] / 'train-label.txt').tolist() == [label for label in range(6) for _ in range(8)]


def test_replay_keeps_what_fine_tuning_forgets(sets, tmp_path, capsys):
    flags = [*TOKENS, *sets, '--base-classes', 3, '--inc-classes', 3, '--epochs', 6, '--lr', 0.3, '--cutmix', 0,
             '--token-noise-prob', 0, '--drop-path', 0]
    call(main_continual, *flags, '--output-dir', tmp_path / 'none')
    call(main_continual, *flags, '--memory', 'tokens', '--memory-bytes', 4000, '--model-ema', '--output-dir',
         tmp_path / 'tokens')
    none, tokens = (results(tmp_path / name) for name in ('none', 'tokens'))
    assert none[0]['test_acc1'] == tokens[0]['test_acc1'] == 100  # no memory yet: the same training
    assert none[-1]['forgetting'] > tokens[-1]['forgetting'] and none[-1]['test_acc1'] < tokens[-1]['test_acc1']
    assert none[-1]['steps'] == tokens[-1]['steps'] and 'ema_test_acc1' in tokens[0] and 'ema_test_acc1' not in none[0]
    assert 'tokenizer: given, as token files' in capsys.readouterr().out


# ---------------------------------------------------------------- resuming

def killed(*_):
    raise Killed


def same_run(whole, cut, tasks):
    assert without_times(results(whole)) == without_times(results(cut)) and len(results(whole)) == tasks
    for task in range(tasks):
        a, b = (folder / f'task-{task}' for folder in (whole, cut))
        assert not training_differs(a, b, ['checkpoint.pth'], ['memory.npz'])


@pytest.mark.parametrize(('kind', 'policy'), [('tokens', 'reservoir'), ('pixels', 'balanced')])
def test_resumed_equals_uninterrupted(paths, sets, tmp_path, monkeypatch, kind, policy):
    """Stopped within a task; killed at two places of a border, and between training a task and its evaluation."""
    flags = [*TOKENS, *sets, *MEMORY] if kind == 'tokens' else [*PIXELS, *paths, *JPEG, '--aug', 'deit',
                                                                '--no-repeated-aug']
    flags += ['--memory-policy', policy, '--drop-path', 0.3, '--output-dir']
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    assert call(main_continual, *flags, whole) == 0

    with monkeypatch.context() as patch:
        tasks = itertools.count(1)
        before_step(patch, 1, 0, lambda: next(tasks) == 2 and send_signal())  # in the last epoch of the second
        assert call(main_continual, *flags, cut) == 75
        assert states(cut / 'task-1' / 'checkpoint.pth')['step'] == 1
    for name in ('save_memory', 'write_results', 'evaluate_models'):  # the second task ends, twice; and the third
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(main_continual, name, killed)
            call(main_continual, *flags, cut, '--resume', 'auto')
        if name == 'write_results':
            assert len(results(cut)) == 1 and (cut / 'task-1' / 'memory.npz').exists()
            assert call(main_continual, *flags, cut, '--resume', 'auto') == 0
            shutil.rmtree(cut / 'task-2')
            (cut / 'results.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in results(cut)[:2]))
    assert call(main_continual, *flags, cut, '--resume', 'auto') == 0
    same_run(whole, cut, 3)
    assert call(main_continual, *flags, cut, '--resume', 'auto') == 0  # nothing is left to do
    same_run(whole, cut, 3)


def test_another_run_is_not_resumed(sets, tmp_path):
    flags = [*TOKENS, *sets, *MEMORY, '--epochs', 1, '--output-dir', tmp_path]
    call(main_continual, *flags)
    fails(lambda: call(main_continual, *flags), 'run.json: an earlier run is here; add --resume auto')
    flags += ['--resume', 'auto']
    for words, name in ((['--inc-classes', 1], '--inc-classes'), (['--order-seed', 7], '--order-seed'),
                        (['--memory-bytes', 3000], '--memory-bytes'), (['--memory-policy', 'reservoir'],
                                                                       '--memory-policy'),
                        (['--replay-share', 0.25], '--replay-share')):
        fails(lambda words=words: call(main_continual, *flags, *words),
              f'{tmp_path}: holds results of another {name}; choose another --output-dir')
    lines = (tmp_path / 'results.jsonl').read_text().splitlines(keepends=True)
    (tmp_path / 'results.jsonl').write_text(lines[0])
    fails(lambda: call(main_continual, *flags, '--seed', 3), 'differs in seed 0 -> 3; resume it as it was')
    shutil.rmtree(tmp_path / 'task-1')  # so that it would begin with another seed than the task before it
    fails(lambda: call(main_continual, *flags, '--seed', 3), 'task-0/checkpoint.pth: .* differs in seed 0 -> 3')
    (tmp_path / 'results.jsonl').write_text(lines[0] + '{')
    fails(lambda: call(main_continual, *flags), 'results.jsonl: line 2 is damaged')


@pytest.mark.parametrize('change', ['replaced', 'added', 'in validation'])
def test_other_images_are_not_resumed(change, images, tmp_path):
    shutil.copytree(images, tmp_path / 'images')
    paths = ['--train-path', tmp_path / 'images' / 'train', '--val-path', tmp_path / 'images' / 'val']
    words = [*PIXELS, *paths, '--memory', 'none', '--epochs', 1, '--output-dir', tmp_path / 'out']
    assert call(main_continual, *words) == 0
    assert call(main_continual, *words, '--resume', 'auto') == 0
    split, name = ('val', '0') if change == 'in validation' else ('train', '0' if change == 'replaced' else 'new')
    Image.new('RGB', (9, 9)).save(tmp_path / 'images' / split / 'class-3' / f'{name}.png')
    fails(lambda: call(main_continual, *words, '--resume', 'auto'), 'holds results of another .*images')


def test_what_is_damaged_or_gone_is_one_line(sets, tmp_path):
    flags = [*TOKENS, *sets, '--base-classes', 4, '--epochs', 1, '--output-dir', tmp_path]
    call(main_continual, *flags)
    flags += ['--resume', 'auto']
    whole = (tmp_path / 'results.jsonl').read_text()
    first = json.loads(whole.splitlines()[0])
    for line in (1, {}, None, [], {**first, 'task': 1}, {**first, 'test_acc1': 'x'}, {**first, 'test_task_acc1': []}):
        (tmp_path / 'results.jsonl').write_text(json.dumps(line) + '\n')
        fails(lambda: call(main_continual, *flags), 'results.jsonl: line 1 is damaged')
    (tmp_path / 'results.jsonl').write_text(whole)
    fails(lambda: call(main_continual, *flags, '--epochs', 2), 'holds results of another --epochs')
    codes, labels = (sets[sets.index(f'--train-{name}-file') + 1] for name in ('token', 'label'))
    write_labels(tmp_path / 'label.txt', np.roll(read_labels(labels), 1))
    other = [word if word != labels else tmp_path / 'label.txt' for word in flags]
    fails(lambda: call(main_continual, *other), 'holds results of another training images')
    (tmp_path / 'run.json').unlink()
    fails(lambda: call(main_continual, *flags), 'results.jsonl: is of an earlier run, but its run.json')
    fails(lambda: call(main_continual, *flags[:-2]), 'results.jsonl: an earlier run is here')


@pytest.mark.parametrize(('words', 'pattern'), [
    (['--batch-size', 98], 'make no step of --batch-size 98'), (['--opt', 'x'], '--opt x'),
    (['--finetune', 'none.pth'], 'none.pth')])
def test_a_mistake_begins_no_run(sets, tmp_path, words, pattern):
    flags = [*TOKENS, *sets, '--epochs', 1, '--base-classes', 4, '--output-dir', tmp_path]
    fails(lambda: call(main_continual, *flags, *words), pattern)
    assert not (tmp_path / 'run.json').exists()
    assert call(main_continual, *flags) == 0


def test_a_later_task_too_small_is_found_at_once(sets, tmp_path):
    flags = [*TOKENS, *sets, '--base-classes', 5, '--inc-classes', 1, '--batch-size', 40, '--output-dir', tmp_path]
    fails(lambda: call(main_continual, *flags), 'train-token.data.bin.gz: task 2 of 2, of class 1: the 12 images of a '
          'process make no step of --batch-size 40 .*: lower --batch-size$')
    assert not list(tmp_path.rglob('*.pth'))


def test_the_task_and_the_class_that_are_too_small_are_named(paths, images, tmp_path):
    flags = [*PIXELS, *paths, '--output-dir', tmp_path, '--memory', 'jpeg', '--memory-quality', 20]
    fails(lambda: call(main_continual, *flags, '--memory-bytes', '1e5', '--batch-size', 18),
          "train: task 1 of 3, of class 'class-\\d', 'class-\\d': the 16 images .*: lower --batch-size$")
    fails(lambda: call(main_continual, *flags, '--memory-bytes', '1e5', '--batch-size', 50, '--base-classes', 6),
          "task 1 of 1, of class ('class-\\d', ){4}'class-\\d' and 1 more: the 48 images")
    fails(lambda: call(main_continual, *flags, '--memory-bytes', 60), r"\(class 'class-\d' has none below \d+ bytes\)")
    assert not (tmp_path / 'run.json').exists()


def test_a_signal_between_trainings(sets, tmp_path, monkeypatch):
    flags = [*TOKENS, *sets, *MEMORY, '--epochs', 1, '--output-dir', tmp_path]
    evaluate = main_continual.evaluate_models

    def signaled(*words):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*words)
    with monkeypatch.context() as patch:
        patch.setattr(main_continual, 'evaluate_models', signaled)
        assert call(main_continual, *flags) == 75
    assert len(results(tmp_path)) == 1
    assert call(main_continual, *flags, '--resume', 'auto') == 0
    assert len(results(tmp_path)) == 3


def test_a_head_starts_from_scratch(sets, tmp_path, capsys):
    """Outputs are in the order of the tasks, which is not that of the labels."""
    flags = [*TOKENS, *sets, '--epochs', 1, '--base-classes', 6, '--output-dir']
    call(main_continual, *flags, tmp_path / 'a')
    call(main_continual, *flags, tmp_path / 'b', '--finetune', tmp_path / 'a' / 'task-0' / 'checkpoint.pth')
    assert 'started from scratch: head.* (other classes)' in capsys.readouterr().out


def test_a_rank_without_images_evaluates(monkeypatch):
    monkeypatch.setattr(task_results, 'evaluate', lambda *_, **__: {'acc1': 50.})  # of other ranks' images
    found = evaluate_seen(torch.nn.Linear(1, 2), make_tasks(2, 1, 1), 0, np.empty(0, np.int64), iter(()), prepare=None)
    assert found['acc1'] == 50 and len(found['task_acc1']) == 1


@pytest.mark.slow
def test_two_processes(paths, made, tmp_path):
    """They fit, tokenize, train and remember; evaluation counts each image once."""
    flags = [*TOKENS, *paths, *MEMORY, '--epochs', 1, *made[:-1]]
    command = [sys.executable, *two_processes(), ROOT / 'main_continual.py', *flags, tmp_path / 'tokens', '--dist-eval',
               '--batch-size', 4, '--output-dir', tmp_path / 'two']
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=clean_environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    assert 'batch: 4 x 2 = 8' in done.stdout
    lines = check_results(tmp_path / 'two', 2000)
    assert [line['steps'] for line in lines] == [2, 2, 2]  # as many as one process of 8 images takes
    for line in lines:  # classes have as many validation images: no image is lost, and none counted twice
        assert line['memory_images_per_class'][1] - line['memory_images_per_class'][0] <= 1
        assert line['test_acc1'] == pytest.approx(np.mean(line['test_task_acc1']))
        right = np.array(line['test_task_acc1']) / 100 * 6
        assert right == pytest.approx(right.round())


# ---------------------------------------------------------------- mistakes

MISTAKES = {
    'divide': ([*TOKENS, *MEMORY, '--inc-classes', 3], 'sets', '--inc-classes 3 at a time do not divide the 6 classes'),
    'more': ([*TOKENS, *MEMORY, '--base-classes', 7], 'sets', '--base-classes 7 are more than the 6 classes'),
    'small': ([*TOKENS, '--memory', 'tokens', '--memory-bytes', 500], 'sets',
              'less than an image of each of the 6 classes takes as tokens .class 0 has none below 106 bytes.: give '
              '636 or more'),
    'bytes': ([*TOKENS, '--memory', 'tokens', '--memory-bytes', '1.5'], 'sets', '1.5: give a whole number of bytes'),
    'no bytes': ([*TOKENS, '--memory', 'tokens'], 'sets', '--memory and --memory-bytes belong together'),
    'form': ([*TOKENS, *JPEG], 'sets', '--new tokens with --memory jpeg'),
    'quality': ([*PIXELS, *JPEG[:4]], 'paths', '--memory jpeg and --memory-quality'),
    'joint': ([*TOKENS, *MEMORY, '--joint'], 'sets', '--joint keeps all images'),
    'share': ([*TOKENS, *MEMORY, '--replay-share', '0.01'], 'sets', '--replay-share 0.01 of --batch-size 8: leaves no'),
    'tokenizer': ([*TOKENS, *MEMORY], 'paths', 'give one of the three'),
    'decoder': ([*PIXELS, *MEMORY], 'both', 'needs the --tokenizer-path that decodes them'),
    'two': ([*TOKENS, *MEMORY, '--tokenizer-from-task', 0], 'both', 'choose one'),
    'pixels': ([*PIXELS, *JPEG, '--tokenizer-path', 'x'], 'paths', 'have no tokens'),
    'codebook': ([*TOKENS, '--tokenizer-from-task', 0, '--codebook-path', 'x'], 'paths', 'takes no --codebook-path'),
    'synonyms': ([*TOKENS, '--tokenizer-from-task', 0, '--token-synonym-dict', 'x'], 'paths', 'synonyms are made with'),
    'eval': ([*TOKENS, '--eval', '--resume', 'auto'], 'sets', '--eval is no flag of main_continual.py'),
    'eval alone': ([*TOKENS, '--eval'], 'sets', '--eval is no flag of main_continual.py'),
    'output': ([*TOKENS, '--output', 'x.json'], 'sets', '--output is no flag of main_continual.py: results.jsonl has'),
    'corruption': ([*PIXELS, *JPEG, '--corruption', 'contrast'], 'paths', '--corruption is no flag of main_continual'),
    'severity': ([*PIXELS, *JPEG, '--severity', 1], 'paths', '--severity is no flag of main_continual.py'),
    'small images': ([*TOKENS, '--tokenizer-from-task', 0, '--image-size', 4], 'paths',
                     '^--image-size 4: smaller than patches of 8 pixels; choose a multiple of 8$'),
    'few patches': ([*TOKENS, '--tokenizer-from-task', 0, '--image-size', 8], 'paths',
                    'patches are too few for 391 codes: give more images, a larger --image-size, or fewer codes$'),
    'file': ([*TOKENS, '--resume', 'x.pth'], 'sets', 'resumes by --resume auto'),
    'paths': ([*PIXELS, *JPEG], 'none', '--train-path and --val-path: name the images'),
    'stored': ([*TOKENS, *MEMORY, '--eval-stored'], 'sets', '--eval-stored is for --new pixels with --memory jpeg, re'),
    'stored files': ([*PIXELS, *MEMORY, '--eval-stored', '--tokenizer-path', 'x'], 'train only',
                     '--train-token-file needs --val-token-file'),
    'labels inside': ([*TOKENS, *MEMORY], 'train only',
                      'needs --val-token-file and --val-label-file; scripts/convert_tokens.py writes the labels'),
    'only': ([*TOKENS, '--tokenize-only'], 'sets', '--tokenize-only needs'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_one_line(paths, sets, tmp_path, name):
    flags, data, pattern = MISTAKES[name]
    words = {'sets': sets, 'paths': paths, 'none': [],
             'both': [*paths, *(word for word in sets if word not in sets[2:4])],
             'train only': [*paths, *sets[:2], *sets[4:8]]}[data]
    fails(lambda: call(main_continual, *flags, *words, '--output-dir', tmp_path / 'out'), pattern)
    assert not list(tmp_path.rglob('*.pth'))


@pytest.mark.slow
def test_runs_that_share_tokens_wait(paths, tmp_path, monkeypatch):
    """For what another makes there, but not for ever; and what a killed fit left is made again."""
    folder = tmp_path / 'tokens'
    flags = [*TOKENS, *paths, '--tokenizer-from-task', 0, '--image-size', 64, '--tokens-dir', folder, '--output-dir',
             tmp_path / 'out', '--tokenize-only']
    folder.mkdir()
    holder = subprocess.Popen([sys.executable, '-c', 'import sys, time\nfrom fileio.files import lock_file\n'
                               'lock = lock_file(sys.argv[1])\nprint(1, flush=True)\ntime.sleep(600)',
                               str(folder / '.lock')], cwd=ROOT, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with monkeypatch.context() as patch:
        patch.setattr(task_tokens, 'PATIENCE', 0.3)
        fails(lambda: call(main_continual, *flags), 'tokens: another process is at work there', '--tokens-dir')
    threading.Timer(1, holder.kill).start()
    assert call(main_continual, *flags) == 0
    holder.wait()
    holder.stdout.close()
    (folder / 'tokenizer.pt').unlink()
    for path in folder.glob('*-*'):
        path.unlink()
    assert call(main_continual, *flags) == 0
    assert (folder / 'tokenizer.pt').exists()


def test_what_is_in_the_way_of_tokens_names_their_flag(images, paths, made, tmp_path):
    """Names of token sets are not chosen by a flag here, and their folder by another one than --output-dir."""
    tokens = tmp_path / 'tokens'
    tokens.mkdir()
    (tokens / 'train-label.txt').write_text('')
    given = [*paths, '--tokenizer-path', made[-1] / 'tokenizer.pt', '--codebook-path', made[-1] / 'codebook.ckpt',
             '--image-size', 64, '--output-dir', tmp_path / 'out', '--tokens-dir']
    fails(lambda: call(main_continual, *TOKENS, *given, tokens),
          'train-label.txt: belongs to another run: choose another --tokens-dir, or remove')
    shutil.copytree(images, tmp_path / 'images')
    inside = ['--train-path', tmp_path / 'images' / 'train', '--val-path', tmp_path / 'images' / 'val', *given[4:]]
    fails(lambda: call(main_continual, *TOKENS, *inside, tmp_path / 'images' / 'train' / 'tokens'),
          '^--tokens-dir .*: lies among the class folders')


def test_a_pickled_tokenizer_names_the_programs_that_take_one(paths, tmp_path):
    torch.save(torch.nn.Conv2d(3, 32, 8, 8), tmp_path / 'x.pt')
    fails(lambda: call(main_continual, *TOKENS, *paths, '--tokenizer-path', tmp_path / 'x.pt', '--output-dir',
                       tmp_path / 'out'), 'scripts/convert_tokenizer.py, .*--tokenizer-code-path of tokenize_images.py')


def test_tokens_of_another_tokenizer_are_refused(images, paths, made, tmp_path):
    folder = made[-1]
    other = tmp_path / 'other'
    call(fit_patch_tokenizer, '--data-path', images / 'val', '--image-size', 64, '--output-dir', other, '--dim', 8)
    for split, size in (('train', 64), ('val', 128)):
        call(tokenize_images, '--data-path', images / split, '--name', split, '--output-dir', tmp_path, '--image-size',
             size, '--tokenizer-path', folder / 'tokenizer.pt', '--codebook-path', folder / 'codebook.ckpt', '--device',
             'cpu')
    flags = [*PIXELS, *MEMORY, *paths, '--output-dir', tmp_path / 'out', '--train-token-file',
             tmp_path / 'train-token.data.bin.gz', '--train-label-file', tmp_path / 'train-label.txt']
    ours, theirs = (['--tokenizer-path', path / 'tokenizer.pt', '--codebook-path', path / 'codebook.ckpt']
                    for path in (folder, other))
    fails(lambda: call(main_continual, *flags, *theirs[:2], *ours[2:]), 'rows of .* elements, but the tokenizer gives')
    fails(lambda: call(main_continual, *flags, *theirs),
          'was made with the codebook codebook.ckpt .*other/codebook.ckpt is another|holds code')
    refitted = tmp_path / 'refitted.pt'  # for the same codebook
    torch.save({name: value + (name == 'mean') for name, value in
                torch.load(folder / 'tokenizer.pt', weights_only=True).items()}, refitted)
    fails(lambda: call(main_continual, *flags, '--tokenizer-path', refitted, *ours[2:]),
          'was made with the tokenizer tokenizer.pt .*refitted.pt is another')
    val = ['--val-token-file', tmp_path / 'val-token.data.bin.gz', '--val-label-file', tmp_path / 'val-label.txt']
    fails(lambda: call(main_continual, *flags, *ours, *val, '--eval-stored'), 'grids of 256 codes, but .* has 64')


def test_folders_among_the_classes_are_refused(images, paths, tmp_path):
    shutil.copytree(images, tmp_path / 'images')
    paths = ['--train-path', tmp_path / 'images' / 'train', '--val-path', tmp_path / 'images' / 'val']
    out = ['--output-dir', tmp_path / 'images' / 'train' / 'run']
    fails(lambda: call(main_continual, *PIXELS, *JPEG, *paths, *out), 'lies among the class folders')
    fails(lambda: call(main_continual, *TOKENS, *paths, '--tokenizer-from-task', 0, *out), 'lies among the class fol')
    assert len(list((tmp_path / 'images' / 'train').iterdir())) == 6


def test_tokens_of_other_images_are_refused(paths, images, made, tmp_path):
    folder = made[-1]
    given = ['--train-token-file', folder / 'train-token.data.bin.gz', '--codebook-path', folder / 'codebook.ckpt',
             '--tokenizer-path', folder / 'tokenizer.pt', '--train-label-file']
    write_labels(tmp_path / 'label.txt', [0] * 8 + [label for label in range(1, 6) for _ in range(8)][::-1])
    flags = [*PIXELS, *MEMORY, '--output-dir', tmp_path / 'out']
    fails(lambda: call(main_continual, *flags, *paths, *given, tmp_path / 'label.txt'),
          'its 48 labels are not those of the 48 images of .*train: give the tokens of these images')
    for split in ('train', 'val'):
        shutil.copytree(images / split, tmp_path / split)
        (tmp_path / split / 'class-5').rename(tmp_path / split / 'other')
    other = ['--train-path', tmp_path / 'train', '--val-path', tmp_path / 'val']
    fails(lambda: call(main_continual, *flags, *other, *given, folder / 'train-label.txt'),
          re.escape("class 5 is 'class-5'") + ".* it is 'other'")
    fails(lambda: call(main_continual, *flags, *other, *made),
          'holds results of another images of (the first task|train); choose another --tokens-dir')
    (tmp_path / 'val' / 'other').rename(tmp_path / 'val' / 'class-9')
    fails(lambda: call(main_continual, *PIXELS, *JPEG, *other, '--output-dir', tmp_path / 'out'), 'class 5 is')
