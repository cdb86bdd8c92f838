"""What manifests state of tokenizers and codebooks, against what is given."""
import json

import numpy as np
import pytest
import safetensors.torch
import torch

import main_mtm_finetune
import main_mtm_pretrain
import main_seit
from fileio.torch_files import digest_of
from helpers import SMALL, call, fails, flag_values, make_data, mistake, run_here, words_of, write_manifest
from token_files import made_with
from token_files.codebook import load_codebook
from token_files.made_with import (check_made_with, digest_of_entry, entry_of_codebook, identity_of_tokenizer,
                                   tokenizer_of)
from token_files.token_file import open_token_file


@pytest.fixture
def sets(tmp_path):
    """Flags of a set whose manifests name a codebook and a tokenizer, and the path of another codebook."""
    flags = flag_values(make_data(tmp_path))
    codebook = load_codebook(flags['--codebook-path'])
    for split in ('train', 'val'):
        write_manifest(flags[f'--{split}-token-file'], codebook=entry_of_codebook(codebook, flags['--codebook-path']),
              tokenizer={'file': 'tok.pt', 'sha256': 'a' * 64}, image_size=80)
    torch.save(codebook.flip(0), tmp_path / 'other.ckpt')
    return flags


def test_a_codebook_of_another_set_is_refused(sets, tmp_path):
    other = {**sets, '--codebook-path': tmp_path / 'other.ckpt'}
    line = mistake(*SMALL, *words_of(other), '--epochs', 1)
    assert 'train-token.data.bin.gz: was made with the codebook codebook.ckpt (SHA-256 ' in line
    assert 'other.ckpt is another: give that one to --codebook-path' in line
    # only the validation set is of another one
    (tmp_path / 'train-token.json').unlink()
    assert 'val-token.data.bin.gz: was made with the codebook' in mistake(*SMALL, *words_of(other), '--epochs', 1)
    (tmp_path / 'val-token.json').unlink()  # nothing is stated, so nothing is compared
    run_here(*SMALL, *words_of(other), '--epochs', 1)


@pytest.mark.parametrize('program, words', [
    (main_mtm_pretrain, ['--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2', 'decoder_embed_dim=16',
                         'decoder_depth=1', 'decoder_num_heads=2', '--tokenadapt-path', '']),
    (main_mtm_finetune, ['--tokenadapt-path', '', '--finetune', ''])])
def test_programs_of_masked_tokens_compare_too(program, words, sets, tmp_path):
    flags = {**sets, '--codebook-path': tmp_path / 'other.ckpt', '--input-size': 64, '--device': 'cpu',
             '--batch-size': 8, '--epochs': 1, '--output-dir': tmp_path / 'out'}
    if program is main_mtm_pretrain:
        flags = {flag: value for flag, value in flags.items() if 'label' not in flag and 'val' not in flag}
    fails(lambda: call(program, *words_of(flags), *words), 'was made with the codebook', 'other.ckpt is another')


def test_a_codebook_saved_again_is_the_same(sets, tmp_path):
    again = tmp_path / 'again.ckpt'
    torch.save(load_codebook(sets['--codebook-path']).clone(), again, _use_new_zipfile_serialization=False)
    assert again.read_bytes() != sets['--codebook-path'].read_bytes()
    run_here(*SMALL, *words_of({**sets, '--codebook-path': again}), '--epochs', 1)


def test_manifests_of_before_state_the_file_alone(sets, tmp_path):
    files = [open_token_file(sets['--train-token-file'])]
    codebook = load_codebook(sets['--codebook-path'])
    del files[0].manifest['codebook']['values_sha256']
    check_made_with(files, codebook, str(sets['--codebook-path']))
    fails(lambda: check_made_with(files, codebook.flip(0), str(tmp_path / 'other.ckpt')), 'is another')


def test_training_and_validation_of_one_tokenizer(sets, tmp_path):
    write_manifest(sets['--val-token-file'], tokenizer={'file': 'new.pt', 'sha256': 'b' * 64})
    line = mistake(*SMALL, *words_of(sets), '--epochs', 1)
    assert 'tokenizer new.pt (SHA-256 bbbbbbbbbbbb...), but ' in line
    assert 'with tok.pt (SHA-256 aaaaaaaaaaaa...)' in line
    write_manifest(sets['--val-token-file'], tokenizer={})
    run_here(*SMALL, *words_of(sets), '--epochs', 1)


@pytest.mark.parametrize('entry', [None, 7, 'x', [], {}, {'sha256': 3}, {'sha256': ''}])
def test_odd_entries_state_nothing(entry, sets):
    write_manifest(sets['--train-token-file'], tokenizer=entry, codebook=entry)
    file = open_token_file(sets['--train-token-file'])
    assert tokenizer_of([file]) is None
    check_made_with([file], torch.ones(3, 4), 'nowhere')


def test_a_converted_tokenizer_is_the_one_it_was_made_of(tmp_path, sets):
    path = tmp_path / 'tok.safetensors'
    safetensors.torch.save_file({'x': torch.ones(2)}, path, {made_with.CONVERTED: 'a' * 64})
    assert digest_of_entry(identity_of_tokenizer(str(path))) == 'a' * 64
    file = open_token_file(sets['--train-token-file'])
    codebook = load_codebook(sets['--codebook-path'])
    check_made_with([file], codebook, str(sets['--codebook-path']), str(path))
    safetensors.torch.save_file({'x': torch.ones(2)}, path)
    fails(lambda: check_made_with([file], codebook, str(sets['--codebook-path']), str(path)),
          'was made with the tokenizer tok.pt', 'tok.safetensors is another')


# ---------------------------------------------------------------- a model, and what it was trained with

def test_a_model_is_not_evaluated_with_another_codebook_or_tokenizer(sets, tmp_path, capsys):
    run_here(*SMALL, *words_of(sets), '--epochs', 1, '--output-dir', tmp_path / 'run')
    best = tmp_path / 'run' / 'checkpoint.pth'
    evaluate = ['--eval', '--resume', best]
    run_here(*SMALL, *words_of(sets), *evaluate)
    for split in ('train', 'val'):
        (tmp_path / f'{split}-token.json').unlink()
    line = mistake(*SMALL, *words_of({**sets, '--codebook-path': tmp_path / 'other.ckpt'}), *evaluate)
    assert 'checkpoint.pth: was trained with another codebook than that of' in line and 'other.ckpt' in line
    write_manifest(sets['--val-token-file'], tokenizer={'file': 'new.pt', 'sha256': 'b' * 64}, image_size=64)
    line = mistake(*SMALL, *words_of(sets), *evaluate)
    assert 'checkpoint.pth: was trained with another tokenizer than that of' in line and 'val-token.data.bin.gz' in line
    write_manifest(sets['--val-token-file'], tokenizer=None, image_size=64)
    capsys.readouterr()
    run_here(*SMALL, *words_of(sets), *evaluate)
    assert 'note: size of tokenized images is 64 pixels; the run that wrote' in capsys.readouterr().out


def test_a_resumed_run_has_the_same_data(sets, tmp_path, capsys):
    words = [*SMALL, '--output-dir', tmp_path / 'run']
    run_here(*words, *words_of(sets), '--epochs', 1)
    other = flag_values(make_data(tmp_path / 'other', seed=1, shift=2))
    for flag, what in (('--train-token-file', 'training tokens'), ('--train-label-file', 'training labels'),
                       ('--val-token-file', 'validation tokens'), ('--token-synonym-dict', 'synonyms')):
        line = mistake(*words, *words_of({**sets, flag: other[flag]}), '--epochs', 2, '--resume', 'auto')
        assert f'differs in {what} ' in line and '--allow-inexact-resume' in line
    capsys.readouterr()
    run_here(*words, *words_of({**sets, '--train-label-file': other['--train-label-file']}), '--epochs', 2, '--resume',
             'auto', '--allow-inexact-resume')
    assert 'warning: ' in capsys.readouterr().out
    assert json.loads((tmp_path / 'run' / 'log.txt').read_text().splitlines()[-1])['epoch'] == 1
    # without validation there is nothing of it to compare
    run_here(*words, *words_of({**sets, '--train-label-file': other['--train-label-file']}), '--epochs', 3, '--resume',
             'auto', '--no-eval')


@pytest.mark.parametrize('words, note', [
    (['--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=4'], '--model-kwargs is '),
    (['--model', 'deit_small_token_32'], '--model is deit_small_token_32; '),
    (['--input-size', '32', '--token-patch-size', '4'], '--input-size is 32; ')])
def test_an_evaluation_says_where_it_is_of_another_model(words, note, sets, tmp_path, capsys):
    """All shapes fit, and the results are others."""
    run_here(*SMALL, *words_of(sets), '--epochs', 1, '--output-dir', tmp_path / 'run')
    evaluate = [*words_of(sets), '--eval', '--resume', tmp_path / 'run' / 'checkpoint.pth']
    capsys.readouterr()
    run_here(*SMALL, *evaluate)
    assert 'note: --' not in capsys.readouterr().out
    run_here(*SMALL, *evaluate, *words)
    assert f'note: {note}' in capsys.readouterr().out


def test_flags_that_make_the_model():
    assert main_seit.get_args_parser().rules.of_the_model == {'model', 'model_kwargs', 'stem', 'input_size',
                                                                  'token_patch_size'}


def test_starting_weights_of_another_codebook_are_noted(sets, tmp_path, capsys):
    run_here(*SMALL, *words_of(sets), '--epochs', 1, '--output-dir', tmp_path / 'run')
    for split in ('train', 'val'):
        (tmp_path / f'{split}-token.json').unlink()
    capsys.readouterr()
    run_here(*SMALL, *words_of({**sets, '--codebook-path': tmp_path / 'other.ckpt'}), '--epochs', 1, '--finetune',
             tmp_path / 'run' / 'checkpoint.pth')
    assert 'was trained with another codebook' in capsys.readouterr().out


def test_digests_are_of_values(sets):
    x = torch.randn(5, 4)
    assert digest_of(x) == digest_of(x.T.contiguous().T) != digest_of(x.half()) != digest_of(x.flip(0))
    assert digest_of({'a': [1, x.bfloat16()]}) != digest_of({'a': [2, x.bfloat16()]})
    big = np.arange(30000, dtype=np.uint16).reshape(10000, 3)
    assert digest_of(big) == digest_of(big.copy()) != digest_of(big[::-1].copy())
    assert digest_of(torch.empty(0)) != digest_of(torch.tensor(0.))
