"""The books of one run: what it answered, how its passes went, what it moved, how long it still takes.  Decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flexgen.devices.base import Backend
from flexgen.engine.answers import Answers, Ending
from flexgen.engine.sequence import Sequence
from flexgen.io.pool import IOPool
from flexgen.plan.price.work import PassWork
from flexgen.plan.tell.remaining import RemainingTime
from flexgen.report.clock import ProgressClock
from flexgen.report.pass_log import Trace
from flexgen.report.progress import Progress
from flexgen.request import TokenResult
from flexgen.weights.rows import EmbeddingRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Meters:
    """What counts the bytes that an engine moves, from its opening on."""

    io: IOPool
    rows: EmbeddingRows
    backend: Backend | None

    def bytes_moved(self) -> dict[str, int]:
        """Link -> bytes."""
        moved = {"disk_read": self.io.bytes_read + self.rows.bytes_gathered, "disk_write": self.io.bytes_written}
        if self.backend is not None:
            moved |= {"host_to_device": self.backend.bytes_in, "device_to_host": self.backend.bytes_out}
        return moved

    def disk_busy_seconds(self) -> float:
        """Seconds in which the disk was reading or writing."""
        return self.io.busy_seconds


class Record:
    """One run, from its making on.

    Args:
        remaining: what tells the time left, if that can be told. on_progress: told now and then how the run goes.

    Attributes:
        trace, answers: passes and requests so far. elapsed_seconds: of the whole run, once it is over.
    """

    def __init__(
        self,
        meters: Meters,
        trace: Trace,
        *,
        remaining: RemainingTime | None = None,
        num_requests: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.trace, self.answers = trace, Answers()
        self.elapsed_seconds = 0.0
        self._meters, self._remaining = meters, remaining
        self._moved_before, self._busy_before = meters.bytes_moved(), meters.disk_busy_seconds()
        self._clock = ProgressClock(num_requests, on_progress, self.bytes_moved())
        self._begin = self._pass_begin = time.perf_counter()
        self._pass_expected_seconds = 0.0

    def over(self) -> None:
        """The run has ended."""
        self.elapsed_seconds = time.perf_counter() - self._begin

    def begins(self, work: PassWork) -> None:
        """A pass is about to do this work."""
        self._pass_begin = time.perf_counter()
        self._pass_expected_seconds = self.trace.expected_of(work)

    def passed(self, seconds: float, work: PassWork, waits: dict[str, float]) -> None:
        """A pass as it went."""
        self.trace.add(seconds, work, waits)
        self._clock.tokens(round(work.num_prompt_tokens), round(work.num_sampled))

    def finished(self, sequence: Sequence, end: Ending) -> TokenResult:
        """The result of a sequence, counted."""
        if end.error is None and self._remaining is not None:
            self._remaining.finished(sequence.num_generated - sequence.num_resumed)
        return self.answers.finish(sequence, end)

    def tell(self, num_live: int, unit: tuple[int, int]) -> None:
        """Report progress, if that is due; `unit` is (unit within the pass, units of a pass)."""
        if self._clock.due():
            self._clock.tell(self.answers.counts, self.trace, self.bytes_moved(), self._seconds_left(unit[0] / unit[1]), num_live, unit)

    def _seconds_left(self, share: float) -> float | None:
        """At the pace so far; a pass of which `share` is done counts as far as that.  None where nothing was forecast."""
        if self._remaining is None:
            return None
        spent = self.trace.seconds + time.perf_counter() - self._pass_begin
        left = self._remaining.seconds(spent, self.trace.expected_seconds + share * self._pass_expected_seconds)
        return max(left, (1 - share) * self._pass_expected_seconds)  # the forecast may have been wrong about the number of passes

    def bytes_moved(self) -> dict[str, int]:
        """Link -> bytes since the run began."""
        return {link: total - self._moved_before[link] for link, total in self._meters.bytes_moved().items()}

    def disk_busy_seconds(self) -> float:
        """Seconds of the run in which the disk was reading or writing."""
        return self._meters.disk_busy_seconds() - self._busy_before
