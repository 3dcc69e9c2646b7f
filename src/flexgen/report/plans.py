"""Plans as text for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flexgen.base.quantities import counted, format_seconds, format_size
from flexgen.plan.formats import MARGIN, FormatChoice, FormatPrice
from flexgen.plan.machine import has_device_tier
from flexgen.plan.price.memory import ENCODED
from flexgen.plan.tell.spill import ENDURANCE_BYTES, LEAST_SPILL_GAIN, Spill, endurance_share

if TYPE_CHECKING:
    from flexgen.plan.model import ModelSpec
    from flexgen.plan.policy import Fractions, Policy
    from flexgen.plan.tell.alternatives import ParetoPoint
    from flexgen.plan.tell.forecast import Forecast, Plan

LEAST_SHOWN = 0.01  # as a fraction of a pass: resources that take less are left out
LEAST_GAIN_SHOWN = 0.001
LEAST_SHARE_SHOWN = 0.001  # as a fraction of an SSD's life
SHOWN_SPEEDUP = 0.1  # what a resource is worth is shown for a rate that is faster by this fraction


def format_plan(plan: Plan) -> str:
    """Return the plan as text: where bytes will live, what a pass will carry, and the forecast."""
    if plan.told is not None:
        return plan.told
    policy, spec = plan.policy, plan.spec
    staging = policy.host_ring_bytes + policy.device_ring_bytes
    encoded = plan.forecast.memory_bytes["host"].get(ENCODED, 0)
    kept = f"{format_size(encoded)} kept encoded ({spec.number_format}), decoded in every pass; " if encoded else ""
    lines = [
        f"plan: {policy.device}, {policy.dtype}{_products(spec)}, {policy.schedule} schedule, {policy.compute_threads} compute and "
        f"{policy.io_threads} I/O threads",
        f"  weights  {format_size(spec.decoded_bytes)} in {counted(len(spec.units), 'unit')}: {format_shares(policy.weights)}; "
        f"{kept}staging {format_size(staging)}{_copies(policy)}, workspace {format_size(policy.workspace_bytes)}",
        f"  KV       {format_size(policy.kv_bytes)}: {format_shares(policy.kv)}; {_kv_format(policy)}"
        f"{format_size(spec.kv_bytes_per_token)} per token{_padded(policy, spec)}, "
        f"pages of {policy.page_tokens} tokens{_attention(policy)}",
        f"  a pass   up to {counted(policy.max_num_seqs, 'sequence')} and, on average, {counted(policy.prefill_tokens, 'prompt token')}; "
        f"{counted(policy.micro_batch_tokens, 'token')} at a time{_blocks(policy)}",
    ]
    chosen = format_choice(plan.formats) if plan.formats is not None else []
    lines += [f"  {line}" for line in format_forecast(plan.forecast)]
    lines += [f"           {line}" for line in _sparse(plan)]
    return "\n".join(lines + [f"  {name:<8} {line}" for name, line in zip(("formats", ""), chosen, strict=False)])


def _copies(policy: Policy) -> str:
    """Return the memory, on both sides, for what passes copy between host and device; nothing on a CPU."""
    size_bytes = 2 * (policy.copies_in_bytes + policy.kv_ring_bytes) + policy.copies_out_bytes
    return f", copies {format_size(size_bytes)}" if size_bytes else ""


def _blocks(policy: Policy) -> str:
    return f"; {policy.num_blocks} blocks of sequences in flight" if policy.num_blocks > 1 else ""


def _attention(policy: Policy) -> str:
    """Return where next tokens attend to KV in host memory, where some is there beside a device."""
    if not has_device_tier(policy.device) or not policy.kv_host_bytes:
        return ""
    return f"; attention to host KV on the {'host' if policy.host_attention else 'device'}"


def format_choice(choice: FormatChoice) -> list[str]:
    """Return lines about the formats that were chosen: why, and what the others would have taken; none where there was no choice."""
    if not choice.prices:
        return [f"{choice.chosen}, as the job was begun"]
    if len(choice.prices) == 1:
        return []
    least = min(price.total_seconds for price in choice.prices)
    (taken,) = (price for price in choice.prices if price.formats == choice.chosen)
    others = [price for price in choice.prices if price is not taken]
    why = "the fastest" if taken.total_seconds <= least else f"at most {MARGIN:.0%} slower than the fastest, and answers change least"
    if taken.total_seconds > (1 + MARGIN) * least:
        why = "the fastest of those in which most requests fit"
    told = "; ".join(_price(price) for price in sorted(others, key=lambda price: price.total_seconds))
    return [f"{_price(taken)}: {why} of the {len(choice.prices)} that are allowed", f"the others: {told}"]


def _price(price: FormatPrice) -> str:
    if price.seconds is None:
        return f"{price.formats} is not possible ({price.problem})"
    converting = f" after {format_seconds(price.conversion_seconds)} of converting" if price.conversion_seconds else ""
    refused = f" ({counted(price.num_refused, 'request never fits', 'requests never fit')})" if price.num_refused else ""
    return f"{price.formats} {format_seconds(price.seconds)}{converting}{refused}"


def _products(spec: ModelSpec) -> str:
    """Return how products are computed, if not all are in the dtype of computing."""
    if not spec.int8_flops_per_token:
        return ""
    return f" ({spec.int8_flops_per_token / (spec.flops_per_token + spec.head_flops_per_token):.0%} of products in int8)"


def _kv_format(policy: Policy) -> str:
    """Return the format of KV, if it is not the dtype of computing, as the beginning of a list."""
    told = [] if policy.kv_format is None else [policy.kv_format]
    if policy.sparse_attention is not None:
        told.append(f"sparse attention {policy.sparse_attention:.3g}")
    return "".join(f"{each}, " for each in told)


def _padded(policy: Policy, spec: ModelSpec) -> str:
    """Return the bytes that a token takes on disk, where some of the KV is there and pages are padded."""
    if not policy.kv_disk_bytes or spec.disk_kv_bytes_per_token <= spec.kv_bytes_per_token:
        return ""
    return f" ({format_size(spec.disk_kv_bytes_per_token)} on disk, where pages are padded to multiples of 4 KiB)"


def _sparse(plan: Plan) -> list[str]:
    """Return a line about what sparse attention is expected to save, if it is on."""
    share, times = plan.policy.sparse_attention, plan.forecast.sparse_over_dense
    if share is None:
        return []
    if times is None:
        return ["sparse attention is counted as dense: this machine has no rates for it"]
    return [f"sparse attention: that of next tokens is expected to take {times:.2f} of the time of dense attention"]


def format_forecast(forecast: Forecast) -> list[str]:
    """Return the forecast as lines: time, rates, the resources of a pass with the busiest marked, and what more memory is worth."""
    if not forecast.num_passes:
        return []
    resources = sorted(forecast.resource_seconds.items(), key=lambda each: (each[0] != forecast.bottleneck, -each[1]))
    # Of passes that differ, the resource that decides most of the time need not be the one with the largest mean.
    often = " most of the time" if forecast.resource_seconds[forecast.bottleneck] < max(forecast.resource_seconds.values()) else ""
    parts = [
        f"{resource_name(name)} {format_seconds(seconds)}{f' (the bottleneck{often})' if name == forecast.bottleneck else ''}"
        for name, seconds in resources
        if seconds >= LEAST_SHOWN * forecast.pass_seconds or name == forecast.bottleneck
    ]
    lines = [
        f"expected {format_seconds(forecast.seconds)} for {_expected_work(forecast)}; the longest request takes "
        f"{format_seconds(forecast.request_seconds)}",
        f"         {counted(forecast.num_passes, 'pass', 'passes')} of {format_seconds(forecast.pass_seconds)}, "
        f"{counted(round(forecast.live_mean), 'sequence')} in each: " + ", ".join(parts),
    ]
    lines += [f"         {line}" for line in _written(forecast)]
    if forecast.num_refused:
        lines.append(f"         {counted(forecast.num_refused, 'request')} can never fit")
    gains = gains_of(forecast.gain_per_gib, forecast.gain_per_rate)
    told = [f"{what}: +{gain:.1%}" for what, gain in gains if gain >= LEAST_GAIN_SHOWN]
    return [*lines, f"         what would help, at the margin, in tokens/s: {'; '.join(told)}"] if told else lines


def _expected_work(forecast: Forecast) -> str:
    """Return what is expected to be computed, and how fast."""
    scores = f" and {counted(forecast.scored_tokens, 'scored position')}" if forecast.scored_tokens else ""
    if not forecast.output_tokens:
        rate = forecast.prompt_tokens / max(forecast.seconds, 1e-9)
        return f"{counted(forecast.prompt_tokens, 'prompt token')}{scores}: {rate:,.2f} prompt tokens/s"
    return (
        f"{counted(forecast.output_tokens, 'output token')}{scores}: {forecast.output_tokens_per_s:,.2f} tokens/s, "
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
        lines.append(f"{format_size(written)} of KV will be written to disk: {told} of what {rated} takes in its life; disk='0' forbids it")
    if spill is not None and spill.chosen:
        lines.append(f"without KV on disk the job would take {format_seconds(spill.seconds_without)}, {_longer(spill)}")
    elif spill is not None:
        saved = format_seconds(spill.seconds_without - spill.seconds)
        lines.append(
            f"no KV on disk: it would write {format_size(spill.written_bytes)} and save {saved} ({spill.gain:.0%} more tokens/s, "
            f"less than {LEAST_SPILL_GAIN:.0%}); disk= with a size allows it"
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
        rows.append([*cells, format_shares(policy.weights), format_shares(policy.kv)])
    return "\n".join(f"  {line}" for line in aligned(rows))


def format_memory(forecast: Forecast) -> list[str]:
    """Return one line per tier with the memory that is reserved on it."""
    lines: list[str] = []
    for tier, parts in forecast.memory_bytes.items():
        listed = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
        lines.append(f"  {tier:<7}  {format_size(sum(parts.values()))} of {format_size(forecast.budget_bytes.get(tier, 0))}: {listed}")
    return lines


def resource_name(name: str) -> str:
    """Return the name of a resource for people."""
    return "issuing work" if name == "lead" else name.replace("_", " ")


def format_shares(fractions: Fractions) -> str:
    """Return the shares of homes, without those that have none."""
    shares = dataclasses.asdict(fractions)
    return ", ".join(f"{tier} {share:.1%}" for tier, share in shares.items() if share) or "nowhere"


def gains_of(per_gib: Mapping[str, float], per_rate: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return pairs of a resource that could be increased and the relative gain in tokens/s, best first."""
    memory = [(f"1 GiB more of {tier} memory ({tier}_mem)", gain) for tier, gain in per_gib.items()]
    return memory + [(f"{resource_name(name)} {SHOWN_SPEEDUP:.0%} faster", SHOWN_SPEEDUP * gain) for name, gain in per_rate.items()]


def aligned(rows: list[list[str]]) -> list[str]:
    """Align the columns of a table: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["   ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
