"""Slow, obvious versions of fast functions: what a fast one must equal."""
import bisect
import hashlib
import itertools
import struct
import zlib

# ---------------------------------------------------------------- tokens


def slow_decode_escaped(data):
    """The codes in one image's escaped bytes, one by one; None where it is no image."""
    codes = []
    position = 0
    while position < len(data):
        code = data[position]
        if code == 255:
            position += 1
            if position == len(data) or data[position] == 255:
                return None
            code += data[position]
        codes.append(code)
        position += 1
    return codes


def slow_decode_uint16(data):
    """The codes in one image's 16-bit codes; None where it is no image."""
    if len(data) % 2:
        return None
    return [data[i] + 256 * data[i + 1] for i in range(0, len(data), 2)]


SLOW_DECODERS = {'escaped-bytes': slow_decode_escaped, 'uint16-le': slow_decode_uint16}


def slow_nearest_codes(codebook, top_k):
    """For each row of a codebook, the other rows by falling cosine; equal ones by rising code."""
    rows = codebook.double().tolist()
    norms = [sum(x * x for x in row) ** 0.5 for row in rows]
    result = []
    for code, row in enumerate(rows):
        cosines = [sum(a * b for a, b in zip(row, other)) / (norms[code] * norms[i]) for i, other in enumerate(rows)]
        others = [i for i in range(len(rows)) if i != code]
        result.append(sorted(others, key=lambda i: -cosines[i])[:top_k])
    return result


# ---------------------------------------------------------------- compact token files

def slow_context_model(data):
    """A context model: (codes, groups of left and of upper neighbors, bias, tables of both), lists; None if damaged."""
    if len(data) < 24 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], 'little'):
        return None
    magic, codes, symbols, left, upper = struct.unpack('<8sIIHH', data[:20])
    if magic != b'SeiTctx1' or not (1 <= symbols <= codes <= 65536 and 1 <= left <= 256 and 1 <= upper <= 256):
        return None
    stride = 2
    while stride <= symbols:
        stride *= 2
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(data[20:-4])
    except zlib.error:
        return None
    sizes = [(codes + 7) // 8, symbols + 1, symbols + 1, symbols, left * symbols, upper * symbols]
    if left * upper * stride > max(1 << 23, stride):
        return None
    if not inflate.eof or inflate.unused_data or len(body) != sum(sizes):
        return None
    parts = []
    for size in sizes:
        parts.append(list(body[:size]))
        body = body[size:]
    used = [code for code in range(codes) if parts[0][code // 8] >> code % 8 & 1]
    if len(used) != symbols or used[-1] != codes - 1:
        return None
    if sorted(set(parts[1])) != list(range(left)) or sorted(set(parts[2])) != list(range(upper)):
        return None
    bias, left, upper = ([byte - 256 if byte > 127 else byte for byte in part] for part in parts[3:])
    return used, parts[1], parts[2], bias, split_rows(left, symbols), split_rows(upper, symbols)


def split_rows(values, size):
    return [values[start:start + size] for start in range(0, len(values), size)]


def slow_ends(model, left_group, upper_group):
    """Where the intervals of the symbols of a context begin, and 2 ** 20 at the end."""
    bias, left, upper = model[3:]
    cost = [sum(three) for three in zip(bias, left[left_group], upper[upper_group])]
    least = min(cost)
    cost = [one - least for one in cost]
    weight = [round(2 ** (30 - one % 4 / 4)) >> min(one // 4, 31) for one in cost]
    total = sum(weight)
    size = [1 + one * (2 ** 20 - len(weight)) // total for one in weight]
    size[size.index(max(size))] += 2 ** 20 - sum(size)
    return list(itertools.accumulate(size, initial=0))


def slow_decode_block(model, words, images, grid):
    """The codes of the images of one rANS block, a list each; None where its words are not as encoding makes them."""
    codes, left_groups, upper_groups = model[:3]
    outside = len(codes)
    contexts = {}
    state = (words[0] << 32 | words[1]) % 2 ** 63
    words = words[2:]
    decoded = []
    for _ in range(images):
        symbols = []
        for place in range(grid ** 2):
            left = symbols[place - 1] if place % grid else outside
            upper = symbols[place - grid] if place >= grid else outside
            context = left_groups[left], upper_groups[upper]
            if context not in contexts:
                contexts[context] = slow_ends(model, *context)
            ends = contexts[context]
            slot = state % 2 ** 20
            symbol = bisect.bisect_right(ends, slot) - 1
            state = (state >> 20) * (ends[symbol + 1] - ends[symbol]) + slot - ends[symbol]
            if state < 2 ** 31:
                if not words:
                    return None
                state = state << 32 | words[0]
                words = words[1:]
            symbols.append(symbol)
        decoded.append([codes[symbol] for symbol in symbols])
    return decoded if state == 2 ** 31 and not words else None


def slow_decode_compact(stream, model_data, block_codes=4096):
    """The images of a compact stream, a list of codes each; None where stream or model is damaged."""
    model = slow_context_model(model_data)
    if model is None or len(stream) < 32:
        return None
    magic, images, grid, block_images, identity = struct.unpack('<8sIHH16s', stream[:32])
    if magic != b'SeiTcmp1' or identity != hashlib.sha256(model_data).digest()[:16]:
        return None
    if not (1 <= images <= 2 ** 27 and 1 <= grid <= 256) or block_images != max(1, block_codes // grid ** 2):
        return None
    blocks = -(-images // block_images)
    if len(stream) % 4 or len(stream) < 32 + 4 * blocks:
        return None
    words = [int.from_bytes(stream[at:at + 4], 'little') for at in range(32, len(stream), 4)]
    lengths, words = words[:blocks], words[blocks:]
    if min(lengths) < 2 or sum(lengths) != len(words):
        return None
    decoded = []
    for length in lengths:
        block = slow_decode_block(model, words[:length], min(block_images, images - len(decoded)), grid)
        if block is None:
            return None
        decoded += block
        words = words[length:]
    return decoded
