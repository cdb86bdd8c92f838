"""What main_mtm_pretrain.py and main_mtm_finetune.py share: flags, the input of masked-token models, their schedule.

Codes are augmented as embeddings and become codes again, because these models read and predict codes (SeiT++ sec. 3);
`make_input` is that way in one function. The learning rate is MAE's: a line from 0, then a cosine, set for each step
(`StepCosine`). Begin with one of the programs, and come here for what it calls.
"""
import os
from collections.abc import Callable
from typing import Any

import torch
from timm.data import Mixup
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

import flags
import recipe
from fileio.files import is_address
from flags import Flags, KeyValues, Parser, integer, number
from recipe import parallel
from seitpp.color_adapt import ColorChange
from seitpp.halves import TokenHalves
from seitpp.models_mtm import PATCH
from seitpp.token_adapt import FINER, TokenAdapt, crop_embeddings, load_token_adapt
from token_augment import RandomCrop, RandomResizedCrop, ReplaceSynonyms, SwapPatches, TokenEDA
from token_files.codebook import look_up, nearest_codes_of
from training.checkpoints import TrainState, without_token_adapt
from utils import InputError

# Accepted because published commands may hold them: flag -> why it changes nothing.
NO_EFFECT_ON_MTM = {
    '--num-workers': 'batches come straight from a memory map, so there are no loader processes',
    '--print-freq': 'the loss is shown every 50 steps',
    '--world-size': 'the launcher (torchrun, srun) sets it',
    '--local-rank': 'the launcher (torchrun, srun) sets it',
    '--dist-on-itp': 'start with torchrun or srun',
}


def add_token_flags(parser: Parser) -> Callable:
    """Tokens and TokenAdapt. Returns the group's add."""
    add = flags.add_token_flags(parser)
    add('--tokenadapt-path', default='weights/tokenadapt.ckpt', metavar='FILE', of_a_rank=True,
        help="a trained TokenAdapt, by which half of each batch is augmented (scripts/fit_token_adapt.py makes one); "
             "'' for none")
    return add


def add_step_flags(parser: Parser, models: list[str]) -> Callable:
    """Model, batch, schedule, precision. Returns the group's add.

    Texts of flags that main_seit.py has too are the same there: docs/flags.md lists only what differs.
    """
    add = parser.add_group('optimization')
    add('--model', help='one of ' + ', '.join(models), of_the_model=True)
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', of_the_model=True,
        help='arguments of the model, as in depth=4 embed_dim=128 num_heads=4')
    add('--batch-size', type=integer(1), default=128, exact=True, help='images of a batch of one process')
    add('--accum-iter', type=integer(1), default=1, metavar='N', exact=True,
        help='batches whose gradients make one step of the optimizer')
    add('--epochs', type=integer(1), default=400, help='how many epochs are trained')
    add('--lr', type=number(0), help='learning rate, taken as it is (default: --blr, scaled)')
    add('--blr', type=number(0), default=1.5e-4, help='learning rate that is scaled with the batch of all processes')
    add('--min-lr', type=number(0), default=0., help='learning rate at the end of the schedule')
    add('--warmup-epochs', type=integer(), default=40, help='epochs in which the learning rate rises')
    add('--weight-decay', type=number(0), default=0.05, help='weight decay; biases and norms have none')
    flags.add_precision_flags(add)
    return add


def add_augmentation_flags(parser: Parser) -> None:
    """Crops, ColorAdapt and noise, Token-EDA, which is off by default."""
    add = flags.add_token_augmentation_flags(parser)
    add('--rrc', action='store_true',
        help='make a random-resized crop of all images first, before the two halves of a batch are cropped')
    add('--src', action='store_true', help='make a plain random crop of all images first')
    parser.set_defaults(rrc_ratio=0.2, token_noise_prob=0., eda_rc_prob=0., eda_sc_prob=0.)


def add_periods_flag(add: Callable, *default: str) -> None:
    """--save-periods, added by a group's add."""
    add('--save-periods', nargs='+', default=list(default), metavar='PERIOD',
        help='which checkpoints are kept: lastN (the newest and the N before it), every_N_epochs, best')


def check_sizes(args: Flags) -> int:
    """Codes on a side that the model reads. InputError for flags of the groups above that cannot work together."""
    # the model reads whole patches of PATCH x PATCH codes
    size, rest = divmod(args.input_size, args.token_patch_size)
    if rest or size < PATCH or size % PATCH:
        raise InputError(f'--input-size {args.input_size}: give {PATCH} x --token-patch-size {args.token_patch_size}, '
                         'or a multiple of that')
    if args.rrc and args.src:
        raise InputError('--rrc and --src exclude each other')
    if args.eda_rc_prob + args.eda_sc_prob > 1:
        raise InputError('--eda-rc-prob and --eda-sc-prob add up to more than 1')
    make_color_change(args)  # raises for chances that add up to more than 1
    return size


def make_color_change(args: Flags) -> ColorChange:
    """Noise or ColorAdapt of the flags."""
    return ColorChange(args.token_noise_prob, args.token_coloradapt_prob, args.token_noise_scale, args.token_noise_std)


def make_token_eda(args: Flags, codebook: torch.Tensor, grid_size: int, device: torch.device) -> TokenEDA:
    """Token-EDA of the flags."""
    changes = []
    if args.eda_rc_prob:
        synonyms = recipe.synonyms_of(args, codebook)
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
    """(K,) int64: for each row of a codebook (K, d) the first row of its direction, mostly the row itself."""
    # nearest codes are found by direction, as the tokenizer finds them, and of equal rows the first is taken
    return nearest_codes_of(codebook.T[None, ..., None], codebook).flatten()


def make_input(args: Flags, codebook: torch.Tensor, grid_size: int, size: int,
               token_adapt: TokenAdapt | None, mixup: Mixup | None = None) -> Callable:
    """(codes (B, g, g) uint16, labels (B,), generator) -> (codes (B, size, size) int64 that the model reads, targets).

    Codes are looked up in the codebook (K, d), on the device; colors, crops and mixing change these embeddings, and
    the nearest codes are taken. With TokenAdapt this happens to the first half of a batch, see TokenHalves.
    """
    device = codebook.device
    token_eda = make_token_eda(args, codebook, grid_size, device)
    color = make_color_change(args)
    # A codebook may hold several rows of one direction, and rounding would decide which of them is the nearest code. So
    # the masked model reads and predicts the first of them: else it would be asked to guess how numbers were rounded.
    canonical = canonical_codes(codebook)
    first_crop = None
    if args.rrc or args.src:
        crop_class = RandomCrop if args.src else RandomResizedCrop
        first_crop = crop_class(codebook, grid_size, size, args.rrc_ratio, device)
        grid_size = size
    # TokenAdapt's half is cropped while it is converted, when a code is FINER x FINER positions
    crop, finer_crop = (RandomResizedCrop(codebook, finer * grid_size, finer * size, args.rrc_ratio, device)
                        for finer in (1, FINER))
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
        return canonical[codes], targets

    return torch.no_grad()(prepare)  # TokenAdapt is a network, but nothing of it is trained here


def make_state(args: Flags, model: nn.Module, optimizer: torch.optim.Optimizer, amp: str, images: int,
               inputs: tuple[torch.Tensor, ...], data: dict[str, Any] | None = None) -> TrainState:
    """The state of a new run.

    Args:
        args: the command line.
        model: on the device.
        optimizer: of its parameters.
        amp: 'bf16', 'fp16' or 'off'.
        images: of an epoch, on this rank.
        inputs: those of an example batch, with which DDP makes its buckets.
        data: see TrainState.
    """
    device = inputs[0].device
    schedule = StepCosine(optimizer, args.epochs, args.warmup_epochs, args.min_lr, images // args.batch_size,
                          recipe.count_steps(args, images, args.train_token_file))
    return TrainState(model, parallel(model, args.compile, device, amp, *inputs), optimizer, schedule,
                      recipe.make_scaler(device, amp), amp=amp, epoch=args.start_epoch, data=data or {})


def resume_run(args: Flags, state: TrainState, checkpoint: dict[str, Any] | None, path: str) -> None:
    """`recipe.resume_run`, from a checkpoint with TokenAdapt's weights in it or not."""
    if checkpoint and not args.tokenadapt_path:  # then the model has no names for these weights
        checkpoint['model'] = without_token_adapt(checkpoint['model'])
    recipe.resume_run(args, state, checkpoint, path, state.scheduler.steps)


class StepCosine(CosineLRScheduler):
    """timm's cosine, as a function of the epoch with its fraction, epoch + batch / batches.

    The engine counts the batches that make whole steps; the published program divides by all batches of an epoch.

    Args:
        optimizer: its groups may have an `lr_scale`.
        epochs: in all, with those of the warm-up.
        warmup_epochs: in which the rate rises from 0 to the optimizer's learning rate.
        min_lr: at the end.
        batches: of an epoch.
        steps: those of the batches that make whole optimizer steps, which `step_update` counts.
    """

    def __init__(self, optimizer: Optimizer, epochs: int, warmup_epochs: int, min_lr: float, batches: int, steps: int):
        cosine_batches = (epochs - warmup_epochs) * batches
        super().__init__(optimizer, max(cosine_batches, 2), min_lr, warmup_t=warmup_epochs * batches,
                         warmup_prefix=True, t_in_epochs=False)
        self.batches = batches
        self.steps = steps

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        epoch, batch = divmod(num_updates, self.steps)
        super().step_update(epoch * self.batches + batch, metric)
