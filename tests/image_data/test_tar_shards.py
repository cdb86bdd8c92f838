"""Tar shards: what is read, and that a damaged or short one never gives fewer images in silence."""
import io
import json
import tarfile

import pytest

from fileio.labels import MAX_CLASS
from helpers import encoded, fails, noise, tar_samples, write_tar
from image_data.decoding import IgnoredFiles
from image_data.tar_shards import BLOCK, MAX_END, read_tar


def read(path):
    """The images of a shard, and what was left out by reason."""
    ignored = IgnoredFiles()
    return list(read_tar(path, ignored)), ignored.counts


def headers(path):
    """The offsets of the headers, and of the end."""
    with tarfile.open(path) as tar:
        return [member.offset for member in tar] + [tar.offset]


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / 'a.tar', tar_samples(6))


# ---------------------------------------------------------------- what is read

@pytest.mark.parametrize('form', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_are_found_by_offset(form, tmp_path):
    members = tar_samples(4, 'x/' + 'long-' * 30 + '/') if form != tarfile.USTAR_FORMAT else tar_samples(4)
    with tarfile.open(tmp_path / 'a.tar', 'w', format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    images, ignored = read(tmp_path / 'a.tar')
    raw = (tmp_path / 'a.tar').read_bytes()
    assert [image.label for image in images] == [0, 1, 2, 0] and not ignored
    assert [image.name for image in images] == [name for name, _ in members if name.endswith('.jpg')]
    assert [raw[image.offset:image.offset + image.size] for image in images] == [
        data for name, data in members if name.endswith('.jpg')]


def test_hidden_members_are_passed_over(tmp_path):
    members = [('__MACOSX/x/._0000.jpg', b'x'), ('x/.DS_Store', b'x')]
    for i in range(3):
        for ending, data in (('cls', b'%d' % i), ('jpg', encoded(noise(i), 'JPEG'))):
            members += [(f'./x/._{i:04d}.{ending}', b'\0\5\x16\7' + bytes(100)), (f'./x/{i:04d}.{ending}', data)]
    members.append(('.hidden/0.jpg', b'x'))
    images, ignored = read(write_tar(tmp_path / 'a.tar', members))
    assert [image.label for image in images] == [0, 1, 2] and ignored == {IgnoredFiles.HIDDEN: 9}


@pytest.mark.parametrize('ending', ['bmp', 'gif', 'tif', 'tiff', 'ppm', 'jp2', 'BMP', 'JPEG', 'jfif'])
def test_images_of_every_kind_that_pil_reads(ending, tmp_path):
    members = [('0.jpg', b'x'), ('0.cls', b'0'), (f'1.{ending}', b'x'), ('1.cls', b'1'), ('2.png', b'x'),
               ('2.cls', b'2')]
    images, ignored = read(write_tar(tmp_path / 'a.tar', members))
    assert [image.label for image in images] == [0, 1, 2] and not ignored


@pytest.mark.parametrize('name', ['1.heic', '1.raw.png', '1', '1.mp4', '1.eps'])
def test_samples_without_an_image_are_named_and_counted(name, tmp_path):
    members = [('0.jpg', b'x'), ('0.cls', b'0'), (name, b'x'), ('1.cls', b'1'), ('2.cls', b'1'), ('3.txt', b'hello')]
    ignored = IgnoredFiles()
    images = list(read_tar(write_tar(tmp_path / 'a.tar', members), ignored))
    assert len(images) == 1 and ignored.counts == {IgnoredFiles.NO_IMAGE: 3}
    assert ignored.first[IgnoredFiles.NO_IMAGE] == f'a.tar/{name}'


def test_of_a_usual_and_an_unusual_image_the_usual_one_is_taken(tmp_path):
    images, ignored = read(write_tar(tmp_path / 'a.tar', [
        ('1.bmp', b'x'), ('1.cls', b'1'), ('1.jpg', b'y'), ('1.txt', b'a caption')]))
    assert [image.name for image in images] == ['1.jpg'] and ignored == {IgnoredFiles.OTHER: 1}
    fails(lambda: read(write_tar(tmp_path / 'a.tar', [('1.bmp', b'x'), ('1.gif', b'x'), ('1.cls', b'1')])),
          '1.bmp and 1.gif are two images')


def test_labels(tmp_path):
    for kind, data in (('cls', b'7\n'), ('cls', b' 7 '), ('json', b'{"label": 7, "x": []}'), ('json', b'7')):
        images, _ = read(write_tar(tmp_path / 'a.tar', [('1.jpg', b'x'), (f'1.{kind}', data)]))
        assert [image.label for image in images] == [7]
    images, _ = read(write_tar(tmp_path / 'a.tar', [('1.json', b'{"label": 1}'), ('1.jpg', b'x'), ('1.cls', b'2')]))
    assert [image.label for image in images] == [2]


# ---------------------------------------------------------------- shards that are not right

@pytest.mark.parametrize('members, said', [
    ([('1.jpg', b'x')], '1 has no label'), ([('x/1.v2.jpg', b'x'), ('x/1.jpg', b'x')], 'x/1 has no label'),
    ([('1.jpg', b'x'), ('1.cls', b'cat')], '1.cls holds no integer label'),
    ([('1.jpg', b'x'), ('1.cls', b'-2')], '1.cls holds no integer label'),
    ([('1.jpg', b'x'), ('1.cls', b'1.5')], '1.cls holds no integer label'),
    ([('1.jpg', b'x'), ('1.cls', b'')], '1.cls holds no integer label'),
    ([('1.jpg', b'x'), ('1.cls', b'999999999')], f'1.cls holds no integer label from 0 to {MAX_CLASS:,}'),
    ([('1.jpg', b'x'), ('1.cls', b'%d' % (MAX_CLASS + 1))], '1.cls holds no integer label'),
    ([('1.jpg', b'x'), ('1.json', b'{"label": true}')], '1.json holds no integer label'),
    ([('1.jpg', b'x'), ('1.json', json.dumps({'label': 10 ** 30}).encode())], '1.json holds no integer label'),
    ([('1.jpg', b'x'), ('1.json', b'{}')], '1 has no label'),
    ([('1.jpg', b'x'), ('2.jpg', b'x'), ('1.cls', b'1')], '1 has no label'),
    ([('1.jpg', b'x'), ('1.png', b'x'), ('1.cls', b'1')], '1.jpg and 1.png')])
def test_bad_samples_get_one_line(members, said, tmp_path):
    fails(lambda: read(write_tar(tmp_path / 'a.tar', members)), 'a.tar', said)


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_special_members_are_refused(kind, tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        member = tarfile.TarInfo('1.jpg')
        member.type = kind
        member.linkname = '/etc/passwd'
        tar.addfile(member)
    fails(lambda: read(tmp_path / 'a.tar'), 'a.tar', '1.jpg is a link or another special')


def test_what_is_no_tar(tmp_path):
    path = tmp_path / 'a.tar'
    for data in (b'junk' * 1000, b'', b'x', b'\x1f\x8b' + bytes(5000), b'\1' + bytes(5000)):
        path.write_bytes(data)
        fails(lambda: read(path), 'a.tar', 'no tar file, compressed, or truncated')
    fails(lambda: read(tmp_path / 'none.tar'), 'none.tar: No such file')
    (tmp_path / 'dir.tar').mkdir()
    fails(lambda: read(tmp_path / 'dir.tar'), 'dir.tar: Is a directory')


@pytest.mark.parametrize('field', [0, 100, 124, 135, 148, 156, 257])
@pytest.mark.parametrize('number', range(1, 12))
def test_a_flipped_bit_in_a_header(shard, number, field):
    raw = bytearray(shard.read_bytes())
    offset = headers(shard)[number]
    raw[offset + field] ^= 1
    shard.write_bytes(raw)
    fails(lambda: read(shard), 'a.tar: damaged', f'byte {offset:,}')


@pytest.mark.parametrize('number', range(12))
def test_a_zeroed_header(shard, number):
    raw = bytearray(shard.read_bytes())
    offset = headers(shard)[number]
    raw[offset:offset + BLOCK] = bytes(BLOCK)
    shard.write_bytes(raw)
    fails(lambda: read(shard), 'a.tar: has an end, or a damaged header', f'at byte {offset:,}', f'{offset + BLOCK:,}')


@pytest.mark.parametrize('more', [0, 1, 100, 511, 512, 513])
@pytest.mark.parametrize('number', range(1, 13))
def test_a_shard_cut_at_a_header_or_after_it(shard, number, more):
    """From 'between two members, without an end mark' to 'in the middle of one'."""
    raw = shard.read_bytes()
    length = headers(shard)[number] + more
    shard.write_bytes(raw[:length])
    fails(lambda: read(shard), 'a.tar: (damaged|ends at)', 'truncated|no header', r'byte [\d,]+')


def test_every_length_of_the_end(shard):
    raw = shard.read_bytes()
    end = headers(shard)[-1]
    assert len(read(shard)[0]) == 6
    for zeros in (2, 3, 10, 20, 22):
        shard.write_bytes(raw[:end] + bytes(zeros * BLOCK))
        assert len(read(shard)[0]) == 6
    for zeros in (0, 100, BLOCK, 2 * BLOCK - 1):
        shard.write_bytes(raw[:end] + bytes(zeros))
        fails(lambda: read(shard), f'a.tar: ends at byte {end + zeros:,} without the end mark')
    for zeros in (MAX_END + 1, 1 << 20):
        shard.write_bytes(raw[:end] + bytes(zeros))
        fails(lambda: read(shard), f'a.tar: only zeros from byte {end:,} on', 'not finished')


def test_a_download_that_left_zeros(tmp_path):
    path = write_tar(tmp_path / 'a.tar', tar_samples(30))
    raw = path.read_bytes()
    for number in (1, 8, 21, 30):
        start = headers(path)[number]
        path.write_bytes(raw[:start] + bytes(len(raw) - start))
        fails(lambda: read(path), f'a.tar: only zeros from byte {start:,} on')
        path.write_bytes(raw)


@pytest.mark.parametrize('padding', [0, BLOCK, 10_000])
def test_archives_one_after_the_other(shard, tmp_path, padding):
    other = write_tar(tmp_path / 'b.tar', tar_samples(3, 'z'))
    end = headers(shard)[-1]
    shard.write_bytes(shard.read_bytes() + bytes(padding) + other.read_bytes())
    fails(lambda: read(shard), f'a.tar: (has an end.* at byte {end:,}, but more|only zeros from byte {end:,})')


@pytest.mark.parametrize('junk', [b'x', b'\0' * 600 + b'x', b'\0' * 5000 + b'x' * 512])
def test_junk_behind_the_end(shard, junk):
    end = headers(shard)[-1]
    shard.write_bytes(shard.read_bytes()[:end + 2 * BLOCK] + junk)
    fails(lambda: read(shard), 'a.tar: has an end', f'at byte {end:,}')


def test_a_damaged_long_name(tmp_path):
    path = write_tar(tmp_path / 'a.tar', tar_samples(3, 'x' * 150))
    raw = path.read_bytes()
    second = headers(path)[1]
    for at in (second + 148, second + 2 * BLOCK + 148):  # of the long name, and of the header that follows it
        bad = bytearray(raw)
        bad[at] ^= 1
        path.write_bytes(bad)
        fails(lambda: read(path), 'a.tar: damaged', 'byte')
