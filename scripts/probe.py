"""Judge frozen features of a checkpoint, or codes themselves: k nearest neighbors, a linear probe, a small head.

    python scripts/probe.py --checkpoint output/run/checkpoint.pth --train-path IMAGES/train --val-path IMAGES/val
    python scripts/probe.py --checkpoint output/run/checkpoint.pth \\
        --train-token-file tokens/my-train-token.data.bin.gz --train-label-file tokens/my-train-label.txt \\
        --val-token-file tokens/my-val-token.data.bin.gz --val-label-file tokens/my-val-label.txt

Without a checkpoint it judges codes: are those of a token set, or of a tokenizer, good for understanding?

    python scripts/probe.py --codebook-path fsq:8,8,8,5,5,5 --train-token-file train.safetensors \\
        --val-token-file val.safetensors
    python scripts/probe.py --codebook-path weights/codebook.ckpt --tokenizer-path weights/tokenizer.safetensors \\
        --tokenizer-input-size 256 --train-path IMAGES/train --val-path IMAGES/val

Then the features of an image are the mean of the rows of its codes, and `head` is a small network, trained on the rows
in their grid: two convolutions of stride 2 and a linear layer, without augmentation, always from the same seed.

Checkpoints may be of main_seit.py, main_mtm_pretrain.py and main_mtm_finetune.py on tokens, and of main_pixels.py on
images. The classes may be others than those of the training. Features are what the head reads, of images as they are
evaluated: without augmentation, in float32.

Neighbors vote as in DINO (arXiv 2104.14294) and Wu et al., 2018 (arXiv 1805.01978): with exp(cosine / temperature).
The linear probe is multinomial logistic regression on standardized features, by L-BFGS; nothing about it is random but
which tenth of the training features is held out to choose the weight decay, always the same one.
"""
import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import check_writable, write_text
from fileio.labels import check_class_names, count_classes
from flags import (DEVICE_HELP, KeyValues, Parser, add_allow_torchscript, add_exif_rotate, add_max_pixels, add_stem,
                   integer, number, views)
from image_data.dataset import ImageDataset, eval_transform
from image_data.decoding import resize_square
from image_data.overlap import note_shared_images
from image_tokenizer.tokenizers import check_codes, check_found, check_sizes, encode_images, load_tokenizer
from inference.models import load_model, make_prepare, program_with
from models_seit import STEMS
from samplers import in_order, shuffled
from token_dataset import TokenDataset, facts_of, note_shared_files
from token_files.codebook import load_codebook, look_up
from token_files.made_with import check_made_with, file_of
from token_files.token_file import MAX_CODES, holds_foreign
from training.checkpoints import FINETUNE, PIXELS, check_tokens_of, load_checkpoint, said_of_the_model
from training.run_info import print_model
from utils import InputError, init_distributed, print0, run

PROBES = ('knn', 'linear', 'head')
TOKEN_FLAGS = ('train_token_file', 'train_label_file', 'val_token_file', 'val_label_file')
IMAGE_FLAGS = ('train_path', 'val_path')
TEMPERATURE = 0.07
DECAYS = (1., 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # tried by the linear probe, the strongest first
MAX_ITERATIONS = 200  # of L-BFGS
CHUNK_ELEMENTS = 1 << 26  # of similarities or logits in memory at a time
ROUNDING = 2. ** -18  # 32 times that of one operation in float32
HELD_OUT = 10  # one training feature in so many
HEAD_WIDTH = 128  # channels of the small head
HEAD_EPOCHS = 20
HEAD_BATCH = 128


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--checkpoint', default='', metavar='FILE',
        help='the checkpoint to judge; without one the codes themselves are judged')
    add('--use-ema', action='store_true', help="judge the checkpoint's averaged weights")
    add('--model', default='', help='name of the model; default: as the checkpoint says, with its arguments')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='sizes of --model, as given in training')
    for flag in TOKEN_FLAGS:
        add(f'--{flag.replace("_", "-")}', default='', metavar='FILE',
            help='a path, a glob or a comma-separated list of shards; sets of other projects have labels inside')
    add('--views', type=views, metavar='V[:B]',
        help='each image is in --train-token-file V times, as in main_seit.py; the first view is read')
    add_stem(add, STEMS)
    add('--codebook-path', default='', metavar='FILE',
        help='the codebook of the tokens (default: as the checkpoint says)')
    add('--tokenizer-path', default='', metavar='FILE',
        help='judge the codes that this tokenizer makes of --train-path and --val-path')
    add('--tokenizer-code-path', metavar='DIR',
        help='folder of the code that a pickled tokenizer runs when it is loaded')
    add('--tokenizer-input-size', type=integer(1), default=256,
        help='pixels to which both sides of an image are resized for --tokenizer-path')
    add_allow_torchscript(add)
    add('--token-cache', default='', metavar='DIR', help='where token files are decoded to, as in main_seit.py')
    for flag in IMAGE_FLAGS:
        add(f'--{flag.replace("_", "-")}', default='', metavar='PATH', help='images: see image_data/sources.py')
    add('--input-size', type=integer(1), help='pixels on a side of images, or 8 to a code; default: as the '
        'checkpoint says')
    add('--eval-crop-ratio', type=number(0.01, 1),
        help='part of the side of images that the center crop keeps; default: as the checkpoint says')
    add('--num-workers', type=integer(), default=10, help='processes that decode images; never more than the cores')
    add_max_pixels(add)
    add_exif_rotate(add)
    add('--probes', nargs='+', choices=PROBES, help='which probes to run (default: all; head is for codes alone)')
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
    if args.codebook_path and args.train_path and not args.tokenizer_path:
        raise InputError('--codebook-path belongs to tokens: give it beside --train-token-file')
    if args.tokenizer_path and not (args.train_path and args.codebook_path):
        raise InputError('--tokenizer-path makes codes of images: give --train-path, --val-path and --codebook-path')
    if args.tokenizer_path and args.checkpoint:
        raise InputError('--tokenizer-path judges codes alone: omit --checkpoint, or tokenize the images and give '
                         '--train-token-file')
    if not args.checkpoint and not args.codebook_path:
        raise InputError('--checkpoint: give the checkpoint to judge, or --codebook-path to judge codes')
    if args.checkpoint and 'head' in (args.probes or ()):
        raise InputError('--probes head: is for codes; a checkpoint has a head of its own kind: give knn and linear')
    return args


# ---------------------------------------------------------------- features

@torch.no_grad()
def features_of(model: nn.Module, data: 'TokenDataset | ImageDataset | Codes', prepare: Callable, batch_size: int,
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


# ---------------------------------------------------------------- codes themselves

class Codes:
    """Codes in memory, fetched as those of a TokenDataset.

    Attributes:
        codes: (N, g, g) uint16.
        labels: (N,) int64.
        classes: names of the classes, or None.
    """

    def __init__(self, codes: np.ndarray, labels: np.ndarray, classes: list[str] | None):
        self.codes = codes
        self.labels = labels
        self.classes = classes

    def __len__(self) -> int:
        return len(self.codes)

    def batches(self, indices: np.ndarray, batch_size: int,
                device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield codes (B, g, g) int32 and labels (B,) int64 on `device`."""
        for start in range(0, len(indices), batch_size):
            part = indices[start:start + batch_size]
            yield (torch.from_numpy(self.codes[part].astype(np.int32)).to(device),
                   torch.from_numpy(self.labels[part]).to(device))


@torch.no_grad()
def tokenized(data: ImageDataset, tokenizer: nn.Module, codebook: torch.Tensor, batch_size: int,
              device: torch.device) -> Codes:
    """The codes of all images. Raises InputError for a tokenizer that gives none."""
    codes = []
    for pixels, _ in data.batches(in_order(len(data), 1, 0), batch_size, device):
        features, part = encode_images(tokenizer, codebook, pixels)  # (B, n)
        check_found(features, part)
        codes.append(part.cpu().numpy().astype(np.uint16))
    codes = np.concatenate(codes)
    side = math.isqrt(codes.shape[1])
    return Codes(codes.reshape(-1, side, side), data.labels, data.classes)


class MeanRow(nn.Module):
    """What timm's models have for their features, of the rows of codes: (B, d, g, g) -> (B, d)."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x.mean((2, 3))


class Head(nn.Module):
    """A small network on rows of codes, (B, d, g, g) -> (B, classes)."""

    def __init__(self, dim: int, classes: int, width: int = HEAD_WIDTH):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(dim, width, 3, stride=2, padding=1), nn.GELU(),
                                    nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GELU())
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(x).mean((2, 3))))


def train_head(splits: dict[str, TokenDataset | Codes], prepare: Callable, dim: int, classes: int,
               device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (M, classes) that a `Head`, trained on 'train', gives 'val', and its labels (M,), on the device.

    AdamW, 1e-3 falling to 0 by a cosine, over HEAD_EPOCHS. What is random in it is the same in each call.
    """
    train, val = splits['train'], splits['val']
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Head(dim, classes).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    steps = HEAD_EPOCHS * -(-len(train) // HEAD_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(HEAD_EPOCHS):
        for codes, labels in train.batches(shuffled(len(train), 1, 0, 0, epoch), HEAD_BATCH, device):
            F.cross_entropy(head(prepare(codes)), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        parts = [(head(prepare(codes)), labels) for codes, labels
                 in val.batches(in_order(len(val), 1, 0), HEAD_BATCH, device)]
    scores, labels = zip(*parts)
    return torch.cat(scores), torch.cat(labels)


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

def open_images(args: argparse.Namespace, size: int, transform: Callable, exif_rotate: bool) -> dict[str, ImageDataset]:
    """The images of --train-path and --val-path."""
    data = {split: ImageDataset(getattr(args, f'{split}_path'), size, transform, args.num_workers,
                                args.max_image_pixels, exif_rotate) for split in ('train', 'val')}
    note_shared_images(data['train'].source, data['val'].source)
    return data


def open_tokens(args: argparse.Namespace, codebook: torch.Tensor, codebook_path: str,
                device: torch.device) -> dict[str, TokenDataset]:
    """The token sets of --train-token-file and --val-token-file. Raises InputError where they are of other codes."""
    data = {split: TokenDataset(getattr(args, f'{split}_token_file'), getattr(args, f'{split}_label_file'),
                                len(codebook), args.token_cache, device, args.views if split == 'train' else None)
            for split in ('train', 'val')}
    check_made_with([file for split in data.values() for file in split.files], codebook, codebook_path)
    note_shared_files(data['train'], data['val'])
    return data


def open_checkpoint(args: argparse.Namespace, device: torch.device) -> tuple[str, nn.Module, Callable, dict[str, Any]]:
    """What is judged of --checkpoint: its name, the model, what prepares its input, and the data."""
    checkpoint = load_checkpoint(args.checkpoint)
    program = program_with(checkpoint, args.checkpoint, args.stem)
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
                         args.input_size, args.eval_crop_ratio, args.stem)
    model = trained.model
    if program == FINETUNE:
        model.reset_classifier(0)  # only its features are read
    if program == PIXELS:
        exif_rotate = said_of_the_model(checkpoint).get('exif_rotate', False)
        if args.exif_rotate and not exif_rotate:
            print0(f'note: images are read with --exif-rotate; those that {args.checkpoint} was trained on were not')
        data = open_images(args, trained.input_size, eval_transform(trained.input_size, trained.crop_ratio),
                           args.exif_rotate or exif_rotate)
    else:
        data = open_tokens(args, codebook, codebook_path, device)
        check_tokens_of(checkpoint, args.checkpoint, facts_of(data, codebook),
                        {'codebook': codebook_path, 'tokenizer': args.train_token_file})
    return f'{program} {trained.name}', model, make_prepare(trained, device, codebook), data


def open_codes(args: argparse.Namespace, device: torch.device) -> tuple[str, nn.Module, Callable, dict[str, Any]]:
    """What is judged of codes themselves, as `open_checkpoint` returns it."""
    codebook = load_codebook(args.codebook_path)
    name = f'codes of {args.tokenizer_path or args.train_token_file}'
    if len(codebook) > MAX_CODES:
        raise InputError(f'{args.codebook_path}: {len(codebook):,} codes, but {MAX_CODES:,} are the most that are read')
    if args.tokenizer_path:
        tokenizer = load_tokenizer(args.tokenizer_path, args.tokenizer_code_path, args.allow_torchscript)
        check_codes(tokenizer, codebook, args.codebook_path)
        check_sizes(args.tokenizer_input_size, tokenizer.patch_size, '--tokenizer-input-size')
        images = open_images(args, args.tokenizer_input_size,
                             functools.partial(resize_square, size=args.tokenizer_input_size), args.exif_rotate)
        tokenizer = tokenizer.to(device).eval()
        data = {split: tokenized(part, tokenizer, codebook.to(device), args.batch_size, device)
                for split, part in images.items()}
    else:
        data = open_tokens(args, codebook, args.codebook_path, device)
    table = codebook.to(device)
    return name, MeanRow(), lambda codes: look_up(codes.long(), table), data


def main(args: argparse.Namespace) -> None:
    """Probe a checkpoint, or codes."""
    if args.output:
        inputs = [args.checkpoint, args.codebook_path, args.tokenizer_path,
                  *(getattr(args, flag) for flag in (*TOKEN_FLAGS, *IMAGE_FLAGS))]
        check_writable(args.output, inputs=list(filter(None, inputs)))
    device = init_distributed(args.device)
    probes = args.probes or [probe for probe in PROBES if probe != 'head' or not args.checkpoint]
    name, model, prepare, data = (open_checkpoint if args.checkpoint else open_codes)(args, device)
    paths = {split: getattr(args, f'{split}_path') or getattr(args, f'{split}_token_file') for split in data}
    check_class_names(data['train'].classes, data['val'].classes, paths['train'], paths['val'])
    classes = count_classes({paths[split]: data[split].labels for split in data}, None, None, 'fix the labels')
    if 'knn' in probes and args.neighbors > len(data['train']):
        raise InputError(f'--neighbors {args.neighbors}: {paths["train"]} has {len(data["train"])} images')
    if 'linear' in probes and len(data['train']) < HELD_OUT:
        raise InputError(f'--probes linear: holds one training image in {HELD_OUT} out, but {paths["train"]} has '
                         f'{len(data["train"])}: give more, or --probes knn')

    if args.checkpoint:
        print_model(name, model.to(device), device, 'off')
    splits = {split: features_of(model, data[split], prepare, args.batch_size, device) for split in data}
    if not all(features.isfinite().all() for features, _ in splits.values()):
        raise InputError(f'{args.checkpoint or args.codebook_path}: gives features that are not finite: its weights '
                         'are damaged, or its training went wrong')
    facts = {split: len(labels) for split, (_, labels) in splits.items()}
    facts |= {'classes': classes, 'dim': splits['train'][0].shape[1]}
    print0(f'features: {facts["train"]:,} for training and {facts["val"]:,} for validation, {facts["dim"]} numbers '
           f'each, {classes} classes')
    results = judge(splits, classes, probes, args.neighbors, args.temperature)
    if 'head' in probes:
        results['head'] = accuracies(*train_head(data, prepare, facts['dim'], classes, device)) | {
            'epochs': HEAD_EPOCHS, 'width': HEAD_WIDTH}
        print_result('head', results['head'])
    if args.output:
        judged = {'checkpoint': args.checkpoint} if args.checkpoint else {'codes': name}
        write_text(args.output, json.dumps({**judged, **facts, **results}) + '\n')


if __name__ == '__main__':
    run(main, parse_args)
