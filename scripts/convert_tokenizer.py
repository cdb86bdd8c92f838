"""Turn a published tokenizer file into a plain one, which loads without running code.

    python scripts/convert_tokenizer.py --input weights/tokenizer.ckpt --output weights/tokenizer.safetensors

Reads a pickled ViT-VQGAN module (SeiT's tokenizer.ckpt) or a Lightning checkpoint; writes the tensors under the names
of vitvqgan.py. No code of the file is run: each class it asks for is replaced by an empty container, and the tensors
are found by the ends of their names and by their shapes. So names and shapes are all that is checked. With
--tokenizer-code-path the file is loaded by running its code instead, and the features of the module it holds are
compared with those of the converted tokenizer.
"""
import argparse
import sys
from collections import OrderedDict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from image_tokenizer import CodeNeeded, features_of, load_running_code, read_file, same_features  # noqa: E402
from utils import InputError, atomic_path, run, save_torch  # noqa: E402
from vitvqgan import ViTVQGAN  # noqa: E402


# ---------------------------------------------------------------- reading without running code

class Container:
    """Stands for an object whose class is not run: takes whatever the file gives it and keeps named attributes."""

    def __init__(self, *args, **kwargs):
        pass

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def stand_in(name):
    """A class to be found under the name 'package.module.Class' whose instances are empty containers."""
    module, _, short = (name if '.' in name else f'builtins.{name}').rpartition('.')
    body = {'__module__': module}
    if short.lower().endswith('dict'):  # torch's restricted unpickler puts items into its own kinds of dict only
        body['__new__'] = lambda cls, *args, **kwargs: OrderedDict()
    return type(short, (Container,), body)


def read_inert(path):
    """What a file holds, with an empty container in place of each class torch does not know. Raises InputError."""
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


def tensors_of(node, prefix=''):
    """Yield (name, tensor) for all tensors in a nest of dicts and of modules, living or contained."""
    if isinstance(node, torch.Tensor):
        yield prefix[:-1], node.detach()
    elif isinstance(node, (dict, nn.Module, Container)):
        fields = [node, *(getattr(node, name, None) for name in ('_parameters', '_buffers', '_modules'))]
        children = {name: child for field in fields if isinstance(field, dict) for name, child in field.items()}
        for name, child in children.items():
            yield from tensors_of(child, f'{prefix}{name}.')


# ---------------------------------------------------------------- finding the parts

def root_of(tensors, end):
    """What precedes `end` in the one name that ends so; None when none does. Raises InputError when several do."""
    roots = [name.removesuffix(end) for name in tensors if f'.{name}'.endswith(f'.{end}')]
    if len(roots) > 1:
        raise InputError(f'several tensors are called {end}, under {", ".join(roots)}: which to take is unknown')
    return roots[0] if roots else None


def take(tensors, part, found, root, ends):
    """Move the tensors under `root` whose names go on with one of `ends` from `tensors` to `found`, under `part`."""
    names = [name for name in tensors if name.startswith(root) and name[len(root):].startswith(ends)]
    found.update({f'{part}.{name[len(root):]}': tensors.pop(name) for name in names})
    print(f'{part:20}  {len(names):3} tensors, from {root or "the top"}')


def take_matrix(tensors, part, found, fits):
    """Move a weight, and its bias if any, by the name `part`; else the only weight that fits(shape, has a bias)."""
    root = root_of(tensors, f'{part}.weight')
    roots = [f'{root}{part}.'] if root is not None else [
        name.removesuffix('weight') for name, value in tensors.items() if name.endswith('.weight')
        and fits(tuple(value.shape), name.removesuffix('weight') + 'bias' in tensors)]
    if len(roots) == 1:
        take(tensors, part, found, roots[0], ('weight', 'bias'))
    else:
        print(f'{part:20}  not found' + (f': {", ".join(roots)} would all fit' if roots else ''))


def find_parts(tensors):
    """The tensors of encoder, pre_quant, and where there are any codebook, decoder, post_quant, under our names.

    Args: tensors, a dict of name -> tensor, emptied of what is taken. Prints what was found. Raises InputError.
    """
    found, listed = {}, ', '.join(list(tensors)[:5]) or 'no tensor'
    root = root_of(tensors, 'to_patch_embedding.0.weight')
    if root is None:
        raise InputError('holds no ViT-VQGAN encoder: no tensor is called to_patch_embedding.0.weight '
                         f'(found: {listed})')
    take(tensors, 'encoder', found, root, ('to_patch_embedding.', 'transformer.', 'en_pos_embedding'))
    root = root_of(tensors, 'to_pixel.1.weight')
    if root is not None:
        take(tensors, 'decoder', found, root, ('to_pixel.', 'transformer.', 'de_pos_embedding'))
    dim = len(found['encoder.to_patch_embedding.0.weight'])
    take_matrix(tensors, 'pre_quant', found, lambda shape, bias: bias and len(shape) == 2 and shape[1] == dim)
    if 'pre_quant.weight' not in found:
        raise InputError(f'no pre_quant, a Linear from {dim} to the codebook\'s width, could be told among what is '
                         f'left: {", ".join(list(tensors)[:5]) or "nothing"}')
    width = len(found['pre_quant.weight'])
    take_matrix(tensors, 'quantizer.embedding', found,
                lambda shape, bias: not bias and len(shape) == 2 and shape[1] == width)
    if root is not None:
        take_matrix(tensors, 'post_quant', found, lambda shape, bias: bias and len(shape) == 2 and shape[1] == width)
    print(f'{"left out":20}  {len(tensors):3} tensors' + (f': {", ".join(list(tensors)[:5])} ...' if tensors else ''))
    return found


# ---------------------------------------------------------------- the program

def convert(path, value):
    """The ViTVQGAN in what was read from `path`. Where that is a living module, their features must agree."""
    source = value['state_dict'] if isinstance(value, dict) and 'state_dict' in value else value
    tensors = {name: tensor for name, tensor in tensors_of(source) if not name.startswith('loss.')}
    try:
        model = ViTVQGAN.from_state_dict(find_parts(tensors))
        if isinstance(value, nn.Module):
            theirs = features_of(value.eval(), model.image_size)
            if not same_features(theirs, features_of(model, model.image_size)):
                raise InputError('the module computes other features than a ViT-VQGAN with its weights: not converted')
            print('the features of the module and of the converted tokenizer agree')
    except InputError as error:
        raise InputError(f'{path}: {error}') from None
    return model


def main(args):
    if args.tokenizer_code_path:
        model = load_running_code(args.input, args.tokenizer_code_path, convert)
    else:
        model = convert(args.input, read_inert(args.input))
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}
    if args.output.lower().endswith('.safetensors'):
        with atomic_path(args.output) as temporary:
            safetensors.torch.save_file(state, temporary)
    else:
        save_torch(state, args.output)
    count = sum(tensor.numel() for tensor in state.values()) / 1e6
    print(f'{args.output}: {count:.1f} M numbers, {model.image_size}x{model.image_size} images, patches of '
          f'{model.patch_size}, features of {model.embed_dim}')


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, metavar='FILE', help='published tokenizer file')
    parser.add_argument('--output', required=True, metavar='FILE',
                        help='plain file to write: .safetensors, or any other ending for a torch file')
    parser.add_argument('--tokenizer-code-path', metavar='DIR',
                        help='load the file by running its code, found in this folder, and compare the features')
    return parser.parse_args()


if __name__ == '__main__':
    run(main, get_args())
