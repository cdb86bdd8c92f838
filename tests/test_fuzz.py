"""Hostile files: each reader is right or refuses, within bounds of time and memory (see tests/stress/fuzz.py)."""
import argparse
import io
import json
import tarfile

import pytest
import safetensors.torch
import torch

pytest.importorskip('hypothesis')
import fuzz
from helpers import hostile_parameters, refused
from image_data.sources import open_source
from image_tokenizer.tokenizers import load_tokenizer
from image_tokenizer.vitvqgan import Size, ViTVQGAN
from training.checkpoints import load_checkpoint, load_weights
from training.run_folder import RunLog

INPUTS = {'index': 100, 'labels': 100, 'synonyms': 80, 'log': 80, 'cache': 80, 'tar': 80, 'list': 100, 'vqgan': 8}


@pytest.mark.parametrize('name', fuzz.READERS)
def test_reader_is_right_or_refuses(name, tmp_path):
    counts = fuzz.fuzz(name, INPUTS.get(name, 60), tmp_path)
    assert counts['right'] and (counts['refused'] or name == 'log'), counts


def test_the_program_prints_one_line(capsys):
    fuzz.main(fuzz.parse_args(['--inputs', '5', '--readers', 'labels', 'log']))
    report = json.loads(capsys.readouterr().out)
    assert (report['inputs'], sum(report['labels'].values())) == (10, 5)
    assert report['log'] == {'right': 5, 'refused': 0}


def test_log_keeps_whole_lines_only(tmp_path):
    path = tmp_path / 'log.txt'
    bad = b'5\n[]\n' + b'[' * 100_000 + b'\n{"epoch": "1"}\n\xff\n'
    path.write_bytes(b'{"epoch": 0}\n' + bad + b'{"epoch": 1}\n{"epoch": 2, "l')
    RunLog(str(tmp_path), 2).write(epoch=2)
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n'


# ---------------------------------------------------------------- torch files

@pytest.mark.parametrize('data, match', hostile_parameters())
def test_hostile_torch_files(tmp_path, data, match):
    path = tmp_path / 'file.pt'
    path.write_bytes(data)
    for read in load_checkpoint, load_tokenizer:
        refused(path, read, path, match=match)


def test_weights_that_torch_would_trust(tmp_path):
    model = torch.nn.Linear(2, 2)
    path = tmp_path / 'a.pth'
    state = model.state_dict()
    state._metadata = 5
    torch.save({'model': state}, path)
    load_weights(model, load_checkpoint(path)['model'], path)
    for key, value in (('weight', torch.ones(2, 2, dtype=torch.complex64)), ('weight', torch.ones(2, 2).long()),
                       ('weight', argparse.Namespace(shape=torch.Size([2, 2]))), ('a\nb\x1b[31m' * 100, torch.ones(1))):
        torch.save({'model': {**model.state_dict(), key: value}}, path)
        refused(path, lambda: load_weights(model, load_checkpoint(path)['model'], path), match='does not fit')


def vit(**changes):
    state = dict(ViTVQGAN(Size(4, 1, 1, 3), None, 0, 2, 8, 4).state_dict())
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


# ---------------------------------------------------------------- archives

@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_special_members_of_tar_shards_are_refused(tmp_path, kind):
    path = tmp_path / 'a.tar'
    with tarfile.open(path, 'w') as archive:
        member = tarfile.TarInfo('a.jpg')
        member.type = kind
        member.linkname = '/etc/passwd'
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
    path = tmp_path / 'a.tar'
    member = tarfile.TarInfo('a.txt')
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b'\xff' * 10 + b'\xfe\x00'  # -512, the number of bytes back to this very header
    block[148:156] = b' ' * 8
    block[148:156] = b'%06o\0 ' % sum(block)
    path.write_bytes(bytes(block) + bytes(1024))
    refused(path, open_source, str(path), match='negative|no tar file')
