"""Train main_seit.py's ViT on pixels instead of tokens: the bar for benchmarks/tokenizers.py, not a product.

    python benchmarks/pixel_twin.py --train-path IMAGES/train --val-path IMAGES/val --side 64 --jpeg-quality 8 \\
        --model deit_tiny_token_32 --input-size 64 --output-dir output/pixels

Takes the flags of main_seit.py; what concerns token files and Token-EDA has no effect, --input-size is in pixels. The
model is the same but for the Stem-adaptor: patches of --patch-size pixels that do not overlap. Loop, recipe, sampling
and the distribution of crops are the same too; there is no flip, as tokens have none. All images live in memory.

Images are resized to --side, made a JPEG of --jpeg-quality by PIL (0: left as they are), and resized to --input-size.
"""
import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_seit
import recipe
from checkpoints import flags_to_save, resume
from engine import evaluate, rank_indices, train
from flags import Parser, integer
from image_files import decode_image, scan_bytes
from image_sources import Source, load_images, open_source
from models_seit import create_model
from preemption import REQUEUE
from run_folder import RunFolder, RunLog, find_checkpoint
from run_info import print_batch, print_model, run_record
from samplers import shuffled
from token_augment import draw_random_resized_crop
from utils import InputError, init_distributed, keep_freed_memory, print0, rank, run, world_size

BATCH = 256  # images decoded at a time


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Our arguments, and main_seit.py's as `main_args`. Raises InputError."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add('--train-path', required=True, metavar='PATH', help='images, as in tokenize_images.py')
    add('--val-path', required=True, metavar='PATH')
    add('--side', type=integer(1), default=64, help='pixels that an image is stored with, on each side')
    add('--jpeg-quality', type=integer(0, 95), default=0, help='of PIL; 0 for no JPEG')
    add('--patch-size', type=integer(1), default=8)
    args, main_flags = parser.parse_known_args(argv)
    main_args = main_seit.parse_args(main_flags)
    if main_args.input_size % args.patch_size:
        raise InputError(f'--input-size {main_args.input_size}: patches of {args.patch_size} do not divide it')
    if main_args.eval or main_args.finetune:
        raise InputError('--eval and --finetune: this program only trains')
    return argparse.Namespace(**vars(args), main_args=main_args)


# ---------------------------------------------------------------- bytes

def jpeg(pixels: torch.Tensor, quality: int) -> bytes:
    """An image (3, H, W) uint8 as a JPEG, by PIL with its defaults: one scan, chroma at half the resolution."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, 'JPEG', quality=quality)
    return file.getvalue()


# ---------------------------------------------------------------- images

class Pixels(NamedTuple):
    """Images as a model gets them, and what their files take.

    Attributes:
        images: (N, 3, S, S) uint8.
        labels: (N,) int64.
        file_bytes: mean bytes of the files.
        scan_bytes: mean bytes without headers (`scan_bytes`), None where not all are JPEGs.
    """
    images: torch.Tensor
    labels: torch.Tensor
    file_bytes: float
    scan_bytes: float | None


def load_pixels(source: Source, side: int, quality: int, size: int) -> Pixels:
    """All images of a source, stored at `side` and `quality` (0: as they are in the source), at `size` then.

    Raises:
        InputError: for an image that cannot be read.
    """
    images = torch.empty(len(source), 3, size, size, dtype=torch.uint8)
    files = []
    scans = []
    batches = [range(first, min(first + BATCH, len(source))) for first in range(0, len(source), BATCH)]
    for batch in load_images(source, batches, side):
        for index, pixels in zip(batch.indices.tolist(), batch.pixels):
            data = jpeg(pixels, quality) if quality else source.read(index)
            files.append(len(data))
            scans.append(scan_bytes(data))
            if quality:
                images[index] = decode_image(data, size)
            elif side == size:
                images[index] = pixels
            else:
                whole = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
                images[index] = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    return Pixels(images, torch.from_numpy(source.labels), float(np.mean(files)),
                  None if None in scans else float(np.mean(scans)))


def normalize(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) uint8 -> float32 of about zero mean and deviation 1, by the usual constants of ImageNet."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1)
                 for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images / 255 - mean) / std


def crop(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, S, S) float, cropped to boxes (B, 4) int64 (top, left, height, width), resampled to S, bicubic."""
    size = images.shape[-1]
    top, left, height, width = boxes.float().div(size).unbind(1)
    zero = torch.zeros_like(top)
    affine = torch.stack([width, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode='bicubic', padding_mode='border', align_corners=False)


def make_model(args: argparse.Namespace, classes: int, patch_size: int) -> nn.Module:
    """main_seit.py's model with a patch embedding of pixels: (B, 3, --input-size, --input-size) -> (B, classes)."""
    side = args.input_size // patch_size
    model = create_model(args.model, args.model_kwargs, classes, 2 * side, drop_path_rate=args.drop_path,
                         pos_drop_rate=args.drop, proj_drop_rate=args.drop)
    model.patch_embed = PatchEmbed(args.input_size, patch_size, 3, model.embed_dim)
    return model


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> int:
    """Train. Returns the exit code."""
    main_args = args.main_args
    device = init_distributed(main_args.device, main_args.dist_url, main_args.dist_timeout)
    recipe.set_up_torch(main_args)
    folder = RunFolder(main_args.output_dir, main_args.save_every)
    checkpoint, path = find_checkpoint(main_args.output_dir, main_args.resume)

    size = main_args.input_size
    train_data, val_data = (load_pixels(open_source(data_path), args.side, args.jpeg_quality, size)
                            for data_path in (args.train_path, args.val_path))
    print0(f'train: {len(train_data.images):,} images of {size}x{size} pixels, {train_data.file_bytes:,.0f} bytes an '
           f'image; val: {len(val_data.images):,}')
    classes = main_args.nb_classes or int(max(train_data.labels.max(), val_data.labels.max())) + 1
    keep_freed_memory(device)
    model = make_model(main_args, classes, args.patch_size).to(device)
    amp = main_args.amp or recipe.default_amp(device)
    print_model(main_args.model, model, device, amp)

    def batches(data: Pixels, indices: np.ndarray, batch_size: int) -> Iterator:
        for chosen in torch.from_numpy(indices).split(batch_size):
            yield data.images[chosen].to(device), data.labels[chosen].to(device)

    def evaluate_of(model: nn.Module, name: str) -> dict[str, float]:
        indices = rank_indices(len(val_data.images), main_args.dist_eval)
        return evaluate(model, batches(val_data, indices, int(1.5 * main_args.batch_size)), normalize, amp=amp,
                        distributed=main_args.dist_eval, name=name)

    mixup, criterion = recipe.make_loss(main_args, classes)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        images, targets = batch
        boxes = draw_random_resized_crop(len(images), size, main_args.rrc_ratio, generator)
        x = crop(normalize(images), boxes)
        if mixup:
            x, targets = mixup(x, targets)
        return criterion(model(x), targets)

    def indices_of(epoch: int) -> np.ndarray:
        return shuffled(len(train_data.images), world_size(), rank(), main_args.seed, epoch)

    def batches_of(epoch: int, start: int) -> Iterator:
        chosen = indices_of(epoch)[start * main_args.batch_size:steps * main_args.batch_size]
        return batches(train_data, chosen, main_args.batch_size)

    steps = recipe.count_steps(main_args, len(indices_of(0)), args.train_path)
    state = recipe.make_state(main_args, model, device, (3, size, size))
    flags = vars(main_args) | {'side': args.side, 'jpeg_quality': args.jpeg_quality, 'patch_size': args.patch_size}
    if checkpoint:
        resume(state, checkpoint, path, flags, steps)
        print0(f'{path}: resumed at epoch {state.epoch}, step {state.step}')
    print_batch(main_args.batch_size, main_args.accum_iter, steps, main_args.epochs, recipe.scaled_lr(main_args),
                main_args.unscale_lr)
    folder.begin(run_record(flags, device), {'args': flags_to_save(flags), 'classes': None})
    log = RunLog(main_args.output_dir, state.epoch, main_args.tensorboard)
    finished = train(state, batches_of, loss_of, None if main_args.no_eval else evaluate_of, folder, log,
                     main_args.epochs, recipe.step_options(main_args, steps))
    return 0 if finished else REQUEUE


if __name__ == '__main__':
    run(main, parse_args)
