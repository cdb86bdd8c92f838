"""main_seit.py as a user runs it."""
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

import main_seit
import recipe
from benchmarks.common import free_port
from foreign_sets import codes_of, labels_of, write_jsonl, write_safetensors
from helpers import (ROOT, SMALL, Killed, accuracy_lines, before_step, clean_environment, flag_values, kill,
                     make_data, mistake, read_log, run_here, seit, states, words_of)
from image_tokenizer.vitvqgan import Size
from processes import Job, training_differs
from seitpp.token_adapt import TokenAdapt
from token_files.codebook import Codebook


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def adapt(tmp_path_factory):
    """A TokenAdapt for the codes of `data`, and flags that switch all of SeiT++'s augmentation on."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('adapt') / 'tokenadapt.ckpt'
    torch.save(TokenAdapt(30, 32, 10, 8, Size(64, 1, 1, 64)).state_dict(), path)
    return ['--tokenadapt-path', path, '--noise-recipe', 'seit++', '--token-coloradapt-prob', '0.5']


def two_processes():
    return '-m', 'torch.distributed.launch', '--nproc_per_node=2', f'--master_port={free_port()}', '--use_env'


# ---------------------------------------------------------------- flags

def test_published_defaults():
    args = main_seit.parse_args([])
    expected = {
        'batch_size': 64, 'epochs': 300, 'model': 'deit_base_token_32', 'input_size': 224, 'token_patch_size': 8,
        'drop': 0, 'drop_path': 0.1, 'model_ema': True, 'model_ema_decay': 0.99996, 'model_ema_force_cpu': False,
        'opt': 'adamw', 'opt_eps': 1e-8, 'opt_betas': None, 'clip_grad': None, 'momentum': 0.9, 'weight_decay': 0.1,
        'sched': 'cosine', 'lr': 7.5e-4, 'lr_noise': None, 'lr_noise_pct': 0.67, 'lr_noise_std': 1.0,
        'warmup_lr': 1e-6, 'min_lr': 1e-5, 'decay_epochs': 30, 'warmup_epochs': 5, 'decay_rate': 0.1,
        'smoothing': 0.1, 'src': False, 'token_noise_prob': 0.5, 'token_noise_scale': 1, 'token_noise_std': 1,
        'token_coloradapt_prob': 0, 'noise_recipe': 'v0.0', 'tokenadapt_path': '',
        'rrc_ratio': 0.08, 'eda_rc_prob': 0.25, 'token_synonym_thres': 5, 'replace_token_prob': 0.25,
        'eda_sc_prob': 0.25, 'swap_token_scale': 0.25, 'eda_erase_prob': 0, 'mixup': 0, 'cutmix': 1,
        'cutmix_minmax': None, 'mixup_prob': 1, 'mixup_switch_prob': 0.5, 'mixup_mode': 'batch', 'finetune': '',
        'attn_only': False, 'output_dir': '', 'device': 'auto', 'seed': 0, 'resume': '', 'start_epoch': 0,
        'eval': False, 'dist_eval': False, 'no_eval': False, 'bce_loss': False, 'unscale_lr': False, 'pin_mem': True,
        'train_token_file': 'tokens/imagenet1k-train-token.data.bin.gz',
        'val_label_file': 'tokens/imagenet1k-val-label.txt', 'codebook_path': 'tokens/codebook.ckpt',
        'token_synonym_dict': 'tokens/synonyms.json', 'views': None, 'val_share': 0}
    assert {k: getattr(args, k) for k in expected} == expected
    # none of them is replaced for a set of ours, but for synonyms that are not there
    args = recipe.files_by_default(args, Codebook(torch.zeros(2, 2), True))
    assert {k: getattr(args, k) for k in expected} == {**expected, 'token_synonym_dict': ''}


def test_both_spellings():
    args = main_seit.parse_args(['--output_dir', 'a_b', '--batch_size=32', '--dist-eval', '--num_workers', '4',
                                 '--no-model-ema', '--no_pin_mem', '--dr', '0.2'])
    assert (args.output_dir, args.batch_size, args.num_workers, args.model_ema, args.pin_mem, args.decay_rate) == \
        ('a_b', 32, '4', False, False, 0.2)


@pytest.mark.parametrize('flags, words', [
    (['--input-size', '100'], 'multiple'), (['--input-size', '8'], '--input-size 8: give twice'),
    (['--eda-rc-prob', '0.6', '--eda-sc-prob', '0.5'], 'add up to more than 1'), (['--epoch', '3'], '--epoch'),
    (['--model-kwargs', 'depth=1', 'heads'], "'heads' is not of the form key=value"), (['--lr'], '--lr'),
    (['--cutmix-minmax', '0.9', '0.2'], 'rising'), (['--cutmix-minmax', '0.30', '0.32'], 'whole codes')])
def test_flags_that_cannot_be(flags, words):
    line = mistake(*flags)
    assert words in line


# ---------------------------------------------------------------- the program

@pytest.mark.slow
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
    words = ['--model', 'deit_small_token_32', *data, '--device', 'cpu', '--eval', '--resume', out / 'checkpoint.pth']
    assert Job('main_seit', words, output=tmp_path / 'alone').wait() == [0]
    assert accuracy_lines((tmp_path / 'alone').read_text()) == [model, ema]
    assert float(model.split()[2]) == pytest.approx(line['test_acc1'], abs=1e-3)


def test_killed_and_resumed_equals_uninterrupted_with_all_of_seitpps_augmentation(data, adapt, tmp_path, monkeypatch):
    flags = [*SMALL, *data, '--epochs', 2, '--warmup-epochs', 0, '--save-every', 1, '--drop-path', 0.3, '--output-dir']
    run_here(*flags, tmp_path / 'whole', *adapt)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 1, 2, kill)
        run_here(*flags, tmp_path / 'cut', *adapt)
    assert states(tmp_path / 'cut' / 'checkpoint.pth')['step'] == 2
    run_here(*flags, tmp_path / 'cut', *adapt, '--resume', 'auto')
    assert not training_differs(tmp_path / 'whole', tmp_path / 'cut')
    run_here(*flags, tmp_path / 'plain')
    assert read_log(tmp_path / 'plain')[1]['train_loss'] != read_log(tmp_path / 'whole')[1]['train_loss']


def test_every_switch_runs_with_tokenadapt(data, adapt, capsys):
    for flags in (['--src', '--cutmix', 0, '--amp', 'bf16', '--eda-erase-prob', '0.3'],
                  ['--bce-loss', '--smoothing', '0', '--noise-recipe', 'v0.0']):
        run_here(*SMALL, *data, '--epochs', 1, '--no-eval', *adapt, *flags)


@pytest.mark.parametrize('flags', [
    ['--bce-loss', '--smoothing', '0', '--repeated-aug', '--clip-grad', '1', '--no-model-ema'],
    ['--src', '--eda-erase-prob', '0.3', '--cutmix', '0', '--sched', 'step', '--amp', 'bf16', '--accum-iter', '3'],
    ['--attn-only', '--opt', 'sgd', '--model-ema-force-cpu', '--mixup', '0.8', '--mixup-mode', 'elem',
     '--grad-checkpointing', '--amp', 'bf16', '--tf32'],
    ['--no-eval', '--cutmix', '0', '--smoothing', '0', '--token-noise-prob', '0', '--eda-rc-prob', '0', '--eda-sc-prob',
     '0', '--nb_classes', '7', '--token-cache', 'none', '--sched', 'poly']])
def test_every_switch_runs(data, flags, capsys):
    run_here(*SMALL, *data, '--epochs', 1, *flags)
    output = capsys.readouterr().out
    assert len(accuracy_lines(output)) == 2 - ('--no-eval' in flags) * 2 - ('--no-model-ema' in flags)
    assert ('best Acc@1' in output) == ('--no-eval' not in flags)


@pytest.mark.slow
def test_slurm_step(data, tmp_path):
    """Two processes with the variables srun sets, and no launcher."""
    port = free_port()
    env = {**clean_environment(), 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_JOB_ID': str(port - 10000),
           'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'}
    ranks = [subprocess.Popen([sys.executable, str(ROOT / 'main_seit.py'), *map(str, [*SMALL, *data]), '--epochs', '1'],
                              env={**env, 'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank),
                                   'MASTER_PORT': str(port)},
                              stdout=subprocess.PIPE, text=True) for rank in range(2)]
    first, second = (rank.communicate(timeout=300)[0] for rank in ranks)
    assert 'batch: 8 x 2 = 16' in first and second == ''


# ---------------------------------------------------------------- bad input

@pytest.mark.slow
def test_a_mistake_gets_one_line_and_exit_code_2(data, tmp_path):
    assert 'gone.pth' in seit(*SMALL, *data, '--epochs', 1, '--resume', tmp_path / 'gone.pth', fails=True)


@pytest.mark.parametrize('flags, words', [
    (['--nb_classes', '3'], 'holds class 3'), (['--batch-size', '64'], '--batch-size 64 x --accum-iter 1'),
    (['--input-size', '96'], 'larger than the 10x10'),
    (['--model', 'nonsense'], 'none of deit'), (['--model-kwargs', 'layers=3'], '--model-kwargs'),
    (['--opt', 'nonsense'], '--opt'), (['--device', 'tpu'], 'choose auto, cuda'),
    (['--swap-token-scale', '1'], 'no room'), (['--finetune', 'gone.pth'], 'gone.pth'),
    (['--model', 'deit_small_token_4'], 'reads 4'),
    (['--token-cache', '/proc/nowhere'], 'choose another folder with --token-cache')])
def test_mistakes_by_flag(data, flags, words):
    assert words in mistake(*SMALL, *data, '--epochs', 1, *flags)


@pytest.mark.parametrize('size', ['16', '224'])
def test_a_grid_of_one_code_is_told_no_smaller_input(size, tmp_path):
    words = make_data(tmp_path, grid=1)
    message = mistake(*SMALL, *words, '--epochs', 1, '--input-size', size)
    assert message.startswith(f'{tmp_path / "train-token.data.bin.gz"}: a token grid of 1x1 codes is too small')


@pytest.mark.parametrize('flags, words', [
    (['--tokenadapt-path', 'gone.ckpt'], 'gone.ckpt: cannot read TokenAdapt weights'),
    (['--batch-size', '6'], '--batch-size 6: each half is mixed with its mirror image: give a multiple of 4'),
    (['--batch-size', '7', '--cutmix', '0'], '--batch-size 7: half of it goes through TokenAdapt: give a multiple'),
    (['--token-noise-prob', '0.75'], 'add up to more than 1')])
def test_mistakes_by_flag_of_seitpp(data, adapt, flags, words):
    assert words in mistake(*SMALL, *data, '--epochs', 1, *adapt, *flags)


def test_a_tokenadapt_of_another_codebook_is_refused(data, adapt, tmp_path):
    other = make_data(tmp_path, codes=29)
    assert 'is for a codebook of 30 x 32, not of 29 x 32' in mistake(*SMALL, *other, '--epochs', 1, *adapt)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_without_cuda_auto_is_the_cpu_and_cuda_is_refused(data, capsys):
    assert 'add --device cpu' in mistake(*SMALL, *data, '--device', 'cuda')
    run_here(*SMALL[2:], *data, '--epochs', 1, '--no-eval')
    assert 'device: 1 x CPU' in capsys.readouterr().out


# ---------------------------------------------------------------- ranks that do not have the same data

def two_ranks(words, output, second=()):
    """Exit codes of two processes, the second with more words; they print to `output`."""
    return Job('main_seit', [*SMALL, '--epochs', 1, '--no-eval', '--dist-timeout', 1, *words], 2, output,
               [(), second]).wait(120)


@pytest.mark.slow
@pytest.mark.parametrize('flags, what', [
    (['--train-token-file', '--train-label-file'], 'training images is 32 on rank 0 and 24 on rank 1'),
    (['--train-token-file'], 'training tokens is '), (['--train-label-file'], 'training labels is '),
    (['--codebook-path'], 'codebook is '), (['--token-synonym-dict'], 'synonyms is '),
    (['--finetune'], 'content of --finetune is ')])
def test_ranks_with_other_data_end_with_one_line(flags, what, data, tmp_path):
    """Of the second rank some files are others, of the same sizes: a stale copy on its node."""
    other = flag_values(make_data(tmp_path / 'other', n=32 if len(flags) == 2 else 24, seed=1, shift=2))
    own = flag_values(data)
    if flags == ['--finetune']:
        for name, values in (('own', own), ('other', other)):
            model = timm.create_model('deit_tiny_token_32', depth=1, embed_dim=32, num_heads=2, num_classes=4,
                                      img_size=8)
            torch.save({'model': model.state_dict()}, tmp_path / f'{name}.pth')
            values['--finetune'] = tmp_path / f'{name}.pth'
    second = own | {flag: other[flag] for flag in flags}
    assert two_ranks(words_of(second), tmp_path / 'out', words_of(own)) == [2, 2]
    line, = [line for line in (tmp_path / 'out').read_text().splitlines() if line.startswith('error: ')]
    assert what in line and len(line) < 300


@pytest.mark.slow
def test_a_mistake_of_another_rank_is_printed_once(data, tmp_path):
    """A damaged label file that only rank 1 has."""
    output = tmp_path / 'out'
    (tmp_path / 'label.txt').write_text('x\n')
    codes = two_ranks(data, output, ['--train-label-file', tmp_path / 'label.txt'])
    assert codes[1] == 2 and codes[0] not in (0, None)
    assert output.read_text().count('error: ') == 1 and 'line 1 is not an integer class' in output.read_text()


# ---------------------------------------------------------------- token sets of others

def foreign_flags(folder, *words):
    """Flags of a run on an FSQ set as cosmos-imagenet stores it, of 512 codes."""
    for split, count in ('train', 24), ('val', 11):
        path = folder / f'{split}.safetensors'
        if not path.exists():
            write_safetensors(path, codes_of(count, 10, 512, seed=count).astype('i2'), labels_of(count).astype('i2'))
    return [*SMALL, '--codebook-path', 'fsq:8,8,8', '--train-token-file', folder / 'train.safetensors',
            '--val-token-file', folder / 'val.safetensors', '--token-cache', folder / 'cache', '--warmup-epochs', '0',
            *words]


def test_a_set_of_others_is_trained_on_and_evaluated(tmp_path, capsys):
    words = foreign_flags(tmp_path, '--output-dir', tmp_path / 'run')
    run_here(*words, '--epochs', '2')
    out = capsys.readouterr().out
    assert 'synonyms: 5 for each code are made from fsq:8,8,8' in out and 'decoding' not in out
    assert all(f'labels: those inside {tmp_path}/{split}.safetensors\n' in out for split in ('train', 'val'))
    accuracies = [line for line in accuracy_lines(out) if 'EMA' not in line]
    best = max(accuracies, key=lambda line: float(line.split()[2]))
    run_here('--device', 'cpu', '--val-token-file', tmp_path / 'val.safetensors', '--token-cache', tmp_path / 'cache',
             '--eval', '--resume', tmp_path / 'run/best_checkpoint.pth')
    assert best.split('loss')[0] in capsys.readouterr().out
    saved = read_args(tmp_path / 'run')
    assert (saved['train_label_file'], saved['val_label_file'], saved['token_synonym_dict']) == ('', '', '')
    assert [file.suffix for file in (tmp_path / 'cache').iterdir()] == ['.sha256'] * 2  # mapped as they lie
    run_here(*words, '--epochs', '3', '--resume', 'auto')  # with the same files by default
    assert 'note: --train-label' not in capsys.readouterr().out


def read_args(folder):
    return json.loads((folder / 'args.json').read_text())


def lines_flags(folder, *words):
    """Flags of a run on pairs of lines, the second a mirror image, without a validation set."""
    path = folder / 'a.jsonl'
    if not path.exists():
        codes = codes_of(40, 10, 512)
        write_jsonl(path, np.stack([codes, codes[:, :, ::-1]], 1).reshape(80, 10, 10), labels_of(40).repeat(2))
    return [*SMALL, '--codebook-path', 'fsq:8,8,8', '--train-token-file', path, '--val-share', '0.1', '--warmup-epochs',
            '0', '--eda-rc-prob', '0', '--epochs', '2', *words]


@pytest.mark.parametrize('resident', [False, True])
def test_views_are_the_same_after_a_kill(tmp_path, monkeypatch, capsys, resident):
    if resident:  # as on a GPU
        monkeypatch.setattr('main_seit.choose_data_device',
                            lambda datasets, *_: [data.keep_on(torch.device('cpu')) for data in datasets.values()])
    words = lines_flags(tmp_path, '--views', '2')
    run_here(*words, '--output-dir', tmp_path / 'a')
    out = capsys.readouterr().out
    assert '4 of its 40 images are held out' in out and 'train: 36 images of 10x10 codes in 2 views' in out
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 1, 2, kill)
        run_here(*words, '--save-every', '1', '--output-dir', tmp_path / 'b')
    capsys.readouterr()
    run_here(*words, '--save-every', '1', '--output-dir', tmp_path / 'b', '--resume', 'auto')
    assert not training_differs(tmp_path / 'a', tmp_path / 'b')
    for changed, what in (['--views', '1'], 'views'), (['--val-share', '0.2'], 'val_share'):
        message = mistake(*words, *changed, '--output-dir', tmp_path / 'b', '--resume', 'auto')
        assert 'the run that wrote it differs in' in message and what in message
    capsys.readouterr()
    run_here('--device', 'cpu', '--train-token-file', tmp_path / 'a.jsonl', '--views', '2', '--val-share', '0.1',
             '--eval', '--resume', tmp_path / 'a/checkpoint.pth')
    out = capsys.readouterr().out
    assert 'val: 4 images of' in out and 'train:' not in out
    # other rows would be held out, of images that were trained on
    evaluate = ['--device', 'cpu', '--val-share', '0.1', '--eval', '--resume', tmp_path / 'a/checkpoint.pth']
    line = mistake(*evaluate, '--train-token-file', tmp_path / 'a.jsonl')
    assert 'its run had --views 2:1, and this evaluation has no --views: other images would be held out' in line
    write_jsonl(tmp_path / 'b.jsonl', codes_of(80, 10, 512), labels_of(40).repeat(2))
    line = mistake(*evaluate, '--views', '2', '--train-token-file', tmp_path / 'b.jsonl')
    assert 'held images of another --train-token-file out' in line
    # weights that start a training have seen what it holds out
    run_here(*words, '--val-share', '0.2', '--finetune', tmp_path / 'a/checkpoint.pth')
    assert 'a/checkpoint.pth: was trained on these images, and held others' in capsys.readouterr().out
    run_here(*words, '--finetune', tmp_path / 'a/checkpoint.pth')
    assert 'was trained on these images' not in capsys.readouterr().out


def test_mistakes_of_sets_of_others(tmp_path):
    words = lines_flags(tmp_path)
    assert '--val-share holds images of --train-token-file out' in mistake(*words, '--val-token-file', 'x')
    assert 'would be views of one image' in mistake(*words, '--views', '2:3')
    assert 'its 80 rows are no images of 3 views' in mistake(*words, '--views', '3')
    assert 'give a number, or two as in 2:128' in mistake(*words, '--views', '2:3:4')
    np.save(tmp_path / 'a.npy', codes_of(8, 10, 512))
    assert 'a.npy: holds no labels that are known here' in mistake(*words, '--train-token-file', tmp_path / 'a.npy')
    assert 'must hold out some' in mistake(*words, '--val-share', '0.001')
    words = [word for word in words if word not in ('--val-share', '0.1')]
    assert "the default, is of SeiT's tokens: give --val-token-file, --val-share 0.02, or --no-eval" in mistake(*words)


def test_an_evaluation_does_not_hold_out_what_was_trained_on(data, tmp_path):
    words = [*SMALL, *dict_without(data, 'val'), '--val-share', '0.4', '--epochs', 1, '--output-dir', tmp_path]
    run_here(*words)
    checkpoint = tmp_path / 'checkpoint.pth'
    run_here(*words[:-4], '--eval', '--resume', checkpoint)
    words[words.index('0.4')] = '0.5'
    assert '--val-share 0.5 would evaluate images that it was trained on' in mistake(*words[:-4], '--eval', '--resume',
                                                                                     checkpoint)


def dict_without(words, split):
    """Flags and values, without those of a split."""
    pairs = zip(words[::2], words[1::2])
    return [word for flag, value in pairs if not str(flag).startswith(f'--{split}') for word in (flag, value)]


def test_synonyms_of_a_resumed_run_are_those_it_began_with(data, tmp_path, monkeypatch):
    at = data.index('--token-synonym-dict')
    without = [*data[:at], *data[at + 2:]]
    monkeypatch.chdir(tmp_path)  # where the published file is not
    words = [*SMALL, *without, '--no-eval', '--output-dir', tmp_path / 'run', '--epochs']
    run_here(*words, 1)
    assert states(tmp_path / 'run' / 'checkpoint.pth')['data']['synonyms'] == 'made from the codebook'
    assert 'differs in synonyms' in mistake(*words, 2, '--resume', 'auto', '--token-synonym-dict', data[at + 1])
    assert run_here(*words, 2, '--resume', 'auto') == 0
