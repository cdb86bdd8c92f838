"""A trained model from its checkpoint: of each of the four programs, in small."""
import pytest
import torch

import main_mtm_finetune
import main_mtm_pretrain
import main_pixels
from helpers import SMALL as SEIT_FLAGS
from helpers import call, fails, make_data, run_here, same_weights, smooth_images, states
from inference.models import load_model, make_prepare, program_of, weights_of
from masked import SIZES, split_flags
from masked import SMALL as MASKED_FLAGS
from models_seit import create_model
from seitpp.models_mtm_finetune import CodeVisionTransformer
from seitpp.mtm_recipe import canonical_codes
from token_augment import EvalTransform
from token_files.codebook import load_codebook
from training.checkpoints import load_checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')
CPU = torch.device('cpu')
PROGRAMS = ('main_seit.py', 'main_mtm_pretrain.py', 'main_mtm_finetune.py', 'main_pixels.py')
SMALL = {'depth': 1, 'embed_dim': 32, 'num_heads': 2}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Paths of a checkpoint of each program, of four classes or three, and of the codebook."""
    folder = tmp_path_factory.mktemp('runs')
    words = make_data(folder)
    run_here(*SEIT_FLAGS, *words, '--epochs', 1, '--no-eval', '--output-dir', folder / 'seit')
    pretraining, finetuning = split_flags(words)
    call(main_mtm_pretrain, *MASKED_FLAGS, *pretraining, '--tokenadapt-path', '', '--epochs', 1, '--output-dir',
         folder / 'pretrained')
    call(main_mtm_finetune, '--device', 'cpu', '--model', 'deit_tiny_token_32', *SIZES, '--batch-size', 4,
         '--input-size', 64, *finetuning, '--tokenadapt-path', '', '--epochs', 1, '--no-eval', '--output-dir',
         folder / 'finetuned')
    smooth_images(folder / 'images')
    call(main_pixels, '--device', 'cpu', '--model', 'deit_tiny_patch16_224', *SIZES, '--input-size', 32,
         '--eval-crop-ratio', 0.5, '--batch-size', 6, '--num-workers', 0, '--train-path', folder / 'images',
         '--no-eval', '--epochs', 1, '--output-dir', folder / 'pixels')
    files = {'main_seit.py': 'seit/checkpoint.pth', 'main_mtm_pretrain.py': 'pretrained/checkpoint-last.pth',
             'main_mtm_finetune.py': 'finetuned/checkpoint-last.pth', 'main_pixels.py': 'pixels/checkpoint.pth'}
    return {program: str(folder / file) for program, file in files.items()} | {'codebook': folder / 'codebook.ckpt'}


def loaded(path, *options, **more):
    return load_model(load_checkpoint(path), path, *options, **more)


@pytest.mark.parametrize('program, name, size, crop_ratio, classes, class_names', [
    ('main_seit.py', 'deit_tiny_token_32', 8, None, 4, None),
    ('main_mtm_pretrain.py', 'mae_token_vit_base_patch16_dec512d4b_k2s2_vitvqgan_32', 8, None, 0, None),
    ('main_mtm_finetune.py', 'deit_tiny_token_32', 8, None, 4, None),
    ('main_pixels.py', 'deit_tiny_patch16_224', 32, 0.5, 3, ['ant', 'bee', 'cat'])])
def test_a_checkpoint_says_what_it_is(runs, program, name, size, crop_ratio, classes, class_names):
    trained = loaded(runs[program])
    assert program_of(load_checkpoint(runs[program])) == program
    assert (trained.program, trained.name, trained.input_size, trained.crop_ratio, trained.classes,
            trained.class_names) == (program, name, size, crop_ratio, classes, class_names)
    assert trained.model.num_classes == classes and not trained.model.training


@pytest.mark.parametrize('program', ['main_seit.py', 'main_mtm_finetune.py', 'main_pixels.py'])
def test_the_weights_are_those_of_the_file_or_its_averages(runs, program, tmp_path, capsys):
    checkpoint = states(runs[program])
    same_weights(loaded(runs[program]).model, checkpoint['model'])
    said = capsys.readouterr().out
    assert ('note: ' in said and '; --use-ema takes those' in said) == bool(checkpoint['model_ema'])
    checkpoint['model_ema'] = {name: value + 1 for name, value in checkpoint['model'].items()}
    torch.save(checkpoint, tmp_path / 'averaged.pth')
    same_weights(loaded(str(tmp_path / 'averaged.pth'), use_ema=True).model, checkpoint['model_ema'])
    assert not capsys.readouterr().out


def test_of_pre_training_the_encoder_is_taken(runs):
    """As the classifier of fine-tuning, without decoder and head."""
    path = runs['main_mtm_pretrain.py']
    model = loaded(path).model
    assert isinstance(model, CodeVisionTransformer)
    weights = states(path)['model']
    same_weights(model, {name: weights[name] for name in model.state_dict()})
    assert not any(name.startswith(('decoder', 'mlm_layer', 'head')) for name in model.state_dict())


@pytest.mark.parametrize('program', PROGRAMS)
def test_it_reads_what_its_program_reads(runs, program):
    codebook = load_codebook(runs['codebook'])
    trained = loaded(runs[program], None if program == 'main_pixels.py' else codebook)
    prepare = make_prepare(trained, CPU, codebook)
    generator = torch.Generator().manual_seed(0)
    if program == 'main_pixels.py':
        inputs = prepare(torch.randint(256, (2, 3, 32, 32), generator=generator).to(torch.uint8))
        assert inputs.dtype == torch.float32 and inputs.abs().max() < 3
    else:
        codes = torch.randint(30, (2, 10, 10), generator=generator).to(torch.uint16)
        inputs = prepare(codes)
        middle = codes[:, 1:9, 1:9].long()
        wanted = EvalTransform(codebook, 8, CPU)(codes) if program == 'main_seit.py' else canonical_codes(codebook)[
            middle]
        assert torch.equal(inputs, wanted)
        fails(lambda: prepare(codes[:, :6, :6]), '8x8')
    with torch.no_grad():
        assert trained.model(inputs).shape == (2, trained.classes or 32)


@pytest.mark.parametrize('kwargs', [{'reg_tokens': 4}, {'reg_tokens': 5, 'class_token': False}, {'reg_tokens': 8},
                                    {'reg_tokens': 4, 'no_embed_class': True}])
@pytest.mark.parametrize('size', [4, 6])
def test_the_size_of_a_model_with_registers(kwargs, size, tmp_path):
    """2x2 patches and 5 tokens are as many positions as 3x3 patches alone."""
    kwargs = SMALL | kwargs
    model = create_model('deit_tiny_token_32', kwargs, 3, size)
    flags = {'model': 'deit_tiny_token_32', 'model_kwargs': kwargs}
    torch.save({'model': model.state_dict(), 'args': flags}, tmp_path / 'x.pth')
    trained = loaded(str(tmp_path / 'x.pth'))
    assert trained.input_size == size
    same_weights(trained.model, model.state_dict())


def test_codes_of_one_direction_are_one_code_to_masked_models(runs):
    """And two to main_seit.py's model, which reads rows of the codebook."""
    codebook = load_codebook(runs['codebook'])
    codebook[7] = 2 * codebook[3]
    codes = torch.full((1, 8, 8), 7, dtype=torch.uint16)
    for program, same in (('main_mtm_finetune.py', True), ('main_seit.py', False)):
        prepare = make_prepare(loaded(runs[program], codebook), CPU, codebook)
        assert torch.equal(prepare(codes), prepare(torch.full_like(codes, 3))) == same


def test_what_is_given_wins_over_the_flags_of_the_file(runs, tmp_path):
    """Without flags in the file it is needed."""
    path = str(tmp_path / 'bare.pth')
    for program, name in (('main_seit.py', 'deit_tiny_token_32'), ('main_mtm_pretrain.py', 'deit_tiny_token_32'),
                          ('main_mtm_finetune.py', 'deit_tiny_token_32'), ('main_pixels.py', 'deit_tiny_patch16_224')):
        weights = states(runs[program])['model']
        torch.save({'model': weights}, path)
        fails(lambda: loaded(path), 'bare.pth: does not say of which model it is: give --model')
        trained = loaded(path, name=name, model_kwargs=SMALL, input_size=32)
        assert (trained.program, trained.name) == (program, name)
        model_weights = trained.model.state_dict()
        assert all(torch.equal(model_weights[key], weights[key]) for key in model_weights)
    pixels = runs['main_pixels.py']
    assert loaded(pixels, crop_ratio=1.).crop_ratio == 1
    fails(lambda: loaded(pixels, input_size=48), 'pixels/checkpoint.pth: does not fit the model: pos_embed')
    assert loaded(pixels, name='deit_tiny_patch16_224').name == 'deit_tiny_patch16_224'  # with its arguments
    fails(lambda: loaded(pixels, name='deit_small_patch16_224'), 'does not fit the model')  # another's has not these
    fails(lambda: loaded(runs['main_seit.py'], model_kwargs={'depth': 2}), 'does not fit the model')


def test_a_codebook_of_other_tokens_is_refused(runs):
    codebook = load_codebook(runs['codebook'])
    fails(lambda: loaded(runs['main_seit.py'], codebook[:, :12]), "the codebook's rows have 12 elements")
    for program in ('main_mtm_pretrain.py', 'main_mtm_finetune.py'):
        assert loaded(runs[program], codebook).classes == (0 if program == 'main_mtm_pretrain.py' else 4)
        fails(lambda: loaded(runs[program], codebook[:20]), 'its model reads 30 codes, but the codebook has 20 rows')


@pytest.mark.parametrize('program, change, message', [
    ('main_seit.py', lambda c: c['model'].pop('pos_embed'), 'x.pth: has no position embeddings of a square grid'),
    ('main_seit.py', lambda c: c['model'].update(pos_embed=torch.zeros(1, 24, 32)), 'of a square grid'),
    ('main_seit.py', lambda c: c['model'].pop('head.bias'), 'x.pth: no head.bias among its weights'),
    ('main_seit.py', lambda c: c['model'].pop('norm.bias'), 'x.pth: does not fit the model: norm.bias: missing'),
    ('main_seit.py', lambda c: c['args'].update(model='nix'), '--model nix is none of'),
    ('main_seit.py', lambda c: c['args'].update(model_kwargs='depth=1'), 'x.pth: does not say of which model it is'),
    ('main_mtm_pretrain.py', lambda c: c['model'].pop('token_emb.word_embeddings.weight'),
     'x.pth: has no embeddings of codes'),
    ('main_pixels.py', lambda c: c['args'].update(input_size='32'), 'x.pth: does not say how it reads images'),
    ('main_pixels.py', lambda c: c['args'].update(eval_crop_ratio=2), 'x.pth: does not say how it reads images'),
    ('main_pixels.py', lambda c: c['model'].pop('head.bias'), 'x.pth: no head.bias among its weights')])
def test_a_damaged_checkpoint_is_one_line(runs, tmp_path, program, change, message):
    checkpoint = states(runs[program])
    change(checkpoint)
    torch.save(checkpoint, tmp_path / 'x.pth')
    fails(lambda: loaded(str(tmp_path / 'x.pth')), message)


def test_weights_that_are_averaged_must_be_there(runs):
    path = runs['main_mtm_finetune.py']
    checkpoint = load_checkpoint(path)
    assert weights_of(checkpoint, path, False) is checkpoint['model']
    fails(lambda: weights_of(checkpoint, path, True), 'checkpoint-last.pth: holds no EMA weights; leave --use-ema out')


def test_patches_of_one_code(tmp_path, capsys):
    """Trained, resumed, evaluated, read from its checkpoint, and a start for patches of 2x2 codes."""
    data = make_data(tmp_path)
    at = SEIT_FLAGS.index('depth=1')
    words = [*SEIT_FLAGS[:at], 'patch_size=1', *SEIT_FLAGS[at:], *data, '--output-dir', tmp_path / 'run']
    run_here(*words, '--epochs', 1)
    run_here(*words, '--epochs', 2, '--resume', 'auto')
    path = str(tmp_path / 'run' / 'checkpoint.pth')
    trained = loaded(path, load_codebook(tmp_path / 'codebook.ckpt'))
    assert (trained.program, trained.input_size, trained.model.patch_embed.num_patches) == ('main_seit.py', 8, 64)
    run_here('--eval', '--resume', path, '--device', 'cpu', *data)
    capsys.readouterr()
    run_here(*SEIT_FLAGS, *data, '--epochs', 1, '--finetune', path)
    out = capsys.readouterr().out
    assert 'resampled from 8x8 to 4x4' in out and 'patch_embed.proj.* (another shape)' in out
