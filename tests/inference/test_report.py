"""The report of an evaluation: its numbers against slow ones, its files, and what it does not touch."""
import csv
import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import evaluate_on_images
import main_mtm_finetune
import main_pixels
from fileio.files import sha256
from helpers import (DEMO, accuracy_lines, call, contents, fails, make_data, run_here, smooth_images, start,
                     two_processes)
from image_data.class_subsets import OnlyClasses
from inference import report
from inference.report import Report, check_report, class_names, draw_confusion
from masked import SIZES
from models_seit import create_model

pytestmark = pytest.mark.usefixtures('one_thread')
CPU = torch.device('cpu')
NAMES = [f'class-{number}' for number in range(7)]


@pytest.fixture(autouse=True)
def with_matplotlib():
    pytest.importorskip('matplotlib')


def rows_of(path):
    return list(csv.DictReader(path.open()))


def check_adds_up(folder, line, prefix=''):
    """Check that classes and confusion matrix of a report add up to a printed line, `* Acc@1 ... Acc@5 ...`."""
    rows, table = rows_of(folder / f'{prefix}classes.csv'), rows_of(folder / f'{prefix}confusion.csv')
    images = [int(row['images']) for row in rows]
    right = [int(row[row['class']]) for row in table]
    assert [row['class'] for row in rows] == [row['class'] for row in table]
    assert images == [sum(int(row[column]) for column in list(row)[2:]) for row in table]
    top5 = sum(count * float(row['top5'] or 0) / 100 for row, count in zip(rows, images))
    for row, count, correct in zip(rows, images, right):
        assert row['top1'] == (f'{100 * correct / count:.3f}' if count else '')
    assert line.startswith(f'* Acc@1 {100 * sum(right) / sum(images):.3f} Acc@5 {100 * round(top5) / sum(images):.3f} ')
    numbers = json.loads((folder / 'report.json').read_text())['ema' if prefix else 'model']
    assert (numbers['images'], numbers['mistakes']) == (sum(images), sum(images) - sum(right))
    assert len(rows_of(folder / f'{prefix}mistakes.csv')) == min(20, sum(images) - sum(right))
    with Image.open(folder / f'{prefix}confusion.png') as picture:
        assert min(picture.size) > 400


def batches(n=200, classes=7, seed=0):
    """Logits (n, classes) and labels (n,), of which about a third are right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += 1
    return logits, labels


def evaluated(folder, logits, labels, size=64, name='', order=None, **options):
    """Evaluate logits by the engine and write their report."""
    check_report(str(folder))
    made = Report(folder, options.pop('names', NAMES), CPU, **options)
    model = options.pop('model', None) or torch.nn.Linear(1, 1)
    if not isinstance(model, OnlyClasses):
        model.forward = lambda x: x
    engine.evaluate(model, zip(logits.split(size), labels.split(size)), lambda x: x, record=made.record)
    made.write(name, range(len(labels)) if order is None else order)


# ---------------------------------------------------------------- numbers

def test_numbers_are_the_slow_ones(tmp_path, capsys):
    logits, labels = batches()
    numbers = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:200].tolist()
    evaluated(tmp_path, logits, labels, order=numbers)
    line, = accuracy_lines(capsys.readouterr().out)
    check_adds_up(tmp_path, line)
    probabilities, predictions = logits.softmax(1).max(1)
    for row in rows_of(tmp_path / 'classes.csv'):
        taken = predictions[labels == int(row['class'])].tolist()
        wrong = {other: taken.count(other) for other in taken if other != int(row['class'])}
        most = max(wrong.values())
        assert row['name'] == f'class-{row["class"]}' and int(row['images']) == len(taken)
        assert int(row['taken_for_images']) == most == wrong[int(row['taken_for'])]
        assert row['taken_for_name'] == f'class-{row["taken_for"]}'
    worst = sorted(((probability, number, label, prediction) for probability, number, label, prediction in zip(
        probabilities.tolist(), numbers, labels.tolist(), predictions.tolist()) if label != prediction), reverse=True)
    found = rows_of(tmp_path / 'mistakes.csv')
    assert [(int(row['image']), int(row['label']), int(row['prediction'])) for row in found] == [
        row[1:] for row in worst[:20]]
    assert [float(row['probability']) for row in found] == pytest.approx([row[0] for row in worst[:20]], abs=1e-6)


def test_what_is_kept_does_not_grow_with_the_images(tmp_path):
    made = Report(tmp_path, NAMES, CPU)
    for seed in range(9):
        made.record(*batches(seed=seed))
        assert len(made.worst) == len(made.sureness) == 20 and made.counts.numel() == 49
    assert made.counts.sum() == made.seen == 1800


@pytest.mark.parametrize('size', [1, 7, 200])
def test_batches_change_nothing_also_where_the_model_is_equally_sure(size, tmp_path):
    logits, labels = batches()
    logits[::2] *= 1000  # half of the mistakes are of probability 1
    logits[5] = float('nan')
    for name, batch in (('one', 33), ('two', size)):
        evaluated(tmp_path / name, logits, labels, batch)
    one, two = (contents(tmp_path / name) for name in ('one', 'two'))
    assert one == two and len(one) == 5


def test_a_subset_has_lines_and_columns_of_its_own(tmp_path, capsys):
    logits, labels = batches()
    chosen = torch.isin(labels, torch.tensor([5, 1]))
    scored = OnlyClasses(torch.nn.Identity(), [5, 1], 7)
    scored.register_parameter('p', torch.nn.Parameter(torch.zeros(1)))
    check_report(str(tmp_path))
    made = Report(tmp_path, NAMES, CPU, subset=[5, 1])
    engine.evaluate(scored, [(logits[chosen], labels[chosen])], lambda x: x, record=made.record)
    made.write('', np.arange(200)[chosen.numpy()])
    check_adds_up(tmp_path, accuracy_lines(capsys.readouterr().out)[0])
    assert (tmp_path / 'confusion.csv').read_text().splitlines()[0] == 'class,name,1,5'


def test_names_are_the_checkpoints_else_those_of_the_images():
    labels = np.array([0, 1, 1])
    assert class_names(3, ['a', 'b', 'c'], ['x', 'y'], labels, labels) == ['a', 'b', 'c']
    assert class_names(3, None, ['x', 'y', 'z'], labels, labels) == ['x', 'y', 'z']  # also of a class without images
    assert class_names(3, None, ['x', 'y'], labels, np.array([2, 0, 0])) == ['y', '', 'x']  # a subset's own order
    assert class_names(3, ['a', 'b']) == ['a', 'b', ''] and class_names(2, None) == ['', '']


def test_classes_without_names_or_images(tmp_path):
    logits, labels = batches()
    evaluated(tmp_path, logits, labels.clamp(max=4), names=['a\udce9\nb', *[''] * 6],
              images_of=lambda numbers: torch.zeros(len(numbers), 3, 8, 8))
    rows = rows_of(tmp_path / 'classes.csv')
    assert [row['images'] for row in rows[5:]] == ['0', '0'] and rows[6]['top1'] == rows[6]['taken_for'] == ''


# ---------------------------------------------------------------- files

def test_an_earlier_report_is_replaced_and_other_files_stay(tmp_path):
    logits, labels = batches()
    (tmp_path / 'notes.txt').write_text('mine')
    made = Report(tmp_path, NAMES, CPU, images_of=lambda numbers: torch.rand(len(numbers), 3, 16, 16))
    for name in ('', 'EMA'):
        made.record(logits, labels)
        made.write(name, range(200))
    before = contents(tmp_path)
    assert before.keys() == {'notes.txt', 'report.json', *report.FILES, *(f'ema_{name}' for name in report.FILES)}
    assert before['classes.csv'] == before['ema_classes.csv']  # the second began from nothing
    assert set(json.loads(before['report.json'])) == {'model', 'ema', 'report_files'}
    evaluated(tmp_path, logits[:50], labels[:50])
    after = contents(tmp_path)
    assert after.keys() == {'notes.txt', 'report.json', *report.FILES[:-1]}
    assert after['notes.txt'] == before['notes.txt']
    assert after['classes.csv'] != before['classes.csv']


def test_a_report_that_was_killed_is_replaced(tmp_path, monkeypatch):
    logits, labels = batches()
    monkeypatch.setattr(report, 'save_figure', None)
    with pytest.raises(TypeError):
        evaluated(tmp_path, logits, labels)
    monkeypatch.undo()
    assert (tmp_path / 'classes.csv').exists() and not (tmp_path / 'confusion.png').exists()
    evaluated(tmp_path, logits, labels)


def test_what_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('x')
    fails(lambda: check_report(str(tmp_path / 'file')), 'cannot be written')
    for name, content in (('classes.csv', 'my,own'), ('ema_confusion.png', ''), ('report.json', '{}'),
                          ('report.json', '[1]')):
        folder = tmp_path / f'{name}{content[:1]}'
        folder.mkdir()
        (folder / name).write_text(content)
        fails(lambda: check_report(str(folder)), f'{name}: is there, and of no report: choose another folder')
        assert contents(folder) == {name: content.encode()}
    fails(lambda: Report(tmp_path, [''] * 5001, CPU), '5,001 x 5,001 classes is too large; 5,000 are the most')
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    fails(lambda: check_report(str(tmp_path / 'new')), 'plots need matplotlib: pip install -r requirements-plot.txt')
    assert not (tmp_path / 'new').exists()
    check_report('')  # none


@pytest.mark.parametrize('classes', [2, 30, 31, 121])
def test_a_confusion_matrix_is_drawn_with_all_its_texts_inside(classes):
    counts = np.random.default_rng(0).integers(0, 3, (classes, classes)) + 9 * np.eye(classes, dtype=int)
    counts[1] = 0  # a class without images
    figure = draw_confusion(counts, [f'{number} $of a long name_{"x" * 30}' for number in range(classes)],
                            [str(number) for number in range(classes)])
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    texts = [text for panel in figure.axes for text in [*panel.texts] + panel.axison * [
        *panel.get_xticklabels(), *panel.get_yticklabels(), panel.xaxis.label, panel.yaxis.label] if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    width, height = figure.canvas.get_width_height()
    assert all(box.x0 >= -2 and box.x1 <= width + 2 and box.y0 >= -2 and box.y1 <= height + 2 for box in boxes)
    written = sum(text.get_text().isdigit() for text in figure.axes[0].texts)
    assert written == (np.count_nonzero(counts) if classes <= 30 else 0)
    if classes > 30:
        listed = next(text.get_text() for panel in figure.axes for text in panel.texts)
        assert listed.startswith('most often:\n2 of ') and listed.count('\n') == 15
    report.pyplot().close(figure)


# ---------------------------------------------------------------- programs

SIZES_OF_DEMO = ['--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder with images of three classes, and a run of main_pixels.py on them in run/."""
    folder = tmp_path_factory.mktemp('data')
    smooth_images(folder / 'images')
    call(main_pixels, *PIXELS, '--train-path', folder / 'images', '--no-eval', '--epochs', 1, '--output-dir',
         folder / 'run')
    return folder


PIXELS = ['--device', 'cpu', '--model', 'deit_tiny_patch16_224', *SIZES, '--input-size', 32, '--batch-size', 6,
          '--num-workers', 0]


def evaluate_pixels(data, *words):
    return call(main_pixels, *PIXELS, '--eval', '--resume', data / 'run' / 'checkpoint.pth', '--val-path',
                data / 'images', *words)


def test_of_images_and_of_averaged_weights(data, tmp_path, capsys):
    evaluate_pixels(data, '--report', tmp_path / 'plain')
    lines = accuracy_lines(capsys.readouterr().out)
    for line, prefix in zip(lines, ('', 'ema_')):
        check_adds_up(tmp_path / 'plain', line, prefix)
        rows = rows_of(tmp_path / 'plain' / f'{prefix}mistakes.csv')
        assert all(row['image'].split('/')[0] == row['label_name'] for row in rows)
        with Image.open(tmp_path / 'plain' / f'{prefix}mistakes.png') as sheet:
            assert sheet.height == 3 + -(-len(rows) // 5) * (96 + 48 + 6) + 3
    (tmp_path / 'two.txt').write_text('cat\nant\n')
    (tmp_path / 'images').mkdir()
    for name in ('ant', 'cat'):
        (tmp_path / 'images' / name).symlink_to(data / 'images' / name)
    evaluate_pixels(data, '--no-model-ema', '--report', tmp_path / 'two', '--classes', tmp_path / 'two.txt',
                    '--val-path', tmp_path / 'images', '--corruption', 'contrast', '--severity', 2)
    check_adds_up(tmp_path / 'two', accuracy_lines(capsys.readouterr().out)[0])
    assert [row['name'] for row in rows_of(tmp_path / 'two' / 'classes.csv')] == ['ant', 'cat']
    fails(lambda: call(main_pixels, *PIXELS, '--train-path', data / 'images', '--no-eval', '--report', tmp_path),
          '--report belongs to --eval')


@pytest.mark.slow
def test_two_processes_write_the_report_of_one(data, tmp_path, capsys):
    evaluate_pixels(data, '--no-model-ema', '--report', tmp_path / 'one')
    words = ['--eval', '--no-model-ema', '--resume', data / 'run' / 'checkpoint.pth', '--val-path', data / 'images']
    for name, more in (('shared', ['--dist-eval']), ('each', [])):
        run = start('main_pixels.py', *PIXELS, *words, *more, '--report', tmp_path / name, launch=two_processes())
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output
        check_adds_up(tmp_path / name, accuracy_lines(output)[0])
        for file in ('classes.csv', 'confusion.csv', 'report.json', 'mistakes.png'):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / 'one' / file).read_bytes(), file


def demo_checkpoint(folder, **more):
    """A checkpoint of main_seit.py for the demo's tokens, with new weights."""
    torch.manual_seed(0)
    model = create_model('deit_tiny_token_32', {'depth': 1, 'embed_dim': 32, 'num_heads': 2}, 10, 8, 32)
    torch.save({'model': model.state_dict(), **more}, folder / 'c.pth')
    return folder / 'c.pth'


def test_of_tokens_with_the_tokenizer_that_the_checkpoint_names(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / 'encoder.jit', 'w') as file:
        file.writestr('a/constants.pkl', '')
        file.writestr('a/code/b.py', '')
    program = {'file': 'encoder.jit', 'sha256': sha256(tmp_path / 'encoder.jit'), 'path': 'encoder.jit'}
    entry = {'file': 'tokenizer.pt', 'sha256': sha256(DEMO / 'tokenizer.pt'), 'path': str(DEMO / 'tokenizer.pt')}
    words = [*SIZES_OF_DEMO, '--device', 'cpu', '--input-size', 64, '--codebook-path', DEMO / 'codebook.ckpt',
             '--val-token-file', DEMO / 'fashion-val-token.data.bin', '--val-label-file',
             DEMO / 'fashion-val-label.txt', '--token-cache', 'none',
             '--no-model-ema', '--eval', '--report', tmp_path / 'r', '--resume']
    drawn = {}
    for name, made_with in (('drawn', {'tokenizer': entry}), ('none', None),
                            ('gone', {'tokenizer': {**entry, 'path': 'x', 'sha256': '0' * 64}}),
                            ('program', {'tokenizer': program})):
        run_here(*words, demo_checkpoint(tmp_path, made_with=made_with))
        printed = capsys.readouterr().out
        check_adds_up(tmp_path / 'r', accuracy_lines(printed)[0])
        drawn[name] = (tmp_path / 'r' / 'mistakes.png').exists()
        assert drawn[name] != ('note: the report shows no images of mistakes: ' in printed)
        assert 'allow-torchscript' not in printed
    assert drawn == {'drawn': True, 'none': False, 'gone': False, 'program': False}
    assert 'encoder.jit is a TorchScript program, which is not run for it' in printed
    assert rows_of(tmp_path / 'r' / 'classes.csv')[3]['name'] == '3-dress'  # of the token set's manifest


def test_of_masked_tokens(tmp_path, capsys):
    words = make_data(tmp_path)
    flags = ['--device', 'cpu', '--model', 'deit_tiny_token_32', *SIZES, '--batch-size', 4, '--input-size', 64, *words,
             '--tokenadapt-path', '', '--epochs', 1]
    call(main_mtm_finetune, *flags, '--no-eval', '--output-dir', tmp_path / 'run')
    call(main_mtm_finetune, *flags, '--eval', '--resume', tmp_path / 'run' / 'checkpoint-last.pth', '--report',
         tmp_path / 'r')
    check_adds_up(tmp_path / 'r', accuracy_lines(capsys.readouterr().out)[-1])


def test_of_images_as_tokens(tmp_path, capsys):
    for source in sorted((DEMO / 'images' / 'val').iterdir()):
        (tmp_path / 'images' / source.name).mkdir(parents=True)
        for path in sorted(source.iterdir())[:3]:
            (tmp_path / 'images' / source.name / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'images' / '4-coat' / '0.png').write_bytes(b'no image')
    call(evaluate_on_images, *SIZES_OF_DEMO, '--device', 'cpu', '--tokenizer-path', DEMO / 'tokenizer.pt',
         '--codebook-path', DEMO / 'codebook.ckpt', '--model-path', demo_checkpoint(tmp_path), '--data-path',
         tmp_path / 'images', '--tokenizer-input-size', 64, '--vit-input-size', 8, '--num-workers', 0, '--report',
         tmp_path / 'r', '--save-predictions', tmp_path / 'p.csv', '--skip-bad-images', '--batch-size', 7)
    check_adds_up(tmp_path / 'r', accuracy_lines(capsys.readouterr().out)[0])
    predictions = {row['image']: row for row in rows_of(tmp_path / 'p.csv')}
    mistakes = rows_of(tmp_path / 'r' / 'mistakes.csv')
    assert len(predictions) == 30 and len(mistakes) == 20
    for row in mistakes:
        same = predictions[row['image']]
        assert [row[key] for key in ('label', 'prediction', 'prediction_name', 'probability')] == [
            same[key] for key in ('label', 'prediction', 'prediction_name', 'probability')]
