"""The scripts around token sets against slow obvious versions, and what they say to mistakes."""
import gzip
import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import build_synonyms
import fit_patch_tokenizer
import inspect_tokens
from conftest import ROOT
from image_tokenizer import image_transform, load_tokenizer, quantize
from test_token_dataset import slow_decode
from token_dataset import index_path, load_codebook, load_synonyms, open_codes, write_tokens
from utils import InputError
from vitvqgan import Size, ViTVQGAN

FIT = ['--image-size', '32', '--patch-size', '4', '--dim', '12', '--codes', '20', '--iterations', '5']


def call(script, *words):
    """Run a script's main in this process."""
    script.main(script.get_args_parser().parse_args([str(word) for word in words]))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def write_images(folder, per_class=8, size=40):
    """Smooth colour images in three class folders; returns their paths in the order of an ImageFolder."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    paths = []
    for name in ('ant', 'bee', 'cat'):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            fy, fx, phase = rng.uniform(1, 6, 3), rng.uniform(1, 6, 3), rng.uniform(0, 6, 3)
            pixels = np.sin(y[..., None] * fy + x[..., None] * fx + phase)
            paths.append(folder / name / f'{i}.png')
            Image.fromarray((127.5 + 127 * pixels).astype(np.uint8)).save(paths[-1])
    return paths


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    """A folder with images/, a tokenizer and codebook fitted to them, and their tokens; made once."""
    folder = tmp_path_factory.mktemp('fitted')
    paths = write_images(folder / 'images')
    call(fit_patch_tokenizer, '--data-path', folder / 'images', '--output-dir', folder, *FIT)
    tokenizer, codebook = load_tokenizer(folder / 'tokenizer.pt'), load_codebook(folder / 'codebook.ckpt')
    images = torch.stack([image_transform(32)(Image.open(path)) for path in paths])
    codes = quantize(tokenizer(images), codebook)
    write_tokens(folder / 'my-token.data.bin.gz', folder / 'my-label.txt', codes.numpy(), np.repeat([0, 1, 2], 8))
    return folder


# ---------------------------------------------------------------- build_synonyms

def slow_nearest(codebook, top_k):
    """Loops over pairs of rows, in Python's own floats."""
    rows = codebook.tolist()
    lists = []
    for i, a in enumerate(rows):
        cosine = {j: math.fsum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)
                  for j, b in enumerate(rows) if j != i}
        lists.append(sorted(cosine, key=lambda j: (-cosine[j], j))[:top_k])
    return lists


def test_synonyms_are_the_nearest_rows_by_cosine(tmp_path):
    lengths = torch.linspace(0.1, 10, 60)[:, None]  # must not matter
    codebook = torch.randn(60, 8, generator=generator()) * lengths
    torch.save(codebook, tmp_path / 'codebook.ckpt')
    call(build_synonyms, '--codebook-path', tmp_path / 'codebook.ckpt', '--output', tmp_path / 's.json', '--top-k', 7)
    lists = json.loads((tmp_path / 's.json').read_text())
    assert list(lists) == [str(code) for code in range(60)]
    assert list(lists.values()) == slow_nearest(codebook, 7)
    table, count = load_synonyms(tmp_path / 's.json', 60, 5)  # training reads it
    assert table.tolist() == [row[:5] for row in slow_nearest(codebook, 7)] and (count == 5).all()


def test_five_synonyms_unless_told_otherwise(fitted, tmp_path):
    call(build_synonyms, '--codebook-path', fitted / 'codebook.ckpt', '--output', tmp_path / 's.json')
    assert {len(row) for row in json.loads((tmp_path / 's.json').read_text()).values()} == {5}


def test_a_code_is_never_its_own_synonym_and_ties_go_to_the_lowest_code():
    codebook = torch.tensor([[1., 0], [2, 0], [4, 0], [0, 1], [0, 0]])  # three equal directions, and a row of zeros
    assert build_synonyms.nearest_codes(codebook, 4).tolist() == [
        [1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3]]


@pytest.mark.parametrize('top_k', [0, 20])
def test_top_k_beyond_the_codebook_is_refused(top_k, fitted, tmp_path):
    with pytest.raises(InputError, match=f'--top-k {top_k}: choose 1 to 19, the other codes in .*codebook.ckpt'):
        call(build_synonyms, '--codebook-path', fitted / 'codebook.ckpt', '--output', tmp_path / 's.json',
             '--top-k', top_k)
    assert not (tmp_path / 's.json').exists()


# ---------------------------------------------------------------- fit_patch_tokenizer

def slow_kmeans(features, rows, iterations):
    """Spherical k-means from given unit rows, one feature at a time. Returns the mean feature of each cluster."""
    unit = [f / np.linalg.norm(f) for f in features]
    for step in range(iterations + 1):
        assigned = [int(np.argmax([u @ r for r in rows])) for u in unit]
        members = [[i for i, a in enumerate(assigned) if a == k] for k in range(len(rows))]
        if step == iterations:
            break
        fresh = [sum(unit[i] for i in m) if m else None for m in members]
        fresh = [r if r is None else r / np.linalg.norm(r) for r in fresh]
        worst = sorted(range(len(unit)), key=lambda i: unit[i] @ fresh[assigned[i]])
        rows = [unit[worst.pop(0)] if r is None else r for r in fresh]
    return np.array([np.mean([features[i] for i in m], axis=0) for m in members])


def test_kmeans_is_the_slow_one():
    features = torch.randn(200, 5, generator=generator(1)) + torch.tensor([1., 0, 0, 0, 0])
    first = F.normalize(features, dim=-1)[torch.randperm(200, generator=generator())[:8]]
    found = fit_patch_tokenizer.spherical_kmeans(features, 8, 6, generator())
    slow = slow_kmeans(features.double().numpy(), list(first.double().numpy()), 6)
    np.testing.assert_allclose(found, slow, atol=1e-5)


def test_kmeans_fills_empty_clusters_with_the_worst_fits():
    base = torch.tensor([[1., 0, 0]]).repeat(60, 1)  # so the first rows drawn are nearly all equal
    others = torch.tensor([[0., 1, 0], [0, 0, 1], [0, -1, 1], [-1, 0, 0.5]])
    features = torch.cat([base, others])
    found = fit_patch_tokenizer.spherical_kmeans(features, 5, 10, generator())
    assert sorted(found.tolist()) == sorted([[1., 0, 0], *others.tolist()])


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
    tokenizer, codebook = load_tokenizer(fitted / 'tokenizer.pt'), load_codebook(fitted / 'codebook.ckpt')
    assert codebook.shape == (20, 12) and codebook.std().item() == pytest.approx(1, abs=1e-5)
    assert (tokenizer.patch_size, tokenizer.embed_dim) == (4, 12)
    paths = sorted((fitted / 'images').rglob('*.png'))
    images = torch.stack([image_transform(32)(Image.open(path)) for path in paths])
    features = tokenizer(images)
    assert features.shape == (24, 64, 12) and features.dtype == torch.float32
    error = (tokenizer.decode(features) - images).square().mean().sqrt().item()
    coarse = (tokenizer.decode(codebook[quantize(features, codebook)]) - images).square().mean().sqrt().item()
    assert error < 0.005 < coarse < 0.2  # PCA keeps the smooth patches; 20 codes keep their gist


def test_fit_draws_the_images_and_patches_it_is_allowed(fitted, tmp_path, capsys):
    call(fit_patch_tokenizer, '--data-path', fitted / 'images', '--output-dir', tmp_path, '--max-images', 5,
         '--max-patches', 100, *FIT)
    assert '5 images, 100 patches; 20 codes of 12' in capsys.readouterr().out


@pytest.mark.parametrize('flags, message', [
    (['--max-patches', '19'], '19 patches of 48 values are too few for 20 codes of 12'),
    (['--dim', '49'], 'patches of 48 values are too few for 20 codes of 49'),
    (['--image-size', '30'], 'do not divide into patches of 4')])
def test_fit_refuses_what_cannot_be(flags, message, fitted, tmp_path):
    with pytest.raises(InputError, match=message):
        call(fit_patch_tokenizer, '--data-path', fitted / 'images', '--output-dir', tmp_path, *FIT, *flags)
    assert not list(tmp_path.iterdir())


def test_fit_refuses_folders_without_anything_to_learn(tmp_path):
    for folder in ('missing', 'empty', 'classes', 'flat'):
        (tmp_path / folder / 'a').mkdir(parents=True) if folder in ('classes', 'flat') else None
    (tmp_path / 'empty').mkdir()
    Image.new('RGB', (32, 32)).save(tmp_path / 'flat' / 'a' / 'black.png')
    for folder in ('missing', 'empty', 'classes', 'flat'):
        message = 'every patch is the same' if folder == 'flat' else 'no class folders of images'
        with pytest.raises(InputError, match=f'{folder}: {message}'):
            call(fit_patch_tokenizer, '--data-path', tmp_path / folder, '--output-dir', tmp_path / 'out', *FIT)


# ---------------------------------------------------------------- inspect_tokens

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
    assert size['stored'] == pytest.approx((file.stat().st_size + index_path(file).stat().st_size) / images, abs=0.01)
    assert size['entropy'] == pytest.approx(total / images * entropy / 8, abs=0.01)
    assert size['fixed'] == pytest.approx(total / images * math.log2(510) / 8, abs=0.01)
    assert 'source' not in size and 'class_counts' not in found


def test_counting_in_runs_is_counting_at_once(monkeypatch):
    codes = np.random.default_rng(0).integers(0, 8192, (50, 16)).astype(np.uint16)
    monkeypatch.setattr(inspect_tokens, 'IMAGES_AT_ONCE', 7)
    assert inspect_tokens.count_codes(codes, 9000).tolist() == np.bincount(codes.ravel(), minlength=9000).tolist()
    with pytest.raises(ValueError, match=f'holds code {codes.max()}, but the codebook has 5 rows'):
        inspect_tokens.count_codes(codes, 5)


def test_shards_are_one_set(fitted, tmp_path, capsys):
    codes = open_codes(fitted / 'my-token.data.bin.gz', 'none')
    for name, part in (('s-0', codes[:20]), ('s-1', codes[20:])):
        write_tokens(tmp_path / f'{name}-token.data.bin.gz', tmp_path / f'{name}-label.txt', part, [7] * len(part))
        (tmp_path / f'{name}-token.json').write_text('{"source_bytes": 1200}')
    flags = ['--codebook-path', fitted / 'codebook.ckpt', '--label-file', tmp_path / 's-*-label.txt']
    _, found = inspect(tmp_path, capsys, *flags, name='s-*')
    _, whole = inspect(fitted, capsys)
    assert found['class_counts'] == {'7': 24} and found['bytes_per_image']['source'] == 100
    assert [found[key] for key in ('images', 'grid', 'code_counts')] == [24, 8, whole['code_counts']]
    assert found['bytes_per_image']['raw'] == whole['bytes_per_image']['raw']
    (tmp_path / 's-1-token.json').unlink()
    assert 'source' not in inspect(tmp_path, capsys, *flags, name='s-*')[1]['bytes_per_image']


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


def test_source_bytes_come_from_the_card_where_there_is_no_folder(fitted, capsys):
    card = fitted / 'my-token.json'
    card.write_text('{"source_bytes": 2400}')
    try:
        assert inspect(fitted, capsys)[1]['bytes_per_image']['source'] == 100
        card.write_text('{"images": 24}')
        assert 'source' not in inspect(fitted, capsys)[1]['bytes_per_image']
    finally:
        card.unlink()


def test_sheet_shows_each_source_beside_its_reconstruction(fitted, tmp_path, capsys):
    inspect(fitted, capsys, '--data-path', fitted / 'images', '--tokenizer-path', fitted / 'tokenizer.pt',
            '--output', tmp_path / 'sheet.png', '--images', 10)
    sheet = np.asarray(Image.open(tmp_path / 'sheet.png')).astype(int)
    tokenizer, codebook = load_tokenizer(fitted / 'tokenizer.pt'), load_codebook(fitted / 'codebook.ckpt')
    columns = 3  # 10 pairs are nearest to a square as 4 rows of 3
    assert sheet.shape == (4 * 34 + 2, columns * 66 + 2, 3)
    for i, path in enumerate(sorted((fitted / 'images').rglob('*.png'))[:10]):
        source = image_transform(32)(Image.open(path))
        decoded = tokenizer.decode(codebook[quantize(tokenizer(source[None]), codebook)])[0].clamp(0, 1)
        top, left = 2 + i // columns * 34, 2 + i % columns * 66
        for image, x in ((source, left), (decoded, left + 32)):
            wanted = (image * 255).permute(1, 2, 0).numpy()
            assert np.abs(sheet[top:top + 32, x:x + 32] - wanted).max() <= 1, path


def test_sheet_of_one_kind_only(fitted, tmp_path, capsys):
    inspect(fitted, capsys, '--data-path', fitted / 'images', '--output', tmp_path / 'source.png', '--images', 1)
    assert Image.open(tmp_path / 'source.png').size == (64, 64)  # 8 pixels a code without a tokenizer
    inspect(fitted, capsys, '--tokenizer-path', fitted / 'tokenizer.pt', '--output', tmp_path / 'decoded.png')
    assert Image.open(tmp_path / 'decoded.png').size == (4 * 34 + 2, 4 * 34 + 2)  # 16 of 24 images


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
    assert sheet.size == (2 * (66 + 64 * decodes) + 2, 2 * 66 + 2)


def test_inspection_refuses_what_does_not_belong_together(fitted, tmp_path, capsys):
    torch.save(torch.randn(3, 12), tmp_path / 'small.ckpt')
    torch.save(torch.randn(20, 5), tmp_path / 'narrow.ckpt')
    (tmp_path / 'labels.txt').write_text('0\n1\n')
    write_images(tmp_path / 'few', per_class=1)
    draw = ['--output', tmp_path / 'sheet.png']
    for flags, message in (
            (['--codebook-path', tmp_path / 'small.ckpt'], 'my-token.data.bin.gz: holds code .* has 3 rows; give'),
            (['--label-file', tmp_path / 'labels.txt'], 'labels.txt: 2 labels for 24 images; give the labels of'),
            (['--data-path', tmp_path / 'few'], 'few: 3 images, but .* holds 24; give the folder'),
            (['--images', 0], '--images 0: at least 1'),
            (draw, '--output: nothing to draw'),
            (['--codebook-path', tmp_path / 'narrow.ckpt', '--tokenizer-path', fitted / 'tokenizer.pt', *draw],
             'narrow.ckpt: rows of 5 elements, but the tokenizer gives 12')):
        with pytest.raises(InputError, match=message):
            inspect(fitted, capsys, *flags)
    assert not (tmp_path / 'sheet.png').exists()


def test_a_damaged_source_image_is_named(fitted, tmp_path, capsys):
    paths = write_images(tmp_path / 'images')
    paths[1].write_bytes(b'no picture')
    with pytest.raises(InputError, match='images: an image cannot be read .*1.png'):
        inspect(fitted, capsys, '--data-path', tmp_path / 'images', '--output', tmp_path / 'sheet.png')


def test_a_mistake_is_one_line_from_any_folder(tmp_path):
    words = ['--token-file', 'none.data.bin.gz', '--codebook-path', 'none.ckpt']
    done = subprocess.run([sys.executable, ROOT / 'scripts' / 'inspect_tokens.py', *words], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == 'error: none.ckpt: cannot read a codebook (No such file or directory)\n'
