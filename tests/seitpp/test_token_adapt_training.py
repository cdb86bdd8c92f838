"""Pairs of codes, what TokenAdapt is compared with, and how many codes are right."""
import numpy as np
import pytest
import torch
from torch import nn

from helpers import fails
from image_tokenizer.tokenizers import PatchTokenizer, unit_range
from token_files.codebook import look_up
from small_training import CountWaits
from image_tokenizer.vitvqgan import Size
from seitpp.token_adapt import Geometry, RandomGeometry, TokenAdapt, load_token_adapt
from seitpp.token_adapt_training import MEASURED, Change, CodePairs, evaluate_token_adapt, save_token_adapt
from token_augment import RandomResizedCrop

GRID = 6
CROP = 4
PATCH = 4


@pytest.fixture(scope='module')
def pairs():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(3 * PATCH ** 2, 6, generator=generator))
    tokenizer = PatchTokenizer(torch.full((3 * PATCH ** 2,), 0.5), basis, torch.tensor(2.))
    return CodePairs(tokenizer, torch.randn(30, 6, generator=generator), GRID, CROP)


@pytest.fixture(scope='module')
def pixels():
    return torch.randint(0, 256, (5, 3, GRID * PATCH, GRID * PATCH), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(1))


def box(top, left, side=CROP):
    """A crop of whole codes, of every image."""
    return torch.tensor([2 * top, 2 * left, 2 * side, 2 * side]).expand(5, -1)


def test_moved_codes_are_those_of_images_moved_by_whole_codes(pairs, pixels):
    """The patches of this tokenizer know nothing of each other."""
    images = unit_range(pixels)
    codes = pairs.codes_of(images)
    for shift_x, shift_y in ((0, 0), (1, 0), (-2, 3), (0, -1)):
        change = Change(Geometry(False, [(0., 2. * shift_x, 2. * shift_y, 0., 0.)], box(1, 1)))
        moved = pairs.moved(codes, change)
        assert torch.equal(moved, pairs.targets_of(images, change))
        slow = pairs.black[0, 0, 0].repeat(5, GRID, GRID)
        for y in range(GRID):
            for x in range(GRID):
                if 0 <= y - shift_y < GRID and 0 <= x - shift_x < GRID:
                    slow[:, y, x] = codes[:, y - shift_y, x - shift_x]
        assert torch.equal(moved, slow[:, 1:1 + CROP, 1:1 + CROP])


def test_moved_codes_are_flipped_and_taken_of_the_larger_part_of_a_mixture(pairs, pixels):
    codes = pairs.codes_of(unit_range(pixels))
    flipped = Change(Geometry(True, [], box(0, 2)))
    assert torch.equal(pairs.moved(codes, flipped), codes.flip(-1)[:, :CROP, 2:2 + CROP])
    still = Geometry(False, [], box(0, 0))
    assert torch.equal(pairs.moved(codes, Change(still, 0.6)), codes[:, :CROP, :CROP])
    assert torch.equal(pairs.moved(codes, Change(still, 0.4)), codes.flip(0)[:, :CROP, :CROP])


def test_moved_codes_of_a_resized_crop_are_the_nearest(pairs):
    codes = torch.arange(GRID * GRID).view(1, GRID, GRID).expand(5, -1, -1)
    moved = pairs.moved(codes, Change(Geometry(False, [], box(0, 0, 2))))  # each code becomes 2 x 2
    assert torch.equal(moved[0], codes[0, :2, :2].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_a_mixture_is_one_of_pixels(pairs, pixels):
    images = unit_range(pixels)
    targets = pairs.targets_of(images, Change(Geometry(False, [], box(1, 1)), 0.7))
    mixed = (0.7 * images + 0.3 * images.flip(0))[:, :, PATCH:PATCH * (1 + CROP), PATCH:PATCH * (1 + CROP)]
    assert torch.equal(targets, pairs.codes_of(mixed))


class Mover(nn.Module):
    """A TokenAdapt that keeps the channels of each code, in every pixel of it, and finds the nearest row."""

    def __init__(self, codebook):
        super().__init__()
        self.codebook = codebook
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, embeddings, change):
        x = change(embeddings.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return -torch.cdist(x[:, :, ::2, ::2].movedim(1, -1), self.codebook).movedim(-1, 1)


def test_codes_that_only_move_are_as_right_as_they_are_said_to_be(pairs, pixels):
    crop = RandomResizedCrop(pairs.codebook, 2 * GRID, 2 * CROP, 0.2, torch.device('cpu'))
    geometry = RandomGeometry(crop.draw, 2 * CROP)
    model = Mover(pairs.codebook)
    stats = evaluate_token_adapt(model, pairs, [pixels, pixels[:3]], geometry, 'off')
    assert stats.keys() == {'loss', *(f'{kind}_{name}' for kind in ('codes', 'moved') for name in MEASURED)}
    assert stats['codes_none'] == stats['moved_none'] == 100
    assert stats['codes_flip'] == stats['moved_flip'] < 50
    assert all(0 <= stats[f'codes_{name}'] <= 100 for name in MEASURED)
    np.random.seed(5)
    assert stats == evaluate_token_adapt(model, pairs, [pixels, pixels[:3]], geometry, 'off')
    fails(lambda: evaluate_token_adapt(model, pairs, [], geometry, 'off'), 'no image is left')


def test_the_loss_reaches_every_weight_also_under_autocast(pairs, pixels):
    torch.manual_seed(0)
    model = TokenAdapt(30, 6, GRID, CROP, Size(64, 2, 1, 64))
    change = Change(Geometry(True, [(10., 0., 0., 0., 0.)], box(0, 0)), 0.9)
    with torch.autocast('cpu', torch.bfloat16):
        loss = pairs.loss(model, pixels, change)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    with torch.autocast('cpu', torch.bfloat16):
        pairs.loss(model, pixels, change).backward()
    for parameter, grad in zip(model.parameters(), plain):
        torch.testing.assert_close(parameter.grad, grad)


def test_compiled_networks_are_not_compiled_for_every_change(pairs, pixels):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    model = TokenAdapt(30, 6, GRID, CROP, Size(64, 1, 1, 64))
    compiled = torch.compile(model, backend=backend)
    counts = []
    for number in range(6):
        maps = [(float(number), 0., 0., 0., 0.)] * (number % 3)
        change = Change(Geometry(number % 2 == 1, maps, box(0, 0)), 1 - number / 10)
        torch.testing.assert_close(pairs.loss(compiled, pixels, change), pairs.loss(model, pixels, change))
        counts.append(len(graphs))
    assert counts[0] > 0 and counts[-1] == counts[2]


def test_the_host_waits_for_nothing(pairs, pixels):
    model = TokenAdapt(30, 6, GRID, CROP, Size(64, 1, 1, 64))
    counter = CountWaits()
    with counter:
        pairs.loss(model, pixels, Change(Geometry(True, [(10., 0., 0., 0., 0.)], box(0, 0)), 0.9)).backward()
    assert counter.count == 0


def test_the_file_is_the_one_that_programs_read(pairs, tmp_path):
    model = TokenAdapt(30, 6, GRID, CROP, Size(64, 1, 1, 64))
    save_token_adapt(model, tmp_path / 'a.ckpt')
    save_token_adapt(model, tmp_path / 'b.ckpt')
    assert (tmp_path / 'a.ckpt').read_bytes() == (tmp_path / 'b.ckpt').read_bytes()
    loaded = load_token_adapt(tmp_path / 'a.ckpt', pairs.codebook)
    x = look_up(torch.zeros(1, GRID, GRID, dtype=torch.int64), pairs.codebook)
    assert torch.equal(loaded(x), model(x))
