"""Train and evaluate a ViT on token files (SeiT, ICCV 2023, arXiv 2303.11114).

One process:   python main_seit.py --batch-size 64 --output-dir output/run
One node:      torchrun --nproc_per_node=8 main_seit.py --batch-size 128 --dist-eval --output-dir output/run
Many nodes:    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 main_seit.py ...
SLURM:         srun --ntasks-per-node=8 --gpus-per-node=8 python main_seit.py ...
Evaluate:      python main_seit.py --eval --resume output/run/best_checkpoint.pth

The defaults are the published recipe; `--batch-size` is per process and the learning rate scales with it.
"""
import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

import recipe
from checkpoints import flags_to_save, progress_of, resume
from class_names import check_class_names, count_classes, head_size
from codebook import load_codebook, load_synonyms, look_up
from color_adapt import color_recipe
from flags import Parser, integer, number, print_no_effect
from run_info import print_batch, print_model, print_recipe_batch, run_record
from engine import evaluate, evaluate_checkpoint, rank_indices, train
from loss_meter import NotFinite
from models_seit import create_model
from preemption import REQUEUE
from pretrained import freeze_all_but_attention, load_pretrained
from run_folder import RunFolder, RunLog, find_checkpoint
from samplers import repeated_augmentation, shuffled
from token_augment import (EraseRectangle, EvalTransform, RandomCrop, RandomResizedCrop, ReplaceSynonyms, SwapPatches,
                           TokenEDA, check_crop)
from token_dataset import TokenDataset, choose_data_device
from token_halves import open_halves
from utils import (InputError, check_same_on_all_ranks, init_distributed, keep_freed_memory, print0, rank, run,
                   world_size)

# Accepted because published commands may hold them: flag -> why it changes nothing.
NO_EFFECT = {
    '--vit-patch-size': 'the stem-adaptor fixes the patches',
    '--use-entire-tokens': 'it had none in the published program either',
    '--eval-crop-ratio': 'evaluation takes the center crop of --input-size',
    '--cooldown-epochs': 'exactly --epochs epochs run, as in the published program',
    '--patience-epochs': 'it belongs to the plateau schedule, which never worked in the published program',
    '--num-workers': 'batches come straight from a memory map, so there are no loader processes',
    '--world-size': 'the launcher (torchrun, srun) sets it',
}


def get_args_parser() -> Parser:
    """All flags."""
    parser = Parser('Train and evaluate SeiT on token files.')
    add = parser.add_argument_group('data').add_argument
    add('--train-token-file', default='tokens/imagenet1k-train-token.data.bin.gz', metavar='FILE')
    add('--train-label-file', default='tokens/imagenet1k-train-label.txt', metavar='FILE')
    add('--val-token-file', default='tokens/imagenet1k-val-token.data.bin.gz', metavar='FILE')
    add('--val-label-file', default='tokens/imagenet1k-val-label.txt', metavar='FILE')
    add('--codebook-path', default='tokens/codebook.ckpt', metavar='FILE')
    add('--token-synonym-dict', default='tokens/synonyms.json', metavar='FILE')
    add('--token-cache', default='', metavar='DIR',
        help="where token files are decoded to: a folder, '' for beside the token file, 'none' for memory only")
    add('--data-device', default='auto', choices=['auto', 'cpu', 'cuda'],
        help='where tokens live: all on the GPU, or in the map; auto: on the GPU if they take a quarter of its free '
        'memory at most')
    add('--nb-classes', type=integer(1), help='default: the largest label + 1, or what the checkpoint has under --eval')
    add('--pin-mem', action=recipe.ON_OFF, default=True, help='copy batches to a GPU from page-locked memory')
    add('--input-size', type=integer(2), default=224,
        help='in pixels of --token-patch-size to a code: 224 / 8 = 28 codes')
    add('--token-patch-size', type=integer(1), default=8, help='pixels a code covers, on each side')
    recipe.add_model_flags(parser)
    recipe.add_optimization_flags(parser)

    add = parser.add_argument_group('augmentation').add_argument
    add('--eda-rc-prob', type=recipe.SHARE, default=0.25, help='share of images with synonym replacement')
    add('--token-synonym-thres', type=integer(1), default=5, help='how many of each synonym list are used')
    add('--replace-token-prob', type=recipe.SHARE, default=0.25, help='of each code in such an image')
    add('--eda-sc-prob', type=recipe.SHARE, default=0.25, help='share of images with two patches swapped')
    add('--swap-token-scale', type=recipe.SHARE, default=0.25, help="largest side of a patch, as a part of the grid's")
    add('--eda-erase-prob', type=recipe.SHARE, default=0., help='share of images with a rectangle erased')
    add('--erase-scale', type=recipe.SHARE, default=0.25, help="its largest sides, as parts of the grid's")
    add('--rrc-ratio', type=recipe.SHARE, default=0.08, help='smallest area of the random-resized crop')
    add('--src', action='store_true', help='a plain random crop instead')
    add('--repeated-aug', action='store_true', help='repeated augmentation: each image three times running')
    add('--token-noise-prob', type=recipe.SHARE, default=0.5, help='part of each batch that gets embedding noise')
    add('--token-coloradapt-prob', type=recipe.SHARE, default=0., help='chance that half of a batch is ColorAdapted')
    add('--noise-recipe', default='v0.0', choices=['v0.0', 'seit++'],
        help='seit++: --token-noise-prob is the chance that half of a batch gets noise, and excludes ColorAdapt')
    add('--token-noise-scale', type=number(0), default=1., help='deviation of the noise a channel shares')
    add('--token-noise-std', type=number(0), default=1., help='deviation of the noise of each element')
    add('--tokenadapt-path', default='', metavar='FILE', help='half of each batch goes through this TokenAdapt')
    recipe.add_mixing_flags(parser)
    recipe.add_run_flags(parser)
    parser.add_no_effect(NO_EFFECT, switches=['--use-entire-tokens'])
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError, also for values that cannot work together."""
    args = get_args_parser().parse_args(argv)
    recipe.check_flags(args)
    if args.input_size % args.token_patch_size or args.input_size < 2 * args.token_patch_size:
        raise InputError(f'--input-size {args.input_size}: give twice --token-patch-size {args.token_patch_size}, or a '
                         'larger multiple of it')
    low, high = (int(args.input_size // args.token_patch_size * side) for side in args.cutmix_minmax or (0, 1))
    if low >= high:
        raise InputError(f'--cutmix-minmax {args.cutmix_minmax}: give two rising shares, with whole codes between them')
    if args.eda_rc_prob + args.eda_sc_prob + args.eda_erase_prob > 1:
        raise InputError('--eda-rc-prob, --eda-sc-prob and --eda-erase-prob add up to more than 1')
    return args


# ---------------------------------------------------------------- data

def load_data(args: argparse.Namespace, codebook: torch.Tensor, size: int,
              device: torch.device) -> dict[str, TokenDataset]:
    """The data sets that are needed of 'train' and 'val', whose class names agree. Prints what they are."""
    datasets = {}
    for split, wanted in (('train', not args.eval), ('val', not args.no_eval)):
        if wanted:
            data = datasets[split] = TokenDataset(getattr(args, f'{split}_token_file'),
                                                  getattr(args, f'{split}_label_file'), len(codebook), args.token_cache,
                                                  device)
            check_crop(size, data.grid_size)
            print0(f'{split}: {len(data):,} images of {data.grid_size}x{data.grid_size} codes, '
                   f'{data.bytes_on_disk() / 1e6:,.2f} MB on disk ({data.bytes_on_disk() / len(data):,.0f} bytes an '
                   f'image), {size}x{size} codes are read')
    if len(datasets) == 2:
        check_class_names(*(data.classes for data in datasets.values()), args.train_token_file, args.val_token_file)
    return datasets


def make_augment(args: argparse.Namespace, codebook: torch.Tensor, grid_size: int, size: int, device: torch.device,
                 mixup: Callable | None) -> Callable:
    """(codes (B, g, g) uint16, labels, generator) -> model input (B, d, size, size), targets: Token-EDA to mixing."""
    changes = []
    if args.eda_rc_prob:
        synonyms = load_synonyms(args.token_synonym_dict, len(codebook), args.token_synonym_thres)
        changes.append((args.eda_rc_prob, ReplaceSynonyms(*synonyms, args.replace_token_prob, device)))
    if args.eda_sc_prob:
        changes.append((args.eda_sc_prob, SwapPatches(grid_size, args.swap_token_scale, device)))
    if args.eda_erase_prob:
        changes.append((args.eda_erase_prob, EraseRectangle(args.erase_scale, len(codebook))))
    token_eda = TokenEDA(changes)
    crop_kind = RandomCrop if args.src else RandomResizedCrop
    crop = crop_kind(codebook, grid_size, size, args.rrc_ratio, device)
    if args.compile:
        crop.resample = torch.compile(crop.resample)
    color = color_recipe(args.noise_recipe, args.token_noise_prob, args.token_coloradapt_prob, args.token_noise_scale,
                         args.token_noise_std)
    halves = open_halves(args.tokenadapt_path, codebook, crop, mixup, args.batch_size, device)

    def augment(codes: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple:
        codes = token_eda(codes.long(), generator)
        if halves:
            return halves.embeddings(color(look_up(codes, crop.embedding), generator), labels, generator)
        x = color(crop(codes, generator), generator)
        return mixup(x, labels) if mixup else (x, labels)
    return augment


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> int:
    """Train, or evaluate. Returns the exit code."""
    # ------------------------------------------------------------ set-up
    device = init_distributed(args.device, args.dist_url, args.dist_timeout)
    check_same_on_all_ranks(recipe.flags_alike(args))
    print_no_effect(NO_EFFECT, vars(args))
    recipe.set_up_torch(args)
    folder = RunFolder('' if args.eval else args.output_dir, args.save_every)
    checkpoint, path = find_checkpoint(args.output_dir, args.resume, args.eval)

    # ------------------------------------------------------------ data
    codebook = load_codebook(args.codebook_path)
    size = args.input_size // args.token_patch_size
    datasets = load_data(args, codebook, size, device)
    train_data = datasets.get('train')
    val_data = datasets.get('val')
    labels = {getattr(args, f'{split}_label_file'): data.labels for split, data in datasets.items()}
    trained = head_size(checkpoint['model'], 'head', path) if args.eval and not args.nb_classes else None
    classes = count_classes(labels, args.nb_classes, trained)
    names = (train_data or val_data).classes
    if checkpoint:
        check_class_names(checkpoint.get('classes'), names, path,
                          args.val_token_file if args.eval else args.train_token_file)
    check_same_on_all_ranks({'training images': len(train_data or ()), 'validation images': len(val_data or ()),
                             'codebook': tuple(codebook.shape), **progress_of(checkpoint)})
    choose_data_device(datasets, args.data_device, device)
    keep_freed_memory(device)  # only now: decoding a large set frees much that need not be kept

    # ------------------------------------------------------------ model
    model = create_model(args.model, args.model_kwargs, classes, size, codebook.shape[1],
                         drop_path_rate=args.drop_path, pos_drop_rate=args.drop, proj_drop_rate=args.drop)
    if args.finetune:
        load_pretrained(model, args.finetune, names)
    if args.attn_only:
        freeze_all_but_attention(model)
    model.to(device)
    amp = args.amp or recipe.default_amp(device)
    print_model(args.model, model, device, amp)

    # ------------------------------------------------------------ evaluation
    transform = EvalTransform(codebook, size, device)

    def evaluate_of(model: nn.Module, name: str) -> dict[str, float]:
        indices = rank_indices(len(val_data), args.dist_eval)
        batches = val_data.batches(indices, int(1.5 * args.batch_size), device, args.pin_mem)
        return evaluate(model, batches, transform, amp=amp, distributed=args.dist_eval, name=name)

    if args.eval:
        evaluate_checkpoint(model, checkpoint, path, args.model_ema, evaluate_of, args.output)
        return 0

    # ------------------------------------------------------------ loss
    mixup, criterion = recipe.make_loss(args, classes)
    augment = make_augment(args, codebook, train_data.grid_size, size, device, mixup)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        x, targets = augment(*batch, generator)
        return criterion(model(x), targets)

    sampler = repeated_augmentation if args.repeated_aug else shuffled

    def indices_of(epoch: int, start: int, stop: int) -> np.ndarray:
        order = sampler(len(train_data), world_size(), rank(), args.seed, epoch)
        return order[start * args.batch_size:stop * args.batch_size]

    def batches_of(epoch: int, start: int) -> Iterator:
        return train_data.batches(indices_of(epoch, start, steps), args.batch_size, device, args.pin_mem)

    # ------------------------------------------------------------ optimizer and resume
    rank_images = len(sampler(len(train_data), world_size(), rank(), args.seed, 0))
    steps = recipe.count_steps(args, rank_images, args.train_token_file)
    state = recipe.make_state(args, model, device, (codebook.shape[1], size, size))
    if checkpoint:
        resume(state, checkpoint, path, vars(args), steps)
        del checkpoint  # its tensors are copied
        print0(f'{path}: resumed at epoch {state.epoch}, step {state.step}, best Acc@1 {state.best["model"]:.3f}')
    print_batch(args.batch_size, args.accum_iter, steps, args.epochs, recipe.scaled_lr(args))
    print_recipe_batch(recipe.effective_batch(args), args.unscale_lr)

    # ------------------------------------------------------------ train
    folder.begin(run_record(vars(args), device), {'args': flags_to_save(vars(args)), 'classes': names})
    log = RunLog(args.output_dir, state.epoch, args.tensorboard)
    try:
        finished = train(state, batches_of, loss_of, None if args.no_eval else evaluate_of, folder, log, args.epochs,
                         recipe.step_options(args, steps))
    except NotFinite as error:
        folder.save_bad_step(error, rank(), args.seed, indices_of(error.epoch, error.step, error.step + 1).tolist())
        raise
    return 0 if finished else REQUEUE


if __name__ == '__main__':
    run(main, parse_args)
