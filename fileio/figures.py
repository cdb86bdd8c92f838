"""Figures by matplotlib, an optional package (requirements-plot.txt)."""
import os
from pathlib import Path
from typing import Any

from fileio.files import atomic_path
from utils import InputError


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
    """Write a figure atomically as PNG, and close it. Raises InputError."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png', dpi=120)
    pyplot().close(figure)
