"""The recipe against golden files, and the program as a user runs it."""
import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

import engine
import main_seit
import utils
from conftest import ROOT
from test_models_seit import fill_golden
from token_dataset import write_tokens
from utils import InputError, free_port

SMALL = ['--device', 'cpu', '--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2',
         '--batch-size', '8', '--input-size', '64', '--swap-token-scale', '0.25']


# ---------------------------------------------------------------- golden recipe

@pytest.mark.parametrize('name, flags', [
    ('default_300ep_8x128', ['--lr', str(7.5e-4 * 8 * 128 / 512)]),
    ('default_300ep_1x64', ['--lr', str(7.5e-4 * 64 / 512)]),
    ('short_20ep_1x256', ['--lr', str(7.5e-4 * 256 / 512), '--epochs', '20'])])
def test_schedule_is_the_published_one(name, flags, golden):
    args = main_seit.parse_args(flags)
    assert args.lr == golden('lr_schedule.json')[name]['base_lr']
    optimizer = main_seit.make_optimizer(args, torch.nn.Linear(2, 2))
    scheduler = main_seit.make_scheduler(args, optimizer)
    rates = []
    for epoch in range(args.epochs):
        scheduler.step(max(epoch - 1, 0))
        rates.append(optimizer.param_groups[0]['lr'])
    np.testing.assert_allclose(rates, golden('lr_schedule.json')[name]['lr_by_epoch'], atol=1e-12, rtol=0)


def test_parameter_groups_are_the_published_ones(golden):
    model = timm.create_model('deit_small_token_32')
    optimizer = main_seit.make_optimizer(main_seit.parse_args([]), model)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults['eps'] == 1e-8
    names = {id(p): n for n, p in model.named_parameters()}
    found = [{'weight_decay': g['weight_decay'], 'names': sorted(names[id(p)] for p in g['params'])}
             for g in optimizer.param_groups]
    assert found == golden('param_groups.json')


def test_four_training_steps_are_the_published_ones(golden):
    z = golden('train_steps.npz')
    model = fill_golden(timm.create_model('deit_small_token_32', num_classes=10))
    args = main_seit.parse_args(['--lr', '1e-3', '--device', 'cpu', '--amp', 'off'])
    x = torch.from_numpy(np.random.default_rng(99).standard_normal((4, 4, 32, 28, 28)).astype(np.float32))
    targets = torch.from_numpy(z['targets'])
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = main_seit.make_optimizer(args, model)
    losses = []
    criterion = SoftTargetCrossEntropy()
    criterion.register_forward_hook(lambda module, inputs, loss: losses.append(loss.item()))
    engine.train_one_epoch(model, ema, optimizer, engine.make_scaler(torch.device('cpu'), 'off'), criterion,
                           zip(x, targets), 4, lambda codes, generator: codes, None, torch.Generator(), 0, args,
                           torch.device('cpu'))
    np.testing.assert_allclose(losses, z['losses'], atol=1e-4)
    with torch.no_grad():
        np.testing.assert_allclose(model.eval()(x[0]).numpy(), z['logits_after'], atol=1e-3)
        np.testing.assert_allclose(ema.module(x[0]).numpy(), z['ema_logits_after'], atol=1e-3)


def test_published_defaults():
    args = main_seit.parse_args([])
    expected = {
        'batch_size': 64, 'epochs': 300, 'model': 'deit_base_token_32', 'input_size': 224, 'token_patch_size': 8,
        'drop': 0, 'drop_path': 0.1, 'model_ema': True, 'model_ema_decay': 0.99996, 'model_ema_force_cpu': False,
        'opt': 'adamw', 'opt_eps': 1e-8, 'opt_betas': None, 'clip_grad': None, 'momentum': 0.9, 'weight_decay': 0.1,
        'sched': 'cosine', 'lr': 7.5e-4, 'lr_noise': None, 'lr_noise_pct': 0.67, 'lr_noise_std': 1.0,
        'warmup_lr': 1e-6, 'min_lr': 1e-5, 'decay_epochs': 30, 'warmup_epochs': 5, 'decay_rate': 0.1,
        'smoothing': 0.1, 'src': False, 'token_noise_prob': 0.5, 'token_noise_scale': 1, 'token_noise_std': 1,
        'rrc_ratio': 0.08, 'eda_rc_prob': 0.25, 'token_synonym_thres': 5, 'replace_token_prob': 0.25,
        'eda_sc_prob': 0.25, 'swap_token_scale': 0.25, 'eda_erase_prob': 0, 'mixup': 0, 'cutmix': 1,
        'cutmix_minmax': None, 'mixup_prob': 1, 'mixup_switch_prob': 0.5, 'mixup_mode': 'batch', 'finetune': '',
        'attn_only': False, 'output_dir': '', 'device': 'cuda', 'seed': 0, 'resume': '', 'start_epoch': 0,
        'eval': False, 'dist_eval': False, 'no_eval': False, 'bce_loss': False, 'unscale_lr': False, 'pin_mem': True,
        'train_token_file': 'tokens/imagenet1k-train-token.data.bin.gz',
        'val_label_file': 'tokens/imagenet1k-val-label.txt', 'codebook_path': 'tokens/codebook.ckpt'}
    assert {k: getattr(args, k) for k in expected} == expected


def test_both_spellings():
    args = main_seit.parse_args(['--output_dir', 'a_b', '--batch_size=32', '--dist-eval', '--num_workers', '4',
                                 '--no-model-ema', '--no_pin_mem', '--dr', '0.2'])
    assert (args.output_dir, args.batch_size, args.num_workers, args.model_ema, args.pin_mem, args.decay_rate) == \
        ('a_b', 32, '4', False, False, 0.2)


# ---------------------------------------------------------------- the program

def make_data(folder, n=24, grid=10, codes=30, classes=4, width=32, seed=0):
    """Token sets in which the class shows: images of class c hold mostly codes c, c + classes, ..."""
    rng = np.random.default_rng(seed)
    for split, count in (('train', n), ('val', 11)):
        y = rng.integers(0, classes, count)
        y[:classes] = range(classes)
        x = y[:, None] + classes * rng.integers(0, codes // classes, (count, grid * grid))
        write_tokens(folder / f'{split}-token.data.bin.gz', folder / f'{split}-label.txt', x, y)
    torch.save(torch.from_numpy(rng.standard_normal((codes, width)).astype(np.float32)), folder / 'codebook.ckpt')
    (folder / 'synonyms.json').write_text(json.dumps({c: [(c + i) % codes for i in range(1, 6)] for c in range(codes)}))
    return ['--codebook-path', folder / 'codebook.ckpt', '--token-synonym-dict', folder / 'synonyms.json',
            '--train-token-file', folder / 'train-token.data.bin.gz', '--train-label-file', folder / 'train-label.txt',
            '--val-token-file', folder / 'val-token.data.bin.gz', '--val-label-file', folder / 'val-label.txt']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def seit(*words, launch=(), fails=False):
    """Run main_seit.py; returns its output, or with `fails` its one error line."""
    command = [sys.executable, *launch, str(ROOT / 'main_seit.py'), *map(str, words)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        env.pop(name, None)
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500, cwd=os.path.expanduser('~'))
    if not fails:
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    assert done.returncode == 2, done.stdout + done.stderr
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith('error: '), done.stderr
    return errors[0]


def run_here(*words):
    """main_seit.py in this process: fast, for what needs no process of its own."""
    main_seit.main(main_seit.parse_args([str(w) for w in words]))


def two_processes():
    return '-m', 'torch.distributed.launch', '--nproc_per_node=2', f'--master_port={free_port()}', '--use_env'


def read_log(folder):
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]


def without_times(lines):
    return [{k: v for k, v in line.items() if 'time' not in k} for line in lines]


def accuracy_lines(output):
    return [line for line in output.splitlines() if line.startswith('* Acc@1')]


def test_published_command_with_two_processes(tmp_path):
    data = make_data(tmp_path, n=10, grid=32, codes=391)
    out = tmp_path / 'out'
    output = seit('--model', 'deit_small_token_32', *data, '--output_dir', out, '--batch-size', 4, '--dist-eval',
                  '--device', 'cpu', '--epochs', 1, launch=two_processes())
    assert {p.name for p in out.iterdir()} >= {'checkpoint.pth', 'best_checkpoint.pth', 'log.txt'}
    line, = read_log(out)
    assert line.keys() >= {'train_loss', 'train_lr', 'test_loss', 'test_acc1', 'test_acc5', 'epoch', 'n_parameters'}
    assert 'batch: 4 x 2 = 8, 1 steps an epoch' in output
    # 11 validation images do not divide by 2: each still counts once, so one process finds the same
    model, ema = accuracy_lines(output)
    assert ema.endswith('(EMA)') and not model.endswith(')')
    alone = seit('--model', 'deit_small_token_32', *data, '--device', 'cpu', '--eval', '--resume',
                 out / 'checkpoint.pth')
    assert accuracy_lines(alone) == [model, ema]
    assert float(model.split()[2]) == pytest.approx(line['test_acc1'], abs=1e-3)


def states(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_resumed_equals_uninterrupted(data, tmp_path):
    flags = [*SMALL, *data, '--epochs', 2, '--drop-path', 0.3, '--warmup-epochs', 0]
    seit(*flags, '--output_dir', tmp_path / 'whole')
    # the first epoch of two, as a run that is cut off leaves it: its checkpoint, and a log line too many
    probe = 'import main_seit, sys; main_seit.train_one_epoch_ = main_seit.train_one_epoch\n' \
        'def stop(*a):\n    if a[10] == 1: sys.exit(0)\n    return main_seit.train_one_epoch_(*a)\n' \
        'main_seit.train_one_epoch = stop; main_seit.main(main_seit.parse_args())'
    subprocess.run([sys.executable, '-c', probe, *map(str, flags), '--output_dir', tmp_path / 'cut'], check=True,
                   cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True)
    assert len(read_log(tmp_path / 'cut')) == 1
    with open(tmp_path / 'cut' / 'log.txt', 'a') as file:
        file.write('{"epoch": 1, "train_loss": 9}\n{"epo')
    output = seit(*flags, '--output_dir', tmp_path / 'cut', '--resume', 'auto')
    assert 'continuing at epoch 1' in output
    whole, cut = (without_times(read_log(tmp_path / name)) for name in ('whole', 'cut'))
    assert whole == cut and len(whole) == 2
    for file in ('checkpoint.pth', 'best_checkpoint.pth', 'best_ema_checkpoint.pth'):
        a, b = (states(tmp_path / name / file) for name in ('whole', 'cut'))
        for state in (a, b):
            del state['args']
        assert_same(a, b)


def test_resume_keeps_the_best_accuracy(data, tmp_path):
    flags = [*SMALL, *data, '--epochs', 1, '--output-dir', tmp_path]
    run_here(*flags)
    state = states(tmp_path / 'checkpoint.pth')
    state['best_acc1'] = 99.
    torch.save(state, tmp_path / 'checkpoint.pth')
    best = (tmp_path / 'best_checkpoint.pth').read_bytes()
    flags[flags.index('--epochs') + 1] = 2
    run_here(*flags, '--resume', tmp_path / 'checkpoint.pth')
    assert states(tmp_path / 'checkpoint.pth')['best_acc1'] == 99.
    assert (tmp_path / 'best_checkpoint.pth').read_bytes() == best


@pytest.mark.parametrize('flags', [
    ['--bce-loss', '--smoothing', '0', '--repeated-aug', '--clip-grad', '1', '--no-model-ema'],
    ['--src', '--eda-erase-prob', '0.3', '--cutmix', '0', '--sched', 'step', '--amp', 'bf16', '--accum-iter', '3'],
    ['--attn-only', '--opt', 'sgd', '--model-ema-force-cpu', '--mixup', '0.8', '--mixup-mode', 'elem',
     '--grad-checkpointing', '--tf32'],
    ['--no-eval', '--cutmix', '0', '--smoothing', '0', '--token-noise-prob', '0', '--eda-rc-prob', '0', '--eda-sc-prob',
     '0', '--nb_classes', '7', '--token-cache', 'none', '--sched', 'poly']])
def test_every_switch_runs(data, flags, capsys):
    run_here(*SMALL, *data, '--epochs', 1, *flags)
    output = capsys.readouterr().out
    assert len(accuracy_lines(output)) == 2 - ('--no-eval' in flags) * 2 - ('--no-model-ema' in flags)
    assert ('best Acc@1' in output) == ('--no-eval' not in flags)


def test_an_accuracy_of_zero_has_a_best_checkpoint_too(data, tmp_path, monkeypatch):
    def measured(*_):
        return {'test_acc1': 0., 'ema_test_acc1': 0.}
    monkeypatch.setattr(main_seit, 'evaluate_all', measured)
    run_here(*SMALL, *data, '--epochs', 1, '--output-dir', tmp_path)
    assert (tmp_path / 'best_checkpoint.pth').exists() and (tmp_path / 'best_ema_checkpoint.pth').exists()


def test_slurm_step(data, tmp_path):
    """Two processes with the variables srun sets, and no launcher."""
    port = free_port()
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_JOB_ID': str(port - 10000),
           'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'}
    ranks = [subprocess.Popen([sys.executable, str(ROOT / 'main_seit.py'), *map(str, [*SMALL, *data]), '--epochs', '1'],
                              env={**env, 'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank),
                                   'MASTER_PORT': str(port)},
                              stdout=subprocess.PIPE, text=True) for rank in range(2)]
    first, second = (rank.communicate(timeout=300)[0] for rank in ranks)
    assert 'batch: 8 x 2 = 16' in first and second == ''


@pytest.mark.parametrize('nodes, first', [('node[012-015,020]', 'node012'), ('gpu-3', 'gpu-3'), ('a1,a2', 'a1')])
def test_slurm_variables(nodes, first, monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, 'x')  # so that monkeypatch restores what is set below
        monkeypatch.delenv(name)
    monkeypatch.setenv('SLURM_PROCID', '3')
    monkeypatch.setenv('SLURM_LOCALID', '1')
    monkeypatch.setenv('SLURM_NTASKS', '8')
    utils.slurm_environment()
    assert 'RANK' not in os.environ  # a batch script's plain python: one process
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '8')
    monkeypatch.setenv('SLURM_STEP_NODELIST', nodes)
    utils.slurm_environment()
    assert [os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')] == ['3', '1', '8', first]


def test_finetune_from_an_address(tmp_path):
    """A local server stands for the web."""
    model = timm.create_model('deit_tiny_token_32', depth=1)
    torch.save({'model': model.state_dict()}, tmp_path / 'w.pth')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *a: None
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        other = timm.create_model('deit_tiny_token_32', depth=1)
        main_seit.finetune(other, f'{address}/w.pth')
        assert torch.equal(other.head.weight, model.head.weight)
        with pytest.raises(InputError, match='gone.pth: cannot be fetched'):
            main_seit.finetune(other, f'{address}/gone.pth')
        server.shutdown()


def test_flags_without_effect_say_so_once(data):
    output = seit(*SMALL, *data, '--epochs', 1, '--num_workers', 4, '--use-entire-tokens', '--world_size', 1,
                  launch=two_processes())
    for flag in ('--num-workers', '--use-entire-tokens', '--world-size'):
        assert output.count(f'note: {flag} has no effect') == 1
    assert output.count('note:') == 3


def test_attn_only_trains_only_attention():
    model = timm.create_model('deit_tiny_token_32', depth=2)
    main_seit.freeze_all_but_attention(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters()
                       if '.attn.' in n or n in ('head.weight', 'head.bias', 'pos_embed')}


def test_finetune_resamples_positions_and_drops_what_differs(tmp_path, capsys):
    old = timm.create_model('deit_tiny_token_32', depth=1, num_classes=5, img_size=28)
    torch.save({'model': old.state_dict()}, tmp_path / 'old.pth')
    new = timm.create_model('deit_tiny_token_32', depth=1, num_classes=3, img_size=20)
    head = new.head.weight.clone()
    main_seit.finetune(new, str(tmp_path / 'old.pth'))
    assert torch.equal(new.head.weight, head)
    assert torch.equal(new.blocks[0].mlp.fc1.weight, old.blocks[0].mlp.fc1.weight)
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])
    grid = old.pos_embed[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    slow = torch.nn.functional.interpolate(grid, (10, 10), mode='bicubic', align_corners=False)
    torch.testing.assert_close(new.pos_embed[:, 1:], slow.flatten(2).transpose(1, 2))
    torch.save({'model': {k: v for k, v in old.state_dict().items() if 'head' not in k}}, tmp_path / 'headless.pth')
    main_seit.finetune(old, str(tmp_path / 'headless.pth'))
    assert '--finetune: head.weight starts anew (in the file: none)' in capsys.readouterr().out
    other = timm.create_model('deit_tiny_token_32', depth=2)
    with pytest.raises(InputError, match='blocks.1.norm1.weight: missing'):
        main_seit.finetune(other, str(tmp_path / 'old.pth'))


def test_published_checkpoint_with_a_namespace_evaluates(data, tmp_path, capsys):
    import argparse
    model = timm.create_model('deit_tiny_token_32', depth=1, embed_dim=32, num_heads=2, img_size=8, num_classes=4)
    torch.save({'model': model.state_dict(), 'args': argparse.Namespace(lr=1)}, tmp_path / 'trained-vit.ckpt')
    flags = [w for w in map(str, data) if '-train' not in w and 'train-' not in w]  # evaluation needs no training files
    run_here(*SMALL, *flags, '--eval', '--resume', tmp_path / 'trained-vit.ckpt')
    line, = accuracy_lines(capsys.readouterr().out)
    assert line.startswith('* Acc@1 ')


def test_tensorboard_and_plot(data, tmp_path):
    run_here(*SMALL, *data, '--epochs', 2, '--output-dir', tmp_path, '--tensorboard')
    assert list(tmp_path.glob('events.out.tfevents*'))
    done = subprocess.run([sys.executable, ROOT / 'scripts' / 'plot_log.py', tmp_path / 'log.txt', '--output',
                           tmp_path / 'plot.png'], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG'), done.stderr
    done = subprocess.run([sys.executable, ROOT / 'scripts' / 'plot_log.py', tmp_path / 'none.txt', '--output',
                           tmp_path / 'p.png'], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: ') and not (tmp_path / 'p.png').exists()


# ---------------------------------------------------------------- bad input

def test_mistakes_get_one_line_and_exit_code_2(data, tmp_path):
    base = [*SMALL, *data, '--epochs', 1]
    assert 'larger than the 10x10' in seit(*base, '--input-size', 96, fails=True)
    assert 'gone.pth' in seit(*base, '--resume', tmp_path / 'gone.pth', fails=True)


@pytest.mark.parametrize('flags, words', [
    (['--nb_classes', '3'], 'holds class 3'), (['--batch-size', '64'], 'lower --batch-size'),
    (['--model', 'resnet50'], 'none of deit'), (['--model-kwargs', 'layers=3'], '--model-kwargs'),
    (['--opt', 'nonsense'], '--opt'), (['--device', 'tpu'], 'choose cuda'), (['--swap-token-scale', '1'], 'no room'),
    (['--finetune', 'gone.pth'], 'gone.pth'), (['--model', 'deit_small_token_4'], 'reads 4'),
    (['--token-cache', '/proc/nowhere'], 'choose another folder with --token-cache')])
def test_mistakes_by_flag(data, flags, words):
    with pytest.raises(InputError, match=words):
        run_here(*SMALL, *data, '--epochs', 1, *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_cuda_without_cuda(data):
    with pytest.raises(InputError, match='add --device cpu'):
        run_here(*SMALL, *data, '--device', 'cuda')


def test_run_folders_are_not_overwritten(data, tmp_path):
    base = [*SMALL, *data, '--epochs', 1, '--output-dir', tmp_path / 'run']
    run_here(*base)
    weights = only_weights(tmp_path / 'run', tmp_path)
    before = {p: p.read_bytes() for p in (tmp_path / 'run').iterdir()}
    with pytest.raises(InputError, match='--resume auto'):
        run_here(*base)
    with pytest.raises(InputError, match='checkpoint.pth: does not fit.*blocks.1.norm1.weight: missing'):
        run_here(*base, '--model-kwargs', 'depth=2', 'embed_dim=32', 'num_heads=2', '--resume', 'auto')
    for resume in (weights, tmp_path / 'gone.pth'):  # another run's checkpoint must not replace this one's
        with pytest.raises(InputError, match='an earlier run is here'):
            run_here(*base, '--resume', resume)
    with pytest.raises(InputError, match='was written with --opt adamw, not sgd'):
        run_here(*base, '--resume', 'auto', '--opt', 'sgd')
    assert {p: p.read_bytes() for p in (tmp_path / 'run').iterdir()} == before


def test_weights_alone_do_not_resume(data, tmp_path):
    run_here(*SMALL, *data, '--epochs', 1, '--output-dir', tmp_path / 'run')
    with pytest.raises(InputError, match='--finetune'):
        run_here(*SMALL, *data, '--epochs', 1, '--resume', only_weights(tmp_path / 'run', tmp_path))


def only_weights(run, folder):
    torch.save({'model': states(run / 'checkpoint.pth')['model']}, folder / 'weights.pth')
    return folder / 'weights.pth'


@pytest.mark.parametrize('flags, words', [
    (['--bce-loss'], '--smoothing 0'), (['--batch-size', '7'], 'odd'), (['--eval'], '--resume'),
    (['--input-size', '100'], 'multiple'), (['--resume', 'auto'], '--output-dir'), (['--eda-rc-prob', '2'], 'between'),
    (['--tensorboard'], '--output-dir'), (['--epochs', '0'], '1 or more'), (['--seed', '-1'], '0 or more'),
    (['--token-patch-size', '0'], '1 or more'), (['--token-synonym-thres', '0'], '1 or more'),
    (['--start_epoch', '-1'], '0 or more'), (['--cutmix-minmax', '0.9', '0.2'], 'rising'),
    (['--drop', '2'], '--drop 2'), (['--eda-sc-prob', 'nan'], '--eda-sc-prob nan'),
    (['--dist-timeout', 'nan'], 'minutes'),
    (['--token-noise-std', '-1'], '--token-noise-std -1.0: choose a value 0 or more')])
def test_flags_that_cannot_work_together(flags, words):
    with pytest.raises(InputError, match=words):
        main_seit.parse_args(flags)


def test_model_kwargs_are_key_value_words(capsys):
    with pytest.raises(SystemExit):
        main_seit.parse_args(['--model-kwargs', 'depth=1', 'heads'])
    assert "'heads' is not of the form key=value" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    with pytest.raises(InputError, match='lower --lr'):
        run_here(*SMALL, *data, '--epochs', 1, '--unscale-lr', '--lr', '1e30', '--warmup-epochs', 0, '--opt', 'sgd',
                 '--output-dir', tmp_path)
    assert not (tmp_path / 'checkpoint.pth').exists()
