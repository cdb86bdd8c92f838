"""Benchmark: token formats on one set, by bytes and by the speed of encoding and decoding.

    python benchmarks/formats.py                                    a synthetic set
    python benchmarks/formats.py --token-file demo/fashion-train-token.data.bin
    python benchmarks/formats.py --token-file 'tokens/my-train-token-*.data.bin' --data-path IMAGES/train

* Bytes are of all files but the labels: stream, index or model, manifest. Shards are taken as one set. A compact stream
  holds its index. xz, zstd and brotli compress what gzip does in the published files: the stream of escaped bytes and
  the .npy of the index (of more than 510 codes, the 16-bit stream); the published manifest is counted with them.
* Speeds are from codes in memory to files, and back, on --threads cores, over the first images of the set. The model
  is fitted once a set; that time is stated on its own.
* zstd needs Python 3.14 or the package zstandard, brotli the package of that name; else they are named as missing.
"""
import argparse
import contextlib
import functools
import importlib
import io
import lzma
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from fileio.files import atomic_path, expand_files
from flags import integer
from image_data.sources import open_source
from token_files.cache import open_codes
from token_files.context_model import ContextModel, bits
from token_files.published import CHUNK_BYTES, Codec, codec_for, encode, parse_npy
from token_files.token_file import (FORMATS, MAX_CODES, count_codes, decode, entropy_bits, format_for, format_of,
                                    open_token_file, source_bytes_of, stream_ending, write_model, write_set)
from utils import InputError, run

RUN_CODES = 1 << 23  # codes handled at a time
SPEED_CODES = 1 << 24  # that speeds are measured on, at most
NAMES = 'published', 'xz -9', 'zstd -19', 'brotli -11', 'compact'
WITHOUT_SPEED = 'brotli -11'  # ten times as slow as the next one


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = common.make_parser('Measure bytes, and codes a second, of token formats on one set.', 3, clock=True,
                                threads='cores that encoding and decoding may use')
    parser.set_defaults(threads=1)
    add = parser.add_argument
    add('--token-file', metavar='FILE', help='a set, or a glob of its shards; default: make a synthetic set')
    add('--data-path', metavar='PATH', help='the images that it was made from, for their bytes; default: what its '
        'manifest says')
    add('--images', type=integer(1), default=50_000, help='images of the synthetic set')
    add('--grid', type=integer(2), default=16, help='codes on a side of the synthetic set')
    args = parser.parse_args(argv)
    if args.data_path and not args.token_file:
        raise InputError('--data-path: give the tokens of these images to --token-file')
    return args


# ---------------------------------------------------------------- formats

def runs_of(codes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield codes (N, n) in runs of images."""
    step = max(1, RUN_CODES // codes.shape[1])
    yield from (codes[first:first + step] for first in range(0, len(codes), step))


@dataclass(frozen=True)
class TokenSet:
    """The files that programs of this project read.

    Attributes:
        tokens: path of the stream.
        manifest: but for what depends on the files; {} for none.
    """
    tokens: Path
    manifest: dict[str, Any]

    def write(self, codes: np.ndarray) -> None:
        manifest = self.manifest and self.manifest | {'images': len(codes)}
        write_set(self.tokens, runs_of(codes), len(codes), manifest=manifest)

    def read(self, codes: np.ndarray) -> None:
        for first, run_ in decode(open_token_file(self.tokens)):
            codes[first:first + len(run_)] = run_

    def sizes(self) -> dict[str, int]:
        file = open_token_file(self.tokens)
        paths = *file.files, file.manifest_path
        return {name: path.stat().st_size if path.exists() else 0
                for name, path in zip(('stream', 'index or model', 'manifest'), paths)}


@dataclass(frozen=True)
class Compressed:
    """Stream and index by another compressor than gzip.

    Attributes:
        folder: for the two files.
        codec: of the published stream.
        published: whose manifest is counted.
        compress: bytes -> bytes.
        decompress: bytes -> bytes.
    """
    folder: Path
    codec: Codec
    published: TokenSet
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]

    def write(self, codes: np.ndarray) -> None:
        encoded = [encode(self.codec, run_) for run_ in runs_of(codes)]
        lengths = np.concatenate([np.diff(index) for _, index in encoded])
        npy = io.BytesIO()
        np.save(npy, np.concatenate([[0], np.cumsum(lengths)]))
        stream = b''.join(stream.tobytes() for stream, _ in encoded)
        for name, data in (('stream', stream), ('index', npy.getvalue())):
            with atomic_path(self.folder / name) as temporary:
                Path(temporary).write_bytes(self.compress(data))

    def read(self, codes: np.ndarray) -> None:
        index = parse_npy(self.decompress((self.folder / 'index').read_bytes()))
        stream = np.frombuffer(self.decompress((self.folder / 'stream').read_bytes()), np.uint8)
        step = max(1, CHUNK_BYTES // codes.shape[1])
        for first in range(0, len(codes), step):
            offsets = index[first:first + step + 1]
            part, _ = self.codec.decode(stream[offsets[0]:offsets[-1]], offsets - offsets[0])
            codes[first:first + step] = part.reshape(-1, codes.shape[1])

    def sizes(self) -> dict[str, int]:
        return {'stream': (self.folder / 'stream').stat().st_size,
                'index or model': (self.folder / 'index').stat().st_size,
                'manifest': self.published.sizes()['manifest']}


def find_compressors() -> dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    """What compresses and decompresses bytes, by name; those whose packages are not installed are left out."""
    compressors = {'xz -9': (functools.partial(lzma.compress, preset=9), lzma.decompress)}
    if zstd := import_first('compression.zstd', 'zstandard'):
        compressors['zstd -19'] = functools.partial(zstd.compress, level=19), zstd.decompress
    if brotli := import_first('brotli'):
        compressors['brotli -11'] = functools.partial(brotli.compress, quality=11, lgwin=24), brotli.decompress
    return compressors


def import_first(*names: str) -> ModuleType | None:
    """The first of some modules that is installed."""
    for name in names:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


def make_formats(folder: Path, stem: str, manifest: dict[str, Any], codes: np.ndarray,
                 codebook_size: int) -> dict[str, TokenSet | Compressed]:
    """The formats that can be had, by name, each with a folder of its own. A model is fitted and written here.

    Args:
        folder: each format gets one below it.
        stem: first part of the files' names.
        manifest: of the set, {} for none.
        codes: (N, n), that will be written.
        codebook_size: rows of their codebook.
    """
    manifest = {key: value for key, value in manifest.items() if key not in ('format', 'model')}
    if 'files' in manifest:  # labels stay
        manifest['files'] = {name: entry for name, entry in manifest['files'].items() if name.endswith('.txt')}
    formats = {}
    for name in FORMATS:
        tokens = folder / name / f'{stem}.{stream_ending(name)}'
        format_name = format_for(name, codebook_size)
        entries = manifest | write_model(tokens, format_name, runs_of(codes), len(codes))
        if entries or format_name != format_of({}):  # else the paper's files, which need no manifest
            entries['format'] = format_name
        formats[name] = TokenSet(tokens, entries)
    codec = codec_for(codebook_size)
    others = {name: Compressed(folder / name, codec, formats['published'], *functions)
              for name, functions in find_compressors().items()}
    return formats | others


# ---------------------------------------------------------------- measuring

def load_codes(args: argparse.Namespace, folder: Path) -> tuple[np.ndarray, str, dict[str, Any], int | None]:
    """What is measured: codes (N, n) uint16, first part of their files' names, manifest, bytes of their images."""
    if args.token_file is None:
        return np.concatenate(list(common.make_codes(args.images, args.grid))), 'set-token', {}, None
    files = [open_token_file(path) for path in expand_files(args.token_file)]
    source = open_source(args.data_path) if args.data_path else None
    codes = open_codes(files, str(folder))
    if source and len(source) != len(codes):
        raise InputError(f'{args.data_path}: has {len(source)} images, but {args.token_file} {len(codes)}: give the '
                         'images that the tokens were made from')
    source_bytes = source.encoded_bytes() if source else source_bytes_of(files)
    return codes, files[0].stream.name.partition('.data.bin')[0], files[0].manifest, source_bytes


def describe_model(model: ContextModel, codes: np.ndarray) -> dict[str, Any]:
    """What there is to say of the model of codes (N, n): its groups, and bits a code by it."""
    grid = math.isqrt(codes.shape[1])
    symbol_of = model.symbol_of()
    total = sum(bits(model, symbol_of[part].reshape(-1, grid, grid)) for part in runs_of(codes))
    return {'groups': [len(table) for table in model.tables], 'model_bits': round(total / codes.size, 4)}


def measure_sizes(formats: dict[str, TokenSet | Compressed], codes: np.ndarray) -> dict[str, Any]:
    """Bytes an image of each file of each format, and bits a code of all together."""
    size = {}
    for name, format_ in formats.items():
        print(f'writing {len(codes):,} images: {name}', flush=True)
        format_.write(codes)
        file_sizes = format_.sizes()
        size[name] = {key: round(value / len(codes), 3) for key, value in file_sizes.items()}
        size[name]['total'] = round(sum(file_sizes.values()) / len(codes), 3)
    bits_a_code = {name: round(8 * value['total'] / codes.shape[1], 4) for name, value in size.items()}
    return {'bytes_an_image': size, 'bits_a_code': bits_a_code}


def measure_speeds(args: argparse.Namespace, formats: dict[str, TokenSet | Compressed], codes: np.ndarray,
                   device: torch.device) -> dict[str, Any]:
    """Codes a second of encoding and decoding in turn. Raises RuntimeError for codes that are not as they were."""
    decoded = {name: np.zeros(codes.shape, np.uint16) for name in formats}
    with common.on_cores(args.threads):
        encoding = {name: functools.partial(format_.write, codes) for name, format_ in formats.items()}
        encoding = common.take_turns(encoding, args.repeats, device, args.clock)
        decoding = {name: functools.partial(format_.read, decoded[name]) for name, format_ in formats.items()}
        decoding = common.take_turns(decoding, args.repeats, device, args.clock)
    for name, others in decoded.items():
        if not np.array_equal(others, codes):
            raise RuntimeError(f'{name}: the codes are not those that were encoded')
    return {'speed_images': len(codes),
            'encode_codes_per_second': {name: common.spread(codes.size / took) for name, took in encoding.items()},
            'decode_codes_per_second': {name: common.spread(codes.size / took) for name, took in decoding.items()}}


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """The numbers of the JSON line; files are made in `folder`."""
    codes, stem, manifest, source_bytes = load_codes(args, folder)
    counts = count_codes(codes, MAX_CODES)
    result = {'images': len(codes), 'grid': math.isqrt(codes.shape[1]), 'codes_used': int((counts > 0).sum()),
              'entropy_bits': round(entropy_bits(counts), 4)}
    if source_bytes is not None:
        result['source_bytes_an_image'] = round(source_bytes / len(codes), 1)
    began = common.CLOCKS[args.clock]()
    formats = make_formats(folder, stem, manifest, codes, int(counts.nonzero()[0][-1]) + 1)
    fit_seconds = common.CLOCKS[args.clock]() - began
    sizes = measure_sizes(formats, codes)
    model = open_token_file(formats['compact'].tokens).content.model
    result |= describe_model(model, codes) | {'fit_seconds': round(fit_seconds, 2)} | sizes
    result['not_installed'] = [name for name in NAMES if name not in formats]
    # copied into memory: the codes are a map, and the first round would read the disk
    some = np.array(codes[:max(1, SPEED_CODES // codes.shape[1])])
    return result | measure_speeds(args, {name: format_ for name, format_ in formats.items() if name != WITHOUT_SPEED},
                                   some, device)


# ---------------------------------------------------------------- the table

def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, a format a line."""
    def millions(speeds: dict[str, float] | None) -> str:
        return '{median:.2f} ({min:.2f} to {max:.2f})'.format(
            **{key: value / 1e6 for key, value in speeds.items()}) if speeds else ''

    lines = [('', 'bytes an image', 'stream', 'index or model', 'manifest', 'bits a code', 'encode, M codes/s',
              'decode, M codes/s'), ('---', *['---:'] * 7)]
    if 'source_bytes_an_image' in result:
        lines.append(('image files', f'{result["source_bytes_an_image"]:,.1f}', *[''] * 6))
    for name in NAMES:
        size = result['bytes_an_image'].get(name)
        if size:
            lines.append((name, *(f'{size[key]:,.2f}' for key in ('total', 'stream', 'index or model', 'manifest')),
                          f'{result["bits_a_code"][name]:.3f}', millions(result['encode_codes_per_second'].get(name)),
                          millions(result['decode_codes_per_second'].get(name))))
        else:
            lines.append((name, 'not installed', *[''] * 6))
    left, upper = result['groups']
    n = result['grid'] ** 2
    for name, value in (('entropy of single codes', result['entropy_bits']),
                        (f'context model alone, {left} left and {upper} upper groups', result['model_bits'])):
        lines.append((name, f'{value * n / 8:,.2f}', '', '', '', f'{value:.3f}', '', ''))
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


# ---------------------------------------------------------------- the program

def main(args: argparse.Namespace) -> None:
    device = common.set_up('cpu', args.threads)
    with tempfile.TemporaryDirectory(prefix='seit-benchmark-') as folder:
        result = measure(args, device, Path(folder))
    print(table(result))
    common.print_result('formats', result, vars(args), device)


if __name__ == '__main__':
    run(main, parse_args)
