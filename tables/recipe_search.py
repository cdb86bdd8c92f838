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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before installed packages of the same names
from fileio.files import read_json, write_text
from flags import Parser, integer
from token_files.cache import open_codes
from token_files.token_file import labels_of, open_token_file, write_set
from utils import InputError, run

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
    """Training files, and the validation set in two halves.

    Args:
        folder, train, val: as --tokens, --train and --val.
        work: folder of decoded tokens and of the halves.

    Attributes:
        images, val_images: how many there are.
        flags: main_seit.py's for training.
        halves: main_seit.py's for evaluating the 'even' or the 'odd' images.
    """

    def __init__(self, folder: str, train: str, val: str, work: Path):
        codebook = ['--codebook-path', f'{folder}/codebook.ckpt', '--token-cache', str(work)]
        self.flags = [*codebook, '--token-synonym-dict', f'{folder}/synonyms.json', '--train-token-file',
                      f'{folder}/{train}-token.data.bin', '--train-label-file', f'{folder}/{train}-label.txt']
        self.images = len(open_token_file(f'{folder}/{train}-token.data.bin'))
        val_file = open_token_file(f'{folder}/{val}-token.data.bin')
        codes, labels = open_codes([val_file], str(work)), labels_of(val_file, Path(folder, f'{val}-label.txt'))
        self.val_images = len(labels)
        self.halves = {}
        for start, half in enumerate(('even', 'odd')):
            paths = work / f'{half}-token.data.bin.gz', work / f'{half}-label.txt'
            if not all(map(os.path.exists, paths)):
                write_set(paths[0], [codes[start::2]], len(labels[start::2]), paths[1], labels[start::2])
            self.halves[half] = [*codebook, '--val-token-file', str(paths[0]), '--val-label-file', str(paths[1])]


def call(*words: str) -> None:
    """Run main_seit.py. Raises InputError with the last line of one that failed."""
    done = subprocess.run([sys.executable, str(ROOT / 'main_seit.py'), '--device', 'cpu', *words],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise InputError(f'main_seit.py: {(done.stdout.splitlines() or [""])[-1]}')


def train(tokens: TokenSet, flags: list[str], seed: int) -> dict[str, Any]:
    """Train once, and evaluate its end. Returns top-1 (%) of the even and of the odd images, and seconds."""
    with tempfile.TemporaryDirectory() as output:
        begun = time.monotonic()
        call('--no-eval', *tokens.flags, *flags, '--seed', str(seed), '--output-dir', output)
        seconds = time.monotonic() - begun
        result = {}
        for half, words in tokens.halves.items():
            call('--eval', '--resume', f'{output}/checkpoint.pth', '--no-model-ema', *words, '--output',
                 f'{output}/{half}.json')
            result[half] = round(read_json(f'{output}/{half}.json')['acc1'], 2)
    return result | {'seconds': round(seconds)}


def run_all(args: argparse.Namespace) -> None:
    """Run what is missing, and print what came out."""
    work = Path(args.output).resolve().with_suffix('.work')
    work.mkdir(parents=True, exist_ok=True)
    tokens = TokenSet(args.tokens, args.train, args.val, work)
    results = read_json(args.output) if os.path.exists(args.output) else {}
    results |= {'images': tokens.images, 'validation images': tokens.val_images, 'epochs': args.epochs}
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
