"""From options to a policy: what is pinned stays, the rest is solved for.

The linear program of the steady state (steady.py) says about where weights and KV should live; policies around its answers and at the
corners of the space (starts.py) are played with the job's lengths at typical rates (play.py), and the best of those are moved until
they get no better (moves.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from flexgen.durations import format_seconds
from flexgen.errors import CapacityError
from flexgen.options import EngineOptions
from flexgen.plan.bounds import Bounds
from flexgen.plan.machine import Limits, Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.moves import climb
from flexgen.plan.outputs import expected
from flexgen.plan.play import Outcome, Player
from flexgen.plan.policy import Policy
from flexgen.plan.shortage import shortage
from flexgen.plan.space import Point, Space
from flexgen.plan.starts import BOUNDED_CAPS, NEAR, starts, steady_states, varied, varied_places, varied_wholes
from flexgen.plan.steady import MeanSequence, Steady
from flexgen.plan.workload import Workload

# What is planned for when nothing is known of the job.
NOMINAL_WORKLOAD = Workload(prompt_lens=(512,) * 256, output_lens=(128,) * 256)
# Effort (see play.py) that the first size of micro-batches that fits gets, under any bounds.
FIRST_SIZE_EFFORT = 56_000
# And other sizes, of which those are begun with whose steady states reach this share of the best.
OTHER_SIZES_EFFORT, PROMISING = 18_000, 0.9
# And other whole numbers at the best place, and other places for those.
WHOLES_EFFORT, PLACES_EFFORT = 14_000, 26_000
# Of the effort that is left, what starts may take before they are moved.
STARTS_SHARE = 0.5
# Of the mean seconds that passes may take, what is asked of steady states: some passes of the job will be longer.
PACES = (0.98, 0.9)
# Of the best starts, how many are moved first.
MOVED_STARTS = 2
# Of the points that were found, how many are begun with under the next bounds.
REMEMBERED = 6
# A bound that nothing keeps.
NO_TIME = 1e-9
# How often bounds are tightened until the whole job keeps them, not its sample only.
ATTEMPTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What was found.

    Attributes:
        policy: the best. seconds: that the job should take with it. refused: share of requests that can never fit.
        request_seconds: of the request that takes longest.
        objective: what was minimised (see play.py).
        steady: the linear program's answer for its schedule-free steady state, with what memory is worth; None where it has none.
        num_played: policies that were played.
    """

    policy: Policy
    seconds: float
    refused: float
    request_seconds: float
    objective: float
    steady: Steady | None
    num_played: int


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
    """The best policy within the bounds of the options, and what it should do.

    Args:
        options: what they say is pinned; `dtype` must be a dtype by now, and `device` is taken from `limits`.
        process_bytes: resident memory of the process before any weight is loaded.
        kv_tiers: where KV may live; never chosen on disk when the offload folder lies in memory.

    Raises:
        OptionError: an option that cannot be honoured on this device.
        CapacityError: it does not fit; the message says what is missing and what to change.  Or it takes longer than it may.
    """
    space = space_of(options, spec, machine, limits, workload, process_bytes=process_bytes, kv_tiers=kv_tiers)
    bounds = Bounds(request_seconds=options.max_request_seconds, job_seconds=options.max_job_seconds)
    return Search(space).best(bounds)


def space_of(
    options: EngineOptions,
    spec: ModelSpec,
    machine: Machine,
    limits: Limits,
    workload: Workload,
    *,
    process_bytes: int,
    kv_tiers: Sequence[str] = ("device", "host", "disk"),
) -> Space:
    """The policies to choose from; arguments and errors are those of `solve`."""
    planned = _servable(spec, limits, expected(workload) if len(workload) else NOMINAL_WORKLOAD)
    return Space(options, spec, machine, limits, planned, process_bytes, kv_tiers)


def _servable(spec: ModelSpec, limits: Limits, workload: Workload) -> Workload:
    """Without requests that no tier could ever hold: they end in errors of their own, and no room is kept for them."""
    most = max(limits.host_bytes, limits.device_bytes, limits.disk_bytes)
    lengths = zip(workload.prompt_lens, workload.output_lens, strict=True)
    kept = [place for place, (s, n) in enumerate(lengths) if spec.kv_bytes(s + n - 1) <= most]
    return workload if len(kept) in (0, len(workload)) else workload.take(kept)


class Search:
    """Looks for the best policies of a space; what was found under one bound is known under the next."""

    def __init__(self, space: Space) -> None:
        self.space, self.player = space, Player(space)
        self._mean = MeanSequence.of(space.spec, space.workload)
        self._found: dict[Point, None] = {}
        self._solved = functools.cache(functools.partial(steady_states, space, self.player.expectation, self._mean))

    def best(self, bounds: Bounds) -> Solution:
        """The best policy within `bounds`.

        Raises:
            CapacityError: nothing fits, or nothing is as fast as the bounds ask for.
        """
        found, asked = self._solution(bounds), bounds
        if not bounds.are_given:
            return found
        whole = self.player.whole(found.policy)
        for _ in range(ATTEMPTS):
            if not bounds.excess(whole.request_seconds, whole.seconds):
                return found
            # The sample that was searched on flatters: asked for as much less, the whole job will keep the bounds.
            asked = asked.tightened(found.request_seconds / whole.request_seconds, found.seconds / whole.seconds)
            found = self._solution(asked)
            whole = self.player.whole(found.policy)
        raise CapacityError(too_slow(bounds, whole))

    def shortest(self) -> Solution:
        """The policy whose requests take the least time.

        Raises:
            CapacityError: nothing fits.
        """
        return self._solution(Bounds(request_seconds=NO_TIME))

    def _solution(self, bounds: Bounds) -> Solution:
        """The best policy that there is; it may exceed the bounds, where all do."""
        point = self._best_point(bounds)
        policy = self.player.policy(point) if point is not None else None
        if point is None or policy is None:
            raise CapacityError(shortage(self.space))
        outcome = self.player.outcome(policy)
        steady = self._steady_states(policy.micro_batch_tokens, self._pass_seconds(bounds))
        return Solution(
            policy=policy,
            seconds=outcome.seconds,
            refused=outcome.refused,
            request_seconds=outcome.request_seconds,
            objective=self.player.score(point, bounds)[-1],
            steady=next((each for each, spills in steady if spills == (policy.kv_disk_bytes > 0)), None),
            num_played=self.player.num_played,
        )

    def _best_point(self, bounds: Bounds) -> Point | None:
        """The first size of micro-batches that fits leads; then others that promise as much; then all that is near the best; then all."""
        score = functools.partial(self.player.score, bounds=bounds)
        caps = BOUNDED_CAPS if bounds.are_given else (1.0,)
        found, most = dict(self._found), self.player.effort

        def begin_with(starts: Iterable[Point], effort: float) -> None:
            """Score the starts, for as long as some of the effort (and what was saved of others) lasts, and move the best of them."""
            nonlocal most
            most += effort
            enough = self.player.effort + STARTS_SHARE * (most - self.player.effort)
            scored: list[Point] = []
            for start in starts:
                if self.player.effort >= enough:
                    break
                score(start)
                scored.append(start)
            chosen = varied(sorted(scored, key=score), MOVED_STARTS)
            for few in (chosen[:MOVED_STARTS], chosen[MOVED_STARTS:]):
                found.update(dict.fromkeys(climb(few, self.space, score, lambda: self.player.effort < most, also=found)))

        pass_seconds = self._pass_seconds(bounds)
        sizes, begun = self._sizes(pass_seconds), list[Point]()
        promising = self._promising(pass_seconds)
        while sizes and not begun:
            begun = list(self._begun(sizes.pop(0), caps, pass_seconds))
        begin_with([*self._found, *begun], FIRST_SIZE_EFFORT)
        also_promising = (point for tokens in promising if tokens in sizes for point in self._begun(tokens, caps, pass_seconds))
        begin_with(also_promising, OTHER_SIZES_EFFORT)
        for others, effort in ((varied_wholes, WHOLES_EFFORT), (varied_places, PLACES_EFFORT)):
            if found:
                begin_with(others(min(found, key=score), self.space), effort)
        while sizes and self.player.effort < most:
            begin_with(self._begun(sizes.pop(0), caps, pass_seconds), 0)
        ranked = sorted(found, key=score)
        self._found |= dict.fromkeys(ranked[:REMEMBERED])
        return ranked[0] if ranked else None

    def _pass_seconds(self, bounds: Bounds) -> float | None:
        """What a pass may take at most, for the longest answer, a pass per token, to be there in time; None where none is so fast."""
        if bounds.request_seconds is None:
            return None
        seconds = bounds.request_seconds / max(self.space.workload.answer_lens)
        return seconds if any(self._steady_states(tokens, seconds) for tokens in self.space.micro_batches()) else None

    def _rates(self, pass_seconds: float | None) -> dict[int, float]:
        """Sizes of micro-batches -> tokens/s of their steady states; without those that have none."""
        states = {tokens: self._steady_states(tokens, pass_seconds) for tokens in self.space.micro_batches()}
        return {tokens: steady[0][0].tokens_per_s for tokens, steady in states.items() if steady}

    def _sizes(self, pass_seconds: float | None) -> list[int]:
        """Sizes of micro-batches, largest first; where passes may not take long, those with the fastest steady states first."""
        sizes = self.space.micro_batches()
        if pass_seconds is None:
            return sizes
        rates = self._rates(pass_seconds)
        return sorted(sizes, key=lambda tokens: -rates.get(tokens, 0.0))

    def _promising(self, pass_seconds: float | None) -> list[int]:
        """Sizes of micro-batches whose steady states are about as fast as the best."""
        rates = self._rates(pass_seconds)
        return [tokens for tokens, rate in rates.items() if rate >= PROMISING * max(rates.values())]

    def _steady_states(self, micro_batch_tokens: int, pass_seconds: float | None) -> list[tuple[Steady, bool]]:
        """The best ones; where passes may not take long, at several paces."""
        bounds = [None] if pass_seconds is None else [pace * pass_seconds for pace in PACES]
        return [state for each in bounds for state in self._solved(micro_batch_tokens, pass_seconds=each)]

    def _begun(self, micro_batch_tokens: int, caps: Sequence[float], pass_seconds: float | None) -> Iterator[Point]:
        """Points to begin with, of different policies."""
        begun = set[Policy]()
        steady = self._steady_states(micro_batch_tokens, pass_seconds)
        others = [state for near in NEAR for state in self._solved(micro_batch_tokens, pass_seconds=pass_seconds, near=near)[:1]]
        for point in starts(self.space, micro_batch_tokens, steady, others, caps if pass_seconds is None else (1.0,), caps):
            policy = self.player.policy(point)
            if policy is not None and policy not in begun:
                begun.add(policy)
                yield point


def too_slow(bounds: Bounds, nearest: Outcome) -> str:
    """What is asked for, and what there is."""
    asked = {"--max-job-seconds": bounds.job_seconds, "--max-request-seconds": bounds.request_seconds}
    given = " and ".join(f"{flag} {seconds:g}" for flag, seconds in asked.items() if seconds is not None)
    return (
        f"no plan keeps {given}: the one that comes nearest takes {format_seconds(nearest.request_seconds)} for its longest request and "
        f"{format_seconds(nearest.seconds)} for the job; allow that much, or raise the budgets"
    )
