"""From options to a policy: what is pinned stays, the rest is solved for.

The linear program of the steady state (steady.py) says about where weights and KV should live; a few policies around its answers
are played with the job's lengths (simulate.py) at typical rates (expect.py), and the best of those is moved until it gets no better.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flexgen.errors import CapacityError
from flexgen.options import EngineOptions
from flexgen.plan.expect import Expectation
from flexgen.plan.machine import Limits, Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.outputs import expected
from flexgen.plan.policy import Policy
from flexgen.plan.search import extrapolated, sampled
from flexgen.plan.simulate import Simulation
from flexgen.plan.space import LEAST_SPILL, Point, Space
from flexgen.plan.steady import Steady, SteadyState
from flexgen.plan.workload import Workload

# Between plans that are about as fast, the one with shorter passes (results come sooner, forecasts matter less) and that moves
# less (what does not move is never late).
LONG_PASS_PENALTY, MOVING_PENALTY = 0.003, 0.003
# What spilling has to gain, for the life of the disk and its other users.
SPILL_PENALTY = 0.05
# What is planned for when nothing is known of the job.
NOMINAL_WORKLOAD = Workload(prompt_lens=(512,) * 256, output_lens=(128,) * 256)
# Prompt quotas that a search starts from, and how many of the best starts it moves.
FIRST_QUOTAS = (0.0, 0.15, 0.4, 0.7, 1.0)
MOVED_STARTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What was found.

    Attributes:
        policy: the best. seconds: that the job should take with it. refused: share of requests that can never fit.
        score: what was minimised (see `objective`).
        steady: the linear program's answer for its schedule-free steady state, with what memory is worth; None where it has none.
        num_played: policies that were played.
    """

    policy: Policy
    seconds: float
    refused: float
    score: float
    steady: Steady | None
    num_played: int


def resolve(
    options: EngineOptions,
    spec: ModelSpec,
    machine: Machine,
    limits: Limits,
    workload: Workload,
    *,
    process_bytes: int,
    kv_tiers: Sequence[str] = ("device", "host", "disk"),
) -> Policy:
    """The policy of a run; see `solve`."""
    return solve(options, spec, machine, limits, workload, process_bytes=process_bytes, kv_tiers=kv_tiers).policy


def solve(
    options: EngineOptions,
    spec: ModelSpec,
    machine: Machine,
    limits: Limits,
    workload: Workload,
    *,
    process_bytes: int,
    kv_tiers: Sequence[str] = ("device", "host", "disk"),
) -> Solution:
    """The best policy, and what it should do.

    Args:
        options: what they say is pinned; `dtype` must be a dtype by now, and `device` is taken from `limits`.
        process_bytes: resident memory of the process before any weight is loaded.
        kv_tiers: where KV may live; never chosen on disk when the offload folder lies in memory.

    Raises:
        OptionError: an option that cannot be honoured on this device.
        CapacityError: it does not fit; the message says what is missing and what to change.
    """
    planned = _servable(spec, limits, expected(workload) if len(workload) else NOMINAL_WORKLOAD)
    space = Space(options, spec, machine, limits, planned, process_bytes, kv_tiers)
    if space.lacking(kv_bytes=0):
        raise CapacityError("; ".join(space.lacking(kv_bytes=space.sizes.smallest)))
    search = _Search(space)
    for micro_batch_tokens in space.micro_batches():
        if (found := search.best(micro_batch_tokens)) is not None:
            return found
    raise CapacityError("; ".join(space.lacking(kv_bytes=space.sizes.smallest)) or space.no_pool())


def _servable(spec: ModelSpec, limits: Limits, workload: Workload) -> Workload:
    """Without requests that no tier could ever hold: they end in errors of their own, and no room is kept for them."""
    most = max(limits.host_bytes, limits.device_bytes, limits.disk_bytes)
    lengths = zip(workload.prompt_lens, workload.output_lens, strict=True)
    kept = [place for place, (s, n) in enumerate(lengths) if spec.kv_bytes(s + n - 1) <= most]
    return workload if len(kept) in (0, len(workload)) else workload.take(kept)


def objective(policy: Policy, quota: float, seconds: float) -> float:
    """What is minimised: seconds, a little more for long passes, for what moves, and for what is written to disk."""
    computing = "host" if policy.device == "cpu" else "device"
    moving = 2 - getattr(policy.weights, computing) - getattr(policy.kv, computing)
    return seconds * (1 + LONG_PASS_PENALTY * quota + MOVING_PENALTY * moving + SPILL_PENALTY * policy.kv.disk)


class _Search:
    """Plays policies of a space and remembers how they did."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.expectation = Expectation(space.spec, space.machine, space.dtype)
        self.sample, self.scale = sampled(space.workload)
        self._known: dict[Policy, tuple[float, float]] = {}

    def best(self, micro_batch_tokens: int) -> Solution | None:
        """The best policy with this size of micro-batches, None where none fits."""
        steady = self._steady(micro_batch_tokens)
        starts = sorted(self._starts(micro_batch_tokens, steady), key=self.score)
        moved = [improve(start, self.space, self.score) for start in _varied(starts)]
        best = min(moved, key=self.score, default=None)
        policy = self.space.policy(best) if best is not None else None
        if policy is None:
            return None
        refused, seconds = self._known[policy]
        worth = next((each for each, spills in steady if spills == (policy.kv_disk_bytes > 0)), None)
        return Solution(policy=policy, seconds=seconds, refused=refused, score=self.score(best)[1], steady=worth, num_played=len(self._known))

    def score(self, point: Point) -> tuple[float, float]:
        """(share of requests refused, objective)."""
        policy = self.space.policy(point)
        if policy is None:
            return math.inf, math.inf
        if policy not in self._known:

            def seconds(played: Simulation) -> float:
                return float(self.expectation.passes(played, policy).sum())

            self._known[policy] = extrapolated(
                self.space.spec, policy, self.sample, self.scale, seconds, weights=self.space.layouts.of(policy.weights).work
            )
        refused, seconds_taken = self._known[policy]
        return refused, objective(policy, point.quota, seconds_taken)

    def _steady(self, micro_batch_tokens: int) -> list[tuple[Steady, bool]]:
        """The steady states without and with KV on disk, best first."""
        space = self.space
        point = _point(space.schedules()[0], micro_batch_tokens, space.default_homes())
        found: list[tuple[Steady, bool]] = []
        for spills in (False, True) if space.disk_bytes or (space.kv is not None and space.kv.disk > 0) else (False,):
            bare, room = space.room(point, spills=spills)
            tiers = space.kv_tiers if spills else tuple(tier for tier in space.kv_tiers if tier != "disk")
            pins = {"weights": space.weights and dataclasses.asdict(space.weights), "kv": space.kv and dataclasses.asdict(space.kv)}
            most = space.options.max_num_seqs or len(space.workload)
            steady = SteadyState(self.expectation, space.workload, bare).best(room, most, kv_tiers=tiers, **pins)
            if steady is not None:
                found.append((steady, spills))
        return sorted(found, key=lambda each: -each[0].tokens_per_s)

    def _starts(self, micro_batch_tokens: int, steady: Sequence[tuple[Steady, bool]]) -> Iterator[Point]:
        """Points of the steady states, and everything in memory as far as it goes, under every schedule and quota."""
        for schedule in self.space.schedules():
            plain = _point(schedule, micro_batch_tokens, self.space.default_homes())
            places = [self._like(plain, each, spills) for each, spills in steady]
            places += [dataclasses.replace(plain, on_device=1.0, on_host=1.0), dataclasses.replace(plain, on_device=.5, on_host=.5),dataclasses.replace(plain, kv_homes=1.0),dataclasses.replace(plain, kv_homes=1.0,on_device=1.0,on_host=1.0), plain]
            free = self.space.free_axes(schedule)
            for place in places:
                for quota in FIRST_QUOTAS if "quota" in free else (1.0,):
                    yield dataclasses.replace(place, quota=quota)

    def _like(self, plain: Point, steady: Steady, spills: bool) -> Point:
        device, host = steady.kv.get("device", 0.0), steady.kv.get("host", 0.0)
        homes = plain.kv_homes if not self.space.on_cpu and min(device, host) == max(device, host) else host / max(device + host, 1e-9)
        homes = 0.0 if homes < LEAST_SPILL else 1.0 if homes > 1 - LEAST_SPILL else 0.5
        point = dataclasses.replace(plain, kv_disk=steady.kv.get("disk", 0.0) * spills, kv_homes=homes)
        return self.space.place_like(point, steady.weights, spills=spills)


def _point(schedule: str, micro_batch_tokens: int, kv_homes: float) -> Point:
    return Point(
        on_device=0.0, on_host=0.0, kv_homes=kv_homes, kv_disk=0.0, quota=1.0, cap=1.0, embedding=1.0, schedule=schedule,
        micro_batch_tokens=micro_batch_tokens,
    )  # fmt: skip


def _varied(ranked: Sequence[Point]) -> list[Point]:
    """The best few, and the best of each schedule and kind of home, between which no single step leads."""
    kinds: dict[tuple[str, float, bool], Point] = {}
    for point in ranked:
        kinds.setdefault((point.schedule, point.kv_homes, point.kv_disk > 0), point)
    return list(dict.fromkeys([*ranked[:MOVED_STARTS], *list(kinds.values())[: MOVED_STARTS + 1]]))


LEAST_GAIN = 5e-4
PAIRS = (("on_host", "quota"), ("on_device", "quota"), ("on_device", "on_host"), ("on_host", "kv_disk"), ("on_host", "kv_homes"), ("on_device", "kv_homes"),("kv_homes","kv_disk"),("quota","cap"),("on_host","cap"))


def _moves(point: Point, space: Space, step: float) -> Iterator[Point]:
    free = space.free_axes(point.schedule)

    def by(**changes: float) -> Point:
        return dataclasses.replace(point, **{axis: min(max(getattr(point, axis) + change, 0.0), 1.0) for axis, change in changes.items()})

    for axis in free:
        if axis == "embedding":
            yield dataclasses.replace(point, embedding=1.0 - point.embedding)
            continue
        for sign in (-1, 1):
            yield by(**{axis: sign * step})
    if step>.1:
        for size in space.micro_batches():
            yield dataclasses.replace(point, micro_batch_tokens=size)
        for schedule in space.schedules():
            yield dataclasses.replace(point, schedule=schedule)
    for one, other in PAIRS:
        if one in free and other in free:
            for sign in (-1, 1):
                yield by(**{one: step, other: sign * step})
                yield by(**{one: -step, other: sign * step})


def improve(start: Point, space: Space, score: Callable[[Point], tuple[float, float]], *, step: float = 0.25, least: float = 0.01) -> Point:
    """Moved as long as that helps, in steps that halve where no move does."""
    best, value = start, score(start)
    while step > least:
        for there in _moves(best, space, step):
            if there != best and (found := score(there)) < (value[0], value[1] * (1 - LEAST_GAIN)):
                best, value = there, found
                break
        else:
            step /= 2
    return best
