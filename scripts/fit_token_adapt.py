"""Train TokenAdapt, SeiT++'s pixel augmentation for codes, for your own tokenizer and images.

    python scripts/fit_token_adapt.py --data-path IMAGES/train --image-size 64 --width 128 \\
        --tokenizer-path demo/tokenizer.pt --codebook-path demo/codebook.ckpt --output-dir output/adapt
    torchrun --nproc_per_node=8 scripts/fit_token_adapt.py --data-path IMAGES/train \\
        --tokenizer-path tokens/tokenizer.safetensors --codebook-path tokens/codebook.ckpt --output-dir output/adapt

How the published one was trained is not known; seitpp/token_adapt_training.py says what is done here. Images come as in
tokenize_images.py, some are held out. After each epoch --output-dir has tokenadapt.ckpt, for --tokenadapt-path of the
programs that train, and a checkpoint, from which --resume auto continues exactly. A line tells how many codes of
changed held-out images come out right, and in brackets how many if codes were only flipped or moved.
"""
import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flags
import recipe
from engine import rank_indices
from flags import Parser, add_image_flags, integer
from image_data.dataset import facts_of, hold_out
from image_tokenizer.tokenizing import load_models
from image_tokenizer.vitvqgan import HEAD_DIM
from samplers import shuffled
from seitpp.halves import ADAPTED_MIXUP
from seitpp.token_adapt import FINER, SIZE, RandomGeometry, TokenAdapt, manifest_of, size_of_width
from seitpp.token_adapt_training import Change, CodePairs, evaluate_token_adapt, save_token_adapt
from token_augment import RandomResizedCrop
from token_files.made_with import digest_of_entry, entry_of_codebook, identity_of_tokenizer
from utils import InputError, on_main, print0, rank, run, world_size

FILE = 'tokenadapt.ckpt'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError, also for values that cannot work together."""
    parser = Parser(__doc__)
    add_image_flags(parser)

    add = parser.add_group('TokenAdapt')
    add('--tokenizer-path', required=True, metavar='FILE', of_a_rank=True,
        help='the tokenizer of the tokens (image_tokenizer/tokenizers.py)')
    add('--codebook-path', metavar='FILE', of_a_rank=True,
        help="the codebook of the tokens; default: the one in the tokenizer's file")
    flags.add_allow_torchscript(add)
    add('--width', type=integer(HEAD_DIM), default=SIZE.dim,
        help=f'width of both networks, a multiple of {HEAD_DIM}, the width of a head; the published program reads only '
             'the default')
    add('--depth', type=integer(1), default=SIZE.depth, help='layers of each network')

    add = parser.add_group('augmentation')
    add('--input-size', type=integer(2), help='side of the crops, in pixels; default: 7/8 of --image-size')
    add('--rrc-ratio', type=flags.FRACTION, default=0.08, help='smallest area of the random-resized crop')
    add('--mixup-prob', type=flags.FRACTION, default=0.25, help=f'of Mixup in a batch, of alpha {ADAPTED_MIXUP}')

    flags.add_average_flags(flags.add_step_flags(parser))
    flags.add_output_flags(parser)
    parser.set_defaults(epochs=30, lr=8e-3, weight_decay=1e-2, clip_grad=1., warmup_epochs=0, model_ema=False,
                        start_epoch=0)
    args = parser.parse_args(argv)
    recipe.check_output_flags(args)
    if args.width % HEAD_DIM:
        near = args.width // HEAD_DIM * HEAD_DIM
        raise InputError(f'--width {args.width}: heads of {HEAD_DIM} do not divide it: choose {near} or '
                         f'{near + HEAD_DIM}')
    return args


def crop_side(args: argparse.Namespace, patch_size: int) -> int:
    """s, codes on a side of a crop. Raises InputError for sizes that do not work with patches of this size."""
    if patch_size % FINER:
        raise InputError(f'{args.tokenizer_path}: patches of {patch_size}: TokenAdapt wants an even number of pixels')
    size = args.input_size or max(1, args.image_size * 7 // 8 // patch_size) * patch_size
    if size % patch_size or size > args.image_size:
        raise InputError(f'--input-size {size}: give a multiple of {patch_size}, the pixels of a code, up to '
                         f'--image-size {args.image_size}')
    return size // patch_size


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> int:
    """Train. Returns the exit code."""
    device, folder, checkpoint, path = recipe.start(args, outputs=(FILE, manifest_of(FILE).name))

    # ------------------------------------------------------------ data and model
    tokenizer, codebook = load_models(args.tokenizer_path, None, args.codebook_path, args.image_size, False,
                                      args.allow_torchscript)
    size = crop_side(args, tokenizer.patch_size)
    grid_size = args.image_size // tokenizer.patch_size
    images, held_out = hold_out(args.data_path, args.val_path, args.val_images, args.seed, size=args.image_size,
                                batch_size=args.batch_size, device=device, workers=args.num_workers,
                                skip_bad=args.skip_bad_images, max_pixels=args.max_image_pixels,
                                exif_rotate=args.exif_rotate)
    made_with = {'tokenizer': identity_of_tokenizer(args.tokenizer_path), 'codebook': entry_of_codebook(
        codebook, args.codebook_path or args.tokenizer_path)}
    facts = facts_of(images, held_out) | {'tokenizer': digest_of_entry(made_with['tokenizer']),
                                          'codebook': made_with['codebook']['values_sha256']}
    facts = recipe.check_data(args, facts, checkpoint)
    pairs = CodePairs(tokenizer.requires_grad_(False).eval().to(device), codebook.to(device), grid_size, size)
    width = size_of_width(args.width, args.depth)
    model = TokenAdapt(*codebook.shape, grid_size, size, width).to(device)
    print0(f'{len(images):,} images to train on, {len(held_out):,} held out; {grid_size}x{grid_size} of '
           f'{len(codebook)} codes, crops of {size}x{size}')
    amp = recipe.print_model(args, 'TokenAdapt', model, device)
    crop = RandomResizedCrop(codebook, FINER * grid_size, FINER * size, args.rrc_ratio, device)
    geometry = RandomGeometry(crop.draw, FINER * size)

    def loss_of(model: nn.Module, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        mixed = np.random.random() < args.mixup_prob
        kept = np.random.beta(ADAPTED_MIXUP, ADAPTED_MIXUP) if mixed else 1.
        return pairs.loss(model, pixels, Change(geometry.draw(len(pixels), FINER * grid_size, generator), kept))

    def order_of(epoch: int) -> np.ndarray:
        order = shuffled(len(images), world_size(), rank(), args.seed, epoch)
        # order counts the images to train on; the source numbers them together with those held out
        return images.numbers[order[:args.epoch_images // world_size()] if args.epoch_images else order]

    def batches_of(indices: np.ndarray, epoch: int, start: int) -> Iterator[torch.Tensor]:
        return images.batches(indices, fill=True)

    def evaluate_of(model: nn.Module, name: str) -> dict[str, float]:
        batches = held_out.batches(held_out.numbers[rank_indices(len(held_out), True)])
        stats = evaluate_token_adapt(model, pairs, batches, geometry, amp, name)
        # with --model-ema both sets of weights are evaluated, and the averaged ones are written
        if args.output_dir and bool(name) == args.model_ema:
            on_main(save_token_adapt, model, folder.path / FILE, made_with)
        return stats

    # ------------------------------------------------------------ train
    steps = recipe.count_steps(args, len(order_of(0)), args.data_path)
    state = recipe.make_state(args, model, device, (codebook.shape[1], grid_size, grid_size), steps, facts)
    recipe.resume_run(args, state, checkpoint, path, steps)
    return recipe.fit(args, state, folder, steps, order_of, batches_of, loss_of, evaluate_of)


if __name__ == '__main__':
    run(main, parse_args)
