"""A training in small: the real loop on a model and batches of a second, and a program as small, to be killed."""
import signal
from collections.abc import Iterator, Sequence

import numpy as np
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import flags
import main_seit
import recipe
from flags import Flags, Parser
from helpers import Killed
from samplers import shuffled
from token_augment import EmbeddingNoise, EraseRectangle, RandomResizedCrop, ReplaceSynonyms, SwapPatches, TokenEDA
from training.checkpoints import progress_of
from utils import check_same_on_all_ranks, rank, world_size

CPU = torch.device('cpu')
WAITS = ('aten._local_scalar_dense', 'aten.nonzero', 'aten.masked_select', 'aten.is_nonzero', 'aten.equal')


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return timm.create_model('deit_tiny_token_32', depth=2, embed_dim=32, num_heads=2, num_classes=5, img_size=8,
                             drop_path_rate=0.2)


def synthetic_batches(count, size=8, device=CPU):
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        codes = torch.randint(0, 20, (size, 10, 10), generator=g).to(torch.uint16)
        yield codes.to(device), torch.randint(0, 5, (size,), generator=g).to(device)


def whole_augment(device):
    """(augment, crop) with every change on."""
    codebook = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    synonyms = torch.randint(0, 20, (20, 5)), torch.full((20,), 5)
    eda = TokenEDA([(0.25, ReplaceSynonyms(*synonyms, 0.25, device)), (0.25, SwapPatches(10, 0.25, device)),
                    (0.2, EraseRectangle(0.25, 20))])
    crop = RandomResizedCrop(codebook, 10, 8, 0.08, device)
    noise = EmbeddingNoise(0.5, 1., 1.)
    return (lambda codes, g: noise(crop(eda(codes.long(), g), g), g)), crop


def train(batches, steps, flags=(), device=CPU, model=None, augment=None, after_step=None):
    """Run the real loop with everything on; returns (state, result)."""
    args = main_seit.parse_args(['--unscale-lr', '--lr', '1e-3', '--warmup-epochs', '0', '--clip-grad', '1', '--amp',
                                 'off', *flags])
    model = (model or tiny_model()).to(device)
    augment = augment or whole_augment(device)[0]
    mixup, criterion = recipe.make_loss(args, 5)
    state = recipe.make_state(args, model, device, (32, 8, 8), 1)
    state.ema = ModelEmaV3(model, decay=0.9)

    def loss_of(model, batch, generator):
        codes, targets = batch
        x = augment(codes, generator)
        if mixup:
            x, targets = mixup(x, targets)
        return criterion(model(x), targets)
    return state, engine.train_one_epoch(state, batches, loss_of, recipe.step_options(args, steps), after_step)


class CountWaits(TorchDispatchMode):
    """Counts the operations for which the host would wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(WAITS)
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- a program

NO_EFFECT = {'--num-workers': 'there are none', '--world-size': 'the launcher sets it'}
IMAGES = 24


def parse_args(argv: Sequence[str] | None = None) -> Flags:
    """The command line: what every program has, and mishaps."""
    parser = Parser('A training in small.')
    add = flags.add_step_flags(parser)
    flags.add_average_flags(add)
    flags.add_run_flags(parser)
    add = parser.add_group('mishaps')
    for flag, what in (('--signal-in', 'the last rank gets SIGTERM'), ('--kill-before', 'the run ends at once')):
        add(flag, type=int, nargs=2, metavar=('EPOCH', 'STEP'), help=what, of_a_start=True)
    add('--bad-image', type=int, help='the loss of this image is not a number', of_a_start=True)
    parser.add_no_effect(NO_EFFECT)
    parser.set_defaults(batch_size=4, epochs=2, warmup_epochs=0, lr=0.1, model_ema_decay=0.9, device='cpu')
    args = parser.parse_args(argv)
    recipe.check_output_flags(args)
    return args


def small(folder, *words):
    """The exit code of this program, run in this process, which writes to a folder."""
    return main(parse_args(['--output-dir', str(folder), *map(str, words)]))


def main(args: Flags) -> int:
    """Train, or evaluate: as short as a program can be. Returns the exit code."""
    device, folder, checkpoint, path = recipe.start(args, NO_EFFECT)
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(IMAGES, 32, 8, 8, generator=generator), torch.arange(IMAGES) % 5
    check_same_on_all_ranks(progress_of(checkpoint))
    model = tiny_model()

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(batch[0].shape, generator=generator)
        return nn.functional.cross_entropy(model(batch[0] + noise), batch[1])

    def order_of(epoch: int) -> np.ndarray:
        return shuffled(IMAGES, world_size(), rank(), args.seed, epoch)

    def batches_of(indices: np.ndarray, epoch: int, start: int) -> Iterator[tuple]:
        for step, chosen in enumerate(indices.reshape(-1, args.batch_size), start):
            if args.kill_before == [epoch, step]:
                raise Killed
            if args.signal_in == [epoch, step] and rank() == world_size() - 1:
                signal.raise_signal(signal.SIGTERM)
            bad = torch.from_numpy(chosen == args.bad_image)
            yield x[chosen].masked_fill(bad[:, None, None, None], torch.nan), labels[chosen]

    def evaluate_of(model: nn.Module, name: str) -> dict[str, float]:
        return engine.evaluate(model, [(x, labels)], lambda x: x, name=name)

    if args.eval:
        engine.evaluate_checkpoint(model, checkpoint, path, args.model_ema, evaluate_of)
        return 0
    steps = recipe.count_steps(args, len(order_of(0)), 'images in small')
    state = recipe.make_state(args, model, device, (32, 8, 8), steps)
    recipe.resume_run(args, state, checkpoint, path, steps)
    return recipe.fit(args, state, folder, steps, order_of, batches_of, loss_of, None if args.no_eval else evaluate_of,
                      list('abcde'))
