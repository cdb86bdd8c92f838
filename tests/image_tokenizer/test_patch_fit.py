"""Fitting the patch tokenizer: PCA against a slow one, which images and patches are drawn, and what it gives."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import fails, published_transform, smooth_images, write_parquet, write_tar
from image_data.sources import open_source
from image_tokenizer.patch_fit import FitOptions, draw, fit_pca, fit_to_folder, sample_patches
from image_tokenizer.tokenizers import PatchTokenizer, load_tokenizer
from token_files.codebook import load_codebook, quantize

OPTIONS = FitOptions(image_size=32, patch_size=4, dim=12, codes=20, iterations=5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    """A folder with images/, and a tokenizer and codebook fitted to them; made once."""
    folder = tmp_path_factory.mktemp('fitted')
    smooth_images(folder / 'images')
    fit_to_folder(open_source(folder / 'images'), folder, OPTIONS)
    return folder


# ---------------------------------------------------------------- the fit

def test_pca_is_the_leading_singular_vectors():
    patches = torch.randn(300, 12, generator=generator()) @ torch.randn(12, 12, generator=generator(1)) + 0.5
    mean, basis = fit_pca(patches, 4)
    x = patches.double().numpy()
    _, values, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-5)
    np.testing.assert_allclose(basis @ basis.T, rows[:4].T @ rows[:4], atol=1e-5)
    residual = (patches - mean) - (patches - mean) @ basis @ basis.T
    assert residual.square().sum().item() == pytest.approx((values[4:] ** 2).sum(), rel=1e-4)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()  # the sign is settled


def test_two_fits_are_equal_and_another_seed_differs(fitted, tmp_path):
    for name, seed in (('same', 0), ('other', 1)):
        fit_to_folder(open_source(fitted / 'images'), tmp_path / name, replace(OPTIONS, seed=seed))
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


# ---------------------------------------------------------------- what is drawn

@pytest.mark.parametrize('total, count', [(10, 4), (10, 10), (10, 20), (1, 1), (5000, 3), (5000, 2499), (5000, 4999)])
def test_numbers_are_drawn_once_each_and_all_alike(total, count):
    for limit in (0, 1 << 24):  # few of many, and a shuffle of all
        drawn = draw(total, count, generator(), limit)
        assert len(drawn) == min(total, count) == len(drawn.unique()) and drawn.min() >= 0 and drawn.max() < total
        assert torch.equal(drawn, draw(total, count, generator(), limit))
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
        options = replace(OPTIONS, max_images=images, max_patches=count)
        found, used = sample_patches(open_source(fitted / 'images'), options, generator(), workers)
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
    fit_to_folder(open_source(source), tmp_path / 'out', OPTIONS, workers=1)
    for file in ('tokenizer.pt', 'codebook.ckpt'):
        assert (tmp_path / 'out' / file).read_bytes() == (fitted / file).read_bytes()


def test_outputs_that_cannot_be_written_are_said_before_the_work(tmp_path):
    (tmp_path / 'file').write_text('')
    for folder in ('file', 'file/x', 'x' * 300):
        fails(lambda: fit_to_folder(None, tmp_path / folder, OPTIONS), 'tokenizer.pt: cannot be written')
    (tmp_path / 'out' / 'codebook.ckpt').mkdir(parents=True)
    fails(lambda: fit_to_folder(None, tmp_path / 'out', OPTIONS), 'codebook.ckpt: cannot be written')
