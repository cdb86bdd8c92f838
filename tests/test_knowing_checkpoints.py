"""A checkpoint knows its model, sizes, codebook and tokenizer, and programs take them from it."""
import json
import shutil

import pytest
import torch

import evaluate_on_images
import main_mtm_finetune
import main_mtm_pretrain
import main_pixels
from fileio.torch_files import digest_of
from helpers import SIZE, accuracy_lines, call, fails, make_images, run_here, states, tokenize
from inference.models import load_model
from scripts import convert_tokens, probe
from token_files.codebook import load_codebook
from token_files.made_with import file_of, find, identity_of_tokenizer
from training.checkpoints import load_checkpoint

GRID = SIZE // 4  # codes on a side: the tokenizer's patches have 4 pixels
MODEL = ['--model', 'deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2', 'in_chans=8',
         '--input-size', SIZE, '--token-patch-size', 4]
REST = ['--device', 'cpu', '--batch-size', 8, '--epochs', 1, '--eda-rc-prob', 0]
# a line of evaluation reads what the checkpoint of `trained` says, and these
EVALUATED = ['--device', 'cpu', '--no-model-ema']


def make(folder):
    """Images, tokenizer, tokens and a model trained on them, all in one folder; returns flags of the validation set."""
    make_images(folder)
    for split in ('train', 'val'):
        tokenize(folder, folder / 'tokens', source=split, name=split)
    run_here(*MODEL, *REST, '--codebook-path', folder / 'codebook.ckpt', *of_split(folder, 'train'), *of_split(folder),
             '--output-dir', folder / 'output' / 'mine')
    return folder


def of_split(folder, split='val'):
    return [f'--{split}-token-file', folder / 'tokens' / f'{split}-token.data.bin.gz',
            f'--{split}-label-file', folder / 'tokens' / f'{split}-label.txt']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return make(tmp_path_factory.mktemp('trained'))


@pytest.fixture
def moved(trained, tmp_path):
    """Everything at another place, where it is to be found all the same, and may be spoiled."""
    shutil.copytree(trained, tmp_path / 'moved')
    return tmp_path / 'moved'


def checkpoint_of(folder):
    return str(folder / 'output' / 'mine' / 'checkpoint.pth')


def evaluation(folder, capsys, *words):
    """The lines of accuracy that --eval prints for the checkpoint of a folder."""
    capsys.readouterr()
    run_here('--eval', '--resume', checkpoint_of(folder), *of_split(folder), *EVALUATED, *words)
    return accuracy_lines(capsys.readouterr().out)


# ---------------------------------------------------------------- what is kept

def test_checkpoints_and_args_json_say_what_the_model_reads(trained):
    saved = states(checkpoint_of(trained))
    tokenizer = identity_of_tokenizer(trained / 'tok.pt')
    codebook = load_codebook(trained / 'codebook.ckpt')
    assert saved['made_with']['tokenizer'] == {**tokenizer, 'path': '../../tok.pt'}
    assert saved['made_with']['codebook']['values_sha256'] == digest_of(codebook)
    assert saved['made_with']['codebook']['path'] == '../../codebook.ckpt'
    assert saved['made_with']['image_size'] == SIZE
    args = json.loads((trained / 'output' / 'mine' / 'args.json').read_text())
    assert args['made_with'] == saved['made_with'] and args['classes'] == saved['classes']
    assert args['classes'] == [f'class-{i}' for i in range(4)]


def test_manifests_say_where_the_tokenizer_is(moved):
    manifest = json.loads((moved / 'tokens' / 'val-token.json').read_text())
    assert manifest['tokenizer']['path'] == '../tok.pt' and 'path' not in manifest['run']['tokenizer']
    out = moved / 'a' / 'b'
    call(convert_tokens, '--token-file', of_split(moved)[1], '--format', 'compact', '--output-dir', out)
    manifest = json.loads((out / 'val-token.json').read_text())
    assert manifest['tokenizer']['path'] == '../../tok.pt'


# ---------------------------------------------------------------- evaluation

def test_evaluation_needs_no_sizes(trained, capsys):
    plain = evaluation(trained, capsys)
    assert plain == evaluation(trained, capsys, *MODEL, '--codebook-path', trained / 'codebook.ckpt')
    assert len(plain) == 1


def test_what_is_taken_is_said(trained, capsys):
    run_here('--eval', '--resume', checkpoint_of(trained), *of_split(trained), *EVALUATED)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(checkpoint_of(trained)))
    for words in ('--model deit_tiny_token_32', '--model-kwargs depth=1 embed_dim=32 num_heads=2 in_chans=8',
                  '--input-size 16', '--token-patch-size 4', '--codebook-path '):
        assert words in line


def test_images_need_no_sizes_either(trained, moved, capsys):
    for folder in trained, moved:
        call(evaluate_on_images, '--model-path', checkpoint_of(folder), '--data-path', folder / 'val', '--device',
             'cpu', '--num-workers', 0)
        images = accuracy_lines(capsys.readouterr().out)
        assert images == evaluation(folder, capsys)


def test_a_run_that_was_moved_finds_its_files(moved, capsys, monkeypatch, tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert evaluation(moved, capsys)
    # files that were copied beside the checkpoint are found as well
    for name in ('codebook.ckpt', 'tok.pt'):
        (moved / name).rename(moved / 'output' / 'mine' / name)
    assert evaluation(moved, capsys)
    call(evaluate_on_images, '--model-path', checkpoint_of(moved), '--data-path', moved / 'val', '--device', 'cpu',
         '--num-workers', 0)


def test_files_that_are_gone_are_named_with_their_flag(moved):
    (moved / 'tok.pt').unlink()
    words = ['--model-path', checkpoint_of(moved), '--data-path', moved / 'val', '--device', 'cpu', '--num-workers', 0]
    fails(lambda: call(evaluate_on_images, *words), 'checkpoint.pth: was trained with the tokenizer tok.pt ',
          'not at ../../tok.pt from there, nor beside it: give it to --tokenizer-path$')
    (moved / 'codebook.ckpt').unlink()
    fails(lambda: evaluation(moved, Quiet()), 'the codebook codebook.ckpt ', 'give it to --codebook-path$')


class Quiet:
    """Instead of capsys, where nothing comes out."""

    def readouterr(self):
        return self


def test_another_codebook_in_its_place_is_not_taken(moved):
    torch.save(load_codebook(moved / 'codebook.ckpt').flip(0), moved / 'codebook.ckpt')
    fails(lambda: evaluation(moved, Quiet()), 'codebook.ckpt from there is another file by now: give it to --codebook')
    fails(lambda: evaluation(moved, Quiet(), '--codebook-path', moved / 'codebook.ckpt'), 'another')


def test_the_file_that_a_default_names_is_tried_last(moved, monkeypatch, tmp_path, capsys):
    before = evaluation(moved, capsys)
    (tmp_path / 'elsewhere' / 'tokens').mkdir(parents=True)
    (moved / 'codebook.ckpt').rename(tmp_path / 'elsewhere' / 'tokens' / 'codebook.ckpt')
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert evaluation(moved, capsys) == before


def test_an_entry_without_a_name_is_one_line():
    checkpoint = {'made_with': {'codebook': {'sha256': 'a' * 64, 'path': ''}}}
    fails(lambda: file_of(checkpoint, 'codebook', 'c.pth', '--codebook-path'), 'does not say where it is')


def test_a_codebook_saved_again_is_the_same(moved, capsys):
    before = evaluation(moved, capsys)
    torch.save(load_codebook(moved / 'codebook.ckpt').clone(), moved / 'codebook.ckpt',
               _use_new_zipfile_serialization=False)
    assert evaluation(moved, capsys) == before


def test_a_published_checkpoint_needs_the_flags(moved, capsys, monkeypatch, tmp_path):
    before = evaluation(moved, capsys)
    saved = states(checkpoint_of(moved))
    torch.save({'model': saved['model']}, checkpoint_of(moved))
    monkeypatch.chdir(tmp_path)
    fails(lambda: evaluation(moved, capsys), 'does not say with which codebook it was trained, and '
          'tokens/codebook.ckpt is not there: give it to --codebook-path$')
    assert evaluation(moved, capsys, *MODEL, '--codebook-path', moved / 'codebook.ckpt') == before


def test_arguments_belong_to_their_model(moved, capsys):
    fails(lambda: evaluation(moved, capsys, '--model', 'deit_small_token_32'), 'deit_small_token_32 reads 32')
    assert '--model-kwargs' not in capsys.readouterr().out


# ---------------------------------------------------------------- other programs

def test_finetuning_takes_the_model_and_nothing_else(trained, tmp_path, capsys):
    words = [*REST, '--codebook-path', trained / 'codebook.ckpt', *of_split(trained, 'train'), *of_split(trained),
             '--finetune', checkpoint_of(trained)]
    run_here(*words, '--input-size', 8, '--token-patch-size', 4, '--output-dir', tmp_path / 'out')
    saved = states(tmp_path / 'out' / 'checkpoint.pth')['args']
    assert saved['model_kwargs'] == {'depth': 1, 'embed_dim': 32, 'num_heads': 2, 'in_chans': 8}
    assert saved['input_size'] == 8
    assert '--model deit_tiny_token_32 --model-kwargs depth=1' in capsys.readouterr().out
    # pixels have no model of that name, so they need one
    line = ['--train-path', trained / 'train', '--val-path', trained / 'val', '--finetune', checkpoint_of(trained),
            '--model', 'deit_tiny_patch16_224', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2',
            'patch_size=8', 'global_pool=avg', '--input-size', 16, '--device', 'cpu', '--epochs', 1, '--batch-size', 8,
            '--num-workers', 0]
    assert call(main_pixels, *line) == 0


def test_pixels_are_evaluated_as_they_were_trained(trained, tmp_path, capsys):
    words = ['--val-path', trained / 'val', '--device', 'cpu', '--num-workers', 0, '--batch-size', 8]
    model = ['--model', 'vit_tiny_patch16_224', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2',
             'patch_size=8', '--input-size', 16, '--eval-crop-ratio', 1]
    call(main_pixels, *words, *model, '--train-path', trained / 'train', '--epochs', 1, '--no-model-ema',
         '--output-dir', tmp_path)
    first = accuracy_lines(capsys.readouterr().out)
    call(main_pixels, *words, '--eval', '--resume', tmp_path / 'checkpoint.pth')
    assert accuracy_lines(capsys.readouterr().out) == first


def test_masked_models_know_theirs(trained, tmp_path, capsys):
    kwargs = ['--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2']
    common = ['--codebook-path', trained / 'codebook.ckpt', '--tokenadapt-path', '', '--input-size', SIZE,
              '--token-patch-size', 4, '--batch-size', 8, '--epochs', 1, '--device', 'cpu', *of_split(trained, 'train')]
    call(main_mtm_pretrain, *common[:-2], *kwargs, 'decoder_embed_dim=16', 'decoder_depth=1', 'decoder_num_heads=2',
         '--output-dir', tmp_path / 'masked')
    saved = states(tmp_path / 'masked' / 'checkpoint-last.pth')
    assert saved['made_with']['tokenizer']['sha256'] == identity_of_tokenizer(trained / 'tok.pt')['sha256']
    capsys.readouterr()
    call(main_mtm_finetune, *common, *of_split(trained), '--finetune', tmp_path / 'masked' / 'checkpoint-last.pth',
         '--output-dir', tmp_path / 'out')
    out = capsys.readouterr().out
    assert 'checkpoint-last.pth: --model-kwargs depth=1 embed_dim=32 num_heads=2\n' in out
    first = accuracy_lines(out)
    call(main_mtm_finetune, '--eval', '--resume', tmp_path / 'out' / 'checkpoint-last.pth', *of_split(trained),
         '--device', 'cpu')
    assert accuracy_lines(capsys.readouterr().out) == first


def test_probing_needs_no_codebook(trained, moved, capsys):
    words = ['--checkpoint', checkpoint_of(trained), *of_split(trained, 'train'), *of_split(trained), '--probes', 'knn',
             '--neighbors', 3, '--device', 'cpu']
    call(probe, *words)
    first = capsys.readouterr().out
    call(probe, *words, '--codebook-path', trained / 'codebook.ckpt')
    assert capsys.readouterr().out == first
    fails(lambda: call(probe, '--checkpoint', checkpoint_of(trained), '--train-path', 'x', '--val-path', 'y',
                       '--codebook-path', 'z'), 'belongs to tokens')


# ---------------------------------------------------------------- finding a file

def test_a_checkpoint_at_an_address_names_the_flag(trained):
    saved = load_checkpoint(checkpoint_of(trained))
    fails(lambda: file_of(saved, 'tokenizer', 'https://example.org/checkpoint.pth', '--tokenizer-path'),
          'give it to --tokenizer-path')


def test_names_cannot_lead_elsewhere(trained, tmp_path):
    entry = {'file': '../../etc/passwd', 'sha256': 'a' * 64, 'path': 'x'}
    assert find(entry, tmp_path) == ''
    assert find({'file': 3, 'sha256': 'a' * 64, 'path': None}, tmp_path) == ''


def test_models_load_as_before(trained):
    saved = load_checkpoint(checkpoint_of(trained))
    assert load_model(saved, checkpoint_of(trained)).input_size == GRID
