"""The codebook: reading it, finding codes of features, and the synonyms of codes that Token-EDA uses.

A codebook is a (K, d) tensor. Codes are its row numbers: `look_up` takes codes to embeddings, `quantize` takes features
to codes. Synonyms of a code are the rows of the most similar direction (SeiT, arXiv 2303.11114, sec. 3).
"""
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from fileio.files import check_writable, read_json, write_text
from fileio.torch_files import load_torch
from utils import InputError, print0

SYNONYMS = 5  # of a code: as many as training uses


def load_codebook(path: str | Path) -> torch.Tensor:
    """The (K, d) float32 codebook in a torch file. Raises InputError."""
    codebook = load_torch(path, 'a codebook')
    if not isinstance(codebook, torch.Tensor) or codebook.ndim != 2 or not codebook.is_floating_point():
        raise InputError(f'{path}: expected a float tensor (codes, code_dim) as codebook')
    if not codebook.numel() or not codebook.isfinite().all() or not codebook.any():
        raise InputError(f'{path}: its elements are not finite, all zero, or none; fetch or make it again')
    return codebook.float().detach()


def quantize(features: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Codes of features: the nearest codebook row after L2-normalizing both (ViT-VQGAN's quantizer).

    Features (..., d) and codebook (K, d), float -> (...) int64 in [0, K). Ties go to the lowest code.
    """
    return (F.normalize(features, dim=-1) @ F.normalize(codebook, dim=-1).T).argmax(-1)


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
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.autocast(embeddings.device.type, enabled=False):
            return quantize(embeddings.float().movedim(1, -1), codebook.float())
    finally:
        torch.set_float32_matmul_precision(precision)


def nearest_codes(codebook: torch.Tensor, top_k: int) -> torch.Tensor:
    """(K, top_k) int64: for each row of the codebook the other rows by falling cosine; equal ones by rising code."""
    unit = F.normalize(codebook.double(), dim=-1)  # in float64, so that every machine ranks near ties alike
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return similarity.argsort(dim=1, descending=True, stable=True)[:, :top_k]


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
