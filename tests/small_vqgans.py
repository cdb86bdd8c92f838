"""State dicts of small VQGANs with random weights, in the names and shapes that the families publish."""
import math

import torch

CHANNELS = 32  # the least, since 32 groups divide them
MULTIPLES = 1, 1, 2  # levels, from the finest
SIDE = 2 ** (len(MULTIPLES) - 1)  # pixels of a code
Z = 6
DIM = 5
CODES = 40
FAMILIES = 'taming', 'ldm', 'llamagen', 'janus', 'ibq', 'maskgit', 'gumbel'


class Weights(dict):
    """A state dict that is filled with random layers."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def conv(self, name, c, channels, size, bias=True):
        self[f'{name}.weight'] = self.random(channels, c, size, size) / math.sqrt(c * size * size)
        if bias:
            self[f'{name}.bias'] = 0.1 * self.random(channels)

    def norm(self, name, channels):
        self[f'{name}.weight'] = 1 + 0.2 * self.random(channels)
        self[f'{name}.bias'] = 0.2 * self.random(channels)

    def residual(self, name, c, channels, maskgit):
        self.norm(f'{name}.norm1', c)
        self.conv(f'{name}.conv1', c, channels, 3, not maskgit)
        self.norm(f'{name}.norm2', channels)
        self.conv(f'{name}.conv2', channels, channels, 3, not maskgit)
        if c != channels:
            self.conv(f'{name}.nin_shortcut', channels if maskgit else c, channels, 1, not maskgit)

    def attention(self, name, channels):
        self.norm(f'{name}.norm', channels)
        for layer in ('q', 'k', 'v', 'proj_out'):
            self.conv(f'{name}.{layer}', channels, channels, 1)


def small_state(family, seed=0, decoder=True, dim=DIM):
    """A state dict of one of FAMILIES, as the file of a plain model has it."""
    state = Weights(seed)
    maskgit = family == 'maskgit'
    llamagen = family in ('llamagen', 'janus')
    dim = Z if maskgit else dim
    blocks = 4 if family == 'ibq' else 2
    last = len(MULTIPLES) - 1
    down, block, attn = ('conv_blocks', 'res', 'attn') if llamagen else ('down', 'block', 'attn')
    top = CHANNELS * MULTIPLES[-1]
    middle = ('mid.0', 'mid.1', 'mid.2') if llamagen else ('mid.block_1', 'mid.attn_1', 'mid.block_2')

    def mid(half):
        if maskgit:
            for i in range(2):
                state.residual(f'{half}.mid.{i}', top, top, True)
            return
        state.residual(f'{half}.{middle[0]}', top, top, False)
        state.attention(f'{half}.{middle[1]}', top)
        state.residual(f'{half}.{middle[2]}', top, top, False)

    state.conv('encoder.conv_in', 3, CHANNELS, 3, not maskgit)
    c = CHANNELS
    for i, multiple in enumerate(MULTIPLES):
        name = f'encoder.{down}.{i}'
        for j in range(blocks):
            state.residual(f'{name}.{block}.{j}', c, CHANNELS * multiple, maskgit)
            c = CHANNELS * multiple
            if i == last and not maskgit:
                state.attention(f'{name}.{attn}.{j}', c)
        if i < last and not maskgit:
            state.conv(f'{name}.downsample.conv', c, c, 3)
    mid('encoder')
    state.norm('encoder.norm_out', top)
    state.conv('encoder.conv_out', top, Z, 1 if maskgit else 3)
    if decoder:
        state.conv('decoder.conv_in', Z, top, 3)
        mid('decoder')
        c = top
        for i in reversed(range(len(MULTIPLES))):
            name = f'decoder.conv_blocks.{last - i}' if llamagen else f'decoder.up.{i}'
            for j in range(blocks + (not maskgit)):
                state.residual(f'{name}.{block}.{j}', c, CHANNELS * MULTIPLES[i], maskgit)
                c = CHANNELS * MULTIPLES[i]
                if i == last and not maskgit:
                    state.attention(f'{name}.{attn}.{j}', c)
            if i:
                state.conv(f'{name}.upsample_conv' if maskgit else f'{name}.upsample.conv', c, c, 3)
        state.norm('decoder.norm_out', c)
        state.conv('decoder.conv_out', c, 3, 3)
    if not maskgit:
        state.conv('quant_conv', Z, dim, 1)
        state.conv('post_quant_conv', dim, Z, 1)
    if family == 'gumbel':
        state.conv('quantize.proj', dim, CODES, 1)
        state['quantize.embed.weight'] = state.random(CODES, dim)
    else:
        state['quantize.embedding.weight'] = 0.3 * state.random(CODES, dim) + 0.1
    return dict(state)
