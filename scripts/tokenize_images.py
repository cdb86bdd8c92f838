"""Tokenise a folder of images into the published three files and a JSON card.

    python scripts/tokenize_images.py --data-path IMAGES/train --name my-train --output-dir tokens \\
        --tokenizer-path tokens/tokenizer.pt --codebook-path tokens/codebook.ckpt --image-size 64

Writes NAME-token.data.bin.gz, NAME-token.index.npy.gz, NAME-label.txt and NAME-token.json. Labels are the class
folders in alphabetical order, from 0.
"""
import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from image_tokenizer import image_transform, load_tokenizer, open_image_folder, quantize  # noqa: E402
from token_dataset import index_path, load_codebook, write_tokens  # noqa: E402
from utils import InputError, run, write_text  # noqa: E402


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--data-path', required=True, metavar='DIR', help='class folders of images')
    add('--name', required=True, help='first part of the file names, as in imagenet1k-train')
    add('--output-dir', required=True, metavar='DIR')
    add('--tokenizer-path', required=True, metavar='FILE')
    add('--codebook-path', required=True, metavar='FILE')
    add('--image-size', type=int, default=256, help='images are resized to this, both sides')
    add('--batch-size', type=int, default=64)
    add('--num-workers', type=int, default=2, help='processes that decode images')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser


@torch.inference_mode()
def tokenize(folder, tokenizer, codebook, args):
    """Codes (N, n) uint16 and labels (N,) int64 of an ImageFolder."""
    codes, labels = [], []
    loader = DataLoader(folder, args.batch_size, num_workers=args.num_workers)
    for images, targets in tqdm(loader, disable=not sys.stderr.isatty()):
        codes.append(quantize(tokenizer(images.to(args.device)), codebook).to('cpu', torch.uint16))
        labels.append(targets)
    return torch.cat(codes).numpy(), torch.cat(labels).numpy()


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def main(args):
    folder = open_image_folder(args.data_path, image_transform(args.image_size))
    tokenizer, codebook = load_tokenizer(args.tokenizer_path).to(args.device), load_codebook(args.codebook_path)
    if codebook.shape[1] != tokenizer.embed_dim:
        raise InputError(f'{args.codebook_path}: rows of {codebook.shape[1]} elements, but the tokenizer gives '
                         f'{tokenizer.embed_dim}')
    codes, labels = tokenize(folder, tokenizer, codebook.to(args.device), args)
    output = Path(args.output_dir)
    tokens, label_file = output / f'{args.name}-token.data.bin.gz', output / f'{args.name}-label.txt'
    write_tokens(tokens, label_file, codes, labels)
    files = [tokens, index_path(tokens), label_file]
    card = {
        'images': len(codes), 'grid': int(round(codes.shape[1] ** 0.5)), 'codes': len(codebook),
        'codes_used': len(np.unique(codes)), 'image_size': args.image_size, 'classes': folder.classes,
        'tokenizer': {'file': Path(args.tokenizer_path).name, 'sha256': sha256(args.tokenizer_path)},
        'codebook': {'file': Path(args.codebook_path).name, 'sha256': sha256(args.codebook_path)},
        'files': {path.name: {'bytes': path.stat().st_size, 'sha256': sha256(path)} for path in files},
    }
    write_text(output / f'{args.name}-token.json', json.dumps(card, indent=1) + '\n')
    stored = sum(path.stat().st_size for path in files[:2])
    print(f'{len(codes):,} images of {card["grid"]}x{card["grid"]} codes, {card["codes_used"]} of {len(codebook)} codes '
          f'in use, {stored:,} bytes ({stored / len(codes):.0f} an image): {tokens}')


if __name__ == '__main__':
    run(lambda: main(get_args_parser().parse_args()))
