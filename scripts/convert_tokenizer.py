"""Turn a published tokenizer file into a plain one, which loads without running code.

    python scripts/convert_tokenizer.py --input weights/tokenizer.ckpt --output weights/tokenizer.safetensors

Reads a pickled ViT-VQGAN module (SeiT's tokenizer.ckpt), or a Lightning checkpoint of a ViT-VQGAN or a VQGAN. Writes
the tensors of the first under the names of image_tokenizer/vitvqgan.py, those of a VQGAN under their own, and averaged
ones where there are any. No code of the file is run: each class it asks for is replaced by an empty container, and
tensors are found by the ends of their names and by their shapes. So names and shapes are all that is checked. With
--tokenizer-code-path the file is loaded by running its code instead, and the features of a ViT-VQGAN module that it
holds are compared with those of the converted tokenizer.
"""
import argparse
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import atomic_path, check_writable, identity, save_torch
from flags import Parser
from image_tokenizer import vqgan
from image_tokenizer.pickled import features_of, load_running_code, same_features
from image_tokenizer.tokenizers import CodeNeeded, read_file
from image_tokenizer.vitvqgan import ViTVQGAN
from image_tokenizer.vqgan import VQGAN
from token_files.made_with import CONVERTED
from utils import InputError, print0, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--input', required=True, metavar='FILE', help='the published tokenizer file')
    add('--output', required=True, metavar='FILE',
        help='the plain file to write: .safetensors, or with any other ending a torch file')
    add('--tokenizer-code-path', metavar='DIR',
        help='load the file by running its code, found in this folder, and compare the features')
    return parser.parse_args(argv)


# ---------------------------------------------------------------- reading without running code

class Container:
    """Stands for an object whose class is not run: takes whatever the file gives it and keeps named attributes."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> 'Container':
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def stand_in(name: str) -> type:
    """A class to be found under the name 'package.module.Class' whose instances are empty containers."""
    module, _, short = (name if '.' in name else f'builtins.{name}').rpartition('.')
    body = {'__module__': module}
    if short.lower().endswith('dict'):  # torch's restricted unpickler puts items into its own kinds of dict only
        body['__new__'] = lambda cls, *args, **kwargs: OrderedDict()
    return type(short, (Container,), body)


def read_inert(path: str | Path) -> Any:
    """What a file holds, with an empty container in place of each class torch does not know. Raises InputError."""
    # torch names one class that it refuses at a time. Each gets an empty stand-in, until the file can be read.
    stand_ins = {}
    while True:
        with torch.serialization.safe_globals(list(stand_ins.values())):
            try:
                return read_file(path)
            except CodeNeeded as error:
                if error.name in stand_ins:  # torch refuses some things, such as os.system, whatever stands in
                    raise InputError(f'{path}: {error.name} cannot be read without running code; if you trust the '
                                     'file, give the folder of its code to --tokenizer-code-path') from None
                stand_ins[error.name] = stand_in(error.name)


def tensors_of(node: Any, prefix: str = '') -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for all tensors in a nest of dicts and of modules, living or contained."""
    if isinstance(node, torch.Tensor):
        yield prefix[:-1], node.detach()
    elif isinstance(node, (dict, nn.Module, Container)):
        fields = [node, *(getattr(node, name, None) for name in ('_parameters', '_buffers', '_modules'))]
        children = {name: child for field in fields if isinstance(field, dict) for name, child in field.items()}
        for name, child in children.items():
            yield from tensors_of(child, f'{prefix}{name}.')


# ---------------------------------------------------------------- the parts of a ViT-VQGAN

class PartFinder:
    """Moves tensors from a file's names to those of vitvqgan.py, part after part; prints what it finds.

    Args:
        tensors: name -> tensor, as in the file.

    Attributes:
        left: those not taken yet, under the file's names.
        taken: those taken, under vitvqgan.py's names.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.left = dict(tensors)
        self.taken = {}

    def some_left(self) -> str:
        """The first names that are left."""
        return ', '.join(list(self.left)[:5])

    def root_of(self, end: str) -> str | None:
        """What precedes `end` in the one name that ends so; None when none does. Raises InputError for several."""
        roots = [name.removesuffix(end) for name in self.left if f'.{name}'.endswith(f'.{end}')]
        if len(roots) > 1:
            raise InputError(f'several tensors are called {end}, under {", ".join(roots)}: which to take is unknown')
        return roots[0] if roots else None

    def take(self, part: str, root: str, starts: tuple[str, ...]) -> None:
        """Take the tensors under `root` whose names continue with one of `starts`, as `part`."""
        names = [name for name in self.left if name.startswith(root) and name[len(root):].startswith(starts)]
        for name in names:
            self.taken[f'{part}.{name[len(root):]}'] = self.left.pop(name)
        print0(f'{part:20}  {len(names):3} tensors, from {root or "the top"}')

    def take_matrix(self, part: str, fits: Callable[[tuple[int, ...], bool], bool]) -> None:
        """Take a weight, and its bias if any, by the name `part`; else the only weight that fits(shape, has a bias)."""
        root = self.root_of(f'{part}.weight')
        if root is not None:
            roots = [f'{root}{part}.']
        else:
            weights = [name for name in self.left if name.endswith('.weight')]
            roots = [name.removesuffix('weight') for name in weights
                     if fits(tuple(self.left[name].shape), name.removesuffix('weight') + 'bias' in self.left)]
        if len(roots) == 1:
            self.take(part, roots[0], ('weight', 'bias'))
        else:
            print0(f'{part:20}  not found' + (f': {", ".join(roots)} would all fit' if roots else ''))


def find_parts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of encoder, pre_quant, and where there are any codebook, decoder, post_quant, by vitvqgan.py's names.

    Prints what was found.

    Args:
        tensors: name -> tensor, as in the file.

    Raises:
        InputError: a part is missing, or cannot be told.
    """
    parts = PartFinder(tensors)
    root = parts.root_of('to_patch_embedding.0.weight')
    if root is None:
        raise InputError('holds no ViT-VQGAN encoder: no tensor is called to_patch_embedding.0.weight '
                         f'(found: {parts.some_left() or "no tensor"})')
    parts.take('encoder', root, ('to_patch_embedding.', 'transformer.', 'en_pos_embedding'))
    decoder_root = parts.root_of('to_pixel.1.weight')
    if decoder_root is not None:
        parts.take('decoder', decoder_root, ('to_pixel.', 'transformer.', 'de_pos_embedding'))
    dim = len(parts.taken['encoder.to_patch_embedding.0.weight'])
    parts.take_matrix('pre_quant', lambda shape, bias: bias and len(shape) == 2 and shape[1] == dim)
    if 'pre_quant.weight' not in parts.taken:
        raise InputError(f"no pre_quant, a Linear from {dim} to the codebook's code_dim, could be told among what is "
                         f'left: {parts.some_left() or "nothing"}')
    code_dim = len(parts.taken['pre_quant.weight'])
    parts.take_matrix('quantizer.embedding',
                      lambda shape, bias: not bias and len(shape) == 2 and shape[1] == code_dim)
    if decoder_root is not None:
        parts.take_matrix('post_quant', lambda shape, bias: bias and len(shape) == 2 and shape[1] == code_dim)
    names = f': {parts.some_left()} ...' if parts.left else ''
    print0(f'{"left out":20}  {len(parts.left):3} tensors{names}')
    return parts.taken


# ---------------------------------------------------------------- the program

def convert(path: str | Path, value: Any) -> tuple[ViTVQGAN | VQGAN, dict[str, torch.Tensor]]:
    """The tokenizer in what was read from `path`, and the tensors to write.

    Where a ViT-VQGAN is a living module, their features must agree.

    Raises:
        InputError: it is neither a ViT-VQGAN nor a VQGAN.
    """
    source = value['state_dict'] if isinstance(value, dict) and 'state_dict' in value else value
    tensors = {name: tensor for name, tensor in tensors_of(source) if not name.startswith('loss.')}
    try:
        if vqgan.prefixes(tensors):
            state = vqgan.weights_of_file(tensors)  # the names say which family it is of, so they are kept
            model = VQGAN.from_state_dict(state)
            print0(f'{model.kind}: {len(state)} of {len(tensors)} tensors')
            return model, state
        model = ViTVQGAN.from_state_dict(find_parts(tensors))
        if isinstance(value, nn.Module):
            module_features = features_of(value.eval(), model.image_size)
            if not same_features(module_features, features_of(model, model.image_size)):
                raise InputError('the module computes other features than a ViT-VQGAN with its weights: not converted')
            print0('the features of the module and of the converted tokenizer agree')
    except InputError as error:
        raise InputError(f'{path}: {error}') from None
    return model, model.state_dict()


def main(args: argparse.Namespace) -> None:
    check_writable(args.output, inputs=[args.input])
    if args.tokenizer_code_path:
        model, state = load_running_code(args.input, args.tokenizer_code_path, convert)
    else:
        model, state = convert(args.input, read_inert(args.input))
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    if args.output.lower().endswith('.safetensors'):
        with atomic_path(args.output) as temporary:
            safetensors.torch.save_file(state, temporary, {CONVERTED: identity(args.input)['sha256']})
    else:
        save_torch(state, args.output)
    count = sum(tensor.numel() for tensor in state.values()) / 1e6
    size = f'{model.image_size}x{model.image_size} images, ' if isinstance(model, ViTVQGAN) else ''
    print0(f'{args.output}: {count:.1f} M numbers, {size}patches of {model.patch_size}, features of {model.embed_dim}')


if __name__ == '__main__':
    run(main, parse_args)
