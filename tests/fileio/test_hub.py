"""Addresses of the Hugging Face Hub, against a server of the test's own that answers as the Hub does.

huggingface_hub reads HF_ENDPOINT when it is imported, so that all fetching is done in processes of its own.
"""
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import fileio.hub
from fileio.files import expand_files, is_address, sha256
from fileio.hub import Address, local_path, parse
from fileio.labels import read_labels
from helpers import (SMALL, fails, flag_values, make_compact_set, make_data, read_log, run_here, without_times,
                     words_of)
from image_tokenizer.tokenizers import load_tokenizer
from token_files.codebook import load_codebook
from token_files.made_with import identity_of_tokenizer

ROOT = Path(__file__).resolve().parents[2]
COMMITS = {'main': 'a' * 40, 'v1': 'b' * 40, 'refs/pr/1': 'c' * 40}
DATA, MODEL = 'datasets/some/set', 'some/model'


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files`: {(repository, revision): {name: bytes}}; 'datasets/some/gated' asks for a login."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Answer)
        self.files = {(DATA, revision): {} for revision in COMMITS} | {(MODEL, 'main'): {}}
        self.got = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def environment(self, home):
        """Of a process that takes this for the Hub, and has no cache yet."""
        return os.environ | {'HF_ENDPOINT': f'http://127.0.0.1:{self.server_port}', 'HF_HOME': str(home),
                             'HF_HUB_DISABLE_TELEMETRY': '1', 'OMP_NUM_THREADS': '1'}


class Answer(http.server.BaseHTTPRequestHandler):
    """Of one request."""

    def do_HEAD(self):
        repository, _, rest = urllib.parse.unquote(self.path).strip('/').partition('/resolve/')
        revisions = [name for name in (*COMMITS, *COMMITS.values()) if rest.startswith(f'{name}/')]
        known = any(repository == name for name, _ in self.server.files)
        if repository == 'datasets/some/gated':
            return self.refuse(401, 'GatedRepo')
        if repository == 'some/broken':
            return self.refuse(403, 'Forbidden')
        if not known:
            return self.refuse(401 if 'secret' in repository else 404, 'RepoNotFound')
        if not revisions:
            return self.refuse(404, 'RevisionNotFound')
        file = rest[len(revisions[0]) + 1:]
        revision = next(name for name, commit in COMMITS.items() if revisions[0] in (name, commit))
        data = self.server.files[repository, revision].get(file)
        if data is None:
            return self.refuse(404, 'EntryNotFound', COMMITS[revision])
        self.send_response(200)
        self.send_header('X-Repo-Commit', COMMITS[revision])
        self.send_header('ETag', f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command == 'GET':
            self.server.got.append(file)
            self.wfile.write(data)
        return None

    do_GET = do_HEAD

    def refuse(self, status, code, commit=''):
        self.send_response(status)
        self.send_header('X-Error-Code', code)
        self.send_header('Content-Length', '0')
        if commit:
            self.send_header('X-Repo-Commit', commit)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope='module')
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


OPEN = """
import sys, time
time.sleep = lambda seconds: None  # between the attempts of huggingface_hub
from fileio.hub import local_path
from utils import InputError
for address in sys.argv[1:]:
    try:
        with open(str(local_path(address)).partition('#')[0]) as file:
            print('text', file.read())
    except InputError as error:
        print('error', error)
"""


def opened(environment, *addresses, wait=True):
    """What a process reads at addresses, a line each; without `wait` the process, as long as it runs."""
    process = subprocess.Popen([sys.executable, '-c', OPEN, *addresses], cwd=ROOT, env=environment, text=True,
                               stdout=subprocess.PIPE)
    if not wait:
        return process
    lines = process.communicate()[0].splitlines()
    assert process.returncode == 0
    return [line for line in lines if not line.startswith('fetching ')]


# ---------------------------------------------------------------- addresses

def test_the_parts_of_an_address():
    assert parse('hf://datasets/o/n/a.bin') == Address('dataset', 'o/n', None, 'a.bin')
    assert parse('hf://o/n@v1/b/a.bin') == Address('model', 'o/n', 'v1', 'b/a.bin')
    assert parse('hf://datasets/o/n@refs/convert/parquet/d/0.parquet') == Address(
        'dataset', 'o/n', 'refs/convert/parquet', 'd/0.parquet')
    assert parse('hf://o/n@main/d@e/f') == Address('model', 'o/n', 'main', 'd@e/f')


@pytest.mark.parametrize('address', ['hf://', 'hf://o', 'hf://o/n', 'hf://o/n/', 'hf://datasets/o/n', 'hf://o/n@/f',
                                     'hf://datasets/o/n@v1', 'hf://spaces/o/n/f', 'hf:///n/f', 'hf://o/n//f'])
def test_what_is_no_address(address):
    fails(lambda: local_path(address), f'^{address}: no address of a file: give hf://datasets/OWNER/NAME', 'a slash')


def test_other_paths_stay():
    for path in ('a.bin', Path('a/b'), 'https://x.y/z', 'fsq:8,5', ''):
        assert local_path(path) is path
    assert is_address('hf://o/n/f') and not is_address('hf:/o')


def test_lists_and_counts(monkeypatch):
    monkeypatch.setattr(fileio.hub, '_fetch', lambda address, name: f'/cache/{address.repository}/{address.file}')
    monkeypatch.setattr(fileio.hub, '_fetched', {})
    assert list(map(str, expand_files('hf://o/n/a-{0..1}.bin, hf://o/m/b.bin'))) == [
        '/cache/o/n/a-0.bin', '/cache/o/n/a-1.bin', '/cache/o/m/b.bin']
    assert local_path('hf://o/n/a.safetensors#codes+labels') == '/cache/o/n/a.safetensors#codes+labels'


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """A folder whose files are those of every repository, and of every host of the web."""
    monkeypatch.setattr(fileio.hub, '_fetch', lambda address, name: str(tmp_path / address.file))
    monkeypatch.setattr(fileio.hub, '_fetched', {})
    monkeypatch.setattr(torch.hub, 'download_url_to_file',
                        lambda url, path, **_: shutil.copy(tmp_path / Path(url).name, path))
    return tmp_path


@pytest.mark.parametrize('start', ['hf://o/n/', 'https://x.y/'])
def test_tokenizers_with_a_digest(fetched, start):
    state = {'mean': torch.zeros(12), 'basis': torch.eye(12)[:, :4].contiguous(), 'scale': torch.tensor(2.)}
    torch.save(state, fetched / 'a.pt')
    safetensors.torch.save_file(state, fetched / 'a.safetensors', {'converted_from': 'f' * 64})
    for name in 'a.pt', 'a.safetensors':
        address = f'{start}{name}#sha256={sha256(fetched / name)}'
        for path in address, start + name:
            assert load_tokenizer(path).embed_dim == 4
            assert identity_of_tokenizer(path) == identity_of_tokenizer(fetched / name)
        other = f'{start}{name}#sha256={"0" * 64}'
        for read in load_tokenizer, identity_of_tokenizer:
            fails(lambda: read(other), f'^{other}: what was fetched has SHA-256 {sha256(fetched / name)}')
            fails(lambda: read(f'{start}{name}#sha256=1'), 'after # may stand sha256= and 64 hexadecimal digits')


def test_programs_codebooks_and_lists_with_a_digest(fetched):
    with zipfile.ZipFile(fetched / 'encoder.jit', 'w') as file:
        file.writestr('a/constants.pkl', '')
        file.writestr('a/code/b.py', '')
    address = f'hf://o/n/encoder.jit#sha256={sha256(fetched / "encoder.jit")}'
    fails(lambda: load_tokenizer(address), f'^{address}: is a TorchScript program')
    rows = torch.randn(5, 3)
    (fetched / 'b#1').mkdir()  # which is the name of a folder
    for name in 'a.safetensors', 'b#1/a.safetensors':
        safetensors.torch.save_file({'quantize.embedding.weight': rows}, fetched / name)
    expected = load_codebook(fetched / 'a.safetensors')
    assert torch.equal(load_codebook(f'hf://o/n/a.safetensors#sha256={sha256(fetched / "a.safetensors")}'), expected)
    assert torch.equal(load_codebook(fetched / 'b#1/a.safetensors'), expected)
    (fetched / 'labels.txt').write_text('3\n')
    assert read_labels(f'hf://o/n/labels.txt#sha256={sha256(fetched / "labels.txt")}').tolist() == [3]


# ---------------------------------------------------------------- fetching

@pytest.mark.slow
def test_files_of_the_hub_and_what_is_wrong(hub, tmp_path):
    hub.files[DATA, 'main']['a.txt'] = b'of main'
    hub.files[DATA, 'v1']['a.txt'] = b'of v1'
    hub.files[DATA, 'refs/pr/1']['b/a.txt'] = b'of a pull request'
    hub.files[MODEL, 'main']['a.txt'] = b'of the model'
    cases = {f'hf://{DATA}/a.txt': 'text of main', f'hf://{DATA}@v1/a.txt': 'text of v1',
             f'hf://{DATA}@{"b" * 40}/a.txt#part': 'text of v1',
             f'hf://{DATA}@refs/pr/1/b/a.txt': 'text of a pull request', f'hf://{MODEL}/a.txt': 'text of the model',
             f'hf://{DATA}/no.txt': 'has no file no.txt', f'hf://{DATA}@v1/no.txt': 'has no file no.txt at v1',
             f'hf://{DATA}@v2/a.txt': 'has no revision v2', 'hf://datasets/some/gated/a.txt': 'hf auth login',
             'hf://some/none/a.txt': 'there is no model some/none', 'hf://datasets/some/secret/a': 'no dataset',
             'hf://some/broken/a.txt': 'cannot be fetched', 'hf://-o/n/a.txt': 'no address of a file'}
    lines = opened(hub.environment(tmp_path), *cases)
    assert len(lines) == len(cases)
    for (address, part), line in zip(cases.items(), lines):
        assert part in line, line
        assert line.startswith(('text', f'error {address}: ')), line
    assert 'is gated: accept its terms' in lines[8]
    # what is in the cache needs no network
    environment = hub.environment(tmp_path) | {'HF_ENDPOINT': 'http://127.0.0.1:9'}
    first, other = opened(environment, f'hf://{DATA}/a.txt', f'hf://{DATA}/c.txt')
    assert first == 'text of main'
    assert other.startswith(f'error hf://{DATA}/c.txt: is not in the cache, and cannot be fetched (')


@pytest.mark.slow
def test_two_processes_of_a_node_fetch_once(hub, tmp_path):
    hub.files[DATA, 'main']['large.txt'] = b'x' * (1 << 24)
    processes = [opened(hub.environment(tmp_path), f'hf://{DATA}/large.txt', wait=False) for _ in range(2)]
    for process in processes:
        assert process.communicate()[0].splitlines()[-1] == 'text ' + 'x' * (1 << 24)
    assert hub.got.count('large.txt') == 1


# ---------------------------------------------------------------- token sets and runs

COUNT = """
import sys
from fileio.files import expand_files
from token_files.token_file import decode, open_token_file
file = open_token_file(expand_files(sys.argv[1])[0])
print(file.format, len(file), sum(int(codes.sum()) for _, codes in decode(file)), sorted(file.manifest))
"""


@pytest.mark.slow
def test_companions_of_a_stream_are_fetched(hub, tmp_path):
    """Manifest and model of a compact set, at the commit of its stream: other files are under these names elsewhere."""
    codes = np.random.default_rng(0).integers(0, 30, (20, 16))
    token_file, _ = make_compact_set(tmp_path / 'set', codes, name='a')
    names = [path.name for path in (tmp_path / 'set').iterdir()]
    assert len(names) == 4  # and labels
    hub.files[DATA, 'v1'] |= {f'sets/{name}': (tmp_path / 'set' / name).read_bytes() for name in names}
    hub.files[DATA, 'main'] |= {f'sets/{name}': b'another' for name in names}
    done = subprocess.run([sys.executable, '-c', COUNT, f'hf://{DATA}@v1/sets/{Path(token_file).name}'], cwd=ROOT,
                          env=hub.environment(tmp_path / 'home'), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert f'20 {codes.sum()} ' in done.stdout and 'compact' in done.stdout


def run(environment, program, *words):
    done = subprocess.run([sys.executable, ROOT / program, *map(str, words)], env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures('one_thread')
def test_a_training_from_addresses_alone(hub, tmp_path):
    """Stream, index, labels, synonyms, codebook, and then the checkpoint: as from files, and kept as typed."""
    data = flag_values(make_data(tmp_path / 'data'))
    hub.files[DATA, 'main'] |= {f'tokens/{path.name}': path.read_bytes() for path in (tmp_path / 'data').iterdir()}
    at_hub = {flag: f'hf://{DATA}/tokens/{path.name}' for flag, path in data.items()}
    environment = hub.environment(tmp_path / 'home')
    words = [*SMALL, '--epochs', 1, '--output-dir']
    run(environment, 'main_seit.py', *words_of(at_hub), *words, tmp_path / 'hub')
    run_here(*words_of(data), *words, tmp_path / 'local')
    log, here = (without_times(read_log(tmp_path / name)) for name in ('hub', 'local'))
    assert log == here
    args = json.loads((tmp_path / 'hub' / 'args.json').read_text())
    assert args['train_token_file'] == at_hub['--train-token-file']
    checkpoint = torch.load(tmp_path / 'hub' / 'checkpoint.pth', weights_only=True)
    assert checkpoint['made_with']['codebook']['path'] == at_hub['--codebook-path']
    hub.files[MODEL, 'main']['checkpoint.pth'] = (tmp_path / 'hub' / 'checkpoint.pth').read_bytes()
    run(environment, 'main_seit.py', *words_of(at_hub), *SMALL, '--eval', '--resume', f'hf://{MODEL}/checkpoint.pth',
        '--output', tmp_path / 'eval.json')
    assert json.loads((tmp_path / 'eval.json').read_text())['acc1'] == log[0]['test_acc1']
