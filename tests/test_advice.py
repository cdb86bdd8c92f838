"""Every flag that a message names is one of the program that prints it, or the message says of which program it is.

The messages are found in the source: the texts in all functions that a program can reach, by the names that they use.
"""
import ast
import importlib
import re
from pathlib import Path

import pytest

from continual.task_flags import NOT_HERE
from flags import ELSEWHERE, Parser, advice

ROOT = Path(__file__).resolve().parent.parent
TREES = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): ast.parse(path.read_text(encoding='utf-8'))
         for folder in ROOT.iterdir() if folder.name not in ('.venv', 'tests', 'benchmarks', 'docs', 'demo')
         for path in ([folder] if folder.suffix == '.py' else folder.glob('*.py'))}
PROGRAMS = sorted(name for name, tree in TREES.items()
                  if {'main', 'parse_args'} <= {getattr(node, 'name', '') for node in tree.body})
# a flag, but not one of a program that is named before or behind it, nor one of docker's
FLAG = re.compile(r'(?<!\.py )(?<![\w-])(--[a-z][a-z0-9-]*)(?![a-z0-9-])(?! of \w+\.py)')
# (module, function, flag): why a program without the flag does not print it
NEVER_PRINTED = {
    ('engine', 'evaluate_checkpoint', '--model-ema'): 'checkpoints of main_mtm_finetune.py hold no average',
    ('fileio.labels', 'count_classes', '--nb-classes'): 'programs without it give other advice',
    ('image_data.corruptions', 'make_corruption', '--corruption'): 'main_continual.py refuses it before',
    ('image_data.corruptions', 'make_corruption', '--severity'): 'main_continual.py refuses it before',
    ('image_data.sources', 'OrientedImages', '--exif-rotate'): 'programs of tables/ list images, and decode none',
    ('image_data.sources', 'load_images', '--skip-bad-images'): 'skip_bad is None there',
    ('image_data.sources', 'next_batch', '--num-workers'): 'they decode in their own process',
    ('image_data.workers', 'plan_workers', '--shm-size'): "it is docker's",
    ('image_tokenizer.pickled', 'load_running_code', '--tokenizer-code-path'): 'no code is run without it',
    ('image_tokenizer.tokenizing', 'check_skipped', '--skip-bad-images'): 'skip_bad is None there',
    ('main_pixels', 'parse_args', '--eval'): 'main_continual.py refuses before what belongs to it',
    ('models_seit', 'create_backbone', '--stem'): 'a checkpoint has a stem that its model can have',
    ('models_seit', 'create_model', '--drop-path'): 'only training drops paths',
    ('models_seit', 'create_model', '--stem'): 'a checkpoint has a stem that its model can have',
    ('recipe', 'check_flags', '--bce-loss'): 'main_mtm_finetune.py sets it to False',
    ('recipe', 'check_flags', '--eval'): 'main_continual.py refuses it before',
    ('recipe', 'check_flags', '--eval-freq'): 'main_continual.py refuses it before',
    ('recipe', 'check_flags', '--no-eval'): 'main_continual.py refuses it before',
    ('recipe', 'check_flags', '--output'): 'main_continual.py refuses it before',
    ('recipe', 'check_flags', '--report'): 'main_continual.py refuses it before',
    ('recipe', 'check_held_out', '--train-token-file'): 'only where --val-share is among the flags',
    ('recipe', 'check_held_out', '--val-share'): 'only where it is among the flags',
    ('recipe', 'check_held_out', '--val-token-file'): 'only where --val-share is among the flags',
    ('recipe', 'check_held_out', '--views'): 'only where --val-share is among the flags',
    ('recipe', 'check_val_share', '--val-share'): 'main_continual.py refuses it before',
    ('recipe', 'count_steps', '--epoch-images'): 'only where it is among the flags',
    ('recipe', 'files_by_default', '--no-eval'): 'programs without it have validation tokens of their own, or none',
    ('recipe', 'files_by_default', '--val-share'): 'programs without it have validation tokens of their own, or none',
    ('recipe', 'files_by_default', '--val-token-file'): 'only where it is among the flags',
    ('recipe', 'flags_alike', '--token-cache'): 'False on all ranks',
    ('recipe', 'make_state', '--model'): "only timm's models refuse",
    ('recipe', 'model_of_start', '--token-patch-size'): 'only where it is among the flags',
    ('recipe', 'views_in_words', '--views'): 'only where --val-share is among the flags',
    ('recipe', 'warn_of_small_sets', '--model-ema-decay'): 'they keep no average',
    ('recipe', 'warn_of_small_sets', '--recipe'): 'only where it is among the flags',
    ('seitpp.models_mtm', 'create_model', '--model'): 'inspect_masked_tokens.py takes one of the names',
    ('token_files.cache', 'build_cache', '--token-cache'): 'they make no cache',
    ('token_files.cache', 'map_array', '--token-cache'): 'they make no cache',
    ('token_files.made_with', 'check_made_with', '--tokenizer-path'): 'no tokenizer is given there',
    ('token_files.parts', 'OutputFiles', '--limit-codes'): 'limit_codes is False there',
    ('training.checkpoints', 'compare_flags', '--finetune'): 'only where it is among the flags',
    ('training.checkpoints', 'compare_flags', '--opt'): 'only where it is among the flags',
}


class Grabbed(Exception):
    """Instead of a parsed command line."""


def flags_of(program, patch):
    """The flags that a program takes."""
    flags = set()

    def grab(parser, *_):
        flags.update(flag for action in parser._actions for flag in action.option_strings)
        raise Grabbed
    patch.setattr(Parser, 'parse_args', grab)
    patch.setattr(Parser, 'parse_known_args', grab)
    with pytest.raises(Grabbed):
        importlib.import_module(program).parse_args([])
    if program in ('main_continual', 'scripts.run_with_submitit'):  # they pass flags on
        flags |= flags_of('main_seit', patch)
    if program == 'main_continual':
        flags |= flags_of('main_pixels', patch)
        flags -= {f'--{name.replace("_", "-")}' for name in NOT_HERE}
    return flags


def definitions(tree):
    """What a module defines at its top, by name."""
    found = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
        names = [node.name] if hasattr(node, 'name') else [part.id for target in targets if target
                                                           for part in ast.walk(target) if isinstance(part, ast.Name)]
        found.update(dict.fromkeys(names, node))
    return found


def imports(tree):
    """(module, name in it or None for all of it) of what a module imports from ours, by the name that it has there."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: (alias.name, None) for alias in node.names if alias.name in TREES}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f'{node.module}.{alias.name}'
                if whole in TREES or node.module in TREES:
                    found[alias.asname or alias.name] = (whole, None) if whole in TREES else (node.module, alias.name)
    return found


DEFINED = {module: definitions(tree) for module, tree in TREES.items()}
IMPORTED = {module: imports(tree) for module, tree in TREES.items()}


def used_by(module, node):
    """(module, name) of all definitions of ours whose names a node holds."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            origin, name = IMPORTED[module].get(part.id, (module, part.id))
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            origin, name = IMPORTED[module].get(part.value.id, (module, None))[0], part.attr
        else:
            continue
        if name in DEFINED[origin]:
            yield origin, name


def reached_by(program):
    """(module, name) of all definitions that a program can reach."""
    reached = {(program, 'main'), (program, 'parse_args')}
    waiting = list(reached)
    while waiting:
        module, name = waiting.pop()
        new = set(used_by(module, DEFINED[module][name])) - reached
        reached |= new
        waiting += new
    return reached


def messages(node):
    """The texts in a definition that a user may read on failure: no docstrings, help, names of flags alone."""
    left_out = set()
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part, False):
            left_out.add(part.body[0].value)
        if isinstance(part, ast.Call) and getattr(part.func, 'id', getattr(part.func, 'attr', '')) in (
                'add', 'add_argument'):
            left_out.update(ast.walk(part))
    return [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
            and part not in left_out and not re.fullmatch(r'--[a-z0-9-]+', part.value)]


def raised(node):
    """The texts in what a definition raises."""
    return [text for part in ast.walk(node) if isinstance(part, ast.Raise) for text in messages(part)]


@pytest.mark.parametrize('program', PROGRAMS)
def test_messages_name_flags_that_the_program_has(program, monkeypatch):
    flags = flags_of(program, monkeypatch)
    wrong = set()
    for module, name in reached_by(program):
        # tables/ has the commands of other programs in its texts
        texts = (raised if module.startswith('tables.') else messages)(DEFINED[module][name])
        named = {flag for text in texts for flag in FLAG.findall(text)}
        wrong |= {(module, name, flag) for flag in named
                  if flag not in flags and flag.replace('--no-', '--', 1) not in flags}
    assert sorted(wrong - NEVER_PRINTED.keys()) == []


def test_exceptions_are_of_messages_that_are_there():
    for module, name, flag in NEVER_PRINTED:
        assert flag in FLAG.findall(' | '.join(messages(DEFINED[module][name]))), (module, name, flag)


def test_the_programs_and_their_messages_are_found():
    assert {'main_continual', 'scripts.probe', 'tables.make', 'tokenize_images'} <= set(PROGRAMS)
    reached = reached_by('main_continual')
    assert {('image_tokenizer.patch_fit', 'check_enough'), ('utils', 'init_distributed')} <= reached
    assert ('image_data.shrinking', 'find_parameter') not in reached
    assert FLAG.findall('give --a-b, or x.py --c, or --d of y.py: --e') == ['--a-b', '--e']


@pytest.mark.parametrize('program', PROGRAMS)
def test_unknown_flags_are_answered_by_flags_that_the_program_has(program, monkeypatch):
    known = flags_of(program, monkeypatch)
    named = {flag for flag in ELSEWHERE for line in advice([flag], known)
             for flag in FLAG.findall(line.partition(': ')[2])}
    assert named <= known


def test_every_flag_of_other_programs_is_answered_somewhere(monkeypatch):
    """A row whose flags were renamed would be silent for ever."""
    known = {program: flags_of(program, monkeypatch) for program in PROGRAMS}
    everywhere = set().union(*known.values())
    assert sorted({flag for row in ELSEWHERE.values() for flag in row.here} - everywhere) == []
    assert [flag for flag in ELSEWHERE if not any(advice([flag], flags) for flags in known.values())] == []


@pytest.mark.parametrize('program, flag, answer', [
    ('main_seit', '--data-path', 'here it is --train-token-file'),
    ('main_pixels', '--data-path', 'here it is --train-path'),
    ('tokenize_images', '--data-dir', 'here it is --data-path'),
    ('main_seit', '--lr-base', 'here it is --lr, which is scaled with the batch'),
    ('main_mtm_pretrain', '--lr-base', 'here it is --blr, which is scaled with the batch'),
    ('main_seit', '--pretrained', 'start from those of a file by --finetune FILE'),
    ('main_mtm_pretrain', '--pretrained', 'no weights are downloaded by name'),
    ('main_mtm_finetune', '--checkpoint-hist', 'here it is --save-periods'),
    ('scripts.probe', '--workers', 'here it is --num-workers'),
    ('scripts.run_with_submitit', '--timeout', 'here it is --hours'), ('main_pixels', '--num-classes', '--nb-classes')])
def test_habits_of_other_programs(program, flag, answer, monkeypatch):
    line, = advice([flag, 'x'], flags_of(program, monkeypatch))
    assert line.startswith(f'{flag}: ') and line.endswith(answer)
