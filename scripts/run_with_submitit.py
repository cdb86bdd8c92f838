"""Train under SLURM with submitit, which queues the job again when its time is up or it is pre-empted.

    python scripts/run_with_submitit.py --nodes 2 --gpus 8 --partition gpu -- --output-dir /shared/run --dist-eval

What stands after `--` is main_seit.py's; --output-dir must be on a disk that all nodes share.
"""
import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_seit
from flags import Parser, integer, number
from training.preemption import REQUEUE
from utils import InputError, print0, run

ROOT = Path(__file__).resolve().parent.parent


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """This script's arguments, and main_seit.py's flags as `training`. Raises InputError for a mistake in either."""
    parser = Parser('Train under SLURM with submitit; flags of main_seit.py come after --.')
    add = parser.add_argument
    add('--nodes', type=integer(1), default=1, help='nodes of the job')
    add('--gpus', type=integer(1), default=8, help='GPUs of a node; each gets a process')
    add('--cpus', type=integer(1), default=8, help='cores for each GPU')
    add('--hours', type=number(0.1), default=24., help='time limit, at which the job saves and is queued again')
    add('--partition', help="SLURM's partition; default: the cluster's")
    add('--constraint', help='features that the nodes must have')
    add('--comment', help='comment for the scheduler')
    add('--requeues', type=integer(), default=100, help='how often the job is queued again at most')
    add('--job-dir', metavar='DIR', help="folder of submitit's files; default: submitit in --output-dir")
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index('--') if '--' in argv else len(argv)
    args = argparse.Namespace(**vars(parser.parse_args(argv[:end])), training=argv[end + 1:])
    training_args(args.training)  # mistakes show now, not when the job has waited for hours
    return args


def training_args(flags: Sequence[str]) -> argparse.Namespace:
    """main_seit.py's arguments, for a run that resumes. Raises InputError."""
    return main_seit.parse_args([*flags, '--resume', 'auto'])


def slurm_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """What submitit's executor is told."""
    optional = {f'slurm_{key}': getattr(args, key) for key in ('partition', 'constraint', 'comment')}
    return {'name': 'seit', 'nodes': args.nodes, 'gpus_per_node': args.gpus, 'tasks_per_node': args.gpus,
            'cpus_per_task': args.cpus, 'timeout_min': round(60 * args.hours), 'slurm_signal_delay_s': 300,
            **{key: value for key, value in optional.items() if value}}


class Training:
    """main_seit.py as submitit's job.

    Args:
        flags: of its command line.
    """

    def __init__(self, flags: Sequence[str]):
        self.flags = flags

    def __call__(self) -> None:
        os.environ.setdefault('OMP_NUM_THREADS', '1')
        if main_seit.main(training_args(self.flags)) == REQUEUE:
            # all is saved, and the handlers of before are back: now submitit may queue the job again
            signal.raise_signal(signal.SIGUSR1)

    def checkpoint(self) -> Any:
        """Called by submitit: what is to run next time."""
        import submitit
        return submitit.helpers.DelayedSubmission(self)


def main(args: argparse.Namespace) -> None:
    os.environ['SUBMITIT_PREEMPT_SIGNAL'] = 'USR1'  # one of those that main_seit.py saves on
    try:
        import submitit
    except ImportError:
        raise InputError('scripts/run_with_submitit.py needs the submitit package: pip install submitit; '
                         'scripts/slurm_train.sbatch does without') from None
    output_dir = training_args(args.training).output_dir
    os.chdir(ROOT)
    # The job unpickles Training, and so imports main_seit, before any line of this file runs there.
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    executor = submitit.AutoExecutor(args.job_dir or Path(output_dir) / 'submitit',
                                     slurm_max_num_timeout=args.requeues)
    executor.update_parameters(**slurm_parameters(args))
    job = executor.submit(Training(args.training))
    print0(f'submitted job {job.job_id}; its output: {job.paths.stdout}')


if __name__ == '__main__':
    run(main, parse_args)
