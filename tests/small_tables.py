"""A preset of the tables that takes seconds, and rows that are forked instead of started."""
from dataclasses import replace

import processes
from tables import presets

TOY = replace(presets.TINY, classes=2, images_per_class=6, epochs=4,
              training=('--batch-size', '4', '--unscale-lr', '--warmup-lr', '1e-4', '--model-ema-decay', '0.9'),
              token_model=('deit_tiny_token_32', '--model-kwargs', 'depth=1', 'embed_dim=32', 'num_heads=2'),
              lrs=dict.fromkeys(presets.KINDS, 1e-3) | {'tokens': 3e-3}, search={'tokens': (1e-3, 3e-3)},
              workers=0, quality_size=16,
              tokenizers={'patch': presets.Tokenizer(32, 32, ('scripts/fit_patch_tokenizer.py', '--image-size', '32',
                                                              '--codes', '24'), 'tokenizer.pt')})


class Forked:
    """A program in a fork of a server that has imported the programs, in the place of a subprocess: starts at once."""

    def __init__(self, command, log):
        name, *words = command
        module = name.removesuffix('.py').replace('/', '.')
        self.process = processes.Job(module, words, output=log).ranks[0]

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()

    def terminate(self):
        self.process.terminate()

    @property
    def returncode(self):
        return self.process.exitcode
