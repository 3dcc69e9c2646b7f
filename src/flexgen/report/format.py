"""Progress and reports as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexgen.base.quantities import counted, format_seconds, format_size
from flexgen.report.plans import aligned, format_choice, gains_of, resource_name
from flexgen.report.progress import BUSY_CORES, Progress, RunReport, StageReport

MOST_HELPS, LEAST_HELP = 3, 0.01  # how many gains a report mentions, and the smallest one
RATE_TOLERANCE = 0.15  # by how much a run's own rates may differ from those of the profile
LEAST_JUDGED_SECONDS = 5.0  # the rates of a shorter run say nothing about the machine


def format_progress(progress: Progress) -> str:
    """Return the progress as one line for a log."""
    total = "?" if progress.num_requests is None else f"{progress.num_requests:,}"
    links = ", ".join(f"{name} {share:.0%}" for name, share in progress.link_shares.items())
    return (
        f"{format_seconds(progress.elapsed_seconds)}: {progress.num_requests_done:,}/{total} requests, "
        f"{', '.join(token_rates(progress))}, "
        f"{place_of(progress, ', ')}, ETA {format_seconds(progress.eta_seconds)}" + (f"; {links}" if links else "")
    )


def place_of(progress: Progress, between: str) -> str:
    """Return how many sequences are alive, and where the pass in progress is; only the former where others make the passes."""
    live = f"{progress.num_live_sequences:,} live"
    return live + (f"{between}pass {progress.pass_index}, unit {progress.unit}/{progress.num_units}" if progress.num_units else "")


def token_rates(progress: Progress) -> list[str]:
    """Return the tokens per second of prompts and of what they are for, once there is some of it: answers, scores, or both."""
    rates = {"prompt": progress.prompt_tokens_per_s}
    if progress.output_tokens_per_s:
        rates["output"] = progress.output_tokens_per_s
    if progress.scored_tokens_per_s:
        rates["scored"] = progress.scored_tokens_per_s
    return [f"{name} {rate:,.1f} tokens/s" for name, rate in rates.items()]


def format_report(report: RunReport, done: str = "") -> str:
    """Return the closing report: what was done, how its speed compares with the plan, and what limited it.

    `format_details` returns the rest.  Remarks on the state of the machine during the run are on lines of their own after the second line.

    Args:
        report: The report of the run.
        done: What was done, in the caller's words; if empty, the requests are counted.
    """
    answered = f"{report.num_requests - report.num_errors:,} of {counted(report.num_requests, 'request')} answered"
    done = done or f"{answered}, {report.num_errors:,} with errors"
    took = f"{format_seconds(report.elapsed_seconds)} (after {format_seconds(report.load_seconds)} of loading)"
    told = [_speed(report), *serially(report), *_sparse(report), *_machine_lines(report), *_formats(report), *_limit(report)]
    return "\n".join([f"done in {took}: {done}", *told])


def serially(report: RunReport) -> list[str]:
    """Return that computing and copies waited for each other, if they did."""
    return [] if report.overlapping else ["without overlap: copies and computing waited for each other, which no plan expects"]


def _formats(report: RunReport) -> list[str]:
    """Return the formats that were chosen, and what the job was expected to take in them and in others."""
    if report.formats is None:
        return []
    return [f"formats: {'; '.join(format_choice(report.formats))}"]


def _sparse(report: RunReport) -> list[str]:
    """Return how many values next tokens did not read."""
    if not report.value_bytes_seen:
        return []
    share = report.value_bytes_unread / report.value_bytes_seen
    return [f"sparse attention: {share:.0%} of values not read, {format_size(report.value_bytes_unread)}"]


def _speed(report: RunReport) -> str:
    """Return how fast the run was and what was planned for the same passes (answers may have ended earlier than allowed)."""
    speed = f"speed: {_rate(report)}"
    planned = report.forecast.get("seconds_of_these_passes")
    if not planned or not report.elapsed_seconds:
        return speed
    share = planned / report.elapsed_seconds
    return f"{speed}, {share:.2f} of what was planned (the plan expected {format_seconds(planned)} for these passes)"


def _rate(report: RunReport) -> str:
    """Return the tokens per second: those of answers, or those of prompts where nothing was generated but something scored."""
    if report.output_tokens or not report.scored_tokens:
        return f"{report.output_tokens_per_s:,.1f} output tokens/s"
    return f"{report.prompt_tokens_per_s:,.1f} prompt tokens/s, shared ones included ({report.requests_per_s:,.2f} requests/s)"


def _limit(report: RunReport) -> list[str]:
    """Return the resource that decided most of the time, as planned, and the changes that would have helped, best first."""
    if not report.forecast.get("num_passes"):
        return []
    gains = sorted(gains_of(report.forecast["gain_per_gib"], report.forecast["gain_per_rate"]), key=lambda each: -each[1])
    helps = [f"{what} (+{gain:.1%} tokens/s)" for what, gain in gains[:MOST_HELPS] if gain >= LEAST_HELP]
    told = f"what would help: {', '.join(helps)}" if helps else "nothing would help much by itself"
    return [f"limit: {resource_name(report.forecast['bottleneck'])}; {told}"]


def format_details(report: RunReport) -> str:
    """Return the rest of the report: where bytes lived and moved, what computing waited for, and how efficient the run was."""
    lines = [
        f"{counted(report.num_requests, 'request')} ({counted(report.num_errors, 'error')}): "
        f"{report.output_tokens_per_s:,.2f} output tokens/s, {report.total_tokens_per_s:,.2f} tokens/s in all, "
        f"{report.requests_per_s:,.3f} requests/s",
        f"{report.prompt_tokens:,} prompt and {counted(report.output_tokens, 'output token')}"
        + (f", {counted(report.scored_tokens, 'token')} scored," if report.scored_tokens else "")
        + f" in {counted(report.num_passes, 'pass', 'passes')}; "
        f"ended by: {_counts(report.finish_reasons)}; {counted(report.num_preemptions, 'preemption')}"
        + (f"; {counted(report.recomputed_tokens, 'token')} computed again" if report.recomputed_tokens else "")
        + (f"; {counted(report.shared_prompt_tokens, 'prompt token')} shared, not computed" if report.shared_prompt_tokens else ""),
        "",
        *_placement_table(report.placement),
        "",
        *_resource_table(report),
        "",
        f"waited for: {_seconds_of(report.wait_seconds)}",
        f"host memory: peak {format_size(report.peak_host_bytes)} of {format_size(report.host_budget_bytes)}",
    ]
    if report.device_budget_bytes:
        lines.append(f"device memory: peak {format_size(report.peak_device_bytes)} of {format_size(report.device_budget_bytes)}")
    lines.append(
        f"overlap {report.overlap:.2f}   plan {report.plan:.2f}   efficiency {report.efficiency:.2f}   "
        f"(the least ideal time is {format_seconds(report.ideal_seconds)})"
    )
    return "\n".join(lines + _checked(report) + _against_forecast(report) + _stages(report.stages))


def _stages(stages: Sequence[StageReport]) -> list[str]:
    """Return a line for each stage of a pipeline."""
    return [
        f"stage {number} on {each.host}: layers {each.first_layer} to {each.first_layer + each.num_layers - 1}, a pass takes "
        f"{format_seconds(each.pass_seconds)} (planned {format_seconds(each.planned_pass_seconds)}, bound by "
        f"{resource_name(each.bound_by)}), busy {each.busy_share:.0%}; waited for: {_seconds_of(each.waits)}"
        for number, each in enumerate(stages)
    ]


def _checked(report: RunReport) -> list[str]:
    """Return how fast the machine was right before and after the run, and how efficient the run was at those rates."""
    if not any(report.check_rates.values()) or report.overlap_at_check is None or report.efficiency_at_check is None:
        return []
    resources = dict.fromkeys(resource for rates in report.check_rates.values() for resource in rates)
    told = [f"{resource_name(name)} {' and '.join(f'{rate:.2f}' for rate in _moments(report, name))}" for name in resources]
    return [
        f"this machine itself, of the rates of its profile, before and after the run: {', '.join(told)}; at these rates "
        f"overlap {_share_at_check(report.overlap_at_check)}, efficiency {_share_at_check(report.efficiency_at_check)}"
    ]


def _share_at_check(share: float) -> str:
    """Return a share of what the machine could do at the ends of the run; in between it may have been faster."""
    return f"{share:.2f}" if share <= 1 else "above 1.00 (it was faster in between)"


def _moments(report: RunReport, resource: str) -> list[float]:
    """Return the machine's rates right before and after the run, relative to those of the profile."""
    return [rates[resource] for rates in report.check_rates.values() if resource in rates]


def _against_forecast(report: RunReport) -> list[str]:
    """Return the forecast beside the measured values."""
    if not report.forecast.get("num_passes"):
        return []
    rate = report.forecast["output_tokens_per_s"]
    return [
        f"expected: {f'{rate:,.2f} output tokens/s in ' if rate else ''}{format_seconds(report.forecast['seconds'])}; "
        f"for the passes that were made {format_seconds(report.forecast['seconds_of_these_passes'])}"
    ]


def _machine_lines(report: RunReport) -> list[str]:
    """Return advice for a machine that was not as fast as measured."""
    lines: list[str] = []
    if report.elapsed_seconds < LEAST_JUDGED_SECONDS:
        return lines
    for resource, ratio in report.rate_ratios.items():
        if abs(ratio - 1) > RATE_TOLERANCE:
            how = f"{abs(ratio - 1):.0%} {'faster' if ratio > 1 else 'slower'}"
            lines.append(f"{resource_name(resource)} was {how} than in the profile of this machine{_explained(report, resource, ratio)}")
    return lines


def _explained(report: RunReport, resource: str, ratio: float) -> str:
    """Return why the run's own rate differed from that of the profile, and what to do about it."""
    if ratio > 1:
        return ": `flexgen profile` measures this machine again"
    moments = _moments(report, "disk_read" if resource == "disk" else resource)
    if report.busy_cores is not None and report.busy_cores > BUSY_CORES:
        return f": other programs kept {report.busy_cores:.1f} cores busy meanwhile; the profile is kept"
    if not moments:
        return ": other programs may have been using it; the profile keeps the faster rates, so there is no need to measure again"
    if min(moments) < 1 - RATE_TOLERANCE:
        return f", and so was this machine itself ({min(moments):.2f} of its profile's rate): other programs use it; the profile is kept"
    return ", though this machine itself was not: either the plan misjudges this model, or other programs used the machine in between"


def _placement_table(placement: Mapping[str, Mapping[str, int]]) -> list[str]:
    tiers = [tier for tier in ("device", "host", "disk") if any(tier in homes for homes in placement.values())]
    rows = [["placement", *tiers]]
    for what, homes in placement.items():
        rows.append([what, *(format_size(homes[tier]) if homes.get(tier) else "-" for tier in tiers)])
    return aligned(rows)


def _resource_table(report: RunReport) -> list[str]:
    """Return a table of the bytes per link and pass, and of the ideal seconds of every resource as a share of the run."""
    rows = [["resource", "moved", "per pass", "ideal time", "share"]]
    for name in dict.fromkeys([*report.bytes_moved, *report.busiest_seconds]):
        moved, busy = report.bytes_moved.get(name), report.busiest_seconds.get(name)
        if not moved and not busy:
            continue
        rows.append(
            [
                name,
                "-" if moved is None else format_size(moved),
                "-" if moved is None else format_size(moved / max(1, report.num_passes)),
                "-" if busy is None else format_seconds(busy),
                "-" if busy is None or not report.elapsed_seconds else f"{busy / report.elapsed_seconds:.0%}",
            ]
        )
    return aligned(rows)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "nothing"


def _seconds_of(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {format_seconds(value)}" for name, value in seconds.items() if value > 0) or "nothing"
