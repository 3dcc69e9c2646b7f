"""Snapshots of a run in progress and its closing report, as plain values.  Drawing them is up to cli/.  Needs no torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from flexgen.plan.formats import FormatChoice

SCHEMA_VERSION = 1
# From this many cores on, the load of other programs affects the measured rates.
BUSY_CORES = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A snapshot of a run in progress.

    Attributes:
        num_requests: The number of requests of the run, or None when the length of the source is unknown.
        unit: The unit that the pass in progress has reached.
        num_units: The number of units of a pass.
        scored_tokens: The number of positions at which known tokens were scored.
        scored_tokens_per_s: The number of these per second.
        link_shares: For each resource ("disk_read", "compute", ...), the achieved over the attainable rate since the last snapshot.
    """

    elapsed_seconds: float
    num_requests: int | None
    num_requests_done: int
    num_live_sequences: int
    prompt_tokens: int
    output_tokens: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    eta_seconds: float | None
    pass_index: int
    unit: int
    num_units: int
    scored_tokens: int = 0
    scored_tokens_per_s: float = 0.0
    link_shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedMachine:
    """The rates of the machine right before and right after a run.

    Attributes:
        start: For each resource ("compute", "disk_read"), its rate before the run over the typical rate of the profile.
        end: The same after the run.
        busy_cores: The cores that other programs used in between, on average.
    """

    start: dict[str, float]
    end: dict[str, float]
    busy_cores: float

    def mean(self) -> dict[str, float]:
        """Return, for each resource, the mean of both measurements."""
        names = dict.fromkeys([*self.start, *self.end])
        found = {name: [rates[name] for rates in (self.start, self.end) if name in rates] for name in names}
        return {name: sum(rates) / len(rates) for name, rates in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """One stage of a pipeline: what it was planned to do, and what it did.

    Attributes:
        host: The name of its host.
        first_layer: The first decoder layer that it computes.
        num_layers: The number of layers.
        bound_by: The resource that decides most of a pass, as planned.
        planned_pass_seconds: The expected time of a pass with a full block.
        passes: The number of passes.
        pass_seconds: The mean time of a pass, without waits for other stages.
        busy_share: The time of its passes, without waits for other stages, over the time of the run.
        waits: For each cause, the seconds in which it had nothing to compute within passes.
        bytes_moved: For each link of its machine, the bytes that it has moved.
    """

    host: str
    first_layer: int
    num_layers: int
    bound_by: str
    planned_pass_seconds: float
    passes: int
    pass_seconds: float
    busy_share: float
    waits: dict[str, float]
    bytes_moved: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """The closing report of a run; its fields are the keys of `--metrics FILE` (documented in docs/metrics.md).

    Attributes:
        overlap: The ideal time of the busiest resource, summed over the passes, over the wall time.
        overlapping: Whether bytes could be copied while something was computed; false in a run that shows what that is worth.
        plan: T* over that sum, where T* is the least ideal time of the job within its budgets.
        efficiency: T* over the wall time.
        ideal_seconds: T*.
        busiest_seconds: For each resource, the sum of its ideal seconds over the passes.
        placement: For each tier, the bytes of "weights" and of "kv" (at the peak), as measured.
        bytes_moved: For each link, the bytes that it moved during the run.
        wait_seconds: For each cause, the seconds that computing waited for it.
        output_tokens: Tokens that this run generated; those that an earlier run generated are counted in `recomputed_tokens`.
        scored_tokens: Known tokens (of prompts, or alternatives after them) whose log probabilities this run computed.
        recomputed_tokens: Tokens of prompts and answers that were computed again, after a preemption or to resume answers of an earlier
            run.
        forecast: The forecast before the first pass (the fields of Forecast), and as seconds_of_these_passes the seconds that the passes of
            this run should have taken; empty without a forecast.
        rate_ratios: For each resource that was busy long enough to measure, the run's own rate over that of the profile.
        check_rates: For "start" and "end" of the run and each resource, the machine's rate at that moment over the typical rate of the
            profile; empty if the machine was not checked.
        busy_cores: The cores that other programs used during the run; None if the machine was not checked.
        overlap_at_check: `overlap` with the best rates scaled by the mean of `check_rates`; None if the machine was not checked.
        efficiency_at_check: `efficiency` with the same rates; None if the machine was not checked.
        shared_prompt_tokens: Prompt tokens that were not computed because another request that begins with them had computed them.
        formats: The formats of weights and KV that were chosen, and what they were chosen from; None where there was no choice.
        stages: For each stage of a pipeline what it was planned to do, and what it did (docs/distributed.md); empty on one machine.
        value_bytes_seen: Under sparse attention, the bytes of all values that next tokens saw, over all layers; otherwise 0.
        value_bytes_unread: The bytes of these that were not read, as counted; values on disk and on a device are all read.
        peak_host_bytes: The peak resident memory of the process, to compare with `host_budget_bytes`.
        peak_device_bytes: The peak memory of the process on the device, its context and libraries included, by the driver's count; on the
            simulated device, which has no driver, the bytes of its arenas.
    """

    elapsed_seconds: float
    load_seconds: float
    num_requests: int
    num_errors: int
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    num_passes: int
    overlap: float
    plan: float
    efficiency: float
    ideal_seconds: float
    busiest_seconds: dict[str, float]
    placement: dict[str, dict[str, int]]
    bytes_moved: dict[str, int]
    wait_seconds: dict[str, float]
    peak_host_bytes: int
    host_budget_bytes: int
    peak_device_bytes: int
    device_budget_bytes: int
    num_preemptions: int
    finish_reasons: dict[str, int]
    policy: dict[str, object]
    machine: dict[str, object]
    model: str
    versions: dict[str, str]
    recomputed_tokens: int = 0
    forecast: dict[str, Any] = field(default_factory=dict)
    rate_ratios: dict[str, float] = field(default_factory=dict)
    shared_prompt_tokens: int = 0
    value_bytes_seen: int = 0
    value_bytes_unread: int = 0
    prompt_tokens_per_s: float = 0.0
    scored_tokens: int = 0
    check_rates: dict[str, dict[str, float]] = field(default_factory=dict)
    busy_cores: float | None = None
    overlap_at_check: float | None = None
    efficiency_at_check: float | None = None
    overlapping: bool = True
    formats: FormatChoice | None = None
    stages: list[StageReport] = field(default_factory=list[StageReport])
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)
