"""Whose weights a checkpoint holds."""
import pytest
import timm
import torch

from seitpp import models_mtm_finetune  # noqa: F401 - its models are timm's then
from helpers import fails
from seitpp.models_mtm import MODELS
from training.checkpoints import check_codes, check_origin, origin, origin_note, without_token_adapt

TINY = {'depth': 1, 'embed_dim': 32, 'num_heads': 2}
KINDS = {'main_mtm_pretrain.py': (MODELS[0], {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 2}),
         'main_mtm_finetune.py': ('mtm_deit_tiny_token_32', {}), 'main_seit.py': ('deit_tiny_token_32', {}),
         '': ('vit_tiny_patch16_224', {})}


@pytest.fixture(scope='module')
def weights():
    found = {program: timm.create_model(name, **TINY, **more).state_dict() for program, (name, more) in KINDS.items()}
    return {**found, 'patch': timm.create_model('deit_tiny_token_32_patch', **TINY).state_dict()}


def test_each_program_is_told_from_the_others(weights):
    for program in KINDS:
        assert origin(weights[program]) == program
    assert origin(weights['patch']) == 'main_seit.py' and origin({}) == ''
    other = timm.create_model('deit_small_token_4', **TINY).state_dict()
    assert origin(other) == 'main_seit.py'


def test_notes_and_refusals(weights):
    pretrained = weights['main_mtm_pretrain.py']
    assert origin_note(pretrained, weights['main_seit.py']) == ' (these are weights of main_mtm_pretrain.py)'
    assert origin_note(pretrained, pretrained) == origin_note(weights[''], pretrained) == ''
    check_origin(pretrained, ('main_mtm_pretrain.py',), 'x.pth')
    fails(lambda: check_origin(weights['main_seit.py'], ('main_mtm_finetune.py',), 'x.pth'),
          '^x.pth: its weights belong to main_seit.py, whose network is another: give a checkpoint of '
          'main_mtm_finetune.py$')
    fails(lambda: check_origin(weights[''], ('main_mtm_finetune.py',), 'x.pth'), 'are of no model of masked tokens')
    check_codes(pretrained, 391, 'x.pth')
    fails(lambda: check_codes(pretrained, 30, 'x.pth'), '^x.pth: its model reads 391 codes, but the codebook has 30')


def test_token_adapt_is_left_out():
    value = torch.zeros(1)
    names = {'conversion_function.0.weight': value, 'reverse_transform.1.bias': value, 'norm.weight': value}
    assert list(without_token_adapt(names)) == ['norm.weight']
