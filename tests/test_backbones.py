"""Models of timm that were made for images, on tokens: ten families from training to a prediction."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import evaluate_on_images
import main_pixels
import main_seit
import tokenize_images
from helpers import Killed, accuracy_lines, before_step, call, fails, kill, make_data, smooth_images, states
from inference.classifier import load_classifier
from models_seit import UpsampledConv2d, create_model
from processes import training_differs
from scripts import fit_patch_tokenizer, predict, probe

SWIN = ['depths=(1,1,1,1)', 'embed_dim=24', 'num_heads=(1,1,2,2)']
VIT = ['depth=1', 'embed_dim=32', 'num_heads=2']
NETS = {'deit3_small_patch16_224': VIT, 'resnet10t': [], 'regnetx_002': [], 'convnext_atto': ['depths=(1,1,1,1)'],
        'mobilenetv3_small_050': [], 'pvt_v2_b0': ['depths=(1,1,1,1)'], 'edgenext_xx_small': ['depths=(1,1,1,1)'],
        'levit_128s': [], 'swin_tiny_patch4_window7_224': SWIN, 'mambaout_femto': ['depths=(1,1,1,1)']}
GRID = ['--token-patch-size', 4, '--input-size', 32]  # 8 of the 10 codes on a side


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    """Images of three classes, and their tokens of 10x10 codes."""
    folder = tmp_path_factory.mktemp('tokens')
    smooth_images(folder / 'images', per_class=4)
    call(fit_patch_tokenizer, '--data-path', folder / 'images', '--output-dir', folder, '--image-size', 40,
         '--patch-size', 4, '--dim', 32, '--codes', 40, '--iterations', 3)
    call(tokenize_images, '--data-path', folder / 'images', '--name', 'my', '--output-dir', folder, '--image-size', 40,
         '--tokenizer-path', folder / 'tokenizer.pt', '--codebook-path', folder / 'codebook.ckpt', '--num-workers', 0,
         '--device', 'cpu')
    return folder


def train(tokens, *words):
    return call(main_seit, '--device', 'cpu', '--batch-size', 6, '--warmup-epochs', 0, '--eda-rc-prob', 0,
                '--codebook-path', tokens / 'codebook.ckpt', '--train-token-file', tokens / 'my-token.data.bin.gz',
                '--train-label-file', tokens / 'my-label.txt', '--val-token-file', tokens / 'my-token.data.bin.gz',
                '--val-label-file', tokens / 'my-label.txt', *GRID, *words)


def flags_of(name, stem='native'):
    kwargs = ['--model-kwargs', *NETS[name]] if NETS[name] else []
    # codes of four pixels leave a first convolution of stride 4 nothing to halve
    return ['--model', name, *kwargs, *([] if name.startswith('deit') else ['--stem', stem])]


@pytest.mark.parametrize('name', NETS)
def test_a_family_from_training_to_a_prediction(name, tokens, tmp_path, monkeypatch, capsys):
    words = [*flags_of(name), '--epochs', 2, '--lr', 0.01, '--save-every', 1, '--output-dir']
    assert train(tokens, *words, tmp_path / 'whole') == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 1, 1, kill)
        train(tokens, *words, tmp_path / 'cut')
    assert states(tmp_path / 'cut' / 'checkpoint.pth')['step'] == 1
    assert train(tokens, *words, tmp_path / 'cut', '--resume', 'auto') == 0
    assert not training_differs(tmp_path / 'whole', tmp_path / 'cut')

    checkpoint = tmp_path / 'whole' / 'checkpoint.pth'
    capsys.readouterr()
    train(tokens, '--eval', '--no-model-ema', '--resume', checkpoint)
    on_tokens = accuracy_lines(capsys.readouterr().out)
    call(evaluate_on_images, '--data-path', tokens / 'images', '--model-path', checkpoint, '--num-workers', 0,
         '--device', 'cpu')
    on_images = accuracy_lines(capsys.readouterr().out)
    assert [line.split()[:5] for line in on_images] == [line.split()[:5] for line in on_tokens] and on_tokens
    classify = load_classifier(checkpoint)
    image = Image.open(next((tokens / 'images').rglob('*.png')))
    names, probabilities = classify([image])
    assert names[0] in classify.classes and probabilities.sum() == pytest.approx(1)


def test_features_of_a_convolutional_network(tokens, tmp_path, capsys):
    train(tokens, *flags_of('regnetx_002', 'fast'), '--epochs', 1, '--output-dir', tmp_path)
    words = [word for split in ('train', 'val') for word in (
        f'--{split}-token-file', tokens / 'my-token.data.bin.gz', f'--{split}-label-file', tokens / 'my-label.txt')]
    call(probe, '--checkpoint', tmp_path / 'checkpoint.pth', *words, '--neighbors', 3, '--device', 'cpu')
    assert '368 numbers' in capsys.readouterr().out


def test_weights_alone_are_used_with_model_and_stem(tokens, tmp_path, capsys):
    train(tokens, *flags_of('regnetx_002', 'fast'), '--epochs', 1, '--output-dir', tmp_path)
    checkpoint = states(tmp_path / 'checkpoint.pth')
    torch.save({'model': checkpoint['model']}, tmp_path / 'alone.pth')
    files = {'codebook_path': tokens / 'codebook.ckpt', 'tokenizer_path': tokens / 'tokenizer.pt',
             'tokenizer_input_size': 40, 'model': 'regnetx_002'}
    image = Image.open(next((tokens / 'images').rglob('*.png')))
    _, known = load_classifier(tmp_path / 'checkpoint.pth')([image])
    fails(lambda: load_classifier(tmp_path / 'alone.pth', **files, stem='fast'),
          'does not say how many codes its model reads: give --input-size, with 8 pixels to a code')
    _, told = load_classifier(tmp_path / 'alone.pth', **files, stem='fast', input_size=64)([image])
    assert known.shape[1] == 3 and told.shape == known.shape
    fails(lambda: load_classifier(tmp_path / 'checkpoint-pixels.pth', stem='fast'), 'checkpoint-pixels.pth')
    torch.save({**checkpoint, 'args': {'train_path': 'x', 'aug': 'deit', 'model': 'regnetx_002'}},
               tmp_path / 'pixels.pth')
    fails(lambda: load_classifier(tmp_path / 'pixels.pth', stem='fast'), '--stem fast: is of models of main_seit.py')
    capsys.readouterr()
    call(predict, tmp_path / 'checkpoint.pth', '--model', 'regnetx_002', '--stem', 'fast', tokens / 'images',
         '--num-workers', 0, '--device', 'cpu')
    assert 'differs' not in capsys.readouterr().err


def test_weights_of_pixels_start_a_model_of_tokens_without_its_stem(tokens, tmp_path, capsys):
    call(main_pixels, '--model', 'regnetx_002', '--train-path', tokens / 'images', '--val-path', tokens / 'images',
         '--input-size', 40, '--num-workers', 0, '--device', 'cpu', '--batch-size', 6, '--epochs', 1, '--output-dir',
         tmp_path / 'pixels')
    start = ['--finetune', tmp_path / 'pixels' / 'checkpoint.pth']
    train(tokens, *flags_of('regnetx_002'), *start, '--epochs', 1, '--lr', 0, '--warmup-lr', 0, '--min-lr', 0,
          '--weight-decay', 0, '--output-dir', tmp_path / 'tokens')
    assert 'started from scratch: stem.conv.* (another shape)' in capsys.readouterr().out
    before, after = (states(tmp_path / kind / 'checkpoint.pth')['model'] for kind in ('pixels', 'tokens'))
    differ = {name for name in after if before[name].shape != after[name].shape}
    assert differ == {'stem.conv.weight'} and before.keys() == after.keys()
    assert torch.equal(before['head.fc.weight'], after['head.fc.weight'])
    # weights alone, as timm publishes them
    for suffix, save in (('bin', torch.save), ('safetensors', save_file)):
        save(before, tmp_path / f'weights.{suffix}')
        train(tokens, *flags_of('regnetx_002'), '--finetune', tmp_path / f'weights.{suffix}', '--epochs', 1,
              '--output-dir', tmp_path / suffix)
        assert f'weights.{suffix}: ' in (said := capsys.readouterr().out)
        assert 'started from scratch: stem.conv.* (another shape)' in said
    (tmp_path / 'bad.safetensors').write_bytes(b'x' * 100)
    fails(lambda: train(tokens, *flags_of('regnetx_002'), '--finetune', tmp_path / 'bad.safetensors'),
          'bad.safetensors: damaged or no .safetensors file')
    # from there the model is known: its name, and its stem
    train(tokens, '--finetune', tmp_path / 'tokens' / 'checkpoint.pth', '--epochs', 1, '--output-dir',
          tmp_path / 'more')
    assert 'started from scratch' not in capsys.readouterr().out.partition('more')[2]
    assert states(tmp_path / 'more' / 'checkpoint.pth')['args']['model'] == 'regnetx_002'


def test_another_stem_is_another_run(tokens, tmp_path, capsys):
    words = ['--epochs', 1, '--output-dir', tmp_path]
    train(tokens, *flags_of('regnetx_002'), *words)
    words[1] = 2
    fails(lambda: train(tokens, *flags_of('regnetx_002', 'fast'), *words, '--resume', 'auto'),
          'differs in stem native -> fast')
    train(tokens, '--eval', '--resume', tmp_path / 'checkpoint.pth', '--stem', 'fast')
    assert 'note: --stem is fast; the run that wrote' in capsys.readouterr().out


def test_codes_of_three_elements_are_not_taken_for_pixels(tmp_path):
    data = make_data(tmp_path, width=3)
    words = [*flags_of('regnetx_002'), *data, '--device', 'cpu', '--batch-size', 6, '--input-size', 64]
    call(main_seit, *words, '--epochs', 1, '--output-dir', tmp_path / 'run')
    checkpoint = tmp_path / 'run' / 'checkpoint.pth'
    assert states(checkpoint)['model']['stem.conv.weight'].shape[1] == 3
    call(main_seit, *data, '--device', 'cpu', '--eval', '--resume', checkpoint)


def test_a_convolutional_classifier_is_exported(tokens, tmp_path):
    train(tokens, *flags_of('regnetx_002'), '--epochs', 1, '--output-dir', tmp_path)
    classify = load_classifier(tmp_path / 'checkpoint.pth')
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    exported = torch.export.export(classify, (pixels,)).module()
    torch.testing.assert_close(exported(pixels), classify(pixels))


# ---------------------------------------------------------------- stems

def grids(model, *shape):
    """Sides of the grids that a model with stages makes of an input."""
    sides = []
    for stage in (model.s1, model.s2, model.s3, model.s4):
        stage.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    model.eval()(torch.zeros(1, *shape))
    return sides


def test_native_grids_are_those_of_pixels_and_fast_ones_half():
    of_pixels = grids(timm.create_model('regnetx_002'), 3, 224, 224)
    assert grids(create_model('regnetx_002', {}, 10, 28, 32, 'native'), 32, 28, 28) == of_pixels == [56, 28, 14, 7]
    for stem in 'fast', None:
        assert grids(create_model('regnetx_002', {}, 10, 28, 32, stem), 32, 28, 28) == [28, 14, 7, 4]
    # codes of 16 pixels
    assert grids(create_model('regnetx_002', {}, 10, 14, 32, 'native', 16), 32, 14, 14) == of_pixels


def test_only_the_first_convolution_differs():
    model = create_model('convnext_atto', {}, 10, 28, 32, 'native')
    plain = timm.create_model('convnext_atto', num_classes=10)
    shapes = [{name: tuple(value.shape) for name, value in net.state_dict().items()} for net in (model, plain)]
    assert {name for name in shapes[0] if shapes[0][name] != shapes[1].get(name)} == {'stem.0.weight'}
    assert shapes[0].keys() == shapes[1].keys() and shapes[0]['stem.0.weight'] == (40, 32, 3, 3)
    assert isinstance(model.stem[0], UpsampledConv2d) and model.stem[0].scale == 2


def test_a_plain_vit_gets_the_stem_adaptor():
    model = create_model('deit3_small_patch16_224', {'depth': 1}, 10, 28, 32)
    proj = model.patch_embed.proj
    assert (proj.kernel_size, proj.stride, proj.padding) == ((4, 4), (2, 2), (1, 1))
    assert model.patch_embed.grid_size == (14, 14)
    single = create_model('deit3_small_patch16_224', {'depth': 1, 'patch_size': 1}, 10, 14, 32).patch_embed
    assert single.grid_size == (14, 14) and single.proj.kernel_size == (3, 3)
    single.proj.weight.sum().backward()


def test_upsampling_repeats_codes():
    stem = UpsampledConv2d(2, 3, 4, True)
    with torch.no_grad():
        stem.weight.zero_()
        stem.weight[:, :, 1, 1] = 1
        stem.bias.zero_()
    x = torch.randn(1, 2, 5, 5)
    expected = x.sum(1, keepdim=True).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(1, 3, 20, 20)
    torch.testing.assert_close(stem(x), expected)
    np.testing.assert_array_equal(torch.jit.script(stem)(x).detach(), stem(x).detach())


def test_the_seed_decides_the_weights():
    torch.manual_seed(1)
    first = create_model('regnetx_002', {}, 10, 8, 32).state_dict()
    torch.manual_seed(1)
    second = create_model('regnetx_002', {}, 10, 8, 32).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize('name, kwargs, options, messages', [
    ('fastvit_t8', {}, {}, ['fastvit_t8: has no single first convolution .*stem.0.conv_kxk.0.conv and']),
    ('tresnet_m', {}, {}, ['tresnet_m: has no single first convolution']),
    ('deit3_small_patch16_224', {}, {'stem': 'fast'}, ['deit3_small_patch16_224 is a ViT, and has the Stem-adaptor']),
    ('deit_tiny_token_32', {}, {'stem': 'fast'}, ['--stem fast: deit_tiny_token_32 is a ViT']),
    ('deit3_small_patch16_224', {'patch_size': 4}, {}, ['a patch has 1 or 2 codes']),
    ('deit3_small_patch16_224', {'depth': 1}, {'img_size': 27}, ['27 codes is no multiple of the patch size']),
    ('convnext_atto', {}, {'stem': 'fast', 'token_patch_size': 4}, ['stride 4, .* codes of 4 pixels with --stem fast']),
    ('convnext_atto', {'patch_size': 8}, {}, ['has stride 8, .* codes of 8 pixels with --stem fast']),
    ('convnext_atto', {}, {'token_patch_size': 6}, ['codes of 6 pixels with --stem fast']),
    ('repvit_m0_9', {}, {'drop_path': 0.1}, ['repvit_m0_9 with --drop-path 0.1: it has no stochastic depth']),
    ('mixer_s32_224', {}, {}, ['fixes the size of its patches']),
    ('resnet18', {'pretrained': True}, {}, ['--model-kwargs pretrained: a model is made without weights']),
    ('deit_tiny_token_32', {'checkpoint_path': 'x.pth'}, {}, ['--model-kwargs checkpoint_path: a model is made']),
    ('regnetx_002', {'drop_path_rate': 0.2}, {'drop_path': 0.1}, ['multiple values']),
    ('convnext_atto', {'layers': 3}, {}, ["unexpected keyword argument 'layers'"]),
    ('convnext_atto', {'in_chans': 4}, {}, ["codebook's rows have 32 elements, but convnext_atto reads 4"]),
    ('convnext_atto', {}, {'img_size': 1, 'stem': 'fast'}, ['--model convnext_atto with --stem fast']),
    ('resnet5', {}, {}, ['timm has no such model; near it are resnet']),
])
def test_what_cannot_be_is_said_in_one_line(name, kwargs, options, messages):
    sizes = {'num_classes': 10, 'img_size': 28, 'in_chans': 32}
    fails(lambda: create_model(name, kwargs, **{**sizes, **options}), *messages)


def test_filters_of_colors_are_no_stem_of_three_element_codes(tokens, tmp_path, capsys):
    call(main_pixels, '--model', 'regnetx_002', '--train-path', tokens / 'images', '--val-path', tokens / 'images',
         '--input-size', 40, '--num-workers', 0, '--device', 'cpu', '--batch-size', 6, '--epochs', 1, '--no-eval',
         '--output-dir', tmp_path / 'pixels')
    data = make_data(tmp_path, width=3)
    call(main_seit, '--model', 'regnetx_002', *data, '--device', 'cpu', '--batch-size', 6, '--input-size', 64,
         '--finetune', tmp_path / 'pixels' / 'checkpoint.pth', '--epochs', 1, '--no-eval')
    assert 'stem.conv.* (of pixels)' in capsys.readouterr().out
