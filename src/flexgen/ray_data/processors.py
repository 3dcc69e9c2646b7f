"""Gives an actor processors of its own, so that engines on one node do not compute on the same ones.

Ray counts CPUs and does not say which.  Whatever counts the processors of this machine (plans, measurements, kernels) goes by those that
the process may run on.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path

NAME = "flexgen-processor"  # of the sockets; a zero byte before it says that no file stands for them


class OwnProcessors:
    """Processors that this process runs on, as long as it is open.

    A processor is taken by a socket with its number in its name.  Such names are there for this machine only, and the system takes them
    back when the process ends, however it does.  Where too few are free, some are shared.

    Args:
        count: The number of processors.

    Attributes:
        numbers: The processors.
    """

    def __init__(self, count: int) -> None:
        self._before = os.sched_getaffinity(0)
        self._taken: dict[int, socket.socket] = {}
        for number in sorted(self._before):
            if len(self._taken) < count and (taken := _take(number)) is not None:
                self._taken[number] = taken
        others = sorted(self._before - self._taken.keys())
        self.numbers = frozenset([*self._taken, *others[: count - len(self._taken)]])
        _run_on(self.numbers)

    def __enter__(self) -> OwnProcessors:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the processors to others, and run on all again."""
        _run_on(self._before)
        for taken in self._taken.values():
            taken.close()
        self._taken.clear()


def _take(number: int) -> socket.socket | None:
    """Return a socket that stands for a processor; None if another process has it."""
    found = socket.socket(socket.AF_UNIX)
    try:
        found.bind(f"\0{NAME}-{number}")
    except OSError:
        found.close()
        return None
    return found


def _run_on(numbers: Iterable[int]) -> None:
    """Have all threads of this process run on some processors; threads that they start later do, too."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread.name), numbers)
