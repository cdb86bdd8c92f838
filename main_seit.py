"""Train and evaluate a ViT on token files (SeiT, ICCV 2023, arXiv 2303.11114).

One process:   python main_seit.py --device cpu --batch-size 64 ...
One node:      torchrun --nproc_per_node=8 main_seit.py --batch-size 128 --dist-eval ...
Many nodes:    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 main_seit.py ...
SLURM:         srun --ntasks-per-node=8 --gpus-per-node=8 python main_seit.py ...
Evaluate:      python main_seit.py --eval --resume output/best_checkpoint.pth ...

The defaults are the published recipe; `--batch-size` is per process and the learning rate scales with it.
"""
import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import timm
import torch
from timm.data import Mixup
from timm.layers import resample_abs_pos_embed
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from checkpoints import (REQUEUE, Checkpoints, StopSignal, TrainState, Vote, check_exact, find_checkpoint,
                         load_checkpoint, load_weights)
from engine import (LossMeter, NotFinite, autocast, check_finite, default_amp, evaluate, make_scaler, own_share,
                    train_one_epoch)
from models_seit import MODELS, KeyValues, create_model
from samplers import repeated_augmentation, shuffled
from token_augment import EvalTransform, TrainAugment, check_crop
from token_dataset import TokenDataset, load_codebook, load_synonyms
from utils import (InputError, RunLog, barrier, init_distributed, is_main, keep_freed_memory, parse_flags, rank, run,
                   say, say_no_effect, world_size, write_text)

VERSIONS = {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__}
ON_OFF = argparse.BooleanOptionalAction
# Accepted because published commands may hold them: flag -> why it changes nothing.
NO_EFFECT = {
    '--vit-patch-size': 'the stem-adaptor fixes the patches',
    '--use-entire-tokens': 'it had none in the published program either',
    '--eval-crop-ratio': 'evaluation takes the centre crop of --input-size',
    '--cooldown-epochs': 'exactly --epochs epochs run, as in the published program',
    '--patience-epochs': 'it belongs to the plateau schedule, which never worked in the published program',
    '--num-workers': 'batches come straight from a memory map, so there are no loader processes',
    '--world-size': 'the launcher (torchrun, srun) sets it',
}
# What flags may be: (least, most, in words, flags).
RANGES = (
    (1, float('inf'), '1 or more', ('batch_size', 'epochs', 'accum_iter', 'token_patch_size', 'token_synonym_thres')),
    (0, float('inf'), '0 or more', ('seed', 'start_epoch', 'warmup_epochs', 'weight_decay', 'token_noise_scale',
                                    'token_noise_std', 'mixup', 'cutmix')),
    (0, 1, 'between 0 and 1', ('drop', 'drop_path', 'model_ema_decay', 'smoothing', 'eda_rc_prob', 'eda_sc_prob',
                               'eda_erase_prob', 'replace_token_prob', 'token_noise_prob', 'rrc_ratio', 'mixup_prob',
                               'mixup_switch_prob', 'swap_token_scale', 'erase_scale')),
)


def get_args_parser():
    """All flags; `parse_args` also takes them with underscores."""
    parser = argparse.ArgumentParser(description='Train and evaluate SeiT on token files.', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    group = parser.add_argument_group('data')
    add = group.add_argument
    add('--train-token-file', default='tokens/imagenet1k-train-token.data.bin.gz', metavar='FILE')
    add('--train-label-file', default='tokens/imagenet1k-train-label.txt', metavar='FILE')
    add('--val-token-file', default='tokens/imagenet1k-val-token.data.bin.gz', metavar='FILE')
    add('--val-label-file', default='tokens/imagenet1k-val-label.txt', metavar='FILE')
    add('--codebook-path', default='tokens/codebook.ckpt', metavar='FILE')
    add('--token-synonym-dict', default='tokens/synonyms.json', metavar='FILE')
    add('--token-cache', default='', metavar='DIR',
        help="where token files are decoded to: a folder, '' for beside the token file, 'none' for memory only")
    add('--data-device', default='auto', choices=['auto', 'cpu', 'cuda'],
        help='where tokens live: all on the GPU, or in the map; auto: on the GPU if they take a quarter of its free '
        'memory at most')
    add('--nb-classes', type=int, help='default: the largest label + 1, or what the checkpoint has under --eval')
    add('--pin-mem', action=ON_OFF, default=True, help='copy batches to a GPU from page-locked memory')

    group = parser.add_argument_group('model')
    add = group.add_argument
    add('--model', default='deit_base_token_32', help=', '.join(MODELS))
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='arguments of timm\'s VisionTransformer, as in depth=4 embed_dim=128 num_heads=4')
    add('--input-size', type=int, default=224, help='in pixels of --token-patch-size to a code: 224 / 8 = 28 codes')
    add('--token-patch-size', type=int, default=8, help='pixels a code covers, on each side')
    add('--drop', type=float, default=0., help='dropout rate')
    add('--drop-path', type=float, default=0.1, help='stochastic depth rate')
    add('--model-ema', action=ON_OFF, default=True, help='keep and evaluate an average of the weights')
    add('--model-ema-decay', type=float, default=0.99996)
    add('--model-ema-force-cpu', action='store_true', help='keep the average in host memory')
    add('--finetune', default='', metavar='FILE',
        help='start from these weights (a path, or an https address, which may end in #sha256=HEX)')
    add('--grad-checkpointing', action='store_true', help='recompute activations: less memory, more time')
    add('--attn-only', action='store_true', help='train only attention, head and position embeddings')

    group = parser.add_argument_group('optimisation')
    add = group.add_argument
    add('--batch-size', type=int, default=64, help='per process')
    add('--accum-iter', type=int, default=1, metavar='N', help='batches whose gradients make one step; counts towards '
        'the batch the learning rate is scaled by')
    add('--epochs', type=int, default=300)
    add('--opt', default='adamw', help="timm's optimisers")
    add('--opt-eps', type=float, default=1e-8)
    add('--opt-betas', type=float, nargs=2, help="default: the optimiser's own")
    add('--clip-grad', type=float, help='largest gradient norm')
    add('--momentum', type=float, default=0.9)
    add('--weight-decay', type=float, default=0.1)
    add('--sched', default='cosine', choices=['cosine', 'tanh', 'step', 'poly'])
    add('--lr', type=float, default=7.5e-4, help='for a batch of 512 over all processes')
    add('--unscale-lr', action='store_true', help='take --lr as it is, whatever the batch')
    add('--lr-noise', type=float, nargs='+', metavar='PCT', help='epochs (as parts of all) between which lr is noisy')
    add('--lr-noise-pct', type=float, default=0.67)
    add('--lr-noise-std', type=float, default=1.)
    add('--warmup-lr', type=float, default=1e-6)
    add('--min-lr', type=float, default=1e-5)
    add('--decay-epochs', type=float, default=30, help='step schedule')
    add('--warmup-epochs', type=int, default=5)
    add('--decay-rate', '--dr', type=float, default=0.1, help='step schedule; the power of poly')
    add('--smoothing', type=float, default=0.1, help='label smoothing')
    add('--bce-loss', action='store_true', help='binary cross-entropy; needs --smoothing 0 and CutMix or Mixup')
    add('--amp', choices=['bf16', 'fp16', 'off'], help='mixed precision (default: fp16 on CUDA, off on CPU)')
    add('--tf32', action='store_true', help='TF32 for what stays in float32 (CUDA)')
    add('--compile', action='store_true', help='torch.compile the model and the crop')

    group = parser.add_argument_group('augmentation')
    add = group.add_argument
    add('--eda-rc-prob', type=float, default=0.25, help='share of images with synonym replacement')
    add('--token-synonym-thres', type=int, default=5, help='how many of each synonym list are used')
    add('--replace-token-prob', type=float, default=0.25, help='of each code in such an image')
    add('--eda-sc-prob', type=float, default=0.25, help='share of images with two patches swapped')
    add('--swap-token-scale', type=float, default=0.25, help="largest side of a patch, as a part of the grid's")
    add('--eda-erase-prob', type=float, default=0., help='share of images with a rectangle erased')
    add('--erase-scale', type=float, default=0.25, help="its largest sides, as parts of the grid's")
    add('--rrc-ratio', type=float, default=0.08, help='smallest area of the random-resized crop')
    add('--src', action='store_true', help='a plain random crop instead')
    add('--repeated-aug', action='store_true', help='repeated augmentation: each image three times running')
    add('--token-noise-prob', type=float, default=0.5, help='part of each batch that gets embedding noise')
    add('--token-noise-scale', type=float, default=1., help='deviation of the noise a channel shares')
    add('--token-noise-std', type=float, default=1., help='deviation of the noise of each element')
    add('--mixup', type=float, default=0., help='Mixup alpha')
    add('--cutmix', type=float, default=1., help='CutMix alpha')
    add('--cutmix-minmax', type=float, nargs=2, help='CutMix side range; overrides alpha')
    add('--mixup-prob', type=float, default=1., help='of mixing a batch at all')
    add('--mixup-switch-prob', type=float, default=0.5, help='of CutMix where both are on')
    add('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'])

    group = parser.add_argument_group('run')
    add = group.add_argument
    add('--output-dir', default='', metavar='DIR', help="checkpoints and log.txt; '' saves nothing")
    add('--resume', default='', metavar='FILE',
        help="continue from a checkpoint (a path, or an https address, which may end in #sha256=HEX), or 'auto' for "
             'the newest in --output-dir')
    add('--allow-inexact-resume', action='store_true',
        help='continue although the number of processes, the batch or the seed is another')
    add('--save-every', type=save_interval, metavar='N', help='a checkpoint every N steps, or Nm minutes, too')
    add('--on-nan', default='stop', choices=['stop', 'skip'], help='what to do about a loss that is not finite')
    add('--deterministic', action='store_true', help='deterministic algorithms on CUDA, for resuming bit by bit')
    add('--start-epoch', type=int, default=0)
    add('--eval', action='store_true', help='only evaluate --resume')
    add('--dist-eval', action='store_true', help='share the validation images over the ranks, each on exactly one')
    add('--no-eval', action='store_true', help='train without evaluating')
    add('--device', default='cuda', help='cuda or cpu')
    add('--seed', type=int, default=0)
    add('--tensorboard', action='store_true', help='write scalars to --output-dir (needs the tensorboard package)')
    add('--dist-url', default='env://', help="torch.distributed's init method")
    add('--dist-timeout', type=float, default=10, metavar='MINUTES',
        help='a process that waits so long for another ends: a host was cut off')

    group = parser.add_argument_group('accepted, without effect')
    for flag, why in NO_EFFECT.items():
        group.add_argument(flag, help=why, **({'action': 'store_true'} if 'entire' in flag else {}))
    return parser


def save_interval(word):
    """'500' -> (500, 'steps'); '30m' -> (30.0, 'minutes')."""
    value, unit = (float(word[:-1]), 'minutes') if word.endswith('m') else (int(word), 'steps')
    if value <= 0:
        raise ValueError
    return value, unit


def parse_args(words=None):
    """The command line, with `_` and `-` in flags alike. Raises InputError for values that cannot work together."""
    args = parse_flags(get_args_parser(), words)
    for least, most, bounds, names in RANGES:
        for name in names:
            if not least <= getattr(args, name) <= most:
                raise InputError(f'--{name.replace("_", "-")} {getattr(args, name)}: choose a value {bounds}')
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    low, high = args.cutmix_minmax or (0, 1)
    checks = [
        (not 0 < args.dist_timeout < 1e6, f'--dist-timeout {args.dist_timeout}: give minutes, more than 0'),
        (args.input_size % args.token_patch_size or args.input_size < 2 * args.token_patch_size,
         f'--input-size {args.input_size} is no multiple of --token-patch-size {args.token_patch_size}, or too small'),
        (mixing and args.batch_size % 2, f'--batch-size {args.batch_size} is odd; CutMix and Mixup want it even'),
        (args.bce_loss and (args.smoothing or not mixing),
         '--bce-loss needs --smoothing 0 (any smoothing makes every target 1) and --cutmix or --mixup on'),
        (not 0 <= low < high <= 1, f'--cutmix-minmax {low} {high}: give two rising shares between 0 and 1'),
        (args.eval and not args.resume, '--eval needs --resume CHECKPOINT'),
        (args.eval and args.no_eval, '--eval and --no-eval exclude each other'),
        (args.resume == 'auto' and not args.output_dir, '--resume auto looks in --output-dir: give one'),
        (args.tensorboard and not args.output_dir, '--tensorboard writes to --output-dir: give one'),
    ]
    for wrong, message in checks:
        if wrong:
            raise InputError(message)
    return args


# ---------------------------------------------------------------- data

def load_split(args, split, codebook):
    """The TokenDataset of 'train' or 'val'."""
    return TokenDataset(getattr(args, f'{split}_token_file'), getattr(args, f'{split}_label_file'), len(codebook),
                        args.token_cache)


def count_classes(args, datasets, checkpoint):
    """Classes of the head: --nb-classes, the checkpoint's under --eval, or the largest training label + 1."""
    known = args.nb_classes
    if known is None and args.eval:
        known = len(checkpoint['model'].get('head.bias', ()))
    if known is None:
        known = int(datasets['train'].labels.max()) + 1
    for split, dataset in datasets.items():
        largest = int(dataset.labels.max())
        if largest >= known:
            raise InputError(f'{getattr(args, split + "_label_file")}: holds class {largest}, but there are {known} '
                             'classes (0 to {}): fix the labels or give --nb-classes'.format(known - 1))
    return known


def place_data(args, datasets, device):
    """--data-device: keep the tokens on the GPU, or leave them in the map. Prints what was chosen, and why."""
    if args.data_device == 'cuda' and device.type != 'cuda':
        raise InputError(f'--data-device cuda needs --device cuda, not {device}')
    if device.type != 'cuda' or args.data_device == 'cpu':
        return
    needed, free = sum(data.codes.nbytes for data in datasets.values()), torch.cuda.mem_get_info(device)[0]
    resident = args.data_device == 'cuda' or needed <= free / 4
    say(f'data: {needed / 1e9:.2f} GB of tokens, {free / 1e9:.1f} GB free on the GPU: '
        + ('they live there' if resident else 'they stay in the memory map'))
    if resident:
        for data in datasets.values():
            data.keep_on(device)


def make_augment(args, codebook, grid, size, device):
    synonyms = None
    if args.eda_rc_prob:
        synonyms = load_synonyms(args.token_synonym_dict, len(codebook), args.token_synonym_thres)
    return TrainAugment(
        codebook, synonyms, grid, size, device, rc_prob=args.eda_rc_prob, sc_prob=args.eda_sc_prob,
        erase_prob=args.eda_erase_prob, replace_prob=args.replace_token_prob, swap_scale=args.swap_token_scale,
        erase_scale=args.erase_scale, rrc_ratio=args.rrc_ratio, simple_crop=args.src,
        noise_prob=args.token_noise_prob, noise_scale=args.token_noise_scale, noise_std=args.token_noise_std)


# ---------------------------------------------------------------- model, optimiser, loss

def finetune(model, path):
    """Start from other weights: a head or stem of another shape is dropped, position embeddings are resampled."""
    state, own = dict(load_checkpoint(path)['model']), model.state_dict()
    for key in [key for key in own if key.startswith(('head.', 'patch_embed.'))]:
        if key not in state or state[key].shape != own[key].shape:
            say(f'--finetune: {key} starts anew (in the file: {tuple(state[key].shape) if key in state else "none"})')
            state[key] = own[key]
    if 'pos_embed' in state and state['pos_embed'].shape != own['pos_embed'].shape:
        side = int(round((own['pos_embed'].shape[1] - 1) ** 0.5))
        state['pos_embed'] = resample_abs_pos_embed(state['pos_embed'], [side, side], antialias=False)
    load_weights(model, state, path)


def freeze_all_but_attention(model):
    """--attn-only: attention, head and position embeddings train, nothing else."""
    for name, value in model.named_parameters():
        value.requires_grad = '.attn.' in name or name.startswith('head.') or name == 'pos_embed'


def make_optimizer(args, model):
    """timm's optimiser; no weight decay on biases, norms, position embeddings and class token."""
    betas = {'betas': tuple(args.opt_betas)} if args.opt_betas else {}
    eps = {} if args.opt in ('sgd', 'nesterov', 'momentum') else {'eps': args.opt_eps}
    # one kernel for all parameters, and one that skips a bad step without asking the host
    fused = {'fused': True} if args.opt in ('adamw', 'adam', 'sgd', 'nesterov', 'momentum') else {}
    try:
        return create_optimizer_v2(model, args.opt, lr=args.lr, weight_decay=args.weight_decay,
                                   momentum=args.momentum, **eps, **betas, **fused)
    except (ValueError, TypeError) as error:
        raise InputError(f'--opt {args.opt}: {error}') from None


def make_scheduler(args, optimizer):
    """timm's schedule, a function of the epoch alone."""
    return create_scheduler_v2(
        optimizer, args.sched, args.epochs, decay_epochs=args.decay_epochs, decay_rate=args.decay_rate,
        min_lr=args.min_lr, warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs,
        noise=args.lr_noise, noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std)[0]


def make_loss(args, classes):
    """(timm's Mixup or None, criterion)."""
    mixup = None
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None:
        mixup = Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax,
                      prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode,
                      label_smoothing=args.smoothing, num_classes=classes)
    if args.bce_loss:
        return mixup, torch.nn.BCEWithLogitsLoss()
    if mixup:
        return mixup, SoftTargetCrossEntropy()
    return mixup, LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else torch.nn.CrossEntropyLoss()


# ---------------------------------------------------------------- the run

def device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'CPU ({platform.machine()}, {torch.get_num_threads()} threads)'


def describe(args, model, datasets, classes, size, steps, device):
    """Print the derived numbers once."""
    for split, data in datasets.items():
        megabytes = data.bytes_on_disk() / 1e6
        say(f'{split}: {len(data):,} images of {data.grid}x{data.grid} codes, {megabytes:,.2f} MB on disk '
            f'({1e6 * megabytes / len(data):,.0f} bytes an image)')
    say(f'model: {args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, '
        f'{size}x{size} codes in, {classes} classes')
    say(f'device: {world_size()} x {device_name(device)}, amp {args.amp}, '
        + ', '.join(f'{k} {v}' for k, v in VERSIONS.items()))
    if not args.eval:
        accumulated = f' x {args.accum_iter}' if args.accum_iter > 1 else ''
        say(f'batch: {args.batch_size} x {world_size()}{accumulated} = '
            f'{args.batch_size * world_size() * args.accum_iter}, {steps // args.accum_iter} steps an epoch, '
            f'{args.epochs} epochs; learning rate {args.lr:.3g}')


def evaluate_all(args, model, ema, dataset, transform, device):
    """Evaluate the model, then the EMA; returns log entries test_* and ema_test_*."""
    indices = own_share(len(dataset), args.dist_eval)

    def measure(model, prefix, name=''):
        batches = dataset.batches(indices, int(1.5 * args.batch_size), device, args.pin_mem)
        stats = evaluate(model, batches, transform, device, args.amp, args.dist_eval, name)
        return {f'{prefix}_{key}': value for key, value in stats.items()}

    stats = measure(model, 'test')
    if ema:
        home = next(ema.module.parameters()).device
        stats |= measure(ema.module.to(device), 'ema_test', 'EMA')
        ema.module.to(home)
    return stats


class Run:
    """The things a training run uses beside its TrainState: data, augmentation, loss, files."""

    def __init__(self, args, model, datasets, augment, transform, classes, steps, device):
        self.args, self.device, self.steps = args, device, steps
        self.data, self.val, self.augment, self.transform = datasets['train'], datasets.get('val'), augment, transform
        self.mixup, self.criterion = make_loss(args, classes)
        self.parallel = parallelise(args, model, augment, device)
        self.generator = torch.Generator(device)
        self.checkpoints, self.vote = Checkpoints(args), Vote(args.dist_timeout)
        if world_size() > 1:
            self.settle_buckets()

    def settle_buckets(self):
        """One backward without a step, after which DDP has arranged its buckets for good.

        Their layout decides in which order ranks are summed, so a resumed run must not begin with another.
        """
        batch = self.indices(0)[:self.args.batch_size]
        codes, _ = next(self.data.batches(batch, len(batch), self.device))
        with autocast(self.device, self.args.amp):
            logits = self.parallel.train()(self.augment(codes, self.generator))
        logits.float().sum().backward()
        self.parallel.zero_grad()

    def indices(self, epoch):
        """Images of this rank in an epoch, whole batches of them."""
        order = sampler(self.args)(len(self.data), world_size(), rank(), self.args.seed, epoch)
        return order[:self.steps * self.args.batch_size]


def sampler(args):
    return repeated_augmentation if args.repeated_aug else shuffled


def parallelise(args, model, augment, device):
    """The model as it is called in training: compiled and in DDP where asked for."""
    if args.compile:
        model = torch.compile(model)
        augment.crop = torch.compile(augment.crop)
    if world_size() > 1:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None,
                                        gradient_as_bucket_view=True)
    return model


def train_epoch(run, state, stop):
    """Train the epoch of `state`, from its step on. A stop signal on any rank saves and ends the program."""
    args, meter = run.args, LossMeter(run.device, state.meter)

    def after_step(done):
        state.step = done
        stopping, due = run.vote(stop.received, run.checkpoints.due(state))
        # nothing is saved unchecked: a bad step may lie between the last logging step and this one
        if (stopping or due) and done < run.steps:
            check_finite(meter, state.scaler, args, state.epoch, done - 1)
            state.meter = meter.gather()
            run.checkpoints.save(state)
        if stopping and done < run.steps:
            barrier()
            say(f'stopped by a signal after step {done} of epoch {state.epoch}; '
                + ('--resume auto continues there' if args.output_dir else 'without --output-dir nothing is saved'))
            sys.exit(REQUEUE)

    indices = run.indices(state.epoch)
    batches = run.data.batches(indices[state.step * args.batch_size:], args.batch_size, run.device, args.pin_mem)
    try:
        stats = train_one_epoch(run.parallel, state.ema, state.optimizer, state.scaler, run.criterion, batches,
                                run.steps, run.augment, run.mixup, run.generator, state.epoch, args, run.device,
                                state.step, meter, after_step)
    except NotFinite as error:
        save_bad_step(run, state, error.step, indices)
        raise
    state.step, state.meter = 0, None
    return {f'train_{key}': value for key, value in stats.items()}


def save_bad_step(run, state, step, indices):
    """Leave what is needed to replay a bad step of this rank in --output-dir."""
    if run.args.output_dir:
        b = run.args.batch_size
        record = {'epoch': state.epoch, 'step': step, 'rank': rank(), 'seed': run.args.seed,
                  'lr': state.optimizer.param_groups[0]['lr'], 'indices': indices[step * b:(step + 1) * b].tolist()}
        write_text(Path(run.args.output_dir) / f'bad_step_rank{rank()}.json', json.dumps(record) + '\n')


def train(run, state):
    """All epochs: train, evaluate, log, save."""
    args, folder = run.args, Path(run.args.output_dir)
    if run.checkpoints.writing:
        record = {**vars(args), 'versions': VERSIONS, 'device_name': device_name(run.device), 'world': world_size()}
        write_text(folder / 'args.json', json.dumps(record, indent=1) + '\n')
        log = RunLog(folder / 'log.txt', state.epoch)
    board = open_tensorboard(folder) if args.tensorboard and is_main() else None
    with StopSignal() as stop:
        while state.epoch < args.epochs:
            epoch, began, skipped = state.epoch, time.time(), state.step
            state.scheduler.step(max(epoch - 1, 0))  # as published: the first two epochs run at the warm-up value
            stats = train_epoch(run, state, stop)
            train_time = time.time() - began
            if run.val:
                stats |= evaluate_all(args, state.model, state.ema, run.val, run.transform, run.device)
            improved = []
            for name, key in (('model', 'test_acc1'), ('ema', 'ema_test_acc1')):
                # while the best is 0 every epoch is as good: so a run that evaluates has a best checkpoint
                if key in stats and (stats[key] > state.best[name] or not state.best[name]):
                    improved.append(name)
                    state.best[name] = stats[key]
            state.epoch += 1
            if run.checkpoints.writing:
                # the log line first: a run cut off between the two repeats the epoch, and its line is dropped then
                speed = (run.steps - skipped) * args.batch_size * world_size() / train_time
                log.write(**stats, epoch=epoch, n_parameters=sum(p.numel() for p in state.model.parameters()),
                          best_acc1=state.best['model'], best_ema_acc1=state.best['ema'],
                          epoch_time=round(time.time() - began, 2), images_per_second_time=round(speed, 1))
            run.checkpoints.save(state, improved)
            if board:
                for key, value in stats.items():
                    board.add_scalar(key, value, epoch)
            best = [f'best {title}Acc@1 {state.best[name]:.3f}'
                    for name, title in (('model', ''), ('ema', 'EMA ')) if run.val and (name == 'model' or state.ema)]
            say(', '.join([f'epoch {epoch}: {time.time() - began:.1f} s', *best]))
    if board:
        board.close()


def open_tensorboard(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError('--tensorboard needs the tensorboard package: pip install tensorboard') from None
    return SummaryWriter(folder)


def main(args):
    # ------------------------------------------------------------ set-up
    device = init_distributed(args.device, args.dist_url, args.dist_timeout)
    say_no_effect(args, NO_EFFECT)
    args.amp = args.amp or default_amp(device.type)
    if not args.unscale_lr:
        args.lr *= args.batch_size * args.accum_iter * world_size() / 512
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if args.tf32:
        torch.set_float32_matmul_precision('high')
    checkpoint, resume = find_checkpoint(args)
    barrier()  # nobody writes to --output-dir before all have looked

    # ------------------------------------------------------------ data
    codebook = load_codebook(args.codebook_path)
    splits = [s for s, wanted in (('train', not args.eval), ('val', not args.no_eval)) if wanted]
    datasets = {split: load_split(args, split, codebook) for split in splits}
    classes = count_classes(args, datasets, checkpoint)
    size = args.input_size // args.token_patch_size
    for dataset in datasets.values():
        check_crop(size, dataset.grid)
    transform = EvalTransform(codebook, size, device)

    # ------------------------------------------------------------ model
    model = create_model(args, classes, size, codebook.shape[1], drop_path_rate=args.drop_path,
                         pos_drop_rate=args.drop, proj_drop_rate=args.drop)
    if args.finetune:
        finetune(model, args.finetune)
    model.to(device)
    steps = 0
    if not args.eval:
        augment = make_augment(args, codebook, datasets['train'].grid, size, device)
        share = len(sampler(args)(len(datasets['train']), world_size(), 0, 0, 0))
        steps = share // (args.batch_size * args.accum_iter) * args.accum_iter
        if not steps:
            raise InputError(f'{args.train_token_file}: {len(datasets["train"])} images make no batch of '
                             f'{args.batch_size} x {args.accum_iter} on {world_size()} processes: lower --batch-size')
    describe(args, model, datasets, classes, size, steps, device)
    place_data(args, datasets, device)
    if device.type == 'cpu':
        keep_freed_memory()  # only now: decoding a large set frees much that need not be kept
    if args.eval:
        load_weights(model, checkpoint['model'], resume)
        ema = None
        if args.model_ema and checkpoint.get('model_ema'):
            ema = ModelEmaV3(model, decay=args.model_ema_decay)
            load_weights(ema.module, checkpoint['model_ema'], resume)
        evaluate_all(args, model, ema, datasets['val'], transform, device)
        return

    # ------------------------------------------------------------ optimiser and resume
    model.set_grad_checkpointing(args.grad_checkpointing)
    if args.attn_only:
        freeze_all_but_attention(model)
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device='cpu' if args.model_ema_force_cpu else None)
    optimizer = make_optimizer(args, model)
    state = TrainState(model, ema, optimizer, make_scheduler(args, optimizer), make_scaler(device, args.amp),
                       epoch=args.start_epoch)
    if checkpoint:
        check_exact(args, checkpoint, resume)
        state.load(checkpoint, resume, args)
        say(f'{resume}: continuing at epoch {state.epoch}, step {state.step}, best Acc@1 so far '
            f'{state.best["model"]:.3f}')
        del checkpoint

    # ------------------------------------------------------------ train
    train(Run(args, model, datasets, augment, transform, classes, steps, device), state)


if __name__ == '__main__':
    run(lambda: main(parse_args()))
