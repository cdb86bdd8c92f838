"""Evaluate a token-trained ViT on images (SeiT sec. 4): image -> tokenizer -> codes -> codebook -> ViT.

One process:   python evaluate_on_images.py --device cpu --data-path IMAGES --model-path trained-vit.ckpt ...
One node:      torchrun --nproc_per_node=8 evaluate_on_images.py --dist-eval ...

IMAGES holds a folder for each class, labels are the folders in alphabetical order, from 0; or it is a list, tar shards
or parquet files, see image_sources.py. Images are resized to --tokenizer-input-size on both sides, and the middle
--vit-input-size codes of the grid are read.
"""
import argparse
import csv
import io

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from checkpoints import load_checkpoint, load_weights
from engine import default_amp, evaluate, own_share
from image_sources import DecodedImages, good_images, open_source
from image_tokenizer import encode, load_tokenizer
from models_seit import MODELS, KeyValues, create_model
from token_augment import EvalTransform
from token_dataset import load_codebook
from utils import (InputError, check_least, cores, init_distributed, is_main, parse_flags, run, say, say_no_effect,
                   world_size, write_text)

NO_EFFECT = {
    '--eval': 'this program only evaluates',
    '--seed': 'nothing here is random',
    '--world-size': 'the launcher (torchrun, srun) sets it',
}


def get_args_parser():
    """All flags; they may be spelled with underscores too."""
    parser = argparse.ArgumentParser(description='Evaluate a token-trained ViT on images.', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--data-path', required=True, metavar='PATH',
        help='class folders of images, a list file .txt, tar shards or parquet files: see image_sources.py')
    add('--model', default='deit_base_token_32', help=', '.join(MODELS))
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='as given in training')
    add('--model-path', default='weights/trained-vit.ckpt', metavar='FILE', help='a checkpoint')
    add('--use-ema', action='store_true', help="take the checkpoint's averaged weights")
    add('--codebook-path', default='weights/codebook.ckpt', metavar='FILE')
    add('--tokenizer-path', default='weights/tokenizer.ckpt', metavar='FILE')
    add('--tokenizer-code-path', metavar='DIR',
        help='folder of the code that a pickled tokenizer runs when loaded; scripts/convert_tokenizer.py does without')
    add('--tokenizer-input-size', type=int, default=256, help='pixels images are resized to, both sides')
    add('--vit-input-size', type=int, default=28, help='codes the model reads, each side')
    add('--nb-classes', type=int, help="default: the checkpoint's (1000 in the published ones)")
    add('--batch-size', type=int, default=64, help='per process')
    add('--num-workers', type=int, default=10, help='processes that decode images; as many as the cores at most')
    add('--pin-mem', action=argparse.BooleanOptionalAction, default=True,
        help='copy batches to a GPU from page-locked memory')
    add('--amp', choices=['bf16', 'fp16', 'off'], help='mixed precision of the ViT (default: fp16 on CUDA, off on CPU)')
    add('--tokenizer-amp', choices=['bf16', 'off'], default='off',
        help='off: fp32, so that codes are those of the training set; bf16 is faster and moves some codes')
    add('--compile', action='store_true', help='torch.compile tokenizer and model')
    add('--dist-eval', action='store_true', help='share the images over the ranks, each on exactly one')
    add('--save-predictions', metavar='FILE.csv', help='a line an image: file, label, prediction, probability, top 5')
    add('--skip-bad-images', action='store_true', help='leave unreadable images out and count them')
    add('--device', default='cuda', help='cuda or cpu')
    add('--dist-url', default='env://', help="torch.distributed's init method")
    group = parser.add_argument_group('accepted, without effect')
    for flag, why in NO_EFFECT.items():
        group.add_argument(flag, help=why, **({'action': 'store_true'} if flag == '--eval' else {}))
    return parser


def parse_args(words=None):
    """The command line. Raises InputError for values that cannot be."""
    args = parse_flags(get_args_parser(), words)
    check_least(args, batch_size=1, num_workers=0, tokenizer_input_size=1, vit_input_size=2)
    return args


class ImageCodes:
    """Batches of codes made from images while they are evaluated; iterate once.

    Args: source: image_sources.Source; tokenizer, codebook (K, d); args: of the command line.
    Yields codes (B, g, g) int64 and labels (B,) int64 on `device`. Afterwards `indices` lists the images in the order
    they came, and `bad` counts those left out.
    """

    def __init__(self, source, tokenizer, codebook, device, args):
        self.source, self.args, self.device = source, args, device
        self.tokenizer, self.codebook, self.indices, self.bad = tokenizer.to(device), codebook.to(device), [], 0
        share = own_share(len(source), args.dist_eval).tolist()
        self.batches = [share[start:start + args.batch_size] for start in range(0, len(share), args.batch_size)]

    def __iter__(self):
        loader = DataLoader(DecodedImages(self.source, self.args.tokenizer_input_size), batch_sampler=self.batches,
                            num_workers=min(self.args.num_workers, cores()),
                            pin_memory=self.args.pin_mem and self.device.type == 'cuda')
        for batch, (pixels, _, problems) in zip(self.batches, loader):
            good = good_images(self.args, self.source, batch, problems)
            self.bad += int((~good).sum())
            if not good.all():
                pixels = pixels[torch.from_numpy(good)]
            if not len(pixels):
                continue
            _, codes = encode(self.tokenizer, self.codebook, pixels, self.args.tokenizer_amp)
            side = int(round(codes.shape[1] ** 0.5))
            chosen = np.array(batch)[good]
            self.indices += chosen.tolist()
            yield codes.view(-1, side, side), torch.from_numpy(self.source.labels[chosen]).to(self.device)


def load_model(args, codebook, device):
    """The ViT with the checkpoint's weights, in eval mode on `device`."""
    checkpoint = load_checkpoint(args.model_path)
    state = checkpoint['model']
    if args.use_ema:
        state = checkpoint.get('model_ema')
        if not isinstance(state, dict):
            raise InputError(f'{args.model_path}: holds no EMA weights; leave --use-ema out')
    classes = args.nb_classes or len(state.get('head.bias', ()))
    model = create_model(args, classes, args.vit_input_size, codebook.shape[1])
    load_weights(model, state, args.model_path)
    return model.to(device)


def gather(values, split):
    """All ranks' lists in one, on rank 0 (elsewhere None); without `split` this rank's own."""
    if not split or world_size() == 1:
        return values
    gathered = [None] * world_size() if is_main() else None
    dist.gather_object(values, gathered)
    return [value for part in gathered for value in part] if is_main() else None


def write_predictions(path, source, rows):
    """CSV lines in the order of the source. `rows`: (index, top-5 classes, probability of the first)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['image', 'label', 'prediction', 'probability', 'top5'])
    for index, top, probability in sorted(rows):
        writer.writerow([source.names[index], source.labels[index], top[0], f'{probability:.6f}',
                         ' '.join(map(str, top))])
    write_text(path, text.getvalue())


def main(args):
    device = init_distributed(args.device, args.dist_url)
    say_no_effect(args, NO_EFFECT)
    amp = args.amp or default_amp(device.type)

    codebook = load_codebook(args.codebook_path)
    model = load_model(args, codebook, device)
    tokenizer = load_tokenizer(args.tokenizer_path, args.tokenizer_code_path)
    if tokenizer.embed_dim != codebook.shape[1]:
        raise InputError(f'{args.codebook_path}: rows of {codebook.shape[1]} elements, but the tokenizer gives '
                         f'{tokenizer.embed_dim}: they belong to different tokenizers')
    source = open_source(args.data_path)
    classes = max(len(source.classes or ()), int(source.labels.max()) + 1)
    if classes > model.num_classes:
        raise InputError(f'{args.data_path}: {classes} classes, but the model has {model.num_classes}')
    if classes < model.num_classes:
        say(f'note: {args.data_path} has {classes} classes and the model {model.num_classes}; labels are from '
            f'{source.labels_from}')
    say(f'{len(source):,} images in {classes} classes; {world_size()} x {device}, amp {amp}')

    if args.compile:
        model, tokenizer = torch.compile(model), torch.compile(tokenizer)
    batches = ImageCodes(source, tokenizer, codebook, device, args)
    rows = []

    def record(logits):
        probability, top = logits.softmax(1).topk(min(5, logits.shape[1]))
        rows.extend(zip(top.tolist(), probability[:, 0].tolist()))

    evaluate(model, batches, EvalTransform(codebook, args.vit_input_size, device), device, amp, args.dist_eval,
             'EMA' if args.use_ema else '', record if args.save_predictions else None)
    bad = gather([batches.bad], args.dist_eval)
    if is_main() and sum(bad):
        print(f'{sum(bad)} unreadable images were left out')
    if args.save_predictions:
        rows = gather([(index, *row) for index, row in zip(batches.indices, rows)], args.dist_eval)
        if is_main():
            write_predictions(args.save_predictions, source, rows)
            print(args.save_predictions)


if __name__ == '__main__':
    run(lambda: main(parse_args()))
