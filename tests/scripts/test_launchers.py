"""What starts training on clusters: the batch script and submitit."""
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import main_seit
from scripts import run_with_submitit
from conftest import ROOT
from flags import Parser
from training.preemption import REQUEUE
from utils import InputError

SCRIPT = ROOT / 'scripts' / 'slurm_train.sbatch'


# ---------------------------------------------------------------- sbatch

def sbatch(folder, code, *words, known='--save-every 30m --resume auto', **env):
    """Run the batch script with a srun that ends with `code`, and a python that says that flags are `known`.

    Returns:
        Its exit code, what srun and scontrol were given, and the environment of srun.
    """
    calls = folder / 'calls'
    (folder / 'python').write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\necho "{known}"\n')
    (folder / 'python').chmod(0o755)
    for name, end in (('srun', code), ('scontrol', 0)):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\nenv > {folder}/{name}.env\nexit {end}\n')
        (folder / name).chmod(0o755)
    outside = {key: value for key, value in os.environ.items() if not key.startswith(('SLURM_', 'SRUN_'))}
    env = {**outside, 'PATH': f'{folder}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '17', 'SLURM_SUBMIT_DIR': str(ROOT),
           **env}
    done = subprocess.run(['bash', SCRIPT, *words], env=env, capture_output=True)
    variables = (folder / 'srun.env').read_text().splitlines()
    lines = calls.read_text().splitlines()
    calls.unlink()
    return done.returncode, lines, dict(line.split('=', 1) for line in variables if '=' in line)


@pytest.mark.slow
def test_the_batch_script_requeues_on_75_alone(tmp_path):
    assert subprocess.run(['bash', '-n', SCRIPT]).returncode == 0
    assert '#SBATCH --signal=USR1@' in SCRIPT.read_text()
    code, calls, _ = sbatch(tmp_path, REQUEUE, '--output-dir', 'a b')
    assert calls[0].endswith('main_seit.py --save-every 30m --output-dir a b --resume auto')
    assert (code, calls[1:]) == (0, ['scontrol requeue 17'])
    for end in (0, 1, 2, 3, 143):
        code, calls, _ = sbatch(tmp_path, end)
        assert code == end
        assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize('known, before, after', [
    ('--save-every 30m --resume auto', '--save-every 30m ', ' --resume auto'), ('', '', ''),
    ('--resume auto', '', ' --resume auto')])
def test_the_batch_script_adds_what_the_program_knows(tmp_path, known, before, after):
    _, calls, _ = sbatch(tmp_path, 0, '--output-dir', 'x', known=known, PROGRAM='main_pixels.py')
    assert calls == [f'srun --wait=60 --export=ALL python main_pixels.py {before}--output-dir x{after}']
    asked = (tmp_path / 'asked').read_text()
    assert asked == 'scripts/run_with_submitit.py main_pixels.py --print-flags -- --output-dir x\n'


@pytest.mark.slow
def test_the_batch_script_ends_in_one_line_for_what_does_not_train(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text(f'#!/bin/sh\ntouch {tmp_path}/started\n')
    srun.chmod(0o755)
    env = {**os.environ, 'SLURM_SUBMIT_DIR': str(ROOT), 'PROGRAM': 'tokenize_images.py',
           'PATH': os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ['PATH']])}
    done = subprocess.run(['bash', SCRIPT, '--output-dir', 'x'], env=env, capture_output=True, text=True)
    line, = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, '')
    assert line.startswith('error: tokenize_images.py: is no program that trains')
    assert not (tmp_path / 'started').exists()


@pytest.mark.slow
def test_the_batch_script_hands_cores_and_environment_to_the_ranks(tmp_path):
    """Since SLURM 22.05 srun takes no --cpus-per-task from the job: each task would get one core."""
    _, calls, env = sbatch(tmp_path, 0, SLURM_CPUS_PER_TASK='6', SLURM_EXPORT_ENV='NONE')
    assert env['SRUN_CPUS_PER_TASK'] == '6'
    assert env['OMP_NUM_THREADS'] == '1'
    assert '--export=ALL' in calls[0].split()
    _, _, env = sbatch(tmp_path, 0)
    assert 'SRUN_CPUS_PER_TASK' not in env


@pytest.mark.slow
def test_words_with_blanks_reach_the_program_whole(tmp_path):
    (tmp_path / 'python').write_text('#!/bin/sh\necho --save-every 30m --resume auto\n'
                                     'for word; do echo "$word"; done > "$SLURM_SUBMIT_DIR/words"\n')
    (tmp_path / 'srun').write_text('#!/bin/sh\nwhile [ "$1" != python ]; do shift; done\nexec "$@"\n')
    for name in ('python', 'srun'):
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_SUBMIT_DIR': str(tmp_path)}
    subprocess.run(['bash', SCRIPT, '--output-dir', 'a b', '--model-kwargs', 'depth=1'], env=env, check=True)
    assert (tmp_path / 'words').read_text().splitlines() == [
        'main_seit.py', '--save-every', '30m', '--output-dir', 'a b', '--model-kwargs', 'depth=1', '--resume', 'auto']


# ---------------------------------------------------------------- submitit

def test_submitit_is_optional_and_its_arguments_are_checked(monkeypatch):
    monkeypatch.setitem(sys.modules, 'submitit', None)
    args = run_with_submitit.parse_args(['--nodes', '2', '--hours', '1.5', '--', '--output_dir', 'x'])
    assert (args.nodes, args.hours, args.training) == (2, 1.5, ['--output_dir', 'x'])
    with pytest.raises(InputError, match='pip install submitit'):
        run_with_submitit.main(args)
    parameters = run_with_submitit.slurm_parameters(args)
    assert parameters['nodes'] == 2
    assert parameters['tasks_per_node'] == args.gpus
    assert parameters['timeout_min'] == 90
    assert not [name for name in parameters if name in ('slurm_partition', 'slurm_constraint', 'slurm_comment')]


@pytest.mark.parametrize('words, message', [
    (['--', '--epochs', '3'], '--output-dir'),
    ([], '--output-dir'),
    (['--nodes', '0', '--', '--output-dir', 'x'], '--nodes: 0: give a value of 1 or more'),
    (['--output-dir', 'x'], 'unrecognized arguments: --output-dir'),
    (['--', '--output-dir', 'x', '--epoch', '3'], 'unrecognized arguments: --epoch'),
    (['main_pixels.py', '--', '--output-dir', 'x'], '--train-path: name the images'),
    (['main_pixels.py', '--', '--train-path', 'a', '--val-path', 'b'], '--output-dir: give one'),
    (['main_nothing.py', '--', '--output-dir', 'x'], 'main_nothing.py: is no program of this project'),
    (['main_seit', '--', '--output-dir', 'x'], 'main_seit: is no program of this project'),
    (['tests/small_training.py', '--'], 'tests/small_training.py: is no program of this project'),
    (['engine.py'], 'engine.py: is no program that trains'), (['recipe.py'], 'recipe.py: is no program that trains'),
    (['tokenize_images.py'], 'is no program that trains'), (['evaluate_on_images.py'], 'is no program that trains'),
    (['scripts/run_with_submitit.py'], 'is no program that trains'),
])
def test_mistakes_show_before_the_job_waits(words, message):
    with pytest.raises(InputError, match=message) as error:
        run_with_submitit.parse_args(words)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('program, words', [
    ('main_seit.py', []), ('main_mtm_pretrain.py', []), ('main_mtm_finetune.py', []),
    ('main_pixels.py', ['--train-path', 'a', '--val-path', 'b']),
    ('main_continual.py', ['--new', 'pixels', '--train-path', 'a', '--val-path', 'b']),
    ('scripts/train_tokenizer.py', ['--data-path', 'a']),
    ('scripts/fit_token_adapt.py', ['--data-path', 'a', '--tokenizer-path', 'b']),
    (str(ROOT / 'main_seit.py'), [])])
def test_programs_that_train_resume(program, words, capsys):
    args = run_with_submitit.parse_args([program, '--print-flags', '--', *words, '--output-dir', 'x'])
    assert run_with_submitit.training_args(args.program, args.training).resume == 'auto'
    run_with_submitit.main(args)
    assert capsys.readouterr().out == '--save-every 30m --resume auto\n'


def test_a_program_that_knows_no_resuming_is_started_without(monkeypatch, capsys):
    """None is here today, so one is made of what every program has."""
    seen = []

    def parse_args(argv):
        parser = Parser('Train at once.')
        parser.add_argument('--output-dir', required=True)
        return parser.parse_args(argv)
    at_once = SimpleNamespace(recipe=None, parse_args=parse_args, main=lambda args: seen.append(vars(args)))
    monkeypatch.setattr(run_with_submitit.importlib, 'import_module', lambda name: at_once)
    args = run_with_submitit.parse_args(['main_pixels.py', '--print-flags', '--', '--output-dir', 'x'])
    run_with_submitit.main(args)
    assert capsys.readouterr().out == '\n'
    run_with_submitit.Training(args.program, args.training)()
    assert seen == [{'output_dir': 'x'}]


def test_what_submitit_is_given(monkeypatch, tmp_path, capsys):
    seen = {}

    class Executor:
        def __init__(self, folder, **options):
            seen.update(folder=Path(folder), options=options)

        def update_parameters(self, **parameters):
            seen.update(parameters)

        def submit(self, job):
            seen.update(job=job)
            return SimpleNamespace(job_id='17', paths=SimpleNamespace(stdout='x.out'))

    monkeypatch.setitem(sys.modules, 'submitit', SimpleNamespace(AutoExecutor=Executor))
    monkeypatch.setenv('SUBMITIT_PREEMPT_SIGNAL', '')
    monkeypatch.setenv('PYTHONPATH', '/elsewhere')
    monkeypatch.chdir(tmp_path)
    words = ['main_mtm_pretrain.py', '--partition', 'gpu', '--requeues', '3', '--', '--output-dir', str(tmp_path),
             '--epochs', '3']
    assert not run_with_submitit.main(run_with_submitit.parse_args(words))
    assert seen['folder'] == tmp_path / 'submitit'
    assert seen['options'] == {'slurm_max_num_timeout': 3}
    assert seen['slurm_partition'] == 'gpu'
    assert seen['slurm_signal_delay_s'] == 300
    assert seen['job'].program == 'main_mtm_pretrain.py'
    assert seen['job'].flags == ['--output-dir', str(tmp_path), '--epochs', '3']
    assert os.environ['SUBMITIT_PREEMPT_SIGNAL'] == 'USR1'
    assert os.environ['PYTHONPATH'] == f'{run_with_submitit.ROOT}{os.pathsep}/elsewhere'
    assert 'submitted job 17' in capsys.readouterr().out


@pytest.mark.parametrize('code, requeues', [(REQUEUE, ['requeue']), (0, [])])
def test_submitit_gets_the_signal_back_once_all_is_saved(monkeypatch, tmp_path, code, requeues):
    seen = []

    def stopped(args):
        assert args.resume == 'auto'
        return code
    monkeypatch.setattr(main_seit, 'main', stopped)
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append('requeue'))
    try:
        run_with_submitit.Training('main_seit.py', ['--output-dir', str(tmp_path), '--device', 'cpu'])()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == requeues
