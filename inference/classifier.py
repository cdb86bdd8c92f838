"""From images to class names, by a checkpoint and the files that it states: what a trained model is used through.

    classify = load_classifier('output/mine')
    names, probabilities = classify([image, other_image])  # of PIL

A `Classifier` is one nn.Module from uint8 pixels to probabilities. For a model of tokens it holds the whole way:
tokenizer, codes, codebook, ViT. Images become pixels as the programs that evaluate read them, so its predictions are
those of evaluate_on_images.py, of main_pixels.py --eval and of main_mtm_finetune.py --eval.
"""
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from fileio.files import is_address
from fileio.torch_files import digest_of
from image_data.dataset import Normalize, eval_transform
from image_data.decoding import resize_square, upright
from image_tokenizer.tokenizers import (check_codes, check_found, check_sizes, find_codes, load_tokenizer,
                                        unit_range)
from inference.models import TrainedModel, load_model, program_with
from seitpp.mtm_recipe import canonical_codes
from token_augment import center_crop, check_crop
from token_files.codebook import load_codebook, look_up
from token_files.made_with import digest_of_entry, file_of, identity_of_tokenizer
from training.checkpoints import (FINETUNE, PIXELS, PRETRAIN, SEEN, check_tokens_of, load_checkpoint,
                                  said_of_the_model, saved_flags)
from training.run_folder import FILES, CheckpointFiles
from utils import CPU, InputError, device_of, print0

FINETUNE_FILES = CheckpointFiles(('checkpoint-last.pth',), {'model': 'checkpoint-best.pth'})  # see checkpoint_files
PUBLISHED = 28, 8, 256  # the published model's codes on a side, pixels of a code on a side, and pixels of its images


class Classifier(nn.Module):
    """Pixels (B, 3, s, s) uint8 -> probabilities (B, classes) float32, computed in float32.

    Called with a PIL image, or a list of them, it gives what `predict` does.

    Args:
        trained: the model, which becomes `model`.
        classes: names of its outputs; further outputs are left out.
        tokenizer, codebook (K, d): of the model's tokens; None for a model of images.
        image_size: pixels to which both sides of an image are resized for the tokenizer.
        exif_rotate: turn images as their EXIF orientation says, as those of the training were.

    Attributes:
        size: s, pixels on a side.
        preparation: in words, how an image becomes pixels.

    Raises:
        InputError: for what does not belong together.
    """

    def __init__(self, trained: TrainedModel, classes: Sequence[str], tokenizer: nn.Module | None = None,
                 codebook: torch.Tensor | None = None, image_size: int | None = None, exif_rotate: bool = False):
        super().__init__()
        self.model = trained.model
        self.classes = list(classes)
        self.exif_rotate = exif_rotate
        turned = 'turned as its EXIF orientation says, ' if exif_rotate else ''
        self.tokenizer = tokenizer
        self.register_buffer('codebook', codebook)
        self.register_buffer('canonical', None)
        if tokenizer is None:
            self.size = trained.input_size
            self.transform = eval_transform(self.size, trained.crop_ratio)
            self.normalize = Normalize(CPU)
            side = int(self.size / trained.crop_ratio)
            self.preparation = (f'{turned}RGB, short side resized to {side} pixels (bicubic), middle {self.size} x '
                                f'{self.size} pixels')
            return
        self.size = image_size
        self.grid_size = trained.input_size
        self.preparation = f'{turned}RGB, both sides resized to {self.size} pixels (bicubic)'
        if trained.program == FINETUNE:
            # models of masked tokens have seen only the first of codebook rows of one direction
            self.canonical = canonical_codes(codebook)
        check_sizes(image_size, tokenizer.patch_size, '--tokenizer-input-size')
        check_crop(self.grid_size, image_size // tokenizer.patch_size)

    def __call__(self, images: torch.Tensor | Image.Image | Sequence[Image.Image]) -> Any:
        return super().__call__(images) if isinstance(images, torch.Tensor) else self.predict(images)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, s, s) uint8, on the module's device -> (B, classes) float32, rows of sum 1. Raises InputError."""
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, self.size, self.size):
            raise InputError(f'pixels of shape {tuple(pixels.shape)}, {pixels.dtype}: give (B, 3, {self.size}, '
                             f'{self.size}) of torch.uint8, or PIL images')
        x = self.normalize(pixels) if self.tokenizer is None else self.embed(pixels)
        return self.model(x).float()[:, :len(self.classes)].softmax(1)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels -> what a model of tokens reads: embeddings (B, d, g, g), or codes (B, g, g) int64 in SeiT++."""
        features, codes = find_codes(self.tokenizer, self.codebook, unit_range(pixels))  # (B, n)
        if not (torch.compiler.is_compiling() or codes.is_meta):  # an export cannot look at values
            check_found(features, codes)
        side = self.size // self.tokenizer.patch_size
        codes = center_crop(codes.view(-1, side, side), self.grid_size)
        return look_up(codes, self.codebook) if self.canonical is None else self.canonical[codes]

    # ---------------------------------------------------------------- images

    def read(self, image: Image.Image) -> torch.Tensor:
        """A PIL image as pixels (3, s, s) uint8: resized, and cropped, as the programs that evaluate do it."""
        image = image.convert('RGB')
        return torch.as_tensor(self.transform(image)) if self.tokenizer is None else resize_square(image, self.size)

    @torch.no_grad()
    def predict(self, images: Image.Image | Sequence[Image.Image], batch_size: int = 64
                ) -> tuple[list[str], torch.Tensor]:
        """The name of the most probable class of each image, and the probabilities (N, classes) float32 on the CPU.

        An image alone counts as a list of one. Raises InputError for what is no image.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        wrong = next((image for image in images if not isinstance(image, Image.Image)), None)
        if wrong is not None:
            raise InputError(f'a {type(wrong).__name__} is no image: give PIL images, such as PIL.Image.open reads')
        parts = [torch.empty(0, len(self.classes))]
        for start in range(0, len(images), batch_size):
            batch = images[start:start + batch_size]
            pixels = torch.stack([self.read(upright(image) if self.exif_rotate else image) for image in batch])
            parts.append(self(pixels.to(device_of(self.model))).cpu())
        probabilities = torch.cat(parts)
        return [self.classes[number] for number in probabilities.argmax(1).tolist()], probabilities


# ---------------------------------------------------------------- from a checkpoint

def load_classifier(path: str | Path, device: str | torch.device = 'cpu', *, use_ema: bool = False,
                    codebook_path: str | Path = '', tokenizer_path: str | Path = '',
                    tokenizer_code_path: str | Path | None = None, allow_torchscript: bool = False,
                    tokenizer_input_size: int | None = None,
                    model: str = '', model_kwargs: dict[str, Any] | None = None, input_size: int | None = None,
                    eval_crop_ratio: float | None = None, exif_rotate: bool | None = None,
                    stem: str | None = None) -> Classifier:
    """The classifier of a checkpoint of main_seit.py, main_pixels.py, main_mtm_finetune.py or a task's of a continual
    run, or of a published one. Options have the names of the flags of scripts/predict.py.

    Args:
        path: of the checkpoint, or of the folder of its run: its best checkpoint is taken, else its newest.
        device: of the module.
        use_ema: take the averaged weights; of a folder, those of their best epoch.
        codebook_path, tokenizer_path: default: the files that the checkpoint states, which are where they were then,
            seen from the checkpoint, or beside it.
        tokenizer_code_path: folder of the code of a pickled tokenizer, which is then run.
        allow_torchscript: whether the tokenizer may be a TorchScript program, which is then run.
        tokenizer_input_size: pixels to which both sides of images are resized, for tokens. Default: as the checkpoint
            says, or 256 for the published model's 28 x 28 codes.
        model, model_kwargs: default: as the checkpoint says. Published checkpoints do not.
        input_size, eval_crop_ratio: of a model of images; default: as the checkpoint says. `input_size` also of a model
            of tokens that is no ViT, 8 pixels to a code.
        exif_rotate: turn images as their EXIF orientation says; default: as the checkpoint says, else not.
        stem: 'native' or 'fast', of a model of tokens that is no ViT; default: as the checkpoint says.

    Raises:
        InputError: for a checkpoint of no classifier, one that does not say enough, and files that are not there or do
            not belong to it.
    """
    path = find_file(str(path), use_ema)
    checkpoint = load_checkpoint(path)
    program = program_with(checkpoint, path, stem)
    if program == PRETRAIN:
        raise InputError(f'{path}: is of {PRETRAIN}, whose model predicts codes and no classes: fine-tune it with '
                         f'{FINETUNE}, and give that checkpoint')
    tokenizer = codebook = None
    if program != PIXELS:
        codebook_path = str(codebook_path) or file_of(checkpoint, 'codebook', path, '--codebook-path')
        tokenizer_path = str(tokenizer_path) or file_of(checkpoint, 'tokenizer', path, '--tokenizer-path')
        for name, file in (('codebook', codebook_path), ('tokenizer', tokenizer_path)):
            if not file:
                raise InputError(f'{path}: does not say with which {name} it was trained: give it to --{name}-path')
        codebook = load_codebook(codebook_path)
        tokenizer = load_tokenizer(tokenizer_path, tokenizer_code_path, allow_torchscript)
        check_codes(tokenizer, codebook, codebook_path)
    trained = load_model(checkpoint, path, codebook, use_ema, model, model_kwargs, input_size, eval_crop_ratio,
                         stem)
    if tokenizer is not None:
        tokenizer_input_size = tokenizer_input_size or image_size_of(checkpoint, path, trained, tokenizer)
        # a wrong codebook or tokenizer has the right shape, and gives chance
        facts = {'codebook': digest_of(codebook), 'size of tokenized images': tokenizer_input_size,
                 'tokenizer': digest_of_entry(identity_of_tokenizer(tokenizer_path))}
        check_tokens_of(checkpoint, path, facts, {'codebook': codebook_path, 'tokenizer': tokenizer_path})
    if exif_rotate is None:
        exif_rotate = said_of_the_model(checkpoint).get('exif_rotate', False)
    classifier = Classifier(trained, class_names(checkpoint, path, trained), tokenizer, codebook, tokenizer_input_size,
                            exif_rotate)
    return classifier.eval().to(device)


def find_file(path: str, use_ema: bool = False) -> str:
    """The checkpoint that a path names: a file, or of a folder the best, else the newest. Raises InputError."""
    if is_address(path) or not os.path.isdir(path):
        return path
    kinds = FILES, FINETUNE_FILES
    names = [files.best[name] for name in (['ema'] if use_ema else []) + ['model'] for files in kinds
             if name in files.best]
    names += [files.newest[0] for files in kinds]
    for name in names:
        if os.path.exists(os.path.join(path, name)):
            return os.path.join(path, name)
    tasks = sorted((len(task.name), task) for task in Path(path).glob('task-*') if task.is_dir())
    advice = f'; it is of {len(tasks)} tasks: give one, such as {tasks[-1][1]}' if tasks else ''
    raise InputError(f'{path}: no checkpoint in it ({", ".join(names)}){advice}')


def image_size_of(checkpoint: dict[str, Any], path: str, trained: TrainedModel, tokenizer: nn.Module) -> int:
    """Pixels to which images were resized for the tokens of a checkpoint. Raises InputError where it is not known."""
    size = said_of_the_model(checkpoint).get('tokenizer_input_size')
    if size is None and (trained.input_size, tokenizer.patch_size) == PUBLISHED[:2]:
        size = PUBLISHED[2]
    if type(size) is not int or size < 1:
        raise InputError(f'{path}: does not say to how many pixels images were resized for its tokens: give '
                         '--tokenizer-input-size')
    return size


def class_names(checkpoint: dict[str, Any], path: str, trained: TrainedModel) -> list[str]:
    """Names of a model's outputs, their numbers where the checkpoint has no names. Of a task, the classes seen."""
    outputs = trained.classes
    seen = (checkpoint.get('data') or {}).get(SEEN)
    if type(seen) is int and 0 < seen <= outputs:
        outputs = seen
    elif 'inc_classes' in saved_flags(checkpoint):
        print0(f'note: {path}: does not say how many classes its task had seen: all {outputs} are told apart')
    names = (trained.class_names or [])[:outputs]
    return names + [str(number) for number in range(len(names), outputs)]
