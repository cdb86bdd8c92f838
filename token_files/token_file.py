"""Token sets: one split of images, each a square grid of codes, and their labels. Whatever the format of the files.

The published files (SeiT, arXiv 2303.11114, sec. 3), see published.py:

    NAME.data.bin.gz    the codes
    NAME.index.npy.gz   where the codes of each image begin
    labels              text, one integer class a line

The compact format has a model in place of the index, see compact.py; sets of other projects are read, and not written,
see foreign.py. What this project adds is said in a manifest
beside the stream, NAME.json, as tokenize_images.py writes it: format, grid, class names, checksums. A set without one
is a published one. A set may also come as shards, each a whole set.

`open_token_file` reads what is small (manifest, index or model) and checks it, `decode` then yields the codes run after
run, and `write_set` writes a set from such runs. They ask the manifest, or whoever writes, which format it is; no other
module needs to know what formats there are.
"""
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fileio.files import expand_files, read_json, sha256, write_text
from fileio.hub import fetch_beside, is_on_hub, local_path
from fileio.labels import read_labels, write_labels
from token_files import compact, foreign, published
from utils import CPU, InputError

FORMATS = 'published', 'compact'  # as the flag --format names them
NAMES = *published.NAMES, *compact.NAMES  # as a manifest's "format" names them
MAX_CODES = 1 << 16  # rows of a codebook, at most: a decoded code is a uint16
IMAGES_AT_ONCE = 4096  # counted at a time: bounds memory


@dataclass(frozen=True)
class TokenFile:
    """A token file whose manifest and index have been read and checked.

    Attributes:
        stream: path of NAME.data.bin.gz, or of a compact set's NAME.data.bin, or of a set of others.
        manifest: the JSON object beside the stream, {} where there is none.
        content: what is in the stream and in the file that belongs to it.
    """
    stream: Path
    manifest: dict[str, Any]
    content: published.Stream | compact.Stream | foreign.ForeignSet

    def __len__(self) -> int:
        """Number of images."""
        return len(self.content)

    @property
    def format(self) -> str:
        """Name of the format."""
        return self.content.format if self.is_foreign else format_of(self.manifest)

    @property
    def is_foreign(self) -> bool:
        """Whether the set is one of others, with labels of its own, views, and codes that may be mapped."""
        return isinstance(self.content, foreign.ForeignSet)

    @property
    def name(self) -> str:
        """Path of the stream, with the names behind '#' of a set of others: for messages, and to tell sets apart."""
        return f'{self.stream}{self.content.part}' if self.is_foreign else str(self.stream)

    @property
    def views(self) -> int:
        """Rows of one image, which follow each other, as far as the files say so."""
        return self.content.views if self.is_foreign else 1

    @property
    def files(self) -> tuple[Path, ...]:
        """The stream, and its index or its model, which shards share."""
        return self.content.files

    @property
    def manifest_path(self) -> Path:
        """Path of the manifest, whether there is one or not."""
        return manifest_path(self.stream)

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of the labels, where the manifest has them."""
        names = self.content.classes if self.is_foreign else self.manifest.get('classes')
        return names if isinstance(names, list) else None

    def check_checksums(self, path: Path) -> None:
        """InputError unless `path`, a file of this set, has the size and SHA-256 that the manifest states."""
        check_checksums(path, self.manifest, self.manifest_path)

    def check_content(self) -> None:
        """InputError unless stream and what belongs to it are as the manifest states, where it has checksums."""
        if 'files' in self.manifest:
            for path in self.files:
                self.check_checksums(path)


def check_checksums(path: Path, manifest: dict[str, Any], manifest_path: Path) -> None:
    """InputError unless a file of a set has the size and SHA-256 that the manifest of the set states."""
    recorded = manifest.get('files', {}).get(path.name)
    if recorded is None:
        raise InputError(f'{manifest_path}: says nothing of {path.name}: it or the manifest is of another set')
    actual = {'sha256': sha256(path), 'bytes': os.path.getsize(path)}
    if actual != recorded:
        raise InputError(f'{path}: {actual["bytes"]} bytes, SHA-256 {actual["sha256"][:12]}..., where its manifest '
                         f'says {reprlib.repr(recorded)}: changed or damaged, fetch or make it again')


# ---------------------------------------------------------------- formats

def _module_of(name: str) -> ModuleType:
    """The module of a format, by its name in --format or in a manifest."""
    return compact if name in compact.NAMES else published


def format_for(name: str, codebook_size: int) -> str:
    """What a manifest calls the format `name` of --format, for codes of a codebook. Raises InputError for too many."""
    return _module_of(name).format_for(codebook_size)


def largest_grid(name: str) -> int:
    """Codes on a side, at most, in a format of --format."""
    return _module_of(name).MAX_GRID


def stream_ending(name: str) -> str:
    """How the name of a stream ends in a format of --format."""
    return _module_of(name).ENDING


def paths_beside(token_file: str | Path, name: str) -> tuple[Path, Path]:
    """Paths of the index or model, and of the manifest, that go with a stream in a format of --format."""
    return _module_of(name).companion_path(token_file), manifest_path(token_file)


# ---------------------------------------------------------------- opening

def expand_token_files(spec: str) -> list[Path]:
    """The token files that a path, a glob or a comma-separated list names, each with the names behind '#', if any.

    Raises InputError when a glob matches nothing.
    """
    if '#' not in str(spec) or os.path.exists(spec):
        return expand_files(spec)
    paths = []
    for item in filter(None, map(str.strip, str(spec).split(','))):
        name, part = foreign.split_name(item)
        paths += [Path(f'{path}#{part}') if part else path for path in expand_files(name)]
    return paths


def holds_foreign(spec: str) -> bool:
    """Whether a set of other projects is among the files that a path, a glob or a list names; False if none is there.

    Nothing is fetched for it: the ending of an address tells.
    """
    items = list(map(str.strip, str(spec).split(',')))
    if any(map(is_on_hub, items)):
        return any(map(foreign.is_foreign, items))
    try:
        return any(map(foreign.is_foreign, expand_token_files(spec)))
    except InputError:  # it is said where the set is read
        return False


def open_token_files(spec: str) -> list[TokenFile]:
    """`open_token_file` of each file that `expand_token_files` finds. Raises InputError."""
    return [open_token_file(path) for path in expand_token_files(spec)]


def manifest_path(token_file: str | Path) -> Path:
    """Path of the manifest that may lie beside a token file. Raises InputError for a name without 'data.bin'."""
    published.companion_path(token_file)
    path = Path(token_file)
    return path.with_name(re.sub(r'data\.bin(\.gz)?', 'json', path.name))


def format_of(manifest: dict[str, Any]) -> str:
    """Name of the format that a manifest states; the published one where it states none."""
    return manifest.get('format', published.PUBLISHED.name)


def open_token_file(path: str | Path) -> TokenFile:
    """Read the manifest and the index of a token file; the stream is left for `decode`. Raises InputError."""
    path = Path(local_path(path))
    if foreign.is_foreign(path):
        content = foreign.open_set(path)
        return TokenFile(content.path, {}, content)
    manifest = read_manifest(path)
    try:
        path.stat()
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    if not manifest and compact.is_compact(path):
        raise InputError(f'{path}: is compact, and its manifest {manifest_path(path).name}, which names its model, is '
                         'not there; fetch it too')
    content = _module_of(format_of(manifest)).open_stream(path, manifest, manifest_path(path))
    return TokenFile(path, manifest, content)


def bytes_on_disk(files: Iterable[TokenFile]) -> int:
    """Size in bytes of streams and what belongs to them; a model that shards share counts once."""
    return sum(_size_of(path) for path in {path for file in files for path in file.files})


def _size_of(path: Path) -> int:
    """Size in bytes of a file, or of the files in a folder."""
    if not path.is_dir():
        return os.path.getsize(path)
    with os.scandir(path) as entries:
        return sum(entry.stat().st_size for entry in entries)


def read_manifest(token_file: str | Path) -> dict[str, Any]:
    """The manifest of a token file, {} where there is none. Raises InputError unless it is of a known format."""
    path = manifest_path(token_file)
    fetch_beside(path)
    if not os.path.exists(path):
        return {}
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise InputError(f'{path}: no JSON object; fetch or make the set again')
    name = format_of(manifest)
    if not isinstance(name, str) or name not in NAMES:
        raise InputError(f'{path}: format {reprlib.repr(name)} is none of the token formats read here '
                         f'({", ".join(NAMES)}); fetch or make the set again, or update this program')
    if not isinstance(manifest.get('files', {}), dict):
        raise InputError(f"{path}: 'files' is no object; fetch or make the set again")
    return manifest


def labels_of(file: TokenFile, path: Path | None) -> np.ndarray:
    """The labels (N,) int64 of one token file, from a file of labels, or with None its own. Raises InputError."""
    if path is None:
        if not file.is_foreign:
            raise InputError(f'{file.stream}: its labels are in a file of their own; name that')
        return file.content.labels()
    if path.name in file.manifest.get('files', {}):  # else they are labels that the user made
        file.check_checksums(path)
    labels = read_labels(path)
    if len(labels) != len(file):
        raise InputError(f'{path}: {len(labels)} labels for the {len(file)} images of {file.stream}')
    return labels


# ---------------------------------------------------------------- decoding

def decode(file: TokenFile, device: torch.device = CPU) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first, codes) for one run of images after another: codes (m, n) uint16, n the same square for all.

    A GPU as `device` decodes compact files faster.

    Raises:
        InputError: for a damaged file, or one that is not as its manifest says.
    """
    for first, codes in file.content.decode(device):
        if first == 0:  # the grid is known from the first image on
            _check_manifest(file, codes.shape[1])
        yield first, codes


def _check_manifest(file: TokenFile, n: int) -> None:
    """InputError where the manifest cannot be of a stream whose first image has n codes."""
    for key, value in (('images', len(file)), ('grid', math.isqrt(n))):
        recorded = file.manifest.get(key, value)
        if recorded != value:
            raise InputError(f'{file.manifest_path}: says {key} {reprlib.repr(recorded)}, but {file.stream} has '
                             f'{value}: the manifest is of another set, or the set is damaged')


# ---------------------------------------------------------------- writing

def write_model(token_file: str | Path, format_name: str, codes: Iterable[np.ndarray], images: int) -> dict[str, str]:
    """Write what all shards of a set need, where their format has that: called once, before `write_set`.

    Args:
        token_file: path of the stream, or of the first shard.
        format_name: as the manifest will state it.
        codes: of all shards: (m, n) integers, run after run; `images` rows together.
        images: more than 0.

    Returns:
        What the manifests of all shards say of it: {'model': its name}, or {}.

    Raises:
        InputError: for a file that cannot be written.
    """
    return _module_of(format_name).write_model(Path(token_file), codes, images)


def write_set(token_file: str | Path, codes: Iterable[np.ndarray], images: int, label_file: str | Path | None = None,
              labels: Iterable[int] | None = None, manifest: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """Write the files of a set, or of one of its shards, each atomically and the manifest last.

    Args:
        token_file: path of the stream.
        codes: (m, n) integers, run after run, since all need not fit into memory; `images` rows together.
        images: more than 0.
        label_file, labels: (N,) integers and where they go; None for a set without labels.
        manifest: 'format', what `write_model` returned, and what else it is to say. What it leaves out is added: number
            of images, grid, codes that occur, and the files with their checksums. None or {} writes a published set
            without a manifest.

    Returns:
        The stream, and its index or model.

    Raises:
        ValueError: for a code that the format cannot hold.
        InputError: for a file that cannot be written.
    """
    path = Path(token_file)
    manifest = manifest or {}
    used = np.zeros(MAX_CODES, bool)
    grid = 0

    def count_used() -> Iterator[np.ndarray]:
        nonlocal grid
        for run in codes:
            yield run  # the format refuses what it cannot hold, before that is counted
            used[run] = True
            grid = math.isqrt(run.shape[1])

    # The manifest is last: it has the checksums of the other files, and a set that was killed on the way has none.
    companion = _module_of(format_of(manifest)).write_stream(path, count_used(), images, manifest)
    files = [path, companion]
    if labels is not None:
        write_labels(label_file, labels)
        files.append(Path(label_file))
    if manifest:
        manifest = {'images': images, 'grid': grid, 'codes_used': int(used.sum())} | manifest
        file_entries = manifest.get('files', {}) | files_of_manifest(files)
        write_text(manifest_path(path), manifest_text(manifest | {'files': file_entries}))
    return path, companion


def files_of_manifest(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What a manifest says of files, by name: bytes and SHA-256."""
    return {path.name: {'bytes': path.stat().st_size, 'sha256': sha256(path)} for path in paths}


def manifest_text(manifest: dict[str, Any]) -> str:
    """JSON with a key a line."""
    # what people look for comes first, checksums and long lists last
    first = ['format', 'images', 'grid', 'codes', 'codes_used']
    keys = [key for key in first if key in manifest] + [key for key in manifest if key not in first]
    return '{\n' + ',\n'.join(f' {json.dumps(key)}: {json.dumps(manifest[key])}' for key in keys) + '\n}\n'


def count_codes(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """Uses of each code, (K,) int64, in codes (N, n) uint16. Raises ValueError for a code beyond the codebook."""
    counts = np.zeros(1 << 16, np.int64)
    for start in range(0, len(codes), IMAGES_AT_ONCE):
        counts += np.bincount(codes[start:start + IMAGES_AT_ONCE].ravel(), minlength=len(counts))
    if counts[codebook_size:].any():
        raise ValueError(f'holds code {counts.nonzero()[0].max()}, but the codebook has {codebook_size} rows')
    return counts[:codebook_size]


def count_uses(codes: np.ndarray, codebook_size: int, path: str) -> np.ndarray:
    """`count_codes` of a token set `path` of the user's. Raises InputError for a code beyond the codebook."""
    try:
        return count_codes(codes, codebook_size)
    except ValueError as error:
        raise InputError(f'{path}: {error}; give the codebook the tokens were made with') from None


def source_bytes_of(files: Sequence[TokenFile]) -> int | None:
    """Bytes of the images that tokens were made from, where all manifests state them, else None."""
    recorded = [file.manifest.get('source_bytes') for file in files]
    return sum(recorded) if all(type(value) is int for value in recorded) else None


def bytes_per_image(files: Sequence[TokenFile], shape: tuple[int, int], counts: np.ndarray,
                    source_bytes: int | None = None) -> dict[str, float]:
    """Bytes an image in several ways.

    Args:
        files: the shards of one set.
        shape: (N, n) of the codes.
        counts: (K,) uses of each code.
        source_bytes: of the source images; None for what the manifests say, if anything.

    Returns:
        `raw` is the uncompressed stream of bytes, `stored` the files, `fixed` log2(K) bits a code, `entropy` the fewest
        a coder can reach that sees each code on its own; `source`, where it is known, the source images.
    """
    images, n = shape
    size = {'raw': published.raw_bytes(counts) / images,
            'stored': bytes_on_disk(files) / images,
            'fixed': n * math.log2(len(counts)) / 8,
            'entropy': n * entropy_bits(counts) / 8}
    if source_bytes is None:
        source_bytes = source_bytes_of(files)
    if source_bytes is not None:
        size['source'] = source_bytes / images
    return {name: round(value, 2) for name, value in size.items()}


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy in bits of one code drawn by counts (K,): from 0 (one code only) to log2(K) (all equally frequent)."""
    frequencies = counts[counts > 0] / counts.sum()
    return float(np.log2(1 / frequencies) @ frequencies)
