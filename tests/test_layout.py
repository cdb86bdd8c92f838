"""Who may import whom, where flags stop, and documents whose commands are whole: CONTRIBUTING.md, on the tree.

Style is ruff's (pyproject.toml): length of lines, annotations, docstrings of modules.
"""
import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each module of the root and each folder may import; what is not named is forbidden.
MODULES = {
    'utils': '',
    'samplers': '',
    'flags': 'utils',
    'fileio': 'utils',
    'models_seit': 'utils',
    'token_augment': 'utils',
    'token_files': 'fileio utils',
    'image_data': 'fileio flags utils',
    'training': 'fileio utils',
    'image_tokenizer': 'token_files image_data training fileio utils',
    'token_dataset': 'token_files fileio token_augment utils',
    'engine': 'training samplers utils',
    'recipe': 'engine training token_augment token_files fileio flags utils',
    'seitpp': 'recipe models_seit token_augment image_tokenizer token_files training fileio flags utils',
    'continual': 'engine token_dataset image_tokenizer image_data token_files training fileio flags utils',
    'inference': 'seitpp models_seit image_tokenizer image_data token_files token_augment training fileio utils',
}
PROGRAMS = ['main_seit', 'main_mtm_pretrain', 'main_mtm_finetune', 'main_pixels', 'main_continual',
            'evaluate_on_images', 'tokenize_images', 'hubconf']
ALONE = ['scripts', 'docs', 'demo']  # each file is a program, and imports none beside it
FREE = ['benchmarks', 'tests']
IMPORTS = {
    **{name: {name, *allowed.split()} for name, allowed in MODULES.items()},
    **{name: set(MODULES) for name in PROGRAMS},
    'main_continual': {*MODULES, 'main_seit', 'main_pixels'},
    **{name: {*MODULES, *PROGRAMS} for name in ALONE},
    'tables': {*MODULES, 'tables'},  # programs and scripts only as commands
}
ARGS = ['recipe.py', 'seitpp/mtm_recipe.py']  # besides programs
ARGPARSE = ['parse_args', 'parse_known_args']  # have such a parameter in argparse, too
ELLIPSIS = '\N{HORIZONTAL ELLIPSIS}'


def names_of_the_project():
    """Names of the files that git tracks or would add; without git, of all files that are not hidden."""
    try:
        done = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True,
                              text=True)
        names = done.stdout.splitlines() if done.returncode == 0 else []
    except OSError:
        names = []
    names = names or [path.relative_to(ROOT).as_posix() for path in ROOT.rglob('*') if not any(
        part.startswith('.') or part == 'output' for part in path.relative_to(ROOT).parts)]
    return sorted(name for name in names if (ROOT / name).is_file())


NAMES = names_of_the_project()
TREES = {name: ast.parse((ROOT / name).read_text(encoding='utf-8')) for name in NAMES if name.endswith('.py')}
OURS = {name: tree for name, tree in TREES.items() if not name.startswith('tests/')}


# ---------------------------------------------------------------- imports

def imported_names(tree):
    """Dotted names of what a module imports anywhere, also within functions; `from a import b` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f'{"." * node.level}{node.module or ""}.{alias.name}' for alias in node.names)


def file_of(dotted, trees):
    """The file of the project that an import reads, None for an installed package's."""
    parts = dotted.split('.')
    for count in range(len(parts), 0, -1):
        start = '/'.join(parts[:count])
        for name in (f'{start}.py', f'{start}/__init__.py'):
            if name in trees:
                return name
    return None


def imports(trees):
    """{file: files that it imports}."""
    return {name: {file_of(dotted, trees) for dotted in imported_names(tree)} - {None}
            for name, tree in trees.items()}


def subject(name):
    """What the table calls a file: a module of the root, or a folder."""
    return name.partition('/')[0].removesuffix('.py')


def forbidden_imports(trees):
    found = []
    for name, targets in imports(trees).items():
        if subject(name) in FREE:
            continue
        if subject(name) not in IMPORTS:
            found.append(f'{name} stands in no line of the table')
        found += [f'{name} imports {target}' for target in sorted(targets)
                  if subject(target) not in IMPORTS.get(subject(name), ())]
        found += [f'{name} imports {dotted}: write the whole name' for dotted in imported_names(trees[name])
                  if dotted.startswith('.')]
    return found


def circles(trees):
    """Each circle of imports once, as 'a.py -> b.py -> a.py'."""
    graph, found, finished = imports(trees), [], set()

    def visit(name, path):
        if name in path:
            found.append(' -> '.join([*path[path.index(name):], name]))
        elif name not in finished:
            for target in sorted(graph[name]):
                visit(target, [*path, name])
            finished.add(name)
    for name in sorted(graph):
        visit(name, [])
    return found


def test_imports_keep_their_direction():
    assert list(forbidden_imports(TREES)) == []


def test_no_imports_go_in_a_circle():
    assert circles(OURS) == []


@pytest.mark.parametrize('sources, forbidden, circle', [
    ({'utils.py': 'import json', 'flags.py': 'from utils import rank'}, [], []),
    ({'utils.py': 'def f():\n    import flags', 'flags.py': ''}, ['utils.py imports flags.py'], []),
    ({'fileio/files.py': 'from training import checkpoints', 'training/checkpoints.py': '', 'training/__init__.py': ''},
     ['fileio/files.py imports training/checkpoints.py'], []),
    ({'main_seit.py': '', 'main_pixels.py': 'import main_seit'}, ['main_pixels.py imports main_seit.py'], []),
    ({'main_seit.py': '', 'main_continual.py': 'import main_seit'}, [], []),
    ({'scripts/a.py': 'from scripts.b import run', 'scripts/b.py': ''}, ['scripts/a.py imports scripts/b.py'], []),
    ({'scripts/a.py': 'import main_seit', 'main_seit.py': ''}, [], []),
    ({'tables/a.py': 'import main_seit\nimport tables.b', 'tables/b.py': '', 'main_seit.py': ''},
     ['tables/a.py imports main_seit.py'], []),
    ({'seitpp/a.py': 'import tests.helpers', 'tests/helpers.py': 'import seitpp.b', 'seitpp/b.py': ''},
     ['seitpp/a.py imports tests/helpers.py'], []),
    ({'helpers.py': ''}, ['helpers.py stands in no line of the table'], []),
    ({'fileio/a.py': 'from . import b', 'fileio/b.py': ''}, ['fileio/a.py imports ..b: write the whole name'], []),
    ({'fileio/a.py': 'from fileio.b import x', 'fileio/b.py': 'def f():\n    from fileio import c',
      'fileio/c.py': 'import fileio.a'}, [], ['fileio/a.py -> fileio/b.py -> fileio/c.py -> fileio/a.py']),
])
def test_what_is_forbidden_is_noticed(sources, forbidden, circle):
    trees = {name: ast.parse(text) for name, text in sources.items()}
    assert forbidden_imports(trees) == forbidden
    assert circles(trees) == circle


def test_packages_hold_a_docstring_alone():
    packages = {name: tree for name, tree in TREES.items() if name.endswith('__init__.py')}
    assert packages
    assert [name for name, tree in packages.items() if len(tree.body) != 1 or not ast.get_docstring(tree)] == []


def test_tests_hide_no_package():
    """With an __init__.py, tests/fileio would be a package that could stand for fileio."""
    assert [name for name in NAMES if name.startswith('tests/') and name.endswith('__init__.py')] == []


# ---------------------------------------------------------------- flags

def is_program(name):
    """Whether a module ends in a call under `if __name__ == '__main__'`."""
    return any(isinstance(node, ast.If) and '__name__' in ast.unparse(node.test) for node in TREES[name].body)


def test_flags_stop_at_the_entries():
    """No library module has a parameter `args`; those which make things of flags, and *args, are free."""
    taking = []
    for name, tree in OURS.items():
        if is_program(name) or name in ARGS:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                function = getattr(node, 'name', 'lambda')
                if any(parameter.arg == 'args' for parameter in parameters) and function not in ARGPARSE:
                    taking.append(f'{name}: {function} takes args')
    assert taking == []


def test_flags_are_never_changed():
    """Nothing assigns to an attribute of `args`, in any program."""
    changed = []
    for name, tree in OURS.items():
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
                changed += [f'{name}:{node.lineno}' for target in targets
                            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == 'args']
            if isinstance(node, ast.Call) and ast.unparse(node).startswith('setattr(args,'):
                changed.append(f'{name}:{node.lineno}')
    assert changed == []


# ---------------------------------------------------------------- documents

@pytest.mark.parametrize('name', [name for name in NAMES if name.endswith(('.md', '.cff'))])
def test_commands_are_whole(name):
    """No code block or inline code in a document holds an ellipsis: it could not be run."""
    text = (ROOT / name).read_text(encoding='utf-8')
    code = re.findall(r'```[\s\S]*?```|`[^`\n]+`|^    .*$', text, re.MULTILINE)
    assert [part for part in code if ELLIPSIS in part or re.search(r'(?<![\w.])\.\.\.(?!\w)', part)] == []
