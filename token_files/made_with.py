"""What token sets were made with, as their manifests state it, against the files that a program is given.

Codes mean something only in their own codebook, and a wrong one of the same size goes unnoticed: a model trains on it,
badly. A manifest states the SHA-256 of the tokenizer's file, and of the codebook's file and values, and where the
tokenizer is. A set without a manifest states nothing, and is compared with nothing. A checkpoint states the same of the
tokens that it was trained on (`made_with`), so that whoever has it finds codebook and tokenizer again (`file_of`).
"""
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch

from fileio.files import download, identity, is_address
from fileio.hub import local_path
from fileio.torch_files import digest_of, is_safetensors
from token_files.codebook import load_codebook
from token_files.codebook_sources import is_formula
from token_files.token_file import TokenFile
from utils import InputError, print0

CONVERTED = 'converted_from'  # in the metadata of a .safetensors and in manifests: SHA-256 of the pickled tokenizer
SHOWN = 12  # hexadecimal digits of a SHA-256 in messages


def identity_of_tokenizer(path: str) -> dict[str, str]:
    """Name and SHA-256 of a tokenizer's file, and of the one that it was converted from. Raises InputError."""
    path = local_path(path)
    if is_address(path):  # of the web
        with tempfile.TemporaryDirectory() as folder:
            return identity_of_tokenizer(download(path, folder))
    entry = identity(path)
    if is_safetensors(path):
        try:
            with safetensors.safe_open(path, 'pt') as file:
                converted = (file.metadata() or {}).get(CONVERTED)
        except (OSError, safetensors.SafetensorError):
            converted = None  # it is said where the tokenizer is read
        if converted:
            entry[CONVERTED] = converted
    return entry


def identity_of_codebook(path: str | Path) -> dict[str, str]:
    """Name and SHA-256 of a codebook's file; a formula has no file, and is its own name. Raises InputError."""
    if is_formula(path):
        return {'file': str(path), 'sha256': hashlib.sha256(str(path).encode()).hexdigest()}
    return identity(path)


def entry_of(manifest: dict[str, Any], name: str) -> dict[str, Any] | None:
    """What a manifest states of its 'tokenizer' or 'codebook', or None."""
    entry = manifest.get(name)
    return entry if isinstance(entry, dict) and isinstance(entry.get('sha256'), str) and entry['sha256'] else None


def digest_of_entry(entry: dict[str, Any]) -> str:
    """The SHA-256 that stands for a tokenizer, whether it was converted or not."""
    return entry.get(CONVERTED) or entry['sha256']


def named(entry: dict[str, Any]) -> str:
    """A file of a manifest, for messages."""
    return f'{str(entry.get("file"))[:80]} (SHA-256 {entry["sha256"][:SHOWN]}...)'


def entry_of_codebook(codebook: torch.Tensor, path: str) -> dict[str, str]:
    """What a manifest is to state of a codebook (K, d) float32 in the file `path`."""
    return identity_of_codebook(path) | {'values_sha256': digest_of(codebook)}


def tokenizer_of(files: Sequence[TokenFile]) -> dict[str, Any] | None:
    """The tokenizer that shards or sets have in common, None where no manifest states one.

    Raises:
        InputError: where two state different ones.
    """
    first = _first_with_tokenizer(files)
    return first[1] if first else None


def _first_with_tokenizer(files: Sequence[TokenFile]) -> tuple[TokenFile, dict[str, Any]] | None:
    """The first file whose manifest states a tokenizer, and that entry; see `tokenizer_of`."""
    first = None
    for file in files:
        entry = entry_of(file.manifest, 'tokenizer')
        if first and entry and digest_of_entry(entry) != digest_of_entry(first[1]):
            raise InputError(f'{file.stream}: was made with the tokenizer {named(entry)}, but {first[0].stream} with '
                             f'{named(first[1])}: their codes mean different things; give sets of one tokenizer')
        if entry and not first:
            first = file, entry
    return first


def is_codebook_of(entry: dict[str, Any], codebook: torch.Tensor, path: str) -> bool:
    """Whether an entry of a manifest is of the codebook (K, d) float32 of the file `path`."""
    if isinstance(entry.get('values_sha256'), str):
        return entry['values_sha256'] == digest_of(codebook)
    return entry['sha256'] == identity_of_codebook(path)['sha256']  # manifests of before state the file alone


def check_codebook_of(entry: dict[str, Any] | None, owner: str, codebook: torch.Tensor, path: str) -> None:
    """InputError where an entry of a manifest is of another codebook than (K, d) of the file `path`.

    Equal values are enough, where the manifest states those: a codebook may be saved again.
    """
    if entry and not is_codebook_of(entry, codebook, path):
        raise InputError(f'{owner}: was made with the codebook {named(entry)}, and {path} is another: give that one to '
                         '--codebook-path')


def is_rotated(file: TokenFile) -> bool:
    """Whether a set was made of images turned by their EXIF orientation."""
    return file.manifest.get('exif_rotate') is True


def note_rotation(files: Sequence[TokenFile], exif_rotate: bool) -> None:
    """Say where images are turned by their EXIF orientation, and those of the token sets were not, or the reverse."""
    for file in files:
        if file.manifest.get('image_size') and is_rotated(file) != exif_rotate:
            print0(f'note: images are read {"with" if exif_rotate else "without"} --exif-rotate; the tokens of '
                   f'{file.stream} were made otherwise')
            return


def check_made_with(files: Sequence[TokenFile], codebook: torch.Tensor, codebook_path: str,
                    tokenizer_path: str = '') -> None:
    """InputError unless token sets were made with one tokenizer, and with what is given, where their manifests say it.

    Args:
        files: of all sets that are used together.
        codebook, codebook_path: (K, d) float32, and its file.
        tokenizer_path: a tokenizer that is used beside them, or ''.
    """
    for file in files:
        check_codebook_of(entry_of(file.manifest, 'codebook'), str(file.stream), codebook, codebook_path)
    entry = tokenizer_of(files)
    if entry and tokenizer_path and digest_of_entry(identity_of_tokenizer(tokenizer_path)) != digest_of_entry(entry):
        raise InputError(f'{files[0].stream}: was made with the tokenizer {named(entry)}, and {tokenizer_path} is '
                         'another: give that one to --tokenizer-path')


# ---------------------------------------------------------------- what a checkpoint states of its tokens

def made_with(files: Sequence[TokenFile], codebook: torch.Tensor, codebook_path: str) -> dict[str, Any]:
    """What checkpoints are to state of the tokens that a model reads: codebook, and tokenizer and size where known.

    Args:
        files: the token sets of the run.
        codebook, codebook_path: (K, d) float32, and its file.

    Returns:
        'codebook' and 'tokenizer', each with name, SHA-256 and path of the file ('' where it is not known), and
        'image_size', to which images were resized.
    """
    entries = {'codebook': entry_of_codebook(codebook, codebook_path) | {'path': str(codebook_path)}}
    first = _first_with_tokenizer(files)
    if first:
        file, tokenizer = first
        stated = {key: tokenizer[key] for key in ('file', 'sha256', CONVERTED) if key in tokenizer}
        entries['tokenizer'] = stated | {'path': find(tokenizer, file.stream.parent)}
    sizes = [file.manifest['image_size'] for file in files if type(file.manifest.get('image_size')) is int]
    return entries | ({'image_size': sizes[0]} if sizes else {})


def seen_from(entries: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """Entries whose paths start from the folder of the file that is to hold them: so the whole can be moved."""
    def moved(path: str) -> str:
        if not path or is_address(path) or is_formula(path):
            return path
        return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    return {name: {**entry, 'path': moved(entry['path'])} if isinstance(entry, dict) and 'path' in entry else entry
            for name, entry in entries.items()}


def find(entry: dict[str, Any], folder: str | Path) -> str:
    """The file of an entry that is held in a folder: where its path says, else of its name in there; '' if neither."""
    path, name = (entry.get(key) if isinstance(entry.get(key), str) else '' for key in ('path', 'file'))
    for candidate in (path, name):
        if is_formula(candidate):
            return candidate
    if is_address(path):
        return path
    for candidate in filter(None, (path, os.path.basename(name))):
        candidate = os.path.normpath(os.path.join(folder, candidate))
        if os.path.isfile(candidate) and _is_file_of(entry, candidate):
            return candidate
    return ''


def _is_file_of(entry: dict[str, Any], path: str) -> bool:
    if 'values_sha256' in entry:  # a codebook: its values count
        return is_codebook_of(entry, load_codebook(path), path)
    return digest_of_entry(identity_of_tokenizer(path)) == digest_of_entry(entry)


def file_of(checkpoint: dict[str, Any], name: str, path: str, flag: str, default: str = '') -> str:
    """The 'codebook' or 'tokenizer' that a checkpoint was trained with; '' where it states none.

    Args:
        checkpoint, path: of the model.
        name: of the entry.
        flag: with which the user can name the file.
        default: a path that is tried last.

    Raises:
        InputError: where it states one that is not there.
    """
    entry = (checkpoint.get('made_with') or {}).get(name)
    if not isinstance(entry, dict) or not isinstance(entry.get('sha256'), str):
        return ''
    folder = '' if is_address(path) else os.path.dirname(os.path.realpath(path))
    found = find(entry, folder)
    if not found:
        if default and os.path.isfile(default) and _is_file_of(entry, default):
            return default
        stated = entry.get('path') or entry.get('file')
        where = f'which is not at {stated} from there, nor beside it' if stated else 'and does not say where it is'
        if stated and os.path.isfile(os.path.join(folder, stated)):
            where = f'and {stated} from there is another file by now'
        raise InputError(f'{path}: was trained with the {name} {named(entry)}, {where}: give it to {flag}')
    if is_address(found) or is_formula(found):
        return found
    return os.path.relpath(found) if len(os.path.relpath(found)) < len(found) else found
