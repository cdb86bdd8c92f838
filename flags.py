"""The command line: one parser for all programs, types that check a value, and the groups that programs share.

A program makes a `Parser`, calls the `add_*_flags` functions for the groups that it needs, and adds flags of its own.
Values are checked while they are parsed, so that a mistake ends the program before it has touched a file. Begin with
`Parser.add_group`: there a flag also says whether all ranks, and a resumed run, must have the same value.
"""
import argparse
import difflib
import math
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from timm.utils import ParseKwargs

from utils import InputError, cores, print0


class Rules(NamedTuple):
    """Names of the flags to which a rule of `Parser.add_group` applies."""
    of_a_rank: set[str]
    of_a_start: set[str]
    exact: set[str]
    of_the_model: set[str]


class Flags(argparse.Namespace):
    """A parsed command line, the rules of its flags, and the names of those that were given on it."""
    __slots__ = ('rules', 'given')  # slots are no part of `vars`: checkpoints and args.json hold the flags alone

    def __init__(self, rules: Rules, given: frozenset[str] = frozenset(), **values: Any):
        super().__init__(**values)
        self.rules = rules
        self.given = given

    def replaced(self, **values: Any) -> 'Flags':
        """A copy with other values, or with more."""
        return Flags(self.rules, self.given, **(vars(self) | values))

    def joined(self, other: 'Flags') -> 'Flags':
        """A copy with the flags of another parser too; of a flag that both have, the other's value counts."""
        rules = Rules(*(first | second for first, second in zip(self.rules, other.rules)))
        return Flags(rules, self.given | other.given, **(vars(self) | vars(other)))


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, `-` and `_` alike in flags, no abbreviations, and InputErrors.

    Args:
        description: only its first line is shown, so that a module's docstring will do; python -OO makes it None.
    """

    def __init__(self, description: str | None = None, **kwargs: Any):
        kwargs.setdefault('formatter_class', argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(description=(description or '').partition('\n')[0], allow_abbrev=False, **kwargs)
        self.rules = Rules(set(), set(), set(), set())
        self.no_effect = {}  # flag -> why it changes nothing
        self.given = []  # the words of the command line, for `error`

    def add_group(self, title: str) -> Callable:
        """Begin a group of flags. Returns its add_argument, which takes four more options:

            of_a_rank=True     ranks may have different values, as for paths of a node; without it all must agree
            of_a_start=True    belongs to one start of a run and not to the run: a resumed run changes it in silence;
                               without it a printed line names the change
            exact=True         another value would give a resumed run other batches or augmentation: it is refused
            of_the_model=True  another value makes another model of the same weights: an evaluation prints a line
        """
        group = self.add_argument_group(title)

        def add(*names: str, of_a_rank: bool = False, of_a_start: bool = False, exact: bool = False,
                of_the_model: bool = False, **options: Any) -> None:
            flag = group.add_argument(*names, **options).dest
            for rule, on in ((self.rules.of_a_rank, of_a_rank), (self.rules.of_a_start, of_a_start),
                             (self.rules.exact, exact), (self.rules.of_the_model, of_the_model)):
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
        self.no_effect |= reasons

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple:
        argv = list(sys.argv[1:] if args is None else args)
        end = argv.index('--') if '--' in argv else len(argv)  # behind '--' no argument is a flag
        self.given = [*map(_with_dashes, argv[:end])]
        words = [*self.given, *argv[end:]]
        if namespace is None:
            probe = _Given(self)
            super().parse_known_args(words, probe)
            namespace = Flags(self.rules, frozenset(probe.__dict__.pop('_given')))
        return super().parse_known_args(words, namespace)

    def format_help(self) -> str:
        for action in self._actions:
            if not action.help and action.default not in (None, argparse.SUPPRESS):
                action.help = 'default: %(default)s'  # argparse shows a default only behind a text
        return super().format_help()

    def flags(self) -> set[str]:
        """The names of all flags."""
        return set(self._option_string_actions)

    def error(self, message: str) -> None:
        # A flag that is missing may be the one that was given by another program's name.
        if message.startswith(('unrecognized arguments', 'the following arguments are required')):
            message += ''.join(f'; {line}' for line in advice(self.given, self.flags(), self.no_effect))
        raise InputError(f'{message}; see {self.prog} --help')


class _Given(argparse.Namespace):
    """A namespace that holds all defaults of a parser already, and notes in `_given` which flags are set."""

    def __init__(self, parser: Parser):
        defaults = {action.dest: action.default for action in parser._actions} | parser._defaults
        # argparse converts a default that is a text, and knows it by its identity: so these are copies
        self.__dict__.update({name: _Text(value) if isinstance(value, str) else value
                              for name, value in defaults.items()}, _given=set())

    def __setattr__(self, name: str, value: Any) -> None:
        self._given.add(name)
        super().__setattr__(name, value)


class _Text(str):
    pass


def add_max_pixels(add: Callable) -> None:
    """--max-image-pixels, by a parser's add_argument."""
    add('--max-image-pixels', type=integer(1), metavar='N',
        help="images of more pixels count as unreadable (default: PIL's limit, 178,956,970)")


def add_exif_rotate(add: Callable, **rules: bool) -> None:
    """--exif-rotate, by a parser's add_argument, or a group's add with its rules."""
    add('--exif-rotate', action='store_true', **rules,
        help='turn images as their EXIF orientation says; without it they are read as they are stored')


def add_allow_torchscript(add: Callable, **rules: bool) -> None:
    """--allow-torchscript, by a parser's add_argument, or a group's add with its rules."""
    add('--allow-torchscript', action='store_true', **rules,
        help='take a tokenizer that is a TorchScript program (encoder.jit), and run it')


def _with_dashes(argument: str) -> str:
    # only the name: an underscore in a value is the user's, as in --output-dir=my_run
    flag, equals, value = argument.partition('=')
    return flag.replace('_', '-') + equals + value if flag.startswith('--') else argument


def print_no_effect(reasons: dict[str, str], flags: dict[str, Any]) -> None:
    """Print a line for each flag of `reasons` (flag -> why it changes nothing) that was given."""
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
FRACTION = number(0, 1)
POSITIVE = number(1e-12)  # `number` has no open bounds, so this stands for 'above 0'
SEED = integer(0, 2 ** 63 - 1)  # torch's generators take no more
SYNONYMS = 'tokens/synonyms.json'
DEVICE_HELP = 'auto (CUDA where there is a GPU), cuda, cuda:N, cpu, or another accelerator of torch, such as mps'


def byte_count(text: str) -> int:
    """An argparse type: a number of bytes, as in '250000' or '2.5e5'."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < 1 << 50 or value != int(value):
        raise argparse.ArgumentTypeError(f'{text}: give a whole number of bytes, as in 1000000 or 1e6')
    return int(value)


def views(text: str) -> tuple[int, int]:
    """An argparse type: '2' -> (2, 1), pairs of rows; '2:128' -> (2, 128), see token_files/views.py."""
    parts = text.split(':')
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f'{text}: give a number, or two as in 2:128')
    count, batch = integer(1, 1000)(parts[0]), integer(1, 10 ** 6)(parts[-1]) if len(parts) == 2 else 1
    return count, batch


class KeyValues(ParseKwargs):
    """timm's KEY=VALUE arguments; a value of another form is an error, where timm would end in a traceback."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[str],
                 option_string: str | None = None) -> None:
        wrong = [value for value in values if '=' not in value]
        if wrong:
            parser.error(f'argument {option_string}: {wrong[0]!r} is not of the form key=value')
        super().__call__(parser, namespace, values, option_string)


# ---------------------------------------------------------------- flags of other programs

class Elsewhere(NamedTuple):
    """What a flag of DeiT, MAE or timm is here.

    Attributes:
        here: flags that do it; the first that a program has is named.
        how: the advice, with {} for that flag.
        otherwise: the advice of a program that has none of them; '' for none.
    """
    here: Sequence[str] = ()
    how: str = 'here it is {}'
    otherwise: str = ''


DATA = ['--train-token-file', '--train-path', '--data-path', '--token-file']
DATA_IS = Elsewhere(DATA)
SET = Elsewhere(DATA, 'a set is named by its path, {}')
WEIGHTS = Elsewhere(['--finetune', '--model-path', '--checkpoint'], otherwise='weights are read from files alone')
OF_A_LAUNCHER = Elsewhere(otherwise='the launcher (torchrun, srun) sets it')
NODES = Elsewhere(otherwise='the launcher (torchrun, srun) starts processes and nodes')
BATCH_NORM = Elsewhere(otherwise="each rank has its own BatchNorm statistics, and rank 0's are evaluated and saved")
RESCALED = Elsewhere(['--unscale-lr'], 'the learning rate is for 512 images a step; {} takes it as it is')
NO_TEACHER = Elsewhere(otherwise='no distillation is done here')
NORMALIZED = Elsewhere(otherwise="pixels are normalized by ImageNet's mean and deviation")
BICUBIC = Elsewhere(otherwise='images are resized bicubically')
AMP = Elsewhere(['--amp'], 'here {} takes the type', 'all is computed in float32')
OF_PIXELS = Elsewhere(['--tokenadapt-path'], 'tokens are no pixels; {} gives them augmentations like those of pixels')

# Flags of main.py of DeiT, main_pretrain.py and main_finetune.py of MAE, train.py and validate.py of timm, and frequent
# spellings of others. A program's own flags come first: this is asked for those that it does not know.
ELSEWHERE = {
    # data
    '--data-path': DATA_IS, '--data-dir': DATA_IS, '--data': DATA_IS, '--train-dir': DATA_IS,
    '--val-dir': Elsewhere(['--val-token-file', '--val-path']),
    '--data-set': SET, '--dataset': SET, '--inat-category': SET, '--split': SET, '--train-split': SET,
    '--val-split': Elsewhere(['--val-token-file', '--val-path'], 'a split is named by its path, {}'),
    '--num-classes': Elsewhere(['--nb-classes']),
    '--workers': Elsewhere(['--num-workers'], otherwise='no other processes read its data'),
    '-j': Elsewhere(['--num-workers'], otherwise='no other processes read its data'),
    '--img-size': Elsewhere(['--input-size', '--image-size', '--tokenizer-input-size']),
    '--crop-pct': Elsewhere(['--eval-crop-ratio']),
    '--mean': NORMALIZED, '--std': NORMALIZED, '--interpolation': BICUBIC, '--train-interpolation': BICUBIC,
    '-b': Elsewhere(['--batch-size']),
    '--validation-batch-size': Elsewhere(['--batch-size'], 'evaluation takes one and a half times {}'),
    # model and weights
    '--arch': Elsewhere(['--model']), '-a': Elsewhere(['--model']),
    '--pretrained': Elsewhere(['--finetune', '--model-path', '--checkpoint'],
                              'no weights are downloaded by name; start from those of a file by {} FILE',
                              'no weights are downloaded by name'),
    '--pretrained-path': WEIGHTS, '--initial-checkpoint': WEIGHTS,
    '--checkpoint': Elsewhere(['--model-path', '--resume']),
    '--no-resume-opt': Elsewhere(['--finetune'], '{} starts from the weights alone'),
    '--auto-resume': Elsewhere(['--resume'], 'here it is {} auto'),
    '--drop-rate': Elsewhere(['--drop']),
    '--use-ema': Elsewhere(['--model-ema'], 'here it is {}, which evaluates the average too'),
    '--ema': Elsewhere(['--model-ema', '--use-ema']), '--ema-decay': Elsewhere(['--model-ema-decay']),
    '--torchcompile': Elsewhere(['--compile']),
    '--teacher-model': NO_TEACHER, '--teacher-path': NO_TEACHER, '--distillation-type': NO_TEACHER,
    '--distillation-alpha': NO_TEACHER, '--distillation-tau': NO_TEACHER,
    '--mask-ratio': Elsewhere(['--mask-ratio-mu'], 'the ratio is drawn, and {} is the mean of what is drawn from'),
    '--norm-pix-loss': Elsewhere(otherwise='codes are predicted, and not pixels'),
    # optimization
    '--learning-rate': Elsewhere(['--lr']), '--wd': Elsewhere(['--weight-decay']),
    '--blr': Elsewhere(['--lr'], 'here it is {}, for 512 images a step, and scaled with them'),
    '--lr-base': Elsewhere(['--blr', '--lr'], 'here it is {}, which is scaled with the batch'),
    '--lr-base-size': RESCALED, '--lr-base-scale': RESCALED,
    '--grad-accum-steps': Elsewhere(['--accum-iter']), '--update-freq': Elsewhere(['--accum-iter']),
    '--warmup-steps': Elsewhere(['--warmup-epochs'], 'here it is {}, in epochs'),
    '--amp-dtype': AMP, '--native-amp': AMP, '--apex-amp': AMP, '--amp-impl': AMP, '--fp16': AMP, '--bf16': AMP,
    '--sync-bn': BATCH_NORM, '--dist-bn': BATCH_NORM, '--split-bn': BATCH_NORM,
    # augmentation
    '--aug-repeats': Elsewhere(['--repeated-aug'], 'here it is {}, three times'),
    '--scale': Elsewhere(['--rrc-ratio'], 'here it is {}, the smallest area'),
    '--reprob': Elsewhere(['--eda-erase-prob']),
    '--color-jitter': Elsewhere(['--token-coloradapt-prob'], 'codes have no colors to change; {} changes embeddings'),
    '--hflip': OF_PIXELS, '--aa': OF_PIXELS,
    # output
    '--experiment': Elsewhere(['--output-dir'], 'here it is {}, the folder itself'),
    '--save-dir': Elsewhere(['--output-dir']), '--outdir': Elsewhere(['--output-dir']),
    '--log-dir': Elsewhere(['--tensorboard'], 'here it is {}, which writes to the output folder'),
    '--log-wandb': Elsewhere(['--wandb']), '--use-wandb': Elsewhere(['--wandb']),
    '--wandb-project': Elsewhere(['--wandb'], 'here it is {} PROJECT'),
    '--wandb-resume-id': Elsewhere(['--wandb'], 'with {} a resumed run is one run there, too'),
    '--results-file': Elsewhere(['--output', '--output-dir']),
    '--checkpoint-hist': Elsewhere(['--save-periods'], otherwise='a training keeps its newest two checkpoints'),
    '--save-freq': Elsewhere(['--save-periods', '--save-every'], 'each epoch is saved; see {}'),
    '--recovery-interval': Elsewhere(['--save-every']),
    '--log-interval': Elsewhere(otherwise='the loss is shown every 50 steps'),
    '--print-freq': Elsewhere(otherwise='the loss is shown every 50 steps'),
    '--eval-freq': Elsewhere(otherwise='a training evaluates each epoch'),
    '--eval-every': Elsewhere(['--eval-freq'], otherwise='a training evaluates each epoch'),
    '--evaluate': Elsewhere(['--eval']), '--eval-only': Elsewhere(['--eval']),
    # processes
    '--gpu': Elsewhere(['--device'], 'here it is {}, as in cuda:1'),
    '--ngpus': Elsewhere(['--gpus'], otherwise=NODES.otherwise),
    '--gpus': NODES, '--nodes': NODES, '--num-gpu': NODES, '--distributed': NODES, '--dist-on-itp': NODES,
    '--multiprocessing-distributed': NODES,
    '--world-size': OF_A_LAUNCHER, '--rank': OF_A_LAUNCHER, '--dist-backend': OF_A_LAUNCHER,
    # torch.distributed.launch passes it, where torchrun sets a variable
    '--local-rank': Elsewhere(otherwise='start with torchrun, which sets LOCAL_RANK instead'),
    '--timeout': Elsewhere(['--hours', '--dist-timeout']), '--use-volta32': Elsewhere(['--constraint']),
}


def advice(given: Sequence[str], known: Collection[str], no_effect: dict[str, str] | None = None) -> list[str]:
    """What to write instead of the flags that a program does not know, a line for each that has an answer.

    Args:
        given: words of its command line, with dashes in flags.
        known: its flags, the only ones that are named.
        no_effect: those of them that change nothing -> why; this is said, and they are not named.
    """
    no_effect = no_effect or {}
    useful = set(known) - no_effect.keys()
    lines = []
    for flag in dict.fromkeys(word.partition('=')[0] for word in given if word.startswith('-')):
        if flag in known or ' ' in flag or flag.strip('-.0123456789e') == '':  # a negative number is a value
            continue
        row = ELSEWHERE.get(flag, Elsewhere())
        name = next((name for name in row.here if name in useful), None)
        # argparse takes no beginnings of names, so that a new flag never changes what a command means
        near = (sorted(name for name in useful if name.startswith(flag))
                or difflib.get_close_matches(flag, sorted(useful), 1, 0.75))[:2]
        why = next((no_effect[name] for name in row.here if name in no_effect), row.otherwise)
        if name:
            lines.append(f'{flag}: {row.how.format(name)}')
        elif why:
            lines.append(f'{flag}: {why}')
        elif near and len(flag) > 4 and flag not in ELSEWHERE:  # --d is near to anything
            lines.append(f'{flag}: did you mean {" or ".join(near)}?')
    return lines


# ---------------------------------------------------------------- groups that programs share

def add_token_flags(parser: Parser) -> Callable:
    """The training tokens, their codebook, and how they are read. Returns the group's add."""
    add = parser.add_group('data')
    add('--train-token-file', default='tokens/imagenet1k-train-token.data.bin.gz', metavar='FILE', of_a_rank=True,
        help='training tokens: a file, a glob or a comma-separated list of shards; also .safetensors, .npy, .npz, '
        '.parquet, .jsonl and folders of .npy of other projects (docs/token_format.md)')
    add('--codebook-path', default='tokens/codebook.ckpt', metavar='FILE', of_a_rank=True,
        help='the codebook of the tokens: one embedding for each code, in a file; or weights of another VQ tokenizer, '
        'or fsq:8,8,8,5,5,5 or lfq:10 (docs/tokenizers.md)')
    add('--token-synonym-dict', default=SYNONYMS, metavar='FILE', of_a_rank=True,
        help='for each code a list of codes near it; it is read where --eda-rc-prob is above 0; where it is not given, '
        'and the default is not there or the codebook is of another project, synonyms are made from the codebook')
    add('--token-cache', default='', metavar='DIR', of_a_rank=True,
        help="where decoded tokens are kept: in a folder, '' for beside the token file, 'none' for in memory only")
    add('--views', type=views, exact=True, metavar='V[:B]',
        help='each image is in --train-token-file V times, and each epoch draws one of them: V rows that follow each '
        'other, or with V:B batches of B images, first all in their first view, then all in the next (default: as the '
        'files say)')
    add('--val-share', type=number(0, 0.9), default=0., exact=True,
        help='hold this share of the images of --train-token-file out of training, always the same ones; validation '
        'is on them')
    add('--data-device', default='auto', choices=['auto', 'cpu', 'cuda'],
        help='where tokens stay while training: cuda, all on the GPU; cpu, in the memory map on disk; auto, on the GPU '
        'if they take at most a quarter of its free memory')
    add('--pin-mem', action=ON_OFF, default=True,
        help='copy batches to the GPU from page-locked memory, which is faster')
    add('--input-size', type=integer(2), default=224, of_the_model=True,
        help='side of what the model reads, in pixels of the image; with 8 pixels a code, 224 are 28 codes')
    add('--token-patch-size', type=integer(1), default=8, of_the_model=True,
        help='side of the square of pixels that one code stands for')
    return add


def add_token_label_flags(add: Callable) -> None:
    """Labels and the validation set, added by a group's add."""
    add('--train-label-file', default='tokens/imagenet1k-train-label.txt', metavar='FILE', of_a_rank=True,
        help='labels of the training tokens: one file for each token file, in the same order; where it is not given, '
        "files of other projects have their own labels, as with ''")
    add('--val-token-file', default='tokens/imagenet1k-val-token.data.bin.gz', metavar='FILE', of_a_rank=True,
        help='validation tokens, given as those of training')
    add('--val-label-file', default='tokens/imagenet1k-val-label.txt', metavar='FILE', of_a_rank=True,
        help='labels of the validation tokens, likewise')
    add('--nb-classes', type=integer(1),
        help='number of classes (default: the largest label + 1; with --eval as many as the checkpoint has)')


def add_token_augmentation_flags(parser: Parser) -> Callable:
    """Token-EDA, crop, noise and ColorAdapt. Returns the group's add."""
    add = parser.add_group('augmentation')
    add('--eda-rc-prob', type=FRACTION, default=0.25, help='fraction of images in which codes are replaced by synonyms')
    add('--token-synonym-thres', type=integer(1), default=5,
        help='how many synonyms of a code may replace it: the nearest so many')
    add('--replace-token-prob', type=FRACTION, default=0.25,
        help='chance of each code of such an image to be replaced by a synonym')
    add('--eda-sc-prob', type=FRACTION, default=0.25, help='fraction of images in which two patches swap places')
    add('--swap-token-scale', type=FRACTION, default=0.25,
        help="largest side of a swapped patch, as a fraction of the grid's side")
    add('--rrc-ratio', type=FRACTION, default=0.08,
        help='smallest area of a random-resized crop, as a fraction of the whole')
    add('--token-noise-prob', type=FRACTION, default=0.5,
        help='how often embeddings get noise: in SeiT the fraction of images of each batch, in SeiT++ the chance of a '
        'batch that half of its images get it')
    add('--token-coloradapt-prob', type=FRACTION, default=0.,
        help='chance of a batch that half of its images are ColorAdapted: each gets the mean and deviation of every '
        'channel of another image')
    add('--token-noise-scale', type=number(0), default=1.,
        help='standard deviation of the noise that all codes of an image have in common, drawn for each channel')
    add('--token-noise-std', type=number(0), default=1.,
        help='standard deviation of the noise drawn for each element alone')
    return add


def add_model_flags(parser: Parser, default: str, names: str) -> Callable:
    """The model, its regularization and its EMA. `names` is the help text of --model: which models there are.

    Returns the group's add.
    """
    add = parser.add_group('model')
    add('--recipe', default='published', choices=['published', 'small'], exact=True,
        help='published: the defaults of all flags, for 300 epochs of ImageNet; small: for hundreds to tens of '
        'thousands of images, flags that are not given are set from the number of images: model, epochs, batch, '
        'learning rate, warm-up, noise, drop-path, crop, mixing, EMA (docs/flags.md)')
    add('--model', default=default, help=names, of_the_model=True)
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', of_the_model=True,
        help='arguments that timm passes to the model, as in depth=4 embed_dim=128 num_heads=4')
    add('--drop', type=FRACTION, default=0., help='dropout rate')
    add('--drop-path', type=FRACTION, default=0.1,
        help='rate of stochastic depth: the chance of an image to skip the last block')
    add_average_flags(add)
    add('--finetune', default='', metavar='FILE', of_a_rank=True,
        help='start from the weights of this checkpoint (a path, or an https or hf:// address, which may end in '
        '#sha256=HEX)')
    add('--attn-only', action='store_true', help='train only attention, head and position embeddings')
    return add


def add_stem(add: Callable, stems: Sequence[str], **rules: bool) -> None:
    """How models that are no ViT read tokens, added by a parser's add_argument, or a group's add with its rules."""
    add('--stem', choices=stems, **rules,
        help='for models of timm that are no ViT: native upsamples codes to the grids that pixels would give the '
        'model, fast to half of that on a side, for a quarter of the compute (default: fast)')


def add_average_flags(add: Callable) -> None:
    """The EMA of the weights, and gradient checkpointing, added by a group's add."""
    add('--model-ema', action=ON_OFF, default=True,
        help='keep a moving average (EMA) of the weights, and evaluate it too')
    add('--model-ema-decay', type=FRACTION, default=0.99996, help='fraction of the EMA that each step keeps')
    add('--model-ema-force-cpu', action='store_true', help="keep the EMA in host memory, to spare the GPU's")
    add('--grad-checkpointing', action='store_true',
        help='recompute activations in the backward pass: less memory, more time')


def add_optimization_flags(parser: Parser) -> None:
    """The flags of `add_step_flags`, and of a classification loss."""
    add = add_step_flags(parser)
    add('--smoothing', type=FRACTION, default=0.1,
        help='label smoothing: how much of each target goes to all classes alike')
    add('--bce-loss', action='store_true',
        help='binary cross-entropy of each class; needs --smoothing 0 and CutMix or Mixup')


def add_step_flags(parser: Parser) -> Callable:
    """Batch, optimizer, schedule, precision. Returns the group's add."""
    add = parser.add_group('optimization')
    add('--batch-size', type=integer(1), default=64, help='images of a batch of one process', exact=True)
    add('--accum-iter', type=integer(1), default=1, metavar='N',
        exact=True,
        help='batches whose gradients make one step of the optimizer; the learning rate is scaled for all their '
        'images')
    add('--epochs', type=integer(1), default=300, help='how many epochs are trained')
    add('--opt', default='adamw', help='the optimizer, by its name in timm')
    add('--opt-eps', type=number(0), default=1e-8, help="the optimizer's epsilon; SGD has none")
    add('--opt-betas', type=number(0, 1), nargs=2, help="the optimizer's two betas (default: as timm has them)")
    add('--clip-grad', type=POSITIVE, help='scale larger gradients down to this norm (default: no limit)')
    add('--momentum', type=number(0), default=0.9, help='momentum of SGD')
    add('--weight-decay', type=number(0), default=0.1, help='weight decay; biases and norms have none')
    add('--sched', default='cosine', choices=['cosine', 'tanh', 'step', 'poly'],
        help='how the learning rate falls; it changes once an epoch, or as --sched-on-updates says')
    add('--sched-on-updates', action='store_true',
        help='change the learning rate with every step; by epochs, as published, it lags by one, and a run of few '
        'epochs ends with a high one')
    add('--lr', type=number(0), default=7.5e-4,
        help='learning rate for 512 images a step over all processes; it is scaled in proportion to the images')
    add('--unscale-lr', action='store_true', help='take --lr as it is, whatever the size of the batch')
    add('--lr-noise', type=number(), nargs='+', metavar='PCT',
        help='add noise to the learning rate, from the first to the second of these fractions of all epochs')
    add('--lr-noise-pct', type=number(1e-3), default=0.67,
        help='largest change by this noise, as a fraction of the learning rate')
    add('--lr-noise-std', type=number(), default=1., help='standard deviation of this noise')
    add('--warmup-lr', type=number(0), default=1e-6,
        help='learning rate that the warm-up begins with; it is not scaled with the batch')
    add('--min-lr', type=number(0), default=1e-5,
        help='learning rate at the end of the schedule; it is not scaled with the batch')
    add('--decay-epochs', type=POSITIVE, default=30, help='epochs between two steps of --sched step')
    add('--warmup-epochs', type=integer(), default=5, help='epochs in which the learning rate rises')
    add('--decay-rate', '--dr', type=number(0), default=0.1,
        help='factor of each step of --sched step, or power of --sched poly')
    add_precision_flags(add)
    return add


def add_precision_flags(add: Callable) -> None:
    """Precision and compiling, added by a group's add."""
    add('--amp', choices=['bf16', 'fp16', 'off'], help='mixed precision (default: fp16 on CUDA, off on CPU)')
    add('--tf32', action='store_true', help='multiply float32 matrices in TF32 on CUDA: faster, less exact')
    add('--compile', action='store_true', help='compile the model by torch.compile')


def add_mixing_flags(parser: Parser) -> None:
    """Mixup and CutMix."""
    add = parser.add_group('mixing')
    add('--mixup', type=number(0), default=0., help="Mixup's alpha; 0 turns Mixup off")
    add('--cutmix', type=number(0), default=1., help="CutMix's alpha; 0 turns CutMix off")
    add('--cutmix-minmax', type=FRACTION, nargs=2,
        help="smallest and largest side of CutMix's box, as fractions of the image's side; used in place of --cutmix")
    add('--mixup-prob', type=FRACTION, default=1., help='chance of a batch to be mixed')
    add('--mixup-switch-prob', type=FRACTION, default=0.5, help='chance of CutMix where Mixup is on too')
    add('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'],
        help='whether the mixing is drawn for a whole batch, for each pair of images, or for each image')


def add_run_flags(parser: Parser) -> None:
    """Output, resuming, device, processes, evaluation."""
    add = add_output_flags(parser)
    add('--start-epoch', type=integer(), default=0, help='the first epoch, from 0; --resume sets it')
    add('--eval', action='store_true', help='evaluate the checkpoint of --resume, and train nothing',
        of_a_start=True)
    add('--output', default='', metavar='FILE.json', of_a_rank=True, of_a_start=True,
        help='with --eval: also write the numbers to this file')
    # all ranks must agree on it, as they count together
    add('--report', default='', metavar='DIR', of_a_start=True,
        help='with --eval: also write to this folder the accuracy of each class, the confusion matrix, and the '
        'mistakes that the model was surest of, as tables and pictures; needs matplotlib')
    add('--dist-eval', action='store_true',
        help='divide the validation images among the ranks; without it each evaluates all')
    add('--eval-freq', type=integer(1), metavar='N',
        help='evaluate after every N epochs, and after the last (default: after each)')
    add('--no-eval', action='store_true', help='train without evaluating, so that no validation set is read')


def add_output_flags(parser: Parser) -> Callable:
    """Output, resuming, device, processes. Returns the group's add."""
    add = parser.add_group('run')
    add('--output-dir', default='', metavar='DIR', of_a_rank=True, of_a_start=True,
        help="folder for checkpoints and log.txt; '' saves nothing")
    add('--resume', default='', metavar='FILE', of_a_rank=True, of_a_start=True,
        help='resume the run of a checkpoint (a path, or an https or hf:// address, which may end in #sha256=HEX); '
        "'auto' takes the newest in --output-dir")
    add('--allow-inexact-resume', action='store_true', of_a_start=True,
        help='resume although the number of processes, the batch or the seed differs from before')
    add('--save-every', type=save_interval, metavar='N',
        help='within an epoch, save a checkpoint every N steps, or every N minutes as in 30m')
    add('--on-nan', default='stop', choices=['stop', 'skip'],
        help='at a loss or gradient that is NaN or infinite: stop the run, or skip the step')
    add('--deterministic', action='store_true',
        help='use deterministic algorithms on CUDA, so that a resumed run is the same bit by bit')
    add('--device', default='auto', help=DEVICE_HELP)
    add('--seed', type=SEED, default=0, exact=True, help='seed of order, augmentation and initial weights')
    add('--tensorboard', action='store_true',
        help='also write the log for TensorBoard to --output-dir (needs the tensorboard package)')
    add('--wandb', nargs='?', const='seit', default='', metavar='PROJECT',
        help='also log to this project of Weights & Biases, seit where none is named (needs the wandb package)')
    add('--dist-url', default='env://', of_a_rank=True,
        help="where the processes meet: torch.distributed's init method")
    add('--dist-timeout', type=number(1e-3, 1e6), default=10, metavar='MINUTES',
        help='how long a process waits for another before it ends, as when a host was cut off')
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
    add('--val-path', default='', metavar='PATH', of_a_rank=True,
        help='held-out images (default: some of --data-path)')
    add('--val-images', type=integer(1), metavar='N', exact=True,
        help='how many images of --data-path are held out, drawn at random (default: a tenth of them, 1,000 at most)')
    add('--epoch-images', type=integer(1), metavar='N', exact=True,
        help='how many images an epoch has, drawn at random (default: all)')
    add('--image-size', type=integer(1), default=256, help='pixels to which both sides of an image are resized')
    add('--num-workers', type=integer(), default=cores(), metavar='N',
        help='processes that decode images, for each rank')
    add('--skip-bad-images', action='store_true', help='leave unreadable images out, instead of stopping at the first')
    add_max_pixels(add)
    add_exif_rotate(add, exact=True)
    return add


def add_fit_flags(add: Callable, options: Any) -> None:
    """What the programs share that fit a tokenizer on a CPU; the defaults are those of the class of their options."""
    add('--data-path', required=True, metavar='PATH',
        help='class folders of images, a list file .txt, tar shards or parquet files: see image_data/sources.py')
    add('--output-dir', required=True, metavar='DIR', help='folder for tokenizer.pt and codebook.ckpt')
    add('--image-size', type=integer(1), default=options.image_size,
        help='resize images to this many pixels on both sides')
    add('--codes', type=integer(2), default=options.codes, help='rows of the codebook')
    add('--iterations', type=integer(0), default=options.iterations, help='iterations of k-means')
    add('--seed', type=SEED, default=options.seed, help='seed of the draws and of k-means')
    add('--num-workers', type=integer(0), metavar='N', help='processes that decode images; default: as many as cores')
    add('--skip-bad-images', action='store_true', help='leave out unreadable images, instead of stopping at one')
    add_max_pixels(add)
    add_exif_rotate(add)


def classifier_options(flags: argparse.Namespace) -> dict[str, Any]:
    """The options of `inference.classifier.load_classifier` that a command line with these flags has."""
    names = ('use_ema', 'codebook_path', 'tokenizer_path', 'tokenizer_code_path', 'allow_torchscript',
             'tokenizer_input_size', 'model', 'model_kwargs', 'stem', 'input_size', 'eval_crop_ratio')
    return {name: getattr(flags, name) for name in names} | {'exif_rotate': flags.exif_rotate or None}


def add_classifier_flags(parser: Parser, stems: Sequence[str]) -> None:
    """A trained model, and what it needs: the options of inference/classifier.py. `stems` are as of `add_stem`."""
    add = parser.add_group('the model; what its checkpoint says need not be given')
    add('checkpoint', metavar='CHECKPOINT', help='a checkpoint, or the folder of a run, whose best one is taken')
    add('--use-ema', action='store_true', help="take the checkpoint's EMA of the weights")
    add('--codebook-path', default='', metavar='FILE', help='the codebook that the model was trained with')
    add('--tokenizer-path', default='', metavar='FILE', help='the tokenizer that made the training tokens')
    add('--tokenizer-code-path', metavar='DIR', help='folder of the code that a pickled tokenizer runs')
    add_allow_torchscript(add)
    add('--tokenizer-input-size', type=integer(1), metavar='N',
        help='pixels to which both sides of an image are resized for the tokenizer')
    add('--model', default='', help='name of the model')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='arguments of the model, as they were given in training')
    add_stem(add, stems)
    add('--input-size', type=integer(1), metavar='N',
        help='pixels on a side of what a model of images reads; of tokens, where the checkpoint does not say it, 8 to '
        'a code')
    add('--eval-crop-ratio', type=number(0.01, 1), metavar='R',
        help='images are resized to --input-size divided by this, and their middle is cropped')
    add_exif_rotate(add)
    add('--device', default='auto', help=DEVICE_HELP)
