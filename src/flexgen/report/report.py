"""How a run went: the three figures, bytes, waits and placement, from the trace.  Measures nothing itself."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen.plan.search.ideal import Budgets, least_ideal_seconds
from flexgen.plan.tell.forecast import Forecast
from flexgen.plan.workload import Workload
from flexgen.report.progress import CheckedMachine, RunReport

if TYPE_CHECKING:
    from flexgen.engine.engine import Engine
    from flexgen.report.pass_log import Trace
    from flexgen.report.run_log import Record


LEAST_SHARE = 0.1  # of a run's time: what was busy for less says little about its rate


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What the report needs to know beyond the trace.

    Attributes:
        budgets: what the least ideal time may use. forecast: what was expected before the first pass, of `workload`.
        check: what a look at the machine found before the run, and finds when it is called; None where the job is too short for that.
    """

    model: str
    host_budget_bytes: int
    device_budget_bytes: int
    budgets: Budgets
    forecast: Forecast | None = None
    workload: Workload | None = None
    check: Callable[[], CheckedMachine] | None = None


def make_report(engine: Engine, context: RunContext) -> RunReport:
    """The report of a run."""
    record = engine.record
    trace, answers = record.trace, record.answers
    counts = answers.counts
    elapsed = max(record.elapsed_seconds, 1e-9)
    served = [place for place, generated in enumerate(answers.generated) if generated > 0]
    workload = Workload(
        prompt_lens=tuple(answers.given[place] for place in served),
        output_lens=tuple(answers.generated[place] for place in served),
        shared_lens=tuple(answers.found[place] for place in served),
    )
    busiest = trace.busiest_seconds
    ideal = least_ideal_seconds(engine.spec, engine.machine, workload, context.budgets, engine.policy.dtype, also=(engine.policy,))
    ideal = min(ideal, busiest)  # what ran is a way to run the job
    checked = context.check() if context.check is not None else None
    at_check = trace.busiest_seconds_at(checked.mean()) / elapsed if checked is not None else None
    return RunReport(
        elapsed_seconds=record.elapsed_seconds,
        load_seconds=engine.load_seconds,
        num_requests=counts.requests,
        num_errors=counts.errors,
        prompt_tokens=counts.prompt_tokens,
        output_tokens=counts.output_tokens,
        output_tokens_per_s=counts.output_tokens / elapsed,
        total_tokens_per_s=(counts.prompt_tokens + counts.output_tokens) / elapsed,
        requests_per_s=counts.requests / elapsed,
        num_passes=trace.num_passes,
        overlap=busiest / elapsed,
        plan=ideal / busiest if busiest else 1.0,
        efficiency=ideal / elapsed,
        ideal_seconds=ideal,
        busiest_seconds=dict(trace.ideal),
        placement={"weights": _weights_placement(engine), "kv": dict(engine.cache.peak_bytes)},
        bytes_moved=record.bytes_moved(),
        wait_seconds=dict(trace.waits),
        forecast=_told(engine.forecast, trace),
        rate_ratios=_rate_ratios(record, engine.policy.device),
        check_rates={"start": checked.start, "end": checked.end} if checked is not None else {},
        busy_cores=checked.busy_cores if checked is not None else None,
        overlap_at_check=at_check,
        efficiency_at_check=None if at_check is None else at_check * (ideal / busiest if busiest else 1.0),
        peak_host_bytes=_peak_resident_bytes(),
        host_budget_bytes=context.host_budget_bytes,
        peak_device_bytes=engine.runner.device_bytes(),
        device_budget_bytes=context.device_budget_bytes,
        num_preemptions=counts.preemptions,
        recomputed_tokens=counts.recomputed_tokens,
        shared_prompt_tokens=counts.shared_prompt_tokens,
        finish_reasons=dict(answers.finish_reasons),
        policy=dataclasses.asdict(engine.policy),
        machine=json.loads(engine.machine.to_json()),
        model=context.model,
        versions=_versions(),
    )


def _told(forecast: Forecast | None, trace: Trace) -> dict[str, object]:
    """What was expected, and what the passes that there were should have taken."""
    if forecast is None:
        return {}
    return {**dataclasses.asdict(forecast), "seconds_of_these_passes": trace.expected_seconds}


def _rate_ratios(record: Record, device: str) -> dict[str, float]:
    """Resource -> the run's own rate over the expected one, where the run kept the resource busy long enough to tell."""
    trace, ratios = record.trace, dict[str, float]()
    disk, busy = trace.expected.get("disk", 0.0), record.disk_busy_seconds()
    if disk > LEAST_SHARE * trace.seconds and busy > 0:
        ratios["disk"] = disk / busy
    computing = trace.seconds - sum(trace.waits.values())
    if device == "cpu" and trace.expected.get("compute", 0.0) > LEAST_SHARE * trace.seconds and computing > 0:
        ratios["compute"] = trace.expected["compute"] / computing
    return ratios


def _weights_placement(engine: Engine) -> dict[str, int]:
    """Bytes of the units by home, as assigned."""
    placed: dict[str, int] = {}
    for layout, home in zip(engine.runner.model.layouts, engine.runner.homes, strict=True):
        placed[home] = placed.get(home, 0) + (layout.stored_bytes if home == "disk" else layout.decoded_bytes)
    return placed


def _peak_resident_bytes() -> int:
    """VmHWM; getrusage would report the parent's peak where that was larger."""
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
