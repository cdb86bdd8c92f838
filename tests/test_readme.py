"""The README's commands, as they stand there but for sizes that make them quick."""
import os
import re
import shlex
import subprocess
import sys

import numpy as np
from PIL import Image

from conftest import ROOT

README = (ROOT / 'README.md').read_text()


def commands(heading):
    """The shell commands of the first code block under a heading."""
    block = re.search(rf'## {heading}\n.*?```\n(.*?)```', README, re.S).group(1)
    return [shlex.split(line, comments=True) for line in block.replace('\\\n', ' ').splitlines() if line.strip()]


def test_own_images_in_five_commands(tmp_path):
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for k, name in enumerate(('cats', 'dogs')):
            (tmp_path / 'images' / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 100, (40, 50, 3), dtype=np.uint8) + np.uint8(100 * k)
                Image.fromarray(pixels).save(tmp_path / 'images' / split / name / f'{i}.jpg')
    small = {'fit_patch_tokenizer.py': ['--max-patches', '3000', '--iterations', '2'],
             'main_seit.py': ['--device', 'cpu', '--epochs', '1', '--batch-size', '4', '--model-kwargs', 'depth=1'],
             'evaluate_on_images.py': ['--device', 'cpu', '--num_workers', '0', '--model-kwargs', 'depth=1']}
    steps = commands('Your own images')
    assert len(steps) == 5
    steps.insert(2, ['val' if w == 'images/train' else w for w in steps[1]])  # "and again for images/val, my-val"
    steps[2] = [{'val': 'images/val', 'my-train': 'my-val'}.get(w, w) for w in steps[2]]
    for python, script, *words in steps:
        assert python == 'python'
        words += small.get(os.path.basename(script), [])
        command = [sys.executable, str(ROOT / script), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert '* Acc@1 ' in done.stdout


def test_every_flag_and_file_in_the_readme_exists():
    import evaluate_on_images
    import main_seit
    known = {flag for parser in (main_seit.get_args_parser(), evaluate_on_images.get_args_parser())
             for flag in parser._option_string_actions}
    for script in (ROOT / 'scripts').glob('*.py'):
        known |= set(re.findall(r"add(?:_argument)?\('(--[a-z0-9-]+)'", script.read_text()))
    launcher = {'--nproc-per-node', '--use-env', '--nnodes', '--rdzv-backend', '--rdzv-endpoint', '--help',
                '--max-restarts'}
    used = {flag.replace('_', '-') for flag in re.findall(r'(?<![\w-])--[a-z][a-z_0-9-]*', README)}
    assert not used - known - launcher
    for path in re.findall(r'\b(?:scripts|docs|demo)/[\w./]+\w', README):
        assert (ROOT / path).exists(), path
