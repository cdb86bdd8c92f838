"""Train and evaluate a model of timm on images, by the recipe of main_seit.py: baselines at equal storage.

One process:   python main_pixels.py --train-path IMAGES/train --val-path IMAGES/val --output-dir output/pixels
One node:      torchrun --nproc_per_node=8 main_pixels.py --batch-size 128 --dist-eval --train-path ...
Evaluate:      python main_pixels.py --eval --resume output/pixels/best_checkpoint.pth --val-path IMAGES/val

IMAGES may be class folders, a list, tar shards or parquet files, see image_sources.py. All that is not said here is as
in main_seit.py: many nodes, resuming, checkpoints, logs. `--aug tokens` augments as tokens can be (random-resized crop
and CutMix), `--aug deit` as DeiT does.
"""
import argparse
import difflib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import to_2tuple
from torch import nn

import recipe
from checkpoints import flags_to_save, progress_of, resume
from class_names import check_class_names, count_classes, head_size
from class_subsets import OnlyClasses, match_classes
from corruptions import add_robustness_flags, make_corruption
from engine import evaluate, evaluate_checkpoint, rank_indices, train
from flags import Parser, add_max_pixels, integer, number
from image_dataset import ImageDataset, Normalize, eval_transform, random_erasing, train_transform
from loss_meter import NotFinite
from models_seit import MODELS
from preemption import REQUEUE
from pretrained import freeze_all_but_attention, load_pretrained
from run_folder import RunFolder, RunLog, find_checkpoint
from run_info import print_batch, print_model, run_record
from samplers import REPEATS, repeated_augmentation, shuffled
from utils import (InputError, check_same_on_all_ranks, init_distributed, keep_freed_memory, print0, rank, run,
                   world_size)

# Defaults of the augmentation flags under each --aug.
AUGMENTATIONS = {
    'tokens': {'hflip': 0., 'aa': '', 'color_jitter': 0., 'reprob': 0., 'repeated_aug': False, 'mixup': 0.},
    'deit': {'hflip': 0.5, 'aa': 'rand-m9-mstd0.5-inc1', 'color_jitter': 0.3, 'reprob': 0.25, 'repeated_aug': True,
             'mixup': 0.8},
}


def get_args_parser() -> Parser:
    """All flags."""
    parser = Parser('Train and evaluate a model of timm on images.')
    add = parser.add_argument_group('data').add_argument
    add('--train-path', default='', metavar='PATH',
        help='class folders of images, a list file .txt, tar shards or parquet files')
    add('--val-path', default='', metavar='PATH')
    add('--nb-classes', type=integer(1), help='default: the largest label + 1, or what the checkpoint has under --eval')
    add('--input-size', type=integer(1), default=224, help='pixels on a side')
    add('--eval-crop-ratio', type=number(0.01, 1), default=0.875,
        help='validation images are resized to --input-size divided by it, and cropped')
    add('--num-workers', type=integer(), default=10, help='processes that decode images; as many as the cores at most')
    add('--pin-mem', action=recipe.ON_OFF, default=True, help='copy batches to a GPU from page-locked memory')
    add_max_pixels(add)
    recipe.add_model_flags(parser, 'deit_base_patch16_224', 'any model of timm')
    recipe.add_optimization_flags(parser)

    add = parser.add_argument_group('augmentation').add_argument
    add('--aug', default='tokens', choices=list(AUGMENTATIONS),
        help='tokens: what tokens can have too; deit: flip, RandAugment, random erasing, repeated augmentation and '
        'Mixup as well. It only sets defaults of the flags below, and of --mixup')
    add('--rrc-ratio', type=recipe.SHARE, default=0.08, help='smallest area of the random-resized crop')
    add('--hflip', type=recipe.SHARE, help='share of images that are mirrored')
    add('--aa', metavar='POLICY', help="timm's auto-augmentation policy; '' for none")
    add('--color-jitter', type=number(0), help='strength; without effect beside --aa, as in DeiT')
    add('--reprob', type=recipe.SHARE, help='share of images with a rectangle of noise (random erasing)')
    add('--repeated-aug', action=recipe.ON_OFF, help='repeated augmentation: each image three times running')
    recipe.add_mixing_flags(parser)
    recipe.add_run_flags(parser)
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
    if not timm.is_model(args.model):
        near = difflib.get_close_matches(args.model, timm.list_models(), 3)
        raise InputError(f'--model {args.model}: timm has no such model'
                         + (f'; near it are {", ".join(near)}' if near else ', and none of a name like it'))
    if args.model in MODELS:
        raise InputError(f'--model {args.model} reads tokens; train it with main_seit.py')
    cfg = timm.get_pretrained_cfg(args.model)
    size = {'img_size': args.input_size} if cfg and cfg.fixed_input_size else {}  # others take any
    flags = f'--model {args.model} with --model-kwargs {args.model_kwargs}, --drop {args.drop:g}'
    flags += f', --drop-path {args.drop_path:g}, --input-size {args.input_size}'
    try:
        model = timm.create_model(args.model, num_classes=classes, drop_rate=args.drop or None,
                                  drop_path_rate=args.drop_path or None, **(size | args.model_kwargs))
        with torch.no_grad():  # sizes that do not fit show here
            shape = model.eval()(torch.zeros(1, 3, args.input_size, args.input_size)).shape
        if shape != (1, classes):
            raise TypeError(f'gives {tuple(shape)} for an image')
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        raise InputError(f'{flags}: {" ".join(str(error).split()) or repr(error)}') from None
    patch_size = to_2tuple(getattr(getattr(model, 'patch_embed', None), 'patch_size', None) or 1)
    if any(args.input_size % side for side in patch_size):  # timm would leave out the pixels that remain
        raise InputError(f'{flags}: patches of {patch_size[0]} pixels do not divide the image')
    return model


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


def draws_of(seed: int, epoch: int, indices: np.ndarray, repeats: int) -> np.ndarray:
    """What the augmentation of each of a rank's images in an epoch is seeded by, (n, 4) int64.

    Args:
        seed, epoch: of the run.
        indices: (n,) of this rank's images, the whole epoch's.
        repeats: how many times running each image comes in the order that is dealt to the ranks.
    """
    copies = (np.arange(len(indices)) * world_size() + rank()) % repeats
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
    amp = args.amp or recipe.default_amp(device)
    print_model(args.model, model, device, amp)
    evaluate_of = make_evaluate(args, data, device, amp)
    scored = model if chosen is None else OnlyClasses(model, chosen, classes).to(device)
    evaluate_checkpoint(model, checkpoint, path, args.model_ema, lambda _, name: evaluate_of(scored, name),
                        args.output)


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> int:
    """Train, or evaluate. Returns the exit code."""
    # set-up
    device = init_distributed(args.device, args.dist_url, args.dist_timeout)
    check_same_on_all_ranks(recipe.flags_alike(args))
    recipe.set_up_torch(args)
    folder = RunFolder('' if args.eval else args.output_dir, args.save_every)
    checkpoint, path = find_checkpoint(args.output_dir, args.resume, args.eval)
    keep_freed_memory(device)
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
    amp = args.amp or recipe.default_amp(device)
    print_model(args.model, model, device, amp)
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

    def batches_of(epoch: int, start: int) -> Iterator:
        indices = order_of(epoch)
        draws = draws_of(args.seed, epoch, indices, REPEATS if args.repeated_aug else 1)
        part = slice(start * args.batch_size, steps * args.batch_size)
        return train_data.batches(indices[part], args.batch_size, device, args.pin_mem, draws[part])

    # optimizer and resume
    steps = recipe.count_steps(args, len(order_of(0)), args.train_path)
    state = recipe.make_state(args, model, device, (3, args.input_size, args.input_size))
    if checkpoint:
        resume(state, checkpoint, path, vars(args), steps)
        print0(f'{path}: resumed at epoch {state.epoch}, step {state.step}, best Acc@1 {state.best["model"]:.3f}')
    print_batch(args.batch_size, args.accum_iter, steps, args.epochs, recipe.scaled_lr(args))

    # train
    folder.begin(run_record(vars(args), device), {'args': flags_to_save(vars(args)), 'classes': train_data.classes})
    log = RunLog(args.output_dir, state.epoch, args.tensorboard)
    try:
        finished = train(state, batches_of, loss_of, evaluate_of, folder, log, args.epochs,
                         recipe.step_options(args, steps))
    except NotFinite as error:
        part = slice(error.step * args.batch_size, (error.step + 1) * args.batch_size)
        folder.save_bad_step(error, rank(), args.seed, order_of(error.epoch)[part].tolist())
        raise
    return 0 if finished else REQUEUE


if __name__ == '__main__':
    run(main, parse_args)
