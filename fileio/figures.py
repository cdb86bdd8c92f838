"""Pictures by the ending of their names, sheets of images, and figures by matplotlib.

matplotlib is an optional package (requirements-plot.txt): `draw_sheet` does without it, `pyplot` is where it is asked
for. Where many points stand close together, `label_points` finds a free spot for the text of each.
"""
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from fileio.files import atomic_path
from utils import InputError

# as PIL and matplotlib call them
FORMATS = {'': 'png', '.png': 'png', '.jpg': 'jpeg', '.jpeg': 'jpeg', '.webp': 'webp'}
DRAWINGS = {'.pdf': 'pdf', '.svg': 'svg'}  # of matplotlib alone

# of sheets, in pixels
SMALLEST = 96  # sides of images below this are enlarged by a whole factor, as one cannot see 28 pixels
GAP = 3  # between the parts of an item, and between items below one another
COLUMN_GAP = 18  # between items beside one another
TEXT_SIZE = 13
LINE = 16  # height of a line of text
WIDEST_NAME = 150  # of a text at the left; longer ones are broken into lines
CAPTION_WIDTH = 168  # that a text under an image has at least


def picture_format(path: str | Path, more: dict[str, str] | None = None) -> str:
    """The format that the name of a picture asks for, of FORMATS and `more`. Raises InputError for another ending."""
    formats = FORMATS | (more or {})
    ending = Path(path).suffix.lower()
    if ending not in formats:
        raise InputError(f'{path}: pictures are written as {", ".join(filter(None, formats))}: choose such a name')
    return formats[ending]


def printable(text: str) -> str:
    """A text with ? for what no font has: names of folders may be any bytes, and hold ends of lines."""
    return ''.join(letter if letter.isprintable() else '?' for letter in text)


# ---------------------------------------------------------------- sheets of images

def draw_sheet(images: torch.Tensor, columns: int = 1, titles: Sequence[str] = (), names: Sequence[str] = (),
               captions: Sequence[str] = ()) -> Image.Image:
    """Images side by side, with texts: an item is a strip of one or more images, such as a source and its tokens.

    Args:
        images: (items, parts, 3, H, W) float in [0, 1].
        columns: items beside one another.
        titles: of the parts, over each column of them; none for no line of titles.
        names: of the items, at the left of each; none, or as many as there are items, '' where an item has none.
        captions: under the items, each line of a text cut to the width.
    """
    items, parts, _, height, width = images.shape
    factor = max(1, math.ceil(SMALLEST / min(height, width)))
    pixels = images.repeat_interleave(factor, 3).repeat_interleave(factor, 4).clamp(0, 1)
    pixels = (255 * pixels).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
    height, width = height * factor, width * factor
    font = _font()
    columns = min(columns, items)

    title_lines = [_broken(title, width, font, 2) for title in titles]
    top = GAP + LINE * max(map(len, title_lines), default=0)
    name_lines = [_broken(name, WIDEST_NAME, font, max(1, height // LINE)) for name in names]
    left = max((math.ceil(font.getlength(line)) for lines in name_lines for line in lines), default=0)
    left += 2 * GAP if left else 0
    strip = parts * (width + GAP) - GAP
    cell = max(strip, CAPTION_WIDTH) if captions else strip
    under = LINE * max((caption.count('\n') + 1 for caption in captions), default=0)
    row = height + under + (2 * GAP if under else GAP)
    sheet = Image.new('RGB', (GAP + columns * (left + cell + COLUMN_GAP) - COLUMN_GAP + GAP,
                              top + math.ceil(items / columns) * row + GAP), 'white')
    draw = ImageDraw.Draw(sheet)
    for number in range(items):
        x = GAP + number % columns * (left + cell + COLUMN_GAP)
        y = top + number // columns * row
        first = x + left + (cell - strip) // 2
        for part in range(parts):
            sheet.paste(Image.fromarray(pixels[number, part]), (first + part * (width + GAP), y))
        if names:
            _write(draw, x, y + (height - LINE * len(name_lines[number])) // 2, name_lines[number], font)
        if captions:
            lines = [_cut(line, cell, font) for line in captions[number].split('\n')]
            _write(draw, x + left + cell // 2, y + height, lines, font, middle=True)
        if number < columns:
            for part, lines in enumerate(title_lines):
                _write(draw, first + part * (width + GAP) + width // 2, top - LINE * len(lines) - 1, lines, font, True)
    return sheet


def square_columns(items: int, parts: int) -> int:
    """Columns in which items of so many square images make a sheet that is about as wide as high."""
    return max(1, round((items / parts) ** 0.5))


def _font() -> Any:
    """DejaVu Sans where matplotlib brings it, else PIL's own font, which has the letters of English alone."""
    spec = importlib.util.find_spec('matplotlib')
    path = Path(spec.origin).parent / 'mpl-data' / 'fonts' / 'ttf' / 'DejaVuSans.ttf' if spec and spec.origin else None
    if path and path.is_file():
        return ImageFont.truetype(str(path), TEXT_SIZE - 1)
    return ImageFont.load_default(TEXT_SIZE)


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, lines: list[str], font: Any, middle: bool = False) -> None:
    for number, line in enumerate(lines):
        draw.text((x - (font.getlength(line) / 2 if middle else 0), y + number * LINE), line, 'black', font)


def _cut(text: str, width: int, font: Any) -> str:
    """A text, with dots in place of the end that is wider than so many pixels."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f'{text}...') > width:
        text = text[:-1]
    return f'{text}...'


def _broken(text: str, width: int, font: Any, most: int) -> list[str]:
    """The lines of a text, broken behind spaces, hyphens and underscores; the last is cut where they are too many."""
    lines = ['']
    for word in re.findall(r'[^ _-]*[ _-]?', printable(text)):
        if lines[-1] and font.getlength((lines[-1] + word).rstrip()) > width and len(lines) < most:
            lines.append('')
        lines[-1] += word
    return [_cut(line.rstrip(' '), width, font) for line in lines]


def save_sheet(sheet: Image.Image, path: str | Path) -> None:
    """Write a sheet whole or not at all, in the format that its name asks for. Raises InputError."""
    picture = picture_format(path)
    with atomic_path(path) as temporary:
        sheet.save(temporary, picture, quality=95)


# ---------------------------------------------------------------- figures by matplotlib

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


def label_points(panel: Any, points: Sequence[tuple[float, float]], texts: Sequence[str], colors: Sequence[Any],
                 size: float = 8) -> None:
    """Write a text beside each point of a panel, where it covers no other text, no marker and as few lines as can be.

    Called last, when all is drawn and the limits of the axes are final, as it measures in pixels. A text that had to
    go far gets a thin line to its point.

    Args:
        panel: matplotlib's Axes.
        points: in the units of the axes.
        texts, colors: of each point.
        size: of the letters.
    """
    figure = panel.figure
    figure.draw_without_rendering()  # only now do the panels have their places
    renderer = figure.canvas.get_renderer()
    dot = figure.dpi / 72
    frame = panel.get_window_extent(renderer)
    spots = panel.transData.transform(points)
    markers = [(x - 3.5 * dot, y - 3.5 * dot, x + 3.5 * dot, y + 3.5 * dot) for x, y in spots]
    lines = _samples_of_lines(panel)
    taken = []
    for point, (x, y), text, color in zip(points, spots, texts, colors):
        note = panel.annotate(text, point, xytext=(0, 0), textcoords='offset points', fontsize=size, color=color,
                              ha='center', va='center', bbox={'facecolor': 'white', 'alpha': 0.6, 'linewidth': 0,
                                                              'pad': 0.5}, zorder=10)
        extent = note.get_window_extent(renderer)
        half = extent.width / 2 + dot, extent.height / 2
        best = None
        for far in (1, 2, 3.2, 4.6):
            for across, up in ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)):
                center = x + across * (half[0] + 3 * far * dot), y + up * (half[1] + 3.5 * far * dot)
                box = center[0] - half[0], center[1] - half[1], center[0] + half[0], center[1] + half[1]
                outside = max(0, frame.x0 - box[0]) + max(0, frame.y0 - box[1]) + max(0, box[2] - frame.x1) + max(
                    0, box[3] - frame.y1)
                cost = (100 * outside + 10 * sum(_overlap(box, other) for other in taken)
                        + 3 * sum(_overlap(box, marker) for marker in markers) + 30 * far
                        + 4 * sum(box[0] < a < box[2] and box[1] < b < box[3] for a, b in lines))
                if best is None or cost < best[0]:
                    best = cost, far, center, box
        _, far, center, box = best
        taken.append(box)
        note.set_position(((center[0] - x) / dot, (center[1] - y) / dot))
        if far > 2:
            panel.annotate('', point, xytext=note.get_position(), textcoords='offset points', zorder=9,
                           arrowprops={'arrowstyle': '-', 'color': color, 'linewidth': 0.6, 'alpha': 0.7})


def _samples_of_lines(panel: Any) -> list[tuple[float, float]]:
    """Points in pixels, three apart, on the lines that a panel has: curves and error bars."""
    points = []
    for line in panel.lines:
        if line.get_linestyle() not in ('None', 'none', ' ', ''):
            points.append(line.get_transform().transform(line.get_xydata()))
    for collection in panel.collections:
        points += [panel.transData.transform(segment) for segment in collection.get_segments()]
    samples = []
    for path in points:
        for (x, y), (to_x, to_y) in zip(path[:-1], path[1:]):
            steps = max(1, int(math.hypot(to_x - x, to_y - y) / 3))
            samples += [(x + (to_x - x) * step / steps, y + (to_y - y) * step / steps) for step in range(steps + 1)]
    return samples


def _overlap(box: Sequence[float], other: Sequence[float]) -> float:
    """Pixels that two boxes (x0, y0, x1, y1) have in common."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(0, width) * max(0, height)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure atomically in the format of its name, and close it. Raises InputError."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=picture_format(path, DRAWINGS), dpi=120)
    pyplot().close(figure)
