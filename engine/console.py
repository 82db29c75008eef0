"""Lines for the user, from the main process only."""

import os
import sys
from collections.abc import Iterable, Sequence

from tqdm import tqdm


def printable(text: str) -> str:
    """``text`` with the bytes of file names that are no UTF-8 written as \\xe9: streams and fonts know none."""
    return text.encode(errors="backslashreplace").decode()


def number_of_classes(number: int) -> str:
    return f"{number} class{'' if number == 1 else 'es'}"


def first_of(texts: Sequence[str], number: int = 20, separator: str = ", ") -> str:
    """The first ``number`` of ``texts``, and how many more there are."""
    return separator.join(texts[:number]) + (f" and {len(texts) - number} more" if len(texts) > number else "")


def _is_heard() -> bool:
    """Whether this process speaks for all; torchrun says so before anything is set up."""
    return os.environ.get("RANK", "0") == "0"


def progress(items: Iterable, text: str, unit: str, *, total: int | None = None) -> tqdm:
    """``items`` with a bar, where this is a terminal."""
    return tqdm(items, text, total=total, unit=unit, leave=False, disable=None if _is_heard() else True)


def say(text: str) -> None:
    if _is_heard():
        print(printable(text), flush=True)


def warn(*texts: str) -> None:
    for text in texts if _is_heard() else ():
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)
