"""Pictures by the ending of their names, and figures by matplotlib, an optional package (requirements-plot.txt)."""
import os
from pathlib import Path
from typing import Any

from fileio.files import atomic_path
from utils import InputError

# as PIL and matplotlib call them
FORMATS = {'': 'png', '.png': 'png', '.jpg': 'jpeg', '.jpeg': 'jpeg', '.webp': 'webp'}
DRAWINGS = {'.pdf': 'pdf', '.svg': 'svg'}  # of matplotlib alone


def picture_format(path: str | Path, more: dict[str, str] | None = None) -> str:
    """The format that the name of a picture asks for, of FORMATS and `more`. Raises InputError for another ending."""
    formats = FORMATS | (more or {})
    ending = Path(path).suffix.lower()
    if ending not in formats:
        raise InputError(f'{path}: pictures are written as {", ".join(filter(None, formats))}: choose such a name')
    return formats[ending]


def pyplot() -> Any:
    """matplotlib's pyplot, which opens no windows. Raises InputError where it is not installed."""
    # Importing reads the variable. A notebook sets it for its cells, to a backend that need not be installed here.
    backend = os.environ.pop('MPLBACKEND', None)
    try:
        import matplotlib
    except ImportError:
        raise InputError('plots need matplotlib: pip install -r requirements-plot.txt') from None
    finally:
        if backend is not None:
            os.environ['MPLBACKEND'] = backend
    matplotlib.use('Agg')  # compute nodes have no display
    import matplotlib.pyplot as plt
    return plt


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure atomically in the format of its name, and close it. Raises InputError."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=picture_format(path, DRAWINGS), dpi=120)
    pyplot().close(figure)
