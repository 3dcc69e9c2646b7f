"""Plans of several stages as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from flexgen.base.quantities import counted, format_link, format_seconds
from flexgen.report.plans import aligned, format_forecast, format_memory, format_shares, resource_name

if TYPE_CHECKING:
    from flexgen.plan.stages.more import OneMore
    from flexgen.plan.stages.plans import StagePlan, StagesPlan

LEAST_SPEEDUP = 1.005  # of one machine more that is worth a word
_HEADER = ["stage", "machine", "layers", "a pass", "busy", "bound by", "weights", "KV"]


def format_stages(plan: StagesPlan, more: OneMore | None) -> str:
    """Return the plans of all stages as text: what they have in common, a table of the stages, and the forecast of the whole.

    Args:
        plan: The plans.
        more: What one machine more would bring; None where that is not known.
    """
    policy, number = plan.stages[0].plan.policy, len(plan.stages)
    link = format_link(plan.link.bytes_per_s, plan.link.latency_s)
    lines = [
        f"plan: {counted(number, 'stage')}, {policy.dtype}, {policy.schedule} schedule, "
        f"{counted(policy.num_blocks, 'block')} of sequences in flight, a link of {link}",
        f"  a pass   up to {counted(policy.max_num_seqs, 'sequence')} and, on average, {counted(policy.prefill_tokens, 'prompt token')}; "
        f"{counted(policy.micro_batch_tokens, 'token')} at a time",
        *(f"  {line}" for line in aligned([_HEADER, *_rows(plan)])),
        *(f"  {line}" for line in format_forecast(plan.forecast)),
        *(f"           {line}" for line in _bounds(plan)),
    ]
    if more is not None:
        worth = f"about {more.speedup:.2f} times as fast" if more.speedup > LEAST_SPEEDUP else "would gain nothing"
        lines.append(f"           one machine more, like {more.like}: {worth}")
    return "\n".join([*lines, "  on all stages together:", *format_memory(plan.forecast)])


def _rows(plan: StagesPlan) -> Iterator[list[str]]:
    """Yield the rows of the table; neighbours that are alike share one."""
    numbered = enumerate(plan.stages)
    for _, members in groupby(numbered, key=lambda each: _alike(each[1])):
        (first, stage), *others = members
        last, last_stage = others[-1] if others else (first, stage)
        policy = stage.plan.policy
        each = f", {len(stage.layers)} each" if others else ""
        yield [
            f"{first}-{last}" if others else str(first),
            stage.plan.machine.name,
            f"{stage.layers.start}-{last_stage.layers.stop - 1}{each}",
            format_seconds(stage.seconds_per_pass),
            f"{stage.busy_share:.0%}",
            resource_name(stage.bound_by),
            format_shares(policy.weights),
            format_shares(policy.kv),
        ]


def _alike(stage: StagePlan) -> tuple[object, ...]:
    return stage.plan.machine.name, stage.plan.policy, len(stage.layers), stage.bound_by


def _bounds(plan: StagesPlan) -> Iterator[str]:
    """Yield what decides the time of the whole."""
    if len(plan.stages) == 1:
        return
    kind, _, number = plan.bound_by.partition(" ")
    if kind == "stage":
        yield f"bound by stage {number} ({resource_name(plan.stages[int(number)].bound_by)}): no pass of a block is computed faster"
    elif kind == "link":
        yield f"bound by the link behind stage {number}: hidden states take longer there than any stage computes"
    else:
        yield "bound by the way through all stages and back: a block's tokens return later than all other blocks need"
    trip = format_seconds(plan.round_trip_seconds)
    yield f"a pass is back after {trip}; bubbles: the busiest stage waits {plan.bubble_share:.1%} of the time"
