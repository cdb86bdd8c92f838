"""The token ViTs with a plain 2x2 patch embedding instead of the Stem-adaptor, to tell what that is worth.

Not published: for the ablation of tables/. Importing this module adds them to models_seit.MODELS.
"""
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from torch import nn

import models_seit
from models_seit import MODELS, StemAdaptor


class PatchStem(StemAdaptor):
    """A 2x2 convolution, stride 2: (B, in_chans, H, W) embeddings -> (B, H/2 · W/2, embed_dim) tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        proj = self.proj
        self.proj = nn.Conv2d(proj.in_channels, proj.out_channels, kernel_size=self.patch_size,
                              stride=self.patch_size, bias=proj.bias is not None).to(proj.weight)


# timm looks here for what a name stands for; no weights are hosted
default_cfgs = generate_default_cfgs({f'deit_{size}_token_32_patch': models_seit.default_cfgs[
    f'deit_{size}_token_32'].default.to_dict() for size in ('tiny', 'small', 'base')})


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


MODELS.extend(timm.list_models(module='models_patch_stem'))
