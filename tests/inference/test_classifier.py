"""Images to class names: against the programs that evaluate, and what does not belong together."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_on_images
import main_mtm_finetune
import main_pixels
import main_seit
from helpers import call, fails, states
from image_data.decoding import decode_rgb
from inference.classifier import find_file, load_classifier
from small_classifiers import PROGRAMS

pytestmark = pytest.mark.usefixtures('one_thread')


def pictures(runs):
    """The images of a set, opened, and their labels."""
    paths = sorted(runs['images'].rglob('*.png'))
    return [Image.open(path) for path in paths], torch.tensor([i // 4 for i in range(len(paths))])


def token_flags(runs):
    tokens = runs['tokens']
    return ['--codebook-path', tokens / 'codebook.ckpt', '--val-token-file', tokens / 'my-token.data.bin.gz',
            '--val-label-file', tokens / 'my-label.txt', '--token-patch-size', 4, '--input-size', 32]


def changed(path, target, change):
    """A checkpoint written to `target` with a change."""
    checkpoint = states(path)
    change(checkpoint)
    torch.save(checkpoint, target)
    return target


# ---------------------------------------------------------------- the same numbers as the programs

def test_predictions_are_those_of_evaluate_on_images(small_runs, tmp_path):
    call(evaluate_on_images, '--model-path', small_runs['main_seit.py'] / 'best_checkpoint.pth', '--data-path',
         small_runs['images'], '--num-workers', 0, '--device', 'cpu', '--save-predictions', tmp_path / 'p.csv')
    names, probabilities = load_classifier(small_runs['main_seit.py'])(pictures(small_runs)[0])
    rows = list(csv.DictReader((tmp_path / 'p.csv').open()))
    assert [('ant', 'bee', 'cat')[int(row['prediction'])] for row in rows] == names and len(set(names)) > 1
    assert [row['probability'] for row in rows] == [f'{p:.6f}' for p in probabilities.amax(1).tolist()]
    assert [row['top5'] for row in rows] == [' '.join(map(str, p)) for p in probabilities.topk(3).indices.tolist()]


@pytest.mark.parametrize('program, module', list(zip(PROGRAMS, (main_seit, main_mtm_finetune, main_pixels))))
def test_accuracy_and_loss_are_those_of_eval(small_runs, tmp_path, program, module):
    path = find_file(str(small_runs[program]))
    data = ['--val-path', small_runs['images'], '--num-workers', 0] if module is main_pixels else token_flags(
        small_runs)
    call(module, '--eval', '--resume', path, '--device', 'cpu', *data, '--output', tmp_path / 'e.json')
    stats = json.loads((tmp_path / 'e.json').read_text())
    images, labels = pictures(small_runs)
    probabilities = load_classifier(small_runs[program])(images)[1]
    assert probabilities.shape == (12, 3) and probabilities.dtype == torch.float32
    assert (probabilities.argmax(1) == labels).sum() == round(12 * stats['acc1'] / 100)
    loss = -probabilities[range(12), labels].double().log().mean().item()
    assert loss == pytest.approx(stats['loss'], rel=1e-5)


def test_one_image_is_a_list_of_one_and_pixels_are_a_batch(small_runs):
    for program in PROGRAMS:
        classify = load_classifier(small_runs[program])
        images, _ = pictures(small_runs)
        names, probabilities = classify(images)
        pixels = torch.stack([classify.read(image) for image in images])
        assert pixels.dtype == torch.uint8 and pixels.shape == (12, 3, classify.size, classify.size)
        assert torch.equal(classify(pixels), probabilities)
        assert torch.equal(classify.predict(iter(images), batch_size=5)[1].argmax(1), probabilities.argmax(1))
        name, alone = classify(images[3])
        assert name == names[3:4] and alone.shape == (1, 3)
        torch.testing.assert_close(alone, probabilities[3:4])
        assert classify([])[0] == [] and classify([])[1].shape == (0, 3)
        assert classify.classes == ['ant', 'bee', 'cat'] and not classify.training
        assert (classify.tokenizer is None) == (program == 'main_pixels.py')
        assert isinstance(classify.model, torch.nn.Module)


def test_images_of_any_kind_are_read_as_the_programs_read_them(small_runs, tmp_path):
    """Gray, with a palette, with transparency: as decode_rgb, which ignores rotation by EXIF too."""
    classify = load_classifier(small_runs['main_seit.py'])
    image = pictures(small_runs)[0][0].resize((50, 30))
    for mode in ('L', 'P', 'RGBA', 'CMYK'):
        path = tmp_path / f'{mode}.tif'
        image.convert(mode).save(path)
        assert torch.equal(classify.read(Image.open(path)), classify.read(decode_rgb(path.read_bytes())))


def test_its_files_are_found_again_where_the_whole_was_moved_to(small_runs, tmp_path):
    shutil.copytree(small_runs['main_seit.py'], tmp_path / 'x' / 'run')
    shutil.copytree(small_runs['tokens'], tmp_path / 'x' / 'tokens')
    images, _ = pictures(small_runs)
    same = load_classifier(tmp_path / 'x' / 'run')(images)[1]
    assert torch.equal(same, load_classifier(small_runs['main_seit.py'] / 'best_checkpoint.pth')(images)[1])
    shutil.rmtree(tmp_path / 'x' / 'tokens')
    fails(lambda: load_classifier(tmp_path / 'x' / 'run'), 'codebook codebook.ckpt .*give it to --codebook-path')
    tokens = small_runs['tokens']
    fails(lambda: load_classifier(tmp_path / 'x' / 'run', codebook_path=tokens / 'codebook.ckpt'),
          'tokenizer tokenizer.pt .*give it to --tokenizer-path')
    given = load_classifier(tmp_path / 'x' / 'run', codebook_path=tokens / 'codebook.ckpt',
                            tokenizer_path=tokens / 'tokenizer.pt')
    assert torch.equal(given(images)[1], same)
    for name in ('codebook.ckpt', 'tokenizer.pt'):
        shutil.copy(tokens / name, tmp_path / 'x' / 'run')
    assert torch.equal(load_classifier(tmp_path / 'x' / 'run')(images)[1], same)


# ---------------------------------------------------------------- which checkpoint, which weights, which names

def test_of_a_folder_the_best_else_the_newest(small_runs, tmp_path):
    names = ['best_ema_checkpoint.pth', 'best_checkpoint.pth', 'checkpoint-best.pth', 'checkpoint.pth',
             'checkpoint-last.pth']
    for name in reversed(names):
        (tmp_path / name).touch()
        wanted = tmp_path / (name if name != names[0] else names[1])
        assert find_file(str(tmp_path)) == str(wanted)
    assert find_file(str(tmp_path), use_ema=True) == str(tmp_path / names[0])
    assert find_file(str(tmp_path / names[3])) == str(tmp_path / names[3])
    (tmp_path / 'empty').mkdir()
    fails(lambda: find_file(str(tmp_path / 'empty')), r'empty: no checkpoint in it \(best_checkpoint.pth, ')
    fails(lambda: find_file(str(small_runs['tasks'])), 'it is of 2 tasks: give one, such as .*task-1')
    fails(lambda: load_classifier(tmp_path / 'none.pth'), 'none.pth: ')


def test_averaged_weights_where_they_are_asked_for(small_runs, tmp_path):
    def change(checkpoint):
        checkpoint['model_ema'] = {name: value + 0.1 for name, value in checkpoint['model'].items()}
    path = changed(small_runs['main_pixels.py'] / 'checkpoint.pth', tmp_path / 'x.pth', change)
    weights = load_classifier(path, use_ema=True).model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in states(path)['model_ema'].items())
    fails(lambda: load_classifier(small_runs['main_mtm_finetune.py'], use_ema=True), 'holds no EMA weights')


def test_of_a_task_the_classes_seen_in_their_order(small_runs):
    """numpy's RandomState(1993).permutation(3) is 0 2 1."""
    images, _ = pictures(small_runs)
    first, last = (load_classifier(small_runs['tasks'] / f'task-{task}') for task in (0, 1))
    assert (first.classes, last.classes) == (['ant', 'cat'], ['ant', 'cat', 'bee'])
    names, probabilities = first(images)
    assert set(names) <= {'ant', 'cat'} and probabilities.shape == (12, 2)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(12))
    assert first.model.num_classes == 3


def test_numbers_where_there_are_no_names(small_runs, tmp_path, capsys):
    path = changed(small_runs['main_seit.py'] / 'checkpoint.pth', tmp_path / 'x.pth', lambda c: c.update(classes=None))
    tokens = {f'{name}_path': small_runs['tokens'] / file
              for name, file in (('codebook', 'codebook.ckpt'), ('tokenizer', 'tokenizer.pt'))}
    assert load_classifier(path, **tokens).classes == ['0', '1', '2']
    changed(path, path, lambda c: c.update(classes=['ant']))
    assert load_classifier(path, **tokens).classes == ['ant', '1', '2']
    path = changed(small_runs['tasks'] / 'task-0' / 'checkpoint.pth', path, lambda c: c.update(data={}))
    assert load_classifier(path, **tokens).classes == ['ant', 'cat', 'bee']
    assert 'does not say how many classes its task had seen: all 3 are told apart' in capsys.readouterr().out


# ---------------------------------------------------------------- published checkpoints, and mistakes

def test_a_published_checkpoint_says_nothing(small_runs, tmp_path):
    path = tmp_path / 'trained-vit.ckpt'
    torch.save({'model': states(small_runs['main_seit.py'] / 'best_checkpoint.pth')['model']}, path)
    given = {'codebook_path': small_runs['tokens'] / 'codebook.ckpt',
             'tokenizer_path': small_runs['tokens'] / 'tokenizer.pt', 'model': 'deit_tiny_token_32',
             'model_kwargs': {'depth': 1, 'embed_dim': 32, 'num_heads': 2}, 'tokenizer_input_size': 40}
    images, _ = pictures(small_runs)
    classify = load_classifier(path, **given)
    assert classify.classes == ['0', '1', '2']
    assert torch.equal(classify(images)[1], load_classifier(small_runs['main_seit.py'])(images)[1])
    for left_out, message in (('codebook_path', 'not say with which codebook .*give it to --codebook-path'),
                              ('tokenizer_path', 'not say with which tokenizer .*give it to --tokenizer-path'),
                              ('model', 'not say of which model it is: give --model'),
                              ('tokenizer_input_size', 'not say to how many pixels .*give --tokenizer-input-size')):
        rest = {name: value for name, value in given.items() if name != left_out}
        fails(lambda: load_classifier(path, **rest), f'trained-vit.ckpt: does {message}')
    fails(lambda: load_classifier(path, **given | {'tokenizer_input_size': 42}), 'size 42: .*patches of 4')
    fails(lambda: load_classifier(path, **given | {'tokenizer_input_size': 24}), 'crop of 8x8 codes is larger')


def test_the_published_sizes_need_not_be_said(small_runs, tmp_path):
    from models_seit import create_model
    kwargs = {'depth': 1, 'embed_dim': 32, 'num_heads': 2}
    torch.save({'model': create_model('deit_base_token_32', kwargs, 3, 28).state_dict()}, tmp_path / 'vit.ckpt')
    tokenizer = states(small_runs['tokens'] / 'tokenizer.pt')
    generator = torch.Generator().manual_seed(0)
    tokenizer |= {'mean': torch.rand(192, generator=generator), 'basis': torch.rand(192, 31, generator=generator)}
    torch.save(tokenizer, tmp_path / 'tokenizer.pt')
    classify = load_classifier(tmp_path / 'vit.ckpt', model='deit_base_token_32', model_kwargs=kwargs,
                               codebook_path=small_runs['tokens'] / 'codebook.ckpt',
                               tokenizer_path=tmp_path / 'tokenizer.pt')
    assert classify.size == 256 and classify(Image.new('RGB', (9, 7)))[1].shape == (1, 3)


def test_what_is_no_classifier_is_one_line(small_runs, tmp_path):
    fails(lambda: load_classifier(small_runs['main_mtm_pretrain.py']),
          'checkpoint-last.pth: is of main_mtm_pretrain.py, .*fine-tune it with main_mtm_finetune.py')
    for program in PROGRAMS:
        path = changed(find_file(str(small_runs[program])), small_runs[program] / 'headless.pth',
                       lambda c: [c['model'].pop(f'head.{name}') for name in ('weight', 'bias')])
        fails(lambda: load_classifier(path), 'headless.pth: no head.bias among its weights')


def test_another_codebook_or_tokenizer_is_refused(small_runs, tmp_path):
    codebook = states(small_runs['tokens'] / 'codebook.ckpt')
    torch.save(codebook.flip(0), tmp_path / 'codebook.ckpt')
    fails(lambda: load_classifier(small_runs['main_seit.py'], codebook_path=tmp_path / 'codebook.ckpt'),
          'was trained with another codebook than that of')
    torch.save(codebook[:, :9].clone(), tmp_path / 'codebook.ckpt')
    fails(lambda: load_classifier(small_runs['main_seit.py'], codebook_path=tmp_path / 'codebook.ckpt'),
          'rows of 9 elements, but the tokenizer gives 32')
    tokenizer = states(small_runs['tokens'] / 'tokenizer.pt')
    torch.save(tokenizer | {'mean': tokenizer['mean'] + 0.1}, tmp_path / 'tokenizer.pt')
    fails(lambda: load_classifier(small_runs['main_seit.py'], tokenizer_path=tmp_path / 'tokenizer.pt'),
          'was trained with another tokenizer than that of')


@pytest.mark.parametrize('wrong, message', [
    (torch.zeros(1, 3, 40, 40), r'pixels of shape \(1, 3, 40, 40\), torch.float32: give \(B, 3, 40, 40\)'),
    (torch.zeros(3, 40, 40, dtype=torch.uint8), r'pixels of shape \(3, 40, 40\)'),
    (['x.png'], 'a str is no image: give PIL images'), ([np.zeros((4, 4, 3))], 'a ndarray is no image')])
def test_what_is_no_image_is_one_line(small_runs, wrong, message):
    fails(lambda: load_classifier(small_runs['main_seit.py'])(wrong), message)


def test_the_module_moves_as_a_whole(small_runs):
    """To another device, with codebook and normalization."""
    for program in PROGRAMS:
        classify = load_classifier(small_runs[program], 'meta')
        assert {tensor.device.type for tensor in (*classify.parameters(), *classify.buffers())} == {'meta'}
        assert classify(torch.zeros(2, 3, classify.size, classify.size, dtype=torch.uint8,
                                    device='meta')).shape == (2, 3)


@pytest.mark.parametrize('program', PROGRAMS[::2])
def test_images_are_turned_as_those_of_the_training_were(small_runs, tmp_path, program):
    path = find_file(str(small_runs[program]))
    # beside the other, so that the tokenizer is found
    turned = changed(path, small_runs[program] / 'turned.pth', lambda c: c['data'].update({'EXIF rotation': True}))
    image = pictures(small_runs)[0][0].rotate(90, expand=True)
    exif = image.getexif()
    exif[0x0112] = 6  # to be seen turned by 270 degrees, as it was before
    image.save(tmp_path / 'a.png', exif=exif)
    image = Image.open(tmp_path / 'a.png')
    before = load_classifier(path)(pictures(small_runs)[0][0])[1]
    assert torch.equal(load_classifier(turned)(image)[1], before)
    assert not torch.equal(load_classifier(path)(image)[1], before)
    turned.unlink()
