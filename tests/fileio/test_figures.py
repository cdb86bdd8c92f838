"""Sheets of images with texts, and figures by matplotlib, wherever a program runs."""
import itertools

import numpy as np
import pytest
import torch

from fileio import figures
from helpers import run_python

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


# ---------------------------------------------------------------- sheets

def test_a_sheet_has_its_images_enlarged_and_its_texts_beside_them():
    images = torch.rand(5, 2, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    plain = np.asarray(figures.draw_sheet(images, 2))
    assert plain.shape == (3 + 3 * (144 + 3) + 3, 6 + 2 * (243 + 18) - 18, 3)  # three times as large
    for item, part in itertools.product(range(5), range(2)):
        y, x = 3 + item // 2 * 147, 3 + item % 2 * 261 + part * 123
        shown = plain[y:y + 144:3, x:x + 120:3]
        assert np.abs(shown - (255 * images[item, part]).permute(1, 2, 0).numpy()).max() <= 0.5
    assert (plain[150:, 265:] == 255).sum() > plain[297:, 265:].size * 0.95  # a sixth item there is not
    titled = np.asarray(figures.draw_sheet(images, 2, ['a', 'b'], ['ant'] * 5, ['is a bee\n12 %'] * 5))
    assert (titled[:, :, 0] == 0).any() and titled.shape[0] == 19 + 3 * (144 + 32 + 6) + 3
    assert np.array_equal(titled[19:163, -123:-3], plain[3:147, -123:-3])  # images are as they were


def test_texts_are_broken_and_cut_to_their_width():
    font = figures._font()
    for text in ('American_alligator of a long name', 'x' * 300, '', 'a\nb\udce9', 'ein Bär'):
        for most in (1, 2, 4):
            lines = figures._broken(text, 80, font, most)
            assert 1 <= len(lines) <= most and all(font.getlength(line) <= 80 for line in lines)
    assert figures._broken('American_alligator', 80, font, 2) == ['American_', 'alligator']
    assert figures._broken('ant', 80, font, 2) == ['ant'] and figures._cut('x' * 300, 80, font).endswith('x...')


def test_sheets_need_no_matplotlib(monkeypatch):
    monkeypatch.setattr(figures.importlib.util, 'find_spec', lambda name: None)
    assert figures.draw_sheet(torch.zeros(1, 1, 3, 8, 8), 1, ['title']).size == (102, 121)


@pytest.mark.parametrize('items, parts, columns', [(16, 1, 4), (16, 2, 3), (16, 5, 2), (1, 5, 1), (6, 3, 1)])
def test_sheets_are_about_square(items, parts, columns):
    assert figures.square_columns(items, parts) == columns


# ---------------------------------------------------------------- matplotlib

def test_labels_of_points_that_lie_close_cover_neither_one_another_nor_points():
    pytest.importorskip('matplotlib')
    plt = figures.pyplot()
    figure, panel = plt.subplots()
    points = [(0, 0), (0, 0), (0.01, 0), (0, 0.01), (0.5, 0.5), (1, 1), (1, 0.995)]
    panel.plot(*zip(*points), 'o')
    figures.label_points(panel, points, [f'{number:,}' for number in range(9000, 9007)], ['k'] * 7)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in panel.texts if text.get_text()]
    assert len(boxes) == 7
    assert not any(box.overlaps(other) for box, other in itertools.combinations(boxes, 2))
    assert not any(box.contains(*panel.transData.transform(point)) for box in boxes for point in points)
    assert all(panel.get_window_extent(renderer).contains(*corner) for box in boxes for corner in box.corners())
    plt.close(figure)


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['module://matplotlib_inline.backend_inline', 'module://not.there', 'nonsense',
                                     'TkAgg', 'inline', ''])
def test_the_backend_of_a_notebook_or_a_desktop_is_not_asked_for(backend, tmp_path):
    """Its package need not be installed, or a display be there; programs started from here still get the variable."""
    pytest.importorskip('matplotlib')
    (tmp_path / 'matplotlib_inline.py').write_text('raise ImportError("not installed")')
    done = run_python(DRAWS, tmp_path / 'x.png', tmp_path, env={'MPLBACKEND': backend})
    assert done.stdout.split() == [*backend.split(), 'agg'], done.stderr
    assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')
