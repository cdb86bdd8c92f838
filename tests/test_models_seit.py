"""Models against the published shapes and logits."""

import numpy as np
import pytest
import timm
import torch
from timm.models import create_feature_extractor
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from helpers import fails, fill_golden
from models_seit import MODELS, StemAdaptor, create_model
from utils import InputError

NAMES = ['deit_small_token_32', 'deit_base_token_32', 'deit_small_token_4', 'deit_base_token_4']


@pytest.mark.parametrize('name', NAMES)
def test_state_dict_has_published_names_and_shapes(name, golden):
    model = timm.create_model(name)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == golden('state_dict_shapes.json')[name]


@pytest.mark.parametrize('name', NAMES)
def test_logits_are_the_published_models(name, golden):
    expected = golden('logits.npz')
    seed = int(expected['seed'])
    model = fill_golden(timm.create_model(name), seed).eval()
    c = model.in_chans
    x = torch.from_numpy(np.random.default_rng(seed + c).standard_normal((2, c, 28, 28)).astype(np.float32))
    with torch.no_grad():
        logits = model(x)
    np.testing.assert_allclose(logits.numpy(), expected[name], atol=1e-4)


def test_tiny_and_small_experiments():
    model = timm.create_model('deit_tiny_token_32', num_classes=10)
    assert model.embed_dim == 192 and len(model.blocks) == 12 and model.blocks[0].attn.num_heads == 3
    model = timm.create_model('deit_tiny_token_32', depth=2, embed_dim=64, num_heads=2, img_size=14)
    assert model.pos_embed.shape == (1, 1 + 49, 64) and model(torch.zeros(3, 32, 14, 14)).shape == (3, 1000)


def test_initialization():
    torch.manual_seed(0)
    model = timm.create_model('deit_small_token_32')
    for value in (model.cls_token, model.pos_embed, model.blocks[0].mlp.fc1.weight, model.head.weight):
        assert value.std().item() == pytest.approx(0.02, rel=0.15)
    conv = torch.nn.Conv2d(32, 384, 4, 2, 1)  # PyTorch's default initialization
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(conv.weight.std().item(), rel=0.05)
    assert not model.head.bias.any()


def test_drop_path_grows_and_rate_is_passed():
    model = timm.create_model('deit_small_token_32', drop_path_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.2)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert model.pos_drop.p == model.blocks[0].attn.proj_drop.p == model.blocks[0].mlp.drop1.p == 0.2
    assert model.head_drop.p == 0  # as timm 0.5.4's drop_rate, which spared the head


def test_pretrained_is_refused():
    with pytest.raises(ValueError, match='no weights are hosted'):
        timm.create_model('deit_small_token_32', pretrained=True)


def test_activation_checkpointing_changes_nothing():
    model = fill_golden(timm.create_model('deit_tiny_token_32', depth=2, num_classes=3, img_size=8)).train()
    x = torch.randn(2, 32, 8, 8)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    plain = model(x)
    plain_gradients = torch.autograd.grad(plain.sum(), model.parameters())
    assert len(calls) == 1
    model.set_grad_checkpointing(True)
    logits = model(x)
    assert len(calls) == 2
    gradients = torch.autograd.grad(logits.sum(), model.parameters())
    assert len(calls) == 3  # the block ran again in the backward pass
    torch.testing.assert_close(logits, plain)
    torch.testing.assert_close(gradients, plain_gradients)


# ---------------------------------------------------------------- what timm's users do with a ViT

def small_model(**kwargs):
    options = {'depth': 3, 'embed_dim': 32, 'num_heads': 2, 'img_size': 8, 'num_classes': 5, **kwargs}
    return timm.create_model('deit_tiny_token_32', **options).eval()


def filled_model(**kwargs):
    """A small model whose layers all do something: fill_golden's weights are larger than the initial ones."""
    return fill_golden(small_model(**kwargs), gain=0.2)


def embeddings(height, width, batch=2):
    return torch.randn(batch, 32, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('size, grid', [(28, (14, 14)), ((8, 12), (4, 6)), (2, (1, 1))])
def test_stem_counts_the_patches_of_its_convolution(size, grid):
    stem = StemAdaptor(size, in_chans=4, embed_dim=8)
    x = torch.randn(2, 4, *stem.img_size)
    assert stem.grid_size == grid == tuple(stem.proj(x).shape[2:])
    assert stem(x).shape == (2, stem.num_patches, 8)
    torch.testing.assert_close(stem(x), stem.proj(x).flatten(2).transpose(1, 2))
    assert (stem.proj.kernel_size, stem.proj.stride, stem.proj.padding) == ((4, 4), (2, 2), (1, 1))


def test_stem_draws_the_random_numbers_of_one_convolution():
    torch.manual_seed(3)
    stem = StemAdaptor(8, in_chans=4, embed_dim=8)
    torch.manual_seed(3)
    assert torch.equal(stem.proj.weight, torch.nn.Conv2d(4, 8, 4, 2, 1).weight)


def test_stem_refuses_unknown_arguments():
    with pytest.raises(TypeError, match='embed_dims'):
        StemAdaptor(28, embed_dims=32)


def test_odd_sizes_are_refused():
    for size in (27, (28, 27), 1, 0):
        with pytest.raises(ValueError, match='no multiple of the patch size, 2'):
            small_model(img_size=size)
    model = small_model()
    with pytest.raises(ValueError, match='no multiple'):
        model.set_input_size(9)
    with pytest.raises(ValueError, match='patch_size=4'):
        model.set_input_size(patch_size=4)
    assert model.patch_embed.img_size == (8, 8) and model(embeddings(8, 8)).shape == (2, 5)  # as before
    with pytest.raises(AssertionError, match='divisible'):
        small_model(dynamic_img_size=True)(embeddings(8, 9))
    with pytest.raises(AssertionError, match="doesn't match"):
        model(embeddings(9, 9))


def test_forward_intermediates():
    model = filled_model()
    x = embeddings(8, 8)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 16, 32)
    final, maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 4)] * 3
    torch.testing.assert_close(final, tokens)
    torch.testing.assert_close(model.forward_head(final), model(x))
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), tokens[:, 1:])
    [(sequence, prefix)] = model.forward_intermediates(x, indices=[1], output_fmt='NLC', return_prefix_tokens=True,
                                                       intermediates_only=True, stop_early=True)
    assert prefix.shape == (2, 1, 32)
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), sequence)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed, maps)  # the final norm comes after pooling


def test_head_reads_the_norm_of_the_mean_patch_token():
    model = filled_model(reg_tokens=2)
    x = embeddings(8, 8)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 2 + 16, 32)
    mean = tokens[:, 3:].mean(1)
    pooled = torch.nn.functional.layer_norm(mean, (32,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), model.head(pooled))
    for options in ({'class_token': False}, {'final_norm': False}, {'weight_init': 'jax'}):
        assert small_model(**options)(x).shape == (2, 5)


def test_get_intermediate_layers():
    model = filled_model()
    x = embeddings(8, 8)
    maps = model.forward_intermediates(x, intermediates_only=True)
    last_two = model.get_intermediate_layers(x, n=2, reshape=True)
    torch.testing.assert_close(list(last_two), maps[1:])
    sequence, prefix = model.get_intermediate_layers(x, n=[0], return_prefix_tokens=True)[0]
    assert sequence.shape == (2, 16, 32) and prefix.shape == (2, 1, 32)


def test_fx_features():
    model = filled_model()
    x = embeddings(8, 8)
    extractor = create_feature_extractor(model, {'blocks.1': 'tokens', 'head': 'logits'})
    torch.testing.assert_close(extractor(x)['logits'], model(x))


@pytest.mark.parametrize('indices, count', [(None, 3), ((0, 2), 2), (1, 1)])
def test_features_only(indices, count):
    options = {} if indices is None else {'out_indices': indices}
    model = small_model(features_only=True, **options)
    assert model.feature_info.reduction() == [2] * count and model.feature_info.channels() == [32] * count
    assert [tuple(m.shape) for m in model(embeddings(8, 8))] == [(2, 32, 4, 4)] * count


def test_set_input_size_and_dynamic_sizes_agree():
    model = filled_model()
    dynamic = filled_model(dynamic_img_size=True)
    torch.testing.assert_close(dynamic(embeddings(8, 8)), model(embeddings(8, 8)))
    model.set_input_size((12, 6))
    assert model.patch_embed.grid_size == (6, 3) and model.pos_embed.shape == (1, 1 + 18, 32)
    torch.testing.assert_close(dynamic(embeddings(12, 6)), model(embeddings(12, 6)))
    maps = dynamic.forward_intermediates(embeddings(12, 6), intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 6, 3)] * 3


def test_patch_dropout():
    model = small_model(patch_drop_rate=0.5).train()
    assert model.forward_features(embeddings(8, 8)).shape == (2, 1 + 8, 32)
    assert model.eval().forward_features(embeddings(8, 8)).shape == (2, 1 + 16, 32)


def test_layer_decay():
    model = small_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5,
                                      no_weight_decay_list=model.no_weight_decay())
    group_of = {names[id(parameter)]: group for group in groups for parameter in group['params']}
    assert group_of.keys() == set(names.values())
    scales = {name: group['lr_scale'] for name, group in group_of.items()}
    layers = ['patch_embed.proj.weight', 'blocks.0.attn.qkv.weight', 'blocks.1.attn.qkv.weight',
              'blocks.2.mlp.fc2.weight', 'head.weight']
    assert [scales[name] for name in layers] == [0.5 ** 4, 0.5 ** 3, 0.5 ** 2, 0.5, 1]
    assert scales['cls_token'] == scales['pos_embed'] == scales['patch_embed.proj.weight']
    assert scales['norm.weight'] == scales['blocks.2.mlp.fc2.weight']  # as timm has it for every ViT's `norm`
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and name not in ('cls_token', 'pos_embed')
        assert group_of[name]['weight_decay'] == (0.1 if decays else 0)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    assert sorted({group['lr_scale'] for group in optimizer.param_groups}) == [0.5 ** 4, 0.5 ** 3, 0.5 ** 2, 0.5, 1]


def test_torch_export():
    model = filled_model()
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(model, (embeddings(8, 8),), dynamic_shapes=({0: batch},))
    x = embeddings(8, 8, batch=5)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize('options', [{}, {'final_norm': False}, {'reg_tokens': 2, 'class_token': False}])
@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')  # newer torch advises others
def test_script_and_symbolic_trace(options, tmp_path):
    model = filled_model(**options)
    x = embeddings(8, 8, batch=3)
    logits = model(x)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), logits)
    torch.jit.save(scripted, str(tmp_path / 'model.pt'))
    assert torch.equal(torch.jit.load(str(tmp_path / 'model.pt'))(x), logits)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), logits)
    assert scripted.state_dict().keys() == traced.state_dict().keys() == model.state_dict().keys()


def test_onnx_export(tmp_path):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = filled_model()
    x = embeddings(8, 8)
    torch.onnx.export(model, (x,), str(tmp_path / 'model.onnx'), input_names=['x'], dynamo=True)
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider'])
    [logits] = session.run(None, {'x': x.numpy()})
    np.testing.assert_allclose(logits, model(x).detach().numpy(), atol=1e-4)


# ---------------------------------------------------------------- from the command line

def test_create_model():
    small = {'depth': 1, 'embed_dim': 32, 'num_heads': 2}
    model = create_model('deit_tiny_token_32', small, num_classes=7, img_size=14, in_chans=32, drop_path=0.1)
    assert model(torch.zeros(1, 32, 14, 14)).shape == (1, 7)
    model = create_model('deit_small_token_4', small, 7, 14)
    assert model.in_chans == 4
    assert create_model('deit_small_token_4', {**small, 'in_chans': 16}, 7, 14, in_chans=16).in_chans == 16


@pytest.mark.parametrize('name, model_kwargs, options, message', [
    ('resnet5', {}, {}, '--model resnet5 is none of deit.*near it are resnet'),
    ('deit_tiny_token_32', {'layers': 3}, {}, "--model-kwargs {'layers': 3}: .*unexpected keyword argument 'layers'"),
    ('deit_tiny_token_32', {'patch_size': 4}, {}, 'patch_size=4: a patch has 1 or 2 codes on a side'),
    ('deit_tiny_token_32', {'patch_size': 'x'}, {}, 'patch_size=x'),
    ('deit_tiny_token_32', {'embed_dim': 34}, {}, 'embed_dim'),
    ('deit_tiny_token_32', {'embed_dim': -3}, {}, 'embed_dim'),
    ('deit_tiny_token_32', {'num_heads': 0}, {}, 'num_heads'),
    ('deit_tiny_token_32', {'depth': '2x'}, {}, 'depth'),
    ('deit_tiny_token_32', {'act_layer': 'none_such'}, {}, 'none_such'),
    ('deit_tiny_token_32', {'img_size': 14}, {}, 'img_size'),
    ('deit_tiny_token_32', {'pretrained': True}, {}, 'is made without weights'),
    ('deit_tiny_token_32', {'features_only': True}, {}, 'features_only.*no classifier'),
    ('deit_tiny_token_32', {}, {'img_size': 27}, '--model deit_tiny_token_32: an input size of 27 is no multiple'),
    ('deit_tiny_token_32', {}, {'in_chans': 4},
     "^the codebook's rows have 4 elements, but deit_tiny_token_32 reads 32: "
     'choose the codebook or the model of the tokens, or make it read these by --model-kwargs in_chans=4$'),
])
def test_create_model_says_what_is_wrong(name, model_kwargs, options, message):
    with pytest.raises(InputError, match=message) as error:
        create_model(name, model_kwargs, **{'num_classes': 10, 'img_size': 28, 'in_chans': 32, **options})
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------- a patch of each code

def test_a_stem_of_stride_1():
    stem = StemAdaptor(16, patch_size=1, in_chans=4, embed_dim=8)
    assert (stem.proj.kernel_size, stem.proj.stride, stem.proj.padding) == ((3, 3), (1, 1), (1, 1))
    assert stem.grid_size == (16, 16) and stem(torch.randn(2, 4, 16, 16)).shape == (2, 256, 8)


@pytest.mark.parametrize('name, side', [('deit_tiny_token_32', 3), ('deit_tiny_token_32_patch', 1)])
@pytest.mark.parametrize('size', [16, 14, 7])
def test_patches_of_one_code(name, side, size):
    small = {'depth': 2, 'embed_dim': 32, 'num_heads': 2}
    model = create_model(name, {**small, 'patch_size': 1}, 10, size, 32)
    usual = create_model(name, small, 10, 2 * size, 32)
    shapes, usual_shapes = ({key: tuple(value.shape) for key, value in m.state_dict().items()} for m in (model, usual))
    assert list(shapes) == list(usual_shapes)
    assert {key for key in shapes if shapes[key] != usual_shapes[key]} == {'patch_embed.proj.weight'}
    assert shapes['patch_embed.proj.weight'] == (32, 32, side, side)
    model(torch.randn(2, 32, size, size)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.set_input_size(9)
    assert model(torch.zeros(1, 32, 9, 9)).shape == (1, 10)


# ---------------------------------------------------------------- without the Stem-adaptor

SMALL = {'depth': 2, 'embed_dim': 32, 'num_heads': 2}


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_only_the_stem_differs(size):
    torch.manual_seed(0)
    plain = create_model(f'deit_{size}_token_32_patch', {'depth': 1}, 10, 16, 32).eval()
    published = create_model(f'deit_{size}_token_32', {'depth': 1}, 10, 16, 32).eval()
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in (plain, published)]
    differ = {name for name in shapes[1] if shapes[0][name] != shapes[1][name]}
    assert shapes[0].keys() == shapes[1].keys() and differ == {'patch_embed.proj.weight'}
    assert plain.patch_embed.proj.kernel_size == plain.patch_embed.proj.stride == (2, 2)
    assert f'deit_{size}_token_32_patch' in MODELS and plain(torch.zeros(2, 32, 16, 16)).shape == (2, 10)


def test_patches_do_not_overlap():
    model = create_model('deit_tiny_token_32_patch', SMALL, 10, 8, 32).eval()
    x = torch.randn(1, 32, 8, 8)
    changed = x.clone()
    changed[:, :, 2, 2] += 1
    rows = (model.patch_embed(x) != model.patch_embed(changed)).any(-1)
    assert rows.nonzero()[:, 1].tolist() == [5]


def test_mistakes_are_one_line():
    with pytest.raises(ValueError, match='no weights are hosted'):
        timm.create_model('deit_tiny_token_32_patch', pretrained=True)
    fails(lambda: create_model('deit_tiny_token_32', {'embed_layer': 'x'}, 10, 8), 'embed_layer')
    fails(lambda: create_model('deit_tiny_token_32_patch', SMALL, 10, 7, 32), 'deit_tiny_token_32_patch')
