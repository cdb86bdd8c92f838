"""Figures by matplotlib, wherever a program runs."""
import pytest

from helpers import run_python

pytest.importorskip('matplotlib')
DRAWS = """
import os, sys
sys.path.insert(0, sys.argv[2])
from fileio.figures import pyplot, save_figure
plt = pyplot()
figure, axes = plt.subplots()
axes.plot([1, 2])
save_figure(figure, sys.argv[1])
print(os.environ.get('MPLBACKEND'), plt.get_backend().lower())
"""


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['module://matplotlib_inline.backend_inline', 'module://not.there', 'nonsense',
                                     'TkAgg', 'inline', ''])
def test_the_backend_of_a_notebook_or_a_desktop_is_not_asked_for(backend, tmp_path):
    """Its package need not be installed, or a display be there; programs started from here still get the variable."""
    (tmp_path / 'matplotlib_inline.py').write_text('raise ImportError("not installed")')
    done = run_python(DRAWS, tmp_path / 'x.png', tmp_path, env={'MPLBACKEND': backend})
    assert done.stdout.split() == [*backend.split(), 'agg'], done.stderr
    assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')
