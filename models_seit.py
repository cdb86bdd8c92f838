"""Vision transformers on token embeddings (SeiT sec. 3.3): a Stem-adaptor instead of the patch embedding.

The state dict has timm 0.5.4's names (`norm.*` for the final norm), so published weights load with a plain
`load_state_dict`, and ours load there.
"""
import timm
import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ParseKwargs
from torch import nn

from utils import InputError


class StemAdaptor(nn.Module):
    """4x4 convolution, stride 2, padding 1: (B, in_chans, s, s) embeddings -> (B, (s/2)², embed_dim) tokens.

    Args: img_size: side s of the input, in codes; the other arguments are as timm's PatchEmbed has them.
    """

    def __init__(self, img_size=28, patch_size=2, in_chans=32, embed_dim=768, bias=True, device=None, dtype=None, **_):
        super().__init__()
        self.num_patches = (img_size // 2) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=4, stride=patch_size, padding=1, bias=bias,
                              device=device, dtype=dtype)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TokenVisionTransformer(VisionTransformer):
    """timm's VisionTransformer reading token embeddings; the class token attends, but the head reads the mean of
    the patch tokens, then the norm (timm would call that norm `fc_norm`; the published weights call it `norm`).

    forward: (B, in_chans, img_size, img_size) float -> (B, num_classes).
    """

    def __init__(self, **kwargs):
        super().__init__(patch_size=2, embed_layer=StemAdaptor, global_pool='avg', fc_norm=False, **kwargs)
        self.in_chans = self.patch_embed.proj.in_channels  # as newer timm does
        trunc_normal_(self.cls_token, std=0.02)  # timm 1.x starts it at 1e-6, the published model did not

    def forward_features(self, x, **_):
        """(B, in_chans, s, s) -> (B, 1 + n, embed_dim), class token first, not yet normalised."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = self.pos_drop(x + self.pos_embed)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing and self.training else self.blocks(x)

    def forward_head(self, x, pre_logits=False):
        """(B, 1 + n, embed_dim) -> (B, num_classes), or (B, embed_dim) with pre_logits."""
        x = self.head_drop(self.norm(x[:, 1:].mean(1)))
        return x if pre_logits else self.head(x)


# timm looks here for what a name stands for; no weights are hosted
default_cfgs = generate_default_cfgs({
    f'deit_{size}_token_{width}': {'num_classes': 1000, 'input_size': (width, 28, 28), 'classifier': 'head',
                                   'first_conv': 'patch_embed.proj'}
    for size, width in (('tiny', 32), ('small', 32), ('base', 32), ('small', 4), ('base', 4))
})


def _token_vit(variant, pretrained, kwargs, **defaults):
    if pretrained:
        raise ValueError(f'{variant}: no weights are hosted; load a checkpoint with load_state_dict')
    return build_model_with_cfg(TokenVisionTransformer, variant, False, **{'img_size': 28, **defaults, **kwargs})


@register_model
def deit_tiny_token_32(pretrained=False, **kwargs):
    """ViT-Ti (192/12/3) on 32-dimensional codes. Ours; the others are published."""
    return _token_vit('deit_tiny_token_32', pretrained, kwargs, in_chans=32, embed_dim=192, depth=12, num_heads=3)


@register_model
def deit_small_token_32(pretrained=False, **kwargs):
    """ViT-S (384/12/6) on 32-dimensional codes."""
    return _token_vit('deit_small_token_32', pretrained, kwargs, in_chans=32, embed_dim=384, depth=12, num_heads=6)


@register_model
def deit_base_token_32(pretrained=False, **kwargs):
    """ViT-B (768/12/12) on 32-dimensional codes: the paper's model."""
    return _token_vit('deit_base_token_32', pretrained, kwargs, in_chans=32, embed_dim=768, depth=12, num_heads=12)


@register_model
def deit_small_token_4(pretrained=False, **kwargs):
    """ViT-S on 4-dimensional codes."""
    return _token_vit('deit_small_token_4', pretrained, kwargs, in_chans=4, embed_dim=384, depth=12, num_heads=6)


@register_model
def deit_base_token_4(pretrained=False, **kwargs):
    """ViT-B on 4-dimensional codes."""
    return _token_vit('deit_base_token_4', pretrained, kwargs, in_chans=4, embed_dim=768, depth=12, num_heads=12)


# ---------------------------------------------------------------- from the command line

MODELS = timm.list_models(module='models_seit')


class KeyValues(ParseKwargs):
    """timm's KEY=VALUE arguments, with a complaint about words of another form."""

    def __call__(self, parser, namespace, values, option_string=None):
        wrong = [word for word in values if '=' not in word]
        if wrong:
            parser.error(f'argument {option_string}: {wrong[0]!r} is not of the form key=value')
        super().__call__(parser, namespace, values, option_string)


def create_model(args, classes, size, width, **rates):
    """--model with --model-kwargs, for `size` x `size` codes of a codebook `width` wide. Raises InputError."""
    if args.model not in MODELS:
        raise InputError(f'--model {args.model} is none of {", ".join(MODELS)}')
    try:
        model = timm.create_model(args.model, num_classes=classes, img_size=size, **rates, **args.model_kwargs)
    except (TypeError, AssertionError, ValueError) as error:
        raise InputError(f'--model {args.model} with --model-kwargs {args.model_kwargs}: {error}') from None
    if model.in_chans != width:
        raise InputError(f'{args.codebook_path}: its rows have {width} elements, but {args.model} reads '
                         f'{model.in_chans}: choose the codebook or the model of the tokens')
    return model
