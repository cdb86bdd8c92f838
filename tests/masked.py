"""Masked-token programs in small: sizes, published commands, a small TokenAdapt."""
import subprocess
import sys

import numpy as np
import torch

from benchmarks.common import free_port
from helpers import ROOT, clean_environment
from image_tokenizer.vitvqgan import Size
from seitpp import token_adapt as ta
from seitpp.token_adapt import TokenAdapt

SIZES = ['--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2']
DECODER = ['decoder_embed_dim=16', 'decoder_depth=1', 'decoder_num_heads=2']
SMALL = ['--device', 'cpu', *SIZES, *DECODER, '--batch-size', 4, '--input-size', 64, '--warmup-epochs', 1, '--blr', 0.1]
PUBLISHED = """--codebook-path x --train-token-file x --train-label-file x --batch_size 128 --output_dir x"""
PUBLISHED_PRETRAIN = f"""{PUBLISHED} --model mae_token_vit_base_patch16_dec512d4b_k2s2_vitvqgan_32 --accum_iter 4
    --blr 1.5e-4 --epochs 400 --tokenadapt-path tokenadapt.ckpt"""
PUBLISHED_FINETUNE = f"""{PUBLISHED} --model deit_base_token_32 --val-token-file x --val-label-file x
    --token-synonym-dict tokens/codebook-synonyms.json --accum_iter 1 --print_freq 400 --epochs 100 --blr 1.0e-3
    --layer_decay 0.65 --dist_eval --finetune x"""

NAME = 'mae_token_vit_base_patch16_dec512d4b_k2s2_vitvqgan_32'
NAMES = 'tokenadapt.ckpt (what load_state_dict(strict=False) can match)'


def token_adapt_flags(folder, codes, grid_size, crop_size):
    """Write a small TokenAdapt; returns the flag that names it."""
    torch.manual_seed(0)
    path = folder / 'tokenadapt.ckpt'
    torch.save(TokenAdapt(codes, 32, grid_size, crop_size, Size(64, 1, 1, 64)).state_dict(), path)
    return ['--tokenadapt-path', path]


def split_flags(words):
    """Flags of make_data for pre-training (no labels, no validation), and for fine-tuning."""
    pairs = dict(zip(words[::2], words[1::2]))
    ours = [word for flag in ('--codebook-path', '--token-synonym-dict', '--train-token-file')
            for word in (flag, pairs[flag])]
    return ours, words


def launched(program, words):
    """The output of a program that torch.distributed.launch starts as two processes."""
    launch = '-m', 'torch.distributed.launch', '--nproc_per_node=2', f'--master_port={free_port()}', '--use_env'
    done = subprocess.run([sys.executable, *launch, str(ROOT / program), *map(str, words)], capture_output=True,
                          text=True, env=clean_environment(), timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rng(k):
    return np.random.default_rng(k)


def codes_of(k, batch):
    return torch.from_numpy(rng(k).integers(0, 391, (batch, 28, 28)))


def geometry_of(z, key, crops):
    """The Geometry that a golden file holds."""
    maps = [tuple(row) for row in z[f'{key}_affine'].tolist()]
    return ta.Geometry(bool(z[f'{key}_flip']), maps, torch.from_numpy(z[f'{key}_{crops}']))
