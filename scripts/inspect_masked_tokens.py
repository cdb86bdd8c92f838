"""Draw what a pre-trained masked-token model predicts: each image, its tokens, those it is not shown, its predictions.

    python scripts/inspect_masked_tokens.py --checkpoint output/pretrained/checkpoint-last.pth \\
        --token-file tokens/my-val-token.data.bin.gz --codebook-path tokens/codebook.ckpt \\
        --tokenizer-path tokens/tokenizer.safetensors --output sheet.png

Side by side: the source, where --data-path has it; the tokens decoded; the same with masked patches gray; the same with
masked codes as predicted; and, where nothing is masked, the tokens as bright as the class token attends to them in the
encoder's last layer. The images are of different classes where --data-path or --label-file tells them. Also prints how
many masked codes are predicted right.
"""
import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.figures import draw_sheet, picture_format, save_sheet, square_columns
from fileio.files import check_writable, expand_files
from fileio.labels import name_labels, read_labels, spread
from flags import SEED, KeyValues, Parser, add_allow_torchscript, add_exif_rotate, add_max_pixels, integer, number
from image_data.sources import open_source, source_images
from image_tokenizer.tokenizers import check_codebook, decode_codes, load_tokenizer
from inference.models import grid_size_of
from seitpp.models_mtm import MODELS, PATCH, MaskedTokenModel, create_model, masked_token_loss, masks_of
from token_augment import center_crop, check_crop
from token_files.cache import open_codes
from token_files.codebook import load_codebook
from token_files.made_with import check_made_with, note_rotation
from token_files.token_file import count_uses, open_token_files
from training.checkpoints import (PRETRAIN, check_codes, check_origin, load_checkpoint, load_weights, saved_flags,
                                  without_token_adapt)
from utils import InputError, print0, run

GRAY = 0.5
UNSEEN = 0.4  # part of the patches that the encoder never sees, as published


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError for values that cannot be."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='FILE', help='a checkpoint of main_mtm_pretrain.py')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='sizes of the model; default: as the checkpoint says')
    add('--token-file', required=True, metavar='FILE', help='NAME.data.bin.gz, or a glob of shards')
    add('--codebook-path', required=True, metavar='FILE', help='the codebook of the tokens')
    add('--tokenizer-path', required=True, metavar='FILE', help='the tokenizer of the tokens; it must have a decoder')
    add_allow_torchscript(add)
    add('--data-path', metavar='PATH', help='the images that the tokens were made from')
    add('--label-file', metavar='FILE', help='labels of the images')
    add('--output', required=True, metavar='FILE.png', help='the picture to write: .png, .jpg or .webp')
    add('--images', type=integer(1), default=16, help='images to draw')
    add('--mask-ratio', type=number(0.01, 1), default=0.6, help='part of the patches that are masked')
    add('--seed', type=SEED, default=0, help='seed of the masks')
    add_max_pixels(add)
    add_exif_rotate(add)
    return parser.parse_args(argv)


def load_model(path: str, model_kwargs: dict, codebook_size: int) -> tuple[MaskedTokenModel, int]:
    """The model of a checkpoint, in eval mode, and the side of the grids that it reads. Raises InputError."""
    checkpoint = load_checkpoint(path)
    weights = without_token_adapt(checkpoint['model'])
    check_origin(weights, (PRETRAIN,), path)
    check_codes(weights, codebook_size, path)
    size = grid_size_of(weights, path, {})
    flags = saved_flags(checkpoint)
    name = flags.get('model') if flags.get('model') in MODELS else MODELS[0]
    model = create_model(name, model_kwargs or flags.get('model_kwargs') or {}, codebook_size, size)
    load_weights(model, weights, path)
    return model.eval(), size


@torch.no_grad()
def predict(model: MaskedTokenModel, codes: torch.Tensor, ratio: float,
            generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mask a part of the patches of codes (B, s, s) int64 and predict them.

    Returns:
        Codes (B, s, s), the masked ones as predicted; which those are, (B, s, s) bool; their cross-entropy.
    """
    side = codes.shape[1] // PATCH
    masks = masks_of(torch.rand(len(codes), side ** 2, generator=generator), ratio, min(ratio, UNSEEN))
    logits = model(codes, *masks)
    masked = masks.masked.view(-1, side, side).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    # codes that are not masked stay as they are, so that the picture shows what the prediction adds
    filled = torch.where(masked, logits.argmax(-1).view_as(codes), codes)
    return filled, masked, masked_token_loss(logits, codes, masks.masked).item()


@torch.no_grad()
def class_attention(model: MaskedTokenModel, codes: torch.Tensor) -> torch.Tensor:
    """How much the class token attends to each patch of codes (B, s, s) int64 in the encoder's last layer.

    Returns (B, s/2, s/2), the mean over heads, as a part of the largest of the image.
    """
    side = codes.shape[1] // PATCH
    layer = model.blocks[-1].attn
    # The fused kernel never makes the matrix of attention. Unfused, it passes through attn_drop, where a hook sees it.
    layer.fused_attn = False
    captured = []
    hook = layer.attn_drop.register_forward_hook(lambda module, inputs, output: captured.append(output))
    model.encode(codes, masks_of(torch.zeros(len(codes), side ** 2), 0., 0.))
    hook.remove()
    attention = captured[0].mean(1)[:, 0, 1:]
    return (attention / attention.amax(1, keepdim=True)).view(-1, side, side)


def main(args: argparse.Namespace) -> None:
    picture_format(args.output)  # raises for another ending, before the work
    codebook = load_codebook(args.codebook_path)
    files = open_token_files(args.token_file)
    check_made_with(files, codebook, args.codebook_path, args.tokenizer_path)
    inputs = [args.checkpoint, args.codebook_path, args.tokenizer_path, args.data_path, args.label_file]
    check_writable(args.output, inputs=[*filter(None, inputs), *(file.stream for file in files)])
    model, size = load_model(args.checkpoint, args.model_kwargs, len(codebook))
    tokenizer = load_tokenizer(args.tokenizer_path, allow_torchscript=args.allow_torchscript)
    check_codebook(tokenizer, codebook, args.codebook_path)
    source = open_source(args.data_path, args.exif_rotate) if args.data_path else None
    if source:
        note_rotation(files, args.exif_rotate)
    all_codes = open_codes(files, cache='none')
    if source and len(source) != len(all_codes):
        raise InputError(f'{args.data_path}: {len(source)} images, but {args.token_file} holds {len(all_codes)}; give '
                         'the images that the tokens were made from')

    labels = source.labels if source else None
    if args.label_file:
        labels = np.concatenate([read_labels(file) for file in expand_files(args.label_file)])
        if len(labels) != len(all_codes):
            raise InputError(f'{args.label_file}: {len(labels)} labels, but {args.token_file} holds {len(all_codes)} '
                             'images; give the labels of this token file')
    chosen = spread(labels, len(all_codes), args.images)
    codes = all_codes[chosen]
    count_uses(codes, len(codebook), args.token_file)
    codes = torch.from_numpy(codes.astype(np.int64))
    grid_size = math.isqrt(codes.shape[1])
    check_crop(size, grid_size, args.token_file)
    codes = center_crop(codes.view(-1, grid_size, grid_size), size)
    filled, masked, loss = predict(model, codes, args.mask_ratio, torch.Generator().manual_seed(args.seed))
    tokens, predicted = (decode_codes(tokenizer, codebook, each.flatten(1)) for each in (codes, filled))
    if tokens is None:
        raise InputError(f'{args.tokenizer_path}: has no decoder, so that tokens cannot be drawn; give one that has')

    patch_size = tokenizer.patch_size
    hidden = masked.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]
    attended = F.interpolate(class_attention(model, codes)[:, None], scale_factor=float(PATCH * patch_size))
    parts = {'tokens': tokens, 'masked': torch.where(hidden, GRAY, tokens), 'predicted': predicted,
             'attention': tokens * attended}
    if source:
        images = source_images(source, chosen, patch_size * grid_size, args.max_image_pixels)
        parts = {'image': center_crop(images, patch_size * size)} | parts
    names = files[0].classes or (source.classes if source else None)
    sheet = draw_sheet(torch.stack(list(parts.values()), 1), square_columns(len(chosen), len(parts)), list(parts),
                       name_labels(None if labels is None else labels[chosen], names))
    save_sheet(sheet, args.output)
    right = (filled == codes)[masked].double().mean()
    print0(f'{len(codes)} images, {int(masked.sum()):,} of {masked.numel():,} codes masked: {right:.1%} predicted '
           f'right, cross-entropy {loss:.3f}; {args.output}')


if __name__ == '__main__':
    run(main, parse_args)
