"""Fine-tune a classifier from masked-token pre-training, on token files (SeiT++, ECCV 2024, arXiv 2312.10105).

One node:      torchrun --nproc_per_node=8 main_mtm_finetune.py --batch-size 128 --layer-decay 0.65 --dist-eval \\
                   --finetune output/pretrained/checkpoint-last.pth --output-dir output/finetuned
Evaluate:      python main_mtm_finetune.py --eval --resume output/finetuned/checkpoint-best.pth

The defaults are the published recipe; without --finetune it trains from scratch. All that is not said here is as in
main_mtm_pretrain.py, whose flags these mostly are.
"""
import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import recipe
from checkpoints import flags_to_save, progress_of
from class_names import check_class_names, count_classes, head_size
from codebook import load_codebook
from engine import evaluate, evaluate_checkpoint, rank_indices, train
from flags import Parser, integer, number, print_no_effect
from loss_meter import NotFinite
from main_mtm_pretrain import (NO_EFFECT_ON_MTM, add_augmentation_flags, add_periods_flag, add_step_flags,
                               add_token_flags, canonical_codes, check_sizes, make_input, make_state, open_token_adapt,
                               resume_checked)
from main_seit import load_data
from models_mtm import keep_token_adapt
from models_mtm_finetune import MODELS, CodeVisionTransformer, create_model, load_encoder
from origins import FINETUNE, check_codes, check_origin, without_token_adapt
from preemption import REQUEUE
from run_folder import RunFolder, RunLog, find_checkpoint
from run_info import print_batch, print_model, run_record
from samplers import shuffled
from save_periods import checkpoint_files
from token_augment import center_crop
from token_dataset import TokenDataset, choose_data_device
from token_halves import check_halves
from utils import check_same_on_all_ranks, init_distributed, keep_freed_memory, rank, run, world_size

NO_EFFECT = {
    '--global-pool': 'the head always reads the mean of the patches',
    '--cls-token': 'the head always reads the mean of the patches, as in the published program',
    **NO_EFFECT_ON_MTM,
}


def get_args_parser() -> Parser:
    """All flags."""
    parser = Parser('Fine-tune a classifier on token files, from masked-token pre-training.')
    add = add_token_flags(parser)
    add('--train-label-file', default='tokens/imagenet1k-train-label.txt', metavar='FILE')
    add('--val-token-file', default='tokens/imagenet1k-val-token.data.bin.gz', metavar='FILE')
    add('--val-label-file', default='tokens/imagenet1k-val-label.txt', metavar='FILE')
    add('--nb-classes', type=integer(1), help='default: the largest label + 1, or what the checkpoint has under --eval')
    add = add_step_flags(parser, MODELS)
    add('--finetune', default='', metavar='FILE', help='a checkpoint of main_mtm_pretrain.py to start from')
    add('--drop-path', type=recipe.SHARE, default=0.1, help='stochastic depth rate')
    add('--layer-decay', type=number(1e-3, 1), default=0.75,
        help="learning rate of a layer, as a part of the next one's")
    add('--clip-grad', type=recipe.POSITIVE, help='largest gradient norm')
    add('--smoothing', type=recipe.SHARE, default=0.1, help='label smoothing')
    add_augmentation_flags(parser)
    recipe.add_mixing_flags(parser)
    recipe.add_run_flags(parser)
    add_periods_flag(parser.add_argument_group('checkpoints').add_argument, 'last2', 'best')
    parser.add_no_effect(NO_EFFECT, switches=['--global-pool', '--cls-token', '--dist-on-itp'])
    parser.set_defaults(model='deit_base_token_32', batch_size=64, epochs=50, blr=1e-3, min_lr=1e-6, warmup_epochs=5,
                        weight_decay=0.1, rrc_ratio=0.08, token_synonym_dict='tokens/codebook-synonyms.json',
                        token_coloradapt_prob=0.25, token_noise_prob=0.75, output_dir='./output_dir', bce_loss=False)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError, also for values that cannot work together."""
    args = get_args_parser().parse_args(argv)
    recipe.check_flags(args)
    check_sizes(args)
    if args.tokenadapt_path and not args.eval:
        check_halves(args.batch_size, recipe.mixes(args))
    checkpoint_files(args.save_periods, args.epochs)
    return args


# ---------------------------------------------------------------- evaluation

def make_evaluate(args: argparse.Namespace, data: TokenDataset, codebook: torch.Tensor, size: int,
                  device: torch.device) -> Callable:
    """The engine's evaluate_of, on a data set: the middle codes of each grid."""
    same = canonical_codes(codebook).to(device)
    amp = args.amp or recipe.default_amp(device)

    def evaluate_of(model: nn.Module, name: str) -> dict[str, float]:
        indices = rank_indices(len(data), args.dist_eval)
        batches = data.batches(indices, int(1.5 * args.batch_size), device, args.pin_mem)
        return evaluate(model, batches, lambda codes: same[center_crop(codes.long(), size)], amp=amp,
                        distributed=args.dist_eval, name=name)

    return evaluate_of


def evaluate_only(args: argparse.Namespace, checkpoint: dict[str, Any], path: str, device: torch.device) -> None:
    """--eval: evaluate a checkpoint. Raises InputError."""
    codebook = load_codebook(args.codebook_path)
    size = check_sizes(args)
    check_checkpoint(checkpoint, path, codebook)
    data = load_data(args, codebook, size, device)['val']
    classes = count_classes({args.val_label_file: data.labels}, args.nb_classes,
                            head_size(checkpoint['model'], 'head', path))
    check_class_names(checkpoint.get('classes'), data.classes, path, args.val_token_file)
    choose_data_device({'val': data}, args.data_device, device)
    keep_freed_memory(device)
    model = make_model(args, len(codebook), size, classes).to(device)
    print_model(args.model, model, device, args.amp or recipe.default_amp(device))
    weights = {'model': without_token_adapt(checkpoint['model'])}
    evaluate_checkpoint(model, weights, path, False, make_evaluate(args, data, codebook, size, device), args.output)


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
    """AdamW; from layer to layer towards the input the learning rate falls by --layer-decay."""
    lr = scaled_lr(args)
    groups = param_groups_layer_decay(model, args.weight_decay, model.no_weight_decay(), layer_decay=args.layer_decay)
    return torch.optim.AdamW(groups, lr, fused=True)


def scaled_lr(args: argparse.Namespace) -> float:
    """The learning rate of the run: --lr, or --blr scaled with the square root of the batch."""
    return args.blr * recipe.effective_batch(args) ** 0.5 / 8 if args.lr is None else args.lr


def main(args: argparse.Namespace) -> int:
    """Train, or evaluate. Returns the exit code."""
    # set-up
    device = init_distributed(args.device, args.dist_url, args.dist_timeout)
    check_same_on_all_ranks(recipe.flags_alike(args))
    print_no_effect(NO_EFFECT, vars(args))
    recipe.set_up_torch(args)
    files = checkpoint_files(args.save_periods, args.epochs)
    folder = RunFolder('' if args.eval else args.output_dir, args.save_every, files=files)
    checkpoint, path = find_checkpoint(args.output_dir, args.resume, args.eval, files=files)
    if args.eval:
        evaluate_only(args, checkpoint, path, device)
        return 0

    # data
    codebook = load_codebook(args.codebook_path)
    size = check_sizes(args)
    datasets = load_data(args, codebook, size, device)
    train_data = datasets['train']
    labels = {getattr(args, f'{split}_label_file'): data.labels for split, data in datasets.items()}
    classes = count_classes(labels, args.nb_classes, None)
    if checkpoint:
        check_checkpoint(checkpoint, path, codebook)
        check_class_names(checkpoint.get('classes'), train_data.classes, path, args.train_token_file)
    check_same_on_all_ranks({'training images': len(train_data), 'validation images': len(datasets.get('val', ())),
                             'codebook': tuple(codebook.shape), **progress_of(checkpoint)})
    choose_data_device(datasets, args.data_device, device)
    keep_freed_memory(device)

    # model
    token_adapt = open_token_adapt(args.tokenadapt_path, codebook, device)
    model = make_model(args, len(codebook), size, classes)
    if args.finetune:
        load_encoder(model, args.finetune)
    model.to(device)
    amp = args.amp or recipe.default_amp(device)
    print_model(args.model, model, device, amp)

    # loss and evaluation
    mixup, criterion = recipe.make_loss(args, classes)
    prepare = make_input(args, codebook.to(device), train_data.grid_size, size, token_adapt, mixup)
    evaluate_of = None if args.no_eval else make_evaluate(args, datasets['val'], codebook, size, device)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        codes, targets = prepare(*batch, generator)
        return criterion(model(codes), targets)

    def indices_of(epoch: int, start: int, stop: int) -> np.ndarray:
        order = shuffled(len(train_data), world_size(), rank(), args.seed, epoch)
        return order[start * args.batch_size:stop * args.batch_size]

    def batches_of(epoch: int, start: int) -> Iterator:
        return train_data.batches(indices_of(epoch, start, steps), args.batch_size, device, args.pin_mem)

    # optimizer and resume
    rank_images = len(shuffled(len(train_data), world_size(), rank(), args.seed, 0))
    inputs = torch.zeros(args.batch_size, size, size, dtype=torch.int64, device=device)
    state = make_state(args, model, make_optimizer(args, model), amp, rank_images, (inputs,))
    steps = state.scheduler.steps
    keep_token_adapt(model, token_adapt)  # only now: it has no part in DDP
    if checkpoint:
        resume_checked(args, state, checkpoint, path)
        del checkpoint  # its tensors are copied
    print_batch(args.batch_size, args.accum_iter, steps, args.epochs, scaled_lr(args))

    # train
    record = {'args': flags_to_save(vars(args)), 'classes': train_data.classes}
    folder.begin(run_record(vars(args), device), record)
    log = RunLog(args.output_dir, state.epoch, args.tensorboard)
    try:
        finished = train(state, batches_of, loss_of, evaluate_of, folder, log, args.epochs,
                         recipe.step_options(args, steps))
    except NotFinite as error:
        folder.save_bad_step(error, rank(), args.seed, indices_of(error.epoch, error.step, error.step + 1).tolist())
        raise
    return 0 if finished else REQUEUE


if __name__ == '__main__':
    run(main, parse_args)
