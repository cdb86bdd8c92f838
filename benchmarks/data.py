"""Benchmark: token file to model input, beside a plain one-hot implementation.

    python benchmarks/data.py --device cpu --threads 1
"""
import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_seit
import recipe
from benchmarks import common
from benchmarks.one_hot import OneHot
from flags import DEVICE_HELP, integer
from samplers import shuffled
from token_augment import RandomResizedCrop
from token_dataset import choose_data_device, open_splits
from token_files.codebook import load_codebook, load_synonyms
from utils import keep_freed_memory, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = common.make_parser('Measure token file to model input, beside a plain one-hot implementation.', 7,
                                clock=True)
    add = parser.add_argument
    add('--device', default='auto', help=DEVICE_HELP)
    add('--batch-size', type=integer(1), default=128, help='images in a batch')
    add('--batches', type=integer(1), default=8, help='batches a round')
    add('--one-hot-images', type=integer(1), default=32, help='images a round of the one-hot implementation')
    add('--grid', type=integer(2), default=32, help="codes on a side; 7/8 of them are the model's input")
    add('--data-device', default='auto', choices=['auto', 'cpu', 'cuda'],
        help='where the tokens live, as in main_seit.py')
    add('--compile', action='store_true', help='torch.compile the crop')
    return parser.parse_args(argv)


def crop_difference(fast: RandomResizedCrop, slow: OneHot, codes: torch.Tensor, device: torch.device) -> float:
    """Largest difference of the two crops over codes (B, g, g) on the CPU, given the same boxes.

    Raises:
        RuntimeError: when they are not one function.
    """
    # a fast augmentation that computes something else would be no comparison
    boxes = fast.draw(len(codes), torch.Generator().manual_seed(0))
    fast_path = fast.resample(codes.long().to(device), boxes.to(device)).cpu()
    plain = torch.stack([slow.crop(image, box) for image, box in zip(codes.numpy(), boxes.tolist())])
    difference = float((fast_path - plain).abs().max())
    if difference > 1e-4:
        raise RuntimeError(f'the crops differ by {difference}: the two implementations are not of one function')
    return difference


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """The numbers of the JSON line; data are made in `folder`."""
    images = args.batch_size * args.batches
    size = args.grid * 7 // 8
    main_flags = [*common.make_tokens(folder, images, args.grid, 1000), '--data-device', args.data_device, '--no-eval']
    if args.compile:
        main_flags.append('--compile')
    main_args = main_seit.parse_args(main_flags)
    recipe.set_up_torch(main_args)
    codebook = load_codebook(main_args.codebook_path)
    datasets = open_splits(recipe.split_files(main_args), codebook, main_args.codebook_path,
                           main_args.token_cache, size, device)
    choose_data_device(datasets, main_args.data_device, device)
    keep_freed_memory(device)
    data = datasets['train']
    augment = main_seit.make_augment(main_args, codebook, args.grid, size, device, mixup=None)
    synonyms = load_synonyms(main_args.token_synonym_dict, len(codebook), main_args.token_synonym_thres)
    noise = main_args.token_noise_prob, main_args.token_noise_scale, main_args.token_noise_std
    one_hot = OneHot(codebook, size, synonyms, main_args.eda_rc_prob, main_args.replace_token_prob,
                     main_args.eda_sc_prob, main_args.swap_token_scale, main_args.rrc_ratio, noise)
    crop = RandomResizedCrop(codebook, args.grid, size, main_args.rrc_ratio, device)
    difference = crop_difference(crop, one_hot, data.batch(range(min(16, images)))[0], device)
    order = shuffled(images, 1, 0, 0, 0)
    generator = torch.Generator(device)

    def fast_path() -> None:
        for batch in data.batches(order, args.batch_size, device, True):
            augment(*batch, generator)

    def plain() -> None:
        one_hot(data.batch(order[:args.one_hot_images])[0])

    seconds = common.take_turns({'ours': fast_path, 'plain': plain}, args.repeats, device, args.clock)
    rate = images / seconds['ours']
    plain_rate = args.one_hot_images / seconds['plain']
    return {'images_per_second': common.spread(rate), 'one_hot_images_per_second': common.spread(plain_rate),
            'ratio': common.spread(rate / plain_rate), 'ms_an_image': common.spread(1e3 / rate),
            'one_hot_ms_an_image': common.spread(1e3 / plain_rate), 'crop_difference': difference,
            'tokens_on_gpu': data.resident is not None}


def main(args: argparse.Namespace) -> None:
    common.run_benchmark('data', functools.partial(measure, args), vars(args))


if __name__ == '__main__':
    run(main, parse_args)
