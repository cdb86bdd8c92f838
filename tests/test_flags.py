"""The command line."""
import argparse
import sys

import pytest
import torch

import flags
import utils
from flags import Parser


NO_EFFECT = {'--num-workers': 'there are none', '--pin-mem': 'it always is'}


def make_parser():
    parser = Parser('What it does.', prog='program.py')
    add = parser.add_argument
    add('--output-dir', default='out', help='where')
    add('--batch-size', type=flags.integer(1), default=64)
    add('--mode', choices=['pixel', 'token'], default='token', help='which')
    add('--drop', type=flags.number(0, 1), default=0.1, help='rate')
    add('--decay-rate', '--dr', type=float, help='without default')
    add('--dist-eval', action='store_true', help='a switch')
    add('--seed', type=flags.SEED, default=0)
    add('--model-ema', action=argparse.BooleanOptionalAction, default=True, help='an average')
    add('rest', nargs='*')
    parser.add_no_effect(NO_EFFECT, switches=['--pin-mem'])
    return parser


def test_dashes_and_underscores_are_alike_in_flags_and_untouched_in_values():
    for words in (['--output-dir', 'a_b', '--batch-size=32', '--dist-eval', '--no-model-ema', '--num-workers', '4'],
                  ['--output_dir', 'a_b', '--batch_size=32', '--dist_eval', '--no_model_ema', '--num_workers', '4'],
                  ['--output_dir=a_b', '--batch-size', '32', '--dist-eval', '--no-model_ema', '--num_workers=4']):
        args = make_parser().parse_args(words)
        assert (args.output_dir, args.batch_size, args.dist_eval, args.model_ema, args.num_workers, args.pin_mem) == \
            ('a_b', 32, True, False, '4', False)
    args = make_parser().parse_args(['--output-dir=--x_y=z_', '--dr', '0.2', 'a_b', '--', '--c_d'])
    assert (args.output_dir, args.decay_rate, args.rest) == ('--x_y=z_', 0.2, ['a_b', '--c_d'])


def test_words_come_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['program.py', '--batch_size', '3'])
    assert make_parser().parse_args().batch_size == 3


def test_defaults_stand_in_the_help(capsys):
    with pytest.raises(SystemExit) as caught:
        utils.run(lambda args: 0, lambda: make_parser().parse_args(['--help']))
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for part in ('where (default: out)', 'default: 64', 'which (default: token)', 'rate (default: 0.1)',
                 'a switch', 'accepted, without effect', 'there are none'):
        assert part in text, text


@pytest.mark.parametrize('words, message', [
    (['--nonsense'], 'unrecognized arguments: --nonsense'), (['--output-dir'], '--output-dir: expected one argument'),
    (['--mode', 'voxel'], "--mode: invalid choice: 'voxel'"), (['--batch-size', 'x'], "'x' is not a whole number"),
    (['--batch-size', '1.5'], "'1.5' is not a whole number"),
    (['--batch-size', '0'], '--batch-size: 0: give a value of 1 or more'),
    (['--batch-size', '-3'], '-3: give a value of 1 or more'), (['--batch', '3'], 'unrecognized arguments: --batch'),
    (['--out', 'x'], 'unrecognized arguments: --out'), (['--drop', '1.5'], '--drop: 1.5: give a value from 0 to 1'),
    (['--drop', '-0.1'], 'give a value from 0 to 1'), (['--drop', 'nan'], 'nan: give a finite number'),
    (['--drop', 'inf'], 'inf: give a finite number'), (['--drop=-inf'], '-inf: give a finite number'),
    (['--drop', '-inf'], 'expected one argument'),
    (['--drop', '1e999'], 'give a finite number'), (['--drop', 'x'], "'x' is not a number"),
    (['--drop='], "'' is not a number"), (['--dist-eval=1'], 'ignored explicit argument'),
    (['--batch-size', 'nan'], 'not a whole number'), (['--batch-size', '9' * 5000], 'not a whole number'),
    (['--seed', '-1'], '-1: give a value from 0 to'),
    (['--seed', str(2 ** 63)], 'give a value from 0 to 9223372036854775807'),
    (['--seed', str(2 ** 64)], 'give a value from 0 to'), (['--seed', '1' + 400 * '0'], 'give a value from 0 to'),
    (['--seed', '1e3'], 'whole'),
    (['--mode', 'a\nb'], 'invalid choice')])
def test_every_mistake_is_one_line_and_exit_code_2(no_launcher, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        utils.run(lambda args: 0, lambda: make_parser().parse_args(words))
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, '')
    line, = err.splitlines()
    assert line.startswith('error: ') and message in line and 'see program.py --help' in line


def advised(*words):
    with pytest.raises(utils.InputError) as error:
        make_parser().parse_args(words)
    return str(error.value)


@pytest.mark.parametrize('words, message', [
    (['--experiment', 'x'], '; --experiment: here it is --output-dir, the folder itself; see'),
    (['--checkpoint_hist=3'], '; --checkpoint-hist: a training keeps its newest two checkpoints; see'),
    (['--workers', '8'], '; --workers: there are none; see'),  # its --num-workers has no effect, and why
    (['--pretrained'], '; --pretrained: no weights are downloaded by name; see'),
    (['--local-rank=0'], '; --local-rank: start with torchrun, which sets LOCAL_RANK instead; see'),
    (['-b', '8', '--world_size', '2'], '; -b: here it is --batch-size; --world-size: the launcher (torchrun, srun) '
     'sets it; see'),
    (['--batch', '3'], '; --batch: did you mean --batch-size?; see'),  # no abbreviation is taken
    (['--dist_evall'], '; --dist-evall: did you mean --dist-eval?; see'),
    (['--d', '3'], 'unrecognized arguments: --d; see'), (['--zebra'], 'unrecognized arguments: --zebra; see')])
def test_unknown_flags_get_the_name_of_the_flag_here(words, message):
    assert advised(*words).startswith('unrecognized arguments: ')
    assert message in advised(*words)


def test_values_of_flags_get_no_advice():
    assert flags.advice(['--seed', '-1', '-0.5', '-1e3', '--a b', 'batch-size'], {'--seed'}) == []
    message = advised('--output-dir=--workers', '--zebra')
    assert '--workers:' not in message


def test_a_missing_flag_may_have_been_given_by_another_name():
    parser = Parser(prog='program.py')
    parser.add_argument('--train-path', required=True)
    with pytest.raises(utils.InputError, match='required: --train-path; --data-path: here it is --train-path; see'):
        parser.parse_args(['--data-path', 'images'])


@pytest.mark.parametrize('make_type, good, bad, words', [
    (lambda: flags.number(), ['-1e30', '0', '5'], ['nan', '-inf'], 'finite'),
    (lambda: flags.number(0), ['0', '1e30'], ['-1e-30'], 'give a value of 0 or more'),
    (lambda: flags.number(most=5), ['-1e30', '5'], ['5.001'], 'give a value of 5 or less'),
    (lambda: flags.number(0.5, 2), ['0.5', '2'], ['0.49', '2.01'], 'give a value from 0.5 to 2'),
    (lambda: flags.integer(), ['0', '12'], ['-1'], 'give a value of 0 or more'),
    (lambda: flags.integer(1, 3), ['1', '3'], ['0', '4', '9' * 400], 'give a value from 1 to 3'),
    (lambda: flags.SEED, ['0', str(2 ** 63 - 1)], ['-1', str(2 ** 63)], 'give a value from 0 to')])
def test_ranges(make_type, good, bad, words):
    parse = make_type()
    for text in good:
        assert parse(text) == float(text) if '.' in text or 'e' in text else parse(text) == int(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            parse(text)


def test_the_largest_seed_is_one_that_torch_takes():
    generator = torch.Generator()
    largest = flags.SEED(str(2 ** 63 - 1))
    generator.manual_seed(largest)
    torch.manual_seed(largest)
    utils.seed_step(largest, 0, 0, 0, generator)


def test_flags_without_effect_are_named_once(capsys):
    parser = make_parser()
    flags.print_no_effect(NO_EFFECT, vars(parser.parse_args(['--num_workers', '4', '--pin-mem'])))
    assert capsys.readouterr().out == ('note: --num-workers has no effect: there are none\n'
                                       'note: --pin-mem has no effect: it always is\n')
    flags.print_no_effect(NO_EFFECT, vars(parser.parse_args([])))
    assert capsys.readouterr().out == ''


def test_flags_know_which_of_them_were_given():
    def given(*words):
        return make_parser().parse_args(words).given - {'rest'}
    assert given() == set()
    words = ['--output_dir=out', '--batch-size', '64', '--no-model-ema']
    assert given(*words) == {'output_dir', 'batch_size', 'model_ema'}
    parser = Parser('What it does.')
    parser.add_argument('--tokenizer', action='append', default=[])
    parser.add_argument('--model', default='a')
    parser.set_defaults(model='b')
    args = parser.parse_args(['--tokenizer', 'x', '--tokenizer', 'y'])
    assert (args.tokenizer, args.model, args.given) == (['x', 'y'], 'b', {'tokenizer'})
    assert args.replaced(model='c').given == args.given and 'given' not in vars(args)
    other = parser.parse_args(['--model', 'd'])
    assert args.joined(other).given == {'tokenizer', 'model'}
