"""A training in small: the real loop on a model and batches of a second."""
import timm
import torch
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import main_seit
import recipe
from token_augment import EmbeddingNoise, EraseRectangle, RandomResizedCrop, ReplaceSynonyms, SwapPatches, TokenEDA

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
    state = recipe.make_state(args, model, device, (32, 8, 8))
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
