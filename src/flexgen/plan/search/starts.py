"""The starting points of a search: near the homes that the steady states' linear programs give to weights and KV, and at the corners."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.price.requests import RequestLoad
from flexgen.plan.search.point import Point
from flexgen.plan.search.space import LEAST_SPILL, Space
from flexgen.plan.search.steady import Steady, SteadyState

# Caps that are tried where time is bounded; prompt quotas that are tried near the steady states, and at the corners.
BOUNDED_CAPS = (1.0, 0.4, 0.15)
FIRST_QUOTAS, CORNER_QUOTAS = (0.4, 0.0, 0.7, 1.0), (0.1, 0.5)
# The first quota tried is so many times the prompt tokens that replace the sequences that end.
ENOUGH = 1.1
# Of the weights that fit where they compute, shares around which steady states are looked for too: several may be equally good.
NEAR = (0.0, 0.25, 0.5, 0.75)
# Of the weights that fit, the shares that are tried when the weights of a good point are placed elsewhere.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
CORNERS: tuple[dict[str, Any], ...] = (
    {"on_device": 1.0, "on_host": 1.0},
    {"on_device": 1.0, "on_host": 1.0, "embedding": False},
    {"on_device": 0.5, "on_host": 1.0},
    {"on_device": 0.25, "on_host": 1.0},
    {"on_device": 0.0, "on_host": 1.0},
    {"on_device": 0.0, "on_host": 0.5},
    {"on_device": 0.5, "on_host": 0.5},
    {},
)
# More corners, where weights can be kept encoded.
ENCODED_CORNERS: tuple[dict[str, Any], ...] = tuple({"on_device": each, "on_host": 1.0, "encoded": 1.0} for each in (1.0, 0.5, 0.0))


def varied_wholes(best: Point, space: Space) -> list[Point]:
    """Return variants of a point in all combinations of its discrete choices: schedule, quota, micro-batches, sequences, embedding.

    Once placements cannot be improved, how evenly prompts fall is a matter of whole numbers, and no small step finds a better one.
    """
    points: list[Point] = []
    for schedule in space.schedules():
        free = space.free_axes(schedule)
        quotas = _first_quotas(space) if "quota" in free else (1.0,)
        caps = {best.cap, 1.0} if "cap" in free else {best.cap}
        points += [
            dataclasses.replace(best, schedule=schedule, quota=quota, cap=cap, embedding=embedding, micro_batch_tokens=tokens)
            for quota, cap, embedding, tokens in product(quotas, sorted(caps), (True, False), _near(best, space))
        ]
    return points


def varied_places(best: Point, space: Space) -> list[Point]:
    """Return variants of a point with its weights elsewhere, on a coarse grid, for every schedule and similar sizes of micro-batches."""
    points: list[Point] = []
    for schedule in space.schedules():
        free = space.free_axes(schedule)
        device, host = (SHARES if axis in free else (getattr(best, axis),) for axis in ("on_device", "on_host"))
        kept = sorted({0.0, best.encoded, 1.0}) if "encoded" in free else [best.encoded]
        points += [
            dataclasses.replace(best, schedule=schedule, on_device=on_device, on_host=on_host, encoded=encoded, micro_batch_tokens=tokens)
            for on_device, on_host, encoded, tokens in product(device, host, kept, _near(best, space))
        ]
    return points


def _near(best: Point, space: Space) -> list[int]:
    """Return the point's size of micro-batches, and the sizes next to it."""
    sizes = space.micro_batches()
    place = sizes.index(best.micro_batch_tokens)
    return [best.micro_batch_tokens, *sizes[max(place - 1, 0) : place], *sizes[place + 1 : place + 2]]


def steady_states(
    space: Space,
    expectation: Expectation,
    mean: RequestLoad,
    micro_batch_tokens: int,
    *,
    pass_seconds: float | None = None,
    near: float | None = None,
) -> list[tuple[Steady, bool]]:
    """Return the steady states without and with KV on disk, best first; by either attention to KV in host memory, where some is there.

    Args:
        space: The space of policies.
        expectation: Prices the passes.
        mean: The load of a live sequence in a pass, on average.
        micro_batch_tokens: The most tokens computed together.
        pass_seconds: The most seconds that a pass may take; None for no bound.
        near: Of the weights that fit where they compute, the share that is at home there, unless it is pinned; None to choose the best.

    Returns:
        Each steady state, and whether it has KV on disk.
    """
    found: list[tuple[Steady, bool]] = []
    spilling = (False, True) if space.disk_bytes or (space.kv is not None and space.kv.disk > 0) else (False,)
    for spills, host_attention in product(spilling, space.host_attentions()):
        point = _point(space, space.schedules()[0], micro_batch_tokens, host_attention=host_attention)
        bare, free = space.free_memory(point, spills=spills)
        tiers = space.kv_tiers if spills else tuple(tier for tier in space.kv_tiers if tier != "disk")
        weights = space.weights and dataclasses.asdict(space.weights)
        if weights is None and near is not None:
            whole = space.weight_sizes.by_home[space.computing]
            weights = {space.computing: near * min(free.memory_bytes[space.computing] / max(whole, 1), 1.0)}
        most = space.options.max_num_seqs or len(space.workload)
        steady = SteadyState(expectation, mean, bare).best(
            free, most, weights=weights, kv=space.kv and dataclasses.asdict(space.kv), kv_tiers=tiers, pass_seconds=pass_seconds
        )
        if steady is not None and (host_attention == space.host_attentions()[0] or steady.kv.get("host", 0.0) >= LEAST_SPILL):
            found.append((steady, spills))
    return sorted(found, key=lambda each: -each[0].tokens_per_s)


def starts(
    space: Space,
    micro_batch_tokens: int,
    steady: Sequence[tuple[Steady, bool]],
    others: Sequence[tuple[Steady, bool]],
    near_caps: Sequence[float],
    caps: Sequence[float],
) -> Iterator[Point]:
    """Yield points near steady states, the best and others, and at the corners, under every schedule, several quotas, several caps."""
    for schedule in space.schedules():
        plain = _point(space, schedule, micro_batch_tokens, host_attention=space.host_attentions()[0])
        free = space.free_axes(schedule)
        near, elsewhere = ([_like(space, plain, each, spills) for each, spills in states] for states in (steady, others))
        places: list[Point] = []
        corners = (*CORNERS, *ENCODED_CORNERS) if "encoded" in free else CORNERS
        for homes, host_attention in product((0.0, 0.5, 1.0) if "kv_homes" in free else (plain.kv_homes,), space.host_attentions()):
            if homes or host_attention == plain.host_attention:
                places += [dataclasses.replace(plain, kv_homes=homes, host_attention=host_attention, **corner) for corner in corners]
        if "kv_disk" in free:
            places += [dataclasses.replace(plain, kv_disk=1.0), dataclasses.replace(plain, kv_disk=1.0, **CORNERS[0])]
        first = _first_quotas(space)
        kinds = ((near, first, near_caps), (elsewhere, first[:1], near_caps[:1]), (places, CORNER_QUOTAS, caps))
        for some, quotas, tried in kinds:
            for place, quota, cap in product(some, quotas if "quota" in free else (1.0,), tried if "cap" in free else (1.0,)):
                yield dataclasses.replace(place, quota=quota, cap=cap)


def _first_quotas(space: Space) -> tuple[float, ...]:
    return (space.sizes.quota_share(ENOUGH), *FIRST_QUOTAS)


def varied(ranked: Sequence[Point], best: int) -> list[Point]:
    """Return the best few, then the best of each schedule and kind of homes, between which no single step leads."""
    kinds: dict[tuple[str, bool, float, bool, int, int], Point] = {}
    for point in ranked:
        homes = (round(2 * point.kv_homes), point.kv_disk > 0, round(2 * point.on_host), round(point.encoded))
        kinds.setdefault((point.schedule, point.host_attention, *homes), point)
    return list(dict.fromkeys([*ranked[:best], *kinds.values()]))


def _point(space: Space, schedule: str, micro_batch_tokens: int, *, host_attention: bool) -> Point:
    """Return a point with all weights on disk."""
    return Point(
        kv_homes=space.default_homes(),
        embedding=True,
        schedule=schedule,
        micro_batch_tokens=micro_batch_tokens,
        host_attention=host_attention,
    )


def _like(space: Space, plain: Point, steady: Steady, spills: bool) -> Point:
    """Return the point that comes close to this steady state."""
    point = dataclasses.replace(plain, kv_disk=steady.kv.get("disk", 0.0) * spills, host_attention=steady.host_attention)
    point = space.place_like(point, steady.weights, spills=spills)
    return (
        dataclasses.replace(point, kv_homes=_homes_like(space, point, steady)) if "kv_homes" in space.free_axes(plain.schedule) else point
    )


def _homes_like(space: Space, point: Point, steady: Steady) -> float:
    """Return how far KV's homes lie between the device (0), all memory (0.5) and the host (1)."""
    both = space.policy(dataclasses.replace(point, kv_homes=0.5, quota=0.0))
    device, host = steady.kv.get("device", 0.0), steady.kv.get("host", 0.0)
    if both is None or not both.kv_device_bytes or not both.kv_host_bytes or device + host < LEAST_SPILL:
        return point.kv_homes
    device, host = device / both.kv_device_bytes, host / both.kv_host_bytes
    return 0.5 * host / device if host <= device else 1.0 - 0.5 * device / host
