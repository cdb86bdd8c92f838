"""The classifiers of SeiT++ against the published names, logits, training steps; and starting them."""
import json

import numpy as np
import pytest
import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay

import engine
from engine import StepOptions
from helpers import fails, seitpp_state
from seitpp import models_mtm
from seitpp.models_mtm import keep_token_adapt
from seitpp.models_mtm_finetune import MODELS, CodeVisionTransformer, create_model, encoder_weights, load_encoder
from seitpp.mtm_recipe import StepCosine
from training.checkpoints import TrainState, without_token_adapt
from masked import NAME, codes_of, rng
from seitpp.token_adapt import TokenAdapt

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = {'embed_dim': 96, 'depth': 4, 'num_heads': 3}
TINY = {'depth': 1, 'embed_dim': 32, 'num_heads': 2}
DECODER = {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 2}


def filled(model):
    """The golden weights."""
    model.load_state_dict(seitpp_state({name: tuple(value.shape) for name, value in model.state_dict().items()}))
    return model.eval()


@pytest.fixture(scope='module')
def full():
    """The published model, with TokenAdapt in it."""
    torch.manual_seed(0)
    model = create_model('deit_base_token_32', {}, num_classes=1000, drop_path_rate=0.1)
    keep_token_adapt(model, TokenAdapt(391, 32))
    return model


def tiny(codes=20, size=8, classes=3, **more):
    return create_model('deit_tiny_token_32', {**TINY, **more}, codebook_size=codes, img_size=size, num_classes=classes)


def pretrained(tmp_path, codes=20, size=8, **more):
    """A small pre-trained checkpoint: its path and weights."""
    model = models_mtm.create_model(NAME, {**TINY, **DECODER, **more}, codes, size)
    keep_token_adapt(model, TokenAdapt(codes, 32, size, size))
    torch.save({'model': model.state_dict()}, tmp_path / 'pretrained.pth')
    return tmp_path / 'pretrained.pth', model.state_dict()


# ---------------------------------------------------------------- the published outputs

def test_state_dict_has_published_names_and_shapes_in_their_order(full, golden):
    shapes = golden('seitpp/state_dict_shapes.json')
    state = {name: list(value.shape) for name, value in full.state_dict().items()}
    assert list(state.items()) == list(shapes['deit_base_token_32 (SeiT++ fine-tuning)'].items())
    assert sum(value.numel() for value in full.state_dict().values()) == shapes['parameters']['finetune'] == 90_593_071
    assert sum(value.numel() for value in full.parameters() if value.requires_grad) == 86_088_712


def test_initialization_is_the_published_one(full, golden):
    parameters = full.state_dict(keep_vars=True)
    for name, (_, _, _, std, trains) in golden('seitpp/init_stats.json')['finetune'].items():
        frozen = name.startswith(('conversion_function', 'reverse_transform'))  # published too, once it is loaded
        assert parameters[name].requires_grad == (trains and not frozen), name
        few = parameters[name].numel() < 1000
        ours = parameters[name].detach().std(correction=0).item()
        assert ours == pytest.approx(std, rel=0.15 if few else 0.05), name


@torch.no_grad()
@pytest.mark.parametrize('key, options', [('small', {'num_classes': 10, **SMALL}), ('full', {})])
def test_features_and_logits_are_the_published_ones(golden, key, options):
    z = golden('seitpp/finetune_forward.npz')
    model = filled(timm.create_model('mtm_deit_base_token_32', **options))
    codes = codes_of(100, 2)
    assert np.array_equal(codes.numpy(), z['codes'])
    features = model.forward_head(model.forward_features(codes), pre_logits=True)
    np.testing.assert_allclose(features, z[f'{key}_features'], atol=1e-4)
    np.testing.assert_allclose(model(codes), z[f'{key}_logits'], atol=1e-4)


def test_four_training_steps_are_the_published_ones(golden):
    z = golden('seitpp/finetune_train_steps.npz')
    model = filled(create_model('deit_base_token_32', SMALL, num_classes=10))
    groups = param_groups_layer_decay(model, 0.1, model.no_weight_decay(), layer_decay=0.65)
    optimizer = torch.optim.AdamW(groups, 2e-3, fused=True)
    state = TrainState(model, model, optimizer, StepCosine(optimizer, 3, 1, 1e-6, 2, 2),
                       torch.amp.GradScaler('cpu', init_scale=1., growth_interval=1 << 30))
    model.train = lambda mode=True: model  # the golden steps have no dropout
    criterion = SoftTargetCrossEntropy()
    losses, lrs, norms = [], [], []

    def loss_of(model, batch, generator):
        loss = criterion(model(batch[0]), batch[1])
        losses.append(loss.item())
        lrs.append([group['lr'] for group in optimizer.param_groups])
        return loss

    def norm_of(*_):
        norms.append(torch.stack([value.grad.norm() for value in model.parameters()]).norm())
    optimizer.register_step_pre_hook(norm_of)
    codes = [torch.from_numpy(rng(110 + s).integers(0, 391, (4, 28, 28))) for s in range(4)]
    batches = list(zip(codes, torch.from_numpy(z['targets'])))
    for state.epoch in range(2):
        state.step = 0
        engine.train_one_epoch(state, batches[2 * state.epoch:2 * state.epoch + 2], loss_of, StepOptions(2))
    np.testing.assert_allclose(losses, z['losses'], atol=1e-5)
    np.testing.assert_allclose(lrs, z['lrs'], atol=1e-12)
    np.testing.assert_allclose(norms, z['grad_norms'], atol=1e-4)
    with torch.no_grad():
        np.testing.assert_allclose(model(codes[0]), z['after_logits'], atol=1e-4)
    np.testing.assert_allclose(model.pos_embed.detach()[:, ::16], z['after_pos_embed'], atol=1e-4)
    np.testing.assert_allclose(model.token_emb.word_embeddings.weight.detach()[::8], z['after_word_embeddings'],
                               atol=1e-4)


@pytest.mark.parametrize('layer_decay', ['0.65', '0.75'])
def test_parameter_groups_are_the_published_ones(full, golden, layer_decay):
    names = {id(value): name for name, value in full.named_parameters()}
    groups = param_groups_layer_decay(full, 0.1, full.no_weight_decay(), layer_decay=float(layer_decay))
    expected = golden('seitpp/param_groups.json')[f'finetune layer_decay {layer_decay} wd 0.1']
    assert len(groups) == len(expected)
    for ours, theirs in zip(groups, expected):
        assert ours['lr_scale'] == pytest.approx(theirs['lr_scale'], abs=1e-12)
        assert ours['weight_decay'] == theirs['weight_decay']
        assert [names[id(value)] for value in ours['params']] == theirs['names']
    assert groups[-1]['lr_scale'] == 1  # the learning rate that is shown and logged


def test_loading_is_the_published_one(full, golden):
    expected = golden('seitpp/finetune_loading.json')
    weights = golden('seitpp/state_dict_shapes.json')[NAME]
    wanted = full.state_dict()
    assert [name for name in wanted if name not in weights] == expected['missing']
    assert [name for name in weights if name not in wanted] == expected['unexpected']
    taken = encoder_weights(weights)
    assert sorted([*taken, *expected['missing']]) == sorted(without_token_adapt(wanted))
    rates = [getattr(block.drop_path1, 'drop_prob', 0.) for block in full.blocks]
    assert rates == [getattr(block.drop_path2, 'drop_prob', 0.) for block in full.blocks]
    np.testing.assert_allclose(rates, expected['drop_path per block'], atol=1e-6)
    assert sorted(full.no_weight_decay() - {'reg_token'}) == expected['no_weight_decay']  # which it has not


# ---------------------------------------------------------------- starting from a checkpoint

def test_the_encoder_of_pretraining_starts_it(tmp_path, capsys):
    path, weights = pretrained(tmp_path)
    model = tiny()
    load_encoder(model, str(path))
    state = model.state_dict()
    for name, value in encoder_weights(weights).items():
        assert torch.equal(state[name], value), name
    assert not state['head.bias'].any() and 0 < state['head.weight'].abs().max() < 2e-4
    assert model.pos_embed.requires_grad and 'the head from scratch' in capsys.readouterr().out
    torch.save({'model': state}, tmp_path / 'finetuned.pth')  # a fine-tuned one with another head starts it too
    other = tiny(classes=7)
    load_encoder(other, str(tmp_path / 'finetuned.pth'))
    assert torch.equal(other.norm.weight, state['norm.weight']) and other.head.weight.shape == (7, 32)


def test_position_embeddings_fit_another_grid(tmp_path):
    path, weights = pretrained(tmp_path)
    model = tiny(size=12)
    load_encoder(model, str(path))
    assert model.pos_embed.shape == (1, 37, 32) and torch.equal(model.pos_embed[:, 0], weights['pos_embed'][:, 0])
    corners = [torch.nn.functional.cosine_similarity(model.pos_embed[0, a], weights['pos_embed'][0, b], 0).item()
               for a, b in ((1, 1), (36, 16))]
    assert min(corners) > 0.9


def test_registers_start_from_scratch_and_then_are_kept(tmp_path, capsys):
    """Pre-training has none; 4 of them and the class token before 2x2 patches are as many positions as 3x3 patches."""
    path, weights = pretrained(tmp_path)
    model = tiny(reg_tokens=4)
    own = model.reg_token.clone()
    load_encoder(model, str(path))
    assert torch.equal(model.reg_token, own) and torch.equal(model.pos_embed[:, 0], weights['pos_embed'][:, 0])
    assert torch.equal(model.pos_embed[:, 5:], weights['pos_embed'][:, 1:])
    assert 'from scratch for 4 of 5 prefix tokens, started from scratch: reg_token' in capsys.readouterr().out
    torch.save({'model': model.state_dict()}, tmp_path / 'finetuned.pth')
    other = tiny(size=4, reg_tokens=4)
    load_encoder(other, str(tmp_path / 'finetuned.pth'))
    assert torch.equal(other.reg_token, own) and torch.equal(other.pos_embed[:, :5], model.pos_embed[:, :5])
    assert 'pos_embed resampled from 4x4 to 2x2' in capsys.readouterr().out


def test_dropout_and_drop_path_are_where_the_published_model_has_them():
    model = create_model('deit_tiny_token_32', {**TINY, 'depth': 2}, img_size=8, drop_path_rate=0.1)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and (
        module.p)}
    assert rates == {'token_emb.dropout': 0.1}
    assert [block.drop_path1.drop_prob for block in list(model.blocks)[1:]] == [pytest.approx(0.1)]


def test_what_cannot_start_it_is_one_line(tmp_path):
    path, _ = pretrained(tmp_path)
    fails(lambda: load_encoder(tiny(codes=21), str(path)), 'reads 20 codes, but the codebook has 21 rows')
    fails(lambda: load_encoder(tiny(embed_dim=64), str(path)), 'pretrained.pth: .*do not fit')
    fails(lambda: load_encoder(tiny(depth=2), str(path)), 'does not fit the model: blocks.1.norm1.weight: missing')
    seit = timm.create_model('deit_tiny_token_32', img_size=8, **TINY)
    torch.save({'model': seit.state_dict()}, tmp_path / 'seit.pth')
    fails(lambda: load_encoder(tiny(), str(tmp_path / 'seit.pth')), 'seit.pth: its weights belong to main_seit.py, '
          'whose network is another: give a checkpoint of main_mtm_pretrain.py or main_mtm_finetune.py$')
    (tmp_path / 'json.pth').write_text(json.dumps({}))
    fails(lambda: load_encoder(tiny(), str(tmp_path / 'json.pth')), 'json.pth')


# ---------------------------------------------------------------- names, and what timm's users do

def test_one_name_means_two_networks_in_two_programs():
    seit = timm.create_model('deit_tiny_token_32', **TINY)
    ours = tiny()
    assert not isinstance(seit, CodeVisionTransformer) and isinstance(ours, CodeVisionTransformer)
    assert sorted(MODELS) == ['deit_base_token_32', 'deit_small_token_32', 'deit_tiny_token_32']
    assert len(timm.create_model('mtm_deit_small_token_32', depth=1).blocks) == 1
    with pytest.raises(ValueError, match='hosted'):
        timm.create_model('mtm_deit_tiny_token_32', pretrained=True)


def test_it_compiles_in_one_graph():
    model = tiny().eval()
    codes = torch.randint(0, 20, (2, 8, 8))
    inputs = (codes,)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='eager')(*inputs), model(*inputs))


def test_forward_intermediates():
    model = tiny(depth=2).eval()
    codes = torch.randint(0, 20, (2, 8, 8))
    final, maps = model.forward_intermediates(codes)
    assert [tuple(each.shape) for each in maps] == [(2, 32, 4, 4)] * 2
    torch.testing.assert_close(model.forward_head(final), model(codes))


@pytest.mark.parametrize('name, model_kwargs, words', [
    ('deit_base_token_4', {}, '--model deit_base_token_4 is none of deit_base_token_32'),
    ('mtm_deit_tiny_token_32', {}, 'is none of'), ('deit_tiny_token_32', {'deep': 1}, "--model-kwargs {'deep': 1}"),
    ('deit_tiny_token_32', {'patch_size': 4}, 'patch_size'), ('deit_tiny_token_32', {'num_heads': 7}, 'num_heads')])
def test_mistakes_are_one_line(name, model_kwargs, words):
    fails(lambda: create_model(name, model_kwargs, codebook_size=20, img_size=8), words)
