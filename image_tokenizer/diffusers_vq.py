"""VQModel of diffusers, an optional package: its weights with the config.json that lies beside them.

The weights are read by our own functions, safely; diffusers only builds the network. Rows are compared by Euclid's
distance. The file serves as a codebook too, and gives the same rows there.
"""
import re
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import nn

from fileio.files import read_json
from fileio.hub import fetch_beside, local_path
from image_tokenizer.vitvqgan import check_divides, check_names_and_shapes, grid_side
from token_files.codebook_sources import deviation, fit_rows
from utils import InputError, first_line

CONFIG = 'config.json'
TABLE = 'quantize.embedding.weight'
OLD_NAMES = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}  # of attention, before 2023


class DiffusersVQ(nn.Module):
    """An image tokenizer with codes of its own (see image_tokenizer/tokenizers.py for the interface).

    Args:
        model: diffusers' VQModel, with its weights.

    Attributes:
        codebook: (K, embed_dim) float, scaled, see token_files/codebook_sources.py.
        input_range: lowest and highest value of a pixel.
    """

    kind = 'VQModel of diffusers'

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        # aMUSEd's looks codes up by number when it decodes, and alone has pixels from 0
        self.input_range = (0., 1.) if model.config.lookup_from_codebook else (-1., 1.)
        self.patch_size = 2 ** (len(model.config.block_out_channels) - 1)
        rows = model.quantize.embedding.weight.detach()
        self.register_buffer('codebook', fit_rows(rows, f'a {self.kind}'), persistent=False)
        self.embed_dim = self.codebook.shape[1]
        self.deviation = deviation(rows)

    def codes(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float in `input_range` -> (B, n) int64, row by row; -1 where features are not finite.

        H and W: multiples of patch_size. Rows are compared in float32 also under autocast.
        """
        check_divides(images, self.patch_size)
        features = self.model.encode(images).latents
        with torch.autocast(images.device.type, enabled=False):
            features = features.float()
            _, _, (_, _, codes) = self.model.quantize(features)
        codes = codes.view(images.shape[0], -1)
        return torch.where(features.isfinite().all(1).flatten(1), codes, -1)

    forward = codes

    def decode(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, n, embed_dim) rows of `codebook`, n a square -> (B, 3, H, W) float in `input_range`, unclamped."""
        width = self.model.quantize.embedding.weight.shape[1]  # without a constant element
        side = grid_side(self.model.decoder, embeddings)
        rows = rearrange(embeddings[..., :width] * self.deviation, 'b (h w) d -> b d h w', h=side)
        spatial = self.model.config.norm_type == 'spatial'
        return self.model.decoder(self.model.post_quant_conv(rows), rows if spatial else None)


def is_vq_model(state: dict) -> bool:
    """Whether weights have the names of diffusers' VQModel."""
    return TABLE in state and any(str(key).startswith('encoder.down_blocks.') for key in state)


def load_vq_model(path: str | Path, state: dict[str, Any]) -> DiffusersVQ:
    """The tokenizer of weights that were read from `path`, in float32 and eval mode.

    Raises:
        InputError: without diffusers or the config.json beside the weights, or where the two do not fit.
    """
    try:
        from diffusers import VQModel
    except (ImportError, RuntimeError) as error:  # RuntimeError: of a package that diffusers needs
        raise InputError(f'{path}: weights of a VQModel of diffusers, which needs packages of its own '
                         f'({first_line(error)}): pip install -r requirements-diffusers.txt') from None
    config_path = Path(local_path(path)).with_name(CONFIG)
    fetch_beside(config_path)
    config = read_json(config_path)
    if not isinstance(config, dict) or config.get('_class_name') != VQModel.__name__:
        raise InputError(f'{config_path}: is not of a VQModel; give weights that lie beside their {CONFIG}')
    try:
        with torch.device('meta'):  # names and shapes only; the tensors are those of `state`
            model = VQModel.from_config(config)
    except Exception as error:  # of diffusers, for whatever stands in the file
        raise InputError(f'{config_path}: no VQModel can be made of it ({first_line(error)})') from None
    old = re.compile(rf'(\.attentions\.\d+)\.({"|".join(OLD_NAMES)})\.')
    state = {old.sub(lambda match: f'{match[1]}.{OLD_NAMES[match[2]]}.', str(key)): value
             for key, value in state.items()}
    expected = model.state_dict()
    try:
        check_names_and_shapes(state, expected, f'the VQModel of its {CONFIG}')
        model.load_state_dict({key: state[key].detach().float() for key in expected}, assign=True)
        rows = model.quantize.embedding.weight
        if not rows.isfinite().all() or not rows.any():
            raise InputError('its codebook is not finite, or all zero: a damaged file')
        return DiffusersVQ(model).eval().requires_grad_(False)
    except InputError as error:
        raise InputError(f'{path}: {error}') from None
