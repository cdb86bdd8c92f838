"""What several test files share: token sets, images, hostile files, processes, main_seit.py on small data."""
import builtins
import contextlib
import gzip
import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import engine
import main_seit
from benchmarks.common import free_port
from fileio.files import expand_files, sha256
from image_data.sources import open_source
from image_tokenizer import tokenizing
from image_tokenizer.tokenizing import EncodingOptions
from image_tokenizer.vitvqgan import Size, position_table
from token_files import cache as token_cache
from token_files.context_model import HEADER, MAGIC
from token_files.parts import OutputFiles
from token_files.published import companion_path, gzip_bytes
from token_files.token_file import manifest_path, open_token_file, write_model, write_set
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
SMALL = ['--device', 'cpu', '--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2',
         '--batch-size', '8', '--input-size', '64', '--swap-token-scale', '0.25']


# ---------------------------------------------------------------- training

def make_data(folder, n=24, grid=10, codes=30, classes=4, width=32, seed=0, shift=1):
    """Token sets in which the class shows: images of class c hold mostly codes c, c + classes, ...

    Returns main_seit.py's flags that name the files.
    """
    rng = np.random.default_rng(seed)
    for split, count in (('train', n), ('val', 11)):
        y = rng.integers(0, classes, count)
        y[:classes] = range(classes)
        x = y[:, None] + classes * rng.integers(0, codes // classes, (count, grid * grid))
        write_set(folder / f'{split}-token.data.bin.gz', [x], count, folder / f'{split}-label.txt', y)
    torch.save(torch.from_numpy(rng.standard_normal((codes, width)).astype(np.float32)), folder / 'codebook.ckpt')
    synonyms = {c: [(c + i) % codes for i in range(shift, shift + 5)] for c in range(codes)}
    (folder / 'synonyms.json').write_text(json.dumps(synonyms))
    return ['--codebook-path', folder / 'codebook.ckpt', '--token-synonym-dict', folder / 'synonyms.json',
            '--train-token-file', folder / 'train-token.data.bin.gz', '--train-label-file', folder / 'train-label.txt',
            '--val-token-file', folder / 'val-token.data.bin.gz', '--val-label-file', folder / 'val-label.txt']


def flag_values(words):
    """Flags with one value each, such as `make_data` returns, by name."""
    return dict(zip(words[::2], words[1::2]))


def words_of(values):
    """The command line of `flag_values`."""
    return [word for pair in values.items() for word in pair]


def clean_environment(**more):
    """This environment without a launcher's variables, one thread a process."""
    launcher = 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'
    env = {name: value for name, value in os.environ.items()
           if name not in launcher and not name.startswith('SLURM_')}
    return {**env, 'OMP_NUM_THREADS': '1', **more}


def seit(*words, launch=(), fails=False):
    """Run main_seit.py; returns its output, or with `fails` its one error line."""
    command = [sys.executable, *launch, str(ROOT / 'main_seit.py'), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=500,
                          cwd=os.path.expanduser('~'))
    if not fails:
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    assert done.returncode == 2, done.stdout + done.stderr
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith('error: '), done.stderr
    return errors[0]


def run_here(*words):
    """main_seit.py in this process: fast, for what needs no process of its own. Returns the exit code."""
    return main_seit.main(main_seit.parse_args([str(word) for word in words]))


class Killed(BaseException):
    """As SIGKILL, but within this process."""


def kill():
    """End a run in this process at once."""
    raise Killed


def send_signal():
    """Send this process SIGTERM, as a scheduler does."""
    signal.raise_signal(signal.SIGTERM)


def before_step(patch, epoch, step, action):
    """Let the engine call action() before a step of an epoch, until the monkeypatch `patch` is undone."""
    seed_step = engine.seed_step

    def seeded(seed, *place):
        if place[:2] == (epoch, step):
            action()
        seed_step(seed, *place)
    patch.setattr(engine, 'seed_step', seeded)


def mistake(*words):
    """The one line that main_seit.py ends with for these words."""
    try:
        run_here(*words)
    except InputError as error:
        assert '\n' not in str(error)
        return str(error)
    raise AssertionError('no InputError')


def read_log(folder):
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]


def without_times(lines):
    return [{k: v for k, v in line.items() if 'time' not in k} for line in lines]


def accuracy_lines(output):
    return [line for line in output.splitlines() if line.startswith('* Acc@1')]


def states(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    """Equal nests of tensors and plain values, to the bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


# ---------------------------------------------------------------- images, tar shards, tokenizer files

def fails(action, *patterns):
    """Check that action() raises an InputError of one line in which each pattern is found."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert '\n' not in message
    for pattern in patterns:
        assert re.search(pattern, message), message


def call(program, *words):
    """The exit code of a program's main, run in this process."""
    return program.main(program.parse_args([str(word) for word in words])) or 0


def published_transform(size):
    """The published preparation of an image, (3, size, size) float32 in [0, 1], by torchvision."""
    return transforms.Compose([transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC),
                               transforms.ToTensor()])


def save_image(path, seed, size=(20, 24), **options):
    """Write an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(noise(seed, size), path.suffix[1:].upper().replace('JPG', 'JPEG'), **options))


def noise(seed, size=(20, 24)):
    """A PIL image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def held(image, orientation, kind='PNG'):
    """The bytes of a PIL image, with an EXIF orientation, in which it is stored as it is."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


def encoded(image, kind='PNG', **options):
    """The bytes of a PIL image as a file of some kind."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def write_tar(path, members):
    """Write a tar of (name, bytes); returns its path."""
    with tarfile.open(path, 'w') as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def tar_samples(count, prefix='', kind='JPEG'):
    """Members of a tar shard with `count` images of noise, and their classes 0, 1, 2, 0, ..."""
    members = []
    for i in range(count):
        members.append((f'{prefix}{i:04d}.jpg', encoded(noise(i), kind)))
        members.append((f'{prefix}{i:04d}.cls', b'%d' % (i % 3)))
    return members


def write_parquet(path, rows, names=None, row_group_size=None):
    """Write a parquet file of (encoded image, label), with class names if given; returns its path."""
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    table = pa.table({'image': [{'bytes': data, 'path': 'x.png'} for data, _ in rows],
                      'label': [label for _, label in rows]})
    if names is not None:
        info = {'info': {'features': {'label': {'names': names, '_type': 'ClassLabel'}}}}
        table = table.replace_schema_metadata({'huggingface': json.dumps(info)})
    parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def samples(data):
    """(path, class) of the images, in the order of the class folders."""
    return [(path, int(path.parent.name[-1])) for path in sorted(data.rglob('*.png'))]


def as_list(data, folder, separator='\t', start='', newline='\n'):
    lines = [f'{os.path.relpath(path, folder)}{separator}{label}{newline}' for path, label in samples(data)]
    (folder / 'list.txt').write_bytes((start + newline.join(lines)).encode())  # with empty lines between
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
    chosen = [(path.read_bytes(), label) for path, label in samples(data)]
    for shard, part in enumerate((chosen[:20], chosen[20:])):
        write_parquet(folder / f'train-{shard}.parquet', part, list('abcd'), row_group_size=7)
    return folder


def smooth_images(folder, per_class=8, size=40):
    """Write smooth color images in three class folders; returns their paths in the order of an ImageFolder."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    paths = []
    for name in ('ant', 'bee', 'cat'):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            fy, fx, phase = rng.uniform(1, 6, 3), rng.uniform(1, 6, 3), rng.uniform(0, 6, 3)
            pixels = np.sin(y[..., None] * fy + x[..., None] * fx + phase)
            paths.append(folder / name / f'{i}.png')
            Image.fromarray((127.5 + 127 * pixels).astype(np.uint8)).save(paths[-1])
    return paths


GOLDEN_SIZE = Size(64, 2, 2, 128)


def golden_state(shapes, seed=0):
    """Weights of a ViT-VQGAN that are a function of their names: the rule of the golden files."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith('_pos_embedding'):
            continue
        rng = np.random.default_rng(zlib.crc32(name.encode()) + seed)
        values = 0.05 * rng.standard_normal(shape).astype(np.float32)
        state[name] = torch.from_numpy((values + ('norm' in name and name.endswith('weight'))).astype(np.float32))
    return state


def seitpp_state(shapes, seed=0):
    """Weights of SeiT++'s models by the rule of their golden files, in which "norm" is found in any case."""
    state = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()) + seed)
        one = name.endswith('weight') and ('norm' in name.lower() or '.ln.' in name)
        state[name] = torch.from_numpy((0.02 * rng.standard_normal(shape)).astype(np.float32) + np.float32(one))
    return state


def token_adapt_state(shapes):
    """The golden weights of TokenAdapt, with its position tables."""
    sides = {'de_pos_embedding': 32, 'en_pos_embedding': 28}
    tables = {name: position_table(sides[name.rpartition('.')[2]], sides[name.rpartition('.')[2]], 384)
              for name in shapes if name.endswith('_pos_embedding')}
    return seitpp_state(shapes) | tables


def same_weights(model, state):
    """Check that a model has exactly the weights of a state dict."""
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in state)


class Bomb:
    """Pickled, it is a call that creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f'open({str(self.marker)!r}, "w").close()',)


TOKENIZER_CODE = '''
import enum
import functools
from pathlib import Path

import numpy as np
from torch import nn
from image_tokenizer.vitvqgan import ViTVQGAN

class SameNames(ViTVQGAN):
    """Our names and our features."""

class Scaled(ViTVQGAN):
    """Our names, other features."""
    def forward(self, images):
        return super().forward(images) * 2

class Autoencoder(ViTVQGAN):
    """Our names; gives images and a loss."""
    def forward(self, images):
        return self.decoder(self.post_quant(super().forward(images))), 0.

class OtherNames(nn.Module):
    """As SeiT's may be: encoder and projection under names we do not know."""
    def __init__(self, model):
        super().__init__()
        self.vit, self.proj, self.codes = model.encoder, model.pre_quant, model.quantizer['embedding']
        self.unrelated = nn.Linear(7, 5)
    def forward(self, images):
        return self.proj(self.vit(images))

class Convolution(nn.Module):
    """No ViT-VQGAN at all, but the right output."""
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 8, stride=8)
    def forward(self, images):
        import late_import
        return self.conv(images).flatten(2).transpose(1, 2)

class Classifier(nn.Linear):
    """The wrong kind."""

class Callback:
    """What a Lightning file may carry along."""
    def __init__(self):
        self.best, self.kind, self.where = np.arange(3.), Kind.LAST, Path('x')
        self.settings = SettingsDict(a=1, b=SettingsDict(c=functools.partial(max, 1)))

class SettingsDict(dict):
    """Unpickled item by item, as Lightning's hyper-parameters are."""

class Kind(enum.Enum):
    LAST = 1
'''


# ---------------------------------------------------------------- starting programs, tokenizing

DEMO = ROOT / 'demo'


def start(program, *words, launch=()):
    """Start a program of the repository in a process (group) of its own; its output comes as one text."""
    line = [sys.executable, *launch, str(ROOT / program), *map(str, words)]
    return subprocess.Popen(line, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def two_processes():
    """What launches a program as two ranks."""
    return '-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}'


def contents(folder):
    """The files of a folder and what they hold, names to bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


PATCH = 4
DIM = 8
SIZE = 16


def make_images(root):
    """Folders train/ (4 classes, 45 images) and val/ (9), tok.pt and codebook.ckpt of 40 codes, of which 3 are idle."""
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


def tokenize_words(data, output, source='train', **options):
    """A command line of tokenize_images.py for `make_images`; an option of None is left out, one of True is a flag."""
    options = {'data_path': data / source, 'name': 'my', 'output_dir': output, 'tokenizer_path': data / 'tok.pt',
               'codebook_path': data / 'codebook.ckpt', 'image_size': SIZE, 'batch_size': 2, 'num_workers': 0,
               'device': 'cpu', **options}
    line = []
    for key, value in options.items():
        if value is not None:
            line.append(f'--{key.replace("_", "-")}')
            if value is not True:
                line.append(str(value))
    return line


def tokenize(data, output, source='train', *, data_path=None, name='my', shard_size=0, format='published',
             image_size=SIZE, batch_size=2, workers=0, skip_bad=False, max_pixels=None, **options):
    """Tokenize the images of `make_images` in this process; returns the output folder."""
    options = {'tokenizer_path': data / 'tok.pt', 'codebook_path': data / 'codebook.ckpt', **options}
    tokenizing.tokenize(open_source(data_path or data / source), OutputFiles(output, name, shard_size, format),
                        EncodingOptions(image_size=image_size, batch_size=batch_size, **options), torch.device('cpu'),
                        workers, skip_bad, max_pixels)
    return output


def with_bad_images(data, folder):
    """A list of copies of the training images, three of them unreadable (truncated, no image, missing); their names."""
    for path, _ in samples(data / 'train'):
        target = folder / 'train' / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    listed = as_list(data / 'train', folder)
    listed.write_text(listed.read_text().replace(os.path.relpath(data, folder) + '/', ''))
    images = sorted(folder.rglob('*.png'))
    images[5].write_bytes(images[5].read_bytes()[:700])
    images[17].write_bytes(b'no image')
    images[40].unlink()
    return listed, [images[i].name for i in (5, 17, 40)]


def open_codes(token_file, cache=''):
    """The codes of the token files that a path, glob or list names."""
    return token_cache.open_codes([open_token_file(path) for path in expand_files(token_file)], cache)


def make_set(folder, n=12, grid=4, codes=391, name='a', seed=0):
    """Write a token set; returns its (token file, label file), codes (n, grid²) and labels (n,)."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, codes, (n, grid * grid)).astype(np.uint16)
    y = rng.integers(0, 10, n)
    files = folder / f'{name}-token.data.bin.gz', folder / f'{name}-label.txt'
    write_set(files[0], [x], n, files[1], y)
    return files, x, y


def make_wide_set(folder, n=12, grid=4, codes=8192, name='w', **manifest):
    """Write a set of 16-bit codes and its manifest; returns its files and codes."""
    x = np.random.default_rng(1).integers(0, codes, (n, grid * grid))
    x[0, 0] = codes - 1
    files = folder / f'{name}-token.data.bin.gz', folder / f'{name}-label.txt'
    write_set(files[0], [x], n, files[1], np.zeros(n, int), {'format': 'uint16-le'})
    manifest_path(files[0]).write_text(json.dumps({'format': 'uint16-le', **manifest}))
    return files, x


CODE_KINDS = 'random', 'constant', 'skewed', 'alternating', 'gaps', 'copied', 'all different'


def codes_of_kind(kind, images, grid, seed=0):
    """Codes (images, grid ** 2) int64 in [0, 65535], easy or hard to compress."""
    rng = np.random.default_rng(seed)
    shape = images, grid ** 2
    codes = rng.integers(0, rng.integers(1, 400), shape)
    if kind == 'constant':
        codes[:] = rng.integers(0, 65536)
    elif kind == 'skewed':
        codes = 300 * (rng.random(shape) < 0.01)
    elif kind == 'alternating':
        codes = np.arange(codes.size).reshape(shape) % 2 * 65535
    elif kind == 'gaps':
        codes = rng.choice(65536, 400, replace=False)[codes]
    elif kind == 'copied':  # mostly the code to the left
        for place in range(1, shape[1]):
            codes[:, place] = np.where(rng.random(images) < 0.9, codes[:, place - 1], codes[:, place])
    elif kind == 'all different':
        codes = rng.permutation(65536)[:codes.size].reshape(shape)
    return codes


def make_compact_set(folder, codes, /, labels=None, name='a', checked=False, **entries):
    """Write a compact set of codes (N, n), its manifest with checksums if `checked`; returns (token, label) files."""
    files = folder / f'{name}-token.data.bin', folder / f'{name}-label.txt'
    manifest = {'format': 'compact', **write_model(files[0], 'compact', [codes], len(codes)), **entries}
    write_set(files[0], [codes], len(codes), files[1], [0] * len(codes) if labels is None else labels, manifest)
    if not checked:
        manifest_path(files[0]).write_text(json.dumps(manifest))
    return files


def make_shards(folder, sizes=(5, 4, 3), **kwargs):
    """Write shards, named out of order; returns their files, and the codes and labels in the order of their names."""
    sets = [make_set(folder, n, name=f's-{i}', seed=i, **kwargs) for i, n in reversed([*enumerate(sizes)])][::-1]
    return [files for files, *_ in sets], *(np.concatenate([s[i] for s in sets]) for i in (1, 2))


def make_checked_set(folder):
    """Write a set of two images whose manifest holds checksums; returns (token file, label file)."""
    path = write_raw_set(folder, bytes(8), [0, 4, 8])
    labels = folder / 'labels'
    labels.write_text('0\n1\n')
    write_manifest(path, labels)
    return path, labels


def write_manifest(token_file, *more, **entries):
    """Write a manifest with the checksums of a token file, its index and `more` files."""
    files = {file.name: {'bytes': file.stat().st_size, 'sha256': sha256(file)}
             for file in (token_file, companion_path(token_file), *more)}
    manifest_path(token_file).write_text(json.dumps({'format': 'escaped-bytes', 'files': files, **entries}))


def npy(array):
    """The bytes of a .npy."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_raw_set(folder, stream, index):
    """Write a token file and its index of any content; returns the token file."""
    path = folder / 'a.data.bin.gz'
    path.write_bytes(gzip.compress(stream, 1, mtime=0))
    companion_path(path).write_bytes(gzip.compress(index if isinstance(index, bytes) else npy(index), 1, mtime=0))
    return path


def rewrite(token_file, stream=None, index=None):
    """Replace the stream or the index of a token file."""
    if stream is not None:
        token_file.write_bytes(gzip_bytes(bytes(stream)))
    if index is not None:
        companion_path(token_file).write_bytes(gzip_bytes(npy(index)))


def unpack(token_file):
    """The (stream, index) of a token file."""
    return bytearray(gzip.decompress(token_file.read_bytes())), open_token_file(token_file).content.index


# ---------------------------------------------------------------- torch files that claim too much

def torch_bytes(value, old=False):
    """A torch file, in the format before torch 1.6 if `old`."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def repacked(value, pickled=None, compress=zipfile.ZIP_STORED):
    """A torch file of `value`, its pickle replaced, its members compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_bytes(value))) as source, zipfile.ZipFile(out, 'w', compress) as file:
        for member in source.infolist():
            swap = pickled is not None and member.filename.endswith('data.pkl')
            file.writestr(member.filename, pickled if swap else source.read(member))
    return out.getvalue()


def claims_more():
    """A torch file one of whose members says that it is longer than the file."""
    data = torch_bytes(torch.ones(2, 2))
    at = data.rindex(b'PK\1\2') + 20
    return data[:at] + b'\xff\xff\xff\x7f' * 2 + data[at + 8:]


class Evil:
    def __reduce__(self):
        return exec, ('raise SystemExit("code was run")',)


def hostile_torch_files():
    """(name, bytes, what the refusal must say) of files that torch should not be given."""
    swelling = b'\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.'  # bytearray(2 ** 31 - 1)
    yield 'compressed', repacked(torch.zeros(1 << 20, 8), compress=zipfile.ZIP_DEFLATED), 'compressed'
    yield 'size', claims_more(), 'claim|damaged'
    yield 'strides', torch_bytes(torch.ones(1, 1).half().expand(1 << 30, 1 << 30)), 'claim more numbers'
    yield 'bytearray', repacked(torch.ones(1), swelling), 'calls bytearray'
    yield 'old', pickle.dumps(0x1950a86a20f9469cfc6c, 2) + pickle.dumps(1001, 2) + swelling, 'calls bytearray'
    encode = b'c_codecs\nencode\n(X\x01\0\0\0aX\x05\0\0\0utf-8tR' + 40 * b'q\0c_codecs\nencode\n(h\0X\x03\0\0\0HEXtR'
    yield 'encode', repacked(torch.ones(1), b'\x80\x02' + encode + b'.'), 'calls encode'
    yield 'long name', repacked(torch.ones(1), b'\x80\x02c' + b'[' * 100_000 + b'\nx\n.'), 'name too long'
    word = b'X' + (1 << 17).to_bytes(4, 'little') + b'[' * (1 << 17)
    yield 'long string', repacked(torch.ones(1), b'\x80\x02' + word + b')R.'), 'name too long'
    yield 'sparse', torch_bytes(torch.ones(2, 2).to_sparse()), 'not a plain one'
    yield 'code', torch_bytes(Evil()), 'run code|runs code'


def hostile_parameters():
    """The hostile torch files as pytest's parameters `data, match`."""
    return [pytest.param(*rest, id=name) for name, *rest in hostile_torch_files()]


# ---------------------------------------------------------------- processes and their limits

SECONDS = 60  # of wall time: a busy machine alone must not look like a hang
MEMORY = 1 << 30  # bytes more than before; hostile files are of kilobytes


class Hang(BaseException):
    """More than SECONDS; no Exception, which a reader might take for damage."""


@contextlib.contextmanager
def limits():
    """Raise Hang after SECONDS, and let allocations beyond MEMORY fail, within the block."""
    def stop(*_):
        raise Hang(f'more than {SECONDS} s')

    pages = int(Path('/proc/self/statm').read_text().split()[0]) if sys.platform == 'linux' else None
    before = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[0][1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before[1])
        resource.setrlimit(resource.RLIMIT_AS, before[0])


def refused(path, read, *args, match):
    """Check that read(*args) raises an InputError of one short line that names `path`, within limits."""
    with limits(), pytest.raises(InputError, match=match) as caught:
        read(*args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(path) in message and len(message) < 1000


def failing_open(monkeypatch, path, number):
    """Let open() of `path` fail with an error number of the system."""
    real = open

    def opened(file, *args, **kwargs):
        if str(file) == str(path):
            raise OSError(number, os.strerror(number), str(file))
        return real(file, *args, **kwargs)
    monkeypatch.setattr(builtins, 'open', opened)


def run_python(code, *words, env=None, wrap=(), **kwargs):
    """Run Python code in a process of its own that can import the root's modules."""
    line = [*wrap, sys.executable, '-c', code, *map(str, words)]
    return subprocess.run(line, env=clean_environment(PYTHONPATH=str(ROOT), **(env or {})), capture_output=True,
                          text=True, timeout=300, **kwargs)


def in_child(work):
    """Call work() in a forked process; returns (exit code, or minus its signal; what it returned, as text)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.write(writing, str(work()).encode())
            code = 0
        except BaseException as error:
            os.write(writing, repr(error).encode())
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


@contextlib.contextmanager
def forked(work):
    """A forked process that calls work(ready), where ready() lets this one go on; killed at the end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            work(lambda: os.write(writing, b'1'))
        os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b'1'
        yield
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def no_space(limit):
    """Files cannot grow beyond `limit` bytes: without rights to mount a disk, writes fail in the same places."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def fill_golden(model, seed=0, gain=0.02):
    """Weights by the golden rule: a generator named after each tensor, and the seed of the golden file."""
    state = {}
    for name, value in model.state_dict().items():
        x = gain * np.random.default_rng(zlib.crc32(name.encode()) + seed).standard_normal(tuple(value.shape))
        x = x.astype(np.float32) + ('norm' in name and name.endswith('weight'))
        state[name] = torch.from_numpy(x)
    model.load_state_dict(state)
    return model


def structured(images=400, grid=8, codes=64, seed=0):
    """Codes that are mostly near the codes to the left and above."""
    rng = np.random.default_rng(seed)
    x = np.zeros((images, grid, grid), np.int64)
    for i in range(grid):
        for j in range(grid):
            near = (x[:, i, j - 1] if j else x[:, i - 1, j]) + (x[:, i - 1, j] if i else x[:, i, j - 1])
            x[:, i, j] = (near // 2 + rng.integers(-2, 3, images)) % codes if i or j else rng.integers(0, codes, images)
    return x.reshape(images, -1)


def signed(data):
    """The bytes of a model with the checksum that belongs to the others."""
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, 'little')


def packed(body=b'', magic=MAGIC, codes=2, symbols=2, left=1, upper=1):
    """A model of any header and body, its checksum right."""
    header = np.array([(magic, codes, symbols, left, upper)], HEADER).tobytes()
    return signed(header + zlib.compress(body) + bytes(4))


def odd_images():
    """One image of each unusual kind, encoded."""
    image = noise(0, (21, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by a viewer; not by torchvision
    deep = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    return {'cmyk.jpg': encoded(image.convert('CMYK'), 'JPEG'), 'gray.jpg': encoded(image.convert('L'), 'JPEG'),
            'gray-alpha.png': encoded(image.convert('LA')), 'alpha.png': encoded(image.convert('RGBA')),
            'palette.png': encoded(image.convert('P')), 'bilevel.png': encoded(image.convert('1')),
            'transparent.gif': encoded(image.convert('P'), 'GIF', transparency=3), 'deep.png': encoded(deep),
            'rotated.jpg': encoded(image, 'JPEG', exif=exif), 'plain.webp': encoded(image, 'WEBP'),
            'progressive.jpg': encoded(image, 'JPEG', progressive=True), 'plain.bmp': encoded(image, 'BMP'),
            'plain.tif': encoded(image, 'TIFF'), 'plain.ppm': encoded(image, 'PPM')}
