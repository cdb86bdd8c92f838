"""Benchmark: tokenizers, judged by bytes, PSNR and SSIM, speed, and the top-1 of a small ViT trained on their tokens.

    python benchmarks/tokenizers.py --train-path IMAGES/train --val-path IMAGES/val --output-dir output/judged \\
        --tokenizer patch-8x8 tok/tokenizer.pt tok/codebook.ckpt 64 --tokenizer vq vq.safetensors - 128 \\
        --seeds 0 1 2 --lrs 1e-3 2e-3 --epochs 15

Takes the flags of main_seit.py too, which all arms are trained with; the defaults here are those of DEFAULTS below.
Each arm, a tokenizer, has a folder below --output-dir. The same command resumes what was stopped, and repeats no
finished run. Pixels at the same bytes are compared by tables/storage.py.

* Images: the first --classes class folders, the first --images-per-class of each, and all their validation images.
* Bytes an image, of the training set: at the entropy of single codes, at log2(codes) bits a code, and as files without
  labels.
* PSNR and SSIM, of the validation set: mean over the images, each compared at --quality-size pixels on a side with the
  same original, so that tokenizers of 64 and of 128 pixels have one yardstick. A reconstruction of another
  size is resized there, bicubic with antialias, which costs too: 64 -> 128 -> 64 alone has 33 dB. The JSON line has
  both at the tokenizer's own size too (own_psnr, own_ssim). Equal images have 100 dB.
* Training: every arm has the same model, steps, crops and search for a learning rate: --lrs with the first seed, and
  the best top-1 on the validation images is taken. That flatters all arms alike. Top-1 is of the last epoch.
"""
import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_seit
from benchmarks import arms, common
from fileio.files import lock_file, write_text
from flags import SEED, integer, number
from image_data.sources import open_source
from image_tokenizer.tokenizers import decode_codes
from image_tokenizer.tokenizing import identity, load_models
from scripts.inspect_tokens import describe, summarize
from tables.rows import check_same
from token_files.cache import open_codes
from token_files.codebook import load_codebook
from token_files.token_file import count_codes, open_token_file
from utils import InputError, cores, run

# What every arm is trained with, unless the command says otherwise. The published schedule holds --warmup-lr for two
# epochs, so that of a short run must not be next to nothing; likewise the average must follow within an epoch. The
# published embedding noise is for 300 epochs; in ten it costs 4 points.
DEFAULTS = ['--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=4', 'embed_dim=128', 'num_heads=4',
            '--batch-size', '100', '--epochs', '10', '--unscale-lr', '--warmup-epochs', '1', '--warmup-lr', '1e-4',
            '--drop-path', '0', '--rrc-ratio', '0.35', '--mixup-prob', '0.2', '--token-noise-prob', '0',
            '--model-ema-decay', '0.99']
COLUMN = 'column.png'  # of an arm, and of the originals
OWN_FLAGS = {'--lr', '--seed', '--output-dir', '--resume', '--eval', '--no-eval', '--finetune', '--start-epoch',
             '--input-size', '--nb-classes', '--codebook-path', '--token-synonym-dict', '--train-token-file',
             '--train-label-file', '--val-token-file', '--val-label-file'}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Our arguments; main_seit.py's as the list `main_flags`, and parsed as `main_args`. Raises InputError."""
    parser = common.make_parser('Judge tokenizers by bytes, reconstruction, speed, and the top-1 of a small ViT. Takes '
                                'the flags of main_seit.py too.', 5)
    add = parser.add_argument
    add('--train-path', required=True, metavar='DIR', help='a folder with a folder of images for every class')
    add('--val-path', required=True, metavar='DIR')
    add('--output-dir', required=True, metavar='DIR',
        help='gets results.json, table.md, sheet.png, and a folder for each arm')
    add('--tokenizer', nargs=4, action='append', required=True, metavar=('NAME', 'TOKENIZER', 'CODEBOOK', 'IMAGE_SIZE'),
        help="an arm; CODEBOOK - is the tokenizer's own")
    add('--classes', type=integer(2), default=20)
    add('--images-per-class', type=integer(1), default=500)
    add('--seeds', type=SEED, nargs='+', default=[0, 1, 2])
    add('--lrs', type=number(1e-12), nargs='+', default=[1e-3], help='learning rates to try, not scaled by default')
    add('--quality-size', type=integer(11), default=64, help='pixels on a side, for PSNR and SSIM')
    add('--jobs', type=integer(1), default=1, help='trainings at a time, each with --threads')
    add('--image-workers', type=integer(), default=cores(), help='processes that decode images')
    args, given = parser.parse_known_args(argv)
    own = OWN_FLAGS & {word.partition('=')[0] for word in given}
    if own:
        raise InputError(f'{", ".join(sorted(own))}: this benchmark sets it; learning rates and seeds come from --lrs '
                         'and --seeds')
    main_flags = [*DEFAULTS, *given]
    return argparse.Namespace(**vars(args), main_flags=main_flags, main_args=main_seit.parse_args(main_flags),
                              arms=check_arms(args.tokenizer))


def check_arms(tokenizers: list[list[str]]) -> dict[str, tuple[str, str, int]]:
    """The arms by name: tokenizer, codebook or '-', image size. Raises InputError."""
    checked = {}
    for name, tokenizer, codebook, image_size in tokenizers:
        if not name or name != Path(name).name or name.startswith('.') or '|' in name or name in checked:
            raise InputError(f'{name!r}: name every arm by a plain word of its own')
        try:
            checked[name] = (tokenizer, codebook, integer(1)(image_size))
        except argparse.ArgumentTypeError as error:
            raise InputError(f'the arm {name}: {error}') from None
    return checked


# ---------------------------------------------------------------- arms

def train_arm(args: argparse.Namespace, folder: Path, program: Sequence[Any],
              model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The accuracies of an arm, whose program and words these are, with the flags that all arms have."""
    def command(output: Path, lr: float, seed: int) -> list[str]:
        words = [f'{key}={value}' for key, value in model_kwargs.items()]
        return [*program, *args.main_flags, '--model-kwargs', *words, '--lr', lr, '--seed', seed, '--output-dir',
                output, '--resume', 'auto']

    return arms.train_seeds(folder, command, args.lrs, args.seeds, args.main_args.epochs, args.jobs, args.threads)


def tokenize(args: argparse.Namespace, folder: Path, lists: Sequence[Path], spec: tuple[str, str, int]) -> Path:
    """Tokenize both splits into a folder, with the synonyms of the codebook; returns the codebook's path."""
    tokenizer, codebook, image_size = spec
    own = codebook == '-'
    codebook = folder / 'codebook.ckpt' if own else Path(codebook)
    for path in lists:
        words = ['--data-path', path, '--name', path.stem, '--output-dir', folder, '--tokenizer-path', tokenizer,
                 '--image-size', image_size, '--num-workers', args.image_workers, '--device', args.main_args.device]
        if not (own and path == lists[0]):  # else the first split writes the codebook
            words += ['--codebook-path', codebook]
        arms.run_programs([(['tokenize_images.py', *words], folder / 'tokenize.log')], 1, args.threads)
    synonyms = folder / 'synonyms.json'
    if not synonyms.exists():
        words = ['--codebook-path', codebook, '--output', synonyms]
        arms.run_programs([(['scripts/build_synonyms.py', *words], folder / 'tokenize.log')], 1, args.threads)
    return codebook


def judge_tokens(args: argparse.Namespace, folder: Path, lists: Sequence[Path], spec: tuple[str, str, int],
                 device: torch.device) -> dict[str, Any]:
    """The result of a tokenizer (path, codebook's path or '-', image size). Raises InputError."""
    tokenizer, _ = load_models(spec[0], None, None if spec[1] == '-' else spec[1], spec[2], False)
    codebook_path = tokenize(args, folder, lists, spec)
    codebook = load_codebook(codebook_path).to(device)
    tokenizer = tokenizer.to(device)
    train_file, val_file = (open_token_file(folder / f'{path.stem}-token.data.bin.gz') for path in lists)
    train_codes = open_codes([train_file], cache='none')
    val_codes = open_codes([val_file], cache='none')
    summary = summarize([train_file], None, train_codes, count_codes(train_codes, len(codebook)))
    print('\n'.join(describe(summary)[:4]), flush=True)
    val_source = open_source(lists[1])

    def reconstruct(batch: Sequence[int]) -> torch.Tensor | None:
        return decode_codes(tokenizer, codebook, torch.from_numpy(val_codes[list(batch)].astype(np.int64)))

    quality, own = arms.image_quality(val_source, reconstruct, (args.quality_size, spec[2]), args.image_workers)
    arms.write_column(reconstruct, len(val_source), args.quality_size, folder / COLUMN)
    speed = arms.tokenizing_speed(val_source, tokenizer, codebook, spec[2], args.repeats)
    program = ['main_seit.py', '--codebook-path', codebook_path, '--token-synonym-dict', folder / 'synonyms.json',
               '--input-size', summary['grid'] * args.main_args.token_patch_size]
    for path in lists:
        program += [f'--{path.stem}-token-file', folder / f'{path.stem}-token.data.bin.gz',
                    f'--{path.stem}-label-file', folder / f'{path.stem}-label.txt']
    trained = train_arm(args, folder, program, args.main_args.model_kwargs | {'in_chans': codebook.shape[1]})
    return {'image_size': spec[2], 'grid': summary['grid'], 'codes': summary['codes'],
            'code_dim': codebook.shape[1], 'codes_used_share': summary['codes_used'] / summary['codes'],
            'entropy_bits': summary['entropy_bits'], 'most_bits': summary['most_bits'],
            'bytes': summary['bytes_per_image'], **quality, 'own_psnr': own['psnr'], 'own_ssim': own['ssim'],
            'images_per_second': speed, **trained}


def definition_of(args: argparse.Namespace, lists: Sequence[Path], spec: tuple[str, str, int]) -> dict[str, Any]:
    """All that the results of an arm depend on but seeds and learning rates, which have folders of their own."""
    tokenizer, codebook, image_size = spec
    return {'images': [open_source(path).digest() for path in lists], 'training flags': args.main_flags,
            'tokenizer': identity(tokenizer), 'image size': image_size,
            'codebook': codebook if codebook == '-' else identity(codebook)}


def judge(args: argparse.Namespace, name: str, lists: Sequence[Path], device: torch.device) -> dict[str, Any]:
    """The result of an arm, or {'failed': why}."""
    folder = Path(args.output_dir) / name
    print(f'{name}:', flush=True)
    try:
        definition = definition_of(args, lists, args.arms[name])
        folder.mkdir(parents=True, exist_ok=True)
        check_same(folder / 'arm.json', definition)
        return judge_tokens(args, folder, lists, args.arms[name], device)
    except InputError as error:
        print(f'error: {name}: {error}', file=sys.stderr, flush=True)
        return {'failed': str(error)}


# ---------------------------------------------------------------- the program

def lock(folder: Path) -> Any:
    """Take a folder for this process; keep what is returned. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock_file(folder / '.lock')
    except BlockingIOError:
        raise InputError(f'{folder}: another benchmark is writing there; choose another --output-dir') from None
    except OSError as error:
        raise InputError(f'{folder}: --output-dir cannot be written ({error.strerror})') from None


def judge_all(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, Any]]:
    """The results of all arms by name; results.json, table.md and sheet.png are kept up to date."""
    folder = Path(args.output_dir)
    lists = arms.write_lists(args.train_path, args.val_path, args.classes, args.images_per_class, folder)
    arms.source_column(open_source(lists[1]), args.quality_size, folder / COLUMN)
    columns = {'source': folder / COLUMN} | {name: folder / name / COLUMN for name in args.arms}
    results = {}
    for name in args.arms:
        results[name] = judge(args, name, lists, device)
        write_text(folder / 'results.json', json.dumps(results, indent=1) + '\n')
        write_text(folder / 'table.md', arms.table(results))
        arms.write_sheet(columns, folder / 'sheet.png')
    return results


def main(args: argparse.Namespace) -> int:
    """Judge all arms. Returns the exit code: 1 where one failed."""
    locked = lock(Path(args.output_dir))
    device = common.set_up(args.main_args.device, args.threads)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the programs it started would live on
    try:
        results = judge_all(args, device)
    finally:
        signal.signal(signal.SIGTERM, before)
        if locked:
            locked.close()
    print(arms.table(results))
    asked = {key: getattr(args, key) for key in ('repeats', 'threads', 'jobs', 'classes', 'images_per_class', 'seeds',
                                                 'lrs', 'quality_size')}
    asked |= {'training_flags': ' '.join(args.main_flags), **common.asked_of_main(args.main_args, device)}
    common.print_result('tokenizers', {'arms': results}, asked, device)
    return int(any('failed' in result for result in results.values()))


if __name__ == '__main__':
    run(main, parse_args)
