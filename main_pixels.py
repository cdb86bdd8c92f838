"""Train and evaluate a model of timm on images, by the recipe of main_seit.py: baselines at equal storage.

One process:   python main_pixels.py --train-path IMAGES/train --val-path IMAGES/val --output-dir output/pixels
One node:      torchrun --nproc_per_node=8 main_pixels.py --batch-size 128 --dist-eval --train-path ...
Evaluate:      python main_pixels.py --eval --resume output/pixels/best_checkpoint.pth --val-path IMAGES/val

IMAGES may be class folders, a list, tar shards or parquet files, see image_data/sources.py. All that is not said here
is as in main_seit.py: many nodes, resuming, checkpoints, logs. `--aug tokens` augments as tokens can be (random-resized
crop and CutMix), `--aug deit` as DeiT does.

The order is that of main_seit.py. What differs is written here: which flags --aug sets, how images are read, and by
what the augmentation of each image is seeded (`draws_of`).
"""
import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before installed packages of the same names
import flags
import recipe
from engine import evaluate_checkpoint
from fileio.labels import check_class_names, count_classes
from flags import Parser, add_exif_rotate, add_max_pixels, integer, number
from image_data.class_subsets import OnlyClasses, match_classes
from image_data.corruptions import add_robustness_flags, make_corruption
from image_data.dataset import ImageDataset, Normalize, eval_transform, random_erasing, train_transform
from image_data.overlap import note_shared_images
from inference.pixel_models import create_pixel_model
from inference.report import Report, check_report, class_names
from models_seit import MODELS, classifier_of
from samplers import REPEATS, repeated_augmentation, shuffled
from training.checkpoints import head_size, load_checkpoint
from training.pretrained import freeze_all_but_attention, load_pretrained
from utils import InputError, print0, rank, run, world_size

# Each --aug sets defaults of the augmentation flags, so that a flag of the command line still counts.
AUGMENTATIONS = {
    'tokens': {'hflip': 0., 'aa': '', 'color_jitter': 0., 'reprob': 0., 'repeated_aug': False, 'mixup': 0.},
    'deit': {'hflip': 0.5, 'aa': 'rand-m9-mstd0.5-inc1', 'color_jitter': 0.3, 'reprob': 0.25, 'repeated_aug': True,
             'mixup': 0.8},
}


def get_args_parser() -> Parser:
    """All flags."""
    parser = Parser('Train and evaluate a model of timm on images.')
    add = parser.add_group('data')
    add('--train-path', default='', metavar='PATH', of_a_rank=True,
        help='training images: class folders, a list file .txt, tar shards or parquet files')
    add('--val-path', default='', metavar='PATH', of_a_rank=True, help='validation images of the same classes')
    add('--nb-classes', type=integer(1),
        help='number of classes (default: the largest label + 1; with --eval as many as the checkpoint has)')
    add('--input-size', type=integer(1), default=224, of_the_model=True,
        help='pixels on a side of what the model reads')
    add('--eval-crop-ratio', type=number(0.01, 1), default=0.875, of_the_model=True,
        help='validation images are resized to --input-size divided by this, and their middle is cropped')
    add('--num-workers', type=integer(), default=10,
        help='processes that decode images, at most as many as there are cores')
    add('--pin-mem', action=flags.ON_OFF, default=True,
        help='copy batches to the GPU from page-locked memory, which is faster')
    add_max_pixels(add)
    add_exif_rotate(add, exact=True, of_the_model=True)
    flags.add_model_flags(parser, 'deit_base_patch16_224', 'any model of timm')
    flags.add_optimization_flags(parser)

    add = parser.add_group('augmentation')
    add('--aug', default='tokens', choices=list(AUGMENTATIONS),
        help='tokens: the augmentations that tokens can have too; deit: also flip, RandAugment, random erasing, '
        'repeated augmentation and Mixup. It only sets defaults of the flags below, and of --mixup')
    add('--rrc-ratio', type=flags.FRACTION, default=0.08,
        help='smallest area of a random-resized crop, as a fraction of the whole')
    add('--hflip', type=flags.FRACTION, help='chance of an image to be mirrored')
    add('--aa', metavar='POLICY', help="an auto-augmentation policy, by its name in timm; '' for none")
    add('--color-jitter', type=number(0),
        help='strength of color jitter; it has no effect beside --aa, as in DeiT')
    add('--reprob', type=flags.FRACTION,
        help='chance of an image to get a rectangle of noise (random erasing)')
    add('--repeated-aug', action=flags.ON_OFF, exact=True,
        help='show each image three times in a row, each time augmented anew (repeated augmentation)')
    flags.add_mixing_flags(parser)
    flags.add_run_flags(parser)
    add_robustness_flags(parser)
    parser.set_defaults(**AUGMENTATIONS['tokens'])
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError, also for values that cannot work together."""
    parser = get_args_parser()
    # parsed twice: --aug must be known before the defaults of other flags are
    parser.set_defaults(**AUGMENTATIONS[parser.parse_known_args(argv)[0].aug])
    args = parser.parse_args(argv)
    recipe.check_flags(args)
    recipe.check_cutmix(args, args.input_size)
    make_corruption(args.corruption, args.severity, args.seed)  # both or neither
    for flag in ('corruption', 'classes'):
        if getattr(args, flag) and not args.eval:
            raise InputError(f'--{flag} belongs to --eval')
    for is_read, flag in ((not args.eval, 'train'), (not args.no_eval, 'val')):
        if is_read and not getattr(args, f'{flag}_path'):
            raise InputError(f'--{flag}-path: name the images; class folders, a list, tar shards or parquet files')
    return args


# ---------------------------------------------------------------- the model

def create_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """The model of the flags, (B, 3, --input-size, --input-size) -> (B, classes). Raises InputError."""
    return create_pixel_model(args.model, args.model_kwargs, classes, args.input_size, args.drop, args.drop_path)


def small_model(input_size: int) -> dict[str, Any]:
    """The model of --recipe small: of as many patches as that of tokens, for 8 pixels to a code."""
    patch_size = 16 if input_size >= 160 and input_size % 16 == 0 else 8
    return {'model': 'deit_tiny_patch16_224',
            'model_kwargs': {**recipe.SMALL_VIT, 'patch_size': patch_size, 'global_pool': 'avg'}}


# ---------------------------------------------------------------- data

def load_split(args: argparse.Namespace, split: str) -> ImageDataset:
    """The images of 'train' or 'val', with the transform of the flags. Prints how many there are."""
    if split == 'train':
        transform = train_transform(args.input_size, args.rrc_ratio, args.hflip, args.color_jitter, args.aa)
    else:
        transform = eval_transform(args.input_size, args.eval_crop_ratio)
    data = ImageDataset(getattr(args, f'{split}_path'), args.input_size, transform, args.num_workers,
                        args.max_image_pixels, args.exif_rotate)
    print0(f'{split}: {len(data):,} images, {args.input_size}x{args.input_size} pixels are read')
    return data


def facts_of(datasets: dict[str, ImageDataset]) -> dict[str, Any]:
    """What ranks, and a resumed run, must have the same: SHA-256 of names, labels and sizes of images, by set."""
    facts = {f'images of {split}': data.source.content_digest() for split, data in datasets.items()}
    return facts | {'EXIF rotation': any(data.source.exif_rotate for data in datasets.values())}


def draws_of(seed: int, epoch: int, indices: np.ndarray, first: int, repeats: int) -> np.ndarray:
    """What the augmentation of each image is seeded by, (n, 4) int64: run, epoch, image, and which of its copies.

    Args:
        seed, epoch: of the run.
        indices: (n,) of this rank's images.
        first: position in the rank's epoch of the first of these images.
        repeats: how many copies of an image follow each other in the order that is dealt to the ranks.
    """
    # A seed for each image, and none for a worker or a batch: so the numbers of workers and of steps before a resume do
    # not matter. The copies of an image lie one after the other in the order of all ranks, hence their numbers.
    copies = (np.arange(first, first + len(indices)) * world_size() + rank()) % repeats
    same = np.ones(len(indices), np.int64)
    return np.stack([seed * same, epoch * same, indices, copies], 1)


# ---------------------------------------------------------------- evaluation

def evaluate_only(args: argparse.Namespace, checkpoint: dict[str, Any], path: str, device: torch.device) -> None:
    """--eval: evaluate a checkpoint, on corrupted images or some of its classes where asked for. Raises InputError."""
    data = load_split(args, 'val')
    recipe.check_data(args, facts_of({'val': data}), checkpoint)
    recipe.check_evaluated(args, checkpoint, path)
    data.source.change = make_corruption(args.corruption, args.severity, args.seed)
    if data.source.change:
        print0(f'corrupted by {data.source.change}')
    classes = args.nb_classes or head_size(checkpoint['model'], classifier_of(args.model), path)
    data.labels, _, subset = match_classes(data.source, checkpoint.get('classes'), classes, path, args.classes)
    model = create_model(args, classes).to(device)
    recipe.print_model(args, args.model, model, device)
    report = None
    if args.report:
        names = class_names(classes, checkpoint.get('classes'), data.source.classes, data.source.labels, data.labels)
        report = Report(args.report, names, device, args.dist_eval, subset, image_names=data.source.names,
                        images_of=lambda numbers: next(data.batches(numbers, len(numbers), device))[0])
    evaluate_of = recipe.make_evaluate(args, data, Normalize(device), device, report)
    scored = model if subset is None else OnlyClasses(model, subset, classes).to(device)
    evaluate_checkpoint(model, checkpoint, path, args.model_ema, lambda _, name: evaluate_of(scored, name),
                        args.output)


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> int:
    """Train, or evaluate. Returns the exit code."""
    device, folder, checkpoint, path = recipe.start(args)
    if args.eval:
        check_report(args.report)
        evaluate_only(recipe.from_checkpoint(args, checkpoint, path), checkpoint, path, device)
        return 0

    # data
    train_data = load_split(args, 'train')
    val_data = None if args.no_eval else load_split(args, 'val')
    labels = {args.train_path: train_data.labels}
    if val_data:
        check_class_names(train_data.classes, val_data.classes, args.train_path, args.val_path)
        labels[args.val_path] = val_data.labels
        note_shared_images(train_data.source, val_data.source)
    classes = count_classes(labels, args.nb_classes, None)
    if checkpoint:
        check_class_names(checkpoint.get('classes'), train_data.classes, path, args.train_path)
    datasets = {'train': train_data} | ({'val': val_data} if val_data else {})
    facts = recipe.check_data(args, facts_of(datasets), checkpoint)
    args = recipe.choose(args, small_model(args.input_size), len(train_data), max(2, args.input_size // 8), classes,
                         (args.val_path, len(val_data)) if val_data else None, checkpoint)

    # model
    pretrained = load_checkpoint(args.finetune, weights_alone=True) if args.finetune else None
    if pretrained:
        args = recipe.model_of_start(args, pretrained, lambda name: timm.is_model(name) and name not in MODELS)
    model = create_model(args, classes)
    if pretrained:
        load_pretrained(model, args.finetune, train_data.classes, checkpoint=pretrained)
    if args.attn_only:
        freeze_all_but_attention(model)
    model.to(device)
    recipe.print_model(args, args.model, model, device)
    evaluate_of = recipe.make_evaluate(args, val_data, Normalize(device), device) if val_data else None

    # loss
    normalize = Normalize(device)
    erase = random_erasing(args.reprob, device)
    mixup, criterion = recipe.make_loss(args, classes)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        x, targets = batch  # (B, 3, s, s) uint8
        x = erase(normalize(x))  # whole batches on the device: cheaper than image by image in the workers
        if mixup:
            x, targets = mixup(x, targets)
        return criterion(model(x), targets)

    def order_of(epoch: int) -> np.ndarray:
        sampler = repeated_augmentation if args.repeated_aug else shuffled
        return sampler(len(train_data), world_size(), rank(), args.seed, epoch)

    def batches_of(indices: np.ndarray, epoch: int, start: int) -> Iterator:
        draws = draws_of(args.seed, epoch, indices, start * args.batch_size, REPEATS if args.repeated_aug else 1)
        return train_data.batches(indices, args.batch_size, device, args.pin_mem, draws)

    # train
    steps = recipe.count_steps(args, len(order_of(0)), args.train_path)
    state = recipe.make_state(args, model, device, (3, args.input_size, args.input_size), steps, facts)
    recipe.resume_run(args, state, checkpoint, path, steps)
    return recipe.fit(args, state, folder, steps, order_of, batches_of, loss_of, evaluate_of, train_data.classes)


if __name__ == '__main__':
    run(main, parse_args)
