"""From options to a policy: pinned choices stay as they are, all others are searched for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

from flexgen.base.quantities import GIB
from flexgen.options import TIERS, EngineOptions
from flexgen.plan.machine import Limits, Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.play.answer_lengths import expected
from flexgen.plan.play.blocks import ALONE, Blocks
from flexgen.plan.search.evaluate import Bounds, Player
from flexgen.plan.search.moves import wander
from flexgen.plan.search.optimise import Search, Solution
from flexgen.plan.search.point import Point
from flexgen.plan.search.space import Space
from flexgen.plan.workload import Workload

# Gains per GiB of at least PROMISE are confirmed by a search of so much EFFORT (see evaluate.py) before they are stated.
PROMISE, EFFORT = 0.01, 6_000
# The workload that is planned for when nothing is known of the job.
NOMINAL_WORKLOAD = Workload(prompt_lens=(512,) * 256, output_lens=(128,) * 256)


def solve(space: Space, *, known: Iterable[Point] = ()) -> Solution:
    """Return the best policy within the bounds of the space's options, and its expected times.

    Args:
        space: The space of policies.
        known: Points to begin with.

    Raises:
        CapacityError: The job does not fit (the message says what is missing and what to change), or it takes longer than it may.
    """
    bounds = Bounds(request_seconds=space.options.max_request_seconds, job_seconds=space.options.max_job_seconds)
    found = Search(space, known=known).best(bounds)
    return dataclasses.replace(found, gain_per_gib=memory_gains(space, found, bounds))


def space_of(
    options: EngineOptions,
    spec: ModelSpec,
    machine: Machine,
    limits: Limits,
    workload: Workload,
    *,
    process_bytes: int,
    kv_tiers: Sequence[str] = TIERS,
    blocks: Blocks = ALONE,
) -> Space:
    """Return the policies to choose from.

    Args:
        options: The options, which pin what they state; `dtype` must be a concrete dtype, and `device` is taken from `limits`.
        spec: The model.
        machine: The machine.
        limits: The budgets.
        workload: The job.
        process_bytes: The resident memory of the process before any weight is loaded.
        kv_tiers: The tiers where KV may live; the disk is never chosen when the offload folder lies in memory.
        blocks: The blocks in flight through the stages of a pipeline; the job is one of them.

    Raises:
        OptionError: An option cannot be honoured on this device.
    """
    planned = _servable(spec, limits, expected(workload) if len(workload) else NOMINAL_WORKLOAD)
    return Space(options, spec, machine, limits, planned, process_bytes, kv_tiers, blocks)


def _servable(spec: ModelSpec, limits: Limits, workload: Workload) -> Workload:
    """Leave out requests that no tier could ever hold: they end in errors of their own, and no room is kept for them."""
    most = max(limits.host_bytes, limits.device_bytes, limits.disk_bytes)
    lengths = zip(workload.prompt_lens, workload.output_lens, strict=True)
    kept = [place for place, (s, n) in enumerate(lengths) if spec.kv_bytes(s + n - 1) <= most]
    return workload if len(kept) in (0, len(workload)) else workload.take(kept)


def memory_gains(space: Space, found: Solution, bounds: Bounds) -> dict[str, float]:
    """Return, per tier, the relative gain by 1 GiB more of it: that of the linear program, or less where a search finds less.

    Args:
        space: The space of policies.
        found: The solution where the search begins.
        bounds: The bounds that the search keeps.
    """
    gains = {tier: gain * GIB for tier, gain in found.worth.items()}
    for tier, gain in gains.items():
        if gain >= PROMISE:
            more = {f"{tier}_bytes": getattr(space.limits, f"{tier}_bytes") + GIB}
            player = Player(space.within(dataclasses.replace(space.limits, **more)))
            score = functools.partial(player.score, bounds=bounds)
            best = wander(found.point, player.space, score, lambda player=player: player.effort < EFFORT)
            gains[tier] = min(gain, max(found.seconds / player.seconds(best) - 1, 0.0))
    return gains
