"""Benchmark: evaluation on tokens and on images. Takes the flags of main_seit.py too.

    python benchmarks/evaluate.py --model deit_base_token_32 --amp bf16
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
from engine import evaluate, rank_indices
from evaluate_on_images import CodeBatches
from flags import integer
from image_data.sources import load_images, open_source
from models_seit import create_model
from token_augment import EvalTransform
from token_dataset import choose_data_device, open_splits
from token_files.codebook import load_codebook
from utils import cores, keep_freed_memory, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """This benchmark's arguments, and main_seit.py's as `main_flags`. Raises InputError."""
    parser = common.make_parser('Measure evaluation on tokens and on images. Takes the flags of main_seit.py too.', 5)
    add = parser.add_argument
    add('--tokenizer', default='base', choices=common.TOKENIZERS, help='ViT-VQGAN of that size, or patches')
    add('--grid', type=integer(2), default=32, help='codes on a side; images have 8 times as many pixels')
    add('--images', type=integer(1), default=1024, help='images to evaluate')
    add('--image-workers', type=integer(), default=cores(), help='processes that decode images')
    return common.parse_with_main(parser, argv)


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """The numbers of the JSON line; data are made in `folder`."""
    # tokens and model, as main_seit.main makes them
    first_args = main_seit.parse_args(args.main_flags)
    classes = min(10, first_args.nb_classes)
    main_args = main_seit.parse_args([*args.main_flags, *common.make_tokens(folder, args.images, args.grid, classes)])
    recipe.set_up_torch(main_args)
    amp = main_args.amp or recipe.default_amp(device)
    codebook = load_codebook(main_args.codebook_path)
    size = main_args.input_size // main_args.token_patch_size
    data = open_splits(recipe.split_files(main_args), codebook, main_args.codebook_path,
                       main_args.token_cache, size, device)['val']
    choose_data_device({'val': data}, main_args.data_device, device)
    keep_freed_memory(device)
    model = create_model(main_args.model, main_args.model_kwargs, main_args.nb_classes, size,
                         codebook.shape[1], main_args.stem, main_args.token_patch_size).to(device)

    # images and tokenizer, as evaluate_on_images.main does
    common.make_images(folder / 'images', args.images, classes)
    source = open_source(str(folder / 'images'))
    tokenizer, rows = common.make_tokenizer(args.tokenizer, device)
    order = rank_indices(args.images, False)

    def on_tokens() -> None:
        # main_seit.py evaluates batches half as large again as those of training, since it needs no gradients
        batches = data.batches(order, int(1.5 * main_args.batch_size), device, main_args.pin_mem)
        evaluate(model, batches, EvalTransform(codebook, size, device), amp=amp)

    def on_images() -> None:
        slices = [order[start:start + main_args.batch_size] for start in range(0, len(order), main_args.batch_size)]
        images = load_images(source, slices, 8 * args.grid, workers=args.image_workers,
                             pin_memory=main_args.pin_mem and device.type == 'cuda')
        batches = CodeBatches(images, torch.from_numpy(source.labels), tokenizer, rows, 'off')
        evaluate(model, batches, EvalTransform(rows, size, device), amp=amp)

    seconds = common.take_turns({'tokens': on_tokens, 'images': on_images}, args.repeats, device)
    return {f'{name}_images_per_second': common.spread(args.images / values) for name, values in seconds.items()}


def main(args: argparse.Namespace) -> None:
    common.run_benchmark('eval', functools.partial(measure, args), vars(args))


if __name__ == '__main__':
    run(main, parse_args)
