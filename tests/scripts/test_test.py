"""scripts/test.sh: what it gives to ruff and pytest."""
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.slow


@pytest.mark.parametrize('words, given', [
    ([], []), (['--quick'], ['-m', 'not slow']), (['-k', 'a or b'], ['-k', 'a or b']),
    (['--quick', '-k', 'a or b', '-x'], ['-m', 'not slow', '-k', 'a or b', '-x'])])
def test_words_reach_pytest(words, given, tmp_path):
    """Run by a python that writes its words down."""
    scripts = tmp_path / 'scripts'
    scripts.mkdir()
    shutil.copy(ROOT / 'scripts' / 'test.sh', scripts)
    (scripts / 'venv.sh').write_text(f'PATH={tmp_path}:$PATH\n')
    (tmp_path / 'python').write_text('#!/bin/sh\nprintf \'%s\\n\' "$@" >> words\n')
    (tmp_path / 'python').chmod(0o755)
    subprocess.run(['bash', scripts / 'test.sh', *words], check=True)
    written = (tmp_path / 'words').read_text().splitlines()
    assert written == ['-m', 'ruff', 'check', '.', '-m', 'pytest', 'tests', '-n', '2', '--dist', 'loadfile', *given]
