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
import recipe
from engine import rank_indices, train
from flags import Parser, integer
from seitpp.halves import ADAPTED_MIXUP
from seitpp.token_adapt import FINER, SIZE, RandomGeometry, TokenAdapt, size_of_width
from seitpp.token_adapt_training import Change, CodePairs, evaluate_token_adapt, save_token_adapt
from token_augment import RandomResizedCrop
from training.checkpoints import flags_to_save, progress_of, resume
from training.loss_meter import NotFinite
from training.preemption import REQUEUE
from training.run_folder import RunFolder, RunLog, find_checkpoint
from training.run_info import print_batch, print_model, run_record
from scripts.train_tokenizer import add_image_flags, hold_out
import flags
from image_tokenizer.vitvqgan import HEAD_DIM
from image_tokenizer.tokenizing import load_models
from utils import InputError, check_same_on_all_ranks, init_distributed, keep_freed_memory, on_main, print0, rank, run

FILE = 'tokenadapt.ckpt'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError, also for values that cannot work together."""
    parser = Parser(__doc__.splitlines()[0])
    add_image_flags(parser)

    add = parser.add_argument_group('TokenAdapt').add_argument
    add('--tokenizer-path', required=True, metavar='FILE', help='see image_tokenizer/tokenizers.py')
    add('--codebook-path', metavar='FILE', help="default: the tokenizer's own")
    add('--width', type=integer(HEAD_DIM), default=SIZE.dim, help=f'a multiple of {HEAD_DIM}, the width of a head; the '
        'published program reads only the default')
    add('--depth', type=integer(1), default=SIZE.depth, help='layers of either network')

    add = parser.add_argument_group('augmentation').add_argument
    add('--input-size', type=integer(2), help='side of the crops, in pixels; default: 7/8 of --image-size')
    add('--rrc-ratio', type=flags.SHARE, default=0.08, help='smallest area of the random-resized crop')
    add('--mixup-prob', type=flags.SHARE, default=0.25, help=f'of Mixup in a batch, of alpha {ADAPTED_MIXUP}')

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
    # ------------------------------------------------------------ set-up
    device = init_distributed(args.device, args.dist_url, args.dist_timeout)
    check_same_on_all_ranks(recipe.flags_alike(args))
    recipe.set_up_torch(args)
    folder = RunFolder(args.output_dir, args.save_every, (FILE,))
    checkpoint, path = find_checkpoint(args.output_dir, args.resume, outputs=(FILE,))

    # ------------------------------------------------------------ data and model
    tokenizer, codebook = load_models(args.tokenizer_path, None, args.codebook_path, args.image_size, False)
    size = crop_side(args, tokenizer.patch_size)
    grid_size = args.image_size // tokenizer.patch_size
    images, held_out = hold_out(args, device)
    check_same_on_all_ranks({'the list of images': images.source.digest(), 'held-out images': len(held_out),
                             'codebook': tuple(codebook.shape), **progress_of(checkpoint)})
    keep_freed_memory(device)
    pairs = CodePairs(tokenizer.requires_grad_(False).eval().to(device), codebook.to(device), grid_size, size)
    width = size_of_width(args.width, args.depth)
    model = TokenAdapt(*codebook.shape, grid_size, size, width).to(device)
    amp = args.amp or recipe.default_amp(device)
    print0(f'{len(images):,} images to train on, {len(held_out):,} held out; {grid_size}x{grid_size} of '
           f'{len(codebook)} codes, crops of {size}x{size}')
    print_model('TokenAdapt', model, device, amp)
    crop = RandomResizedCrop(codebook, FINER * grid_size, FINER * size, args.rrc_ratio, device)
    geometry = RandomGeometry(crop.draw, FINER * size)

    def loss_of(model: nn.Module, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        mixed = np.random.random() < args.mixup_prob
        kept = np.random.beta(ADAPTED_MIXUP, ADAPTED_MIXUP) if mixed else 1.
        return pairs.loss(model, pixels, Change(geometry.draw(len(pixels), FINER * grid_size, generator), kept))

    def indices_of(epoch: int, start: int, stop: int) -> np.ndarray:
        return images.order(epoch)[start * args.batch_size:stop * args.batch_size]

    def batches_of(epoch: int, start: int) -> Iterator[torch.Tensor]:
        return images.batches(indices_of(epoch, start, steps))

    def evaluate_of(model: nn.Module, name: str) -> dict[str, float]:
        batches = held_out.batches(rank_indices(len(held_out), True))
        stats = evaluate_token_adapt(model, pairs, batches, geometry, amp, name)
        if args.output_dir and bool(name) == args.model_ema:
            on_main(save_token_adapt, model, folder.path / FILE)
        return stats

    # ------------------------------------------------------------ optimizer and resume
    steps = recipe.count_steps(args, len(images.order(0)), args.data_path)
    state = recipe.make_state(args, model, device, (codebook.shape[1], grid_size, grid_size))
    if checkpoint:
        resume(state, checkpoint, path, vars(args), steps)
        del checkpoint  # its tensors are copied
        print0(f'{path}: resumed at epoch {state.epoch}, step {state.step}')
    print_batch(args.batch_size, args.accum_iter, steps, args.epochs, recipe.scaled_lr(args))

    # ------------------------------------------------------------ train
    folder.begin(run_record(vars(args), device), {'args': flags_to_save(vars(args)), 'classes': None})
    log = RunLog(args.output_dir, state.epoch, args.tensorboard)
    try:
        finished = train(state, batches_of, loss_of, evaluate_of, folder, log, args.epochs,
                         recipe.step_options(args, steps))
    except NotFinite as error:
        bad = images.chosen[indices_of(error.epoch, error.step, error.step + 1)]
        folder.save_bad_step(error, rank(), args.seed, bad.tolist())
        raise
    return 0 if finished else REQUEUE


if __name__ == '__main__':
    run(main, parse_args)
