"""Codebooks that are no file of ours: by formula, and the tables within weights of other tokenizers.

    fsq:8,8,8,5,5,5   finite scalar quantization (arXiv 2309.15505): a row for each combination of levels
    lfq:10            lookup-free quantization (arXiv 2310.05737): the bits of the code as -1 and 1

Tokenizers were not made for embedding noise of deviation 1, nor always for codes that are told apart by direction, as
all codes are here. So `fit_rows` scales the rows of both kinds, and gives them a constant element where directions are
not enough. image_tokenizer/vqgan.py makes the codebook of a tokenizer by the same functions: its tokens are trained on,
and evaluated, with the weights file in place of a codebook.
"""
import difflib
import math
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F

from fileio.files import download, is_address
from fileio.torch_files import is_safetensors, load_torch
from utils import InputError, first_line

MAX_ROWS = 1 << 16  # token files hold codes of two bytes
CONSTANT = 2.  # the element that is the same in all rows, as in a patch tokenizer: others have deviation 1
KINDS = 'fsq:', 'lfq:'
# Of taming, latent diffusion, LlamaGen, Janus, IBQ, MaskGIT-VQGAN, diffusers; of taming's Gumbel tokenizers; and of
# ViT-VQGAN. Larger models hold their tokenizer under a further name, as in 'vqmodel.quantize.embedding.weight'.
TABLES = 'quantize.embedding.weight', 'quantize.embed.weight', 'quantizer.embedding.weight'
EMA = 'model_ema.'  # before the names, without their points, of averaged weights
UNIT_ROWS = 'encoder.conv_blocks.'  # names of LlamaGen and Janus, whose rows are of unit length wherever they are used
PARTS = 'state_dict', 'model'  # of a checkpoint, that hold the weights: Lightning's, and LlamaGen's
DIRECTION = 1e-6  # elements of unit rows that differ by less are equal


# ---------------------------------------------------------------- formulas

def is_formula(path: str | Path) -> bool:
    """Whether a --codebook-path is a formula, and no file."""
    return str(path).startswith(KINDS)


def rows_of_formula(formula: str) -> torch.Tensor:
    """The rows (K, d) float32 of 'fsq:L,L,...', 'lfq:BITS', 'lfq:BITS:lsb' or 'lfq:BITS:msb'. Raises InputError."""
    kind, _, text = formula.partition(':')
    return fsq_rows(formula, text) if kind == 'fsq' else lfq_rows(formula, text)


def fsq_rows(formula: str, text: str) -> torch.Tensor:
    """Rows of all combinations of levels, values from -1 to 1; the first digit of a code counts fastest."""
    words = text.split(',')
    if not all(word.isascii() and word.isdecimal() and len(word) < 8 and int(word) >= 2 for word in words):
        raise InputError(f'{formula}: give levels of 2 or more, as in fsq:8,8,8,5,5,5')
    levels = [int(word) for word in words]
    check_rows(formula, math.prod(levels))
    rest = torch.arange(math.prod(levels))
    columns = []
    for level in levels:
        columns.append((rest % level - level // 2) / (level // 2))
        rest = rest // level
    return torch.stack(columns, 1)


def lfq_rows(formula: str, text: str) -> torch.Tensor:
    """Rows of bits as -1 and 1, the highest bit first ('msb'), or the lowest ('lsb')."""
    word, _, order = text.partition(':')
    is_number = word.isascii() and word.isdecimal() and len(word) < 8 and int(word) >= 1
    if not is_number or order not in ('', 'msb', 'lsb'):
        raise InputError(f'{formula}: give the bits of a code, as in lfq:10, or lfq:10:lsb, the lowest bit first')
    bits = int(word)
    check_rows(formula, 1 << min(bits, 64))
    places = torch.arange(bits) if order == 'lsb' else torch.arange(bits).flip(0)
    return ((torch.arange(1 << bits)[:, None] >> places) % 2 * 2 - 1).float()


def check_rows(formula: str, rows: int) -> None:
    """InputError for more rows than codes in token files can name."""
    if rows > MAX_ROWS:
        raise InputError(f'{formula}: makes {rows:,} codes, but token files hold {MAX_ROWS:,} at most')


# ---------------------------------------------------------------- files

def read_file(path: str | Path) -> Any:
    """What a .safetensors or torch file holds; no code in it runs. Raises InputError."""
    if is_address(path):
        with tempfile.TemporaryDirectory() as folder:
            return read_file(download(str(path), folder))
    if not is_safetensors(path):
        return load_torch(path, 'a codebook')
    try:
        with safetensors.safe_open(path, 'pt') as file:  # of large weights the table alone is read
            names = list(file.keys())
            return {name: file.get_tensor(name) if is_table_name(name) or is_average_of_table(name) else None
                    for name in names}
    except OSError as error:
        raise InputError(f'{path}: cannot read a codebook ({error.strerror or error})') from None
    except safetensors.SafetensorError as error:
        raise InputError(f'{path}: damaged or no .safetensors file ({first_line(error)})') from None


def is_table_name(name: Any) -> bool:
    """Whether weights of this name are the table of a published tokenizer."""
    return isinstance(name, str) and any(name == table or name.endswith(f'.{table}') for table in TABLES)


def is_average_of_table(name: Any) -> bool:
    """Whether weights of this name are the average (EMA) of such a table."""
    return isinstance(name, str) and name.endswith(tuple(EMA + table.replace('.', '') for table in TABLES))


def find_table(value: Any, path: str | Path) -> torch.Tensor:
    """The table (K, d) float32 in what a weights file holds, as its encoder compares features with it.

    Averaged rows are preferred, and rows that are normalized in use are of unit length. Raises InputError where there
    is no table, or several.
    """
    for part in PARTS:
        if isinstance(value, dict) and isinstance(value.get(part), dict):
            value = value[part]
    names = list(value) if isinstance(value, dict) else []
    tables = [name for name in names if is_table_name(name)]
    if not tables:
        near = difflib.get_close_matches(TABLES[0], [name for name in names if isinstance(name, str)], 1, 0)
        nearest = f'; the nearest of its {len(names)} names is {near[0][:80]}' if near else ''
        raise InputError(f'{path}: expected a float tensor (codes, code_dim) as codebook, or weights with '
                         f'{" or ".join(TABLES)}{nearest}')
    if len(tables) > 1:
        raise InputError(f'{path}: holds {len(tables)} tables ({", ".join(name[:80] for name in tables[:3])}): save '
                         'the one of the tokens alone, as a tensor')
    end = next(table for table in TABLES if tables[0].endswith(table))
    prefix = tables[0].removesuffix(end)
    table = value.get(f'{prefix}{EMA}{end.replace(".", "")}', value[tables[0]])
    if not isinstance(table, torch.Tensor) or table.ndim != 2 or not table.is_floating_point():
        raise InputError(f'{path}: its {tables[0][:80]} is no float tensor (codes, code_dim)')
    return unit_rows(table) if any(str(name).startswith(prefix + UNIT_ROWS) for name in names) else table


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows (K, d) in float32 and of unit length, the same on any processor: float32's own norms are not."""
    return F.normalize(rows.detach().double(), dim=-1).float()


# ---------------------------------------------------------------- scale and directions

def deviation(rows: torch.Tensor) -> float:
    """Root mean square of what elements of rows (K, d) differ from the mean row, to seven digits.

    The order in which processors and threads add changes later ones, and with them the digest of the codebook.
    """
    rows = rows.double()
    return float(f'{(rows - rows.mean(0)).square().mean().sqrt().item():.7g}')


def fit_rows(rows: torch.Tensor, path: str | Path) -> torch.Tensor:
    """Rows (K, d) float32 as tokens are trained on; raises InputError where all are equal.

    They are scaled so that elements differ from the mean row by 1 (root mean square), the deviation of embedding noise.
    Where rows that differ have one direction, or a row is zero and has none, CONSTANT is one more element of each:
    (K, d + 1).
    """
    spread = deviation(rows)
    if not spread:
        raise InputError(f'{path}: all rows of its codebook are equal')
    rows = rows.double() / spread
    directions = (F.normalize(rows, dim=1) / DIRECTION).round() + 0.  # no -0.
    is_zero = not rows.any(1).all()
    if is_zero or len(directions.unique(dim=0)) < len(rows.unique(dim=0)):
        rows = F.pad(rows, (0, 1), value=CONSTANT)
    return rows.float()
