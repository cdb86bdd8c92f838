"""Torch files from strangers: read without running code from them, and within the memory that their size allows.

`load_torch` is the door. torch.load(weights_only=True) runs no code, but trusts sizes: a file of a kilobyte can ask for
all memory. So a file is looked at before torch opens it (`check_torch`), and its tensors are added up afterwards
(`check_tensors`).
"""
import argparse
import hashlib
import os
import pickle
import pickletools
import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch

from fileio.files import MAX_TENSOR_RATIO, SMALL, download, is_address
from utils import InputError, first_line

MAX_NAME = 1000  # characters of a class name in a torch file
MAX_STRING = 1 << 14  # characters of a string
ROWS_AT_ONCE = 4096  # of an array, when it is digested
# What people put into checkpoints without harm, by torch's names for it.
HARMLESS = (r'numpy\.(_?core\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)|dtype|ndarray|dtypes\.\w+)|'
            r'(pathlib|datetime|decimal|fractions|uuid|collections)\.[\w.]+')
ENLARGING = {'hex', 'hexcodec', 'base64', 'base64codec', 'uu', 'uucodec', 'quopri', 'quopricodec', 'quotedprintable'}


def check_zip(file: zipfile.ZipFile, size: int) -> None:
    """RuntimeError unless the members of an open torch file of `size` bytes are whole and not compressed.

    Torch does not look at the checksums. It can be told to write none (0 then): those are not compared.
    """
    for member in file.infolist():
        if member.CRC == 0:
            del member.CRC  # zipfile then compares nothing
    if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
        raise RuntimeError('it is compressed, which no torch file is')
    if sum(member.file_size for member in file.infolist()) > size:
        raise RuntimeError('its members claim more bytes than it has')
    bad = file.testzip()
    if bad:
        raise RuntimeError(f'{bad} has another checksum than was written')


def check_pickle(file: bytes | BinaryIO) -> None:
    """RuntimeError for a pickle in which a few bytes become any number of them, or any number of seconds.

    Torch runs no code from it, but allows bytearray(n) and chains of encodings, and takes hours to refuse long names.
    """
    names = set()
    strings = set()
    for operation, argument, _ in pickletools.genops(file):
        if isinstance(argument, str):
            (names if operation.name == 'GLOBAL' else strings).add(argument)
    if any(len(name) > MAX_NAME for name in names) or any(len(argument) > MAX_STRING for argument in strings):
        raise RuntimeError('it holds a name too long')
    # bytearray(n) takes n bytes for a number of a few digits
    if any(name.endswith(' bytearray') for name in names):
        raise RuntimeError('it calls bytearray, which no tensor needs')
    # each of these encodings makes text longer, and a few in a row fill the memory
    if '_codecs encode' in names and ENLARGING & {re.sub('[^a-z0-9]', '', argument.lower()) for argument in strings}:
        raise RuntimeError('it calls encode, to make bytes longer')


def check_torch(path: str | Path) -> None:
    """Exceptions of any kind where a torch file should not be given to torch."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            check_zip(file, os.path.getsize(path))
            for member in file.infolist():
                if member.filename.lower().endswith('data.pkl'):
                    check_pickle(file.read(member))
    else:
        with open(path, 'rb') as file:
            for _ in range(5):  # before torch 1.6: magic number, protocol, system, the object, keys of its storages
                if file.peek(1):
                    check_pickle(file)


def check_tensors(value: Any, limit: int) -> None:
    """RuntimeError unless the tensors in nested containers are plain, and take `limit` bytes at most together.

    A tensor of a few bytes can claim any shape, with strides of 0, and the next copy of it would fill the memory.
    """
    todo = [value]
    seen = {}
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node  # kept alive, so that no other object gets its id
        if isinstance(node, torch.Tensor):
            if node.layout is not torch.strided or node.is_quantized or node.is_nested or node.device.type != 'cpu':
                raise RuntimeError('it holds a tensor that is not a plain one')
            limit -= node.numel() * node.element_size()  # not its storage: strides of 0 claim more than is stored
            if limit < 0:
                raise RuntimeError('its tensors claim more numbers than it has')
        elif isinstance(node, (dict, list, tuple, set)):
            todo += node.values() if isinstance(node, dict) else node
        elif hasattr(node, '__dict__'):
            todo.append(vars(node))


def load_torch(path: str | Path, what: str) -> Any:
    """torch.load on the CPU without running code from the file (`weights_only=True`).

    argparse.Namespace is allowed, because the published checkpoints hold one. `path` may be an address, see
    `files.download`; `what` is what errors call the file, as in 'a checkpoint'.

    Raises:
        InputError: when it is anything else, damaged, or would run code.
    """
    path = str(path)
    if is_address(path):
        with tempfile.TemporaryDirectory() as folder:
            return load_torch(download(path, folder), what)
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            check_torch(path)
            value = torch.load(path, map_location='cpu', weights_only=True)
            check_tensors(value, MAX_TENSOR_RATIO * os.path.getsize(path) + SMALL)
            return value
        except pickle.UnpicklingError as error:
            why = _refusal(str(error))
            raise InputError(f'{path}: refused as {what}: {why}') from None
        except OSError as error:
            raise InputError(f'{path}: cannot read {what} ({error.strerror or error})') from None
        except Exception as error:  # damage makes the unpickler raise nearly anything
            raise InputError(f'{path}: damaged or not {what} ({first_line(error)[:120]})') from None


def is_safetensors(path: str | Path) -> bool:
    """Whether a path or an address is of a .safetensors, by its ending; behind the '#' of an address is its digest."""
    return (str(path).partition('#')[0] if is_address(path) else str(path)).lower().endswith('.safetensors')


def load_safetensors(path: str | Path, what: str) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors on the CPU; `path` and `what` as of `load_torch`. Raises InputError."""
    path = str(path)
    if is_address(path):
        with tempfile.TemporaryDirectory() as folder:
            return load_safetensors(download(path, folder), what)
    try:
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise InputError(f'{path}: cannot read {what} ({error.strerror or error})') from None
    except safetensors.SafetensorError as error:
        raise InputError(f'{path}: damaged or no .safetensors file ({first_line(error)})') from None


def check_fields(value: dict[str, Any], checks: dict[str, Callable], path: str | Path, what: str) -> None:
    """InputError unless each field of a loaded dict that is there, and is not None, is of the kind it should be."""
    wrong = [name for name, kind in checks.items() if value.get(name) is not None and not kind(value[name])]
    if wrong:
        raise InputError(f'{path}: damaged or not {what} (its {", ".join(wrong)} cannot be)')


def _refusal(complaint: str) -> str:
    """What torch's refusal of a pickle means to the user."""
    match = re.search(r'GLOBAL (\S+)', complaint)
    if not match:
        return 'it is no torch file'
    name = match.group(1)
    if re.fullmatch(HARMLESS, name):
        return (f'it carries a value of {name}; only tensors and plain Python values are read: convert it before '
                'saving')
    return f'it carries {name}, which would run code when loaded'


# ---------------------------------------------------------------- what values are the same

def digest_of(value: Any) -> str:
    """SHA-256 of the values in nested containers of tensors, arrays and plain values, however they are stored."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        # as bytes, since numpy has no bfloat16
        array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(f'{value.dtype} {tuple(value.shape)}\n'.encode())
        digest.update(array)
    elif isinstance(value, np.ndarray):
        digest.update(f'{value.dtype} {value.shape}\n'.encode())
        for start in range(0, len(value), ROWS_AT_ONCE):  # a memory map need not be in memory as a whole
            digest.update(np.ascontiguousarray(value[start:start + ROWS_AT_ONCE]))
    elif isinstance(value, dict):
        for key, item in value.items():
            digest.update(f'{key!r}: '.encode())
            _update(digest, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _update(digest, item)
    else:
        digest.update(f'{value!r}\n'.encode())
