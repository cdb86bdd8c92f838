"""The command line: one parser for all programs, and types that state what a flag may be."""
import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from utils import InputError, print0


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, `-` and `_` alike in flags, no abbreviations, and InputErrors."""

    def __init__(self, description: str = '', **kwargs: Any):
        kwargs.setdefault('formatter_class', argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **kwargs)

    def add_no_effect(self, reasons: dict[str, str], switches: Sequence[str] = ()) -> None:
        """Accept flags that change nothing, because published commands hold them.

        Args:
            reasons: flag -> why it changes nothing.
            switches: those of them that take no value.
        """
        group = self.add_argument_group('accepted, without effect')
        for flag, why in reasons.items():
            group.add_argument(flag, help=why, **({'action': 'store_true'} if flag in switches else {}))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple:
        argv = list(sys.argv[1:] if args is None else args)
        end = argv.index('--') if '--' in argv else len(argv)  # what follows are no flags
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


SEED = integer(0, 2 ** 63 - 1)  # what torch takes


def byte_count(text: str) -> int:
    """An argparse type: a number of bytes, as in '250000' or '2.5e5'."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < 1 << 50 or value != int(value):
        raise argparse.ArgumentTypeError(f'{text}: give a whole number of bytes, as in 1000000 or 1e6')
    return int(value)
