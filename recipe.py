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

from checkpoints import TrainState
from engine import StepOptions
from flags import SEED, Parser, integer, number
from models_patch_stem import MODELS
from models_seit import KeyValues
from parallel import parallel
from utils import InputError, world_size

ON_OFF = argparse.BooleanOptionalAction
SHARE = number(0, 1)
POSITIVE = number(1e-12)
# Where things lie may differ from node to node; every other flag must be the same on all ranks.
LOCATIONS = ('_file', '_path', '_dir', '_dict', '_cache')


# ---------------------------------------------------------------- flags

def add_model_flags(parser: Parser, default: str = 'deit_base_token_32', names: str = ', '.join(MODELS)) -> None:
    """The model, of those that `names` tells, its regularization and its average."""
    add = parser.add_argument_group('model').add_argument
    add('--model', default=default, help=names)
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help="timm's arguments of the model, as in depth=4 embed_dim=128 num_heads=4")
    add('--drop', type=SHARE, default=0., help='dropout rate')
    add('--drop-path', type=SHARE, default=0.1, help='stochastic depth rate')
    add_average_flags(add)
    add('--finetune', default='', metavar='FILE',
        help='start from these weights (a path, or an https address, which may end in #sha256=HEX)')
    add('--attn-only', action='store_true', help='train only attention, head and position embeddings')


def add_average_flags(add: Callable) -> None:
    """The average of the weights, and memory for time, added by a group's add_argument."""
    add('--model-ema', action=ON_OFF, default=True, help='keep and evaluate an average of the weights')
    add('--model-ema-decay', type=SHARE, default=0.99996)
    add('--model-ema-force-cpu', action='store_true', help='keep the average in host memory')
    add('--grad-checkpointing', action='store_true', help='recompute activations: less memory, more time')


def add_optimization_flags(parser: Parser) -> None:
    """Batch, optimizer, schedule, precision, classification loss."""
    add = add_step_flags(parser)
    add('--smoothing', type=SHARE, default=0.1, help='label smoothing')
    add('--bce-loss', action='store_true', help='binary cross-entropy; needs --smoothing 0 and CutMix or Mixup')


def add_step_flags(parser: Parser) -> Callable:
    """Batch, optimizer, schedule, precision. Returns the group's add_argument."""
    add = parser.add_argument_group('optimization').add_argument
    add('--batch-size', type=integer(1), default=64, help='per process')
    add('--accum-iter', type=integer(1), default=1, metavar='N',
        help='batches whose gradients make one step; counts towards the batch the learning rate is scaled by')
    add('--epochs', type=integer(1), default=300)
    add('--opt', default='adamw', help="timm's optimizers")
    add('--opt-eps', type=number(0), default=1e-8)
    add('--opt-betas', type=number(0, 1), nargs=2, help="default: the optimizer's own")
    add('--clip-grad', type=POSITIVE, help='largest gradient norm')
    add('--momentum', type=number(0), default=0.9)
    add('--weight-decay', type=number(0), default=0.1)
    add('--sched', default='cosine', choices=['cosine', 'tanh', 'step', 'poly'])
    add('--lr', type=number(0), default=7.5e-4, help='for a batch of 512 over all processes')
    add('--unscale-lr', action='store_true', help='take --lr as it is, whatever the batch')
    add('--lr-noise', type=number(), nargs='+', metavar='PCT', help='parts of all epochs between which lr is noisy')
    add('--lr-noise-pct', type=number(1e-3), default=0.67, help='largest change of lr, as a part of it')
    add('--lr-noise-std', type=number(), default=1.)
    add('--warmup-lr', type=number(0), default=1e-6)
    add('--min-lr', type=number(0), default=1e-5)
    add('--decay-epochs', type=POSITIVE, default=30, help='step schedule')
    add('--warmup-epochs', type=integer(), default=5)
    add('--decay-rate', '--dr', type=number(0), default=0.1, help='step schedule; the power of poly')
    add_precision_flags(add)
    return add


def add_precision_flags(add: Callable) -> None:
    """Precision and compiling, added by a group's add_argument."""
    add('--amp', choices=['bf16', 'fp16', 'off'], help='mixed precision (default: fp16 on CUDA, off on CPU)')
    add('--tf32', action='store_true', help='TF32 for what stays in float32 (CUDA)')
    add('--compile', action='store_true', help='torch.compile the model')


def add_mixing_flags(parser: Parser) -> None:
    """Mixup and CutMix."""
    add = parser.add_argument_group('mixing').add_argument
    add('--mixup', type=number(0), default=0., help='Mixup alpha')
    add('--cutmix', type=number(0), default=1., help='CutMix alpha')
    add('--cutmix-minmax', type=SHARE, nargs=2, help='CutMix side range; overrides alpha')
    add('--mixup-prob', type=SHARE, default=1., help='of mixing a batch at all')
    add('--mixup-switch-prob', type=SHARE, default=0.5, help='of CutMix where both are on')
    add('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'])


def add_run_flags(parser: Parser) -> None:
    """Output, resuming, device, processes, evaluation."""
    add = add_output_flags(parser)
    add('--start-epoch', type=integer(), default=0)
    add('--eval', action='store_true', help='only evaluate --resume')
    add('--output', default='', metavar='FILE.json', help='with --eval: write the numbers there, too')
    add('--dist-eval', action='store_true', help='share the validation images over the ranks, each on exactly one')
    add('--no-eval', action='store_true', help='train without evaluating')


def add_output_flags(parser: Parser) -> Callable:
    """Output, resuming, device, processes. Returns the group's add_argument."""
    add = parser.add_argument_group('run').add_argument
    add('--output-dir', default='', metavar='DIR', help="checkpoints and log.txt; '' saves nothing")
    add('--resume', default='', metavar='FILE',
        help="resume from a checkpoint (a path, or an https address, which may end in #sha256=HEX), or 'auto' for "
             'the newest in --output-dir')
    add('--allow-inexact-resume', action='store_true', help='resume although processes, batch or seed are others')
    add('--save-every', type=save_interval, metavar='N', help='a checkpoint every N steps, or Nm minutes, too')
    add('--on-nan', default='stop', choices=['stop', 'skip'], help='what to do about a loss that is not finite')
    add('--deterministic', action='store_true', help='deterministic algorithms on CUDA, for resuming bit by bit')
    add('--device', default='auto', help='auto (CUDA where there is one), cuda, cuda:N or cpu')
    add('--seed', type=SEED, default=0)
    add('--tensorboard', action='store_true', help='write scalars to --output-dir (needs the tensorboard package)')
    add('--dist-url', default='env://', help="torch.distributed's init method")
    add('--dist-timeout', type=number(1e-3, 1e6), default=10, metavar='MINUTES',
        help='a process that waits so long for another ends: a host was cut off')
    return add


def save_interval(text: str) -> tuple[float, str]:
    """'500' -> (500, 'steps'); '30m' -> (30.0, 'minutes')."""
    if text.endswith('m'):
        return POSITIVE(text[:-1]), 'minutes'
    return integer(1)(text), 'steps'


def check_flags(args: argparse.Namespace) -> None:
    """InputError for flags of the groups above that cannot work together."""
    checks = [
        (mixes(args) and args.batch_size % 2, f'--batch-size {args.batch_size} is odd; CutMix and Mixup want it even'),
        (args.bce_loss and (args.smoothing or not mixes(args)),
         '--bce-loss needs --smoothing 0 (any smoothing makes every target 1) and --cutmix or --mixup on'),
        (args.eval and not args.resume, '--eval needs --resume CHECKPOINT'),
        (args.eval and args.no_eval, '--eval and --no-eval exclude each other'),
        (args.output and not args.eval, '--output belongs to --eval; training writes to --output-dir'),
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
