"""Train under SLURM with submitit, which queues the job again when its time is up or it is pre-empted.

    python scripts/run_with_submitit.py --nodes 2 --gpus 8 --partition gpu -- --output-dir /shared/run --dist-eval
    python scripts/run_with_submitit.py main_pixels.py -- --output-dir /shared/pixels --train-path A --val-path B

PROGRAM is any that trains, main_seit.py where none is named. What stands after `--` is its own; --output-dir must be on
a disk that all nodes share. A program that knows --resume resumes by itself when the job runs again.
"""
import argparse
import ast
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flags import Parser, integer, number
from training.preemption import REQUEUE
from utils import InputError, print0, run

ROOT = Path(__file__).resolve().parent.parent


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """This script's arguments, and the program's flags as `training`. Raises InputError for a mistake in either."""
    parser = Parser('Train under SLURM with submitit; flags of the program come after --.')
    add = parser.add_argument
    add('program', nargs='?', default='main_seit.py', metavar='PROGRAM', help='the program that trains')
    add('--nodes', type=integer(1), default=1, help='nodes of the job')
    add('--gpus', type=integer(1), default=8, help='GPUs of a node; each gets a process')
    add('--cpus', type=integer(1), default=8, help='cores for each GPU')
    add('--hours', type=number(0.1), default=24., help='time limit, at which the job saves and is queued again')
    add('--partition', help="SLURM's partition; default: the cluster's")
    add('--constraint', help='features that the nodes must have')
    add('--comment', help='comment for the scheduler')
    add('--requeues', type=integer(), default=100, help='how often the job is queued again at most')
    add('--job-dir', metavar='DIR', help="folder of submitit's files; default: submitit in --output-dir")
    add('--print-flags', action='store_true',
        help='only print which flags for long runs the program knows, as scripts/slurm_train.sbatch asks')
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index('--') if '--' in argv else len(argv)
    args = argparse.Namespace(**vars(parser.parse_args(argv[:end])), training=argv[end + 1:])
    training_args(args.program, args.training)  # mistakes show now, not when the job has waited for hours
    return args


def load_program(name: str) -> ModuleType:
    """A training program of this project by its file's name, as in scripts/train_tokenizer.py. Raises InputError."""
    path = ROOT / name  # a whole path stays as it is
    if path.suffix != '.py' or not path.is_file() or path.resolve().parent not in (ROOT, ROOT / 'scripts'):
        raise InputError(f'{name}: is no program of this project: name one that trains, such as main_seit.py or '
                         'scripts/train_tokenizer.py')
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)}
    if 'recipe.fit' not in calls:  # which is the end of every program that trains, and of no other
        raise InputError(f'{name}: is no program that trains, such as main_seit.py or scripts/train_tokenizer.py')
    return importlib.import_module('.'.join(path.resolve().relative_to(ROOT).with_suffix('').parts))


def added_flags(args: argparse.Namespace) -> list[str]:
    """The flags for long runs that a program knows, with values, as scripts/slurm_train.sbatch adds them."""
    added = {'save_every': ['--save-every', '30m'], 'resume': ['--resume', 'auto']}
    return [word for name, words in added.items() if name in vars(args) for word in words]


def training_args(program: str, flags: Sequence[str]) -> argparse.Namespace:
    """A program's arguments, for a run that resumes where it can. Raises InputError."""
    parse_args = load_program(program).parse_args
    # a program says by its arguments what it knows, as some take other flags with some of them
    resumes = 'resume' in vars(parse_args(flags))
    return parse_args([*flags, '--resume', 'auto'] if resumes else flags)


def slurm_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """What submitit's executor is told."""
    optional = {f'slurm_{key}': getattr(args, key) for key in ('partition', 'constraint', 'comment')}
    return {'name': 'seit', 'nodes': args.nodes, 'gpus_per_node': args.gpus, 'tasks_per_node': args.gpus,
            'cpus_per_task': args.cpus, 'timeout_min': round(60 * args.hours), 'slurm_signal_delay_s': 300,
            **{key: value for key, value in optional.items() if value}}


class Training:
    """A program as submitit's job.

    Args:
        program: its file's name.
        flags: of its command line.
    """

    def __init__(self, program: str, flags: Sequence[str]):
        self.program = program
        self.flags = flags

    def __call__(self) -> None:
        os.environ.setdefault('OMP_NUM_THREADS', '1')
        if load_program(self.program).main(training_args(self.program, self.flags)) == REQUEUE:
            # all is saved, and the handlers of before are back: now submitit may queue the job again
            signal.raise_signal(signal.SIGUSR1)

    def checkpoint(self) -> Any:
        """Called by submitit: what is to run next time."""
        import submitit
        return submitit.helpers.DelayedSubmission(self)


def main(args: argparse.Namespace) -> None:
    if args.print_flags:
        print0(*added_flags(training_args(args.program, args.training)))
        return
    os.environ['SUBMITIT_PREEMPT_SIGNAL'] = 'USR1'  # one of those that programs save on
    try:
        import submitit
    except ImportError:
        raise InputError('scripts/run_with_submitit.py needs the submitit package: pip install submitit; '
                         'scripts/slurm_train.sbatch does without') from None
    output_dir = training_args(args.program, args.training).output_dir
    # The job imports modules of ours before any line of this file runs there.
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    executor = submitit.AutoExecutor(args.job_dir or Path(output_dir) / 'submitit',
                                     slurm_max_num_timeout=args.requeues)
    executor.update_parameters(**slurm_parameters(args))
    job = executor.submit(Training(args.program, args.training))
    print0(f'submitted job {job.job_id}; its output: {job.paths.stdout}')


if __name__ == '__main__':
    run(main, parse_args)
