"""Hostile files: each ends in an InputError of one line, within bounds of time and memory (see scripts/fuzz.py)."""
import argparse
import gzip
import hashlib
import io
import json
import pickle
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import safetensors.torch
import torch

pytest.importorskip('hypothesis')
import fuzz  # noqa: E402
import token_dataset as td  # noqa: E402
import tokenize_images  # noqa: E402
import utils  # noqa: E402
from checkpoints import load_checkpoint, load_weights  # noqa: E402
from image_sources import open_source  # noqa: E402
from image_tokenizer import load_tokenizer  # noqa: E402
from utils import InputError  # noqa: E402

INPUTS = {'index': 100, 'labels': 100, 'synonyms': 80, 'log': 80, 'cache': 80, 'tar': 80}


@pytest.mark.parametrize('name', fuzz.READERS)
def test_reader_is_right_or_refuses(name, tmp_path):
    counts = fuzz.fuzz(name, INPUTS.get(name, 60), tmp_path)
    assert counts['right'] and (counts['refused'] or name == 'log'), counts


def refused(path, read, *args, match):
    """The message with which `read` refuses a file, within the limits of scripts/fuzz.py."""
    with fuzz.limits(), pytest.raises(InputError, match=match) as caught:
        read(*args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(path) in message and len(message) < 1000
    return message


# ---------------------------------------------------------------- token sets

def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text):
    """A .npy of a header and nothing else."""
    return b'\x93NUMPY\x01\x00' + len(text).to_bytes(2, 'little') + text.encode()


def write_set(folder, stream, index):
    path = folder / 'a.data.bin.gz'
    path.write_bytes(gzip.compress(stream, 1))
    td.index_path(path).write_bytes(gzip.compress(index if isinstance(index, bytes) else npy(index), 1))
    return path


@pytest.mark.parametrize('index, match', [
    (npy(np.arange(3)) + bytes(1 << 26), 'unpacks to more than'),
    (header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,)}\n"), 'not a .npy array'),
    (header("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}\n"), 'not a .npy array'),
    (header("{'descr': '<i8', 'fortran_order': False, 'shape': (1e9,)}\n"), 'not a .npy array'),
    (header('(' * 5000), 'not a .npy array'),
    (header("{'descr': '<i8', 'fortran_order': False,\n 'shape'"), 'not a .npy array'),
    (b'', 'not a .npy array'),
    (npy(np.array([0, 2 ** 63 + 5], np.uint64)), 'do not rise'),
    (npy(np.array([0, 2 ** 62])), 'more than 2,097,152 bytes'),
])
def test_index_claims_too_much(tmp_path, index, match):
    path = write_set(tmp_path, bytes(16), index)
    refused(td.index_path(path), td.open_codes, path, 'none', match=match)


def test_npz_is_no_index(tmp_path):
    file = io.BytesIO()
    np.savez(file, np.arange(3))
    path = write_set(tmp_path, bytes(2), file.getvalue())
    refused(td.index_path(path), td.read_index, path, match='not a .npy array')


def test_stream_bomb_is_read_only_as_far_as_its_index_says(tmp_path):
    path = write_set(tmp_path, bytes(1 << 28), [0, 4, 8])
    refused(path, td.open_codes, path, 'none', match='goes on after byte 8')


def test_index_says_more_bytes_than_gzip_can_hold(tmp_path):
    path = write_set(tmp_path, bytes(64), np.arange(1 << 12) << 20)
    refused(path, td.open_codes, path, 'none', match='no gzip of its size unpacks to')


def test_one_large_image_does_not_make_all_large(tmp_path, monkeypatch):
    """100,000 images as large as the first would take 200 GB."""
    monkeypatch.setattr(td, 'CHUNK_BYTES', 1 << 20)
    path = write_set(tmp_path, bytes((1 << 20) + 100_000), np.concatenate([[0], (1 << 20) + np.arange(100_001)]))
    refused(path, td.open_codes, path, 'none', match='are more than the 1148576 bytes')
    refused(path, td.open_codes, path, match='are more than the 1148576 bytes')
    assert not list(tmp_path.glob('*.npy')) and not list(tmp_path.glob('.*'))


def test_labels_are_bounded_and_strict(tmp_path, monkeypatch):
    path = tmp_path / 'labels'
    for text, match in ((b'1\n1_0\n', "line 2 .*'1_0'"), (b'9' * 18 + b'\n' + b'9' * 19, 'line 2'),
                        (b'9223372036854775807\nx', 'line 1'), (b'1\n\n2', 'line 2'), (b'\xff\n', 'line 1')):
        path.write_bytes(text)
        refused(path, td.read_labels, path, match=match)
    monkeypatch.setattr(td, 'MAX_LABEL_BYTES', 10)
    path.write_bytes(b'1\n' * 6)
    refused(path, td.read_labels, path, match='more than 10 bytes')


def test_damaged_cache_is_refused(tmp_path):
    path = write_set(tmp_path, bytes(8), [0, 4, 8])
    assert td.open_codes(path).shape == (2, 4)
    cache = next(tmp_path.glob('*.npy'))
    cache.write_bytes(cache.read_bytes()[:-1])
    refused(cache, td.open_codes, path, match='damaged cache.*delete it')


# ---------------------------------------------------------------- checksums

def carded_set(folder):
    path = write_set(folder, bytes(8), [0, 4, 8])
    labels = folder / 'labels'
    labels.write_text('0\n1\n')
    files = {file.name: {'bytes': file.stat().st_size, 'sha256': utils.sha256(file)}
             for file in (path, td.index_path(path), labels)}
    td.card_path(path).write_text(json.dumps({'format': td.BYTES, 'files': files}))
    return path, labels


@pytest.mark.parametrize('cache', ['', 'none'])
@pytest.mark.parametrize('damage', ['stream', 'index', 'labels'])
def test_what_differs_from_its_card_is_refused(tmp_path, cache, damage):
    path, labels = carded_set(tmp_path)
    assert len(td.TokenDataset(path, labels, 256, cache)) == 2
    if damage == 'labels':
        labels.write_text('0\n2\n')
    else:  # right in structure, but other codes
        write_set(tmp_path, *((b'\1' * 8, [0, 4, 8]) if damage == 'stream' else (bytes(8), [0, 1, 8])))
    bad = {'stream': path, 'index': td.index_path(path), 'labels': labels}[damage]
    refused(bad, td.TokenDataset, path, labels, 256, cache, match='changed or damaged, fetch or make it again')


def test_labels_of_the_users_own_are_allowed(tmp_path):
    path, _ = carded_set(tmp_path)
    (tmp_path / 'mine').write_text('5\n6\n')
    assert td.TokenDataset(path, tmp_path / 'mine', 256).labels.tolist() == [5, 6]


def test_card_of_another_set_is_refused(tmp_path):
    path, _ = carded_set(tmp_path)
    card = td.card_path(path)
    card.write_text(card.read_text().replace('a.data', 'b.data'))
    refused(card, td.open_codes, path, match='says nothing of a.data.bin.gz')


# ---------------------------------------------------------------- JSON

@pytest.mark.parametrize('text', [b'[' * 1_000_000, b'{"a":' * 100_000, b'9' * 5000, b'[' + b'0,' * (1 << 24) + b'0]',
                                  b'\xff', b'\0', b''])
def test_json_bombs(tmp_path, text):
    path = write_set(tmp_path, bytes(8), [0, 4, 8])
    card, synonyms = td.card_path(path), tmp_path / 'synonyms.json'
    card.write_bytes(text)
    synonyms.write_bytes(text)
    refused(card, td.open_codes, path, match='not JSON|more than')
    refused(synonyms, td.load_synonyms, synonyms, 4, 2, match='not JSON|more than')


def test_long_values_of_a_card_are_not_printed_whole(tmp_path):
    path = write_set(tmp_path, bytes(8), [0, 4, 8])
    for card in ({'format': 'x' * 10_000}, {'images': json.loads('[' * 900 + ']' * 900)}, {'grid': ['\n'] * 10_000}):
        td.card_path(path).write_text(json.dumps(card))
        refused(td.card_path(path), td.open_codes, path, match='none of the|says')


def test_log_keeps_whole_lines_only(tmp_path):
    path = tmp_path / 'log.txt'
    bad = b'5\n[]\n' + b'[' * 100_000 + b'\n{"epoch": "1"}\n\xff\n'
    path.write_bytes(b'{"epoch": 0}\n' + bad + b'{"epoch": 1}\n{"epoch": 2, "l')
    utils.RunLog(path, 2).write(epoch=2)
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n'


# ---------------------------------------------------------------- torch files

def repacked(value, pickled=None, compress=zipfile.ZIP_STORED):
    """A torch file of `value`, its pickle replaced, its members compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(fuzz.torch_bytes(value))) as source, zipfile.ZipFile(out, 'w', compress) as file:
        for member in source.infolist():
            swap = pickled is not None and member.filename.endswith('data.pkl')
            file.writestr(member.filename, pickled if swap else source.read(member))
    return out.getvalue()


def claims_more():
    """A torch file one of whose members says that it is longer than the file."""
    data = fuzz.torch_bytes(torch.ones(2, 2))
    at = data.rindex(b'PK\1\2') + 20
    return data[:at] + b'\xff\xff\xff\x7f' * 2 + data[at + 8:]


def hostile_torch_files():
    swelling = b'\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.'  # bytearray(2 ** 31 - 1)
    yield 'compressed', repacked(torch.zeros(1 << 20, 8), compress=zipfile.ZIP_DEFLATED), 'compressed'
    yield 'size', claims_more(), 'claim|damaged'
    yield 'strides', fuzz.torch_bytes(torch.ones(1, 1).half().expand(1 << 30, 1 << 30)), 'claim more numbers'
    yield 'bytearray', repacked(torch.ones(1), swelling), 'calls bytearray'
    yield 'old', pickle.dumps(0x1950a86a20f9469cfc6c, 2) + pickle.dumps(1001, 2) + swelling, 'calls bytearray'
    encode = b'c_codecs\nencode\n(X\x01\0\0\0aX\x05\0\0\0utf-8tR' + 40 * b'q\0c_codecs\nencode\n(h\0X\x03\0\0\0HEXtR'
    yield 'encode', repacked(torch.ones(1), b'\x80\x02' + encode + b'.'), 'calls encode'
    yield 'long name', repacked(torch.ones(1), b'\x80\x02c' + b'[' * 100_000 + b'\nx\n.'), 'name too long'
    word = b'X' + (1 << 17).to_bytes(4, 'little') + b'[' * (1 << 17)
    yield 'long string', repacked(torch.ones(1), b'\x80\x02' + word + b')R.'), 'name too long'
    yield 'sparse', fuzz.torch_bytes(torch.ones(2, 2).to_sparse()), 'not a plain one'
    yield 'code', fuzz.torch_bytes(Evil()), 'run code|runs code'


class Evil:
    def __reduce__(self):
        return exec, ('raise SystemExit("code was run")',)


@pytest.mark.parametrize('data, match', [pytest.param(*rest, id=name) for name, *rest in hostile_torch_files()])
def test_hostile_torch_files(tmp_path, data, match):
    path = tmp_path / 'file.pt'
    path.write_bytes(data)
    for read in td.load_codebook, load_checkpoint, load_tokenizer:
        refused(path, read, path, match=match)


def test_old_tar_format_writes_nothing(tmp_path, monkeypatch):
    """Torch 0.1's archives were unpacked to disk."""
    path = tmp_path / 'in' / 'old.pt'
    path.parent.mkdir()
    with tarfile.open(path, 'w') as archive:
        for name in 'storages', '../escaped', '/escaped':
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b'abc'))
    monkeypatch.chdir(path.parent)
    refused(path, load_checkpoint, path, match='checkpoint')
    assert sorted(file.name for file in tmp_path.rglob('*')) == ['in', 'old.pt']


def test_weights_that_torch_would_trust(tmp_path):
    model, path = torch.nn.Linear(2, 2), tmp_path / 'a.pth'
    state = model.state_dict()
    state._metadata = 5
    torch.save({'model': state}, path)
    load_weights(model, load_checkpoint(path)['model'], path)
    for key, value in (('weight', torch.ones(2, 2, dtype=torch.complex64)), ('weight', torch.ones(2, 2).long()),
                       ('weight', argparse.Namespace(shape=torch.Size([2, 2]))), ('a\nb\x1b[31m' * 100, torch.ones(1))):
        torch.save({'model': {**model.state_dict(), key: value}}, path)
        refused(path, lambda: load_weights(model, load_checkpoint(path)['model'], path), match='does not fit')


def vit(**changes):
    state = dict(fuzz.ViTVQGAN(fuzz.Size(4, 1, 1, 3), None, 0, 2, 8, 4).state_dict())
    return {key: value for key, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize('suffix', ['pt', 'safetensors'])
@pytest.mark.parametrize('state, match', [
    # without a stored table a patch of one pixel would give 65,536 positions of this width: 130 GB
    (vit(**{'encoder.en_pos_embedding': None, 'encoder.to_patch_embedding.0.weight': torch.ones(4, 3, 1, 1),
            'encoder.transformer.layers.0.0.fn.to_qkv.weight': torch.ones(1, 500_000)}), 'too large'),
    (vit(**{f'encoder.transformer.layers.{i}.x': torch.ones(1) for i in range(300)}), '300 layers'),
    (vit(**{'pre_quant.weight': torch.ones(2, 4, dtype=torch.int64)}), 'pre_quant.weight is missing'),
    ({'mean': torch.ones(12), 'basis': torch.ones(12, 0), 'scale': torch.tensor(1.)}, 'not a patch tokenizer'),
    ({'mean': torch.ones(12).long(), 'basis': torch.ones(12, 2), 'scale': torch.tensor(1.)}, 'not all float'),
])
def test_tokenizers_that_claim_too_much(tmp_path, state, match, suffix):
    path = tmp_path / f'tokenizer.{suffix}'
    (safetensors.torch.save_file if suffix == 'safetensors' else torch.save)(state, path)
    refused(path, load_tokenizer, path, match=match)


@pytest.mark.parametrize('data', [
    (1 << 60).to_bytes(8, 'little'), (1 << 20).to_bytes(8, 'little') + b'{' * (1 << 20),
    *(len(text).to_bytes(8, 'little') + text for text in (
        b'[' * 100_000, b'{"mean":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}' + bytes(4)))])
def test_hostile_safetensors(tmp_path, data):
    path = tmp_path / 'tokenizer.safetensors'
    path.write_bytes(data)
    refused(path, load_tokenizer, path, match='damaged or no .safetensors')


# ---------------------------------------------------------------- archives and addresses

@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_special_members_of_tar_shards_are_refused(tmp_path, kind):
    path = tmp_path / 'a.tar'
    with tarfile.open(path, 'w') as archive:
        member = tarfile.TarInfo('a.jpg')
        member.type, member.linkname = kind, '/etc/passwd'
        archive.addfile(member)
    refused(path, open_source, str(path), match='link or another special member')


def test_tar_shards_with_paths_are_never_unpacked(tmp_path):
    path = tmp_path / 'in' / 'a.tar'
    path.parent.mkdir()
    with tarfile.open(path, 'w') as archive:
        for name in '../a.jpg', '../a.cls', '/tmp/never/b.jpg', '/tmp/never/b.cls':
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b'1'))
    source = open_source(str(path))
    assert source.labels.tolist() == [1, 1] and source.read(1) == b'1'
    assert sorted(file.name for file in tmp_path.rglob('*')) == ['a.tar', 'in']


def test_tar_member_of_negative_size_is_no_endless_loop(tmp_path):
    path, member = tmp_path / 'a.tar', tarfile.TarInfo('a.txt')
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b'\xff' * 10 + b'\xfe\x00'  # -512, the number of bytes back to this very header
    block[148:156] = b' ' * 8
    block[148:156] = b'%06o\0 ' % sum(block)
    path.write_bytes(bytes(block) + bytes(1024))
    refused(path, open_source, str(path), match='negative|no tar file')


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass
    data = fuzz.torch_bytes(torch.ones(2, 2))
    served = HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{served.server_port}/codebook.ckpt', hashlib.sha256(data).hexdigest()
    served.shutdown()
    served.server_close()


def test_downloads_are_compared_with_the_hash_of_their_address(server):
    url, right = server
    for address in url, f'{url}#sha256={right}':
        assert td.load_codebook(address).tolist() == [[1, 1], [1, 1]]
    refused(url, td.load_codebook, f'{url}#sha256={"0" * 64}', match=f'has SHA-256 {right}')
    for fragment in 'sha256=12', 'md5=' + '0' * 64, 'x':
        refused(url, td.load_codebook, f'{url}#{fragment}', match='64 hexadecimal digits')
    assert tokenize_images.identity(url) == {'file': 'codebook.ckpt', 'sha256': right}


def test_messages_are_one_line_whatever_they_quote():
    assert str(InputError('a\nb\x1b[31m\u2028c\ud800d')) == 'a b [31m c d'
