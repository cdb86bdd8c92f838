"""Tokens for class-incremental training: a tokenizer that has seen only the first task, and token files made with it.

A tokenizer fitted on all classes knows what the later tasks' images look like: a leak, small or not. So it is fitted on
the first task alone, or it is one that the user gives, and every result says which.

In order: `hold_tokens` keeps other runs out of the folder, `fit_tokenizer` makes a tokenizer, `tokenize_splits` makes
the token files. `open_token_store` is for a memory of tokens beside training on pixels.
"""
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from continual.forms import TokenStore
from fileio.files import check_same, hold_folder, sha256
from fileio.hub import local_path
from fileio.labels import check_class_names
from image_data.dataset import ImageDataset
from image_data.sources import Source
from image_tokenizer.patch_fit import FitOptions, fit_to_folder
from image_tokenizer.tokenizers import check_codebook, load_tokenizer
from image_tokenizer.tokenizing import EncodingOptions, tokenize
from token_dataset import TokenDataset
from token_files.codebook import SYNONYMS, build_synonyms, load_codebook
from token_files.made_with import check_made_with
from token_files.parts import OutputFiles
from utils import InputError, on_main

PATIENCE = 60  # seconds to wait for another run, which mostly only looks whether all tokens are there
FITTED = 'fitted.json'  # in the folder of tokens: the images that the tokenizer was fitted on


@contextlib.contextmanager
def hold_tokens(folder: Path) -> Iterator[None]:
    """Hold a folder of tokens for this process: another waits, a minute at most. Collective. Raises InputError."""
    with contextlib.ExitStack() as held:
        def hold() -> None:
            held.enter_context(hold_folder(folder, 'choose another --tokens-dir', PATIENCE))
        on_main(hold)
        yield


class TokenFiles(NamedTuple):
    """Paths, '' where there is none: of a tokenizer, its codebook, and token sets with their labels."""
    tokenizer: str = ''
    codebook: str = ''
    synonyms: str = ''
    train: str = ''
    train_labels: str = ''
    val: str = ''
    val_labels: str = ''

    def describe(self, fitted: bool) -> str:
        """Where the tokenizer comes from, as a text for results and run.json."""
        if not self.tokenizer:
            return 'given, as token files' if self.train else 'none'
        if fitted:
            return 'fitted on task 0'
        return f'given ({Path(self.tokenizer).name}, SHA-256 {sha256(self.tokenizer)[:12]})'

    def sizes(self) -> dict[str, int | None]:
        """Bytes of the tokenizer and of the codebook, None where there is no file."""
        paths = {'tokenizer_bytes': local_path(self.tokenizer), 'codebook_bytes': local_path(self.codebook)}
        # a codebook may also be a formula, or lie on the web
        return {name: os.path.getsize(path) if os.path.isfile(path) else None for name, path in paths.items()}


def fit_tokenizer(first: Source, folder: Path, image_size: int) -> TokenFiles:
    """Fit a patch tokenizer to the first task's images, unless that was done. Collective. Raises InputError.

    Args:
        first: the images.
        folder: gets tokenizer.pt and codebook.ckpt.
        image_size: images are resized to this, both sides.
    """
    on_main(_fit, first, folder, image_size)
    return TokenFiles(str(folder / 'tokenizer.pt'), str(folder / 'codebook.ckpt'))


def _fit(first: Source, folder: Path, image_size: int) -> None:
    # FITTED says that a tokenizer is from here; it is written before the tokenizer, so one without it is another's
    files = folder / 'tokenizer.pt', folder / 'codebook.ckpt'
    if any(path.exists() for path in files) and not (folder / FITTED).exists():
        raise InputError(f'{folder}: holds a tokenizer that was not made here; give it as --tokenizer-path, or choose '
                         'another --tokens-dir')
    check_same(folder / FITTED, {'images of the first task': first.digest(), 'image size': image_size}, '--tokens-dir')
    if all(path.exists() for path in files):
        return
    for path in files:
        path.unlink(missing_ok=True)  # of a run killed between the two
    fit_to_folder(first, folder, FitOptions(image_size))


def tokenize_splits(files: TokenFiles, folder: Path, splits: dict[str, Source], image_size: int, device: torch.device,
                    max_pixels: int | None = None) -> TokenFiles:
    """Tokenize images into a folder, unless that was done; returns all paths. Collective. Raises InputError.

    Killed at any moment, it resumes.

    Args:
        files: tokenizer, and a codebook, or '' for the one in the tokenizer's file.
        folder: of the token files.
        splits: images by 'train' and 'val'.
        image_size: images are resized to this, both sides.
        device: of the tokenizer.
        max_pixels: larger images are an InputError; None for PIL's limit.
    """
    options = EncodingOptions(files.tokenizer, image_size, files.codebook or None)
    tokenizer = sha256(files.tokenizer)
    for name, source in splits.items():
        made_of = {f'images of {name}': source.digest(), 'tokenizer': tokenizer, 'image size': image_size}
        on_main(check_same, folder / f'{name}-images.json', made_of, '--tokens-dir')
        output = OutputFiles(folder, name, name_flag='', folder_flag='--tokens-dir')
        tokenize(source, output, options, device, max_pixels=max_pixels)
        files = files._replace(**{name: str(folder / f'{name}-token.data.bin.gz'),
                                  f'{name}_labels': str(folder / f'{name}-label.txt')})
    files = files._replace(codebook=files.codebook or str(folder / 'codebook.ckpt'),
                           synonyms=str(folder / 'synonyms.json'))
    on_main(_write_synonyms, files)
    return files


def _write_synonyms(files: TokenFiles) -> None:
    other_codes = len(load_codebook(files.codebook)) - 1
    build_synonyms(files.codebook, files.synonyms, min(SYNONYMS, other_codes))


def open_token_store(images: dict[str, ImageDataset], files: dict[str, tuple[str, str]], tokenizer_path: str,
                     codebook_path: str, device: torch.device) -> TokenStore:
    """Token sets, as a memory beside training on pixels stores their images.

    Args:
        images: sets by 'train' and 'val', with the labels of their files.
        files: token file and label file of each.
        tokenizer_path, codebook_path: decode them.
        device: of the tokenizer.

    Raises:
        InputError: for tokens of other images, or another tokenizer or codebook.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    codebook = load_codebook(codebook_path)
    check_codebook(tokenizer, codebook, codebook_path)
    codes = {}
    for split, (token_file, label_file) in files.items():
        tokens = TokenDataset(token_file, label_file, len(codebook), device=device)
        check_one_view(tokens)
        check_same_images(tokens, images[split], token_file, images[split].source.data_path)
        check_made_with(tokens.files, codebook, codebook_path, tokenizer_path)
        codes[split] = tokens.codes
        if tokens.codes.shape[1] != codes['train'].shape[1]:
            raise InputError(f'{token_file}: grids of {tokens.codes.shape[1]} codes, but {files["train"][0]} has '
                             f'{codes["train"].shape[1]}: give tokens of one tokenizer and image size')
    return TokenStore(images, codes, tokenizer.to(device), codebook.to(device), tokenizer_path)


def check_one_view(tokens: TokenDataset) -> None:
    """InputError for a set that holds several views of an image, of which a memory keeps one."""
    if tokens.views > 1:
        raise InputError(f'{tokens.files[0].name}: holds {tokens.views} views of each image: convert it by '
                         'scripts/convert_tokens.py, which keeps the first')


def check_same_images(tokens: TokenDataset, images: ImageDataset, token_file: str, path: str) -> None:
    """InputError unless a token set can be that of the images: same classes, as many images, same labels."""
    check_class_names(images.classes, tokens.classes, path, token_file)
    if not np.array_equal(tokens.labels, images.labels):
        raise InputError(f'{token_file}: its {len(tokens)} labels are not those of the {len(images)} images of {path}: '
                         'give the tokens of these images')
