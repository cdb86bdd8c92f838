"""Images a batch at a time, and their transforms."""
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from helpers import fails, limits, smooth_images
from image_data.dataset import (LONGEST_RATIO, ImageDataset, Images, Normalize, eval_transform, hold_out, middle,
                                posterize, random_erasing, train_transform)
from image_data.decoding import decode_image
from image_data.sources import open_source

CPU = torch.device('cpu')


@pytest.mark.slow
def test_an_image_is_augmented_by_its_draw_alone(tmp_path):
    """Not by its place in a batch, by its neighbors, or by which process decodes it."""
    smooth_images(tmp_path / 'x')
    data = ImageDataset(str(tmp_path / 'x'), 16, train_transform(16, 0.1, 0.5, 0., 'rand-m9-mstd0.5-inc1'))
    indices = np.arange(24)
    draws = np.stack([indices * 0 + 7, indices], 1)
    whole, = data.batches(indices, 24, CPU, draws=draws)
    assert whole[0].shape == (24, 3, 16, 16) and whole[0].dtype == torch.uint8
    assert torch.equal(whole[1], torch.arange(3).repeat_interleave(8))
    data.workers = 2
    order = np.random.default_rng(0).permutation(24)
    mixed = list(data.batches(order, 5, CPU, draws=draws[order]))
    assert [len(pixels) for pixels, _ in mixed] == [5, 5, 5, 5, 4]
    assert torch.equal(torch.cat([pixels for pixels, _ in mixed]), whole[0][order])
    other, = data.batches(indices, 24, CPU, draws=draws + 1)
    assert (other[0] != whole[0]).flatten(1).any(1).all()


def test_evaluation_resizes_and_crops_the_middle(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 255
    result = torch.as_tensor(eval_transform(32, 1.)(Image.fromarray(pixels)))
    assert result.shape == (3, 32, 32) and int(result[:, :, 2:-2].min()) == 255
    result = torch.as_tensor(eval_transform(32, 0.5)(Image.fromarray(pixels)))
    assert int(result.min()) == 255


@pytest.mark.parametrize('size', [(2, 40_000), (70_000, 1), (1, 89_000_000), (20_000_000, 3)])
def test_extreme_sides_take_no_more_memory_than_others(size):
    """Resized to 256 on the short side, the last but one would have 17 TB."""
    image = Image.new('RGB', size, (9, 8, 7))
    with limits():
        for transform in eval_transform(224, 0.875), train_transform(224, 0.08, 0.5, 0., 'rand-m9-mstd0.5-inc1'):
            assert torch.as_tensor(transform(image)).shape == (3, 224, 224)
        assert torch.as_tensor(eval_transform(224, 0.875)(image))[:, 0, 0].tolist() == [9, 8, 7]


@pytest.mark.parametrize('long', [33, 200, 201])
@pytest.mark.parametrize('upright', [False, True])
def test_what_is_cut_from_long_sides_is_not_seen(long, upright):
    rng = np.random.default_rng(0)
    wave = np.sin(np.arange(8 * long) / 3 + rng.uniform(0, 6)) * 120 + 127
    pixels = np.broadcast_to(wave[None, :, None], (8, 8 * long, 3)).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 0, 2) if upright else pixels))
    transform = eval_transform(32, 0.875)
    cut = torch.as_tensor(transform(image)).int()
    del transform.transforms[0]
    whole = torch.as_tensor(transform(image)).int()
    # both sides of the middle are cut alike, to whole pixels of the source
    assert (cut - whole).abs().max() <= 24 and (cut - whole).abs().float().mean() < 8


def test_usual_images_are_not_cut():
    for size in (LONGEST_RATIO * 5, 5), (5, LONGEST_RATIO * 5 + 1), (40, 40):
        image = Image.new('RGB', size)
        assert middle(image) is image
    assert middle(Image.new('RGB', (5, LONGEST_RATIO * 5 + 3))).size == (5, LONGEST_RATIO * 5 + 1)


def test_pixels_are_normalized_by_the_constants_of_imagenet():
    x = Normalize(CPU)(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert torch.allclose(x[0, :, 0, 0], torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-4)


def test_no_bits_are_black():
    """timm asks for them at magnitude 10, and Pillow 12 refuses."""
    image = Image.new('RGB', (4, 4), (200, 100, 50))
    assert posterize(image, 0).getpixel((0, 0)) == (0, 0, 0)
    assert posterize(image, 1).getpixel((0, 0)) == (128, 0, 0)
    assert posterize(image, 8) is image
    assert auto_augment.NAME_TO_OP['PosterizeIncreasing'] is posterize


def test_erasing_is_of_a_step():
    random.seed(0), torch.manual_seed(0)
    x = torch.zeros(64, 3, 16, 16)
    erased = random_erasing(0.25, CPU)(x.clone()).flatten(1).any(1)
    assert 2 < erased.sum() < 32
    assert torch.equal(random_erasing(0., CPU)(x.clone()), x)


def test_a_policy_that_timm_lacks_is_one_line():
    fails(lambda: train_transform(16, 0.1, 0., 0., 'randy'), '--aa randy: is no policy of timm')


READING = {'size': 8, 'batch_size': 5, 'device': CPU}


@pytest.mark.parametrize('val_images, expected', [(None, 2), (7, 7), (23, 23)])
def test_no_image_is_both_trained_on_and_held_out(tmp_path, val_images, expected):
    smooth_images(tmp_path / 'x')
    draws = []
    for seed in 0, 0, 1:
        images, held_out = hold_out(str(tmp_path / 'x'), '', val_images, seed, **READING)
        assert len(held_out) == expected and sorted([*images.numbers, *held_out.numbers]) == list(range(24))
        draws.append(held_out.numbers.tolist())
    assert draws[0] == draws[1] != draws[2] and draws[0] == sorted(draws[0])
    images, held_out = hold_out(str(tmp_path / 'x'), str(tmp_path / 'x'), val_images, 0, **READING)
    assert len(images) == 24 and held_out.numbers.tolist() == draws[0]


def test_too_few_images_to_hold_some_out(tmp_path):
    smooth_images(tmp_path / 'x')
    fails(lambda: hold_out(str(tmp_path / 'x'), '', 24, 0, **READING), 'x: of its 24 images 24 cannot be held out')
    fails(lambda: hold_out(str(tmp_path / 'x'), str(tmp_path / 'x'), 25, 0, **READING), 'smaller --val-images')


def test_images_come_in_the_order_that_is_asked_for(tmp_path):
    paths = smooth_images(tmp_path / 'x')
    images, _ = hold_out(str(tmp_path / 'x'), str(tmp_path / 'x'), 1, 0, **READING)
    order = np.random.default_rng(0).permutation(24)
    batches = list(images.batches(order))
    assert [len(pixels) for pixels in batches] == [5, 5, 5, 5, 4] and batches[0].dtype == torch.uint8
    expected = [decode_image(images.source.read(i), 8) for i in order]
    assert torch.equal(torch.cat(batches), torch.stack(expected))
    for path in paths[:2]:
        path.write_bytes(b'')
    fails(lambda: list(images.batches(np.arange(3))), 'is no readable image')
    skipping, _ = hold_out(str(tmp_path / 'x'), str(tmp_path / 'x'), 1, 0, skip_bad=True, **READING)
    bad = [skipping.source.names.index(path.relative_to(tmp_path / 'x').as_posix()) for path in paths[:2]]
    assert len(next(skipping.batches(np.array([*bad, 5])))) == 1
    assert not list(skipping.batches(np.array(bad)))


def test_a_batch_that_cannot_be_read_is_left_out_or_filled(tmp_path, capsys):
    paths = smooth_images(tmp_path / 'x')
    for path in (*paths[2:5], paths[-1]):
        path.write_bytes(b'no image')
    images = Images(open_source(tmp_path / 'x'), np.arange(24), 8, 2, CPU, skip_bad=True)
    numbers = np.array([0, 1, 2, 3, 5, 4, 23])
    whole = [images.source.read(i) for i in range(24)]

    def expected(*indices):
        return torch.stack([decode_image(whole[i], 8) for i in indices])
    for fill, wanted in ((False, [(0, 1), (5,)]), (True, [(0, 1), (5,), (5,), (0,)])):
        batches = list(images.batches(numbers, fill))
        assert len(batches) == len(wanted)
        assert all(torch.equal(batch, expected(*indices)) for batch, indices in zip(batches, wanted))
    notes = capsys.readouterr().out.splitlines()
    assert [note.partition('none of the ')[2] for note in notes] == [
        '2 images of a batch can be read; ant/5.png takes their place',
        '1 images of a batch can be read; ant/0.png takes their place']
    some = replace(images, numbers=np.array([3, 4, 7, 23]))  # others are not looked for
    assert torch.equal(next(some.batches(np.array([23]), True)), expected(7))
    none = replace(images, numbers=np.array([3, 23]))
    fails(lambda: list(none.batches(none.numbers, True)), 'x: none of its 2 images can be read')
    strict = replace(images, skip_bad=False)
    fails(lambda: list(strict.batches(numbers, True)), 'ant/2.png is no readable image.*add --skip-bad-images')


def test_held_out_images_that_cannot_be_read_are_found_before_the_training(tmp_path):
    smooth_images(tmp_path / 'x')
    for path in smooth_images(tmp_path / 'val'):
        path.write_bytes(b'')
    fails(lambda: hold_out(str(tmp_path / 'x'), str(tmp_path / 'val'), 3, 0, skip_bad=True, **READING),
          'val: none of its 3 images can be read')
