"""Masked-token pre-training on token files (SeiT++, ECCV 2024, arXiv 2312.10105). It needs no labels.

One process:   python main_mtm_pretrain.py --batch-size 64 --output-dir output/pretrained
One node:      torchrun --nproc_per_node=8 main_mtm_pretrain.py --batch-size 128 --accum-iter 4 --output-dir ...

The defaults are the published recipe; `--batch-size` is per process and the learning rate scales with it. What it
leaves in --output-dir goes on in main_mtm_finetune.py. All that is not said here is as in main_seit.py: many nodes,
resuming, logs.

`main` goes from data and model to the loss, which masks patches of codes and asks for the codes under them. The model
and its masks stand in seitpp/models_mtm.py; seitpp/mtm_recipe.py has what fine-tuning shares with it.
"""
import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before installed packages of the same names
import flags
import recipe
from flags import Parser, integer, number
from samplers import draw_views, shuffled
from seitpp.halves import check_halves
from seitpp.models_mtm import MODELS, PATCH, MaskRatio, create_model, draw_masks, keep_token_adapt, masked_token_loss
from seitpp.mtm_recipe import (NO_EFFECT_ON_MTM, add_augmentation_flags, add_periods_flag, add_step_flags,
                               add_token_flags, check_sizes, make_input, make_state, open_token_adapt, resume_run)
from token_augment import check_crop
from token_dataset import TokenDataset, choose_data_device, describe, facts_of
from token_files.codebook import read_codebook
from token_files.made_with import check_made_with, made_with
from training.checkpoints import PRETRAIN, check_codes, check_origin
from training.run_folder import checkpoint_files
from utils import InputError, print0, rank, run, world_size

# Accepted because published commands may hold them: flag -> why it changes nothing.
NO_EFFECT = {
    '--train-label-file': 'pre-training needs no labels',
    '--flip': 'the half of a batch that goes through TokenAdapt is flipped half of the time, as published',
    '--affine': 'the half of a batch that goes through TokenAdapt gets affine maps half of the time, as published',
    **NO_EFFECT_ON_MTM,
}


def get_args_parser() -> Parser:
    """All flags."""
    parser = Parser('Masked-token pre-training on token files.')
    add_token_flags(parser)
    add = add_step_flags(parser, MODELS)
    add('--clip-grad', '--grad-clip', type=flags.POSITIVE,
        help='scale larger gradients down to this norm (default: no limit)')
    add = parser.add_group('masks')
    add('--mask-ratio-min', type=flags.FRACTION, default=0.4,
        help='smallest fraction of masked patches; this fraction is left out before the encoder')
    add('--mask-ratio-max', type=flags.FRACTION, default=1., help='largest fraction of masked patches, above 0')
    add('--mask-ratio-mu', type=number(), default=0.45,
        help='mean of the normal distribution that the fraction is drawn from')
    add('--mask-ratio-std', type=flags.POSITIVE, default=0.25, help='standard deviation of that distribution')
    add('--smoothing', type=flags.FRACTION, default=0.,
        help='label smoothing of the predicted codes')
    add('--bce-loss', action='store_true',
        help='binary cross-entropy with each code of the codebook, instead of cross-entropy')
    add_augmentation_flags(parser)
    add = flags.add_output_flags(parser)
    add('--start-epoch', type=integer(), default=0, help='the first epoch, from 0; --resume sets it')
    add_periods_flag(add, 'last2', 'every_200_epochs')
    parser.set_defaults(model=MODELS[0], output_dir='./output_dir')
    parser.add_no_effect(NO_EFFECT, switches=['--flip', '--affine', '--dist-on-itp'])
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError, also for values that cannot work together."""
    args = get_args_parser().parse_args(argv)
    recipe.check_output_flags(args)
    patches = (check_sizes(args) // PATCH) ** 2
    if args.tokenadapt_path:
        check_halves(args.batch_size, mixed=False)
    make_mask_ratio(args)  # raises for ratios that cannot be drawn, or mask nothing
    if math.ceil(patches * args.mask_ratio_min) == patches:
        raise InputError(f'--mask-ratio-min {args.mask_ratio_min:g} leaves the encoder none of the patches to see, '
                         f'which are {patches} of 2x2 codes: give a smaller one, or a larger --input-size')
    if args.bce_loss and args.smoothing:
        raise InputError('--bce-loss needs --smoothing 0')
    checkpoint_files(args.save_periods, args.epochs, has_best=False)
    return args


def make_mask_ratio(args: argparse.Namespace) -> MaskRatio:
    """The distribution of the fraction of masked patches."""
    return MaskRatio(args.mask_ratio_min, args.mask_ratio_max, args.mask_ratio_mu, args.mask_ratio_std)


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> int:
    """Pre-train. Returns the exit code."""
    files = checkpoint_files(args.save_periods, args.epochs, has_best=False)
    device, folder, checkpoint, path = recipe.start(args, NO_EFFECT, files=files)

    # data
    table = read_codebook(args.codebook_path)
    args = recipe.files_by_default(args, table)
    codebook = table.rows
    size = check_sizes(args)
    if checkpoint:
        check_origin(checkpoint['model'], (PRETRAIN,), path)
        check_codes(checkpoint['model'], len(codebook), path)
    token_adapt = open_token_adapt(args.tokenadapt_path, codebook, device)
    data = TokenDataset(args.train_token_file, None, len(codebook), args.token_cache, device, args.views)
    if args.val_share:
        data, held_out = data.split(args.val_share)
        print0(f'{data.files[0].name}: {len(held_out):,} of its {len(data) + len(held_out):,} images are held out')
    check_crop(size, data.grid_size, args.train_token_file)
    print0(f'train: {describe(data)}, {size}x{size} codes are read')
    check_made_with(data.files, codebook, args.codebook_path)
    facts = recipe.check_data(args, facts_of({'train': data}, codebook), checkpoint)
    choose_data_device({'train': data}, args.data_device, device)

    # model
    model = create_model(args.model, args.model_kwargs, len(codebook), size).to(device)
    amp = recipe.print_model(args, args.model, model, device)

    # loss
    mask_ratio = make_mask_ratio(args)
    prepare = make_input(args, codebook.to(device), data.grid_size, size, token_adapt)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        codes, _ = prepare(*batch, generator)
        masks = draw_masks(len(codes), (size // PATCH) ** 2, mask_ratio, generator)
        return masked_token_loss(model(codes, *masks), codes, masks.masked, args.smoothing, args.bce_loss)

    def order_of(epoch: int) -> np.ndarray:
        return shuffled(len(data), world_size(), rank(), args.seed, epoch)

    def batches_of(indices: np.ndarray, epoch: int, start: int) -> Iterator:
        views = draw_views(len(data), data.views, args.seed, epoch)
        return data.batches(indices, args.batch_size, device, args.pin_mem, views)

    # train
    lr = args.blr * recipe.effective_batch(args) / 256 if args.lr is None else args.lr  # as in MAE
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, args.weight_decay), lr, (0.9, 0.95),
                                  fused=recipe.can_fuse(model))
    # an example of a batch, with which DDP makes its buckets
    codes = torch.zeros(args.batch_size, size, size, dtype=torch.int64, device=device)
    masks = draw_masks(len(codes), (size // PATCH) ** 2, mask_ratio, torch.Generator(device))
    state = make_state(args, model, optimizer, amp, len(order_of(0)), (codes, *masks), facts)
    keep_token_adapt(model, token_adapt)  # only now, as frozen weights have no part in DDP
    resume_run(args, state, checkpoint, path)
    return recipe.fit(args, state, folder, state.scheduler.steps, order_of, batches_of, loss_of,
                      made_with=made_with(data.files, codebook, args.codebook_path))


if __name__ == '__main__':
    run(main, parse_args)
