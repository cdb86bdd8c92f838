"""A run in small of each program that trains a classifier, on images of three classes, with all that belongs to it."""
from pathlib import Path

import main_continual
import main_mtm_finetune
import main_mtm_pretrain
import main_pixels
import main_seit
import tokenize_images
from helpers import call, smooth_images
from scripts import build_synonyms, fit_patch_tokenizer

SIZES = ['--device', 'cpu', '--batch-size', 6, '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2']
TOKENS = [*SIZES, '--model', 'deit_tiny_token_32']
PROGRAMS = 'main_seit.py', 'main_mtm_finetune.py', 'main_pixels.py'


def make_runs(folder: Path) -> dict[str, Path]:
    """Train all in `folder`; returns folders of runs by program, 'images', 'tokens', and a folder 'tasks'."""
    images, tokens = folder / 'images', folder / 'tokens'
    smooth_images(images, per_class=4)
    call(fit_patch_tokenizer, '--data-path', images, '--output-dir', tokens, '--image-size', 40, '--patch-size', 4,
         '--dim', 32, '--codes', 40, '--iterations', 3)
    call(tokenize_images, '--data-path', images, '--name', 'my', '--output-dir', tokens, '--image-size', 40,
         '--tokenizer-path', tokens / 'tokenizer.pt', '--codebook-path', tokens / 'codebook.ckpt', '--num-workers', 0,
         '--device', 'cpu')
    call(build_synonyms, '--codebook-path', tokens / 'codebook.ckpt', '--output', tokens / 'synonyms.json')
    codes = ['--codebook-path', tokens / 'codebook.ckpt', '--train-token-file', tokens / 'my-token.data.bin.gz']
    sets = [*codes, '--token-synonym-dict', tokens / 'synonyms.json', '--train-label-file', tokens / 'my-label.txt',
            '--val-token-file', tokens / 'my-token.data.bin.gz', '--val-label-file', tokens / 'my-label.txt']
    grid = ['--token-patch-size', 4, '--input-size', 32]  # 8 of the 10 codes on a side
    runs = {program: folder / program.removesuffix('.py') for program in (*PROGRAMS, 'main_mtm_pretrain.py')}
    call(main_seit, *TOKENS, *sets, *grid, '--epochs', 1, '--lr', '0.05', '--output-dir', runs['main_seit.py'])
    call(main_mtm_finetune, *TOKENS, *sets, *grid, '--tokenadapt-path', '', '--epochs', 1, '--output-dir',
         runs['main_mtm_finetune.py'])
    call(main_mtm_pretrain, *SIZES, 'decoder_embed_dim=16', 'decoder_depth=1', 'decoder_num_heads=2', *codes,
         '--token-synonym-dict', tokens / 'synonyms.json', *grid, '--tokenadapt-path', '', '--epochs', 1,
         '--warmup-epochs', 0, '--output-dir', runs['main_mtm_pretrain.py'])
    call(main_pixels, *SIZES, '--model', 'deit_tiny_patch16_224', '--input-size', 32, '--eval-crop-ratio', '0.8',
         '--num-workers', 0, '--train-path', images, '--val-path', images, '--epochs', 1, '--lr', '0.05',
         '--output-dir', runs['main_pixels.py'])
    call(main_continual, *TOKENS, *sets, *grid, '--new', 'tokens', '--memory', 'tokens', '--memory-bytes', 2000,
         '--base-classes', 2, '--inc-classes', 1, '--epochs', 1, '--warmup-epochs', 0, '--batch-size', 2,
         '--output-dir', folder / 'tasks')
    return runs | {'images': images, 'tokens': tokens, 'tasks': folder / 'tasks'}
