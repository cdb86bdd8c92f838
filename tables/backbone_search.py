"""ViT, RegNet and ConvNeXt of equal compute on tokens and on pixels: what the stem of a convolutional network is worth.

    python tables/backbone_search.py --tokens SET --images IMAGES --input-size 64 --epochs 6 --output tiny.json

SET is a folder with token sets train and val, codebook.ckpt and synonyms.json, and IMAGES one with the class folders
train and val that they were made of. Each arm gets four learning rates with seed 0, and larger ones while the largest
is the best; the even validation images choose one, the odd ones tell what it is worth, with three seeds. All else is
`--recipe small`. The results are written after each run: begun again, the command does what is missing. `--speed` then
measures training in turn, arm after arm.

    python tables/backbone_search.py --report docs/backbones/*.json
"""
import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before installed packages of the same names
from fileio.files import write_text
from flags import Parser, integer, number
from image_data.sources import open_source
from tables.recipe_search import TokenSet, open_results, read_results, spread, train
from utils import InputError, run

RATES = ('5e-4', '1e-3', '2e-3', '4e-3')
MORE_RATES = ('8e-3', '1.6e-2')  # tried in turn while the largest is an arm's best
# of 14 to 16 million multiplications for 64 pixels or 8x8 codes, but for the fast stem, and 12 to 14 times that for 224
MODELS = {'ViT': ('deit_tiny_token_32', 'depth=4', 'embed_dim=128', 'num_heads=4'),
          'RegNet': ('regnetx_002', 'stem_width=12', 'depth=11'),
          'ConvNeXt': ('convnext_atto', 'depths=(2,2,4,2)', 'dims=(24,48,96,192)')}
VIT_OF_PIXELS = 'deit_tiny_patch16_224', *MODELS['ViT'][1:], 'patch_size=16', 'global_pool=avg'
STEMS = 'native', 'fast'


def rate(text: str) -> str:
    """A learning rate as it was typed, which names a run. Raises argparse's error for what is none."""
    number(1e-12)(text)
    return text


def get_args_parser() -> Parser:
    """All flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--report', nargs='+', default=[], metavar='FILE.json', help='run nothing; print the tables of these results')
    add('--tokens', metavar='DIR', help='folder of the token sets train and val, codebook.ckpt and synonyms.json')
    add('--images', metavar='DIR', help='folder of the class folders train and val that they were made of')
    add('--input-size', type=integer(2), help='pixels on a side that a model sees; tokens have 8 pixels a code')
    add('--epochs', type=integer(1), default=6, help='of every run')
    add('--arms', nargs='+', choices=list(arms()), default=list(arms()), help='those to be run')
    add('--rates', type=rate, nargs='+', default=list(RATES), help='learning rates of the search')
    add('--seeds', type=integer(1), default=3, help='how many runs of the best rate')
    add('--speed', type=integer(), default=0, metavar='ROUNDS',
        help='train no more; measure one epoch of each arm, arm after arm, so many times')
    add('--output', metavar='FILE.json', help='takes the results')
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    args = get_args_parser().parse_args(argv)
    missing = [f'--{name.replace("_", "-")}' for name in ('tokens', 'images', 'input_size', 'output')
               if not getattr(args, name)]
    if missing and not args.report:
        raise InputError(f'{", ".join(missing)}: give {"it" if len(missing) == 1 else "them"}, or --report FILE.json')
    return args


def arms() -> dict[str, tuple[str, list[str]]]:
    """Program and flags of each arm, by its name."""
    found = {'ViT, tokens': ('main_seit.py', of_model(MODELS['ViT'])),
             'ViT, pixels': ('main_pixels.py', of_model(VIT_OF_PIXELS))}
    for name in ('RegNet', 'ConvNeXt'):
        for stem in STEMS:
            found[f'{name}, tokens {stem}'] = 'main_seit.py', [*of_model(MODELS[name]), '--stem', stem]
        found[f'{name}, pixels'] = 'main_pixels.py', of_model(MODELS[name])
    return found


def of_model(words: tuple[str, ...]) -> list[str]:
    """Flags of a model and its arguments."""
    return ['--model', words[0], '--model-kwargs', *words[1:]]


class ImageSet:
    """Training images, and the validation images in two halves: `TokenSet` of pixels.

    Attributes:
        counts: how many images there are of either.
        flags: main_pixels.py's for training.
        halves: main_pixels.py's for evaluating the 'even' or the 'odd' images.
    """

    def __init__(self, folder: str, work: Path):
        # images of one size are decoded faster than a small model is trained
        self.flags = ['--train-path', f'{folder}/train', '--num-workers', '0']
        source = open_source(f'{folder}/val')
        self.counts = {'images': len(open_source(f'{folder}/train')), 'validation images': len(source)}
        self.halves = {}
        for start, half in enumerate(('even', 'odd')):
            lines = [f'{Path(folder, "val", name).resolve()}\t{label}'
                     for name, label in zip(source.names[start::2], source.labels[start::2])]
            write_text(work / f'{half}.txt', '\n'.join(lines) + '\n')
            self.halves[half] = ['--val-path', str(work / f'{half}.txt'), '--num-workers', '0']


def run_all(args: argparse.Namespace) -> None:
    """Run what is missing, and print what came out."""
    work = Path(args.output).resolve().with_suffix('.work')
    work.mkdir(parents=True, exist_ok=True)
    sets = {'main_seit.py': TokenSet(args.tokens, 'train', 'val', work), 'main_pixels.py': ImageSet(args.images, work)}
    tokens = sets['main_seit.py'].facts
    for split, count in sets['main_pixels.py'].counts.items():
        if count != tokens[split]:
            raise InputError(f'{args.images}: has {count:,} {split}, but {args.tokens} {tokens[split]:,}: name those '
                             'that the tokens were made of')
    results = open_results(args.output, epochs=args.epochs, input_size=args.input_size, **tokens)
    runs = results['runs']
    common = ['--recipe', 'small', '--input-size', str(args.input_size), '--no-model-ema']

    def flags_of(arm: str, rate: str, seed: int, epochs: int) -> tuple[str, Any, list[str]]:
        program, flags = arms()[arm]
        return program, sets[program], [*common, *flags, '--unscale-lr', '--lr', rate, '--warmup-lr',
                                        str(float(rate) / 10), '--epochs', str(epochs), '--seed', str(seed)]

    def run_once(arm: str, rate: str, seed: int) -> float:
        key = f'{arm}, {rate}, seed {seed}'
        if key not in runs:
            runs[key] = train(*flags_of(arm, rate, seed, args.epochs))
            write_text(args.output, json.dumps(results, indent=1) + '\n')
            print(f'{key}: {runs[key]}', flush=True)
        return runs[key]['even']

    def best_rate(arm: str) -> str:
        rates = list(args.rates)
        waiting = list(MORE_RATES) if args.rates == list(RATES) else []
        while True:
            best = max(rates, key=lambda rate: run_once(arm, rate, 0))
            if best != rates[-1] or not waiting:
                return best
            rates.append(waiting.pop(0))

    if args.speed:
        for number in range(args.speed):
            for arm in args.arms:
                speed = train(*flags_of(arm, RATES[0], number, 1), evaluate=False)['images_per_second']
                results.setdefault('speed', {}).setdefault(arm, []).append(speed)
                print(f'{arm}: {speed} images a second', flush=True)
                write_text(args.output, json.dumps(results, indent=1) + '\n')
    else:
        # all arms come to their first seed before any comes to its second
        best = {arm: best_rate(arm) for arm in args.arms}
        results['best'] = results.get('best', {}) | best
        write_text(args.output, json.dumps(results, indent=1) + '\n')
        for seed in range(1, args.seeds):
            for arm, rate in best.items():
                run_once(arm, rate, seed)
    print_table(args.output)


def print_table(file: str) -> None:
    """Print a Markdown table of a file of results. Raises InputError."""
    results = read_results(file)
    print('| arm | rate | seeds | top-1 | images a second |')
    print('|-----|-----:|------:|------:|----------------:|')
    for arm in arms():
        rate = results.get('best', {}).get(arm)
        told = [value['odd'] for key, value in results['runs'].items() if key.startswith(f'{arm}, {rate}, seed')]
        speeds = results.get('speed', {}).get(arm)
        speed = f'{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})' if speeds else ''
        top1 = f'{statistics.mean(told):.1f} ({spread(told)})' if told else ''
        if told or speeds:
            print(f'| {arm} | {rate or ""} | {len(told) or ""} | {top1} | {speed} |')


def main(args: argparse.Namespace) -> None:
    """Run the comparison, or print its tables."""
    for file in args.report:
        print_table(file)
    if not args.report:
        run_all(args)


if __name__ == '__main__':
    run(main, parse_args)
