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
import hashlib
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
        facts: how many images there are, and a digest of the codes of validation.
        flags: main_seit.py's for training.
        halves: main_seit.py's for evaluating the 'even' or the 'odd' images.
    """

    def __init__(self, folder: str, train: str, val: str, work: Path):
        codebook = ['--codebook-path', f'{folder}/codebook.ckpt', '--token-cache', str(work)]
        self.flags = [*codebook, '--token-synonym-dict', f'{folder}/synonyms.json', '--train-token-file',
                      f'{folder}/{train}-token.data.bin', '--train-label-file', f'{folder}/{train}-label.txt']
        images = len(open_token_file(f'{folder}/{train}-token.data.bin'))
        val_file = open_token_file(f'{folder}/{val}-token.data.bin')
        codes, labels = open_codes([val_file], str(work)), labels_of(val_file, Path(folder, f'{val}-label.txt'))
        self.facts = {'images': images, 'validation images': len(labels),
                      'validation codes': hashlib.sha256(np.ascontiguousarray(codes)).hexdigest()[:16]}
        self.halves = {}
        for start, half in enumerate(('even', 'odd')):
            paths = work / f'{half}-token.data.bin.gz', work / f'{half}-label.txt'
            write_set(paths[0], [codes[start::2]], len(labels[start::2]), paths[1], labels[start::2])
            self.halves[half] = [*codebook, '--val-token-file', str(paths[0]), '--val-label-file', str(paths[1])]


def call(program: str, *words: str) -> None:
    """Run a program. Raises InputError with the last line of one that failed."""
    done = subprocess.run([sys.executable, str(ROOT / program), '--device', 'cpu', *words],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise InputError(f'{program}: {(done.stdout.splitlines() or [""])[-1]}')


def train(program: str, data: Any, flags: list[str], evaluate: bool = True) -> dict[str, Any]:
    """Train once, and evaluate its end.

    Args:
        program: its file's name.
        data: a `TokenSet`, or one like it of images.
        flags: of the program, beside those of the data.
        evaluate: else it is only timed.

    Returns:
        top-1 (%) of the 'even' and of the 'odd' images, if `evaluate`; 'seconds', and 'images_per_second' of training.
    """
    with tempfile.TemporaryDirectory() as output:
        begun = time.monotonic()
        call(program, '--no-eval', *data.flags, *flags, '--output-dir', output)
        result = {'seconds': round(time.monotonic() - begun)}
        lines = Path(output, 'log.txt').read_text().splitlines()
        result['images_per_second'] = statistics.median(json.loads(line)['images_per_second_time'] for line in lines)
        for half, words in data.halves.items() if evaluate else ():
            call(program, '--eval', '--resume', f'{output}/checkpoint.pth', '--no-model-ema', *words, '--output',
                 f'{output}/{half}.json')
            result[half] = round(read_json(f'{output}/{half}.json')['acc1'], 2)
    return result


def open_results(path: str, **settings: Any) -> dict[str, Any]:
    """The results that are in a file, with the settings they are of. InputError where they are of others."""
    results = read_results(path) if os.path.exists(path) else {'runs': {}}
    for name, value in settings.items():
        if results.setdefault(name, value) != value:
            raise InputError(f'{path}: is of {name} {results[name]}, not {value}: choose another --output')
    return results


def read_results(path: str) -> dict[str, Any]:
    """A file of results. Raises InputError for any other."""
    results = read_json(path)
    if not isinstance(results, dict) or not isinstance(results.get('runs'), dict):
        raise InputError(f'{path}: holds no results of a search: name a file that --output wrote')
    return results


def run_all(args: argparse.Namespace) -> None:
    """Run what is missing, and print what came out."""
    work = Path(args.output).resolve().with_suffix('.work')
    work.mkdir(parents=True, exist_ok=True)
    tokens = TokenSet(args.tokens, args.train, args.val, work)
    results = open_results(args.output, epochs=args.epochs, input_size=args.input_size, **tokens.facts)
    runs = results['runs']
    epochs = ['--epochs', str(args.epochs)] if args.epochs else []
    common = ['--recipe', 'small', '--input-size', str(args.input_size), *epochs]

    def run_once(name: str, seed: int, flags: list[str]) -> dict[str, Any]:
        key = f'{name}, seed {seed}'
        if key not in runs:
            runs[key] = train('main_seit.py', tokens, [*common, '--seed', str(seed), *flags])
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
        results = read_results(file)
        if str(results.get('best')) not in trials():
            raise InputError(f'{file}: names no best trial: name the file of a search of this program that has ended')
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
