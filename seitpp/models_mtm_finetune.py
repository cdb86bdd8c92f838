"""The classifiers that masked-token pre-training ends in (SeiT++): ViTs on codes, and starting them from its weights.

The published program calls its classifier `deit_base_token_32`, as SeiT calls another network. timm knows it here as
`mtm_deit_base_token_32`, so both can be used at once; `--model` takes the published name. `CodeVisionTransformer` is
SeiT's ViT with learned embeddings in front; `load_encoder` at the end is what --finetune does.
"""
from typing import Any

import timm
import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

import models_seit
from models_seit import PatchStem, TokenVisionTransformer
from seitpp.models_mtm import TokenEmbedding, make_model
from training.checkpoints import (FINETUNE, PRETRAIN, check_codes, check_origin, check_start, check_tokens_of,
                                  load_checkpoint, load_weights, note_average, without_token_adapt)
from training.pretrained import POSITIONS, TOKENS, fit_parts, fit_positions, summary, without_positions
from utils import InputError, print0

PREFIX = 'mtm_'  # of timm's names
UNUSED = ('mask_token_label', 'decoder_', 'mlm_layer.')  # prefixes of weights that only pre-training needs


class CodeVisionTransformer(TokenVisionTransformer):
    """A ViT reading codes, (B, s, s) int64 -> (B, num_classes): learned embeddings, patches of 2x2 codes.

    Args:
        codebook_size: how many codes there are.
        **kwargs: timm's.
    """

    def __init__(self, codebook_size: int = 391, **kwargs: Any) -> None:
        super().__init__(embed_layer=PatchStem, **kwargs)
        self.token_emb = TokenEmbedding(codebook_size, self.in_chans)

    def forward_features(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().forward_features(self.token_emb(x), **kwargs)

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward_intermediates(self.token_emb(x), *args, **kwargs)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer decay. A weight in none of them counts to the last one, with the full learning rate.

        As published, that is so for the code embedding too, though it is the first layer.
        """
        return {'stem': r'^cls_token|pos_embed|patch_embed', 'blocks': [(r'^blocks\.(\d+)', None)]}


# ---------------------------------------------------------------- timm's names

# timm looks here for what a name stands for; no weights are hosted
default_cfgs = generate_default_cfgs({f'{PREFIX}deit_{size}_token_32': models_seit.default_cfgs[
    f'deit_{size}_token_32'].default.to_dict() for size in ('tiny', 'small', 'base')})


def _code_vit(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> nn.Module:
    if pretrained:
        raise ValueError(f'{variant}: no weights are hosted; load a checkpoint with load_state_dict')
    return build_model_with_cfg(CodeVisionTransformer, variant, False, **(defaults | kwargs))


@register_model
def mtm_deit_tiny_token_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Ti (192/12/3) on codes. Not published, as ViT-S."""
    return _code_vit('mtm_deit_tiny_token_32', pretrained, kwargs, embed_dim=192, depth=12, num_heads=3)


@register_model
def mtm_deit_small_token_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-S (384/12/6) on codes."""
    return _code_vit('mtm_deit_small_token_32', pretrained, kwargs, embed_dim=384, depth=12, num_heads=6)


@register_model
def mtm_deit_base_token_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B (768/12/12) on codes: the paper's model."""
    return _code_vit('mtm_deit_base_token_32', pretrained, kwargs, embed_dim=768, depth=12, num_heads=12)


MODELS = [name.removeprefix(PREFIX) for name in timm.list_models(module='models_mtm_finetune')]


def create_model(name: str, model_kwargs: dict[str, Any], **options: Any) -> nn.Module:
    """The model of --model (a published name) and --model-kwargs.

    Args:
        name: one of MODELS.
        model_kwargs: the user's arguments for timm's VisionTransformer.
        **options: codebook_size, img_size, num_classes, drop_path_rate.

    Raises:
        InputError: for an unknown name, or arguments that cannot be.
    """
    if name not in MODELS:
        raise InputError(f'--model {name} is none of {", ".join(MODELS)}')
    return make_model(name, PREFIX + name, model_kwargs, **options)


# ---------------------------------------------------------------- starting from a pre-trained encoder

def encoder_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint's weights those of the classifier, without its head: neither decoder nor TokenAdapt."""
    return {name: value for name, value in without_token_adapt(weights).items()
            if not str(name).startswith((*UNUSED, 'head.'))}


def kwargs_of_encoder(flags: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments of the classifier for the encoder of a run of pre-training, or None where its flags do not say."""
    kwargs = flags.get('model_kwargs')
    return {key: value for key, value in kwargs.items() if not str(key).startswith('decoder_')} if isinstance(
        kwargs, dict) else None


def load_encoder(model: CodeVisionTransformer, path: str, facts: dict[str, Any] | None = None,
                 codebook_path: str = '', checkpoint: dict[str, Any] | None = None) -> None:
    """--finetune: start from the encoder of a checkpoint of masked-token pre-training, or of fine-tuning.

    Position embeddings are resampled bicubically; the head starts from scratch, near zero, as published. Prefix tokens
    are kept as `load_pretrained` keeps them: pre-training has no registers.

    Args:
        model: changed in place.
        path: of the checkpoint.
        facts: of the data, see `token_dataset.facts_of`, which must be of the checkpoint's codebook and tokenizer.
        codebook_path: the file of the codebook.
        checkpoint: what `path` holds, where it is loaded already.

    Raises:
        InputError: for another program's weights, other codes, or another size of model; where ranks read others.
    """
    checkpoint = checkpoint or load_checkpoint(path)
    weights = checkpoint['model']
    check_origin(weights, (PRETRAIN, FINETUNE), path)
    check_codes(weights, len(model.token_emb.word_embeddings.weight), path)
    check_tokens_of(checkpoint, path, facts or {}, {'codebook': codebook_path, 'tokenizer': '--train-token-file'})
    weights = encoder_weights(weights)
    wanted = model.state_dict()
    resampled = ''
    if isinstance(weights.get(POSITIONS), torch.Tensor) and POSITIONS in wanted:
        weights[POSITIONS], resampled = fit_positions(weights, model, path, without_positions(checkpoint))
    weights, scratch, left_out = fit_parts(weights, wanted, TOKENS)
    trunc_normal_(model.head.weight, std=2e-5)  # as in MAE: the first steps shall not disturb the encoder
    load_weights(model, weights | {name: value for name, value in wanted.items() if name.startswith('head.')}, path)
    check_start(model)
    note_average(checkpoint, path)
    print0(summary(path, 'the encoder starts from it, the head from scratch', resampled, scratch, left_out))
