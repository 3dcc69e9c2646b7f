"""What the command's exit codes mean."""

from __future__ import annotations

import contextlib
import sys
import traceback
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes, each with its meaning for the person who reads the help."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    ALL_ANSWERED = 0, "every line is answered"
    SOME_FAILED = 1, "every line is done, some with an error"
    USAGE = 2, "the command line is wrong"
    REFUSED = 3, "refused before the start: the model, the budgets, the input, or another run on this output"
    BUG = 70, "a bug in flexgen"
    RESUMABLE = 75, "stopped by a failure (disk full, I/O error, out of memory); the same command goes on"
    HANGUP = 129, "stopped by SIGHUP; the same command goes on"
    INTERRUPTED = 130, "stopped by SIGINT (Ctrl-C); the same command goes on"
    TERMINATED = 143, "stopped by SIGTERM; the same command goes on"


def complain(error: object, code: ExitCode) -> ExitCode:
    """Say why the command ends with `code`."""
    print(f"flexgen: {error}", file=sys.stderr)
    return code


def complain_of_bug() -> ExitCode:
    """Say that the exception in flight is a bug, wherever it can be said."""
    with contextlib.suppress(OSError, ValueError):  # stderr is full, or closed
        traceback.print_exc()
        complain("this is a bug in flexgen; please report it with the lines above", ExitCode.BUG)
    return ExitCode.BUG
