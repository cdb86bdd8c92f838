"""The recipe against golden files; flags; and how every program begins, resumes and ends, on a small one."""
import argparse
import copy
import json
import shutil
import time

import numpy as np
import pytest
import timm
import torch

import flags
import main_continual
import main_mtm_finetune
import main_mtm_pretrain
import main_pixels
import main_seit
import recipe
import small_training
from helpers import Killed, accuracy_lines, contents, fails, forked, read_log, states
from processes import CHECKPOINTS, Job, training_differs
from samplers import shuffled
from scripts import fit_token_adapt, train_tokenizer
from small_training import CPU, small, tiny_model
from training import pretrained
from training.loss_meter import NotFinite
from training.preemption import REQUEUE
from training.run_folder import RunFolder
from training.run_info import run_record
from utils import InputError

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('name, flags', [
    ('default_300ep_8x128', ['--lr', str(7.5e-4 * 8 * 128 / 512)]),
    ('default_300ep_1x64', ['--lr', str(7.5e-4 * 64 / 512)]),
    ('short_20ep_1x256', ['--lr', str(7.5e-4 * 256 / 512), '--epochs', '20'])])
def test_schedule_is_the_published_one(name, flags, golden):
    args = main_seit.parse_args([*flags, '--unscale-lr'])
    assert recipe.scaled_lr(args) == golden('lr_schedule.json')[name]['base_lr']
    optimizer = recipe.make_optimizer(args, torch.nn.Linear(2, 2))
    scheduler = recipe.make_scheduler(args, optimizer, 1)
    rates = []
    for epoch in range(args.epochs):
        scheduler.step(max(epoch - 1, 0))
        rates.append(optimizer.param_groups[0]['lr'])
    np.testing.assert_allclose(rates, golden('lr_schedule.json')[name]['lr_by_epoch'], atol=1e-12, rtol=0)


def test_a_schedule_by_steps_does_not_lag(tmp_path):
    """It rises in the first epoch, and ends at the least rate, however few the epochs are."""
    args = main_seit.parse_args(['--sched-on-updates', '--epochs', '3', '--warmup-epochs', '1', '--warmup-lr', '1e-4',
                                 '--min-lr', '1e-5', '--lr', '1e-3', '--unscale-lr'])
    optimizer = recipe.make_optimizer(args, torch.nn.Linear(2, 2))
    scheduler = recipe.make_scheduler(args, optimizer, 10)
    rates = []
    for step in range(30):
        scheduler.step(step // 10)
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates[0] == pytest.approx(1e-4) and rates[5] == pytest.approx(5.5e-4)
    cosine = [1e-5 + (1e-3 - 1e-5) / 2 * (1 + np.cos(np.pi * step / 30)) for step in range(10, 30)]
    np.testing.assert_allclose(rates[10:], cosine)
    flags = ['--sched-on-updates', '--lr', 0.01, '--warmup-epochs', 1, '--unscale-lr', '--min-lr', 1e-5]
    assert small(tmp_path, *flags, '--epochs', 2) == 0
    rate = [line['train_lr'] for line in read_log(tmp_path)]
    assert rate[0] == pytest.approx(5 / 6 * 0.01, rel=1e-3) and rate[1] < 0.001  # of the last of six steps


def test_evaluation_is_every_so_many_epochs_and_at_the_end(tmp_path):
    assert small(tmp_path, '--epochs', 5, '--eval-freq', 2) == 0
    assert ['test_acc1' in line for line in read_log(tmp_path)] == [False, True, False, True, True]
    assert {'epoch_time', 'best_acc1'} <= set(read_log(tmp_path)[0])
    fails(lambda: main_seit.parse_args(['--no-eval', '--eval-freq', '2']), '--eval-freq and --no-eval exclude')


def test_parameter_groups_are_the_published_ones(golden):
    model = timm.create_model('deit_small_token_32')
    optimizer = recipe.make_optimizer(main_seit.parse_args([]), model)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults['eps'] == 1e-8
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [{'weight_decay': g['weight_decay'], 'names': sorted(names[id(p)] for p in g['params'])}
              for g in optimizer.param_groups]
    assert groups == golden('param_groups.json')


@pytest.mark.parametrize('flags, rate', [
    ([], 7.5e-4 * 64 / 512), (['--accum-iter', '4'], 7.5e-4 * 256 / 512), (['--unscale-lr'], 7.5e-4),
    (['--batch-size', '512', '--lr', '1e-3'], 1e-3)])
def test_the_learning_rate_scales_with_the_effective_batch_and_args_stay(flags, rate):
    args = main_seit.parse_args(flags)
    before = copy.deepcopy(vars(args))
    assert recipe.scaled_lr(args) == pytest.approx(rate)
    optimizer = recipe.make_optimizer(args, torch.nn.Linear(2, 2))
    assert optimizer.param_groups[0]['lr'] == pytest.approx(rate)
    recipe.make_state(args, timm.create_model('deit_tiny_token_32', depth=1), torch.device('cpu'), (32, 28, 28), 1)
    assert vars(args) == before


def test_a_run_repeated_from_its_args_json_has_the_same_learning_rate():
    args = main_seit.parse_args(['--batch-size', '128'])
    record = json.loads(json.dumps(run_record(vars(args), torch.device('cpu'))))
    again = argparse.Namespace(**record)
    assert recipe.scaled_lr(again) == recipe.scaled_lr(args) and record['lr'] == 7.5e-4


def test_attn_only_trains_only_attention():
    model = timm.create_model('deit_tiny_token_32', depth=2)
    pretrained.freeze_all_but_attention(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters()
                       if '.attn.' in n or n in ('head.weight', 'head.bias', 'pos_embed')}


@pytest.mark.parametrize('flags, words', [
    (['--bce-loss'], '--smoothing 0'), (['--batch-size', '7'], 'odd'), (['--eval'], '--resume'),
    (['--resume', 'auto'], '--output-dir'), (['--eval', '--resume', 'x', '--no-eval'], 'exclude'),
    (['--tensorboard'], '--output-dir'), (['--wandb'], '--wandb keeps its run in --output-dir: give one$')])
def test_flags_that_cannot_work_together(flags, words):
    with pytest.raises(InputError, match=words):
        main_seit.parse_args(flags)


@pytest.mark.parametrize('flags', [
    ['--eda-rc-prob', '2'], ['--epochs', '0'], ['--seed', '-1'], ['--seed', str(2 ** 64)], ['--token-patch-size', '0'],
    ['--token-synonym-thres', '0'], ['--start_epoch', '-1'], ['--drop', '2'], ['--eda-sc-prob', 'nan'],
    ['--dist-timeout', 'nan'], ['--token-noise-std', '-1'], ['--clip-grad', '-1'], ['--clip-grad', '0'],
    ['--lr', '-1'], ['--lr', 'inf'], ['--save-every', '0'], ['--save-every', '5x'], ['--save-every', '-3m'],
    ['--weight-decay', '-0.1'], ['--model-ema-decay', '1.5'], ['--batch-size', '1e3'], ['--opt-betas', '0.9', '2'],
    ['--lr-noise-pct', '0'], ['--amp', 'fp8'], ['--nb-classes', '0']])
def test_values_out_of_range_name_their_flag(flags):
    with pytest.raises(InputError) as error:
        main_seit.parse_args(flags)
    assert flags[0].replace('_', '-') in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('text, value', [('500', (500, 'steps')), ('30m', (30.0, 'minutes'))])
def test_save_interval(text, value):
    assert flags.save_interval(text) == value


@pytest.mark.parametrize('flags', [['--batch-size', '8', '--accum-iter', '4'], ['--batch-size', '32']])
def test_an_epoch_without_a_step_is_refused(flags):
    with pytest.raises(InputError, match='^tokens: the 31 images of a process make no step') as error:
        recipe.count_steps(main_seit.parse_args(flags), 31, 'tokens')
    assert str(error.value).endswith(f': lower {" or ".join(flags[::2])}')


def test_advice_for_an_epoch_without_a_step_is_of_what_can_change(monkeypatch):
    args = main_seit.parse_args(['--batch-size', '1', '--accum-iter', '40', '--cutmix', '0'])
    fails(lambda: recipe.count_steps(args, 31, 'tokens'), r'\(1 processes\): lower --accum-iter$')
    monkeypatch.setattr(recipe, 'world_size', lambda: 2)
    fails(lambda: recipe.count_steps(args, 31, 'x'), r'\(2 processes\): lower --accum-iter or the number of processes$')
    args = args.replaced(epoch_images=62)
    fails(lambda: recipe.count_steps(args, 31, 'x'), 'lower --accum-iter or .*, or raise --epoch-images$')


def test_steps_are_whole_accumulations():
    args = main_seit.parse_args(['--batch-size', '4', '--accum-iter', '3'])
    assert recipe.count_steps(args, 59, 'tokens') == 12


def test_flags_that_must_be_alike_leave_out_places():
    alike = recipe.flags_alike(main_seit.parse_args(['--output-dir', 'a', '--lr', '2e-3']))
    assert alike['--lr'] == 2e-3 and '--batch-size' in alike
    assert not {'--output-dir', '--train-token-file', '--codebook-path', '--token-cache', '--resume'} & alike.keys()


def test_bce_targets_are_one_wherever_the_mix_is_positive():
    args = main_seit.parse_args(['--bce-loss', '--smoothing', '0'])
    _, criterion = recipe.make_loss(args, 3)
    logits = torch.randn(2, 3)
    targets = torch.tensor([[0.3, 0.7, 0], [0, 0, 1.]])
    slow = torch.nn.functional.binary_cross_entropy_with_logits(logits, (targets > 0).float())
    torch.testing.assert_close(criterion(logits, targets), slow)


# ---------------------------------------------------------------- which flags ranks and resumed runs must have alike

START = {'output_dir', 'resume', 'allow_inexact_resume'}
NODE = {'output_dir', 'resume', 'dist_url'}
TOKENS = {'train_token_file', 'codebook_path', 'token_synonym_dict', 'token_cache', 'tokenadapt_path'}
LABELS = {'train_label_file', 'val_token_file', 'val_label_file'}
PATHS = {'train_path', 'val_path'}
TASKS = {*PATHS, *LABELS, 'train_token_file', 'codebook_path', 'tokenizer_path', 'tokens_dir'}
EVALUATING = {'finetune', 'output'}
EVAL = {'eval', 'output', 'report'}
EXACT = {'batch_size', 'accum_iter', 'seed'}
EXACT_TOKENS = {'views', 'val_share'}
OF_TASKS = ['--base-classes', '2', '--output-dir', 'x']
OF_THE_MODEL = {kind: {'model', 'model_kwargs', 'input_size', *more} for kind, more in (
    ('seit', ['token_patch_size', 'stem']), ('tokens', ['token_patch_size', 'stem']), ('mtm', ['token_patch_size']),
    ('pixels', ['eval_crop_ratio', 'exif_rotate']))}
# program, least words; files that may lie elsewhere on each node, flags of a start, and those a resumed run must keep
PROGRAMS = {
    'seit': (main_seit, [], NODE | TOKENS | LABELS | EVALUATING, START | EVAL,
             EXACT | EXACT_TOKENS | {'repeated_aug', 'recipe', 'stem'}),
    'pixels': (main_pixels, ['--train-path', 'x', '--val-path', 'y'], NODE | PATHS | EVALUATING, START | EVAL,
               EXACT | {'repeated_aug', 'recipe', 'exif_rotate'}),
    'mtm pretrain': (main_mtm_pretrain, [], NODE | TOKENS, START, EXACT | EXACT_TOKENS),
    'mtm finetune': (main_mtm_finetune, [], NODE | TOKENS | LABELS | EVALUATING, START | EVAL,
                     EXACT | EXACT_TOKENS),
    'continual tokens': (main_continual, [*OF_TASKS, '--codebook-path', 'x'] + [
        word for name in ('train-token', 'train-label', 'val-token', 'val-label') for word in (f'--{name}-file', 'x')],
        NODE | TOKENS | TASKS | EVALUATING, START | EVAL,
        EXACT | EXACT_TOKENS | {'repeated_aug', 'recipe', 'exif_rotate', 'stem'}),
    'continual pixels': (main_continual, [*OF_TASKS, '--new', 'pixels', '--train-path', 'x', '--val-path', 'y'],
                         NODE | TASKS | EVALUATING, START | EVAL, EXACT | {'repeated_aug', 'recipe', 'exif_rotate'}),
    'train tokenizer': (train_tokenizer, ['--data-path', 'x'], NODE | {'data_path', 'val_path', 'vgg_path'}, START,
                        EXACT | {'val_images', 'epoch_images', 'exif_rotate', 'flip'}),
    'fit token adapt': (fit_token_adapt, ['--data-path', 'x', '--tokenizer-path', 'y'],
                        NODE | {'data_path', 'val_path', 'tokenizer_path', 'codebook_path'}, START,
                        EXACT | {'val_images', 'epoch_images', 'exif_rotate'})}


def other_value(value):
    """A value that a flag may have instead of this one."""
    return not value if isinstance(value, bool) else (value or 0) + 1 if not isinstance(value, str) else value + '1'


@pytest.mark.parametrize('name', PROGRAMS)
def test_the_rules_of_each_programs_flags(name):
    program, words, of_a_rank, of_a_start, exact = PROGRAMS[name]
    args = program.parse_args(words)
    reasons = main_seit.NO_EFFECT if name == 'continual tokens' else getattr(program, 'NO_EFFECT', {})
    no_effect = {flag[2:].replace('-', '_') for flag in reasons}
    of_the_model = OF_THE_MODEL.get(name.partition(' ')[-1 if name.startswith('continual') else 0], set())
    assert args.rules == (of_a_rank | no_effect, of_a_start | no_effect, exact, of_the_model)
    assert set().union(*args.rules) <= vars(args).keys()
    alike = recipe.flags_alike(args)
    elsewhere = recipe.flags_alike(args.replaced(**dict.fromkeys(args.rules.of_a_rank, 'elsewhere')))
    assert alike == elsewhere and '--lr' in alike and '--token-cache none' in alike


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_resumed_run_keeps_each_programs_exact_flags(name, capsys):
    program, words, *_, exact = PROGRAMS[name]
    args = program.parse_args(words)
    state = recipe.make_state(main_seit.parse_args(['--amp', 'off']), tiny_model(), CPU, (32, 8, 8), 1)

    def resume(**values):
        """Resume a run of `args`, with other values of some flags; returns what is printed."""
        checkpoint = state.state_dict() | {'args': vars(args), 'classes': None, 'epoch': 0, 'step': 3}
        recipe.resume_run(args.replaced(**values), state, checkpoint, 'c.pth', 12)
        assert not checkpoint  # its memory is given back
        return capsys.readouterr().out
    assert resume() == 'c.pth: resumed at epoch 1, step 3\n'
    for flag in args.rules.of_a_start - {'allow_inexact_resume'}:
        assert resume(**{flag: 'another'}) == 'c.pth: resumed at epoch 1, step 3\n'
    assert f'note: --lr is 0.5; the run that wrote c.pth had {args.lr}\n' in resume(lr=0.5)
    for flag in exact:
        before = getattr(args, flag)
        change = {flag: other_value(before)}
        fails(lambda change=change: resume(**change), f'c.pth: the run that wrote it differs in {flag} {before} -> '
              f'{change[flag]}; resume it as it was, or add --allow-inexact-resume$')
        assert f'warning: c.pth is resumed with {flag} {before} -> {change[flag]}: ' in resume(
            **change, allow_inexact_resume=True)


# ---------------------------------------------------------------- the beginning

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folder of an undisturbed run of the small program: two epochs of six steps."""
    folder = tmp_path_factory.mktemp('whole')
    assert small(folder) == 0
    return folder


def two_ranks(*words, **options):
    """Exit codes of the small program in two processes: an epoch has three steps."""
    return Job('small_training', words, 2, **options).wait(120)


def test_flags_without_effect_are_named_once(tmp_path, capsys):
    small(tmp_path, '--epochs', 1, '--num_workers', 4, '--no-eval')
    output = capsys.readouterr().out
    assert output.count('note: --num-workers has no effect: there are none\n') == 1 and '--world-size' not in output


def test_an_earlier_run_is_resumed_or_left_alone(whole, tmp_path):
    before = contents(whole)
    fails(lambda: small(whole), 'an earlier run is here; add --resume auto')
    shutil.copy(whole / 'checkpoint.pth', tmp_path / 'other.pth')
    fails(lambda: small(whole, '--resume', tmp_path / 'other.pth'), 'an earlier run is here')
    assert contents(whole) == before
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'product.bin').write_bytes(b'mine')
    args = small_training.parse_args(['--output-dir', str(tmp_path / 'out')])
    fails(lambda: recipe.start(args, outputs=['product.bin']), 'product.bin: an earlier run is here')
    assert (tmp_path / 'out' / 'product.bin').read_bytes() == b'mine'


def test_another_runs_checkpoint_starts_a_new_folder(whole, tmp_path, capsys):
    small(tmp_path, '--epochs', 3, '--resume', whole / 'checkpoint.pth')
    assert f'{whole}/checkpoint.pth: resumed at epoch 2, step 0, best Acc@1 ' in capsys.readouterr().out
    assert [line['epoch'] for line in read_log(tmp_path)] == [2]


def test_evaluation_writes_nothing(whole, tmp_path, capsys):
    before = contents(whole)
    small(whole, '--eval', '--resume', 'auto')
    small(tmp_path / 'none', '--eval', '--resume', whole / 'checkpoint.pth')
    lines = accuracy_lines(capsys.readouterr().out)
    assert len(lines) == 4 and lines[:2] == lines[2:]  # the model's and the average's
    assert contents(whole) == before and not (tmp_path / 'none').exists()
    fails(lambda: small(tmp_path, '--eval', '--resume', 'auto'), 'no checkpoint to evaluate')


@pytest.mark.slow
def test_a_folder_that_another_process_holds_is_refused(tmp_path):
    def held(ready):
        lock = RunFolder(str(tmp_path))  # noqa: F841 - held while this is alive
        ready()
        time.sleep(600)
    with forked(held):
        fails(lambda: small(tmp_path), 'another process is at work there')
    assert small(tmp_path, '--epochs', 1) == 0


@pytest.mark.slow
def test_ranks_with_other_flags_end_with_one_line(tmp_path):
    output = tmp_path / 'out'
    more = [['--output-dir', tmp_path / 'a'], ['--output-dir', tmp_path / 'b', '--lr', '1e-1']]
    assert two_ranks('--lr', 1e-3, '--num-workers', 4, output=output, more=more) == [2, 2]
    line, = output.read_text().splitlines()
    assert line.startswith('error: the ranks are not of one run: --lr is 0.001 on rank 0 and 0.1 on rank 1')
    assert not list(tmp_path.rglob('*.pth'))


@pytest.mark.slow
def test_a_checkpoint_that_only_rank_0_finds_is_taken_by_all(tmp_path):
    """Ranks may name other folders; what has no effect is said once for all of them."""
    output = tmp_path / 'out'
    assert two_ranks('--epochs', 1, '--output-dir', tmp_path / 'a') == [0, 0]
    more = [['--output-dir', tmp_path / 'a'], ['--output-dir', tmp_path / 'b']]
    assert two_ranks('--resume', 'auto', '--num-workers', 4, output=output, more=more) == [0, 0]
    assert output.read_text().count('checkpoint.pth: resumed at epoch 1, step 0') == 1
    assert output.read_text().count('note: --num-workers has no effect') == 1
    assert [line['epoch'] for line in read_log(tmp_path / 'a')] == [0, 1] and not list(tmp_path.glob('b/*.pth'))


# ---------------------------------------------------------------- resuming

@pytest.mark.parametrize('accumulated, more, places', [
    (1, [], [(0, 1), (0, 4), (0, 5), (1, 0), (1, 1), (1, 5)]), (2, [], [(0, 3), (1, 1), (1, 4)]),
    (1, ['--sched-on-updates'], [(0, 3), (1, 1)]), (2, ['--sched-on-updates'], [(1, 1)])])
def test_killed_after_a_step_it_resumes_bit_by_bit(tmp_path, capsys, accumulated, more, places):
    """Within an epoch and across its border, and amid batches that make one step."""
    words = ['--accum-iter', accumulated, '--save-every', 1, *more]
    assert small(tmp_path / 'whole', *words) == 0
    for epoch, step in places:
        cut = tmp_path / f'{epoch}-{step}'
        with pytest.raises(Killed):
            small(cut, *words, '--kill-before', epoch, step)
        capsys.readouterr()
        assert small(cut, *words, '--resume', 'auto') == 0
        saved = step // accumulated * accumulated
        assert f'checkpoint.pth: resumed at epoch {epoch}, step {saved}' in capsys.readouterr().out
        assert not training_differs(tmp_path / 'whole', cut), (epoch, step)


def test_a_run_killed_before_its_first_checkpoint_begins_again(whole, tmp_path):
    with pytest.raises(Killed):
        small(tmp_path, '--kill-before', 0, 5)
    assert not (tmp_path / 'checkpoint.pth').exists()
    assert small(tmp_path, '--resume', 'auto') == 0
    assert not training_differs(whole, tmp_path)


def test_the_best_accuracy_is_kept(whole, tmp_path, capsys):
    for path in whole.iterdir():
        shutil.copy(path, tmp_path)
    state = states(whole / 'checkpoint.pth') | {'best_acc1': 99.}
    torch.save(state, tmp_path / 'checkpoint.pth')
    assert small(tmp_path, '--epochs', 3, '--resume', 'auto') == 0
    assert 'resumed at epoch 2, step 0, best Acc@1 99.000\n' in capsys.readouterr().out
    assert states(tmp_path / 'checkpoint.pth')['best_acc1'] == 99.
    assert (tmp_path / 'best_checkpoint.pth').read_bytes() == (whole / 'best_checkpoint.pth').read_bytes()


def test_an_inexact_resume_is_refused_or_allowed(whole, tmp_path, capsys):
    words = ['--epochs', 3, '--resume', whole / 'checkpoint.pth', '--batch-size', 8]
    fails(lambda: small(tmp_path, *words), 'batch_size 4 -> 8; .*--allow-inexact-resume$')
    assert not list(tmp_path.glob('*.pth'))
    assert small(tmp_path, *words, '--allow-inexact-resume') == 0
    assert 'batch_size 4 -> 8: batches, augmentation' in capsys.readouterr().out


# ---------------------------------------------------------------- training to the end

def test_what_a_run_leaves(whole):
    record = json.loads((whole / 'args.json').read_text())
    assert (record['lr'], record['world'], record['output_dir']) == (0.1, 1, str(whole))
    assert 'torch' in record['versions']
    log = read_log(whole)
    assert [line['epoch'] for line in log] == [0, 1]
    assert log[0].keys() >= {'train_loss', 'train_lr', 'test_acc1', 'ema_test_acc1', 'best_acc1', 'n_parameters'}
    checkpoint = states(whole / 'checkpoint.pth')
    assert checkpoint['classes'] == list('abcde') and checkpoint['args']['batch_size'] == 4
    assert {path.name for path in whole.iterdir()} == {*CHECKPOINTS, 'checkpoint_previous.pth', 'log.txt', 'args.json',
                                                       '.lock'}


def test_without_an_output_folder_nothing_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert small('', '--signal-in', 0, 1) == REQUEUE
    output = capsys.readouterr().out
    assert 'batch: 4 x 1 = 4, 6 steps an epoch, 2 epochs; learning rate 0.000781' in output
    assert 'stopped by a signal after step 2 of epoch 0; without --output-dir nothing is saved' in output
    assert not list(tmp_path.iterdir())


def test_tensorboard(tmp_path):
    small(tmp_path, '--epochs', 1, '--tensorboard')
    assert list(tmp_path.glob('events.out.tfevents*'))


@pytest.mark.parametrize('place', [(0, 0), (0, 3), (1, 4)])
def test_a_signal_saves_and_the_run_resumes_exactly(whole, tmp_path, capsys, place):
    epoch, step = place
    assert small(tmp_path, '--signal-in', epoch, step) == REQUEUE
    done = f'stopped by a signal after step {step + 1} of epoch {epoch}; --resume auto continues there'
    assert done in capsys.readouterr().out
    checkpoint = states(tmp_path / 'checkpoint.pth')
    assert (checkpoint['epoch'], checkpoint['step']) == (epoch - 1, step + 1)
    assert small(tmp_path, '--resume', 'auto') == 0
    assert f'resumed at epoch {epoch}, step {step + 1}' in capsys.readouterr().out
    assert not training_differs(whole, tmp_path)


def test_a_signal_in_the_last_step_of_an_epoch_stops_after_the_next(whole, tmp_path):
    assert small(tmp_path / 'a', '--signal-in', 0, 5) == REQUEUE
    assert states(tmp_path / 'a' / 'checkpoint.pth')['step'] == 1 and len(read_log(tmp_path / 'a')) == 1
    assert small(tmp_path / 'b', '--signal-in', 1, 5) == 0  # there is no next: the run is done
    assert not training_differs(whole, tmp_path / 'b')


def test_a_bad_step_leaves_what_replays_it(tmp_path):
    words = ['--bad-image', 3, '--save-every', 2, '--seed', 5]
    with pytest.raises(NotFinite, match='the loss of step . of epoch 0 is not finite: lower --lr') as caught:
        small(tmp_path, *words)
    assert caught.value.exit_code == 3
    bad = json.loads((tmp_path / 'bad_step_rank0.json').read_text())
    order = shuffled(small_training.IMAGES, 1, 0, 5, 0)
    step = order.tolist().index(3) // 4
    assert bad == {'epoch': 0, 'step': step, 'rank': 0, 'seed': 5, 'lr': 0.1 * 4 / 512,
                   'indices': order[4 * step:4 * step + 4].tolist()}
    assert not (tmp_path / 'log.txt').read_text()
    assert all(value.isfinite().all() for path in tmp_path.glob('*.pth') for value in states(path)['model'].values())


def test_a_bad_step_is_skipped_where_asked_for(tmp_path, capsys):
    assert small(tmp_path, '--bad-image', 3, '--on-nan', 'skip', '--no-eval') == 0
    assert capsys.readouterr().out.count('warning: skipped: the loss of step ') == 2
    assert len(read_log(tmp_path)) == 2 and not list(tmp_path.glob('bad_step*'))


@pytest.mark.slow
def test_two_processes_stop_for_a_signal_to_one_and_resume_exactly(tmp_path):
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    assert two_ranks('--output-dir', whole) == [0, 0]
    assert two_ranks('--output-dir', cut, '--signal-in', 1, 0) == [REQUEUE] * 2
    assert states(cut / 'checkpoint.pth')['step'] == 2  # the ranks agree a step later
    assert two_ranks('--output-dir', cut, '--resume', 'auto') == [0, 0]
    assert not training_differs(whole, cut)


@pytest.mark.slow
def test_two_processes_end_for_a_bad_step_of_one(tmp_path):
    output = tmp_path / 'out'
    assert two_ranks('--output-dir', tmp_path, '--bad-image', 3, output=output) == [3, 3]
    line, = (line for line in output.read_text().splitlines() if 'error' in line)
    records = [json.loads((tmp_path / f'bad_step_rank{rank}.json').read_text()) for rank in range(2)]
    assert f'the loss of step {records[0]["step"]} of epoch 0 is not finite' in line
    for rank, record in enumerate(records):
        order = shuffled(small_training.IMAGES, 2, rank, 0, 0)
        assert record['rank'] == rank and record['step'] == records[0]['step']
        assert record['indices'] == order[4 * record['step']:4 * record['step'] + 4].tolist()
    assert 3 in records[0]['indices'] + records[1]['indices'] and not (tmp_path / 'checkpoint.pth').exists()


def test_statistics_of_batch_norm_begin_alike_in_any_number_of_processes(monkeypatch):
    """The pass that arranges DDP's buckets is no training."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    monkeypatch.setattr(recipe, 'world_size', lambda: 2)
    monkeypatch.setattr(recipe, 'DistributedDataParallel', lambda model, **_: model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe.parallel(model, False, CPU, 'off', torch.ones(2, 3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
