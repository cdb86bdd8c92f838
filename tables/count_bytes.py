"""Count the bytes of an image set or a token set, as files and without headers, to a JSON file.

    python tables/count_bytes.py --data-path IMAGES/train --output bytes.json
    python tables/count_bytes.py --token-file tokens/x-token.data.bin.gz --codebook-path tokens/codebook.ckpt \\
        --output bytes.json

Without headers means, of images, the coded data alone (null where one is no JPEG, WebP or AVIF); of published tokens,
the fewest bytes that a coder can reach that sees each code on its own, their entropy, or the .gz where that is less; of
compact ones the coded words and the model. The codebook is counted with the tokens, in both. Labels are not counted.
"""
import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import check_writable, write_text
from flags import Parser
from image_data.decoding import BadImage, bare_bytes
from image_data.sources import open_source
from token_files import compact
from token_files.cache import open_codes
from token_files.codebook import load_codebook
from token_files.token_file import bytes_on_disk, bytes_per_image, count_uses, open_token_files
from utils import InputError, print0, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--data-path', metavar='PATH', help='images: see image_data/sources.py')
    add('--token-file', metavar='FILE', help='NAME.data.bin.gz, or a glob of shards')
    add('--codebook-path', metavar='FILE', help='of the tokens')
    add('--output', required=True, metavar='FILE.json')
    args = parser.parse_args(argv)
    if bool(args.data_path) == bool(args.token_file) or bool(args.token_file) != bool(args.codebook_path):
        raise InputError('give --data-path, or --token-file and --codebook-path')
    return args


def image_bytes(data_path: str) -> dict[str, int | None]:
    """Images of a source, and their bytes in all. Raises InputError for one that cannot be read."""
    source = open_source(data_path)
    files = 0
    scans = []
    for index, name in enumerate(source.names):
        try:
            data = source.read(index)
        except (OSError, BadImage) as error:
            raise InputError(f'{data_path}: {name} cannot be read ({error}); replace or remove it') from None
        files += len(data)
        scans.append(bare_bytes(data))
        if scans[-1] is None and scans.count(None) == 1:
            print0(f'note: {data_path}: {name} is no whole JPEG, WebP or AVIF, so bytes without headers are not known')
    return {'images': len(source), 'files': files, 'without_headers': None if None in scans else sum(scans)}


def token_bytes(token_file: str, codebook_path: str) -> dict[str, int]:
    """Images of a token set, and their bytes in all, with the codebook's rows. Raises InputError."""
    files = open_token_files(token_file)
    codes = open_codes(files, cache='none')
    codebook = load_codebook(codebook_path)
    counts = count_uses(codes, len(codebook), token_file)
    on_disk = bytes_on_disk(files)
    # a .gz can be smaller: it sees which codes follow which
    bare = min(on_disk, round(bytes_per_image(files, codes.shape, counts)['entropy'] * len(codes)))
    if isinstance(files[0].content, compact.Stream):  # its words, and the model that they cannot be read without
        bare = sum(4 * int(file.content.lengths.sum()) for file in files) + files[0].content.model_path.stat().st_size
    rows = codebook.numel() * codebook.element_size()
    return {'images': len(codes), 'files': on_disk + rows, 'without_headers': bare + rows}


def main(args: argparse.Namespace) -> None:
    check_writable(args.output)
    if args.data_path:
        size = image_bytes(args.data_path)
    else:
        size = token_bytes(args.token_file, args.codebook_path)
    write_text(args.output, json.dumps(size) + '\n')
    print0(json.dumps(size))


if __name__ == '__main__':
    run(main, parse_args)
