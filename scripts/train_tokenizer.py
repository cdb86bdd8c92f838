"""Train a ViT-VQGAN, an image tokenizer that SeiT's programs read, on your own images.

    python scripts/train_tokenizer.py --data-path IMAGES/train --image-size 64 --patch-size 8 --vit tiny \\
        --output-dir output/tokenizer
    torchrun --nproc_per_node=8 scripts/train_tokenizer.py --data-path IMAGES/train --output-dir output/tokenizer

Images come as in tokenize_images.py: class folders, a list file, tar shards or parquet files; some are held out. After
each epoch --output-dir has tokenizer.safetensors, codebook.ckpt, reconstruction.png (source, reconstruction and error
of held-out images) and a checkpoint, from which --resume auto continues exactly. There is no adversarial loss, so fine
texture blurs; published weights that were trained with one load in the same programs.
"""
import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flags
import recipe
from engine import rank_indices
from fileio.figures import draw_sheet, save_sheet, square_columns
from fileio.files import identity, save_torch
from fileio.labels import name_labels, spread
from flags import Parser, add_image_flags, integer, number
from image_data.dataset import Images, facts_of, hold_out
from image_data.sources import load_images
from image_tokenizer.perceptual_loss import PerceptualLoss
from image_tokenizer.tokenizers import check_sizes, unit_range
from image_tokenizer.vector_quantizer import ESTIMATORS, VectorQuantizer
from image_tokenizer.vitvqgan import HEAD_DIM, SIZES, Size, ViTVQGAN
from image_tokenizer.vq_start import fit_start
from image_tokenizer.vq_training import LossWeights, TokenizerTraining, evaluate_tokenizer, save_tokenizer
from samplers import shuffled
from utils import InputError, on_main, print0, rank, run, world_size

TOKENIZER = 'tokenizer.safetensors'
CODEBOOK = 'codebook.ckpt'
SHEET = 'reconstruction.png'
VITS = {'tiny': Size(256, 4, 4, 1024), **SIZES}
MLP_RATIO = 4  # feed-forward width of a ViT of an explicit --width
SHEET_IMAGES = 16
PATCHES_A_CODE = 64  # that new weights are fitted to


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError, also for values that cannot work together."""
    parser = Parser(__doc__)
    add = add_image_flags(parser)
    add('--flip', action=flags.ON_OFF, default=True, exact=True, help='mirror half of the training images')

    add = parser.add_group('tokenizer')
    add('--vit', default='small', choices=list(VITS), help='size of both encoder and decoder; tiny is for CPUs')
    add('--width', type=integer(HEAD_DIM),
        help=f"width of both, instead of --vit's; a multiple of {HEAD_DIM}, the width of a head")
    add('--depth', type=integer(1), help="layers of both, instead of --vit's")
    add('--mixer', choices=['attention', 'convolution'], default='attention',
        help="what patches learn of each other by: attention, as published, or ConvNeXt's convolutions over the grid, "
             'several times as fast on large grids')
    add('--patch-size', type=integer(1), default=8, help='pixels on a side that a code covers')
    add('--codes', type=integer(2, 1 << 16), default=391, help='rows of the codebook')
    add('--dim', type=integer(1), default=32, help='width of the codebook')
    add('--estimator', default='straight-through', choices=ESTIMATORS, help='how gradients pass the codebook')
    add('--decay', type=flags.FRACTION, default=0.9, help='of the moving averages that the codebook is, a step')
    add('--revive-below', type=flags.FRACTION, default=0.1,
        help='codes used less than this part of the mean use start again at a feature; 0: never')

    add = parser.add_group('loss')
    add('--l1', type=number(0), default=LossWeights.l1, help='weight of the mean absolute error of pixels')
    add('--l2', type=number(0), default=LossWeights.l2, help='weight of the mean squared error of pixels')
    add('--gradient', type=number(0), default=LossWeights.gradient,
        help='weight of the mean absolute error of differences between neighboring pixels')
    add('--perceptual', type=number(0), default=0.1, help='weight of the perceptual term, with --vgg-path')
    add('--vgg-path', default='', metavar='FILE', of_a_rank=True,
        help="adds a perceptual term: torchvision's VGG16 weights, a state dict as a torch file")
    add('--commitment', type=number(0), default=LossWeights.commitment,
        help='weight of the distance of features from their rows')

    flags.add_average_flags(flags.add_step_flags(parser))
    flags.add_output_flags(parser)
    # A learning rate of 1e-4 for a batch of 64, without warm-up: the fitted start is good, and large steps spoil it.
    parser.set_defaults(epochs=30, lr=8e-4, weight_decay=1e-4, clip_grad=1., warmup_epochs=0, model_ema_decay=0.995,
                        start_epoch=0)
    args = parser.parse_args(argv)
    recipe.check_output_flags(args)
    check_sizes(args.image_size, args.patch_size)
    part, what = (HEAD_DIM, f'heads of {HEAD_DIM}') if args.mixer == 'attention' else (4, 'the four parts of positions')
    if args.width and args.width % part:
        near = args.width // part * part
        choices = f'{near} or {near + part}' if near else str(part)
        raise InputError(f'--width {args.width}: {what} do not divide it: choose {choices}')
    if not (args.l1 or args.l2 or args.gradient):
        raise InputError('--l1, --l2 and --gradient are all 0: nothing would hold reconstructions to their images')
    return args


# ---------------------------------------------------------------- model

def make_training(args: argparse.Namespace, device: torch.device) -> TokenizerTraining:
    """What is trained, with new weights, on the device. Raises InputError."""
    size = VITS[args.vit]
    if args.width:
        size = size._replace(dim=args.width, heads=args.width // HEAD_DIM, mlp_dim=MLP_RATIO * args.width)
    if args.depth:
        size = size._replace(depth=args.depth)
    if args.mixer == 'convolution':
        size = size._replace(heads=0)
    model = ViTVQGAN(size, size, embed_dim=args.dim, image_size=args.image_size, patch_size=args.patch_size)
    quantizer = VectorQuantizer(args.codes, args.dim, args.decay, args.revive_below, args.estimator)
    perceptual = PerceptualLoss(args.vgg_path, device) if args.vgg_path else None
    weights = LossWeights(args.l1, args.l2, args.gradient, args.perceptual if perceptual else 0., args.commitment)
    return TokenizerTraining(model, quantizer, weights, perceptual).to(device)


def fitted_start(args: argparse.Namespace, training: TokenizerTraining, images: Images) -> dict[str, torch.Tensor]:
    """Fit new weights to the first images of the first epoch; returns them all, on the CPU. Raises InputError."""
    n = (args.image_size // args.patch_size) ** 2
    # the order of one process, whatever the number of ranks: the start does not depend on it
    order = shuffled(len(images), 1, 0, args.seed, 0)[:math.ceil(PATCHES_A_CODE * args.codes / n)]
    batches = list(images.batches(images.numbers[order], fill=True))
    generator = torch.Generator(batches[0].device).manual_seed(args.seed)
    fit_start(training.eval().model, training.quantizer, batches, generator)
    return {name: value.cpu() for name, value in training.state_dict().items()}


# ---------------------------------------------------------------- output

@torch.no_grad()
def reconstruction_sheet(training: TokenizerTraining, pixels: torch.Tensor, names: list[str]) -> Image.Image:
    """Source, reconstruction and absolute error of images (B, 3, S, S) uint8, with the names of their classes."""
    images = unit_range(pixels)
    reconstruction = training.reconstruct(images)[0].clamp(0, 1)
    parts = torch.stack([images, reconstruction, (images - reconstruction).abs()], 1)
    return draw_sheet(parts, square_columns(len(parts), 3), ['image', 'tokens', 'error'], names)


def write_outputs(training: TokenizerTraining, pixels: torch.Tensor, names: list[str], folder: Path) -> None:
    """Write tokenizer, codebook and sheet. Raises InputError."""
    save_tokenizer(training, folder / TOKENIZER)
    save_torch(training.codebook(), folder / CODEBOOK)
    save_sheet(reconstruction_sheet(training, pixels, names), folder / SHEET)


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> int:
    """Train. Returns the exit code."""
    device, folder, checkpoint, path = recipe.start(args, outputs=(TOKENIZER, CODEBOOK, SHEET))

    # ------------------------------------------------------------ data and model
    images, held_out = hold_out(args.data_path, args.val_path, args.val_images, args.seed, size=args.image_size,
                                batch_size=args.batch_size, device=device, workers=args.num_workers,
                                skip_bad=args.skip_bad_images, max_pixels=args.max_image_pixels,
                                exif_rotate=args.exif_rotate)
    facts = facts_of(images, held_out) | ({'VGG16': identity(args.vgg_path)['sha256']} if args.vgg_path else {})
    facts = recipe.check_data(args, facts, checkpoint)
    training = make_training(args, device)
    print0(f'{len(images):,} images to train on, {len(held_out):,} held out; {args.image_size // args.patch_size} x '
           f'{args.image_size // args.patch_size} of {args.codes} codes')
    amp = recipe.print_model(args, training.model.kind, training, device)

    def order_of(epoch: int) -> np.ndarray:
        order = shuffled(len(images), world_size(), rank(), args.seed, epoch)
        # order counts the images to train on; the source numbers them together with those held out
        return images.numbers[order[:args.epoch_images // world_size()] if args.epoch_images else order]

    def batches_of(indices: np.ndarray, epoch: int, start: int) -> Iterator[torch.Tensor]:
        return images.batches(indices, fill=True)

    def loss_of(model: nn.Module, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        x = unit_range(pixels)
        if args.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, generator=generator, device=device) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        return model(x, torch.rand(args.codes + 1, generator=generator, device=device)).sum()

    source = held_out.source
    shown = held_out.numbers[spread(source.labels[held_out.numbers], len(held_out), SHEET_IMAGES)]

    def write(model: TokenizerTraining) -> None:
        batch = next(load_images(source, [shown], args.image_size, skip_bad=args.skip_bad_images,
                                 max_pixels=args.max_image_pixels))
        if not len(batch.indices):
            batch = held_out.next_readable(-1)
        names = name_labels(source.labels[batch.indices], source.classes)
        write_outputs(model, batch.pixels.to(device), names, folder.path)

    def evaluate_of(model: nn.Module, name: str) -> dict[str, float]:
        batches = held_out.batches(held_out.numbers[rank_indices(len(held_out), True)])
        stats = evaluate_tokenizer(model, batches, amp, name)
        # with --model-ema both sets of weights are evaluated, and the averaged ones are written
        if args.output_dir and bool(name) == args.model_ema:
            on_main(write, model)
        return stats

    # ------------------------------------------------------------ train
    steps = recipe.count_steps(args, len(order_of(0)), args.data_path)
    # rank 0 fits, and all ranks load what it fitted: they must begin with the same weights
    if not checkpoint:
        training.load_state_dict(on_main(fitted_start, args, training, images))
    state = recipe.make_state(args, training, device, (3, args.image_size, args.image_size), steps, facts)
    recipe.resume_run(args, state, checkpoint, path, steps)
    return recipe.fit(args, state, folder, steps, order_of, batches_of, loss_of, evaluate_of)


if __name__ == '__main__':
    run(main, parse_args)
