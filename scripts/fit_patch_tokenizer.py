"""Learn a patch tokenizer and its codebook from a folder of images: PCA of patches, then spherical k-means.

    python scripts/fit_patch_tokenizer.py --data-path IMAGES/train --image-size 64 --output-dir tokens

Writes tokenizer.pt (plain tensors) and codebook.ckpt. A stand-in for ViT-VQGAN that fits in a minute on a CPU and
takes half a megabyte; equal input and flags give equal files on one machine.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from image_tokenizer import PatchTokenizer, image_transform, open_image_folder, quantize  # noqa: E402
from utils import InputError, run, save_torch  # noqa: E402


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--data-path', required=True, metavar='DIR', help='class folders of images')
    add('--output-dir', required=True, metavar='DIR')
    add('--image-size', type=int, default=256, help='images are resized to this, both sides')
    add('--patch-size', type=int, default=8)
    add('--dim', type=int, default=32, help='components kept, the width of the codebook')
    add('--codes', type=int, default=391, help='rows of the codebook')
    add('--max-images', type=int, default=2000, help='drawn at random for the fit')
    add('--max-patches', type=int, default=200_000, help='of their patches, drawn at random')
    add('--iterations', type=int, default=50, help='of k-means')
    add('--seed', type=int, default=0)
    return parser


def sample_images(args, generator):
    """(N, 3, S, S) float32 images drawn at random."""
    folder = open_image_folder(args.data_path, image_transform(args.image_size))
    chosen = torch.randperm(len(folder), generator=generator)[:args.max_images].tolist()
    return torch.cat([images for images, _ in DataLoader(Subset(folder, chosen), batch_size=100)])


def fit_pca(patches, dim):
    """Mean (m,) and leading components (m, dim) of patches (N, m); each component's largest entry is positive."""
    mean = patches.mean(0)
    centred = (patches - mean).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    basis = vectors.flip(1)[:, :dim]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return mean, (basis * largest.sign()).float().contiguous()


def spherical_kmeans(features, codes, iterations, generator):
    """Codebook (codes, d): k-means by cosine. A row is its cluster's mean feature, with its length.

    A cluster that empties starts again at the features that fit their rows worst.
    """
    unit = F.normalize(features, dim=-1)
    rows = unit[torch.randperm(len(unit), generator=generator)[:codes]]
    for _ in range(iterations):
        assigned = quantize(unit, rows)
        count = torch.bincount(assigned, minlength=codes)
        rows = F.normalize(torch.zeros_like(rows).index_add_(0, assigned, unit), dim=-1)
        empty = (count == 0).nonzero().squeeze(1)
        if len(empty):
            worst = (unit * rows[assigned]).sum(-1).argsort()[:len(empty)]
            rows[empty] = unit[worst]
    assigned = quantize(unit, rows)
    total = torch.zeros_like(rows).index_add_(0, assigned, features)
    count = torch.bincount(assigned, minlength=codes)
    return torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], rows * features.norm(dim=1).mean())


def main(args):
    generator = torch.Generator().manual_seed(args.seed)
    images = sample_images(args, generator)
    raw = PatchTokenizer(torch.zeros(3 * args.patch_size ** 2), torch.eye(3 * args.patch_size ** 2), torch.tensor(1.))
    patches = raw.patches(images).flatten(0, 1)
    patches = patches[torch.randperm(len(patches), generator=generator)[:args.max_patches]]
    if len(patches) < args.codes or patches.shape[1] < args.dim:
        raise InputError(f'{args.data_path}: {len(patches)} patches of {patches.shape[1]} values are too few for '
                         f'{args.codes} codes of {args.dim}')
    if (patches == patches[0]).all():
        raise InputError(f'{args.data_path}: every patch is the same; give images with something on them')
    mean, basis = fit_pca(patches, args.dim)
    features = (patches - mean) @ basis
    codebook = spherical_kmeans(features, args.codes, args.iterations, generator)
    # embedding-noise has deviation 1, so codebook elements must have it too
    scale = 1 / codebook.std()
    output = Path(args.output_dir)
    save_torch({'mean': mean, 'basis': basis, 'scale': scale}, output / 'tokenizer.pt')
    save_torch(codebook * scale, output / 'codebook.ckpt')
    cosine = (F.normalize(features, dim=-1) * F.normalize(codebook, dim=-1)[quantize(features, codebook)]).sum(-1)
    print(f'{len(images):,} images, {len(patches):,} patches; {args.codes} codes of {args.dim}; '
          f'mean cosine of a patch to its code {cosine.mean():.4f}; wrote {output}/tokenizer.pt and codebook.ckpt')


if __name__ == '__main__':
    run(lambda: main(get_args_parser().parse_args()))
