"""Codebooks by formula and of other tokenizers' weights: rows, scale, directions, and runs on them."""
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import main_seit
from helpers import SMALL, fails, flag_values, make_data, mistake, run_here, states, words_of
from inference.models import load_model
from token_files.codebook import load_codebook, quantize, read_codebook
from token_files.codebook_sources import TABLES, fit_rows, rows_of_formula
from token_files.made_with import file_of, find, identity_of_codebook, made_with, seen_from
from training.checkpoints import load_checkpoint

COSMOS = 'fsq:8,8,8,5,5,5'


def deviation(rows):
    """Root mean square of elements about the mean row."""
    return (rows - rows.mean(0)).square().mean().sqrt().item()


# ---------------------------------------------------------------- formulas

def test_rows_of_fsq_by_hand():
    rows = rows_of_formula('fsq:3,2')
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[-1, -1], [0, -1], [1, -1], [-1, 0], [0, 0], [1, 0]]
    cosmos = rows_of_formula(COSMOS)
    assert cosmos.shape == (64_000, 6)
    assert not cosmos[32036].any() and cosmos.any(1).sum() == 63_999
    # 12345 = 1 + 7 * 8 + 0 * 64 + 4 * 512 + 4 * 2560 + 0 * 12800
    assert cosmos[12345].tolist() == [-0.75, 0.75, -1, 1, 1, -1]
    torch.testing.assert_close(cosmos.mean(0), torch.tensor([-0.125] * 3 + [0.] * 3))
    assert deviation(cosmos) == pytest.approx(0.643, abs=5e-4)


def test_all_codes_of_cosmos_have_a_direction_of_their_own():
    rows = load_codebook(COSMOS)
    assert rows.shape == (64_000, 7) and (rows[:, 6] == 2).all()
    assert deviation(rows[:, :6]) == pytest.approx(1, abs=1e-5)
    assert len((F.normalize(rows, dim=1) * 1e5).round().unique(dim=0)) == 64_000
    assert len((F.normalize(rows[:, :6], dim=1) * 1e5).round().unique(dim=0)) == 62_247
    codes = torch.cat([torch.arange(0, 64_000, 1600), torch.tensor([32036, 63_999])])
    assert torch.equal(quantize(rows[codes], rows), codes)


def test_rows_of_lfq():
    assert rows_of_formula('lfq:2').tolist() == [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    assert torch.equal(rows_of_formula('lfq:10:msb'), rows_of_formula('lfq:10'))
    assert torch.equal(rows_of_formula('lfq:10:lsb'), rows_of_formula('lfq:10').flip(1))
    rows = load_codebook('lfq:10')
    assert rows.shape == (1024, 10) and deviation(rows) == pytest.approx(1)  # no two have one direction
    assert rows_of_formula('lfq:16').shape == (65_536, 16)


@pytest.mark.parametrize('formula, message', [
    ('fsq:', 'levels of 2 or more'), ('fsq:8,1', 'levels of 2 or more'), ('fsq:8,x', 'levels of 2 or more'),
    ('fsq:8,', 'levels of 2 or more'), ('fsq:8.5', 'levels of 2 or more'), ('fsq:-8', 'levels of 2 or more'),
    ('fsq:8,8,8,5,5,5,2', 'makes 128,000 codes, but token files hold 65,536'), ('fsq:9999999', 'makes 9,999,999 codes'),
    ('lfq:', 'bits of a code'), ('lfq:0', 'bits of a code'), ('lfq:x', 'bits of a code'),
    ('lfq:10:big', 'bits of a code'), ('lfq:17', 'makes 131,072 codes'), ('lfq:9999999', 'codes, but token files')])
def test_bad_formulas(formula, message):
    fails(lambda: load_codebook(formula), f'^{formula}: ', message)


# ---------------------------------------------------------------- weights of other tokenizers

def weights(table=TABLES[0], prefix=''):
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) / 100 + 3
    return {'encoder.conv_in.weight': torch.zeros(8, 3, 3, 3), f'{prefix}{table}': rows}, rows


@pytest.mark.parametrize('table', TABLES)
@pytest.mark.parametrize('wrap', [lambda state: state, lambda state: {'state_dict': state, 'epoch': 3},
                                  lambda state: {'model': state}])
def test_tables_are_found_by_their_published_names(table, wrap, tmp_path):
    state, rows = weights(table)
    torch.save(wrap(state), tmp_path / 'tok.ckpt')
    codebook = read_codebook(tmp_path / 'tok.ckpt')
    assert not codebook.as_stored and codebook.rows.dtype == torch.float32 and codebook.rows.shape == (20, 4)
    assert deviation(codebook.rows) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(codebook.rows / codebook.rows[0, 0], rows / rows[0, 0])  # scaled, not moved


def test_tables_of_safetensors_and_of_larger_models(tmp_path):
    state, rows = weights(prefix='vqmodel.')
    path = tmp_path / 'tok.safetensors'
    safetensors.torch.save_file({name: value.bfloat16() for name, value in state.items()}, path)
    torch.testing.assert_close(load_codebook(path), fit_rows(rows.bfloat16().float(), path))
    path.write_bytes(path.read_bytes()[:100])
    fails(lambda: load_codebook(path), 'tok.safetensors: damaged')
    fails(lambda: load_codebook(tmp_path / 'none.safetensors'), 'none.safetensors: cannot read a codebook')


def test_a_tensor_is_taken_as_it_is(tmp_path):
    rows = weights()[1]
    torch.save(rows, tmp_path / 'codebook.ckpt')
    codebook = read_codebook(tmp_path / 'codebook.ckpt')
    assert codebook.as_stored and torch.equal(codebook.rows, rows)


def test_files_without_a_table(tmp_path):
    path = tmp_path / 'tok.pt'
    state, rows = weights('quantize.embeddings.weight')
    cases = [(state, 'expected a float tensor', 'the nearest of its 2 names is quantize.embeddings.weight'),
             ({}, 'expected a float tensor'), ({'state_dict': {}}, 'expected a float tensor'),
             (weights()[0] | weights(prefix='ema.')[0], 'holds 2 tables .*ema.quantize'),
             ({TABLES[0]: torch.zeros(20, 4, 1)}, 'its quantize.embedding.weight is no float tensor'),
             ({TABLES[0]: torch.zeros(20, 4)}, 'all zero'), ({TABLES[0]: torch.ones(20, 4)}, 'all rows .* are equal')]
    for value, *patterns in cases:
        torch.save(value, path)
        fails(lambda: load_codebook(path), 'tok.pt', *patterns)


def test_only_rows_of_one_direction_get_a_constant():
    rows = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    assert fit_rows(rows, 'x').shape == (10, 3)
    rows[4] = rows[2]  # equal rows stay equal whatever is done
    assert fit_rows(rows, 'x').shape == (10, 3)
    rows[4] = rows[2] * 1.5
    assert fit_rows(rows, 'x').shape == (10, 4)


# ---------------------------------------------------------------- what has no file

def test_a_formula_is_kept_as_typed(tmp_path):
    codebook = load_codebook('lfq:3')
    entries = made_with([], codebook, 'lfq:3')
    assert entries['codebook']['file'] == entries['codebook']['path'] == 'lfq:3'
    assert seen_from(entries, tmp_path) == entries
    assert file_of({'made_with': entries}, 'codebook', str(tmp_path / 'x.pth'), '--codebook-path') == 'lfq:3'
    assert find(identity_of_codebook('lfq:3'), tmp_path) == 'lfq:3'  # as in manifests of tokens


def formula_run(folder, *words):
    """Flags of a set of 30 codes, with a formula for its codebook."""
    return words_of(flag_values(make_data(folder)) | {'--codebook-path': 'fsq:5,3,2'}) + list(words)


def test_a_run_on_a_formula(tmp_path, monkeypatch, capsys):
    words = [*SMALL, *formula_run(tmp_path), '--output-dir', tmp_path / 'run']
    run_here(*words, '--epochs', 1)
    run_here(*words, '--epochs', 2, '--resume', 'auto')
    path = str(tmp_path / 'run' / 'checkpoint.pth')
    assert 'note: --model' not in capsys.readouterr().out
    assert states(path)['model']['patch_embed.proj.weight'].shape[1] == 4
    checkpoint = load_checkpoint(path)
    assert checkpoint['args']['model_kwargs']['in_chans'] == 4
    trained = load_model(checkpoint, path, load_codebook('fsq:5,3,2'))
    assert trained.program == 'main_seit.py' and trained.model.in_chans == 4
    # evaluated by what the checkpoint says alone
    data = flag_values(make_data(tmp_path))
    run_here('--eval', '--resume', path, '--device', 'cpu', '--val-token-file', data['--val-token-file'],
             '--val-label-file', data['--val-label-file'])
    out = capsys.readouterr().out
    assert '--codebook-path fsq:5,3,2' in out and 'note: --' not in out
    line = mistake('--eval', '--resume', path, '--device', 'cpu', '--val-token-file', data['--val-token-file'],
                   '--val-label-file', data['--val-label-file'], '--codebook-path', 'fsq:5,2,3')
    assert 'trained with another codebook' in line


def test_three_elements_are_no_pixels(tmp_path):
    state, _ = weights()
    state[TABLES[0]] = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    torch.save(state, tmp_path / 'tok.ckpt')
    data = words_of(flag_values(make_data(tmp_path)) | {'--codebook-path': tmp_path / 'tok.ckpt'})
    run_here(*SMALL, *data, '--epochs', 1, '--output-dir', tmp_path / 'run')
    path = str(tmp_path / 'run' / 'checkpoint.pth')
    assert load_model(load_checkpoint(path), path).program == 'main_seit.py'


def test_widths_that_do_not_fit(tmp_path):
    words = formula_run(tmp_path, '--epochs', 1)
    small = [*SMALL[:SMALL.index('num_heads=2') + 1], 'in_chans=6', *SMALL[SMALL.index('num_heads=2') + 1:]]
    assert "the codebook's rows have 4 elements, but deit_tiny_token_32 reads 6" in mistake(*small, *words)
    plain = words_of(flag_values(make_data(tmp_path, width=4)))
    assert 'rows have 4 elements, but deit_tiny_token_32 reads 32' in mistake(*SMALL, *plain, '--epochs', 1)
    assert main_seit.parse_args([]).codebook_path == 'tokens/codebook.ckpt'
