"""Torch files from strangers: no code runs, no memory beyond their size, and only wrong checksums are damage."""
import argparse
import collections
import datetime
import decimal
import fractions
import io
import os
import pathlib
import tarfile
import uuid
import zipfile

import numpy as np
import pytest
import torch

from fileio.torch_files import load_torch
from helpers import Evil, fails, hostile_parameters, refused, repacked, torch_bytes
from utils import InputError


def load(path):
    return load_torch(path, 'a checkpoint')


@pytest.mark.parametrize('data, match', hostile_parameters())
def test_hostile_torch_files(tmp_path, data, match):
    path = tmp_path / 'file.pt'
    path.write_bytes(data)
    refused(path, load, path, match=match)


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
    refused(path, load, path, match='checkpoint')
    assert sorted(file.name for file in tmp_path.rglob('*')) == ['in', 'old.pt']


class MakesFolder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('old', [False, True])
def test_no_file_runs_code(tmp_path, old):
    (tmp_path / 'file.pt').write_bytes(torch_bytes({'a': [MakesFolder(tmp_path / 'ran')]}, old))
    fails(lambda: load(tmp_path / 'file.pt'), 'refused as a checkpoint', 'mkdir', 'run code')
    assert not (tmp_path / 'ran').exists()


# ---------------------------------------------------------------- what is read

@pytest.mark.parametrize('old', [False, True])
def test_what_checkpoints_hold_is_read(tmp_path, old):
    shared = torch.arange(6.)
    value = {'model': collections.OrderedDict(a=shared, b=shared[2:], c=torch.tensor(3, dtype=torch.bfloat16)),
             'args': argparse.Namespace(lr=0.1, names=['x']), 'epoch': 3, 'shape': torch.Size([2, 3]), 'none': None,
             'dtype': torch.float16, 'set': {1, 2}, 'parameter': torch.nn.Parameter(torch.ones(2))}
    path = tmp_path / 'file.pt'
    path.write_bytes(torch_bytes(value, old))
    found = load(path)
    assert found.keys() == value.keys()
    assert all(torch.equal(found['model'][key], tensor) for key, tensor in value['model'].items())
    assert (found['args'], found['epoch'], found['shape'], found['set']) == (value['args'], 3, (2, 3), {1, 2})


HARMLESS = [np.float64(0.5), np.int64(3), np.bool_(True), np.arange(3), np.dtype('f4'), {'acc': [np.float32(1)]},
            pathlib.Path('x'), datetime.datetime(2020, 1, 1), datetime.timedelta(1), decimal.Decimal(1),
            fractions.Fraction(1, 2), uuid.UUID(int=1), collections.defaultdict(list)]


@pytest.mark.parametrize('value', HARMLESS, ids=lambda value: type(value).__name__)
def test_harmless_values_of_other_kinds_are_not_said_to_run_code(tmp_path, value):
    path = tmp_path / 'file.pt'
    torch.save({'model': {'a': torch.ones(1)}, 'best': value}, path)
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message and 'convert it before saving' in message and 'run code' not in message


@pytest.mark.parametrize('name', [b'numpy.testing._private.utils\nrunstring', b'numpy\nsave', b'os\nsystem',
                                  b'builtins\neval', b'posix\nsystem', b'pathlibx\nPath'])
def test_what_could_run_code_is_said_to(tmp_path, name):
    path = tmp_path / 'file.pt'
    path.write_bytes(repacked(torch.ones(1), b'\x80\x02c' + name + b'\nX\x01\0\0\0x\x85R.'))
    fails(lambda: load(path), 'refused as a checkpoint', 'run code')


# ---------------------------------------------------------------- checksums

def test_files_without_checksums_are_read(tmp_path):
    path = tmp_path / 'file.pt'
    value = {'model': {'weight': torch.arange(1000.)}, 'args': argparse.Namespace(lr=1)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(value, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as file:
        assert not any(member.CRC for member in file.infolist())
    assert torch.equal(load(path)['model']['weight'], value['model']['weight'])


def flipped(data, place, bit=1):
    data = bytearray(data)
    data[place] ^= bit
    return bytes(data)


def test_a_wrong_checksum_is_damage(tmp_path):
    path = tmp_path / 'file.pt'
    whole = torch_bytes(torch.arange(1000.))
    path.write_bytes(whole)
    load(path)
    place = whole.index(np.arange(1000, dtype='f4').tobytes()) + 40
    path.write_bytes(flipped(whole, place))
    fails(lambda: load(path), 'damaged or not a checkpoint', 'another checksum than was written')


@pytest.mark.parametrize('content', [b'', b'junk', b'\x80\x02', b'PK\3\4', torch_bytes(torch.ones(9))[:-30],
                                     torch_bytes(torch.ones(9))[:300], torch_bytes(torch.ones(9), True)[:-5]])
def test_what_is_no_torch_file(tmp_path, content):
    path = tmp_path / 'file.pt'
    path.write_bytes(content)
    refused(path, load, path, match='a checkpoint')


def test_what_cannot_be_read(tmp_path):
    fails(lambda: load(tmp_path / 'none.pt'), 'none.pt: cannot read a checkpoint .No such file')
    fails(lambda: load(tmp_path), 'cannot read a checkpoint .Is a directory')


def test_tensors_that_share_memory_may_be_larger_than_their_file(tmp_path):
    path = tmp_path / 'file.pt'
    shared = torch.zeros(1 << 19)
    torch.save([shared] * 3, path)
    assert len(load(path)) == 3
    torch.save([shared.expand(100, 1 << 19)], path)
    refused(path, load, path, match='claim more numbers')


def test_a_file_of_evil_is_named_as_what_it_should_be(tmp_path):
    (tmp_path / 'x').write_bytes(torch_bytes(Evil()))
    fails(lambda: load_torch(tmp_path / 'x', 'a codebook'), 'refused as a codebook')
