"""The replay memory: bytes at every step, policies, files; and the forms in which images are stored."""
import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from continual import forms, memory
from continual.forms import (PixelStore, StoredImages, TaskImages, codes_of, decode_to_files, image_file, length_of,
                             store_codes, store_from, store_image)
from continual.memory import POLICIES, ReplayMemory, Sample, check_room, fill, fill_reservoir, load_memory, save_memory
from helpers import fails, noise
from image_data.dataset import ImageDataset, eval_transform
from image_data.decoding import decode_rgb, pixels_of
from image_tokenizer.tokenizers import PatchTokenizer
from token_files.published import CODECS


class Watched(ReplayMemory):
    """A memory that checks its bytes whenever a sample comes or goes."""

    def check(self):
        assert sum(len(sample.data) + 6 for sample in self.samples) == self.size <= self.limit
        return self

    def add(self, sample):
        super().add(sample)
        self.check()

    def remove(self, position):
        super().remove(position)
        self.check()


def sized(labels, sizes):
    """Encode: image i becomes a sample of so many bytes."""
    return lambda i: Sample(int(labels[i]), int(sizes[i]), bytes([i % 256]) * int(sizes[i]))


# ---------------------------------------------------------------- policies

@pytest.mark.parametrize('policy', POLICIES)
def test_never_above_its_bytes_and_balanced_to_within_one(policy):
    rng = np.random.default_rng(0)
    for run in range(60):
        classes = int(rng.integers(1, 4))
        tasks = int(rng.integers(1, 5))
        labels = rng.integers(0, classes * tasks, int(rng.integers(1, 200)))
        sizes = rng.integers(1, rng.integers(2, 400), len(labels))
        memory = Watched(int(rng.integers(1, 8000)))
        small = sizes + 6 <= memory.limit // (labels.max() + 1)
        passed = 0
        for task in range(tasks):
            images = np.flatnonzero(labels // classes == task)
            passed += fill(memory, policy, images, labels, sized(labels, sizes), (run, task))
            memory.check()
            assert set(memory.labels().tolist()) <= set(range(classes * (task + 1)))
            if policy == 'balanced':
                seen = np.unique(labels[labels < classes * (task + 1)])
                held = np.bincount(memory.labels(), minlength=classes * tasks)[seen]
                there = np.bincount(labels[small], minlength=classes * tasks)[seen]
                assert all(count == all_of or count >= max(1, held.max() - 1) for count, all_of in zip(held, there))
        assert passed <= (~small).sum()


def test_balanced_holds_the_first_that_fit():
    """Of samples ranked by their position within their class, then by class: found another way, all of them at once."""
    rng = np.random.default_rng(1)
    for run in range(60):
        labels = rng.integers(0, 6, 150)
        sizes = rng.integers(1, 90, len(labels))
        memory = Watched(int(rng.integers(1, 2500)))
        share = memory.limit // 6
        most, held = 1000, {}
        for task in range(3):
            images = np.flatnonzero(labels // 2 == task)
            order = np.random.default_rng((run, task)).permutation(images)
            for label in (2 * task, 2 * task + 1):
                held[label] = [i for i in order[labels[order] == label] if sizes[i] + 6 <= share]
            fill(memory, 'balanced', images, labels, sized(labels, sizes), (run, task))
            ranked = sorted((position, label, i) for label in held for position, i in enumerate(held[label][:most]))
            fit = int((np.cumsum([sizes[i] + 6 for *_, i in ranked]) <= memory.limit).sum())
            if fit < len(ranked):
                most = ranked[fit][0] + 1
            held = {label: [i for _, owner, i in ranked[:fit] if owner == label] for label in held}
            expected = sorted((label, int(sizes[i]), i % 256) for label in held for i in held[label])
            assert sorted((sample.label, sample.index, sample.data[0]) for sample in memory.samples) == expected
            assert min(memory.most, 1000) == most


@pytest.mark.parametrize('policy', POLICIES)
def test_one_large_image_costs_no_class_its_place(policy):
    labels = np.repeat(np.arange(10), 20)
    for run in range(20):
        sizes = np.full(200, 100)
        sizes[run] = 2000  # of the first class
        memory = Watched(10 * 400)
        passed = [fill(memory, policy, np.flatnonzero(labels // 2 == task), labels, sized(labels, sizes), (run, task))
                  for task in range(5)]
        assert len(memory) == 4000 // 106 and sum(passed) <= 1
        if policy == 'balanced':
            assert set(np.bincount(memory.labels())) == {3, 4}


def test_balanced_takes_as_much_as_fits():
    """Of equal samples; and old ones are dropped, never taken again."""
    labels = np.repeat(np.arange(6), 50)
    encode = sized(labels, np.full(300, 94))
    memory = Watched(2500)  # 25 samples
    before = None
    for task, held in enumerate(([12, 13], [6, 7], [4, 5])):
        fill(memory, 'balanced', np.flatnonzero(labels // 2 == task), labels, encode, (0, task))
        counts = np.bincount(memory.labels())
        assert len(memory) == 25 and [counts.min(), counts.max()] == held
        if before:
            assert {sample for sample in memory.samples if sample.label < 2 * task} <= before
        before = set(memory.samples)


def test_the_reservoir_is_a_uniform_sample():
    """Whenever it came, an image is held with the same chance; and a large one as likely as a small one."""
    times = 2000
    held = np.zeros(60)
    sizes = np.where(np.arange(60) % 2, 40, 4)
    for run in range(times):
        memory = ReplayMemory(400)
        rng = np.random.default_rng(run)
        for part in np.split(np.arange(60), 3):  # tasks: the state between them is the file's
            fill_reservoir(memory, part.tolist(), lambda i: Sample(i, int(sizes[i]), bytes(int(sizes[i]))), 400, rng)
        held[memory.labels()] += 1
    share = held / times
    deviation = np.sqrt(share.mean() * (1 - share.mean()) / times)
    assert 0.15 < share.mean() < 0.35
    assert abs(share - share.mean()).max() < 4.5 * deviation
    assert abs(share[::2].mean() - share[1::2].mean()) < 6 * deviation / np.sqrt(30) + 0.01
    assert abs(share[:20].mean() - share[40:].mean()) < 6 * deviation / np.sqrt(20)


def test_the_reservoir_encodes_few():
    encoded = []

    def encode(i):
        encoded.append(i)
        return Sample(0, 4, bytes(4))
    fill_reservoir(ReplayMemory(100), range(5000), encode, 100, np.random.default_rng(0))
    assert 10 < len(encoded) < 200


def test_too_small_a_memory_is_one_line():
    labels = np.array([0, 1, 2, 2])
    encode = sized(labels, np.array([10, 10, 40, 11]))
    check_room(51, labels, encode, 'jpeg')  # a class has one that is small enough
    fails(lambda: check_room(50, labels, encode, 'jpeg'),
          r'--memory-bytes 50: less than an image of each of the 3 classes takes as jpeg \(a class has none below 17 '
          r'bytes\): give 51 or more')
    with pytest.raises(ValueError):
        ReplayMemory(15).add(encode(0))


# ---------------------------------------------------------------- files

def test_a_memory_is_read_as_it_was_written(tmp_path):
    labels = np.arange(50) % 5
    memory = ReplayMemory(900)
    fill(memory, 'reservoir', np.arange(50), labels, sized(labels, np.arange(50) + 1), (0, 0))
    save_memory(memory, tmp_path / 'memory.npz')
    again = load_memory(tmp_path / 'memory.npz', int)
    assert again.samples == memory.samples and again.largest_key == memory.largest_key < 1
    assert again.most == memory.most
    assert (again.limit, again.size) == (900, memory.size)
    # what is counted is what lies on the disk, but for the headers
    assert 0 < (tmp_path / 'memory.npz').stat().st_size - memory.size < 2000
    empty = ReplayMemory(5)
    save_memory(empty, tmp_path / 'empty.npz')
    assert len(load_memory(tmp_path / 'empty.npz', int)) == 0


def test_a_damaged_memory_is_one_line(tmp_path):
    path = tmp_path / 'memory.npz'
    memory = ReplayMemory(90)
    memory.add(Sample(1, 20, bytes(20)))
    save_memory(memory, path)
    data = path.read_bytes()
    fails(lambda: load_memory(path, lambda index: index + 1), 'memory.npz: no replay memory, or damaged .its lengths')
    for damaged in (data[:-30], data[:100], b'', b'no zip'):
        path.write_bytes(damaged)
        fails(lambda: load_memory(path, int), 'memory.npz: no replay memory, or damaged')
    np.savez(path, labels=np.array([1]))
    fails(lambda: load_memory(path, int), 'no replay memory')
    np.savez(path, labels=np.array([{}], dtype=object))
    fails(lambda: load_memory(path, int), 'no replay memory')


# ---------------------------------------------------------------- forms

def test_pixels_are_kept_exactly_and_cost_three_bytes_each():
    image = noise(1, (20, 24))
    sample = store_image(7, image, 'pixels', None, None)
    assert sample.label == 7 and len(sample.data) == 3 * 20 * 24 == length_of('pixels')(sample.index)
    assert sample.size == 3 * 20 * 24 + 6
    assert torch.equal(pixels_of(decode_rgb(image_file(sample, 'pixels'))), pixels_of(image))


def test_fewer_pixels_keep_the_shape_and_never_grow():
    sample = store_image(0, noise(1, (20, 40)), 'resize', None, 10)
    assert decode_rgb(image_file(sample, 'resize')).size == (20, 10) and len(sample.data) == 600
    whole = store_image(0, noise(1, (20, 40)), 'resize', None, 30)
    assert whole == store_image(0, noise(1, (20, 40)), 'pixels', None, None)


def test_a_jpeg_counts_with_its_headers():
    sample = store_image(0, noise(1), 'jpeg', 30, None)
    assert sample.index == len(sample.data) == length_of('jpeg')(sample.index)
    with Image.open(io.BytesIO(image_file(sample, 'jpeg'))) as image:
        assert image.format == 'JPEG' and image.size == (24, 20)
    assert len(store_image(0, noise(1), 'jpeg', 90, None).data) > len(sample.data)


@pytest.mark.parametrize(('codec', 'largest'), [('escaped-bytes', 509), ('uint16-le', 65535)])
def test_codes_are_those_of_the_format(codec, largest):
    codec = CODECS[codec]
    codes = np.random.default_rng(0).integers(0, largest + 1, (9, 16)).astype(np.uint16)
    samples = [store_codes(3, row, codec) for row in codes]
    assert np.array_equal(codes_of(samples, codec, 16), codes)
    stream, _ = codec.encode(codes)
    assert b''.join(sample.data for sample in samples) == stream.tobytes()
    assert codes_of([], codec, 16).shape == (0, 16)


def test_codes_become_images_by_the_decoder():
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    tokenizer = PatchTokenizer(torch.full((12,), 0.5), torch.eye(12)[:, :3], torch.tensor(4.), rows)
    codes = np.array([[0, 1, 2, 3], [4, 4, 4, 4]], np.uint16)
    images = [decode_rgb(file) for file in decode_to_files(codes, tokenizer, rows, 'tok.pt')]
    expected = tokenizer.decode(rows[torch.from_numpy(codes.astype(np.int64))]).clamp(0, 1)
    assert [image.size for image in images] == [(4, 4)] * 2
    for image, pixels in zip(images, expected):
        assert (pixels_of(image) / 255 - pixels).abs().max() <= 0.5 / 255 + 1e-6

    class Encoder(torch.nn.Module):
        """Without a decoder."""
    fails(lambda: decode_to_files(codes, Encoder(), rows, 'tok.pt'), 'tok.pt: has no decoder')


def test_a_task_reads_its_images_and_then_the_memory():
    class Source:
        data_path, classes, names = 'x', None, ['a', 'b', 'c']
        exif_rotate, oriented = False, None

        def read(self, i):
            if i == 1:
                raise OSError('gone')
            return b'abc'[i:i + 1]
    images = TaskImages(Source(), np.array([2, 0]), np.array([5, 6]), [b'm', b'n'], [1, 2])
    assert [images.read(i) for i in range(len(images))] == [b'c', b'a', b'm', b'n']
    assert images.labels.tolist() == [5, 6, 1, 2] and images.names[2:] == ['memory/0', 'memory/1']
    fails(lambda: store_from(Source(), 1, None), 'x: b cannot be read or stored .gone')
    fails(lambda: store_from(Source(), 0, None), 'x: a cannot be read or stored')


@pytest.mark.parametrize('form, longest', [('pixels', 65535), ('resize', 65535), ('jpeg', 65500)])
@pytest.mark.parametrize('size', [(70000, 1), (1, 70000), (131072, 4)])
def test_a_side_that_no_form_holds_is_brought_down_to_one_that_it_does(form, longest, size):
    image = decode_rgb(b'P6 %d %d 255\n' % size + bytes(3 * size[0] * size[1]))
    restored = decode_rgb(image_file(store_image(0, image, form, 50, 8), form))
    assert max(restored.size) == longest and min(restored.size) == max(1, min(size) // 2)
    assert (restored.width > restored.height) == (size[0] > size[1])


def test_a_store_gives_samples_the_labels_of_now(tmp_path):
    Image.new('RGB', (8, 6)).save(tmp_path / 'a.png')
    (tmp_path / 'list.txt').write_text('a.png 3\n')
    data = ImageDataset(str(tmp_path / 'list.txt'), 8, eval_transform(8, 1))
    store = PixelStore({'train': data}, 'pixels', None, None)
    data.labels = np.array([1])
    sample = store.store('train', 0)
    assert sample.label == 1 and decode_rgb(store.restore([sample])[0]).size == (8, 6)


def test_stored_images_come_in_parts_and_in_order(tmp_path, monkeypatch):
    for label, number in itertools.product(range(2), range(4)):
        (tmp_path / f'{label}').mkdir(exist_ok=True)
        Image.new('RGB', (8, 8), (30 * number, 100 * label, 0)).save(tmp_path / f'{label}' / f'{number}.png')
    data = ImageDataset(str(tmp_path), 8, eval_transform(8, 1))
    asked = []

    class Store(PixelStore):
        def restore(self, samples):
            asked.append(len(samples))
            return super().restore(samples)
    store = Store({'val': data}, 'pixels', None, None)
    monkeypatch.setattr(forms, 'RESTORED', 3)
    indices = np.array([7, 1, 2, 5, 0])
    cpu = torch.device('cpu')
    stored, whole = (tuple(map(torch.cat, zip(*images.batches(indices, 2, cpu, False))))
                     for images in (StoredImages(data, 'val', store), data))
    assert asked == [3, 2]
    for one, other in zip(stored, whole):
        assert torch.equal(one, other)


def test_labels_fit_their_bytes():
    assert np.iinfo(np.uint16).max == memory.MAX_CLASSES - 1
