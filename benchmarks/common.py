"""What the benchmarks share: their command line, rounds that take turns, synthetic data, the JSON line.

A benchmark is a function (device, folder) -> numbers. `run_benchmark` calls it in a temporary folder and prints what it
returns; inside, `take_turns` measures variants in rounds.
"""
import argparse
import contextlib
import functools
import json
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import main_seit
from fileio.files import check_writable, save_torch, write_text
from flags import Parser, integer
from image_tokenizer.tokenizers import PatchTokenizer, lift_rows
from image_tokenizer.vitvqgan import ViTVQGAN
from recipe import default_amp
from token_files.token_file import format_for, stream_ending, write_model, write_set
from training.run_info import VERSIONS
from utils import device_of_rank

CODES = 391  # of the published codebook
CODE_DIM = 32
CHUNK_CODES = 1 << 23  # codes made at a time: bounds memory
RANKINGS = 64  # of the codes, one for every so many of the neighbors that a synthetic code may have
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}
# Flags that say where files lie.
PLACES = 'main_flags', 'folder', 'token_file', 'data_path', 'tokenizer_path', 'codebook_path', 'output'
# Of main_seit.py's flags, those that the JSON line repeats.
MAIN_FLAGS = 'model', 'model_kwargs', 'batch_size', 'input_size', 'compile', 'nb_classes', 'data_device'


# ---------------------------------------------------------------- the command line

def make_parser(about: str, repeats: int, clock: bool = False, threads: str = "torch's, on the CPU") -> Parser:
    """The flags that all benchmarks have.

    Args:
        about: the benchmark in a few words.
        repeats: rounds by default.
        clock: the benchmark can count CPU time.
        threads: what --threads are.
    """
    parser = Parser(about)
    add = parser.add_argument
    add('--repeats', type=integer(1), default=repeats, help='rounds to measure')
    add('--threads', type=integer(1), default=torch.get_num_threads(), help=threads)
    add('--output', metavar='FILE.json', help='write the JSON line there, too')
    if clock:
        add('--clock', default='wall', choices=list(CLOCKS), help='cpu counts CPU seconds of the process: with '
            '--threads 1, what a CPU that other jobs use too would do alone')
    return parser


def parse_with_main(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of `parser`; what it does not know is main_seit.py's, and becomes the list `main_flags`.

    Raises:
        InputError: for a mistake in either.
    """
    args, main_flags = parser.parse_known_args(argv)
    main_args = main_seit.parse_args(main_flags)
    if main_args.nb_classes is None:
        main_flags = [*main_flags, '--nb-classes', '1000']
    return argparse.Namespace(**vars(args), main_flags=main_flags, device=main_args.device)


def set_up(device: str, threads: int) -> torch.device:
    """The device, with so many threads of torch on the CPU. Raises InputError for a device that is not there."""
    torch.set_num_threads(threads)
    return device_of_rank(device)


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keep this thread, and what it starts, on at most so many cores: library threads that nobody asked for too."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# ---------------------------------------------------------------- measuring

def take_turns(variants: dict[str, Callable], repeats: int, device: torch.device,
               clock: str = 'wall') -> dict[str, np.ndarray]:
    """Measure functions in turn, after a warm-up of each.

    Args:
        variants: functions without arguments, by name.
        repeats: rounds.
        device: where they work.
        clock: 'wall' or 'cpu'.

    Returns:
        Seconds of each round, (repeats,), by name.
    """
    now = CLOCKS[clock]
    seconds = {name: [] for name in variants}
    for round_ in range(-1, repeats):  # round -1 is the warm-up
        for name, variant in variants.items():
            began = now()
            variant()
            if device.type == 'cuda':  # else only the launch of the kernels would be measured
                torch.cuda.synchronize(device)
            if round_ >= 0:
                seconds[name].append(now() - began)
    return {name: np.array(values) for name, values in seconds.items()}


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least and largest of some numbers, to so many significant digits."""
    values = np.asarray(values, float)
    statistics = {'median': np.median(values), 'min': values.min(), 'max': values.max()}
    return {name: float(f'{value:.{digits}g}') for name, value in statistics.items()}


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    on_gpu = device.type == 'cuda'
    return {'cpu': names[0] if names else 'unknown', 'cores': len(os.sched_getaffinity(0)),
            'threads': torch.get_num_threads(), 'gpu': torch.cuda.get_device_name(device) if on_gpu else None,
            'cuda': torch.version.cuda if on_gpu else None, **VERSIONS, 'numpy': np.__version__}


def run_benchmark(name: str, measure: Callable, settings: dict[str, Any]) -> None:
    """Measure in a temporary folder, and print the result.

    Args:
        name: of the benchmark.
        measure: (device, folder) -> numbers by name.
        settings: the flags by name, among them 'device' and 'threads', and what `parse_with_main` adds.
    """
    if settings.get('output'):
        check_writable(settings['output'])
    device = set_up(settings['device'], settings['threads'])
    with tempfile.TemporaryDirectory(prefix='seit-benchmark-') as folder:
        result = measure(device, Path(folder))
    if 'main_flags' in settings:
        settings = settings | asked_of_main(main_seit.parse_args(settings['main_flags']), device)
    print_result(name, result, settings, device)


def asked_of_main(main_args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What main_seit.py's flags asked for, as the JSON line has it."""
    settings = {name: getattr(main_args, name) for name in MAIN_FLAGS}
    return settings | {'amp': main_args.amp or default_amp(device)}


def print_result(name: str, result: dict[str, Any], asked: dict[str, Any], device: torch.device) -> None:
    """Print a line for each result, then the JSON line, which --output gets, too.

    Args:
        name: of the benchmark.
        result: numbers by name.
        settings: the flags; those that say where files lie are left out.
        device: it was measured on.
    """
    for key, value in result.items():
        print(f'{key}: {value}')
    facts = {key: value for key, value in asked.items() if key not in PLACES}
    line = json.dumps({'benchmark': name, **result, 'asked': facts, 'hardware': hardware(device)})
    print(line, flush=True)
    if asked.get('output'):
        write_text(asked['output'], line + '\n')


# ---------------------------------------------------------------- synthetic data

def make_codes(images: int, grid_size: int) -> Iterator[np.ndarray]:
    """Yield runs of synthetic codes (m, n) uint16, always the same; neighbors depend on each other as real ones do.

    Each code is drawn from a ranking of all codes, the first ones most often, that its left or its upper neighbor has.
    Of the 7.5 bits of a code on its own 5.1 are left to a context model of 128 groups, about as with real ones.
    """
    # A power of a uniform number makes low ranks frequent. Each neighbor ranks the codes in another order, so a code
    # says much about the next one, while all codes are used about alike.
    rng = np.random.default_rng(0)
    ranking = rng.permuted(np.tile(np.arange(CODES, dtype=np.uint16), (RANKINGS, 1)), axis=1)
    chunk = max(1, CHUNK_CODES // grid_size ** 2)
    for first in range(0, images, chunk):
        shape = grid_size, grid_size, min(chunk, images - first)  # images last: what is drawn together lies together
        by_left = rng.random(shape, np.float32) < 0.5
        rank = (CODES * rng.random(shape, np.float32) ** 10).astype(np.int16)
        codes = np.zeros(shape, np.uint16)  # what is before the first column, or row, is code 0
        for y in range(grid_size):
            for x in range(grid_size):
                neighbor = np.where(by_left[y, x], codes[y, x - 1], codes[y - 1, x])
                codes[y, x] = ranking[neighbor % RANKINGS, rank[y, x]]
        yield np.ascontiguousarray(codes.reshape(-1, shape[2]).T)


def make_tokens(folder: Path, images: int, grid_size: int, classes: int, format_name: str = 'published') -> list[str]:
    """Write a synthetic set, its codebook and synonyms; returns main_seit.py's flags that name the files."""
    codes = functools.partial(make_codes, images, grid_size)
    tokens = token_file(folder, format_name)
    name = format_for(format_name, CODES)
    model = write_model(tokens, name, codes(), images)
    manifest = {'format': name, **model} if model else None  # published sets are as the paper's, without a manifest
    write_set(tokens, codes(), images, folder / 'set-label.txt', np.arange(images) % classes, manifest)
    rng = np.random.default_rng(0)
    codebook = rng.standard_normal((CODES, CODE_DIM), np.float32)
    save_torch(torch.from_numpy(codebook), folder / 'codebook.ckpt')
    synonyms = {str(code): rng.permutation(CODES)[:5].tolist() for code in range(CODES)}
    write_text(folder / 'synonyms.json', json.dumps(synonyms))
    return token_flags(folder, format_name)


def token_file(folder: Path, format_name: str = 'published') -> Path:
    """Path of the stream that `make_tokens` writes."""
    return folder / f'{format_name}-token.{stream_ending(format_name)}'


def token_flags(folder: Path, format_name: str = 'published') -> list[str]:
    """main_seit.py's flags for the files of `make_tokens`, for training and for evaluation alike."""
    flags = ['--codebook-path', folder / 'codebook.ckpt', '--token-synonym-dict', folder / 'synonyms.json']
    for split in ('train', 'val'):
        flags += [f'--{split}-token-file', token_file(folder, format_name), f'--{split}-label-file',
                  folder / 'set-label.txt']
    return [str(flag) for flag in flags]


def make_images(folder: Path, images: int, classes: int = 10, width: int = 500, height: int = 375) -> None:
    """Write JPEGs of ImageNet's typical size (about 90 KB) into class folders."""
    rng = np.random.default_rng(0)
    for i in range(images):
        # large smooth areas and a little noise, as photographs have; noise alone would make much larger files
        coarse = Image.fromarray(rng.integers(256, size=(24, 32, 3), dtype=np.uint8)).resize((width, height))
        pixels = np.asarray(coarse) + rng.normal(0, 12, (height, width, 1))
        path = folder / f'class-{i % classes}' / f'{i:05d}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


TOKENIZERS = 'base', 'small', 'patch'


def make_tokenizer(name: str, device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    """(tokenizer, codebook) on a device: ViT-VQGAN 'base' or 'small' with random weights, or 'patch'."""
    torch.manual_seed(0)
    if name == 'patch':
        basis = torch.linalg.qr(torch.randn(192, CODE_DIM - 1)).Q
        codebook = lift_rows(torch.randn(CODES, CODE_DIM - 1))
        tokenizer = PatchTokenizer(torch.full((192,), 0.5), basis, torch.ones(()), codebook)
    else:
        tokenizer = ViTVQGAN.from_name(name).eval()
        codebook = tokenizer.codebook
    return tokenizer.to(device), codebook.to(device)


def forward_flops(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Floating-point operations of one image's forward pass in evaluation, a multiply-add being two."""
    x = torch.zeros(1, *input_shape, device=next(model.parameters()).device)
    training = model.training
    # the plain kernel of attention: the counter does not see into the fused ones
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(x)
    model.train(training)
    return counter.get_total_flops()


# ---------------------------------------------------------------- processes

@functools.cache
def _ports() -> Iterator[int]:
    """All below those that the system hands out, so that nothing else takes one before it is used; in any order."""
    return iter(random.SystemRandom().sample(range(10_000, 32_768), 22_768))


def free_port() -> int:
    """A TCP port that is free on this machine now, and another at each call."""
    for port in _ports():
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(('127.0.0.1', port))
            return port
    raise RuntimeError('no TCP port from 10,000 to 32,767 is free')
