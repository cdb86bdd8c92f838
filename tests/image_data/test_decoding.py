"""Which names are images; decoding against torchvision; what is wrong with an image, on one line."""
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from torchvision.datasets.folder import default_loader

from helpers import encoded, held, limits, noise, odd_images, published_transform
from image_data.decoding import (LONG_SIDE, BadImage, IgnoredFiles, avif_bytes, bare_bytes, decode_image,
                                 decode_oriented, decode_rgb, image_extensions, is_hidden, is_image, pixels_of,
                                 resize_square, scan_bytes, webp_bytes)

SIZE = 16
AVIF = pytest.mark.skipif('avif' not in features.get_supported(), reason='this Pillow has no AVIF')


# ---------------------------------------------------------------- names

@pytest.mark.parametrize('name', ['.DS_Store', '._a.png', '.a/b.png', 'a/.ipynb_checkpoints/b.png', '__MACOSX/a.png',
                                  'a/__MACOSX/._b.png', '.x.parts', 'a/@eaDir/b.png', './._a.png', 'lost+found'])
def test_hidden(name):
    assert is_hidden(name)


@pytest.mark.parametrize('name', ['a.png', './a.png', '../a/b.png', 'a.b/c.png', '_a/b_.png', 'a./b', 'MACOSX/a'])
def test_not_hidden(name):
    assert not is_hidden(name)


def test_extensions():
    for ending in ('jpg', 'JPEG', 'png', 'webp', 'bmp', 'gif', 'tif', 'TIFF', 'ppm', 'pgm', 'jp2', 'tga'):
        assert is_image(f'a/b.{ending}')
    for name in ('a.txt', 'a', 'jpg', 'a.jpg.txt', 'a.eps', 'a.h5', 'a.mpg', 'a.pdf', 'a.json', 'a.cls'):
        assert not is_image(name)
    assert all(ending == ending.lower() and ending[0] == '.' for ending in image_extensions())


def test_what_is_left_out_is_said_once_and_counted(capsys):
    ignored = IgnoredFiles()
    for name in ('a/b.txt', 'c/\udce9.txt', 'd.doc'):
        ignored.add(IgnoredFiles.OTHER, name)
    ignored.add(IgnoredFiles.HIDDEN, '\udce9.DS_Store')
    ignored.report('in')
    assert capsys.readouterr().out.splitlines() == [
        'note: in: files of kinds that are not read left out: 3 (first: a/b.txt)',
        r'note: in: hidden names (such as .DS_Store) passed over: 1 (first: \udce9.DS_Store)']


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', pytest.param('AVIF', marks=AVIF)])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_ignored_or_applied(kind, orientation):
    data = held(noise(orientation), orientation, kind)
    stored = Image.open(io.BytesIO(data)).convert('RGB')
    plain, found = decode_oriented(data)
    assert found == orientation and torch.equal(pixels_of(plain), pixels_of(stored))
    turned = decode_rgb(data, exif_rotate=True)
    assert torch.equal(pixels_of(turned), pixels_of(ImageOps.exif_transpose(stored)))
    assert (turned.size == stored.size) == (orientation < 5)


@pytest.mark.parametrize('exif', [b'', b'Exif\x00\x00', b'Exif\x00\x00II*\x00\xff\xff\xff\xff', b'junk' * 9,
                                  b'Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x09\x00\x00'])
@pytest.mark.filterwarnings('ignore:Corrupt EXIF')  # PIL's, when it opens the file
def test_damaged_or_unknown_orientation_is_none(exif):
    """The pixels are whole: such an image was never unreadable."""
    data = encoded(noise(0), 'JPEG', exif=exif)
    for rotate in (False, True):
        image, orientation = decode_oriented(data, exif_rotate=rotate)
        assert orientation == 1 and torch.equal(pixels_of(image), pixels_of(decode_rgb(encoded(noise(0), 'JPEG'))))


@pytest.mark.parametrize('name', odd_images())
def test_odd_images_are_as_before_without_the_flag_and_upright_with_it(name):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(odd_images()[name]))).convert('RGB')
    assert torch.equal(pixels_of(decode_rgb(odd_images()[name], exif_rotate=True)), pixels_of(image))


@pytest.mark.parametrize('name', odd_images())
def test_odd_images_become_what_torchvision_makes_of_them(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(odd_images()[name])
    expected = published_transform(SIZE)(default_loader(path))
    pixels = decode_image(path.read_bytes(), SIZE)
    assert is_image(name) and pixels.dtype == torch.uint8 and pixels.shape == (3, SIZE, SIZE)
    assert torch.equal(pixels / torch.full((1,), 255.), expected) and pixels.max() > 0


@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGBA', 'CMYK', 'I;16', '1'])
def test_images_of_every_mode_become_rgb(mode):
    rgb = Image.radial_gradient('L').resize((32, 32))
    image = Image.new('I;16', (32, 32), 9000) if mode == 'I;16' else rgb.convert('RGB').convert(mode)
    pixels = decode_image(encoded(image, 'JPEG' if mode == 'CMYK' else 'PNG'), SIZE)
    assert pixels.shape == (3, SIZE, SIZE) and pixels.max() > 0


@pytest.mark.parametrize('data, why', [(b'', 'an empty file'), (b'no image', 'no image of a kind that is read'),
                                       (encoded(noise(0))[:700], 'truncated'), (b'\0\5\x16\7' + bytes(100), 'no image'),
                                       (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'no image')])
def test_bad_images_get_one_line_without_the_name_of_an_object(data, why):
    with pytest.raises(BadImage, match=why) as caught:
        decode_image(data, SIZE)
    assert '\n' not in str(caught.value) and 'BytesIO' not in str(caught.value)


@pytest.mark.parametrize('size', [(1, 70_000), (131_071, 2), (1, 89_000_000), (30_000_000, 2)])
def test_extreme_sides_become_squares_in_little_memory(size):
    image = Image.new('RGB', size, (9, 8, 7))
    wide = size[0] > size[1]
    image.paste((200, 8, 7), (0, 0, size[0] // 2 if wide else size[0], size[1] if wide else size[1] // 2))
    with limits():
        pixels = resize_square(image, 256)
    assert pixels.shape == (3, 256, 256) and pixels[1:].flatten(1).unique(dim=1).tolist() == [[8], [7]]
    assert pixels[0, 0, 0] == 200 and pixels[0, -1, -1] == 9
    if max(size) < 2 * LONG_SIDE:  # as published
        expected = image.resize((256, 256), Image.Resampling.BICUBIC)
        assert torch.equal(pixels, pixels_of(expected))


def test_an_error_of_pil_that_names_the_buffer(monkeypatch):
    def open_(file, formats):
        raise OSError(f'cannot find\nanything in {file!r}')
    monkeypatch.setattr(Image, 'open', open_)
    with pytest.raises(BadImage, match='^cannot find anything in it$'):
        decode_image(b'x', SIZE)


def test_decompression_bombs_are_bad_images_unless_they_are_allowed(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    data = encoded(noise(0, (20, 30)))
    with pytest.raises(BadImage, match='decompression bomb.*--max-image-pixels'):
        decode_image(data, SIZE)
    allowed = decode_image(data, SIZE, max_pixels=600)
    with pytest.raises(BadImage, match=r'30 x 20 pixels.*--max-image-pixels'):
        decode_image(data, SIZE, max_pixels=599)
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert torch.equal(allowed, decode_image(data, SIZE))


def test_pil_is_not_asked_about_formats_that_run_other_programs():
    with Image.open(io.BytesIO(encoded(noise(0), 'EPS'))) as image:
        assert image.format == 'EPS'  # PIL alone would call ghostscript
    with pytest.raises(BadImage, match='no image of a kind'):
        decode_image(encoded(noise(0), 'EPS'), SIZE)


# ---------------------------------------------------------------- bytes without headers

def scan_by_hand(data):
    """Bytes between the only SOS header of a JPEG and its EOI, by the first place of either."""
    start = data.index(b'\xff\xda')
    start += 2 + int.from_bytes(data[start + 2:start + 4], 'big')
    return data.rindex(b'\xff\xd9') - start


def test_bytes_of_a_jpeg_without_headers():
    image = noise(0, (40, 56))
    plain = encoded(image, 'JPEG', quality=50)
    assert scan_bytes(plain) == scan_by_hand(plain) > 500
    # a whole JPEG in a header, and restart markers, are not counted as scans, or ends of one
    assert scan_bytes(encoded(image, 'JPEG', quality=50, comment=plain)) == scan_by_hand(plain)
    restarting = encoded(image, 'JPEG', quality=50, restart_marker_blocks=1)
    assert b'\xff\xd1' in restarting
    assert scan_bytes(restarting) == scan_by_hand(restarting)
    # several scans: those of a progressive file, with tables between
    progressive = encoded(image, 'JPEG', quality=50, progressive=True)
    assert progressive.count(b'\xff\xda') > 1
    assert scan_by_hand(plain) / 2 < scan_bytes(progressive) < scan_by_hand(progressive)
    assert scan_bytes(encoded(image, 'PNG')) is None
    assert scan_bytes(plain[:-100]) is None
    assert scan_bytes(plain + b'more') == scan_by_hand(plain)


def test_bytes_of_a_webp_without_headers():
    image = noise(0, (40, 57))
    plain = encoded(image, 'WEBP', quality=50)
    assert bare_bytes(plain) == webp_bytes(plain) == int.from_bytes(plain[16:20], 'little')
    assert len(plain) - 22 < webp_bytes(plain) <= len(plain) - 20
    with_exif = encoded(image, 'WEBP', quality=50, exif=b'Exif\0\0' + bytes(500))  # a VP8X chunk and one of EXIF
    assert webp_bytes(with_exif) == webp_bytes(plain) < len(with_exif) - 500
    assert webp_bytes(encoded(image, 'WEBP', lossless=True)) > 40 * 57
    assert webp_bytes(plain[:-9]) is None and bare_bytes(encoded(image)) is None
    assert bare_bytes(encoded(image, 'JPEG')) == scan_bytes(encoded(image, 'JPEG'))


@AVIF
def test_avif_images_are_read():
    image = noise(0, (30, 41))
    data = encoded(image, 'AVIF', quality=80)
    assert is_image('a/b.avif')
    assert torch.equal(pixels_of(decode_rgb(data)), pixels_of(Image.open(io.BytesIO(data)).convert('RGB')))
    with pytest.raises(BadImage):
        decode_rgb(data[:-200])


@AVIF
def test_bytes_of_an_avif_without_boxes():
    image = noise(0, (40, 57))
    plain = encoded(image, 'AVIF', quality=50)
    assert bare_bytes(plain) == avif_bytes(plain) == len(plain) - plain.index(b'mdat') - 4  # all of the last box
    exif = Image.Exif()
    exif[0x010e] = 500 * 'a'  # a description
    with_exif = encoded(image, 'AVIF', quality=50, exif=exif, xmp=bytes(300))
    assert avif_bytes(with_exif) == avif_bytes(plain) < len(with_exif) - 800
    alpha = image.copy()
    alpha.putalpha(noise(1, (40, 57)).convert('L'))
    assert avif_bytes(encoded(alpha, 'AVIF', quality=50)) > avif_bytes(plain) + 500
    film = encoded(image, 'AVIF', save_all=True, append_images=[noise(1, (40, 57))])
    assert avif_bytes(film) is None


def box(kind, *content, wide=False):
    content = b''.join(content)
    if wide:
        return struct.pack('>I4sQ', 1, kind, 16 + len(content)) + content
    return struct.pack('>I4s', 8 + len(content), kind) + content


def avif_by_hand(version, kind=b'av01', place=0, brand=b'avif'):
    """An AVIF of two items, one of two extents of 30 and 40 bytes and one of 7, and of an item of metadata."""
    number, id_format = (3, '>I') if version == 2 else (2, '>H')
    infos = [box(b'infe', struct.pack('>I', number << 24), struct.pack(id_format, item), b'\0\0', name)
             for item, name in ((1, kind), (2, kind), (9, b'Exif'))]
    count = struct.pack('>I' if version == 2 else '>H', 3)
    iinf = box(b'iinf', bytes([version and 1, 0, 0, 0]), struct.pack('>I' if version else '>H', 3), *infos)
    located = []
    for item, lengths in ((1, (30, 40)), (2, (7,)), (9, (20,))):
        located += [struct.pack(id_format, item), struct.pack('>H', place) if version else b'', bytes(2),
                    struct.pack('>H', 5), struct.pack('>H', len(lengths))]
        for length in lengths:
            located += [b'\0' if version else b'', struct.pack('>HI', 3, length)]  # an index of one byte, of four bits
    iloc = box(b'iloc', bytes([version, 0, 0, 0, 0x24, 0x21 if version else 0x20]), count, *located)
    meta = box(b'meta', bytes(4), iloc, box(b'idat', bytes(60)), iinf, wide=version == 1)
    return box(b'ftyp', brand, bytes(4), b'mif1', brand) + meta + struct.pack('>I4s', 0, b'mdat') + bytes(97)


@pytest.mark.parametrize('version', [0, 1, 2])
def test_every_version_of_the_boxes(version):
    assert avif_bytes(avif_by_hand(version)) == 77
    assert avif_bytes(avif_by_hand(version, kind=b'hvc1')) is None
    assert avif_bytes(avif_by_hand(version, brand=b'heic')) is None
    if version:
        assert avif_bytes(avif_by_hand(version, place=1)) == 77  # in the box idat
        assert avif_bytes(avif_by_hand(version, place=2)) is None  # within another item


@pytest.mark.parametrize('version', [0, 1, 2])
def test_damaged_boxes_have_no_bytes_that_can_be_told(version):
    data = avif_by_hand(version)
    for end in range(data.index(b'mdat') - 4):
        assert bare_bytes(data[:end]) is None
    rng = np.random.default_rng(version)
    for _ in range(2000):
        damaged = bytearray(data)
        damaged[rng.integers(len(data) - 97)] = rng.integers(256)
        found = bare_bytes(bytes(damaged))
        assert found is None or 0 < found <= 3 * len(data)
