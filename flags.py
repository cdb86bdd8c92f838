"""The command line: one parser for all programs, and types that state what a flag may be."""
import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from timm.utils import ParseKwargs

from utils import InputError, cores, print0


class Rules(NamedTuple):
    """What flags say of themselves, as names of flags; see `Parser.add_group`."""
    of_a_rank: set[str]
    of_a_start: set[str]
    exact: set[str]


class Flags(argparse.Namespace):
    """A parsed command line, and its flags' rules, which are not among `vars`."""
    __slots__ = ('rules',)

    def __init__(self, rules: Rules, **values: Any):
        super().__init__(**values)
        self.rules = rules

    def replaced(self, **values: Any) -> 'Flags':
        """A copy with other values, or with more."""
        return Flags(self.rules, **(vars(self) | values))

    def joined(self, other: 'Flags') -> 'Flags':
        """A copy with the flags of another parser beside these; where both have one, the other's counts."""
        rules = Rules(*(first | second for first, second in zip(self.rules, other.rules)))
        return Flags(rules, **(vars(self) | vars(other)))


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, `-` and `_` alike in flags, no abbreviations, and InputErrors.

    Args:
        description: its first line is shown. A module's docstring will do; python -OO makes it None.
    """

    def __init__(self, description: str | None = None, **kwargs: Any):
        kwargs.setdefault('formatter_class', argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(description=(description or '').partition('\n')[0], allow_abbrev=False, **kwargs)
        self.rules = Rules(set(), set(), set())

    def add_group(self, title: str) -> Callable:
        """Begin a group of flags; returns its add_argument, which also takes what a flag says of itself:

            of_a_rank=True     ranks may have other values, as of where files lie on a node; else all must agree
            of_a_start=True    it is no part of the run, so that a resumed run may change it; else a line says so
            exact=True         with another value a resumed run would have other batches or augmentation: refused
        """
        group = self.add_argument_group(title)

        def add(*names: str, of_a_rank: bool = False, of_a_start: bool = False, exact: bool = False,
                **options: Any) -> None:
            flag = group.add_argument(*names, **options).dest
            for rule, on in ((self.rules.of_a_rank, of_a_rank), (self.rules.of_a_start, of_a_start),
                             (self.rules.exact, exact)):
                if on:
                    rule.add(flag)
        return add

    def add_no_effect(self, reasons: dict[str, str], switches: Sequence[str] = ()) -> None:
        """Accept flags that change nothing, because published commands hold them.

        Args:
            reasons: flag -> why it changes nothing.
            switches: those of them that take no value.
        """
        add = self.add_group('accepted, without effect')
        for flag, why in reasons.items():
            switch = {'action': 'store_true'} if flag in switches else {}
            add(flag, help=why, of_a_rank=True, of_a_start=True, **switch)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple:
        argv = list(sys.argv[1:] if args is None else args)
        end = argv.index('--') if '--' in argv else len(argv)  # what follows are no flags
        namespace = Flags(self.rules) if namespace is None else namespace
        return super().parse_known_args([*map(_with_dashes, argv[:end]), *argv[end:]], namespace)

    def format_help(self) -> str:
        for action in self._actions:
            if not action.help and action.default not in (None, argparse.SUPPRESS):
                action.help = 'default: %(default)s'  # argparse shows a default only behind a text
        return super().format_help()

    def error(self, message: str) -> None:
        raise InputError(f'{message}; see {self.prog} --help')


def add_max_pixels(add: Callable) -> None:
    """--max-image-pixels, by a parser's add_argument."""
    add('--max-image-pixels', type=integer(1), metavar='N',
        help="larger images count as unreadable (default: PIL's limit, 178,956,970)")


def _with_dashes(word: str) -> str:
    flag, equals, value = word.partition('=')
    return flag.replace('_', '-') + equals + value if flag.startswith('--') else word


def print_no_effect(reasons: dict[str, str], flags: dict[str, Any]) -> None:
    """Name, once, the flags of `reasons` (flag -> why it changes nothing) that were given."""
    for flag, why in reasons.items():
        if flags[flag[2:].replace('-', '_')]:
            print0(f'note: {flag} has no effect: {why}')


def number(least: float | None = None, most: float | None = None, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a finite number, from `least` to `most` where they are given."""
    if least is None:
        bounds = f'of {most} or less'
    elif most is None:
        bounds = f'of {least} or more'
    else:
        bounds = f'from {least} to {most}'

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = 'a whole number' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(f'{text!r} is not {what}') from None
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f'{text}: give a finite number')
        if (least is not None and value < least) or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f'{text}: give a value {bounds}')
        return value
    return parse


def integer(least: int = 0, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number of `least` or more, up to `most` where it is given."""
    return number(least, most, int)


ON_OFF = argparse.BooleanOptionalAction
SHARE = number(0, 1)
POSITIVE = number(1e-12)
SEED = integer(0, 2 ** 63 - 1)  # what torch takes
SYNONYMS = 'tokens/synonyms.json'


def byte_count(text: str) -> int:
    """An argparse type: a number of bytes, as in '250000' or '2.5e5'."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < 1 << 50 or value != int(value):
        raise argparse.ArgumentTypeError(f'{text}: give a whole number of bytes, as in 1000000 or 1e6')
    return int(value)


class KeyValues(ParseKwargs):
    """timm's KEY=VALUE arguments, with a complaint about words of another form."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[str],
                 option_string: str | None = None) -> None:
        wrong = [word for word in values if '=' not in word]
        if wrong:
            parser.error(f'argument {option_string}: {wrong[0]!r} is not of the form key=value')
        super().__call__(parser, namespace, values, option_string)


# ---------------------------------------------------------------- groups that programs share

def add_token_flags(parser: Parser) -> Callable:
    """The training tokens, their codebook, and how they are read. Returns the group's add."""
    add = parser.add_group('data')
    add('--train-token-file', default='tokens/imagenet1k-train-token.data.bin.gz', metavar='FILE', of_a_rank=True)
    add('--codebook-path', default='tokens/codebook.ckpt', metavar='FILE', of_a_rank=True)
    add('--token-synonym-dict', default=SYNONYMS, metavar='FILE', of_a_rank=True)
    add('--token-cache', default='', metavar='DIR', of_a_rank=True,
        help="where token files are decoded to: a folder, '' for beside the token file, 'none' for memory only")
    add('--data-device', default='auto', choices=['auto', 'cpu', 'cuda'],
        help='where tokens live: all on the GPU, or in the map; auto: on the GPU if they take a quarter of its free '
        'memory at most')
    add('--pin-mem', action=ON_OFF, default=True, help='copy batches to a GPU from page-locked memory')
    add('--input-size', type=integer(2), default=224,
        help='in pixels of --token-patch-size to a code: 224 / 8 = 28 codes')
    add('--token-patch-size', type=integer(1), default=8, help='pixels a code covers, on each side')
    return add


def add_token_label_flags(add: Callable) -> None:
    """Labels and the validation set, added by a group's add."""
    add('--train-label-file', default='tokens/imagenet1k-train-label.txt', metavar='FILE', of_a_rank=True)
    add('--val-token-file', default='tokens/imagenet1k-val-token.data.bin.gz', metavar='FILE', of_a_rank=True)
    add('--val-label-file', default='tokens/imagenet1k-val-label.txt', metavar='FILE', of_a_rank=True)
    add('--nb-classes', type=integer(1), help='default: the largest label + 1, or what the checkpoint has under --eval')


def add_token_augmentation_flags(parser: Parser) -> Callable:
    """Token-EDA, crop, noise and ColorAdapt. Returns the group's add."""
    add = parser.add_group('augmentation')
    add('--eda-rc-prob', type=SHARE, default=0.25, help='share of images with synonym replacement')
    add('--token-synonym-thres', type=integer(1), default=5, help='how many of each synonym list are used')
    add('--replace-token-prob', type=SHARE, default=0.25, help='of each code in such an image')
    add('--eda-sc-prob', type=SHARE, default=0.25, help='share of images with two patches swapped')
    add('--swap-token-scale', type=SHARE, default=0.25, help="largest side of a patch, as a part of the grid's")
    add('--rrc-ratio', type=SHARE, default=0.08, help='smallest area of the random-resized crop')
    add('--token-noise-prob', type=SHARE, default=0.5, help='part of each batch that gets embedding noise')
    add('--token-coloradapt-prob', type=SHARE, default=0., help='chance that half of a batch is ColorAdapted')
    add('--token-noise-scale', type=number(0), default=1., help='deviation of the noise a channel shares')
    add('--token-noise-std', type=number(0), default=1., help='deviation of the noise of each element')
    return add


def add_model_flags(parser: Parser, default: str, names: str) -> None:
    """The model, of those that `names` tells, its regularization and its average."""
    add = parser.add_group('model')
    add('--model', default=default, help=names)
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help="timm's arguments of the model, as in depth=4 embed_dim=128 num_heads=4")
    add('--drop', type=SHARE, default=0., help='dropout rate')
    add('--drop-path', type=SHARE, default=0.1, help='stochastic depth rate')
    add_average_flags(add)
    add('--finetune', default='', metavar='FILE', of_a_rank=True,
        help='start from these weights (a path, or an https address, which may end in #sha256=HEX)')
    add('--attn-only', action='store_true', help='train only attention, head and position embeddings')


def add_average_flags(add: Callable) -> None:
    """The average of the weights, and memory for time, added by a group's add."""
    add('--model-ema', action=ON_OFF, default=True, help='keep and evaluate an average of the weights')
    add('--model-ema-decay', type=SHARE, default=0.99996)
    add('--model-ema-force-cpu', action='store_true', help='keep the average in host memory')
    add('--grad-checkpointing', action='store_true', help='recompute activations: less memory, more time')


def add_optimization_flags(parser: Parser) -> None:
    """Batch, optimizer, schedule, precision, classification loss."""
    add = add_step_flags(parser)
    add('--smoothing', type=SHARE, default=0.1, help='label smoothing')
    add('--bce-loss', action='store_true', help='binary cross-entropy; needs --smoothing 0 and CutMix or Mixup')


def add_step_flags(parser: Parser) -> Callable:
    """Batch, optimizer, schedule, precision. Returns the group's add."""
    add = parser.add_group('optimization')
    add('--batch-size', type=integer(1), default=64, help='per process', exact=True)
    add('--accum-iter', type=integer(1), default=1, metavar='N',
        exact=True,
        help='batches whose gradients make one step; counts towards the batch the learning rate is scaled by')
    add('--epochs', type=integer(1), default=300)
    add('--opt', default='adamw', help="timm's optimizers")
    add('--opt-eps', type=number(0), default=1e-8)
    add('--opt-betas', type=number(0, 1), nargs=2, help="default: the optimizer's own")
    add('--clip-grad', type=POSITIVE, help='largest gradient norm')
    add('--momentum', type=number(0), default=0.9)
    add('--weight-decay', type=number(0), default=0.1)
    add('--sched', default='cosine', choices=['cosine', 'tanh', 'step', 'poly'])
    add('--lr', type=number(0), default=7.5e-4, help='for a batch of 512 over all processes')
    add('--unscale-lr', action='store_true', help='take --lr as it is, whatever the batch')
    add('--lr-noise', type=number(), nargs='+', metavar='PCT', help='parts of all epochs between which lr is noisy')
    add('--lr-noise-pct', type=number(1e-3), default=0.67, help='largest change of lr, as a part of it')
    add('--lr-noise-std', type=number(), default=1.)
    add('--warmup-lr', type=number(0), default=1e-6)
    add('--min-lr', type=number(0), default=1e-5)
    add('--decay-epochs', type=POSITIVE, default=30, help='step schedule')
    add('--warmup-epochs', type=integer(), default=5)
    add('--decay-rate', '--dr', type=number(0), default=0.1, help='step schedule; the power of poly')
    add_precision_flags(add)
    return add


def add_precision_flags(add: Callable) -> None:
    """Precision and compiling, added by a group's add."""
    add('--amp', choices=['bf16', 'fp16', 'off'], help='mixed precision (default: fp16 on CUDA, off on CPU)')
    add('--tf32', action='store_true', help='TF32 for what stays in float32 (CUDA)')
    add('--compile', action='store_true', help='torch.compile the model')


def add_mixing_flags(parser: Parser) -> None:
    """Mixup and CutMix."""
    add = parser.add_group('mixing')
    add('--mixup', type=number(0), default=0., help='Mixup alpha')
    add('--cutmix', type=number(0), default=1., help='CutMix alpha')
    add('--cutmix-minmax', type=SHARE, nargs=2, help='CutMix side range; overrides alpha')
    add('--mixup-prob', type=SHARE, default=1., help='of mixing a batch at all')
    add('--mixup-switch-prob', type=SHARE, default=0.5, help='of CutMix where both are on')
    add('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'])


def add_run_flags(parser: Parser) -> None:
    """Output, resuming, device, processes, evaluation."""
    add = add_output_flags(parser)
    add('--start-epoch', type=integer(), default=0)
    add('--eval', action='store_true', help='only evaluate --resume', of_a_start=True)
    add('--dist-eval', action='store_true', help='share the validation images over the ranks, each on exactly one')
    add('--no-eval', action='store_true', help='train without evaluating')


def add_output_flags(parser: Parser) -> Callable:
    """Output, resuming, device, processes. Returns the group's add."""
    add = parser.add_group('run')
    add('--output-dir', default='', metavar='DIR', of_a_rank=True, of_a_start=True,
        help="checkpoints and log.txt; '' saves nothing")
    add('--resume', default='', metavar='FILE', of_a_rank=True, of_a_start=True,
        help="resume from a checkpoint (a path, or an https address, which may end in #sha256=HEX), or 'auto' for "
             'the newest in --output-dir')
    add('--allow-inexact-resume', action='store_true', of_a_start=True,
        help='resume although processes, batch or seed are others')
    add('--save-every', type=save_interval, metavar='N', help='a checkpoint every N steps, or Nm minutes, too')
    add('--on-nan', default='stop', choices=['stop', 'skip'], help='what to do about a loss that is not finite')
    add('--deterministic', action='store_true', help='deterministic algorithms on CUDA, for resuming bit by bit')
    add('--device', default='auto', help='auto (CUDA where there is one), cuda, cuda:N or cpu')
    add('--seed', type=SEED, default=0, exact=True)
    add('--tensorboard', action='store_true', help='write scalars to --output-dir (needs the tensorboard package)')
    add('--dist-url', default='env://', help="torch.distributed's init method", of_a_rank=True)
    add('--dist-timeout', type=number(1e-3, 1e6), default=10, metavar='MINUTES',
        help='a process that waits so long for another ends: a host was cut off')
    return add


def save_interval(text: str) -> tuple[float, str]:
    """'500' -> (500, 'steps'); '30m' -> (30.0, 'minutes')."""
    if text.endswith('m'):
        return POSITIVE(text[:-1]), 'minutes'
    return integer(1)(text), 'steps'


def add_image_flags(parser: Parser) -> Callable:
    """The images, those held out, and how they are read. Returns the group's add."""
    add = parser.add_group('data')
    add('--data-path', required=True, metavar='PATH', of_a_rank=True,
        help='class folders of images, a list file .txt, tar shards or parquet files: see image_data/sources.py')
    add('--val-path', default='', metavar='PATH', of_a_rank=True, help='held-out images; default: some of --data-path')
    add('--val-images', type=integer(1), metavar='N', exact=True,
        help='images held out, drawn at random; default: a tenth of them, 1,000 at most')
    add('--epoch-images', type=integer(1), metavar='N', exact=True,
        help='images of an epoch, drawn at random; default: all')
    add('--image-size', type=integer(1), default=256, help='images are resized to this, both sides')
    add('--num-workers', type=integer(), default=cores(), metavar='N', help='processes that decode images, per rank')
    add('--skip-bad-images', action='store_true', help='leave unreadable images out, instead of stopping at one')
    add('--max-image-pixels', type=integer(1), metavar='N', help="images with more are refused; default: PIL's limit")
    return add
