"""Text from files, names and paths made safe to print, and errors of a command as one sentence."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from reprlib import Repr

__all__ = ["counted", "one_line", "plain", "run_command", "run_with_traceback", "shown"]

# Terminals obey control characters, and bidirectional marks (Unicode 9, "Trojan source", CVE-2021-42574) reorder what
# is read; half surrogates cannot be encoded at all.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
LONGEST_NAME = 200
LONGEST_ERROR = 2000
BROKEN_PIPE, INTERRUPTED = 141, 130  # 128 + the number of the signal, as a shell has it

_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel = 3


def plain(text: object, longest: int = LONGEST_NAME) -> str:
    """The text with control characters written as escapes, and shortened in the middle to ``longest`` characters."""
    whole = str(text)
    if len(whole) > longest:
        half = (longest - 5) // 2
        whole = f"{whole[:half]} ... {whole[len(whole) - half :]}"
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), whole)


def one_line(text: object, longest: int = LONGEST_ERROR) -> str:
    """The text as one line that is safe to print: spaces for line breaks, else as ``plain``."""
    return plain(" ".join(str(text).split()), longest)


def shown(value: object) -> str:
    """A short repr of any value, however deep or large."""
    return plain(_short.repr(value))


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 block", "3 blocks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def run_command(program: str, run: Callable[[], int | None], debug: bool = False) -> int:
    """The exit status of a command whose errors are one sentence on stderr.

    Args:
        program: What the sentence begins with.
        run: The command; None stands for 0.
        debug: Print the traceback of an error above its sentence.

    Returns:
        The command's own status; 2 after an error the caller can mend or a missing package, 130 after Ctrl-C, 141 if
        the reader of stdout has gone.
    """
    try:
        status = run() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        if debug:
            traceback.print_exc()
        print(f"{program}: error: {one_line(_sentence(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status


def _sentence(error: Exception) -> str:
    """What went wrong, without the number that errors of the system begin with."""
    if _is_out_of_memory(error):
        return "there is not enough memory; use a smaller batch or fewer images"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error)


def _is_out_of_memory(error: Exception) -> bool:
    """True for Python's error and for torch's, which is not imported for it: OutOfMemoryError, or words on a CPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "CPUAllocator" in str(error)


def run_with_traceback(run: Callable[[], object]) -> int:
    """The exit status of what a command only starts, such as a training: 0, or 1 after any error, with its traceback.

    An error there is not one in what the caller typed, so that one line would say too little.
    """
    try:
        run()
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0
