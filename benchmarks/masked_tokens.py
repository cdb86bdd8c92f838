"""Benchmark: steps of masked-token pre-training and of fine-tuning beside SeiT's, and what TokenAdapt takes of them.

    python benchmarks/masked_tokens.py --batch-size 128 --amp bf16
"""
import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_mtm_finetune
import main_mtm_pretrain
import main_seit
import recipe
from benchmarks import common
from engine import train_one_epoch
from flags import DEVICE_HELP, KeyValues, integer
from image_tokenizer.vitvqgan import HEAD_DIM
from models_seit import create_model as create_seit
from samplers import shuffled
from seitpp import mtm_recipe
from seitpp.models_mtm import PATCH, create_model, draw_masks, masked_token_loss
from seitpp.token_adapt import SIZE, TokenAdapt, size_of_width
from seitpp.token_adapt_training import save_token_adapt
from token_dataset import TokenDataset
from token_files.codebook import load_codebook
from training.checkpoints import TrainState
from utils import device_of, run

CLASSES = 1000


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = common.make_parser(__doc__, 5, clock=True)
    add = parser.add_argument
    add('--steps', type=integer(1), default=20, help='batches a round')
    add('--grid', type=integer(2), default=32, help='codes on a side')
    add('--batch-size', type=integer(4), default=128, help='images in a batch')
    add('--input-size', type=integer(2), default=224, help='pixels on a side of the input, 8 to a code')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='sizes of all three ViTs')
    add('--decoder-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='sizes of the decoder of pre-training')
    add('--width', type=integer(HEAD_DIM), default=SIZE.dim, help=f'width of TokenAdapt, a multiple of {HEAD_DIM}')
    add('--amp', choices=['bf16', 'fp16', 'off'], help='mixed precision')
    add('--device', default='auto', help=DEVICE_HELP)
    return parser.parse_args(argv)


def words_of(values: dict[str, Any]) -> list[str]:
    """Words of --model-kwargs."""
    return [f'{key}={value}' for key, value in values.items()]


def seit_step(args: argparse.Namespace, codebook: torch.Tensor, data: TokenDataset, device: torch.device) -> tuple:
    """State and loss of main_seit.py's loop."""
    size = args.input_size // args.token_patch_size
    model = create_seit(args.model, args.model_kwargs, CLASSES, size, codebook.shape[1], args.stem,
                        args.token_patch_size, drop_path=args.drop_path).to(device)
    mixup, criterion = recipe.make_loss(args, CLASSES)
    augment = main_seit.make_augment(args, codebook, data.grid_size, size, device, mixup)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        x, targets = augment(*batch, generator)
        return criterion(model(x), targets)

    return recipe.make_state(args, model, device, (codebook.shape[1], size, size), 1), loss_of


def pretraining_step(args: argparse.Namespace, codebook: torch.Tensor, data: TokenDataset,
                     device: torch.device) -> tuple:
    """State and loss of main_mtm_pretrain.py's loop."""
    size = mtm_recipe.check_sizes(args)
    model = create_model(args.model, args.model_kwargs, len(codebook), size).to(device)
    token_adapt = mtm_recipe.open_token_adapt(args.tokenadapt_path, codebook, device)
    prepare = mtm_recipe.make_input(args, codebook.to(device), data.grid_size, size, token_adapt)
    ratio = main_mtm_pretrain.make_mask_ratio(args)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        codes, _ = prepare(*batch, generator)
        masks = draw_masks(len(codes), (size // PATCH) ** 2, ratio, generator)
        return masked_token_loss(model(codes, *masks), codes, masks.masked, args.smoothing, args.bce_loss)

    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), fused=True)
    inputs = torch.zeros(args.batch_size, size, size, dtype=torch.int64, device=device)
    masks = draw_masks(len(inputs), (size // PATCH) ** 2, ratio, torch.Generator(device))
    amp = args.amp or recipe.default_amp(device)
    return mtm_recipe.make_state(args, model, optimizer, amp, len(data), (inputs, *masks)), loss_of


def finetuning_step(args: argparse.Namespace, codebook: torch.Tensor, data: TokenDataset,
                    device: torch.device) -> tuple:
    """State and loss of main_mtm_finetune.py's loop."""
    size = mtm_recipe.check_sizes(args)
    model = main_mtm_finetune.make_model(args, len(codebook), size, CLASSES).to(device)
    token_adapt = mtm_recipe.open_token_adapt(args.tokenadapt_path, codebook, device)
    mixup, criterion = recipe.make_loss(args, CLASSES)
    prepare = mtm_recipe.make_input(args, codebook.to(device), data.grid_size, size, token_adapt, mixup)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        codes, targets = prepare(*batch, generator)
        return criterion(model(codes), targets)

    inputs = torch.zeros(args.batch_size, size, size, dtype=torch.int64, device=device)
    optimizer = main_mtm_finetune.make_optimizer(args, model)
    amp = args.amp or recipe.default_amp(device)
    return mtm_recipe.make_state(args, model, optimizer, amp, len(data), (inputs,)), loss_of


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """The numbers of the JSON line; data are made in `folder`."""
    images = args.steps * args.batch_size
    files = common.make_tokens(folder, images, args.grid, CLASSES)
    codebook = load_codebook(folder / 'codebook.ckpt')
    data = TokenDataset(str(common.token_file(folder)), str(folder / 'set-label.txt'), len(codebook), '', device)
    torch.manual_seed(0)
    token_adapt = TokenAdapt(*codebook.shape, args.grid, args.input_size // 8, size_of_width(args.width))
    save_token_adapt(token_adapt, folder / 'tokenadapt.ckpt')
    common_flags = ['--batch-size', str(args.batch_size), '--input-size', str(args.input_size), '--device', args.device,
             *(['--amp', args.amp] if args.amp else [])]
    sizes = words_of(args.model_kwargs)
    decoder = words_of(args.decoder_kwargs)
    programs = {'seit': (main_seit, seit_step, [*files, '--nb-classes', str(CLASSES)], sizes),
                'pretrain': (main_mtm_pretrain, pretraining_step, files[:2] + files[4:6], [*sizes, *decoder]),
                'finetune': (main_mtm_finetune, finetuning_step, files, sizes)}
    rounds = {}
    for name, (program, make, flags, kwargs) in programs.items():
        paths = {'': folder / 'tokenadapt.ckpt', '_without_tokenadapt': ''} if program is not main_seit else {'': ''}
        for suffix, path in paths.items():
            program_args = program.parse_args([*flags, *common_flags, '--model-kwargs', *kwargs,
                                               '--tokenadapt-path', str(path)])
            rounds[name + suffix] = make_round(program_args, *make(program_args, codebook, data, device), data,
                                               args.steps)
    seconds = common.take_turns(rounds, args.repeats, device, args.clock)
    result = {f'{name}_images_per_second': common.spread(images / values) for name, values in seconds.items()}
    for name in ('pretrain', 'finetune'):
        without = seconds[f'{name}_without_tokenadapt']
        result[f'{name}_tokenadapt_share'] = common.spread(1 - without / seconds[name])
        result[f'{name}_to_seit'] = common.spread(seconds['seit'] / seconds[name])
    return result


def make_round(args: argparse.Namespace, state: TrainState, loss_of: Callable, data: TokenDataset,
               steps: int) -> Callable:
    """A function that makes so many steps."""
    order = shuffled(len(data), 1, 0, 0, 0)
    options = recipe.step_options(args, steps)

    def run_steps() -> None:
        state.step = 0
        train_one_epoch(state, data.batches(order, args.batch_size, device_of(state.model)), loss_of, options)

    return run_steps


def main(args: argparse.Namespace) -> None:
    common.run_benchmark('masked_tokens', functools.partial(measure, args), vars(args))


if __name__ == '__main__':
    run(main, parse_args)
