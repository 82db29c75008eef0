"""What a user is told when something is wrong: one line and an exit code, never a traceback."""

import functools
import os
import sys
from collections.abc import Callable


class Refused(Exception):  # noqa: N818  the sentence says what happened
    """Input that cannot work, found before the first step: exit code 2. Says what is wrong, where, and what to do."""

    exit_code = 2


class Failed(Exception):  # noqa: N818
    """Something that happened on the way (disk full, unreadable file, non-finite loss): exit code 1."""

    exit_code = 1


def one_line_errors(main: Callable) -> Callable:
    """Wrap a script's ``main``: what a user can cause becomes one line on stderr and `SystemExit` with its code.

    All processes of a machine refuse alike, so its first one speaks for them; what failed is said where it failed.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr, flush=True)
            raise SystemExit(130) from None
        except Refused as error:
            if is_first_of_machine():
                print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(error.exit_code) from None
        except (Failed, OSError, RuntimeError, MemoryError) as error:
            print(f"error: {_sentence(error)}", file=sys.stderr, flush=True)
            raise SystemExit(Failed.exit_code) from None

    return wrapped


def is_first_of_machine() -> bool:
    """Whether this is the first process that torchrun started on this machine, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_out_of_memory(error: Exception) -> bool:
    """Python's, numpy's, or torch's, whose classes a script that does without torch need not load."""
    words = ("out of memory", "allocate memory")  # a GPU, a CPU
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _sentence(error: Exception) -> str:
    """What a user can do something about; any other `RuntimeError` is a defect and goes on as it is."""
    if is_out_of_memory(error):
        on_gpu = f" ({str(error).splitlines()[0]})" if "out of memory" in str(error) else ""
        return (
            f"out of memory{on_gpu}; try a smaller --batch_size, --cache_limit or image size, or less of what was set"
        )
    if type(error).__name__ in ("BackendCompilerFailed", "InductorError"):
        return f"the backbone cannot be compiled here ({' '.join(str(error).split())[:200]}); leave out --compile"
    if isinstance(error, RuntimeError):
        if type(error).__name__ == "DistBackendError" or "NCCL" in str(error):
            what = str(error).strip().splitlines()[-1]
            return f"another process of the launch ended, or the GPUs find no way to each other ({what})"
        if "shared memory" in str(error):
            return "shared memory is too small for the decoded images; try --cache_limit 0, or a larger /dev/shm"
        if any(words in str(error) for words in ("gloo/transport", "closed by peer", "Connection reset")):
            return "another process of the launch ended"
        if "DataLoader worker" not in str(error):
            raise error
        return f"a data worker died: {str(error).strip()} If memory ran out, try fewer --workers"
    return str(error)
