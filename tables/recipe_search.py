"""Is `--recipe small` about as good as a search? Twelve trials on a token set, against the recipe.

    python tables/recipe_search.py --tokens demo --train fashion-train --val fashion-val --input-size 64 \
        --epochs 6 --output output/search/demo.json

The trials are 3 learning rates x 2 models x 2 strengths of augmentation, all with the batch and warm-up of the recipe.
The even validation images choose the best trial, the odd ones tell what it is worth; so no number told was chosen by.
Three seeds of the best trial and of the recipe are told. The results are written after each run: begun again, the
command does what is missing. Files of results become the table of docs/results.md:

    python tables/recipe_search.py --report docs/recipe_search/*.json
"""
import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before installed packages of the same names
from fileio.files import read_json, write_text
from flags import Parser, integer
from inference.models import load_model, make_prepare
from token_dataset import TokenDataset
from token_files.codebook import load_codebook
from training.checkpoints import load_checkpoint
from utils import CPU, InputError, run

ROOT = Path(__file__).resolve().parents[1]
RATES = ('5e-4', '1e-3', '2e-3')
MODELS = {'width 128': ('depth=4', 'embed_dim=128', 'num_heads=4'),
          'width 192': ('depth=4', 'embed_dim=192', 'num_heads=6')}
STRENGTHS = {
    'light': ('--drop-path', '0', '--rrc-ratio', '0.6', '--token-noise-prob', '0.05', '--mixup-prob', '0.2'),
    'strong': ('--drop-path', '0.1', '--rrc-ratio', '0.35', '--token-noise-prob', '0.25', '--mixup-prob', '0.5'),
}
RECIPE = 'small'
SEEDS = (0, 1, 2)
EVALUATED = 250  # images of a batch


def get_args_parser() -> Parser:
    """All flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--report', nargs='+', default=[], metavar='FILE.json', help='run nothing; print the table of these results')
    add('--tokens', metavar='DIR', help='folder of token sets, codebook.ckpt and synonyms.json')
    add('--train', metavar='NAME', help='the training set there: NAME-token.data.bin and NAME-label.txt')
    add('--val', metavar='NAME', help='the validation set there')
    add('--input-size', type=integer(2), help='as of main_seit.py')
    add('--epochs', type=integer(1), help='of every run (default: those of the recipe)')
    add('--output', metavar='FILE.json', help='takes the results')
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    args = get_args_parser().parse_args(argv)
    needed = ('tokens', 'train', 'val', 'input_size', 'output')
    missing = [f'--{name.replace("_", "-")}' for name in needed if not getattr(args, name)]
    if missing and not args.report:
        raise InputError(f'{", ".join(missing)}: give {"it" if len(missing) == 1 else "them"}, or --report FILE.json')
    return args


def trials() -> dict[str, list[str]]:
    """The twelve trials: flags of main_seit.py by name."""
    return {f'{rate}, {model}, {strength}': ['--unscale-lr', '--lr', rate, '--warmup-lr', str(float(rate) / 10),
                                             '--no-model-ema', '--model', 'deit_tiny_token_32', '--model-kwargs',
                                             *MODELS[model], *STRENGTHS[strength]]
            for rate, model, strength in itertools.product(RATES, MODELS, STRENGTHS)}


class TokenSet:
    """Training files, and the validation set in memory.

    Args:
        folder, train, val: as --tokens, --train and --val.
        cache: folder of decoded tokens.
    """

    def __init__(self, folder: str, train: str, val: str, cache: str):
        self.codebook_path = f'{folder}/codebook.ckpt'
        self.codebook = load_codebook(self.codebook_path)
        self.cache = cache
        self.flags = ['--codebook-path', self.codebook_path, '--token-synonym-dict', f'{folder}/synonyms.json',
                      '--train-token-file', f'{folder}/{train}-token.data.bin',
                      '--train-label-file', f'{folder}/{train}-label.txt', '--token-cache', cache]
        self.images = len(TokenDataset(f'{folder}/{train}-token.data.bin', None, len(self.codebook), cache))
        self.val = TokenDataset(f'{folder}/{val}-token.data.bin', f'{folder}/{val}-label.txt', len(self.codebook),
                                cache)

    def right(self, checkpoint: str) -> np.ndarray:
        """Which validation images the model of a checkpoint gets right, (N,) bool."""
        trained = load_model(load_checkpoint(checkpoint), checkpoint, self.codebook)
        prepare = make_prepare(trained, CPU, self.codebook)
        right = []
        with torch.inference_mode():
            for codes, labels in self.val.batches(np.arange(len(self.val)), EVALUATED, CPU):
                right.append(trained.model(prepare(codes)).argmax(1) == labels)
        return torch.cat(right).numpy()


def train(tokens: TokenSet, flags: list[str], seed: int) -> dict[str, Any]:
    """Train once, and evaluate its end. Returns top-1 (%) of the even and of the odd images, and seconds."""
    with tempfile.TemporaryDirectory() as output:
        begun = time.monotonic()
        done = subprocess.run([sys.executable, str(ROOT / 'main_seit.py'), '--no-eval', *tokens.flags, *flags, '--seed',
                               str(seed), '--output-dir', output, '--device', 'cpu'], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise InputError(f'main_seit.py: {done.stdout.splitlines()[-1]}')
        seconds = time.monotonic() - begun
        right = tokens.right(os.path.join(output, 'checkpoint.pth'))
    even, odd = (round(100 * float(half.mean()), 2) for half in (right[::2], right[1::2]))
    return {'even': even, 'odd': odd, 'seconds': round(seconds)}


def run_all(args: argparse.Namespace) -> None:
    """Run what is missing, and print what came out."""
    cache = os.path.join(os.path.dirname(os.path.abspath(args.output)), 'cache')
    os.makedirs(cache, exist_ok=True)
    tokens = TokenSet(args.tokens, args.train, args.val, cache)
    results = read_json(args.output) if os.path.exists(args.output) else {}
    results |= {'images': tokens.images, 'validation images': len(tokens.val), 'epochs': args.epochs}
    runs = results.setdefault('runs', {})
    common = ['--input-size', str(args.input_size)] + (['--epochs', str(args.epochs)] if args.epochs else [])

    def run_once(name: str, seed: int, flags: list[str]) -> dict[str, Any]:
        key = f'{name}, seed {seed}'
        if key not in runs:
            runs[key] = train(tokens, [*common, '--recipe', 'small', *flags], seed)
            write_text(args.output, json.dumps(results, indent=1) + '\n')
            print(f'{key}: {runs[key]}', flush=True)
        return runs[key]

    results['best'] = max(trials(), key=lambda name: run_once(name, 0, trials()[name])['even'])
    write_text(args.output, json.dumps(results, indent=1) + '\n')
    for name, flags in {results['best']: trials()[results['best']], RECIPE: []}.items():
        for seed in SEEDS:
            run_once(name, seed, flags)
    print_table([args.output])


def told(results: dict[str, Any], name: str) -> list[float]:
    """Top-1 (%) of the odd images, of each seed of an arm that there is."""
    return [results['runs'][key]['odd'] for key in (f'{name}, seed {seed}' for seed in SEEDS) if key in results['runs']]


def print_table(files: list[str]) -> None:
    """Print a Markdown table of files of results, in their order. Raises InputError."""
    print('| set | images | epochs | best of 12 trials | its top-1 | `--recipe small` | behind | standard error |')
    print('|-----|-------:|-------:|-------------------|----------:|-----------------:|-------:|---------------:|')
    for file in files:
        results = read_json(file)
        odd = results['validation images'] // 2
        best, recipe = told(results, results['best']), told(results, RECIPE)
        mean, mean_of_recipe = statistics.mean(best), statistics.mean(recipe)
        error = math.sqrt(mean * (100 - mean) / odd)
        print(f'| {Path(file).stem} | {results["images"]:,} | {results["epochs"] or "its own"} | {results["best"]} '
              f'| {mean:.1f} ({spread(best)}) | {mean_of_recipe:.1f} ({spread(recipe)}) | {mean - mean_of_recipe:.1f} '
              f'| {error:.1f} |')


def spread(values: list[float]) -> str:
    """The least and the largest of some values, as a text."""
    return f'{min(values):.1f} to {max(values):.1f}'


def main(args: argparse.Namespace) -> None:
    """Run the search, or print its table."""
    if args.report:
        print_table(args.report)
    else:
        run_all(args)


if __name__ == '__main__':
    run(main, parse_args)
