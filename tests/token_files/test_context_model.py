"""The context model: intervals that decoding can rely on, files that hold it, and what fitting gives."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from helpers import CODE_KINDS, codes_of_kind, limits, packed, signed, structured
from token_files import context_model
from token_files.context_model import BITS, HEADER, TOTAL, ContextModel, bits, cluster, fit, fit_proportions, neighbors
from twins import slow_context_model, slow_ends

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
CODES = {'kind': st.sampled_from(CODE_KINDS), 'images': st.integers(1, 40), 'grid': st.integers(1, 6),
         'seed': st.integers(0, 2 ** 32)}


def random_model(rng, symbols, left, upper, largest=127):
    """A model of any numbers, as no fitting would give it."""
    def numbers(*shape):
        return rng.integers(-largest, largest + 1, shape).astype(np.int8)
    groups = tuple(np.resize(rng.permutation(count), symbols + 1).astype(np.uint8) for count in (left, upper))
    codes = np.sort(rng.choice(65536, symbols, replace=False)).astype(np.uint16)
    return ContextModel(codes, groups, numbers(symbols), (numbers(left, symbols), numbers(upper, symbols)))


MODELS = st.builds(lambda seed, symbols, left, upper, largest: random_model(
    np.random.default_rng(seed), symbols, min(left, symbols + 1), min(upper, symbols + 1), largest),
    st.integers(0, 2 ** 32), st.integers(1, 20), st.integers(1, 5), st.integers(1, 5), st.sampled_from([0, 1, 9, 127]))


def same_model(a, b):
    arrays = [(m.codes, *m.groups, m.bias, *m.tables) for m in (a, b)]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(*arrays))


# ---------------------------------------------------------------- intervals

def check_ends(model):
    ends = model.ends()
    symbols = len(model.codes)
    assert ends.dtype == np.int32 and ends.shape == (*map(len, model.tables), model.stride) and model.stride > symbols
    assert (ends[..., 0] == 0).all() and (ends[..., symbols:] == TOTAL).all()
    assert (np.diff(ends[..., :symbols + 1], axis=-1) > 0).all()
    return ends


@SETTINGS
@given(model=MODELS)
def test_intervals_rise_are_never_empty_and_fill_the_range(model):
    ends = check_ends(model)
    slow = slow_context_model(model.to_bytes())
    for left in range(len(model.tables[0])):
        for upper in range(len(model.tables[1])):
            assert ends[left, upper, :len(model.codes) + 1].tolist() == slow_ends(slow, left, upper)


@pytest.mark.parametrize('symbols', [1, 2, 3, 255, 256, 65535, 65536])
@pytest.mark.parametrize('largest', [0, 127])
def test_intervals_of_few_and_of_all_codes(symbols, largest):
    model = random_model(np.random.default_rng(0), symbols, 1, min(2, symbols), largest)
    ends = check_ends(model)
    assert ends[0, 0, :symbols + 1].tolist() == slow_ends(slow_context_model(model.to_bytes()), 0, 0)


def test_the_extremes_of_a_table():
    """One symbol as likely and the others as unlikely as numbers can say: none gets lost."""
    codes = np.arange(100, dtype=np.uint16)
    groups = np.zeros(101, np.uint8)
    numbers = np.full(100, 127, np.int8)
    numbers[50] = -128
    ends = check_ends(ContextModel(codes, (groups, groups), numbers, (numbers[None], numbers[None])))
    size = np.diff(ends[0, 0, :101])
    assert size[50] == TOTAL - 99 and (np.delete(size, 50) == 1).all()


@SETTINGS
@given(model=MODELS, seed=st.integers(0, 99))
def test_contexts_are_those_of_the_neighbors(model, seed):
    symbols = np.random.default_rng(seed).integers(0, len(model.codes), (3, 4, 4))
    got = model.contexts(symbols)
    for image, y, x in np.ndindex(symbols.shape):
        left = symbols[image, y, x - 1] if x else len(model.codes)
        upper = symbols[image, y - 1, x] if y else len(model.codes)
        context = int(model.groups[0][left]) * len(model.tables[1]) + int(model.groups[1][upper])
        assert got[image, y, x] == context * model.stride


def test_neighbors():
    left, upper = neighbors(np.array([[[0, 1], [2, 3]]]), 9)
    assert left.tolist() == [[[9, 0], [9, 2]]] and upper.tolist() == [[[9, 9], [0, 1]]]


@SETTINGS
@given(model=MODELS)
def test_symbols_of_codes(model):
    table = model.symbol_of()
    assert table.shape == (65536,) and table[model.codes].tolist() == list(range(len(model.codes)))
    assert (table >= 0).sum() == len(model.codes)


# ---------------------------------------------------------------- files

@SETTINGS
@given(model=MODELS)
def test_a_model_round_trips_through_bytes(model):
    data = model.to_bytes()
    again = ContextModel.from_bytes(data)
    assert same_model(again, model) and again.to_bytes() == data and same_model(again, as_model(data))


def as_model(data):
    """The slow reader's model."""
    codes, left_groups, upper_groups, bias, left, upper = slow_context_model(data)
    return ContextModel(np.array(codes, np.uint16), (np.array(left_groups, np.uint8), np.array(upper_groups, np.uint8)),
                        np.array(bias, np.int8), (np.array(left, np.int8), np.array(upper, np.int8)))


@SETTINGS
@given(**CODES)
def test_a_fitted_model_round_trips_and_has_the_codes_in_use(kind, images, grid, seed):
    codes = codes_of_kind(kind, images, grid, seed)
    model = fit([codes], images)
    check_ends(model)
    assert same_model(ContextModel.from_bytes(model.to_bytes()), model)
    assert model.codes.tolist() == np.unique(codes).tolist()


def bad(data, match):
    with limits(), pytest.raises(ValueError, match=match) as caught:
        ContextModel.from_bytes(data)
    assert len(str(caught.value)) < 200 and slow_context_model(data) is None


def test_no_damaged_byte_goes_unseen():
    data = fit([structured(60)], 60).to_bytes()
    for place in range(len(data)):
        for bit in (0, 7):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            bad(bytes(damaged), 'its checksum is wrong')
    for end in range(0, len(data), 7):
        bad(data[:end], 'its checksum is wrong')
    bad(data + b'\0', 'its checksum is wrong')


GOOD = b'\3' + bytes(3) + bytes(3) + bytes(2) + bytes(2) + bytes(2)  # two codes, no groups


def test_bytes_that_are_no_model():
    assert ContextModel.from_bytes(packed(GOOD)).codes.tolist() == [0, 1]
    bad(b'', 'checksum')
    bad(packed(GOOD, magic=b'SeiTctx2'), 'does not begin with SeiTctx1')
    for sizes in ({'codes': 1}, {'symbols': 0}, {'symbols': 3}, {'codes': 65537, 'symbols': 65537}, {'left': 0},
                  {'upper': 0}, {'left': 257}, {'upper': 65535}, {'codes': 1 << 31, 'symbols': 1 << 31},
                  {'codes': 65536, 'symbols': 65536, 'left': 8, 'upper': 9}):
        bad(packed(GOOD, **sizes), 'impossible sizes')
    for body in (GOOD[:-1], GOOD + b'\0', b''):
        bad(packed(body), 'not as long as its header says')
    whole = packed(GOOD)
    bad(signed(whole[:-4] + b'more' + bytes(4)), 'not as long as its header says')  # after the end of the zlib stream
    bad(signed(whole[:-6] + bytes(4)), 'not as long as its header says')  # which ends too early
    bad(signed(whole[:HEADER.itemsize] + b'no zlib' + bytes(4)), 'cannot be unpacked')
    for body in (b'\1' + GOOD[1:], b'\2' + GOOD[1:], b'\0' + GOOD[1:]):  # one code or none, where two are stated
        bad(packed(body), 'codes or groups are not as')
    bad(packed(b'\3' + GOOD[1:], codes=3), 'codes or groups are not as')  # the last code is none
    for group in range(1, 7):
        bad(packed(GOOD[:group] + b'\1' + GOOD[group + 1:]), 'codes or groups are not as')  # a group that is not there
    bad(packed(GOOD[:11] + bytes(4), left=2), 'codes or groups are not as')  # a group that nobody is in


def test_a_model_that_unpacks_to_much_more_than_it_says():
    bad(packed(bytes(1 << 26)), 'not as long as its header says')


def test_the_largest_model_that_a_file_may_hold_stays_within_bounds():
    """Some 17 KB that claim all that the header allows."""
    symbols = (1 << 15) - 1
    sizes = -(-symbols // 8), symbols + 1, symbols + 1, symbols, symbols, 256 * symbols
    used = np.packbits(np.ones(symbols, bool), bitorder='little').tobytes()
    upper = np.resize(np.arange(256, dtype=np.uint8), sizes[2]).tobytes()
    data = packed(used + bytes(sizes[1]) + upper + bytes(sum(sizes[3:])), codes=symbols, symbols=symbols, upper=256)
    with limits():
        check_ends(ContextModel.from_bytes(data))


# ---------------------------------------------------------------- fitting

@SETTINGS
@given(**CODES, cuts=st.lists(st.integers(0, 40), max_size=5))
def test_the_cut_into_runs_changes_nothing(kind, images, grid, seed, cuts):
    codes = codes_of_kind(kind, images, grid, seed)
    runs = np.split(codes, sorted(cut for cut in cuts if cut <= images))
    assert fit(runs, images).to_bytes() == fit([codes], images).to_bytes()
    assert fit([codes.astype(np.uint16)], images).to_bytes() == fit([codes], images).to_bytes()


@pytest.mark.parametrize('most', [1, 50, 700])
def test_a_model_of_a_sample_has_all_codes_and_no_cut_changes_it(most, monkeypatch):
    monkeypatch.setattr(context_model, 'SAMPLE_CODES', most)
    codes = structured(90, 4)
    codes[1, 3] = 40000  # in an image that is not in the sample
    whole = fit([codes], 90)
    assert whole.codes.tolist() == np.unique(codes).tolist() and not (whole.symbol_of()[codes] < 0).any()
    for size in (1, 7, 89):
        runs = (codes[start:start + size] for start in range(0, 90, size))
        assert fit(runs, 90).to_bytes() == whole.to_bytes()


@pytest.mark.parametrize('codes', [structured(), structured(30), codes_of_kind('random', 40, 6)])
def test_the_size_is_the_best_of_those_around(codes):
    """Model and codes together: what is chosen is no larger than half or twice as many groups, or none."""
    model = fit([codes], len(codes))
    symbol_of = model.symbol_of()
    grid = int(codes.shape[1] ** 0.5)
    symbols = symbol_of[codes].reshape(-1, grid, grid)
    counts = [context_model._pairs(neighbor, symbols, len(model.codes))
              for neighbor in neighbors(symbols, len(model.codes))]

    def size(model):
        return len(model.to_bytes()) + bits(model, symbols) / 8
    groups = len(model.tables[0])
    for other in {1, max(1, groups // 2), groups * 2}:
        assert size(model) <= size(context_model._fit_groups(model.codes, symbols, counts, other)) + 1e-6


def test_neighbors_tell_much_where_they_do_and_nothing_where_they_do_not():
    codes = structured()
    model = fit([codes], len(codes))
    symbols = codes.reshape(-1, 8, 8)
    assert min(map(len, model.tables)) > 4
    shares = np.bincount(codes.ravel()) / codes.size
    assert len(model.to_bytes()) * 8 + bits(model, symbols) < 0.65 * codes.size * -(shares @ np.log2(shares))
    noise = codes_of_kind('random', 40, 6)
    assert [len(table) for table in fit([noise], 40).tables] == [1, 1]


def test_bits_are_what_the_intervals_say():
    model = fit([structured(20)], 20)
    symbols = model.symbol_of()[structured(20)].reshape(-1, 8, 8)
    ends = model.ends().ravel()
    slow = sum(BITS - np.log2(ends[context + symbol + 1] - ends[context + symbol])
               for context, symbol in zip(model.contexts(symbols).ravel(), symbols.ravel()))
    assert bits(model, symbols) == pytest.approx(slow)


def test_clusters_of_rows_that_fall_into_two():
    counts = np.array([[90, 10, 0, 0], [0, 0, 50, 50], [9, 1, 0, 0], [0, 0, 400, 380], [900, 80, 0, 0], [0, 0, 0, 0]])
    groups = cluster(counts, 2)
    assert groups.dtype == np.uint8 and len(set(groups.tolist())) == 2
    assert groups[0] == groups[2] == groups[4] != groups[1] == groups[3]
    assert cluster(counts, 1).tolist() == [0] * 6
    many = cluster(counts, 100)  # more than there are rows: numbers without gaps
    assert sorted(set(many.tolist())) == list(range(many.max() + 1))


def test_proportions_have_the_margins_that_were_observed():
    rng = np.random.default_rng(0)
    left, upper, symbols = 3, 4, 6
    data = rng.integers(100, 9000, (left, upper, symbols))
    observed = data.sum(1), data.sum(0)
    bias = np.log(data.sum((0, 1)) / data.sum())
    tables = fit_proportions(bias, observed, data.sum(2), iterations=50)
    weight = np.exp(bias + tables[0][:, None] + tables[1][None])
    expected = weight / weight.sum(-1, keepdims=True) * data.sum(2)[..., None]
    assert np.allclose(expected.sum(1), observed[0], rtol=1e-3) and np.allclose(expected.sum(0), observed[1], rtol=1e-3)
