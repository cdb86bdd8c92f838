"""Train under SLURM with submitit, which queues the job again when its time is up or it is pre-empted.

    python scripts/run_with_submitit.py --nodes 2 --gpus 8 --partition gpu -- --output-dir /shared/run --dist-eval ...

Words after `--` are main_seit.py's; --output-dir must be on a disk that all nodes share.
"""
import argparse
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import main_seit  # noqa: E402
from checkpoints import REQUEUE  # noqa: E402
from utils import InputError, run, say  # noqa: E402


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--nodes', type=int, default=1)
    add('--gpus', type=int, default=8, help='a node')
    add('--cpus', type=int, default=8, help='a GPU')
    add('--hours', type=float, default=24., help='until the job is queued again')
    add('--partition', help="default: the cluster's")
    add('--constraint', help='of the nodes')
    add('--comment', help='for the scheduler')
    add('--requeues', type=int, default=100, help='at most, for lack of time')
    add('--job-dir', metavar='DIR', help="submitit's files (default: submitit in --output-dir)")
    return parser


def split_words(words):
    """(own flags, main_seit.py's words) of a command line."""
    at = words.index('--') if '--' in words else len(words)
    return get_args_parser().parse_args(words[:at]), words[at + 1:]


def slurm_parameters(args):
    """What submitit's executor is told."""
    return {'name': 'seit', 'nodes': args.nodes, 'gpus_per_node': args.gpus, 'tasks_per_node': args.gpus,
            'cpus_per_task': args.cpus, 'timeout_min': round(60 * args.hours), 'slurm_signal_delay_s': 300,
            **{f'slurm_{key}': getattr(args, key) for key in ('partition', 'constraint', 'comment')
               if getattr(args, key)}}


class Training:
    """main_seit.py as submitit's job. Args: words: of its command line."""

    def __init__(self, words):
        self.words = words

    def __call__(self):
        os.environ.setdefault('OMP_NUM_THREADS', '1')
        try:
            main_seit.main(main_seit.parse_args([*self.words, '--resume', 'auto']))
        except SystemExit as stopped:
            if stopped.code != REQUEUE:
                raise
            # all is saved, and the handlers of before are back: now submitit may queue the job again
            signal.raise_signal(signal.SIGUSR1)

    def checkpoint(self):
        """Called by submitit: what is to run next time."""
        import submitit
        return submitit.helpers.DelayedSubmission(self)


def main(args, words):
    # mistakes show now, not when the job has waited for hours
    output = main_seit.parse_args([*words, '--resume', 'auto']).output_dir
    os.environ['SUBMITIT_PREEMPT_SIGNAL'] = 'USR1'  # one of those that main_seit.py saves on
    try:
        import submitit
    except ImportError:
        raise InputError('scripts/run_with_submitit.py needs the submitit package: pip install submitit; '
                         'scripts/slurm_train.sbatch does without') from None
    os.chdir(ROOT)
    executor = submitit.AutoExecutor(args.job_dir or Path(output) / 'submitit', slurm_max_num_timeout=args.requeues)
    executor.update_parameters(**slurm_parameters(args))
    job = executor.submit(Training(words))
    say(f'submitted job {job.job_id}; its output: {job.paths.stdout}')


if __name__ == '__main__':
    run(lambda: main(*split_words(sys.argv[1:])))
