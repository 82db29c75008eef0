"""The command line of every script: strict booleans, @file, one-line errors, defaults in --help."""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from engine.errors import is_first_of_machine

SWITCH_WORDS = {"true": True, "1": True, "false": False, "0": False}
LONGEST_NAME = 200  # bytes of a folder's: files beside it add to it, and 255 is what file systems take


class DefaultsInHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Appends a flag's default to its help, unless the help says it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if "default:" in (action.help or "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that takes no abbreviations, reads ``@file`` (flags with their values on a line,
    ``#`` comments) and reports an error in one line."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=DefaultsInHelp,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
        )

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return shlex.split(arg_line.removeprefix("\ufeff"), comments=True)  # a byte order mark
        except ValueError as error:
            self.error(f"in a file of flags, {error}: {arg_line.strip()}")

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        try:
            return super().parse_known_args(args, namespace)
        except UnicodeDecodeError as error:
            self.error(f"a file of flags is not UTF-8 text: {error}")
        except RecursionError:
            self.error("a file of flags names itself")

    def error(self, message: str):
        if is_first_of_machine():
            print(f"error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def switch(word: str) -> bool:
    """``True`` or ``False`` from one of `SWITCH_WORDS`, in any case; ``type=bool`` would read "False" as True."""
    if word.lower() not in SWITCH_WORDS:
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return SWITCH_WORDS[word.lower()]


def add_switch(group: argparse._ActionsContainer, flag: str, default: bool | None, help: str) -> None:
    """``--flag``, ``--flag True``, ``--flag false``, ``--flag 0``."""
    group.add_argument(flag, type=switch, nargs="?", const=True, default=default, metavar="BOOL", help=help)


def given_path(word: str) -> Path:
    """A path; an empty word, which pathlib takes for the current folder, is a variable that was not set."""
    if not word:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(word)


def plain_name(word: str) -> str:
    """A name for a folder, without a path; "" is none."""
    if Path(word).name != word or word == "..":
        raise argparse.ArgumentTypeError(f"{word!r} is no plain name; --root_model says where run folders lie")
    if len(os.fsencode(word)) > LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"{word[:20]}... is longer than {LONGEST_NAME} bytes; give a shorter one")
    return word


def add_device(group: argparse._ActionsContainer, more: str = "") -> None:
    choices = ("auto", "cpu", "cuda", "mps")
    group.add_argument("--device", choices=choices, default="auto", help=f"where to compute{more}")


def add_root_model(group: argparse._ActionsContainer) -> None:
    group.add_argument("--root_model", type=given_path, default=Path("checkpoint"), metavar="DIR", help="holds runs")


def epoch_or_share(low: int) -> Callable:
    """A converter for an epoch of at least ``low`` ("160"), or, with a point, for a share of all epochs ("0.8")."""

    def convert(word: str) -> int | float:
        is_share = "." in word or "e" in word  # 0.00001 is 1e-05 in a run's record
        return number_in(0, 1)(word) if is_share else number_in(low, kind=int)(word)

    convert.__name__ = "epoch or share"
    return convert


def resolved_epoch(args: argparse.Namespace, flag: str) -> int | None:
    """The epoch that an `epoch_or_share` flag means, a share being rounded to whole epochs."""
    value = getattr(args, flag)
    return round(value * args.epochs) if isinstance(value, float) else value


def number_in(
    low: float, high: float | None = None, kind: type = float, open_low: bool = False, open_high: bool = False
) -> Callable:
    """A converter for finite numbers of ``kind`` in [low, high]; ``open_low`` and ``open_high`` leave out the ends.
    Without ``high`` whole numbers end at a billion."""
    high = high if high is not None else math.inf if kind is float else 10**9

    def convert(word: str) -> float:
        value = kind(word)
        below = value < high if open_high else value <= high
        if not (low < value if open_low else low <= value) or not below or value == math.inf:
            bounds = f"{'above' if open_low else 'at least'} {low:g}"
            if high < math.inf:
                bounds += f", {'below' if open_high else 'at most'} {high:g}"
            raise argparse.ArgumentTypeError(f"{word} is out of range: {bounds}")
        return value

    convert.__name__ = kind.__name__  # argparse names it in "invalid float value"
    return convert


def command_line(script: str, flags: dict, defaults: dict) -> str:
    """The shell command that gives ``script`` the `flag_words`."""
    return shlex.join(["python", script, *flag_words(flags, defaults)])


def flag_words(flags: dict, defaults: dict) -> list[str]:
    """``flags`` as a command line has them; those at their ``defaults``, or None, are left out."""
    words = []
    for flag, value in flags.items():
        if value is None or value == defaults.get(flag):
            continue
        texts = [str(each) for each in value] if isinstance(value, list) else [str(value)]
        joined = len(texts) == 1 and texts[0][:1] in ("-", "@")  # would be read as a flag, or as a file of flags
        words += [f"--{flag}={texts[0]}"] if joined else [f"--{flag}", *texts]
    return words
