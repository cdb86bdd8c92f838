"""Tokenise images into the published three files and a JSON card.

    python scripts/tokenize_images.py --data-path IMAGES/train --name my-train --output-dir tokens \\
        --tokenizer-path tokens/tokenizer.pt --codebook-path tokens/codebook.ckpt --image-size 64
    torchrun --nproc_per_node=8 scripts/tokenize_images.py --data-path 'train-{000..146}.tar' ...

Writes NAME-token.data.bin.gz, NAME-token.index.npy.gz, NAME-label.txt and NAME-token.json; with --shard-size each shard
is such a set, of NAME-token-00000 and so on. For --data-path and where labels come from see image_sources.py: class
folders (label: the folder's number in alphabetical order), a list file of 'path label' lines, tar shards (.cls, or
.json's 'label', beside the image), parquet files (column 'label').

Killed at any moment, the same command goes on where it stopped: images are cut into parts of a fixed number of fixed
batches, each kept in DIR/.NAME.parts until the end. Batches never mix parts, so on one machine the files are the same,
byte for byte, for any number of processes and interruptions (on CPUs: for the same OMP_NUM_THREADS, which torchrun
sets to 1). An image that stopped the run may be mended or replaced under its name before the command is given again.

A large codebook is cut to the codes in use, and ImageNet's 8192 become 391, in two steps: the training split with
--limit-codes, which writes DIR/codebook.ckpt, then the other splits with --codebook-path DIR/codebook.ckpt. Codebooks
of more than 510 rows give 16-bit files, which the card says and training reads.
"""
import argparse
import datetime
import functools
import glob
import hashlib
import io
import json
import math
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from image_sources import DecodedImages, good_images, open_source  # noqa: E402
from image_tokenizer import encode, load_tokenizer  # noqa: E402
from token_dataset import card_path, format_for, index_path, load_codebook, write_tokens  # noqa: E402
from utils import (InputError, RankError, atomic_path, check_least, cores, download, init_distributed,  # noqa: E402
                   is_address, is_main, rank, read_json, run, say, sha256, world_size, write_text)

PART_BATCHES = 16  # lost at most when killed; few enough that all ranks have parts, many enough to write in the shade
MAX_CODES = 1 << 16


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('files')
    add = group.add_argument
    add('--data-path', required=True, metavar='PATH',
        help="class folders of images (labels: folders in alphabetical order); a .txt list of 'path label' lines; "
             ".tar shards, as a glob, x-{000..146}.tar or comma list (labels: members .cls, or .json's 'label'); "
             "or .parquet files, a folder of them or a glob (labels: column 'label')")
    add('--name', required=True, help='first part of the file names, as in imagenet1k-train')
    add('--output-dir', required=True, metavar='DIR')
    add('--tokenizer-path', required=True, metavar='FILE')
    add('--tokenizer-code-path', metavar='DIR', help="a pickled tokenizer's code, which is then run")
    add('--codebook-path', metavar='FILE', help="default: the tokenizer's own, also written to DIR/codebook.ckpt")
    add('--limit-codes', action='store_true',
        help='keep and renumber only the codes in use, and write that codebook to DIR/codebook.ckpt (training split)')
    add('--shard-size', type=int, default=0, metavar='N', help='images to a numbered shard; 0: one set of files')
    add('--skip-bad-images', action='store_true', help='leave out unreadable images, instead of stopping at one')

    group = parser.add_argument_group('computation')
    add = group.add_argument
    add('--image-size', type=int, default=256, help='images are resized to this, both sides')
    add('--batch-size', type=int, default=64, help='per process; another may change a few codes, by rounding')
    add('--amp', choices=('off', 'bf16'), default='off',
        help='off: fp32; bf16: faster, and how many codes agree with fp32 is reported')
    add('--compile', action='store_true', help='torch.compile the tokenizer; may change a few codes, by rounding')
    add('--num-workers', type=int, help='processes that decode images, per rank; default: the cores, shared by ranks')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser


# ---------------------------------------------------------------- what is asked for

def check_args(args):
    """InputError for values that cannot be."""
    check_least(args, image_size=1, batch_size=1, shard_size=0, num_workers=0)
    if not args.name or args.name != Path(args.name).name or args.name.startswith('.'):
        raise InputError(f'--name {args.name}: give a plain word, as in imagenet1k-train, and folders to --output-dir')


def load_models(args):
    """(tokenizer, codebook (K, d) float32), on the CPU, that fit each other and the image size. Raises InputError."""
    tokenizer = load_tokenizer(args.tokenizer_path, args.tokenizer_code_path)
    source = args.codebook_path or args.tokenizer_path
    codebook = load_codebook(source) if args.codebook_path else getattr(tokenizer, 'codebook', None)
    if codebook is None:
        raise InputError(f'{args.tokenizer_path}: has no codebook of its own: give one to --codebook-path')
    if codebook.shape[1] != tokenizer.embed_dim:
        raise InputError(f'{source}: rows of {codebook.shape[1]} elements, but the tokenizer gives '
                         f'{tokenizer.embed_dim}: give the codebook that belongs to it')
    if len(codebook) > MAX_CODES and not args.limit_codes:
        raise InputError(f'{source}: {len(codebook)} codes, but token files hold {MAX_CODES}: add --limit-codes, which '
                         'keeps those in use')
    patch = tokenizer.patch_size
    if args.image_size % patch:
        near = max(patch, args.image_size // patch * patch)
        raise InputError(f'--image-size {args.image_size}: patches of {patch} do not divide it; choose {near} or '
                         f'{near + patch}')
    return tokenizer, codebook


def identity(path):
    """Name and checksum of a file, or of what an address gives."""
    if is_address(path):
        with tempfile.TemporaryDirectory() as folder:
            return identity(download(path, folder))
    return {'file': Path(path).name, 'sha256': sha256(path)}


def torch_bytes(tensor):
    """What torch.save writes for a tensor; the same as utils.save_torch makes."""
    buffer = io.BytesIO()
    torch.save(tensor.clone(), buffer)
    return buffer.getvalue()


def describe(args, source, codebook, device):
    """All that the codes depend on, as the values of the card that tell one run from another."""
    if args.codebook_path:
        codebook_id = identity(args.codebook_path)
    else:
        codebook_id = {'file': 'codebook.ckpt', 'sha256': hashlib.sha256(torch_bytes(codebook)).hexdigest()}
    return {'source': source.digest(), 'tokenizer': identity(args.tokenizer_path), 'codebook': codebook_id,
            'image_size': args.image_size, 'batch_size': args.batch_size, 'part_batches': PART_BATCHES,
            'precision': ('fp32' if args.amp == 'off' else args.amp) + ' compiled' * args.compile,
            'device': device.type, 'limit_codes': args.limit_codes, 'shard_size': args.shard_size}


# ---------------------------------------------------------------- parts: what makes a run resumable

class Parts:
    """The folder of finished parts of a run, and the cut of its images into parts and batches.

    Args: folder: Path; images: how many; batch_size: images a batch.
    """

    def __init__(self, folder, images, batch_size):
        self.folder, self.images, self.batch_size = folder, images, batch_size
        self.size = PART_BATCHES * batch_size

    def __len__(self):
        return -(-self.images // self.size)

    def path(self, part):
        return self.folder / f'{part:06d}.npz'

    def batches(self, part):
        """The batches of a part, as ranges of images."""
        end = min((part + 1) * self.size, self.images)
        return [range(start, min(start + self.batch_size, end))
                for start in range(part * self.size, end, self.batch_size)]

    def write(self, part, **arrays):
        with atomic_path(self.path(part)) as temporary, open(temporary, 'wb') as file:
            np.savez(file, **arrays)

    def read(self, part, name):
        """One array of a finished part. Raises InputError."""
        path = self.path(part)
        try:
            with np.load(path) as arrays:
                return arrays[name]
        except FileNotFoundError:
            raise InputError(f'{path}: another rank made it, but it is not here: all nodes must share '
                             '--output-dir') from None
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            raise InputError(f'{path}: damaged; delete it and start the same command again') from None


def retired(folder):
    """The name a parts folder gets when its run is complete: renaming is one step, removing many."""
    return folder.with_name(folder.name + '-done')


def final_files(output, name):
    """The files of token sets called `name` in a folder, sorted."""
    name = glob.escape(name)
    patterns = '-token*.data.bin.gz', '-token*.index.npy.gz', '-token*.json', '-label*.txt'
    return sorted(path for pattern in patterns for path in output.glob(name + pattern))


def is_complete(output, files, run_id):
    """Whether `files` are all that the run `run_id` writes: its parts are gone, so it came to its end."""
    cards = [read_json(path) for path in files if path.suffix == '.json']
    return bool(cards) and all(isinstance(card, dict) and card.get('run') == run_id
                               and isinstance(card.get('files'), dict)
                               and all((output / name).exists() for name in card['files']) for card in cards)


def prepare(args, codebook, run_id):
    """Make or find the parts folder of this run. Returns it, or None when the run's files are all there already.

    Raises InputError when the output folder holds files of another run.
    """
    output = Path(args.output_dir)
    folder = output / f'.{args.name}.parts'
    shutil.rmtree(retired(folder), ignore_errors=True)
    for left in glob.escape(f'.{args.name}-'), '.codebook.ckpt.':  # by a run killed while it wrote its final files
        for path in output.glob(f'{left}*.tmp'):
            path.unlink()
    if (folder / 'run.json').exists():
        before = read_json(folder / 'run.json')
        if before != run_id:
            differs = [key for key in run_id if not isinstance(before, dict) or before.get(key) != run_id[key]]
            raise InputError(f'{folder}: holds an unfinished run that differs in {", ".join(differs)}: give the same '
                             'inputs and options to finish it, or delete that folder to start anew')
        return folder
    files = final_files(output, args.name)
    if is_complete(output, files, run_id):
        return None
    if files:
        raise InputError(f'{files[0]}: belongs to another run: choose another --name or --output-dir, or remove '
                         f'{args.name}-token* and {args.name}-label* there')
    path = output / 'codebook.ckpt'
    if path.exists() and (args.limit_codes or not args.codebook_path and path.read_bytes() != torch_bytes(codebook)):
        raise InputError(f'{path}: a codebook is there, which this run would overwrite: choose another --output-dir'
                         + (', or drop --limit-codes to quantise against it' if args.limit_codes else ''))
    write_text(folder / 'run.json', json.dumps(run_id, indent=1) + '\n')
    return folder


# ---------------------------------------------------------------- images to codes

class Encoder:
    """Pixels to codes on a device.

    Args: tokenizer, codebook (K, d): already on `device`; amp: 'off' or 'bf16'; path: of the tokenizer, for errors.
    """

    def __init__(self, tokenizer, codebook, device, amp, path):
        self.tokenizer, self.codebook, self.device, self.amp, self.path = tokenizer, codebook, device, amp, path

    def codes(self, pixels, amp):
        """(B, 3, S, S) uint8 on any device -> (B, n) int32 on the device; -1 where features are not finite."""
        features, codes = encode(self.tokenizer, self.codebook, pixels, amp)
        return torch.where(features.isfinite().all(-1), codes.int(), -1)

    @torch.inference_mode()
    def __call__(self, pixels):
        return self.codes(pixels, self.amp)

    @torch.inference_mode()
    def agreement(self, pixels):
        """Share of codes that are the same in the precision chosen and in fp32."""
        return float((self.codes(pixels, self.amp) == self.codes(pixels, 'off')).float().mean())


def make_loader(args, source, batches, device):
    """A DataLoader that decodes given batches, in order, in worker processes."""
    workers = cores() if args.num_workers is None else args.num_workers
    return DataLoader(DecodedImages(source, args.image_size), batch_sampler=batches, num_workers=workers,
                      pin_memory=device.type == 'cuda', prefetch_factor=4 if workers else None)


def tokenize(args, source, encoder, parts, mine, total):
    """Make the parts `mine` of this rank; `total` images are to do on all ranks."""
    batches = [parts.batches(part) for part in mine]
    loader = iter(make_loader(args, source, [list(batch) for part in batches for batch in part], encoder.device))
    share = sum(len(batch) for part in batches for batch in part) / total if total else 1
    # On a terminal a bar; in a log a line a minute. It counts this rank's images for all, which keep in step.
    with tqdm(total=total, unit=' images', unit_scale=True, disable=not (is_main() and total),
              mininterval=0.1 if sys.stderr.isatty() else 60) as bar:
        for part, ranges in zip(mine, batches):
            codes, sizes, good, extra = [], [], [], {}
            for batch in ranges:
                pixels, encoded, problems = next(loader)
                good.append(good_images(args, source, batch, problems))
                codes.append(encoder(pixels))  # stays on the device until the part ends, so nothing waits for it
                sizes.append(encoded.numpy())
                if part == 0 and batch.start == 0 and encoder.amp != 'off':
                    extra['agreement'] = encoder.agreement(pixels)
                bar.update(len(batch) / share)
            good = np.concatenate(good)
            codes = torch.cat(codes).cpu().numpy()[good]
            if (codes < 0).any():
                raise InputError(f'{encoder.path}: gives features that are not finite for images '
                                 f'{ranges[0].start} to {ranges[-1].stop - 1}: a damaged tokenizer, or try --amp off')
            used = np.zeros(len(encoder.codebook), bool)
            used[codes] = True
            parts.write(part, codes=codes.astype(np.uint16 if len(encoder.codebook) <= MAX_CODES else np.int32),
                        sizes=np.concatenate(sizes)[good], good=good, used=used.nonzero()[0], **extra)


# ---------------------------------------------------------------- parts to files

class Assembly:
    """All finished parts as one array of codes, which never is in memory whole.

    Attributes: good (N,) bool, images that were read; sizes (good images,) int64, of the encoded images in bytes;
    used (codes,) int64, the codes in use, rising.
    """

    def __init__(self, parts):
        def every(name):
            return [parts.read(part, name) for part in range(len(parts))]
        self.parts = parts
        good = every('good')
        self.good, self.sizes = np.concatenate(good), np.concatenate(every('sizes'))
        self.used = np.unique(np.concatenate(every('used')))
        self.starts = np.cumsum([0] + [int(mask.sum()) for mask in good])
        self.codes = functools.lru_cache(maxsize=1)(lambda part: parts.read(part, 'codes'))

    def runs(self, first, last):
        """Yield the codes of good images first to last - 1, (m, n) integers at a time."""
        for part in range(len(self.parts)):
            a, b = (np.clip(edge - self.starts[part], 0, self.starts[part + 1] - self.starts[part])
                    for edge in (first, last))
            if a < b:
                yield self.codes(part)[a:b]


def final_codebook(args, output, codebook, used):
    """(rows of the codebook the files refer to, its name and checksum, table from old codes to new or None).

    Writes DIR/codebook.ckpt where that is the codebook.
    """
    table = None
    if args.limit_codes:
        if len(used) > MAX_CODES:
            raise InputError(f'{args.data_path}: {len(used)} codes are in use, but token files hold {MAX_CODES}: '
                             'choose a smaller codebook')
        table = np.zeros(len(codebook), np.int64)
        table[used] = np.arange(len(used))
        codebook = codebook[torch.from_numpy(used)]
    elif args.codebook_path:
        return len(codebook), identity(args.codebook_path), None
    path = output / 'codebook.ckpt'
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(torch_bytes(codebook))
    return len(codebook), identity(path), table


def write_set(tokens, label_file, runs, labels, table, format):
    """Write one token set; returns the number of codes it uses."""
    used = np.zeros(MAX_CODES, bool)

    def final():
        for codes in runs:
            codes = codes if table is None else table[codes]
            used[codes] = True
            yield codes
    write_tokens(tokens, label_file, final(), labels, format)
    return int(used.sum())


def run_card(args, source, whole, codebook, kept, run_id):
    """What the cards of all shards say. `codebook`: (rows, identity); `kept`: the rows kept, or None for all."""
    rows, codebook_id = codebook
    card = {'format': format_for(rows), 'grid': math.isqrt(whole.codes(0).shape[1]), 'codes': rows,
            'image_size': args.image_size, 'classes': source.classes, 'labels_from': source.labels_from,
            'skipped_in_run': int((~whole.good).sum()), 'precision': run_id['precision'],
            'tokenizer': run_id['tokenizer'], 'codebook': codebook_id, 'run': run_id}
    if kept is not None:
        card['kept_codes'] = kept.tolist()
    if args.amp != 'off':
        card['agreement_with_fp32'] = float(whole.parts.read(0, 'agreement'))
    return card


def check_skipped(args, source, parts, good):
    """InputError when no image is left, or images were skipped that now are not to be."""
    bad = np.flatnonzero(~good)
    if len(bad) and not args.skip_bad_images:
        raise InputError(f'{parts.folder}: {len(bad)} images were skipped before (first: {source.names[bad[0]]}): add '
                         '--skip-bad-images again, or delete that folder to start anew')
    if len(bad) == len(source):
        raise InputError(f'{args.data_path}: none of the {len(bad)} images can be read')


def assemble(args, source, parts, codebook, run_id):
    """Write the final files and cards from the parts; returns the line that says what was made. Raises InputError."""
    output, whole = Path(args.output_dir), Assembly(parts)
    check_skipped(args, source, parts, whole.good)
    rows, codebook_id, table = final_codebook(args, output, codebook, whole.used)
    card = run_card(args, source, whole, (rows, codebook_id), None if table is None else whole.used, run_id)
    labels, stored = source.labels[whole.good], 0
    size = args.shard_size or len(labels)
    for first in range(0, len(labels), size):
        shard = slice(first, first + size)
        suffix = f'-{first // size:05d}' if args.shard_size else ''
        tokens, label_file = (output / f'{args.name}-{kind}' for kind in (f'token{suffix}.data.bin.gz',
                                                                          f'label{suffix}.txt'))
        used = write_set(tokens, label_file, whole.runs(first, first + size), labels[shard], table, card['format'])
        files = [tokens, index_path(tokens), label_file]
        own = {'images': len(labels[shard]), 'codes_used': used, 'source_bytes': int(whole.sizes[shard].sum()),
               'files': {path.name: {'bytes': path.stat().st_size, 'sha256': sha256(path)} for path in files}}
        write_text(card_path(tokens), card_text(card | own))
        stored += sum(path.stat().st_size for path in files[:2])
    skipped = f'{card["skipped_in_run"]} bad images skipped, ' if card['skipped_in_run'] else ''
    precise = f'{card["agreement_with_fp32"]:.4%} of codes agree with fp32, ' if args.amp != 'off' else ''
    return (f'{len(labels):,} images of {card["grid"]}x{card["grid"]} codes, {len(whole.used)} of {rows} codes in use, '
            f'{skipped}{precise}{stored:,} bytes ({stored / len(labels):.0f} an image, of '
            f'{whole.sizes.sum() / len(labels):.0f} before): {output / args.name}-token{"-*" * bool(args.shard_size)}'
            '.data.bin.gz')


def card_text(card):
    """JSON with a key a line."""
    order = ['format', 'images', 'grid', 'codes', 'codes_used']
    keys = order + [key for key in card if key not in order]
    return '{\n' + ',\n'.join(f' {json.dumps(key)}: {json.dumps(card[key])}' for key in keys) + '\n}\n'


# ---------------------------------------------------------------- the program

def plan(args, source, codebook, run_id):
    """(parts, those still to do), the same on every rank because rank 0 looks; (None, []) when all is done."""
    found = [None, None]
    if is_main():
        folder = prepare(args, codebook, run_id)
        if folder:
            parts = Parts(folder, len(source), args.batch_size)
            found = [folder, [part for part in range(len(parts)) if not parts.path(part).exists()]]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    folder, todo = found
    return (Parts(folder, len(source), args.batch_size), todo) if folder else (None, [])


def wait_for_all():
    """A barrier without time limit: slow nodes may lag by hours, which NCCL would take for a hang."""
    if dist.is_initialized():
        dist.barrier(group=dist.new_group(backend='gloo', timeout=datetime.timedelta(days=30)))


def main(args):
    check_args(args)
    device = init_distributed(args.device)
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions; fp32 is to mean fp32
    source = open_source(args.data_path)
    tokenizer, codebook = load_models(args)
    run_id = describe(args, source, codebook, device)
    parts, todo = plan(args, source, codebook, run_id)
    if parts is None:
        say(f'{args.output_dir}: {args.name} is complete already, nothing to do')
        return
    say(f'{len(source):,} images, labels from {source.labels_from}; '
        f'{len(parts) - len(todo)} of {len(parts)} parts done')
    tokenizer = torch.compile(tokenizer.to(device)) if args.compile else tokenizer.to(device)
    encoder = Encoder(tokenizer, codebook.to(device), device, args.amp, args.tokenizer_path)
    total = sum(len(batch) for part in todo for batch in parts.batches(part))
    try:
        tokenize(args, source, encoder, parts, todo[rank()::world_size()], total)
    except InputError as error:  # met by this rank, and perhaps by no other
        raise RankError(str(error)) from None
    wait_for_all()
    if is_main():
        say(assemble(args, source, parts, codebook, run_id))
        parts.folder.rename(retired(parts.folder))
        shutil.rmtree(retired(parts.folder), ignore_errors=True)


if __name__ == '__main__':
    run(lambda: main(get_args_parser().parse_args()))
