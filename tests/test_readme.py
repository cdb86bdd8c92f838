"""README and docs: their commands parse with the real parsers, their flags and files exist, and one block is run."""
import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md')),
             ROOT / 'demo' / 'README.md', ROOT / 'tables' / 'README.md']
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8') for path in DOCUMENTS}
README = TEXTS['README.md']
# Flags of torchrun, torch.distributed.launch, sbatch, pytest and scripts/test.sh, which are no flags of our programs.
OTHERS = {'--nproc-per-node', '--use-env', '--nnodes', '--rdzv-backend', '--rdzv-endpoint', '--max-restarts', '--help',
          '--quick'}


# ---------------------------------------------------------------- reading documents

def blocks(text):
    """Code blocks, fenced or indented, with continued lines joined; without those of Python."""
    fenced = [code for language, code in fenced_blocks(text) if not language]
    rest = re.sub(r'^```(.*?)^```', '', text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r'(?<=\n\n)((?:    .*\n)+)', rest)
    return [block.replace('\\\n', ' ') for block in fenced + indented]


def fenced_blocks(text):
    """(language or '', code) of each fenced block."""
    return re.findall(r'^```(\w*)\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def inline_code(text):
    """What stands between single backticks outside of blocks."""
    return re.findall(r'`([^`\n]+)`', re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE))


def words_of(line):
    """The simple commands of a shell line, as lists of words, without what is redirected."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    command = []
    for word in [*lexer, ';']:
        if word and set(word) <= set(';&|()'):
            yield command
            command = []
        else:
            command.append(word)


def program_calls(text):
    """(program, its words) of each call of one of our programs in a document."""
    for line in [line for block in blocks(text) for line in block.splitlines()] + inline_code(text):
        if '.py' not in line and '.sbatch' not in line:
            continue
        for words in words_of(line):
            at = next((i for i, word in enumerate(words) if re.fullmatch(r'[\w/]+\.(py|sbatch)', word)), None)
            if at is None:
                continue
            named = [word.partition('=')[2] for word in words[:at] if word.startswith('PROGRAM=')]
            words = [*words[at:at + 1], *named, *words[at + 1:]]
            if '>' in words:
                words = words[:words.index('>')]
            if len(words) > 1 or at > 0:  # a bare name is no call
                yield words[0], words[1:]


CALLS = [(name, program, words) for name, text in TEXTS.items() for program, words in program_calls(text)]


def section(text, heading):
    """The text under a heading, up to the next of its level."""
    level = heading.split()[0]
    return re.search(rf'^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)', text, re.DOTALL | re.MULTILINE)[1]


# ---------------------------------------------------------------- programs

def load(program):
    """A program as a module, by its path."""
    name = program.removesuffix('.py').replace('/', '_')
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / program)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


class Captured(Exception):
    """Carries a parser."""


def parser_of(program):
    """The argparse parser that a program's parse_args uses."""
    def capture(self, *_, **__):
        raise Captured(self)
    with pytest.MonkeyPatch.context() as patch:
        module = load(program)
        for kind in {argparse.ArgumentParser, *argparse.ArgumentParser.__subclasses__()}:
            patch.setattr(kind, 'parse_known_args', capture)
        with pytest.raises(Captured) as caught:
            module.parse_args([])
    return caught.value.args[0]


def options(parser):
    """The actions of a parser that are flags, without --help."""
    return [action for action in parser._actions if action.option_strings and action.dest != 'help']


PROGRAMS = sorted({program for _, program, _ in CALLS if program.endswith('.py')})


@pytest.mark.parametrize(('document', 'program', 'words'), CALLS,
                         ids=[f'{i}-{name}-{program}' for i, (name, program, _) in enumerate(CALLS)])
def test_command_parses(document, program, words):
    assert (ROOT / program).exists(), f'{document}: {program}'
    if program.endswith('.sbatch'):  # the flags of a program follow, main_seit.py's unless one is named
        named = words[:1] if words[0].endswith('.py') else []
        program, words = (named or ['main_seit.py'])[0], words[len(named):]
    load(program).parse_args(words)  # of run_with_submitit.py this parses the flags behind -- too


def test_the_documents_hold_commands():
    """The reading above finds what is there: else the test before this one would pass on nothing."""
    assert len(CALLS) > 35
    assert {'main_seit.py', 'evaluate_on_images.py', 'tokenize_images.py', 'scripts/slurm_train.sbatch',
            'scripts/run_with_submitit.py', 'benchmarks/data.py', 'tests/stress/fuzz.py'} <= {call[1] for call in CALLS}
    assert ('README.md', 'main_seit.py') in {call[:2] for call in CALLS}


def test_every_flag_in_the_documents_exists():
    known = set(OTHERS)
    for program in PROGRAMS:
        known |= {flag for action in options(parser_of(program)) for flag in action.option_strings}
    for name, text in TEXTS.items():
        code = ' '.join([*blocks(text), *inline_code(text)])
        used = {flag.replace('_', '-') for flag in re.findall(r'(?<![\w-])--[a-z][a-z0-9_-]*', code)}
        assert used - known == set(), name


def test_every_file_in_the_documents_exists():
    for name, text in TEXTS.items():
        folder = (ROOT / name).parent
        for link in re.findall(r'\]\((?!https?:)([^)#]+)\)', text):
            assert (folder / link).exists(), f'{name}: {link}'
        for path in re.findall(r'(?<![\w./])(?:scripts|docs|demo|tests|benchmarks|tables)/[\w./-]+\w(?![\w<])', text):
            assert (ROOT / path).exists(), f'{name}: {path}'
        for path in re.findall(r'`(\w+\.py)`', text):
            assert list(ROOT.glob(path)) + list(ROOT.glob(f'*/{path}')) + list(ROOT.glob(f'tests/*/{path}')), path


# ---------------------------------------------------------------- docs/flags.md

# Of these only what differs from others is listed.
BASES = {'main_pixels.py': ['main_seit.py'], 'main_mtm_pretrain.py': ['main_seit.py'],
         'main_mtm_finetune.py': ['main_seit.py', 'main_mtm_pretrain.py']}


@pytest.mark.parametrize('program', ['main_seit.py', *BASES, 'evaluate_on_images.py', 'tokenize_images.py'])
def test_flags_and_defaults_are_those_of_the_parser(program):
    rows = {}
    for line in section(TEXTS['docs/flags.md'], f'## {program}').splitlines():
        if line.startswith('| `--'):
            flags, default, _ = (cell.strip() for cell in line.strip('|').split(' | ', 2))
            rows[tuple(re.findall(r'`([^`]+)`', flags))] = default.strip('`')
    flags = options(parser_of(program))
    def facts(action):
        return *action.option_strings, action.help, str(action.default)
    same = {facts(action) for base in BASES.get(program, ()) for action in options(parser_of(base))}
    flags = [action for action in flags if facts(action) not in same]
    assert set(rows) == {tuple(action.option_strings) for action in flags}
    for action in flags:
        stated = rows[tuple(action.option_strings)]
        if action.required:
            assert stated == 'required', action.dest
        elif isinstance(action, argparse.BooleanOptionalAction):
            assert stated == {True: 'on', False: 'off'}[action.default], action.dest
        elif stated == 'the cores':
            assert action.default in (None, len(os.sched_getaffinity(0))), action.dest
        elif action.default is False or action.default in (None, '', {}):
            assert stated == '', action.dest
        elif isinstance(action.default, int | float):
            assert float(stated or 'nan') == action.default, action.dest
        elif isinstance(action.default, list):
            assert stated.split() == action.default, action.dest
        else:
            assert stated == str(action.default), action.dest


# ---------------------------------------------------------------- the README

def test_the_first_screen():
    """One sentence, the figure, the table with the published numbers, the clone line and the quick start."""
    first = README[:README.index('## How it works')]
    assert re.match(r'# SeiT[^\n]*\n\n[^\n]+\.\n\n!\[[^\]]+\]\(docs/pipeline\.png\)\n\n\| ViT-B', first)
    for row in ('| full pixels | 140 GB | 81.8 | paper |', '| **SeiT tokens** | **1.4 GB** | **74.0** | paper |'):
        assert row in re.sub(' +', ' ', first)
    for command in ('git clone', 'bash scripts/quickstart.sh', 'bash scripts/test.sh'):
        assert command in first
    with Image.open(ROOT / 'docs' / 'pipeline.png') as figure:
        assert figure.width == 1200


def test_the_quick_start_prints_the_line_that_the_readme_shows():
    line = section(README, '## Quick start').split('```\n')[3]
    assert re.fullmatch(r'top-1        \d\d\.\d\d %\n', line)
    assert "print(f'top-1        {best:.2f} %')" in (ROOT / 'scripts' / 'quickstart.sh').read_text()


def test_every_program_and_module_has_its_place():
    where = section(README, '## What is where')
    assert [path.name for path in sorted(ROOT.glob('*.py')) if f'`{path.name}`' not in where] == []


# Blocks that cannot run here: what they hold -> why. All others run, as they stand and in their order.
NOT_RUN = {
    '--preset photos': 'needs 12,000 photographs, and trains for hours',
    'git clone': 'needs a network, and trains for minutes: scripts/quickstart.sh',
    'imagenet1k-': "needs ImageNet's tokens, which are not here",
    'weights/': 'needs the published weights, which are not here',
    'torchrun --nproc_per_node=8': 'needs eight GPUs and ImageNet',
    'hf://': 'needs a network, and days',
}


def why_not_run(block):
    """Why a block cannot run here, or None."""
    return next((why for text, why in NOT_RUN.items() if text in block), None)


def commands_of(text):
    """(language, block) of each block of a document that holds commands."""
    command = re.compile(r'^(OMP_NUM_THREADS=\d+ )?(python|bash|torchrun|git) ', re.MULTILINE)
    return [(language, code) for language, code in fenced_blocks(text) if language == 'python' or command.search(code)]


def test_blocks_that_cannot_run_are_listed_with_the_reason():
    left_out = [code for _, code in commands_of(README) if why_not_run(code)]
    assert all(any(text in code for code in left_out) for text in NOT_RUN), 'a reason without a block'
    assert len(left_out) == 9
    assert len(commands_of(README)) - len(left_out) == 9
    assert all(why_not_run(code) is None for _, code in commands_of(section(README, '## Your own images')))


@pytest.mark.slow
def test_blocks_that_need_only_the_demo_run_as_they_stand(tmp_path):
    """In a folder that holds links to the project, by a shell that stops at a failure."""
    folders = [path.parent for path in ROOT.glob('*/__init__.py')]
    for path in [*ROOT.glob('*.py'), *folders, ROOT / 'demo', ROOT / 'docs']:
        (tmp_path / path.name).symlink_to(path)
    environment = os.environ | {'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}

    def outputs_of(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    # what the quick start leaves, after one epoch instead of twelve
    quick = re.search(r'^data=.*?^python main_seit.py[^\n]*', (ROOT / 'scripts' / 'quickstart.sh').read_text(),
                      re.MULTILINE | re.DOTALL)[0]
    outputs_of('bash', '-euo', 'pipefail', '-c', f'demo=demo output=output/quickstart\nmkdir -p $output\n{quick} '
               '--epochs 1 --warmup-epochs 0')
    blocks = [(language, code) for language, code in commands_of(README) if not why_not_run(code)]
    printed = outputs_of('bash', '-euo', 'pipefail', '-c',
                         '\n'.join(code for language, code in blocks if language != 'python'))
    assert len(re.findall(r'^\* Acc@1 \d', printed, re.MULTILINE)) > 20
    # a class has a name
    assert re.search(r'^demo/images/val/7-sneaker/\d+.png +\d-\w+ +[\d.]+ %', printed, re.MULTILINE)
    for path in ('output/mine/sheet.png', 'output/mine/classifier.pt2', 'output/masked/sheet.png'):
        assert (tmp_path / path).exists()
    for code in (code for language, code in blocks if language == 'python'):
        outputs_of(sys.executable, '-c', code)
