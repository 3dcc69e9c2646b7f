"""Plans, progress and reports as text for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flexgen.base.quantities import format_seconds, format_size
from flexgen.plan.price.memory import ENCODED
from flexgen.plan.tell.spill import ENDURANCE_BYTES, LEAST_SPILL_GAIN, Spill, endurance_share
from flexgen.report.progress import BUSY_CORES, Progress, RunReport

if TYPE_CHECKING:
    from flexgen.plan.policy import Fractions, Policy
    from flexgen.plan.tell.alternatives import ParetoPoint
    from flexgen.plan.tell.forecast import Forecast, Plan

LEAST_SHOWN = 0.01  # as a fraction of a pass: resources that take less are left out
LEAST_GAIN_SHOWN = 0.001
LEAST_SHARE_SHOWN = 0.001  # as a fraction of an SSD's life
SHOWN_SPEEDUP = 0.1  # what a resource is worth is shown for a rate that is faster by this fraction
MOST_HELPS, LEAST_HELP = 3, 0.01  # how many gains a report mentions, and the smallest one
RATE_TOLERANCE = 0.15  # by how much a run's own rates may differ from those of the profile
LEAST_JUDGED_SECONDS = 5.0  # the rates of a shorter run say nothing about the machine


def format_plan(plan: Plan) -> str:
    """Return the plan as text: where bytes will live, what a pass will carry, and the forecast."""
    policy, spec = plan.policy, plan.spec
    staging = policy.host_ring_bytes + policy.device_ring_bytes
    encoded = plan.forecast.memory_bytes["host"].get(ENCODED, 0)
    kept = f"{format_size(encoded)} kept encoded ({spec.number_format}), decoded in every pass; " if encoded else ""
    lines = [
        f"plan: {policy.device}, {policy.dtype}, {policy.schedule} schedule, {policy.compute_threads} compute and "
        f"{policy.io_threads} I/O threads",
        f"  weights  {format_size(spec.decoded_bytes)} in {len(spec.units)} units: {_shares(policy.weights)}; "
        f"{kept}staging {format_size(staging)}, workspace {format_size(policy.workspace_bytes)}",
        f"  KV       {format_size(policy.kv_bytes)}: {_shares(policy.kv)}; {_kv_format(policy)}"
        f"{format_size(spec.kv_bytes_per_token)} per token, "
        f"pages of {policy.page_tokens} tokens",
        f"  a pass   up to {policy.max_num_seqs:,} sequences and, on average, {policy.prefill_tokens:,} prompt tokens; "
        f"{policy.micro_batch_tokens:,} tokens at a time",
    ]
    return "\n".join(lines + [f"  {line}" for line in format_forecast(plan.forecast)])


def _kv_format(policy: Policy) -> str:
    """Return the format of KV, if it is not the dtype of computing, as the beginning of a list."""
    told = [] if policy.kv_format is None else [policy.kv_format]
    if policy.sparse_attention is not None:
        told.append(f"sparse attention {policy.sparse_attention:.3g}")
    return "".join(f"{each}, " for each in told)


def format_forecast(forecast: Forecast) -> list[str]:
    """Return the forecast as lines: time, rates, the resources of a pass with the busiest marked, and what more memory is worth."""
    if not forecast.num_passes:
        return []
    resources = sorted(forecast.resource_seconds.items(), key=lambda each: (each[0] != forecast.bottleneck, -each[1]))
    # Of passes that differ, the resource that decides most of the time need not be the one with the largest mean.
    often = " most of the time" if forecast.resource_seconds[forecast.bottleneck] < max(forecast.resource_seconds.values()) else ""
    parts = [
        f"{_resource(name)} {format_seconds(seconds)}{f' (the bottleneck{often})' if name == forecast.bottleneck else ''}"
        for name, seconds in resources
        if seconds >= LEAST_SHOWN * forecast.pass_seconds or name == forecast.bottleneck
    ]
    lines = [
        f"expected {format_seconds(forecast.seconds)} for {_expected_work(forecast)}; the longest request takes "
        f"{format_seconds(forecast.request_seconds)}",
        f"         {forecast.num_passes:,} passes of {format_seconds(forecast.pass_seconds)}, {forecast.live_mean:,.0f} sequences in each: "
        + ", ".join(parts),
    ]
    lines += [f"         {line}" for line in _written(forecast)]
    if forecast.num_refused:
        lines.append(f"         {forecast.num_refused:,} requests can never fit")
    gains = _gains(forecast.gain_per_gib, forecast.gain_per_rate)
    told = [f"{what}: +{gain:.1%}" for what, gain in gains if gain >= LEAST_GAIN_SHOWN]
    return [*lines, f"         what would help, at the margin, in tokens/s: {'; '.join(told)}"] if told else lines


def _expected_work(forecast: Forecast) -> str:
    """Return what is expected to be computed, and how fast."""
    scores = f" and {forecast.scored_tokens:,} scored positions" if forecast.scored_tokens else ""
    if not forecast.output_tokens:
        rate = forecast.prompt_tokens / max(forecast.seconds, 1e-9)
        return f"{forecast.prompt_tokens:,} prompt tokens{scores}: {rate:,.2f} prompt tokens/s"
    return (
        f"{forecast.output_tokens:,} output tokens{scores}: {forecast.output_tokens_per_s:,.2f} tokens/s, "
        f"{forecast.full_block_tokens_per_s:,.2f} with a full block"
    )


def _written(forecast: Forecast) -> list[str]:
    """Return lines about the KV written to disk: how much it is, what it means for the SSD, and how the alternative plan compares."""
    spill, written = forecast.spill, forecast.disk_written_bytes
    lines: list[str] = []
    if written:
        share = endurance_share(written)
        told = f"{share:.1%}" if share >= LEAST_SHARE_SHOWN else f"less than {LEAST_SHARE_SHOWN:.1%}"
        rated = f"an SSD rated for {ENDURANCE_BYTES / 1e12:.0f} TB written"
        lines.append(f"{format_size(written)} of KV will be written to disk: {told} of what {rated} takes in its life; --disk 0 forbids it")
    if spill is not None and spill.chosen:
        lines.append(f"without KV on disk the job would take {format_seconds(spill.seconds_without)}, {_longer(spill)}")
    elif spill is not None:
        saved = format_seconds(spill.seconds_without - spill.seconds)
        lines.append(
            f"no KV on disk: it would write {format_size(spill.written_bytes)} and save {saved} ({spill.gain:.0%} more tokens/s, "
            f"less than {LEAST_SPILL_GAIN:.0%}); --disk SIZE allows it"
        )
    return lines


def _longer(spill: Spill) -> str:
    return f"{spill.gain:.0%} longer" if spill.gain >= 0 else f"{-spill.gain:.0%} shorter"


def format_curve(curve: Sequence[ParetoPoint]) -> str:
    """Return a table of plans by request time, one per line, shortest requests first."""
    rows = [["longest request", "tokens/s", "sequences", "schedule", "weights", "KV"]]
    for point in curve:
        policy = point.policy
        longest = point.request_seconds  # rounded up, so that the plan keeps what is shown as a bound
        longest = math.ceil(10 * longest) / 10 if longest < 60 else math.ceil(longest)
        cells = [format_seconds(longest), f"{point.tokens_per_s:,.2f}", f"{policy.max_num_seqs:,}", policy.schedule]
        rows.append([*cells, _shares(policy.weights), _shares(policy.kv)])
    return "\n".join(f"  {line}" for line in _table(rows))


def format_memory(forecast: Forecast) -> list[str]:
    """Return one line per tier with the memory that is reserved on it."""
    lines: list[str] = []
    for tier, parts in forecast.memory_bytes.items():
        listed = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
        lines.append(f"  {tier:<7}  {format_size(sum(parts.values()))} of {format_size(forecast.budget_bytes.get(tier, 0))}: {listed}")
    return lines


def _resource(name: str) -> str:
    return "issuing work" if name == "lead" else name.replace("_", " ")


def _shares(fractions: Fractions) -> str:
    shares = dataclasses.asdict(fractions)
    return ", ".join(f"{tier} {share:.1%}" for tier, share in shares.items() if share) or "nowhere"


def format_progress(progress: Progress) -> str:
    """Return the progress as one line for a log."""
    total = "?" if progress.num_requests is None else f"{progress.num_requests:,}"
    links = ", ".join(f"{name} {share:.0%}" for name, share in progress.link_shares.items())
    return (
        f"{format_seconds(progress.elapsed_seconds)}: {progress.num_requests_done:,}/{total} requests, "
        f"{', '.join(token_rates(progress))}, "
        f"{progress.num_live_sequences:,} live, pass {progress.pass_index}, unit {progress.unit}/{progress.num_units}, "
        f"ETA {format_seconds(progress.eta_seconds)}" + (f"; {links}" if links else "")
    )


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
    done = (
        done
        or f"{report.num_requests - report.num_errors:,} of {report.num_requests:,} requests answered, {report.num_errors:,} with errors"
    )
    took = f"{format_seconds(report.elapsed_seconds)} (after {format_seconds(report.load_seconds)} of loading)"
    return "\n".join([f"done in {took}: {done}", _speed(report), *_sparse(report), *_machine_lines(report), *_limit(report)])


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
    gains = sorted(_gains(report.forecast["gain_per_gib"], report.forecast["gain_per_rate"]), key=lambda each: -each[1])
    helps = [f"{what} (+{gain:.1%} tokens/s)" for what, gain in gains[:MOST_HELPS] if gain >= LEAST_HELP]
    told = f"what would help: {', '.join(helps)}" if helps else "nothing would help much by itself"
    return [f"limit: {_resource(report.forecast['bottleneck'])}; {told}"]


def _gains(per_gib: Mapping[str, float], per_rate: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return pairs of a resource that could be increased and the relative gain in tokens/s, best first."""
    memory = [(f"1 GiB more of {tier} memory (--{tier}-mem)", gain) for tier, gain in per_gib.items()]
    return memory + [(f"{_resource(name)} {SHOWN_SPEEDUP:.0%} faster", SHOWN_SPEEDUP * gain) for name, gain in per_rate.items()]


def format_details(report: RunReport) -> str:
    """Return the rest of the report: where bytes lived and moved, what computing waited for, and how efficient the run was."""
    lines = [
        f"{report.num_requests:,} requests ({report.num_errors:,} errors): {report.output_tokens_per_s:,.2f} output tokens/s, "
        f"{report.total_tokens_per_s:,.2f} tokens/s in all, {report.requests_per_s:,.3f} requests/s",
        f"{report.prompt_tokens:,} prompt and {report.output_tokens:,} output tokens"
        + (f", {report.scored_tokens:,} tokens scored," if report.scored_tokens else "")
        + f" in {report.num_passes:,} passes; "
        f"ended by: {_counts(report.finish_reasons)}; {report.num_preemptions:,} preemptions"
        + (f"; {report.recomputed_tokens:,} tokens computed again" if report.recomputed_tokens else "")
        + (f"; {report.shared_prompt_tokens:,} prompt tokens shared, not computed" if report.shared_prompt_tokens else ""),
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
    return "\n".join(lines + _checked(report) + _against_forecast(report))


def _checked(report: RunReport) -> list[str]:
    """Return how fast the machine was right before and after the run, and how efficient the run was at those rates."""
    if not any(report.check_rates.values()) or report.overlap_at_check is None or report.efficiency_at_check is None:
        return []
    resources = dict.fromkeys(resource for rates in report.check_rates.values() for resource in rates)
    told = [f"{_resource(name)} {' and '.join(f'{rate:.2f}' for rate in _moments(report, name))}" for name in resources]
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
            lines.append(f"{_resource(resource)} was {how} than in the profile of this machine{_explained(report, resource, ratio)}")
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
    return _table(rows)


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
    return _table(rows)


def _table(rows: list[list[str]]) -> list[str]:
    """Align the columns of a table: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["   ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "nothing"


def _seconds_of(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {format_seconds(value)}" for name, value in seconds.items() if value > 0) or "nothing"
