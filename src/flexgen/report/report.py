"""Builds the report of a run (the three figures, bytes, waits and placement) from its log, its plan and its placement."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flexgen.plan.machine import has_device_tier
from flexgen.plan.search.ideal import Budgets, least_ideal_seconds
from flexgen.plan.tell.forecast import Forecast, Plan
from flexgen.plan.workload import Workload
from flexgen.report.pass_log import PassLog
from flexgen.report.progress import CheckedMachine, RunReport
from flexgen.report.run_log import RunLog

LEAST_SHARE = 0.1  # as a fraction of a run's time: the rate of a resource that was busy for less cannot be judged


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """The inputs of a report besides the run and its plan.

    Attributes:
        load_seconds: The seconds that loading the model took.
        budgets: The memory that the least ideal time may use.
        check: A function that measures the machine again and returns its rates before and after the run; None if the job is too short for
            that.
        overlapping: As in the report.
    """

    load_seconds: float
    budgets: Budgets
    check: Callable[[], CheckedMachine] | None = None
    overlapping: bool = True


def make_report(log: RunLog, plan: Plan, placement: dict[str, dict[str, int]], device_bytes: int, context: RunContext) -> RunReport:
    """Return the report of a run.

    Args:
        log: The log of the run.
        plan: The plan that was executed.
        placement: For each tier, the bytes of "weights" and of "kv" (at the peak), as measured.
        device_bytes: The most memory that was taken on the device.
        context: The other inputs of the report.
    """
    passes, counts = log.passes, log.counts
    elapsed = max(log.elapsed_seconds, 1e-9)
    busiest = passes.busiest_seconds
    ideal = _least_ideal_seconds(log, plan, context.budgets)
    checked = context.check() if context.check is not None else None
    at_check = passes.busiest_seconds_at(checked.mean()) / elapsed if checked is not None else None
    return RunReport(
        elapsed_seconds=log.elapsed_seconds,
        load_seconds=context.load_seconds,
        num_requests=counts.requests,
        num_errors=counts.errors,
        prompt_tokens=counts.prompt_tokens,
        output_tokens=counts.output_tokens,
        output_tokens_per_s=counts.output_tokens / elapsed,
        total_tokens_per_s=(counts.prompt_tokens + counts.output_tokens) / elapsed,
        prompt_tokens_per_s=counts.prompt_tokens / elapsed,
        scored_tokens=counts.scored_tokens,
        requests_per_s=counts.requests / elapsed,
        num_passes=passes.num_passes,
        overlap=busiest / elapsed,
        overlapping=context.overlapping,
        plan=ideal / busiest if busiest else 1.0,
        efficiency=ideal / elapsed,
        ideal_seconds=ideal,
        busiest_seconds=dict(passes.ideal),
        placement=placement,
        bytes_moved=log.bytes_moved(),
        wait_seconds=dict(passes.waits),
        forecast=_told(plan.forecast, passes),
        rate_ratios=_rate_ratios(log, plan.policy.device),
        check_rates={"start": checked.start, "end": checked.end} if checked is not None else {},
        busy_cores=checked.busy_cores if checked is not None else None,
        overlap_at_check=at_check,
        efficiency_at_check=None if at_check is None else at_check * (ideal / busiest if busiest else 1.0),
        peak_host_bytes=_peak_resident_bytes(),
        host_budget_bytes=plan.forecast.budget_bytes["host"],
        peak_device_bytes=device_bytes,
        device_budget_bytes=plan.forecast.budget_bytes["device"],
        num_preemptions=counts.preemptions,
        recomputed_tokens=counts.recomputed_tokens,
        shared_prompt_tokens=counts.shared_prompt_tokens,
        value_bytes_seen=log.values_attended()["seen"],
        value_bytes_unread=log.values_attended()["unread"],
        finish_reasons=dict(log.finish_reasons),
        policy=dataclasses.asdict(plan.policy),
        machine=json.loads(plan.machine.to_json()),
        model=plan.spec.name,
        formats=plan.formats,
        versions=_versions(),
    )


def _least_ideal_seconds(log: RunLog, plan: Plan, budgets: Budgets) -> float:
    """Return T* of the requests that were served."""
    served = [index for index, sizes in enumerate(zip(log.generated, log.scored, strict=True)) if any(sizes)]
    workload = Workload(
        prompt_lens=tuple(log.given[index] for index in served),
        output_lens=tuple(log.generated[index] for index in served),
        shared_lens=tuple(log.found[index] for index in served),
        scored_lens=tuple(log.scored[index] for index in served),
    )
    return least_ideal_seconds(plan.spec, plan.machine, workload, budgets, plan.policy.dtype)


def _told(forecast: Forecast, passes: PassLog) -> dict[str, object]:
    """Return the forecast, and the seconds that the passes of this run should have taken."""
    return {**dataclasses.asdict(forecast), "seconds_of_these_passes": passes.expected_seconds}


def _rate_ratios(log: RunLog, device: str) -> dict[str, float]:
    """Return the run's own rate over the expected one, for each resource that was busy long enough to measure."""
    passes, ratios = log.passes, dict[str, float]()
    disk, busy = passes.expected.get("disk", 0.0), log.disk_busy_seconds()
    if disk > LEAST_SHARE * passes.seconds and busy > 0:
        ratios["disk"] = disk / busy
    computing = passes.seconds - sum(passes.waits.values())
    if not has_device_tier(device) and passes.expected.get("compute", 0.0) > LEAST_SHARE * passes.seconds and computing > 0:
        ratios["compute"] = passes.expected["compute"] / computing
    return ratios


def _peak_resident_bytes() -> int:
    """Return VmHWM; getrusage would report the parent's peak if that was larger."""
    with Path("/proc/self/status").open(encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("flexgen-engine", "torch", "transformers", "numpy", "numba", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
