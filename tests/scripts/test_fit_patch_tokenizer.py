"""Fitting the patch tokenizer: PCA against a slow one; which images and patches are drawn; memory."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import fit_patch_tokenizer
from token_files.codebook import load_codebook, quantize
from conftest import ROOT
from helpers import call, fails, published_transform, smooth_images, write_parquet, write_tar
from image_data.sources import open_source
from image_tokenizer.tokenizers import PatchTokenizer, load_tokenizer
from scripts.fit_patch_tokenizer import draw, parse_args, sample_patches
from utils import InputError

FIT = ['--image-size', '32', '--patch-size', '4', '--dim', '12', '--codes', '20', '--iterations', '5']


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    """A folder with images/, and a tokenizer and codebook fitted to them; made once."""
    folder = tmp_path_factory.mktemp('fitted')
    smooth_images(folder / 'images')
    call(fit_patch_tokenizer, '--data-path', folder / 'images', '--output-dir', folder, *FIT)
    return folder


# ---------------------------------------------------------------- the fit

def test_pca_is_the_leading_singular_vectors():
    patches = torch.randn(300, 12, generator=generator()) @ torch.randn(12, 12, generator=generator(1)) + 0.5
    mean, basis = fit_patch_tokenizer.fit_pca(patches, 4)
    x = patches.double().numpy()
    _, values, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-5)
    np.testing.assert_allclose(basis @ basis.T, rows[:4].T @ rows[:4], atol=1e-5)
    residual = (patches - mean) - (patches - mean) @ basis @ basis.T
    assert residual.square().sum().item() == pytest.approx((values[4:] ** 2).sum(), rel=1e-4)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()  # the sign is settled


def test_two_fits_are_equal_and_another_seed_differs(fitted, tmp_path):
    for name, seed in (('same', 0), ('other', 1)):
        call(fit_patch_tokenizer, '--data-path', fitted / 'images', '--output-dir', tmp_path / name, *FIT,
             '--seed', seed)
    for file in ('tokenizer.pt', 'codebook.ckpt'):
        assert (tmp_path / 'same' / file).read_bytes() == (fitted / file).read_bytes()
    assert (tmp_path / 'other' / 'codebook.ckpt').read_bytes() != (fitted / 'codebook.ckpt').read_bytes()


def test_fitted_tokenizer_has_the_interface_and_reconstructs(fitted):
    tokenizer = load_tokenizer(fitted / 'tokenizer.pt')
    codebook = load_codebook(fitted / 'codebook.ckpt')
    assert codebook.shape == (20, 12) and codebook[:, :11].std().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(codebook, tokenizer.codebook)
    assert (tokenizer.patch_size, tokenizer.embed_dim) == (4, 12)
    paths = sorted((fitted / 'images').rglob('*.png'))
    images = torch.stack([published_transform(32)(Image.open(path)) for path in paths])
    features = tokenizer(images)
    assert features.shape == (24, 64, 12) and features.dtype == torch.float32
    coarse = (tokenizer.decode(codebook[quantize(features, codebook)]) - images).square().mean().sqrt().item()
    assert 0.005 < coarse < 0.15  # 20 codes keep the gist


def test_its_codes_are_the_nearest_patches(fitted):
    """By cosine among rows, and by Euclidean distance among patches."""
    tokenizer = load_tokenizer(fitted / 'tokenizer.pt')
    codebook = load_codebook(fitted / 'codebook.ckpt')
    components = (all_patches(fitted).flatten(0, 1) - tokenizer.mean) @ tokenizer.basis * tokenizer.scale
    euclidean = torch.cdist(components.double(), codebook[:, :11].double()).argmin(1)
    paths = sorted((fitted / 'images').rglob('*.png'))
    images = torch.stack([published_transform(32)(Image.open(path)) for path in paths])
    assert torch.equal(quantize(tokenizer(images), codebook).flatten(), euclidean)


def test_a_gray_patch_becomes_a_gray_row(fitted):
    """What directions cannot do: near the mean patch they are noise."""
    tokenizer = load_tokenizer(fitted / 'tokenizer.pt')
    codebook = load_codebook(fitted / 'codebook.ckpt')
    flat = tokenizer.mean.view(1, 3, 4, 4) + torch.linspace(-0.02, 0.02, 5).view(5, 1, 1, 1)
    back = tokenizer.decode(codebook[quantize(tokenizer(flat), codebook)])
    rows = tokenizer.decode(codebook[:, None])  # (20, 3, 4, 4)
    best = torch.cdist(flat.flatten(1), rows.flatten(1)).min(1).values
    assert torch.allclose((back - flat).flatten(1).norm(dim=1), best, atol=1e-5)


def test_fit_draws_the_images_and_patches_it_is_allowed(fitted, tmp_path, capsys):
    call(fit_patch_tokenizer, '--data-path', fitted / 'images', '--output-dir', tmp_path, '--max-images', 5,
         '--max-patches', 100, *FIT)
    assert '5 images, 100 patches; 20 codes of 12' in capsys.readouterr().out


@pytest.mark.parametrize('flags, message', [
    (['--max-patches', '19'], '19 patches are too few for 20 codes'),
    (['--dim', '51'], '--dim 51: a patch of --patch-size 4 has 48 values; choose 49 or less'),
    (['--dim', '1'], '--dim'),
    (['--image-size', '30'], '--image-size 30: .*do not divide into patches of 4: choose 28 or 32'),
    (['--image-size', '3'], '--patch-size 4: larger than images of --image-size 3'),
    (['--codes', '1'], '--codes'), (['--max-images', '0'], '--max-images'), (['--seed', 2 ** 63], '--seed')])
def test_fit_refuses_what_cannot_be(flags, message, fitted, tmp_path):
    with pytest.raises(InputError, match=message):
        call(fit_patch_tokenizer, '--data-path', fitted / 'images', '--output-dir', tmp_path, *FIT, *flags)
    assert not list(tmp_path.iterdir())


def test_fit_refuses_folders_without_anything_to_learn(tmp_path):
    for folder in ('missing', 'empty', 'classes', 'flat'):
        if folder in ('classes', 'flat'):
            (tmp_path / folder / 'a').mkdir(parents=True)
    (tmp_path / 'empty').mkdir()
    Image.new('RGB', (32, 32)).save(tmp_path / 'flat' / 'a' / 'black.png')
    for folder in ('missing', 'empty', 'classes', 'flat'):
        message = {'flat': 'every patch is the same', 'missing': 'no such file or folder',
                   'empty': 'no class folders of images', 'classes': 'the class folder a holds no images'}[folder]
        with pytest.raises(InputError, match=f'{folder}: {message}'):
            call(fit_patch_tokenizer, '--data-path', tmp_path / folder, '--output-dir', tmp_path / 'out', *FIT)


# ---------------------------------------------------------------- what is drawn

@pytest.mark.parametrize('total, count', [(10, 4), (10, 10), (10, 20), (1, 1), (5000, 3), (5000, 2499), (5000, 4999)])
def test_numbers_are_drawn_once_each_and_all_alike(total, count, monkeypatch):
    for limit in (0, 1 << 24):  # few of many, and a shuffle of all
        monkeypatch.setattr(fit_patch_tokenizer, 'SHUFFLED_WHOLE', limit)
        drawn = draw(total, count, generator())
        assert len(drawn) == min(total, count) == len(drawn.unique()) and drawn.min() >= 0 and drawn.max() < total
        assert torch.equal(drawn, draw(total, count, generator()))
    if total == 5000 and count > 3:
        assert not torch.equal(drawn, drawn.sort().values)
        assert abs(drawn.double().mean() - total / 2) < 100


def all_patches(fitted):
    paths = sorted((fitted / 'images').rglob('*.png'))
    images = torch.stack([published_transform(32)(Image.open(path)) for path in paths])
    return PatchTokenizer(torch.zeros(48), torch.eye(48), torch.tensor(1.)).patches(images)  # (24, 64, 48)


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_sample_is_that_of_the_slow_way(fitted, workers):
    """All images in memory, all their patches shuffled."""
    patches = all_patches(fitted)
    for images, count in ((24, 5000), (24, 300), (7, 100), (100, 20)):
        args = parse_args(['--data-path', 'x', '--output-dir', 'x', *FIT, '--max-images', str(images),
                           '--max-patches', str(count), '--num-workers', str(workers)])
        found, used = sample_patches(open_source(fitted / 'images'), args, generator())
        seeded = generator()
        chosen = torch.randperm(24, generator=seeded)[:images]
        slow = patches[chosen].flatten(0, 1)
        order = torch.randperm(len(slow), generator=seeded)[:count]
        assert torch.equal(found, slow[order]) and used == len((order // 64).unique())


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['list', 'tar', 'parquet'])
def test_every_kind_of_source_gives_the_same_fit(kind, fitted, tmp_path):
    paths = sorted((fitted / 'images').rglob('*.png'))
    if kind == 'list':
        source = tmp_path / 'l.txt'
        source.write_text(''.join(f'{path}\t0\n' for path in paths))
    elif kind == 'tar':
        source = write_tar(tmp_path / 'a.tar', [member for i, path in enumerate(paths) for member in (
            (f'{i:03d}.png', path.read_bytes()), (f'{i:03d}.cls', b'0'))])
    else:
        source = write_parquet(tmp_path / 'a.parquet', [(path.read_bytes(), 0) for path in paths], row_group_size=5)
    call(fit_patch_tokenizer, '--data-path', source, '--output-dir', tmp_path / 'out', *FIT, '--num-workers', 1)
    for file in ('tokenizer.pt', 'codebook.ckpt'):
        assert (tmp_path / 'out' / file).read_bytes() == (fitted / file).read_bytes()


def test_bad_images_stop_the_fit_or_are_left_out(tmp_path, capsys):
    paths = smooth_images(tmp_path / 'in')
    paths[3].write_bytes(b'no image')
    line = ['--data-path', tmp_path / 'in', '--output-dir', tmp_path / 'out', *FIT]
    fails(lambda: call(fit_patch_tokenizer, *line), 'in: ant/3.png is no readable image .*--skip-bad-images')
    fails(lambda: call(fit_patch_tokenizer, *line, '--max-image-pixels', 1599),
          'no readable image .*--max-image-pixels')
    assert not list((tmp_path / 'out').iterdir())
    call(fit_patch_tokenizer, *line, '--skip-bad-images')
    assert f'23 images, {23 * 64:,} patches' in capsys.readouterr().out
    fails(lambda: call(fit_patch_tokenizer, *line), 'tokenizer.pt: is there, and tokens may have been made with it')
    line[3] = tmp_path / 'again'
    for path in paths[1:]:
        path.write_bytes(b'no image')
    fails(lambda: call(fit_patch_tokenizer, *line, '--codes', 65, '--skip-bad-images'),
          'in: 64 patches are too few for 65 codes')


def test_outputs_that_cannot_be_written_are_said_before_the_work(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_patch_tokenizer, 'sample_patches', None)
    (tmp_path / 'file').write_text('')
    for folder in ('file', 'file/x', 'x' * 300):
        fails(lambda: call(fit_patch_tokenizer, '--data-path', fitted / 'images', '--output-dir', tmp_path / folder,
                           *FIT), 'tokenizer.pt: cannot be written')
    (tmp_path / 'out' / 'codebook.ckpt').mkdir(parents=True)
    fails(lambda: call(fit_patch_tokenizer, '--data-path', fitted / 'images', '--output-dir', tmp_path / 'out', *FIT),
          'codebook.ckpt: cannot be written')


@pytest.mark.slow
def test_memory_does_not_go_with_the_number_of_images(fitted, tmp_path):
    """1,500 images of 256 x 256 are 1.2 GB of floats."""
    path = next((fitted / 'images').rglob('*.png'))
    (tmp_path / 'l.txt').write_text(f'{path}\t0\n' * 1500)
    code = (
        'import resource, sys; import fit_patch_tokenizer as fit\n'
        'for images in ("64", "1500"):\n'
        '    fit.main(fit.parse_args([*sys.argv[1:], "--output-dir", images, "--max-images", images]))\n'
        '    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)')
    done = subprocess.run([sys.executable, '-c', code, '--data-path', tmp_path / 'l.txt',
                           '--max-patches', '2000', '--codes', '20', '--iterations', '1', '--num-workers', '0'],
                          cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT / 'scripts')}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    few, many = (int(line) for line in done.stdout.splitlines() if line.isdigit())  # KiB at most so far
    assert many - few < 150_000
