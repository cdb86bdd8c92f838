"""Parquet files, of images or of tokens: opening them, and reading columns within limits.

Needs pyarrow (requirements-formats.txt). A file is read by row groups, the smallest unit that parquet has. No threads
of pyarrow are used: loader processes are forks, in which its threads do not run.
"""
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fileio.labels import MAX_CLASS
from utils import InputError, first_line

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile


def open_parquet(path: Path) -> 'ParquetFile':
    """An open parquet file. Raises InputError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f'parquet files need pyarrow ({error}): pip install -r requirements-formats.txt') from None
    try:
        return parquet.ParquetFile(path, pre_buffer=False)  # buffering ahead would start threads
    except (OSError, MemoryError, pyarrow.ArrowException) as error:
        why = getattr(error, 'strerror', None) or first_line(error)
        raise InputError(f'{path}: no readable parquet file ({why})') from None


def types_of(file: 'ParquetFile') -> 'dict[str, pyarrow.DataType]':
    """The columns of an open parquet file, and their types."""
    return {field.name: field.type for field in file.schema_arrow}


def check_labels_type(path: Path, kind: 'pyarrow.DataType', name: str = 'label') -> None:
    """InputError unless a column of classes, of a pyarrow type, holds integers."""
    import pyarrow
    if not pyarrow.types.is_integer(kind):
        raise InputError(f"{path}: column '{name}' is of type {str(kind)[:80]}, but classes are integers from 0: "
                         'number them')


def read_column(path: Path, file: 'ParquetFile', name: str, groups: Sequence[int] | None = None) -> list:
    """One column of an open parquet file, or of some of its row groups. Raises InputError."""
    import pyarrow
    groups = list(range(file.num_row_groups)) if groups is None else list(groups)
    try:
        return file.read_row_groups(groups, columns=[name], use_threads=False).column(name).to_pylist()
    except (OSError, MemoryError, pyarrow.ArrowException) as error:
        raise InputError(f'{path}: damaged parquet file ({first_line(error)}); fetch it again') from None


def read_labels_of(path: Path, file: 'ParquetFile', classes: list[str] | None, name: str = 'label') -> list[int]:
    """A column of classes. Raises InputError for an empty or negative one, or one beyond the names of the classes."""
    labels = read_column(path, file, name)
    if None in labels or min(labels, default=0) < 0:
        raise InputError(f"{path}: column '{name}' has empty or negative labels: a test set without labels?")
    largest = max(labels, default=0)
    if largest > MAX_CLASS or (classes and largest >= len(classes)):
        raise InputError(f"{path}: column '{name}' has class {largest}, which is not from 0 to "
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


# ---------------------------------------------------------------- lists of integers

def list_depth(kind: 'pyarrow.DataType') -> int:
    """How many lists are around the integers of a pyarrow type; -1 where there are no integers in it."""
    from pyarrow import types
    depth = 0
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
        depth += 1
    return depth if types.is_integer(kind) else -1


def read_lists(path: Path, file: 'ParquetFile', name: str, rows: int) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Yield a column of lists of integers, or of lists of lists, about `rows` rows at a time.

    Yields:
        The integers of all its rows in one array, and for each level of lists how long they are.

    Raises:
        InputError: for a damaged file, and for an empty cell.
    """
    import pyarrow
    try:
        for batch in file.iter_batches(rows, columns=[name], use_threads=False):
            values = batch.column(0)
            lengths = []
            while pyarrow.types.is_nested(values.type):
                if values.null_count:
                    break
                if pyarrow.types.is_fixed_size_list(values.type):
                    lengths.append(np.full(len(values), values.type.list_size, np.int64))
                else:
                    lengths.append(np.diff(values.offsets.to_numpy()).astype(np.int64))
                values = values.flatten()
            if values.null_count:
                raise InputError(f"{path}: column '{name}' has empty cells; each image needs all its codes")
            yield values.to_numpy(zero_copy_only=False), lengths
    except (OSError, MemoryError, pyarrow.ArrowException) as error:
        raise InputError(f'{path}: damaged parquet file ({first_line(error)}); fetch it again') from None
