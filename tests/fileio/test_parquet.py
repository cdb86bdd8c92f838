"""Columns of parquet files, and what damage is told."""
import numpy as np
import pytest

from fileio.parquet import list_depth, open_parquet, read_column, read_labels_of, read_lists, types_of
from helpers import fails, refused

pyarrow = pytest.importorskip('pyarrow')
from pyarrow import parquet  # noqa: E402


def write(path, **columns):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path, open_parquet(path)


def test_columns(tmp_path):
    path, file = write(tmp_path / 'a.parquet', x=[1, 2, 3], y=['a', 'b', 'c'])
    assert list(types_of(file)) == ['x', 'y']
    assert read_column(path, file, 'y') == ['a', 'b', 'c'] and read_column(path, file, 'x', [1]) == [3]
    assert read_labels_of(path, file, None, 'x') == [1, 2, 3]
    fails(lambda: read_labels_of(path, file, ['cat', 'dog', 'cow'], 'x'), "column 'x' has class 3")


@pytest.mark.parametrize('kind, depth', [
    (pyarrow.int8(), 0), (pyarrow.list_(pyarrow.int64()), 1), (pyarrow.large_list(pyarrow.uint16()), 1),
    (pyarrow.list_(pyarrow.list_(pyarrow.int16(), 4)), 2), (pyarrow.list_(pyarrow.string()), -1),
    (pyarrow.float32(), -1), (pyarrow.list_(pyarrow.struct([('a', pyarrow.int8())])), -1)])
def test_depth_of_lists(kind, depth):
    assert list_depth(kind) == depth


def test_lists_come_in_runs(tmp_path):
    rows = [[[1, 2], [3]], [[4]], [[], [5, 6], [7]]]
    path, file = write(tmp_path / 'a.parquet', x=rows)
    values, outer, inner = [], [], []
    for part, lengths in read_lists(path, file, 'x', 2):
        values += part.tolist()
        outer += lengths[0].tolist()
        inner += lengths[1].tolist()
    assert (values, outer, inner) == ([1, 2, 3, 4, 5, 6, 7], [2, 1, 3], [2, 1, 1, 0, 2, 1])
    for bad in [[1], None], [[1], [None]]:
        path, file = write(tmp_path / 'b.parquet', x=bad)
        fails(lambda path=path, file=file: list(read_lists(path, file, 'x', 2)), "column 'x' has empty cells")


def test_damage(tmp_path):
    path, _ = write(tmp_path / 'a.parquet', x=[list(range(i, i + 400)) for i in range(50)])
    data = bytearray(path.read_bytes())
    refused(tmp_path / 'no.parquet', open_parquet, tmp_path / 'no.parquet', match='no readable parquet file')
    data[20:2000] = np.random.default_rng(0).bytes(1980)
    path.write_bytes(data)
    refused(path, lambda: list(read_lists(path, open_parquet(path), 'x', 2)), match='damaged parquet file')
