"""Fuzz every reader with arbitrary, damaged and hostile files (hypothesis, the same inputs each time).

    python tests/stress/fuzz.py --inputs 1200

Each input must end in the right result, which a slow and obvious reader confirms, or in an InputError: one line that
names the file. Anything else stops the program and shows the smallest input that does it: another exception, a wrong
result, more time or memory than tests/helpers.py allows. Prints one JSON line with counts of each reader. Takes some
minutes with one core, most of them for VQGANs; needs hypothesis (requirements-test.txt).
"""
import argparse
import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import random
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
from image_data.decoding import image_extensions, is_hidden  # noqa: E402

from training.checkpoints import load_checkpoint, load_weights  # noqa: E402
from token_files.codebook import load_codebook, load_synonyms  # noqa: E402
from fileio.files import sha256  # noqa: E402
from flags import Parser, integer  # noqa: E402
from helpers import (CODE_KINDS, codes_of_kind, limits, make_compact_set, npy, open_codes, rewrite,  # noqa: E402
                     torch_bytes)
from image_data.sources import open_source  # noqa: E402
from image_tokenizer.tokenizers import PatchTokenizer, load_tokenizer  # noqa: E402
from training.run_folder import RunLog  # noqa: E402
from token_files.cache import labels_inside, map_cache, open_codes as open_files  # noqa: E402
from token_files.published import CODECS, encode  # noqa: E402
from token_files.published import gzip_bytes, companion_path, read_index  # noqa: E402
from token_files.token_file import decode, manifest_path, open_token_file, write_set as write_files  # noqa: E402
from fileio.labels import read_labels  # noqa: E402
from small_vqgans import FAMILIES, SIDE, small_state  # noqa: E402
from twins import SLOW_DECODERS, slow_decode_compact  # noqa: E402
from utils import InputError, run  # noqa: E402
from image_tokenizer.vitvqgan import Size, ViTVQGAN  # noqa: E402

REFUSED = object()


# ---------------------------------------------------------------- what an input may do

def outcome(paths, read, *args):
    """read(*args) within limits, or REFUSED where it raises an InputError of one line that names one of `paths`."""
    try:
        with limits():
            return read(*args)
    except InputError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 2000, message
        assert any(str(path) in message for path in paths), f'{message} names none of {paths}'
        return REFUSED


def same(a, b):
    """Whether two float tensors have the same shape and, bit by bit, the same numbers."""
    a, b = (tensor.detach().float().contiguous() for tensor in (a, b))
    return a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


# ---------------------------------------------------------------- what inputs are made of

NUMBERS = st.one_of(st.integers(-2, 600), st.sampled_from([2 ** 31, 2 ** 32, 2 ** 40, 2 ** 62, 2 ** 63 - 1]))
JSON = st.recursive(st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=6)
PIECES = [
    b'\xff' * 8, b'\0' * 8, b'\xff\xff\xff\x7f', b'\n', b'[', b'{' * 3, b'[' * 100_000, b'"', b'-1', b'9' * 30,
    b'1e999', b'NaN', b'\\ud800', b'\xef\xbb\xbf', b'PK\x03\x04', b'\x93NUMPY', b'\x1f\x8b\x08']


@st.composite
def damaged(draw, whole):
    """Some bytes after 0 to 3 accidents anywhere: a bit flipped, bytes set, put in, cut out, or the end lost."""
    data, chance = bytearray(whole), random.Random(draw(st.integers(0, 1 << 60)))
    for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
        place = chance.randrange(len(data) + 1)
        kind = chance.choice(['bit', 'bit', 'set', 'set', 'insert', 'cut', 'end'])
        if kind == 'bit':
            data[place:place + 1] = bytes(byte ^ 1 << chance.randrange(8) for byte in data[place:place + 1])
        elif kind in ('set', 'insert'):
            piece = chance.choice([chance.randbytes(1), chance.randbytes(4), chance.choice(PIECES)])
            data[place:place + len(piece) * (kind == 'set')] = piece
        else:
            del data[place:place + chance.randrange(1, 40) if kind == 'cut' else None]
    return bytes(data)


def any_tensor(draw):
    """A small tensor of any type and shape; some claim much by strides of 0, some are not plain."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    tensor = torch.ones(shape).to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64,
                                                        torch.int64, torch.bool, torch.complex64])))
    kind = draw(st.sampled_from(['plain'] * 4 + ['claims', 'sparse', 'meta']))
    if kind == 'claims':
        return torch.ones(1, 1).expand(*draw(st.sampled_from([(2, 3), (1 << 20, 1 << 20), (1 << 30, 4)])))
    return {'plain': tensor.clone, 'sparse': tensor.to_sparse, 'meta': lambda: tensor.to('meta')}[kind]()


def any_object(draw):
    """What a torch file may hold instead of what it should."""
    kind = draw(st.sampled_from(['json', 'tensor', 'tensor', 'dict', 'namespace']))
    if kind == 'json':
        return draw(JSON)
    if kind == 'dict':
        keys = draw(st.lists(st.text(max_size=4) | NUMBERS, max_size=3))
        return OrderedDict((key, any_tensor(draw)) for key in keys)
    return argparse.Namespace(shape=torch.Size([3])) if kind == 'namespace' else any_tensor(draw)


def damaged_pickle(draw, data):
    """A torch file whose pickle is damaged, with the checksum that goes with it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, 'w') as file:
        for member in source.infolist():
            content = source.read(member)
            file.writestr(member.filename, draw(damaged(content)) if member.filename.endswith('.pkl') else content)
    return out.getvalue()


def torch_file(draw, path, value, change):
    """Write a torch file of `value`, somehow damaged, or of what `change()` makes of it.

    Returns what it should then hold, or None: torch may tell.
    """
    kind = draw(st.sampled_from(['zip', 'pickle', 'old', 'object']))
    if kind == 'object':
        value = change()
        path.write_bytes(torch_bytes(value))
        return value
    whole = torch_bytes(value, kind == 'old')
    path.write_bytes(damaged_pickle(draw, whole) if kind == 'pickle' else draw(damaged(whole)))
    return value if kind == 'zip' or path.read_bytes() == whole else None


def torch_says(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location='cpu', weights_only=True)


# ---------------------------------------------------------------- token sets

def slow_read(token_file, index):
    """The codes of a set as lists, REFUSED where it is none."""
    try:
        stream = gzip.decompress(token_file.read_bytes())
    except Exception:
        return REFUSED
    manifest = slow_manifest(token_file)
    if manifest is None or index[0] != 0 or index[-1] != len(stream) or any(b <= a for a, b in zip(index, index[1:])):
        return REFUSED
    decode = SLOW_DECODERS[manifest.get('format', 'escaped-bytes')]
    images = [decode(stream[a:b]) for a, b in zip(index, index[1:])]
    if None in images or len({len(image) for image in images}) > 1 or math.isqrt(len(images[0])) ** 2 != len(images[0]):
        return REFUSED
    actual = {'images': len(images), 'grid': math.isqrt(len(images[0]))}
    return images if all(manifest.get(key, value) == value for key, value in actual.items()) else REFUSED


def slow_manifest(token_file, formats=('escaped-bytes', 'uint16-le'), names=('a.data.bin.gz', 'a.index.npy.gz')):
    """The manifest of a set of some formats, {} where there is none, None where it does not fit the files' names."""
    path = manifest_path(token_file)
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.get('format', 'escaped-bytes') not in formats:
        return None
    if 'files' in manifest:
        files = manifest['files'] if isinstance(manifest['files'], dict) else {}
        for name in names:
            file = token_file.with_name(name)
            if files.get(name) != {'bytes': len(file.read_bytes()), 'sha256': sha256(file)}:
                return None
    return manifest


def write_set(draw, folder):
    """Write a small right set; returns (token file, stream, index as a list, name of the format)."""
    images = draw(st.integers(1, 4))
    grid = draw(st.integers(1, 3))
    codec = CODECS[draw(st.sampled_from(sorted(CODECS)))]
    codes = draw(st.lists(st.integers(0, codec.largest_code), min_size=images * grid ** 2, max_size=images * grid ** 2))
    codes = np.array(codes).reshape(images, -1)
    path = folder / 'a.data.bin.gz'
    write_files(path, [codes], images, folder / 'labels', [0] * images, {'format': codec.name})
    stream, index = encode(codec, codes)
    manifest = folder / 'a.json'
    manifest.unlink(missing_ok=True)
    if codec.name != 'escaped-bytes':
        manifest.write_text(json.dumps({'format': codec.name}))
    return path, stream.tobytes(), index.tolist(), codec.name


def check_codes(path, index):
    """Read a set and compare with the slow reader, which must refuse what is refused."""
    codes = outcome([path, companion_path(path), manifest_path(path)], open_codes, path, 'none')
    slow = slow_read(path, index)
    assert (codes is REFUSED) == (slow is REFUSED), 'refused though right' if codes is REFUSED else 'taken though wrong'
    assert codes is REFUSED or codes.tolist() == slow
    return codes


def stream(draw, folder):
    path, data, index, _ = write_set(draw, folder)
    kind = draw(st.sampled_from(['stream', 'gzip', 'index', 'arbitrary']))
    if kind == 'stream':
        path.write_bytes(gzip_bytes(draw(damaged(data))))
    elif kind == 'gzip':
        path.write_bytes(draw(damaged(path.read_bytes())))
    elif kind == 'index':
        index[draw(st.integers(0, len(index) - 1))] = draw(NUMBERS)
    else:
        data = draw(st.binary(min_size=1, max_size=20) | st.lists(st.sampled_from([7, 255])).map(bytes))
        index = draw(st.lists(st.integers(1, len(data) + 1), unique=True, max_size=4).map(lambda x: [0, *sorted(x)]))
        path.write_bytes(gzip_bytes(data))
        if len(index) < 2:
            index.append(len(data) + 1)
    rewrite(path, index=np.array(index, np.int64))
    return check_codes(path, index)


def manifest(draw, folder):
    path, _, index, name = write_set(draw, folder)
    files = {file.name: {'bytes': len(file.read_bytes()), 'sha256': sha256(file)}
             for file in (path, companion_path(path), folder / 'labels')}
    value = {'format': name, 'images': len(index) - 1, 'files': files}
    kind = draw(st.sampled_from(['text', 'value', 'file', 'arbitrary']))
    if kind == 'value':
        value[draw(st.sampled_from(['format', 'images', 'grid', 'files', 'codes', 'classes']))] = draw(JSON)
    elif kind == 'file':
        files[draw(st.sampled_from(sorted(files)))] = draw(JSON)
    elif kind == 'arbitrary':
        value = draw(JSON)
    text = json.dumps(value).encode()
    (folder / 'a.json').write_bytes(draw(damaged(text)) if kind == 'text' else text)
    return check_codes(path, index)


def compact(draw, folder):
    """A compact set whose stream, model or manifest is damaged; some with the checksums that belong to the damage."""
    codes = codes_of_kind(draw(st.sampled_from(CODE_KINDS)), draw(st.integers(1, 9)), draw(st.integers(1, 4)),
                          draw(st.integers(0, 1 << 32)))
    path, _ = make_compact_set(folder, codes, name='a', checked=draw(st.booleans()))
    model = folder / 'a-token.model.bin'
    said = json.loads(manifest_path(path).read_bytes())
    data = bytearray(path.read_bytes())
    kind = draw(st.sampled_from(['stream', 'words', 'header', 'index', 'model', 'body', 'manifest', 'value']))
    if kind == 'stream':
        data = draw(damaged(data))
    elif kind == 'words':  # after 32 bytes of header and 4 of index, in whole words
        start = 36 + 4 * draw(st.integers(0, (len(data) - 37) // 4))
        data[start:start + 4] = draw(st.binary(max_size=16).map(lambda more: more[:len(more) // 4 * 4]))
        data[32:36] = ((len(data) - 36) // 4).to_bytes(4, 'little')
    elif kind in ('header', 'index'):
        start, size = draw(st.sampled_from([(8, 4), (12, 2), (14, 2), (16, 16)] if kind == 'header' else [(32, 4)]))
        data[start:start + size] = (draw(NUMBERS) % (1 << 8 * size)).to_bytes(size, 'little')
    elif kind == 'model':
        model.write_bytes(draw(damaged(model.read_bytes())))
    elif kind == 'body':
        model.write_bytes(damaged_model(draw, model.read_bytes()))
        data[16:32] = hashlib.sha256(model.read_bytes()).digest()[:16]
    elif kind == 'value':
        said[draw(st.sampled_from(['format', 'model', 'images', 'grid', 'files']))] = draw(
            JSON | st.sampled_from(['../a-token.model.bin', 'b.model.bin', 'a\0', '\ud800', 'x' * 300, '.', '..']))
    text = json.dumps(said).encode()
    manifest_path(path).write_bytes(draw(damaged(text)) if kind == 'manifest' else text)
    path.write_bytes(data)
    return check_compact(path, model)


def damaged_model(draw, data):
    """A model whose header or unpacked body is damaged, packed again, with the checksum that goes with it."""
    header, body = data[:20], zlib.decompress(data[20:-4])
    if draw(st.booleans()):
        start, size = draw(st.sampled_from([(8, 4), (12, 4), (16, 2), (18, 2)]))
        number = draw(NUMBERS) % (1 << 8 * size)
        header = header[:start] + number.to_bytes(size, 'little') + header[start + size:]
    else:
        body = draw(damaged(body))
    data = header + zlib.compress(body)
    return data + zlib.crc32(data).to_bytes(4, 'little')


def check_compact(path, model):
    """Read a compact set and compare with the slow reader."""
    manifest = slow_manifest(path, ('compact',), (path.name, model.name))
    slow = None
    if manifest and manifest.get('format') == 'compact' and manifest.get('model') == model.name:
        slow = slow_decode_compact(path.read_bytes(), model.read_bytes())
    if slow is not None:
        actual = {'images': len(slow), 'grid': math.isqrt(len(slow[0]))}
        slow = slow if all(manifest.get(key, value) == value for key, value in actual.items()) else None
    others = [f'{path.parent}/{manifest["model"]}'] if manifest and isinstance(manifest.get('model'), str) else []
    codes = outcome([path, model, manifest_path(path), companion_path(path), *others], open_codes, path, 'none')
    assert (codes is REFUSED) == (slow is None), 'refused though right' if codes is REFUSED else 'taken though wrong'
    assert codes is REFUSED or codes.tolist() == slow
    return codes


def index(draw, folder):
    path = folder / 'a.index.npy.gz'
    whole = draw(st.booleans())
    intact = draw(st.integers(0, 3)) == 0  # often enough that some are right, whatever else is drawn
    offsets = np.cumsum([0] + draw(st.lists(st.integers(1, 300), min_size=1, max_size=5)))
    data = npy(offsets.astype(draw(st.sampled_from(['<i8', '>i8', '<u4', '<i2', '<u8', 'f8']))))
    if not intact and draw(st.booleans()):  # a header of the right form, as long as before or not
        shape = draw(st.lists(NUMBERS, max_size=3).map(tuple) | st.just(True))
        header = str({'descr': draw(st.sampled_from(['<i8', '|O', '<U9', 'V0', [('a', '<i8')], '(2,)<i8', 'x'])),
                      'fortran_order': draw(st.booleans()), 'shape': shape})
        data = data[:10] + header.ljust(len(data[10:128]) - 1).encode() + b'\n' + data[128:]
    data = gzip_bytes(data if whole or intact else draw(damaged(data)))
    path.write_bytes(draw(damaged(data)) if whole and not intact else data)
    found = outcome([path], read_index, path)
    if found is not REFUSED:
        other = np.load(io.BytesIO(gzip.decompress(path.read_bytes())))
        assert found.dtype == np.int64 and found.tolist() == other.tolist() and found[0] == 0 and found[-1] > 0
        assert (other.astype(object)[1:] > other.astype(object)[:-1]).all()
    return found


def cache(draw, folder):
    path = folder / 'a.codes-0.npy'
    codes = np.arange(12, dtype=draw(st.sampled_from(['<u2', '<u2', '<i4']))).reshape(3, 4)
    path.write_bytes(draw(damaged(npy(codes))))
    found = outcome([path], map_cache, path)
    assert found is REFUSED or np.array_equal(found, np.load(io.BytesIO(path.read_bytes())))
    return found


# ---------------------------------------------------------------- token sets of others

INTEGERS = ['<u2', '<i2', '<u2', '<i2', '<i8', '<i4', '<u1', '<u8', '>i2', '<f4']


def foreign_arrays(draw):
    """Codes and labels that are right, or wrong by type, shape or a number."""
    images = draw(st.integers(1, 4))
    grid = draw(st.integers(1, 3))
    shapes = [(images, grid ** 2), (images, grid, grid)]
    if draw(st.booleans()):
        dtype = draw(st.sampled_from(['<u2', '<i2', '<i8', '<u1']))
        codes = draw(st.lists(st.integers(0, 255), min_size=images * grid ** 2, max_size=images * grid ** 2))
        labels = draw(st.lists(st.integers(0, 999), min_size=images, max_size=images))
        return np.array(codes, dtype).reshape(draw(st.sampled_from(shapes))), np.array(labels, '<i8')
    shape = draw(st.sampled_from(shapes * 3 + [
        (images, grid ** 2 + 1), (images,), (images, grid, grid + 1), (0, 4), (images, 0)]))
    numbers = draw(st.sampled_from([st.integers(0, 255)] * 3 + [NUMBERS]))
    values = draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
    codes = np.array(values, object).reshape(shape).astype('<i8').astype(draw(st.sampled_from(INTEGERS)))
    numbers = draw(st.sampled_from([st.integers(0, 999)] * 3 + [NUMBERS]))
    labels = draw(st.lists(numbers, min_size=images, max_size=images + draw(st.sampled_from([0, 0, 0, 1]))))
    return codes, np.array(labels, '<i8').astype(draw(st.sampled_from(['<i8', '<i8', '<i2', '<f4'])))


def slow_codes(codes):
    """The rows of codes in an array as lists, REFUSED where it holds none."""
    if codes.dtype.kind not in 'iu' or codes.ndim not in (2, 3) or not codes.size:
        return REFUSED
    if codes.ndim == 3 and codes.shape[1] != codes.shape[2]:
        return REFUSED
    if math.isqrt(math.prod(codes.shape[1:])) ** 2 != math.prod(codes.shape[1:]):
        return REFUSED
    rows = [[int(code) for code in row.ravel()] for row in codes]
    if codes.dtype.itemsize == 2:
        rows = [[code % 65536 for code in row] for row in rows]
    return rows if all(0 <= code <= 65535 for row in rows for code in row) else REFUSED


def slow_labels(labels, images):
    """The labels in an array as a list, REFUSED where they are none of so many images."""
    if labels is None or labels.dtype.kind not in 'iu' or labels.shape != (images,):
        return REFUSED
    return labels.tolist() if all(0 <= label <= 10 ** 6 for label in labels.tolist()) else REFUSED


def check_foreign(path, slow, paths=(), exact=True):
    """Read a set of others, mapped or decoded, and compare with (codes, labels) of a slow reader.

    Without `exact` a set may be refused that the slow reader takes.
    """
    def read():
        files = [open_token_file(path)]
        codes = open_files(files, 'none').tolist()
        return codes, [*decode(files[0])], labels_inside(files, 'none').tolist()

    found = outcome([path, *paths], read)
    right = REFUSED if REFUSED in slow else tuple(slow)
    if found is not REFUSED:
        codes, runs, found_labels = found
        found = codes, found_labels
        assert np.concatenate([run for _, run in runs]).tolist() == codes
        assert found == right, 'taken though wrong'
    assert not exact or (found is REFUSED) == (right is REFUSED), 'refused though right'
    return found


def foreign_safetensors(draw, folder):
    path = folder / 'a.safetensors'
    codes, labels = foreign_arrays(draw)
    codes = np.ascontiguousarray(codes.astype(codes.dtype.newbyteorder('<')))
    data = safetensors.numpy.save({'indices': codes, draw(st.sampled_from(['labels'] * 9 + ['l'])): labels})
    size = 8 + int.from_bytes(data[:8], 'little')
    kind = draw(st.sampled_from(['whole', 'whole', 'bytes', 'header']))
    if kind == 'header':
        header = draw(damaged(data[8:size]))
        data = len(header).to_bytes(8, 'little') + header + data[size:]
    path.write_bytes(draw(damaged(data)) if kind == 'bytes' else data)
    try:
        tensors = safetensors.numpy.load(path.read_bytes())
        codes, labels = tensors['indices'], tensors.get('labels')
    except Exception:
        codes = None
    return check_foreign(path, [REFUSED] if codes is None else [slow_codes(codes), slow_labels(labels, len(codes))
                                                                if codes.ndim else REFUSED])


def foreign_npz(draw, folder):
    path = folder / 'a.npz'
    codes, labels = foreign_arrays(draw)
    save = draw(st.sampled_from([np.savez, np.savez_compressed]))
    save(path, **{'indices': codes, draw(st.sampled_from(['labels'] * 9 + ['l'])): labels})
    if draw(st.integers(0, 2)) == 0:
        path.write_bytes(draw(damaged(path.read_bytes())))
    try:
        with limits(), np.load(path, allow_pickle=False) as arrays:
            codes, labels = arrays['indices'], arrays.get('labels')
        slow = [slow_codes(codes), slow_labels(labels, len(codes)) if codes.ndim else REFUSED]
    except Exception:
        slow = [REFUSED]
    return check_foreign(path, slow, exact=False)  # damage that no number of ours depends on may be refused


def foreign_npy(draw, folder):
    """An array without labels, or the folders that hold one for each image."""
    codes, labels = foreign_arrays(draw)
    if draw(st.booleans()):
        path = folder / 'a.npy'
        path.write_bytes(draw(damaged(npy(codes))) if draw(st.booleans()) else npy(codes))
        found = outcome([path], open_codes, path, 'none')
        slow = slow_npy(path)
        slow = REFUSED if slow is None else slow_codes(slow)
        assert found is REFUSED or found.tolist() == slow
        assert (found is REFUSED) == (slow is REFUSED)
        return found
    path, beside = folder / 'x8_codes', folder / 'x8_labels'
    for each in path, beside:
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir()
    views = draw(st.integers(1, 2))
    n = math.prod(codes.shape[1:])
    codes = codes.astype('<i8').reshape(len(codes), n).repeat(views, 0).reshape(len(codes), views, n)
    for i, (image, label) in enumerate(zip(codes, labels.astype('<i8'))):
        (path / f'{i}.npy').write_bytes(npy(image[None]))
        (beside / f'{i}.npy').write_bytes(npy(label[None]))
    files = sorted([*path.iterdir(), *beside.iterdir()])
    if files and draw(st.booleans()):
        file = draw(st.sampled_from(files))
        if draw(st.integers(0, 4)) == 0:
            file.unlink()
        else:
            file.write_bytes(draw(damaged(file.read_bytes())))
    return check_foreign(path, slow_folders(path, beside), [beside])


def slow_npy(path):
    """The array in a .npy, None where there is none."""
    data = io.BytesIO(path.read_bytes())
    try:
        with limits():
            array = np.load(data, allow_pickle=False)
    except Exception:
        return None
    return None if data.read(1) or not isinstance(array, np.ndarray) else array


def slow_folders(path, beside):
    """Codes and labels of two folders as lists, with REFUSED for what is wrong."""
    names = sorted((int(file.stem), file.name) for file in path.iterdir())
    images = [slow_npy(path / name) for _, name in names]
    if not images or any(image is None or image.ndim != 3 or image.shape != images[0].shape or image.shape[0] != 1
                         or image.flags.fnc for image in images):
        return [REFUSED]
    codes = [slow_codes(image[0]) for image in images]
    labels = [slow_npy(beside / name) if (beside / name).exists() else None for _, name in names]
    if REFUSED in codes or len(labels) != len(list(beside.iterdir())) or any(
            label is None or REFUSED is slow_labels(label, 1) for label in labels):
        return [REFUSED]
    views = images[0].shape[1]
    return [[row for image in codes for row in image], [int(label[0]) for label in labels for _ in range(views)]]


def foreign_lines(draw, folder):
    path = folder / 'a.jsonl'
    codes, labels = foreign_arrays(draw)
    lines = [{'class_id': label, 'tokens': row.ravel().tolist()} for row, label in zip(codes, labels.tolist())]
    if lines and draw(st.integers(0, 2)) == 0:
        line = draw(st.sampled_from(lines))
        line[draw(st.sampled_from(['class_id', 'tokens', 'more']))] = draw(JSON | st.lists(NUMBERS, max_size=4))
    text = '\n'.join(map(json.dumps, lines)).encode() + draw(st.sampled_from([b'', b'\n', b'\r\n\n']))
    path.write_bytes(draw(damaged(text)) if draw(st.integers(0, 2)) == 0 else text)
    return check_foreign(path, slow_lines(path))


def slow_lines(path):
    rows = []
    for line in path.read_bytes().split(b'\n'):
        if line.strip(b' \t\n\r\x0b\f'):
            try:
                rows.append(json.loads(line.decode()))
            except (ValueError, RecursionError):
                return [REFUSED]
    right = all(isinstance(row, dict) and type(row.get('class_id')) is int and 0 <= row['class_id'] <= 10 ** 6
                and isinstance(row.get('tokens'), list) and all(type(code) is int for code in row['tokens'])
                and row['tokens'] and len(row['tokens']) == len(rows[0].get('tokens', [])) for row in rows)
    if not right or not rows or any(not 0 <= code <= 65535 for row in rows for code in row['tokens']):
        return [REFUSED]
    return [slow_codes(np.array([row['tokens'] for row in rows])), [row['class_id'] for row in rows]]


def foreign_parquet(draw, folder):
    import pyarrow
    from pyarrow import parquet
    path = folder / 'a.parquet'
    codes, labels = foreign_arrays(draw)
    columns = {'tokens': codes.astype(codes.dtype.newbyteorder('=')).tolist(), 'label': labels.tolist()[:len(codes)]}
    if codes.size and draw(st.integers(0, 2)) == 0:
        cells = columns[draw(st.sampled_from(['tokens', 'label']))]
        cells[draw(st.integers(0, len(cells) - 1))] = draw(st.sampled_from([None, cells[0], -1, [], [1, 2], [[1]],
                                                                              [None], [0.5], 'x']))
    try:
        parquet.write_table(pyarrow.table(columns), path, row_group_size=draw(st.integers(1, 4)))
    except (pyarrow.ArrowException, TypeError, OverflowError, ValueError):
        path.write_bytes(b'PAR1PAR1')
    if draw(st.integers(0, 2)) == 0:
        path.write_bytes(draw(damaged(path.read_bytes())))
    return check_foreign(path, slow_parquet(path), exact=False)


def slow_parquet(path):
    from pyarrow import parquet
    try:
        with limits():
            columns = parquet.read_table(path, use_threads=False).to_pydict()
        codes, labels = np.array(columns['tokens']), np.array(columns['label'])
    except Exception:
        return [REFUSED]
    return [slow_codes(codes), slow_labels(labels, len(codes))]


# ---------------------------------------------------------------- text

def labels(draw, folder):
    path = folder / 'labels.txt'
    words = st.integers(0, 999).map(str) | st.sampled_from([
        '', '-1', '+3', ' 4 ', '5\r', '1_0', '१', '0x1', '1.', '6 7', '1000000', '1000001', '9' * 18, '9' * 19,
        '9' * 5000, '\u2028', '\x1c'])
    lines = draw(st.lists(st.integers(0, 999).map(str), max_size=6) | st.lists(words, max_size=4))
    start = draw(st.sampled_from([b'', b'', b'\xef\xbb\xbf']))
    path.write_bytes(start + draw(damaged('\n'.join(lines).encode() + b'\n' * draw(st.integers(0, 2)))))
    found = outcome([path], read_labels, path)
    text = path.read_bytes()
    if text.startswith(b'\xef\xbb\xbf'):
        text = text[3:]
    lines = text.split(b'\n')
    while lines and not lines[-1].strip(b' \t\r'):
        lines.pop()
    right = bool(lines) and all(is_class(line) for line in lines)
    assert (found is not REFUSED) == right
    assert found is REFUSED or found.tolist() == [int(line) for line in lines]
    return found


def is_class(line):
    """Whether a line of a label file is an integer from 0 to a million, in up to 18 digits."""
    word = line.lstrip(b' \t').rstrip(b' \t\r')
    digits = word[1:] if word[:1] in (b'+', b'-') else word
    return digits.isdigit() and len(digits) <= 18 and 0 <= int(word) <= 10 ** 6


def listed(draw, folder):
    """A list file: a line 'path label' for each image."""
    path = folder / 'list.txt'
    names = st.sampled_from(['a.jpg', 'b/c.png', 'd e.jpg', 'ü.jpg', ' f.jpg ', '../g.jpg', '', '#', 'a\tb.jpg'])
    right = st.integers(0, 999).map(str)
    numbers = right | st.sampled_from(['-1', '+1', '1.0', '', '1000000', '1000001', '9' * 19, '१', '3 ', '4\r'])
    ends = draw(st.sampled_from([right, numbers]))
    lines = [draw(names) + draw(st.sampled_from([' ', ' ', '\t', '  '])) + draw(ends)
             for _ in range(draw(st.integers(0, 4)))]
    lines += draw(st.lists(st.sampled_from(['', ' ', '\r', '\ufeff']), max_size=1))
    path.write_bytes(draw(damaged('\n'.join(lines).encode())))
    found = outcome([path], open_source, str(path))
    slow = slow_list(path.read_bytes())
    assert (found is REFUSED) == (slow is REFUSED), 'refused though right' if found is REFUSED else 'taken though wrong'
    assert found is REFUSED or list(zip(found.names, found.labels.tolist())) == slow
    return found


def slow_list(data):
    """The (path, label) pairs in the bytes of a list file, REFUSED where it is none."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return REFUSED
    pairs = []
    for line in text.removeprefix('\ufeff').split('\n'):
        if not line.strip():
            continue
        end = line.rstrip()
        gap = end.rfind('\t' if '\t' in line else ' ')
        name = end[:max(gap, 0)].strip()
        label = end[gap + 1:].strip()
        is_number = label.isascii() and label.isdigit() and len(label) <= 18
        if gap < 0 or not name or '\0' in name or not label or (is_number and int(label) > 10 ** 6):
            return REFUSED
        if not is_number and '\t' not in line:  # names of classes stand behind a tab
            return REFUSED
        pairs.append((name, int(label) if is_number else label))
    classes = sorted({label for _, label in pairs if isinstance(label, str)})
    if classes and any(isinstance(label, int) for _, label in pairs):
        return REFUSED
    return [(name, classes.index(label) if classes else label) for name, label in pairs] or REFUSED


def synonyms(draw, folder):
    path = folder / 'synonyms.json'
    codes = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, 4))
    value = {str(code): draw(st.lists(st.integers(0, codes - 1), min_size=1, max_size=5)) for code in range(codes)}
    kind = draw(st.sampled_from(['text', 'value', 'arbitrary']))
    if kind == 'value':
        value[str(draw(st.integers(0, 5)))] = draw(JSON | st.lists(NUMBERS, max_size=3))
    text = json.dumps(draw(JSON) if kind == 'arbitrary' else value).encode()
    path.write_bytes(draw(damaged(text)) if kind == 'text' else text)
    found = outcome([path], load_synonyms, path, codes, top_k)
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError):
        value = None
    rows = [value.get(str(code)) if isinstance(value, dict) else None for code in range(codes)]
    right = all(isinstance(row, list) and row and all(type(c) is int and 0 <= c < codes for c in row) for row in rows)
    assert (found is not REFUSED) == right
    if right:
        used = [row[:top_k] for row in rows]
        assert found[1].tolist() == [len(row) for row in used]
        assert found[0].tolist() == [row + [code] * (top_k - len(row)) for code, row in enumerate(used)]
    return found


def log(draw, folder):
    path = folder / 'log.txt'
    start = draw(st.integers(0, 4))
    lines = [json.dumps({'epoch': epoch, 'loss': 0.5}) for epoch in range(draw(st.integers(0, 4)))]
    if draw(st.booleans()):
        lines.insert(draw(st.integers(0, len(lines))), json.dumps(draw(JSON | st.builds(dict, epoch=JSON))))
    path.write_bytes(draw(damaged('\n'.join(lines).encode())))
    kept = []
    for line in path.read_bytes().split(b'\n') if start else []:
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and type(value.get('epoch', -1)) is int and value.get('epoch', -1) < start:
            kept.append(value)

    def read():
        RunLog(str(folder), start).write(epoch=start)
        return path.read_text()

    found = outcome([path], read)
    assert found is not REFUSED and found == ''.join(json.dumps(line) + '\n' for line in [*kept, {'epoch': start}])
    return found


# ---------------------------------------------------------------- tensors

def codebook(draw, folder):
    path = folder / 'codebook.ckpt'
    value = torch_file(draw, path, torch.arange(12.).reshape(4, 3), lambda: any_object(draw))
    found = outcome([path], load_codebook, path)
    if found is not REFUSED:
        assert found.dtype == torch.float32 and found.ndim == 2
        assert same(found, torch_says(path) if value is None else value)
    return found


def checkpoint(draw, folder):
    path = folder / 'checkpoint.pth'
    model = torch.nn.Linear(3, 2)
    right = {'model': torch.nn.Linear(3, 2).state_dict(), 'epoch': 1, 'args': argparse.Namespace(lr=.1)}

    def change():
        state = right['model']
        kind = draw(st.sampled_from(['whole', 'model', 'weight', 'more', 'metadata']))
        if kind == 'metadata':
            state._metadata = draw(JSON)
        elif kind in ('weight', 'more'):
            state['weight' if kind == 'weight' else draw(st.text(max_size=5) | NUMBERS)] = any_object(draw)
        if kind == 'whole':
            return any_object(draw)
        return {**right, 'model': any_object(draw) if kind == 'model' else state}

    def read():
        found = load_checkpoint(path)
        load_weights(model, found['model'], path)
        return found

    value = torch_file(draw, path, right, change)
    found = outcome([path], read)
    if found is not REFUSED:
        state = (torch_says(path) if value is None else value)['model']
        assert state.keys() == model.state_dict().keys()
        assert all(same(tensor, state[key]) for key, tensor in model.state_dict().items())
    return found


def tokenizer_state(draw):
    """A right state dict of a tiny patch tokenizer or ViT-VQGAN."""
    if draw(st.booleans()):
        return dict(PatchTokenizer(torch.rand(12), torch.rand(12, 4), torch.tensor(2.)).state_dict())
    size = Size(4, 1, 1, 3)
    return dict(ViTVQGAN(size, draw(st.sampled_from([None, size])), 5, 2, 8, 4).state_dict())


def from_safetensors(path):
    """The tensors of a .safetensors by its format: 8 bytes length, a JSON header, data."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], 'little')
    header = {key: value for key, value in json.loads(data[8:start]).items() if key != '__metadata__'}
    types = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'F64': torch.float64}
    return {key: torch.frombuffer(bytearray(data[start:][slice(*value['data_offsets'])]), dtype=types[value['dtype']])
            .reshape(value['shape']) for key, value in header.items() if value['dtype'] in types}


def tokenizer(draw, folder):
    found, value = read_weights(draw, folder, tokenizer_state(draw), load_tokenizer)
    if found is not REFUSED:
        check_tokenizer(found, value.get('state_dict', value))
    return found


def read_weights(draw, folder, right, read, nest=('state_dict',)):
    """What `read` makes of a state dict in a file that may be damaged, or hold something else; and what is in it.

    Args:
        right: the state dict.
        nest: names under which it may stand.
    """
    plain = draw(st.booleans())
    path = folder / ('weights.safetensors' if plain else 'weights.pt')

    def change():
        state = dict(right)
        kind = draw(st.sampled_from(['tensor', 'tensor', 'lost', 'more', 'whole', 'nested']))
        key = draw(st.sampled_from(sorted(state)))
        if kind == 'tensor':
            state[key] = any_tensor(draw)
        elif kind == 'lost':
            del state[key]
        elif kind == 'more':
            state[key.replace('0', draw(st.sampled_from('12x'))) + draw(st.sampled_from('xy'))] = any_tensor(draw)
        if kind == 'whole':
            return any_object(draw)
        return {draw(st.sampled_from(nest)): state} if kind == 'nested' else state

    if plain:
        path.write_bytes(draw(damaged(safetensors.torch.save(right))))
        value = None
    else:
        value = torch_file(draw, path, right, change)
    found = outcome([path], read, path)
    if found is not REFUSED:
        value = from_safetensors(path) if plain else torch_says(path) if value is None else value
    return found, value


def check_tokenizer(model, state):
    """It has the tensors of `state` and gives features of the shape it says."""
    assert all(same(tensor, state[key]) for key, tensor in model.state_dict().items()
               if key in state or 'pos_embedding' not in key)
    side = 2 * model.patch_size
    with torch.no_grad():
        assert model(torch.zeros(1, 3, side, side)).shape == (1, 4, model.embed_dim)


@functools.cache
def vqgan_state(family, decoder):
    return small_state(family, decoder=decoder)


def weights_of_vqgan(draw):
    """A right state dict of a tiny VQGAN of any family."""
    return dict(vqgan_state(draw(st.sampled_from(FAMILIES)), draw(st.sampled_from([False, False, False, True]))))


def inner(value):
    """The state dict in what a file of weights holds."""
    for name in ('state_dict', 'model'):
        if isinstance(value.get(name), dict):
            value = value[name]
    return value


def vqgan(draw, folder):
    """Weights of a VQGAN as tokenizer: it has the tensors of the file, and gives codes."""
    found, value = read_weights(draw, folder, weights_of_vqgan(draw), load_tokenizer, ('state_dict', 'model'))
    if found is not REFUSED:
        state = inner(value)
        expected = Counter(slow_digest(tensor) for key, tensor in state.items() if isinstance(tensor, torch.Tensor))
        assert not Counter(map(slow_digest, found.state_dict().values())) - expected
        with torch.no_grad():
            assert found.codes(torch.zeros(1, 3, 2 * SIDE, 2 * SIDE)).shape == (1, 4)
        check_table(found.codebook, state)
    return found


def slow_digest(tensor):
    return hashlib.sha256(repr(tuple(tensor.shape)).encode() + tensor.detach().float().contiguous().numpy().tobytes()
                          ).digest()


def check_table(found, state):
    """A codebook is the table in a state dict, as it is trained on; by numpy, in float64."""
    key, = [key for key in state if isinstance(key, str) and key.endswith(('quantize.embedding.weight',
                                                                           'quantize.embed.weight'))]
    prefix = key[:key.rindex('quantize.')]
    rows = state.get(f'{prefix}model_ema.{key[len(prefix):].replace(".", "")}', state[key]).double().numpy()
    if any(str(name).startswith(f'{prefix}encoder.conv_blocks.') for name in state):
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    rows = rows / np.sqrt(np.square(rows - rows.mean(0)).mean())
    found = found.numpy()
    assert np.allclose(found[:, :rows.shape[1]], rows, rtol=1e-4, atol=1e-5)
    more = found[:, rows.shape[1]:]
    assert more.shape[1] < 2 and (more == 2).all()
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / np.maximum(lengths, 1e-300)
    apart = np.abs(units[:, None] - units).max(2)[(rows[:, None] != rows).any(2)]  # rows that differ, in direction
    # where a damaged number dwarfs all others, their directions are lost in use, and either may be
    assert more.shape[1] or (lengths.all() and (apart > 1e-9).all())
    assert not more.shape[1] or (lengths < 1e-9).any() or (apart < 1e-5).any()


def table(draw, folder):
    """The table of a codebook in weights of another tokenizer."""
    right = {key: value for key, value in weights_of_vqgan(draw).items()
             if key.startswith(('quantize.', 'encoder.conv_in.', 'encoder.conv_blocks.0.res.0.norm1.'))}
    prefix = draw(st.sampled_from(['', '', 'vq.model.']))
    right = {prefix + key: value for key, value in right.items()}
    if draw(st.integers(0, 3)) == 0:
        key = next(key for key in right if key.endswith(('embedding.weight', 'embed.weight')))
        right[f'{prefix}model_ema.{key[len(prefix):].replace(".", "")}'] = torch.randn(
            6, 3, generator=torch.Generator().manual_seed(0))
    found, value = read_weights(draw, folder, right, load_codebook, ('state_dict', 'model'))
    if found is not REFUSED:
        assert found.dtype == torch.float32 and found.ndim == 2 and found.isfinite().all()
        if isinstance(value, torch.Tensor):
            assert same(found, value)
        else:
            check_table(found, inner(value))
    return found


# ---------------------------------------------------------------- images

def tar(draw, folder):
    path = folder / 'a.tar'
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        names = [f'{key}.{end}' for key in draw(st.sets(st.sampled_from(['a', 'b', '../c', '/d']), min_size=1))
                 for end in ('jpg', draw(st.sampled_from(['cls', 'json'])))]
        if draw(st.booleans()):
            names = draw(st.lists(st.sampled_from(names), max_size=3))
        for name in names:
            data = b'{"label": 3}' if name.endswith('json') else b'7'
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.type = draw(st.sampled_from([tarfile.REGTYPE] * 20 + [
                tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE]))
            archive.addfile(member, io.BytesIO(data))
    path.write_bytes(draw(damaged(file.getvalue())))
    found = outcome([path], open_source, str(path))
    if found is not REFUSED:
        images = slow_tar(path)
        assert [found.read(i) for i in range(len(found))] == images and len(found.labels) == len(images)
    return found


def slow_tar(path):
    """The image of each sample in a tar that has one, by tarfile."""
    members = []
    with tarfile.open(path, 'r:') as archive:
        for member in archive:
            folder, _, name = member.name.rpartition('/')
            if not member.isdir() and not is_hidden(member.name):
                stem, _, ending = name.partition('.')
                members.append(((folder, stem), ending.lower(), archive.extractfile(member).read()))
    images = []
    for _, sample in itertools.groupby(members, key=lambda member: member[0]):
        readable = [(ending, data) for _, ending, data in sample if f'.{ending}' in image_extensions()]
        usual = [(ending, data) for ending, data in readable if ending in ('jpg', 'jpeg', 'png', 'webp')]
        images += [data for _, data in (usual or readable)[:1]]
    return images


READERS = {'stream': stream, 'compact': compact, 'index': index, 'labels': labels, 'synonyms': synonyms,
           'codebook': codebook, 'table': table, 'checkpoint': checkpoint, 'tokenizer': tokenizer, 'vqgan': vqgan,
           'manifest': manifest, 'log': log,
           'cache': cache, 'tar': tar, 'list': listed, 'safetensors': foreign_safetensors, 'npz': foreign_npz,
           'npy': foreign_npy, 'lines': foreign_lines, 'parquet': foreign_parquet}


# ---------------------------------------------------------------- the program

def fuzz(name, inputs, folder):
    """Try a reader on `inputs` inputs; returns how many were right and how many refused."""
    counts = Counter(right=0, refused=0)

    @settings(max_examples=inputs, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
    @given(st.data())
    def one(data):
        counts['refused' if READERS[name](data.draw, folder) is REFUSED else 'right'] += 1

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's about old formats and complex numbers
        one()
    return dict(counts)


def parse_args(words=None):
    parser = Parser(__doc__)
    parser.add_argument('--inputs', type=integer(1), default=1200, help='to each reader')
    parser.add_argument('--readers', nargs='+', choices=READERS, default=list(READERS), help='which')
    return parser.parse_args(words)


def main(args):
    report = {}
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        for name in args.readers:
            with contextlib.redirect_stdout(io.StringIO()):  # notes of what a source leaves out
                report[name] = fuzz(name, args.inputs, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({'inputs': sum(sum(counts.values()) for counts in report.values()), **report,
                      'seconds': round(time.monotonic() - started), 'memory_mib': peak >> 10}))


if __name__ == '__main__':
    run(main, parse_args)
