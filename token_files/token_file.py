"""Token files: one image set on disk as a grid of codes an image.

The published files (SeiT, arXiv 2303.11114, sec. 3):

    NAME.data.bin.gz    gzip of a stream of codes, see token_files/token_codecs.py
    NAME.index.npy.gz   gzip of a .npy with N + 1 integer offsets into the decompressed stream
    labels              text, one integer class a line

What is ours is said in a manifest beside the stream, NAME.json, as tokenize_images.py writes it: format, grid, class
names, checksums. A set without one is a published one. A set may also come as shards, each a whole set. The files of
the format 'compact', which has a model in place of an index, are in token_files/compact.py.
"""
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fileio.files import read_json, sha256
from fileio.labels import read_labels, write_labels
from token_files import compact
from token_files.compact import CPU, CompactStream, open_compact
from token_files.published import ByteStream, index_path, read_index, write_stream
from token_files.token_codecs import CODECS, ESCAPE, PUBLISHED, Codec, codec_for
from utils import InputError

FORMATS = (*CODECS, compact.NAME)
IMAGES_AT_ONCE = 4096  # counted at a time: bounds memory


@dataclass(frozen=True)
class TokenFile:
    """A token file whose manifest and index have been read and checked.

    Attributes:
        stream: path of NAME.data.bin.gz, or of a compact set's NAME.data.bin.
        manifest: the JSON object beside the stream, {} where there is none.
        content: what is in the stream and in the file that belongs to it.
    """
    stream: Path
    manifest: dict[str, Any]
    content: ByteStream | CompactStream

    def __len__(self) -> int:
        """Number of images."""
        return len(self.content)

    @property
    def format(self) -> str:
        """Name of the format."""
        return format_of(self.manifest)

    @property
    def files(self) -> tuple[Path, Path]:
        """The stream, and its index or its model, which shards share."""
        return self.content.files

    @property
    def manifest_path(self) -> Path:
        """Path of the manifest, whether there is one or not."""
        return manifest_path(self.stream)

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of the labels, where the manifest has them."""
        names = self.manifest.get('classes')
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
    stated = manifest.get('files', {}).get(path.name)
    if stated is None:
        raise InputError(f'{manifest_path}: says nothing of {path.name}: it or the manifest is of another set')
    actual = {'sha256': sha256(path), 'bytes': os.path.getsize(path)}
    if actual != stated:
        raise InputError(f'{path}: {actual["bytes"]} bytes, SHA-256 {actual["sha256"][:12]}..., where its manifest '
                         f'says {reprlib.repr(stated)}: changed or damaged, fetch or make it again')


# ---------------------------------------------------------------- opening

def manifest_path(token_file: str | Path) -> Path:
    """Path of the manifest that may lie beside a token file. Raises InputError, see `index_path`."""
    index_path(token_file)
    path = Path(token_file)
    return path.with_name(re.sub(r'data\.bin(\.gz)?', 'json', path.name))


def format_of(manifest: dict[str, Any]) -> str:
    """Name of the format that a manifest states; the published one where it states none."""
    return manifest.get('format', PUBLISHED.name)


def open_token_file(path: str | Path) -> TokenFile:
    """Read the manifest and the index of a token file; the stream is left for `decode`. Raises InputError."""
    path = Path(path)
    manifest = read_manifest(path)
    try:
        path.stat()
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    name = format_of(manifest)
    if name == compact.NAME:
        return TokenFile(path, manifest, open_compact(path, manifest, manifest_path(path)))
    if not manifest and compact.is_compact(path):
        raise InputError(f'{path}: is compact, and its manifest {manifest_path(path).name}, which names its model, is '
                         'not there; fetch it too')
    return TokenFile(path, manifest, ByteStream(path, read_index(index_path(path)), CODECS[name]))


def bytes_on_disk(files: Iterable[TokenFile]) -> int:
    """Size in bytes of streams and what belongs to them; a model that shards share counts once."""
    return sum(os.path.getsize(path) for path in {path for file in files for path in file.files})


def read_manifest(token_file: str | Path) -> dict[str, Any]:
    """The manifest of a token file, {} where there is none. Raises InputError unless it is of a known format."""
    path = manifest_path(token_file)
    if not os.path.exists(path):
        return {}
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise InputError(f'{path}: no JSON object; fetch or make the set again')
    name = format_of(manifest)
    if not isinstance(name, str) or name not in FORMATS:
        raise InputError(f'{path}: format {reprlib.repr(name)} is none of the token formats read here '
                         f'({", ".join(FORMATS)}); fetch or make the set again, or update this program')
    if not isinstance(manifest.get('files', {}), dict):
        raise InputError(f"{path}: 'files' is no object; fetch or make the set again")
    return manifest


def labels_of(file: TokenFile, path: Path) -> np.ndarray:
    """The labels of one token file, as many as it has images. Raises InputError."""
    if path.name in file.manifest.get('files', {}):  # else they are labels of the user's own
        file.check_checksums(path)
    labels = read_labels(path)
    if len(labels) != len(file):
        raise InputError(f'{path}: {len(labels)} labels for the {len(file)} images of {file.stream}')
    return labels


# ---------------------------------------------------------------- decoding

def decode(file: TokenFile, device: torch.device = CPU) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first, codes) for one run of images after another: codes (m, n) uint16, n the same square for all.

    Args:
        file: that is decoded.
        device: a GPU decodes compact files faster.

    Raises:
        InputError: for a damaged file, or one that is not as its manifest says.
    """
    for first, codes in file.content.decode(device):
        if first == 0:
            _check_manifest(file, codes.shape[1])
        yield first, codes


def _check_manifest(file: TokenFile, n: int) -> None:
    """InputError where the manifest cannot be of a stream whose first image has n codes."""
    for key, value in (('images', len(file)), ('grid', math.isqrt(n))):
        stated = file.manifest.get(key, value)
        if stated != value:
            raise InputError(f'{file.manifest_path}: says {key} {reprlib.repr(stated)}, but {file.stream} has '
                             f'{value}: the manifest is of another set, or the set is damaged')


# ---------------------------------------------------------------- writing

def write_tokens(token_file: str | Path, label_file: str | Path, codes: np.ndarray | Iterable[np.ndarray],
                 labels: Iterable[int], codec: Codec = PUBLISHED) -> None:
    """Write the three files of a set, each atomically; a codec other than PUBLISHED needs a manifest that names it.

    Args:
        token_file: path of the stream.
        label_file: path of the labels.
        codes: (N, n) integers, or an iterable of such runs of images, for what does not fit in memory.
        labels: (N,) integers.
        codec: of the stream.

    Raises:
        ValueError: for a code that the codec cannot hold.
        InputError: for a file that cannot be written.
    """
    write_stream(token_file, codes, codec)
    write_labels(label_file, labels)


def files_of_manifest(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What a manifest says of files, by name: bytes and SHA-256."""
    return {path.name: {'bytes': path.stat().st_size, 'sha256': sha256(path)} for path in paths}


def manifest_text(manifest: dict[str, Any]) -> str:
    """JSON with a key a line."""
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


def stated_source_bytes(files: Sequence[TokenFile]) -> int | None:
    """Bytes of the images that tokens were made from, where all manifests state them, else None."""
    stated = [file.manifest.get('source_bytes') for file in files]
    return sum(stated) if all(type(value) is int for value in stated) else None


def bytes_per_image(files: Sequence[TokenFile], shape: tuple[int, int], counts: np.ndarray,
                    source_bytes: int | None = None) -> dict[str, float]:
    """Bytes an image in several ways.

    Args:
        files: the token files.
        shape: (N, n) of the codes.
        counts: (K,) uses of each code.
        source_bytes: of the source images; None for what the manifests say, if anything.

    Returns:
        `raw` is the uncompressed stream of bytes, `stored` the files, `fixed` log2(K) bits a code, `entropy` the fewest
        a coder can reach that sees each code on its own; `source`, where it is known, the source images.
    """
    images, n = shape
    size = {'raw': raw_bytes(counts) / images,
            'stored': bytes_on_disk(files) / images,
            'fixed': n * math.log2(len(counts)) / 8,
            'entropy': n * entropy_bits(counts) / 8}
    if source_bytes is None:
        source_bytes = stated_source_bytes(files)
    if source_bytes is not None:
        size['source'] = source_bytes / images
    return {name: round(value, 2) for name, value in size.items()}


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy in bits of one code drawn by counts (K,): from 0 (one code only) to log2(K) (all equally frequent)."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.log2(1 / shares) @ shares)


def raw_bytes(counts: np.ndarray) -> int:
    """Bytes of the codes with `counts` (K,) uses as a stream of bytes, see token_files/token_codecs.py."""
    if codec_for(len(counts)).name == 'uint16-le':
        return 2 * int(counts.sum())
    return int(counts.sum() + counts[ESCAPE:].sum())
