"""ImageNet-C's corruptions: known values, strengths, and what decides the noise."""
import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

from helpers import encoded, fails, save_image
from image_data import corruptions
from image_data.corruptions import CORRUPTIONS, Corruption, corrupt, make_corruption
from image_data.quality import psnr
from image_data.sources import load_images, open_source

NOISES = 'gaussian_noise', 'shot_noise', 'impulse_noise', 'speckle_noise'


def picture(height=96, width=80):
    """A colored picture (3, H, W) uint8 with edges, slopes, a black and a gray part."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing='ij')
    rings = ((x - .5) ** 2 + (y - .4) ** 2).mul(60).sin() * .5 + .5
    pixels = (torch.stack([rings, y * rings, (1 - x) * .8]) * 255).byte()
    pixels[:, :8, :8] = 0
    pixels[:, 8:16, :8] = 90
    return pixels


def plain(value, side=64):
    """An image (3, side, side) of one color or gray."""
    return torch.as_tensor(value, dtype=torch.uint8).reshape(-1, 1, 1).expand(3, side, side).contiguous()


# ---------------------------------------------------------------- strengths

def test_every_severity_is_worse_than_the_one_before():
    """By PSNR; but saturation, whose first two severities take color away and whose last three add it."""
    clean = picture()
    for name in CORRUPTIONS:
        quality = [psnr(clean[None] / 255, corrupt(clean, name, severity)[None] / 255).item()
                   for severity in range(1, 6)]
        falls = np.diff(quality) < 0
        assert falls[[0, 2, 3] if name == 'saturate' else slice(None)].all(), (name, quality)
        assert 4 < quality[4] < 35, (name, quality)


def test_noise_has_the_published_moments():
    gray = plain(102, 224)  # 0.4
    for severity, (deviation, photons, share, part) in enumerate(zip(
            [.08, .12, .18, .26, .38], [60, 25, 12, 5, 3], [.03, .06, .09, .17, .27], [.15, .2, .35, .45, .6]), 1):
        def values(name):
            return corrupt(gray, name, severity).double() / 255
        inside = [np.quantile(values('gaussian_noise'), q) for q in (.3, .7)]  # which nothing clips
        assert inside[1] - inside[0] == pytest.approx(2 * .5244 * deviation, abs=.005)
        counts = values('shot_noise') * photons
        assert (counts - (counts + .02).round()).abs().max() < photons / 255 + .02
        assert (counts < .5).double().mean().item() == pytest.approx(np.exp(-.4 * photons), abs=.004)
        impulses = values('impulse_noise')
        ends = [(impulses == end).double().mean().item() for end in (0, 1)]
        assert ends == pytest.approx([share / 2] * 2, rel=.05)
        assert (impulses == .4).double().mean().item() == pytest.approx(1 - share, rel=.01)
        inside = [np.quantile(values('speckle_noise'), q) for q in (.3, .7)]
        assert inside[1] - inside[0] == pytest.approx(2 * .5244 * .4 * part, abs=.005)


def test_contrast_and_brightness_by_hand():
    pixels = plain([0, 0, 0])
    pixels[0, :, 32:] = 200  # mean 100 in red
    for severity, part in enumerate([.4, .3, .2, .1, .05], 1):
        changed = corrupt(pixels, 'contrast', severity)
        assert changed[0, 0, [0, -1]].tolist() == [int(100 - 100 * part + .001), int(100 + 100 * part + .001)]
        assert not changed[1:].any()
    # value 100 becomes 125.5 at .1, and the others grow by 1.255; black becomes gray; value 255 stays
    assert corrupt(plain([100, 50, 20]), 'brightness', 1)[:, 0, 0].tolist() == [125, 62, 25]
    assert corrupt(plain([100, 50, 20]), 'brightness', 5)[:, 0, 0].tolist() == [227, 113, 45]
    assert corrupt(plain([0]), 'brightness', 3)[:, 0, 0].tolist() == [76] * 3
    assert corrupt(plain([255, 40, 0]), 'brightness', 5)[:, 0, 0].tolist() == [255, 40, 0]


def test_saturation_and_brightness_are_those_of_hsv():
    clean = picture(24, 20)
    for severity in range(1, 6):
        factor, summand = corruptions.SATURATE[severity - 1]
        added = corruptions.BRIGHTNESS[severity - 1]
        for name in ('saturate', 'brightness'):
            changed = corrupt(clean, name, severity)
            for before, after in zip(clean.flatten(1).T.tolist(), changed.flatten(1).T.tolist()):
                hue, saturation, value = colorsys.rgb_to_hsv(*(x / 255 for x in before))
                if name == 'saturate':
                    saturation = min(saturation * factor + summand, 1)
                else:
                    value = min(value + added, 1)
                expected = np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255
                assert np.abs(expected - .5 - after).max() < .51, (name, severity, before)


# ---------------------------------------------------------------- blurs and files

def test_a_gaussian_blur_is_torchvisions_within_the_borders():
    clean = picture()
    for severity, sigma in enumerate([1, 2, 3, 4, 6], 1):
        theirs = gaussian_blur(clean.double(), 8 * sigma + 1, float(sigma))
        near = 4 * sigma
        assert (corrupt(clean, 'gaussian_blur', severity) + .5 - theirs)[:, near:-near, near:-near].abs().max() < .51


def test_a_defocus_blur_makes_a_point_a_disk():
    for severity, (radius, total) in enumerate([(3, 1), (4, 1), (6, 1), (8, 1.013), (10, 1.011)], 1):
        point = np.zeros((41, 41, 3))
        point[20, 20] = 1
        kernel = corruptions._defocus_blur(point, severity, None)[..., 0]
        y, x = np.mgrid[-20:21, -20:21]
        area = (x ** 2 + y ** 2 <= radius ** 2).sum()
        assert kernel.sum() == pytest.approx(total, abs=1e-3)
        assert np.allclose(kernel[x ** 2 + y ** 2 <= (radius - 3) ** 2], 1 / area)  # flat
        assert np.abs(kernel[x ** 2 + y ** 2 > (radius + 3) ** 2]).max() < 1e-15
    # a plain image stays, but for what the two largest disks have too much; an image may be smaller than a blur
    assert [corrupt(plain(100), 'defocus_blur', severity)[0, 30, 30] for severity in (1, 2, 3, 4, 5)] == \
        [100, 100, 100, 101, 101]
    assert corrupt(plain(100, 3), 'gaussian_blur', 5).unique().tolist() == [100]
    assert corrupt(plain(100, 3), 'defocus_blur', 3).unique().tolist() == [100]


def test_jpeg_and_pixelate_are_pils():
    clean = picture(60, 80)
    image = Image.fromarray(clean.permute(1, 2, 0).numpy())
    for severity, (quality, part) in enumerate(zip([25, 18, 15, 10, 7], [.6, .5, .4, .3, .25]), 1):
        file = io.BytesIO(encoded(image, 'JPEG', quality=quality))
        assert np.array_equal(corrupt(clean, 'jpeg_compression', severity).permute(1, 2, 0), np.array(Image.open(file)))
        blocks = {tuple(color) for color in corrupt(clean, 'pixelate', severity).flatten(1).T.tolist()}
        assert len(blocks) <= int(60 * part) * int(80 * part)
    quarter = corrupt(clean, 'pixelate', 5)  # blocks of 4 x 4, each of its mean
    means = clean.double().unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2))
    assert (quarter[:, ::4, ::4] - means).abs().max() <= 1 and torch.equal(quarter[:, ::4, ::4], quarter[:, 3::4, 3::4])


# ---------------------------------------------------------------- what decides the noise

def test_an_image_is_corrupted_by_seed_name_severity_and_index():
    clean = picture()
    before = clean.clone()
    for name in CORRUPTIONS:
        changed = [corrupt(clean, name, 2, seed, index)
                   for seed, index in ((0, 0), (0, 0), (1, 0), (0, 1), (2 ** 63 - 1, 9))]
        assert {(image.dtype, image.shape, image.is_contiguous()) for image in changed} == \
            {(torch.uint8, clean.shape, True)}
        assert torch.equal(changed[0], changed[1])
        assert len({image.numpy().tobytes() for image in changed}) == (4 if name in NOISES else 1), name
    assert torch.equal(clean, before)
    assert torch.equal(Corruption('shot_noise', 2, 1)(clean, 3), corrupt(clean, 'shot_noise', 2, 1, 3))


@pytest.mark.slow
def test_worker_processes_and_batches_change_nothing(tmp_path):
    for i in range(12):
        save_image(tmp_path / f'class-{i % 2}' / f'{i}.png', i, (30, 30))
    for name in ('gaussian_noise', 'defocus_blur', 'jpeg_compression'):
        source = open_source(tmp_path)
        clean, = load_images(source, [range(12)], 24)
        source.change = make_corruption(name, 3, 5)
        expected = torch.stack([corrupt(pixels, name, 3, 5, i) for i, pixels in enumerate(clean.pixels)])
        for workers, batches in ((0, [range(12)]), (2, [[4, 5, 6, 7], [0, 1, 2, 3], [11, 10, 9, 8]])):
            for batch in load_images(source, batches, 24, workers=workers):
                assert torch.equal(batch.pixels, expected[batch.indices])


def test_what_is_not_known_is_one_line():
    fails(lambda: corrupt(plain(0), 'fog', 1), "unknown corruption 'fog'; there are gaussian_noise, .*, pixelate$")
    for severity in (0, 6):
        fails(lambda: corrupt(plain(0), 'contrast', severity), f'contrast: severity {severity} is not from 1 to 5')
    assert make_corruption(None, None, 0) is None and str(make_corruption('contrast', 2, 0)).startswith('contrast')
