"""The recipe: flags that several programs share, and what they make: optimizer, schedule, EMA, loss, mixing, DDP.

Flags stop here and in the entry scripts: other modules never see `args`, and `args` is never changed after parsing.
"""
import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine import StepOptions
from training.checkpoints import TrainState
from utils import InputError, autocast, world_size

# Where things lie may differ from node to node; every other flag must be the same on all ranks.
LOCATIONS = ('_file', '_path', '_dir', '_dict', '_cache')


# ---------------------------------------------------------------- flags


def check_flags(args: argparse.Namespace) -> None:
    """InputError for flags of the groups above that cannot work together."""
    checks = [
        (mixes(args) and args.batch_size % 2, f'--batch-size {args.batch_size} is odd; CutMix and Mixup want it even'),
        (args.bce_loss and (args.smoothing or not mixes(args)),
         '--bce-loss needs --smoothing 0 (any smoothing makes every target 1) and --cutmix or --mixup on'),
        (args.eval and not args.resume, '--eval needs --resume CHECKPOINT'),
        (args.eval and args.no_eval, '--eval and --no-eval exclude each other'),
    ]
    for wrong, message in checks:
        if wrong:
            raise InputError(message)
    check_output_flags(args)


def check_output_flags(args: argparse.Namespace) -> None:
    """InputError for flags that need --output-dir without it."""
    for on, flag in ((args.resume == 'auto', '--resume auto looks in'), (args.tensorboard, '--tensorboard writes to')):
        if on and not args.output_dir:
            raise InputError(f'{flag} --output-dir: give one')


def mixes(args: argparse.Namespace) -> bool:
    """Whether Mixup or CutMix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def flags_alike(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that must be the same on all ranks, by their names on the command line."""
    alike = {f'--{name.replace("_", "-")}': value for name, value in vars(args).items()
             if not name.endswith(LOCATIONS) and name not in ('finetune', 'resume', 'dist_url')}
    return alike | {'--token-cache none': vars(args).get('token_cache') == 'none'}  # no rank waits for another's then


# ---------------------------------------------------------------- what the flags make

def default_amp(device: torch.device) -> str:
    """The published precision: 'fp16' on CUDA, 'off' elsewhere."""
    return 'fp16' if device.type == 'cuda' else 'off'


def set_up_torch(args: argparse.Namespace) -> None:
    """Seed, determinism, TF32."""
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if args.tf32:
        torch.set_float32_matmul_precision('high')


def effective_batch(args: argparse.Namespace) -> int:
    """Images of one step of the optimizer, over all processes."""
    return args.batch_size * args.accum_iter * world_size()


def scaled_lr(args: argparse.Namespace) -> float:
    """The learning rate of the run: --lr is for a batch of 512, unless --unscale-lr."""
    return args.lr if args.unscale_lr else args.lr * effective_batch(args) / 512


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; no weight decay on biases, norms, position embeddings and class token."""
    options = {'betas': tuple(args.opt_betas)} if args.opt_betas else {}
    if args.opt not in ('sgd', 'nesterov', 'momentum'):
        options['eps'] = args.opt_eps
    if args.opt in ('adamw', 'adam', 'sgd', 'nesterov', 'momentum'):
        options['fused'] = True  # one kernel for all parameters, and one that skips a bad step without asking the host
    try:
        return create_optimizer_v2(model, args.opt, lr=scaled_lr(args), weight_decay=args.weight_decay,
                                   momentum=args.momentum, **options)
    except (ValueError, TypeError) as error:
        raise InputError(f'--opt {args.opt}: {error}') from None


def make_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> Any:
    """timm's schedule, a function of the epoch alone."""
    return create_scheduler_v2(
        optimizer, args.sched, args.epochs, decay_epochs=args.decay_epochs, decay_rate=args.decay_rate,
        min_lr=args.min_lr, warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs,
        noise=args.lr_noise, noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std)[0]


def make_scaler(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """Gradient scaler: fp16's dynamic one, else one of constant scale 1.

    Either skips, on the device, the step of a gradient that is not finite; with a fused optimizer the host never waits.
    """
    if amp == 'fp16':
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1., growth_interval=1 << 30)


def make_loss(args: argparse.Namespace, classes: int) -> tuple[Mixup | None, Callable]:
    """timm's Mixup, or None, and the criterion (logits (B, classes), targets) -> ()."""
    mixup = None
    if mixes(args):
        mixup = Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax,
                      prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode,
                      label_smoothing=args.smoothing, num_classes=classes)
    if args.bce_loss:
        bce = nn.BCEWithLogitsLoss()
        return mixup, lambda logits, targets: bce(logits, targets.gt(0).float())
    if mixup:
        return mixup, SoftTargetCrossEntropy()
    return mixup, LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def make_state(args: argparse.Namespace, model: nn.Module, device: torch.device,
               input_shape: tuple[int, ...]) -> TrainState:
    """The state of a new run, from a model on `device` that reads inputs (B, *input_shape)."""
    amp = args.amp or default_amp(device)
    try:
        model.set_grad_checkpointing(args.grad_checkpointing)
    except AssertionError:  # what timm says
        raise InputError(f'--model {args.model} has no gradient checkpointing; omit --grad-checkpointing') from None
    ema_device = 'cpu' if args.model_ema_force_cpu else None
    ema = ModelEmaV3(model, decay=args.model_ema_decay, device=ema_device) if args.model_ema else None
    optimizer = make_optimizer(args, model)
    x = torch.zeros(args.batch_size, *input_shape, device=device).to(memory_format=torch.channels_last)
    return TrainState(model, parallel(model, args.compile, device, amp, x), optimizer, make_scheduler(args, optimizer),
                      make_scaler(device, amp), ema, amp, epoch=args.start_epoch)


def count_steps(args: argparse.Namespace, images: int, source: str) -> int:
    """Batches an epoch for a rank that gets `images` of `source`, a multiple of --accum-iter. Raises InputError."""
    steps = images // (args.batch_size * args.accum_iter) * args.accum_iter
    if not steps:
        raise InputError(f'{source}: the {images} images of a process make no step of --batch-size {args.batch_size} x '
                         f'--accum-iter {args.accum_iter} ({world_size()} processes): lower them')
    return steps


def step_options(args: argparse.Namespace, steps: int) -> StepOptions:
    """The engine's options, for epochs of `steps` batches."""
    return StepOptions(steps, args.batch_size, args.seed, args.accum_iter, args.clip_grad, args.on_nan,
                       args.dist_timeout)


def parallel(model: nn.Module, compiled: bool, device: torch.device, amp: str, *inputs: torch.Tensor) -> nn.Module:
    """The model on `device`, by torch.compile if `compiled`, and in DDP where there are several ranks.

    Args:
        model: on the device.
        compiled: whether torch.compile comes first.
        device: of the model.
        amp: 'bf16', 'fp16' or 'off'.
        *inputs: like those of a batch, on the device.
    """
    train_model = torch.compile(model) if compiled else model
    if world_size() > 1:
        train_model = DistributedDataParallel(train_model, device_ids=[device.index] if device.type == 'cuda' else None,
                                              gradient_as_bucket_view=True)
        # DDP arranges its buckets for good after a first backward. Their layout decides in which order ranks are
        # summed, so a resumed run must not begin with another.
        with autocast(device, amp):
            train_model(*inputs).float().sum().backward()
        model.zero_grad()
    return train_model
