"""Fine-tune a classifier from masked-token pre-training, on token files (SeiT++, ECCV 2024, arXiv 2312.10105).

One node:      torchrun --nproc_per_node=8 main_mtm_finetune.py --batch-size 128 --layer-decay 0.65 --dist-eval \\
                   --finetune output/pretrained/checkpoint-last.pth --output-dir output/finetuned
Evaluate:      python main_mtm_finetune.py --eval --resume output/finetuned/checkpoint-best.pth

The defaults are the published recipe; without --finetune it trains from scratch. All that is not said here is as in
main_mtm_pretrain.py, whose flags these mostly are.

`main` builds a classifier, starts it from the encoder of --finetune and trains it; seitpp/models_mtm_finetune.py has
both. Learning rates fall from layer to layer towards the input (`make_optimizer`).
"""
import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before installed packages of the same names
import flags
import recipe
from engine import evaluate_checkpoint
from fileio.labels import check_class_names, count_classes
from flags import Parser, number
from inference.report import Report, check_report, class_names, token_images
from samplers import draw_views, shuffled
from seitpp.halves import check_halves
from seitpp.models_mtm import keep_token_adapt
from seitpp.models_mtm_finetune import MODELS, CodeVisionTransformer, create_model, kwargs_of_encoder, load_encoder
from seitpp.mtm_recipe import (NO_EFFECT_ON_MTM, add_augmentation_flags, add_periods_flag, add_step_flags,
                               add_token_flags, canonical_codes, check_sizes, make_input, make_state, open_token_adapt,
                               resume_run)
from token_augment import center_crop
from token_dataset import TokenDataset, choose_data_device, facts_of, labels_by_file, open_splits
from token_files.codebook import read_codebook
from token_files.made_with import made_with
from training.checkpoints import (FINETUNE, PRETRAIN, check_codes, check_origin, head_size, load_checkpoint,
                                  note_average, origin, saved_flags, without_token_adapt)
from training.run_folder import checkpoint_files
from utils import print0, rank, run, world_size

NO_EFFECT = {
    '--global-pool': 'the head always reads the mean of the patches',
    '--cls-token': 'the head always reads the mean of the patches, as in the published program',
    **NO_EFFECT_ON_MTM,
}


def get_args_parser() -> Parser:
    """All flags."""
    parser = Parser('Fine-tune a classifier on token files, from masked-token pre-training.')
    flags.add_token_label_flags(add_token_flags(parser))
    add = add_step_flags(parser, MODELS)
    add('--finetune', default='', metavar='FILE', of_a_rank=True,
        help='start from the encoder of this checkpoint of main_mtm_pretrain.py')
    add('--drop-path', type=flags.FRACTION, default=0.1,
        help='rate of stochastic depth: the chance of an image to skip the last block')
    add('--layer-decay', type=number(1e-3, 1), default=0.75,
        help='learning rate of a layer, as a fraction of that of the layer after it')
    add('--clip-grad', type=flags.POSITIVE,
        help='scale larger gradients down to this norm (default: no limit)')
    add('--smoothing', type=flags.FRACTION, default=0.1,
        help='label smoothing: how much of each target goes to all classes alike')
    add_augmentation_flags(parser)
    flags.add_mixing_flags(parser)
    flags.add_run_flags(parser)
    add_periods_flag(parser.add_group('checkpoints'), 'last2', 'best')
    parser.add_no_effect(NO_EFFECT, switches=['--global-pool', '--cls-token', '--dist-on-itp'])
    parser.set_defaults(model='deit_base_token_32', batch_size=64, epochs=50, blr=1e-3, min_lr=1e-6, warmup_epochs=5,
                        weight_decay=0.1, rrc_ratio=0.08, token_synonym_dict='tokens/codebook-synonyms.json',
                        token_coloradapt_prob=0.25, token_noise_prob=0.75, output_dir='./output_dir', bce_loss=False)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError, also for values that cannot work together."""
    args = get_args_parser().parse_args(argv)
    recipe.check_flags(args)
    recipe.check_val_share(args)
    recipe.check_cutmix(args, check_sizes(args))
    if args.tokenadapt_path and not args.eval:  # only training goes by halves of a batch
        check_halves(args.batch_size, recipe.mixes(args))
    checkpoint_files(args.save_periods, args.epochs)
    return args


# ---------------------------------------------------------------- evaluation

def make_evaluate(args: argparse.Namespace, data: TokenDataset, codebook: torch.Tensor, size: int,
                  device: torch.device, report: Report | None = None) -> Callable:
    """The recipe's evaluate_of: of the middle codes of each grid."""
    # Of the codes of one direction training reads only the first (see make_input), so the model has learned nothing of
    # the others: they are read as the first one here too.
    canonical = canonical_codes(codebook).to(device)
    return recipe.make_evaluate(args, data, lambda codes: canonical[center_crop(codes.long(), size)], device, report)


def evaluate_only(args: argparse.Namespace, checkpoint: dict[str, Any], path: str, device: torch.device) -> None:
    """--eval: evaluate a checkpoint. Raises InputError."""
    table = read_codebook(args.codebook_path)
    args = recipe.files_by_default(args, table)
    codebook = table.rows
    size = check_sizes(args)
    check_checkpoint(checkpoint, path, codebook)
    datasets = open_splits(recipe.split_files(args), codebook, args.codebook_path, args.token_cache, size, device,
                           args.views, args.val_share)
    data = datasets['val']
    recipe.check_evaluated(args, checkpoint, path, recipe.check_data(args, facts_of(datasets, codebook), checkpoint))
    classes = count_classes(labels_by_file(datasets), args.nb_classes,
                            head_size(checkpoint['model'], 'head', path))
    check_class_names(checkpoint.get('classes'), data.classes, path, recipe.split_files(args)['val'][0])
    choose_data_device({'val': data}, args.data_device, device)
    model = make_model(args, len(codebook), size, classes).to(device)
    recipe.print_model(args, args.model, model, device)
    note_average(checkpoint, path)
    weights = {'model': without_token_adapt(checkpoint['model'])}
    report = None
    if args.report:
        names = class_names(classes, checkpoint.get('classes'), data.classes)
        images_of = token_images(checkpoint, path, codebook, lambda numbers: data.batch(numbers)[0])
        report = Report(args.report, names, device, args.dist_eval, images_of=images_of)
    evaluate_of = make_evaluate(args, data, codebook, size, device, report)
    evaluate_checkpoint(model, weights, path, False, evaluate_of, args.output)


# ---------------------------------------------------------------- the program

def check_checkpoint(checkpoint: dict[str, Any], path: str, codebook: torch.Tensor) -> None:
    """InputError for another program's checkpoint, and for one of other codes."""
    check_origin(checkpoint['model'], (FINETUNE,), path)
    check_codes(checkpoint['model'], len(codebook), path)


def make_model(args: argparse.Namespace, codes: int, size: int, classes: int) -> CodeVisionTransformer:
    """The model of the flags."""
    return create_model(args.model, args.model_kwargs, codebook_size=codes, img_size=size, num_classes=classes,
                        drop_path_rate=args.drop_path)


def make_optimizer(args: argparse.Namespace, model: CodeVisionTransformer) -> torch.optim.Optimizer:
    """AdamW. The learning rate is --blr by the square root of the batch, and falls by --layer-decay to the input."""
    # sqrt(64) = 8: --blr is the rate for 64 images a step
    lr = args.blr * recipe.effective_batch(args) ** 0.5 / 8 if args.lr is None else args.lr
    groups = param_groups_layer_decay(model, args.weight_decay, model.no_weight_decay(), layer_decay=args.layer_decay)
    return torch.optim.AdamW(groups, lr, fused=recipe.can_fuse(model))


def main(args: argparse.Namespace) -> int:
    """Train, or evaluate. Returns the exit code."""
    files = checkpoint_files(args.save_periods, args.epochs)
    device, folder, checkpoint, path = recipe.start(args, NO_EFFECT, files=files)
    if args.eval:
        check_report(args.report)
        evaluate_only(recipe.from_checkpoint(args, checkpoint, path), checkpoint, path, device)
        return 0

    # data
    table = read_codebook(args.codebook_path)
    args = recipe.files_by_default(args, table)
    codebook = table.rows
    size = check_sizes(args)
    files = recipe.split_files(args)
    datasets = open_splits(files, codebook, args.codebook_path, args.token_cache, size, device, args.views,
                           args.val_share)
    train_data = datasets['train']
    classes = count_classes(labels_by_file(datasets), args.nb_classes, None)
    if checkpoint:
        check_checkpoint(checkpoint, path, codebook)
        check_class_names(checkpoint.get('classes'), train_data.classes, path, args.train_token_file)
    token_adapt = open_token_adapt(args.tokenadapt_path, codebook, device)
    facts = recipe.check_data(args, facts_of(datasets, codebook), checkpoint)
    choose_data_device(datasets, args.data_device, device)

    # model
    pretrained = load_checkpoint(args.finetune) if args.finetune else None
    if pretrained and origin(pretrained['model']) == PRETRAIN:
        kwargs = kwargs_of_encoder(saved_flags(pretrained))
        if kwargs and not args.given & {'model', 'model_kwargs'}:
            print0(f'{args.finetune}: {recipe.words_of("model_kwargs", kwargs)}')
            args = args.replaced(model_kwargs=kwargs)
    elif pretrained:
        args = recipe.model_of_start(args, pretrained, MODELS.__contains__)
    model = make_model(args, len(codebook), size, classes)
    if pretrained:
        recipe.note_held_out(args, pretrained, facts)
        load_encoder(model, args.finetune, facts, args.codebook_path, pretrained)
    model.to(device)
    amp = recipe.print_model(args, args.model, model, device)

    # loss and evaluation
    mixup, criterion = recipe.make_loss(args, classes)
    prepare = make_input(args, codebook.to(device), train_data.grid_size, size, token_adapt, mixup)
    evaluate_of = None if args.no_eval else make_evaluate(args, datasets['val'], codebook, size, device)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        codes, targets = prepare(*batch, generator)
        return criterion(model(codes), targets)

    def order_of(epoch: int) -> np.ndarray:
        return shuffled(len(train_data), world_size(), rank(), args.seed, epoch)

    def batches_of(indices: np.ndarray, epoch: int, start: int) -> Iterator:
        views = draw_views(len(train_data), train_data.views, args.seed, epoch)
        return train_data.batches(indices, args.batch_size, device, args.pin_mem, views)

    # train
    # an example of a batch, with which DDP makes its buckets
    inputs = torch.zeros(args.batch_size, size, size, dtype=torch.int64, device=device)
    state = make_state(args, model, make_optimizer(args, model), amp, len(order_of(0)), (inputs,), facts)
    keep_token_adapt(model, token_adapt)  # only now, as frozen weights have no part in DDP
    resume_run(args, state, checkpoint, path)
    return recipe.fit(args, state, folder, state.scheduler.steps, order_of, batches_of, loss_of, evaluate_of,
                      train_data.classes, made_with(train_data.files, codebook, args.codebook_path))


if __name__ == '__main__':
    run(main, parse_args)
