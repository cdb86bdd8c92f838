"""Inspecting a token set: its numbers against slow ones, and the contact sheet against the images."""
import gzip
import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

import tokenize_images
from scripts import fit_patch_tokenizer, inspect_tokens
from token_files import token_file
from token_files.codebook import load_codebook, quantize
from conftest import ROOT
from fileio.labels import read_labels
from foreign_sets import codes_of, labels_of, write_safetensors
from helpers import call, fails, make_compact_set, published_transform, smooth_images, write_parquet, write_tar
from image_data.quality import psnr, ssim
from image_tokenizer.tokenizers import load_tokenizer
from image_tokenizer.vitvqgan import Size, ViTVQGAN
from token_files.cache import open_codes
from token_files.published import companion_path
from token_files.token_file import open_token_file, write_set
from utils import InputError

FIT = ['--image-size', '32', '--patch-size', '4', '--dim', '12', '--codes', '20', '--iterations', '5']


def slow_decode(stream):
    """The codes in a stream of escaped bytes, one by one."""
    codes = []
    stream = iter(stream)
    for byte in stream:
        codes.append(byte if byte < 255 else 255 + next(stream))
    return codes


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    """A folder with images/, a tokenizer and codebook fitted to them, and their tokens; made once."""
    folder = tmp_path_factory.mktemp('fitted')
    paths = smooth_images(folder / 'images')
    call(fit_patch_tokenizer, '--data-path', folder / 'images', '--output-dir', folder, *FIT)
    tokenizer = load_tokenizer(folder / 'tokenizer.pt')
    codebook = load_codebook(folder / 'codebook.ckpt')
    images = torch.stack([published_transform(32)(Image.open(path)) for path in paths])
    codes = quantize(tokenizer(images), codebook)
    write_set(folder / 'my-token.data.bin.gz', [codes.numpy()], len(codes), folder / 'my-label.txt',
              np.repeat([0, 1, 2], 8))
    return folder


def inspect(folder, capsys, *words, name='my'):
    """The text lines and the JSON of an inspection of the set `name` in a folder."""
    words = words if '--codebook-path' in words else ('--codebook-path', folder / 'codebook.ckpt', *words)
    call(inspect_tokens, '--token-file', folder / f'{name}-token.data.bin.gz', *words)
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_numbers_are_the_slow_ones_on_the_golden_file(golden, tmp_path, capsys):
    torch.save(torch.randn(510, 32), tmp_path / 'codebook.ckpt')
    _, found = inspect(golden.folder, capsys, '--codebook-path', tmp_path / 'codebook.ckpt', name='sample')
    file = golden.folder / 'sample-token.data.bin.gz'
    stream = gzip.decompress(file.read_bytes())
    uses = Counter(slow_decode(stream))
    total, images = sum(uses.values()), len(golden('codec.npz')['labels'])
    entropy = -sum(n / total * math.log2(n / total) for n in uses.values())
    assert found['images'] == images and found['grid'] ** 2 == total // images
    assert found['code_counts'] == [uses[code] for code in range(510)] and max(uses) >= 255  # escapes are counted once
    assert (found['codes'], found['codes_used']) == (510, len(uses))
    assert found['entropy_bits'] == pytest.approx(entropy, abs=1e-4)
    assert found['most_bits'] == pytest.approx(math.log2(510), abs=1e-4)
    size = found['bytes_per_image']
    assert size['raw'] == pytest.approx(len(stream) / images, abs=0.01)
    stored = file.stat().st_size + companion_path(file).stat().st_size
    assert size['stored'] == pytest.approx(stored / images, abs=0.01)
    assert size['entropy'] == pytest.approx(total / images * entropy / 8, abs=0.01)
    assert size['fixed'] == pytest.approx(total / images * math.log2(510) / 8, abs=0.01)
    assert 'source' not in size and 'class_counts' not in found


def test_counting_in_runs_is_counting_at_once(monkeypatch):
    codes = np.random.default_rng(0).integers(0, 8192, (50, 16)).astype(np.uint16)
    monkeypatch.setattr(token_file, 'IMAGES_AT_ONCE', 7)
    assert token_file.count_codes(codes, 9000).tolist() == np.bincount(codes.ravel(), minlength=9000).tolist()
    with pytest.raises(ValueError, match=f'holds code {codes.max()}, but the codebook has 5 rows'):
        token_file.count_codes(codes, 5)


def test_shards_are_one_set(fitted, tmp_path, capsys):
    codes = open_codes([open_token_file(fitted / 'my-token.data.bin.gz')], 'none')
    for name, part in (('s-0', codes[:20]), ('s-1', codes[20:])):
        write_set(tmp_path / f'{name}-token.data.bin.gz', [part], len(part), tmp_path / f'{name}-label.txt',
                  [7] * len(part))
        (tmp_path / f'{name}-token.json').write_text('{"source_bytes": 1200}')
    flags = ['--codebook-path', fitted / 'codebook.ckpt', '--label-file', tmp_path / 's-*-label.txt']
    _, found = inspect(tmp_path, capsys, *flags, name='s-*')
    _, whole = inspect(fitted, capsys)
    assert found['class_counts'] == {'7': 24} and found['bytes_per_image']['source'] == 100
    assert [found[key] for key in ('images', 'grid', 'code_counts')] == [24, 8, whole['code_counts']]
    assert found['bytes_per_image']['raw'] == whole['bytes_per_image']['raw']
    (tmp_path / 's-1-token.json').unlink()
    assert 'source' not in inspect(tmp_path, capsys, *flags, name='s-*')[1]['bytes_per_image']


def test_a_compact_set_differs_from_its_twin_in_bytes_alone(fitted, tmp_path, capsys):
    codes = open_codes([open_token_file(fitted / 'my-token.data.bin.gz')], 'none')
    path, labels = make_compact_set(tmp_path, codes.astype(int), read_labels(fitted / 'my-label.txt'), name='my')
    capsys.readouterr()
    call(inspect_tokens, '--token-file', path, '--codebook-path', fitted / 'codebook.ckpt', '--label-file', labels)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    _, twin = inspect(fitted, capsys, '--label-file', fitted / 'my-label.txt')
    stored = sum(file.stat().st_size for file in tmp_path.glob('*.bin')) / 24
    assert found['bytes_per_image'].pop('stored') == pytest.approx(stored, abs=0.01)
    assert twin['bytes_per_image'].pop('stored') > 0 and found == twin


@pytest.mark.parametrize('counts, bits', [([5, 0, 0], 0), ([3, 3, 3, 3], 2), ([2, 1, 1, 0], 1.5)])
def test_entropy(counts, bits):
    assert inspect_tokens.entropy_bits(np.array(counts)) == pytest.approx(bits)


def test_histogram_shares_rows_among_ranks():
    lines = inspect_tokens.histogram(np.array([1, 0, 6, 0, 2, 1, 0, 0, 0, 0, 0, 0]))
    assert [line.split()[:2] for line in lines[:3]] == [['1-2', '80.0%'], ['3-4', '20.0%'], ['5-5', '0.0%']]
    assert lines[0].count('#') == 40 and len(lines) == 10 and lines[-1].split()[0] == '12-12'
    assert len(inspect_tokens.histogram(np.array([1, 2]))) == 2


def test_labels_and_source_bytes(fitted, capsys):
    lines, found = inspect(fitted, capsys, '--label-file', fitted / 'my-label.txt', '--data-path', fitted / 'images')
    assert found['class_counts'] == {'0': 8, '1': 8, '2': 8}
    files = [path.stat().st_size for path in (fitted / 'images').rglob('*.png')]
    assert found['bytes_per_image']['source'] == pytest.approx(sum(files) / 24, abs=0.01)
    assert any('3 classes of 8 to 8 images' in line for line in lines)
    assert any(line.startswith('24 images of 8x8 codes') for line in lines)


def test_source_bytes_come_from_the_manifest_where_there_is_no_source(fitted, capsys):
    manifest = fitted / 'my-token.json'
    manifest.write_text('{"source_bytes": 2400}')
    try:
        assert inspect(fitted, capsys)[1]['bytes_per_image']['source'] == 100
        manifest.write_text('{"images": 24}')
        assert 'source' not in inspect(fitted, capsys)[1]['bytes_per_image']
    finally:
        manifest.unlink()


def test_sheet_shows_each_source_beside_its_reconstruction(fitted, tmp_path, capsys):
    inspect(fitted, capsys, '--data-path', fitted / 'images', '--tokenizer-path', fitted / 'tokenizer.pt',
            '--output', tmp_path / 'sheet.png', '--images', 3)
    sheet = np.asarray(Image.open(tmp_path / 'sheet.png')).astype(int)[-(3 * 99 + 3):, -(2 * 99):]
    tokenizer, codebook = load_tokenizer(fitted / 'tokenizer.pt'), load_codebook(fitted / 'codebook.ckpt')
    for row, name in enumerate(('ant', 'bee', 'cat')):  # the first image of each class, three times as large
        source = published_transform(32)(Image.open(fitted / 'images' / name / '0.png'))
        decoded = tokenizer.decode(codebook[quantize(tokenizer(source[None]), codebook)])[0].clamp(0, 1)
        for part, image in enumerate((source, decoded)):
            shown = sheet[row * 99:, part * 99:][:96, :96]
            assert np.abs(shown[::3, ::3] - (image * 255).permute(1, 2, 0).numpy()).max() <= 1, name
            assert np.array_equal(shown[::3, ::3], shown[2::3, 2::3])


def test_images_of_a_sheet_are_of_different_classes(fitted, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(inspect_tokens, 'draw_sheet', lambda *args: drawn.append(args[1:]) or Image.new('RGB', (9, 9)))
    (tmp_path / 'labels.txt').write_text('7\n' * 12 + '2\n' * 12)
    for words in (['--data-path', fitted / 'images'], ['--tokenizer-path', fitted / 'tokenizer.pt'],
                  ['--tokenizer-path', fitted / 'tokenizer.pt', '--label-file', tmp_path / 'labels.txt']):
        inspect(fitted, capsys, *words, '--images', 4, '--output', tmp_path / 'sheet.png')
    assert drawn == [(2, ['image'], ['ant', 'ant', 'bee', 'cat']), (2, ['tokens'], []),
                     (2, ['tokens'], ['7', '7', '2', '2'])]


def test_sheet_of_one_kind_only(fitted, tmp_path, capsys):
    inspect(fitted, capsys, '--tokenizer-path', fitted / 'tokenizer.pt', '--output', tmp_path / 'decoded.png')
    assert Image.open(tmp_path / 'decoded.png').size == (4 * 114 - 12, 4 * 99 + 22)  # 16 of 24, no names, one title
    for name, kind in (('sheet.jpg', 'JPEG'), ('sheet.WEBP', 'WEBP'), ('sheet', 'PNG')):  # as the name says
        inspect(fitted, capsys, '--data-path', fitted / 'images', '--output', tmp_path / name, '--images', 1)
        assert Image.open(tmp_path / name).format == kind
    for name in ('sheet.pdf', 'sheet.JSON', 'sheet.png.old'):
        fails(lambda: inspect(fitted, capsys, '--data-path', fitted / 'images', '--output', tmp_path / name),
              f'{name}: pictures are written as .png, .jpg, .jpeg, .webp: choose such a name')
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize('decodes', [True, False])
def test_sheet_with_a_vit_vqgan(decodes, fitted, tmp_path, capsys):
    size = Size(16, 1, 1, 32)
    torch.save(ViTVQGAN(size, size if decodes else None, 20, 12, 64).state_dict(), tmp_path / 'vit.pt')
    flags = ['--tokenizer-path', tmp_path / 'vit.pt', '--output', tmp_path / 'sheet.png', '--images', 4]
    if not decodes:
        with pytest.raises(InputError, match='nothing to draw; give --data-path, or a --tokenizer-path that has'):
            inspect(fitted, capsys, *flags)
    inspect(fitted, capsys, '--data-path', fitted / 'images', *flags)
    sheet = Image.open(tmp_path / 'sheet.png')
    assert sheet.height == 22 + 131 * (4 if decodes else 2)  # one column of pairs, or two of images


def test_quality_is_the_mean_over_the_images(fitted, tmp_path, capsys):
    """At the reconstruction's own size, and at another, for which it is resized."""
    flags = ['--data-path', fitted / 'images', '--tokenizer-path', fitted / 'tokenizer.pt', '--quality',
             '--num-workers', 0]
    tokenizer, codebook = load_tokenizer(fitted / 'tokenizer.pt'), load_codebook(fitted / 'codebook.ckpt')
    paths = sorted((fitted / 'images').rglob('*.png'))
    for more, size in (([], 32), (['--quality-size', 48], 48)):
        lines, summary = inspect(fitted, capsys, *flags, *more, '--output', tmp_path / 'found.json')
        assert json.loads((tmp_path / 'found.json').read_text()) == summary
        scores = []
        for path in paths:
            with Image.open(path) as image:
                codes = quantize(tokenizer(published_transform(32)(image)[None]), codebook)
                original = published_transform(size)(image)[None]
            made = tokenizer.decode(codebook[codes]).clamp(0, 1)
            if size != 32:
                made = resize(made, [size, size], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
            scores.append((psnr(original, made).item(), ssim(original, made).item()))
        assert [summary['psnr'], summary['ssim']] == pytest.approx(np.mean(scores, 0).tolist(), abs=2e-3)
        assert summary['quality_size'] == size and 10 < summary['psnr'] < 60
        assert f'reconstruction: PSNR {summary["psnr"]:.2f} dB, SSIM {summary["ssim"]:.3f}, at {size} pixels' in lines
    size = Size(16, 1, 1, 32)
    torch.save(ViTVQGAN(size, None, 20, 12, 64).state_dict(), tmp_path / 'vit.pt')
    _, summary = inspect(fitted, capsys, *flags, '--tokenizer-path', tmp_path / 'vit.pt')
    assert summary['psnr'] is None and summary['ssim'] is None  # it has no decoder
    with pytest.raises(InputError, match='give --data-path and --tokenizer-path'):
        inspect(fitted, capsys, '--quality')


def test_inspection_refuses_what_does_not_belong_together(fitted, tmp_path, capsys):
    torch.save(torch.randn(3, 12), tmp_path / 'small.ckpt')
    torch.save(torch.randn(20, 5), tmp_path / 'narrow.ckpt')
    (tmp_path / 'labels.txt').write_text('0\n1\n')
    smooth_images(tmp_path / 'few', per_class=1)
    draw = ['--output', tmp_path / 'sheet.png']
    for flags, message in (
            (['--codebook-path', tmp_path / 'small.ckpt'], 'my-token.data.bin.gz: holds code .* has 3 rows; give'),
            (['--label-file', tmp_path / 'labels.txt'], 'labels.txt: 2 labels for 24 images; give the labels of'),
            (['--data-path', tmp_path / 'few'], 'few: 3 images, but .* holds 24; give the images'),
            (['--images', 0], '--images: 0: give a value of 1 or more'),
            (draw, '--output: nothing to draw'),
            (['--codebook-path', tmp_path / 'narrow.ckpt', '--tokenizer-path', fitted / 'tokenizer.pt', *draw],
             'narrow.ckpt: rows of 5 elements, but the tokenizer gives 12')):
        with pytest.raises(InputError, match=message):
            inspect(fitted, capsys, *flags)
    assert not (tmp_path / 'sheet.png').exists()


def test_a_damaged_source_image_is_named(fitted, tmp_path, capsys):
    paths = smooth_images(tmp_path / 'images')
    paths[1].write_bytes(b'no picture')
    with pytest.raises(InputError, match='images: ant/1.png is no readable image .*: replace or remove it$'):
        inspect(fitted, capsys, '--data-path', tmp_path / 'images', '--output', tmp_path / 'sheet.png')


@pytest.mark.slow
def test_a_mistake_is_one_line_from_any_folder(tmp_path):
    words = ['--token-file', 'none.data.bin.gz', '--codebook-path', 'none.ckpt']
    done = subprocess.run([sys.executable, ROOT / 'scripts' / 'inspect_tokens.py', *words], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == 'error: none.ckpt: cannot read a codebook (No such file or directory)\n'


@pytest.mark.parametrize('kind', ['list', 'tar', 'parquet'])
def test_every_kind_of_source_gives_the_same_report(kind, fitted, tmp_path, capsys, monkeypatch):
    paths = sorted((fitted / 'images').rglob('*.png'))
    members = [member for i, path in enumerate(paths)
               for member in ((f'{i:03d}.png', path.read_bytes()), (f'{i:03d}.cls', b'%d' % (i // 8)))]
    if kind == 'list':
        source = tmp_path / 'l.txt'
        source.write_text(''.join(f'{path}\t{i // 8}\n' for i, path in enumerate(paths)))
    elif kind == 'tar':
        source = write_tar(tmp_path / 'a.tar', members)
    else:
        source = write_parquet(tmp_path / 'a.parquet', [(path.read_bytes(), i // 8) for i, path in enumerate(paths)])
    draw = inspect_tokens.draw_sheet
    monkeypatch.setattr(inspect_tokens, 'draw_sheet', lambda images, *_: draw(images))  # folders alone name classes
    sheets = []
    reports = []
    for data_path in (fitted / 'images', source):
        lines, found = inspect(fitted, capsys, '--data-path', data_path, '--output', tmp_path / 'sheet.png')
        reports.append((lines, found))
        sheets.append((tmp_path / 'sheet.png').read_bytes())
    assert reports[0] == reports[1] and sheets[0] == sheets[1]


def test_an_output_that_cannot_be_written_is_said_before_the_work(fitted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspect_tokens, 'open_codes', None)
    (tmp_path / 'file').write_text('')
    for name in ('file/sheet.png', 'x' * 300 + '.png'):
        fails(lambda: inspect(fitted, capsys, '--data-path', fitted / 'images', '--output', tmp_path / name),
              'cannot be written')


@pytest.mark.parametrize('rotate', [False, True])
def test_images_turned_otherwise_than_those_of_the_tokens_are_noted(fitted, tmp_path, capsys, rotate):
    flag = ['--exif-rotate']
    call(tokenize_images, '--data-path', fitted / 'images', '--name', 'own', '--output-dir', tmp_path,
         '--tokenizer-path', fitted / 'tokenizer.pt', '--codebook-path', fitted / 'codebook.ckpt', '--image-size', 32,
         '--num-workers', 0, '--device', 'cpu', *flag * rotate)
    words = ['--codebook-path', fitted / 'codebook.ckpt', '--data-path', fitted / 'images']
    lines, _ = inspect(tmp_path, capsys, *words, *flag * (not rotate), name='own')
    note = f'note: images are read {"without" if rotate else "with"} --exif-rotate; the tokens of {tmp_path}'
    assert f'{note}/own-token.data.bin.gz were made otherwise' in lines
    lines, _ = inspect(tmp_path, capsys, *words, *flag * rotate, name='own')
    assert not any('--exif-rotate' in line for line in lines)


def test_large_images_are_bad_unless_allowed(fitted, tmp_path, capsys):
    flags = ['--data-path', fitted / 'images', '--output', tmp_path / 'sheet.png', '--max-image-pixels']
    fails(lambda: inspect(fitted, capsys, *flags, 1599), 'images: ant/0.png is no readable.*--max-image-pixels')
    inspect(fitted, capsys, *flags, 1600)


def test_a_set_of_others(tmp_path, capsys):
    path = write_safetensors(tmp_path / 'a.safetensors', codes_of(12, 3, 512).astype('i2'), labels_of(12))
    call(inspect_tokens, '--token-file', path, '--codebook-path', 'fsq:8,8,8')
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found['images'], found['grid'], found['codes']) == (12, 3, 512)
    assert found['class_counts'] == {'0': 3, '1': 3, '2': 3, '3': 3}
    assert found['bytes_per_image']['stored'] == round(path.stat().st_size / 12, 2)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
