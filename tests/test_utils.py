"""Errors, processes, printing and seeds that all programs share."""
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import utils
from helpers import ROOT, clean_environment, fails, free_port, run_python
from utils import InputError

# ---------------------------------------------------------------- errors and the way out

def test_messages_are_one_line_whatever_they_quote():
    assert str(InputError('a\nb\x1b[31m\u2028c\ud800d')) == 'a b [31m c d'


def test_the_first_line_of_an_exception():
    assert utils.first_line(ValueError('a\nb')) == 'a'
    assert utils.first_line(MemoryError()) == 'MemoryError'
    assert utils.first_line(ValueError('x' * 1000)) == 'x' * 200


class Diverged(InputError):
    exit_code = 3


@pytest.mark.parametrize('outcome, code, line', [
    (None, 0, ''), (0, 0, ''), (75, 75, ''), (InputError('a.txt: bad'), 2, 'error: a.txt: bad\n'),
    (Diverged('no number'), 3, 'error: no number\n'), (KeyboardInterrupt(), 130, '')])
def test_the_exit_code_of_a_program(no_launcher, capsys, outcome, code, line):
    def main(args):
        assert args == 'args'
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
    with pytest.raises(SystemExit) as caught:
        utils.run(main, lambda: 'args')
    assert (caught.value.code, capsys.readouterr()) == (code, ('', line))


def test_a_fault_of_the_program_keeps_its_traceback(no_launcher):
    def main(_):
        raise RuntimeError('out of order')
    with pytest.raises(RuntimeError, match='out of order'):
        utils.run(main, lambda: None)


def test_before_they_have_joined_one_rank_a_node_speaks(no_launcher, capsys):
    def main(error):
        raise error
    for rank, error, lines in (('0', InputError('x'), 1), ('1', InputError('x'), 0), ('1', utils.RankError('x'), 1)):
        no_launcher.setenv('LOCAL_RANK', rank)
        with pytest.raises(SystemExit):
            utils.run(main, lambda error=error: error)
        assert len(capsys.readouterr().err.splitlines()) == lines


# ---------------------------------------------------------------- SLURM

@pytest.mark.parametrize('nodes, first', [
    ('node[012-015,020]', 'node012'), ('gpu-3', 'gpu-3'), ('a1,a2', 'a1'), ('n[9-12]-ib', 'n9-ib'),
    ('n[09-12,20]-ib,m3', 'n09-ib'), ('rack[1-2]node[03-04]', 'rack1node03'),
    ('r[2,4]n[7]-x[1-9].site,b', 'r2n7-x1.site'),
    ('n[3]', 'n3'), ('10.0.0.[1-4]', '10.0.0.1'), ('a-b.c[1-2],d[3-4]', 'a-b.c1'), ('n7,n[1-3]', 'n7')])
def test_slurm_variables(nodes, first, no_launcher):
    for name, value in (('SLURM_PROCID', '3'), ('SLURM_LOCALID', '1'), ('SLURM_NTASKS', '8')):
        no_launcher.setenv(name, value)
    utils.slurm_environment()
    assert 'RANK' not in os.environ  # a batch script's plain python: one process
    no_launcher.setenv('SLURM_STEP_NUM_TASKS', '8')
    no_launcher.setenv('SLURM_STEP_NODELIST', nodes)
    utils.slurm_environment()
    assert [os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')] == ['3', '1', '8', first]


def slurm(patch, **variables):
    for name, value in variables.items():
        patch.setenv(f'SLURM_{name}', str(value))


def test_steps_and_jobs_have_ports_of_their_own(no_launcher):
    """Steps of one job run side by side: srun ... & srun ... &"""
    ports = {}
    for name in 'STEP_ID', 'STEPID':
        for job in 1, 2, 40_000, 4_294_901_760:
            for step in *range(30), 4_294_967_290:
                with no_launcher.context() as patch:
                    slurm(patch, STEP_NUM_TASKS=2, PROCID=0, LOCALID=0, JOB_ID=job, **{name: step})
                    utils.slurm_environment()
                    ports[name, job, step] = int(os.environ['MASTER_PORT'])
                for variable in 'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT':
                    del os.environ[variable]
    assert min(ports.values()) >= 10_000 and max(ports.values()) < 60_000
    assert len({port for (name, *_), port in ports.items() if name == 'STEP_ID'}) == 4 * 31
    assert all(ports['STEP_ID', job, step] == port for (_, job, step), port in ports.items())


def test_addresses_that_the_user_set_are_kept(no_launcher):
    slurm(no_launcher, STEP_NUM_TASKS=2, PROCID=0, LOCALID=0, STEP_NODELIST='n[1-2]', JOB_ID=7)
    no_launcher.setenv('MASTER_ADDR', 'here')
    no_launcher.setenv('MASTER_PORT', '12')
    utils.slurm_environment()
    assert (os.environ['MASTER_ADDR'], os.environ['MASTER_PORT']) == ('here', '12')


def test_torchruns_variables_are_left_alone(no_launcher):
    slurm(no_launcher, STEP_NUM_TASKS=2, PROCID=1, LOCALID=1, STEP_NODELIST='n[1-2]', JOB_ID=7)
    no_launcher.setenv('RANK', '0')
    utils.slurm_environment()
    assert 'WORLD_SIZE' not in os.environ and os.environ['RANK'] == '0'


@pytest.fixture
def gpus(no_launcher):
    """A function of a number: so many CUDA devices seem to be here."""
    chosen = []

    def there_are(count):
        no_launcher.setattr(torch.cuda, 'is_available', lambda: count > 0)
        no_launcher.setattr(torch.cuda, 'device_count', lambda: count)
        no_launcher.setattr(torch.cuda, 'set_device', chosen.append)
        return chosen
    return there_are


@pytest.mark.parametrize('count, device, local_rank, variables, expected', [
    (8, 'cuda', 3, {}, 3), (8, 'auto', 3, {}, 3), (8, 'cuda:2', 3, {}, 2), (1, 'cuda', 0, {}, 0),
    (1, 'cuda', 1, {'GPUS_PER_TASK': 1}, 0), (1, 'auto', 7, {'GPUS_PER_TASK': 1}, 0),
    (1, 'cuda', 1, {'TRES_PER_TASK': 'cpu=8,gres/gpu=1'}, 0), (1, 'cuda', 1, {'NTASKS_PER_GPU': 1}, 0),
    (1, 'cuda', 1, {'GPU_BIND': 'single:1'}, 0), (1, 'cuda', 2, {'GPU_BIND': 'map_gpu:0,1,2'}, 0),
    (2, 'cuda', 3, {'GPUS_PER_TASK': 2}, 0), (8, 'cuda', 3, {'GPUS_PER_TASK': 1, 'GPU_BIND': 'none'}, 3)])
def test_the_gpu_of_a_local_rank(gpus, no_launcher, count, device, local_rank, variables, expected):
    chosen = gpus(count)
    no_launcher.setenv('LOCAL_RANK', str(local_rank))
    slurm(no_launcher, **variables)
    assert utils.device_of_rank(device) == torch.device('cuda', expected) and chosen == [expected]


@pytest.mark.parametrize('count, device, local_rank, variables, words', [
    (1, 'cuda', 1, {}, 'GPU 1 is asked for .* there are 1: start fewer'), (2, 'cuda:2', 0, {}, 'GPU 2 is asked for'),
    (1, 'cuda', 1, {'TRES_PER_TASK': 'cpu=8'}, 'GPU 1'), (1, 'cuda:1', 0, {'GPUS_PER_TASK': 1}, 'GPU 1'),
    (1, 'cuda', 1, {'GPUS_PER_TASK': 1, 'GPU_BIND': 'none'}, 'GPU 1'), (0, 'cuda', 0, {}, 'add --device cpu'),
    (0, 'cuda:0', 0, {}, 'add --device cpu'), (1, 'tpu', 0, {}, 'choose auto, cuda, cuda:N or cpu, or another'),
    (1, 'meta', 0, {}, 'choose'), (1, 'mps', 0, {}, 'finds no MPS device here: add --device cpu'),
    (1, 'mps:x', 0, {}, 'choose'), (1, 'xpu:1', 0, {}, 'finds no XPU device here'),
    (1, 'cuda:x', 0, {}, 'choose'), (1, 'cuda:-1', 0, {}, 'choose'), (1, 'cpu:0', 0, {}, 'choose'),
    (1, 'auto:0', 0, {}, 'choose'), (1, '', 0, {}, 'choose'), (1, 'cuda:²', 0, {}, 'choose')])
def test_devices_that_are_not_there(gpus, no_launcher, count, device, local_rank, variables, words):
    gpus(count)
    no_launcher.setenv('LOCAL_RANK', str(local_rank))
    slurm(no_launcher, **variables)
    fails(lambda: utils.device_of_rank(device), words)


def test_other_accelerators_that_torch_has(gpus, no_launcher):
    gpus(0)
    chosen = []
    xpu = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, set_device=chosen.append)
    mps = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
    modules = {'xpu': xpu, 'mps': mps, 'cuda': torch.cuda}
    no_launcher.setattr(torch, 'get_device_module', lambda device: modules[device.type])
    assert utils.device_of_rank('mps') == torch.device('mps', 0)
    assert utils.device_of_rank('xpu:1') == torch.device('xpu', 1)
    assert utils.device_of_rank('auto') == utils.CPU  # not for what no test here has run on
    no_launcher.setenv('LOCAL_RANK', '1')
    assert utils.device_of_rank('xpu') == torch.device('xpu', 1) and chosen == [1, 1]
    fails(lambda: utils.device_of_rank('mps'), 'GPU 1 is asked for .* there are 1')
    no_launcher.setenv('WORLD_SIZE', '2')
    no_launcher.setenv('LOCAL_RANK', '0')
    fails(lambda: utils.init_distributed('mps'), '--device mps: torch.distributed has no backend for several processes')


def test_without_a_gpu_auto_is_the_cpu(gpus):
    gpus(0)
    assert utils.device_of_rank('auto') == utils.device_of_rank('cpu') == torch.device('cpu')
    gpus(2)
    assert utils.device_of_rank('cpu') == torch.device('cpu')


@pytest.mark.parametrize('here, variables, expected', [
    (64, {}, 64), (64, {'LOCAL_WORLD_SIZE': 8}, 8), (4, {'LOCAL_WORLD_SIZE': 8}, 1),
    (64, {'SLURM_CPUS_PER_TASK': 8}, 8), (4, {'SLURM_CPUS_PER_TASK': 8}, 4),
    (64, {'SLURM_CPUS_PER_TASK': 8, 'LOCAL_WORLD_SIZE': 4}, 16),  # torchrun in one task
    # srun without --cpus-per-task: not bound to cores, each of 8 tasks sees all; bound, only its own
    (64, {'SLURM_STEP_NUM_TASKS': 16, 'SLURM_CPUS_ON_NODE': 64, 'SLURM_STEP_TASKS_PER_NODE': '8(x2)'}, 8),
    (8, {'SLURM_STEP_NUM_TASKS': 16, 'SLURM_CPUS_ON_NODE': 64, 'SLURM_STEP_TASKS_PER_NODE': '8(x2)'}, 8),
    (64, {'SLURM_STEP_NUM_TASKS': 20, 'SLURM_CPUS_ON_NODE': 64, 'SLURM_STEP_TASKS_PER_NODE': '8(x2),4',
          'SLURM_NODEID': 2}, 16),
    (64, {'SLURM_STEP_NUM_TASKS': 1, 'SLURM_CPUS_ON_NODE': 64, 'SLURM_STEP_TASKS_PER_NODE': '1'}, 64),
    (64, {'SLURM_CPUS_ON_NODE': 64, 'SLURM_TASKS_PER_NODE': '8'}, 64)])  # python in a batch script: one process
def test_cores_of_a_process(no_launcher, here, variables, expected):
    no_launcher.setattr(os, 'sched_getaffinity', lambda _: set(range(here)))
    for name, value in variables.items():
        no_launcher.setenv(name, str(value))
    assert utils.cores() == expected


# ---------------------------------------------------------------- ranks

def test_alone(no_launcher):
    assert (utils.rank(), utils.world_size(), utils.local_rank(), utils.is_main()) == (0, 1, 0, True)
    utils.barrier()
    utils.check_same_on_all_ranks({'a': 1})
    assert utils.on_main(lambda a, b: a + b, 1, 2) == 3
    fails(lambda: utils.on_main(raises, 'no'), '^no$')
    with utils.one_first(True):
        pass
    assert utils.init_distributed('cpu') == torch.device('cpu')


def raises(message):
    raise InputError(message)


def test_a_world_without_ranks(no_launcher):
    no_launcher.setenv('WORLD_SIZE', '2')
    fails(lambda: utils.init_distributed('cpu'), 'WORLD_SIZE is 2 but RANK is not set')
    no_launcher.setenv('RANK', '1')
    fails(lambda: utils.init_distributed('cpu'), 'at env://', 'MASTER_ADDR')
    no_launcher.setenv('MASTER_ADDR', '127.0.0.1')
    no_launcher.setenv('MASTER_PORT', str(free_port()))
    fails(lambda: utils.init_distributed('cpu', minutes=0.02), 'did not find each other at env://', '0.02 minutes')


RANKS = """
import json, os, sys, time, traceback
import utils
from utils import InputError

def refuse(text):
    raise InputError(text)

def outcome(function, *args):
    try:
        return function(*args)
    except InputError as error:
        return f'refused: {error}'

def together():
    rank = utils.rank()
    order = []
    with utils.one_first(rank == 1):
        with open('order', 'a') as file:
            file.write(str(rank))
    utils.barrier()
    found = {'rank': rank, 'size': utils.world_size(), 'main': utils.is_main()}
    found['order'] = open('order').read()
    found['answer'] = outcome(utils.on_main, lambda x: [x, utils.rank()], rank)
    found['error'] = outcome(utils.on_main, lambda: refuse(f'rank {utils.rank()} cannot read it'))
    found['same'] = outcome(utils.check_same_on_all_ranks, {'epoch': 3, 'data': (5, 'x')})
    found['value'] = outcome(utils.check_same_on_all_ranks, {'epoch': 3, 'step': 7 + rank})
    found['missing'] = outcome(utils.check_same_on_all_ranks, {'epoch': 3} if rank else {'epoch': 3, 'ema': True})
    found['more'] = outcome(utils.check_same_on_all_ranks, {'ema': True} if rank else {})
    utils.print0(json.dumps(found))
    if rank:
        print(json.dumps(found), flush=True)

def met_by(ranks, wait):
    if utils.rank() in ranks:
        time.sleep(0.3)
        refuse('a.txt: bad')
    wait()

WAITS = {'barrier': utils.barrier, 'on_main': lambda: utils.on_main(int), 'none': lambda: time.sleep(5)}

def main(args):
    utils.init_distributed('cpu', minutes=1)
    utils.barrier()
    scenario = args
    if scenario == ['together']:
        together()
    else:
        met_by([int(digit) for digit in scenario[0]], WAITS[scenario[1]])
    return 0

def child(scenario, rank, port, folder):
    os.chdir(folder)
    out = os.open(f'{folder}/{rank}.out', os.O_WRONLY | os.O_CREAT)
    err = os.open(f'{folder}/{rank}.err', os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1), os.dup2(err, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    code = 1
    try:
        utils.run(main, lambda: scenario)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

children = []
for place, (port, *scenario) in enumerate(json.loads(sys.argv[1])):
    folder = f'{sys.argv[2]}/{place}'
    os.mkdir(folder)
    for rank in range(2):
        pid = os.fork()
        if not pid:
            child(scenario, rank, port, folder)
        children.append(pid)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]))
"""
SCENARIOS = [['together'], ['1', 'barrier'], ['1', 'on_main'], ['0', 'barrier'], ['0', 'on_main'], ['01', 'barrier'],
             ['1', 'none']]


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """Two real processes for each scenario, forked from one that has imported torch; all scenarios at once."""
    ports = [[str(free_port()), *scenario] for scenario in SCENARIOS]
    done = run_python(RANKS, json.dumps(ports), tmp_path)
    assert done.returncode == 0, done.stderr
    codes = np.reshape(json.loads(done.stdout), (-1, 2)).tolist()
    out, err = ([[(tmp_path / str(place) / f'{rank}.{kind}').read_text() for rank in range(2)]
                 for place in range(len(SCENARIOS))] for kind in ('out', 'err'))

    assert codes[0] == [0, 0], err[0]
    first, second = map(json.loads, out[0])
    assert (first.pop('rank'), second.pop('rank'), first.pop('main'), second.pop('main')) == (0, 1, True, False)
    assert first == second == {
        'size': 2, 'order': '10', 'answer': [0, 0], 'error': 'refused: rank 0 cannot read it', 'same': None,
        'value': first['value'], 'missing': first['missing'], 'more': first['more']}
    assert 'refused: the ranks are not of one run: step is 7 on rank 0 and 8 on rank 1' in first['value']
    assert 'ema is True on rank 0 and None on rank 1' in first['missing']
    assert 'ema is None on rank 0 and True on rank 1' in first['more']

    for place, (ranks, wait) in enumerate(SCENARIOS[1:], 1):
        assert ''.join(err[place]) == 'error: a.txt: bad\n', (ranks, wait, err[place])  # once, and nothing else
        assert codes[place] == ([0, 2] if wait == 'none' else [2, 2]), (ranks, wait)
        assert out[place] == ['', '']


# ---------------------------------------------------------------- printing

PRINTS = """
import sys
from types import SimpleNamespace
import utils
def main(args):
    for number in range(2000):
        utils.print0('line', number)
    open(args, 'w').write('to the end')
utils.run(main, lambda: sys.argv[1])
"""


@pytest.mark.slow
def test_a_closed_standard_output_does_not_stop_a_program(tmp_path):
    """Closed from the start (a daemon), standard input and error too; a pipe that breaks midway."""
    endings = ['"$@" >&- 2>&- <&-', 'set -o pipefail; "$@" | head -1']
    started = []
    for number, ending in enumerate(endings):
        line = ['bash', '-c', ending, '_', sys.executable, '-c', PRINTS, str(tmp_path / str(number))]
        started.append(subprocess.Popen(line, env=clean_environment(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE))
    for number, process in enumerate(started):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, b''), (endings[number], err)
        assert out == (b'line 0\n' if 'head' in endings[number] else b'')
        assert (tmp_path / str(number)).read_text() == 'to the end'


def test_output_that_is_closed_gets_no_number_that_libraries_print_to(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', None)
    monkeypatch.setattr(sys, 'stderr', None)
    utils.keep_standard_output()
    assert min(sys.stdout.fileno(), sys.stderr.fileno()) > 2
    print('dropped', '\udce9')
    utils.print0('dropped')
    sys.stdout.close(), sys.stderr.close()
    utils.print0('dropped too')


def test_any_name_can_be_printed(monkeypatch, capsys):
    utils.print0('caf\udce9', 1, 'ü')
    assert capsys.readouterr().out == 'caf\\udce9 1 ü\n'
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, encoding='ascii'))
    utils.print0('café')
    utils.print0('and what follows')
    assert raw.getvalue() == b'caf\\xe9\nand what follows\n'


SPEAKS = """
import os, sys
import utils
from flags import Parser
def parse_args():
    parser = Parser('Größe')
    parser.add_argument('--größe', help='in Å')
    return parser.parse_args()
def main(args):
    print('größer → 日本', os.fsdecode(b'caf\\xe9'))
    utils.print0('größer → 日本')
    raise utils.InputError('größer → 日本: zu groß')
utils.run(main, parse_args)
"""


@pytest.mark.slow
@pytest.mark.parametrize('variables', [
    {'PYTHONIOENCODING': 'ascii'}, {'PYTHONIOENCODING': 'ascii:strict'}, {'PYTHONIOENCODING': 'latin-1'},
    {'PYTHONIOENCODING': 'utf-8'}, {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}, {'LC_ALL': 'C'}],
    ids=str)
def test_an_output_that_is_not_utf8_gets_all_text(variables, tmp_path):
    """Also from print, from --help, and as an error."""
    (tmp_path / 'speaks.py').write_text(SPEAKS, encoding='utf-8')
    for words, code in (([], 2), (['--help'], 0)):
        done = subprocess.run([sys.executable, tmp_path / 'speaks.py', *words], capture_output=True, timeout=300,
                              env=clean_environment(PYTHONPATH=str(ROOT), **variables))
        assert done.returncode == code and b'Traceback' not in done.stderr, done.stderr
        if words:
            assert done.stdout.startswith(b'usage: ') and b'help' in done.stdout
        else:
            assert len(done.stdout.splitlines()) == 2 and done.stderr.startswith(b'error: gr')


def test_a_broken_pipe_is_met_once_and_then_all_is_dropped(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, 'w') as broken:
        monkeypatch.setattr(sys, 'stdout', broken)
        utils.print0('x' * 100_000)
        print('by another way', flush=True)
        utils.print0('x')


def test_a_full_standard_output_is_met_once_and_then_all_is_dropped(monkeypatch):
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr(sys, 'stdout', full)
        utils.print0('x')
        print('by another way', flush=True)
        utils.print0('x')


# ---------------------------------------------------------------- seeds

def draws(*numbers):
    generator = torch.Generator()
    utils.seed_step(*numbers, generator)
    return np.random.rand(), torch.rand(1).item(), torch.rand(1, generator=generator).item()


def test_attention_on_the_cpu_in_half_precision_is_products_and_a_softmax():
    """torch's fused one is slower there."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 16, 8, generator=generator) for _ in range(3))
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(q, k, v)
    fused = {}
    for amp in ('off', 'bf16'):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, \
                utils.autocast(utils.CPU, amp):
            found = attention(q, k, v)
        assert found.dtype == (torch.bfloat16 if amp == 'bf16' else torch.float32)
        torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
        fused[amp] = any('flash' in event.key for event in profile.key_averages())
    assert fused == {'off': True, 'bf16': False}
    with pytest.raises(InputError), utils.autocast(utils.CPU, 'bf16'):
        assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        raise InputError('a')  # the switch is of all the process
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


def test_the_randomness_of_a_step_is_a_function_of_its_numbers():
    assert draws(0, 1, 2, 3) == draws(0, 1, 2, 3)
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2 ** 63 - 1, 0, 0, 0)]
    drawn = [value for numbers in places for value in draws(*numbers)]
    assert len(set(drawn)) == len(drawn)
