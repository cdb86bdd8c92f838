"""scripts/fit_patch_tokenizer.py: its flags, what it refuses in one line, and its memory."""
import os
import subprocess
import sys

import pytest
from PIL import Image

from conftest import ROOT
from helpers import call, fails, smooth_images
from image_data.sources import open_source
from image_tokenizer.patch_fit import FitOptions, fit_to_folder
from scripts import fit_patch_tokenizer
from utils import InputError

FIT = ['--image-size', '32', '--patch-size', '4', '--dim', '12', '--codes', '20', '--iterations', '5']


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    smooth_images(folder)
    return folder


def test_the_program_fits_what_the_library_fits_for_its_flags(images, tmp_path):
    options = FitOptions(32, 4, dim=12, codes=20, max_images=20, max_patches=900, iterations=5, seed=3)
    fit_to_folder(open_source(images), tmp_path / 'library', options)
    call(fit_patch_tokenizer, '--data-path', images, '--output-dir', tmp_path / 'program', *FIT, '--max-images', 20,
         '--max-patches', 900, '--seed', 3)
    for file in ('tokenizer.pt', 'codebook.ckpt'):
        assert (tmp_path / 'program' / file).read_bytes() == (tmp_path / 'library' / file).read_bytes()


def test_fit_draws_the_images_and_patches_it_is_allowed(images, tmp_path, capsys):
    call(fit_patch_tokenizer, '--data-path', images, '--output-dir', tmp_path, '--max-images', 5,
         '--max-patches', 100, *FIT)
    assert '5 images, 100 patches; 20 codes of 12' in capsys.readouterr().out


@pytest.mark.parametrize('flags, message', [
    (['--max-patches', '19'], '19 patches are too few for 20 codes'),
    (['--dim', '51'], 'rows of 51 elements: a patch of 4 x 4 pixels has 48 values; choose 49 or less'),
    (['--dim', '1'], '--dim'),
    (['--image-size', '30'], '--image-size 30: .*do not divide into patches of 4: choose 28 or 32'),
    (['--image-size', '3'], '--image-size 3: smaller than patches of 4 pixels; choose a multiple of 4'),
    (['--codes', '1'], '--codes'), (['--max-images', '0'], '--max-images'), (['--seed', 2 ** 63], '--seed')])
def test_fit_refuses_what_cannot_be(flags, message, images, tmp_path):
    with pytest.raises(InputError, match=message):
        call(fit_patch_tokenizer, '--data-path', images, '--output-dir', tmp_path, *FIT, *flags)
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


@pytest.mark.slow
def test_memory_does_not_go_with_the_number_of_images(images, tmp_path):
    """1,500 images of 256 x 256 are 1.2 GB of floats."""
    path = next(images.rglob('*.png'))
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
