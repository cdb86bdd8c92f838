"""Parquet files as image sets on Hugging Face have them: a column 'image' of struct{bytes, path}, a column 'label'.

fileio/parquet.py reads them. Images should be asked for in order, or a row group would be read for each of them.
"""
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fileio.parquet import check_labels_type, open_parquet, types_of
from utils import InputError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

SPLITS = {'train': 'train', 'training': 'train', 'test': 'test', 'testing': 'test', 'eval': 'test',
          'val': 'validation', 'valid': 'validation', 'validation': 'validation', 'dev': 'validation'}


def split_of(name: str) -> str | None:
    """The split in a parquet file's name, as in 'train-00000-of-00005.parquet'; None where the name has none."""
    numbered = re.match(r'(.+)-\d+-of-\d+', name.lower())
    parts = re.findall('[a-z]+', name.lower())
    splits = [SPLITS[word] for word in parts if word in SPLITS]
    if splits:
        return splits[0]
    return numbered.group(1) if numbered else None


def check_one_split(folder: Path, paths: Sequence[Path]) -> None:
    """InputError where the names of a folder's parquet files are of more than one split."""
    splits = {split_of(path.name): path for path in reversed(paths)}
    splits.pop(None, None)
    if len(splits) > 1:
        names = sorted(path.name for path in splits.values())
        raise InputError(f'{folder}: parquet files of several splits ({", ".join(names)}); give those of one, as a '
                         f"glob: '{folder}/*{next(iter(sorted(splits)))}*.parquet'")


def open_images(path: Path, labeled: bool = True) -> 'ParquetFile':
    """An open parquet file that has a column of images, and one of labels if `labeled`. Raises InputError."""
    file = open_parquet(path)
    types = types_of(file)
    columns = {'image': "'image' (struct of bytes and path)"} | ({'label': "'label' (integers)"} if labeled else {})
    for name in columns:
        if name not in types:
            raise InputError(f'{path}: expected columns {" and ".join(columns.values())}, '
                             f'found {", ".join(map(str, types)) or "none"}')
    if labeled:
        check_labels_type(path, types['label'])
    if not _holds_bytes(types['image']):
        raise InputError(f"{path}: column 'image' is of type {str(types['image'])[:80]}, but images come as a struct "
                         'of bytes and path, or as bytes')
    return file


def _holds_bytes(kind: Any) -> bool:
    """Whether a pyarrow type is bytes, or a struct with a field 'bytes' of them."""
    from pyarrow import types
    if types.is_struct(kind):
        index = kind.get_field_index('bytes')
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return str(kind) in ('binary', 'large_binary', 'binary_view')


def image_bytes(cell: Any) -> bytes | None:
    """The encoded image in a cell of the column 'image', or None."""
    data = cell.get('bytes') if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else None
