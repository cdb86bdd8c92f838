"""Fine-tuning from masked-token pre-training as a user runs it, after pre-training."""
import json

import numpy as np
import pytest
import torch

import engine
import main_mtm_finetune
import main_mtm_pretrain
from helpers import (SMALL as SEIT_SMALL, Killed, accuracy_lines, before_step, call, fails, kill, make_data, mistake,
                     read_log, run_here, states)
from token_files.codebook import load_codebook
from small_training import CountWaits
from masked import DECODER, PUBLISHED_FINETUNE, PUBLISHED_PRETRAIN, SIZES, launched, split_flags
from masked import SMALL as PRETRAIN_SMALL
from masked import token_adapt_flags
from processes import Job, training_differs
from seitpp.token_adapt import load_token_adapt

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = ['--device', 'cpu', '--model', 'deit_tiny_token_32', *SIZES, '--batch-size', 4, '--input-size', 64,
         '--warmup-epochs', 1, '--blr', 0.02]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('data')


@pytest.fixture(scope='module')
def data(folder):
    """Flags of a set of 24 training images of 10x10 codes, and 11 to validate."""
    return make_data(folder)


@pytest.fixture(scope='module')
def adapt(folder, data):
    return token_adapt_flags(folder, 30, 10, 8)


@pytest.fixture(scope='module')
def pretrained(data, adapt, tmp_path_factory):
    """A pre-trained checkpoint."""
    ours, _ = split_flags(data)
    folder = tmp_path_factory.mktemp('pretrained')
    call(main_mtm_pretrain, *PRETRAIN_SMALL, *ours, *adapt, '--epochs', 1, '--output-dir', folder)
    return folder / 'checkpoint-last.pth'


@pytest.fixture(scope='module')
def finetuned(data, adapt, pretrained, tmp_path_factory):
    """The folder of two epochs from the pre-trained checkpoint, and their flags."""
    folder = tmp_path_factory.mktemp('finetuned')
    flags = [*data, *adapt, '--epochs', 2, '--finetune', pretrained, '--drop-path', 0.3]
    finetune(*flags, '--output-dir', folder)
    return folder, flags


def finetune(*words):
    return call(main_mtm_finetune, *SMALL, *words)


# ---------------------------------------------------------------- the published commands

def published(command, flags):
    """A published command with other files and sizes in it."""
    words = command.split()
    for flag, value in zip(flags[::2], flags[1::2]):
        words[words.index(flag) + 1] = value
    return [*words, '--device', 'cpu', *SIZES]


@pytest.mark.slow
def test_the_two_published_commands_one_after_the_other(tmp_path):
    """In two processes; evaluation in one gives the same."""
    data = make_data(tmp_path, n=18, grid=32, codes=391)
    adapt = token_adapt_flags(tmp_path, 391, 32, 28)
    files = dict(zip(data[::2], data[1::2]))
    files |= {'--batch_size': 4, '--epochs': 1}
    synonyms = files.pop('--token-synonym-dict')
    training = {flag: files[flag] for flag in ('--codebook-path', '--train-token-file', '--batch_size', '--epochs')}
    words = published(PUBLISHED_PRETRAIN, [word for pair in [*training.items(), ('--accum_iter', 2), (
        '--output_dir', tmp_path / 'pretrained'), ('--tokenadapt-path', adapt[1])] for word in pair])
    output = launched('main_mtm_pretrain.py', [*words, *DECODER])
    assert 'batch: 4 x 2 x 2 = 16, 1 steps' in output and 'note: --train-label-file has no effect' in output
    line, = read_log(tmp_path / 'pretrained')
    assert line['train_loss'] == pytest.approx(np.log(391), abs=0.3)

    files |= {'--token-synonym-dict': synonyms, '--output_dir': tmp_path / 'finetuned',
              '--finetune': tmp_path / 'pretrained' / 'checkpoint-last.pth'}
    words = published(PUBLISHED_FINETUNE, [word for pair in files.items() for word in pair])
    words = [*words, '--model', 'deit_tiny_token_32', *adapt]  # its default must exist, the published command says
    output = launched('main_mtm_finetune.py', words)
    line, = read_log(tmp_path / 'finetuned')
    accuracy, = accuracy_lines(output)
    assert float(accuracy.split()[2]) == pytest.approx(line['test_acc1'], abs=1e-3)
    # 11 validation images do not divide by 2: each still counts once, so one process finds the same
    words = [*words, '--eval', '--resume', tmp_path / 'finetuned' / 'checkpoint-last.pth']
    assert Job('main_mtm_finetune', words, output=tmp_path / 'alone').wait() == [0]
    assert accuracy_lines((tmp_path / 'alone').read_text()) == [accuracy]


# ---------------------------------------------------------------- training

def test_killed_and_resumed_equals_uninterrupted(finetuned, tmp_path, monkeypatch):
    whole, flags = finetuned
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 1, 2, kill)
        finetune(*flags, '--save-every', 1, '--output-dir', tmp_path)
    assert states(tmp_path / 'checkpoint-last.pth')['step'] == 2
    finetune(*flags, '--output-dir', tmp_path, '--resume', 'auto')
    assert not training_differs(whole, tmp_path, ['checkpoint-last.pth', 'checkpoint-best.pth'])


def test_what_a_run_leaves(finetuned):
    folder, _ = finetuned
    log = read_log(folder)
    assert [line['epoch'] for line in log] == [0, 1] and log[0].keys() >= {'test_acc1', 'test_loss', 'train_lr'}
    best = max(log, key=lambda line: (line['test_acc1'], -line['epoch']))
    assert states(folder / 'checkpoint-best.pth')['epoch'] == best['epoch']
    summary = json.loads((folder / 'checkpoint-best.pth.summary.json').read_text())
    assert summary['test_acc1'] == best['test_acc1'] and summary['epoch'] == f'{best["epoch"] + 1}/2'
    assert log[0]['train_lr'] == pytest.approx(0.02 * 4 ** 0.5 / 8 * 5 / 6)  # of the head, at the last of 6 steps


def test_the_input_is_mixed_and_the_targets_follow(data, adapt):
    args = main_mtm_finetune.parse_args([str(word) for word in [*SMALL, *data, *adapt, '--batch-size', 8]])
    codebook = load_codebook(args.codebook_path)
    mixup, _ = main_mtm_finetune.recipe.make_loss(args, 4)
    token_adapt = load_token_adapt(args.tokenadapt_path, codebook)
    counter = CountWaits()
    for adapted in (token_adapt, None):
        prepare = main_mtm_finetune.make_input(args, codebook, 10, 8, adapted, mixup)
        batch = torch.randint(0, 30, (8, 10, 10)).to(torch.uint16), torch.arange(8) % 4
        with counter:
            codes, targets = prepare(*batch, torch.Generator().manual_seed(0))
        assert codes.shape == (8, 8, 8) and codes.dtype == torch.int64 and targets.shape == (8, 4)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        mirror = [3, 2, 1, 0, 7, 6, 5, 4] if adapted else [7, 6, 5, 4, 3, 2, 1, 0]
        plain = torch.nn.functional.one_hot(batch[1], 4) * 0.9 + 0.025
        # each half is mixed with its mirror image
        torch.testing.assert_close(targets + targets[mirror], plain + plain[mirror])
    assert counter.count == 0


def test_layers_learn_at_their_own_rates(data, tmp_path, monkeypatch):
    seen = {}
    optimizer_step = engine.optimizer_step

    def look(state, clip_grad):
        names = {id(value): name for name, value in state.model.named_parameters()}
        seen.update({names[id(value)]: group['lr'] for group in state.optimizer.param_groups
                     for value in group['params']})
        optimizer_step(state, clip_grad)
    monkeypatch.setattr(engine, 'optimizer_step', look)
    finetune(*data, '--tokenadapt-path', '', '--epochs', 1, '--warmup-epochs', 0, '--layer-decay', 0.5, '--no-eval',
             '--batch-size', 24, '--lr', 0.01, '--output-dir', tmp_path)
    names = ('pos_embed', 'blocks.0.mlp.fc1.weight', 'token_emb.word_embeddings.weight', 'norm.bias', 'head.bias')
    assert [seen[name] for name in names] == pytest.approx([0.0025, 0.005, 0.01, 0.01, 0.01])


@pytest.mark.parametrize('flags', [
    ['--mixup', 0, '--cutmix', 0, '--batch-size', 6, '--token-noise-prob', 0, '--token-coloradapt-prob', 0],
    ['--mixup', 0.8, '--mixup-mode', 'elem', '--clip-grad', 1, '--amp', 'bf16', '--accum-iter', 3, '--rrc'],
    ['--tokenadapt-path', '', '--batch-size', 6, '--src', '--no-eval', '--save-periods', 'every_1_epochs'],
    ['--nb-classes', 7, '--smoothing', 0, '--mixup-prob', 0.5, '--eda-rc-prob', 0.5, '--input-size', 80]])
def test_every_switch_runs(data, adapt, tmp_path, flags):
    assert finetune(*data, *adapt, '--epochs', 1, '--output-dir', tmp_path, *flags) == 0
    assert np.isfinite(read_log(tmp_path)[0]['train_loss'])


def test_it_learns(data, tmp_path):
    finetune(*data, '--tokenadapt-path', '', '--epochs', 15, '--cutmix', 0, '--token-noise-prob', 0,
             '--token-coloradapt-prob', 0, '--output-dir', tmp_path)
    assert max(line['test_acc1'] for line in read_log(tmp_path)) > 80


# ---------------------------------------------------------------- evaluation

def test_evaluation_is_of_the_given_checkpoint_and_needs_no_token_adapt(finetuned, data, tmp_path, capsys):
    folder, _ = finetuned
    finetune(*data, '--eval', '--resume', folder / 'checkpoint-best.pth', '--output-dir', tmp_path / 'none')
    line, = accuracy_lines(capsys.readouterr().out)
    best = max(read_log(folder), key=lambda line: (line['test_acc1'], -line['epoch']))
    assert float(line.split()[2]) == pytest.approx(best['test_acc1'], abs=1e-3)
    assert not (tmp_path / 'none').exists()
    finetune(*data, '--eval', '--resume', 'auto', '--output-dir', folder)
    line, = accuracy_lines(capsys.readouterr().out)
    assert float(line.split()[2]) == pytest.approx(read_log(folder)[-1]['test_acc1'], abs=1e-3)


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('flags, words', [
    (['--batch-size', 6], '--batch-size 6: each half is mixed'), (['--batch-size', 5], 'is odd'),
    (['--layer-decay', 0], '--layer-decay'), (['--save-periods', 'worst'], "or 'best'"),
    (['--eval'], '--eval needs --resume'), (['--model', 'resnet50'], 'is none of deit'),
    (['--finetune', 'gone.pth'], 'gone.pth'), (['--tokenadapt-path', 'gone.ckpt'], 'gone.ckpt'),
    (['--nb-classes', 3], 'holds class 3'), (['--input-size', 96], 'larger than the 10x10')])
def test_mistakes_by_flag(data, adapt, tmp_path, flags, words):
    fails(lambda: finetune(*data, *adapt, '--epochs', 1, '--output-dir', tmp_path, *flags), words)
    assert not list(tmp_path.glob('checkpoint*'))


def test_another_codebook_is_refused(data, pretrained, finetuned, tmp_path):
    torch.save(torch.randn(40, 32), tmp_path / 'codebook.ckpt')
    flags = [*data, '--tokenadapt-path', '', '--codebook-path', tmp_path / 'codebook.ckpt']
    words = 'its model reads 30 codes, but the codebook has 40 rows'
    fails(lambda: finetune(*flags, '--finetune', pretrained, '--output-dir', tmp_path / 'a'), words)
    resume = ['--resume', finetuned[0] / 'checkpoint-last.pth', '--output-dir', tmp_path / 'b']
    fails(lambda: finetune(*flags, *resume), words)
    fails(lambda: finetune(*flags, *resume, '--eval'), words)


def test_checkpoints_of_other_programs_are_refused(data, adapt, pretrained, finetuned, tmp_path):
    """One name, two networks: each program says whose the checkpoint is."""
    run_here(*SEIT_SMALL, *data, '--epochs', 1, '--output-dir', tmp_path / 'seit')
    seit = tmp_path / 'seit' / 'checkpoint.pth'
    finetuned = finetuned[0] / 'checkpoint-last.pth'
    out = ['--output-dir', tmp_path / 'out']
    ours = [*data, *adapt, *out]
    theirs = 'its weights belong to main_seit.py, whose network is another: give a checkpoint of main_mtm_'
    for flags in (['--resume', seit], ['--resume', seit, '--eval'], ['--finetune', seit]):
        fails(lambda: finetune(*ours, *flags), 'checkpoint.pth: ' + theirs)
    fails(lambda: finetune(*ours, '--resume', pretrained), 'belong to main_mtm_pretrain.py.*main_mtm_finetune.py$')
    only_tokens, _ = split_flags(data)
    for checkpoint, program in ((seit, 'main_seit.py'), (finetuned, 'main_mtm_finetune.py')):
        fails(lambda: call(main_mtm_pretrain, *PRETRAIN_SMALL, *only_tokens, *adapt, *out, '--resume', checkpoint),
              f'belong to {program}, .*: give a checkpoint of main_mtm_pretrain.py$')
    for checkpoint, program in ((pretrained, 'main_mtm_pretrain.py'), (finetuned, 'main_mtm_finetune.py')):
        for flags in (['--resume', checkpoint], ['--resume', checkpoint, '--eval'], ['--finetune', checkpoint]):
            assert f'these are weights of {program}' in mistake(*SEIT_SMALL, *data, '--batch-size', 4, *flags)
