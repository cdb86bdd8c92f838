"""Results of other machines beside those of an output folder."""
import json
from pathlib import Path

import pytest

from helpers import call, fails
from tables import make, report

TABLE = {'table': 'storage', 'title': 'Storage against accuracy', 'preset': 'photos', 'flags': '--amp bf16',
         'lrs': {'pixels': {'chosen': 2e-3, 'search': {'0.002': 25.}, 'epochs': 3}}}
WORDS = ['storage', '--preset', 'photos', '--data-path', 'data', '--output-dir']


def line(seeds, values, **facts):
    return {'kind': 'pixels', 'seeds': seeds, 'top1': values, **report.mean_and_sd(values), 'epochs': '6',
            'paper': None, 'curves': [[value - 1, value] for value in values],
            'bytes': {'files': 9, 'images': 5}} | facts


def merged(tmp_path, here, there, **facts):
    path = tmp_path / 'results.json'
    path.write_text(json.dumps(TABLE | {'rows': there} | facts))
    return report.with_results(TABLE | {'rows': here}, path, dict.fromkeys(here, '6'))


def test_seeds_and_lines_that_are_not_here_are_added(tmp_path):
    here = {'full pixels': line([1, 3], [31., 33.]), 'JPEG q10': None, 'sample 4%': None}
    there = {'full pixels': line([0, 1, 2], [30., 99., 32.]), 'JPEG q10': line([0], [20.])}
    rows = merged(tmp_path, here, there)['rows']
    full = rows['full pixels']
    assert (full['seeds'], full['top1']) == ([0, 1, 2, 3], [30., 31., 32., 33.])
    assert (full['mean'], full['sd']) == (31.5, 1.291)
    assert full['curves'] == [[29., 30.], [30., 31.], [31., 32.], [32., 33.]]
    assert list(rows) == list(here) and rows['JPEG q10'] == there['JPEG q10'] and rows['sample 4%'] is None
    failed = line([], [], failed='it did', bytes=None)
    rows = merged(tmp_path, here | {'full pixels': failed}, there)['rows']
    assert rows['full pixels'] == there['full pixels'] | {'failed': 'it did'}
    there = {'full pixels': line([0], [30.], failed='it did', ema_top1=[29.])}
    rows = merged(tmp_path, here, there)['rows']
    assert 'failed' not in rows['full pixels'] and 'ema_top1' not in rows['full pixels']


def test_rates_are_added_in_order(tmp_path):
    lrs = {'pixels': {'chosen': 2e-3, 'search': {'0.004': 24., '0.0005': 23., '0.002': 99.}, 'epochs': 3}}
    assert merged(tmp_path, {}, {}, lrs=lrs)['lrs']['pixels']['search'] == {'0.0005': 23., '0.002': 25., '0.004': 24.}


@pytest.mark.parametrize('rows, facts, words', [
    ({}, {'table': 'speed'}, 'is no results.json of the table storage with --preset photos'),
    ({}, {'preset': 'tiny'}, 'is no results.json of the table storage with --preset photos'),
    ({}, {'flags': ''}, 'trained with the same flags'),
    ([], {}, 'trained with the same flags'),
    ({}, {'lrs': 3}, 'trained with the same flags'),
    ({'ours': line([0], [1.])}, {}, 'has a line that this table has not: ours'),
    ({'full pixels': line([0], [1.], epochs='7')}, {}, 'full pixels is of 7 epochs there, of 6 here'),
    ({'JPEG q10': line([0], [1.], epochs='7')}, {}, 'JPEG q10 is of 7 epochs there, of 6 here'),
    ({'full pixels': line([0], [1.], bytes={'images': 7})}, {}, 'full pixels is of 7 images there, of 5 here'),
    ({'full pixels': None}, {}, 'is damaged'),
    ({'full pixels': line([0], [1.], top1=[])}, {}, 'is damaged'),
    ({'full pixels': line(['a'], [1.])}, {}, 'is damaged'),
    ({}, {'lrs': {'pixels': {}}}, 'is damaged'),
    ({}, {'lrs': {'pixels': {'chosen': 2e-3, 'search': {'0.1': 1.}, 'epochs': 4}}}, 'is of 4 epochs there, of 3 here'),
    ({}, {'lrs': {'pixels': {'chosen': 1e-3, 'search': {}}}}, 'the learning rate 0.001 there, 0.002 here'),
])
def test_results_of_something_else_are_refused(tmp_path, rows, facts, words):
    fails(lambda: merged(tmp_path, {'full pixels': line([1], [2.]), 'JPEG q10': None}, rows, **facts), words)


def test_a_file_that_is_no_results(tmp_path):
    Path(tmp_path, 'results.json').write_text('[]')
    fails(lambda: call(make, *WORDS, tmp_path / 'out', '--report', '--results', tmp_path / 'results.json'),
          'is no results.json')
    fails(lambda: make.parse_args(['continual', *WORDS[3:], 'out', '--results', 'x.json']), 'is for one table')
