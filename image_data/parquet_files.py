"""Parquet files as image sets on Hugging Face have them: a column 'image' of struct{bytes, path}, a column 'label'.

Needs pyarrow (requirements-formats.txt). A file is read by row groups, the smallest unit that parquet has. So images
should be asked for in order, or a group would be read for each of them. No threads of pyarrow are used: loader
processes are forks, in which its threads do not run.
"""
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fileio.labels import MAX_CLASS
from utils import InputError, first_line

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


def open_parquet(path: Path, labeled: bool = True) -> 'ParquetFile':
    """An open parquet file that has a column of images, and one of labels if `labeled`. Raises InputError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f'parquet files need pyarrow ({error}): pip install -r requirements-formats.txt') from None
    try:
        file = parquet.ParquetFile(path, pre_buffer=False)  # buffering ahead would start threads
    except (OSError, pyarrow.ArrowException) as error:
        why = getattr(error, 'strerror', None) or first_line(error)
        raise InputError(f'{path}: no readable parquet file ({why})') from None
    types = {field.name: field.type for field in file.schema_arrow}
    columns = {'image': "'image' (struct of bytes and path)"} | ({'label': "'label' (integers)"} if labeled else {})
    for name in columns:
        if name not in types:
            raise InputError(f'{path}: expected columns {" and ".join(columns.values())}, '
                             f'found {", ".join(map(str, types)) or "none"}')
    if labeled and not pyarrow.types.is_integer(types['label']):
        raise InputError(f"{path}: column 'label' is of type {types['label']}, but classes are integers from 0: "
                         'number them')
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


def read_column(path: Path, file: 'ParquetFile', name: str, groups: Sequence[int] | None = None) -> list:
    """One column of an open parquet file, or of some of its row groups. Raises InputError."""
    import pyarrow
    groups = list(range(file.num_row_groups)) if groups is None else list(groups)
    try:
        return file.read_row_groups(groups, columns=[name], use_threads=False).column(name).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f'{path}: damaged parquet file ({first_line(error)}); fetch it again') from None


def read_labels_of(path: Path, file: 'ParquetFile', classes: list[str] | None) -> list[int]:
    """The column 'label'. Raises InputError for an empty or negative one, or one beyond the names of the classes."""
    labels = read_column(path, file, 'label')
    if None in labels or min(labels, default=0) < 0:
        raise InputError(f"{path}: column 'label' has empty or negative labels: a test set without labels?")
    largest = max(labels, default=0)
    if largest > MAX_CLASS or (classes and largest >= len(classes)):
        raise InputError(f"{path}: column 'label' has class {largest}, which is not from 0 to "
                         f'{len(classes) - 1 if classes else MAX_CLASS:,}')
    return labels


def class_names(file: 'ParquetFile') -> list[str] | None:
    """Class names that Hugging Face's datasets library leaves in a parquet file, or None."""
    try:
        info = json.loads(file.schema_arrow.metadata[b'huggingface'])
        names = info['info']['features']['label']['names']
    except (TypeError, KeyError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def image_bytes(cell: Any) -> bytes | None:
    """The encoded image in a cell of the column 'image', or None."""
    data = cell.get('bytes') if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else None
