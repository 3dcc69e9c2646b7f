"""What a run tells while it goes on and when it ends: plain values, drawn by cli.py.  No torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A snapshot within a run.

    Attributes:
        num_requests: of the run, or None when the source's length is unknown.
        unit, num_units: how far the pass in progress has come.
        link_shares: achieved over attainable rate since the last snapshot, by resource ("disk_read", "compute", ...).
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
    link_shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """How a run went; the keys of `--metrics FILE` (documented in docs/metrics.md).

    Attributes:
        overlap: sum over passes of the busiest resource's ideal time / wall time.
        plan: T* / that sum, where T* is the least ideal time of the job within its budgets.
        efficiency: T* / wall time.
        ideal_seconds: T*.
        busiest_seconds: resource -> sum of its ideal seconds over the passes.
        placement: tier -> bytes, for "weights" and "kv" (peak), as they really were.
        bytes_moved: link -> bytes over the run. wait_seconds: what computing waited for -> seconds.
        peak_host_bytes: peak resident memory of the process; host_budget_bytes stands beside it.
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
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)
