"""Evaluates policies: each is played once with a sample of the job, and its outcome is cached."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexgen.plan.machine import has_device_tier
from flexgen.plan.play.sampling import Sample, Samples, play_sample
from flexgen.plan.play.simulate import Simulation
from flexgen.plan.policy import Policy
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.search.moves import Score
from flexgen.plan.search.point import Point
from flexgen.plan.search.space import Space

# Among plans that are about as fast, those are preferred that have shorter passes (results come sooner, forecasts matter less) and that
# move fewer bytes (bytes that do not move are never late), above all from the disk.
LONG_PASS_PENALTY, MOVING_PENALTY = 0.003, 0.003
# The gain that spilling must exceed, for the sake of the disk's life and its other users.
SPILL_PENALTY = 0.05
# The effort of finding the policy of a point, and of each unit of a new placement, in units of about 10 µs on one core of 2024.
POINT_EFFORT, UNIT_EFFORT = 20, 0.1
# The effort of playing a sample, and of each of its passes, each group that enters together, and each pass of a group's life.
PLAY_EFFORT, PASS_EFFORT, GROUP_EFFORT, LIFE_EFFORT = 23, 0.009, 0.03, 0.00012


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The most seconds that a job and each of its requests may take.

    Attributes:
        request_seconds: The bound on each request, from its first pass to its last; None for no bound.
        job_seconds: The bound on the job; None for no bound.
    """

    request_seconds: float | None = None
    job_seconds: float | None = None

    @property
    def are_given(self) -> bool:
        return self.request_seconds is not None or self.job_seconds is not None

    def excess(self, request_seconds: float, job_seconds: float) -> float:
        """Return the share by which the worse of the two is exceeded; 0 where both are kept."""
        pairs = ((request_seconds, self.request_seconds), (job_seconds, self.job_seconds))
        return max((max(taken / most - 1.0, 0.0) for taken, most in pairs if most is not None), default=0.0)

    def tightened(self, request_share: float, job_share: float) -> Bounds:
        """Return the bounds multiplied by these shares, where the shares are less than 1."""
        shares = ((self.request_seconds, request_share), (self.job_seconds, job_share))
        request_seconds, job_seconds = (most and most * min(share, 1.0) for most, share in shares)
        return Bounds(request_seconds=request_seconds, job_seconds=job_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of playing a policy.

    Attributes:
        refused: The share of the requests that can never fit.
        seconds: The duration of the job.
        request_seconds: The duration of the request that takes longest.
    """

    refused: float
    seconds: float
    request_seconds: float


def objective(policy: Policy, quota: float, seconds: float) -> float:
    """Return the number to minimise: seconds, and a little more for long passes, for what moves and for what is written to disk."""
    computing = "device" if has_device_tier(policy.device) else "host"
    moving = 2 - getattr(policy.weights, computing) - getattr(policy.kv, computing) + policy.weights.disk
    moving += policy.kv.host * (not policy.host_attention)
    return seconds * (1 + LONG_PASS_PENALTY * quota + MOVING_PENALTY * moving + SPILL_PENALTY * policy.kv.disk)


class Player:
    """Plays the policies of a space, and caches their outcomes.

    Attributes:
        effort: The effort spent so far.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.expectation = Expectation(space.spec, space.machine, space.dtype)
        self._samples, self._wholes = Samples(space.workload), Samples.played_once(space.workload)
        self.effort = 0.0
        self._policies: dict[Point, Policy | None] = {}
        self._known: dict[Policy, Outcome] = {}
        self._known_whole: dict[Policy, Outcome] = {}

    @property
    def num_played(self) -> int:
        """The number of policies that were played."""
        return len(self._known)

    def score(self, point: Point, bounds: Bounds) -> Score:
        """Return (share of requests refused, excess over the bounds, objective); less is better, in this order."""
        policy = self.policy(point)
        if policy is None:
            return math.inf, math.inf, math.inf
        outcome = self.outcome(policy)
        excess = bounds.excess(outcome.request_seconds, outcome.seconds)
        return outcome.refused, excess, objective(policy, point.quota, outcome.seconds)

    def policy(self, point: Point) -> Policy | None:
        """Return the policy of a point, or None where it does not fit."""
        if point not in self._policies:
            known = len(self.space.placed)
            self._policies[point] = self.space.policy(point)
            self.effort += POINT_EFFORT + UNIT_EFFORT * len(self.space.spec.units) * (len(self.space.placed) - known)
        return self._policies[point]

    def seconds(self, point: Point) -> float:
        """Return the duration of the job under the policy of this point; infinite where it does not fit."""
        policy = self.policy(point)
        return math.inf if policy is None else self.outcome(policy).seconds

    def outcome(self, policy: Policy) -> Outcome:
        """Return the policy's outcome for the sample, extrapolated to the job."""
        if policy not in self._known:
            self._known[policy] = self._play(policy, self._samples.of(self.space.sizes.num_seqs(policy)))
        return self._known[policy]

    def whole(self, policy: Policy) -> Outcome:
        """Return the policy's outcome for the whole job (or for a larger sample, where there are too many requests)."""
        if policy not in self._known_whole:
            self._known_whole[policy] = self._play(policy, self._wholes.of(self.space.sizes.num_seqs(policy)))
        return self._known_whole[policy]

    def _play(self, policy: Policy, sample: Sample) -> Outcome:
        played = play_sample(self.space.spec, policy, sample, weights=self.space.placed.of(policy.weights).work)
        seconds = [self.space.blocks.with_drains(job.seconds(self.expectation, policy)) for job in played.jobs]
        self.effort += sum(map(_effort, played.jobs))
        return Outcome(
            refused=played.refused,
            seconds=played.extrapolated([float(each.sum()) for each in seconds]),
            request_seconds=max(job.longest_request_seconds(each) for job, each in zip(played.jobs, seconds, strict=True)),
        )


def _effort(job: Simulation) -> float:
    """Return the effort of playing a job."""
    lives = job.end_passes - job.first_passes
    return PLAY_EFFORT + PASS_EFFORT * job.num_passes + GROUP_EFFORT * len(lives) + LIFE_EFFORT * float(lives.sum())
