"""Benchmark: images to codes, as tokenize_images.py makes them, with and without decoding the images.

    python benchmarks/encode.py --amp off bf16 --compile

(Named so because a file tokenize.py here would stand before Python's own module of that name.)
"""
import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from flags import DEVICE_HELP, integer
from image_data.sources import Source, load_images, open_source
from image_tokenizer.tokenizers import load_tokenizer
from image_tokenizer.tokenizing import Encoder, encode_part
from token_files.codebook import load_codebook
from token_files.parts import PartsFolder
from utils import InputError, cores, keep_freed_memory, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = common.make_parser('Measure images to codes, with and without decoding the images.', 5)
    add = parser.add_argument
    add('--device', default='auto', help=DEVICE_HELP)
    add('--tokenizer', default='base', choices=common.TOKENIZERS, help='ViT-VQGAN of that size, or patches')
    add('--tokenizer-path', metavar='FILE', help='a tokenizer that is there, instead; with --codebook-path')
    add('--codebook-path', metavar='FILE')
    add('--amp', nargs='+', default=['off', 'bf16'], choices=['off', 'bf16'])
    add('--compile', action='store_true', help='measure each with torch.compile too')
    add('--image-size', type=integer(1), default=256, help='pixels on a side')
    add('--batch-size', type=integer(1), default=64, help='images in a batch')
    add('--images', type=integer(1), default=1024, help='images with decoding')
    add('--num-workers', type=integer(), default=cores(), help='processes that decode images')
    args = parser.parse_args(argv)
    if bool(args.tokenizer_path) != bool(args.codebook_path):
        raise InputError('give --tokenizer-path and --codebook-path together')
    return args


def make_encoders(args: argparse.Namespace, device: torch.device) -> dict[str, Encoder]:
    """An encoder for each precision, compiled too where that is asked for, by name."""
    if args.tokenizer_path:
        tokenizer = load_tokenizer(args.tokenizer_path).to(device)
        codebook = load_codebook(args.codebook_path).to(device)
    else:
        tokenizer, codebook = common.make_tokenizer(args.tokenizer, device)
    encoders = {}
    for amp in args.amp:
        name = 'fp32' if amp == 'off' else amp
        encoders[name] = Encoder(tokenizer, codebook, amp, args.tokenizer)
        if args.compile:
            encoders[f'{name} compiled'] = Encoder(torch.compile(tokenizer), codebook, amp, args.tokenizer)
    return encoders


def encode_all(encoder: Encoder, source: Source, parts: PartsFolder, args: argparse.Namespace,
               device: torch.device) -> None:
    """Decode and encode all images, and write the parts."""
    batches = [batch for part in range(len(parts)) for batch in parts.batches(part)]
    images = load_images(source, batches, args.image_size, workers=args.num_workers, pin_memory=device.type == 'cuda')
    for part in range(len(parts)):
        encode_part(parts, part, images, encoder, lambda count: None)


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """The numbers of the JSON line; images and codes are made in `folder`."""
    torch.backends.cudnn.allow_tf32 = False  # as tokenize_images.py
    keep_freed_memory(device)
    encoders = make_encoders(args, device)
    pixels = torch.randint(256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8).to(device)
    alone = {name: lambda encoder=encoder: encoder(pixels) for name, encoder in encoders.items()}
    seconds = common.take_turns(alone, args.repeats, device)
    result = {'tokenizer_images_per_second': {
        name: common.spread(args.batch_size / values) for name, values in seconds.items()}}

    common.make_images(folder / 'images', args.images)
    source = open_source(str(folder / 'images'))
    parts = PartsFolder(folder / 'parts', args.images, args.batch_size)
    whole = {name: lambda encoder=encoder: encode_all(encoder, source, parts, args, device)
             for name, encoder in encoders.items()}
    seconds = common.take_turns(whole, args.repeats, device)
    return result | {'with_decoding_images_per_second': {
        name: common.spread(args.images / values) for name, values in seconds.items()}}


def main(args: argparse.Namespace) -> None:
    common.run_benchmark('tokenize', functools.partial(measure, args), vars(args))


if __name__ == '__main__':
    run(main, parse_args)
