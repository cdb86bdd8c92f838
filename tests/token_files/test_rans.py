"""rANS blocks: decoding gives back what was encoded, as a slow decoder does too, and finds damage."""
import numpy as np
import pytest

pytest.importorskip('hypothesis')
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import CODE_KINDS, codes_of_kind
from token_files.context_model import ContextModel, bits, fit
from token_files.rans import decode_blocks, encode_blocks
from twins import slow_context_model, slow_decode_block

SETTINGS = settings(max_examples=80, deadline=None, derandomize=True, database=None)
CODES = {'kind': st.sampled_from(CODE_KINDS), 'images': st.integers(1, 30), 'grid': st.integers(1, 6),
         'seed': st.integers(0, 2 ** 32), 'block_images': st.integers(1, 9)}


def round_trip(model, codes, block_images):
    """Encode codes and decode them again, which must give the same; returns (words, lengths)."""
    ends = model.ends()
    words, lengths = encode_blocks(model, ends, codes, block_images)
    assert words.dtype == np.uint32 and lengths.dtype == np.int64
    assert len(words) == lengths.sum() and lengths.min() >= 2 and len(lengths) == -(-len(codes) // block_images)
    decoded = decode_blocks(model, ends, words, lengths, (len(codes), block_images, codes.shape[1]))
    assert decoded.dtype == np.uint16 and np.array_equal(decoded, codes)
    return words, lengths


def slow_decode(model, words, lengths, images, block_images, grid):
    """What a slow decoder says of the blocks: their codes, a list each, or None."""
    slow = slow_context_model(model.to_bytes())
    blocks = np.split(words.tolist(), np.cumsum(lengths)[:-1])
    return [slow_decode_block(slow, block.tolist(), min(block_images, images - first), grid)
            for first, block in zip(range(0, images, block_images), blocks)]


# ---------------------------------------------------------------- there and back

@SETTINGS
@given(**CODES)
def test_decoding_gives_back_what_was_encoded(kind, images, grid, seed, block_images):
    codes = codes_of_kind(kind, images, grid, seed)
    words, lengths = round_trip(fit([codes], images), codes, block_images)
    slow = slow_decode(fit([codes], images), words, lengths, images, block_images, grid)
    assert [image for block in slow for image in block] == codes.tolist()


@SETTINGS
@given(**CODES, other=st.sampled_from(['sorted', 'rare', 'shuffled', 'few']))
def test_a_model_of_other_statistics_encodes_all_codes_that_it_has(kind, images, grid, seed, block_images, other):
    fitted = codes_of_kind(kind, images, grid, seed)
    model = fit([fitted], images)
    rng = np.random.default_rng(seed)
    codes = {'sorted': np.sort(fitted.ravel()), 'shuffled': rng.permutation(fitted.ravel()),
             'few': rng.choice(model.codes, fitted.size),
             'rare': np.full(fitted.size, model.codes[model.bias.argmax()], np.int64)}[other].reshape(fitted.shape)
    words, lengths = round_trip(model, codes, block_images)
    slow = slow_decode(model, words, lengths, images, block_images, grid)
    assert [image for block in slow for image in block] == codes.tolist()


@SETTINGS
@given(seed=st.integers(0, 2 ** 32), symbols=st.integers(1, 30), groups=st.integers(1, 5), grid=st.integers(1, 5),
       images=st.integers(1, 20))
def test_any_tables_will_do(seed, symbols, groups, grid, images):
    """Numbers from one end to the other, which no fitting gives: intervals of one in a million."""
    rng = np.random.default_rng(seed)
    groups = min(groups, symbols + 1)
    tables = [rng.choice([-128, -1, 0, 1, 127], (rows, symbols)).astype(np.int8) for rows in (1, groups, groups)]
    group = np.resize(np.arange(groups), symbols + 1).astype(np.uint8)
    model = ContextModel(np.arange(symbols, dtype=np.uint16), (group, group[::-1].copy()), tables[0][0],
                         (tables[1], tables[2]))
    codes = rng.integers(0, symbols, (images, grid ** 2))
    words, lengths = round_trip(model, codes, 4)
    slow = slow_decode(model, words, lengths, images, 4, grid)
    assert [image for block in slow for image in block] == codes.tolist()


def test_all_codes_that_there_are():
    codes = np.random.default_rng(0).permutation(65536).reshape(16, 4096)
    model = fit([codes], 16)
    words, lengths = round_trip(model, codes, 1)
    assert len(model.codes) == 65536 and 4 * len(words) < 2.1 * codes.size
    slow = slow_decode(model, words[:lengths[0]], lengths[:1], 1, 1, 64)
    assert slow == [[codes[0].tolist()]]


def test_codes_that_can_be_one_only_take_no_bits():
    codes = np.full((40, 64), 65535)
    words, lengths = round_trip(fit([codes], 40), codes, 10)
    assert lengths.tolist() == [2] * 4 and words.tolist() == [0, 1 << 31] * 4


def test_blocks_take_the_bits_that_the_model_says():
    codes = codes_of_kind('copied', 600, 8)
    model = fit([codes], 600)
    words, lengths = round_trip(model, codes, 64)
    entropy = bits(model, model.symbol_of()[codes].reshape(-1, 8, 8))
    assert entropy <= 32 * len(words) <= 1.001 * entropy + 64 * len(lengths)  # and a state each


@SETTINGS
@given(**CODES)
def test_a_block_alone_is_the_block_among_others(kind, images, grid, seed, block_images):
    codes = codes_of_kind(kind, images, grid, seed)
    model = fit([codes], images)
    words, lengths = round_trip(model, codes, block_images)
    blocks = np.split(words, np.cumsum(lengths)[:-1])
    for number, block in enumerate(blocks):
        mine = codes[number * block_images:(number + 1) * block_images]
        alone = decode_blocks(model, model.ends(), block, lengths[number:number + 1],
                              (len(mine), block_images, codes.shape[1]))
        assert np.array_equal(alone, mine)
        assert np.array_equal(encode_blocks(model, model.ends(), mine, block_images)[0], block)


def test_codes_of_any_integer_type_give_the_same_words():
    codes = codes_of_kind('random', 10, 4) % 120
    model = fit([codes], 10)
    expected, _ = round_trip(model, codes, 3)
    for dtype in (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint64):
        assert np.array_equal(round_trip(model, codes.astype(dtype), 3)[0], expected)
    assert np.array_equal(round_trip(model, np.asfortranarray(codes), 3)[0], expected)


def test_a_code_that_the_model_does_not_have_is_named():
    codes = np.array([[5, 7, 9, 5]])
    model = fit([codes], 1)
    for code in (0, 6, 10, 65535):
        with pytest.raises(ValueError, match=f'code {code} is none'):
            encode_blocks(model, model.ends(), np.array([[5, 7, code, 5]]), 1)


# ---------------------------------------------------------------- damage

def decode_or_none(model, words, lengths, shape):
    """The codes of blocks, or the number of the first bad one."""
    try:
        return decode_blocks(model, model.ends(), words, lengths, shape).tolist()
    except ValueError as error:
        block, complaint = error.args
        assert 'does not end in the state' in complaint
        return block


@pytest.mark.parametrize('kind', ['skewed', 'copied', 'alternating', 'constant'])
def test_every_flipped_bit_is_found_or_changes_nothing(kind):
    """The highest bit of a state is not looked at."""
    codes = codes_of_kind(kind, 9, 4, 3)
    model = fit([codes], 9)
    words, lengths = round_trip(model, codes, 4)
    starts = np.cumsum(lengths) - lengths
    unseen = []
    for place in range(len(words)):
        for bit in range(32):
            damaged = words.copy()
            damaged[place] ^= np.uint32(1 << bit)
            got = decode_or_none(model, damaged, lengths, (9, 4, 16))
            block = int(np.searchsorted(starts, place, side='right')) - 1
            if got != block:
                assert got == codes.tolist()
                unseen.append((place, bit))
            slow = slow_decode(model, damaged, lengths, 9, 4, 4)
            bad = [] if got == codes.tolist() else [block]
            assert [number for number, one in enumerate(slow) if one is None] == bad
    assert unseen == [(start, 31) for start in starts]


def test_a_bit_that_swaps_equally_likely_codes_is_not_found_here():
    """What checksums are for: between intervals of one size, a code becomes another and the state stays as it was."""
    codes = np.array([[0, 1, 1, 0]])
    model = fit([codes], 1)
    words, lengths = round_trip(model, codes, 1)
    got = decode_or_none(model, words ^ np.array([0, 1 << 19], np.uint32), lengths, (1, 1, 4))
    assert got == [[1, 1, 1, 0]]


@SETTINGS
@given(seed=st.integers(0, 2 ** 32), blocks=st.integers(1, 4), symbols=st.integers(1, 9))
def test_arbitrary_words_are_refused_or_decoded_as_the_slow_way_does(seed, blocks, symbols):
    rng = np.random.default_rng(seed)
    model = fit([rng.integers(0, symbols, (20, 9))], 20)
    lengths = rng.integers(2, 6, blocks)
    extremes = [0, 1, 1 << 31, (1 << 32) - 1, (1 << 31) - 1]
    words = np.where(rng.random(lengths.sum()) < 0.5, rng.choice(extremes, lengths.sum()),
                     rng.integers(0, 1 << 32, lengths.sum())).astype(np.uint32)
    words[:2] = 0, 1 << 31  # one block that could be right
    got = decode_or_none(model, words, lengths, (2 * blocks, 2, 9))
    slow = slow_decode(model, words, lengths, 2 * blocks, 2, 3)
    bad = [block for block, one in enumerate(slow) if one is None]
    assert got == (bad[0] if bad else [image for block in slow for image in block])


@pytest.mark.parametrize('kind', ['random', 'copied'])
def test_lost_and_added_words_are_found_in_their_block(kind):
    codes = codes_of_kind(kind, 30, 4, 1)
    model = fit([codes], 30)
    words, lengths = round_trip(model, codes, 10)
    starts = np.cumsum(lengths) - lengths
    for block in range(3):
        for place in range(starts[block], starts[block] + lengths[block]):
            lost = lengths - (np.arange(3) == block)
            assert decode_or_none(model, np.delete(words, place), lost, (30, 10, 16)) == block
            more = lengths + (np.arange(3) == block)
            assert decode_or_none(model, np.insert(words, place + 1, 7), more, (30, 10, 16)) == block
    moved = lengths + (1, -1, 0)  # an index that disagrees
    assert decode_or_none(model, words, moved, (30, 10, 16)) == 0


@pytest.mark.parametrize('images', [21, 28, 29])
def test_another_number_of_images_is_found(images):
    codes = codes_of_kind('random', 25, 4, 1)
    model = fit([codes], 25)
    words, lengths = round_trip(model, codes, 10)
    assert decode_or_none(model, words, lengths, (images, 10, 16)) == 2
