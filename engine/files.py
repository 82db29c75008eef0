"""Files that are whole or not there: written under a temporary name in the same folder, flushed, then renamed."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from engine.errors import Failed, Refused


def write_atomically(path: Path, write: Callable[[IO[bytes]], None], keep_previous: Path | None = None) -> None:
    """Let ``write`` fill ``path``. What was there stays until the new content is safe on the disk, and then under the
    name ``keep_previous`` if given. `Failed` when the disk is full or refuses."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _alone(temporary) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                if keep_previous is not None and path.exists():
                    path.replace(keep_previous)
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
        _flush_folder(path.parent)
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror}; what was saved before is intact") from None


def _alone(temporary: Path) -> IO[bytes]:
    """``temporary`` opened for writing, empty; another process that has it open so is waited for."""
    while True:
        file = open(temporary, "wb", opener=lambda path, flags: os.open(path, flags & ~os.O_TRUNC, 0o666))  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        opened = os.fstat(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(opened, temporary.stat()):  # not renamed while this one waited
                if opened.st_size:
                    file.truncate()  # what a killed process left
                return file
        file.close()


def append_json(path: Path, row: dict) -> None:
    """Add a line to ``path`` and wait until it is on the disk."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror}; what was saved before is intact") from None


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def read_json(path: Path, default: dict | None = None) -> dict:
    """The object in ``path``, or ``default`` if one is given and there is no such file."""
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} is not JSON ({error}); mend it or remove it") from None
    if not isinstance(content, dict):
        raise Refused(f"{path} holds no JSON object; mend it or remove it")
    return content


def write_json_lines(path: Path, rows: list[dict]) -> None:
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    write_atomically(path, lambda file: file.write(content.encode()))


def read_json_lines(path: Path, keys: set[str], what: str, may_be_torn: bool = True) -> list[dict]:
    """The objects in ``path``, a line each, none without a file; a last one that was only half written is left out
    where it ``may_be_torn``. `Refused` for a line that is no ``what``: one that lacks ``keys``, or is no JSON."""
    content = path.read_bytes().rstrip(b"\n") if path.exists() else b""
    lines = content.split(b"\n") if content else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and keys <= row.keys():
            rows.append(row)
        elif number < len(lines) or not may_be_torn:
            raise Refused(f"{path}, line {number}, is no {what}; mend or remove the line")
    return rows


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold ``folder``, which is made, for this process; while another one does, ``wait``, or `Failed`. The lock dies
    with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except (FileExistsError, NotADirectoryError):
        raise Refused(f"{folder} cannot be a folder: a file is in its way; name another one") from None
    except OSError as error:
        raise Failed(f"cannot write to {folder}: {error.strerror}") from None
    with file:
        try:
            # unlike flock's, not shared with worker processes
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise Failed(f"another process is at work in {folder}; wait for it to end") from None
        yield
