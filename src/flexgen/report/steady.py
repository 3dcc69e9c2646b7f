"""The report of passes that were measured in the middle of a job: each of them, and the figures of all together."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen.base.quantities import counted, format_seconds, format_size
from flexgen.plan.search.ideal import Budgets, least_ideal_seconds
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.tell.middle import Middle
from flexgen.plan.workload import Workload
from flexgen.report.format import serially
from flexgen.report.pass_log import PassRecord
from flexgen.report.progress import RunReport


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPass:
    """One pass.

    Attributes:
        seconds: The time from the end of the pass before to its own end, with admission and sampling.
        num_sequences: The sequences in it.
        prompt_tokens: The prompt tokens that it computed.
        output_tokens: The tokens that it generated.
        expected_seconds: The seconds that it should have taken at typical rates.
        ideal_seconds: For each resource, its work divided by the best rate.
        wait_seconds: For each cause, the seconds in which there was nothing to compute.
        bytes_moved: For each link, the bytes that it moved meanwhile, some of them for later passes.
    """

    seconds: float
    num_sequences: int
    prompt_tokens: int
    output_tokens: int
    expected_seconds: float
    ideal_seconds: dict[str, float]
    wait_seconds: dict[str, float]
    bytes_moved: dict[str, int]

    @classmethod
    def of(cls, record: PassRecord, seconds: float, bytes_moved: Mapping[str, int]) -> MeasuredPass:
        """Return a pass as measured, from its record in the log."""
        work = record.work
        return cls(
            seconds=seconds, num_sequences=round(work.num_sequences), prompt_tokens=round(work.num_prompt_tokens),
            output_tokens=round(work.num_sampled), expected_seconds=record.expected_seconds,
            ideal_seconds={resource: float(each) for resource, each in record.ideal.items()}, wait_seconds=dict(record.waits),
            bytes_moved=dict(bytes_moved),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyFigures:
    """What is known of passes in the middle of a job beside their report (documented in docs/metrics.md).

    Attributes:
        num_prompts: The requests of the job that was planned.
        skipped_passes: The passes before those that were computed.
        prepare_seconds: The time that going through them and filling the KV cache took.
        middle_passes: The passes of the job, as planned, from the end of the first answer to the last admission.
        passes_per_s: The passes that count, over their time.
        pass_seconds: The "median", "least" and "most" seconds of a pass that counts.
        live_mean: The mean number of sequences in them.
        expected_tokens_per_s: The output tokens per second that the plan expected: of "these_passes", of the whole "middle", and of the
            "job" with its beginning and its end.
        warmup: The passes that were computed first, and do not count.
        passes: The passes that count.
    """

    num_prompts: int
    skipped_passes: int
    prepare_seconds: float
    middle_passes: int
    passes_per_s: float
    pass_seconds: dict[str, float]
    live_mean: float
    expected_tokens_per_s: dict[str, float]
    warmup: tuple[MeasuredPass, ...]
    passes: tuple[MeasuredPass, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyReport:
    """Passes that were measured in the middle of a job.

    Attributes:
        run: The report of these passes, as if they were a run.
        steady: What a run does not have.
    """

    run: RunReport
    steady: SteadyFigures

    def to_json(self) -> dict[str, Any]:
        """Return the keys of a run's report, and those of the steady state under "steady"."""
        return {**dataclasses.asdict(self.run), "steady": dataclasses.asdict(self.steady)}


def make_steady_report(
    report: RunReport,
    plan: Plan,
    workload: Workload,
    budgets: Budgets,
    middle: Middle,
    *,
    num_skipped: int,
    prepare_seconds: float,
    warmup: Sequence[MeasuredPass],
    passes: Sequence[MeasuredPass],
) -> SteadyReport:
    """Return the report of the passes that count.

    Their share of T* is that of the work of the job: of its prompt tokens or of its output tokens, whichever is less.

    Args:
        report: The report of the run that these passes were; what it says of requests is of those that ended in them.
        plan: The plan that was executed.
        workload: The job that it was made for.
        budgets: The memory that the least ideal time may use.
        middle: The passes that were to be measured.
        num_skipped: The passes that were not computed.
        prepare_seconds: The time that these took, with filling the KV cache.
        warmup: The passes that were computed first.
        passes: The passes that count, at least one.
    """
    prompts, outputs = (sum(getattr(each, name) for each in passes) for name in ("prompt_tokens", "output_tokens"))
    seconds = [each.seconds for each in passes]
    elapsed, expected = sum(seconds), sum(each.expected_seconds for each in passes)
    share = min(prompts / workload.prompt_tokens, outputs / workload.output_tokens)
    ideal = share * least_ideal_seconds(plan.spec, plan.machine, workload, budgets, plan.policy.dtype)
    chosen = ideal / (report.overlap * report.elapsed_seconds) if report.overlap else 1.0
    run = dataclasses.replace(
        report,
        elapsed_seconds=elapsed,
        prompt_tokens=prompts,
        output_tokens=outputs,
        prompt_tokens_per_s=prompts / elapsed,
        output_tokens_per_s=outputs / elapsed,
        total_tokens_per_s=(prompts + outputs) / elapsed,
        requests_per_s=report.num_requests / elapsed,
        overlap=report.overlap * report.elapsed_seconds / elapsed,
        plan=chosen,
        efficiency=ideal / elapsed,
        ideal_seconds=ideal,
        bytes_moved={link: sum(each.bytes_moved[link] for each in passes) for link in report.bytes_moved},
        efficiency_at_check=None if report.overlap_at_check is None else report.overlap_at_check * chosen,
    )
    steady = SteadyFigures(
        num_prompts=len(workload),
        skipped_passes=num_skipped,
        prepare_seconds=prepare_seconds,
        middle_passes=middle.num_passes,
        passes_per_s=len(passes) / elapsed,
        pass_seconds={"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)},
        live_mean=statistics.fmean(each.num_sequences for each in passes),
        expected_tokens_per_s={
            "these_passes": outputs / expected if expected else 0.0,
            "middle": middle.output_tokens_per_s,
            "job": plan.forecast.output_tokens_per_s,
        },
        warmup=tuple(warmup),
        passes=tuple(passes),
    )
    return SteadyReport(run=run, steady=steady)


def format_steady(report: SteadyReport) -> str:
    """Return what was measured, and what was expected of it, as text for people."""
    run, steady = report.run, report.steady
    count, of_pass = len(steady.passes), steady.pass_seconds
    moved = [f"{link} {format_size(size / count)}" for link, size in run.bytes_moved.items() if size]
    expected = steady.expected_tokens_per_s
    return "\n".join(
        [
            f"Steady state: {counted(count, 'pass', 'passes')}, after {counted(len(steady.warmup), 'pass', 'passes')} of warm-up and "
            f"{steady.skipped_passes:,} that were not computed",
            f"Throughput: {run.output_tokens_per_s:.2f} output tokens/s, {run.prompt_tokens_per_s:.2f} prompt tokens/s, "
            f"{steady.passes_per_s:.4g} passes/s",
            f"Expected:   {expected['these_passes']:.2f} output tokens/s in these passes, {expected['middle']:.2f} in the whole middle of "
            f"{counted(steady.num_prompts, 'prompt')}, {expected['job']:.2f} with its beginning and its end",
            f"A pass:     {format_seconds(of_pass['median'])} (median; {format_seconds(of_pass['least'])} to "
            f"{format_seconds(of_pass['most'])}), {steady.live_mean:.1f} sequences, {run.prompt_tokens / count:.1f} prompt tokens; "
            f"moved: {', '.join(moved) or 'nothing'}",
            f"Figures:    overlap {run.overlap:.2f}   plan {run.plan:.2f}   efficiency {run.efficiency:.2f}",
            *(f"Setting:    {each}" for each in serially(run)),
        ]
    )
