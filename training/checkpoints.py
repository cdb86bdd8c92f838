"""The state of a run, and resuming it exactly.

`TrainState` is what the loop changes and what a checkpoint holds; `load_checkpoint` reads a file, which may be a
published one or a damaged one, and `resume` puts it into a new state after comparing flags. At the end stand the
functions that tell from the names and shapes of weights which program made them.
"""
from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from fileio.torch_files import MAX_STRING, check_fields, digest_of, is_safetensors, load_safetensors, load_torch
from utils import InputError, check_same_on_all_ranks, print0, shown, world_size

MOMENTS = {'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'momentum_buffer'}  # of fused optimizers: of a parameter's shape
COUNTERS = ('step', 'lookahead_step')  # what optimizers count in a parameter group
FIELDS = {  # what a field of a checkpoint may hold, where the checkpoint has it
    'model_ema': lambda value: isinstance(value, dict),
    'epoch': lambda value: type(value) is int and value >= -1,
    'step': lambda value: type(value) is int and value >= 0,
    'world_size': lambda value: type(value) is int and value > 0,
    'data': lambda value: isinstance(value, dict) and all(isinstance(item, str | int) for item in value.values()),
    'made_with': lambda value: isinstance(value, dict) and all(isinstance(item, int | dict) for item in value.values()),
    'best_acc1': lambda value: isinstance(value, int | float),
    'best_ema_acc1': lambda value: isinstance(value, int | float),
    'meter': lambda value: isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == 2,
}
WRAPPERS = ('module.', '_orig_mod.')  # what DDP and torch.compile put before the names of weights
SEIT = 'main_seit.py'
PRETRAIN = 'main_mtm_pretrain.py'
FINETUNE = 'main_mtm_finetune.py'
PIXELS = 'main_pixels.py'
CODES = 'token_emb.word_embeddings.weight'
SEEN = 'classes seen'  # in TrainState.data of main_continual.py: how many of the outputs have been trained by then
TOKEN_ADAPT = ('conversion_function.', 'reverse_transform.')  # how the names of TokenAdapt's weights begin


@dataclass
class TrainState:
    """All that a run needs to resume. Random state is not among it: it is a function of (seed, epoch, step, rank).

    Attributes:
        model: bare: saved, averaged, evaluated.
        train_model: the same weights as the loop calls them: compiled, in DDP.
        optimizer, scheduler: timm's.
        scaler: of gradients; it skips a step that is not finite, on the device.
        ema: timm's ModelEmaV3 of the model, or None.
        amp: 'bf16', 'fp16' or 'off'.
        epoch: the one in progress, or next.
        step: batches done in it, per rank.
        losses: (ranks, 2) sum and number of the losses so far in it (loss_meter.LossMeter), None at its start.
        best: top-1 (%) of the model and of the EMA.
        data: what the run reads, by name: SHA-256 or another plain value. A resumed run must have the same.
    """
    model: nn.Module
    train_model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    amp: str = 'off'
    epoch: int = 0
    step: int = 0
    losses: torch.Tensor | None = None
    best: dict[str, float] = field(default_factory=lambda: {'model': 0., 'ema': 0.})
    data: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint, in plain types: the published keys ('epoch' is the last one finished), and a few more."""
        return {
            'model': self.model.state_dict(), 'model_ema': self.ema.module.state_dict() if self.ema else None,
            'optimizer': self.optimizer.state_dict(), 'lr_scheduler': self.scheduler.state_dict(),
            'scaler': self.scaler.state_dict() if self.amp == 'fp16' else {},  # otherwise its scale is a constant
            'epoch': self.epoch - 1, 'step': self.step, 'meter': self.losses, 'best_acc1': self.best['model'],
            'best_ema_acc1': self.best['ema'], 'world_size': world_size(), 'data': self.data,
        }


# ---------------------------------------------------------------- reading

def load_checkpoint(path: str, weights_alone: bool = False) -> dict[str, Any]:
    """A checkpoint of this program or of the published one, as a dict with 'model'. Raises InputError.

    What DDP and torch.compile put before the names of weights is taken off. With `weights_alone` the file may hold
    nothing else, as those of timm do: a .safetensors, or a dict of tensors.
    """
    if weights_alone and is_safetensors(path):
        checkpoint = {'model': load_safetensors(path, 'a checkpoint')}
    else:
        checkpoint = load_torch(path, 'a checkpoint')
        values = checkpoint.values() if isinstance(checkpoint, dict) else ()
        if weights_alone and values and all(isinstance(value, torch.Tensor) for value in values):
            checkpoint = {'model': checkpoint}
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('model'), dict):
        raise InputError(f'{path}: not a checkpoint (no "model" in it)')
    check_fields(checkpoint, FIELDS, path, 'a checkpoint')
    for key in ('model', 'model_ema'):
        if checkpoint.get(key):
            checkpoint[key] = _without_wrappers(checkpoint[key], path)
    names = checkpoint.get('classes')
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        checkpoint['classes'] = None  # another program's, with another meaning
    return checkpoint


def _without_wrappers(weights: dict[str, Any], path: str) -> dict[str, Any]:
    for prefix in (*WRAPPERS, *WRAPPERS):  # twice, because either may be around the other
        if weights and all(str(name).startswith(prefix) for name in weights):
            print0(f'{path}: names of weights begin with {prefix!r}, which is taken off')
            weights = {name[len(prefix):]: value for name, value in weights.items()}
    return weights


def flags_to_save(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags as checkpoints hold them: a very long list of shards is cut, as `load_torch` refuses long strings."""
    return {name: f'{value[:1000]} and so on, {len(value)} characters' if len(str(value)) > MAX_STRING // 2 else value
            for name, value in flags.items()}


def saved_flags(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The flags of the run that wrote a checkpoint, {} where it does not say."""
    flags = checkpoint.get('args')
    flags = vars(flags) if isinstance(flags, Namespace) else flags
    return flags if isinstance(flags, dict) else {}


def progress_of(checkpoint: dict[str, Any] | None) -> dict[str, Any]:
    """Where the run that wrote a checkpoint was: what must be the same on all ranks."""
    if not checkpoint:
        return {}
    progress = {f'{key} of the checkpoint': checkpoint.get(key) for key in ('epoch', 'step')}
    # a stale copy on one node may be of the same epoch; with one rank there is nothing to compare
    return progress | ({'content of the checkpoint': digest_of(checkpoint)} if world_size() > 1 else {})


def note_average(checkpoint: dict[str, Any], path: str, advice: str = '') -> None:
    """Where a checkpoint holds averaged weights, say that they are not taken, and what to do to take them."""
    if checkpoint.get('model_ema'):
        print0(f'note: {path}: its plain weights are taken, not the averaged ones (EMA) that it holds too{advice}')


def check_start(model: nn.Module) -> None:
    """InputError on every rank unless a model has the same weights on all ranks. Collective."""
    if world_size() > 1:  # DDP would take those of rank 0 for all, in silence
        check_same_on_all_ranks({'content of --finetune': digest_of(model.state_dict())})


def load_weights(model: nn.Module, weights: dict[str, Any], path: str) -> None:
    """load_state_dict, with the keys that differ in a one-line InputError."""
    wanted = model.state_dict()
    # None, which fits no shape, for what is no tensor, or of integers where the model has floats
    shapes = {key: tuple(value.shape) if isinstance(value, torch.Tensor) and value.is_floating_point() == (
        key not in wanted or wanted[key].is_floating_point()) else None for key, value in weights.items()}
    wrong = [f'{key}: {shapes[key]} for {tuple(wanted[key].shape)}' for key in wanted
             if key in weights and shapes[key] != wanted[key].shape]
    wrong += [f'{key}: missing' for key in wanted if key not in weights]
    wrong += [f'{str(key)[:80]}: unknown' for key in weights if key not in wanted]
    if wrong:
        more = f'; and {len(wrong) - 8} more' if len(wrong) > 8 else ''
        raise InputError(f'{path}: does not fit the model{origin_note(weights, wanted)}: {"; ".join(wrong[:8])}{more}')
    model.load_state_dict(dict(weights))  # plain: an OrderedDict of a file may carry attributes that torch trusts


# ---------------------------------------------------------------- resuming

def resume(state: TrainState, checkpoint: dict[str, Any], path: str, flags: dict[str, Any], steps: int,
           exact: Collection[str] = (), of_a_start: Collection[str] = ()) -> None:
    """Resume from a checkpoint of this program or of the published one.

    One rule: hyperparameters are those of the command line; the file gives weights, EMA, the optimizer's moments and
    progress. A line is printed for each flag that differs from the run's.

    Args:
        state: of a new run with these flags; changed in place.
        checkpoint: of `load_checkpoint`; `path` names it in errors.
        flags: of the command line, by name.
        steps: batches of an epoch, per rank.
        exact, of_a_start: see `compare_flags`.

    Raises:
        InputError: for another value of an exact flag, unless allow_inexact_resume is on, and for a checkpoint that
            does not fit.
    """
    if not isinstance(checkpoint.get('optimizer'), dict) or type(checkpoint.get('epoch')) is not int:
        advice = [f'--{name}' for name in ('finetune', 'eval') if name in flags]
        raise InputError(f'{path}: holds weights only, of which no run can be resumed'
                         + (f'; start from them with {" or evaluate them with ".join(advice)}' if advice else ''))
    load_weights(state.model, checkpoint['model'], path)
    compare_flags(checkpoint, flags, path, exact, of_a_start, state.data)
    load_optimizer(state.optimizer, checkpoint['optimizer'], path)
    if state.ema and checkpoint.get('model_ema'):
        load_weights(state.ema.module, checkpoint['model_ema'], path)
    elif state.ema:
        print0(f'{path}: no EMA in it; it starts from the weights')
        state.ema.set(state.model)
    if state.amp == 'fp16' and checkpoint.get('scaler'):  # a run may change --amp, and the scale of others is constant
        state.scaler.load_state_dict(checkpoint['scaler'])
    state.best = {'model': checkpoint.get('best_acc1') or 0., 'ema': checkpoint.get('best_ema_acc1') or 0.}
    state.epoch = checkpoint['epoch'] + 1
    state.step = checkpoint.get('step') or 0
    losses = checkpoint.get('meter')
    state.losses = None if losses is None or len(losses) != world_size() else losses  # one row for each rank
    # An allowed, inexact resume may have batches of another size: it begins after about as many images, at a whole
    # optimizer step, and with at least one step left, at which the epoch ends. An exact one keeps its step.
    batch_now = world_size() * flags['batch_size']
    batch_before = (checkpoint.get('world_size') or world_size()) * saved_flags(checkpoint).get('batch_size',
                                                                                               flags['batch_size'])
    step = (min(state.step * batch_before // batch_now, steps - flags['accum_iter'])
            // flags['accum_iter'] * flags['accum_iter'])
    state.step = max(0, step)


def compare_flags(checkpoint: dict[str, Any], flags: dict[str, Any], path: str, exact: Collection[str],
                  of_a_start: Collection[str], data: dict[str, Any] | None = None) -> None:
    """Print the flags that differ from those of the run that wrote a checkpoint; InputError for some, and other data.

    Args:
        checkpoint, path: of that run.
        flags: of the command line, by name.
        exact: names of flags with whose other values batches or augmentation would differ. The number of processes
            counts as one of them.
        of_a_start: names of flags that are no part of a run, which no line is printed for.
        data: of the run now, see TrainState. What only one of the runs has is not compared, such as a validation set.
    """
    before = saved_flags(checkpoint) | {'world_size': checkpoint.get('world_size') or world_size()}
    if 'classes' not in checkpoint:  # written before there was one: it holds what was made of these two
        before = {key: value for key, value in before.items() if key not in ('lr', 'amp')}
    now = {**flags_to_save(flags), 'world_size': world_size()}
    for key in flags:
        if key in before and key not in of_a_start and before[key] != now[key]:
            print0(f'note: --{key.replace("_", "-")} is {now[key]}; the run that wrote {path} had {before[key]}')
    if 'opt' in now and before.get('opt', now['opt']) != now['opt']:
        advice = ', or start from the weights with --finetune' if 'finetune' in now else ''
        raise InputError(f'{path}: was written with --opt {before["opt"]}, not {now["opt"]}; resume with the same'
                         f'{advice}')
    inexact = [f'{key} {before[key]} -> {now[key]}' for key in ('world_size', *sorted(exact))
               if key in before and key in now and before[key] != now[key]]
    data_before = checkpoint.get('data') or {}
    inexact += [f'{name} {shown(data_before[name])} -> {shown(value)}' for name, value in (data or {}).items()
                if name in data_before and data_before[name] != value]
    if inexact and not now['allow_inexact_resume']:
        raise InputError(f'{path}: the run that wrote it differs in {", ".join(inexact)}; resume it as it was, or add '
                         '--allow-inexact-resume')
    if inexact:
        print0(f'warning: {path} is resumed with {", ".join(inexact)}: batches, augmentation, the scaled learning rate '
               'and the mean loss of the epoch are no longer those of the uninterrupted run')


def said_of_the_model(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The flags of the run that wrote a checkpoint, with those that evaluate_on_images.py has for its tokens."""
    flags = dict(saved_flags(checkpoint))
    sizes = flags.get('input_size'), flags.get('token_patch_size')
    if all(type(size) is int and size for size in sizes):
        flags['vit_input_size'] = sizes[0] // sizes[1]
    size = (checkpoint.get('made_with') or {}).get('image_size')
    flags |= {'tokenizer_input_size': size} if type(size) is int else {}
    rotated = (checkpoint.get('data') or {}).get('EXIF rotation')
    return flags if rotated is None else {**flags, 'exif_rotate': bool(rotated)}


def compare_model_flags(checkpoint: dict[str, Any], flags: dict[str, Any], path: str) -> None:
    """Print the flags of a model that differ from those of the run that trained it, as weights often fit all the same.

    Args:
        checkpoint, path: of that run.
        flags: those that decide what the model computes, by name.
    """
    before = said_of_the_model(checkpoint)
    for name, value in flags.items():
        if name in before and before[name] != value:
            print0(f'note: --{name.replace("_", "-")} is {value}; the run that wrote {path} had {before[name]}')


def check_tokens_of(checkpoint: dict[str, Any], path: str, facts: dict[str, Any], files: dict[str, str]) -> None:
    """InputError where a model is used with another codebook or tokenizer than it was trained with.

    A line is printed where images are tokenized at another size. A checkpoint that does not say is not compared.

    Args:
        checkpoint, path: of the model.
        facts: 'codebook', 'tokenizer' and 'size of tokenized images', as in TrainState.data; or some of them.
        files: what a codebook and a tokenizer are called in messages: the path of each.
    """
    before = checkpoint.get('data') or {}
    for name in ('codebook', 'tokenizer'):
        if name in before and name in facts and before[name] != facts[name]:
            raise InputError(f'{path}: was trained with another {name} than that of {files[name]} (SHA-256 '
                             f'{shown(before[name])}, not {shown(facts[name])}): give the {name} of its tokens')
    name = 'size of tokenized images'
    if name in before and name in facts and before[name] != facts[name]:
        print0(f'note: {name} is {facts[name]} pixels; the run that wrote {path} had {before[name]}')
    name = 'EXIF rotation'
    if name in before and name in facts and bool(before[name]) != facts[name]:
        print0(f'note: {name} of images is {"on" if facts[name] else "off"}; the tokens of the run that wrote {path} '
               f'had it {"on" if before[name] else "off"}')


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], path: str) -> None:
    """Take a saved optimizer's state; hyperparameters stay the optimizer's own. Raises InputError."""
    new = optimizer.state_dict()['param_groups']
    try:
        groups = saved['param_groups']
        if [len(group['params']) for group in groups] != [len(group['params']) for group in new]:
            raise ValueError('other parameter groups')
        # hyperparameters of the command line, with the file's numbering of the parameters and what it has counted
        merged = [{**new_group, **counted(saved_group, new_group), 'params': saved_group['params']}
                  for new_group, saved_group in zip(new, groups)]
        # what else is in the file is state too, such as the generator of timm's Kron
        optimizer.load_state_dict({**saved, 'param_groups': merged})
        if optimizer.defaults.get('fused'):
            check_moments(optimizer)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f'{path}: its optimizer state does not fit ({error}); resume with the flags of the run that '
                         'wrote it') from None


def counted(saved_group: dict[str, Any], new_group: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer's steps have left in a group: timm's LAMB and Adan count steps there, and Lookahead does.

    A new group holds hyperparameters alone, so whatever else a saved one holds was left by steps. Raises ValueError, or
    torch's RuntimeError, for a count that is no number.
    """
    left = {key: value for key, value in saved_group.items() if key not in new_group or key in COUNTERS}
    for key in COUNTERS:
        value = left.get(key, 0)
        if not isinstance(value.item() if isinstance(value, torch.Tensor) else value, int | float):
            raise ValueError(f'{key} is no number')
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in left.items()}


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """ValueError for moments of another shape than their parameter, with which fused kernels write anywhere."""
    names = set()
    for group in optimizer.param_groups:
        for parameter in group['params']:
            moments = optimizer.state.get(parameter, {})
            for name in MOMENTS & moments.keys():
                if name == 'momentum_buffer' and moments[name] is None:  # SGD without momentum
                    continue
                if not isinstance(moments[name], torch.Tensor) or moments[name].shape != parameter.shape:
                    raise ValueError(f'{name} is not of the shape of its parameter, {tuple(parameter.shape)}')
            names.add(frozenset(moments))
    if len(names - {frozenset()}) > 1:
        raise ValueError('parameters have different moments')


def head_size(weights: dict[str, Any], classifier: str | tuple[str, ...], path: str) -> int:
    """Classes that the head of a checkpoint's weights tells apart. Raises InputError without a head of that name."""
    classifier = classifier if isinstance(classifier, str) else classifier[0]  # DeiT's second head is for distillation
    bias = weights.get(f'{classifier}.bias')
    if not isinstance(bias, torch.Tensor) or bias.ndim != 1:
        names = ', '.join(map(str, list(weights)[:3]))
        raise InputError(f'{path}: no {classifier}.bias among its weights ({names}, ...): of another kind of model'
                         + origin_note(weights, {}))
    return len(bias)


def program_of(checkpoint: dict[str, Any]) -> str:
    """The program that wrote a checkpoint: as its flags say, else as its weights do; what says nothing is of pixels."""
    flags = saved_flags(checkpoint).keys()
    # a task of main_continual.py has the flags of the program whose models it trains
    for program, own in ((SEIT, {'train_token_file', 'noise_recipe'}), (PIXELS, {'train_path', 'aug'})):
        if own <= flags:
            return program
    return origin(checkpoint['model']) or PIXELS


def origin(weights: dict[str, Any]) -> str:
    """The program that makes weights of these names and shapes; '' for none of the three on tokens.

    Published files do not say it, so the weights decide.
    """
    if 'mlm_layer.bias' in weights:
        return PRETRAIN
    if CODES in weights:
        return FINETUNE
    stem = weights.get('patch_embed.proj.weight')
    if isinstance(stem, torch.Tensor) and stem.ndim == 4 and stem.shape[1] != 3 and stem.shape[2] <= 4:
        return SEIT  # images have 3 channels
    return ''


def origin_note(weights: dict[str, Any], wanted: dict[str, Any]) -> str:
    """For an error about weights that do not fit a model: which program made them, where it is another than wanted."""
    program = origin(weights)
    return f' (these are weights of {program})' if program and program != origin(wanted) else ''


def check_origin(weights: dict[str, Any], programs: Sequence[str], path: str) -> None:
    """InputError unless the weights of a file belong to one of some programs."""
    program = origin(weights)
    if program not in programs:
        what = f'belong to {program}, whose network is another' if program else 'are of no model of masked tokens'
        raise InputError(f'{path}: its weights {what}: give a checkpoint of {" or ".join(programs)}')


def check_codes(weights: dict[str, Any], codebook_size: int, path: str) -> None:
    """InputError unless the weights of a model that reads codes are for so many of them."""
    table = weights.get(CODES)
    if isinstance(table, torch.Tensor) and len(table) != codebook_size:
        raise InputError(f'{path}: its model reads {len(table)} codes, but the codebook has {codebook_size} rows: give '
                         'the codebook that it was trained with in --codebook-path')


def without_token_adapt(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights without TokenAdapt's, which published checkpoints hold beside the model's."""
    return {name: value for name, value in weights.items() if not str(name).startswith(TOKEN_ADAPT)}
