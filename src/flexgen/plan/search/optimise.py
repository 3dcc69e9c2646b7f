"""Searches a space for its best policy.

The linear program of the steady state (steady.py) says about where weights and KV should live. Policies around its answers and at the
corners of the space (starts.py) are played with the job's lengths at typical rates (evaluate.py), and the best of those are moved until
they get no better, then kicked and moved again (moves.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from flexgen.base.quantities import format_seconds
from flexgen.errors import CapacityError
from flexgen.plan.policy import Policy
from flexgen.plan.price.requests import RequestLoad
from flexgen.plan.search.evaluate import Bounds, Outcome, Player
from flexgen.plan.search.moves import Improvement, climb, refine, wander
from flexgen.plan.search.point import Point
from flexgen.plan.search.shortage import shortage
from flexgen.plan.search.space import Space
from flexgen.plan.search.starts import BOUNDED_CAPS, NEAR, starts, steady_states, varied, varied_places, varied_wholes
from flexgen.plan.search.steady import Steady

# The effort (see evaluate.py) of the stages of a search, beginning with the first size of micro-batches that fits.
FIRST_SIZE_EFFORT = 36_000
# The effort for other sizes, of which those are tried whose steady states reach the share PROMISING of the best.
OTHER_SIZES_EFFORT, PROMISING = 15_000, 0.9
# The effort for other discrete choices at the best placement, for other placements, for kicks, and for the fine steps at the end.
WHOLES_EFFORT, PLACES_EFFORT, KICKS_EFFORT, LAST_EFFORT = 12_000, 11_000, 40_000, 12_000
# The share of the remaining effort that scoring the starts may take before they are moved.
STARTS_SHARE = 0.5
# How many of the best starts are moved first.
MOVED_STARTS = 2
# The shares of all this effort for the best point without bounds (UNBOUNDED), which is often within wide bounds, and then for the best
# within them (BOUNDED); and the share for any further bounds (AGAIN), when many good points are known already.
UNBOUNDED, BOUNDED, AGAIN = 0.2, 0.9, 0.5
# Steady states must keep these shares of the mean seconds that passes may take, because some passes of the job will be longer.
PACES = (0.98, 0.9)
# How many of the points found are starts under the next bounds.
REMEMBERED = 6
# Bounds that no plan keeps: what comes nearest has the shortest requests.
SHORTEST = Bounds(request_seconds=1e-9)
# How often bounds are tightened until the whole job keeps them, and not only its sample.
ATTEMPTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The best policy that a search found.

    Attributes:
        policy: The best policy.
        seconds: The time that the job should take with it.
        refused: The share of the requests that can never fit.
        request_seconds: The time of the request that takes longest.
        objective: The number that was minimised (see evaluate.py).
        point: The point of the space that became the policy.
        worth: Per tier, the relative gain of tokens/s per byte more of it, at the margin of the linear program; empty where that has no
            solution.
        num_played: The number of policies that were played.
        gain_per_gib: Per tier, the relative gain of tokens/s by 1 GiB more of it; empty where it was not searched for.
    """

    policy: Policy
    seconds: float
    refused: float
    request_seconds: float
    objective: float
    point: Point
    worth: dict[str, float]
    num_played: int
    gain_per_gib: dict[str, float] = field(default_factory=dict[str, float])


# Where no single part is to blame.
NOTHING_FITS = "no plan fits the budgets: raise host_mem, device_mem or disk, or lower max_num_seqs"


class Search:
    """Looks for the best policies of a space; points found under one set of bounds are the start for the next.

    Args:
        space: The space of policies.
        patience: How many times the usual effort a search may spend.
        known: Points to begin with, such as those that are good in similar spaces.
    """

    def __init__(self, space: Space, *, patience: float = 1.0, known: Iterable[Point] = ()) -> None:
        self.space, self.player = space, Player(space)
        self._patience = patience
        self._found: dict[Point, None] = dict.fromkeys(known)
        self._mean, self._solved = functools.cache(self._mean_load), functools.cache(self._solve)

    def best(self, bounds: Bounds) -> Solution:
        """Return the best policy within `bounds`.

        Raises:
            CapacityError: No policy fits the budgets, or none is as fast as the bounds require.
        """
        found, asked = self._solution(bounds), bounds
        if not bounds.are_given:
            return found
        whole = self.player.whole(found.policy)
        for _ in range(ATTEMPTS):
            if not bounds.excess(whole.request_seconds, whole.seconds):
                return found
            if asked.excess(found.request_seconds, found.seconds):
                break  # not even the sample keeps them
            # The sample is faster than the whole job: under bounds tightened by the same factor, the whole job should keep the given ones.
            asked = asked.tightened(found.request_seconds / whole.request_seconds, found.seconds / whole.seconds)
            found = self._solution(asked)
            whole = self.player.whole(found.policy)
        raise CapacityError(too_slow(bounds, whole))

    def shortest(self) -> Solution:
        """Return the policy whose requests take the least time.

        Raises:
            CapacityError: No policy fits the budgets.
        """
        return self._solution(SHORTEST)

    def steady_rate(self) -> float:
        """Return the tokens/s of the best steady state without bounds on time; 0 where nothing fits."""
        return max(self._rates(None).values(), default=0.0)

    def _solution(self, bounds: Bounds) -> Solution:
        """Return the best policy found; it may exceed the bounds, where all policies do."""
        share = 1.0
        if self._found:
            share = AGAIN
        elif bounds.are_given:
            share = BOUNDED
            self._look(Bounds(), UNBOUNDED * self._patience)
        point = self._look(bounds, share * self._patience)
        policy = self.player.policy(point) if point is not None else None
        if point is None or policy is None:
            raise CapacityError(shortage(self.space) or NOTHING_FITS)
        outcome = self.player.outcome(policy)
        steady = self._steady_states(policy.micro_batch_tokens, self._pass_seconds(bounds))
        alike = [each for each, spills in steady if spills == (policy.kv_disk_bytes > 0)]
        alike = [each for each in alike if each.host_attention == policy.host_attention] or alike
        return Solution(
            policy=policy,
            seconds=outcome.seconds,
            refused=outcome.refused,
            request_seconds=outcome.request_seconds,
            objective=self.player.score(point, bounds)[-1],
            point=point,
            worth=alike[0].worth if alike else dict[str, float](),
            num_played=self.player.num_played,
        )

    def _look(self, bounds: Bounds, patience: float) -> Point | None:
        """Return the best point found within bounds, or None where nothing fits.

        The first size of micro-batches that fits leads; then come others that promise as much, then all that is near the best, then kicks.
        """
        hunt = _Hunt(self.space, self.player, bounds, patience, self._found)
        caps = BOUNDED_CAPS if bounds.are_given else (1.0,)
        pass_seconds = self._pass_seconds(bounds)
        rates = self._rates(pass_seconds)
        best = max(rates.values(), default=1.0)
        promising = [tokens for tokens, rate in rates.items() if rate >= PROMISING * best]
        # The sizes with the fastest steady states come first; among nearly equal ones, the largest.
        sizes = sorted(self.space.micro_batches(), key=lambda tokens: (-round(rates.get(tokens, 0.0) / best, 2), -tokens))
        begun = list[Point]()
        while sizes and not begun:
            begun = list(self._begun(sizes.pop(0), caps, pass_seconds))
        hunt.begin_with([*self._found, *begun], FIRST_SIZE_EFFORT)
        also_promising = (point for tokens in promising if tokens in sizes for point in self._begun(tokens, caps, pass_seconds))
        hunt.begin_with(also_promising, OTHER_SIZES_EFFORT)
        for others, effort in ((varied_wholes, WHOLES_EFFORT), (varied_places, PLACES_EFFORT)):
            hunt.begin_with(others(hunt.ranked[0], self.space) if hunt.ranked else (), effort)
        hunt.go_on(wander, KICKS_EFFORT)
        hunt.go_on(refine, LAST_EFFORT)
        while sizes and hunt.goes_on():
            hunt.begin_with(self._begun(sizes.pop(0), caps, pass_seconds), 0)
        self._found |= dict.fromkeys(hunt.ranked[:REMEMBERED])
        return hunt.ranked[0] if hunt.ranked else None

    def _pass_seconds(self, bounds: Bounds) -> float | None:
        """Return the most seconds per pass for the longest answer, at a pass per token, to be in time; None if no pass is so fast."""
        if bounds.request_seconds is None:
            return None
        seconds = bounds.request_seconds / max(self.space.workload.answer_lens)
        return seconds if any(self._steady_states(tokens, seconds) for tokens in self.space.micro_batches()) else None

    def _rates(self, pass_seconds: float | None) -> dict[int, float]:
        """Return the tokens/s of the best steady state per size of micro-batches, without the sizes that have none."""
        states = {tokens: self._steady_states(tokens, pass_seconds) for tokens in self.space.micro_batches()}
        return {tokens: steady[0][0].tokens_per_s for tokens, steady in states.items() if steady}

    def _steady_states(self, micro_batch_tokens: int, pass_seconds: float | None) -> list[tuple[Steady, bool]]:
        """Return the best steady states; where the time of passes is bounded, at several paces."""
        bounds = [None] if pass_seconds is None else [pace * pass_seconds for pace in PACES]
        return [state for each in bounds for state in self._solved(micro_batch_tokens, pass_seconds=each)]

    def _mean_load(self, micro_batch_tokens: int | None) -> RequestLoad:
        return RequestLoad.of(self.space.spec, self.space.workload, micro_batch_tokens).mean()

    def _solve(self, micro_batch_tokens: int, *, pass_seconds: float | None = None, near: float | None = None) -> list[tuple[Steady, bool]]:
        """Return what `steady_states` does; beside a device the load depends on how prompts are cut."""
        mean = self._mean(None if self.space.on_cpu else micro_batch_tokens)
        return steady_states(self.space, self.player.expectation, mean, micro_batch_tokens, pass_seconds=pass_seconds, near=near)

    def _begun(self, micro_batch_tokens: int, caps: Sequence[float], pass_seconds: float | None) -> Iterator[Point]:
        """Yield points to begin with, each with a different policy."""
        begun = set[Policy]()
        steady = self._steady_states(micro_batch_tokens, pass_seconds)
        others = [state for near in NEAR for state in self._solved(micro_batch_tokens, pass_seconds=pass_seconds, near=near)[:1]]
        for point in starts(self.space, micro_batch_tokens, steady, others, caps if pass_seconds is None else (1.0,), caps):
            policy = self.player.policy(point)
            if policy is not None and policy not in begun:
                begun.add(policy)
                yield point


class _Hunt:
    """One search for the best points within bounds: the points found, best first, and the effort that it may spend.

    Args:
        space: The space of policies.
        player: Plays the policies, and counts the effort.
        bounds: The bounds that points should keep.
        patience: How many times the usual effort its stages may spend.
        known: The points to begin with.
    """

    def __init__(self, space: Space, player: Player, bounds: Bounds, patience: float, known: Iterable[Point]) -> None:
        self._space, self._player, self._patience = space, player, patience
        self._score = functools.partial(player.score, bounds=bounds)
        self._most = player.effort
        self.ranked = sorted(known, key=self._score)

    def goes_on(self) -> bool:
        """Return whether effort is left, of this stage or of earlier ones."""
        return self._player.effort < self._most

    def begin_with(self, starts: Iterable[Point], effort: float) -> None:
        """Score the starts for as long as the effort allows, and move the best of them."""
        self._most += self._patience * effort
        enough = self._player.effort + STARTS_SHARE * (self._most - self._player.effort)
        scored: list[Point] = []
        for start in starts:
            if self._player.effort >= enough:
                break
            self._score(start)
            scored.append(start)
        chosen = varied(sorted(scored, key=self._score), MOVED_STARTS)
        for few in (chosen[:MOVED_STARTS], chosen[MOVED_STARTS:]):
            self._take(climb(few, self._space, self._score, self.goes_on, also=self.ranked))

    def go_on(self, move: Improvement, effort: float) -> None:
        """Move the best point."""
        self._most += self._patience * effort
        if self.ranked:
            self._take([move(self.ranked[0], self._space, self._score, self.goes_on)])

    def _take(self, found: Iterable[Point]) -> None:
        self.ranked = sorted(dict.fromkeys([*self.ranked, *found]), key=self._score)


def too_slow(bounds: Bounds, nearest: Outcome) -> str:
    """Return a message that names the bounds that were requested and the times that the nearest plan takes."""
    asked = {"max_job_seconds": bounds.job_seconds, "max_request_seconds": bounds.request_seconds}
    given = " and ".join(f"{name}={seconds:g}" for name, seconds in asked.items() if seconds is not None)
    return (
        f"no plan keeps {given}: the one that comes nearest takes {format_seconds(nearest.request_seconds)} for its longest request and "
        f"{format_seconds(nearest.seconds)} for the job; allow that much, or raise the budgets"
    )
