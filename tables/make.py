"""Make a table of the paper, or all: plan its rows, run what is not done, write the results.

    python tables/make.py storage --preset tiny --data-path DATA --output-dir output/tables --device cpu
    python tables/make.py storage --preset tiny --data-path DATA --output-dir output/tables --rows 'search *'
    python tables/make.py all --preset imagenet --data-path DATA --output-dir output/paper --dry-run
    python tables/make.py all --preset imagenet --data-path DATA --output-dir output/paper --cluster slurm \\
        --slurm slurm_partition=gpu gpus_per_node=8 cpus_per_task=80 timeout_min=4320

Rows that are done are skipped, whoever ran their commands; killed ones resume when the same command is given again; a
failed one does not stop the others. `all` writes tables.md, too, with all tables. README.md says what the tables are.
"""
import argparse
import fnmatch
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.figures import pyplot
from fileio.files import write_text
from flags import DEVICE_HELP, SEED, Parser, byte_count, integer, number
from image_data.sources import FolderImages, open_source
from tables import class_incremental, cluster, pretraining, report
from tables.figures import COMPACT
from tables.plan import BYTES, SEARCH_SEED, Images, Line, Plan, Tokens, flag_value, needed, percent
from tables.presets import PAPER, PAPER_ROBUSTNESS, PAPER_SEITPP, PRESETS, PRETRAINING, PROTOCOLS, Preset, Tokenizer
from tables.rows import Row, check_row, failures_of, is_done, run_rows, shell_line
from training.preemption import REQUEUE, StopSignal
from utils import InputError, cores, run

ALL = 'all'
TABLES_FILE = 'tables.md'  # of ALL


# ---------------------------------------------------------------- table 1: storage against accuracy

def storage(plan: Plan, seeds: Sequence[int]) -> list[Line]:
    """Full pixels, fewer images, smaller images, JPEG, and tokens, in both formats."""
    preset = plan.preset
    sets = {'full pixels': plan.full()}
    sets |= {f'sample {percent(share)}': plan.shrunk('sample', share) for share in preset.shares}
    sets |= {f'resize x{side:g}': plan.shrunk('resize', side) for side in preset.sides}
    sets |= {f'JPEG q{quality}': plan.shrunk('jpeg', quality) for quality in preset.qualities}
    sets |= {f'best codec at {size:,} bytes': plan.shrunk(method, quality, side)
             for size, (method, side, quality) in preset.rivals.items()}
    lines = []
    longer = plan.of_epochs(preset.long_epochs) if preset.long_epochs else None
    for name, images in sets.items():
        lines += pixel_lines(plan, longer, name, seeds, images)
    sets = {'tokens': plan.main_tokens()}
    sets |= {f'tokens {percent(share)}': plan.main_tokens(share) for share in preset.token_shares}
    sets |= {f'tokens {name}': plan.tokens(name) for name in list(preset.tokenizers)[1:]}
    for name, tokens in sets.items():
        line, *more = token_lines(plan, longer, name, seeds, tokens)
        # the same codes in fewer bytes: nothing is trained again
        compact = replace(line, name=f'{name}{COMPACT}', files={'bytes': (plan.compact(tokens), BYTES)}, paper=None,
                          paper_size=None)
        lines += [line, compact, *more]
    full = {'full_bytes': (plan.full().row, BYTES)}
    return [replace(line, files=full | line.files) for line in lines]


def pixel_lines(plan: Plan, longer: Plan | None, name: str, seeds: Sequence[int], images: Images) -> list[Line]:
    """The line of images, its groups of classes, and both trained longer where the preset asks for it."""
    lines = []
    for of, title in titles(plan, longer, name):
        facts = {'longer': of.preset.epochs} if of is longer else {}
        line = of.pixel_line(title, seeds, images, **paper(title), facts=facts)
        lines += [line, *of.group_lines(line, ('main_pixels.py', '--val-path', images.val, *of.workers))]
    return lines


def token_lines(plan: Plan, longer: Plan | None, name: str, seeds: Sequence[int], tokens: Tokens) -> list[Line]:
    """The line of tokens, as `pixel_lines`."""
    lines = []
    val = [word for flag in ('--codebook-path', '--val-token-file', '--val-label-file')
           for word in (flag, flag_value(tokens.flags, flag))] if plan.preset.groups else []
    for of, title in titles(plan, longer, name):
        facts = {'longer': of.preset.epochs} if of is longer else {}
        line = of.token_line(title, seeds, tokens, **paper(title), facts=facts)
        lines += [line, *of.group_lines(line, ('main_seit.py', *val))]
    return lines


def titles(plan: Plan, longer: Plan | None, name: str) -> list[tuple[Plan, str]]:
    """The plans that train a line, and its name in each."""
    is_long = name in plan.preset.long_lines and longer
    return [(plan, name), *([(longer, long_name(name, plan.preset))] if is_long else [])]


def long_name(name: str, preset: Preset) -> str:
    """The name of a line of table 1 where it is trained longer."""
    return f'{name}, {preset.long_epochs} epochs'


def paper(name: str) -> dict[str, Any]:
    """What the paper says of a line: its accuracy and storage."""
    value, size = PAPER.get(name, (None, None))
    return {'paper': value, 'paper_size': size}


# ---------------------------------------------------------------- table 2: ablation

# Flags with which a part is left out; of those that are given twice, the last counts.
OFF = {
    'synonym': ('--eda-rc-prob', '0'),
    'swap': ('--eda-sc-prob', '0'),
    'erase': ('--eda-erase-prob', '0'),
    'crop': ('--rrc-ratio', '1'),
    'noise': ('--token-noise-prob', '0'),
    'CutMix': ('--cutmix', '0'),
}
# Flags that add a part which the base recipe may lack.
ON = {'erase': ('--eda-erase-prob', '0.25'), 'noise': ('--token-noise-prob', '0.5')}


def off(*kept: str) -> tuple[str, ...]:
    """The flags that leave out all parts but some."""
    return tuple(word for part, flags in OFF.items() if part not in kept for word in flags)


def ablation(plan: Plan, seeds: Sequence[int]) -> list[Line]:
    """What each augmentation of tokens, and the Stem-adaptor, is worth.

    Each part is left out of the base recipe, and alone added to none of them. Erasing is not in the published recipe:
    it is added to it instead of left out.
    """
    tokens = plan.main_tokens()
    lacks = ['erase'] + [part for part in OFF if OFF[part] == plan.preset.tokens]
    variants = {f'without {part}': flags for part, flags in OFF.items() if part not in lacks}
    variants |= {f'with {part}': ON[part] for part in lacks}
    variants |= {'without Token-EDA': OFF['synonym'] + OFF['swap'] + OFF['erase'], 'none': off()}
    variants |= {f'only {part}': off(part) + ON.get(part, ()) for part in OFF}
    model, *kwargs = plan.preset.token_model
    variants |= {'patch stem': ('--model', f'{model}_patch', *kwargs)}
    return [plan.base_line('tokens', seeds, paper=PAPER['tokens'][0])] + [
        plan.token_line(name, seeds, tokens, flags) for name, flags in variants.items()]


# ---------------------------------------------------------------- table 3: robustness

def robustness(plan: Plan, seeds: Sequence[int]) -> list[Line]:
    """Accuracy on corrupted images, and on ImageNet-R, -A and -Sketch, of tokens and of full pixels.

    Evaluates the checkpoints of table 1's base lines. The corruptions are applied to the images; tokens are made of
    what comes out.
    """
    rows, val = plan.corrupted()
    sets = {'clean': (val, (), {})}
    sets |= {f'{name} {severity}': (val, ('--corruption', name, '--severity', str(severity)), {'severity': severity})
             for name in plan.preset.corruptions for severity in plan.preset.severities}
    sets |= {name: (plan.data / name, ('--classes', name), {}) for name in plan.preset.more_sets}
    lines = []
    for kind in ('tokens', 'pixels'):
        base = plan.base_line(kind, seeds)
        for name, (path, flags, facts) in sets.items():
            runs = {seed: plan.evaluation(kind, run, name, path, flags, rows) for seed, run in base.runs.items()}
            lines.append(Line(f'{kind} {name}', kind, runs, 'evaluated top1', facts=facts,
                              paper=PAPER_ROBUSTNESS.get(name) if kind == 'tokens' else None))
    return lines


# ---------------------------------------------------------------- table 4: speed

TIMED_EPOCHS = 2
TIMED_LR = 1e-3  # no speed depends on it
TIMED = ('--epochs', str(TIMED_EPOCHS), '--warmup-epochs', '1', '--no-eval', '--no-model-ema')


def speed(plan: Plan, seeds: Sequence[int]) -> list[Line]:
    """Images a second of training on tokens and on pixels, and the bytes read for them.

    The same two epochs without evaluation, the second of which counts: with a model that costs next to nothing, so that
    loading is what takes the time, and with the preset's model. Rows run one at a time, and nothing else should.
    """
    preset = plan.preset
    tokens = plan.main_tokens()
    images = plan.full()
    lines = []
    for bound, token_model, pixel_model in (('loader', preset.small_model, preset.small_pixel_model),
                                            ('compute', preset.token_model, preset.pixel_model)):
        for kind, words, row in (('tokens', plan.token_words(tokens, TIMED, token_model), tokens.row),
                                 ('pixels', plan.pixel_words(images, TIMED, pixel_model), images.row)):
            name = f'{kind} {bound}-bound'
            runs = {seed: plan.train(f'speed {name}', TIMED_LR, seed, words, [row]) for seed in seeds}
            lines.append(Line(name, '', runs, 'images_per_second', {'bytes': (row, BYTES)}, TIMED_EPOCHS))
    return lines


# ---------------------------------------------------------------- table 5: SeiT++

COLOR_ADAPT = ('--noise-recipe', 'seit++', '--token-coloradapt-prob', '0.25')  # published


def seitpp(plan: Plan, seeds: Sequence[int]) -> list[Line]:
    """ColorAdapt, TokenAdapt and masked-token pre-training, each on top of what stands above it.

    The paper gives SeiT++ 500 epochs, 400 of pre-training and 100 of fine-tuning, against 300 of SeiT. Both that
    proportion and as many epochs as SeiT are here. Its network reads numbers of codes, not embeddings, so it is also
    trained from scratch, with the same augmentation: for SeiT's epochs, and for those of fine-tuning, which
    pre-training comes before. The learning rate of pre-training is the preset's first; others have a line each. A
    preset with long lines has its epochs here; one without TokenAdapt leaves out what it would be added to.
    """
    preset = plan.preset
    if preset.long_epochs:
        plan = plan.of_epochs(preset.long_epochs)
    tokens = plan.main_tokens()
    rows, path = plan.token_adapt(tokens)
    adapted = [
        plan.token_line('ColorAdapt, TokenAdapt', seeds, tokens, (*COLOR_ADAPT, '--tokenadapt-path', path), rows),
    ] if preset.masked.token_adapt is not None else []
    return [
        plan.token_line(long_name('tokens', preset) if preset.long_epochs else 'tokens', seeds, tokens,
                        paper=PAPER['tokens'][0]),
        plan.token_line('ColorAdapt', seeds, tokens, COLOR_ADAPT),
        *adapted,
        plan.base_line('codes', seeds),
        plan.codes_line(f'MTM network, from scratch, {plan.tuning_epochs} epochs', seeds, plan.tuning_epochs,
                        preset.masked.warmup_epochs),
        plan.base_line('fine-tuning', seeds),
        *(plan.pretrained_line(f'pre-trained at {lr:g}, equal epochs', [SEARCH_SEED], plan.equal_times, lr)
          for lr in preset.masked.pretrain_lrs[1:]),
        plan.pretrained_line('pre-trained, published epochs', seeds, 4, paper=PAPER_SEITPP),
    ]


# ---------------------------------------------------------------- tokenizers

def tokenizers(plan: Plan, seeds: Sequence[int]) -> list[Line]:
    """What tokenizers are worth: bytes, reconstruction, speed, and what is trained on their tokens as in table 1."""
    lines = []
    for name in plan.preset.tokenizers:
        tokens = plan.tokens(name)
        first = name == next(iter(plan.preset.tokenizers))
        line = plan.token_line('tokens' if first else f'tokens {name}', seeds, tokens)
        lines.append(replace(line, name=name, files=line.files | plan.judged_tokens(name, tokens)))
    return lines


# ---------------------------------------------------------------- the tables

class Table(NamedTuple):
    """A table: its title, its presets by name, the class of its plan, and (plan, seeds) -> its lines."""
    title: str
    presets: dict[str, Any]
    plan: type[Plan]
    lines: Callable[[Plan, Sequence[int]], list[Line]]


TABLES = {
    'storage': Table('Storage against accuracy', PRESETS, Plan, storage),
    'ablation': Table('Ablation of token augmentation', PRESETS, Plan, ablation),
    'robustness': Table('Robustness', PRESETS, Plan, robustness),
    'speed': Table('Speed of training', PRESETS, Plan, speed),
    'seitpp': Table('SeiT++', PRESETS, Plan, seitpp),
    'pretraining': Table('Storage-efficient pre-training', PRETRAINING, pretraining.PretrainingPlan, pretraining.lines),
    class_incremental.NAME: Table('Class-incremental learning', PROTOCOLS, class_incremental.TasksPlan,
                                  class_incremental.lines),
    'tokenizers': Table('Tokenizers', PRESETS, Plan, tokenizers),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('table', choices=[*TABLES, ALL])
    add('--preset', default='tiny', choices=list(PRESETS | PROTOCOLS),
        help="tiny: two CPU cores; tiny-gpu: one GPU; photos, photos-float32, photos-gpu: 20 classes of photographs of "
        "224 pixels; imagenet: the paper's, eight GPUs. The table `continual` has "
        'tiny (five tasks of four classes), b10-inc10 and b50-inc5 (100 classes of DATA, as of ImageNet, one GPU)')
    add('--data-path', required=True, metavar='DIR', help='train/ and val/ with a folder of images for every class; '
        'for imagenet also tokens/ (the published token files) and weights/tokenizer.safetensors')
    add('--output-dir', required=True, metavar='DIR', help='for all rows and results; tables may share it, and then '
        'share what they have in common')
    add('--rows', nargs='+', default=[], metavar='NAME', help="lines of the table, as in '*' or 'JPEG*'; default: all "
        "but those of the search for learning rates, 'search *'")
    add('--seeds', type=SEED, nargs='+', default=[0])
    add('--dry-run', action='store_true', help='print the commands, and run nothing')
    add('--report', action='store_true', help='run nothing, and write the results of what is done')
    add('--results', type=Path, nargs='+', default=[], metavar='FILE.json', help='results.json of this table from '
        'other machines: seeds and lines that are not done here are written as they are there')

    add = parser.add_argument_group('instead of what the preset says').add_argument
    add('--lr', type=number(1e-12), help='learning rate of every row but those of pre-training')
    add('--classes', type=integer(1), help='take the first N classes')
    add('--images-per-class', type=integer(1), metavar='N', help='train on the first N images of each class')
    add('--epochs', type=integer(1), help='of training on all images')
    add('--memories', type=byte_count, nargs='+', metavar='BYTES', help='of the table `continual`, as in 1e6')
    add('--memory-policy', choices=['balanced', 'reservoir'], help='of the table `continual`; default: balanced')
    add('--tokenizer', nargs=5, action='append', default=[],
        metavar=('NAME', 'TOKENIZER', 'CODEBOOK', 'IMAGE_SIZE', 'GRID'),
        help='one more line of the table `tokenizers`: images of IMAGE_SIZE pixels become GRID codes on a side')

    add = parser.add_argument_group('how rows are run').add_argument
    add('--jobs', type=integer(1), default=1, help='rows at a time, each with --threads')
    add('--threads', type=integer(1), default=max(1, cores() // 2), help='of a program on the CPU')
    add('--device', default='auto', help=DEVICE_HELP)
    add('--cluster', default='local', choices=['local', 'slurm'],
        help='slurm: submit each row as a job, through submitit')
    add('--slurm', nargs='+', default=[], metavar='NAME=VALUE',
        help="parameters of the jobs, by the names of submitit's AutoExecutor; timeout_min is needed")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """InputError for flags that cannot work together."""
    if args.table == 'speed' and args.jobs > 1:
        raise InputError(f'--jobs {args.jobs}: rows that are timed run one at a time')
    if args.preset not in TABLES.get(args.table, TABLES['storage']).presets:
        raise InputError(f'--preset {args.preset}: {args.table} has '
                         f'{", ".join(TABLES.get(args.table, TABLES["storage"]).presets)}')
    for flag, table in (('memories', 'continual'), ('memory_policy', 'continual'), ('tokenizer', 'tokenizers')):
        if getattr(args, flag) and args.table not in (table, ALL):
            raise InputError(f'--{flag.replace("_", "-")}: is for the table {table}')
    if args.results and args.table in (class_incremental.NAME, 'speed', ALL):
        raise InputError(f'--results: is for one table, and not for {class_incremental.NAME} or speed')
    if args.slurm and args.cluster != 'slurm':
        raise InputError('--slurm: needs --cluster slurm')
    if args.cluster == 'slurm':
        cluster.parameters_of(args.slurm)


def plan_of(name: str, args: argparse.Namespace) -> Plan:
    """The plan of a table, with what the command line overrides in its preset. Raises InputError."""
    table = TABLES[name]
    sizes = table.presets[args.preset].with_sizes(args.classes, args.images_per_class, args.epochs)
    places = Path(args.data_path), Path(args.output_dir), args.device, args.lr
    if table.plan is class_incremental.TasksPlan:
        return table.plan(sizes, *places, args.memories, args.memory_policy or 'balanced')
    if name == 'tokenizers':
        sizes = with_tokenizers(sizes, args.tokenizer)
    return table.plan(sizes, *places)


def with_tokenizers(preset: Preset, tokenizers: Sequence[Sequence[str]]) -> Preset:
    """A preset with the tokenizers of --tokenizer after its own. Raises InputError."""
    added = {}
    for name, tokenizer, codebook, image_size, grid in tokenizers:
        if name != Path(name).name or name.startswith('.') or name in preset.tokenizers | added:
            raise InputError(f'--tokenizer {name}: name each by a plain word of its own')
        try:
            sizes = integer(1)(image_size), 8 * integer(2)(grid)  # main_seit.py's --input-size has 8 pixels a code
        except argparse.ArgumentTypeError as error:
            raise InputError(f'--tokenizer {name}: {error}') from None
        added[name] = Tokenizer(*sizes, (), *(str(Path(path).absolute()) for path in (tokenizer, codebook)))
    return replace(preset, tokenizers=preset.tokenizers | added)


# ---------------------------------------------------------------- the rows of a command line

def planned(name: str, args: argparse.Namespace) -> tuple[Plan, list[Line]]:
    """The plan of a table, and all its lines, those of the search last."""
    plan = plan_of(name, args)
    lines = TABLES[name].lines(plan, args.seeds)
    return plan, lines + plan.search_lines(dict.fromkeys(line.kind for line in lines))


def chosen_lines(lines: Sequence[Line], patterns: Sequence[str]) -> list[Line]:
    """The lines whose names a pattern fits, with the columns of them; without patterns all but those of the search."""
    if not patterns:
        return [line for line in lines if line.rate is None]
    chosen = []
    for line in lines:
        of = line.facts.get('of')
        names = (line.name, of, f'{of}{COMPACT}') if of else (line.name,)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names):
            chosen.append(line)
    return chosen


def rows_of(name: str, args: argparse.Namespace) -> list[Row]:
    """The rows of the lines of a table that are asked for, each after those that it needs."""
    plan, lines = planned(name, args)
    return needed(plan.rows, [row for line in chosen_lines(lines, args.rows) for row in line.rows])


def check_patterns(names: Sequence[str], args: argparse.Namespace) -> None:
    """InputError for a --rows that fits no line of these tables."""
    lines = [line.name for name in names for line in planned(name, args)[1]] if args.rows else []
    for pattern in args.rows:
        if not fnmatch.filter(lines, pattern):
            raise InputError(f'--rows {pattern}: is none of {", ".join(map(repr, dict.fromkeys(lines)))}')


def check_data(plan: Plan, asked: int | None) -> None:
    """InputError for images that cannot be those of a plan.

    Args:
        plan: what is taken of them.
        asked: --images-per-class.
    """
    for split in ('train', 'val'):
        path = plan.images / split
        if not path.is_dir():
            if plan.preset.evaluated or split == 'train':
                raise InputError(f'{plan.images}: has no folder {split}/; give one with train/ and val/')
            continue
        if plan.preset.groups:
            names = sorted(name for names in plan.preset.groups.values() for name in names)
            found = folder_images(path).classes
            if found != names:
                other = sorted(set(found).symmetric_difference(names))
                raise InputError(f'{path}: its classes are not the {len(names)} of this preset (such as {other[0]}): '
                                 'give those, or --classes N for the first N of yours')
        if plan.preset.classes is None:
            continue
        source = folder_images(path)
        last = plan.preset.skip_classes + plan.preset.classes
        if len(source.classes) < last:
            raise InputError(f'{path}: has {len(source.classes)} classes, but {last} are taken; give a smaller '
                             '--classes')
        for label in range(plan.preset.skip_classes, last if asked and split == 'train' else 0):
            count = int((source.labels == label).sum())
            if count < asked:
                raise InputError(f'{path}: the class {source.classes[label]} has {count} images, but '
                                 f'--images-per-class is {asked}')


@functools.cache
def folder_images(path: Path) -> FolderImages:
    """The images of class folders. Raises InputError."""
    source = open_source(str(path))
    if not isinstance(source, FolderImages):
        raise InputError(f'{path}: give a folder with a folder of images for every class')
    return source


def print_commands(rows: Sequence[Row]) -> None:
    """Print the commands of rows so that a shell can run them, in order."""
    for row in rows:
        print(f'# {row.name}{" (done)" if is_done(row) else ""}')
        print(f'mkdir -p {shlex.quote(str(row.folder))}')
        for command in row.commands:
            print(shell_line(command))


# ---------------------------------------------------------------- results

def results_of(name: str, args: argparse.Namespace, outcomes: dict[str, str]) -> dict[str, Any]:
    """The results of a table, of all seeds that were run: `outcomes` is what became of rows in this call."""
    plan = plan_of(name, args)
    seeds = sorted(report.seeds_on_disk(plan.output) | set(args.seeds))
    lines = TABLES[name].lines(plan, seeds)
    found = {line.name: report.line_result(line, outcomes) for line in lines}
    kinds = [kind for kind in dict.fromkeys(line.kind for line in lines) if kind]
    search = report.search_results(plan.search_lines(kinds))
    results = {'table': name, 'title': TABLES[name].title, 'preset': args.preset,
               'lrs': {kind: {'chosen': plan.lrs[kind], 'search': search.get(kind, {}),
                              'epochs': plan.preset.search_epochs or plan.preset.epochs} for kind in kinds},
               'flags': shlex.join(plan.preset.training), 'rows': found}
    if name == 'seitpp':
        results['token_adapt'] = plan.preset.masked.token_adapt is not None
    if isinstance(plan, class_incremental.TasksPlan):
        results |= {'title': f'{TABLES[name].title}, {plan.name}', 'policy': plan.policy[1],
                    'epochs': plan.preset.epochs}
    for path in args.results:
        results = report.with_results(results, path, {line.name: report.epochs_of(line) for line in lines})
    return results | {'rows': {line: result for line, result in results['rows'].items() if result}}


def write_results(names: Sequence[str], args: argparse.Namespace, outcomes: dict[str, str]) -> None:
    """Write the results of tables into their folders, and of ALL into TABLES_FILE; tables without any are left out."""
    texts = []
    for name in names:
        results = results_of(name, args, outcomes)
        if results['rows'] or args.table != ALL:
            report.write(results, Path(args.output_dir, name))
            texts.append(report.markdown(results))
    if args.table == ALL:
        write_text(Path(args.output_dir, TABLES_FILE), '\n'.join(texts))


# ---------------------------------------------------------------- the program

def run_tables(names: Sequence[str], args: argparse.Namespace, stop: StopSignal) -> dict[str, str]:
    """Run or submit the rows of tables; returns what became of them, by name. InputErrors come before anything runs."""
    rows = {name: rows_of(name, args) for name in names}
    for name in names:
        for row in rows[name]:
            check_row(row)
    outcomes = {}
    for name in names:
        if args.cluster == 'slurm':
            outcomes = cluster.submit_rows(rows[name], args.slurm, args.threads, outcomes)
        else:
            jobs = 1 if name == 'speed' else args.jobs
            outcomes = run_rows(rows[name], jobs, args.threads, outcomes, lambda: stop.received)
    return outcomes


def main(args: argparse.Namespace) -> int:
    """Make the tables, or print their commands. Returns the exit code: 1 where a row failed, 75 after a signal."""
    names = [args.table] if args.table != ALL else [name for name in TABLES if args.preset in TABLES[name].presets]
    check_patterns(names, args)
    if args.dry_run:
        print_commands(list({row.name: row for name in names for row in rows_of(name, args)}.values()))
        return 0
    if args.cluster == 'slurm' and not args.report:
        cluster.connect(cluster.parameters_of(args.slurm))
    for name in names if not args.report else ():
        plan = plan_of(name, args)
        if name == 'storage' and plan.preset.groups:
            pyplot()  # which the reports are drawn with that the groups are read from
        check_data(plan, args.images_per_class)
        if isinstance(plan, pretraining.PretrainingPlan) and plan.before.preset.classes:
            check_data(plan.before, args.images_per_class)
    if args.results:
        results_of(args.table, args, {})  # raises for files that do not fit, before anything runs
    with StopSignal() as stop:
        outcomes = {} if args.report else run_tables(names, args, stop)
        write_results(names, args, outcomes)
    for name, why in failures_of(outcomes, outcomes).items():
        print(f'error: {name}: {why}', file=sys.stderr, flush=True)
    if stop.received or 'stopped' in outcomes.values():
        print('stopped by a signal; the same command resumes it', flush=True)
        return REQUEUE
    return int(bool(failures_of(outcomes, outcomes)))


if __name__ == '__main__':
    run(main, parse_args)
