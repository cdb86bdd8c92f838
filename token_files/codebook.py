"""The codebook: reading it, finding codes of features, and the synonyms of codes that Token-EDA uses.

A codebook is a (K, d) tensor. Codes are its row numbers: `look_up` takes codes to embeddings, `quantize` takes features
to codes. Synonyms of a code are the rows of the most similar direction (SeiT, arXiv 2303.11114, sec. 3).
"""
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fileio.files import atomic_path, check_writable, read_json, write_text
from fileio.torch_files import digest_of
from token_files.codebook_sources import find_table, fit_rows, is_formula, read_file, rows_of_formula
from utils import InputError, on_main, print0

SYNONYMS = 5  # of a code: as many as training uses
SMALL_CODEBOOK = 4096  # rows up to which all are compared at once; larger codebooks go in blocks
ROWS_AT_ONCE = 1024  # of a large codebook, in a block of `quantize`
NUMBERS_AT_ONCE = 1 << 21  # cosines of a block of `nearest_codes`: 8 MB, which caches hold
COLUMNS_AT_ONCE = 256  # cosines of which `nearest_codes` takes the largest to see which rows can be near
EQUAL = 1e-12  # cosines of a large codebook that differ by less are equal: the order of a sum decides more


class Codebook(NamedTuple):
    """Rows (K, d) float32, and whether they are `as_stored` in a file that holds a codebook alone."""
    rows: torch.Tensor
    as_stored: bool


def load_codebook(path: str | Path) -> torch.Tensor:
    """The rows of `read_codebook`, (K, d) float32. Raises InputError."""
    return read_codebook(path).rows


def read_codebook(path: str | Path) -> Codebook:
    """The codebook of a path: a torch file with a tensor, weights of a tokenizer, or a formula. Raises InputError.

    A tensor is taken as it is. Rows of the other two are scaled, and get a constant element where they need it: see
    codebook_sources.py.
    """
    if is_formula(path):
        return Codebook(fit_rows(rows_of_formula(str(path)), path), False)
    value = read_file(path)
    as_stored = not isinstance(value, dict)
    codebook = value if as_stored else find_table(value, path)
    if not isinstance(codebook, torch.Tensor) or codebook.ndim != 2 or not codebook.is_floating_point():
        raise InputError(f'{path}: expected a float tensor (codes, code_dim) as codebook')
    if not codebook.numel() or not codebook.isfinite().all() or not codebook.any():
        raise InputError(f'{path}: its elements are not finite, all zero, or none; fetch or make it again')
    codebook = codebook.float().detach()
    return Codebook(codebook if as_stored else fit_rows(codebook, path), as_stored)


def quantize(features: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Codes of features: the nearest codebook row after L2-normalizing both (ViT-VQGAN's quantizer).

    Features (..., d) and codebook (K, d), float -> (...) int64 in [0, K). Ties go to the lowest code.
    """
    features = F.normalize(features, dim=-1)
    codebook = F.normalize(codebook, dim=-1)
    if len(codebook) <= SMALL_CODEBOOK:
        return (features @ codebook.T).argmax(-1)
    # With all rows at once, 100 thousand positions and 64,000 codes would take 26 GB. The rows are cut, and not the
    # positions, because their number is known when a model is exported.
    best, codes = (features @ codebook[:ROWS_AT_ONCE].T).max(-1)
    for start in range(ROWS_AT_ONCE, len(codebook), ROWS_AT_ONCE):
        cosine, code = (features @ codebook[start:start + ROWS_AT_ONCE].T).max(-1)
        codes = torch.where(cosine > best, code + start, codes)  # of equal ones the first stays
        best = torch.maximum(cosine, best)
    return codes


def look_up(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, d, h, w) of codes (B, h, w) int64: rows of a codebook (K, d)."""
    return codebook[codes].movedim(-1, 1)


@torch.no_grad()
def nearest_codes_of(embeddings: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Codes of changed embeddings, by `quantize` in float32, whatever autocast and --tf32 say.

    In half precision and in TF32 a cosine near 1 is known to 5e-4, so that rows of like direction are confused.

    Args:
        embeddings: (B, d, h, w) float.
        codebook: (K, d) float, on the same device.

    Returns:
        (B, h, w) int64. The embeddings of codes get these codes back, but for rows of the same direction.
    """
    with _full_precision(), torch.autocast(embeddings.device.type, enabled=False):
        return quantize(embeddings.float().movedim(1, -1), codebook.float())


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def nearest_codes(codebook: torch.Tensor, top_k: int) -> torch.Tensor:
    """(K, top_k) int64: for each row of the codebook the other rows by falling cosine; equal ones by rising code."""
    unit = F.normalize(codebook.double(), dim=-1)  # in float64, so that every machine ranks near ties alike
    if len(codebook) > SMALL_CODEBOOK:
        with _full_precision():
            return _nearest_in_blocks(unit, top_k)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return similarity.argsort(dim=1, descending=True, stable=True)[:, :top_k]


def _nearest_in_blocks(unit: torch.Tensor, top_k: int) -> torch.Tensor:
    """`nearest_codes` of many unit rows (K, d) float64."""
    count, dim = unit.shape
    # Sorting all cosines would take many minutes. The k-th largest of the largest ones of groups of columns is no
    # larger than the k-th largest cosine, and little smaller: few are as large, and only those are computed in float64.
    width = min(COLUMNS_AT_ONCE, count // top_k)
    groups = -(-count // width)
    columns = F.pad(unit.float().T, (0, groups * width - count)).contiguous()
    rounding = 2 * (dim + 2) * torch.finfo(torch.float32).eps
    rows_at_once = max(1, NUMBERS_AT_ONCE // count)
    # one tensor: small ones, kept from each block, would lie between large ones in malloc's heap, which then grows
    nearest = torch.empty(count, top_k, dtype=torch.int64)
    for block in torch.arange(count).split(rows_at_once):
        similarity = columns[:, block].T @ columns
        similarity[torch.arange(len(block)), block] = -torch.inf
        similarity[:, count:] = -torch.inf
        similarity = similarity.view(-1, width)
        largest = similarity.amax(1).view(-1, groups)
        least = largest.topk(top_k).values[:, -1:] - rounding
        row, group = (largest >= least).nonzero(as_tuple=True)
        near, column = (similarity[row * groups + group] >= least[row]).nonzero(as_tuple=True)
        row, code = row[near], group[near] * width + column  # by rising row, then by rising code
        cosine = ((unit[block[row]] * unit[code]).sum(1) / EQUAL).round()
        order = cosine.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        ends = torch.bincount(row, minlength=len(block)).cumsum(0)
        first = F.pad(ends[:-1], (1, 0))
        nearest[block] = code[order[first[:, None] + torch.arange(top_k)]]
    return nearest


def build_synonyms(codebook_path: str | Path, output: str | Path, top_k: int = SYNONYMS) -> None:
    """Write the `top_k` synonyms of each code of a codebook, as `load_synonyms` reads them. Raises InputError."""
    codebook = load_codebook(codebook_path)
    if top_k >= len(codebook):
        raise InputError(f'{top_k} synonyms of each code: choose 1 to {len(codebook) - 1}, the others in '
                         f'{codebook_path}')
    check_writable(output, inputs=[codebook_path])
    lists = nearest_codes(codebook, top_k).tolist()
    rows = ',\n'.join(f'"{code}": {json.dumps(row)}' for code, row in enumerate(lists))
    write_text(output, '{\n' + rows + '\n}\n')
    print0(f'{len(lists)} codes, {top_k} synonyms each: {output}')


def made_synonyms(codebook: torch.Tensor, path: str, top_k: int,
                  folder: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Synonyms made from a codebook (K, d) of `path`, as `load_synonyms` gives them; a line says so. Collective.

    Those of a large codebook take minutes, and are kept in a folder, None for none. Raises InputError.
    """
    count = min(top_k, len(codebook) - 1)
    if not count:
        raise InputError(f'{path}: a codebook of one row has no synonyms')
    rows = codebook.detach().cpu()
    table = on_main(_find_synonyms, rows, path, count, folder)  # the ranks of a node would take each other's cores
    return table, torch.full((len(rows),), count)


def _find_synonyms(rows: torch.Tensor, path: str, count: int, folder: str | None) -> torch.Tensor:
    """(K, count) int64, from a file in the folder, or computed, and then written there if that takes long."""
    large = len(rows) > SMALL_CODEBOOK and folder is not None
    cached = Path(folder or '', f'synonyms-{digest_of(rows)[:16]}-{count}.npy')
    if large and cached.exists():
        with contextlib.suppress(OSError, ValueError):  # a damaged one is made again
            table = np.load(cached, allow_pickle=False)
            if table.dtype == np.int64 and table.shape == (len(rows), count):
                print0(f'synonyms: {cached}, made from {path}')
                return torch.from_numpy(table)
    print0(f'synonyms: {count} for each code are made from {path}')
    table = nearest_codes(rows, count)
    if large:
        # where the folder cannot be written, the next start makes them again
        with contextlib.suppress(InputError), atomic_path(cached) as temporary, open(temporary, 'wb') as file:
            np.save(file, table.numpy())
    return table


def load_synonyms(path: str | Path, codes: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Synonyms as a table to index.

    Args:
        path: a synonyms.json, {"code": [other codes, best first], ...}.
        codes: rows of the codebook, K.
        top_k: how many of each list are used (5 in the paper).

    Returns:
        table (K, top_k) int64, short lists padded with the code itself, and count (K,) int64.

    Raises:
        InputError: when a code has no entry or a synonym lies beyond the codebook.
    """
    lists = read_json(path)
    if not isinstance(lists, dict):
        raise InputError(f'{path}: expected an object that maps each code to a list of codes')
    missing = [c for c in range(codes) if not lists.get(str(c))]
    if missing:
        raise InputError(f'{path}: no synonyms for {len(missing)} of {codes} codes (first: {missing[0]}); '
                         'make it from this codebook with scripts/build_synonyms.py')
    # Each row begins as the code itself, and stays so where its list is short: a draw beyond `count` would be harmless.
    table = torch.arange(codes)[:, None].repeat(1, top_k)
    count = torch.empty(codes, dtype=torch.int64)
    for code in range(codes):
        row = lists[str(code)]
        if not isinstance(row, list) or not all(type(c) is int and 0 <= c < codes for c in row):
            raise InputError(f'{path}: the synonyms of code {code} are not codes from 0 to {codes - 1}')
        count[code] = min(len(row), top_k)
        table[code, :len(row[:top_k])] = torch.tensor(row[:top_k])
    return table, count
