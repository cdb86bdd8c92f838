"""tables/pretraining.py: what each line starts from, and the table at a toy size."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import SMALL as SEIT_SMALL, call, make_data, mistake, read_log, run_here, smooth_images, states
from tables import make, presets, pretraining, report, rows
from small_tables import TOY, Forked
from token_files.token_file import write_set

SIZES = ('deit_tiny_patch16_224', '--model-kwargs', 'img_size=64', 'patch_size=16', 'global_pool=avg', 'depth=1',
         'embed_dim=32', 'num_heads=2')
BOTH = replace(TOY, images_per_class=11, epochs=1, warmup_epochs=0, pixel_model=SIZES)
LINES = presets.PRETRAINING_LINES
SMALL = presets.Pretraining(replace(BOTH, lrs={'tokens': 1e-3, 'pixels': 2e-3}), replace(BOTH, skip_classes=1),
                            {line: 3e-3 if now == 'tokens' else 1e-3 for line, (_, now) in LINES.items()},
                            {'tokens from scratch': (1e-3, 3e-3)})


def lines_of(preset, seeds=(0, 1)):
    """The lines of a preset, by name."""
    plan = pretraining.PretrainingPlan(presets.PRETRAINING[preset], Path('data'), Path('out'), 'cpu', 3e-3)
    return {line.name: line for line in pretraining.lines(plan, seeds)}


def value(row, flag):
    """The word after a flag in a row's last command; None without it."""
    words = row.commands[-1]
    return words[words.index(flag) + 1] if flag in words else None


def test_every_line_starts_from_the_pre_training_of_its_seed():
    lines = lines_of('tiny')
    for name, (before, now) in LINES.items():
        for seed, row in lines[name].runs.items():
            assert row.commands[0][0] == {'tokens': 'main_seit.py', 'pixels': 'main_pixels.py'}[now]
            assert value(row, '--seed') == str(seed) and value(row, '--epochs') == '6'
            start = f'pretrain/train/{before}/lr-0.0005-seed-{seed}'
            assert value(row, '--finetune') == (f'out/{start}/checkpoint.pth' if before else None)
            assert (start in row.after) == bool(before)
    probe = lines['linear probe of pixels'].runs[1]
    assert probe == lines['neighbors of pixels'].runs[1]  # one program does both
    assert value(probe, '--checkpoint') == 'out/pretrain/train/pixels/lr-0.0005-seed-1/checkpoint.pth'
    assert value(probe, '--train-path') == value(lines['pixels to pixels'].runs[0], '--train-path')
    assert len(lines) == 9 and all(line.paper is None for line in lines.values())


def test_one_half_of_the_classes_and_the_other():
    args = make.parse_args(['pretraining', '--data-path', 'data', '--output-dir', 'out', '--rows', '*'])
    found = make.rows_of('pretraining', args)
    chosen = {row.name: row for row in found if row.name.endswith('chosen')}
    assert {value(row, '--classes') for row in chosen.values()} == {'50'}
    assert value(chosen['finetune/chosen'], '--skip-classes') == '50'
    assert value(chosen['pretrain/chosen'], '--skip-classes') is None
    names = [row.name for row in found]
    assert 'tokenizers/vitvqgan-16x16' in names  # shared with the other tables
    for name in LINES:  # each line has a search of its own
        assert sum(f'/{name.replace(" ", "-")}/' in row for row in names) == len(presets.TINY.search['tokens'])


def test_imagenet_takes_a_set_in_shards_without_validation_images():
    lines = lines_of('imagenet', [0])
    assert lines['tokens from scratch'].runs[0].name == 'train/tokens-from-scratch/lr-0.003-seed-0'
    start, = (name for name in lines['tokens to pixels'].runs[0].after if 'pretrain' in name)
    words = presets.PRETRAINING['imagenet']
    assert not words.before.evaluated and words.after.evaluated
    plan = pretraining.PretrainingPlan(words, Path('data'), Path('out'), 'cpu')
    row = plan.pretrained('tokens', 0)
    assert row.name == start and '--no-eval' in row.commands[0] and value(row, '--val-token-file') is None
    assert value(row, '--train-token-file') == 'data/tokens/imagenet21k-train-*-token.data.bin.gz'
    assert value(row, '--train-label-file') == 'data/tokens/imagenet21k-train-*-label.txt'
    pixels = plan.pretrained('pixels', 0)
    assert value(pixels, '--train-path') == 'data/imagenet21k/train' and value(pixels, '--val-path') is None


def test_shards_of_many_classes_start_a_set_of_few(tmp_path, capsys):
    """The road of ImageNet-21k: any number of shards and classes, none of which holds all, and nothing to validate."""
    data = make_data(tmp_path)
    rng = np.random.default_rng(1)
    for shard in range(3):
        labels = rng.integers(20 * shard, 20 * shard + 20, 9)
        labels[-1] = 20 * shard + 19
        write_set(tmp_path / f'big-{shard}-token.data.bin.gz', [rng.integers(0, 30, (9, 100))], 9,
                  tmp_path / f'big-{shard}-label.txt', labels)
    flags = [*SEIT_SMALL, *data[:4], '--train-token-file', tmp_path / 'big-*-token.data.bin.gz', '--train-label-file',
             tmp_path / 'big-*-label.txt', '--no-eval', '--epochs', 1]
    run_here(*flags, '--output-dir', tmp_path / 'before')
    assert 'train: 27 images of 10x10 codes' in capsys.readouterr().out
    before = states(tmp_path / 'before' / 'checkpoint.pth')['model']
    assert before['head.weight'].shape == (60, 32)
    still = ['--lr', 0, '--min-lr', 0, '--warmup-lr', 0, '--epochs', 1, '--output-dir', tmp_path / 'after']
    run_here(*SEIT_SMALL, *data, '--finetune', tmp_path / 'before' / 'checkpoint.pth', *still)
    assert ('checkpoint.pth: 18 tensors kept, started from scratch: head.* (another shape)\n'
            in capsys.readouterr().out)
    after = states(tmp_path / 'after' / 'checkpoint.pth')['model']
    assert after['head.weight'].shape == (4, 32)
    assert all(torch.equal(after[key], value) for key, value in before.items() if not key.startswith('head.'))
    (tmp_path / 'big-2-label.txt').unlink()
    assert '3 token files, but' in mistake(*flags)


@pytest.mark.slow
def test_the_table_at_a_toy_size(tmp_path, monkeypatch, capsys):
    for split in ('train', 'val'):
        smooth_images(tmp_path / 'data' / split, 12)
    monkeypatch.setitem(presets.PRETRAINING, 'tiny', SMALL)
    started = []
    monkeypatch.setattr(rows, 'start', lambda command, log, env: started.append(log) or Forked(command, log))
    out = tmp_path / 'out'
    words = ['--data-path', tmp_path / 'data', '--output-dir', out, '--device', 'cpu', '--jobs', 2, '--seeds', 0]
    assert call(make, 'pretraining', *words) == 0, capsys.readouterr().err
    assert call(make, 'pretraining', *words, '--rows', 'search *') == 0

    results = json.loads((out / 'pretraining' / 'results.json').read_text())
    assert list(results['rows']) == [*LINES, 'neighbors of tokens', 'linear probe of tokens',
                                     'neighbors of pixels', 'linear probe of pixels']
    for name in LINES:
        best = results['lrs'][name]['chosen']
        folder = out / 'finetune' / 'train' / name.replace(' ', '-') / f'lr-{best:g}-seed-0'
        assert results['rows'][name]['top1'] == [read_log(folder)[-1]['test_acc1']]
        assert len(results['lrs'][name]['search']) == (2 if name == 'tokens from scratch' else 0)
        assert ('start_bytes' in results['rows'][name]) == ('from scratch' not in name)
    assert states(folder / 'checkpoint.pth')['classes'] == ['bee', 'cat']
    said = (out / 'finetune' / 'train' / 'tokens-to-pixels' / 'lr-0.001-seed-0' / rows.OUTPUT).read_text()
    assert ('checkpoint.pth: 15 tensors kept (norm.* as fc_norm.*), pos_embed resampled from 2x2 to 4x4, started from '
            'scratch: patch_embed.proj.* (another shape), head.* (other classes)\n') in said
    for kind, lr in (('tokens', '0.001'), ('pixels', '0.002')):
        found = json.loads((out / 'finetune' / 'probe' / kind / f'lr-{lr}-seed-0' / 'probe.json').read_text())
        assert found['train'] == 22 and found['val'] == 24 and found['classes'] == 2
        assert results['rows'][f'neighbors of {kind}']['top1'] == [found['knn']['acc1']]
        assert results['rows'][f'linear probe of {kind}']['top1'] == [found['linear']['acc1']]

    started.clear()
    assert call(make, 'pretraining', *words, '--rows', 'tokens to*') == 0
    assert started == [] and json.loads((out / 'pretraining' / 'results.json').read_text()) == results
    text = (out / 'pretraining' / 'table.md').read_text()
    size = json.loads((out / 'pretrain' / 'tokens' / 'patch' / 'bytes.json').read_text())
    assert f'| tokens to pixels | 22 in {size["files"] / 1e6:,.2f} MB | 22 in 0.05 MB | 1 + 1 | ' in text
    assert f'| pixels from scratch | {report.DASH} | 22 in ' in text
    assert text.count('\n| ') == 11 and 'Learning rates: tokens to tokens 0.00' in text


@pytest.mark.parametrize('preset', list(presets.PRETRAINING))
def test_presets_are_those_of_the_other_tables(preset):
    assert presets.PRETRAINING.keys() <= presets.PRESETS.keys()
    sizes = presets.PRETRAINING[preset]
    assert sizes.before.token_model == sizes.after.token_model == presets.PRESETS[preset].token_model
    assert 'global_pool=avg' in sizes.after.pixel_model and sizes.after.pixel_model == sizes.before.pixel_model
