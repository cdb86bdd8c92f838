"""Evaluation on images: against evaluation on tokens of the same images, and what bad images get."""
import json
import csv
import io
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

import evaluate_on_images
import main_seit
import tokenize_images
import utils
from fileio.files import sha256
from fileio.torch_files import digest_of
from helpers import DEMO, accuracy_lines, call, fails, start, two_processes
from image_data.sources import load_images, open_source
from image_tokenizer.tokenizers import load_tokenizer
from token_augment import EvalTransform
from token_dataset import TokenDataset
from token_files.codebook import load_codebook
from training.checkpoints import load_checkpoint
from utils import InputError

MODEL = ['--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2', '--device', 'cpu']
TOKENIZER = ['--tokenizer-path', DEMO / 'tokenizer.pt', '--codebook-path', DEMO / 'codebook.ckpt']


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Seven of the demo's images a class: 70, which no batch or world size divides."""
    folder = tmp_path_factory.mktemp('images')
    for source in sorted((DEMO / 'images' / 'val').iterdir()):
        (folder / source.name).mkdir()
        for path in sorted(source.iterdir())[:7]:
            (folder / source.name / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    models = [timm.create_model('deit_tiny_token_32', depth=1, embed_dim=32, num_heads=2, img_size=6, num_classes=10)
              for _ in range(2)]
    path = tmp_path_factory.mktemp('weights') / 'trained-vit.ckpt'
    torch.save({'model': models[0].state_dict(), 'model_ema': models[1].state_dict()}, path)
    return path


def words(images, checkpoint, *more):
    return [str(w) for w in [*MODEL, *TOKENIZER, '--model-path', checkpoint, '--data-path', images,
                             '--tokenizer-input-size', 64, '--vit-input-size', 6, '--num_workers', 0,
                             '--batch-size', 16, *more]]


def on_images(*args):
    return call(evaluate_on_images, *words(*args))


def tokenize(images, folder):
    call(tokenize_images, '--data-path', images, '--name', 'x', '--output-dir', folder, *TOKENIZER, '--image-size', 64,
         '--num-workers', 0, '--device', 'cpu')
    return folder / 'x-token.data.bin.gz', folder / 'x-label.txt'


def test_agrees_with_evaluation_on_tokens_of_the_same_images(images, checkpoint, tmp_path, capsys):
    tokens, labels = tokenize(images, tmp_path)
    call(main_seit, *MODEL, '--codebook-path', DEMO / 'codebook.ckpt', '--val-token-file', tokens, '--val-label-file',
         labels, '--input-size', 48, '--eval', '--resume', checkpoint, '--output', tmp_path / 'tokens.json')
    on_tokens = accuracy_lines(capsys.readouterr().out)
    on_images(images, checkpoint, '--output', tmp_path / 'images.json')
    on_images(images, checkpoint, '--use-ema', '--output', tmp_path / 'ema.json')
    assert accuracy_lines(capsys.readouterr().out) == on_tokens and len(on_tokens) == 2
    found = {name: json.loads((tmp_path / f'{name}.json').read_text()) for name in ('tokens', 'images', 'ema')}
    assert found['tokens'].pop('ema') == pytest.approx(found['ema'])
    assert found['tokens'] == pytest.approx(found['images'])
    assert f'* Acc@1 {found["images"]["acc1"]:.3f} Acc@5 {found["images"]["acc5"]:.3f} ' in on_tokens[0]


def test_logits_agree_with_those_on_tokens(images, checkpoint, tmp_path):
    data = TokenDataset(*tokenize(images, tmp_path), 391, 'none')
    codebook = load_codebook(DEMO / 'codebook.ckpt')
    sizes = {'depth': 1, 'embed_dim': 32, 'num_heads': 2}
    model, _ = evaluate_on_images.load_model(load_checkpoint(checkpoint), checkpoint, False, 'deit_tiny_token_32',
                                             sizes, None, 6, 32)
    model.eval()
    source = open_source(images)
    loaded = load_images(source, [list(part) for part in np.array_split(np.arange(70), 9)], 64)
    batches = evaluate_on_images.CodeBatches(loaded, torch.from_numpy(source.labels),
                                             load_tokenizer(DEMO / 'tokenizer.pt'), codebook, 'off')
    transform = EvalTransform(codebook, 6, torch.device('cpu'))
    with torch.no_grad():
        ours = torch.cat([model(transform(codes)) for codes, _ in batches])
        theirs = model(transform(data.batch(range(len(data)))[0]))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert batches.indices == list(range(70)) and batches.skipped == 0


def test_bf16_tokenizer_is_a_flag(images, checkpoint, capsys):
    on_images(images, checkpoint, '--tokenizer-amp', 'bf16', '--amp', 'bf16')
    assert len(accuracy_lines(capsys.readouterr().out)) == 1


def test_predictions_file(images, checkpoint, tmp_path, capsys):
    on_images(images, checkpoint, '--save-predictions', tmp_path / 'p.csv')
    line, = accuracy_lines(capsys.readouterr().out)
    rows = list(csv.DictReader((tmp_path / 'p.csv').open()))
    assert len(rows) == 70 and len({row['image'] for row in rows}) == 70
    right = sum(row['label'] == row['prediction'] for row in rows)
    in_top = sum(row['label'] in row['top5'].split() for row in rows)
    assert line.startswith(f'* Acc@1 {100 * right / 70:.3f} Acc@5 {100 * in_top / 70:.3f} ')
    assert all(row['top5'].split()[0] == row['prediction'] and 0 < float(row['probability']) <= 1 for row in rows)
    names = sorted(path.name for path in images.iterdir())
    assert list(rows[0])[:5] == ['image', 'label', 'prediction', 'probability', 'top5']  # as they always stood
    assert all(row[f'{part}_name'] == names[int(row[part])] for row in rows for part in ('label', 'prediction'))


def in_two_processes(images, checkpoint, *more):
    """(exit code, output) of two processes that share the images."""
    run = start('evaluate_on_images.py', *words(images, checkpoint, '--dist-eval', *more), launch=two_processes())
    output, _ = run.communicate(timeout=200)
    return run.returncode, output


@pytest.mark.slow
def test_two_processes_count_each_image_once(images, checkpoint, tmp_path, capsys):
    on_images(images, checkpoint, '--save-predictions', tmp_path / 'one.csv')
    alone = accuracy_lines(capsys.readouterr().out)
    code, output = in_two_processes(images, checkpoint, '--save-predictions', tmp_path / 'two.csv')
    assert code == 0, output
    # the loss may differ in its last digits, summed in another order
    assert [x.split()[:5] for x in accuracy_lines(output)] == [x.split()[:5] for x in alone]
    one, two = ([row.rsplit(',', 4)[0] for row in (tmp_path / f'{n}.csv').read_text().splitlines()]
                for n in ('one', 'two'))
    assert [row.split(',')[:3] for row in one] == [row.split(',')[:3] for row in two]


def with_a_bad_image(images, folder, number):
    """Copy images to a folder and truncate one; returns its path."""
    for path in images.rglob('*.png'):
        target = folder / path.relative_to(images)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    victim = sorted(folder.rglob('*.png'))[number]
    victim.write_bytes(victim.read_bytes()[:100])
    return victim


@pytest.mark.slow
def test_a_bad_image_that_only_the_second_rank_meets_is_named(images, checkpoint, tmp_path):
    victim = with_a_bad_image(images, tmp_path, 21)
    code, output = in_two_processes(tmp_path, checkpoint)
    assert code == 1  # torchrun's, where a rank failed
    assert output.count('error: ') == 1
    assert f'error: {tmp_path}: {victim.relative_to(tmp_path)} is no readable' in output


@pytest.mark.parametrize('batch_size', [64, 1])  # a batch with others, and alone
def test_bad_images(batch_size, images, checkpoint, tmp_path, capsys):
    victim = with_a_bad_image(images, tmp_path, 20)
    with pytest.raises(InputError, match=f'{victim.name}.*--skip-bad-images'):
        on_images(tmp_path, checkpoint)
    on_images(tmp_path, checkpoint, '--skip-bad-images', '--save-predictions', tmp_path / 'p.csv', '--batch-size',
              batch_size)
    said = capsys.readouterr()
    assert '1 unreadable images were left out' in said.out and f'skipped {victim.relative_to(tmp_path)}: ' in said.err
    assert len((tmp_path / 'p.csv').read_text().splitlines()) == 70


def test_it_is_said_where_averaged_weights_are_not_taken(images, checkpoint, tmp_path, capsys):
    note = 'its plain weights are taken, not the averaged ones (EMA) that it holds too; --use-ema takes those'
    on_images(images, checkpoint)
    assert f'note: {checkpoint}: {note}' in capsys.readouterr().out
    on_images(images, checkpoint, '--use-ema')
    weights = torch.load(checkpoint)
    torch.save({'model': weights['model']}, tmp_path / 'plain.ckpt')
    on_images(images, tmp_path / 'plain.ckpt')
    assert 'averaged' not in capsys.readouterr().out


def test_a_list_of_files_is_evaluated_like_their_folder(images, checkpoint, tmp_path, capsys):
    on_images(images, checkpoint)
    classes = sorted(path.name for path in images.iterdir())
    (images.parent / 'list.txt').write_text(''.join(
        f'{path.relative_to(images.parent)} {classes.index(path.parent.name)}\n' for path in images.rglob('*.png')))
    on_images(images.parent / 'list.txt', checkpoint)
    of_folder, of_list = accuracy_lines(capsys.readouterr().out)
    assert of_folder.split()[:5] == of_list.split()[:5]
    (images.parent / 'list.txt').write_text(f'{next(images.rglob("*.png"))} 12\n')
    with pytest.raises(InputError, match='list.txt: 13 classes, but the model has 10'):
        on_images(images.parent / 'list.txt', checkpoint)


@pytest.mark.parametrize('flags, message', [
    (['--tokenizer-input-size', 60], '--tokenizer-input-size 60: .* patches of 8: choose 56 or 64'),
    (['--tokenizer-input-size', 40], 'larger than the 5x5'),
    (['--tokenizer-input-size', 8], 'a token grid of 1x1 codes is too small for any model'),
    (['--vit-input-size', 4], 'pos_embed'), (['--data-path', 'nowhere'], 'nowhere: no such file or folder'),
    (['--tokenizer-path', 'no.pt'], 'no.pt'), (['--nb_classes', 3], 'head.weight'),
    (['--tokenizer-path', DEMO / 'codebook.ckpt'], 'no known kind'),
    (['--corruption', 'fog', '--severity', 3], "'fog'.*gaussian_noise.*pixelate"),
    (['--corruption', 'contrast'], 'give a --severity from 1 to 5'), (['--severity', 3], 'name a --corruption'),
    (['--corruption', 'contrast', '--severity', 6], 'a value from 1 to 5'),
    (['--classes', 'imagenet-r'], "trained-vit.ckpt has no class 'n01443537', only 10"),
    (['--classes', 'imagenet-x'], '--classes imagenet-x: no such file, and none of imagenet, imagenet-sketch, '),
    (['--batch-size', 0], '--batch-size: 0: give a value of 1 or more'),
    (['--num_workers', -1], '--num-workers: -1: give a value of 0'), (['--vit-input-size', 1], 'of 2 or more')])
def test_mistakes(flags, message, images, checkpoint):
    with pytest.raises(InputError, match=message):
        on_images(images, checkpoint, *flags)


def test_published_defaults():
    args = evaluate_on_images.parse_args(['--data-path', 'x', '--eval', '--nb_classes', '1000'])
    expected = {'batch_size': 64, 'model': 'deit_base_token_32', 'model_path': 'weights/trained-vit.ckpt',
                'codebook_path': 'weights/codebook.ckpt', 'vit_input_size': 28,
                'tokenizer_path': 'weights/tokenizer.ckpt', 'tokenizer_code_path': None, 'tokenizer_input_size': 256,
                'device': 'auto', 'dist_eval': False, 'num_workers': 10, 'pin_mem': True}
    assert {k: getattr(args, k) for k in expected} == expected


# ---------------------------------------------------------------- class names

@pytest.fixture
def named(checkpoint, tmp_path, images):
    """A function: the checkpoint with class names, made from those of the images."""
    names = sorted(path.name for path in images.iterdir())

    def save(change):
        path = tmp_path / 'named.ckpt'
        torch.save({**torch.load(checkpoint, weights_only=True), 'classes': change(names)}, path)
        return path
    return save


@pytest.mark.parametrize('change', [lambda names: names, lambda names: None, lambda names: 7, lambda names: [1, 2]],
                         ids=['the same', 'none', 'no list', 'no names'])
def test_class_names_that_are_the_same_or_unknown(change, named, images, capsys):
    assert on_images(images, named(change)) == 0
    assert len(accuracy_lines(capsys.readouterr().out)) == 1


@pytest.mark.parametrize('change, message', [
    (lambda names: names[1:] + names[:1], "class 0 is '0-tshirt', but in .*named.ckpt it is '1-trouser'"),
    (lambda names: names[:9] + ['9-Boot'], "class 9 is '9-boot', but in .*named.ckpt it is '9-Boot'"),
    (lambda names: names[:3] + ['dre\u0301ss'] + names[4:], "class 3 is '3-dress'.* it is 'dre.u0301ss'"),
    (lambda names: names[:9], "class 9 is '9-boot', but in .*named.ckpt it is missing")],
    ids=['shifted', 'spelled otherwise', 'another Unicode form', 'one fewer'])
def test_class_names_that_differ_are_refused(change, message, named, images, monkeypatch):
    monkeypatch.setattr(evaluate_on_images, 'load_images', None)
    fails(lambda: on_images(images, named(change)), message)


def test_folders_called_by_their_labels_name_no_class(named, images, tmp_path):
    """Folders 0 to 9, or a checkpoint from such, say nothing against names; other numbers do."""
    for label, folder in enumerate(sorted(images.iterdir())):
        (tmp_path / 'numbers' / f'{label:02d}').mkdir(parents=True)
        for path in folder.iterdir():
            (tmp_path / 'numbers' / f'{label:02d}' / path.name).write_bytes(path.read_bytes())
    assert on_images(tmp_path / 'numbers', named(lambda names: names)) == 0
    assert on_images(tmp_path / 'numbers', named(lambda names: [str(label) for label in range(10)])) == 0
    assert on_images(images, named(lambda names: [str(label) for label in range(10)])) == 0
    for shifted in ([*map(str, range(1, 11))], ['0', '1', '10', *'3456789']):
        for folder in (images, tmp_path / 'numbers'):
            fails(lambda: on_images(folder, named(lambda names: shifted)), 'labels would mean other classes')


def test_images_that_lack_a_class_are_refused_and_those_that_lack_the_last_are_noted(named, images, tmp_path, capsys):
    checkpoint = named(lambda names: names)
    for missing, name in (('0-tshirt', 'zero'), ('9-boot', 'nine')):
        for path in images.rglob('*.png'):
            if path.parent.name != missing:
                target = tmp_path / name / path.relative_to(images)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    fails(lambda: on_images(tmp_path / 'zero', checkpoint), "zero: class 0 is '1-trouser'.*it is '0-tshirt'")
    on_images(tmp_path / 'nine', checkpoint)  # its labels mean the same
    assert 'nine has 9 classes and the model 10' in capsys.readouterr().out


def test_damaged_tokenizers_give_no_accuracy(monkeypatch):
    codes = torch.zeros(2, 16, dtype=torch.int64)
    codebook = torch.randn(5, 4)
    features = torch.randn(2, 16, 4)
    batch = SimpleNamespace(indices=np.arange(2), pixels=None, skipped=[])
    for found in ((None, codes), (features, codes)):
        monkeypatch.setattr(evaluate_on_images, 'encode_images', lambda *_, found=found: found)
        assert len(list(evaluate_on_images.CodeBatches([batch], torch.arange(2), None, codebook, 'off'))) == 1
        found[0 if found[0] is not None else 1][1, 3] = float('nan') if found[0] is not None else -1
        fails(lambda: list(evaluate_on_images.CodeBatches([batch], torch.arange(2), None, codebook, 'off')),
              'the tokenizer gives no codes for some images')


# ---------------------------------------------------------------- robustness

@pytest.mark.slow
def test_corrupted_images(images, checkpoint, tmp_path, capsys):
    """The predictions change with corruption and seed, and not with batches or worker processes."""
    predictions = {}
    for name, more in {'clean': [], 'a': ['--corruption', 'gaussian_noise', '--severity', 3],
                       'b': ['--corruption', 'gaussian_noise', '--severity', 3, '--num-workers', 2, '--batch-size', 9],
                       'c': ['--corruption', 'gaussian_noise', '--severity', 3, '--seed', 1]}.items():
        on_images(images, checkpoint, *more, '--save-predictions', tmp_path / name)
        rows = csv.DictReader((tmp_path / name).open())
        predictions[name] = np.array([float(row['probability']) for row in rows])
    said = capsys.readouterr().out
    assert said.count('amp off; corrupted by gaussian_noise of severity 3, seed 0\n') == 2
    np.testing.assert_allclose(predictions['a'], predictions['b'], atol=2e-6)
    assert all(np.abs(predictions['a'] - predictions[other]).max() > 1e-4 for other in ('clean', 'c'))


def test_a_subset_of_the_classes(images, checkpoint, tmp_path, capsys):
    """Images of three of the ten classes: labels and predictions keep the model's numbers."""
    (tmp_path / 'three').mkdir()
    for name in ('2-pullover', '5-sandal', '9-boot'):
        (tmp_path / 'three' / name).symlink_to(images / name)
    (tmp_path / 'classes.txt').write_text('2\n5\n9\n')
    on_images(tmp_path / 'three', checkpoint, '--classes', tmp_path / 'classes.txt', '--save-predictions',
              tmp_path / 'p.csv')
    line, = accuracy_lines(capsys.readouterr().out)
    rows = list(csv.DictReader((tmp_path / 'p.csv').open()))
    assert [row['label'] for row in rows] == ['2'] * 7 + ['5'] * 7 + ['9'] * 7
    assert [row['label_name'] for row in rows[::7]] == ['2-pullover', '5-sandal', '9-boot']
    assert all(sorted(row['top5'].split()) == ['2', '5', '9'] for row in rows)
    right = sum(row['label'] == row['prediction'] for row in rows)
    assert line.startswith(f'* Acc@1 {100 * right / 21:.3f} Acc@5 100.000 loss ') and 'inf' not in line
    fails(lambda: on_images(images, checkpoint, '--classes', tmp_path / 'classes.txt'), '10 classes.*is 3')


# ---------------------------------------------------------------- predictions that cannot be written, odd names

@pytest.mark.parametrize('name', ['file/p.csv', 'n' * 250, '.', 'file/a/p.csv'])
def test_predictions_that_cannot_be_written_are_refused_before_the_work(name, images, checkpoint, tmp_path,
                                                                         monkeypatch):
    (tmp_path / 'file').write_text('x')
    monkeypatch.setattr(evaluate_on_images, 'load_checkpoint', None)
    fails(lambda: on_images(images, checkpoint, '--save-predictions', tmp_path / name), 'cannot be written')


def test_names_that_are_not_utf_8_are_escaped(images, checkpoint, tmp_path, capsys):
    folder = tmp_path / 'images'
    for path in images.rglob('*.png'):
        target = os.fsencode(folder / path.relative_to(images))
        if path.parent.name == '3-dress':
            target = target.replace(b'dress', b'robe d\xe9t\xe9').replace(b'.png', b' \xff,"x".png')
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, 'wb') as file:
            file.write(path.read_bytes())
    on_images(folder, checkpoint, '--save-predictions', tmp_path / 'p.csv')
    rows = list(csv.DictReader((tmp_path / 'p.csv').open(encoding='utf-8')))
    assert len(rows) == 70
    odd = [row['image'] for row in rows if row['label'] == '3']
    assert len(odd) == 7 and all(re.fullmatch(r'3-robe d\\udce9t\\udce9/.* \\udcff,"x".png', name) for name in odd)


def test_paths_that_are_not_utf_8_are_escaped_in_print(monkeypatch):
    """In a locale whose output is strict, one such path would silence all that is printed after it."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, 'utf-8', errors='strict'))
    utils.keep_standard_output()
    utils.print0('caf\udce9/p.csv')
    utils.print0('* Acc@1')
    assert raw.getvalue() == b'caf\\udce9/p.csv\n* Acc@1\n'


def test_weights_with_the_prefixes_of_ddp_and_compile(images, checkpoint, tmp_path, capsys):
    on_images(images, checkpoint)
    plain = accuracy_lines(capsys.readouterr().out)
    weights = torch.load(checkpoint, weights_only=True)['model']
    for prefix in ('module.', '_orig_mod.', 'module._orig_mod.'):
        torch.save({'model': {prefix + key: value for key, value in weights.items()}}, tmp_path / 'c.ckpt')
        on_images(images, tmp_path / 'c.ckpt')
        assert accuracy_lines(capsys.readouterr().out) == plain


def test_images_turned_otherwise_than_in_training_are_noted(images, checkpoint, tmp_path, capsys):
    torch.save(torch.load(checkpoint, weights_only=True) | {'data': {'EXIF rotation': False}}, tmp_path / 'c.ckpt')
    on_images(images, tmp_path / 'c.ckpt')
    assert 'EXIF' not in capsys.readouterr().out
    on_images(images, tmp_path / 'c.ckpt', '--exif-rotate')
    assert capsys.readouterr().out.count('note: --exif-rotate is True; the run that wrote ') == 1
    on_images(images, checkpoint, '--exif-rotate')  # which says nothing
    assert 'exif' not in capsys.readouterr().out
    torch.save(torch.load(checkpoint, weights_only=True) | {'data': {'EXIF rotation': True}}, tmp_path / 'c.ckpt')
    on_images(images, tmp_path / 'c.ckpt')
    assert f'{tmp_path / "c.ckpt"}: --exif-rotate\n' in capsys.readouterr().out, 'the checkpoint knows'


def test_large_images_are_bad_unless_allowed(images, checkpoint, capsys):
    fails(lambda: on_images(images, checkpoint, '--max-image-pixels', 100), 'is no readable image')
    on_images(images, checkpoint, '--max-image-pixels', 28 * 28)
    assert len(accuracy_lines(capsys.readouterr().out)) == 1


def test_nothing_is_left_to_evaluate(checkpoint, tmp_path):
    for name in '0123456789':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'a.png').write_bytes(b'no image')
    fails(lambda: on_images(tmp_path, checkpoint, '--skip-bad-images'), 'no image is left to evaluate')


def test_flags_without_effect_say_so(images, checkpoint, capsys):
    on_images(images, checkpoint, '--eval', '--world_size', 1)
    said = capsys.readouterr().out
    assert all(f'note: {flag} has no effect' in said for flag in ('--eval', '--world-size'))


# ---------------------------------------------------------------- what the model was trained with

def test_the_tokenizer_and_codebook_of_training_are_asked_for(images, checkpoint, tmp_path, capsys):
    content = {'model': torch.load(checkpoint, weights_only=True)['model']}
    codebook = load_codebook(DEMO / 'codebook.ckpt')
    made_with = {'codebook': digest_of(codebook), 'tokenizer': sha256(DEMO / 'tokenizer.pt'),
                 'size of tokenized images': 64}
    args = {'model': 'deit_tiny_token_32', 'model_kwargs': {'depth': 1, 'embed_dim': 32, 'num_heads': 2},
            'input_size': 48, 'token_patch_size': 8}
    path = tmp_path / 'trained.pth'
    torch.save(content | {'data': made_with, 'args': args}, path)
    on_images(images, path)
    assert 'note: ' not in capsys.readouterr().out
    torch.save(codebook.flip(0), tmp_path / 'other.ckpt')
    fails(lambda: on_images(images, path, '--codebook-path', tmp_path / 'other.ckpt'),
          'trained.pth: was trained with another codebook than that of .*other.ckpt')
    tokenizer = torch.load(DEMO / 'tokenizer.pt', weights_only=True)
    torch.save({**tokenizer, 'mean': tokenizer['mean'] + 1}, tmp_path / 'other.pt')
    fails(lambda: on_images(images, path, '--tokenizer-path', tmp_path / 'other.pt'),
          'trained.pth: was trained with another tokenizer than that of .*other.pt')
    for words, note in ((['--tokenizer-input-size', 56], 'size of tokenized images is 56 pixels; '),
                        (['--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=4'], '--model-kwargs is '),
                        (['--model', 'deit_small_token_32'], '--model is deit_small_token_32; ')):
        on_images(images, path, *words)
        assert f'note: {note}' in capsys.readouterr().out
