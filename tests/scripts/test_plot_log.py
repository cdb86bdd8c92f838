"""Curves of a run's log.txt."""
import json

import pytest

from helpers import call, contents, fails
from scripts import plot_log


def write_log(path, epochs=3, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{'epoch': epoch, 'train_loss': 2. - epoch / 9, 'train_lr': 1e-3, 'test_loss': 2., 'test_acc1': 9. * epoch,
              **more} for epoch in range(epochs)]
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return path


def plot(folder, *logs, output='plot.png'):
    call(plot_log, *logs, '--output', folder / output)
    return folder / output


def test_one_or_more_runs_are_drawn(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    log = write_log(tmp_path / 'a' / 'log.txt')
    other = write_log(tmp_path / 'b' / 'log.txt', ema_test_acc1=5.)
    sizes = []
    for logs in ([log], [log, other]):
        picture = plot(tmp_path, *logs).read_bytes()
        assert picture.startswith(b'\x89PNG')
        sizes.append(len(picture))
        assert capsys.readouterr().out == f'{tmp_path / "plot.png"}\n'
    assert sizes[0] != sizes[1]


def test_runs_are_named_by_what_tells_them_apart():
    assert plot_log.run_names(['/a/run/log.txt']) == ['run']
    assert plot_log.run_names(['/a/x/log.txt', '/b/y/log.txt']) == ['x', 'y']
    assert plot_log.run_names(['/a/run/log.txt', '/b/run/log.txt']) == ['a/run', 'b/run']
    assert plot_log.run_names(['/a/run/log.txt', '/a/run/old.txt']) == ['run', 'run']


def test_the_legend_covers_no_curve(tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    figures = []
    monkeypatch.setattr(plot_log, 'save_figure', lambda figure, path: figures.append(figure))
    plot(tmp_path, *(write_log(tmp_path / name / 'run' / 'log.txt', ema_test_acc1=5.) for name in 'abc'))
    figures[0].draw_without_rendering()
    for panel in figures[0].axes:
        legend = panel.get_legend().get_window_extent()
        assert not legend.overlaps(panel.get_window_extent()) and len(panel.get_legend().texts) == len(panel.lines)
        assert legend.y0 >= 0  # it is not cut off
    plot_log.pyplot().close(figures[0])


def test_a_run_without_evaluation_is_drawn(tmp_path):
    pytest.importorskip('matplotlib')
    (tmp_path / 'log.txt').write_text('{"epoch": 0, "train_loss": 1.5, "train_lr": 0.1}\n')
    assert plot(tmp_path, tmp_path / 'log.txt').read_bytes().startswith(b'\x89PNG')


def test_the_log_of_a_tokenizer_is_drawn(tmp_path):
    pytest.importorskip('matplotlib')
    log = write_log(tmp_path / 'log.txt', test_psnr=20., ema_test_psnr=21., test_usage=0.9)
    other = write_log(tmp_path / 'other' / 'log.txt')
    drawn = plot(tmp_path, log).read_bytes()
    assert drawn.startswith(b'\x89PNG') and drawn != plot(tmp_path, other).read_bytes()


@pytest.mark.parametrize('killed, lines', [
    ('{whole}{{"epoch": 3, "train_lo', 1), ('{whole}{{', 1), ('{{"epo\n{whole}', 1), ('{whole}\n\r\n', 0),
    ('{whole}{{"epoch": 3, "tr{{"epoch": 3}}\n', 1), ('{whole}\x00\x00\x00\n[1]\n"x"\n', 3)])
def test_half_lines_are_left_out_and_counted(killed, lines, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    log = write_log(tmp_path / 'log.txt')
    expected = plot(tmp_path, log).read_bytes()
    log.write_text(killed.format(whole=log.read_text()))
    capsys.readouterr()
    assert plot(tmp_path, log).read_bytes() == expected
    note = f'note: {log}: {lines} of {lines + 3} lines are left out: they are no whole lines of an epoch'
    assert capsys.readouterr().out.startswith(note if lines else str(tmp_path))


def test_a_value_that_is_no_number_is_no_point(tmp_path):
    pytest.importorskip('matplotlib')
    log = write_log(tmp_path / 'log.txt')
    expected = plot(tmp_path, log).read_bytes()
    log.write_text(log.read_text() + '{"epoch": 3, "train_loss": "x", "train_lr": null, "test_loss": [1]}\n')
    assert plot(tmp_path, log).read_bytes() == expected


@pytest.mark.parametrize('name, begins', [
    ('plot.jpg', b'\xff\xd8\xff'), ('plot.JPEG', b'\xff\xd8\xff'), ('plot.PNG', b'\x89PNG'), ('plot', b'\x89PNG'),
    ('plot.webp', b'RIFF'), ('plot.pdf', b'%PDF'), ('plot.svg', b'<?xml')])
def test_a_picture_is_of_the_format_of_its_name(name, begins, tmp_path):
    pytest.importorskip('matplotlib')
    log = write_log(tmp_path / 'log.txt')
    assert plot(tmp_path, log, output=name).read_bytes().startswith(begins)


def test_mistakes_get_one_line(tmp_path):
    pytest.importorskip('matplotlib')
    log = write_log(tmp_path / 'log.txt')
    fails(lambda: plot(tmp_path, tmp_path / 'none.txt'), 'none.txt: No such file')
    for text, said in (('', 'no epochs in it'), ('{}', 'no epochs in it'), ('[1]', 'no epochs in it'),
                       ('{"ep', 'no epochs in it'), ('{"epoch": "a"}\n{"epoch": true}', 'no epochs in it')):
        (tmp_path / 'bad.txt').write_text(text)
        fails(lambda: plot(tmp_path, tmp_path / 'bad.txt'), f'bad.txt: {said}')
    (tmp_path / 'bad.txt').unlink()
    fails(lambda: plot(tmp_path, log, output='log.txt/plot.png'), 'cannot be written')
    for name in ('plot.gif', 'plot.png.gz', 'plot.txt'):
        fails(lambda: plot(tmp_path, log, output=name), f'{name}: pictures are written as .png, .*: choose such a name')
    fails(lambda: call(plot_log, log), '--output')
    assert contents(tmp_path).keys() == {'log.txt'}
