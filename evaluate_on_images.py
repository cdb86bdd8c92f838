"""Evaluate a token-trained ViT on images (SeiT, arXiv 2303.11114, sec. 4).

Each image takes the way of the training tokens: image -> tokenizer -> codes -> codebook -> ViT.

One process:   python evaluate_on_images.py --data-path IMAGES --model-path trained-vit.ckpt ...
One node:      torchrun --nproc_per_node=8 evaluate_on_images.py --dist-eval ...

IMAGES holds a folder for each class, labels are the folders in alphabetical order, from 0; or it is a list, tar shards
or parquet files, see image_data/sources.py. Images are resized to --tokenizer-input-size on both sides, and the middle
--vit-input-size codes of the grid are read. --corruption and --classes are for ImageNet-C, -R, -A and -Sketch, see
image_data/corruptions.py and image_data/class_subsets.py.

`main` loads what must belong together, makes codes of the images while they are evaluated (`CodeBatches`), and leaves
the counting to the engine's `evaluate`.
"""
import argparse
import csv
import io
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before installed packages of the same names
import recipe
from engine import evaluate, rank_indices
from fileio.files import check_writable, write_text
from fileio.torch_files import digest_of
from flags import (DEVICE_HELP, SEED, KeyValues, Parser, add_allow_torchscript, add_exif_rotate, add_max_pixels,
                   add_stem, integer, print_no_effect)
from image_data.class_subsets import OnlyClasses, match_classes
from image_data.corruptions import add_robustness_flags, make_corruption
from image_data.sources import ImageBatch, Source, load_images, open_source
from image_tokenizer.tokenizers import (check_codes, check_found, check_sizes, compile_tokenizer, encode_images,
                                        load_tokenizer)
from inference.models import weights_of
from inference.report import Report, check_report, class_names
from models_seit import MODELS, STEMS, classifier_of, create_model
from token_augment import EvalTransform
from token_files.codebook import read_codebook
from token_files.made_with import digest_of_entry, identity_of_tokenizer
from training.checkpoints import (PIXELS, SEIT, check_tokens_of, compare_model_flags, load_checkpoint, load_weights,
                                  program_of, saved_flags)
from training.run_folder import write_evaluation
from utils import (InputError, check_same_on_all_ranks, gather, init_distributed, is_main, on_main, print0, run,
                   world_size)

NO_EFFECT = {
    '--eval': 'this program only evaluates',
    '--world-size': 'the launcher (torchrun, srun) sets it',
}


def make_parser() -> Parser:
    """All flags."""
    parser = Parser('Evaluate a token-trained ViT on images.')
    add = parser.add_group('what a checkpoint of this project says itself is taken from there, unless it is given here')
    add('--data-path', required=True, metavar='PATH',
        help='class folders of images, a list file .txt, tar shards or parquet files: see image_data/sources.py')
    add('--model', default='deit_base_token_32', of_the_model=True,
        help=f'one of {", ".join(MODELS)}, or any other model of timm')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', of_the_model=True,
        help='arguments of the model, as they were given in training')
    add_stem(add, STEMS, exact=True, of_the_model=True)
    add('--model-path', default='weights/trained-vit.ckpt', metavar='FILE', help='the checkpoint of the model')
    add('--use-ema', action='store_true', help="take the checkpoint's EMA of the weights")
    add('--codebook-path', default='weights/codebook.ckpt', metavar='FILE',
        help='the codebook that the model was trained with')
    add('--tokenizer-path', default='weights/tokenizer.ckpt', metavar='FILE',
        help='the tokenizer that made the training tokens')
    add('--tokenizer-code-path', metavar='DIR',
        help='folder of the code that a pickled tokenizer runs when it is loaded; files of '
        'scripts/convert_tokenizer.py need none')
    add_allow_torchscript(add)
    add('--tokenizer-input-size', type=integer(1), default=256, of_the_model=True,
        help='pixels to which both sides of an image are resized')
    add('--vit-input-size', type=integer(2), default=28, of_the_model=True,
        help='codes on a side of what the model reads')
    add('--token-patch-size', type=integer(1), default=8, of_the_model=True,
        help='side of the square of pixels that one code stands for, as it was given in training; it matters for a '
        '--stem alone')
    add('--nb-classes', type=integer(1),
        help='number of classes (default: as many as the checkpoint has, 1000 in the published ones)')
    add('--batch-size', type=integer(1), default=64, help='images of a batch of one process')
    add('--num-workers', type=integer(), default=10,
        help='processes that decode images, at most as many as there are cores')
    add('--pin-mem', action=argparse.BooleanOptionalAction, default=True,
        help='copy batches to the GPU from page-locked memory, which is faster')
    add('--amp', choices=['bf16', 'fp16', 'off'], help='mixed precision of the ViT (default: fp16 on CUDA, off on CPU)')
    add('--tokenizer-amp', choices=['bf16', 'off'], default='off',
        help='off: compute in fp32, which gives the codes of the training set; bf16: faster, but some codes change')
    add('--compile', action='store_true', help='compile tokenizer and model by torch.compile')
    add('--dist-eval', action='store_true',
        help='divide the images among the ranks; without it each evaluates all')
    add('--output', default='', metavar='FILE.json', help='also write the numbers to this file')
    add('--report', default='', metavar='DIR',
        help='also write to this folder the accuracy of each class, the confusion matrix, and the mistakes that the '
        'model was surest of, as tables and pictures; needs matplotlib')
    add('--save-predictions', metavar='FILE.csv',
        help='write a line for each image: file, label, prediction, probability, the five most probable classes, and '
        'the names of label and prediction')
    add('--skip-bad-images', action='store_true', help='leave unreadable images out and count them')
    add_max_pixels(add)
    add_exif_rotate(add, of_the_model=True)
    add('--seed', type=SEED, default=0, help='seed of the noise of --corruption; nothing else is random')
    add('--device', default='auto', help=DEVICE_HELP)
    add('--dist-url', default='env://',
        help="where the processes meet: torch.distributed's init method")
    add_robustness_flags(parser)
    parser.add_no_effect(NO_EFFECT, switches=['--eval'])
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    return make_parser().parse_args(argv)


# ---------------------------------------------------------------- the model

def load_model(checkpoint: dict[str, Any], path: str, use_ema: bool, name: str, model_kwargs: dict[str, Any],
               num_classes: int | None, input_size: int, code_dim: int, stem: str | None = None,
               token_patch_size: int = 8) -> tuple[nn.Module, list[str] | None]:
    """The ViT with a checkpoint's weights, and its class names where the checkpoint has them. Raises InputError.

    Unlike inference/models.py, which reads sizes off the checkpoint, this takes them as the flags say, as published.

    Args:
        checkpoint, path: of `load_checkpoint`, and its file.
        use_ema: take the averaged weights.
        num_classes: None for as many as the checkpoint has.
        input_size: codes on a side that the model reads.
        code_dim: elements of a codebook row, which the model must read.
        stem, token_patch_size: as of `create_model`.
    """
    weights = weights_of(checkpoint, path, use_ema)
    bias = weights.get(f'{classifier_of(name)}.bias')
    num_classes = num_classes or (bias.numel() if isinstance(bias, torch.Tensor) else 0)
    model = create_model(name, model_kwargs, num_classes, input_size, code_dim, stem, token_patch_size)
    load_weights(model, weights, path)
    return model, checkpoint.get('classes')


# ---------------------------------------------------------------- images to codes

class CodeBatches:
    """Batches of codes made from images while they are evaluated; iterate once.

    Yields codes (B, grid_size, grid_size) int64 and labels (B,) int64, on the device.

    Args:
        images: what `load_images` yields.
        labels: (N,) int64, of all images.
        tokenizer, codebook (K, d): on the device.
        amp: of the tokenizer, 'off' or 'bf16'.

    Attributes:
        indices: the images in the order they came.
        skipped: how many could not be read.
    """

    def __init__(self, images: Iterable[ImageBatch], labels: torch.Tensor, tokenizer: nn.Module,
                 codebook: torch.Tensor, amp: str):
        self.images = images
        self.labels = labels
        self.tokenizer = tokenizer
        self.codebook = codebook
        self.amp = amp
        self.indices = []
        self.skipped = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.images:
            self.skipped += len(batch.skipped)
            # a batch in which no image could be read; the ranks need not evaluate equally many, so it may be left out
            if not len(batch.indices):
                continue
            with torch.no_grad():
                features, codes = encode_images(self.tokenizer, self.codebook, batch.pixels, self.amp)
            check_found(features, codes)
            grid_size = math.isqrt(codes.shape[1])
            self.indices += batch.indices.tolist()  # predictions are matched with files by these, skipped ones aside
            yield codes.view(-1, grid_size, grid_size), self.labels[batch.indices].to(codes.device)


# ---------------------------------------------------------------- predictions

def write_predictions(path: str | Path, source: Source, labels: np.ndarray, names: Sequence[str],
                      rows: list[tuple[int, list[int], float]]) -> None:
    """Write a line of CSV an image, in the order of the source. Raises InputError.

    Args:
        labels: (N,) int64, as the model numbers them.
        names: of the model's classes, '' where a class has none.
        rows: (image, its five most probable classes, probability of the first).
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    # names stand last, so that what reads columns by their position still finds the others
    writer.writerow(['image', 'label', 'prediction', 'probability', 'top5', 'label_name', 'prediction_name'])
    for index, top, probability in sorted(rows):
        writer.writerow([source.names[index], labels[index], top[0], f'{probability:.6f}',
                         ' '.join(map(str, top)), names[labels[index]], names[top[0]]])
    write_text(path, text.getvalue())


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> None:
    """Evaluate, and print the accuracy."""
    device = init_distributed(args.device, args.dist_url)
    print_no_effect(NO_EFFECT, vars(args))
    amp = args.amp or recipe.default_amp(device)
    change = make_corruption(args.corruption, args.severity, args.seed)
    for path in filter(None, (args.output, args.save_predictions)):
        on_main(check_writable, path)
    check_report(args.report)

    # model, tokenizer and images, which must belong together: a wrong codebook has the right shape, and gives chance
    checkpoint = load_checkpoint(args.model_path)
    program = program_of(checkpoint)
    if program != SEIT and (program != PIXELS or 'train_path' in saved_flags(checkpoint)):
        raise InputError(f'{args.model_path}: is of {program}, and this program evaluates those of {SEIT}: evaluate it '
                         f'with {program}, or name the classes of images with scripts/predict.py')
    args = recipe.from_checkpoint(args, checkpoint, args.model_path)
    table = read_codebook(args.codebook_path)
    codebook = table.rows
    if args.model in MODELS:
        args = recipe.as_wide_as(table, args)
    facts = {'codebook': digest_of(codebook), 'size of tokenized images': args.tokenizer_input_size,
             'tokenizer': digest_of_entry(identity_of_tokenizer(args.tokenizer_path))}
    check_tokens_of(checkpoint, args.model_path, facts,
                    {'codebook': args.codebook_path, 'tokenizer': args.tokenizer_path})
    compare_model_flags(checkpoint, {name: vars(args)[name] for name in sorted(args.rules.of_the_model)},
                        args.model_path)
    model, names = load_model(checkpoint, args.model_path, args.use_ema, args.model, args.model_kwargs,
                              args.nb_classes, args.vit_input_size, codebook.shape[1], args.stem,
                              args.token_patch_size)
    tokenizer = load_tokenizer(args.tokenizer_path, args.tokenizer_code_path, args.allow_torchscript)
    check_sizes(args.tokenizer_input_size, tokenizer.patch_size, '--tokenizer-input-size')
    check_codes(tokenizer, codebook, args.codebook_path)
    source = open_source(args.data_path, args.exif_rotate)
    source.change = change  # images are corrupted where they are decoded, by the workers
    if world_size() > 1:
        check_same_on_all_ranks({'the list of images': source.digest(), 'images': source.content_digest(),
                                 'weights of the model': digest_of(model.state_dict()), **facts})
    labels, classes, subset = match_classes(source, names, model.num_classes, args.model_path, args.classes)
    print0(f'{len(source):,} images in {classes} classes; {world_size()} x {device}, amp {amp}'
           + (f'; corrupted by {source.change}' if source.change else ''))

    # images to codes
    num_classes = model.num_classes
    classes_by_number = class_names(num_classes, names, source.classes, source.labels, labels)
    model = model.to(device)
    tokenizer = tokenizer.to(device)
    codebook = codebook.to(device)
    if args.compile:
        model = torch.compile(model)
        tokenizer = compile_tokenizer(tokenizer)
    if subset is not None:
        model = OnlyClasses(model, subset, num_classes).to(device)
    indices = rank_indices(len(source), args.dist_eval)
    split = [indices[start:start + args.batch_size] for start in range(0, len(indices), args.batch_size)]
    images = load_images(source, split, args.tokenizer_input_size, workers=args.num_workers,
                         skip_bad=args.skip_bad_images, pin_memory=args.pin_mem and device.type == 'cuda',
                         max_pixels=args.max_image_pixels)
    batches = CodeBatches(images, torch.from_numpy(labels), tokenizer, codebook, args.tokenizer_amp)

    # codes to classes
    rows = []
    report = None
    if args.report:
        report = Report(args.report, classes_by_number, device, args.dist_eval, subset, image_names=source.names,
                        images_of=lambda numbers: next(load_images(source, [numbers], args.tokenizer_input_size,
                                                                   max_pixels=args.max_image_pixels)).pixels)

    def record(logits: torch.Tensor, labels: torch.Tensor) -> None:
        if report:
            report.record(logits, labels)
        if args.save_predictions:
            probability, top = logits.softmax(1).topk(min(5, num_classes if subset is None else len(subset)))
            rows.extend(zip(top.tolist(), probability[:, 0].tolist()))

    stats = evaluate(model, batches, EvalTransform(codebook, args.vit_input_size, device), amp=amp,
                     distributed=args.dist_eval, name='EMA' if args.use_ema else '',
                     record=record if args.save_predictions or report else None)
    write_evaluation(args.output, stats)
    skipped = gather([batches.skipped], args.dist_eval)
    if is_main() and sum(skipped):
        print0(f'{sum(skipped)} unreadable images were left out')
    if args.save_predictions:
        rows = gather([(index, *row) for index, row in zip(batches.indices, rows)], args.dist_eval)
        if is_main():
            write_predictions(args.save_predictions, source, labels, classes_by_number, rows)
            print0(args.save_predictions)
    if report:
        report.write('', batches.indices)


if __name__ == '__main__':
    run(main, parse_args)
