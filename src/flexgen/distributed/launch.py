"""Starts the followers of a run on this machine: processes with torchrun's environment, which end with the leader.  Needs no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO

from flexgen.distributed.cores import OwnCores, cores_of_machine
from flexgen.distributed.devices import VISIBLE, visible_name
from flexgen.distributed.interfaces import address_of, listening_socket
from flexgen.distributed.place import STORE_FD
from flexgen.errors import OptionError, StageError

PARENT = "FLEXGEN_PARENT"  # the leader's process, whose end is the follower's
PROGRAM = (sys.executable, "-m", "flexgen.distributed")
_PR_SET_PDEATHSIG = 1
_PATIENCE_SECONDS = 10.0  # for followers to end by themselves
_PATIENCE_AFTER_ERRORS = 2.0
_TERM_SECONDS = 3.0


class Followers:
    """The ranks 1 to size - 1 of a run, which this process leads.  A context; afterwards none of them is left.

    `start_followers` makes it, on a thread that lives as long as the followers: the system ends them with it.

    Attributes:
        environment: The environment in which the leader joins them.
        processes: The followers in the order of their ranks.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.processes: list[subprocess.Popen[bytes]] = []
        self._printers: list[threading.Thread] = []
        self._patience_seconds = _PATIENCE_SECONDS
        self._cores: OwnCores | None = None

    def check(self) -> None:
        """Return if all followers are running.

        Raises:
            StageError: One has ended.
        """
        for rank, process in enumerate(self.processes, 1):
            if (code := process.poll()) is not None:
                how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
                raise StageError(f"rank {rank} on this machine has ended ({how})")

    def hurry(self) -> None:
        """Wait less for followers to end, because the run has failed: those that still work know it."""
        self._patience_seconds = _PATIENCE_AFTER_ERRORS

    def close(self, patience_seconds: float | None = None) -> None:
        """Wait until the followers have ended, and end those that do not."""
        until = time.monotonic() + (self._patience_seconds if patience_seconds is None else patience_seconds)
        for end, seconds in ((None, 0.0), (signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, _TERM_SECONDS)):
            until = max(until, time.monotonic() + seconds)
            for process in self.processes:
                if end is not None and process.poll() is None:
                    process.send_signal(end)
            for process in self.processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(until - time.monotonic(), 0.0))
            if all(process.poll() is not None for process in self.processes):
                break
        for printer in self._printers:
            printer.join(_TERM_SECONDS)
        if self._cores is not None:
            self._cores.close()
            self._cores = None

    def __enter__(self) -> Followers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            self.hurry()
        self.close()

    def start(self, rank: int, program: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process of a rank."""
        process = subprocess.Popen(  # in a session of its own, so that Ctrl-C is for the leader alone
            program, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.processes.append(process)
        assert process.stdout is not None
        printer = threading.Thread(target=_print_lines, args=(rank, process.stdout), name=f"stage-{rank}-output", daemon=True)
        printer.start()
        self._printers.append(printer)

    def divide_cores(self) -> None:
        """Give every rank cores of its own."""
        shares = cores_of_machine(len(self.processes) + 1)
        self._cores = OwnCores(shares[0])
        for process, cores in zip(self.processes, shares[1:], strict=True):
            with suppress(OSError):  # it has ended, or the system forbids it
                os.sched_setaffinity(process.pid, cores)


def start_followers(
    size: int, interface: str = "lo", devices: Sequence[str] = (), *,
    program: Sequence[str] = PROGRAM, environment: Mapping[str, str] | None = None,
) -> Followers:  # fmt: skip
    """Start the ranks 1 to size - 1 on this machine, each with cores of its own.

    Args:
        size: The number of ranks, the leader included.
        interface: The network interface for all connections.
        devices: The device of every rank, such as ("cuda:0", "cuda:1"); a follower sees its own only, so that it is "cuda" there.
        program: The command of a follower.
        environment: The environment of followers; None: that of this process.

    Raises:
        OptionError: There is no such interface, or not one device for every rank.
    """
    if devices and len(devices) != size:
        raise OptionError(f"{len(devices)} devices for {size} stages: one for each is needed")
    address = address_of(interface)
    common = dict(os.environ if environment is None else environment)
    seen = [visible_name(device, common) for device in devices]
    with listening_socket(address) as listener:
        places = {
            "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": address, "MASTER_PORT": str(listener.getsockname()[1]),
        }  # fmt: skip
        own = {**places, "RANK": "0", "LOCAL_RANK": "0", STORE_FD: str(os.dup(listener.fileno()))}
        followers = Followers({**common, **own})
    try:
        for rank in range(1, size):
            theirs = {**common, **places, "RANK": str(rank), "LOCAL_RANK": str(rank), PARENT: str(os.getpid())}
            if devices and seen[rank] is not None:
                theirs[VISIBLE] = str(seen[rank])
            followers.start(rank, program, theirs)
        followers.divide_cores()
    except BaseException:
        followers.close(0.0)
        raise
    return followers


def end_with_parent(environment: Mapping[str, str]) -> None:
    """Let the system end this process when the leader that started it ends; nothing where no leader did."""
    if not environment.get(PARENT, "").isdecimal():
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(environment[PARENT]):  # it had ended before
        os.kill(os.getpid(), signal.SIGKILL)


def _print_lines(rank: int, stream: IO[bytes]) -> None:
    """Copy the lines of a follower to stderr, each with the stage's number before it."""
    with stream:
        for line in stream:
            with suppress(OSError, ValueError):  # stderr is closed or full; the follower must not wait for it
                sys.stderr.write(f"stage {rank}: {line.decode(errors='replace').rstrip()}\n")
                sys.stderr.flush()
