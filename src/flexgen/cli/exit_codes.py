"""The exit codes of the command, with their meanings."""

from __future__ import annotations

import contextlib
import sys
import traceback
from enum import IntEnum

from flexgen.cli.spelling import in_flags
from flexgen.errors import is_disk_full


class ExitCode(IntEnum):
    """An exit code, with its meaning as the help shows it."""

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
    RESUMABLE = 75, "stopped by a failure (disk full, I/O error, out of memory, a stage lost); the same command goes on"
    HANGUP = 129, "stopped by SIGHUP; the same command goes on"
    INTERRUPTED = 130, "stopped by SIGINT (Ctrl-C); the same command goes on"
    TERMINATED = 143, "stopped by SIGTERM; the same command goes on"


def complain(error: object, code: ExitCode) -> ExitCode:
    """Print why the command ends with `code` on stderr, with flags in place of the names of options, and return the code."""
    print(f"flexgen: {in_flags(str(error))}", file=sys.stderr)
    return code


def complain_of_disk(error: BaseException, said: object) -> ExitCode:
    """Print what a disk that is full or does not work has stopped, and when it can go on, and return the exit code.

    Args:
        error: An error for which `is_disk_failure` is true.
        said: What it says.
    """
    when = "there is room" if is_disk_full(error) else "it can be read and written again"
    return complain(f"{said}\nthe same command goes on when {when}", ExitCode.RESUMABLE)


def complain_of_bug() -> ExitCode:
    """Print the current exception as a bug, if stderr can be written, and return the exit code."""
    with contextlib.suppress(OSError, ValueError):  # stderr is full, or closed
        traceback.print_exc()
        complain("this is a bug in flexgen; please report it with the lines above", ExitCode.BUG)
    return ExitCode.BUG
