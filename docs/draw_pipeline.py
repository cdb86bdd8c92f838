"""Draw the README's figure: a picture, its codes, their embeddings, the Stem-adaptor and the ViT.

    python docs/draw_pipeline.py --output docs/pipeline.png

Codes, embeddings and the decoded picture are real: a patch tokenizer with 391 codes is fitted to the picture itself.
Stem-adaptor and ViT are drawn as boxes. Needs matplotlib (requirements-plot.txt).
"""
import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fileio.figures import picture_format, pyplot  # noqa: E402
from fileio.files import atomic_path  # noqa: E402
from flags import Parser  # noqa: E402
from image_data.sources import open_source  # noqa: E402
from image_tokenizer.patch_fit import FitOptions, fit  # noqa: E402
from token_files.codebook import quantize  # noqa: E402
from utils import print0, run  # noqa: E402

SIZE = 256  # pixels of the picture, each side
GRID = 32  # codes, each side
WIDTH = 1200  # pixels of the figure
HEIGHT = 500
PART = (11, 9, 3, 5)  # top, left, rows, columns of the codes shown as numbers: an eye
INK = '#1f2933'
GRAY = '#616e7c'
STORED = '#2f6f9f'  # what happens once, and what is stored
TRAINED = '#a8572a'  # what happens at each training step


class Picture(NamedTuple):
    """What is drawn of one picture.

    Attributes:
        pixels: (256, 256, 3) float in [0, 1].
        codes: (32, 32) int64.
        embeddings: (32, 32, d) float, the codebook's row of each code.
        decoded: (256, 256, 3) float in [0, 1], the picture decoded from its codes.
    """
    pixels: np.ndarray
    codes: np.ndarray
    embeddings: np.ndarray
    decoded: np.ndarray


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument('--image', default=str(ROOT / 'docs' / 'cat.jpg'), metavar='FILE',
                        help='the picture to tokenize')
    parser.add_argument('--output', default=str(ROOT / 'docs' / 'pipeline.png'), metavar='FILE.png',
                        help='the figure to write')
    return parser.parse_args(argv)


def tokenize_picture(path: str | Path) -> Picture:
    """Fit a patch tokenizer to a picture and tokenize the picture with it."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, 'images.txt')  # a set of one image: the fit takes any source
        images.write_text(f'{Path(path).resolve()}\t0\n', encoding='utf-8')
        tokenizer, _ = fit(open_source(images), FitOptions(SIZE))
    with Image.open(path) as image:
        pixels = np.asarray(image.convert('RGB').resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / np.float32(255)
    codes = quantize(tokenizer(torch.from_numpy(pixels).permute(2, 0, 1)[None]), tokenizer.codebook)
    embeddings = tokenizer.codebook[codes]  # (1, 1024, d)
    decoded = tokenizer.decode(embeddings)[0].clamp(0, 1).permute(1, 2, 0)
    return Picture(pixels, codes.view(GRID, GRID).numpy(), embeddings[0].view(GRID, GRID, -1).numpy(), decoded.numpy())


# ---------------------------------------------------------------- drawing; positions are pixels from the lower left

def draw_frame(axes: Any, left: float, bottom: float, width: float, height: float, **style: Any) -> None:
    """A rectangle, with rounded corners where `rounded` pixels are given."""
    from matplotlib.patches import FancyBboxPatch
    rounded = style.pop('rounded', 0)
    shape = f'round,pad=0,rounding_size={rounded}' if rounded else 'square,pad=0'
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=shape, **style))


def draw_image(axes: Any, image: np.ndarray, left: float, bottom: float, size: float, **style: Any) -> None:
    """A square image with a thin frame, `size` pixels wide."""
    order = style.pop('zorder', 2)
    axes.imshow(image, extent=(left, left + size, bottom, bottom + size), zorder=order, **style)
    draw_frame(axes, left, bottom, size, size, fill=False, edgecolor=INK, linewidth=0.8, zorder=order)


def draw_arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str = INK, **style: Any) -> None:
    """An arrow between two points."""
    axes.annotate('', end, start, arrowprops={'arrowstyle': '-|>,head_length=0.45,head_width=0.22', 'color': color,
                                              'linewidth': 1.6, 'shrinkA': 0, 'shrinkB': 0, **style})


def draw_text(axes: Any, x: float, y: float, text: str, size: float = 10.5, **style: Any) -> Any:
    """Text whose center is at (x, y) unless the style says otherwise; `size` in points. Returns matplotlib's text."""
    style = {'ha': 'center', 'va': 'center', 'color': INK, 'linespacing': 1.3} | style
    return axes.text(x, y, text, fontsize=size, **style)


def draw_heading(axes: Any, x: float, title: str, rest: str, color: str) -> None:
    """A bold title, and the rest of the sentence after it."""
    text = draw_text(axes, x, 470, title, 12.5, ha='left', color=color, weight='bold')
    axes.annotate(rest, (1, 0.5), (8, 0), xycoords=text, textcoords='offset points', fontsize=10.5, color=color,
                  va='center', ha='left')


def draw_storing(axes: Any, picture: Picture) -> None:
    """The left part: picture, tokenizer, code grid, some codes as numbers, and the decoded picture."""
    draw_frame(axes, 8, 8, 510, 484, rounded=14, facecolor='#eef4f9', edgecolor='none', zorder=0)
    draw_heading(axes, 24, 'once', 'images become codes, and only the codes are kept', STORED)

    draw_image(axes, picture.pixels, 24, 226, 200)
    draw_text(axes, 124, 434, 'image, 256×256 pixels', va='baseline')
    draw_arrow(axes, (230, 326), (300, 326))
    draw_text(axes, 264, 342, 'tokenizer')

    colors = brightness_order(picture)
    draw_image(axes, colors[picture.codes], 306, 226, 200, cmap='viridis', interpolation='nearest')
    draw_text(axes, 406, 434, '32×32 codes', va='baseline')

    top, left, rows, columns = PART
    cell = 200 / GRID
    x = 306 + left * cell
    y = 226 + (GRID - top - rows) * cell
    draw_frame(axes, x, y, columns * cell, rows * cell, fill=False, edgecolor='white', linewidth=2, zorder=3)
    axes.plot([x, 306], [y, 186], color=INK, linewidth=0.8, zorder=3)
    axes.plot([x + columns * cell, 506], [y, 186], color=INK, linewidth=0.8, zorder=3)
    part = picture.codes[top:top + rows, left:left + columns]
    axes.imshow(colors[part], extent=(306, 506, 78, 186), cmap='viridis', vmin=0, vmax=len(colors) - 1, alpha=0.4,
                aspect='auto', zorder=2)
    draw_frame(axes, 306, 78, 200, 108, fill=False, edgecolor=INK, linewidth=0.8, zorder=3)
    for (row, column), code in np.ndenumerate(part):
        draw_text(axes, 306 + 200 / columns * (column + 0.5), 186 - 108 / rows * (row + 0.5), str(code), zorder=4)
    draw_text(axes, 406, 56, '9 bits a code: 1.1 KB', 11.5, color=STORED, weight='bold')
    draw_text(axes, 406, 32, '(an ImageNet JPEG: 110 KB)', color=STORED)

    draw_image(axes, picture.decoded, 54, 46, 140)
    draw_text(axes, 124, 29, 'decoded again, only to look at', 9.5, color=GRAY)
    draw_arrow(axes, (300, 126), (202, 116), GRAY, linestyle=(0, (4, 3)))


def brightness_order(picture: Picture) -> np.ndarray:
    """(codes,) rank of each code among those in use, from dark to bright: a color for the code grid."""
    total = np.zeros(picture.codes.max() + 1)
    patches = picture.decoded.reshape(GRID, SIZE // GRID, GRID, SIZE // GRID, 3).mean((1, 3, 4))
    np.add.at(total, picture.codes, patches)
    return (total / np.maximum(np.bincount(picture.codes.ravel()), 1)).argsort().argsort()


def draw_training(axes: Any, picture: Picture) -> None:
    """The right part: codebook rows, augmentation, Stem-adaptor, ViT, class."""
    draw_frame(axes, 528, 8, 664, 484, rounded=14, facecolor='#fbf2ea', edgecolor='none', zorder=0)
    draw_heading(axes, 546, 'every training step', 'codes go into the ViT, no pixel is decoded', TRAINED)
    draw_arrow(axes, (512, 326), (610, 326))
    draw_text(axes, 572, 351, 'codebook\nlook-up')

    channels = 6
    for channel in reversed(range(channels)):
        plane = picture.embeddings[:, :, channel]
        draw_image(axes, plane / plane.std(), 618 + 10 * channel, 246 + 10 * channel, 116, cmap='PuOr', vmin=-2.5,
                   vmax=2.5, interpolation='nearest', zorder=4 + channels - channel)
    draw_text(axes, 701, 434, 'embeddings, 32×32×32', va='baseline')
    draw_arrow(axes, (790, 326), (816, 326))

    draw_box(axes, 822, 'Stem-\nadaptor', '4×4\nconvolution,\nstride 2')
    draw_arrow(axes, (922, 326), (938, 326))
    for row, column in np.ndindex(14, 14):
        draw_frame(axes, 945 + 5 * column, 291 + 5 * row, 4, 4, facecolor=TRAINED, edgecolor='none', alpha=0.55)
    draw_text(axes, 980, 266, '14×14\npatches', 9.5, color=GRAY)
    draw_arrow(axes, (1020, 326), (1036, 326))
    draw_box(axes, 1042, 'ViT', 'attention,\nmean of the\npatches')
    draw_arrow(axes, (1141, 326), (1155, 326))
    draw_text(axes, 1172, 326, 'cat', 12.5, weight='bold')

    draw_text(axes, 546, 192, 'augmented on the way, in batches, on the training device', ha='left', weight='bold')
    steps = [('Token-EDA', 'codes become near synonyms; two patches of codes change places'),
             ('crop', 'random-resized, to 28×28 embeddings'),
             ('noise', 'on the embeddings of half the images'),
             ('CutMix', 'a rectangle of another image, and a part of its label')]
    for number, (name, what) in enumerate(steps):
        y = 154 - 32 * number
        draw_text(axes, 564, y, name, ha='left', va='baseline', color=TRAINED, weight='bold')
        draw_text(axes, 660, y, what, ha='left', va='baseline')


def draw_box(axes: Any, left: float, name: str, detail: str) -> None:
    """A part of the model."""
    draw_frame(axes, left, 236, 94, 180, rounded=10, facecolor='white', edgecolor=TRAINED, linewidth=1.8, zorder=2)
    draw_text(axes, left + 47, 356, name, 13, weight='bold')
    draw_text(axes, left + 47, 284, detail, 9.5, color=GRAY)


def draw(picture: Picture) -> Any:
    """The figure, 1200 pixels wide."""
    plt = pyplot()
    plt.rcParams['font.family'] = 'DejaVu Sans'
    figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor='white')
    axes = figure.add_axes((0, 0, 1, 1))
    draw_storing(axes, picture)
    draw_training(axes, picture)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis('off')
    return figure


def main(args: argparse.Namespace) -> None:
    """Draw and write the figure."""
    pyplot()  # before the work, which needs it at its end
    picture = picture_format(args.output)
    figure = draw(tokenize_picture(args.image))
    with atomic_path(args.output) as temporary:
        metadata = {'Software': None} if picture == 'png' else None  # equal figures, equal files
        figure.savefig(temporary, format=picture, metadata=metadata)
    print0(args.output)


if __name__ == '__main__':
    run(main, parse_args)
