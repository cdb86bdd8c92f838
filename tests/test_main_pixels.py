"""main_pixels.py: the recipe on images."""
import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import main_pixels
from helpers import (Killed, accuracy_lines, as_list, as_parquet, as_tars, before_step, call, fails, held, kill,
                     read_log, save_image, states, without_times)
from processes import Job, training_differs

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = ['--device', 'cpu', '--model', 'vit_tiny_patch16_224', '--model-kwargs', 'depth=1', 'embed_dim=32',
         'num_heads=2', '--input-size', '32', '--batch-size', '8', '--warmup-epochs', '0', '--lr', '1e-2',
         '--num-workers', '0']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """45 images of four classes, the color of which tells the class."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for number in range(45):
        label = number % 4
        pixels = rng.integers(0, 60, (40, 44, 3), dtype=np.uint8)
        pixels[..., label % 3] += np.uint8(60 * (1 + label))
        path = folder / f'class-{label}' / f'{number:02d}.png'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def train(data, *flags):
    return call(main_pixels, *SMALL, '--train-path', data, '--val-path', data, *flags)


def test_turned_images_are_counted_once_and_kept_for_a_resumed_run(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / 'in')
    for path in sorted((tmp_path / 'in').rglob('*.png'))[:9]:
        path.write_bytes(held(Image.open(path), 8))
    words = ['--output-dir', tmp_path / 'out', '--exif-rotate']
    assert train(tmp_path / 'in', *words, '--epochs', 2, '--no-eval') == 0
    note, = (line for line in capsys.readouterr().out.splitlines() if 'note:' in line and 'EXIF' in line)
    count, = re.findall(r': (\d) of the images read have an EXIF orientation other than 1, and are turned by it', note)
    assert 4 < int(count) <= 9  # of the 40 images of an epoch's whole batches
    assert states(tmp_path / 'out' / 'checkpoint.pth')['data']['EXIF rotation'] is True
    fails(lambda: train(tmp_path / 'in', *words[:-1], '--epochs', 3, '--no-eval', '--resume', 'auto'),
          'differs in exif_rotate True -> False')
    assert train(tmp_path / 'in', *words, '--epochs', 3, '--no-eval', '--resume', 'auto') == 0


@pytest.mark.slow
def test_killed_within_an_epoch_and_resumed_equals_uninterrupted(data, tmp_path, monkeypatch):
    flags = ['--epochs', 2, '--aug', 'deit', '--drop-path', 0.3, '--save-every', 1, '--output-dir']
    assert train(data, *flags, tmp_path / 'whole') == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 1, 2, kill)
        train(data, *flags, tmp_path / 'cut')
    assert states(tmp_path / 'cut' / 'checkpoint.pth')['step'] == 2
    # what comes after it is decoded by other processes
    assert train(data, *flags, tmp_path / 'cut', '--num-workers', 2, '--resume', 'auto') == 0
    assert not training_differs(tmp_path / 'whole', tmp_path / 'cut')


@pytest.mark.slow
def test_two_processes(data, tmp_path, capsys):
    """Evaluation shared by two processes equals that of one; 45 images do not divide by 2."""
    words = [*SMALL, '--train-path', data, '--val-path', data, '--epochs', 1, '--dist-eval', '--output-dir', tmp_path]
    assert Job('main_pixels', words, 2, tmp_path / 'out').wait() == [0, 0]
    output = (tmp_path / 'out').read_text()
    assert 'batch: 8 x 2 = 16, 2 steps an epoch' in output
    train(data, '--eval', '--resume', tmp_path / 'checkpoint.pth')
    alone = accuracy_lines(capsys.readouterr().out)
    assert alone == accuracy_lines(output) and len(alone) == 2


def test_each_rank_sees_other_images_and_all_copies_differ():
    seen = [main_pixels.draws_of(3, 1, np.arange(rank, 12, 2), 0, 1) for rank in range(2)]
    assert sorted(np.concatenate(seen)[:, 2]) == list(range(12))
    indices = np.repeat(np.arange(4), 3)
    draws = main_pixels.draws_of(3, 1, indices, 0, 3)
    assert len({tuple(draw) for draw in draws.tolist()}) == 12
    assert draws[:, :2].tolist() == [[3, 1]] * 12
    assert np.array_equal(main_pixels.draws_of(3, 1, indices[5:], 5, 3), draws[5:])  # as a resumed run has them


def test_it_learns_from_every_source(data, tmp_path):
    """Class folders, a list, tar shards and parquet files of the same images give the same run."""
    pytest.importorskip('pyarrow')
    (tmp_path / 'parquet').mkdir()
    sources = [data, as_list(data, tmp_path), as_tars(data, tmp_path), as_parquet(data, tmp_path / 'parquet')]
    logs = []
    for number, source in enumerate(sources):
        out = tmp_path / str(number)
        call(main_pixels, *SMALL, '--train-path', source, '--val-path', source, '--epochs', 3, '--output-dir', out,
             '--mixup-prob', 0, '--rrc-ratio', 0.5)
        logs.append(without_times(read_log(out)))
    assert logs[0][-1]['test_acc1'] > 60
    assert all(log == logs[0] for log in logs)


def test_defaults_of_an_augmentation_can_be_overridden(data):
    words = ['--train-path', str(data), '--val-path', str(data)]
    tokens = main_pixels.parse_args(words)
    assert (tokens.hflip, tokens.aa, tokens.reprob, tokens.repeated_aug, tokens.mixup, tokens.cutmix) == (
        0, '', 0, False, 0, 1)
    deit = main_pixels.parse_args([*words, '--aug', 'deit', '--mixup', '0.2', '--no-repeated-aug'])
    assert (deit.hflip, deit.aa, deit.reprob, deit.repeated_aug, deit.mixup, deit.cutmix) == (
        0.5, 'rand-m9-mstd0.5-inc1', 0.25, False, 0.2, 1)


def test_a_convolutional_network_resumes_with_its_counters(data, tmp_path):
    flags = ['--model', 'resnet10t', '--model-kwargs', '--attn-only', '--drop-path', 0, '--epochs', 1]
    fails(lambda: train(data, *flags), '--attn-only: the model has no attention')
    flags.remove('--attn-only')
    train(data, *flags, '--output-dir', tmp_path)
    flags[-1] = 2
    train(data, *flags, '--output-dir', tmp_path, '--resume', 'auto')
    assert states(tmp_path / 'checkpoint.pth')['model']['bn1.num_batches_tracked'] == 10


def test_weights_of_tokens_and_pixels_start_each_other(data, tmp_path, capsys):
    tokens = timm.create_model('deit_tiny_token_32', depth=1, embed_dim=32, num_heads=2, img_size=4, num_classes=4)
    torch.save({'model': tokens.state_dict()}, tmp_path / 'tokens.pth')
    train(data, '--finetune', tmp_path / 'tokens.pth', '--lr', 0, '--min-lr', 0, '--warmup-lr', 0, '--epochs', 1,
          '--output-dir', tmp_path / 'out', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2',
          'global_pool=avg')
    assert ('tokens.pth: 18 tensors kept (norm.* as fc_norm.*), started from scratch: patch_embed.proj.* (another '
            'shape)\n') in capsys.readouterr().out
    pixels = states(tmp_path / 'out' / 'checkpoint.pth')['model']
    assert torch.equal(pixels['fc_norm.weight'], tokens.norm.weight)
    assert torch.equal(pixels['pos_embed'], tokens.pos_embed)
    assert torch.equal(pixels['head.weight'], tokens.head.weight)


MISTAKES = {
    'unknown model': (['--model', 'vit_tinny_patch16_224'], 'no such model; near it are .*vit_tiny_patch16_224'),
    'tokens': (['--model', 'deit_tiny_token_32'], 'reads tokens; train it with main_seit.py'),
    'size': (['--input-size', '40'], '--input-size 40: patches of 16 pixels do not divide'),
    'checkpointing': (['--model', 'pit_ti_224', '--model-kwargs', '--grad-checkpointing', '--input-size', '64'],
                      'pit_ti_224 .*checkpointing'),
    'whole patches': (['--model', 'xcit_nano_12_p16_224', '--model-kwargs', '--input-size', '40'], 'divide'),
    'arguments': (['--model-kwargs', 'deep=3'], 'deep'),
    'policy': (['--aa', 'randy'], '--aa randy: is no policy'),
    'crop': (['--eval-crop-ratio', '0'], 'from 0.01 to 1'),
    'path': (['--val-path', '/nowhere'], '/nowhere'),
    'classes': (['--nb-classes', '3'], 'holds class 3, but there are 3 classes'),
    'odd': (['--batch-size', '7'], 'is odd'),
    'box': (['--cutmix-minmax', '0.8', '0.3'], 'give two rising shares'),
    'weights': (['--model-kwargs', 'checkpoint_path=x.pth'], '--model-kwargs checkpoint_path: a model is made'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_one_line(data, name):
    flags, pattern = MISTAKES[name]
    fails(lambda: train(data, *flags, '--epochs', 1), pattern)


def test_other_mistakes_are_one_line(data, tmp_path):
    fails(lambda: call(main_pixels, *SMALL, '--train-path', data), '--val-path: name the images')
    for name in ('class-0', 'class-1', 'other'):
        save_image(tmp_path / name / '0.png', 1)
    fails(lambda: train(data, '--val-path', tmp_path), "class 2 is 'other', but in .* it is 'class-2'")
    (tmp_path / 'class-0' / '1.png').write_bytes(b'no image')
    fails(lambda: call(main_pixels, *SMALL, '--train-path', tmp_path, '--no-eval', '--batch-size', 4, '--epochs', 1),
          'class-0/1.png is no readable image .* replace or remove it$')


def test_a_checkpoint_of_other_classes_is_refused(data, tmp_path):
    train(data, '--epochs', 1, '--output-dir', tmp_path / 'out')
    for name in ('class-0', 'dog'):
        save_image(tmp_path / 'val' / name / '0.png', 1)
    fails(lambda: call(main_pixels, *SMALL, '--eval', '--resume', tmp_path / 'out' / 'checkpoint.pth', '--val-path',
                       tmp_path / 'val'), re.escape(str(tmp_path / 'val')) + ": class 1 is 'dog'")


@pytest.mark.slow
def test_corrupted_images_and_some_classes(data, tmp_path, capsys):
    train(data, '--epochs', 3, '--lr', 0.1, '--output-dir', tmp_path)
    evaluate = [*SMALL, '--eval', '--no-model-ema', '--resume', tmp_path / 'checkpoint.pth', '--val-path', data]
    capsys.readouterr()

    def accuracy(*flags):
        call(main_pixels, *evaluate, *flags, '--output', tmp_path / 'found.json')
        line, = accuracy_lines(capsys.readouterr().out)
        found = json.loads((tmp_path / 'found.json').read_text())
        assert line == f'* Acc@1 {found["acc1"]:.3f} Acc@5 {found["acc5"]:.3f} loss {found["loss"]:.4f}'
        return line
    clean = accuracy()
    gray = ['--corruption', 'contrast', '--severity', 5]
    assert accuracy(*gray) != clean
    assert accuracy(*gray) == accuracy(*gray, '--num-workers', 2)
    (tmp_path / 'some.txt').write_text('class-0\nclass-1\n')
    for name in ('class-0', 'class-1'):
        (tmp_path / 'val').mkdir(exist_ok=True)
        (tmp_path / 'val' / name).symlink_to(data / name)
    assert float(accuracy('--val-path', tmp_path / 'val', '--classes', tmp_path / 'some.txt').split()[2]) >= float(
        accuracy('--val-path', tmp_path / 'val').split()[2])
    fails(lambda: call(main_pixels, *evaluate, '--corruption', 'contrast'), 'give a --severity')
    fails(lambda: call(main_pixels, *evaluate, '--corruption', 'fog', '--severity', 1), "'fog'.*'contrast'")
    fails(lambda: train(data, '--classes', 'imagenet-r'), '--classes belongs to --eval')
    fails(lambda: train(data, '--output', tmp_path / 'x.json'), '--output belongs to --eval')


# ---------------------------------------------------------------- what was trained, and on what

@pytest.mark.parametrize('change', ['added', 'replaced', 'of another class', 'gone'])
@pytest.mark.parametrize('kind', ['folder', 'tar'])
def test_a_resumed_run_has_the_same_images(change, kind, tmp_path):
    images = tmp_path / 'images'
    for number in range(24):
        save_image(images / f'class-{number % 2}' / f'{number:02d}.png', number)
    first = images / 'class-0' / '00.png'

    def read():
        return as_tars(images, tmp_path) if kind == 'tar' else images
    flags = ['--no-eval', '--output-dir', tmp_path / 'run']
    assert train(read(), *flags, '--epochs', 1) == 0
    if change == 'added':
        save_image(images / 'class-1' / 'new.png', 99)
    elif change == 'replaced':  # under its name
        save_image(first, 99, (20, 25))
    elif change == 'of another class':
        first.rename(images / 'class-1' / '00.png')
    else:
        first.unlink()
    changed = read()
    again = [*flags, '--epochs', 2, '--resume', 'auto']
    fails(lambda: train(changed, *again), 'differs in images of train ', '--allow-inexact-resume')
    assert train(changed, *again, '--allow-inexact-resume') == 0


def test_a_copy_of_the_images_is_the_same(data, tmp_path):
    flags = ['--no-eval', '--output-dir', tmp_path / 'run']
    train(data, *flags, '--epochs', 1)
    shutil.copytree(data, tmp_path / 'copy', copy_function=shutil.copy)  # with other times
    assert train(tmp_path / 'copy', *flags, '--epochs', 2, '--resume', 'auto') == 0


@pytest.mark.parametrize('words, note', [
    (['--input-size', 48], '--input-size is 48; the run that wrote'),
    (['--eval-crop-ratio', 1], '--eval-crop-ratio is 1.0; the run that wrote'),
    (['--model-kwargs', 'depths=[1,1,1,1]', 'dims=[8,8,8,8]', 'kernel_sizes=7'], '--model-kwargs is ')])
def test_an_evaluation_says_where_it_is_of_another_model(words, note, data, tmp_path, capsys):
    """A convolutional net reads any size, so that the weights fit all the same."""
    net = ['--model', 'convnext_atto', '--model-kwargs', 'depths=[1,1,1,1]', 'dims=[8,8,8,8]']
    train(data, *net, '--epochs', 1, '--no-eval', '--no-model-ema', '--output-dir', tmp_path)
    evaluate = [*net, '--eval', '--resume', tmp_path / 'checkpoint.pth']
    capsys.readouterr()
    train(data, *evaluate)
    assert 'note: --' not in capsys.readouterr().out
    train(data, *evaluate, *words)
    assert f'note: {note}' in capsys.readouterr().out
