"""Snapshots of a run in progress: counts, rates, an estimate of the time left.  Decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flexgen.engine.progress import Progress
from flexgen.engine.trace import Trace

PROGRESS_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCounts:
    """What was served so far."""

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0


class ProgressClock:
    """Tells a callback how the run goes, at most every PROGRESS_SECONDS."""

    def __init__(self) -> None:
        self._report: Callable[[Progress], None] | None = None
        self._begin = self._last = 0.0

    def start(self, num_requests: int | None, report: Callable[[Progress], None] | None, moved: dict[str, int]) -> None:
        self._begin = self._last = time.perf_counter()
        self._num_requests, self._report, self._moved = num_requests, report, moved
        self._prompt_tokens = self._output_tokens = 0

    def tokens(self, prompt: int, output: int) -> None:
        """Count what a finished pass computed."""
        self._prompt_tokens += prompt
        self._output_tokens += output

    def due(self) -> bool:
        return self._report is not None and time.perf_counter() - self._last >= PROGRESS_SECONDS

    def tell(self, counts: RunCounts, trace: Trace, moved: dict[str, int], begun: float, num_live: int, unit: tuple[int, int]) -> None:
        """Report a snapshot.

        Args:
            moved: link -> bytes since the run began. begun: live answers, in units of whole ones.
            unit: (unit within the pass, units of a pass).
        """
        assert self._report is not None
        now = time.perf_counter()
        elapsed, since = now - self._begin, max(now - self._last, 1e-9)
        done = counts.requests + begun
        left = None
        if self._num_requests and done > 0:
            left = elapsed * (self._num_requests - done) / done
        self._report(
            Progress(
                elapsed_seconds=elapsed,
                num_requests=self._num_requests,
                num_requests_done=counts.requests,
                num_live_sequences=num_live,
                prompt_tokens=self._prompt_tokens,
                output_tokens=self._output_tokens,
                prompt_tokens_per_s=self._prompt_tokens / max(elapsed, 1e-9),
                output_tokens_per_s=self._output_tokens / max(elapsed, 1e-9),
                eta_seconds=left,
                pass_index=len(trace.passes),
                unit=unit[0],
                num_units=unit[1],
                link_shares=self._shares(trace, moved, since),
            )
        )
        self._last, self._moved = now, moved

    def _shares(self, trace: Trace, moved: dict[str, int], seconds: float) -> dict[str, float]:
        """Achieved over attainable rate: links since the last snapshot, computing over the last whole pass."""
        machine = trace.machine
        rates = {
            "disk_read": machine.disk_read_bytes_per_s,
            "disk_write": machine.disk_write_bytes_per_s,
            "host_to_device": machine.host_to_device_bytes_per_s or machine.host_memory_bytes_per_s,
            "device_to_host": machine.device_to_host_bytes_per_s or machine.host_memory_bytes_per_s,
        }
        shares = {link: (moved[link] - self._moved.get(link, 0)) / seconds / rates[link] for link in moved}
        if trace.passes:
            last = trace.passes[-1]
            shares["compute"] = last.ideal["compute"] / max(last.seconds, 1e-9)
        return shares
