"""Which checkpoints --save-periods keeps."""
import json
import os
from types import SimpleNamespace

import pytest
import torch

from helpers import Killed, fails
from training.run_folder import CheckpointFiles, RunFolder, checkpoint_files, find_checkpoint


class State(SimpleNamespace):
    """Of a checkpoint what the folder reads: epochs done, batches of the next."""

    def state_dict(self):
        return {'model': {}, 'epoch': self.epoch - 1, 'step': self.step}


def inside(folder):
    """The epoch in each checkpoint."""
    return {path.name: torch.load(path)['epoch'] for path in folder.glob('checkpoint*.pth')}


@pytest.mark.parametrize('periods', ['last2 every_2_epochs', 'last2 best', 'every_2_epochs only'])
def test_files_are_the_published_ones(golden, tmp_path, periods):
    expected = golden('seitpp/checkpoint_files.json')[periods]
    epochs = len(expected['after each epoch, file: epoch inside'])
    files = checkpoint_files([word for word in periods.split() if word != 'only'], epochs)
    folder = RunFolder(str(tmp_path), files=files)
    for epoch, names in enumerate(expected['after each epoch, file: epoch inside']):
        improved = names.get('checkpoint-best.pth', epoch) == epoch  # the golden run's best were after epochs 0 and 2
        folder.save(State(epoch=epoch + 1, step=0), ['model'] if improved else [], {'train_loss': float(epoch)})
        assert inside(tmp_path) == names
    summaries = {path.name for path in tmp_path.glob('*.summary.json')}
    assert summaries == set(expected['summary files at the end'])
    for name, epoch in inside(tmp_path).items():
        summary = json.loads((tmp_path / f'{name}.summary.json').read_text())
        assert summary['epoch'] == f'{epoch + 1}/{epochs}' and summary['train_loss'] == epoch


def test_a_run_without_a_copy_of_its_last_epoch_keeps_the_newest(tmp_path):
    folder = RunFolder(str(tmp_path), files=checkpoint_files(['every_2_epochs'], 3))
    for epoch in range(3):
        folder.save(State(epoch=epoch + 1, step=0))
    assert inside(tmp_path) == {'checkpoint-2.pth': 1, 'checkpoint-last.pth': 2}


def test_within_an_epoch_there_are_no_copies(tmp_path):
    files = checkpoint_files(['last1', 'every_1_epochs'], 4)
    folder = RunFolder(str(tmp_path), files=files)
    folder.save(State(epoch=1, step=0))
    folder.save(State(epoch=1, step=3))
    assert inside(tmp_path) == {'checkpoint-1.pth': 0, 'checkpoint-last.pth': 0, 'checkpoint-last1.pth': 0}
    checkpoint, path = find_checkpoint(str(tmp_path), 'auto', files=files)
    assert checkpoint['step'] == 3 and path == str(tmp_path / 'checkpoint-last.pth')


@pytest.mark.parametrize('renames', range(6))
def test_a_kill_between_renames_loses_nothing(tmp_path, monkeypatch, renames):
    """Saves move three files and their summaries; whenever that is cut off, the next start ends it the same way."""
    from training import run_folder
    files = checkpoint_files(['last2'], 9)
    folder = RunFolder(str(tmp_path), files=files)
    for epoch in range(3):
        folder.save(State(epoch=epoch + 1, step=0))
    replace = run_folder.os.replace
    left = [renames]

    def killed(source, target):
        names = os.path.basename(source), os.path.basename(target)
        if 'checkpoint' in names[0] and not names[0].endswith('.tmp'):
            if not left[0]:
                raise Killed
            left[0] -= 1
        replace(source, target)
    monkeypatch.setattr(run_folder.os, 'replace', killed)
    with pytest.raises(Killed):
        folder.save(State(epoch=4, step=0))
    monkeypatch.undo()
    checkpoint, _ = find_checkpoint(str(tmp_path), 'auto', files=files)
    assert checkpoint['epoch'] == 3
    names = files.newest
    assert inside(tmp_path) == {names[0]: 3, names[1]: 2, names[2]: 1}
    for place, name in enumerate(names):
        assert json.loads((tmp_path / f'{name}.summary.json').read_text())['epoch'] == f'{4 - place}/9'


@pytest.mark.parametrize('period', ['last-1', 'first', 'every_0_epochs', 'every_2', 'best_2', ''])
def test_other_words_are_refused(period):
    fails(lambda: checkpoint_files(['last2', period], 4), "--save-periods.*: give words like 'last2'")


def test_best_needs_an_accuracy():
    fails(lambda: checkpoint_files(['best'], 4, has_best=False), "best: give words like 'last2', 'every_200_epochs'$")
    assert checkpoint_files(['best'], 4).newest == ('checkpoint-last.pth',)
    assert not checkpoint_files(['last'], 4).best
    assert CheckpointFiles().newest == ('checkpoint.pth', 'checkpoint_previous.pth')
