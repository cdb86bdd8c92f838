"""Token files: an image set stored as a grid of VQ codes an image.

The published format (SeiT, arXiv 2303.11114, sec. 3):

    NAME.data.bin.gz    gzip of a byte stream: code c < 255 is byte c; c >= 255 is byte 255, then byte c - 255.
                        The largest code is therefore 509. Nothing separates the images.
    NAME.index.npy.gz   gzip of a .npy with N + 1 integer offsets into the decompressed stream.
    labels              text, one integer class a line.
    codebook.ckpt       torch.save of a (K, d) float tensor.
    synonyms.json       {"code": [other codes, best first], ...}

What is ours is said in a card beside the stream, NAME.json, as scripts/tokenize_images.py writes it; a set without one
is a published one. "format": "uint16-le" there means that the stream holds little-endian 16-bit codes, two bytes each,
for codebooks of more than 510 rows. A set may also come as shards, each a whole set: wherever a token or label file is
asked for, a glob or a comma-separated list will do.

The stream is decoded once a node into a memory-mapped uint16 array that all ranks share; a batch is then one
`codes[indices]`. ImageNet-1k is 1.28 M x 1024 codes: 2.6 GB on disk, and in memory only what the page cache keeps.
"""
import contextlib
import functools
import gzip
import hashlib
import io
import math
import os
import re
import reprlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from utils import (SMALL, InputError, atomic_path, expand_files, load_torch, one_first, read_bytes, read_json, say,
                   sha256, write_text)

ESCAPE = 255
MAX_CODE = ESCAPE + ESCAPE - 1
BYTES, UINT16 = FORMATS = 'escaped-bytes', 'uint16-le'
CHUNK_BYTES = 1 << 24  # of stream decoded at a time: bounds memory, long enough for numpy to be fast
# What a file may claim. Damaged or hostile ones would have us allocate anything.
MAX_IMAGES = 1 << 27  # of one file, 100 times ImageNet-1k; larger sets come as shards
MAX_IMAGE_BYTES = 2 * 1024 ** 2  # two a code, of a grid of 1024 x 1024
MAX_INDEX_RATIO = 64  # bytes of an index to one of its gzip; a regular one has 8
MAX_GZIP_RATIO = 1032  # bytes of anything to one of its gzip: what deflate can do
MAX_LABEL_BYTES = 1 << 28  # of one label file


# ---------------------------------------------------------------- the byte stream

def decode_stream(stream):
    """Codes of a whole number of images' bytes.

    Args: stream (n,) uint8.
    Returns (codes, is_code): codes (m,) uint16 in [0, 509]; is_code (n,) bool, False at escape bytes.
    Raises ValueError when an escape byte has no code byte after it.
    """
    is_escape = stream == ESCAPE
    follows = np.empty_like(is_escape)
    follows[:1], follows[1:] = False, is_escape[:-1]
    if (is_escape & follows).any() or is_escape[-1:].any():
        raise ValueError('dangling escape byte')
    codes = stream.astype(np.uint16) + follows * np.uint16(ESCAPE)
    is_code = ~is_escape
    return codes[np.flatnonzero(is_code)], is_code  # sums and places: four times as fast as two masks


def encode_codes(codes):
    """The byte stream of codes and where each image starts in it.

    Args: codes (N, n) integers in [0, 509], one row an image.
    Returns (stream, index): stream (bytes,) uint8; index (N + 1,) int64.
    Raises ValueError for a code that the format cannot hold.
    """
    codes = np.asarray(codes)
    if codes.size and not 0 <= codes.min() <= codes.max() <= MAX_CODE:
        raise ValueError(f'codes run from {codes.min()} to {codes.max()}; the format holds 0 to {MAX_CODE}')
    escaped = codes >= ESCAPE
    index = np.concatenate([[0], np.cumsum(codes.shape[1] + escaped.sum(1))]).astype(np.int64)
    flat, escaped = codes.ravel(), escaped.ravel()
    at = np.arange(flat.size) + np.cumsum(escaped)  # place of each code's own byte
    stream = np.full(index[-1], ESCAPE, np.uint8)
    stream[at] = flat - ESCAPE * escaped
    return stream, index


def encode_uint16(codes):
    """As `encode_codes`, in the 16-bit format: codes (N, n) integers in [0, 65535]."""
    codes = np.asarray(codes)
    if codes.size and not 0 <= codes.min() <= codes.max() <= 0xffff:
        raise ValueError(f'codes run from {codes.min()} to {codes.max()}; the format holds 0 to {0xffff}')
    index = np.arange(len(codes) + 1, dtype=np.int64) * 2 * codes.shape[1]
    return codes.astype('<u2').view(np.uint8).ravel(), index


def format_for(codebook_size):
    """The format for codes of a codebook: the published one where it can hold them."""
    return BYTES if codebook_size <= MAX_CODE + 1 else UINT16


def index_path(token_file):
    """Path of the index that belongs to a token file. Raises InputError for a name without 'data.bin'."""
    path = Path(token_file)
    if 'data.bin' not in path.name:
        raise InputError(f'{path}: a token file is named NAME.data.bin.gz (its index is found by that name)')
    return path.with_name(path.name.replace('data.bin', 'index.npy'))


def card_path(token_file):
    """Path of the JSON card that may lie beside a token file."""
    index_path(token_file)  # for its complaint
    path = Path(token_file)
    return path.with_name(re.sub(r'data\.bin(\.gz)?', 'json', path.name))


def gzip_bytes(data):
    """gzip without name or time, so that equal content gives equal files."""
    return gzip.compress(data, compresslevel=9, mtime=0)


def write_tokens(token_file, label_file, codes, labels, format=BYTES):
    """Write the three files of a set, each atomically.

    Args: codes: (N, n) integers, or an iterable of such runs of images, for what does not fit in memory;
        labels (N,) integers; format: of FORMATS. UINT16 is read back only with a card that says so.
    Raises ValueError for a code that the format cannot hold.
    """
    encode = encode_codes if format == BYTES else encode_uint16
    offsets, end = [np.zeros(1, np.int64)], 0
    with atomic_path(token_file) as temporary, open(temporary, 'wb') as file:
        pack = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: as gzip, without name or time
        for run in [codes] if isinstance(codes, np.ndarray) else codes:
            stream, index = encode(run)
            offsets.append(index[1:] + end)
            end += index[-1]
            file.write(pack.compress(stream.tobytes()))
        file.write(pack.flush())
    npy = io.BytesIO()
    np.save(npy, np.concatenate(offsets))
    with atomic_path(index_path(token_file)) as temporary:
        Path(temporary).write_bytes(gzip_bytes(npy.getvalue()))
    write_text(label_file, ''.join(f'{label}\n' for label in labels))


# ---------------------------------------------------------------- reading and checking

@contextlib.contextmanager
def reading_gzip(path):
    """Open a gzip file for reading; what can be wrong with it becomes an InputError."""
    try:
        with gzip.open(path, 'rb') as file:
            yield file
    except FileNotFoundError:
        raise InputError(f'{path}: no such file') from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f'{path}: damaged or truncated gzip ({error}); fetch or make it again') from None
    except OSError as error:
        raise InputError(f'{path}: {error.strerror or error}') from None


def read_card(token_file):
    """The card of a token file, {} where there is none. Raises InputError unless it is an object of a known format."""
    path = card_path(token_file)
    if not path.exists():
        return {}
    card = read_json(path)
    if not isinstance(card, dict) or card.get('format', BYTES) not in FORMATS:
        what = f'format {reprlib.repr(card.get("format"))}' if isinstance(card, dict) else 'no object'
        raise InputError(f'{path}: {what} is none of the token formats read here ({", ".join(FORMATS)}); '
                         'fetch or make the set again, or update this program')
    if not isinstance(card.get('files', {}), dict):
        raise InputError(f"{path}: 'files' is no object; fetch or make the set again")
    return card


def check_file(token_file, card, path):
    """InputError unless the file `path` of a set has the size and checksum that the set's card states."""
    if path.name not in card.get('files', {}):
        raise InputError(f'{card_path(token_file)}: says nothing of {path.name}: it or the card is of another set')
    found, stated = {'sha256': sha256(path), 'bytes': os.path.getsize(path)}, card['files'][path.name]
    if found != stated:
        raise InputError(f'{path}: {found["bytes"]} bytes, SHA-256 {found["sha256"][:12]}..., where its card says '
                         f'{reprlib.repr(stated)}: changed or damaged, fetch or make it again')


def parse_npy(data):
    """The array in the bytes of a .npy, which must be as long as it says. Raises ValueError."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_column, dtype = read_header[version](file)
    except Exception as error:  # numpy parses the header as Python, and passes on what that raises
        raise ValueError((str(error).splitlines() or [''])[0][:120]) from None
    start = file.tell()
    if dtype.hasobject or by_column or math.prod(shape) * dtype.itemsize != len(data) - start:
        raise ValueError(f'{len(data) - start} bytes for {dtype} of shape {shape}')
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def read_index(token_file):
    """The (N + 1,) int64 offsets of a token file's index, checked to rise from 0. Raises InputError."""
    path = index_path(token_file)
    with reading_gzip(path) as file:
        limit = min(8 * MAX_IMAGES, MAX_INDEX_RATIO * os.path.getsize(path)) + SMALL
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f'{path}: unpacks to more than {limit:,} bytes, which no index of its size does; fetch or '
                         'make it again, or make shards')
    try:
        index = parse_npy(data)
    except ValueError as error:
        raise InputError(f'{path}: not a .npy array ({error})') from None
    if index.ndim != 1 or index.dtype.kind not in 'iu' or len(index) < 2:
        raise InputError(f'{path}: expected N + 1 integer offsets, found {index.dtype} of shape {index.shape}')
    index = index.astype(np.int64)
    if index[0] != 0 or (np.diff(index) <= 0).any():
        raise InputError(f'{path}: offsets do not rise from 0; the index is damaged or of another file')
    if np.diff(index).max() > MAX_IMAGE_BYTES:
        raise InputError(f'{path}: image {np.diff(index).argmax()} has more than {MAX_IMAGE_BYTES:,} bytes; the '
                         'index is damaged')
    return index


def read_labels(path):
    """The (N,) int64 classes in a label file. Raises InputError naming the first bad line."""
    text = read_bytes(path, MAX_LABEL_BYTES).removesuffix(b'\n')
    bad = re.search(rb'^(?![ \t]*[+-]?\d{1,18}[ \t\r]*$).*', text, re.MULTILINE) if text else None
    if bad:
        line = text.count(b'\n', 0, bad.start()) + 1
        raise InputError(f'{path}: line {line} is not an integer class: {bad.group()[:40].decode(errors="replace")!r}')
    labels = np.fromstring(text, np.int64, sep=' ')
    if not len(labels) or labels.min() < 0:
        raise InputError(f'{path}: ' + ('no labels in it' if not len(labels) else 'a class is negative'))
    return labels


def load_codebook(path):
    """The (K, d) float32 codebook. Raises InputError."""
    codebook = load_torch(path, 'a codebook')
    if not isinstance(codebook, torch.Tensor) or codebook.ndim != 2 or not codebook.is_floating_point():
        raise InputError(f'{path}: expected a float tensor (codes, dimension) as codebook')
    return codebook.float().detach()


def load_synonyms(path, codes, top_k):
    """Synonyms as a table to index.

    Args: codes: rows of the codebook, K; top_k: how many of each list are used (published: 5).
    Returns (table, count): table (K, top_k) int64, short lists padded with the code itself; count (K,) int64.
    Raises InputError when a code has no entry or a synonym lies beyond the codebook.
    """
    lists = read_json(path)
    if not isinstance(lists, dict):
        raise InputError(f'{path}: expected an object that maps each code to a list of codes')
    missing = [c for c in range(codes) if not lists.get(str(c))]
    if missing:
        raise InputError(f'{path}: no synonyms for {len(missing)} of {codes} codes (first: {missing[0]}); '
                         'make it from this codebook with scripts/build_synonyms.py')
    table = torch.arange(codes)[:, None].repeat(1, top_k)
    count = torch.empty(codes, dtype=torch.int64)
    for code in range(codes):
        row = lists[str(code)]
        if not isinstance(row, list) or not all(type(c) is int and 0 <= c < codes for c in row):
            raise InputError(f'{path}: the synonyms of code {code} are not codes from 0 to {codes - 1}')
        count[code] = min(len(row), top_k)
        table[code, :len(row[:top_k])] = torch.tensor(row[:top_k])
    return table, count


# ---------------------------------------------------------------- decoding a file

def one_ahead(function, items):
    """Yield function(item) for each item in order; a thread computes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in items:
            ready, waiting = waiting, thread.submit(function, item)
            if ready:
                yield ready.result()
        if waiting:
            yield waiting.result()


def _image_chunks(index):
    """Ranges (first, last) of images whose bytes make about CHUNK_BYTES together."""
    first = 0
    while first < len(index) - 1:
        last = int(np.searchsorted(index, index[first] + CHUNK_BYTES, side='right')) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def _split_bytes(token_file, data, offsets, first):
    """Codes and the number of codes of each image, from the escaped bytes `data` of images `first` and on."""
    try:
        codes, is_code = decode_stream(data)
    except ValueError:
        raise InputError(f'{token_file}: a dangling escape byte between images {first} and '
                         f'{first + len(offsets) - 2}; the stream or its index is damaged') from None
    if data[offsets[1:] - 1].max() == ESCAPE:
        bad = first + int(np.argmax(data[offsets[1:] - 1] == ESCAPE))
        raise InputError(f'{token_file}: image {bad} ends in a dangling escape byte')
    return codes, np.add.reduceat(is_code, offsets[:-1], dtype=np.int64)


def _split_uint16(token_file, data, offsets, first):
    """As `_split_bytes`, from 16-bit codes."""
    if (offsets % 2).any():
        bad = first + int(np.argmax(offsets[1:] % 2))
        raise InputError(f'{token_file}: image {bad} has an odd number of bytes, where its card says {UINT16}')
    return data.view('<u2'), np.diff(offsets) // 2


def _decode_images(token_file, data, offsets, first, n, split):
    """Codes (images, n) of the images whose bytes `data` holds; n is None until the first image tells it."""
    codes, lengths = split(token_file, data, offsets, first)
    n = n or int(lengths[0])
    if round(n ** 0.5) ** 2 != n:
        raise InputError(f'{token_file}: image {first} has {n} codes, which is no square grid')
    if (lengths != n).any():
        bad = int(np.argmax(lengths != n))
        raise InputError(f'{token_file}: image {first + bad} has {lengths[bad]} codes where the first has {n}')
    return codes.reshape(-1, n)


def _check_card(token_file, card, images, n):
    """InputError where a card says other things than the stream it belongs to."""
    found = {'images': images, 'grid': round(n ** 0.5)}
    for key, value in found.items():
        if card.get(key, value) != value:
            raise InputError(f'{card_path(token_file)}: says {key} {reprlib.repr(card[key])}, but {token_file} has '
                             f'{value}: the card is of another set, or the set is damaged')


def decode_images(token_file, index):
    """Yield (first, codes) for runs of images: codes (m, n) uint16, n the same square for all.

    Reads the gzip as a stream, so memory stays at a few times CHUNK_BYTES. Raises InputError.
    """
    card = read_card(token_file)
    split = _split_uint16 if card.get('format') == UINT16 else _split_bytes
    n, images = None, len(index) - 1
    with reading_gzip(token_file) as file:
        if index[-1] > MAX_GZIP_RATIO * os.path.getsize(token_file) + SMALL:
            raise InputError(f'{token_file}: its index says {index[-1]:,} bytes, which no gzip of its size unpacks to: '
                             'one of the two is truncated or of another file')

        def read(chunk):
            first, last = chunk
            return first, last, np.frombuffer(file.read(int(index[last] - index[first])), np.uint8)

        for first, last, data in one_ahead(read, _image_chunks(index)):  # unpacks while the chunk before is decoded
            if len(data) < index[last] - index[first]:
                raise InputError(f'{token_file}: the stream ends at byte {index[first] + len(data)}, but its index '
                                 f'says {index[-1]}: one of the two is truncated or of another file')
            codes = _decode_images(token_file, data, index[first:last + 1] - index[first], first, n, split)
            if n is None:
                n = codes.shape[1]
                _check_card(token_file, card, images, n)
                if images * n > index[-1]:
                    raise InputError(f'{token_file}: {images} images of {n} codes, as the first has, are more than the '
                                     f'{index[-1]} bytes its index says')
            yield first, codes
        if file.read(1):
            raise InputError(f'{token_file}: the stream goes on after byte {index[-1]}, where its index ends')


# ---------------------------------------------------------------- the cache a node shares

def _identity(path):
    """What changes when the file does: its size, time and checksum (gzip keeps one of the content at its end)."""
    try:
        with open(path, 'rb') as file:
            stat = os.stat(file.fileno())
            file.seek(max(0, stat.st_size - 8))
            return stat.st_size, stat.st_mtime_ns, file.read().hex()
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None


def cache_path(token_files, folder=''):
    """Where the decoded codes of token files belong; the name changes with what they are decoded from."""
    token_files = [Path(path).absolute() for path in token_files]
    said = [(read_card(path).get('format', BYTES), _identity(path), _identity(index_path(path)))
            for path in token_files]
    key = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
    place = hashlib.sha256('\0'.join(map(str, token_files)).encode()).hexdigest()[:8]
    stem = token_files[0].name.replace('.data.bin.gz', '').replace('.gz', '')
    return Path(folder or token_files[0].parent) / f'{stem}.{place}.codes-{key}.npy'


def _fill(token_files, allocate):
    """Decode every image into the array that `allocate((N, n))` returns once the grid is known. Raises InputError,
    also for files that are not as their cards say."""
    for path in token_files:
        card = read_card(path)
        if 'files' in card:
            check_file(path, card, path)
            check_file(path, card, index_path(path))
    indices = [read_index(path) for path in token_files]
    codes, start = None, 0
    for path, index in zip(token_files, indices):
        for first, run in decode_images(path, index):
            if codes is None:
                codes = allocate((sum(len(i) - 1 for i in indices), run.shape[1]))
            if run.shape[1] != codes.shape[1]:
                raise InputError(f'{path}: {run.shape[1]} codes an image, where {token_files[0]} has {codes.shape[1]}: '
                                 'they are no shards of one set')
            codes[start + first:start + first + len(run)] = run
        start += len(index) - 1
    return codes


def _allocate(path, shape):
    """A new .npy of codes, mapped; all its space is taken at once, since a map on a full disk dies of a bus error."""
    codes = np.lib.format.open_memmap(path, 'w+', np.uint16, shape)
    if hasattr(os, 'posix_fallocate'):
        with open(path, 'rb+') as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return codes


def build_cache(token_files, path):
    """Decode token files into the .npy at `path`, atomically; older caches of the same files are removed."""
    more = f' and {len(token_files) - 1} more' if len(token_files) > 1 else ''
    say(f'decoding {token_files[0]}{more} into {path}')
    with atomic_path(path, 'choose another folder with --token-cache') as temporary:
        codes = _fill(token_files, functools.partial(_allocate, temporary))
        codes.flush()
    for old in path.parent.glob(path.name.split('.codes-')[0] + '.codes-*.npy'):
        if old != path:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()


def open_codes(token_file, cache=''):
    """The codes of a token set, (N, n) uint16; those of shards one after the other.

    Args:
        token_file: a path, a glob or a comma-separated list.
        cache: folder of the decoded file; '' puts it beside the (first) token file; 'none' decodes into this
            process's own memory instead.
    Collective: with several ranks, the first of each node decodes and all map the same file.
    """
    token_files = expand_files(token_file)
    if cache == 'none':
        return _fill(token_files, in_memory)
    path = cache_path(token_files, cache)
    with one_first(int(os.environ.get('LOCAL_RANK', 0)) == 0):
        if not path.exists():
            build_cache(token_files, path)
    return map_cache(path)


def in_memory(shape):
    """An empty uint16 array. Raises InputError where memory lacks."""
    try:
        return np.empty(shape, np.uint16)
    except MemoryError:
        raise InputError(f'{shape[0]:,} images of {shape[1]} codes do not fit into memory: use a cache') from None


def map_cache(path):
    """The codes in a cache, mapped. Raises InputError."""
    try:
        codes = np.load(path, mmap_mode='r', allow_pickle=False)
    except Exception as error:  # see parse_npy
        raise InputError(f'{path}: damaged cache ({error}); delete it, and it is made again') from None
    if not isinstance(codes, np.ndarray) or codes.dtype != np.uint16 or codes.ndim != 2 or not codes.size:
        raise InputError(f'{path}: no cache of codes; delete it, and it is made again')
    return codes


class TokenDataset:
    """Token grids and their classes, fetched whole batches at a time.

    Args:
        token_file, label_file: see the module's docstring; for shards, globs or comma-separated lists of as many files.
        codebook_size: rows of the codebook; a code beyond it is an InputError.
        cache: see `open_codes`.
    Attributes: codes (N, n) uint16, mapped; labels (N,) int64; grid: side of the token grid, n = grid².
    """

    def __init__(self, token_file, label_file, codebook_size, cache=''):
        self.token_files, label_files = expand_files(token_file), expand_files(label_file)
        if len(self.token_files) != len(label_files):
            raise InputError(f'{token_file}: {len(self.token_files)} token files, but {label_file} is '
                             f'{len(label_files)} label files: give one for each, in the same order')
        for tokens, path in zip(self.token_files, label_files):
            card = read_card(tokens)
            if path.name in card.get('files', {}):  # else they are labels of the user's own
                check_file(tokens, card, path)
        labels = [read_labels(path) for path in label_files]
        self.labels = np.concatenate(labels)
        self.codes = open_codes(token_file, cache)
        self.resident = None
        self.grid = int(round(self.codes.shape[1] ** 0.5))
        counts = [len(self.codes)] if len(labels) == 1 else [len(read_index(path)) - 1 for path in self.token_files]
        for tokens, count, label_path, own in zip(self.token_files, counts, label_files, labels):
            if count != len(own):
                raise InputError(f'{label_path}: {len(own)} labels for the {count} images of {tokens}')
        for tokens, end, count in zip(self.token_files, np.cumsum(counts), counts):
            largest = int(self.codes[end - count:end].max())  # also brings the map into the page cache, in one pass
            if largest >= codebook_size:
                raise InputError(f'{tokens}: holds code {largest}, but the codebook has {codebook_size} rows; '
                                 'give the codebook the tokens were made with')

    def __len__(self):
        return len(self.codes)

    def bytes_on_disk(self):
        """Size in bytes of the token files and their indices."""
        return sum(os.path.getsize(path) + os.path.getsize(index_path(path)) for path in self.token_files)

    def batch(self, indices):
        """codes (B, grid, grid) uint16 and labels (B,) int64, CPU tensors, of images `indices` (B,) int64."""
        indices = np.asarray(indices)
        codes = torch.from_numpy(self.codes[indices]).view(-1, self.grid, self.grid)
        return codes, torch.from_numpy(self.labels[indices])

    def keep_on(self, device):
        """Hold a copy of all codes and labels on `device`: a batch is then one gather there."""
        codes = torch.from_numpy(np.array(self.codes)).view(torch.int16)  # many operations lack uint16
        self.resident = codes.to(device), torch.from_numpy(self.labels).to(device)

    def batches(self, indices, batch_size, device, pin_memory=False):
        """Yield codes (B, grid, grid) uint16 and labels (B,) int64 on `device`, for batch after batch of `indices`.

        From what `keep_on` left there; else from the map, for a GPU one batch ahead and, with `pin_memory`, through
        page-locked memory, so that the copy overlaps with computing. Only codes and labels travel.
        """
        slices = [indices[start:start + batch_size] for start in range(0, len(indices), batch_size)]
        if self.resident:
            yield from self._resident_batches(indices, batch_size)
        elif device.type == 'cpu':
            yield from map(self.batch, slices)
        else:
            yield from self._travelling_batches(slices, device, pin_memory)

    def _resident_batches(self, indices, batch_size):
        codes, labels = self.resident
        for chosen in torch.from_numpy(np.asarray(indices)).to(codes.device).split(batch_size):
            yield codes[chosen].view(torch.uint16).view(-1, self.grid, self.grid), labels[chosen]

    def _travelling_batches(self, slices, device, pin_memory):
        def load(chosen):
            return [t.pin_memory() if pin_memory else t for t in self.batch(chosen)]

        for ready in one_ahead(load, slices):
            yield tuple(t.to(device, non_blocking=pin_memory) for t in ready)
