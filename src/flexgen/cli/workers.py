"""The workers that a run starts on its own host: processes of `flexgen work`, which are replaced when they die.

A worker's standard input is a pipe from the run.  When it closes, because the run was asked to stop or has died, the worker stops after its
pass.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from flexgen.base.quantities import counted
from flexgen.cli.exit_codes import ExitCode
from flexgen.cli.worker_places import WorkerPlace
from flexgen.errors import JobError, StorageError, io_failure
from flexgen.jobs.interrupt import PATIENCE_SECONDS

if TYPE_CHECKING:
    from flexgen.jobs.workers.members import MemberFile

_ENDING_SECONDS = PATIENCE_SECONDS + 20.0  # a worker that was asked to stop is given so long
_MOST_EARLY_DEATHS = 2  # in a row, of workers that have not answered anything
_SAID_LINES = 12  # of what a worker has said last
_GIVES_UP = (ExitCode.USAGE, ExitCode.REFUSED)
_STOPPED = (ExitCode.HANGUP, ExitCode.INTERRUPTED, ExitCode.TERMINATED)


class Process(Protocol):
    """A process of a worker: what is needed of `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        ...

    def kill(self) -> None: ...


def start_process(command: Sequence[str], stdin: int, log: Path, cores: Sequence[int], environment: Mapping[str, str]) -> Process:
    """Start a worker in a session of its own, so that Ctrl-C reaches the run only.

    Args:
        command: The arguments after `flexgen`.
        stdin: The descriptor of its standard input.
        log: The file for what it says.
        cores: The cores that it may use; empty for those of this process.
        environment: Its environment.
    """
    own = os.sched_getaffinity(0)
    with log.open("ab") as said:
        try:
            if cores:
                os.sched_setaffinity(0, cores)  # of this thread, which the new process inherits: a hook in the child is not safe
            return subprocess.Popen(
                [sys.executable, "-m", "flexgen", *command], stdin=stdin, stdout=said, stderr=said, env=dict(environment),
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.sched_setaffinity(0, own)


@dataclass(slots=True)
class _Child:
    """A worker that was started."""

    number: int
    place: WorkerPlace
    process: Process
    pipe: int
    log: Path
    ended: bool = False


class Children:
    """The workers of a run on its own host, until the context ends.

    Args:
        named: The output of the job, or its folder.
        places: What each worker may use.
        logs: The folder for what they say.
        members: Returns what all workers have told.
        warn: Shows a warning.
    """

    def __init__(
        self, named: Path, places: Sequence[WorkerPlace], logs: Path, members: Callable[[], list[MemberFile]],
        warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._named, self._logs, self._members, self._warn = named, logs, members, warn
        self._places, self._early_deaths = places, 0
        self._children: list[_Child] = []

    def tend(self) -> None:
        """Replace workers that have died.

        Raises:
            JobError: A worker refuses to work, or workers die before they answer anything; or all were stopped by others.
            StorageError: A worker was stopped by a failure that would stop others, too.
        """
        for place, child in enumerate(self._children):
            code = None if child.ended else child.process.poll()
            if code is None:
                continue
            self._close(child)
            if code in (ExitCode.ALL_ANSWERED, *_STOPPED):
                continue
            told = next((each for each in self._members() if each.process.pid == child.process.pid), None)
            self._check(child, code, told)
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            self._warn(
                f"worker {child.number} (process {child.process.pid}) {how}; its lines go to others, and another one takes its place"
            )
            self._children[place] = self._started(child.number, child.place)
        if self._children and all(child.ended and child.process.poll() in _STOPPED for child in self._children):
            raise JobError(f"all workers on this host were stopped: {counted(len(self._children), 'worker')}")

    def _check(self, child: _Child, code: int, told: MemberFile | None) -> None:
        """Refuse to replace a worker whose successors would end alike."""
        from flexgen.jobs.workers.members import FAILED, REFUSED

        said = f"worker {child.number} ended with {code}: {_last_lines(child.log)}"
        if code in (ExitCode.RESUMABLE,) and told is not None and told.state == REFUSED:
            raise StorageError(f"worker {child.number}: {told.reason}") from io_failure()
        if code in _GIVES_UP and (told is None or told.state != FAILED):
            raise JobError(said)
        self._early_deaths = self._early_deaths + 1 if told is None or not (told.lines or told.leases) else 0
        if self._early_deaths >= _MOST_EARLY_DEATHS:
            raise JobError(f"workers end before they answer anything; {said}")

    def wait(self) -> None:
        """Wait for workers to end by themselves, which they do when they see that no line is left."""
        self._wait_until(time.monotonic() + _ENDING_SECONDS)

    def _started(self, number: int, place: WorkerPlace) -> _Child:
        log = self._logs / f"{number}.log"
        environment = dict(os.environ)
        if place.device is not None:
            visible = [each for each in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
            if visible and place.device >= len(visible):
                raise JobError(f"--workers cuda:{place.device}: CUDA_VISIBLE_DEVICES has {counted(len(visible), 'device')}")
            environment["CUDA_VISIBLE_DEVICES"] = visible[place.device] if visible else str(place.device)
        reading, pipe = os.pipe()
        try:
            command = ["work", str(self._named), "--child", str(number), "--progress", "none", *place.flags]
            process = start_process(command, reading, log, place.cores, environment)
        except OSError as error:
            os.close(pipe)
            raise StorageError(f"worker {number} cannot be started: {error.strerror or error}") from error
        finally:
            os.close(reading)
        return _Child(number=number, place=place, process=process, pipe=pipe, log=log)

    def _close(self, child: _Child) -> None:
        if not child.ended:
            child.ended = True
            os.close(child.pipe)

    def _wait_until(self, deadline: float) -> bool:
        while any(child.process.poll() is None for child in self._children):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True

    def __enter__(self) -> Self:
        try:
            for number, place in enumerate(self._places, 1):
                self._children.append(self._started(number, place))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Ask all workers to stop after their pass, and wait for them."""
        for child in self._children:
            self._close(child)
        if not self._wait_until(time.monotonic() + _ENDING_SECONDS):
            for child in self._children:
                with suppress(OSError):
                    child.process.kill()
            self._wait_until(time.monotonic() + _ENDING_SECONDS)


def _last_lines(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-_SAID_LINES:]) or "it said nothing"
    except OSError as error:
        return f"what it said cannot be read ({error.strerror})"
