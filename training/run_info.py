"""Derived numbers, printed once, and what a run is recorded with: versions, device."""
import os
import platform
from typing import Any

import timm
import torch
from torch import nn

from utils import print0, world_size

VERSIONS = {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__}
RECIPE_BATCH = 1024  # images a step of the published recipe: 8 GPUs x 128


def device_name(device: torch.device) -> str:
    """The GPU's name, another accelerator's kind, or the CPU's architecture and threads."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type != 'cpu':
        return device.type
    return f'CPU ({platform.machine()}, {torch.get_num_threads()} threads)'


def print_model(name: str, model: nn.Module, device: torch.device, amp: str) -> None:
    """Print the model's size, the device, the precision and the versions."""
    classes = f', {model.num_classes} classes' if hasattr(model, 'num_classes') else ''
    print0(f'model: {name}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters{classes}')
    versions = ', '.join(f'{package} {version}' for package, version in VERSIONS.items())
    print0(f'device: {world_size()} x {device_name(device)}, amp {amp}, {versions}')
    if amp != 'off' and device.type == 'cpu' and torch.backends.cpu.get_cpu_capability() == 'AVX2':
        print0(f'note: this CPU has no AVX-512, without which {amp} is many times slower than float32')


def print_batch(batch_size: int, accum_iter: int, steps: int, epochs: int, lr: float) -> None:
    """Print the effective batch, steps and learning rate. `steps` counts the batches of an epoch on a rank."""
    accumulated = f' x {accum_iter}' if accum_iter > 1 else ''
    batch = batch_size * world_size() * accum_iter
    print0(f'batch: {batch_size} x {world_size()}{accumulated} = {batch}, {steps // accum_iter} steps an epoch, '
           f'{epochs} epochs; learning rate {lr:.3g}')


def print_recipe_batch(batch: int, unscaled: bool) -> None:
    """Print a note where the effective batch is not the published one; `unscaled`: the learning rate is as given."""
    if batch != RECIPE_BATCH:
        print0(f'note: the published accuracy is for an effective batch of {RECIPE_BATCH} (8 GPUs x 128), this is '
               f'{batch}: the learning rate is {"as given" if unscaled else "scaled with it"}, but --warmup-lr, '
               '--min-lr and the number of steps are not, so accuracy may differ; processes x --batch-size x '
               '--accum-iter make the batch')


def run_record(flags: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What args.json holds: the flags as given, versions, device, processes, and the folder that paths start from."""
    return {**flags, 'versions': VERSIONS, 'device_name': device_name(device), 'world': world_size(),
            'started_in': working_folder()}


def working_folder() -> str | None:
    """The folder that relative paths start from; None where it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return None
