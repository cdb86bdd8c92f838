"""Every program starts from any folder, beside packages of our names, with PYTHONSAFEPATH, -OO and any output."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import clean_environment, two_processes

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ('', 'scripts', 'tables', 'benchmarks', 'demo', 'docs')
PROGRAMS = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).glob('*.py')
                  if "if __name__ == '__main__':" in path.read_text(encoding='utf-8'))
# A process that has imported torch and timm, but no module of ours, forks a child for each program: starts at once.
# {program: [exit code, output]} goes to standard output.
SERVER = """
import json, os, runpy, sys, tempfile
import timm, torch, torchvision

def child(program, output):
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [program, *([] if program.endswith('start_probe.py') else ['--help'])]
    try:
        runpy.run_path(program, run_name='__main__')
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

root, *programs = sys.argv[1:]
results = {}
for name in programs:
    with tempfile.TemporaryFile('w+') as output:
        pid = os.fork()
        if not pid:
            child(os.path.join(root, name), output.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        results[name] = code, output.read()
print(json.dumps(results))
"""


def packages_of_our_names(folder):
    """A folder of installed packages that cannot be imported, one for each module and folder of ours."""
    modules = [path.stem for path in ROOT.glob('*.py')]
    packages = {path.parent.name for path in ROOT.glob('*/*.py')}
    for name in {*modules, *packages}:
        (folder / name).mkdir(parents=True)
        (folder / name / '__init__.py').write_text(f'raise RuntimeError("another {name} was imported")\n')
    return folder


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    return packages_of_our_names(tmp_path_factory.mktemp('site'))


# Options and environment of Python: as ever, and all at once that is unusual.
WAYS = {'plain': ([], {}), 'without docstrings, into ASCII, from a notebook': (
    ['-OO'], {'PYTHONIOENCODING': 'ascii', 'MPLBACKEND': 'module://not_installed.backend_inline', 'LC_ALL': 'C'})}


@pytest.fixture(scope='module', params=WAYS)
def started(request, hostile, tmp_path_factory):
    """{program: (exit code, output)} of all programs with --help, from another folder, as with PYTHONSAFEPATH=1."""
    options, variables = WAYS[request.param]
    command = [sys.executable, *options, '-P', '-c', SERVER, ROOT, *PROGRAMS]
    done = subprocess.run(command, cwd=tmp_path_factory.mktemp('elsewhere'), capture_output=True, text=True,
                          env=clean_environment(PYTHONPATH=str(hostile), **variables), timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize('program', PROGRAMS)
def test_every_program_starts(program, started):
    code, output = started[program]
    if program == 'benchmarks/start_probe.py':  # it has no --help: benchmarks/start.py gives it a time
        assert 'Traceback' not in output and 'another' not in output and 'ValueError' in output, output
    else:
        assert code == 0 and 'usage: ' in output, output


@pytest.mark.slow
@pytest.mark.parametrize('launch, options, safe', [((), ['-OO'], '1'), (two_processes, [], '')],
                         ids=['python', 'torchrun'])
def test_a_training_starts_from_another_folder(launch, options, safe, hostile, tmp_path):
    """As Python and torchrun really do it; a relative path too, and without docstrings."""
    launch = launch() if launch else ()
    program = os.path.relpath(ROOT / 'main_seit.py', tmp_path)
    command = [sys.executable, *options, *launch, program, '--help']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=clean_environment(PYTHONPATH=str(hostile), PYTHONSAFEPATH=safe), timeout=300)
    assert done.returncode == 0 and '--train-token-file' in done.stdout, done.stderr


def test_the_programs_are_found():
    assert {'main_seit.py', 'tokenize_images.py', 'scripts/probe.py', 'demo/make_demo.py', 'docs/draw_pipeline.py',
            'benchmarks/train.py'} <= set(PROGRAMS) and len([name for name in PROGRAMS if '/' not in name]) == 7
