"""Train and evaluate a model of timm on images, by the recipe of main_seit.py: baselines at equal storage.

One process:   python main_pixels.py --train-path IMAGES/train --val-path IMAGES/val --output-dir output/pixels
One node:      torchrun --nproc_per_node=8 main_pixels.py --batch-size 128 --dist-eval --train-path ...
Evaluate:      python main_pixels.py --eval --resume output/pixels/best_checkpoint.pth --val-path IMAGES/val

IMAGES may be class folders, a list, tar shards or parquet files, see image_data/sources.py. All that is not said here
is as in main_seit.py: many nodes, resuming, checkpoints, logs. `--aug tokens` augments as tokens can be (random-resized
crop and CutMix), `--aug deit` as DeiT does.
"""
import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # ours come first, under PYTHONSAFEPATH=1 too
import flags
import recipe
from engine import evaluate, evaluate_checkpoint, rank_indices
from fileio.labels import check_class_names, count_classes
from flags import Parser, add_max_pixels, integer, number
from image_data.class_subsets import OnlyClasses, match_classes
from image_data.corruptions import add_robustness_flags, make_corruption
from image_data.dataset import ImageDataset, Normalize, eval_transform, random_erasing, train_transform
from inference.pixel_models import create_pixel_model
from samplers import REPEATS, repeated_augmentation, shuffled
from training.checkpoints import head_size, progress_of
from training.pretrained import freeze_all_but_attention, load_pretrained
from utils import InputError, check_same_on_all_ranks, print0, rank, run, world_size

# Defaults of the augmentation flags under each --aug.
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
        help='class folders of images, a list file .txt, tar shards or parquet files')
    add('--val-path', default='', metavar='PATH', of_a_rank=True)
    add('--nb-classes', type=integer(1), help='default: the largest label + 1, or what the checkpoint has under --eval')
    add('--input-size', type=integer(1), default=224, help='pixels on a side')
    add('--eval-crop-ratio', type=number(0.01, 1), default=0.875,
        help='validation images are resized to --input-size divided by it, and cropped')
    add('--num-workers', type=integer(), default=10, help='processes that decode images; as many as the cores at most')
    add('--pin-mem', action=flags.ON_OFF, default=True, help='copy batches to a GPU from page-locked memory')
    add_max_pixels(add)
    flags.add_model_flags(parser, 'deit_base_patch16_224', 'any model of timm')
    flags.add_optimization_flags(parser)

    add = parser.add_group('augmentation')
    add('--aug', default='tokens', choices=list(AUGMENTATIONS),
        help='tokens: what tokens can have too; deit: flip, RandAugment, random erasing, repeated augmentation and '
        'Mixup as well. It only sets defaults of the flags below, and of --mixup')
    add('--rrc-ratio', type=flags.SHARE, default=0.08, help='smallest area of the random-resized crop')
    add('--hflip', type=flags.SHARE, help='share of images that are mirrored')
    add('--aa', metavar='POLICY', help="timm's auto-augmentation policy; '' for none")
    add('--color-jitter', type=number(0), help='strength; without effect beside --aa, as in DeiT')
    add('--reprob', type=flags.SHARE, help='share of images with a rectangle of noise (random erasing)')
    add('--repeated-aug', action=flags.ON_OFF, exact=True,
        help='repeated augmentation: each image three times running')
    flags.add_mixing_flags(parser)
    flags.add_run_flags(parser)
    add_robustness_flags(parser)
    parser.set_defaults(**AUGMENTATIONS['tokens'])
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError, also for values that cannot work together."""
    parser = get_args_parser()
    parser.set_defaults(**AUGMENTATIONS[parser.parse_known_args(argv)[0].aug])
    args = parser.parse_args(argv)
    recipe.check_flags(args)
    make_corruption(args.corruption, args.severity, args.seed)  # both or neither
    for flag in ('corruption', 'classes'):
        if getattr(args, flag) and not args.eval:
            raise InputError(f'--{flag} belongs to --eval')
    for wanted, flag in ((not args.eval, 'train'), (not args.no_eval, 'val')):
        if wanted and not getattr(args, f'{flag}_path'):
            raise InputError(f'--{flag}-path: name the images; class folders, a list, tar shards or parquet files')
    return args


# ---------------------------------------------------------------- the model

def create_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """The model of the flags, (B, 3, --input-size, --input-size) -> (B, classes). Raises InputError."""
    return create_pixel_model(args.model, args.model_kwargs, classes, args.input_size, args.drop, args.drop_path)


# ---------------------------------------------------------------- data

def load_split(args: argparse.Namespace, split: str) -> ImageDataset:
    """The images of 'train' or 'val', with the transform of the flags. Prints how many there are."""
    if split == 'train':
        transform = train_transform(args.input_size, args.rrc_ratio, args.hflip, args.color_jitter, args.aa)
    else:
        transform = eval_transform(args.input_size, args.eval_crop_ratio)
    data = ImageDataset(getattr(args, f'{split}_path'), args.input_size, transform, args.num_workers,
                        args.max_image_pixels)
    check_same_on_all_ranks({f'images of {split}': data.source.digest()})
    print0(f'{split}: {len(data):,} images, {args.input_size}x{args.input_size} pixels are read')
    return data


def draws_of(seed: int, epoch: int, indices: np.ndarray, first: int, repeats: int) -> np.ndarray:
    """What the augmentation of each image is seeded by, (n, 4) int64.

    Args:
        seed, epoch: of the run.
        indices: (n,) of this rank's images.
        first: which image of the rank's epoch the first of these is.
        repeats: how many times running each image comes in the order that is dealt to the ranks.
    """
    copies = (np.arange(first, first + len(indices)) * world_size() + rank()) % repeats
    same = np.ones(len(indices), np.int64)
    return np.stack([seed * same, epoch * same, indices, copies], 1)


# ---------------------------------------------------------------- evaluation

def make_evaluate(args: argparse.Namespace, data: ImageDataset, device: torch.device, amp: str) -> Callable:
    """The engine's evaluate_of, on a data set."""
    normalize = Normalize(device)

    def evaluate_of(model: nn.Module, name: str) -> dict[str, float]:
        indices = rank_indices(len(data), args.dist_eval)
        batches = data.batches(indices, int(1.5 * args.batch_size), device, args.pin_mem)
        return evaluate(model, batches, normalize, amp=amp, distributed=args.dist_eval, name=name)

    return evaluate_of


def evaluate_only(args: argparse.Namespace, checkpoint: dict[str, Any], path: str, device: torch.device) -> None:
    """--eval: evaluate a checkpoint, on corrupted images or some of its classes where asked for. Raises InputError."""
    data = load_split(args, 'val')
    data.source.change = make_corruption(args.corruption, args.severity, args.seed)
    if data.source.change:
        print0(f'corrupted by {data.source.change}')
    cfg = timm.get_pretrained_cfg(args.model)
    classes = args.nb_classes or head_size(checkpoint['model'], cfg.classifier if cfg else 'head', path)
    data.labels, _, chosen = match_classes(data.source, checkpoint.get('classes'), classes, path, args.classes)
    model = create_model(args, classes).to(device)
    amp = recipe.print_model(args, args.model, model, device)
    evaluate_of = make_evaluate(args, data, device, amp)
    scored = model if chosen is None else OnlyClasses(model, chosen, classes).to(device)
    evaluate_checkpoint(model, checkpoint, path, args.model_ema, lambda _, name: evaluate_of(scored, name),
                        args.output)


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> int:
    """Train, or evaluate. Returns the exit code."""
    device, folder, checkpoint, path = recipe.start(args)
    if args.eval:
        evaluate_only(args, checkpoint, path, device)
        return 0

    # data
    train_data = load_split(args, 'train')
    val_data = None if args.no_eval else load_split(args, 'val')
    labels = {args.train_path: train_data.labels}
    if val_data:
        check_class_names(train_data.classes, val_data.classes, args.train_path, args.val_path)
        labels[args.val_path] = val_data.labels
    classes = count_classes(labels, args.nb_classes, None)
    if checkpoint:
        check_class_names(checkpoint.get('classes'), train_data.classes, path, args.train_path)
    check_same_on_all_ranks(progress_of(checkpoint))

    # model
    model = create_model(args, classes)
    if args.finetune:
        load_pretrained(model, args.finetune, train_data.classes)
    if args.attn_only:
        freeze_all_but_attention(model)
    model.to(device)
    amp = recipe.print_model(args, args.model, model, device)
    evaluate_of = make_evaluate(args, val_data, device, amp) if val_data else None

    # loss
    normalize = Normalize(device)
    erase = random_erasing(args.reprob, device)
    mixup, criterion = recipe.make_loss(args, classes)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        x, targets = batch
        x = erase(normalize(x))
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
    state = recipe.make_state(args, model, device, (3, args.input_size, args.input_size))
    recipe.resume_run(args, state, checkpoint, path, steps)
    return recipe.fit(args, state, folder, steps, order_of, batches_of, loss_of, evaluate_of, train_data.classes)


if __name__ == '__main__':
    run(main, parse_args)
