"""rANS (Duda, 2013) over the contexts of a model, many blocks of images in step.

rANS writes a code of probability p in log2(1 / p) bits, fractions of bits included, which no prefix code does. A block
is one stream of 32-bit words: a 64-bit state, then what the state is filled up with. Decoding a code takes the
last BITS of the state, finds the symbol whose interval holds them, and shrinks the state by that symbol's probability;
a state below 2 ** 31 takes a word. After the last code the state is 2 ** 31 again, and no word is left.

A code depends on the one before it, so a block alone cannot be vectorized. All blocks of an array therefore go through
these steps together, one element of a numpy (or, on a GPU, torch) operation each. Decoding uses integers only, so every
machine gets the same codes. States stay below 2 ** 63, so that int64 holds them.

Read `_Reader.next_symbols` first, which decodes one code, then `_encode_steps`, which is its inverse, backward.
"""
import math

import numpy as np
import torch

from token_files.context_model import BITS, TOTAL, ContextModel

LOWEST = 1 << 31  # of a state between two codes, and the state that encoding begins with
WORD_BITS = 32
WORD_MASK = (1 << WORD_BITS) - 1


# ---------------------------------------------------------------- encoding

def encode_blocks(model: ContextModel, ends: np.ndarray, codes: np.ndarray,
                  block_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode images, block after block.

    Args:
        model: whose codes hold all of `codes`.
        ends: `model.ends()`.
        codes: (N, n) integers.
        block_images: images of a block; the last one may have fewer.

    Returns:
        words: uint32, one block after the other.
        lengths: (blocks,) int64, words of each.

    Raises:
        ValueError: for a code that the model does not have.
    """
    images, n = codes.shape
    blocks = -(-images // block_images)
    grid = math.isqrt(n)
    symbols = model.symbol_of()[codes].reshape(-1, grid, grid)
    if symbols.min() < 0:
        raise ValueError(f'code {codes.flat[symbols.argmin()]} is none that the model was fitted to')
    start, size = (array.reshape(images, n) for array in _intervals(model, ends, symbols))
    if images % block_images:  # the last block: images that take no bits, which decoding never gets to
        missing = blocks * block_images - images
        start = np.concatenate([start, np.zeros((missing, n), start.dtype)])
        size = np.concatenate([size, np.full((missing, n), TOTAL, size.dtype)])
    # (steps, blocks): what is read together lies together
    start, size = (np.ascontiguousarray(array.reshape(blocks, -1).T) for array in (start, size))
    return _encode_steps(start, size)


def _intervals(model: ContextModel, ends: np.ndarray, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begin and size of the interval of each of symbols (N, g, g) in its context: two (N, g, g) int32."""
    flat = ends.ravel()
    position = model.contexts(symbols)
    position += symbols
    start = flat.take(position)
    position += 1
    return start, flat.take(position) - start


def _encode_steps(start: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words and lengths of blocks, see `encode_blocks`, whose codes have these intervals (steps, blocks) int32."""
    steps, blocks = start.shape
    state = np.full(blocks, LOWEST, np.uint64)
    words = np.empty((blocks, steps + 2), np.uint32)  # filled from the end: decoding takes them in the other order
    first = np.full(blocks, steps + 2)
    full = np.uint64(WORD_BITS + 31 - BITS)
    # The state is a stack: what is put in last comes out first. So codes go in from the last to the first.
    for step in range(steps - 1, -1, -1):
        size64 = size[step].astype(np.uint64)
        # a state that would grow past 63 bits hands its lower word to the stream first
        spill = (state >= size64 << full).nonzero()[0]
        if len(spill):
            first[spill] -= 1
            words[spill, first[spill]] = state[spill] & np.uint64(WORD_MASK)
            state[spill] >>= np.uint64(WORD_BITS)
        times, rest = np.divmod(state, size64)
        state = (times << np.uint64(BITS)) + rest + start[step].astype(np.uint64)
    rows = np.arange(blocks)
    words[rows, first - 1] = state & np.uint64(WORD_MASK)
    words[rows, first - 2] = state >> np.uint64(WORD_BITS)
    first -= 2
    return words[np.arange(steps + 2) >= first[:, None]], steps + 2 - first


# ---------------------------------------------------------------- decoding

def decode_blocks(model: ContextModel, ends: np.ndarray, words: np.ndarray, lengths: np.ndarray,
                  shape: tuple[int, int, int]) -> np.ndarray:
    """Decode consecutive blocks.

    Args:
        model: that they were encoded with.
        ends: `model.ends()`.
        words: uint32 of the blocks, as long as `lengths` say together.
        lengths: (blocks,) int64, each 2 or more.
        shape: images in all, images of a block, codes an image. Only the last block may have fewer images.

    Returns:
        codes (images, n) uint16.

    Raises:
        ValueError: (block, complaint) for one whose words are not as `encode_blocks` makes them.
    """
    images, block_images, n = shape
    blocks = len(lengths)
    grid = math.isqrt(n)
    last = np.cumsum(lengths)
    reader = _Reader(ends.ravel(), model.stride, words, last - lengths)
    left_offset, upper_offset = model.context_offsets()
    codes = np.empty((blocks * block_images, n), np.uint16)
    by_block = codes.reshape(blocks, block_images, n)
    # Image by image and code by code, in all blocks at once. The last block leaves when its images are done.
    for image in range(block_images):
        active = blocks if image < images - (blocks - 1) * block_images else blocks - 1
        if not active:  # the only block is not full
            break
        upper = np.full((grid, active), len(model.codes))
        for y in range(grid):
            position = upper_offset.take(upper)
            left = np.full(active, len(model.codes))
            for x in range(grid):
                left = upper[x] = reader.next_symbols(position[x] + left_offset.take(left))
            by_block[:active, image, y * grid:(y + 1) * grid] = model.codes.take(upper).T
    _check_end(reader.state, reader.cursor, last)
    return codes[:images]


def _check_end(state: np.ndarray, cursor: np.ndarray, last: np.ndarray) -> None:
    """ValueError unless all blocks have come back to the first state, and to their last word."""
    # Encoding began with this state, so whole blocks end in it. A changed bit leads elsewhere but for one in 2 ** 31.
    wrong = (state != LOWEST) | (cursor != last)
    if wrong.any():
        raise ValueError(int(wrong.argmax()), 'does not end in the state that its encoding began with')


def _first_states(words: np.ndarray, cursor: np.ndarray) -> np.ndarray:
    """(blocks,) int64. A damaged one may be anything, but not negative."""
    return (words[cursor].astype(np.int64) << WORD_BITS | words[cursor + 1]) & ((1 << 63) - 1)


class _Reader:
    """The states of blocks that are decoded in step.

    Args:
        ends: flat, see `ContextModel.ends`.
        stride: of its contexts.
        words: uint32 of all blocks.
        cursor: (blocks,) the first word of each.
    """

    def __init__(self, ends: np.ndarray, stride: int, words: np.ndarray, cursor: np.ndarray):
        self.ends = ends
        self.halves = [1 << bit for bit in range(stride.bit_length() - 2, -1, -1)]
        self.words = words
        self.cursor = cursor + 2
        self.state = _first_states(words, cursor)

    def next_symbols(self, context: np.ndarray) -> np.ndarray:
        """(m,) int64: the next symbol of each of the first m blocks, whose contexts begin at these offsets."""
        state = self.state[:len(context)]
        slot = (state & (TOTAL - 1)).astype(np.int32)
        position = context.copy()
        # Bisection for the last interval that begins at or before the slot. A context begins at a multiple of the
        # stride, a power of two, so a step sets one bit.
        for half in self.halves:
            middle = position | half
            position += (self.ends.take(middle, mode='clip') <= slot) * half
        start = self.ends.take(position)
        size = self.ends.take(position + 1) - start
        # the inverse of encoding: the quotient times the interval, plus the distance of the slot from its begin
        state >>= BITS
        state *= size
        state += slot - start
        underflow = (state < LOWEST).nonzero()[0]
        if len(underflow):
            cursor = self.cursor[underflow]
            state[underflow] = state[underflow] << WORD_BITS | self.words.take(cursor, mode='clip')
            self.cursor[underflow] = cursor + 1
        return position - context


@torch.inference_mode()
def decode_blocks_on(device: torch.device, model: ContextModel, ends: np.ndarray, words: np.ndarray,
                     lengths: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """`decode_blocks` on a GPU, where a step of very many blocks takes hardly longer than one of a few."""
    images, block_images, n = shape
    blocks = len(lengths)
    grid = math.isqrt(n)
    last = np.cumsum(lengths)
    flat, left_offset, upper_offset, symbol_codes, state, cursor, words64 = (
        torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in
        (ends.ravel(), *model.context_offsets(), model.codes.view(np.int16), _first_states(words, last - lengths),
         last - lengths + 2, words.astype(np.int64)))
    codes = torch.empty(blocks, block_images, n, dtype=torch.int16, device=device)
    for image in range(block_images):
        active = blocks if image < images - (blocks - 1) * block_images else blocks - 1
        upper = torch.full((grid, active), len(model.codes), device=device)
        for y in range(grid):
            position = upper_offset[upper]
            left = torch.full((active,), len(model.codes), device=device)
            for x in range(grid):
                left = upper[x] = _next_symbols(flat, words64, state[:active], cursor[:active],
                                                position[x] + left_offset[left], model.stride)
            codes[:active, image, y * grid:(y + 1) * grid] = symbol_codes[upper].T
    _check_end(state.cpu().numpy(), cursor.cpu().numpy(), last)
    return codes.view(-1, n)[:images].cpu().numpy().view(np.uint16)


def _next_symbols(ends: torch.Tensor, words: torch.Tensor, state: torch.Tensor, cursor: torch.Tensor,
                  context: torch.Tensor, stride: int) -> torch.Tensor:
    """See `_Reader.next_symbols`. `state` and `cursor` are changed, and nothing here waits for the GPU."""
    slot = state & (TOTAL - 1)
    position = context.clone()
    half = stride >> 1
    while half:
        middle = position | half
        position = torch.where(ends[middle] <= slot, middle, position)
        half >>= 1
    start = ends[position]
    state.copy_((state >> BITS) * (ends[position + 1] - start) + slot - start)
    # all blocks read a word and some keep it: to list those that need one, as on the CPU, would wait for the GPU
    underflow = state < LOWEST
    word = words[cursor.clamp(max=len(words) - 1)]
    state.copy_(torch.where(underflow, state << WORD_BITS | word, state))
    cursor += underflow
    return position - context
