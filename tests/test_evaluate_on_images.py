"""Evaluation on images: against evaluation on tokens of the same images, and what bad images get."""
import csv
import os
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

import evaluate_on_images
import main_seit
import tokenize_images
from conftest import ROOT
from test_main_seit import accuracy_lines, two_processes
from token_augment import EvalTransform
from token_dataset import TokenDataset, load_codebook
from utils import InputError

DEMO = ROOT / 'demo'
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
    make = lambda: timm.create_model('deit_tiny_token_32', depth=1, embed_dim=32, num_heads=2, img_size=6,  # noqa: E731
                                     num_classes=10).state_dict()
    path = tmp_path_factory.mktemp('weights') / 'trained-vit.ckpt'
    torch.save({'model': make(), 'model_ema': make()}, path)
    return path


def words(images, checkpoint, *more):
    return [str(w) for w in [*MODEL, *TOKENIZER, '--model-path', checkpoint, '--data-path', images,
                             '--tokenizer-input-size', 64, '--vit-input-size', 6, '--num_workers', 0,
                             '--batch-size', 16, *more]]


def on_images(*args):
    evaluate_on_images.main(evaluate_on_images.parse_args(words(*args)))


def tokenise(images, folder):
    tokenize_images.main(tokenize_images.get_args_parser().parse_args([str(w) for w in [
        '--data-path', images, '--name', 'x', '--output-dir', folder, *TOKENIZER, '--image-size', 64,
        '--num-workers', 0, '--device', 'cpu']]))
    return folder / 'x-token.data.bin.gz', folder / 'x-label.txt'


def test_agrees_with_evaluation_on_tokens_of_the_same_images(images, checkpoint, tmp_path, capsys):
    tokens, labels = tokenise(images, tmp_path)
    main_seit.main(main_seit.parse_args([str(w) for w in [
        *MODEL, '--codebook-path', DEMO / 'codebook.ckpt', '--val-token-file', tokens, '--val-label-file', labels,
        '--input-size', 48, '--eval', '--resume', checkpoint]]))
    on_tokens = accuracy_lines(capsys.readouterr().out)
    on_images(images, checkpoint)
    on_images(images, checkpoint, '--use-ema')
    assert accuracy_lines(capsys.readouterr().out) == on_tokens and len(on_tokens) == 2


def test_logits_agree_with_those_on_tokens(images, checkpoint, tmp_path):
    data = TokenDataset(*tokenise(images, tmp_path), 391, 'none')
    args = evaluate_on_images.parse_args(words(images, checkpoint))
    codebook = load_codebook(args.codebook_path)
    model = evaluate_on_images.load_model(args, codebook, torch.device('cpu')).eval()
    source = evaluate_on_images.open_source(images)
    batches = evaluate_on_images.ImageCodes(source, evaluate_on_images.load_tokenizer(args.tokenizer_path), codebook,
                                            torch.device('cpu'), args)
    transform = EvalTransform(codebook, 6, 'cpu')
    with torch.no_grad():
        ours = torch.cat([model(transform(codes)) for codes, _ in batches])
        theirs = model(transform(data.batch(range(len(data)))[0]))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


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


def in_two_processes(images, checkpoint, *more):
    """A finished run of two processes that share the images."""
    return subprocess.run([sys.executable, *two_processes(), str(ROOT / 'evaluate_on_images.py'),
                           *words(images, checkpoint, '--dist-eval', *more)],
                          capture_output=True, text=True, cwd=checkpoint.parent,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})


def test_two_processes_count_each_image_once(images, checkpoint, tmp_path, capsys):
    on_images(images, checkpoint, '--save-predictions', tmp_path / 'one.csv')
    alone = accuracy_lines(capsys.readouterr().out)
    done = in_two_processes(images, checkpoint, '--save-predictions', tmp_path / 'two.csv')
    assert done.returncode == 0, done.stderr
    # the loss may differ in its last digits, summed in another order
    assert [x.split()[:5] for x in accuracy_lines(done.stdout)] == [x.split()[:5] for x in alone]
    one, two = ([row.rsplit(',', 2)[0] for row in (tmp_path / f'{n}.csv').read_text().splitlines()]
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


def test_a_bad_image_that_only_the_second_rank_meets_is_named(images, checkpoint, tmp_path):
    victim = with_a_bad_image(images, tmp_path, 21)
    done = in_two_processes(tmp_path, checkpoint)
    assert done.returncode and f'error: {tmp_path}: {victim.relative_to(tmp_path)} is no readable' in done.stderr


def test_bad_images(images, checkpoint, tmp_path, capsys):
    victim = with_a_bad_image(images, tmp_path, 20)
    with pytest.raises(InputError, match=f'{victim.name}.*--skip-bad-images'):
        on_images(tmp_path, checkpoint)
    on_images(tmp_path, checkpoint, '--skip-bad-images', '--save-predictions', tmp_path / 'p.csv')
    said = capsys.readouterr()
    assert '1 unreadable images were left out' in said.out and f'skipped {victim.relative_to(tmp_path)}: ' in said.err
    assert len((tmp_path / 'p.csv').read_text().splitlines()) == 70


@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGBA', 'CMYK', 'I;16', '1'])
def test_images_of_every_mode_become_rgb(mode, tmp_path):
    rgb = Image.radial_gradient('L').resize((32, 32))
    image = Image.new('I;16', (32, 32), 9000) if mode == 'I;16' else rgb.convert('RGB').convert(mode)
    path = tmp_path / 'a' / ('x.jpg' if mode == 'CMYK' else 'x.png')
    path.parent.mkdir()
    image.save(path)
    pixels, _, problem = evaluate_on_images.DecodedImages(evaluate_on_images.open_source(tmp_path), 16)[0]
    assert pixels.shape == (3, 16, 16) and pixels.max() > 0 and not problem


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
    (['--tokenizer-input-size', 60], 'multiple of 8'), (['--tokenizer-input-size', 40], 'larger than the 5x5'),
    (['--vit-input-size', 4], 'pos_embed'), (['--data-path', 'nowhere'], 'nowhere: no such file or folder'),
    (['--tokenizer-path', 'no.pt'], 'no.pt'), (['--nb_classes', 3], 'head.weight'),
    (['--tokenizer-path', DEMO / 'codebook.ckpt'], 'no known kind'), (['--batch-size', 0], '--batch-size 0: must be 1'),
    (['--num_workers', -1], '--num-workers -1: must be 0'), (['--vit-input-size', 1], 'must be 2')])
def test_mistakes(flags, message, images, checkpoint):
    with pytest.raises(InputError, match=message):
        on_images(images, checkpoint, *flags)


def test_published_defaults():
    args = evaluate_on_images.parse_args(['--data-path', 'x', '--eval', '--nb_classes', '1000'])
    expected = {'batch_size': 64, 'model': 'deit_base_token_32', 'model_path': 'weights/trained-vit.ckpt',
                'codebook_path': 'weights/codebook.ckpt', 'vit_input_size': 28,
                'tokenizer_path': 'weights/tokenizer.ckpt', 'tokenizer_code_path': None, 'tokenizer_input_size': 256,
                'device': 'cuda', 'dist_eval': False, 'num_workers': 10, 'pin_mem': True}
    assert {k: getattr(args, k) for k in expected} == expected
