"""The sheet of masked and predicted tokens, for a checkpoint of main_mtm_pretrain.py."""
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import main_mtm_pretrain
import main_seit
import tokenize_images
from helpers import call, contents, fails, smooth_images
from image_tokenizer.tokenizers import decode_codes, load_tokenizer
from scripts import fit_patch_tokenizer, inspect_masked_tokens
from token_files.codebook import load_codebook

SIDE = 32  # pixels of an image, 8x8 codes
SIZES = ['depth=1', 'embed_dim=32', 'num_heads=2', 'decoder_embed_dim=16', 'decoder_depth=1', 'decoder_num_heads=2']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder with images/, a tokenizer, tokens, and a run of pre-training in run/, on crops of 6x6 codes."""
    folder = tmp_path_factory.mktemp('data')
    smooth_images(folder / 'images')
    call(fit_patch_tokenizer, '--data-path', folder / 'images', '--image-size', SIDE, '--patch-size', 4, '--codes', 20,
         '--dim', 12, '--output-dir', folder, '--num-workers', 0)
    call(tokenize_images, '--data-path', folder / 'images', '--name', 'x', '--output-dir', folder, '--tokenizer-path',
         folder / 'tokenizer.pt', '--codebook-path', folder / 'codebook.ckpt', '--image-size', SIDE, '--num-workers', 0,
         '--device', 'cpu')
    call(main_mtm_pretrain, '--train-token-file', folder / 'x-token.data.bin.gz', '--codebook-path',
         folder / 'codebook.ckpt', '--tokenadapt-path', '', '--input-size', 24, '--token-patch-size', 4, '--epochs', 1,
         '--batch-size', 8, '--device', 'cpu', '--model-kwargs', *SIZES, '--output-dir', folder / 'run')
    return folder


def words(data, output, *more):
    return ['--checkpoint', data / 'run' / 'checkpoint-last.pth', '--token-file', data / 'x-token.data.bin.gz',
            '--codebook-path', data / 'codebook.ckpt', '--tokenizer-path', data / 'tokenizer.pt', '--output', output,
            *more]


def inspect(data, output, *more):
    return call(inspect_masked_tokens, *words(data, output, *more))


def test_the_sheet_shows_source_tokens_masks_and_predictions(data, tmp_path, capsys):
    inspect(data, tmp_path / 'a.png', '--images', 1, '--data-path', data / 'images')
    line = capsys.readouterr().out.strip()
    found = re.match(r'1 images, (\d+) of 36 codes masked: (\d+\.\d)% predicted right, cross-entropy (\d+\.\d+)', line)
    assert int(found[1]) == 4 * 6 and float(found[3]) == pytest.approx(np.log(20), abs=1)  # ceil(9 * 0.6) patches
    with Image.open(tmp_path / 'a.png') as picture:
        sheet = pil_to_tensor(picture)[:, -99:-3, -5 * 99:] / 255
    # 24 pixels on a side are enlarged to 96, and three lie between two parts
    source, tokens, masked, predicted, attended = (part[:, ::4, :96:4] for part in sheet.split(99, 2))

    tokenizer, codebook = load_tokenizer(data / 'tokenizer.pt'), load_codebook(data / 'codebook.ckpt')
    model, size = inspect_masked_tokens.load_model(data / 'run' / 'checkpoint-last.pth', {}, 20)
    assert size == 6
    with Image.open(data / 'images' / 'ant' / '0.png') as image:
        pixels = pil_to_tensor(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))[:, 4:28, 4:28] / 255
    assert (source - pixels).abs().mean() < 0.02
    assert (tokens - pixels).abs().mean() < 0.2
    gray = (masked - 0.5).abs().amax(0) < 0.01
    blocks = gray.view(3, 8, 3, 8).float().mean((1, 3))
    assert (blocks == 1).sum() == 6 and torch.equal(masked[:, ~gray], tokens[:, ~gray])
    hidden = (blocks == 1).repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(predicted[:, ~hidden], tokens[:, ~hidden])
    weights = (attended.sum(0) / tokens.sum(0)).view(3, 8, 3, 8)
    assert (weights - weights.mean((1, 3), keepdim=True)).abs().max() < 0.05 and 0.95 < weights.max() < 1.01
    decoded = {tuple((part * 255).round().flatten().int().tolist()) for part in
               (decode_codes(tokenizer, codebook, torch.full((1, 1), code))[0] for code in range(20))}
    patches = predicted.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).flatten(2)
    near = [min(max(abs(a - b) for a, b in zip(each, (patch * 255).round().int().tolist())) for each in decoded)
            for patch in patches.flatten(0, 1)]
    assert max(near) <= 1  # every patch is that of a code


def test_the_images_are_of_different_classes(data, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(inspect_masked_tokens, 'draw_sheet',
                        lambda images, *texts: drawn.append(texts) or Image.new('RGB', (9, 9)))
    parts = ['tokens', 'masked', 'predicted', 'attention']
    for words in (['--data-path', data / 'images'], ['--label-file', data / 'x-label.txt'], []):
        inspect(data, tmp_path / 'a.png', '--images', 3, *words)
    assert drawn == [(1, ['image', *parts], ['ant', 'bee', 'cat']), (1, parts, ['ant', 'bee', 'cat']), (1, parts, [])]
    (tmp_path / 'labels.txt').write_text('0\n1\n')
    fails(lambda: inspect(data, tmp_path / 'b.png', '--label-file', tmp_path / 'labels.txt'),
          '2 labels, but .* holds 24')


def test_attention_is_the_mean_over_heads_of_the_class_tokens_row(data):
    model, size = inspect_masked_tokens.load_model(data / 'run' / 'checkpoint-last.pth', {}, 20)
    codes = torch.randint(20, (2, size, size), generator=torch.Generator().manual_seed(0))
    inputs = []
    hook = model.blocks[-1].attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    found = inspect_masked_tokens.class_attention(model, codes)
    hook.remove()
    x, layer = inputs[0], model.blocks[-1].attn
    q, k, _ = layer.qkv(x).view(2, 10, 3, 2, 16).permute(2, 0, 3, 1, 4)
    attention = (q[:, :, :1] @ k.transpose(2, 3) / 4).softmax(-1).mean(1)[:, 0, 1:]
    expected = attention / attention.amax(1, keepdim=True)
    torch.testing.assert_close(found.flatten(1), expected)
    assert found.shape == (2, 3, 3) and found.min() < 0.999


def test_masks_follow_the_seed_and_the_ratio(data, tmp_path, capsys):
    for name, more in (('a', []), ('b', []), ('c', ['--seed', 1]), ('d', ['--mask-ratio', 1])):
        inspect(data, tmp_path / f'{name}.png', '--images', 4, *more)
    files = contents(tmp_path)
    assert files['a.png'] == files['b.png'] != files['c.png']
    assert '144 of 144 codes masked' in capsys.readouterr().out.splitlines()[3]


def test_bad_input_gets_one_line(data, tmp_path):
    output = tmp_path / 'a.png'
    torch.save(torch.randn(21, 12), tmp_path / 'codebook.ckpt')
    fails(lambda: inspect(data, output, '--codebook-path', tmp_path / 'codebook.ckpt'), 'was made with the codebook')
    fails(lambda: inspect(data, output, '--model-kwargs', 'depth=2'), 'does not fit the model')
    fails(lambda: inspect(data, tmp_path / 'a.gif'), 'a.gif: pictures are written as .png')
    fails(lambda: inspect(data, output, '--mask-ratio', 0), 'from 0.01 to 1')
    fails(lambda: inspect(data, data / 'codebook.ckpt'), 'codebook.ckpt')
    (tmp_path / 'few' / 'ant').mkdir(parents=True)
    (tmp_path / 'few' / 'ant' / '0.png').write_bytes((data / 'images' / 'ant' / '0.png').read_bytes())
    fails(lambda: inspect(data, output, '--data-path', tmp_path / 'few'), '1 images, but .* holds 24')
    call(main_seit, '--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2',
         'in_chans=12', '--codebook-path', data / 'codebook.ckpt', '--train-token-file', data / 'x-token.data.bin.gz',
         '--train-label-file', data / 'x-label.txt', '--no-eval', '--eda-rc-prob', 0, '--input-size', 64, '--epochs', 1,
         '--batch-size', 8, '--device', 'cpu', '--output-dir', tmp_path / 'seit')
    fails(lambda: inspect(data, output, '--checkpoint', tmp_path / 'seit' / 'checkpoint.pth'), 'belong to main_seit.py')
    assert not output.exists()
