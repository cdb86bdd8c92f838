"""Tokenizing images: kinds of input, resuming, shards, codebooks, formats, and what is refused."""
import json
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from conftest import ROOT
from fileio import files
from fileio.files import sha256
from fileio.labels import read_labels
from fileio.torch_files import digest_of
from helpers import (DIM, PATCH, SIZE, as_list, as_parquet, as_tars, contents, fails, make_images, published_transform,
                     samples, save_image, tokenize, with_bad_images)
from image_tokenizer import tokenizing
from image_tokenizer.tokenizers import load_tokenizer
from image_tokenizer.vitvqgan import Size, ViTVQGAN
from token_dataset import TokenDataset
from token_files import parts
from token_files.cache import open_codes
from token_files.codebook import load_codebook, quantize
from token_files.published import PUBLISHED
from token_files.token_file import open_token_file
from utils import InputError


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images'))


def manifest(folder, name='my-token'):
    return json.loads((folder / f'{name}.json').read_text())


def codes_of(folder, name='my-token'):
    return np.asarray(open_codes([open_token_file(folder / f'{name}.data.bin.gz')], 'none'))


@pytest.fixture(scope='module')
def plain(data, tmp_path_factory):
    """The training images tokenized in one go."""
    return tokenize(data, tmp_path_factory.mktemp('plain'))


# ---------------------------------------------------------------- what comes out

def test_codes_are_those_of_the_slow_way(data, plain):
    tokenizer = load_tokenizer(data / 'tok.pt')
    codebook = load_codebook(data / 'codebook.ckpt')
    folder = ImageFolder(data / 'train', published_transform(SIZE))
    expected = torch.cat([quantize(tokenizer(image[None]), codebook) for image, _ in folder])
    assert np.array_equal(codes_of(plain), expected)
    assert read_labels(plain / 'my-label.txt').tolist() == folder.targets
    said = manifest(plain)
    sources = sum(path.stat().st_size for path in (data / 'train').rglob('*.png'))
    assert (said['format'], said['images'], said['grid'], said['codes'], said['codes_used'], said['source_bytes']) == \
        (PUBLISHED.name, 45, 4, 40, 37, sources)
    assert said['classes'] == [f'class-{i}' for i in range(4)] and 'class folders' in said['labels_from']
    assert contents(plain).keys() == {'my-label.txt', 'my-token.data.bin.gz', 'my-token.index.npy.gz', 'my-token.json'}


# ---------------------------------------------------------------- kinds of input

@pytest.mark.slow
@pytest.mark.parametrize('make', [as_list, lambda *a: as_list(*a, ' '), as_tars, lambda *a: as_tars(*a, 'json'),
                                  as_parquet], ids=['tabs', 'spaces', 'cls', 'json', 'parquet'])
def test_every_kind_of_input_gives_the_same_tokens(data, plain, make, tmp_path):
    folder = tmp_path / 'in put'
    folder.mkdir()
    out = tokenize(data, tmp_path / 'out', data_path=make(data / 'train', folder), workers=2)
    for name in ('my-token.data.bin.gz', 'my-token.index.npy.gz', 'my-label.txt'):
        assert (out / name).read_bytes() == (plain / name).read_bytes(), name
    assert manifest(out)['source_bytes'] == manifest(plain)['source_bytes']
    assert manifest(out)['classes'] == (list('abcd') if make is as_parquet else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in put', 'out']  # nothing was extracted


# ---------------------------------------------------------------- bad images and bad options

def test_bad_images_stop_or_are_skipped(data, plain, tmp_path, capfd, monkeypatch):
    listed, bad = with_bad_images(data, tmp_path / 'in')
    monkeypatch.setattr(parts, 'PART_BATCHES', 4)
    out = tmp_path / 'out'
    fails(lambda: tokenize(data, out, data_path=listed), f'{bad[0]} is no readable image', 'skip-bad-images')
    tokenize(data, out, data_path=listed, skip_bad=True)  # resumes from there
    assert [line.split()[1].split('/')[-1][:-1] for line in capfd.readouterr().err.splitlines()
            if line.startswith('skipped')] == bad
    keep = np.setdiff1d(np.arange(45), (5, 17, 40))
    assert np.array_equal(codes_of(out), codes_of(plain)[keep]) and manifest(out)['skipped_in_run'] == 3
    assert np.array_equal(read_labels(out / 'my-label.txt'), read_labels(plain / 'my-label.txt')[keep])


def test_skipped_parts_are_not_taken_for_whole_ones(data, tmp_path, monkeypatch):
    listed, bad = with_bad_images(data, tmp_path / 'in')
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, 'finish', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokenize(data, tmp_path / 'out', data_path=listed, skip_bad=True)
    fails(lambda: tokenize(data, tmp_path / 'out', data_path=listed), '3 images were skipped before', bad[0])
    (tmp_path / 'x.txt').write_text('no.png 1\n')
    fails(lambda: tokenize(data, tmp_path / 'x', data_path=tmp_path / 'x.txt', skip_bad=True),
          'none of the 1 images can be read')


def test_large_images_are_bad_unless_allowed(data, plain, tmp_path):
    fails(lambda: tokenize(data, tmp_path, max_pixels=100), '00.png is no readable image.*pixels')
    tokenize(data, tmp_path, max_pixels=20 * 24)
    assert contents(tmp_path) == contents(plain)  # a limit changes no code, so the run is the same


def test_a_part_without_any_good_image(data, plain, tmp_path, monkeypatch):
    """The first part gives no codes, and nothing to compare precisions on."""
    monkeypatch.setattr(parts, 'PART_BATCHES', 2)
    lines = [f'{path} {label}' for path, label in samples(data / 'train')[:9]]
    (tmp_path / 'list.txt').write_text('\n'.join(['no.png 0'] * 4 + lines))
    out = tokenize(data, tmp_path / 'out', data_path=tmp_path / 'list.txt', skip_bad=True, amp='bf16')
    exact = tokenize(data, tmp_path / 'exact', data_path=tmp_path / 'list.txt', skip_bad=True, shard_size=5)
    assert manifest(out)['images'] == 9 and manifest(out)['agreement_with_fp32'] is None
    assert np.array_equal(codes_of(exact, 'my-token-00000'), codes_of(plain)[:5])
    assert np.array_equal(codes_of(exact, 'my-token-00001'), codes_of(plain)[5:9])


def test_features_that_are_not_finite_stop_the_run(data, tmp_path):
    state = torch.load(data / 'tok.pt', weights_only=True)
    torch.save({**state, 'scale': torch.tensor(float('nan'))}, tmp_path / 'nan.pt')
    fails(lambda: tokenize(data, tmp_path / 'out', tokenizer_path=tmp_path / 'nan.pt'), 'nan.pt', 'not finite')


def test_files_of_another_run_are_refused(data, tmp_path, capsys):
    out = tokenize(data, tmp_path / 'out', name='a')
    before = contents(out)
    capsys.readouterr()
    tokenize(data, out, name='a')  # the same again: nothing to do
    assert 'complete already' in capsys.readouterr().out
    fails(lambda: tokenize(data, out, 'val', name='a'), 'a-token.data.bin.gz|a-label', 'another run')
    fails(lambda: tokenize(data, out, name='a', shard_size=20), 'another run')
    fails(lambda: tokenize(data, out, 'val', name='b', codebook_path=None), 'codebook')
    assert contents(out) == before
    tokenize(data, out, 'val', name='b')  # another name is welcome
    (out / 'a-token.json').unlink()
    fails(lambda: tokenize(data, out, name='a'), 'another run')


def test_files_of_a_set_whose_name_begins_alike_are_no_obstacle(data, tmp_path):
    for other in ('my-token-2', 'my-tokens', 'my-label-x', 'my.', 'my'):
        tokenize(data, tmp_path, 'val', name=other)
    assert len(list(tmp_path.glob('*.json'))) == 5


# ---------------------------------------------------------------- what cannot be written, said before the work

def never(*_args, **_more):
    raise AssertionError('the work began')


@pytest.mark.parametrize('options', [{'name': 'n' * 226}, {'name': 'n' * 300}, {'name': 'n' * 221, 'shard_size': 7},
                                     {'name': '\u00e9' * 120}],
                         ids=['temporary name', 'name', 'shards', 'two bytes a letter'])
def test_a_name_too_long_for_the_file_system_is_refused_before_the_work(data, tmp_path, options, monkeypatch):
    monkeypatch.setattr(tokenizing, 'load_images', never)
    fails(lambda: tokenize(data, tmp_path / 'out', **options), 'File name too long', '--name or .*, of a shorter')
    assert not contents(tmp_path / 'out')


def test_the_longest_name_that_is_accepted_can_be_written(data, tmp_path):
    """The check is neither too late nor too strict: one letter fewer than what is refused works to the end."""
    length = next(length for length in range(180, 260) if refused(data, tmp_path, 'n' * length))
    tokenize(data, tmp_path / 'out', 'val', name='n' * (length - 1))
    assert len(contents(tmp_path / 'out')) == 4


def refused(data, folder, name):
    try:
        parts.OutputFiles(folder, name).check_writable(9, codebook=False)
    except InputError:
        return True
    return False


def put_a_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('x')


@pytest.mark.parametrize('name, put', [
    ('.', put_a_file), ('codebook.ckpt', lambda path: path.mkdir(parents=True)), ('.my.parts', put_a_file),
    ('.my.parts/lock', lambda path: path.mkdir(parents=True))])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(data, tmp_path, name, put, monkeypatch):
    put(tmp_path / 'out' / name)
    monkeypatch.setattr(tokenizing, 'load_images', never)
    fails(lambda: tokenize(data, tmp_path / 'out', limit_codes=True), 'out')


def test_an_output_folder_that_a_file_is_in_the_way_of(data, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('x')
    monkeypatch.setattr(tokenizing, 'load_images', never)
    fails(lambda: tokenize(data, tmp_path / 'file' / 'out'), 'file/out', 'cannot be written', '--output-dir')


def test_a_folder_in_the_place_of_a_final_file_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, 'load_images', never)
    for name, options in (('my-label.txt', {}), ('my-token-00001.json', {'shard_size': 20})):
        (tmp_path / name).mkdir()
        fails(lambda: tokenize(data, tmp_path, **options), name)
        (tmp_path / name).rmdir()


# ---------------------------------------------------------------- the output beside the images

def copied(data, folder):
    for path, _ in samples(data / 'train'):
        target = folder / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


def interrupted(data, output, monkeypatch, **options):
    """A run that ends when all its parts are made, and no final file is."""
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, 'finish', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokenize(data, output, **options)


def test_a_run_into_the_folder_of_its_images_resumes(data, plain, tmp_path, monkeypatch):
    images = copied(data, tmp_path / 'images')
    interrupted(data, images, monkeypatch, data_path=images)
    assert (images / '.my.parts').is_dir()
    monkeypatch.setattr(tokenizing, 'encode_part', never)  # all parts are there
    tokenize(data, images, data_path=images)
    made, expected = {path.name: path.read_bytes() for path in images.glob('my-*')}, contents(plain)
    manifests = [json.loads(files.pop('my-token.json')) for files in (made, expected)]
    paths = [manifest['tokenizer'].pop('path') for manifest in manifests]  # seen from another folder
    assert os.path.samefile(images / paths[0], plain / paths[1])
    assert made == expected and manifests[0] == manifests[1]
    before = (images / 'my-token.json').read_bytes()
    tokenize(data, images, data_path=images)  # complete, and still the same images
    assert (images / 'my-token.json').read_bytes() == before


def test_an_output_folder_among_the_class_folders_is_refused(data, tmp_path, capsys):
    """The next run would take it for a class."""
    images = copied(data, tmp_path / 'images')
    (tmp_path / 'link').symlink_to(images)
    for output in (images / 'tokens', images / 'tokens' / 'a', tmp_path / 'link' / 'tokens'):
        fails(lambda: tokenize(data, output, data_path=images), 'tokens', 'would be taken for a class')
        assert not (images / 'tokens').exists()
    for output in (images / '.tokens', images / 'class-1' / 'tokens', tmp_path / 'images-2'):
        tokenize(data, output, data_path=images)
        capsys.readouterr()
        tokenize(data, output, data_path=images)
        assert 'complete already' in capsys.readouterr().out


# ---------------------------------------------------------------- images that were replaced

FORMS = [lambda images, _: images, as_list, as_tars, as_parquet]


def whole(images, folder, form):
    """A finished set of copied images in some form; returns its folder and the path of the images."""
    (folder / 'in').mkdir(exist_ok=True)
    path = form(images, folder / 'in')
    return tokenize(images.parent, folder / 'out', data_path=path), path


def own_images(data, folder):
    """Copies of the training images that a test may change."""
    for name in ('tok.pt', 'codebook.ckpt'):
        (folder / name).write_bytes((data / name).read_bytes())
    return copied(data, folder / 'images')


@pytest.mark.parametrize('form', FORMS, ids=['folder', 'list', 'tars', 'parquet'])
def test_a_set_of_images_that_were_replaced_is_not_complete(data, form, tmp_path, capsys):
    images = own_images(data, tmp_path)
    out, path = whole(images, tmp_path, form)
    capsys.readouterr()
    tokenize(tmp_path, out, data_path=path)
    assert 'complete already, nothing to do (its images have the same names, labels and sizes, and are older)' in (
        capsys.readouterr().out)
    before = contents(out)
    save_image(images / 'class-1' / '05.png', 77, (30, 31))
    form(images, tmp_path / 'in')
    fails(lambda: tokenize(tmp_path, out, data_path=path), f'{out}: my was made of images that have changed since',
          re.escape('remove my-token* and my-label* there'))
    assert contents(out) == before
    for made in out.glob('my-*'):
        made.unlink()
    tokenize(tmp_path, out, data_path=path)
    assert contents(out) != before


def test_images_of_the_same_sizes_that_are_newer_are_noted(data, tmp_path, capsys):
    images = own_images(data, tmp_path)
    out, _ = whole(images, tmp_path, FORMS[0])
    first = images / 'class-1' / '05.png'
    first.write_bytes(first.read_bytes()[:-1] + b'x')
    capsys.readouterr()
    tokenize(tmp_path, out, data_path=images)
    said = capsys.readouterr().out
    assert f'note: {out}: my is older than its images: if they were replaced, and not only copied, remove my-' in said
    assert 'complete already, nothing to do (its images have the same names, labels and sizes)' in said


def test_a_set_of_before_is_recognized(data, tmp_path, capsys):
    """Its manifests state no sizes."""
    images = own_images(data, tmp_path)
    out, _ = whole(images, tmp_path, FORMS[0])
    said = manifest(out)
    del said['source_sizes']
    (out / 'my-token.json').write_text(json.dumps(said))
    capsys.readouterr()
    tokenize(tmp_path, out, data_path=images)
    assert 'nothing to do (its images have the same names and labels, and are older)' in capsys.readouterr().out
    save_image(images / 'class-1' / '05.png', 77)
    tokenize(tmp_path, out, data_path=images)
    assert 'note: ' in capsys.readouterr().out


def test_a_resumed_run_notes_images_that_are_newer_than_its_parts(data, tmp_path, capsys, monkeypatch):
    images = own_images(data, tmp_path)
    interrupted(tmp_path, tmp_path / 'out', monkeypatch, data_path=images)
    save_image(images / 'class-1' / '05.png', 77)
    capsys.readouterr()
    interrupted(tmp_path, tmp_path / 'out', monkeypatch, data_path=images)
    assert f'note: {tmp_path / "out" / ".my.parts"}: images are newer than parts that are done' in (
        capsys.readouterr().out)
    for part in (tmp_path / 'out' / '.my.parts').glob('*.npz'):
        part.unlink()  # an image that stopped the run before any part was done may be mended without a word
    tokenize(tmp_path, tmp_path / 'out', data_path=images)
    assert 'note: ' not in capsys.readouterr().out


# ---------------------------------------------------------------- processes and interruptions

@pytest.mark.slow
def test_a_second_process_in_the_same_run_is_refused(data, tmp_path, monkeypatch):
    interrupted(data, tmp_path, monkeypatch)
    holder = subprocess.Popen([sys.executable, '-c', 'import sys; from fileio.files import lock_file; '
                               'held = lock_file(sys.argv[1]); print("held", flush=True); sys.stdin.read()',
                               tmp_path / '.my.parts' / 'lock'],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == 'held\n'
        fails(lambda: tokenize(data, tmp_path), '.my.parts: another process is at work there')
        tokenize(data, tmp_path, 'val', name='other')
    finally:
        holder.kill()
        holder.communicate()
    tokenize(data, tmp_path)  # a killed process leaves no lock behind
    assert (tmp_path / 'my-token.json').exists()


def test_leftovers_of_killed_runs_go_and_those_of_living_ones_stay(data, plain, tmp_path, monkeypatch):
    interrupted(data, tmp_path, monkeypatch)
    left = ['.my-token.data.bin.gz.a1b2c3.tmp', '.my-token.json.x.tmp', '.my-token.index.npy.gz.x.tmp',
            '.my-label.txt.x.tmp', '.codebook.ckpt.x.tmp', '.my.parts/.000001.npz.x.tmp', '.my.parts/.run.json.x.tmp']
    kept = ['.my-tokens-token.json.x.tmp', '.other.tmp', '.my-tokenizer.pt.x.tmp']
    for name in left + kept:
        (tmp_path / name).write_text('x')
    with files.atomic_path(tmp_path / 'my-label.txt') as alive:  # as another process would write it
        tokenize(data, tmp_path / 'elsewhere')
        parts.OutputFiles(tmp_path, 'my').remove_leftovers()
        assert os.path.exists(alive)
    (tmp_path / 'my-label.txt').unlink()
    assert not any((tmp_path / name).exists() for name in left) and all((tmp_path / name).exists() for name in kept)


def raising(error):
    def function(*_args, **_more):
        raise error
    return function


def test_a_complete_run_in_a_folder_that_is_read_only_is_complete(data, tmp_path, capsys, monkeypatch):
    tokenize(data, tmp_path / 'out')
    (tmp_path / 'out' / '.my-label.txt.x.tmp').write_text('x')
    (tmp_path / 'out' / '.my.parts-done').mkdir()
    refusing = PermissionError(13, 'Permission denied')
    for module, name in ((os, 'unlink'), (os, 'rmdir'), (os, 'mkdir'), (os, 'replace'), (tempfile, 'mkstemp')):
        monkeypatch.setattr(module, name, raising(refusing))
    tokenize(data, tmp_path / 'out')
    assert 'complete already' in capsys.readouterr().out


def test_ranks_that_see_other_images_are_refused(data, tmp_path, monkeypatch):
    """As two nodes whose image folders are not the same: parts would be of other images."""
    seen = []

    def refuse(facts):
        seen.append(facts)
        raise InputError('they differ')

    monkeypatch.setattr(tokenizing, 'check_same_on_all_ranks', refuse)
    for source in ('train', 'val'):
        fails(lambda: tokenize(data, tmp_path / 'out', source), 'they differ')
    assert seen[0]['source'] != seen[1]['source'] and seen[0]['tokenizer'] == seen[1]['tokenizer']
    assert not (tmp_path / 'out').exists()


class Killed(BaseException):
    pass


def stops_until_it_ends(data, tmp_path, monkeypatch, **options):
    """How many renames a run has: it is stopped before each of them, and resumed.

    Files change by renaming only, so a kill at any moment is one between two renames.
    """
    monkeypatch.setattr(parts, 'PART_BATCHES', 2)
    whole = contents(tokenize(data, tmp_path / 'whole', **options))
    replace, unlink = os.replace, os.unlink
    for stop in range(40):
        out, left = tmp_path / f'stop-{stop}', [stop]

        def dying(source, target):
            if not left[0]:
                monkeypatch.setattr(os, 'unlink', lambda path: None)  # a kill tidies nothing
                raise Killed
            left[0] -= 1
            replace(source, target)
        with monkeypatch.context() as patch:
            patch.setattr(os, 'replace', dying)
            try:
                tokenize(data, out, **options)
                break  # it came to its end
            except Killed:
                pass
        monkeypatch.setattr(os, 'unlink', unlink)
        assert contents(out) != whole
        tokenize(data, out, **options)
        assert contents(out) == whole, stop
    return stop


def test_stopped_after_any_write_it_resumes_to_the_same_files(data, tmp_path, monkeypatch):
    stop = stops_until_it_ends(data, tmp_path, monkeypatch, source='val', limit_codes=True, shard_size=4)
    assert stop == 1 + 3 + 1 + 3 * 4  # run.json, parts, codebook, shards


def test_a_changed_run_is_not_resumed(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, 'finish', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokenize(data, tmp_path / 'out')
    for options, said in (({'batch_size': 4}, 'batch_size'), ({'source': 'val'}, 'source'),
                          ({'image_size': 20}, 'image_size'), ({'amp': 'bf16'}, 'precision'),
                          ({'limit_codes': True}, 'limit_codes')):
        fails(lambda: tokenize(data, tmp_path / 'out', **options), '.my.parts: holds results of another', said)
    part, = (tmp_path / 'out' / '.my.parts').glob('000001.npz')
    part.write_bytes(part.read_bytes()[:100])
    fails(lambda: tokenize(data, tmp_path / 'out'), '000001.npz: damaged; delete it')


# ---------------------------------------------------------------- codebooks

def test_limited_codes(data, plain, tmp_path):
    full = load_codebook(data / 'codebook.ckpt')
    out = tokenize(data, tmp_path / 'out', name='train', limit_codes=True)
    kept = manifest(out, 'train-token')['kept_codes']
    reduced = load_codebook(out / 'codebook.ckpt')
    assert len(kept) == 37 and torch.equal(reduced, full[kept])
    assert np.array_equal(np.array(kept)[codes_of(out, 'train-token')], codes_of(plain))
    assert manifest(out, 'train-token')['codebook']['sha256'] == sha256(out / 'codebook.ckpt')
    # the other split is quantized against what was kept
    tokenize(data, out, 'val', name='val', codebook_path=out / 'codebook.ckpt')
    tokenizer = load_tokenizer(data / 'tok.pt')
    folder = ImageFolder(data / 'val', published_transform(SIZE))
    expected = torch.cat([quantize(tokenizer(image[None]), reduced) for image, _ in folder])
    assert np.array_equal(codes_of(out, 'val-token'), expected)
    fails(lambda: tokenize(data, out, 'val', name='other', limit_codes=True), 'codebook.ckpt', 'drop --limit-codes')


def test_large_codebooks_get_16_bits(data, tmp_path):
    big = torch.randn(8192, DIM, generator=torch.Generator().manual_seed(1))
    torch.save(big, tmp_path / 'big.ckpt')
    out = tokenize(data, tmp_path / 'out', codebook_path=tmp_path / 'big.ckpt')
    codes = TokenDataset(out / 'my-token.data.bin.gz', out / 'my-label.txt', 8192).codes
    assert manifest(out)['format'] == 'uint16-le' and codes.max() > 509
    limited = tokenize(data, tmp_path / 'limited', codebook_path=tmp_path / 'big.ckpt', limit_codes=True)
    used = np.unique(codes)
    assert len(used) == manifest(limited)['codes'] > 510 and manifest(limited)['format'] == 'uint16-le'
    assert np.array_equal(used[codes_of(limited)], codes)


def test_more_codes_than_16_bits_are_kept_only_where_few_are_used(data, tmp_path):
    huge = torch.cat([load_codebook(data / 'codebook.ckpt'), torch.zeros(70_000, DIM)]).flip(0)
    torch.save(huge, tmp_path / 'huge.ckpt')
    out = tokenize(data, tmp_path / 'out', codebook_path=tmp_path / 'huge.ckpt', limit_codes=True)
    said = manifest(out)
    assert said['codes'] == 37 and min(said['kept_codes']) >= 70_000 and said['format'] == PUBLISHED.name


def test_the_codebook_of_the_tokenizer_itself(data, tmp_path):
    torch.manual_seed(0)
    model = ViTVQGAN(Size(64, 1, 1, 64), codebook_size=40, embed_dim=DIM, image_size=SIZE, patch_size=PATCH)
    torch.save(model.state_dict(), tmp_path / 'vit.pt')
    own = {'tokenizer_path': tmp_path / 'vit.pt', 'codebook_path': None}
    out = tokenize(data, tmp_path / 'out', name='train', **own)
    assert torch.equal(load_codebook(out / 'codebook.ckpt'), model.codebook)
    again = tokenize(data, tmp_path / 'again', name='train', **own)
    assert contents(again) == contents(out)
    tokenize(data, out, 'val', name='val', **own)  # the same codebook is no other run's file
    assert manifest(out, 'val-token')['codebook'] == manifest(out, 'train-token')['codebook'] == \
        {'file': 'codebook.ckpt', 'sha256': sha256(out / 'codebook.ckpt'), 'values_sha256': digest_of(model.codebook)}


def test_bf16_reports_its_agreement(data, plain, tmp_path, capsys):
    out = tokenize(data, tmp_path / 'out', amp='bf16')
    share = (codes_of(out)[:2] == codes_of(plain)[:2]).mean()  # measured on the first batch
    assert manifest(out)['agreement_with_fp32'] == pytest.approx(share) and manifest(out)['precision'] == 'bf16'
    assert f'{share:.4%} of codes agree with fp32' in capsys.readouterr().out


# ---------------------------------------------------------------- the compact format

@pytest.fixture(scope='module')
def compact(data, tmp_path_factory):
    """The training images tokenized in one go to a compact set."""
    return tokenize(data, tmp_path_factory.mktemp('compact'), format='compact')


COMPACT_FILES = {'my-label.txt', 'my-token.data.bin', 'my-token.model.bin', 'my-token.json'}


def test_a_compact_set_holds_what_the_published_one_holds(data, plain, compact):
    assert contents(compact).keys() == COMPACT_FILES
    files_ = compact / 'my-token.data.bin', compact / 'my-label.txt'
    assert np.array_equal(TokenDataset(*files_, 40, 'none').codes, codes_of(plain))
    assert files_[1].read_bytes() == (plain / 'my-label.txt').read_bytes()
    said, published = manifest(compact), manifest(plain)
    assert said['format'] == 'compact' and said['model'] == 'my-token.model.bin' and said['run']['format'] == 'compact'
    assert said['files'].keys() == COMPACT_FILES - {'my-token.json'}
    different = {'format', 'model', 'files', 'run'}
    assert {key: value for key, value in said.items() if key not in different} == \
        {key: value for key, value in published.items() if key not in different}
    assert 'format' not in published['run']


def test_compact_shards_share_one_model(data, plain, compact, tmp_path, capsys):
    out = tokenize(data, tmp_path / 'out', shard_size=20, format='compact')
    model = (out / 'my-token.model.bin').read_bytes()
    assert model == (compact / 'my-token.model.bin').read_bytes()
    assert len(contents(out)) == 3 * 3 + 1 and not [*out.glob('my-token-*.model.bin')]
    shards = TokenDataset(f'{out}/my-token-*.data.bin', f'{out}/my-label-*.txt', 40)
    assert np.array_equal(shards.codes, codes_of(plain))
    assert np.array_equal(shards.labels, read_labels(plain / 'my-label.txt'))
    assert all('my-token.model.bin' in manifest(out, f'my-token-0000{i}')['files'] for i in range(3))
    stored = sum(path.stat().st_size for path in out.glob('*.bin'))
    assert shards.bytes_on_disk() == stored and f'{stored:,} bytes' in capsys.readouterr().out
    tokenize(data, out, shard_size=20, format='compact')
    assert 'complete already' in capsys.readouterr().out
    (out / 'my-token.model.bin').unlink()
    fails(lambda: tokenize(data, out, shard_size=20, format='compact'), 'files of it are missing or changed')


def test_a_compact_run_stopped_after_any_write_resumes_to_the_same_files(data, tmp_path, monkeypatch):
    stop = stops_until_it_ends(data, tmp_path, monkeypatch, source='val', shard_size=4, format='compact',
                               limit_codes=True)
    assert stop == 1 + 3 + 1 + 1 + 3 * 3  # run.json, parts, codebook, model, shards


@pytest.mark.parametrize('lost', [0, 1, 4])
@pytest.mark.parametrize('kind', ['published', 'compact'])
def test_a_part_whose_images_are_all_bad_at_any_place(data, tmp_path, monkeypatch, lost, kind):
    """Its codes have no grid."""
    monkeypatch.setattr(parts, 'PART_BATCHES', 2)
    lines = [f'{path} {label}' for path, label in samples(data / 'train')[:16]]
    lines[4 * lost:4 * lost] = ['no.png 0'] * 4
    (tmp_path / 'list.txt').write_text('\n'.join(lines))
    out = tokenize(data, tmp_path / 'out', data_path=tmp_path / 'list.txt', skip_bad=True, format=kind)
    token_file, = out.glob('my-token.data.bin*')
    want = tokenize(data, tmp_path / 'all')
    assert np.array_equal(open_codes([open_token_file(token_file)], 'none'), codes_of(want)[:16])


def test_a_run_of_one_format_is_not_resumed_as_another(data, tmp_path, monkeypatch):
    interrupted(data, tmp_path, monkeypatch, format='compact')
    fails(lambda: tokenize(data, tmp_path), 'belongs to another|holds results of another')
    tokenize(data, tmp_path, format='compact')
    fails(lambda: tokenize(data, tmp_path), 'my-label.txt|my-token', 'another run')
    assert contents(tmp_path).keys() == COMPACT_FILES


def test_leftovers_of_a_killed_compact_run_go(data, tmp_path):
    left = ['.my-token.data.bin.x.tmp', '.my-token.model.bin.x.tmp', '.my-token-00003.data.bin.x.tmp',
            '.my-token-00003.json.x.tmp']
    for name in left:
        (tmp_path / name).write_text('x')
    for size in (0, 5):
        parts.OutputFiles(tmp_path, 'my', size, True).remove_leftovers()
    assert not [*tmp_path.iterdir()]


def test_grids_beyond_the_compact_format_are_refused_before_the_work(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, 'load_images', never)
    fails(lambda: tokenize(data, tmp_path / 'out', image_size=257 * PATCH, format='compact'),
          'the format compact holds grids of up to 256 codes on a side, not 257')
    assert not (tmp_path / 'out').exists()


# ---------------------------------------------------------------- shards, training, verification

def test_shards_hold_what_the_single_file_holds(data, plain, tmp_path):
    out = tokenize(data, tmp_path / 'out', shard_size=20)
    assert [manifest(out, f'my-token-0000{i}')['images'] for i in range(3)] == [20, 20, 5]
    data_ = TokenDataset(f'{out}/my-token-*.data.bin.gz', f'{out}/my-label-*.txt', 40)
    assert np.array_equal(data_.codes, codes_of(plain))
    assert np.array_equal(data_.labels, read_labels(plain / 'my-label.txt'))
    manifests = [manifest(out, f'my-token-0000{i}') for i in range(3)]
    assert sum(one['source_bytes'] for one in manifests) == manifest(plain)['source_bytes']
    assert [one['codes_used'] for one in manifests] == [len(np.unique(x)) for x in np.split(codes_of(plain), (20, 40))]


@pytest.mark.parametrize('damage', ['shard', 'empty', 'codebook'])
def test_a_finished_run_that_lacks_files_is_not_called_complete(data, tmp_path, damage):
    options = {'shard_size': 15} if damage == 'shard' else {}
    if damage == 'codebook':
        options = {'limit_codes': True}
    tokenize(data, tmp_path, **options)
    tokenize(data, tmp_path, **options)  # nothing to do
    if damage == 'shard':
        for path in tmp_path.glob('my-*-00001*'):
            path.unlink()
    elif damage == 'empty':
        (tmp_path / 'my-token.data.bin.gz').write_bytes(b'')
    else:
        (tmp_path / 'codebook.ckpt').unlink()
    fails(lambda: tokenize(data, tmp_path, **options), 'files of it are missing or changed')
