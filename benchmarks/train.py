"""Benchmark: training steps, with the real data path and with a constant batch. Takes the flags of main_seit.py too.

    python benchmarks/train.py --model deit_base_token_32 --batch-size 512 --amp bf16 --compile
"""
import argparse
import functools
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_seit
import recipe
from benchmarks import common
from engine import train_one_epoch
from flags import integer
from models_seit import create_model
from samplers import shuffled
from token_dataset import choose_data_device, open_splits
from token_files.codebook import load_codebook
from utils import AMP_DTYPE, InputError, keep_freed_memory, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """This benchmark's arguments, and main_seit.py's as `main_flags`. Raises InputError."""
    parser = common.make_parser('Measure training steps, with the real data path and with a constant batch. Takes the '
                                'flags of main_seit.py too.', 5, clock=True)
    parser.add_argument('--steps', type=integer(1), default=50, help='batches a round')
    parser.add_argument('--grid', type=integer(2), default=32, help='codes on a side')
    args = common.parse_with_main(parser, argv)
    accum_iter = main_seit.parse_args(args.main_flags).accum_iter
    if args.steps % accum_iter:
        raise InputError(f'--steps {args.steps} is no multiple of --accum-iter {accum_iter}')
    return args


def matmul_peak(device: torch.device, amp: str, repeats: int, clock: str) -> float:
    """The device's measured peak in FLOP/s: the best of large square matrix products in the precision of `amp`."""
    best = 0.
    for n in (4096, 8192, 16384) if device.type == 'cuda' else (1024, 2048):
        a, b = (torch.randn(n, n, device=device, dtype=AMP_DTYPE.get(amp)) for _ in range(2))
        seconds = common.take_turns({'matmul': lambda a=a, b=b: torch.mm(a, b)}, max(repeats, 10), device, clock)
        best = max(best, 2 * n ** 3 / seconds['matmul'].min())
    return best


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """The numbers of the JSON line; data are made in `folder`."""
    # what main_seit.main makes before its loop
    first_args = main_seit.parse_args(args.main_flags)
    batch_size = first_args.batch_size
    images = args.steps * batch_size
    token_flags = common.make_tokens(folder, images, args.grid, first_args.nb_classes)
    main_args = main_seit.parse_args([*args.main_flags, *token_flags, '--no-eval'])
    recipe.set_up_torch(main_args)
    codebook = load_codebook(main_args.codebook_path)
    size = main_args.input_size // main_args.token_patch_size
    input_shape = codebook.shape[1], size, size
    datasets = open_splits(recipe.split_files(main_args), codebook, main_args.codebook_path,
                           main_args.token_cache, size, device)
    choose_data_device(datasets, main_args.data_device, device)
    keep_freed_memory(device)
    data = datasets['train']
    model = create_model(main_args.model, main_args.model_kwargs, main_args.nb_classes, size, codebook.shape[1],
                         main_args.stem, main_args.token_patch_size, main_args.drop, main_args.drop_path).to(device)
    flops = common.forward_flops(model, input_shape)
    mixup, criterion = recipe.make_loss(main_args, main_args.nb_classes)
    unmixed, augment = (main_seit.make_augment(main_args, codebook, data.grid_size, size, device, mixing)
                        for mixing in (None, mixup))
    state = recipe.make_state(main_args, model, device, input_shape, args.steps)
    options = recipe.step_options(main_args, args.steps)

    # The two that are compared: their difference is what reading and augmenting take of a step.
    order = shuffled(images, 1, 0, 0, 0)
    constant_x, first_targets = unmixed(*next(data.batches(order, batch_size, device)), torch.Generator(device))

    def loss_of_data(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        x, targets = augment(*batch, generator)
        return criterion(model(x), targets)

    def loss_of_constant(model: nn.Module, targets: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        x, targets = mixup(constant_x, targets) if mixup else (constant_x, targets)
        return criterion(model(x), targets)

    def with_data() -> None:
        state.step = 0
        train_one_epoch(state, data.batches(order, batch_size, device, main_args.pin_mem), loss_of_data, options)

    def constant() -> None:
        state.step = 0
        train_one_epoch(state, [first_targets] * args.steps, loss_of_constant, options)

    seconds = common.take_turns({'data': with_data, 'constant': constant}, args.repeats, device, args.clock)
    peak = matmul_peak(device, state.amp, args.repeats, args.clock)
    rate = images / seconds['data']
    memory = (torch.cuda.max_memory_allocated(device) if device.type == 'cuda'
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {'images_per_second': common.spread(rate),
            'constant_images_per_second': common.spread(images / seconds['constant']),
            'data_to_constant': common.spread(seconds['constant'] / seconds['data']),
            'ms_a_step': common.spread(1e3 * seconds['data'] / args.steps), 'forward_gflop_an_image': flops / 1e9,
            'matmul_peak_tflops': peak / 1e12, 'flops_utilization': common.spread(3 * flops * rate / peak),
            'peak_memory_mb': round(memory / 1e6)}


def main(args: argparse.Namespace) -> None:
    common.run_benchmark('train', functools.partial(measure, args), vars(args))


if __name__ == '__main__':
    run(main, parse_args)
