"""Measure how fast this project is on this machine.

    python scripts/benchmark.py data --device cpu --threads 1
    python scripts/benchmark.py train --model deit_base_token_32 --batch-size 512 --amp bf16 --compile
    python scripts/benchmark.py start --ranks 1 4
    python scripts/benchmark.py tokenize --amp off bf16 --compile
    python scripts/benchmark.py eval --model deit_base_token_32 --amp bf16

Each ends in one JSON line on standard output. A measured number there is {"median", "min", "max"} over --repeats rounds
after a warm-up; variants that are compared take turns, so that a drift of the machine hits all alike. Data are random,
of ImageNet's sizes by default, in a temporary folder. `train` and `eval` take the flags of main_seit.py too.
docs/performance.md holds results.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.utils import ModelEmaV3
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import evaluate_on_images  # noqa: E402
import main_seit  # noqa: E402
import tokenize_images  # noqa: E402
from engine import AMP_DTYPE, default_amp, evaluate, make_scaler, train_one_epoch  # noqa: E402
from image_sources import open_source  # noqa: E402
from image_tokenizer import PatchTokenizer  # noqa: E402
from models_seit import create_model  # noqa: E402
from samplers import in_order, shuffled  # noqa: E402
from token_augment import EvalTransform, draw_random_resized_crop  # noqa: E402
from token_dataset import cache_path, index_path, load_codebook, write_tokens  # noqa: E402
from utils import (InputError, free_port, init_distributed, keep_freed_memory, parse_flags, run,  # noqa: E402
                   save_torch, write_text)
from vitvqgan import ViTVQGAN  # noqa: E402

CODES, WIDTH = 391, 32  # the published codebook
CHUNK = 10_000  # images of random codes made at a time


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest='command', required=True, metavar='data|train|start|tokenize|eval')

    def command(name, about, repeats):
        sub = commands.add_parser(name, help=about, description=about, allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument('--repeats', type=int, default=repeats)
        sub.add_argument('--threads', type=int, default=torch.get_num_threads(), help="torch's, on the CPU")
        if name in ('data', 'train'):
            sub.add_argument('--clock', default='wall', choices=['wall', 'cpu'], help='cpu: count CPU seconds of the '
                             'process; with --threads 1, what a CPU shared with other jobs would do alone')
        return sub.add_argument

    add = command('data', 'token file to model input, beside a plain one-hot implementation', 7)
    add('--device', default='cuda')
    add('--batch-size', type=int, default=128)
    add('--batches', type=int, default=8, help='batches a round')
    add('--one-hot-images', type=int, default=32, help='images a round of the one-hot implementation')
    add('--grid', type=int, default=32, help='codes on a side; 7/8 of them are the model\'s input')
    add('--data-device', default='auto', choices=['auto', 'cpu', 'cuda'], help='as in main_seit.py')
    add('--compile', action='store_true', help='torch.compile the crop')

    add = command('train', 'training steps, with the real data path and with a constant batch; takes the flags of '
                  'main_seit.py', 5)
    add('--steps', type=int, default=50, help='steps a round')
    add('--grid', type=int, default=32, help='codes on a side')

    add = command('start', 'process start to first batch, and memory, of 1 to many ranks', 3)
    add('--images', type=int, default=1_281_167)
    add('--grid', type=int, default=32, help='codes on a side')
    add('--ranks', type=int, nargs='+', default=[1, 4])
    add('--folder', metavar='DIR', help='keep the synthetic set here, and use one that is here already')

    add = command('tokenize', 'images to codes, with and without decoding the images', 5)
    add('--device', default='cuda')
    add('--tokenizer', default='base', choices=['base', 'small', 'patch'], help='ViT-VQGAN of that size, or patches')
    add('--amp', nargs='+', default=['off', 'bf16'], choices=['off', 'bf16'])
    add('--compile', action='store_true', help='measure each with torch.compile too')
    add('--image-size', type=int, default=256)
    add('--batch-size', type=int, default=64)
    add('--images', type=int, default=1024)
    add('--num-workers', type=int, help='processes that decode images; default: the cores')

    add = command('eval', 'evaluation on tokens and on images; takes the flags of main_seit.py', 5)
    add('--tokenizer', default='base', choices=['base', 'small', 'patch'], help='ViT-VQGAN of that size, or patches')
    add('--grid', type=int, default=32, help='codes on a side; images have 8 times as many pixels')
    add('--images', type=int, default=1024)
    add('--image-workers', type=int, default=len(os.sched_getaffinity(0)), help='processes that decode images')
    return parser


# ---------------------------------------------------------------- measuring

def take_turns(works, repeats, device, clock='wall'):
    """{name: seconds of each round, (repeats,)} of functions without arguments, after a warm-up of each."""
    now = {'wall': time.perf_counter, 'cpu': time.process_time}[clock]
    seconds = {name: [] for name in works}
    for round_ in range(-1, repeats):
        for name, work in works.items():
            began = now()
            work()
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            if round_ >= 0:
                seconds[name].append(now() - began)
    return {name: np.array(values) for name, values in seconds.items()}


def spread(values, digits=4):
    """Median, least and largest of some numbers, to so many significant digits."""
    values = np.asarray(values, float)
    found = {'median': np.median(values), 'min': values.min(), 'max': values.max()}
    return {name: float(f'{value:.{digits}g}') for name, value in found.items()}


def matmul_peak(device, amp, repeats, clock):
    """The device's measured peak in FLOP/s: the best of large square matrix products in the precision of `amp`."""
    best = 0.
    for n in (4096, 8192, 16384) if device.type == 'cuda' else (1024, 2048):
        a, b = (torch.randn(n, n, device=device, dtype=AMP_DTYPE.get(amp)) for _ in range(2))
        seconds = take_turns({'matmul': lambda: torch.mm(a, b)}, max(repeats, 10), device, clock)['matmul']
        best = max(best, 2 * n ** 3 / seconds.min())
    return best


def forward_flops(model, size):
    """Floating-point operations of one image's forward pass, a multiply-add being two."""
    x = torch.zeros(1, model.in_chans, size, size, device=next(model.parameters()).device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def hardware(device):
    """What the numbers were measured on and with."""
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return {'cpu': names[0] if names else 'unknown', 'cores': len(os.sched_getaffinity(0)),
            'threads': torch.get_num_threads(),
            'gpu': torch.cuda.get_device_name(device) if device.type == 'cuda' else None,
            'cuda': torch.version.cuda if device.type == 'cuda' else None,
            **main_seit.VERSIONS, 'numpy': np.__version__}


# ---------------------------------------------------------------- synthetic data

def make_tokens(folder, images, grid, classes):
    """Write a set of random codes, its codebook and synonyms; returns main_seit.py's flags that name the files."""
    g = np.random.default_rng(0)
    tokens, labels = folder / 'set-token.data.bin.gz', folder / 'set-label.txt'
    runs = (g.integers(CODES, size=(min(CHUNK, images - first), grid ** 2), dtype=np.uint16)
            for first in range(0, images, CHUNK))
    write_tokens(tokens, labels, runs, np.arange(images) % classes)
    save_torch(torch.from_numpy(g.standard_normal((CODES, WIDTH), np.float32)), folder / 'codebook.ckpt')
    synonyms = {str(code): g.permutation(CODES)[:5].tolist() for code in range(CODES)}
    write_text(folder / 'synonyms.json', json.dumps(synonyms))
    return token_flags(folder)


def token_flags(folder):
    """main_seit.py's flags for the files of `make_tokens`, for training and for evaluation alike."""
    flags = ['--codebook-path', folder / 'codebook.ckpt', '--token-synonym-dict', folder / 'synonyms.json']
    for split in ('train', 'val'):
        flags += [f'--{split}-token-file', folder / 'set-token.data.bin.gz',
                  f'--{split}-label-file', folder / 'set-label.txt']
    return list(map(str, flags))


def make_images(folder, count, width=500, height=375):
    """Write JPEGs of ImageNet's typical size (about 90 KB) into ten class folders."""
    g = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(g.integers(256, size=(24, 32, 3), dtype=np.uint8)).resize((width, height))
        pixels = np.asarray(coarse) + g.normal(0, 12, (height, width, 1))
        path = folder / f'class-{i % 10}' / f'{i:05d}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def make_tokenizer(name):
    """(tokenizer, codebook): ViT-VQGAN 'base' or 'small' with random weights, or 'patch'."""
    torch.manual_seed(0)
    if name != 'patch':
        tokenizer = ViTVQGAN.from_name(name).eval()
        return tokenizer, tokenizer.codebook
    basis = torch.linalg.qr(torch.randn(192, WIDTH)).Q
    return PatchTokenizer(torch.full((192,), 0.5), basis, torch.ones(())), torch.randn(CODES, WIDTH)


# ---------------------------------------------------------------- data

class OneHot:
    """The augmentations as one would first write them: image by image, on one-hot grids.

    Args: augment: the token_augment.TrainAugment to imitate. Called with codes (B, g, g) it gives the same
    distribution of model inputs (B, d, s, s), with other random numbers.
    """

    def __init__(self, augment):
        self.a, self.g = augment, np.random.default_rng(0)

    def synonyms(self, codes):
        table, count = (t.cpu().numpy() for t in self.a.synonyms)
        pick = self.g.integers(count[codes])
        return np.where(self.g.random(codes.shape) < self.a.replace_prob, table[codes, pick], codes)

    def swap(self, codes):
        grid = len(codes)
        side = int(grid * self.g.uniform(0, self.a.swap_scale))
        while True:
            (y0, x0), (y1, x1) = self.g.integers(grid - side, size=(2, 2))
            if np.hypot(y1 - y0, x1 - x0) > side:
                break
        out = codes.copy()
        out[y0:y0 + side, x0:x0 + side] = codes[y1:y1 + side, x1:x1 + side]
        out[y1:y1 + side, x1:x1 + side] = codes[y0:y0 + side, x0:x0 + side]
        return out

    def crop(self, codes, box):
        """One-hot grid, crop, bicubic resampling, codebook: codes (g, g) -> (d, s, s)."""
        top, left, height, width = box
        codebook = self.a.embedding[:-1].cpu()
        grid = F.one_hot(torch.from_numpy(codes).long(), len(codebook)).permute(2, 0, 1).float()  # (K, g, g)
        crop = grid[None, :, top:top + height, left:left + width]
        crop = F.interpolate(crop, (self.a.size, self.a.size), mode='bicubic', align_corners=False)[0]
        return (crop.permute(1, 2, 0) @ codebook).permute(2, 0, 1)

    def __call__(self, codes):
        out = []
        for image in codes.numpy():
            choice = self.g.random()
            if choice < self.a.rc_prob:
                image = self.synonyms(image)
            elif choice < self.a.rc_prob + self.a.sc_prob:
                image = self.swap(image)
            box = draw_random_resized_crop(1, len(image), self.a.rrc_ratio, torch.default_generator)[0].tolist()
            out.append(self.crop(image, box))
        x = torch.stack(out)
        fraction, channel_std, element_std = self.a.noise
        for i in torch.randperm(len(x))[:int(len(x) * fraction)]:
            x[i] += torch.randn_like(x[i]) * element_std + torch.randn(len(x[i]), 1, 1) * channel_std
        return x


def crop_difference(augment, one_hot, codes):
    """Largest difference of the two crops over codes (B, g, g), given the same boxes. Raises where they are not one."""
    boxes = draw_random_resized_crop(len(codes), augment.grid, augment.rrc_ratio, torch.Generator().manual_seed(0))
    device = augment.embedding.device
    fast = augment.crop(codes.long().to(device), boxes.to(device)).cpu()
    slow = torch.stack([one_hot.crop(image, box) for image, box in zip(codes.numpy(), boxes.tolist())])
    difference = float((fast - slow).abs().max())
    if difference > 1e-4:
        raise RuntimeError(f'the crops differ by {difference}: the two implementations are not of one function')
    return difference


def bench_data(args, device, folder):
    images, size = args.batch_size * args.batches, args.grid * 7 // 8
    real = main_seit.parse_args([*make_tokens(folder, images, args.grid, 1000), '--data-device', args.data_device])
    codebook = load_codebook(real.codebook_path)
    data = main_seit.load_split(real, 'train', codebook)
    main_seit.place_data(real, {'train': data}, device)
    augment = main_seit.make_augment(real, codebook, args.grid, size, device)
    one_hot = OneHot(augment)
    difference = crop_difference(augment, one_hot, data.batch(range(min(16, images)))[0])
    if args.compile:
        augment.crop = torch.compile(augment.crop)
    order, generator = shuffled(images, 1, 0, 0, 0), torch.Generator(device)

    def ours():
        for codes, _ in data.batches(order, args.batch_size, device, True):
            augment(codes, generator)

    def plain():
        one_hot(data.batch(order[:args.one_hot_images])[0])

    seconds = take_turns({'ours': ours, 'plain': plain}, args.repeats, device, args.clock)
    ours, plain = images / seconds['ours'], args.one_hot_images / seconds['plain']
    return {'images_per_second': spread(ours), 'one_hot_images_per_second': spread(plain),
            'ratio': spread(ours / plain), 'ms_an_image': spread(1e3 / ours),
            'one_hot_ms_an_image': spread(1e3 / plain),
            'crop_difference': difference, 'tokens_on_gpu': data.resident is not None}


# ---------------------------------------------------------------- train

def set_up_training(real, grid, device):
    """Everything main_seit.py makes before its loop, as a namespace; `real` are its arguments."""
    codebook = load_codebook(real.codebook_path)
    data = main_seit.load_split(real, 'train', codebook)
    size = real.input_size // real.token_patch_size
    torch.manual_seed(0)
    model = create_model(real, real.nb_classes, size, WIDTH, drop_path_rate=real.drop_path).to(device)
    flops = forward_flops(model, size)
    model.set_grad_checkpointing(real.grad_checkpointing)
    main_seit.place_data(real, {'train': data}, device)
    augment = main_seit.make_augment(real, codebook, grid, size, device)
    mixup, criterion = main_seit.make_loss(real, real.nb_classes)
    run_ = SimpleNamespace(data=data, model=model, augment=augment, mixup=mixup, criterion=criterion, flops=flops,
                           ema=ModelEmaV3(model, decay=real.model_ema_decay) if real.model_ema else None,
                           optimizer=main_seit.make_optimizer(real, model), scaler=make_scaler(device, real.amp))
    if real.compile:
        run_.model, augment.crop = torch.compile(model), torch.compile(augment.crop)
    return run_


def main_flags(words, **more):
    """main_seit.py's arguments for the words a sub-command did not know itself, and what main() derives from them."""
    real = main_seit.parse_args([*words, *(word for flag, value in more.items() for word in (f'--{flag}', value))])
    real.nb_classes = real.nb_classes or 1000
    real.amp = real.amp or default_amp(real.device.partition(':')[0])
    if real.tf32:
        torch.set_float32_matmul_precision('high')
    return real


def bench_train(args, device, folder):
    real, steps = args.real, args.steps
    images = steps * real.batch_size
    flags = main_seit.parse_args(make_tokens(folder, images, args.grid, real.nb_classes))
    vars(real).update({key: value for key, value in vars(flags).items() if key.endswith(('_file', '_path', '_dict'))})
    r = set_up_training(real, args.grid, device)
    order, generator = shuffled(images, 1, 0, 0, 0), torch.Generator(device)

    def epoch(batches, augment):
        train_one_epoch(r.model, r.ema, r.optimizer, r.scaler, r.criterion, batches, steps, augment, r.mixup,
                        generator, 0, real, device)

    def with_data():
        epoch(r.data.batches(order, real.batch_size, device, real.pin_mem), r.augment)

    batch = next(r.data.batches(order, real.batch_size, device))
    x = r.augment(batch[0], generator.manual_seed(0))

    def constant():
        epoch(([batch] * steps), lambda codes, generator: x)

    seconds = take_turns({'data': with_data, 'constant': constant}, args.repeats, device, args.clock)
    peak = matmul_peak(device, real.amp, args.repeats, args.clock)
    rate = images / seconds['data']
    memory = (torch.cuda.max_memory_allocated(device) if device.type == 'cuda'
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {'images_per_second': spread(rate), 'constant_images_per_second': spread(images / seconds['constant']),
            'data_to_constant': spread(seconds['constant'] / seconds['data']),
            'ms_a_step': spread(1e3 * seconds['data'] / steps), 'forward_gflop_an_image': r.flops / 1e9,
            'matmul_peak_tflops': peak / 1e12, 'flops_utilisation': spread(3 * r.flops * rate / peak),
            'peak_memory_mb': round(memory / 1e6)}


# ---------------------------------------------------------------- start

def start(folder, ranks):
    """Start `ranks` processes of start_probe.py, as a launcher would; returns what each measured."""
    common = {**os.environ, 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': ranks, 'MASTER_ADDR': '127.0.0.1',
              'MASTER_PORT': free_port()}
    command = [sys.executable, str(Path(__file__).with_name('start_probe.py')), str(time.time()), *token_flags(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={
        **{key: str(value) for key, value in common.items()}, 'RANK': str(r), 'LOCAL_RANK': str(r)})
        for r in range(ranks)]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise InputError('start_probe.py failed, see above')
    return json.loads(said[0].splitlines()[-1])


def bench_start(args, device, folder):
    folder = Path(args.folder) if args.folder else folder
    tokens = folder / 'set-token.data.bin.gz'
    if not tokens.exists():
        print(f'writing {args.images:,} images of random codes into {folder}', flush=True)
        make_tokens(folder, args.images, args.grid, 1000)
    result = {'stream_mb': round(tokens.stat().st_size / 1e6),
              'index_mb': round(index_path(tokens).stat().st_size / 1e6)}
    for ranks in args.ranks:
        for state in ('cold', 'warm'):
            runs = []
            for _ in range(args.repeats):
                if state == 'cold':
                    cache_path([tokens]).unlink(missing_ok=True)
                runs.append(start(folder, ranks))
                print(f'{ranks} ranks, {state}: {max(own["seconds"] for own in runs[-1]):.1f} s', flush=True)
            result[f'{state}_{ranks}'] = {
                # of the slowest or largest rank; map_share of all ranks together
                key: spread([(sum if key == 'map_share' else max)(own[key] for own in every) for every in runs])
                for key in runs[0][0]}
    return result


# ---------------------------------------------------------------- tokenize

def bench_tokenize(args, device, folder):
    torch.backends.cudnn.allow_tf32 = False  # as tokenize_images.py
    make_images(folder / 'images', args.images)
    source = open_source(str(folder / 'images'))
    tokenizer, codebook = (value.to(device) for value in make_tokenizer(args.tokenizer))
    options = SimpleNamespace(data_path=str(folder / 'images'), image_size=args.image_size,
                              batch_size=args.batch_size, num_workers=args.num_workers, skip_bad_images=False)
    parts = tokenize_images.Parts(folder / 'parts', args.images, args.batch_size)
    parts.folder.mkdir()
    pixels = torch.randint(256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8).to(device)
    alone, whole = {}, {}
    for amp in args.amp:
        for compiled in (False, True)[:1 + args.compile]:
            name = {'off': 'fp32'}.get(amp, amp) + ' compiled' * compiled
            encoder = tokenize_images.Encoder(torch.compile(tokenizer) if compiled else tokenizer, codebook, device,
                                              amp, args.tokenizer)
            alone[name] = lambda encoder=encoder: encoder(pixels)
            whole[name] = lambda encoder=encoder: tokenize_images.tokenize(
                options, source, encoder, parts, range(len(parts)), args.images)
    seconds = take_turns(alone, args.repeats, device)
    result = {'tokenizer_images_per_second': {k: spread(args.batch_size / v) for k, v in seconds.items()}}
    seconds = take_turns(whole, args.repeats, device)
    return result | {'with_decoding_images_per_second': {k: spread(args.images / v) for k, v in seconds.items()}}


# ---------------------------------------------------------------- eval

def bench_eval(args, device, folder):
    real, size = args.real, args.real.input_size // args.real.token_patch_size
    flags = main_seit.parse_args(make_tokens(folder, args.images, args.grid, min(10, real.nb_classes)))
    codebook = load_codebook(flags.codebook_path)
    data = main_seit.load_split(flags, 'val', codebook)
    main_seit.place_data(real, {'val': data}, device)
    model = create_model(real, real.nb_classes, size, WIDTH).to(device)
    make_images(folder / 'images', args.images)
    images = open_source(str(folder / 'images'))
    tokenizer, rows = make_tokenizer(args.tokenizer)
    options = parse_flags(evaluate_on_images.get_args_parser(), [
        '--data-path', str(folder / 'images'), '--tokenizer-input-size', str(args.grid * 8),
        '--batch-size', str(real.batch_size), '--num-workers', str(args.image_workers)])
    batch_size, order = int(1.5 * real.batch_size), in_order(args.images, 1, 0)

    def on_tokens():
        evaluate(model, data.batches(order, batch_size, device, True), EvalTransform(codebook, size, device), device,
                 real.amp)

    def on_images():
        batches = evaluate_on_images.ImageCodes(images, tokenizer, rows, device, options)
        evaluate(model, batches, EvalTransform(rows, size, device), device, real.amp)

    seconds = take_turns({'tokens': on_tokens, 'images': on_images}, args.repeats, device)
    return {f'{name}_images_per_second': spread(args.images / values) for name, values in seconds.items()}


# ---------------------------------------------------------------- the program

def parse_args(words=None):
    """Our arguments; for train and eval, those of main_seit.py in `real`. Raises InputError."""
    args, others = get_args_parser().parse_known_args(words)
    if args.command in ('train', 'eval'):
        args.real = main_flags(others)
        args.device = args.real.device
    elif others:
        raise InputError(f'{args.command}: no flag is called {others[0]}; see --help')
    for name, value in vars(args).items():
        numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
        if numbers and min(numbers) < (not name.endswith('workers')):  # no worker at all is fine
            raise InputError(f'--{name.replace("_", "-")} {min(numbers)}: must be 1 or more')
    return args


def main(args):
    torch.set_num_threads(args.threads)
    device = init_distributed(getattr(args, 'device', 'cpu'))
    if device.type == 'cpu':
        keep_freed_memory()  # as main_seit.py
    measure = {'data': bench_data, 'train': bench_train, 'start': bench_start, 'tokenize': bench_tokenize,
               'eval': bench_eval}[args.command]
    with tempfile.TemporaryDirectory(prefix='seit-benchmark-') as folder:
        result = measure(args, device, Path(folder))
    asked = {key: value for key, value in vars(args).items() if key not in ('command', 'real', 'folder')}
    if 'real' in args:
        asked |= {key: getattr(args.real, key) for key in ('model', 'model_kwargs', 'batch_size', 'input_size', 'amp',
                                                           'compile', 'nb_classes', 'data_device')}
    for key, value in result.items():
        print(f'{key}: {value}')
    print(json.dumps({'benchmark': args.command, **result, 'asked': asked, 'hardware': hardware(device)}), flush=True)


if __name__ == '__main__':
    run(lambda: main(parse_args()))
