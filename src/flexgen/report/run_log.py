"""The log of one run: what it answered, how its passes went, what it moved, how long it still takes.  Decides nothing."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from flexgen.plan.price.work import PassLoad, PassWork
from flexgen.plan.tell.remaining import RemainingTime
from flexgen.report.pass_log import PassLog
from flexgen.report.progress import Progress
from flexgen.request import TokenRequest, TokenResult

PROGRESS_SECONDS = 0.2  # progress is told at most this often


class Meters(Protocol):
    """Counts what an engine moves, from its opening on."""

    def bytes_moved(self) -> dict[str, int]:
        """Link -> bytes."""
        ...

    def disk_busy_seconds(self) -> float: ...


@dataclass(slots=True)
class RunCounts:
    """What was served so far.

    Attributes:
        requests: Finished requests.
        errors: Those of them that failed.
        prompt_tokens: Tokens of their prompts.
        output_tokens: Tokens that this run has generated for them.
        preemptions: How often a sequence had to give way.
        recomputed_tokens: Tokens that were computed again, after a preemption or for an earlier run.
        shared_prompt_tokens: Tokens that sequences found stored when they entered, because another request has computed them.
    """

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    shared_prompt_tokens: int = 0


class RunLog:
    """One run, from its making on.

    Args:
        meters: What counts the bytes that are moved.
        passes: An empty log for the passes.
        remaining: What estimates the time left; None where nothing was forecast.
        num_requests: The requests of the run, if that is known.
        on_progress: Called now and then with how the run goes.

    Attributes:
        passes: The passes so far.
        counts: Requests and tokens so far.
        finish_reasons: Reason -> answers.
        given: For each finished request, the tokens that it came with: its prompt, and what an earlier run had generated.
        generated: For each finished request, the tokens that this run has generated.
        found: For each finished request, those of its given tokens that were stored already when it entered.
        elapsed_seconds: The seconds of the whole run, once it is over.
    """

    def __init__(
        self,
        meters: Meters,
        passes: PassLog,
        *,
        remaining: RemainingTime | None = None,
        num_requests: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.passes, self.counts = passes, RunCounts()
        self.finish_reasons: Counter[str] = Counter()
        self.given, self.generated, self.found = array("q"), array("q"), array("q")
        self.elapsed_seconds = 0.0
        self._meters, self._remaining = meters, remaining
        self._num_requests, self._on_progress = num_requests, on_progress
        self._moved_before, self._busy_before = meters.bytes_moved(), meters.disk_busy_seconds()
        self._prompt_tokens = self._output_tokens = 0  # that the passes have computed
        self._begin = self._pass_begin = self._told = time.perf_counter()
        self._moved_told = self.bytes_moved()
        self._work = PassWork()  # of the last pass
        self._pass_expected_seconds = 0.0

    # -- what happens ---------------------------------------------------------------------------------------------------------------

    def entered(self, *, recomputed_tokens: int, shared_tokens: int) -> None:
        """Count what an admitted sequence computes again, and what it finds stored."""
        self.counts.recomputed_tokens += recomputed_tokens
        self.counts.shared_prompt_tokens += shared_tokens

    def preempted(self, count: int = 1) -> None:
        self.counts.preemptions += count

    def begins(self, load: PassLoad) -> None:
        """A pass is about to begin."""
        self._work = self.passes.work_of(load)
        self._pass_begin = time.perf_counter()
        self._pass_expected_seconds = self.passes.expected_of(self._work)

    def passed(self, seconds: float, waits: dict[str, float]) -> None:
        """The pass that had begun has ended."""
        self.passes.add(seconds, self._work, waits)
        self._prompt_tokens += round(self._work.num_prompt_tokens)
        self._output_tokens += round(self._work.num_sampled)

    def finished(self, result: TokenResult, request: TokenRequest, num_found: int) -> None:
        """Count a result.

        Args:
            result: The answer, with what an earlier run has generated.
            request: What it answers.
            num_found: Its tokens that were stored already when it entered.
        """
        num_resumed = len(request.generated.token_ids)
        num_generated = len(result.token_ids) - num_resumed
        if result.error is None and self._remaining is not None:
            self._remaining.finished(num_generated)
        self.finish_reasons[result.finish_reason] += 1
        self.given.append(len(request.prompt_token_ids) + num_resumed)
        self.generated.append(num_generated)
        self.found.append(num_found)
        self.counts.requests += 1
        self.counts.errors += result.error is not None
        self.counts.prompt_tokens += len(request.prompt_token_ids)
        self.counts.output_tokens += num_generated

    def over(self) -> None:
        """The run has ended."""
        self.elapsed_seconds = time.perf_counter() - self._begin

    # -- how it goes ----------------------------------------------------------------------------------------------------------------

    def bytes_moved(self) -> dict[str, int]:
        """Link -> bytes since the run began."""
        return {link: total - self._moved_before[link] for link, total in self._meters.bytes_moved().items()}

    def disk_busy_seconds(self) -> float:
        """Seconds of the run in which the disk was reading or writing."""
        return self._meters.disk_busy_seconds() - self._busy_before

    def tell(self, num_live: int, unit: int, num_units: int) -> None:
        """Report progress, if that is due.

        Args:
            num_live: The live sequences.
            unit: How far the pass has come.
            num_units: The units of a pass.
        """
        now = time.perf_counter()
        if self._on_progress is None or now - self._told < PROGRESS_SECONDS:
            return
        elapsed, moved = now - self._begin, self.bytes_moved()
        self._on_progress(
            Progress(
                elapsed_seconds=elapsed,
                num_requests=self._num_requests,
                num_requests_done=self.counts.requests,
                num_live_sequences=num_live,
                prompt_tokens=self._prompt_tokens,
                output_tokens=self._output_tokens,
                prompt_tokens_per_s=self._prompt_tokens / max(elapsed, 1e-9),
                output_tokens_per_s=self._output_tokens / max(elapsed, 1e-9),
                eta_seconds=self._seconds_left(unit / num_units),
                pass_index=self.passes.num_passes,
                unit=unit,
                num_units=num_units,
                link_shares=self._link_shares(moved, max(now - self._told, 1e-9)),
            )
        )
        self._told, self._moved_told = now, moved

    def _seconds_left(self, share: float) -> float | None:
        """At the pace so far; a pass of which `share` is done counts as far as that.  None where nothing was forecast."""
        if self._remaining is None:
            return None
        spent = self.passes.seconds + time.perf_counter() - self._pass_begin
        left = self._remaining.seconds(spent, self.passes.expected_seconds + share * self._pass_expected_seconds)
        return max(left, (1 - share) * self._pass_expected_seconds)  # the forecast may have been wrong about the number of passes

    def _link_shares(self, moved: dict[str, int], seconds: float) -> dict[str, float]:
        """Achieved over attainable rate: links since progress was told last, computing over the last whole pass."""
        machine = self.passes.machine
        rates = {
            "disk_read": machine.disk_read.best,
            "disk_write": machine.disk_write.best,
            "host_to_device": (machine.host_to_device or machine.host_memory).best,
            "device_to_host": (machine.device_to_host or machine.host_memory).best,
        }
        shares = {link: (moved[link] - self._moved_told.get(link, 0)) / seconds / rates[link] for link in moved}
        if self.passes.num_passes:
            shares["compute"] = self.passes.compute_share
        return shares
