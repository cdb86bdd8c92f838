"""Judge frozen features of a checkpoint: k nearest neighbors and a linear probe, on tokens or on images.

    python scripts/probe.py --checkpoint output/run/checkpoint.pth --train-path IMAGES/train --val-path IMAGES/val
    python scripts/probe.py --checkpoint output/run/checkpoint.pth --codebook-path tokens/codebook.ckpt \\
        --train-token-file tokens/my-train-token.data.bin.gz --train-label-file tokens/my-train-label.txt \\
        --val-token-file tokens/my-val-token.data.bin.gz --val-label-file tokens/my-val-label.txt

Takes checkpoints of main_seit.py, main_mtm_pretrain.py and main_mtm_finetune.py on tokens, and of main_pixels.py on
images. The classes may be others than those of the training. Features are what the head reads, of images as they are
evaluated: without augmentation, in float32. feature_probes.py says how they are judged.
"""
import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_pixels
import models_seit
from fileio.labels import check_class_names, count_classes
from seitpp import models_mtm_finetune
from token_files.codebook import load_codebook
from training.checkpoints import head_size, load_checkpoint, load_weights, saved_flags
from feature_probes import TEMPERATURE, accuracies, linear_probe, neighbor_votes
from fileio.files import check_writable, write_text
from flags import KeyValues, Parser, integer, number
from image_data.dataset import ImageDataset, Normalize, eval_transform
from samplers import in_order
from seitpp.mtm_recipe import canonical_codes
from token_augment import EvalTransform, center_crop, check_crop
from token_dataset import TokenDataset
from training.checkpoints import PRETRAIN, SEIT, check_codes, origin
from training.pretrained import POSITIONS, prefix_tokens, prefixes
from training.run_info import print_model
from utils import InputError, init_distributed, print0, run

PIXELS = 'main_pixels.py'
CLASSIFIER = 'deit_base_token_32'  # what main_mtm_finetune.py makes of main_mtm_pretrain.py's one model
PROBES = ('knn', 'linear')
TOKEN_FLAGS = ('train_token_file', 'train_label_file', 'val_token_file', 'val_label_file', 'codebook_path')
IMAGE_FLAGS = ('train_path', 'val_path')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='FILE')
    add('--use-ema', action='store_true', help="take the checkpoint's averaged weights")
    add('--model', default='', help='default: as the checkpoint says, and with what arguments')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help='as given in training')
    for flag in TOKEN_FLAGS:
        add(f'--{flag.replace("_", "-")}', default='', metavar='FILE',
            help='a glob or a comma-separated list of shards, too' if flag != 'codebook_path' else 'of the tokens')
    add('--token-cache', default='', metavar='DIR', help='see main_seit.py')
    for flag in IMAGE_FLAGS:
        add(f'--{flag.replace("_", "-")}', default='', metavar='PATH', help='images: see image_data/sources.py')
    add('--input-size', type=integer(1), help='of images, pixels on a side; default: as the checkpoint says')
    add('--eval-crop-ratio', type=number(0.01, 1), help='of images; default: as the checkpoint says')
    add('--num-workers', type=integer(), default=10, help='processes that decode images; as many as the cores at most')
    add('--probes', nargs='+', choices=PROBES, default=list(PROBES))
    add('--neighbors', type=integer(1), default=20)
    add('--temperature', type=number(1e-6), default=TEMPERATURE, help="of the neighbors' votes")
    add('--batch-size', type=integer(1), default=64)
    add('--device', default='auto', help='auto (CUDA where there is one), cuda, cuda:N or cpu')
    add('--output', metavar='FILE.json', help='write the results there, too')
    args = parser.parse_args(argv)
    given = [[flag for flag in flags if getattr(args, flag)] for flags in (TOKEN_FLAGS, IMAGE_FLAGS)]
    if [len(flags) for flags in given] not in ([len(TOKEN_FLAGS), 0], [0, len(IMAGE_FLAGS)]):
        raise InputError('give ' + ', or '.join(', '.join(f'--{flag.replace("_", "-")}' for flag in flags)
                                                for flags in (IMAGE_FLAGS, TOKEN_FLAGS)))
    return args


# ---------------------------------------------------------------- the model

def weights_of(checkpoint: dict[str, Any], path: str, ema: bool) -> dict[str, Any]:
    """The weights of a checkpoint, or its averaged ones. Raises InputError where it has none of these."""
    if not ema:
        return checkpoint['model']
    if not isinstance(checkpoint.get('model_ema'), dict):
        raise InputError(f'{path}: holds no EMA weights; leave --use-ema out')
    return checkpoint['model_ema']


def model_words(args: argparse.Namespace, flags: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the model: those of the command line, or of the run that wrote the checkpoint."""
    name = args.model or flags.get('model')
    kwargs = args.model_kwargs or (flags.get('model_kwargs') if not args.model else None) or {}
    if not isinstance(name, str) or not isinstance(kwargs, dict):
        raise InputError(f'{args.checkpoint}: does not say of which model it is: give --model')
    return name, kwargs


def grid_of(weights: dict[str, Any], path: str) -> int:
    """Codes on a side that a model of tokens reads: its patches are of 2x2. Raises InputError."""
    positions = weights.get(POSITIONS)
    prefix = prefix_tokens(positions.shape[1]) if isinstance(positions, torch.Tensor) and positions.ndim == 3 else None
    if prefix is None:
        raise InputError(f'{path}: has no position embeddings of a square grid: give another checkpoint')
    return 2 * round((positions.shape[1] - prefix) ** 0.5)


def token_model(args: argparse.Namespace, checkpoint: dict[str, Any], codebook: torch.Tensor,
                device: torch.device) -> tuple[nn.Module, Callable]:
    """A model of tokens, and (codes (B, g, g) uint16) -> what it reads. Raises InputError."""
    path = args.checkpoint
    weights = weights_of(checkpoint, path, args.use_ema)
    name, kwargs = model_words(args, saved_flags(checkpoint))
    size = grid_of(weights, path)
    if origin(weights) == SEIT:
        model = models_seit.create_model(name, kwargs, head_size(weights, 'head', path), size, codebook.shape[1])
        prepare = EvalTransform(codebook, size, device)
    else:
        check_codes(weights, len(codebook), path)
        if origin(weights) == PRETRAIN and not args.model:  # its classifier's name and arguments
            name = CLASSIFIER
            kwargs = {key: value for key, value in kwargs.items() if not str(key).startswith('decoder_')}
        model = models_mtm_finetune.create_model(name, kwargs, codebook_size=len(codebook), img_size=size,
                                                 num_classes=0)
        weights = models_mtm_finetune.encoder_weights(weights)
        same = canonical_codes(codebook).to(device)

        def prepare(codes: torch.Tensor) -> torch.Tensor:
            check_crop(size, codes.shape[-1])
            return same[center_crop(codes.long(), size)]
    load_weights(model, weights, path)
    return model, prepare


def pixel_model(args: argparse.Namespace, checkpoint: dict[str, Any]) -> tuple[nn.Module, int, float]:
    """A model of images, and the size and crop with which it reads them. Raises InputError."""
    path = args.checkpoint
    weights = weights_of(checkpoint, path, args.use_ema)
    flags = saved_flags(checkpoint)
    name, kwargs = model_words(args, flags)
    size = args.input_size or flags.get('input_size')
    crop = args.eval_crop_ratio or flags.get('eval_crop_ratio') or 0.875
    if type(size) is not int or size < 1 or not isinstance(crop, int | float) or not 0 < crop <= 1:
        raise InputError(f'{path}: does not say how it reads images: give --input-size and --eval-crop-ratio')
    words = argparse.Namespace(model=name, model_kwargs=kwargs, drop=0., drop_path=0., input_size=size)
    bare = main_pixels.create_model(words, 1)
    heads = prefixes(bare, 'classifier')
    model = main_pixels.create_model(words, head_size(weights, heads[0][:-1], path)) if heads else bare
    load_weights(model, weights, path)
    return model, size, crop


# ---------------------------------------------------------------- features

@torch.no_grad()
def features_of(model: nn.Module, data: TokenDataset | ImageDataset, prepare: Callable, batch_size: int,
                device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head of a model reads, (N, D) float32, and the labels (N,) int64, on the device. Raises InputError."""
    model.eval()
    features = []
    labels = []
    for inputs, classes in data.batches(in_order(len(data), 1, 0), batch_size, device):
        try:
            x = model.forward_head(model.forward_features(prepare(inputs)), pre_logits=True)
        except (AttributeError, TypeError):
            raise InputError(f'{type(model).__name__} does not say what its head reads (timm: forward_head with '
                             'pre_logits), so its features cannot be probed') from None
        features.append(x.flatten(1).float())
        labels.append(classes)
    return torch.cat(features), torch.cat(labels)


def probe(args: argparse.Namespace, splits: dict[str, tuple[torch.Tensor, torch.Tensor]], classes: int) -> dict:
    """The results of the probes of the flags, on features and labels of 'train' and 'val'. Prints a line for each."""
    train, val = splits['train'], splits['val']
    results = {}
    if 'knn' in args.probes:
        votes = neighbor_votes(*train, val[0], classes, args.neighbors, args.temperature)
        results['knn'] = accuracies(votes, val[1]) | {'neighbors': args.neighbors, 'temperature': args.temperature}
    if 'linear' in args.probes:
        scores, decay = linear_probe(*train, val[0], classes)
        results['linear'] = accuracies(scores, val[1]) | {'weight_decay': decay}
    for name, result in results.items():
        acc1, acc5, *_ = result.values()
        facts = ', '.join(f'{key.replace("_", " ")} {value:g}' for key, value in list(result.items())[2:])
        print0(f'* {name.replace("knn", "kNN")} Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} ({facts})')
    return results


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> None:
    """Probe a checkpoint."""
    if args.output:
        inputs = [args.checkpoint, *(getattr(args, flag) for flag in (*TOKEN_FLAGS, *IMAGE_FLAGS))]
        check_writable(args.output, inputs=list(filter(None, inputs)))
    device = init_distributed(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    program = origin(checkpoint['model']) or PIXELS
    if bool(args.train_path) != (program == PIXELS):
        reads, flag = ('images', 'train-path') if program == PIXELS else ('tokens', 'train-token-file')
        raise InputError(f'{args.checkpoint}: is of {program}, which reads {reads}: give --{flag} and the others')
    if program == PIXELS:
        model, size, crop = pixel_model(args, checkpoint)
        prepare = Normalize(device)
        paths = {'train': args.train_path, 'val': args.val_path}
        data = {split: ImageDataset(path, size, eval_transform(size, crop), args.num_workers)
                for split, path in paths.items()}
    else:
        codebook = load_codebook(args.codebook_path)
        model, prepare = token_model(args, checkpoint, codebook, device)
        paths = {'train': args.train_token_file, 'val': args.val_token_file}
        data = {split: TokenDataset(path, getattr(args, f'{split}_label_file'), len(codebook), args.token_cache, device)
                for split, path in paths.items()}
    check_class_names(data['train'].classes, data['val'].classes, paths['train'], paths['val'])
    classes = count_classes({paths[split]: data[split].labels for split in data}, None, None)
    if 'knn' in args.probes and args.neighbors > len(data['train']):
        raise InputError(f'--neighbors {args.neighbors}: {paths["train"]} has {len(data["train"])} images')

    print_model(f'{program} {args.model or saved_flags(checkpoint)["model"]}', model.to(device), device, 'off')
    splits = {split: features_of(model, data[split], prepare, args.batch_size, device) for split in data}
    if not all(features.isfinite().all() for features, _ in splits.values()):
        raise InputError(f'{args.checkpoint}: gives features that are not finite: its weights are damaged, or '
                         'its training went wrong')
    facts = {split: len(labels) for split, (_, labels) in splits.items()}
    facts |= {'classes': classes, 'dim': splits['train'][0].shape[1]}
    print0(f'features: {facts["train"]:,} for training and {facts["val"]:,} for validation, {facts["dim"]} numbers '
           f'each, {classes} classes')
    results = probe(args, splits, classes)
    if args.output:
        write_text(args.output, json.dumps({'checkpoint': args.checkpoint, **facts, **results}) + '\n')


if __name__ == '__main__':
    run(main, parse_args)
