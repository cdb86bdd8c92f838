"""The context model of compact token files: how likely each code is, given the codes to the left and above.

Neighboring patches of an image look alike, so a code's neighbors say much about it. A table of all pairs of neighbors
would be larger than the codes it saves. So codes are put into groups by what follows them, once as left and once as
upper neighbors, and with a table of quarter bits for each,

    p(code | left, upper) ~ 2 ** -((b[code] + l[group of left][code] + u[group of upper][code]) / 4),

a log-linear model of a few hundred small numbers a group. It is fitted with floats, once a set (`fit`); what files are
decoded with, `ContextModel.ends`, is made of the small numbers with integers alone, so it is the same on every machine.
Begin reading at `ContextModel`; rans.py turns its probabilities into bytes.
"""
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

BITS = 20  # probabilities are integers of 2 ** BITS together
TOTAL = 1 << BITS
# 2 ** 30 * 2 ** (-i / 4), rounded
QUARTERS = np.array([1073741824, 902905651, 759250125, 638450708])
MAX_TABLE = 1 << 23  # entries of `ends`: 32 MiB, which caches still help with
MAX_GROUPS = 256
MAX_SYMBOLS = 1 << 16
SAMPLE_CODES = 1 << 24  # a model is fitted on about so many codes at most

MAGIC = b'SeiTctx1'
HEADER = np.dtype([('magic', 'S8'), ('codes', '<u4'), ('symbols', '<u4'), ('left', '<u2'), ('upper', '<u2')])


@dataclass(frozen=True)
class ContextModel:
    """Probabilities of symbols, which are the codes in use, numbered from 0 in rising order; S of them.

    A neighbor outside of the grid is symbol S.

    Attributes:
        codes: (S,) uint16, rising: the code of each symbol.
        groups: of left and of upper neighbors, each (S + 1,) uint8: the group of a symbol. All numbers up to the
            largest occur.
        bias: (S,) int8, in quarter bits.
        tables: for left and for upper neighbors, each (groups, S) int8, in quarter bits; larger is less likely.
    """
    codes: np.ndarray
    groups: tuple[np.ndarray, np.ndarray]
    bias: np.ndarray
    tables: tuple[np.ndarray, np.ndarray]

    @property
    def stride(self) -> int:
        """Entries of a context in `ends`: the least power of two above S."""
        return 1 << len(self.codes).bit_length()

    def ends(self) -> np.ndarray:
        """(left groups, upper groups, stride) int32: where each symbol's interval of [0, TOTAL) begins.

        Symbol s has [ends[..., s], ends[..., s + 1]), which is never empty; entries S and beyond are TOTAL.
        """
        left, upper = self.tables
        symbols = len(self.codes)
        ends = np.full((len(left), len(upper), self.stride), TOTAL, np.int32)
        for group, row in enumerate(left):
            cost = self.bias.astype(np.int64) + row + upper
            cost -= cost.min(1, keepdims=True)
            # 2 ** (-cost / 4) by a table and a shift: no float, which another machine might round otherwise
            weight = QUARTERS[cost & 3] >> np.minimum(cost >> 2, 31)
            # every code keeps an interval of 1 at least, or an unlikely one could not be encoded at all
            size = 1 + weight * (TOTAL - symbols) // weight.sum(1, keepdims=True)
            best = size.argmax(1)
            # what rounding left over goes to the likeliest code, which it changes least
            size[np.arange(len(size)), best] += TOTAL - size.sum(1)
            ends[group, :, 0] = 0
            ends[group, :, 1:symbols] = size[:, :-1].cumsum(1)
        return ends

    def contexts(self, symbols: np.ndarray) -> np.ndarray:
        """(N, g, g) int64: the offset in the flat `ends` at which the context of each of symbols (N, g, g) begins."""
        left, upper = neighbors(symbols, len(self.codes))
        left_offset, upper_offset = self.context_offsets()
        return left_offset[left] + upper_offset[upper]

    def context_offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """What a left and an upper symbol each add to the offset of a context in the flat `ends`: (S + 1,) int64."""
        left, upper = (group.astype(np.int64) for group in self.groups)
        return left * (len(self.tables[1]) * self.stride), upper * self.stride

    def symbol_of(self) -> np.ndarray:
        """(65536,) int32: the symbol of each code; -1 for codes that are not in use."""
        table = np.full(MAX_SYMBOLS, -1, np.int32)
        table[self.codes] = np.arange(len(self.codes))
        return table

    def to_bytes(self) -> bytes:
        """The file of the model; docs/token_format.md has its layout."""
        left, upper = self.tables
        used = np.zeros(int(self.codes[-1]) + 1, bool)
        used[self.codes] = True
        header = np.array([(MAGIC, len(used), len(self.codes), len(left), len(upper))], HEADER).tobytes()
        body = b''.join(array.tobytes() for array in
                        (np.packbits(used, bitorder='little'), *self.groups, self.bias, left, upper))
        data = header + zlib.compress(body, 9)
        return data + zlib.crc32(data).to_bytes(4, 'little')

    @classmethod
    def from_bytes(cls, data: bytes) -> 'ContextModel':
        """The model in the bytes of its file. Raises ValueError with a complaint."""
        if len(data) < HEADER.itemsize + 4 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], 'little'):
            raise ValueError('its checksum is wrong')
        header = np.frombuffer(data, HEADER, 1)[0]
        codes, symbols, left, upper = (int(header[name]) for name in HEADER.names[1:])
        if header['magic'] != MAGIC:
            raise ValueError(f'it does not begin with {MAGIC.decode()}')
        stride = 1 << symbols.bit_length()
        if not (1 <= symbols <= codes <= MAX_SYMBOLS and min(left, upper) >= 1 and max(left, upper) <= MAX_GROUPS
                and left * upper * stride <= max(MAX_TABLE, stride)):
            raise ValueError('its header holds impossible sizes')
        sizes = [-(-codes // 8), symbols + 1, symbols + 1, symbols, left * symbols, upper * symbols]
        body = _inflate(data[HEADER.itemsize:-4], sum(sizes))
        used, *parts = np.split(body, np.cumsum(sizes)[:-1])
        used = np.unpackbits(used, count=codes, bitorder='little').nonzero()[0]
        groups = parts[0], parts[1]
        numbers = [np.unique(group).tolist() for group in groups]
        if len(used) != symbols or used[-1] != codes - 1 or numbers != [list(range(left)), list(range(upper))]:
            raise ValueError('its codes or groups are not as its header says')
        bias, *tables = (part.view(np.int8) for part in parts[2:])
        return cls(used.astype(np.uint16), groups, bias, (tables[0].reshape(left, symbols),
                                                          tables[1].reshape(upper, symbols)))


def _inflate(data: bytes, size: int) -> np.ndarray:
    """(size,) uint8, what a zlib stream unpacks to. Raises ValueError unless it is whole and as long."""
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f'it cannot be unpacked ({error})') from None
    if len(body) != size or not inflate.eof or inflate.unused_data:
        raise ValueError('it is not as long as its header says')
    return np.frombuffer(body, np.uint8)


def neighbors(symbols: np.ndarray, outside: int) -> tuple[np.ndarray, np.ndarray]:
    """The left and the upper neighbor of each of symbols (N, g, g); `outside` where there is none. Views."""
    images, grid, _ = symbols.shape
    padded = np.full((images, grid + 1, grid + 1), outside, symbols.dtype)
    padded[:, 1:, 1:] = symbols
    return padded[:, 1:, :-1], padded[:, :-1, 1:]


# ---------------------------------------------------------------- fitting

def fit(runs: Iterable[np.ndarray], images: int) -> ContextModel:
    """The model with which a set is smallest, the model's own bytes included; of codes alone if that is best.

    The same codes give the same model, however they are cut into runs.

    Args:
        runs: codes (m, n) integers in [0, 65535], n a square; `images` rows together.
        images: more than 0.
    """
    codes, sample = _sample(runs, images)
    symbol_of = np.zeros(int(codes[-1]) + 1, np.int32)
    symbol_of[codes] = np.arange(len(codes))
    grid = math.isqrt(sample.shape[1])
    symbols = symbol_of[sample].reshape(-1, grid, grid)
    scale = images / len(sample)
    counts = [_pairs(neighbor, symbols, len(codes)) for neighbor in neighbors(symbols, len(codes))]
    # More groups make the stream smaller and the model larger. The sum of both has one minimum in practice, so the
    # search doubles the groups until a set gets larger.
    best = None
    groups = 1
    while groups <= MAX_GROUPS and groups ** 2 << len(codes).bit_length() <= MAX_TABLE:
        model = _fit_groups(codes, symbols, counts, groups)
        size = len(model.to_bytes()) + scale * bits(model, symbols) / 8
        if best and size >= best[0]:
            break
        best = size, model
        groups *= 2
    return best[1]


def _sample(runs: Iterable[np.ndarray], images: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes in use, rising; the codes of every k-th image)."""
    used = np.zeros(MAX_SYMBOLS, bool)
    sampled = []
    first = 0
    for run in runs:
        used[run] = True
        # every k-th image of the set, wherever the runs begin, so that the cut into runs changes nothing
        step = max(1, -(-images * run.shape[1] // SAMPLE_CODES))
        sampled.append(run[-first % step::step].copy())
        first += len(run)
    return used.nonzero()[0].astype(np.uint16), np.concatenate(sampled)


def _pairs(neighbor: np.ndarray, symbols: np.ndarray, count: int) -> np.ndarray:
    """(count + 1, columns) int64: how often a symbol follows a neighbor. Of many symbols, some share a column."""
    columns = max(1, min(count, (1 << 22) // count))
    cell = neighbor.ravel().astype(np.int64) * columns + symbols.ravel() % columns
    return np.bincount(cell, minlength=(count + 1) * columns).reshape(count + 1, columns)


def _fit_groups(codes: np.ndarray, symbols: np.ndarray, counts: Sequence[np.ndarray], max_groups: int) -> ContextModel:
    """The model of at most `max_groups` groups a neighbor, fitted to symbols (N, g, g)."""
    groups = tuple(cluster(count, max_groups) for count in counts)
    left, upper = (group[neighbor].ravel().astype(np.int64)
                   for group, neighbor in zip(groups, neighbors(symbols, len(codes))))
    flat = symbols.ravel()
    shape = int(groups[0].max()) + 1, int(groups[1].max()) + 1
    observed = [np.bincount(group * len(codes) + flat, minlength=size * len(codes)).reshape(size, -1)
                for group, size in zip((left, upper), shape)]
    contexts = np.bincount(left * shape[1] + upper, minlength=shape[0] * shape[1]).reshape(shape)
    bias = np.bincount(flat, minlength=len(codes)) + 0.5  # half a use more, so that no logarithm is of 0
    bias = np.log(bias / bias.sum())
    tables = fit_proportions(bias, observed, contexts)
    quarters = [np.clip(np.rint(-4 / math.log(2) * table), -127, 127).astype(np.int8) for table in (bias, *tables)]
    return ContextModel(codes, groups, quarters[0], (quarters[1], quarters[2]))


def cluster(counts: np.ndarray, groups: int, iterations: int = 15) -> np.ndarray:
    """k-means of distributions by relative entropy: (rows,) uint8, the group of each row of counts (rows, columns).

    The seeds are the most frequent rows. Costs are integers: sums of floats would depend on the number of threads.
    """
    start = np.argsort(-counts.sum(1), kind='stable')[:groups]
    everything = (counts.sum(0) + 0.5) / (counts.sum() + 0.5 * counts.shape[1])
    centers = counts[start]
    assigned = None
    for _ in range(iterations):
        probability = (centers + 4 * everything) / (centers.sum(1, keepdims=True) + 4)
        # relative entropy up to a constant of each row: counts times -log2 of a center, in units of 1/4096 bit
        before, assigned = assigned, (counts @ np.rint(-4096 * np.log2(probability)).astype(np.int64).T).argmin(1)
        if before is not None and (before == assigned).all():
            break
        centers = np.zeros_like(centers)
        np.add.at(centers, assigned, counts)
    return np.unique(assigned, return_inverse=True)[1].astype(np.uint8)  # groups that nobody is in are left out


def fit_proportions(bias: np.ndarray, observed: Sequence[np.ndarray], contexts: np.ndarray,
                    iterations: int = 6) -> list[np.ndarray]:
    """Iterative proportional fitting: tables whose model has the margins that were observed.

    In turn each table is scaled until its margin is right, which puts the other one's a little out (Deming and Stephan,
    1940). A few rounds suffice: the tables are rounded to quarter bits anyway.

    Args:
        bias: (S,) natural logarithms, which both tables are added to.
        observed: counts of left groups and symbols (left, S), and of upper groups and symbols (upper, S).
        contexts: (left, upper) counts.

    Returns:
        (left, S) and (upper, S) natural logarithms.
    """
    tables = [np.zeros(count.shape) for count in observed]
    for _ in range(iterations):
        for axis in (0, 1):
            expected = np.zeros(observed[axis].shape)
            for group, row in enumerate(tables[0]):
                weight = bias + row + tables[1]
                weight = np.exp(weight - weight.max(1, keepdims=True))
                weight *= (contexts[group] / weight.sum(1))[:, None]
                if axis:
                    expected += weight
                else:
                    expected[group] = weight.sum(0)
            tables[axis] += np.log((observed[axis] + 1) / (expected + 1))  # 1: what was never seen is not impossible
    return tables


def bits(model: ContextModel, symbols: np.ndarray) -> float:
    """Bits that symbols (N, g, g) take by a model."""
    ends = model.ends().ravel()
    cost = BITS - np.log2(np.diff(ends, append=TOTAL).clip(min=1))
    parts = np.array_split(symbols, 1 + len(symbols) // 4096)
    return float(sum(cost[model.contexts(part) + part].sum() for part in parts))
