"""docs/draw_pipeline.py: what the figure shows is real, and it is drawn whole."""
import numpy as np
import pytest
from PIL import Image

from docs import draw_pipeline


@pytest.fixture(scope='module')
def picture():
    return draw_pipeline.tokenize_picture(draw_pipeline.ROOT / 'docs' / 'cat.jpg')


def test_codes_embeddings_and_decoded_picture_belong_together(picture):
    assert picture.codes.shape == (32, 32) and picture.codes.min() >= 0 and picture.codes.max() < 391
    assert picture.embeddings.shape == (32, 32, 32)
    same = picture.codes == picture.codes[0, 0]
    assert (picture.embeddings[same] == picture.embeddings[0, 0]).all()
    assert picture.decoded.shape == picture.pixels.shape == (256, 256, 3)
    assert ((picture.decoded - picture.pixels) ** 2).mean() < 0.01


def test_codes_are_ordered_from_dark_to_bright(picture):
    order = draw_pipeline.brightness_order(picture)
    patches = picture.decoded.reshape(32, 8, 32, 8, 3).mean((1, 3, 4))
    assert np.corrcoef(order[picture.codes].ravel(), patches.ravel())[0, 1] > 0.9


def test_the_figure_is_written(picture, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draw_pipeline, 'tokenize_picture', lambda path: picture)
    output = tmp_path / 'figure.png'
    draw_pipeline.main(draw_pipeline.parse_args(['--output', str(output)]))
    assert capsys.readouterr().out == f'{output}\n'
    with Image.open(output) as figure, Image.open(draw_pipeline.ROOT / 'docs' / 'pipeline.png') as committed:
        assert figure.size == committed.size == (draw_pipeline.WIDTH, draw_pipeline.HEIGHT)
