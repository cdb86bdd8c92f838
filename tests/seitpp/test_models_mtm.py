"""Masked-token models against the published names, masks, logits, gradients and training steps."""
import math
import zlib

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

import engine
from engine import StepOptions
from helpers import fails, seitpp_state
from masked import NAME, codes_of, rng
from seitpp.models_mtm import (MaskRatio, MaskedTokenModel, create_model, draw_masks, keep_token_adapt,
                               masked_token_loss, masks_of)
from seitpp.mtm_recipe import StepCosine
from seitpp.token_adapt import TokenAdapt
from training.checkpoints import TrainState

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = {'embed_dim': 96, 'depth': 2, 'num_heads': 3, 'decoder_embed_dim': 64, 'decoder_depth': 2,
         'decoder_num_heads': 4}
TINY = {'codebook_size': 20, 'img_size': 8, 'embed_dim': 32, 'depth': 1, 'num_heads': 2, 'decoder_embed_dim': 16,
        'decoder_depth': 1, 'decoder_num_heads': 2}


def noise_of(k, batch):
    return torch.from_numpy(rng(k).random((batch, 196), dtype=np.float32))


def filled(**sizes):
    """A model with the golden weights; its fixed tables are computed."""
    model = timm.create_model(NAME, **sizes).eval()
    fixed = {name: value for name, value in model.state_dict().items() if name.endswith('coder_pos_embed')}
    fixed['pos_embed'] = model.pos_embed
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(seitpp_state(shapes) | fixed)
    return model


@pytest.fixture(scope='module')
def full():
    """The published model, with TokenAdapt in it."""
    torch.manual_seed(1)  # 32 biases are few: their deviation is as published to 15 % with most seeds
    model = timm.create_model(NAME)
    keep_token_adapt(model, TokenAdapt(391, 32))
    return model


@pytest.fixture(scope='module')
def small():
    return filled(**SMALL)


# ---------------------------------------------------------------- names and initialization

def test_state_dict_has_published_names_and_shapes_in_their_order(full, golden):
    shapes = golden('seitpp/state_dict_shapes.json')
    state = {name: list(value.shape) for name, value in full.state_dict().items()}
    assert list(state.items()) == list(shapes[NAME].items())
    numbers = sum(value.numel() for value in full.state_dict().values())
    assert numbers == shapes['parameters']['mtm'] == 103_096_974
    trained = sum(value.numel() for value in full.parameters() if value.requires_grad)
    assert trained == 98_340_455


def test_initialization_is_the_published_one(full, golden):
    parameters = full.state_dict(keep_vars=True)
    for name, (low, high, mean, std, trains) in golden('seitpp/init_stats.json')['mtm'].items():
        value = parameters[name].detach()
        frozen = name.startswith(('conversion_function', 'reverse_transform'))  # published too, once it is loaded
        assert parameters[name].requires_grad == (trains and not frozen), name
        few = value.numel() < 1000
        assert value.std(correction=0).item() == pytest.approx(std, rel=0.15 if few else 0.05), name
        assert value.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(value.numel()) + 1e-3 + (
            std / 10 if few else 0)), name
        if not std:
            assert value.min() == value.max() == low == high
        elif name.endswith('weight') and 'word' not in name:  # uniform: the ends are those of the distribution
            assert value.abs().max().item() == pytest.approx(max(-low, high), rel=0.02), name


def test_position_tables_are_the_published_ones(full, golden):
    z = golden('seitpp/pos_embed.npz')
    for table, key in ((full.pos_embed, 'mtm_768'), (full.decoder_pos_embed, 'mtm_512')):
        np.testing.assert_allclose(table[0, ::13], z[key], atol=5e-6)
        assert not table[0, 0].any()


def test_pretrained_is_refused():
    with pytest.raises(ValueError, match='hosted'):
        timm.create_model(NAME, pretrained=True)


# ---------------------------------------------------------------- masks

def test_ratios_have_the_published_distribution(golden):
    stats = golden('seitpp/mask_ratio.json')
    ratio = MaskRatio()
    for share, value in stats['quantiles'].items():
        assert ratio.quantile(torch.tensor(float(share), dtype=torch.float64)).item() == pytest.approx(value, abs=1e-6)
    shares = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    values = ratio.quantile(shares)
    assert values.min() == stats['min'] and values.max() == stats['max']
    assert values.mean().item() == pytest.approx(stats['mean'], abs=1e-4)
    assert values.std().item() == pytest.approx(stats['sd'], abs=1e-4)
    for value, share in stats['cdf points'].items():
        assert (values < float(value)).double().mean().item() == pytest.approx(share, abs=2e-5)
    mean, least, most = stats['masked patches ceil(196 r), 200k draws: mean, min, max']
    counts = (196 * values).ceil()
    assert counts.mean().item() == pytest.approx(mean, abs=0.5) and (counts.min(), counts.max()) == (least, most)


def test_ratios_are_the_published_draws_of_numpys_numbers(golden):
    expected = golden('seitpp/mask_ratio.json')['first 8 of rvs(1)[0] after numpy.random.seed(seed)']
    shares = torch.from_numpy(np.random.RandomState(0).uniform(size=8))
    np.testing.assert_allclose(MaskRatio().quantile(shares), expected, atol=1e-9)


def test_masks_of_a_generator():
    ratio = MaskRatio()
    counts = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        seen, masked = draw_masks(3, 196, ratio, generator)
        again = draw_masks(3, 196, ratio, torch.Generator().manual_seed(seed))
        assert torch.equal(seen, again.seen) and torch.equal(masked, again.masked)
        assert seen.shape == (3, 117) and (seen.diff(dim=1) > 0).all()
        number, = set(masked.sum(1).tolist())  # alike in all images
        counts.add(number)
        unseen = torch.ones(3, 196, dtype=torch.bool).scatter(1, seen, False)
        assert (masked | ~unseen).all() and 79 <= number <= 196  # whatever is not seen is masked
        assert not torch.equal(masked[0], masked[1]) or number == 196
    assert len(counts) > 10


@pytest.mark.parametrize('ratio, words', [
    ((0.6, 0.5), 'mask ratios from 0.6 to 0.5: .*rising order'), ((-0.1, 0.5), 'from 0 to 1'),
    ((0.4, 1.2), 'from 0 to 1'), ((1., 1.), 'below 1'), ((0.4, 1., 9., 0.1), 'hardly any ratio from 0.4 to 1'),
    ((0., 0.), '--mask-ratio-max 0 masks nothing'), ((0.4, 0.), '--mask-ratio-max 0 masks nothing'),
    ((0.4, 1., 0.45, 1e9), 'hardly any ratio .* another deviation'),
    ((0., 1e-300), 'ratios further apart')])
def test_ratios_out_of_order_are_refused(ratio, words):
    fails(lambda: MaskRatio(*ratio), words)


@pytest.mark.parametrize('ratio', [(0., 1e-4), (1e-300, 1e-300), (0., 1., 0., 1e-12)])
def test_the_smallest_ratio_masks_a_patch(ratio):
    for seed in range(5):
        _, masked = draw_masks(2, 4, MaskRatio(*ratio), torch.Generator().manual_seed(seed))
        assert (masked.sum(1) == 1).all()


def test_one_ratio_and_no_mask_are_possible():
    share = torch.rand(9, dtype=torch.float64)
    assert (MaskRatio(0.5, 0.5, 0.9).quantile(share) == 0.5).all()
    seen, masked = masks_of(torch.rand(2, 16), 0., 0.)
    assert seen.shape == (2, 16) and not masked.any()
    logits = torch.randn(2, 64, 5, requires_grad=True)
    loss = masked_token_loss(logits, torch.zeros(2, 8, 8, dtype=torch.int64), masked)
    assert loss == 0


# ---------------------------------------------------------------- the published outputs

@torch.no_grad()
def check_forward(model, z, key, codes, noise, every):
    """Masks, features, logits and losses against a golden file."""
    for name, value in (('codes', codes), ('noise', noise)):
        if f'{key}{name}' in z:
            assert np.array_equal(value.numpy(), z[f'{key}{name}'])
    masks = masks_of(noise, float(z[f'{key}ratio']), 0.4)
    dropped = torch.ones(noise.shape, dtype=torch.bool).scatter(1, masks.seen, False)
    assert np.array_equal(dropped.numpy(), z[f'{key}drop'][:, 1:] == 1) and not z[f'{key}drop'][:, 0].any()
    assert np.array_equal(masks.masked.numpy(), z[f'{key}masked'][:, 1:] == 1)
    latent = model.encode(codes, masks)
    logits = model(codes, *masks)
    np.testing.assert_allclose(latent[:, ::every[0]], z[f'{key}latent'], atol=1e-4)
    np.testing.assert_allclose(logits[:, ::every[1]], z[f'{key}logits_every16'], atol=1e-4)
    for name, value in (('mean', logits.mean()), ('std', logits.std())):
        assert value.item() == pytest.approx(float(z[f'{key}logits_{name}']), abs=1e-4)
    everything = torch.nn.functional.cross_entropy(logits.transpose(1, 2), codes.flatten(1), reduction='none')
    np.testing.assert_allclose(everything, z[f'{key}per_code_ce'], atol=1e-4)
    for name, options in (('loss', {}), ('loss_smoothing01', {'smoothing': 0.1}), ('loss_bce', {'bce': True})):
        loss = masked_token_loss(logits, codes, masks.masked, **options)
        assert loss.item() == pytest.approx(float(z[f'{key}{name}']), abs=1e-5), name


@pytest.mark.parametrize('r', range(4))
def test_forward_is_the_published_one(small, golden, r):
    z = golden('seitpp/mtm_forward_small.npz')
    check_forward(small, z, f'r{r}_', codes_of(10 + 10 * r, 3), noise_of(11 + 10 * r, 3), (9, 64))


def test_forward_of_the_published_size_is_the_published_one(golden):
    check_forward(filled(), golden('seitpp/mtm_forward_full.npz'), '', codes_of(60, 2), noise_of(61, 2), (16, 48))


def test_gradients_are_the_published_ones(small, golden):
    expected = golden('seitpp/mtm_grads.json')
    codes = codes_of(70, 3)
    masks = masks_of(noise_of(71, 3), 0.6, 0.4)
    small.zero_grad()
    loss = masked_token_loss(small(codes, *masks), codes, masks.masked)
    loss.backward()
    assert loss.item() == pytest.approx(expected['loss'], abs=1e-5)
    gradients = {name: value.grad for name, value in small.named_parameters()}
    theirs = {name: row for name, row in expected['grads'].items()
              if not name.startswith(('conversion_function', 'reverse_transform'))}
    assert gradients.keys() == theirs.keys()
    for name, row in theirs.items():
        if row is None:
            assert gradients[name] is None, name
            continue
        gradient = gradients[name].double()
        weights = rng(zlib.crc32(name.encode()) + 1).standard_normal(tuple(gradient.shape))
        ours = [gradient.norm().item(), gradient.abs().max().item(), (gradient.numpy() * weights).sum()]
        np.testing.assert_allclose(ours, row, atol=max(1e-4 * row[0], 1e-9), rtol=1e-6, err_msg=name)


def test_four_training_steps_are_the_published_ones(golden):
    z = golden('seitpp/mtm_train_steps.npz')
    model = filled(**SMALL)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), 1e-3, (0.9, 0.95), fused=True)
    state = TrainState(model, model, optimizer, StepCosine(optimizer, 3, 1, 0., 2, 2),
                       torch.amp.GradScaler('cpu', init_scale=1., growth_interval=1 << 30))
    model.train = lambda mode=True: model  # the golden steps have no dropout
    losses, lrs, norms = [], [], []

    def loss_of(model, batch, generator):
        codes, noise, ratio = batch
        masks = masks_of(noise, float(ratio), 0.4)
        loss = masked_token_loss(model(codes, *masks), codes, masks.masked)
        losses.append(loss.item())
        lrs.append(optimizer.param_groups[0]['lr'])
        return loss

    def norm_of(*_):
        norms.append(torch.stack([value.grad.norm() for value in model.parameters() if value.requires_grad]).norm())
    optimizer.register_step_pre_hook(norm_of)
    batches = [(codes_of(80 + 2 * s, 4), noise_of(81 + 2 * s, 4), z['ratios'][s]) for s in range(4)]
    for state.epoch in range(2):
        state.step = 0
        engine.train_one_epoch(state, batches[2 * state.epoch:2 * state.epoch + 2], loss_of, StepOptions(2))
    np.testing.assert_allclose(losses, z['losses'], atol=1e-5)
    np.testing.assert_allclose(lrs, z['lrs'], atol=1e-12)
    np.testing.assert_allclose(norms, z['grad_norms'], atol=1e-4)
    codes, noise, _ = batches[0]
    masks = masks_of(noise, 0.5, 0.4)
    with torch.no_grad():
        logits = model(codes, *masks)
    np.testing.assert_allclose(logits[:, ::64], z['after_logits'], atol=1e-4)
    assert masked_token_loss(logits, codes, masks.masked).item() == pytest.approx(float(z['after_loss']), abs=1e-4)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for name, key, part in (('token_emb.word_embeddings.weight', 'word_embeddings', slice(None, None, 8)),
                            ('mask_token_label', 'mask_token_label', slice(None)),
                            ('decoder_pos_embed_learned', 'decoder_pos', (slice(None), slice(None, None, 16))),
                            ('mlm_layer.bias', 'mlm_bias', slice(None))):
        np.testing.assert_allclose(state[name][part], z[f'after_{key}'], atol=1e-4, err_msg=name)


def test_parameter_groups_are_the_published_ones(full, golden):
    names = {id(value): name for name, value in full.named_parameters()}
    groups = param_groups_weight_decay(full, 0.05)
    expected = golden('seitpp/param_groups.json')['pretrain wd 0.05 (order: no decay, decay)']
    assert [(group['weight_decay'], [names[id(value)] for value in group['params']]) for group in groups] == \
        [(group['weight_decay'], group['names']) for group in expected]


# ---------------------------------------------------------------- ours

def test_only_masked_patches_count():
    codes = torch.randint(0, 20, (2, 8, 8))
    logits = torch.randn(2, 64, 20, requires_grad=True)
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[1, 5] = True  # second row of patches, second column: codes 2..3 x 2..3
    masked_token_loss(logits, codes, masked).backward()
    assert logits.grad.abs().sum(-1).nonzero().tolist() == [[1, place] for place in (18, 19, 26, 27)]


def test_a_masked_patch_cannot_be_seen():
    model = create_model(NAME, {k: v for k, v in TINY.items() if k not in ('codebook_size', 'img_size')}, 20, 8).eval()
    codes = torch.randint(0, 20, (1, 8, 8))
    seen, masked = masks_of(torch.rand(1, 16), 0.6, 0.3)
    patches = masked.view(1, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)
    others = (codes + 1) % 20
    logits = model(codes, seen, masked)
    assert torch.equal(logits, model(torch.where(patches, others, codes), seen, masked))
    assert not torch.equal(logits, model(torch.where(patches, codes, others), seen, masked))


def test_it_compiles_in_one_graph():
    model = MaskedTokenModel(**TINY).eval()
    codes = torch.randint(0, 20, (2, 8, 8))
    inputs = (codes, *masks_of(torch.rand(2, 16), 0.6, 0.3))
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='eager')(*inputs), model(*inputs))


def test_dropout_is_where_the_published_model_has_it():
    model = MaskedTokenModel(**TINY)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p}
    assert rates == {'token_emb.dropout': 0.1, 'decoder_blocks.0.attn.attn_drop': 0.1,
                     'decoder_blocks.0.attn.proj_drop': 0.1, 'decoder_blocks.0.mlp.drop1': 0.1,
                     'decoder_blocks.0.mlp.drop2': 0.1}


@pytest.mark.parametrize('model_kwargs, words', [
    ({'depths': 3}, "--model-kwargs {'depths': 3}: .*unexpected keyword argument 'depths'"),
    ({'embed_dim': 30}, 'embed_dim'), ({'num_heads': 5}, 'num_heads'), ({'decoder_embed_dim': 'x'}, 'decoder')])
def test_sizes_that_cannot_be_are_one_line(model_kwargs, words):
    fails(lambda: create_model(NAME, model_kwargs, 20, 8), words)


def test_other_mistakes_are_one_line():
    fails(lambda: create_model('resnet50', {}, 20, 8), '--model resnet50 is none of mae_token')
    fails(lambda: create_model(NAME, {}, 20, 7), 'an input size of 7 is no multiple')
