"""The workers of a job: what each one tells of itself, and what the others make of its silence.

A worker replaces its file every few seconds.  Who watches it counts the time, by its own clock, for which the file stays the same: clocks
of different hosts are never compared.  On the same host a worker whose process is gone counts as dead at once.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from flexgen.errors import StorageError
from flexgen.jobs.workers.leases import Fate
from flexgen.jobs.workers.place import names_in, read_json, replace_json, translated

LEASE_SECONDS = 60.0  # the silence after which a worker counts as dead
_BEATS = 12  # in that time
_LOOKS = 4  # so many looks it takes at least: between two looks, a watcher may have been stopped itself
_LOOK_SECONDS = 0.25  # the least time between two looks
# States of a worker that has ended.
FINISHED, STOPPED, REFUSED, FAILED = "finished", "stopped", "refused", "failed"
_FATES = {FINISHED: Fate.RELEASED, STOPPED: Fate.RELEASED, REFUSED: Fate.RELEASED, FAILED: Fate.DEAD}


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, so that others of the same host can tell whether it still runs.

    Attributes:
        host: The name of its host.
        boot: The id of the host's boot, and the namespace of its process ids; empty where they are unknown.
        pid: Its process id.
        started: The time of its start, as the kernel counts it, because process ids are used again.
    """

    host: str
    boot: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> Process:
        """Return this process."""
        return cls(host=socket.gethostname(), boot=_boot(), pid=os.getpid(), started=_state_of(os.getpid())[1])

    def is_gone(self) -> bool:
        """Return whether the process has ended; False where that cannot be known from here."""
        return self._is_of_this_host() and not self._runs()

    def is_here(self) -> bool:
        """Return whether the process runs on this host."""
        return self._is_of_this_host() and self._runs()

    def _is_of_this_host(self) -> bool:
        return bool(self.boot) and self.boot == _boot()

    def _runs(self) -> bool:
        state, started = _state_of(self.pid)
        return state not in ("", "Z", "X") and started == self.started


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberFile:
    """What a worker tells of itself.

    Attributes:
        worker: Its id.
        process: Its process.
        child: The number that the run gave it; 0 if the run has not started it.
        state: What it does ("reading", "answering", "waiting"), or how it ended.
        reason: Why it ended; empty where that needs no reason.
        beat: A number that rises as long as it lives.
        leases: The names of its leases.
        lines: Number of lines that it has stored.
        figures: Figures of its engine: those of `Progress` that add up, `eta_seconds`, `answers_resumed`, `tokens_kept`.
    """

    worker: str
    process: Process
    child: int = 0
    state: str = "reading"
    reason: str = ""
    beat: int = 0
    leases: tuple[str, ...] = ()
    lines: int = 0
    figures: Mapping[str, float | None] = field(default_factory=dict[str, float | None])

    @property
    def has_ended(self) -> bool:
        return self.state in _FATES

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MemberFile:
        """Return what `dataclasses.asdict` has made a JSON object of."""
        return cls(**{**value, "process": Process(**value["process"]), "leases": tuple(value["leases"])})


class Member:
    """This worker among the others: its file is kept up to date by a thread until the context ends.

    Args:
        folder: The folder of the workers' files.
        lease_seconds: The silence after which a worker counts as dead.
        child: The number that the run gave this worker; 0 if the run has not started it.

    Attributes:
        id: The id of the worker.
    """

    def __init__(self, folder: Path, *, lease_seconds: float, child: int = 0) -> None:
        self.id = secrets.token_hex(8)
        self._path, self._seconds = folder / self.id, lease_seconds / _BEATS
        self._told = MemberFile(worker=self.id, process=Process.this(), child=child)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="flexgen-beat", daemon=True)

    def tell(self, *, now: bool = False, **changes: Any) -> None:
        """Tell others something, with the next beat or now."""
        with self._lock:
            self._told = dataclasses.replace(self._told, **changes)
        if now:
            self._write()

    def end(self, state: str, reason: str = "") -> None:
        """Tell others at once that this worker has ended, and how."""
        self._over.set()
        self._thread.join()
        self.tell(state=state, reason=reason)
        self._write()

    def _beat(self) -> None:
        while not self._over.wait(self._seconds):
            try:
                self._write()
            except StorageError:  # it is silent, which is what a failing disk should look like; or the run is over
                continue

    def _write(self) -> None:
        with self._lock:
            self._told = dataclasses.replace(self._told, beat=self._told.beat + 1)
            told = dataclasses.asdict(self._told)
        with translated(self._path):
            replace_json(self._path, told)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._over.is_set():  # an error that nobody has given a name
            self._over.set()
            self._thread.join()


@dataclass(slots=True)
class _Watched:
    """What is known of a worker: its file, for how long that has been the same, and when it was looked at last."""

    content: MemberFile | None = None
    silent_seconds: float = 0.0
    looked: float | None = None


class Observer:
    """Watches the workers of a job, and says what has become of them.

    Args:
        folder: The folder of the workers' files.
        lease_seconds: The silence after which a worker counts as dead.
        clock: Returns the time in seconds, on a clock that only this process knows.
    """

    def __init__(self, folder: Path, *, lease_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._lease_seconds, self._clock = folder, lease_seconds, clock
        self._watched: dict[str, _Watched] = {}

    def members(self) -> list[MemberFile]:
        """Return what all workers have told last, the dead included."""
        with translated(self._folder):
            names = names_in(self._folder)
        found = (self._look(name, anew=True).content for name in names)
        return [each for each in found if each is not None]

    def fate_of(self, worker: str) -> Fate:
        """Return what has become of a worker, as far as can be known from here."""
        watched = self._look(worker)
        told = watched.content
        if told is not None and told.has_ended:
            return _FATES[told.state]
        if told is not None and told.process.is_gone():
            return Fate.DEAD
        return Fate.DEAD if watched.silent_seconds >= self._lease_seconds else Fate.ALIVE

    def num_alive(self) -> int:
        """Return the number of workers that are at work."""
        return sum(self.fate_of(each.worker) is Fate.ALIVE for each in self.members())

    def _look(self, worker: str, *, anew: bool = False) -> _Watched:
        """Read a worker's file, unless that was done a moment ago; a file that cannot be read has not changed."""
        watched, now = self._watched.setdefault(worker, _Watched()), self._clock()
        if not anew and watched.looked is not None and now - watched.looked < min(_LOOK_SECONDS, self._lease_seconds / _LOOKS):
            return watched
        try:
            content = MemberFile.from_json(read_json(self._folder / worker))
        except (OSError, StorageError, KeyError, TypeError):
            content = watched.content
        if content != watched.content:
            watched.content, watched.silent_seconds = content, 0.0
        elif watched.looked is not None:
            watched.silent_seconds += min(now - watched.looked, self._lease_seconds / _LOOKS)
        watched.looked = now
        return watched


def _boot() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _state_of(pid: int) -> tuple[str, str]:
    """Return the state of a process and the time of its start, as the kernel writes them; both are empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
