"""Images made smaller with a side: sizes, files, which encoders there are, and the search over sides."""
import io

import numpy as np
import PIL
import pytest
from PIL import Image, features

from helpers import encoded, fails, noise, smooth_images
from image_data import shrinking
from image_data.shrinking import METHODS, SIDED, check_encoder, draw_images, search_sides, shrink, sides_of
from image_data.sources import open_source

pytestmark = pytest.mark.usefixtures('one_thread')
AVIF = pytest.mark.skipif('avif' not in features.get_supported(), reason='this Pillow has no AVIF')


@pytest.mark.parametrize('size, side, sides', [
    ((224, 224), 64, [64, 64]), ((500, 375), 224, [299, 224]), ((375, 500), 224, [224, 299]), ((31, 40), 32, [31, 40]),
    ((32, 40), 32, [32, 40]), ((3, 9000), 1, [1, 3000]), ((5, 8), 2, [2, 3]), ((4, 5), 2, [2, 3])])
def test_the_short_side_becomes_the_side_and_never_longer(size, side, sides):
    image = Image.new('RGB', size)
    assert sides_of(image, 'jpeg', 50, side) == sides
    assert sides_of(image, 'jpeg', 50) == list(size)


@pytest.mark.parametrize('method', [pytest.param(method, marks=AVIF if method == 'avif' else []) for method in SIDED])
def test_an_image_is_resized_then_encoded(method):
    image = noise(0, (40, 52))
    small = image.resize((26, 20), Image.Resampling.BICUBIC)
    options = {'jpeg': {'optimize': True}, 'webp': {}, 'avif': {'speed': 6, 'codec': 'aom', 'max_threads': 1}}[method]
    assert shrink(image, method, 40, 20) == shrink(small, method, 40) == encoded(
        small, method.upper(), quality=40, **options)
    assert shrink(image, method, 40, 40) == shrink(image, method, 40)


@AVIF
def test_an_avif_drops_the_color_profile_of_its_source():
    image = noise(0, (24, 24))
    plain = shrink(image, 'avif', 50)
    image.info['icc_profile'] = bytes(400)
    assert shrink(image, 'avif', 50) == plain


# ---------------------------------------------------------------- encoders

@pytest.mark.parametrize('method', [pytest.param(method, marks=AVIF if method == 'avif' else []) for method in METHODS])
def test_encoders_that_are_here(method):
    check_encoder(method)


@pytest.mark.parametrize('method, library', [('avif', 'libavif'), ('webp', 'libwebp'), ('jpeg', 'libjpeg')])
def test_a_pillow_without_a_codec(monkeypatch, method, library):
    monkeypatch.setattr(features, 'check', lambda _: False)
    fails(lambda: check_encoder(method), f'^--method {method}: this Pillow, {PIL.__version__}, lacks {library}; ')
    check_encoder('sample')


def test_a_pillow_whose_library_has_no_encoder(monkeypatch):
    def save(*_, **__):
        raise ValueError('Invalid saving codec')
    monkeypatch.setattr(features, 'check', lambda _: True)
    monkeypatch.setattr(Image.Image, 'save', save)
    fails(lambda: check_encoder('avif'), '--method avif.* lacks an encoder .*Invalid saving codec')


# ---------------------------------------------------------------- the search

def test_fewer_drawn_images_are_some_of_more():
    assert draw_images(5, 5, 0).tolist() == [0, 1, 2, 3, 4]
    many, few = draw_images(100, 30, 1), draw_images(100, 10, 1)
    assert set(few) < set(many) and len(many) == 30 and (np.diff(many) > 0).all()
    assert many.tolist() != draw_images(100, 30, 2).tolist()


def test_the_search_equals_a_loop_over_all_qualities(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, 'webp', METHODS['webp']._replace(lowest=20, highest=60))  # fewer to try
    monkeypatch.setattr(shrinking, 'COMPARED', 4)
    smooth_images(tmp_path / 'in', per_class=2)
    source = open_source(tmp_path / 'in')
    images = [Image.open(io.BytesIO(source.read(i))).convert('RGB') for i in range(6)]
    compared = draw_images(6, 4, 3).tolist()
    budget = 6 * 180
    found, searched, on = search_sides(source, 'webp', [50, 32, 20, 9], budget, 3, 0, None)
    assert (searched, on) == (6, 4)
    for side, (at, quality, size, psnr) in zip([50, 32, 20, 9], found):
        totals = {number: sum(len(shrink(image, 'webp', number, side)) for image in images) for number in range(20, 61)}
        within = [number for number, total in totals.items() if total <= budget]
        assert at == side
        if not within:
            assert (quality, size, psnr) == (None, pytest.approx(totals[20] / 6), None)
            continue
        assert totals[quality] <= budget and (quality == 60 or totals[quality + 1] > budget)
        assert size == pytest.approx(totals[quality] / 6)
        errors = []
        for i in compared:
            other = Image.open(io.BytesIO(shrink(images[i], 'webp', quality, side))).resize((40, 40), 3)
            errors.append(np.square(np.asarray(images[i]) / 255 - np.asarray(other) / 255).mean())
        assert psnr == pytest.approx(np.mean(-10 * np.log10(errors)), abs=1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(':')[0] for line in lines] == [f'webp, side {side}' for side in (50, 32, 20, 9)]
    assert [side.parameter is None for side in found] == [True, False, False, False]
