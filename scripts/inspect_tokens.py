"""Report what is in a token set: codes in use, their entropy, bytes an image; draw images beside their reconstruction.

    python scripts/inspect_tokens.py --token-file tokens/my-train-token.data.bin.gz \\
        --label-file tokens/my-train-label.txt --codebook-path tokens/codebook.ckpt \\
        --tokenizer-path tokens/tokenizer.pt --data-path IMAGES/train --output sheet.png

Prints text for people, then one JSON line. The codes are decoded in memory (2 bytes each); no cache is written.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from image_tokenizer import image_transform, load_tokenizer, open_image_folder  # noqa: E402
from token_dataset import index_path, load_codebook, open_codes, read_card, read_index, read_labels  # noqa: E402
from utils import InputError, atomic_path, expand_files, run  # noqa: E402

IMAGES_AT_ONCE = 4096  # counted at a time: bounds memory
PATCH_SIZE = 8  # pixels a code covers where no tokenizer says so (the published one)


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--token-file', required=True, metavar='FILE', help='NAME.data.bin.gz, or a glob of shards')
    add('--codebook-path', required=True, metavar='FILE')
    add('--label-file', metavar='FILE', help='adds images a class')
    add('--data-path', metavar='DIR', help='class folders of images the tokens were made from: adds their bytes')
    add('--tokenizer-path', metavar='FILE', help='reconstructs the images of --output, where it has a decoder')
    add('--output', metavar='FILE.png', help='contact sheet: source images and reconstructions, whichever there are')
    add('--images', type=int, default=16, help='on the contact sheet, from the first on')
    return parser


# ---------------------------------------------------------------- numbers

def count_codes(codes, codebook_size):
    """Uses of each code, (K,) int64, in codes (N, n) uint16. Raises ValueError for a code beyond the codebook."""
    counts = np.zeros(1 << 16, np.int64)
    for start in range(0, len(codes), IMAGES_AT_ONCE):
        counts += np.bincount(codes[start:start + IMAGES_AT_ONCE].ravel(), minlength=len(counts))
    if counts[codebook_size:].any():
        raise ValueError(f'holds code {counts.nonzero()[0].max()}, but the codebook has {codebook_size} rows')
    return counts[:codebook_size]


def entropy_bits(counts):
    """Entropy in bits of one code drawn by counts (K,): from 0 (one code only) to log2(K) (all equally frequent)."""
    share = counts[counts > 0] / counts.sum()
    return float(np.log2(1 / share) @ share)


def source_bytes(files, folder):
    """Bytes of the source images: of the files in `folder`, else as the cards beside the tokens say, else None."""
    if folder:
        return sum(os.path.getsize(path) for path, _ in folder.samples)
    cards = [read_card(file) for file in files]
    if all(type(card.get('source_bytes')) is int for card in cards):
        return sum(card['source_bytes'] for card in cards)


def bytes_per_image(files, folder, shape, counts):
    """Bytes an image in several ways.

    Args: files: the token files; folder: ImageFolder of the source images, or None; shape (N, n) of the codes;
        counts (K,) uses of each code.
    Returns a dict: `raw` is the uncompressed stream, `stored` the gzipped files, `fixed` log2(K) bits a code, `entropy`
    the fewest a coder can reach that sees each code on its own; `source`, where it is known, the source images.
    """
    images, n = shape
    raw = sum(int(read_index(file)[-1]) for file in files)
    stored = sum(os.path.getsize(file) + os.path.getsize(index_path(file)) for file in files)
    source = source_bytes(files, folder)
    size = {'raw': raw / images, 'stored': stored / images, 'fixed': n * math.log2(len(counts)) / 8,
            'entropy': n * entropy_bits(counts) / 8, **({} if source is None else {'source': source / images})}
    return {name: round(value, 2) for name, value in size.items()}


def summarise(files, folder, codes, counts):
    """What the token set holds, as plain values. Args: as above, with codes (N, n)."""
    images, n = codes.shape
    return {'images': images, 'grid': math.isqrt(n), 'codes': len(counts), 'codes_used': int((counts > 0).sum()),
            'entropy_bits': round(entropy_bits(counts), 4), 'most_bits': round(math.log2(len(counts)), 4),
            'bytes_per_image': bytes_per_image(files, folder, codes.shape, counts), 'code_counts': counts.tolist()}


def count_classes(label_file, images):
    """Images of each class, {class: count}. Raises InputError unless there is a label for each image."""
    labels = np.concatenate([read_labels(file) for file in expand_files(label_file)])
    if len(labels) != images:
        raise InputError(f'{label_file}: {len(labels)} labels for {images} images; give the labels of this token file')
    return dict(zip(*(values.tolist() for values in np.unique(labels, return_counts=True))))


def histogram(counts):
    """Lines of text: the share of all codes that each tenth of the codebook takes, most used first."""
    ranked = np.sort(counts)[::-1]
    lines, first = [], 1
    for part in np.array_split(ranked, min(10, len(ranked))):
        share = part.sum() / ranked.sum()
        last = first + len(part) - 1
        lines.append(f'  {f"{first}-{last}":>9} {share:6.1%} {"#" * round(50 * share)}')
        first = last + 1
    return lines


def describe(summary):
    """The lines for people."""
    s, size = summary, summary['bytes_per_image']
    ratio = f' of {s["most_bits"]:.2f} ({s["entropy_bits"] / s["most_bits"]:.1%})' if s['most_bits'] else ''
    lines = [f'{s["images"]:,} images of {s["grid"]}x{s["grid"]} codes, {s["codes_used"]} of {s["codes"]} codes in use',
             f'entropy: {s["entropy_bits"]:.2f} bits a code{ratio}',
             f'bytes an image: {size["raw"]:,.0f} as a byte stream, {size["stored"]:,.0f} on disk, '
             f'{size["fixed"]:,.0f} at log2(codes) bits a code, {size["entropy"]:,.0f} at the entropy']
    if 'source' in size:
        lines.append(f'source images: {size["source"]:,.0f} bytes an image, '
                     f'{size["source"] / size["stored"]:.1f} times the tokens on disk')
    if 'class_counts' in s:
        counts = s['class_counts'].values()
        lines.append(f'labels: {len(counts)} classes of {min(counts):,} to {max(counts):,} images')
    return lines + ['codes by rank of use, most used first, and their share:'] + histogram(np.array(s['code_counts']))


# ---------------------------------------------------------------- pictures

def source_images(folder, count, side):
    """The first images of a folder as the tokenizer gets them: (count, 3, side, side) float32 in [0, 1]."""
    folder.transform = image_transform(side)
    try:
        return torch.stack([folder[i][0] for i in range(count)])
    except OSError as error:
        raise InputError(f'{folder.root}: an image cannot be read ({error})') from None


@torch.inference_mode()
def reconstruct(tokenizer, codebook, codes):
    """Images (B, 3, H, W) float32 in [0, 1] of codes (B, n) uint16, or None where the tokenizer has no decoder."""
    if not hasattr(tokenizer, 'decode') or getattr(tokenizer, 'decoder', True) is None:
        return None
    embeddings = codebook[torch.from_numpy(codes.astype(np.int64))]
    return torch.cat([tokenizer.decode(part) for part in embeddings.split(8)]).clamp(0, 1)


def contact_sheet(args, codes, codebook, folder):
    """A PIL image of the first images: each one's source beside its reconstruction, whichever of them there are."""
    count = min(args.images, len(codes))
    side, parts = PATCH_SIZE * math.isqrt(codes.shape[1]), []
    if args.tokenizer_path:
        tokenizer = load_tokenizer(args.tokenizer_path)
        if codebook.shape[1] != tokenizer.embed_dim:
            raise InputError(f'{args.codebook_path}: rows of {codebook.shape[1]} elements, but the tokenizer gives '
                             f'{tokenizer.embed_dim}')
        side = tokenizer.patch_size * math.isqrt(codes.shape[1])
        parts = [reconstruct(tokenizer, codebook, codes[:count])]
    if folder:
        parts = [source_images(folder, count, side), *parts]
    parts = [part for part in parts if part is not None]
    if not parts:
        raise InputError('--output: nothing to draw; give --data-path, or a --tokenizer-path that has a decoder')
    cells = torch.cat(parts, dim=3)  # (B, 3, side, side * parts)
    return to_pil_image(make_grid(cells, nrow=math.ceil((count / len(parts)) ** 0.5), pad_value=1))


def main(args):
    if args.images < 1:
        raise InputError(f'--images {args.images}: at least 1 is needed')
    codebook = load_codebook(args.codebook_path)
    codes = open_codes(args.token_file, cache='none')
    try:
        counts = count_codes(codes, len(codebook))
    except ValueError as error:
        raise InputError(f'{args.token_file}: {error}; give the codebook the tokens were made with') from None
    folder = open_image_folder(args.data_path, None) if args.data_path else None
    if folder and len(folder) != len(codes):
        raise InputError(f'{args.data_path}: {len(folder)} images, but {args.token_file} holds {len(codes)}; give the '
                         'folder the tokens were made from')
    summary = summarise(expand_files(args.token_file), folder, codes, counts)
    if args.label_file:
        summary['class_counts'] = count_classes(args.label_file, len(codes))
    print('\n'.join(describe(summary)))
    if args.output:
        sheet = contact_sheet(args, codes, codebook, folder)
        with atomic_path(args.output) as temporary:
            sheet.save(temporary, 'PNG')
        print(f'contact sheet: {args.output}')
    print(json.dumps(summary))


if __name__ == '__main__':
    run(lambda: main(get_args_parser().parse_args()))
