"""Vision transformers on token embeddings (SeiT sec. 3.3): a Stem-adaptor instead of the patch embedding.

A ViT that reads the embeddings of a token grid as a DeiT reads pixels. Begin with `StemAdaptor`, the paper's idea, and
`TokenVisionTransformer`, timm's ViT around it; below them the sizes are registered under names that timm knows.

The state dict has timm 0.5.4's names (`norm.*` for the final norm), so published weights load with a plain
`load_state_dict`, and weights from here load in the published program. All else is timm's: intermediate features,
other input sizes, layer decay. It can be exported by torch.export, ONNX, torch.jit.script and torch.fx.
"""
import difflib
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from utils import InputError


class StemAdaptor(PatchEmbed):
    """timm's PatchEmbed with patches that overlap by a code on every side: a 4x4 convolution, stride 2, padding 1.

    (B, in_chans, H, W) embeddings -> (B, H/2 · W/2, embed_dim) tokens. With patch_size=1, for grids of 16x16 or 14x14
    codes, a 3x3 convolution of stride 1 makes a token of each code.
    """

    def __init__(self, img_size: int | tuple[int, int] = 28, patch_size: int = 2, **kwargs: Any) -> None:
        # PatchEmbed makes a convolution that is replaced below. What it draws is undone, so that only
        # weights that stay take numbers from the seed.
        with torch.random.fork_rng(devices=[]):
            super().__init__(img_size, patch_size, **kwargs)
        proj = self.proj
        self.proj = nn.Conv2d(proj.in_channels, proj.out_channels, kernel_size=patch_size + 2, stride=patch_size,
                              padding=1, bias=proj.bias is not None).to(proj.weight)

    def _init_img_size(self, img_size: int | tuple[int, int] | None) -> tuple:
        # with another size the convolution would leave codes out in silence
        for side in to_2tuple(self.patch_size if img_size is None else img_size):
            if side < 1 or side % self.patch_size[0]:
                raise ValueError(f'an input size of {side} is no multiple of the patch size, {self.patch_size[0]}')
        return super()._init_img_size(img_size)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Change the size of the input. The patch size is fixed."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f'patch_size={patch_size}: the patch size of the Stem-adaptor is {self.patch_size[0]}')
        super().set_input_size(img_size)


class PooledNorm(nn.LayerNorm):
    """The final norm, after pooling: tokens (B, N, D) pass unchanged, and `normalize` takes what is pooled, (B, D).

    timm would call it `fc_norm`, and make `norm` an identity; the published weights call it `norm`. There are two
    functions, because torch.fx cannot follow a branch, nor torch.jit.script a call of `super()`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, D)."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class NoNorm(nn.Identity):
    """What stands in its place with final_norm=False."""

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, D), the same."""
        return x


class TokenVisionTransformer(VisionTransformer):
    """timm's VisionTransformer reading token embeddings, (B, in_chans, H, W) -> (B, num_classes).

    The class token attends, but the head reads the mean of the patch tokens, then the norm.
    Tokens are never normalized by the final norm: `norm=True` of `forward_intermediates` has no effect, as in all
    of timm's models that pool before the norm, and its final features are those of `forward_features`.
    `norm_layer` chooses the norms of the blocks; the final norm is a LayerNorm.
    `patch_size` is 2, or 1 for grids of half as many codes on a side, such as those of tokenizers of 16 pixels a code.
    """

    def __init__(self, embed_layer: type[nn.Module] = StemAdaptor, patch_size: int = 2, **kwargs: Any) -> None:
        if patch_size not in (1, 2):
            raise ValueError(f'patch_size={patch_size}: a patch has 1 or 2 codes on a side')
        super().__init__(patch_size=patch_size, embed_layer=embed_layer, global_pool='avg', fc_norm=False, **kwargs)
        self.in_chans = self.patch_embed.proj.in_channels  # timm 1.0.15 does not set it
        identity = isinstance(self.norm, nn.Identity)  # as it is with final_norm=False
        self.norm = NoNorm() if identity else PooledNorm(self.embed_dim, eps=1e-6).to(self.norm.weight)

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """As timm's, but timm 1.x starts the class token at 1e-6; the published model did not."""
        super().init_weights(*args, **kwargs)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, 1 + N, D) tokens -> (B, num_classes); with pre_logits (B, D): the mean patch token, normalized."""
        x = self.norm.normalize(self.pool(x))
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)


# timm looks here for what a name stands for; no weights are hosted
default_cfgs = generate_default_cfgs({
    f'deit_{name}': {'num_classes': 1000, 'input_size': (code_dim, 28, 28), 'fixed_input_size': True,
                     'classifier': 'head', 'first_conv': 'patch_embed.proj'}
    for code_dim, names in ((32, ('tiny_token_32', 'small_token_32', 'base_token_32', 'tiny_token_32_patch',
                                  'small_token_32_patch', 'base_token_32_patch')),
                            (4, ('small_token_4', 'base_token_4')))
    for name in names
})


def _token_vit(variant: str, pretrained: bool, kwargs: dict, **defaults: Any) -> nn.Module:
    if pretrained:
        raise ValueError(f'{variant}: no weights are hosted; load a checkpoint with load_state_dict')
    feature_cfg = {'out_indices': 3, 'feature_cls': 'getter'}  # of features_only=True: the last three blocks
    return build_model_with_cfg(TokenVisionTransformer, variant, False, feature_cfg=feature_cfg, **(defaults | kwargs))


@register_model
def deit_tiny_token_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Ti (192/12/3) on 32-dimensional codes. It was not published, as the larger ones were."""
    return _token_vit('deit_tiny_token_32', pretrained, kwargs, embed_dim=192, depth=12, num_heads=3)


@register_model
def deit_small_token_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-S (384/12/6) on 32-dimensional codes."""
    return _token_vit('deit_small_token_32', pretrained, kwargs, embed_dim=384, depth=12, num_heads=6)


@register_model
def deit_base_token_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B (768/12/12) on 32-dimensional codes: the paper's model."""
    return _token_vit('deit_base_token_32', pretrained, kwargs, embed_dim=768, depth=12, num_heads=12)


@register_model
def deit_small_token_4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-S on 4-dimensional codes."""
    return _token_vit('deit_small_token_4', pretrained, kwargs, embed_dim=384, depth=12, num_heads=6)


@register_model
def deit_base_token_4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B on 4-dimensional codes."""
    return _token_vit('deit_base_token_4', pretrained, kwargs, embed_dim=768, depth=12, num_heads=12)


# ---------------------------------------------------------------- without the Stem-adaptor: the paper's ablation

class PatchStem(StemAdaptor):
    """A 2x2 convolution, stride 2: (B, in_chans, H, W) embeddings -> (B, H/2 · W/2, embed_dim) tokens.

    With patch_size=1 it is a linear map of each code.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        proj = self.proj
        self.proj = nn.Conv2d(proj.in_channels, proj.out_channels, kernel_size=self.patch_size,
                              stride=self.patch_size, bias=proj.bias is not None).to(proj.weight)


def _patch_stem(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """The model of that name without '_patch', but for its stem."""
    if pretrained:
        raise ValueError(f'{variant}: no weights are hosted; load a checkpoint with load_state_dict')
    return timm.create_model(variant.removesuffix('_patch'), embed_layer=PatchStem, **kwargs)


@register_model
def deit_tiny_token_32_patch(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Ti (192/12/3) on 32-dimensional codes, patches of 2x2."""
    return _patch_stem('deit_tiny_token_32_patch', pretrained, kwargs)


@register_model
def deit_small_token_32_patch(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-S (384/12/6) on 32-dimensional codes, patches of 2x2."""
    return _patch_stem('deit_small_token_32_patch', pretrained, kwargs)


@register_model
def deit_base_token_32_patch(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B (768/12/12) on 32-dimensional codes, patches of 2x2."""
    return _patch_stem('deit_base_token_32_patch', pretrained, kwargs)


# ---------------------------------------------------------------- any other model of timm

STEMS = 'fast', 'native'  # the first is the default: docs/backbones.md has what each is worth
LEAST_PATCH = 8  # pixels on a side of a patch: a model of larger ones, all of one size, is a plain ViT

# the user's arguments go into timm and torch as they are, so a mistake in them may surface as any of these
MISTAKES = ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError


class UpsampledConv2d(nn.Conv2d):
    """A model's first convolution, for tokens: (B, d, H, W) -> (B, width, scale · H, scale · W).

    Nearest upsampling, then a 3x3 convolution of stride 1. Its weights have the names of those that it replaces.
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=float(self.scale), mode='nearest')
        return self._conv_forward(x, self.weight, self.bias)


def create_backbone(name: str, model_kwargs: dict[str, Any], num_classes: int, img_size: int, in_chans: int,
                    stem: str | None, token_patch_size: int, rates: dict[str, float | None]) -> nn.Module:
    """A model of timm that was made for images, reading (B, in_chans, img_size, img_size) embeddings of codes.

    A plain ViT gets the Stem-adaptor. In any other model its first convolution is replaced by `UpsampledConv2d`, with
    which all later grids are half of those on a side that pixels would give it, or the same with the native stem.

    Args:
        name, model_kwargs, num_classes, img_size, in_chans, token_patch_size: as of `create_model`.
        stem: one of STEMS, None for the first of them; a ViT has none.
        rates: timm's drop rates.

    Raises:
        InputError: where a stem cannot be had.
        MISTAKES: of timm, for arguments that do not fit.
    """
    cfg = timm.get_pretrained_cfg(name)
    patch_size = model_kwargs.get('patch_size', 2)
    # A model is what its module is made of, which no list of timm says. This one is only looked at.
    with torch.random.fork_rng(devices=[]):
        kwargs = {key: value for key, value in model_kwargs.items() if key != 'patch_size'}
        first, parent = first_convolution(timm.create_model(name, **kwargs), name, cfg, cfg.input_size[0] if cfg else 3)
    if isinstance(parent, PatchEmbed) and first.stride[0] >= LEAST_PATCH:
        if stem:
            raise InputError(f'--stem {stem}: {name} is a ViT, and has the Stem-adaptor: omit it')
        if patch_size not in (1, 2):
            raise ValueError(f'patch_size={patch_size}: a patch has 1 or 2 codes on a side')
        if img_size % patch_size:
            raise ValueError(f'an input size of {img_size} codes is no multiple of the patch size, {patch_size}')
        model = timm.create_model(name, num_classes=num_classes, in_chans=in_chans, img_size=img_size, **rates,
                                  **{'patch_size': 2, **model_kwargs})
        first, parent = first_convolution(model, name, cfg, in_chans)
        adapted = nn.Conv2d(in_chans, first.out_channels, kernel_size=patch_size + 2, stride=patch_size, padding=1,
                            bias=first.bias is not None)
    else:
        stem = stem or STEMS[0]
        pixels = token_patch_size / 2 if stem == 'fast' else token_patch_size  # that a code stands for
        # models whose positions or windows belong to a size are told that of pixels
        size = {'img_size': int(img_size * pixels)} if cfg.fixed_input_size else {}
        model = timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **rates, **(size | model_kwargs))
        first, parent = first_convolution(model, name, cfg, in_chans)  # of the patch_size that is asked for
        scale, rest = divmod(pixels, first.stride[0])
        if rest or not scale:
            raise InputError(f'--model {name}: its first convolution has stride {first.stride[0]}, so it cannot read '
                             f'codes of {token_patch_size} pixels with --stem {stem}: choose another stem or '
                             'model')
        adapted = UpsampledConv2d(in_chans, first.out_channels, int(scale), first.bias is not None)
        if isinstance(parent, PatchEmbed):
            parent.img_size = None  # it would refuse what is not of this size; the grid is that of this size
    model.set_submodule(cfg.first_conv, adapted)
    return model


def first_convolution(model: nn.Module, name: str, cfg: Any, in_chans: int) -> tuple[nn.Conv2d, nn.Module]:
    """The convolution that reads (B, in_chans, H, W), and the module that holds it. InputError for a model without."""
    path = cfg.first_conv if cfg else None
    module = dict(model.named_modules()).get(path) if isinstance(path, str) else None
    # TResNet rearranges pixels into channels before its first convolution
    if not isinstance(module, nn.Conv2d) or module.in_channels != in_chans:
        found = ' and '.join(path) if isinstance(path, (list, tuple)) else path or 'none that timm names'
        raise InputError(f'--model {name}: has no single first convolution to be replaced ({found}), so it cannot read '
                         'tokens: choose another model')
    return module, model.get_submodule(path.rpartition('.')[0])


# ---------------------------------------------------------------- from the command line

MODELS = timm.list_models(module='models_seit')


def classifier_of(name: str) -> str:
    """How the names of the head's weights begin in a model of timm, without the dot."""
    cfg = timm.get_pretrained_cfg(name)
    classifier = cfg.classifier if cfg else None
    return 'head' if not classifier else classifier if isinstance(classifier, str) else classifier[0]


def check_loads_nothing(model_kwargs: dict[str, Any]) -> None:
    """InputError for arguments by which timm would read weights, past our checks of files and in silence."""
    for key in ('pretrained', 'pretrained_cfg', 'checkpoint_path'):
        if key in model_kwargs:
            raise InputError(f'--model-kwargs {key}: a model is made without weights: omit it')


def create_model(name: str, model_kwargs: dict[str, Any], num_classes: int, img_size: int, in_chans: int | None = None,
                 stem: str | None = None, token_patch_size: int = 8, drop: float = 0.,
                 drop_path: float = 0.) -> nn.Module:
    """The model of --model and the flags beside it: (B, in_chans, img_size, img_size) -> (B, num_classes).

    Args:
        name: one of MODELS, or any other model of timm.
        model_kwargs: the user's arguments for timm.
        num_classes: 0 for no head.
        img_size: side of the input in codes.
        in_chans: elements of a codebook row. A model of MODELS must be one that reads so many; None for no check.
            Others are made to read them.
        stem: 'fast' or 'native', of models that are no ViT; None: fast.
        token_patch_size: pixels on a side that a code stands for: what 'native' makes of a code.
        drop, drop_path: rates of dropout and of stochastic depth.

    Raises:
        InputError: for an unknown name, wrong arguments or size, a stem that the model cannot have, or a codebook of
            another width.
    """
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models(), 3)
        raise InputError(f'--model {name} is none of {", ".join(MODELS)}, and timm has no such model'
                         + (f'; near it are {", ".join(similar)}' if similar else ''))
    check_loads_nothing(model_kwargs)
    values = {'--model-kwargs': model_kwargs, '--drop': drop, '--drop-path': drop_path, '--stem': stem}
    flags = ' with '.join([f'--model {name}', ', '.join(f'{flag} {value}' for flag, value in values.items() if value)])
    try:
        if name in MODELS:
            if stem:
                raise InputError(f'--stem {stem}: {name} is a ViT, and has the Stem-adaptor: omit it')
            model = timm.create_model(name, num_classes=num_classes, img_size=img_size, drop_path_rate=drop_path,
                                      pos_drop_rate=drop, proj_drop_rate=drop, **model_kwargs)
            if not isinstance(model, TokenVisionTransformer):
                raise TypeError('this makes no classifier')  # features_only=True
        else:
            rates = {'drop_rate': drop or None, 'drop_path_rate': drop_path or None}
            channels = model_kwargs.get('in_chans', in_chans) or 32
            kwargs = {key: value for key, value in model_kwargs.items() if key != 'in_chans'}
            model = create_backbone(name, kwargs, num_classes, img_size, channels, stem, token_patch_size, rates)
            check_forward(model, channels, img_size, num_classes)
            model.in_chans = channels
    except MISTAKES as error:
        why = ' '.join(str(error).split()) or repr(error)
        why = 'it has no stochastic depth: give --drop-path 0' if (
            "unexpected keyword argument 'drop_path_rate'" in why) else why
        if "multiple values for keyword argument 'patch_size'" in why and 'patch_size' not in model_kwargs:
            why = 'fixes the size of its patches, and so cannot read tokens: choose another model'
        raise InputError(f'{flags.removesuffix(" with ")}: {why}') from None
    if in_chans not in (None, model.in_chans):
        raise InputError(f"the codebook's rows have {in_chans} elements, but {name} reads {model.in_chans}: choose the "
                         'codebook or the model of the tokens, or make it read these by --model-kwargs '
                         f'in_chans={in_chans}')
    return model


def check_forward(model: nn.Module, in_chans: int, img_size: int, num_classes: int) -> None:
    """TypeError, or what torch raises, unless a model gives (1, num_classes) for an input: sizes that do not fit."""
    training = model.training
    with torch.no_grad():
        output = model.eval()(torch.zeros(1, in_chans, img_size, img_size))
    model.train(training)
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if num_classes and shape != (1, num_classes):
        raise TypeError(f'gives {shape} for an image')
