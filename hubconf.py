"""Entries of torch.hub: the models of tokens by name, as DeiT has them, and 'classifier', from images to class names.

    model = torch.hub.load(folder, 'deit_base_token_32', source='local', checkpoint='output/mine')
    classify = torch.hub.load(folder, 'classifier', source='local', checkpoint='output/mine')

torch.hub imports this file with its folder first on the path. Modules here have names that other projects use too, such
as `utils`. Where another module of such a name is imported already, Python would take it for ours in silence, so that
is an error here.
"""
import os
import sys
import typing

dependencies = ['torch', 'torchvision', 'timm', 'numpy', 'einops', 'safetensors', 'tqdm']

_ROOT = os.path.dirname(os.path.realpath(__file__))
_OURS = ('utils', 'flags', 'recipe', 'engine', 'samplers', 'models_seit', 'token_augment', 'fileio', 'token_files',
         'image_data', 'image_tokenizer', 'training', 'seitpp', 'inference')

for _name in _OURS:
    _file = getattr(sys.modules.get(_name), '__file__', None) or ''
    if _name in sys.modules and not os.path.realpath(_file).startswith(os.path.join(_ROOT, '')):
        raise ImportError(f'a module {_name!r} that is not of this project is imported already '
                          f'({_file or "a folder without __init__.py"}), and {_ROOT} has one of that name: load from '
                          'torch.hub in a process that has not imported it, or rename it')

import timm  # noqa: E402 - only now, after the check
from torch import nn  # noqa: E402

import inference.classifier  # noqa: E402
import inference.models  # noqa: E402
import models_seit  # noqa: E402
import training.checkpoints  # noqa: E402
import utils  # noqa: E402


def classifier(checkpoint: str, device: str = 'cpu', **options: typing.Any) -> nn.Module:
    """From images to class names: `load_classifier` of inference/classifier.py, whose options it takes.

    `checkpoint` is a file, or the folder of a run.
    """
    return inference.classifier.load_classifier(checkpoint, device, **options)


def _entry(name: str) -> typing.Callable:
    def entry(checkpoint: str = '', use_ema: bool = False, **model_kwargs: typing.Any) -> nn.Module:
        if not checkpoint:
            return timm.create_model(name, **model_kwargs)
        path = inference.classifier.find_file(str(checkpoint), use_ema)
        state = training.checkpoints.load_checkpoint(path)
        program = training.checkpoints.program_of(state)
        if program != training.checkpoints.SEIT:
            raise utils.InputError(f"{path}: is of {program}, whose model is none of {training.checkpoints.SEIT}: load "
                                   "'classifier'")
        # the checkpoint's own arguments are taken where it is of a model of this name, so it is not named once more
        same = training.checkpoints.saved_flags(state).get('model') == name
        return inference.models.load_model(state, path, None, use_ema, '' if same else name, model_kwargs or None).model

    entry.__name__ = name
    entry.__doc__ = f"""The model {name}: embeddings (B, d, s, s) of codes -> logits (B, classes).

    Args:
        checkpoint: a file, or the folder of a run; '' for initial weights. With it the model is in eval mode.
        use_ema: take the averaged weights.
        **model_kwargs: timm's, as in depth=4; default: as the checkpoint says. Published ones do not.
    """
    return entry


globals().update({_model: _entry(_model) for _model in models_seit.MODELS})
