"""Train and evaluate a ViT on token files (SeiT, ICCV 2023, arXiv 2303.11114).

One process:   python main_seit.py --batch-size 64 --output-dir output/run
One node:      torchrun --nproc_per_node=8 main_seit.py --batch-size 128 --dist-eval --output-dir output/run
Many nodes:    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 main_seit.py ...
SLURM:         srun --ntasks-per-node=8 --gpus-per-node=8 python main_seit.py ...
Evaluate:      python main_seit.py --eval --resume output/run/best_checkpoint.pth

The defaults are the published recipe; `--batch-size` is per process and the learning rate scales with it.

Data, model and checkpoint are fitted to one another in `main`, and then trained or evaluated. `make_augment` has the
augmentation of the paper; engine.py has the loop, and recipe.py what the flags make of optimizer and schedule.
"""
import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before installed packages of the same names
import flags
import recipe
from engine import evaluate_checkpoint
from fileio.labels import check_class_names, count_classes
from flags import Parser
from models_seit import MODELS, STEMS, UpsampledConv2d, classifier_of, create_model
from samplers import draw_views, repeated_augmentation, shuffled
from inference.report import Report, check_report, class_names, token_images
from seitpp.color_adapt import color_recipe
from seitpp.halves import open_halves
from token_augment import (EraseRectangle, EvalTransform, RandomCrop, RandomResizedCrop, ReplaceSynonyms, SwapPatches,
                           TokenEDA)
from token_dataset import choose_data_device, facts_of, labels_by_file, open_splits
from token_files.codebook import look_up, read_codebook
from token_files.made_with import made_with
from training.checkpoints import SEIT, head_size, load_checkpoint, program_of
from training.pretrained import freeze_all_but_attention, load_pretrained
from utils import InputError, rank, run, world_size

# Accepted because published commands may hold them: flag -> why it changes nothing.
NO_EFFECT = {
    '--vit-patch-size': 'the stem-adaptor fixes the patches',
    '--use-entire-tokens': 'it had none in the published program either',
    '--eval-crop-ratio': 'evaluation takes the center crop of --input-size',
    '--cooldown-epochs': 'exactly --epochs epochs run, as in the published program',
    '--patience-epochs': 'it belongs to the plateau schedule, which never worked in the published program',
    '--num-workers': 'batches come straight from a memory map, so there are no loader processes',
    '--world-size': 'the launcher (torchrun, srun) sets it',
}


def get_args_parser() -> Parser:
    """All flags."""
    parser = Parser('Train and evaluate SeiT on token files.')
    flags.add_token_label_flags(flags.add_token_flags(parser))
    add = flags.add_model_flags(parser, 'deit_base_token_32', f'{", ".join(MODELS)}, or any other model of timm')
    flags.add_stem(add, STEMS, exact=True, of_the_model=True)
    flags.add_optimization_flags(parser)
    add = flags.add_token_augmentation_flags(parser)
    add('--eda-erase-prob', type=flags.FRACTION, default=0.,
        help='fraction of images in which a rectangle of codes is erased')
    add('--erase-scale', type=flags.FRACTION, default=0.25,
        help="largest sides of the erased rectangle, as fractions of the grid's")
    add('--src', action='store_true', help='take a plain random crop instead of the random-resized one')
    add('--repeated-aug', action='store_true', exact=True,
        help='show each image three times in a row, each time augmented anew (repeated augmentation)')
    add('--noise-recipe', default='v0.0', choices=['v0.0', 'seit++'],
        help='v0.0: --token-noise-prob is the fraction of images with noise; seit++: it is the chance of a batch that '
        'half of its images get noise, and a batch gets noise or ColorAdapt, never both')
    add('--tokenadapt-path', default='', metavar='FILE', of_a_rank=True,
        help='a trained TokenAdapt, by which half of each batch is augmented')
    flags.add_mixing_flags(parser)
    flags.add_run_flags(parser)
    parser.add_no_effect(NO_EFFECT, switches=['--use-entire-tokens'])
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError, also for values that cannot work together."""
    args = get_args_parser().parse_args(argv)
    recipe.check_flags(args)
    recipe.check_val_share(args)
    if not args.eval:
        size_of(args)
    recipe.check_cutmix(args, args.input_size // args.token_patch_size)
    if args.eda_rc_prob + args.eda_sc_prob + args.eda_erase_prob > 1:
        raise InputError('--eda-rc-prob, --eda-sc-prob and --eda-erase-prob add up to more than 1')
    return args


def size_of(args: argparse.Namespace) -> int:
    """Codes on a side that the model reads. Raises InputError."""
    if args.input_size % args.token_patch_size or args.input_size < 2 * args.token_patch_size:
        raise InputError(f'--input-size {args.input_size}: give twice --token-patch-size {args.token_patch_size}, or a '
                         'larger multiple of it')
    return args.input_size // args.token_patch_size


# ---------------------------------------------------------------- augmentation

def make_augment(args: argparse.Namespace, codebook: torch.Tensor, grid_size: int, size: int, device: torch.device,
                 mixup: Callable | None) -> Callable:
    """The augmentation of training, from codes to mixed embeddings (SeiT sec. 3.2).

    Returns:
        A function of codes (B, g, g) uint16, labels (B,) and a generator. It gives the model's input (B, d, size,
        size) and the targets.
    """
    changes = []
    if args.eda_rc_prob:
        synonyms = recipe.synonyms_of(args, codebook)
        changes.append((args.eda_rc_prob, ReplaceSynonyms(*synonyms, args.replace_token_prob, device)))
    if args.eda_sc_prob:
        changes.append((args.eda_sc_prob, SwapPatches(grid_size, args.swap_token_scale, device)))
    if args.eda_erase_prob:
        # one code more than the codebook has: the crop gives it an embedding of zeros
        changes.append((args.eda_erase_prob, EraseRectangle(args.erase_scale, len(codebook))))
    token_eda = TokenEDA(changes)
    crop_kind = RandomCrop if args.src else RandomResizedCrop
    crop = crop_kind(codebook, grid_size, size, args.rrc_ratio, device)
    if args.compile:  # the draws stay outside, as torch.compile cannot fuse them
        crop.resample = torch.compile(crop.resample)
    color = color_recipe(args.noise_recipe, args.token_noise_prob, args.token_coloradapt_prob, args.token_noise_scale,
                         args.token_noise_std)
    halves = open_halves(args.tokenadapt_path, codebook, crop, mixup, args.batch_size, device)

    def augment(codes: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple:
        codes = token_eda(codes.long(), generator)
        if halves:  # TokenAdapt reads whole grids, so colors change before the halves are cropped
            return halves.embeddings(color(look_up(codes, crop.embedding), generator), labels, generator)
        x = color(crop(codes, generator), generator)
        return mixup(x, labels) if mixup else (x, labels)
    return augment


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> int:
    """Train, or evaluate. Returns the exit code."""
    device, folder, checkpoint, path = recipe.start(args, NO_EFFECT)
    if args.eval:
        check_report(args.report)
        args = recipe.from_checkpoint(args, checkpoint, path)

    # ------------------------------------------------------------ data
    table = read_codebook(args.codebook_path)
    args = recipe.files_by_default(args, table)
    codebook = table.rows
    size = size_of(args)
    files = recipe.split_files(args)
    datasets = open_splits(files, codebook, args.codebook_path, args.token_cache, size, device, args.views,
                           args.val_share)
    train_data, val_data = datasets.get('train'), datasets.get('val')
    # the labels of a validation set need not reach the last class, so under --eval the checkpoint's head counts
    trained = None
    if args.eval and not args.nb_classes:
        trained = head_size(checkpoint['model'], classifier_of(args.model), path)
    classes = count_classes(labels_by_file(datasets), args.nb_classes, trained)
    names = (train_data or val_data).classes
    if checkpoint:
        check_class_names(checkpoint.get('classes'), names, path, next(iter(files.values()))[0])
    facts = recipe.check_data(args, facts_of(datasets, codebook), checkpoint)
    choose_data_device(datasets, args.data_device, device)
    if train_data:
        args = recipe.choose(args, {'model': 'deit_tiny_token_32', 'model_kwargs': recipe.SMALL_VIT}, len(train_data),
                             size, classes, (files['val'][0], len(val_data)) if val_data else None, checkpoint)
    pretrained = load_checkpoint(args.finetune, weights_alone=True) if args.finetune else None
    if pretrained:
        # a ViT of images has arguments that one of tokens has not, so its name is the user's to give
        args = recipe.model_of_start(args, pretrained, lambda name: program_of(pretrained) == SEIT)
    if args.model in MODELS:
        args = recipe.as_wide_as(table, args)

    # ------------------------------------------------------------ model
    model = create_model(args.model, args.model_kwargs, classes, size, codebook.shape[1], args.stem,
                         args.token_patch_size, args.drop, args.drop_path)
    if any(isinstance(module, UpsampledConv2d) for module in model.modules()):
        args = args.replaced(stem=args.stem or STEMS[0])  # a checkpoint says which, whatever the default is then
    if pretrained:
        recipe.note_held_out(args, pretrained, facts)
        load_pretrained(model, args.finetune, names, codebook=facts['codebook'], checkpoint=pretrained)
    if args.attn_only:
        freeze_all_but_attention(model)
    model.to(device)
    recipe.print_model(args, args.model, model, device)

    # ------------------------------------------------------------ evaluation
    report = None
    if args.report:
        images_of = token_images(checkpoint, path, codebook, lambda numbers: val_data.batch(numbers)[0])
        report = Report(args.report, class_names(classes, checkpoint.get('classes'), names), device, args.dist_eval,
                        images_of=images_of)
    evaluate_of = recipe.make_evaluate(args, val_data, EvalTransform(codebook, size, device), device, report)

    if args.eval:
        recipe.check_evaluated(args, checkpoint, path, facts)
        evaluate_checkpoint(model, checkpoint, path, args.model_ema, evaluate_of, args.output)
        return 0

    # ------------------------------------------------------------ loss
    mixup, criterion = recipe.make_loss(args, classes)
    augment = make_augment(args, codebook, train_data.grid_size, size, device, mixup)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        x, targets = augment(*batch, generator)
        return criterion(model(x), targets)

    def order_of(epoch: int) -> np.ndarray:
        sampler = repeated_augmentation if args.repeated_aug else shuffled
        return sampler(len(train_data), world_size(), rank(), args.seed, epoch)

    def batches_of(indices: np.ndarray, epoch: int, start: int) -> Iterator:
        views = draw_views(len(train_data), train_data.views, args.seed, epoch)
        return train_data.batches(indices, args.batch_size, device, args.pin_mem, views)

    # ------------------------------------------------------------ train
    steps = recipe.count_steps(args, len(order_of(0)), args.train_token_file)  # all epochs are equally long
    # a checkpoint is loaded last, into a state that is complete: DDP has run once by then
    state = recipe.make_state(args, model, device, (codebook.shape[1], size, size), steps, facts)
    recipe.resume_run(args, state, checkpoint, path, steps)
    recipe.print_recipe_batch(args)
    files = [file for data in datasets.values() for file in data.files]
    return recipe.fit(args, state, folder, steps, order_of, batches_of, loss_of, None if args.no_eval else evaluate_of,
                      names, made_with(files, codebook, args.codebook_path))


if __name__ == '__main__':
    run(main, parse_args)
