"""Masked-token pre-training on token files (SeiT++, ECCV 2024, arXiv 2312.10105). It needs no labels.

One process:   python main_mtm_pretrain.py --batch-size 64 --output-dir output/pretrained
One node:      torchrun --nproc_per_node=8 main_mtm_pretrain.py --batch-size 128 --accum-iter 4 --output-dir ...

The defaults are the published recipe; `--batch-size` is per process and the learning rate scales with it. What it
leaves in --output-dir goes on in main_mtm_finetune.py. All that is not said here is as in main_seit.py: many nodes,
resuming, logs.
"""
import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from torch import nn

import recipe
from engine import train
from fileio.files import is_address
from flags import Parser, integer, number, print_no_effect
from models_seit import KeyValues
from parallel import parallel
from samplers import shuffled
from seitpp.color_adapt import ColorChange
from seitpp.halves import TokenHalves, check_halves
from seitpp.models_mtm import MODELS, PATCH, MaskRatio, create_model, draw_masks, keep_token_adapt, masked_token_loss
from seitpp.step_schedule import StepCosine
from seitpp.token_adapt import FINER, TokenAdapt, crop_embeddings, load_token_adapt
from token_augment import RandomCrop, RandomResizedCrop, ReplaceSynonyms, SwapPatches, TokenEDA, check_crop
from token_dataset import TokenDataset, choose_data_device
from token_files.codebook import load_codebook, load_synonyms, look_up, nearest_codes_of
from training.checkpoints import TrainState, flags_to_save, progress_of, resume
from training.loss_meter import NotFinite
from training.origins import PRETRAIN, check_codes, check_origin, without_token_adapt
from training.preemption import REQUEUE
from training.run_folder import RunFolder, RunLog, find_checkpoint
from training.run_info import print_batch, print_model, run_record
from training.save_periods import checkpoint_files
from utils import (InputError, check_same_on_all_ranks, init_distributed, keep_freed_memory, print0, rank, run,
                   world_size)

# Accepted because published commands may hold them: flag -> why it changes nothing.
NO_EFFECT_ON_MTM = {
    '--num-workers': 'batches come straight from a memory map, so there are no loader processes',
    '--print-freq': 'the loss is shown every 50 steps',
    '--world-size': 'the launcher (torchrun, srun) sets it',
    '--local-rank': 'the launcher (torchrun, srun) sets it',
    '--dist-on-itp': 'start with torchrun or srun',
}
NO_EFFECT = {
    '--train-label-file': 'pre-training needs no labels',
    '--flip': 'the half of a batch that goes through TokenAdapt is flipped half of the time, as published',
    '--affine': 'the half of a batch that goes through TokenAdapt gets affine maps half of the time, as published',
    **NO_EFFECT_ON_MTM,
}


# ---------------------------------------------------------------- flags, most of them of fine-tuning too

def add_token_flags(parser: Parser) -> Callable:
    """Tokens and TokenAdapt. Returns the group's add_argument."""
    add = parser.add_argument_group('data').add_argument
    add('--train-token-file', default='tokens/imagenet1k-train-token.data.bin.gz', metavar='FILE')
    add('--codebook-path', default='tokens/codebook.ckpt', metavar='FILE', help='only augmentation uses it')
    add('--tokenadapt-path', default='weights/tokenadapt.ckpt', metavar='FILE',
        help="TokenAdapt for half of each batch (scripts/fit_token_adapt.py makes one); '' for none")
    add('--token-synonym-dict', default='tokens/synonyms.json', metavar='FILE')
    add('--token-cache', default='', metavar='DIR',
        help="where token files are decoded to: a folder, '' for beside the token file, 'none' for memory only")
    add('--data-device', default='auto', choices=['auto', 'cpu', 'cuda'], help='where tokens live, see main_seit.py')
    add('--pin-mem', action=recipe.ON_OFF, default=True, help='copy batches to a GPU from page-locked memory')
    add('--input-size', type=integer(2), default=224,
        help='in pixels of --token-patch-size to a code: 224 / 8 = 28 codes')
    add('--token-patch-size', type=integer(1), default=8, help='pixels a code covers, on each side')
    return add


def add_step_flags(parser: Parser, models: list[str]) -> Callable:
    """Model, one of `models`, batch, schedule, precision. Returns the group's add_argument."""
    add = parser.add_argument_group('optimization').add_argument
    add('--model', help=', '.join(models))
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='its sizes, as in depth=4 embed_dim=128 num_heads=4')
    add('--batch-size', type=integer(1), default=128, help='per process')
    add('--accum-iter', type=integer(1), default=1, metavar='N', help='batches whose gradients make one step')
    add('--epochs', type=integer(1), default=400)
    add('--lr', type=number(0), help='of the run; default: from --blr')
    add('--blr', type=number(0), default=1.5e-4, help='learning rate that is scaled with the batch of all processes')
    add('--min-lr', type=number(0), default=0.)
    add('--warmup-epochs', type=integer(), default=40)
    add('--weight-decay', type=number(0), default=0.05)
    recipe.add_precision_flags(add)
    return add


def add_augmentation_flags(parser: Parser) -> Callable:
    """Crops, ColorAdapt and noise, Token-EDA. Returns the group's add_argument."""
    add = parser.add_argument_group('augmentation').add_argument
    add('--rrc-ratio', type=recipe.SHARE, default=0.2, help='smallest area of the random-resized crops')
    add('--rrc', action='store_true', help='a random-resized crop of all images first, before the halves have theirs')
    add('--src', action='store_true', help='a plain random crop of all images first')
    add('--token-coloradapt-prob', type=recipe.SHARE, default=0., help='chance of a batch to get ColorAdapt, on half')
    add('--token-noise-prob', type=recipe.SHARE, default=0., help='chance of a batch to get noise, on half of it')
    add('--token-noise-scale', type=number(0), default=1., help='deviation of the noise a channel shares')
    add('--token-noise-std', type=number(0), default=1., help='deviation of the noise of each element')
    add('--eda-rc-prob', type=recipe.SHARE, default=0., help='share of images with synonym replacement')
    add('--token-synonym-thres', type=integer(1), default=5, help='how many of each synonym list are used')
    add('--replace-token-prob', type=recipe.SHARE, default=0.25, help='of each code in such an image')
    add('--eda-sc-prob', type=recipe.SHARE, default=0., help='share of images with two patches swapped')
    add('--swap-token-scale', type=recipe.SHARE, default=0.25, help="largest side of a patch, as a part of the grid's")
    return add


def add_periods_flag(add: Callable, *default: str) -> None:
    """--save-periods, added by a group's add_argument."""
    add('--save-periods', nargs='+', default=list(default), metavar='PERIOD',
        help='checkpoints to keep: lastN (the newest and N before it), every_N_epochs, best')


def check_sizes(args: argparse.Namespace) -> int:
    """Codes on a side that the model reads. InputError for flags of the groups above that cannot work together."""
    size, rest = divmod(args.input_size, args.token_patch_size)
    if rest or size < PATCH or size % PATCH:
        raise InputError(f'--input-size {args.input_size}: give {PATCH} x --token-patch-size {args.token_patch_size}, '
                         'or a multiple of that')
    if args.rrc and args.src:
        raise InputError('--rrc and --src exclude each other')
    if args.eda_rc_prob + args.eda_sc_prob > 1:
        raise InputError('--eda-rc-prob and --eda-sc-prob add up to more than 1')
    make_color_change(args)
    return size


def get_args_parser() -> Parser:
    """All flags."""
    parser = Parser('Masked-token pre-training on token files.')
    add_token_flags(parser)
    add = add_step_flags(parser, MODELS)
    add('--clip-grad', '--grad-clip', type=recipe.POSITIVE, help='largest gradient norm')
    add = parser.add_argument_group('masks').add_argument
    add('--mask-ratio-min', type=recipe.SHARE, default=0.4, help='smallest; also the share the encoder never sees')
    add('--mask-ratio-max', type=recipe.SHARE, default=1., help='largest')
    add('--mask-ratio-mu', type=number(), default=0.45, help='mean of the normal that ratios are drawn from')
    add('--mask-ratio-std', type=recipe.POSITIVE, default=0.25, help='deviation of it')
    add('--smoothing', type=recipe.SHARE, default=0., help='label smoothing of codes')
    add('--bce-loss', action='store_true', help='binary cross-entropy of each code')
    add_augmentation_flags(parser)
    add = recipe.add_output_flags(parser)
    add('--start-epoch', type=integer(), default=0)
    add_periods_flag(add, 'last2', 'every_200_epochs')
    parser.set_defaults(model=MODELS[0], output_dir='./output_dir')
    parser.add_no_effect(NO_EFFECT, switches=['--flip', '--affine', '--dist-on-itp'])
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError, also for values that cannot work together."""
    args = get_args_parser().parse_args(argv)
    recipe.check_output_flags(args)
    check_sizes(args)
    if args.tokenadapt_path:
        check_halves(args.batch_size, mixed=False)
    make_mask_ratio(args)
    if args.bce_loss and args.smoothing:
        raise InputError('--bce-loss needs --smoothing 0')
    checkpoint_files(args.save_periods, args.epochs, has_best=False)
    return args


def make_mask_ratio(args: argparse.Namespace) -> MaskRatio:
    """What the ratio of masked patches is drawn from."""
    return MaskRatio(args.mask_ratio_min, args.mask_ratio_max, args.mask_ratio_mu, args.mask_ratio_std)


# ---------------------------------------------------------------- input

def make_color_change(args: argparse.Namespace) -> ColorChange:
    """Noise or ColorAdapt of the flags."""
    return ColorChange(args.token_noise_prob, args.token_coloradapt_prob, args.token_noise_scale, args.token_noise_std)


def make_token_eda(args: argparse.Namespace, codes: int, grid_size: int, device: torch.device) -> TokenEDA:
    """Token-EDA of the flags."""
    changes = []
    if args.eda_rc_prob:
        synonyms = load_synonyms(args.token_synonym_dict, codes, args.token_synonym_thres)
        changes.append((args.eda_rc_prob, ReplaceSynonyms(*synonyms, args.replace_token_prob, device)))
    if args.eda_sc_prob:
        changes.append((args.eda_sc_prob, SwapPatches(grid_size, args.swap_token_scale, device)))
    return TokenEDA(changes)


def open_token_adapt(path: str, codebook: torch.Tensor, device: torch.device) -> TokenAdapt | None:
    """--tokenadapt-path, on the device, or None for ''. Raises InputError."""
    if not path:
        return None
    if not (is_address(path) or os.path.exists(path)):
        raise InputError(f"{path}: there is no such TokenAdapt: name the published tokenadapt.ckpt, make one with "
                         "scripts/fit_token_adapt.py, or give --tokenadapt-path '' to train without")
    return load_token_adapt(path, codebook).to(device)


def canonical_codes(codebook: torch.Tensor) -> torch.Tensor:
    """(K,) int64: for each row of a codebook (K, d) the first row of its direction, mostly itself."""
    return nearest_codes_of(codebook.T[None, ..., None], codebook).flatten()


def make_input(args: argparse.Namespace, codebook: torch.Tensor, grid_size: int, size: int,
               token_adapt: TokenAdapt | None, mixup: Mixup | None = None) -> Callable:
    """(codes (B, g, g) uint16, labels (B,), generator) -> (codes (B, size, size) int64 that the model reads, targets).

    Codes are looked up in the codebook (K, d), on the device; colors, crops and mixing change these embeddings, and
    the nearest codes are taken. With TokenAdapt this happens to the first half of a batch, see TokenHalves.
    """
    device = codebook.device
    token_eda = make_token_eda(args, len(codebook), grid_size, device)
    color = make_color_change(args)
    same = canonical_codes(codebook)
    first_crop = None
    if args.rrc or args.src:
        kind = RandomCrop if args.src else RandomResizedCrop
        first_crop = kind(codebook, grid_size, size, args.rrc_ratio, device)
        grid_size = size
    crop, finer_crop = (RandomResizedCrop(codebook, n * grid_size, n * size, args.rrc_ratio, device)
                        for n in (1, FINER))
    halves = TokenHalves(token_adapt, codebook, crop, finer_crop, mixup) if token_adapt else None

    def prepare(codes: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple:
        codes = token_eda(codes.long(), generator)
        x = first_crop(codes, generator) if first_crop else look_up(codes, codebook)
        x = color(x, generator)  # (B, d, g, g)
        if halves:
            codes, targets = halves.codes(x, labels, generator)
        else:
            x = crop_embeddings(x, crop.draw(len(x), generator), size)
            x, targets = mixup(x, labels) if mixup else (x, labels)
            codes = nearest_codes_of(x, codebook)
        return same[codes], targets

    return torch.no_grad()(prepare)


# ---------------------------------------------------------------- the program

def make_state(args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer, amp: str, images: int,
               inputs: tuple[torch.Tensor, ...]) -> TrainState:
    """The state of a new run.

    Args:
        args: the command line.
        model: on the device.
        optimizer: of its parameters.
        amp: 'bf16', 'fp16' or 'off'.
        images: of an epoch, on this rank.
        inputs: a batch for the model.
    """
    device = inputs[0].device
    schedule = StepCosine(optimizer, args.epochs, args.warmup_epochs, args.min_lr, images // args.batch_size,
                          recipe.count_steps(args, images, args.train_token_file))
    return TrainState(model, parallel(model, args.compile, device, amp, *inputs), optimizer, schedule,
                      recipe.make_scaler(device, amp), amp=amp, epoch=args.start_epoch)


def resume_checked(args: argparse.Namespace, state: TrainState, checkpoint: dict[str, Any], path: str) -> None:
    """Resume from a checkpoint, with TokenAdapt in it or not."""
    if not args.tokenadapt_path:
        checkpoint['model'] = without_token_adapt(checkpoint['model'])
    resume(state, checkpoint, path, vars(args), state.scheduler.steps)
    print0(f'{path}: resumed at epoch {state.epoch}, step {state.step}')


def main(args: argparse.Namespace) -> int:
    """Pre-train. Returns the exit code."""
    # set-up
    device = init_distributed(args.device, args.dist_url, args.dist_timeout)
    check_same_on_all_ranks(recipe.flags_alike(args))
    print_no_effect(NO_EFFECT, vars(args))
    recipe.set_up_torch(args)
    files = checkpoint_files(args.save_periods, args.epochs, has_best=False)
    folder = RunFolder(args.output_dir, args.save_every, files=files)
    checkpoint, path = find_checkpoint(args.output_dir, args.resume, files=files)

    # data
    codebook = load_codebook(args.codebook_path)
    size = check_sizes(args)
    if checkpoint:
        check_origin(checkpoint['model'], (PRETRAIN,), path)
        check_codes(checkpoint['model'], len(codebook), path)
    token_adapt = open_token_adapt(args.tokenadapt_path, codebook, device)
    data = TokenDataset(args.train_token_file, None, len(codebook), args.token_cache, device)
    check_crop(size, data.grid_size)
    print0(f'train: {len(data):,} images of {data.grid_size}x{data.grid_size} codes, {size}x{size} codes are read')
    check_same_on_all_ranks({'training images': len(data), 'codebook': tuple(codebook.shape),
                             **progress_of(checkpoint)})
    choose_data_device({'train': data}, args.data_device, device)
    keep_freed_memory(device)

    # model
    model = create_model(args.model, args.model_kwargs, len(codebook), size).to(device)
    amp = args.amp or recipe.default_amp(device)
    print_model(args.model, model, device, amp)

    # loss
    mask_ratio = make_mask_ratio(args)
    prepare = make_input(args, codebook.to(device), data.grid_size, size, token_adapt)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        codes, _ = prepare(*batch, generator)
        masks = draw_masks(len(codes), (size // PATCH) ** 2, mask_ratio, generator)
        return masked_token_loss(model(codes, *masks), codes, masks.masked, args.smoothing, args.bce_loss)

    def indices_of(epoch: int, start: int, stop: int) -> np.ndarray:
        order = shuffled(len(data), world_size(), rank(), args.seed, epoch)
        return order[start * args.batch_size:stop * args.batch_size]

    def batches_of(epoch: int, start: int) -> Iterator:
        return data.batches(indices_of(epoch, start, steps), args.batch_size, device, args.pin_mem)

    # optimizer and resume
    rank_images = len(shuffled(len(data), world_size(), rank(), args.seed, 0))
    lr = args.blr * recipe.effective_batch(args) / 256 if args.lr is None else args.lr
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, args.weight_decay), lr, (0.9, 0.95), fused=True)
    codes = torch.zeros(args.batch_size, size, size, dtype=torch.int64, device=device)
    masks = draw_masks(len(codes), (size // PATCH) ** 2, mask_ratio, torch.Generator(device))
    state = make_state(args, model, optimizer, amp, rank_images, (codes, *masks))
    steps = state.scheduler.steps
    keep_token_adapt(model, token_adapt)  # only now: it has no part in DDP
    if checkpoint:
        resume_checked(args, state, checkpoint, path)
        del checkpoint  # its tensors are copied
    print_batch(args.batch_size, args.accum_iter, steps, args.epochs, lr)

    # train
    folder.begin(run_record(vars(args), device), {'args': flags_to_save(vars(args)), 'classes': None})
    log = RunLog(args.output_dir, state.epoch, args.tensorboard)
    try:
        finished = train(state, batches_of, loss_of, None, folder, log, args.epochs, recipe.step_options(args, steps))
    except NotFinite as error:
        folder.save_bad_step(error, rank(), args.seed, indices_of(error.epoch, error.step, error.step + 1).tolist())
        raise
    return 0 if finished else REQUEUE


if __name__ == '__main__':
    run(main, parse_args)
