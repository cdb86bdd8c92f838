"""Token codecs: codes <-> the bytes of a token stream. Pure functions on arrays; files are in token_file.py.

    escaped-bytes   the published format (SeiT, arXiv 2303.11114, sec. 3): code c < 255 is byte c; c >= 255 is byte 255,
                    then byte c - 255. The largest code is therefore 509.
    uint16-le       ours, for larger codebooks: each code is two bytes, little-endian.

Nothing separates the images in a stream; an index beside it holds where each begins. The third format, 'compact', is a
stream of words by a model, see token_files/compact.py.
"""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from utils import InputError

ESCAPE = 255


class Codec(NamedTuple):
    """One way to store codes.

    Attributes:
        name: as a manifest's "format" states it.
        largest_code: that it can hold.
        encode: codes (N, n) integers, one row an image -> (stream (bytes,) uint8, index (N + 1,) int64).
        decode: stream (bytes,) uint8 of whole images, their offsets (m + 1,) int64 from 0 -> (codes, one image after
            the other, (sum,) uint16; codes of each image (m,) int64). Raises ValueError(image, complaint).
    """
    name: str
    largest_code: int
    encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    decode: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


# ---------------------------------------------------------------- escaped bytes

def encode_escaped(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Codec.encode`; codes in [0, 509]."""
    escaped = codes >= ESCAPE
    index = np.concatenate([[0], np.cumsum(codes.shape[1] + escaped.sum(1))]).astype(np.int64)
    flat = codes.ravel()
    escaped = escaped.ravel()
    position = np.arange(flat.size) + np.cumsum(escaped)  # of each code's own byte
    stream = np.full(index[-1], ESCAPE, np.uint8)
    stream[position] = flat - ESCAPE * escaped
    return stream, index


def decode_escaped(stream: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Codec.decode`. An escape byte without a code byte after it, within its image, is refused."""
    is_escape = stream == ESCAPE
    follows_escape = np.empty_like(is_escape)
    follows_escape[:1] = False
    follows_escape[1:] = is_escape[:-1]
    dangling = is_escape & follows_escape
    dangling[offsets[1:] - 1] |= is_escape[offsets[1:] - 1]  # an escape as an image's last byte
    if dangling.any():
        image = int(np.searchsorted(offsets, np.argmax(dangling), side='right')) - 1
        raise ValueError(image, 'has a dangling escape byte')
    codes = stream.astype(np.uint16) + follows_escape * np.uint16(ESCAPE)
    is_code = ~is_escape
    lengths = np.add.reduceat(is_code, offsets[:-1], dtype=np.int64)
    return codes[np.flatnonzero(is_code)], lengths  # places: four times as fast as a mask


# ---------------------------------------------------------------- 16 bits

def encode_uint16(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Codec.encode`; codes in [0, 65535]."""
    index = np.arange(len(codes) + 1, dtype=np.int64) * 2 * codes.shape[1]
    return codes.astype('<u2').view(np.uint8).ravel(), index


def decode_uint16(stream: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Codec.decode`. An image with half a code is refused."""
    odd = offsets[1:] % 2 != 0
    if odd.any():
        raise ValueError(int(np.argmax(odd)), 'has an odd number of bytes')
    return stream.view('<u2'), np.diff(offsets) // 2


# ---------------------------------------------------------------- which there are

CODECS = {codec.name: codec for codec in (
    Codec('escaped-bytes', 2 * ESCAPE - 1, encode_escaped, decode_escaped),
    Codec('uint16-le', 0xffff, encode_uint16, decode_uint16),
)}
PUBLISHED = CODECS['escaped-bytes']
MAX_CODES = max(codec.largest_code for codec in CODECS.values()) + 1


def codec_for(codebook_size: int) -> Codec:
    """The codec for codes of a codebook: the first that can hold them. Raises InputError where none can."""
    for codec in CODECS.values():
        if codebook_size <= codec.largest_code + 1:
            return codec
    raise InputError(f'{codebook_size} codes are more than token files hold ({0xffff + 1})')


def encode(codec: Codec, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(stream, index) of codes (N, n), see `Codec.encode`. Raises ValueError for a code the codec cannot hold."""
    codes = np.asarray(codes)
    if codes.size and not 0 <= codes.min() <= codes.max() <= codec.largest_code:
        raise ValueError(f'codes run from {codes.min()} to {codes.max()}; the format {codec.name} holds 0 to '
                         f'{codec.largest_code}')
    return codec.encode(codes)
