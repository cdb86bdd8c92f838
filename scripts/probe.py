"""Judge frozen features of a checkpoint: k nearest neighbors and a linear probe, on tokens or on images.

    python scripts/probe.py --checkpoint output/run/checkpoint.pth --train-path IMAGES/train --val-path IMAGES/val
    python scripts/probe.py --checkpoint output/run/checkpoint.pth \\
        --train-token-file tokens/my-train-token.data.bin.gz --train-label-file tokens/my-train-label.txt \\
        --val-token-file tokens/my-val-token.data.bin.gz --val-label-file tokens/my-val-label.txt

Takes checkpoints of main_seit.py, main_mtm_pretrain.py and main_mtm_finetune.py on tokens, and of main_pixels.py on
images. The classes may be others than those of the training. Features are what the head reads, of images as they are
evaluated: without augmentation, in float32.

Neighbors vote as in DINO (arXiv 2104.14294) and Wu et al., 2018 (arXiv 1805.01978): with exp(cosine / temperature).
The linear probe is multinomial logistic regression on standardized features, by L-BFGS; nothing about it is random but
which tenth of the training features is held out to choose the weight decay, always the same one.
"""
import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import check_writable, write_text
from fileio.labels import check_class_names, count_classes
from flags import DEVICE_HELP, KeyValues, Parser, add_exif_rotate, add_max_pixels, integer, number, views
from image_data.dataset import ImageDataset, eval_transform
from image_data.overlap import note_shared_images
from inference.models import load_model, make_prepare
from samplers import in_order
from token_dataset import TokenDataset, facts_of, note_shared_files
from token_files.codebook import load_codebook
from token_files.made_with import check_made_with, file_of
from token_files.token_file import holds_foreign
from training.checkpoints import FINETUNE, PIXELS, check_tokens_of, load_checkpoint, program_of, said_of_the_model
from training.run_info import print_model
from utils import InputError, init_distributed, print0, run

PROBES = ('knn', 'linear')
TOKEN_FLAGS = ('train_token_file', 'train_label_file', 'val_token_file', 'val_label_file')
IMAGE_FLAGS = ('train_path', 'val_path')
TEMPERATURE = 0.07
DECAYS = (1., 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # tried by the linear probe, the strongest first
MAX_ITERATIONS = 200  # of L-BFGS
CHUNK_ELEMENTS = 1 << 26  # of similarities or logits in memory at a time
ROUNDING = 2. ** -18  # 32 times that of one operation in float32
HELD_OUT = 10  # one training feature in so many


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='FILE', help='the checkpoint to judge')
    add('--use-ema', action='store_true', help="judge the checkpoint's averaged weights")
    add('--model', default='', help='name of the model; default: as the checkpoint says, with its arguments')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='sizes of --model, as given in training')
    for flag in TOKEN_FLAGS:
        add(f'--{flag.replace("_", "-")}', default='', metavar='FILE',
            help='a path, a glob or a comma-separated list of shards; sets of other projects have labels inside')
    add('--views', type=views, metavar='V[:B]',
        help='each image is in the token files V times, as in main_seit.py; the first view is read')
    add('--codebook-path', default='', metavar='FILE',
        help='the codebook of the tokens (default: as the checkpoint says)')
    add('--token-cache', default='', metavar='DIR', help='where token files are decoded to, as in main_seit.py')
    for flag in IMAGE_FLAGS:
        add(f'--{flag.replace("_", "-")}', default='', metavar='PATH', help='images: see image_data/sources.py')
    add('--input-size', type=integer(1), help='pixels on a side of images; default: as the checkpoint says')
    add('--eval-crop-ratio', type=number(0.01, 1),
        help='part of the side of images that the center crop keeps; default: as the checkpoint says')
    add('--num-workers', type=integer(), default=10, help='processes that decode images; never more than the cores')
    add_max_pixels(add)
    add_exif_rotate(add)
    add('--probes', nargs='+', choices=PROBES, default=list(PROBES), help='which probes to run')
    add('--neighbors', type=integer(1), default=20, help='how many nearest neighbors vote')
    add('--temperature', type=number(1e-6), default=TEMPERATURE, help="temperature of the neighbors' votes")
    add('--batch-size', type=integer(1), default=64, help='images in a batch')
    add('--device', default='auto', help=DEVICE_HELP)
    add('--output', metavar='FILE.json', help='also write the results to this file')
    args = parser.parse_args(argv)
    # either all flags of tokens or all flags of images
    inside = {flag for flag in TOKEN_FLAGS if flag.endswith('_label_file')
              and holds_foreign(getattr(args, flag.replace('label', 'token')))}
    given = [[flag for flag in flags if getattr(args, flag) or flag in inside] for flags in (TOKEN_FLAGS, IMAGE_FLAGS)]
    if [len(flags) for flags in given] not in ([len(TOKEN_FLAGS), 0], [0, len(IMAGE_FLAGS)]):
        raise InputError('give ' + ', or '.join(', '.join(f'--{flag.replace("_", "-")}' for flag in flags)
                                                for flags in (IMAGE_FLAGS, TOKEN_FLAGS)))
    if args.views and args.train_path:
        raise InputError('--views belongs to tokens: give it beside --train-token-file')
    if args.codebook_path and args.train_path:
        raise InputError('--codebook-path belongs to tokens: give it beside --train-token-file')
    return args


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


# ---------------------------------------------------------------- k nearest neighbors

def neighbor_votes(train: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, classes: int, k: int = 20,
                   temperature: float = TEMPERATURE) -> torch.Tensor:
    """What the k training features of largest cosine similarity vote, for each query.

    Args:
        train: (N, D) float32 features.
        labels: (N,) int64, of the training features.
        queries: (M, D) float32 features.
        classes: how many there are.
        k: neighbors, N at most.
        temperature: a neighbor of similarity s votes with exp((s - s_max) / temperature).

    Returns:
        (M, classes) float32, logarithms of votes; -inf for a class without one.

    Raises:
        InputError: for more neighbors than training features.
    """
    if k > len(train):
        raise InputError(f'{k} neighbors of {len(train)} training images: ask for fewer')
    keys = F.normalize(train, dim=1).T
    votes = []
    for part in F.normalize(queries, dim=1).split(max(1, CHUNK_ELEMENTS // len(train))):
        similarity, nearest = (part @ keys).topk(k, dim=1)
        logs = (similarity - similarity[:, :1]) / temperature
        voted = labels[nearest]
        # relative to the largest of each class: at a low temperature all others would be 0, as if they had not voted
        largest = logs.new_full((len(part), classes), -torch.inf).scatter_reduce_(1, voted, logs, 'amax')
        sums = torch.zeros_like(largest).scatter_add_(1, voted, (logs - largest.gather(1, voted)).exp())
        votes.append(largest + sums.log())
    return torch.cat(votes)


# ---------------------------------------------------------------- linear probe

def standardize(train: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of features, (N, D) and (M, D), minus the mean of the first, divided by its deviation.

    Features that never change in the first, but for rounding, become 0: divided by its deviation, rounding would be as
    large as what the model says.
    """
    std, mean = torch.std_mean(train, dim=0, correction=0)
    size = torch.maximum(mean.abs(), train.square().mean().sqrt())  # of what was summed to make the feature
    changes = std > ROUNDING * size
    std = torch.where(changes, std, 1.)
    return tuple(torch.where(changes, (features - mean) / std, 0.) for features in (train, other))


def scores_of(weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Logits (N, classes) of weights (D + 1, classes), the last row of which is the bias, for features (N, D)."""
    return features @ weights[:-1] + weights[-1]


def fit_linear(features: torch.Tensor, labels: torch.Tensor, decay: float, start: torch.Tensor) -> torch.Tensor:
    """Minimize mean cross-entropy + decay / 2 · |weights|², the bias without decay, by L-BFGS.

    Args:
        features: (N, D) float32, standardized.
        labels: (N,) int64.
        decay: above 0, so that there is one minimum.
        start: (D + 1, classes) weights to begin from, see `scores_of`.

    Returns:
        (D + 1, classes).
    """
    weights = torch.nn.Parameter(start.clone())
    chunk = max(1, CHUNK_ELEMENTS // start.shape[1])
    optimizer = torch.optim.LBFGS([weights], max_iter=MAX_ITERATIONS, history_size=10, tolerance_grad=1e-6,
                                  tolerance_change=1e-9, line_search_fn='strong_wolfe')

    @torch.no_grad()
    def loss_and_gradient() -> torch.Tensor:
        """In chunks, so that never all logits are in memory."""
        penalty = decay * weights
        penalty[-1] = 0
        loss = (penalty * weights).sum() / 2
        weights.grad = penalty
        for x, y in zip(features.split(chunk), labels.split(chunk)):
            logits = scores_of(weights, x)
            loss += F.cross_entropy(logits, y, reduction='sum') / len(features)
            errors = logits.softmax(1)
            errors[torch.arange(len(y), device=y.device), y] -= 1
            errors /= len(features)
            weights.grad[:-1] += x.T @ errors
            weights.grad[-1] += errors.sum(0)
        return loss

    optimizer.step(loss_and_gradient)
    return weights.detach()


def linear_probe(train: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, classes: int,
                 decays: tuple[float, ...] = DECAYS) -> tuple[torch.Tensor, float]:
    """Scores (M, classes) of queries (M, D), and the weight decay of the least loss on a held-out tenth.

    The loss and not the accuracy, because that of a few images is mostly chance.

    Args:
        train: (N, D) float32 features.
        labels: (N,) int64, of the training features.
        queries: (M, D) float32 features.
        classes: how many there are.
        decays: to try.

    Raises:
        InputError: for fewer than ten training features.
    """
    if len(train) < HELD_OUT:
        raise InputError(f'{len(train)} training images: a linear probe holds one in {HELD_OUT} of them out')
    train, queries = standardize(train, queries)
    # drawn on the CPU, so that the held-out tenth is the same on every device
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    held_out, rest = order[:len(train) // HELD_OUT], order[len(train) // HELD_OUT:]
    # from strong to weak decay, each fit begins at the one before: fewer iterations
    weights = train.new_zeros(train.shape[1] + 1, classes)
    losses = {}
    for decay in decays:
        weights = fit_linear(train[rest], labels[rest], decay, weights)
        losses[decay] = F.cross_entropy(scores_of(weights, train[held_out]), labels[held_out]).item()
    best = min(losses, key=losses.get)
    # the last fit has all features, and begins at zero, so that it does not depend on what was tried
    weights = fit_linear(train, labels, best, torch.zeros_like(weights))
    return scores_of(weights, queries), best


# ---------------------------------------------------------------- results

def accuracies(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Top-1 and top-5 (%) of scores (N, classes) for labels (N,): {'acc1', 'acc5'}. Classes of -inf do not count."""
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    top = ((best.indices == labels[:, None]) & (best.values > -torch.inf)).cpu()  # not every device has float64
    return {'acc1': 100 * top[:, 0].double().mean().item(), 'acc5': 100 * top.any(1).double().mean().item()}


def judge(splits: dict[str, tuple[torch.Tensor, torch.Tensor]], classes: int, probes: Sequence[str], neighbors: int,
          temperature: float) -> dict[str, dict[str, float]]:
    """The results of some of PROBES, on features and labels of 'train' and 'val'. Prints a line for each."""
    train, val = splits['train'], splits['val']
    results = {}
    if 'knn' in probes:
        votes = neighbor_votes(*train, val[0], classes, neighbors, temperature)
        results['knn'] = accuracies(votes, val[1]) | {'neighbors': neighbors, 'temperature': temperature}
        print_result('kNN', results['knn'])  # before the linear probe, which takes longer, and may be stopped
    if 'linear' in probes:
        scores, decay = linear_probe(*train, val[0], classes)
        results['linear'] = accuracies(scores, val[1]) | {'weight_decay': decay}
        print_result('linear', results['linear'])
    return results


def print_result(name: str, result: dict[str, float]) -> None:
    """Print the line of a probe."""
    acc1, acc5, *_ = result.values()
    facts = ', '.join(f'{key.replace("_", " ")} {value:g}' for key, value in list(result.items())[2:])
    print0(f'* {name} Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} ({facts})')


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> None:
    """Probe a checkpoint."""
    if args.output:
        inputs = [args.checkpoint, args.codebook_path, *(getattr(args, flag) for flag in (*TOKEN_FLAGS, *IMAGE_FLAGS))]
        check_writable(args.output, inputs=list(filter(None, inputs)))
    device = init_distributed(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    program = program_of(checkpoint)
    if bool(args.train_path) != (program == PIXELS):
        reads, flag = ('images', 'train-path') if program == PIXELS else ('tokens', 'train-token-file')
        raise InputError(f'{args.checkpoint}: is of {program}, which reads {reads}: give --{flag} and the others')
    codebook = None
    if program != PIXELS:
        codebook_path = args.codebook_path or file_of(checkpoint, 'codebook', args.checkpoint, '--codebook-path')
        if not codebook_path:
            raise InputError(f'{args.checkpoint}: does not say with which codebook it was trained: give it to '
                             '--codebook-path')
        codebook = load_codebook(codebook_path)
    trained = load_model(checkpoint, args.checkpoint, codebook, args.use_ema, args.model, args.model_kwargs,
                         args.input_size, args.eval_crop_ratio)
    model = trained.model
    if program == FINETUNE:
        model.reset_classifier(0)  # only its features are read
    prepare = make_prepare(trained, device, codebook)
    if program == PIXELS:
        exif_rotate = said_of_the_model(checkpoint).get('exif_rotate', False)
        if args.exif_rotate and not exif_rotate:
            print0(f'note: images are read with --exif-rotate; those that {args.checkpoint} was trained on were not')
        paths = {'train': args.train_path, 'val': args.val_path}
        transform = eval_transform(trained.input_size, trained.crop_ratio)
        data = {split: ImageDataset(path, trained.input_size, transform, args.num_workers, args.max_image_pixels,
                                   args.exif_rotate or exif_rotate)
                for split, path in paths.items()}
        note_shared_images(data['train'].source, data['val'].source)
    else:
        paths = {'train': args.train_token_file, 'val': args.val_token_file}
        data = {split: TokenDataset(path, getattr(args, f'{split}_label_file'), len(codebook), args.token_cache, device,
                                    args.views)
                for split, path in paths.items()}
        check_made_with([file for split in data.values() for file in split.files], codebook, codebook_path)
        check_tokens_of(checkpoint, args.checkpoint, facts_of(data, codebook),
                        {'codebook': codebook_path, 'tokenizer': args.train_token_file})
        note_shared_files(data['train'], data['val'])
    check_class_names(data['train'].classes, data['val'].classes, paths['train'], paths['val'])
    classes = count_classes({paths[split]: data[split].labels for split in data}, None, None, 'fix the labels')
    if 'knn' in args.probes and args.neighbors > len(data['train']):
        raise InputError(f'--neighbors {args.neighbors}: {paths["train"]} has {len(data["train"])} images')
    if 'linear' in args.probes and len(data['train']) < HELD_OUT:
        raise InputError(f'--probes linear: holds one training image in {HELD_OUT} out, but {paths["train"]} has '
                         f'{len(data["train"])}: give more, or --probes knn')

    print_model(f'{program} {trained.name}', model.to(device), device, 'off')
    splits = {split: features_of(model, data[split], prepare, args.batch_size, device) for split in data}
    if not all(features.isfinite().all() for features, _ in splits.values()):
        raise InputError(f'{args.checkpoint}: gives features that are not finite: its weights are damaged, or '
                         'its training went wrong')
    facts = {split: len(labels) for split, (_, labels) in splits.items()}
    facts |= {'classes': classes, 'dim': splits['train'][0].shape[1]}
    print0(f'features: {facts["train"]:,} for training and {facts["val"]:,} for validation, {facts["dim"]} numbers '
           f'each, {classes} classes')
    results = judge(splits, classes, args.probes, args.neighbors, args.temperature)
    if args.output:
        write_text(args.output, json.dumps({'checkpoint': args.checkpoint, **facts, **results}) + '\n')


if __name__ == '__main__':
    run(main, parse_args)
