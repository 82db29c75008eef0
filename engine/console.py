"""Lines for the user, from the main process only."""

import os
import sys


def printable(text: str) -> str:
    """``text`` with the bytes of file names that are no UTF-8 written as \\xe9: streams and fonts know none."""
    return text.encode(errors="backslashreplace").decode()


def say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), flush=True)


def warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)
