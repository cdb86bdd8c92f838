"""Codes to bytes and back, against slow decoders and golden bytes."""
import gzip

import numpy as np
import pytest

from helpers import fails
from token_files.published import CODECS, PUBLISHED, codec_for, decode_escaped, decode_uint16, encode
from twins import SLOW_DECODERS, slow_decode_escaped


@pytest.mark.parametrize('name, codes', [('escaped-bytes', 1), ('escaped-bytes', 255), ('escaped-bytes', 256),
                                         ('escaped-bytes', 391), ('escaped-bytes', 510), ('uint16-le', 1),
                                         ('uint16-le', 511), ('uint16-le', 65536)])
def test_round_trip_against_slow_decoder(name, codes):
    x = np.random.default_rng(codes).integers(0, codes, (20, 64))
    x[0, 0] = codes - 1
    stream, index = encode(CODECS[name], x)
    assert stream.dtype == np.uint8 and index.dtype == np.int64 and index[0] == 0 and index[-1] == len(stream)
    decoded, lengths = CODECS[name].decode(stream, index)
    assert decoded.dtype == np.uint16 and np.array_equal(decoded.reshape(x.shape), x)
    assert lengths.dtype == np.int64 and lengths.tolist() == [64] * 20
    assert [SLOW_DECODERS[name](stream[a:b].tolist()) for a, b in zip(index, index[1:])] == x.tolist()


def test_golden_bytes(golden):
    z = golden('codec.npz')
    stream, index = encode(PUBLISHED, z['tokens'])
    assert gzip.decompress((golden.folder / 'sample-token.data.bin.gz').read_bytes()) == stream.tobytes()
    assert slow_decode_escaped(stream[index[5]:index[6]].tolist()) == z['tokens'][5].tolist()


def test_codes_of_any_integer_type():
    for dtype in (np.uint8, np.int16, np.uint16, np.int64):
        x = np.array([[0, 254, 255, 127]]).astype(dtype)
        for codec in CODECS.values():
            assert codec.decode(*encode(codec, x))[0].tolist() == x.ravel().tolist()


@pytest.mark.parametrize('name, bad, match', [
    ('escaped-bytes', 510, 'escaped-bytes holds 0 to 509'), ('escaped-bytes', -1, '0 to 509'),
    ('uint16-le', 65536, 'uint16-le holds 0 to 65535'), ('uint16-le', -1, '0 to 65535')])
def test_codes_beyond_the_format_are_refused(name, bad, match):
    with pytest.raises(ValueError, match=match):
        encode(CODECS[name], np.array([[0, bad]]))


def test_the_codec_is_chosen_by_the_size_of_the_codebook():
    assert [codec_for(k).name for k in (1, 510, 511, 8192, 65536)] == ['escaped-bytes'] * 2 + ['uint16-le'] * 3
    assert PUBLISHED is CODECS['escaped-bytes'] and PUBLISHED.largest_code == 509
    fails(lambda: codec_for(65537), '65537 codes')


@pytest.mark.parametrize('stream, offsets, image', [
    ([1, 255], [0, 2], 0), ([1, 2, 255], [0, 1, 3], 1), ([1, 255, 0, 2], [0, 2, 4], 0), ([255, 255], [0, 2], 0),
    ([1, 255, 255, 7], [0, 1, 4], 1), ([255, 3, 255], [0, 2, 3], 1), ([1, 255, 255, 2], [0, 2, 4], 0)])
def test_a_dangling_escape_byte_names_its_image(stream, offsets, image):
    with pytest.raises(ValueError) as caught:
        decode_escaped(np.array(stream, np.uint8), np.array(offsets))
    assert caught.value.args == (image, 'has a dangling escape byte')
    assert slow_decode_escaped(stream[offsets[image]:offsets[image + 1]]) is None


def test_half_a_code_names_its_image():
    with pytest.raises(ValueError) as caught:
        decode_uint16(np.zeros(6, np.uint8), np.array([0, 2, 5, 6]))
    assert caught.value.args == (1, 'has an odd number of bytes')


def test_random_bytes_decode_as_the_slow_decoders_say():
    rng = np.random.default_rng(0)
    for _ in range(300):
        stream = rng.choice([0, 7, 254, 255], rng.integers(1, 9)).astype(np.uint8)
        inner = rng.permutation(np.arange(1, len(stream)))[:rng.integers(0, 3)]
        offsets = np.array([0, *sorted(inner), len(stream)])
        for name, codec in CODECS.items():
            slow = [SLOW_DECODERS[name](stream[a:b].tolist()) for a, b in zip(offsets, offsets[1:])]
            if None in slow:
                with pytest.raises(ValueError) as caught:
                    codec.decode(stream, offsets)
                assert slow[caught.value.args[0]] is None
            else:
                codes, lengths = codec.decode(stream, offsets)
                assert codes.tolist() == sum(slow, []) and lengths.tolist() == [len(image) for image in slow]
