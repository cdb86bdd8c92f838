"""Images to token files: inputs, kinds of images, resuming, shards, codebooks; and the check of what was made."""
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import default_loader

import image_sources
import main_seit
import token_dataset as td
import tokenize_images
import verify_tokens
from conftest import ROOT
from image_tokenizer import image_transform, quantize
from test_main_seit import SMALL, assert_same, states
from test_token_dataset import fails
from utils import free_port
from vitvqgan import Size, ViTVQGAN

PATCH, DIM, SIZE = 4, 8, 16


def save_image(path, seed, size=(20, 24), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Folders train/ (4 classes, 45 images) and val/ (9), tok.pt and codebook.ckpt of 40 codes, of which 3 are idle."""
    root = tmp_path_factory.mktemp('images')
    for split, count in (('train', 45), ('val', 9)):
        for i in range(count):
            save_image(root / split / f'class-{i % 4}' / f'{i:02d}.png', i + 1000 * (split == 'val'))
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(3 * PATCH ** 2, DIM, generator=generator))
    torch.save({'mean': torch.full((3 * PATCH ** 2,), 0.5), 'basis': basis, 'scale': torch.tensor(2.)}, root / 'tok.pt')
    codebook = torch.randn(40, DIM, generator=generator)
    codebook[[3, 17, 39]] = codebook[[2, 2, 2]]  # of equal rows the first wins, so these are never used
    torch.save(codebook, root / 'codebook.ckpt')
    return root


def words(data, output, source='train', **options):
    """A command line; an option of None is left out, one of True is a flag."""
    options = {'data_path': data / source, 'name': 'my', 'output_dir': output, 'tokenizer_path': data / 'tok.pt',
               'codebook_path': data / 'codebook.ckpt', 'image_size': SIZE, 'batch_size': 2, 'num_workers': 0,
               'device': 'cpu', **options}
    line = []
    for key, value in options.items():
        if value is not None:
            line += [f'--{key.replace("_", "-")}', *([] if value is True else [str(value)])]
    return line


def tokenize(data, output, source='train', **options):
    tokenize_images.main(tokenize_images.get_args_parser().parse_args(words(data, output, source, **options)))
    return output


def files(folder):
    """The content of a folder, names to bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def card(folder, name='my-token'):
    return json.loads((folder / f'{name}.json').read_text())


def codes_of(folder, name='my-token'):
    return np.asarray(td.open_codes(folder / f'{name}.data.bin.gz', 'none'))


@pytest.fixture(scope='module')
def plain(data, tmp_path_factory):
    """The training images tokenised in one go."""
    return tokenize(data, tmp_path_factory.mktemp('plain'))


# ---------------------------------------------------------------- what comes out

def test_codes_are_those_of_the_slow_way(data, plain):
    tokenizer = tokenize_images.load_tokenizer(data / 'tok.pt')
    codebook = td.load_codebook(data / 'codebook.ckpt')
    folder = image_sources.open_image_folder(data / 'train', image_transform(SIZE))
    expected = torch.cat([quantize(tokenizer(image[None]), codebook) for image, _ in folder])
    assert np.array_equal(codes_of(plain), expected)
    assert td.read_labels(plain / 'my-label.txt').tolist() == folder.targets
    said = card(plain)
    sources = sum(path.stat().st_size for path in (data / 'train').rglob('*.png'))
    assert (said['format'], said['images'], said['grid'], said['codes'], said['codes_used'], said['source_bytes']) == \
        (td.BYTES, 45, 4, 40, 37, sources)
    assert said['classes'] == [f'class-{i}' for i in range(4)] and 'class folders' in said['labels_from']
    assert files(plain).keys() == {'my-label.txt', 'my-token.data.bin.gz', 'my-token.index.npy.gz', 'my-token.json'}


def encoded(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def odd_images():
    """One image of each unusual kind, encoded."""
    pixels = np.random.default_rng(0).integers(0, 256, (21, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by a viewer; not by torchvision
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return {'cmyk.jpg': encoded(image.convert('CMYK'), 'JPEG'), 'grey.jpg': encoded(image.convert('L'), 'JPEG'),
            'grey-alpha.png': encoded(image.convert('LA'), 'PNG'), 'alpha.png': encoded(image.convert('RGBA'), 'PNG'),
            'palette.png': encoded(image.convert('P'), 'PNG'), 'bilevel.png': encoded(image.convert('1'), 'PNG'),
            'transparent.gif': encoded(image.convert('P'), 'GIF', transparency=3), 'deep.png': encoded(deep, 'PNG'),
            'rotated.jpg': encoded(image, 'JPEG', exif=exif), 'plain.webp': encoded(image, 'WEBP'),
            'progressive.jpg': encoded(image, 'JPEG', progressive=True)}


@pytest.mark.parametrize('name', odd_images())
def test_odd_images_become_what_torchvision_makes_of_them(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(odd_images()[name])
    expected = image_transform(SIZE)(default_loader(path))
    pixels = image_sources.decode_image(path.read_bytes(), SIZE)
    assert pixels.dtype == torch.uint8 and torch.equal(pixels / torch.full((1,), 255.), expected)


# ---------------------------------------------------------------- kinds of input

def samples(data):
    """(path, class) of the training images, in the order of the class folders."""
    return [(path, int(path.parent.name[-1])) for path in sorted((data / 'train').rglob('*.png'))]


def write_tar(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def as_list(data, folder, separator='\t'):
    lines = [f'{os.path.relpath(path, folder)}{separator}{label}\n' for path, label in samples(data)]
    (folder / 'list.txt').write_text('\n'.join(lines))  # with empty lines between
    return folder / 'list.txt'


def as_tars(data, folder, kind='cls'):
    content = {'cls': lambda label: b'%d\n' % label, 'json': lambda label: json.dumps({'label': label}).encode()}[kind]
    chosen = samples(data)
    for shard, part in enumerate((chosen[:20], chosen[20:])):
        members = [('x/readme.txt', b'hello')]
        for i, (path, label) in enumerate(part):
            pair = [(f'x/{shard}{i:03d}.png', path.read_bytes()), (f'x/{shard}{i:03d}.{kind}', content(label))]
            members += pair if i % 2 else pair[::-1]
        write_tar(folder / f'in-{shard:02d}.tar', members)
    return f'{folder}/in-{{00..01}}.tar'


def as_parquet(data, folder):
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    chosen = samples(data)
    info = {'info': {'features': {'label': {'names': list('abcd'), '_type': 'ClassLabel'}}}}
    for shard, part in enumerate((chosen[:20], chosen[20:])):
        table = pa.table({'image': [{'bytes': path.read_bytes(), 'path': path.name} for path, _ in part],
                          'label': [label for _, label in part]})
        table = table.replace_schema_metadata({'huggingface': json.dumps(info)})
        parquet.write_table(table, folder / f'train-{shard}.parquet', row_group_size=7)
    return folder


@pytest.mark.parametrize('make', [as_list, lambda *a: as_list(*a, ' '), as_tars, lambda *a: as_tars(*a, 'json'),
                                  as_parquet], ids=['tabs', 'spaces', 'cls', 'json', 'parquet'])
def test_every_kind_of_input_gives_the_same_tokens(data, plain, make, tmp_path):
    folder = tmp_path / 'in put'
    folder.mkdir()
    out = tokenize(data, tmp_path / 'out', data_path=make(data, folder), num_workers=2)
    for name in ('my-token.data.bin.gz', 'my-token.index.npy.gz', 'my-label.txt'):
        assert (out / name).read_bytes() == (plain / name).read_bytes(), name
    assert card(out)['source_bytes'] == card(plain)['source_bytes']
    assert card(out)['classes'] == (list('abcd') if make is as_parquet else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in put', 'out']  # nothing was extracted


def test_bad_inputs_get_one_line(data, tmp_path):
    source = image_sources.open_source
    fails(lambda: source(tmp_path / 'none'), 'none: no such file or folder')
    fails(lambda: source(f'{tmp_path}/*.tar'), r'\*.tar: no file matches')
    (tmp_path / 'empty').mkdir()
    fails(lambda: source(tmp_path / 'empty'), 'empty: no class folders')
    (tmp_path / 'half' / 'dogs').mkdir(parents=True)
    save_image(tmp_path / 'half' / 'cats' / 'a.png', 0)
    fails(lambda: source(tmp_path / 'half'), 'half:.*dogs')
    (tmp_path / 'a.zip').write_bytes(b'')
    fails(lambda: source(tmp_path / 'a.zip'), 'a.zip: images come from')
    for text, said in (('', 'no images'), ('a.png 1\nb.png\n', "line 2 is not 'path label'"), ('a.png -1', 'line 1'),
                       ('a.png\tcat', 'line 1'), ('7', 'line 1')):
        (tmp_path / 'list.txt').write_text(text)
        fails(lambda: source(tmp_path / 'list.txt'), 'list.txt', said)


def test_bad_tars_get_one_line(tmp_path):
    path = tmp_path / 'a.tar'
    for members, said in (([('1.jpg', b'x')], '1 has no label'), ([('1.txt', b'x')], 'no images'),
                          ([('1.jpg', b'x'), ('1.cls', b'cat')], '1.cls holds no integer label'),
                          ([('1.jpg', b'x'), ('1.cls', b'-2')], '1.cls holds no integer label'),
                          ([('1.jpg', b'x'), ('1.json', b'{"label": true}')], '1.json holds no integer label'),
                          ([('1.jpg', b'x'), ('1.json', b'{}')], '1 has no label'),
                          ([('1.jpg', b'x'), ('1.png', b'x'), ('1.cls', b'1')], '1.jpg and 1.png')):
        write_tar(path, members)
        fails(lambda: image_sources.open_source(path), 'a.tar', said)
    write_tar(path, [('1.jpg', b'x' * 5000), ('1.cls', b'1')])
    path.write_bytes(path.read_bytes()[:3000])
    fails(lambda: image_sources.open_source(path), 'a.tar', 'truncated')
    path.write_bytes(b'junk' * 1000)
    fails(lambda: image_sources.open_source(path), 'a.tar', 'no tar file')
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        with tarfile.open(path, 'w') as tar:
            member = tarfile.TarInfo('1.jpg')
            member.type, member.linkname = kind, '/etc/passwd'
            tar.addfile(member)
        fails(lambda: image_sources.open_source(path), 'a.tar', '1.jpg is a link or another special')


def test_bad_parquet_gets_one_line(tmp_path, monkeypatch):
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    path = tmp_path / 'a.parquet'
    image = [{'bytes': b'x', 'path': 'a'}]
    for columns, said in (({'img': image, 'label': [1]}, "expected columns 'image'.*img, label"),
                          ({'image': image, 'label': ['cat']}, "expected columns"),
                          ({'image': image, 'label': [-1]}, 'empty or negative'),
                          ({'image': image * 2, 'label': [1, None]}, 'empty or negative')):
        parquet.write_table(pa.table(columns), path)
        fails(lambda: image_sources.open_source(path), 'a.parquet', said)
    path.write_bytes(b'PAR1 junk')
    fails(lambda: image_sources.open_source(path), 'a.parquet', 'no readable parquet')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    fails(lambda: image_sources.open_source(path), 'pip install')


# ---------------------------------------------------------------- bad images and bad options

@pytest.fixture
def bad_data(data, tmp_path):
    """The training images as a list, three of them unreadable: truncated, no image, missing."""
    for path, label in samples(data):
        target = tmp_path / 'in' / 'train' / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    listed = as_list(data, tmp_path / 'in')
    listed.write_text(listed.read_text().replace(os.path.relpath(data, tmp_path / 'in') + '/', ''))
    images = sorted((tmp_path / 'in').rglob('*.png'))
    images[5].write_bytes(images[5].read_bytes()[:700])
    images[17].write_bytes(b'no image')
    images[40].unlink()
    return listed, [images[i].name for i in (5, 17, 40)]


def test_bad_images_stop_or_are_skipped(data, plain, bad_data, tmp_path, capfd, monkeypatch):
    listed, bad = bad_data
    monkeypatch.setattr(tokenize_images, 'PART_BATCHES', 4)
    out = tmp_path / 'out'
    fails(lambda: tokenize(data, out, data_path=listed), f'{bad[0]} is no readable image', 'skip-bad-images')
    tokenize(data, out, data_path=listed, skip_bad_images=True)  # goes on from there
    assert [line.split()[1].split('/')[-1][:-1] for line in capfd.readouterr().err.splitlines()
            if line.startswith('skipped')] == bad
    keep = np.setdiff1d(np.arange(45), (5, 17, 40))
    assert np.array_equal(codes_of(out), codes_of(plain)[keep]) and card(out)['skipped_in_run'] == 3
    assert np.array_equal(td.read_labels(out / 'my-label.txt'), td.read_labels(plain / 'my-label.txt')[keep])


def test_skipped_parts_are_not_taken_for_whole_ones(data, bad_data, tmp_path, monkeypatch):
    listed, bad = bad_data
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_images, 'assemble', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokenize(data, tmp_path / 'out', data_path=listed, skip_bad_images=True)
    fails(lambda: tokenize(data, tmp_path / 'out', data_path=listed), '3 images were skipped before', bad[0])
    (tmp_path / 'x.txt').write_text('no.png 1\n')
    fails(lambda: tokenize(data, tmp_path / 'x', data_path=tmp_path / 'x.txt', skip_bad_images=True),
          'none of the 1 images can be read')


def test_decompression_bombs_are_bad_images(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(image_sources.BadImage, match='decompression bomb'):
        image_sources.decode_image(odd_images()['plain.webp'], SIZE)


def test_bad_options_get_one_line(data, tmp_path):
    out = tmp_path / 'out'
    torch.save(torch.zeros(40, 5), tmp_path / 'narrow.ckpt')
    torch.save(torch.zeros(65537, DIM), tmp_path / 'huge.ckpt')
    for options, said in (({'image_size': 18}, '--image-size 18: patches of 4.*choose 16 or 20'),
                          ({'codebook_path': tmp_path / 'narrow.ckpt'}, 'narrow.ckpt: rows of 5.*gives 8'),
                          ({'codebook_path': tmp_path / 'huge.ckpt'}, 'huge.ckpt: 65537 codes.*--limit-codes'),
                          ({'codebook_path': None}, 'tok.pt: has no codebook of its own'),
                          ({'batch_size': 0}, '--batch-size 0'), ({'shard_size': -1}, '--shard-size -1'),
                          ({'name': '../x'}, '--name ../x'), ({'name': ''}, '--name')):
        fails(lambda: tokenize(data, out, **options), said)
        assert not out.exists()


def test_features_that_are_not_finite_stop_the_run(data, tmp_path):
    state = torch.load(data / 'tok.pt', weights_only=True)
    torch.save({**state, 'scale': torch.tensor(float('nan'))}, tmp_path / 'nan.pt')
    fails(lambda: tokenize(data, tmp_path / 'out', tokenizer_path=tmp_path / 'nan.pt'), 'nan.pt', 'not finite')


def test_files_of_another_run_are_refused(data, tmp_path, capsys):
    out = tokenize(data, tmp_path / 'out', name='a')
    before = files(out)
    capsys.readouterr()
    tokenize(data, out, name='a')  # the same again: nothing to do
    assert 'complete already' in capsys.readouterr().out
    fails(lambda: tokenize(data, out, 'val', name='a'), 'a-token.data.bin.gz|a-label', 'another run')
    fails(lambda: tokenize(data, out, name='a', shard_size=20), 'another run')
    fails(lambda: tokenize(data, out, 'val', name='b', codebook_path=None), 'codebook')
    assert files(out) == before
    tokenize(data, out, 'val', name='b')  # another name is welcome
    (out / 'a-token.json').unlink()
    fails(lambda: tokenize(data, out, name='a'), 'another run')


# ---------------------------------------------------------------- processes and interruptions

def command(data, output, *launch, **options):
    line = [sys.executable, *launch, str(ROOT / 'scripts' / 'tokenize_images.py'), *words(data, output, **options)]
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    return subprocess.Popen(line, env={**env, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)


def two_processes():
    return '-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}'


def test_two_processes_make_the_same_files(data, plain, tmp_path):
    run = command(data, tmp_path / 'out', *two_processes(), num_workers=1)
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0, output
    assert files(tmp_path / 'out') == files(plain)


def test_a_bad_image_that_only_the_second_rank_meets_is_named(data, bad_data, tmp_path):
    listed, bad = bad_data
    listed.write_text('\n'.join(line for line in listed.read_text().splitlines()
                                if bad[0] not in line and bad[1] not in line))  # what is left is in the second part
    run = command(data, tmp_path / 'out', *two_processes(), data_path=listed)
    output, _ = run.communicate(timeout=200)
    assert run.returncode and sum(f'{bad[2]} is no readable image' in line for line in output.splitlines()) == 1


@pytest.mark.parametrize('moment', ['parts', 'end'])
def test_killed_then_resumed_makes_the_same_files(data, plain, moment, tmp_path):
    """Killed with -9 once a part is there, or while the final files are written; then with two workers."""
    out = tmp_path / 'out'
    options = {'batch_size': 2, 'num_workers': 1}
    run = command(data, out, **options)
    seen = {'parts': lambda: [*out.glob('.my.parts/0*.npz')], 'end': lambda: [*out.glob('my-token*')]}[moment]
    deadline = time.time() + 60
    while not seen() and run.poll() is None and time.time() < deadline:
        time.sleep(0.0005)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL  # it had not come to its end
    tokenize(data, out, **options)
    assert files(out) == files(plain)


class Killed(BaseException):
    pass


def test_stopped_after_any_write_it_resumes_to_the_same_files(data, tmp_path, monkeypatch):
    """Files change by renaming only, so a kill at any moment is one between two renames: stop at each of them."""
    monkeypatch.setattr(tokenize_images, 'PART_BATCHES', 4)
    options = {'limit_codes': True, 'shard_size': 20}
    whole = files(tokenize(data, tmp_path / 'whole', **options))
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
        assert files(out) != whole
        tokenize(data, out, **options)
        assert files(out) == whole, stop
    assert stop == 1 + 6 + 1 + 3 * 4  # run.json, parts, codebook, shards


def test_a_changed_run_is_not_resumed(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_images, 'assemble', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokenize(data, tmp_path / 'out')
    for options, said in (({'batch_size': 4}, 'batch_size'), ({'source': 'val'}, 'source'),
                          ({'image_size': 20}, 'image_size'), ({'amp': 'bf16'}, 'precision'),
                          ({'limit_codes': True}, 'limit_codes')):
        fails(lambda: tokenize(data, tmp_path / 'out', **options), '.my.parts: holds an unfinished run', said)
    part, = (tmp_path / 'out' / '.my.parts').glob('000001.npz')
    part.write_bytes(part.read_bytes()[:100])
    fails(lambda: tokenize(data, tmp_path / 'out'), '000001.npz: damaged; delete it')


# ---------------------------------------------------------------- codebooks

def test_limited_codes(data, plain, tmp_path):
    full = td.load_codebook(data / 'codebook.ckpt')
    out = tokenize(data, tmp_path / 'out', name='train', limit_codes=True)
    kept = card(out, 'train-token')['kept_codes']
    reduced = td.load_codebook(out / 'codebook.ckpt')
    assert len(kept) == 37 and torch.equal(reduced, full[kept])
    assert np.array_equal(np.array(kept)[codes_of(out, 'train-token')], codes_of(plain))
    assert card(out, 'train-token')['codebook']['sha256'] == tokenize_images.sha256(out / 'codebook.ckpt')
    # the other split is quantised against what was kept
    tokenize(data, out, 'val', name='val', codebook_path=out / 'codebook.ckpt')
    tokenizer = tokenize_images.load_tokenizer(data / 'tok.pt')
    folder = image_sources.open_image_folder(data / 'val', image_transform(SIZE))
    expected = torch.cat([quantize(tokenizer(image[None]), reduced) for image, _ in folder])
    assert np.array_equal(codes_of(out, 'val-token'), expected)
    fails(lambda: tokenize(data, out, 'val', name='other', limit_codes=True), 'codebook.ckpt', 'drop --limit-codes')


def test_large_codebooks_get_16_bits(data, tmp_path):
    big = torch.randn(8192, DIM, generator=torch.Generator().manual_seed(1))
    torch.save(big, tmp_path / 'big.ckpt')
    out = tokenize(data, tmp_path / 'out', codebook_path=tmp_path / 'big.ckpt')
    codes = td.TokenDataset(out / 'my-token.data.bin.gz', out / 'my-label.txt', 8192).codes
    assert card(out)['format'] == td.UINT16 and codes.max() > 509
    limited = tokenize(data, tmp_path / 'limited', codebook_path=tmp_path / 'big.ckpt', limit_codes=True)
    used = np.unique(codes)
    assert len(used) == card(limited)['codes'] > 510 and card(limited)['format'] == td.UINT16
    assert np.array_equal(used[codes_of(limited)], codes)


def test_more_codes_than_16_bits_are_kept_only_where_few_are_used(data, tmp_path):
    huge = torch.cat([td.load_codebook(data / 'codebook.ckpt'), torch.zeros(70_000, DIM)]).flip(0)
    torch.save(huge, tmp_path / 'huge.ckpt')
    out = tokenize(data, tmp_path / 'out', codebook_path=tmp_path / 'huge.ckpt', limit_codes=True)
    assert card(out)['codes'] == 37 and min(card(out)['kept_codes']) >= 70_000 and card(out)['format'] == td.BYTES


def test_the_codebook_of_the_tokenizer_itself(data, tmp_path):
    torch.manual_seed(0)
    model = ViTVQGAN(Size(64, 1, 1, 64), codebook_size=40, embed_dim=DIM, image_size=SIZE, patch_size=PATCH)
    torch.save(model.state_dict(), tmp_path / 'vit.pt')
    own = {'tokenizer_path': tmp_path / 'vit.pt', 'codebook_path': None}
    out = tokenize(data, tmp_path / 'out', name='train', **own)
    assert torch.equal(td.load_codebook(out / 'codebook.ckpt'), model.codebook)
    again = tokenize(data, tmp_path / 'again', name='train', **own)
    assert files(again) == files(out)
    tokenize(data, out, 'val', name='val', **own)  # the same codebook is no other run's file
    assert card(out, 'val-token')['codebook'] == card(out, 'train-token')['codebook'] == \
        {'file': 'codebook.ckpt', 'sha256': tokenize_images.sha256(out / 'codebook.ckpt')}


def test_bf16_reports_its_agreement(data, plain, tmp_path, capsys):
    out = tokenize(data, tmp_path / 'out', amp='bf16')
    share = (codes_of(out)[:2] == codes_of(plain)[:2]).mean()  # measured on the first batch
    assert card(out)['agreement_with_fp32'] == pytest.approx(share) and card(out)['precision'] == 'bf16'
    assert f'{share:.4%} of codes agree with fp32' in capsys.readouterr().out


# ---------------------------------------------------------------- shards, training, verification

def test_shards_hold_what_the_single_file_holds(data, plain, tmp_path):
    out = tokenize(data, tmp_path / 'out', shard_size=20)
    assert [card(out, f'my-token-0000{i}')['images'] for i in range(3)] == [20, 20, 5]
    data_ = td.TokenDataset(f'{out}/my-token-*.data.bin.gz', f'{out}/my-label-*.txt', 40)
    assert np.array_equal(data_.codes, codes_of(plain))
    assert np.array_equal(data_.labels, td.read_labels(plain / 'my-label.txt'))
    cards = [card(out, f'my-token-0000{i}') for i in range(3)]
    assert sum(c['source_bytes'] for c in cards) == card(plain)['source_bytes']
    assert [c['codes_used'] for c in cards] == [len(np.unique(x)) for x in np.split(codes_of(plain), (20, 40))]


def test_training_on_shards_equals_training_on_the_single_file(data, plain, tmp_path):
    shards = tokenize(data, tmp_path / 'shards', shard_size=20)
    results = []
    for name, tokens, labels in (('one', plain / 'my-token.data.bin.gz', plain / 'my-label.txt'),
                                 ('many', f'{shards}/my-token-*.data.bin.gz', f'{shards}/my-label-*.txt')):
        line = [*SMALL, '--input-size', 24, '--batch-size', 8, '--codebook-path', data / 'codebook.ckpt',
                '--eda-rc-prob', 0, '--epochs', 2, '--warmup-epochs', 0, '--output_dir', tmp_path / name,
                '--train-token-file', tokens, '--train-label-file', labels, '--val-token-file', tokens,
                '--val-label-file', labels, '--token-cache', 'none', '--model-kwargs', 'depth=1', 'embed_dim=32',
                'num_heads=2', f'in_chans={DIM}']
        main_seit.main(main_seit.parse_args([str(word) for word in line]))
        results.append(states(tmp_path / name / 'checkpoint.pth'))
    for key in ('model', 'model_ema', 'optimizer'):
        assert_same(results[0][key], results[1][key])


def verify(capsys, *line):
    """(exit code, lines) of verify_tokens.py."""
    capsys.readouterr()
    try:
        verify_tokens.main(verify_tokens.get_args_parser().parse_args([str(word) for word in line]))
        code = 0
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().out.splitlines()


def test_verify_tokens(data, tmp_path, capsys, golden):
    published = ['--token-file', golden.folder / 'sample-token.data.bin.gz', '--label-file',
                 golden.folder / 'sample-label.txt']
    code, lines = verify(capsys, *published)
    assert code == 0 and len(lines) == 1 and lines[0].startswith('right: ')

    out = tokenize(data, tmp_path / 'out', shard_size=20)
    line = ['--token-file', f'{out}/my-token-*.data.bin.gz', '--label-file', f'{out}/my-label-*.txt', '--codebook-path',
            data / 'codebook.ckpt', '--token-synonym-dict', out / 'synonyms.json']
    (out / 'synonyms.json').write_text(json.dumps({c: [(c + 1) % 40] for c in range(40)}))
    code, lines = verify(capsys, *line)
    assert code == 0 and lines == ['right: 45 images of 4x4 codes in 3 files (escaped-bytes)']

    (out / 'my-label-00000.txt').write_text('1\n')
    (out / 'my-token-00001.data.bin.gz').write_bytes(b'junk')
    (out / 'my-token-00002.json').write_text('{')
    (out / 'synonyms.json').write_text('{}')
    code, lines = verify(capsys, *line)
    assert code == 1 and lines[-1] == f'{len(lines) - 1} problems found'
    for said in ('my-label-00000.txt: 1 labels for the 20', 'my-label-00000.txt: 2 bytes', 'my-token-00001.*gzip',
                 'my-token-00001.data.bin.gz: 4 bytes', 'my-token-00002.json: not JSON', 'no synonyms for 40'):
        assert sum(bool(re.search(said, text)) for text in lines) == 1, (said, lines)
    torch.save(torch.zeros(40, DIM), out / 'codebook.ckpt')
    out = tokenize(data, tmp_path / 'good')
    line = ['--token-file', out / 'my-token.data.bin.gz', '--label-file', out / 'my-label.txt']
    assert verify(capsys, *line)[0] == 0
    code, lines = verify(capsys, *line, '--codebook-path', tmp_path / 'out' / 'codebook.ckpt')
    assert code == 1 and 'is not the codebook' in lines[0]
    said = card(out)
    (out / 'my-token.json').write_text(json.dumps({**said, 'codes_used': 1, 'files': {}, 'classes': ['one']}))
    code, lines = verify(capsys, *line)
    assert code == 1 and len(lines) == 6
