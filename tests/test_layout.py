"""What CONTRIBUTING.md says of the layout and the style, measured on the tree."""
import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAINING = ('main_seit.py', 'recipe.py', 'engine.py', 'training/checkpoints.py', 'samplers.py', 'token_dataset.py',
            'token_augment.py', 'models_seit.py')
FLAG_LIST = re.compile(r'add_\w*flags|get_args_parser|make_parser|parse_args')  # functions that list flags
# Words that came back once too often, and what to write instead; as parts of words, in any case.
WORDS = {
    r'\b\w*tokenis\w*': 'tokenize', r'\b\w*normalis\w*': 'normalize', r'\b\w*quantis\w*': 'quantize',
    r'\b\w*optimis\w*': 'optimize', r'\b\w*initialis\w*': 'initialize', r'\bcolour\w*': 'color',
    r'\bcentre\w*': 'center', r'\bneighbour\w*': 'neighbor', r'\bbehaviour\w*': 'behavior', r'\blicence\w*': 'license',
    r'\bgrey\w*': 'gray', r'\banew\b': 'from scratch', r'\bcards?\b': 'manifest', r'\bcard_path\b': 'manifest_path',
    r'\bone_ahead\b': 'prefetch', r'\breading_gzip\b': 'open_gzip', r'(?<![\w.])say\(': 'print0(',
}
ELLIPSIS = '\N{HORIZONTAL ELLIPSIS}'


def files_of_the_project():
    """Paths of what git tracks or would add; without git, of all files that are not hidden."""
    try:
        done = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True,
                              text=True)
        names = done.stdout.splitlines() if done.returncode == 0 else []
    except OSError:
        names = []
    paths = [ROOT / name for name in names] or [path for path in ROOT.rglob('*') if not any(
        part.startswith('.') or part == 'output' for part in path.relative_to(ROOT).parts)]
    return sorted(path for path in paths if path.is_file())


FILES = files_of_the_project()
MODULES = [path for path in FILES if path.suffix == '.py' and path.relative_to(ROOT).parts[0] != 'tests']
TEXTS = [path for path in FILES if path.suffix in ('.md', '.cff')]
TREES = {path: ast.parse(path.read_text(encoding='utf-8')) for path in MODULES}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def lines(path):
    return len(path.read_text(encoding='utf-8').splitlines())


def functions(tree, prefix='', nested=False):
    """(qualified name, node, whether it can be called from outside) of each function, nested ones too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f'{prefix}{node.name}.', nested)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f'{prefix}{node.name}'
            hidden = any(re.match('_(?!_)', part) for part in name.split('.'))
            yield name, node, not (nested or hidden)
            yield from functions(node, f'{name}.', True)
        else:
            yield from functions(node, prefix, nested)


def parameters(node):
    """The parameters of a function without self and cls, *args and **kwargs among them."""
    rest = [value for value in (node.args.vararg, node.args.kwarg) if value]
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, *rest]
    return [value for index, value in enumerate(every) if not (index == 0 and value.arg in ('self', 'cls'))]


def length(node):
    """Lines of a function, from its first decorator or `def` to its end."""
    return node.end_lineno - min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) + 1


def every_function():
    for path, tree in TREES.items():
        for name, node, public in functions(tree):
            yield path, name, node, public


def is_entry(path):
    """Whether a module is a program: it ends in a call under `if __name__ == '__main__'`."""
    return any(isinstance(node, ast.If) and '__name__' in ast.unparse(node.test) for node in TREES[path].body)


# ---------------------------------------------------------------- sizes

def test_training_is_understood_in_1700_lines():
    counts = {name: lines(ROOT / name) for name in TRAINING}
    assert sum(counts.values()) <= 1700, counts


def test_the_training_program_is_short():
    assert lines(ROOT / 'main_seit.py') <= 260
    main = {name: node for name, node, _ in functions(TREES[ROOT / 'main_seit.py'])}['main']
    assert length(main) <= 100


def test_no_module_is_long():
    assert {name_of(path): lines(path) for path in MODULES if lines(path) > 400} == {}


def test_no_function_is_long():
    long = {f'{name_of(path)}: {name}': length(node) for path, name, node, _ in every_function()
            if length(node) > 80 and not FLAG_LIST.fullmatch(name)}
    long.pop('main_seit.py: main', None)  # it has a bound of its own, above
    assert long == {}


def test_no_function_has_many_parameters():
    many = {f'{name_of(path)}: {name}': len(parameters(node)) for path, name, node, _ in every_function()
            if len(parameters(node)) > 8}
    assert many == {}


# ---------------------------------------------------------------- interfaces

def test_flags_stop_at_the_entries():
    """No library module has a parameter `args`; recipe.py, which makes things of flags, and *args are free."""
    taking = [f'{name_of(path)}: {name}' for path, name, node, _ in every_function()
              if not is_entry(path) and path.name != 'recipe.py'
              and any(value.arg == 'args' and value is not node.args.vararg for value in parameters(node))
              and name.rpartition('.')[2] not in ('parse_args', 'parse_known_args')]  # argparse's own names
    assert taking == []


def test_flags_are_never_changed():
    """Nothing assigns to an attribute of `args`, in any program."""
    changed = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
                changed += [f'{name_of(path)}:{node.lineno}' for target in targets
                            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == 'args']
            if isinstance(node, ast.Call) and ast.unparse(node).startswith('setattr(args,'):
                changed.append(f'{name_of(path)}:{node.lineno}')
    assert changed == []


def test_public_functions_are_annotated():
    bare = []
    for path, name, node, public in every_function():
        missing = [value.arg for value in parameters(node) if value.annotation is None]
        if node.returns is None and node.name != '__init__':
            missing.append('return')
        if public and missing:
            bare.append(f'{name_of(path)}: {name} ({", ".join(missing)})')
    assert bare == []


def test_the_path_is_touched_once_in_scripts_and_never_at_the_root():
    statements = {name_of(path): sum('sys.path' in ast.unparse(node) for node in tree.body if isinstance(
        node, ast.Expr | ast.Assign | ast.AugAssign)) for path, tree in TREES.items()}
    assert [name for name, count in statements.items() if count > (1 if '/' in name else 0)] == []


# ---------------------------------------------------------------- words

def test_plain_words():
    """American spelling, and one word for one thing. CONTRIBUTING.md and this file, which list the others, are free."""
    spared = {ROOT / 'CONTRIBUTING.md', Path(__file__).resolve()}
    found = []
    for path in FILES:
        if path.suffix not in ('.py', '.md', '.sh', '.sbatch', '.toml', '.txt', '.cff') or path in spared:
            continue
        for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
            found += [f'{name_of(path)}:{number}: {match.group()} (write {better})' for word, better in WORDS.items()
                      for match in re.finditer(word, line, re.IGNORECASE)]
    assert found == []


@pytest.mark.parametrize('path', TEXTS, ids=name_of)
def test_commands_are_whole(path):
    """No code block or inline code in a document holds an ellipsis: it could not be run."""
    text = path.read_text(encoding='utf-8')
    code = re.findall(r'```[\s\S]*?```|`[^`\n]+`|^    .*$', text, re.MULTILINE)
    assert [part for part in code if ELLIPSIS in part or re.search(r'(?<![\w.])\.\.\.(?!\w)', part)] == []


def test_no_line_is_long():
    long = [f'{name_of(path)}:{number}' for path in FILES if path.suffix in ('.py', '.sh', '.sbatch')
            for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1) if len(line) > 120]
    assert long == []
