"""Token grids and labels, a whole batch at a time.

The stream is decoded once a node into a memory-mapped uint16 array that all ranks share; a batch is then one
`codes[indices]`. ImageNet-1k is 1.28 M x 1024 codes: 2.6 GB on disk, and in memory only what the page cache keeps.
Wherever a token or label file is asked for, a glob or a comma-separated list of shards will do. A set of others may
hold several views of an image (token_files/views.py): its rows are more than its images, and labels are of images.

A program calls `open_splits`, which reads and checks the sets, then `choose_data_device`, which copies the codes to the
GPU where they fit, and then `TokenDataset.batches` in each epoch.
"""
import copy
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fileio.files import expand_files
from fileio.labels import check_class_names
from fileio.torch_files import digest_of
from token_augment import check_crop
from token_files.cache import digest_of_codes, labels_inside, open_codes
from token_files.made_with import check_made_with, digest_of_entry, is_rotated, tokenizer_of
from token_files.prefetching import prefetch
from token_files.token_file import TokenFile, bytes_on_disk, labels_of, open_token_files
from token_files.views import Images, check_classes, group_images, held_out
from utils import CPU, InputError, print0

SPLIT_NAMES = {'train': 'training', 'val': 'validation'}


class TokenDataset:
    """Token grids and their classes, fetched whole batches at a time.

    Args:
        token_file: a path, a glob or a comma-separated list of shards.
        label_file: the same, one for each token file; '' for labels inside the token files, as sets of others may have
            them; None for a set whose labels do not matter.
        codebook_size: rows of the codebook; a code beyond it is an InputError.
        cache: see `open_codes`.
        device: decodes the files where there is no cache yet.
        views: how rows are views of images, see `group_images`.

    Attributes:
        files: the TokenFiles.
        codes: (rows, n) uint16, mapped.
        images: which rows are of which image; None where each row is an image.
        labels: (N,) int64 of the images, zeros without labels.
        labels_from: the file that holds them, for messages.
        grid_size: side of the token grid, n = grid_size².
        classes: class names in the order of the labels, where the manifests have them, else None.
    """

    def __init__(self, token_file: str, label_file: str | None, codebook_size: int, cache: str = '',
                 device: torch.device = CPU, views: tuple[int, int] | None = None):
        self.files = open_token_files(token_file)
        self.images = group_images(self.files, views)
        labels = self._labels_beside(token_file, label_file) if label_file else None  # before a long decoding
        self.classes = _classes_of(self.files)
        self.cache = cache
        self.codes = open_codes(self.files, cache, device if device.type == 'cuda' else CPU)
        self.grid_size = math.isqrt(self.codes.shape[1])
        self.resident = None
        if label_file == '':
            labels = labels_inside(self.files, cache)
        elif labels is None:
            labels = self._labels_that_do_not_matter()
        self.labels_from = label_file or token_file
        if len(self.codes) != len(labels):
            raise InputError(f'{token_file}: its cache holds {len(self.codes)} images, its index {len(labels)}; '
                             'delete the cache, and it is made again')
        if self.images:
            check_classes(self.images, labels, self.labels_from)
        self.labels = labels[self.images.first] if self.images else labels
        self._check_largest_code(codebook_size)

    def _labels_beside(self, token_file: str, label_file: str) -> np.ndarray:
        """The labels (rows,) int64 in files of their own. Raises InputError."""
        label_files = expand_files(label_file)
        if len(self.files) != len(label_files):
            raise InputError(f'{token_file}: {len(self.files)} token files, but {label_file} is {len(label_files)} '
                             'label files: give one for each, in the same order')
        return np.concatenate([labels_of(file, path) for file, path in zip(self.files, label_files)])

    def _labels_that_do_not_matter(self) -> np.ndarray:
        """Zeros (rows,) int64, or the labels inside the files, by which wrongly grouped views are noticed."""
        if self.images and all(file.is_foreign and file.content.read_labels for file in self.files):
            return labels_inside(self.files, self.cache)
        return np.zeros(sum(map(len, self.files)), np.int64)

    def _check_largest_code(self, codebook_size: int) -> None:
        """InputError for a code beyond the codebook, which on a GPU would end in an assertion without a name.

        Reading all codes once, in order, also brings the map into the page cache, from which batches are then gathered.
        """
        start = 0
        for file in self.files:
            largest = int(self.codes[start:start + len(file)].max())
            if largest >= codebook_size:
                raise InputError(f'{file.stream}: holds code {largest}, but the codebook has {codebook_size} rows; '
                                 'give the codebook the tokens were made with')
            start += len(file)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def views(self) -> int:
        """Rows of each image."""
        return self.images.views if self.images else 1

    def split(self, share: float) -> tuple['TokenDataset', 'TokenDataset']:
        """The images that are trained on, and a share of them that is held out, see `held_out`; the codes are shared.

        Raises InputError.
        """
        everywhere = np.arange(len(self))
        images = self.images or Images(everywhere, np.zeros_like(everywhere), 1)
        parts = []
        for numbers in held_out(len(self), share, self.files[0].name):
            part = copy.copy(self)
            part.images = images.only(numbers)
            part.labels = self.labels[numbers]
            parts.append(part)
        return tuple(parts)

    def bytes_on_disk(self) -> int:
        """Size in bytes of the token files and what belongs to them."""
        return bytes_on_disk(self.files)

    def rows(self, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """The rows (B,) of `codes` that are images `indices` (B,).

        Args:
            views: (N,) of all images, as samplers.draw_views gives them: which view is read; None for the first.
        """
        indices = np.asarray(indices)
        if not self.images:
            return indices
        return self.images.rows(indices, 0 if views is None else views[indices])

    def batch(self, indices: np.ndarray, views: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """codes (B, grid_size, grid_size) uint16 and labels (B,) int64, CPU tensors, of images `indices` (B,)."""
        indices = np.asarray(indices)
        codes = torch.from_numpy(self.codes[self.rows(indices, views)]).view(-1, self.grid_size, self.grid_size)
        return codes, torch.from_numpy(self.labels[indices])

    def keep_on(self, device: torch.device, codes: torch.Tensor | None = None) -> None:
        """Hold a copy of all codes and labels on `device`: a batch is then one gather there.

        `codes` are those of a set that shares them, which hold them there already.
        """
        if codes is None:
            # many operations lack uint16
            codes = torch.from_numpy(np.array(self.codes)).view(torch.int16).to(device)
        self.resident = codes, torch.from_numpy(self.labels).to(device)

    def batches(self, indices: np.ndarray, batch_size: int, device: torch.device, pin_memory: bool = False,
                views: np.ndarray | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield codes (B, grid_size, grid_size) and labels (B,) int64 on `device`, batch after batch.

        Codes are uint16 on the CPU and on CUDA, and int32 elsewhere. They come from what `keep_on` left there; else
        from the map, for a GPU one batch ahead and, with `pin_memory`, through page-locked memory, so that the copy
        overlaps with computing. Only codes and labels travel. For `views` see `rows`.
        """
        slices = [indices[start:start + batch_size] for start in range(0, len(indices), batch_size)]
        if not slices:  # which torch would split into one empty batch
            return
        if self.resident:
            yield from self._resident_batches(indices, batch_size, views)
        elif device.type == 'cpu':
            yield from (self.batch(part, views) for part in slices)
        else:
            yield from self._moved_batches(slices, device, pin_memory, views)

    def _resident_batches(self, indices: np.ndarray, batch_size: int,
                          views: np.ndarray | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        codes, labels = self.resident
        # the indices of the whole epoch travel once, so that no batch waits for the host
        images = torch.from_numpy(np.asarray(indices)).to(codes.device)
        rows = torch.from_numpy(self.rows(indices, views)).to(codes.device) if self.images else images
        for part, image in zip(rows.split(batch_size), images.split(batch_size)):
            yield codes[part].view(torch.uint16).view(-1, self.grid_size, self.grid_size), labels[image]

    def _moved_batches(self, slices: list[np.ndarray], device: torch.device, pin_memory: bool,
                       views: np.ndarray | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        def load(part: np.ndarray) -> list[torch.Tensor]:
            codes, labels = self.batch(part, views)
            if device.type not in ('cpu', 'cuda'):  # some accelerators have no uint16
                return [codes.int(), labels]
            return [tensor.pin_memory() if pin_memory else tensor for tensor in (codes, labels)]

        for ready in prefetch(load, slices):
            yield tuple(tensor.to(device, non_blocking=pin_memory and device.type == 'cuda') for tensor in ready)


def _classes_of(files: Sequence[TokenFile]) -> list[str] | None:
    """The class names that shards agree on, or None where none has any. Raises InputError where they differ."""
    named = [file for file in files if file.classes]
    for file in named:
        check_class_names(named[0].classes, file.classes, named[0].stream, file.stream)
    return named[0].classes if named else None


def choose_data_device(datasets: dict[str, TokenDataset], data_device: str, device: torch.device) -> None:
    """--data-device: keep the tokens on the GPU, or leave them in the map. Prints which, and the sizes that decide."""
    if data_device == 'cuda' and device.type != 'cuda':
        raise InputError(f'--data-device cuda needs --device cuda, not {device}')
    if device.type != 'cuda' or data_device == 'cpu':
        return
    needed = sum({id(data.codes): data.codes.nbytes for data in datasets.values()}.values())  # held-out images share
    free = torch.cuda.mem_get_info(device)[0]
    resident = data_device == 'cuda' or needed <= free / 4  # the model, its gradients and activations need the rest
    print0(f'data: {needed / 1e9:.2f} GB of tokens, {free / 1e9:.1f} GB free on the GPU: '
           + ('they live there' if resident else 'they stay in the memory map'))
    if resident:
        there = {}
        for data in datasets.values():
            data.keep_on(device, there.get(id(data.codes)))
            there[id(data.codes)] = data.resident[0]


def open_splits(files: dict[str, tuple[str, str]], codebook: torch.Tensor, codebook_path: str, cache: str, size: int,
                device: torch.device, views: tuple[int, int] | None = None,
                val_share: float = 0.) -> dict[str, TokenDataset]:
    """Data sets whose class names and tokenizers agree. Prints what they are.

    Args:
        files: token file and label file, by 'train' and 'val'; with `val_share` those of training for both.
        codebook: (K, d), which must be the one that the tokens were made with.
        codebook_path: its file.
        cache, device: see TokenDataset.
        views: of the training set, see TokenDataset; a validation set has the views that its files state.
        size: codes on a side that the model reads.
        val_share: the share of the training images that is held out as 'val'; 0 where that is a set of its own.

    Raises:
        InputError: for a set that cannot be read, or whose grids are too small.
    """
    if val_share:
        whole = TokenDataset(*next(iter(files.values())), len(codebook), cache, device, views)
        parts = dict(zip(SPLIT_NAMES, whole.split(val_share)))
        print0(f'{whole.files[0].name}: {len(parts["val"]):,} of its {len(whole):,} images are held out')
    datasets = {}
    for split, (token_file, label_file) in files.items():
        data = datasets[split] = parts[split] if val_share else TokenDataset(token_file, label_file, len(codebook),
                                                                             cache, device,
                                                                             views if split == 'train' else None)
        check_crop(size, data.grid_size, token_file)
        size_on_disk = data.bytes_on_disk()
        print0(f'{split}: {describe(data)}, {size_on_disk / 1e6:,.2f} MB on disk '
               f'({size_on_disk / (len(whole) if val_share else len(data)):,.0f} bytes an image), {size}x{size} codes '
               'are read')
    check_made_with([file for data in datasets.values() for file in data.files], codebook, codebook_path)
    if len(datasets) == 2 and not val_share:
        check_class_names(*(data.classes for data in datasets.values()), *(file for file, _ in files.values()))
        note_shared_files(datasets['train'], datasets['val'])
    return datasets


def describe(data: TokenDataset) -> str:
    """How many images a set has, of how many codes and views, for the line that a program prints of it."""
    views = f' in {data.views} views' if data.views > 1 else ''
    return f'{len(data):,} images of {data.grid_size}x{data.grid_size} codes{views}'


def labels_by_file(datasets: dict[str, TokenDataset]) -> dict[str, np.ndarray]:
    """The labels of data sets by the file that holds them, for messages; held-out images count with the others."""
    found = {}
    for data in datasets.values():
        found.setdefault(data.labels_from, []).append(data.labels)
    return {path: np.concatenate(labels) for path, labels in found.items()}


def note_shared_files(train: TokenDataset, val: TokenDataset) -> None:
    """Say where token files of one set are files of another: the same ones, or equal ones by their manifests."""
    of_training = {identity: file for file in train.files for identity in _identities(file)}
    for file in val.files:
        same = next((of_training[identity] for identity in _identities(file) if identity in of_training), None)
        if same:
            print0(f'note: {file.stream}: its images are those of {same.stream}, which is trained on: results on them '
                   'say nothing of other images')


def _identities(file: TokenFile) -> list[tuple]:
    """What equal streams have in common: device and inode, and the checksum that a manifest states."""
    stat = os.stat(file.stream)
    recorded = file.manifest.get('files', {}).get(file.stream.name)
    checksum = recorded.get('sha256') if isinstance(recorded, dict) else None
    part = file.content.part if file.is_foreign else ''  # a file of others may hold two sets
    return [(stat.st_dev, stat.st_ino, part)] + ([(str(checksum),)] if checksum else [])


def facts_of(datasets: dict[str, TokenDataset], codebook: torch.Tensor) -> dict[str, Any]:
    """What ranks, and a resumed run, must have the same: SHA-256 of codes, labels and codebook, by name. Collective.

    With the tokenizer, the size of its images and whether they were turned, where a manifest states them.

    Args:
        datasets: by 'train' and 'val'.
        codebook: (K, d) float32.
    """
    facts = {f'{SPLIT_NAMES[split]} images': len(data) for split, data in datasets.items()}  # first: easy to understand
    facts['codebook'] = digest_of(codebook)
    for split, data in datasets.items():
        name = SPLIT_NAMES[split]
        facts |= {f'{name} tokens': digest_of_codes(data.files, data.codes, data.cache),
                  f'{name} labels': digest_of(data.labels)}
    files = [file for data in datasets.values() for file in data.files]
    tokenizer = tokenizer_of(files)
    if tokenizer:
        facts['tokenizer'] = digest_of_entry(tokenizer)
    sizes = [file.manifest['image_size'] for file in files if type(file.manifest.get('image_size')) is int]
    if sizes:  # of a set whose manifest says how it was made
        facts |= {'size of tokenized images': sizes[0], 'EXIF rotation': any(map(is_rotated, files))}
    return facts
