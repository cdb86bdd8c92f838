"""From flags to a training: what they make (optimizer, schedule, EMA, loss, DDP), and how a program begins and ends.

A program is `start`, then its data, model, evaluation and loss, then `make_state`, `resume_run` and `fit`. Flags stop
here, in the programs and in seitpp/mtm_recipe.py: other modules never see `args`, and `args` is never changed.
"""
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine import StepOptions, evaluate, rank_indices, train
from fileio.files import identity, is_address
from flags import Flags, print_no_effect
from token_files.codebook import Codebook, load_synonyms, made_synonyms
from token_files.made_with import file_of, seen_from
from token_files.token_file import expand_token_files, holds_foreign
from training import run_info
from training.checkpoints import (TrainState, check_tokens_of, compare_model_flags, flags_to_save, progress_of, resume,
                                  said_of_the_model, saved_flags)
from training.loss_meter import NotFinite
from training.preemption import REQUEUE
from training.run_folder import FILES, CheckpointFiles, RunFolder, RunLog, find_checkpoint
from utils import (InputError, autocast, check_same_on_all_ranks, device_of, first_line, init_distributed,
                   keep_freed_memory, print0, rank, world_size)

# ---------------------------------------------------------------- flags that cannot work together

def check_flags(args: Flags) -> None:
    """InputError for flags of the shared groups that cannot work together."""
    checks = [
        (mixes(args) and args.batch_size % 2, f'--batch-size {args.batch_size} is odd; CutMix and Mixup want it even'),
        (args.bce_loss and (args.smoothing or not mixes(args)),
         '--bce-loss needs --smoothing 0 (any smoothing makes every target 1) and --cutmix or --mixup on'),
        (args.eval and not args.resume, '--eval needs --resume CHECKPOINT'),
        (args.eval and args.no_eval, '--eval and --no-eval exclude each other'),
        (args.no_eval and args.eval_freq, '--eval-freq and --no-eval exclude each other'),
        (args.output and not args.eval, '--output belongs to --eval; training writes to --output-dir'),
        (args.report and not args.eval, '--report belongs to --eval; training writes to --output-dir'),
    ]
    for wrong, message in checks:
        if wrong:
            raise InputError(message)
    check_output_flags(args)


def check_val_share(args: Flags) -> None:
    """InputError where validation tokens are given, and are to be held out of those of training, too."""
    if args.val_share and args.given & {'val_token_file', 'val_label_file'}:
        raise InputError('--val-share holds images of --train-token-file out: give it, or --val-token-file, but not '
                         'both')


def check_output_flags(args: Flags) -> None:
    """InputError for flags that need --output-dir without it."""
    for on, flag in ((args.resume == 'auto', '--resume auto looks in'), (args.tensorboard, '--tensorboard writes to'),
                     (args.wandb, '--wandb keeps its run in')):
        if on and not args.output_dir:
            raise InputError(f'{flag} --output-dir: give one')


def mixes(args: Flags) -> bool:
    """Whether Mixup or CutMix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check_cutmix(args: Flags, side: int) -> None:
    """InputError where the box of CutMix would be drawn from an empty range, of images of `side` codes or pixels."""
    low, high = (int(side * part) for part in args.cutmix_minmax or (0, 1))
    if low >= high:
        raise InputError(f'--cutmix-minmax {args.cutmix_minmax}: give two rising shares, with whole codes or pixels '
                         'between them')


# ---------------------------------------------------------------- the beginning of a program

def start(args: Flags, no_effect: dict[str, str] | None = None, outputs: Sequence[str] = (),
          files: CheckpointFiles = FILES) -> tuple[torch.device, RunFolder, dict[str, Any] | None, str]:
    """Join the other processes, seed, take the output folder, and find the checkpoint to begin from. Collective.

    Args:
        args: the command line.
        no_effect: of `Parser.add_no_effect`; a line is printed for each of these flags that was given.
        outputs: names of files that the program writes to --output-dir beside checkpoints and log.
        files: how it names checkpoints.

    Returns:
        The device of this rank, the folder, and checkpoint and path as `find_checkpoint` has them.

    Raises:
        InputError: on every rank.
    """
    device = init_distributed(args.device, args.dist_url, args.dist_timeout)
    # before anything is read or written: ranks of different flags would meet in a deadlock later
    check_same_on_all_ranks(flags_alike(args))
    print_no_effect(no_effect or {}, vars(args))
    set_up_torch(args)
    evaluating = vars(args).get('eval', False)  # some programs only train
    if not evaluating and not args.output_dir:
        print0('note: without --output-dir no checkpoint and no log is kept')
    # The folder is locked before it is searched, so that no other run writes the checkpoint that this one reads.
    folder = RunFolder('' if evaluating else args.output_dir, args.save_every, outputs, files)
    return device, folder, *find_checkpoint(args.output_dir, args.resume, evaluating, outputs, files)


def flags_alike(args: Flags) -> dict[str, Any]:
    """The flags that must be the same on all ranks, by their names on the command line."""
    alike = {f'--{name.replace("_", "-")}': value for name, value in vars(args).items()
             if name not in args.rules.of_a_rank}
    # Each node may have its own cache folder. But with 'none' no rank waits for another's cache, and then none may.
    return alike | {'--token-cache none': vars(args).get('token_cache') == 'none'}


def check_data(args: Flags, facts: dict[str, Any], checkpoint: dict[str, Any] | None) -> dict[str, Any]:
    """InputError on every rank unless all ranks read the same data and checkpoint. Collective.

    Args:
        args: the command line.
        facts: of the data, see `token_dataset.facts_of`.
        checkpoint: that the run begins from, or None.

    Returns:
        The facts, with those of further files that the flags name: they are what a resumed run compares.
    """
    values = vars(args)
    used = {'synonyms': values.get('eda_rc_prob') and values['token_synonym_dict'],
            'TokenAdapt': values.get('tokenadapt_path')}
    if not values.get('eval'):
        # of a file that is missing its reader says more
        facts = facts | {name: identity(path)['sha256'] for name, path in used.items()
                         if path and (is_address(path) or os.path.exists(path))}
        if used['synonyms'] == '':  # a resumed run must not take those of a file that has come since, nor the reverse
            facts = facts | {'synonyms': 'made from the codebook'}
    # ranks that read different data would wait for each other forever, or train on silently
    check_same_on_all_ranks({**facts, **progress_of(checkpoint)})
    return facts


def from_checkpoint(args: Flags, checkpoint: dict[str, Any], path: str) -> Flags:
    """The flags of an evaluation: those of the model that were not given, and its codebook, as the checkpoint says.

    A published checkpoint says nothing: for it the defaults count, which are those of the published model.

    Raises:
        InputError: where the codebook is not there.
    """
    before = said_of_the_model(checkpoint)
    known = {name: before[name] for name in args.rules.of_the_model
             if name not in args.given and type(before.get(name)) in (str, int, float, bool, dict)}
    if 'model' in args.given and args.model != before.get('model'):
        known.pop('model_kwargs', None)  # arguments of a model belong to no other one, nor does its stem
        known.pop('stem', None)
    for name in ('codebook', 'tokenizer'):
        flag = f'{name}_path'
        if flag in vars(args) and flag not in args.given:
            file = file_of(checkpoint, name, path, f'--{name}-path', vars(args)[flag])
            if not file and not os.path.exists(vars(args)[flag]):
                raise InputError(f'{path}: does not say with which {name} it was trained, and {vars(args)[flag]} is '
                                 f'not there: give it to --{name}-path')
            known |= {flag: file} if file else {}
    said = [words_of(name, value) for name, value in sorted(known.items()) if value not in ({}, False)]
    if said:
        print0(f'{path}: {" ".join(said)}')
    return args.replaced(**known)


def model_of_start(args: Flags, checkpoint: dict[str, Any], names: Callable[[str], bool]) -> Flags:
    """The flags of a training from --finetune: model and arguments of the checkpoint, where --model was not given.

    Args:
        args: the command line.
        checkpoint: of --finetune.
        names: whether a model of a name can be trained here; a ViT that was trained on pixels cannot be on tokens.
    """
    before = saved_flags(checkpoint)
    name, kwargs = before.get('model'), before.get('model_kwargs')
    if 'model' in args.given or not isinstance(name, str) or not isinstance(kwargs, dict) or not names(name):
        return args
    taken = {'model': name} | ({} if 'model_kwargs' in args.given else {'model_kwargs': kwargs})
    if 'stem' in vars(args) and 'stem' not in args.given:
        taken['stem'] = before.get('stem')
        side = before.get('token_patch_size', args.token_patch_size)
        if side != args.token_patch_size:  # by which codes are upsampled, but in a ViT
            print0(f'note: --token-patch-size is {args.token_patch_size}; {args.finetune} was trained with {side}')
    print0(f'{args.finetune}: {" ".join(words_of(name, value) for name, value in taken.items() if value)}')
    return args.replaced(**taken)


def as_wide_as(codebook: Codebook, args: Flags) -> Flags:
    """The flags with a model that reads rows of a codebook, where they are not as stored and --model-kwargs is silent.

    Models are named after the published codebooks, and one of another width is a mistake there. Formulas and weights of
    other tokenizers have any width: for them in_chans is added, which checkpoints then hold.
    """
    if codebook.as_stored or ('model_kwargs' in args.given and 'in_chans' in args.model_kwargs):
        return args
    return args.replaced(model_kwargs={**args.model_kwargs, 'in_chans': codebook.rows.shape[1]})


def check_evaluated(args: Flags, checkpoint: dict[str, Any], path: str, facts: dict[str, Any] | None = None) -> None:
    """Say where an evaluation is of another model than was trained; InputError for another codebook or tokenizer.

    Args:
        args: the command line, whose codebook and validation tokens are used.
        checkpoint, path: of the model.
        facts: of the data, for a model of tokens.
    """
    compare_model_flags(checkpoint, {name: vars(args)[name] for name in sorted(args.rules.of_the_model)}, path)
    if facts:
        check_held_out(args, checkpoint, path, facts)
        check_tokens_of(checkpoint, path, facts, {'codebook': args.codebook_path,
                                                  'tokenizer': split_files(args)['val'][0]})


def check_held_out(args: Flags, checkpoint: dict[str, Any], path: str, facts: dict[str, Any]) -> None:
    """InputError where --val-share of an evaluation holds out other images than the training did."""
    share, before = vars(args).get('val_share', 0), saved_flags(checkpoint)
    if not share or not before:
        return
    if before.get('val_share', 0) != share:
        raise InputError(f'{path}: its run held a share of {before.get("val_share", 0):g} of the images out, so '
                         f'--val-share {share:g} would evaluate images that it was trained on: give the same share')
    if not same_views(before, args):
        raise InputError(f'{path}: its run had {views_in_words(before.get("views"))}, and this evaluation has '
                         f'{views_in_words(args.views)}: other images would be held out, and those are trained on; '
                         'give the same --views')
    data = checkpoint.get('data') or {}
    same = [data.get(f'{name} tokens') in (None, facts['validation tokens']) for name in ('validation', 'training')]
    if not all(same):
        raise InputError(f'{path}: its run held images of another --train-token-file out than {args.train_token_file}: '
                         'give that one, or evaluate --val-token-file')


def same_views(before: dict[str, Any], args: Flags) -> bool:
    """Whether --views is that of the flags of another run, from which it comes as a tuple, a list, or not at all."""
    return tuple(before.get('views') or ()) == tuple(args.views or ())


def views_in_words(views: Sequence[int] | None) -> str:
    """--views as it is typed."""
    return f'--views {":".join(map(str, views))}' if views else 'no --views'


def note_held_out(args: Flags, start: dict[str, Any], facts: dict[str, Any]) -> None:
    """Say where the weights of --finetune were trained on images that --val-share holds out now."""
    before, data = saved_flags(start), start.get('data') or {}
    tokens = facts.get('training tokens')
    same = before.get('val_share', 0) == args.val_share and same_views(before, args)
    if args.val_share and tokens and data.get('training tokens') == tokens and not same:
        print0(f'note: {args.finetune}: was trained on these images, and held others of them out than --val-share '
               f'{args.val_share:g} does now: results on those say nothing of other images')


def files_by_default(args: Flags, codebook: Codebook) -> Flags:
    """The flags without the published files of labels and synonyms where they were not given and cannot be meant.

    Sets of other projects have labels of their own, for which '' stands: published ones of as many images, in another
    order, would be taken in silence. Likewise '' stands for synonyms made from the codebook.
    """
    flags = vars(args)
    if 'val_token_file' in flags and holds_foreign(args.train_token_file) and not (
            'val_token_file' in args.given or flags.get('val_share') or args.no_eval or flags.get('eval')):
        raise InputError(f'{args.train_token_file}: validation tokens are not given, and {args.val_token_file}, the '
                         "default, is of SeiT's tokens: give --val-token-file, --val-share 0.02, or --no-eval")
    known = {}
    for split in ('train', 'val') if 'val_label_file' in flags else ():
        if f'{split}_label_file' not in args.given and holds_foreign(flags[f'{split}_token_file']):
            known[f'{split}_label_file'] = ''
            print0(f'labels: those inside {flags[f"{split}_token_file"]}')
    are_given = 'token_synonym_dict' in args.given or (codebook.as_stored and os.path.exists(args.token_synonym_dict))
    if args.eda_rc_prob and not are_given:
        known['token_synonym_dict'] = ''
    return args.replaced(**known)


def synonyms_of(args: Flags, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables of `load_synonyms`, of a file or made from the codebook (K, d). Collective. Raises InputError."""
    if args.token_synonym_dict:
        return load_synonyms(args.token_synonym_dict, len(codebook), args.token_synonym_thres)
    folder = args.token_cache or os.path.dirname(expand_token_files(args.train_token_file)[0])
    return made_synonyms(codebook, args.codebook_path, args.token_synonym_thres, None if folder == 'none' else folder)


def split_files(args: Flags) -> dict[str, tuple[str, str]]:
    """Token file and label file of the splits that a run needs: 'train' unless under --eval, 'val' unless --no-eval.

    With --val-share both are those of training, see `token_dataset.open_splits`.
    """
    files = {'train': (args.train_token_file, args.train_label_file), 'val': (args.val_token_file, args.val_label_file)}
    if args.val_share:
        files['val'] = files['train']
    left_out = 'train' if args.eval else 'val' if args.no_eval else None
    return {split: paths for split, paths in files.items() if split != left_out}


def set_up_torch(args: Flags) -> None:
    """Seed, determinism, TF32."""
    torch.manual_seed(args.seed)
    if args.deterministic:  # cuBLAS reads the variable at its first use, so it is set early
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if args.tf32:
        torch.set_float32_matmul_precision('high')


# ---------------------------------------------------------------- the recipe for small sets

MOST_PARAMETERS = 50_000  # for an image of training
SMALL_VIT = {'depth': 4, 'embed_dim': 128, 'num_heads': 4}


def moving_decay(steps: int) -> float:
    """The decay of an EMA that averages over about a tenth of a run of so many steps, over ten steps at least."""
    return math.floor(1e5 * max(0., 1 - 10 / steps)) / 1e5


def small_values(images: int, grid: int, accum_iter: int, given: dict[str, Any]) -> dict[str, Any]:
    """--recipe small: what it sets, by name of the flag. The rule stands in docs/flags.md, with what it is worth.

    Args:
        images: of training.
        grid: codes on a side that the model reads; for pixels, what is left of it with 8 pixels to a code.
        accum_iter: batches of a step.
        given: flags that the user set: what depends on them follows them.
    """
    epochs = given.get('epochs') or min(60, max(10, round(150 / images ** 0.25)))
    batch = 32 if images < 1000 else 64 if images < 5000 else 128
    parts = world_size() * accum_iter  # of a step; Mixup wants each to be even
    batch = given.get('batch_size') or max(2, min(batch, images) // parts // 2 * 2)
    lr = given.get('lr', 1e-3)
    steps = max(1, epochs * (images // (batch * parts)))
    return {
        'epochs': epochs, 'batch_size': batch, 'unscale_lr': True, 'lr': lr,
        'warmup_epochs': min(max(1, round(epochs / 10)), epochs - 1), 'warmup_lr': lr / 10,
        'token_noise_prob': 0.05, 'drop_path': 0., 'mixup_prob': 0.2,
        # the smallest crop has about eleven codes on a side, where the grid has so many
        'rrc_ratio': round(min(0.6, max(0.08, (11 / grid) ** 2)), 2),
        'model_ema_decay': min(0.99996, moving_decay(steps)),
    }


def choose(args: Flags, model: dict[str, Any], images: int, grid: int, classes: int, validation: tuple[str, int] | None,
           checkpoint: dict[str, Any] | None) -> Flags:
    """The flags of a training with what --recipe sets where the user did not, which is printed in a line.

    Args:
        args: the command line.
        model: what --recipe small takes for --model and --model-kwargs, by name.
        images, grid: see `small_values`.
        classes: of the training.
        validation: name and number of the validation images, or None.
        checkpoint: of a run that is resumed: its values count, whatever the rule is by now.

    Raises:
        InputError: for too few validation images.
    """
    before = saved_flags(checkpoint) if checkpoint else {}
    recipe_before = before.get('recipe', 'published')  # runs of before there was another do not say
    if checkpoint and recipe_before != args.recipe:
        raise InputError(f'--recipe is {args.recipe}, but the run that is resumed had {recipe_before}: give that')
    if args.recipe != 'small':
        return args
    if validation and validation[1] < classes:
        raise InputError(f'{validation[0]}: {validation[1]} validation images for {classes} classes are too few for '
                         '--recipe small, which keeps what is best on them; give one of each class at least, or '
                         '--no-eval')
    flags = vars(args)
    values = small_values(images, grid, args.accum_iter, {name: flags[name] for name in args.given})
    if not args.finetune and 'model' not in args.given:  # arguments of a model belong to no other one
        values |= model
    chosen = {name: before.get(name, value) for name, value in values.items()
              if name in flags and name not in args.given}
    print0(f'recipe small for {images:,} images of {classes} classes: '
           + ' '.join(words_of(name, value) for name, value in chosen.items()))
    return args.replaced(**chosen)


def words_of(name: str, value: Any) -> str:
    """A flag and its value, as one would type them."""
    flag = f'--{name.replace("_", "-")}'
    if isinstance(value, dict):
        return ' '.join([flag, *(f'{key}={item}' for key, item in value.items())])
    return flag if value is True else f'{flag} {value:g}' if isinstance(value, float) else f'{flag} {value}'


# ---------------------------------------------------------------- what the flags make

def default_amp(device: torch.device) -> str:
    """The published precision: 'fp16' on CUDA, 'off' elsewhere."""
    return 'fp16' if device.type == 'cuda' else 'off'


def effective_batch(args: Flags) -> int:
    """Images of one step of the optimizer, over all processes."""
    return args.batch_size * args.accum_iter * world_size()


def scaled_lr(args: Flags) -> float:
    """The learning rate of the run: --lr is for 512 images a step and grows in proportion, unless --unscale-lr."""
    return args.lr if args.unscale_lr else args.lr * effective_batch(args) / 512


def make_optimizer(args: Flags, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; no weight decay on biases, norms, position embeddings and class token."""
    options = {'betas': tuple(args.opt_betas)} if args.opt_betas else {}
    if args.opt not in ('sgd', 'nesterov', 'momentum'):  # which take no epsilon
        options['eps'] = args.opt_eps
    if args.opt in ('adamw', 'adam', 'sgd', 'nesterov', 'momentum'):
        options['fused'] = can_fuse(model)
    try:
        optimizer = create_optimizer_v2(model, args.opt, lr=scaled_lr(args), weight_decay=args.weight_decay,
                                        momentum=args.momentum, **options)
    # timm asserts that there is a GPU, or that a package is there, for the optimizers that need them
    except (ValueError, TypeError, AssertionError, ImportError, RuntimeError) as error:
        raise InputError(f'--opt {args.opt}: {first_line(error)}') from None
    if getattr(optimizer, 'is_second_order', False):
        raise InputError(f'--opt {args.opt}: needs second derivatives, which are not computed here; choose another')
    return optimizer


def can_fuse(model: nn.Module) -> bool:
    """Whether a fused optimizer is taken: one kernel for all parameters, which skips a bad step without the host.

    That is known of CPU and CUDA. On other accelerators torch's GradScaler asks the host, and makes no bad step.
    """
    return device_of(model).type in ('cpu', 'cuda')


def make_scheduler(args: Flags, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """timm's schedule, a function of the epoch alone, or of the batch, of which an epoch has `steps`."""
    return create_scheduler_v2(
        optimizer, args.sched, args.epochs, decay_epochs=args.decay_epochs, decay_rate=args.decay_rate,
        min_lr=args.min_lr, warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs,
        noise=args.lr_noise, noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std,
        step_on_epochs=not args.sched_on_updates, updates_per_epoch=steps)[0]


def print_model(args: Flags, name: str, model: nn.Module, device: torch.device) -> str:
    """Print a model's size, the device, the precision and the versions; returns the precision."""
    amp = args.amp or default_amp(device)
    run_info.print_model(name, model, device, amp)
    return amp


def print_recipe_batch(args: Flags) -> None:
    """Say what another effective batch than the published recipe's means."""
    if args.recipe == 'published':
        run_info.print_recipe_batch(effective_batch(args), args.unscale_lr)


def make_scaler(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """Gradient scaler: fp16's dynamic one, else one of constant scale 1.

    Either finds gradients that are not finite on the device, and hands the finding to a fused optimizer, which then
    changes no weight. So a bad step is skipped without the host waiting to learn of it, also without fp16.
    """
    if amp == 'fp16':
        return torch.amp.GradScaler(device.type)
    # The scale never grows; it shrinks at a bad step, by which `loss_meter.check_finite` notices one.
    return torch.amp.GradScaler(device.type, init_scale=1., growth_interval=1 << 30)


def make_evaluate(args: Flags, data: Any, prepare: Callable, device: torch.device, report: Any = None) -> Callable:
    """The engine's evaluate_of on a data set; `prepare` is as in `evaluate`, and a `report` counts too."""
    amp = args.amp or default_amp(device)

    def evaluate_of(model: nn.Module, name: str) -> dict[str, float]:
        indices = rank_indices(len(data), args.dist_eval)
        # without gradients there is memory for larger batches; the factor is DeiT's
        batches = data.batches(indices, int(1.5 * args.batch_size), device, args.pin_mem)
        stats = evaluate(model, batches, prepare, amp=amp, distributed=args.dist_eval, name=name,
                         record=report.record if report else None)
        if report:
            report.write(name, indices)
        return stats

    return evaluate_of


def make_loss(args: Flags, classes: int) -> tuple[Mixup | None, Callable]:
    """timm's Mixup, or None, and the criterion (logits (B, classes), targets) -> ()."""
    mixup = None
    if mixes(args):
        mixup = Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax,
                      prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode,
                      label_smoothing=args.smoothing, num_classes=classes)
    if args.bce_loss:  # as published: every class that is part of a mixture counts as wholly there
        bce = nn.BCEWithLogitsLoss()
        return mixup, lambda logits, targets: bce(logits, targets.gt(0).float())
    if mixup:
        return mixup, SoftTargetCrossEntropy()
    return mixup, LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def parallel(model: nn.Module, compiled: bool, device: torch.device, amp: str, *inputs: torch.Tensor) -> nn.Module:
    """The model on `device`, by torch.compile if `compiled`, and in DDP where there are several ranks.

    `inputs` are those of an example batch, on the device; `amp` is 'bf16', 'fp16' or 'off'.
    """
    train_model = torch.compile(model) if compiled else model
    if world_size() > 1:
        train_model = DistributedDataParallel(train_model, device_ids=[device.index] if device.type == 'cuda' else None,
                                              gradient_as_bucket_view=True)
        # DDP arranges its buckets of gradients for good in the first backward pass, and their layout decides in which
        # order the ranks' gradients are summed. A resumed run that trained its first step with buckets not yet arranged
        # would round differently, so they are built here, before anything is resumed or trained.
        before = {name: value.clone() for name, value in model.named_buffers()}
        with autocast(device, amp):
            train_model(*inputs).float().sum().backward()
        model.zero_grad()
        with torch.no_grad():
            for name, value in model.named_buffers():  # the statistics of BatchNorm have seen no image yet
                value.copy_(before[name])
    return train_model


def make_state(args: Flags, model: nn.Module, device: torch.device, input_shape: tuple[int, ...], steps: int,
               data: dict[str, Any] | None = None) -> TrainState:
    """The state of a new run, from a model on `device` that reads inputs (B, *input_shape); for `data` see there.

    `steps` is of `count_steps`.
    """
    amp = args.amp or default_amp(device)
    try:
        model.set_grad_checkpointing(args.grad_checkpointing)
    except AssertionError:  # timm's models assert that they can
        raise InputError(f'--model {args.model} has no gradient checkpointing; omit --grad-checkpointing') from None
    ema_device = 'cpu' if args.model_ema_force_cpu else None
    ema = ModelEmaV3(model, decay=args.model_ema_decay, device=ema_device) if args.model_ema else None
    optimizer = make_optimizer(args, model)
    x = torch.zeros(args.batch_size, *input_shape, device=device).to(memory_format=torch.channels_last)
    return TrainState(model, parallel(model, args.compile, device, amp, x), optimizer,
                      make_scheduler(args, optimizer, steps), make_scaler(device, amp), ema, amp,
                      epoch=args.start_epoch, data=data or {})


def count_steps(args: Flags, images: int, source: str) -> int:
    """Batches an epoch for a rank that gets `images` of `source`, a multiple of --accum-iter. Raises InputError."""
    steps = images // (args.batch_size * args.accum_iter) * args.accum_iter
    if not steps:
        sizes = {'--batch-size': args.batch_size, '--accum-iter': args.accum_iter,
                 'the number of processes': world_size()}
        advice = f'lower {" or ".join(name for name, size in sizes.items() if size > 1)}'
        if vars(args).get('epoch_images'):  # of the programs that have it
            advice += ', or raise --epoch-images'
        raise InputError(f'{source}: the {images} images of a process make no step of --batch-size {args.batch_size} x '
                         f'--accum-iter {args.accum_iter} ({world_size()} processes): {advice}')
    return steps


def step_options(args: Flags, steps: int) -> StepOptions:
    """The engine's options, for epochs of `steps` batches."""
    return StepOptions(steps, args.batch_size, args.seed, args.accum_iter, args.clip_grad, args.on_nan,
                       args.dist_timeout)


def warn_of_small_sets(args: Flags, state: TrainState, steps: int) -> None:
    """A line for each way in which the recipe of a large set cannot work on a small one.

    Args:
        args: the command line.
        state: at the beginning.
        steps: batches of an epoch.
    """
    flags = vars(args)
    if args.epochs <= args.warmup_epochs:
        print0(f'warning: --epochs {args.epochs} are not more than --warmup-epochs {args.warmup_epochs}: the learning '
               'rate never reaches its value')
    images = steps * args.batch_size * world_size()
    size = sum(weight.numel() for weight in state.model.parameters() if weight.requires_grad)
    # where an epoch has so many images as it is told, the set has more
    if size > MOST_PARAMETERS * images and not flags.get('epoch_images'):
        print0(f'warning: {size / 1e6:.1f} M parameters are trained on {images:,} images, {size // images:,} for each: '
               'expect it to learn them by heart; choose '
               f'{"--recipe small, or " if flags.get("recipe") == "published" else ""}a smaller model')
    updates = args.epochs * steps // args.accum_iter
    if state.ema and updates * (1 - args.model_ema_decay) < 1:
        choice = f'choose {moving_decay(updates):g} or less, or ' if updates > 10 else 'choose '
        print0(f'warning: --model-ema-decay {args.model_ema_decay:g}: in {updates} steps the EMA hardly leaves the '
               f'initial weights: {choice}--no-model-ema')


# ---------------------------------------------------------------- resuming, and the training that ends a program

def resume_run(args: Flags, state: TrainState, checkpoint: dict[str, Any] | None, path: str, steps: int) -> None:
    """Let a new run's state resume from the checkpoint of `start`, if there is one, which is then empty.

    Raises:
        InputError: for a checkpoint that does not fit the flags, see `resume`.
    """
    if checkpoint is None:
        return
    saved = saved_flags(checkpoint)
    epochs = saved.get('epochs')
    by_steps = saved.get('sched_on_updates', False) != vars(args).get('sched_on_updates', False)
    resume(state, checkpoint, path, vars(args), steps, args.rules.exact, args.rules.of_a_start)
    checkpoint.clear()  # its tensors are copied, and the program still holds it
    best = f', best Acc@1 {state.best["model"]:.3f}' if state.best['model'] else ''
    print0(f'{path}: resumed at epoch {state.epoch}, step {state.step}{best}')
    if (epochs not in (None, args.epochs) or by_steps) and state.epoch < args.epochs:
        state.scheduler.step(max(state.epoch - 1, 0))  # as the engine does at the beginning of each epoch ...
        state.scheduler.step_update(state.epoch * steps + state.step)  # ... and step
        now = max(group['lr'] for group in state.optimizer.param_groups)
        other = 'by epochs' if vars(args).get('sched_on_updates') else 'by steps'
        print0(f'note: the learning rate is that of a schedule of {args.epochs} epochs from here on, not '
               f'{other if by_steps else f"of {epochs}"}: {now:.3g} in epoch {state.epoch}')


def fit(args: Flags, state: TrainState, folder: RunFolder, steps: int, order_of: Callable, batches_of: Callable,
        loss_of: Callable, evaluate_of: Callable | None = None, classes: list[str] | None = None,
        made_with: dict[str, Any] | None = None, seed: int | None = None) -> int:
    """Train to the last epoch: the end of every program that trains.

    Args:
        args: the command line.
        state: new, or resumed.
        folder: takes checkpoints and log.
        steps: of `count_steps`.
        order_of, batches_of, loss_of, evaluate_of: see engine.py.
        classes: names of the labels, for the checkpoints.
        made_with: of the tokens, see token_files/made_with.py, for args.json and the checkpoints.
        seed: of everything random in the steps; None for --seed.

    Returns:
        The exit code: 0, or REQUEUE when a signal stopped the run after saving.

    Raises:
        NotFinite: after noting the bad step in the folder.
    """
    device = device_of(state.model)
    run_info.print_batch(args.batch_size, args.accum_iter, steps, args.epochs, state.optimizer.defaults['lr'])
    keep_freed_memory(device)  # only now: reading data frees much that need not be kept
    warn_of_small_sets(args, state, steps)
    tokens = {'made_with': seen_from(made_with, folder.path)} if made_with else {}
    record = run_info.run_record(vars(args), device)
    folder.begin(record | {'classes': classes} | tokens,
                 {'args': flags_to_save(vars(args)), 'classes': classes} | tokens)
    log = RunLog(str(folder.path) if folder.saves else '', state.epoch, args.tensorboard, args.wandb, record)
    seed = args.seed if seed is None else seed
    options = dataclasses.replace(step_options(args, steps), seed=seed)
    # At a bad step the run says which images it saw, so that `bad_step_rankN.json` is enough to replay it.
    try:
        finished = train(state, order_of, batches_of, loss_of, evaluate_of, folder, log, args.epochs, options,
                         vars(args).get('eval_freq') or 1)
    except NotFinite as error:
        indices = order_of(error.epoch)[error.step * args.batch_size:(error.step + 1) * args.batch_size]
        folder.save_bad_step(error, rank(), seed, np.asarray(indices).tolist())
        raise
    finally:
        log.close()
    return 0 if finished else REQUEUE
