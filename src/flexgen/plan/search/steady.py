"""The steady state as one linear program: where weights and KV live, how many sequences are alive, how long a pass takes.

With B live sequences a pass takes as long as its slowest resource, and each resource is linear in the homes of the weights, in the
sequences per home of KV and in 1. Seconds per live sequence, pass / B, are a ratio of linear functions; divided by B (Charnes and Cooper,
1962) everything is linear again: t = 1/B, weights w·t, shares of the sequences, and τ = pass·t, which is minimised. A bound on the time of
a pass, as of a request, is linear too: τ ≤ seconds·t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexgen.options import TIERS, WEIGHT_HOMES
from flexgen.plan.machine import has_device_tier
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.price.pass_time import RESOURCES, Expectation
from flexgen.plan.price.requests import Floats, RequestLoad
from flexgen.plan.price.weights import unit_homes, weights_work
from flexgen.plan.price.work import PassWork, price
from flexgen.plan.search.drafts import WeightSizes

# The coefficients of sequences are those of a pass with this many, so that micro-batches are full.
MANY_SEQUENCES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """The bytes that weights and KV may take.

    Attributes:
        memory_bytes: Per tier, the bytes left for weights, KV, and what grows with the sequences; on disk, those for KV only.
        sequence_bytes: Per tier, the bytes that each live sequence takes besides its KV.
        kv_bytes: The KV bytes of a live sequence on average, times the blocks of such sequences in flight.
        staged: The host bytes that a byte of KV on disk takes.
        disk_growth: The bytes on disk that it takes there.
    """

    memory_bytes: Mapping[str, float]
    sequence_bytes: Mapping[str, float]
    kv_bytes: float
    staged: float
    disk_growth: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """The best steady state.

    Attributes:
        num_seqs: The number of live sequences.
        tokens_per_s: The output tokens per second.
        weights: The share of the weights per home.
        kv: The share of KV per tier.
        worth: Per tier, the relative gain of tokens/s per byte more of it, at the margin (the dual values).
        host_attention: Whether the host attends to the KV in its memory for next tokens.
    """

    num_seqs: float
    tokens_per_s: float
    weights: dict[str, float]
    kv: dict[str, float]
    worth: dict[str, float]
    host_attention: bool = True


class SteadyState:
    """The coefficients for one model, machine and job under one policy's micro-batch size and placement of the embedding."""

    def __init__(self, expectation: Expectation, mean: RequestLoad, policy: Policy) -> None:
        spec = expectation.spec
        self._host_attention = policy.host_attention
        fixed = _vector(expectation.resources(PassWork(), policy))
        self.fixed = fixed + expectation.machine.overheads.per_pass
        tiers = TIERS if has_device_tier(policy.device) else ("host", "disk")
        sizes = WeightSizes.of(spec, policy.device)
        homes = [home for home in sizes.by_home if home != "encoded" or sizes.can_stay_encoded]
        work = {home: weights_work(spec, unit_homes(spec, Fractions(**{home: 1.0})), policy.device) for home in homes}
        self.weights = {home: _vector(expectation.resources(each, policy)) - fixed for home, each in work.items()}
        self.kv = {tier: _sequence_seconds(expectation, mean, policy, tier) for tier in tiers}
        self.weight_bytes = {home: float(sizes.by_home[home]) for home in homes if home != "disk"}

    def best(
        self,
        free: FreeMemory,
        max_num_seqs: float,
        *,
        weights: Mapping[str, float] | None = None,
        kv: Mapping[str, float] | None = None,
        kv_tiers: Sequence[str] = TIERS,
        pass_seconds: float | None = None,
    ) -> Steady | None:
        """Return the steady state with the most tokens/s, or None where nothing fits.

        Args:
            free: The bytes that weights and KV may take.
            max_num_seqs: The most live sequences.
            weights: The pinned shares of weights per home; None where they are free.
            kv: The pinned shares of KV per tier; None where they are free.
            kv_tiers: The tiers where KV may live.
            pass_seconds: The most seconds that a pass may take; None for no bound.
        """
        homes, tiers = list(self.weights), list(self.kv)
        t = len(homes) + len(tiers)
        tau, size = t + 1, t + 2
        rows: list[Floats] = []
        for number in range(len(RESOURCES)):
            row = np.zeros(size)
            row[:t] = [each[number] for each in (*self.weights.values(), *self.kv.values())]
            row[t], row[tau] = self.fixed[number], -1.0
            rows.append(row)
        for tier in TIERS:
            rows.append(self._memory_row(free, tier, size))
        if pass_seconds is not None:
            rows.append(np.zeros(size))
            rows[-1][t], rows[-1][tau] = -pass_seconds, 1.0
        equal = np.zeros((2, size))
        equal[0, : len(homes)], equal[0, t] = 1.0, -1.0
        equal[1, len(homes) : t] = 1.0
        pins, pinned = _pins(homes, tiers, size, weights, kv)
        bounds = [(0.0, None)] * len(homes) + [(0.0, None if tier in kv_tiers else 0.0) for tier in tiers]
        bounds += [(1.0 / max_num_seqs, 1.0), (0.0, None)]
        matrix, goal = np.array(rows), np.zeros(size)
        goal[tau] = 1.0
        solved = minimum(goal, matrix, np.zeros(len(rows)), np.concatenate([equal, pins]), np.concatenate([[0.0, 1.0], pinned]), bounds)
        if solved is None:
            return None
        x, duals = solved.at, solved.worth
        num_seqs = float(1.0 / x[t])
        memory = dict(zip(TIERS, duals[len(RESOURCES) :], strict=False))
        return Steady(
            num_seqs=num_seqs,
            tokens_per_s=1.0 / float(x[tau]),
            weights={home: float(x[place]) * num_seqs for place, home in enumerate(homes)},
            kv={tier: float(x[len(homes) + place]) for place, tier in enumerate(tiers)},
            # One more byte relaxes the tier's row by t, because the row is divided by B.
            worth={tier: float(-dual * x[t] / x[tau]) for tier, dual in memory.items()},
            host_attention=self._host_attention,
        )

    def _memory_row(self, free: FreeMemory, tier: str, size: int) -> Floats:
        """Return the bytes used in a tier minus those available, per live sequence."""
        row = np.zeros(size)
        count = len(self.weights)
        for place, home in enumerate(self.weights):
            if WEIGHT_HOMES[home] == tier and tier != "disk":
                row[place] = self.weight_bytes[home]
        for place, home in enumerate(self.kv):
            growth = free.disk_growth if home == "disk" else 1.0
            row[count + place] = growth * free.kv_bytes * (home == tier) + free.sequence_bytes.get(tier, 0.0)
            if home == "disk" and tier == "host":
                row[count + place] += free.staged * free.kv_bytes
        row[count + len(self.kv)] = -free.memory_bytes.get(tier, 0.0)
        return row


@dataclass(frozen=True, slots=True, kw_only=True)
class Minimum:
    """The solution of a linear program.

    Attributes:
        value: The least value of the goal.
        at: The values of the variables.
        worth: The change of the goal per unit by which an inequality's right-hand side grows.
        equal_worth: The same for the equations.
    """

    value: float
    at: Floats
    worth: Floats
    equal_worth: Floats


def minimum(
    goal: Floats, at_most: Floats, limits: Floats, equal: Floats, values: Floats, bounds: Sequence[tuple[float, float | None]]
) -> Minimum | None:
    """Minimise goal · x where at_most · x <= limits and equal · x = values; return None where nothing fulfils them all.

    Rows of inequalities are scaled so that all numbers are near 1: seconds and bytes differ by 15 orders of magnitude.
    """
    from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

    linprog: Any = optimize.linprog  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    scale = np.abs(at_most).max(axis=1)
    scale[scale == 0] = 1.0
    found = linprog(goal, A_ub=at_most / scale[:, None], b_ub=limits / scale, A_eq=equal, b_eq=values, bounds=bounds, method="highs")
    if found.status != 0:
        return None
    return Minimum(value=found.fun, at=found.x, worth=found.ineqlin.marginals / scale, equal_worth=found.eqlin.marginals)


def _pins(
    homes: Sequence[str], tiers: Sequence[str], size: int, weights: Mapping[str, float] | None, kv: Mapping[str, float] | None
) -> tuple[Floats, Floats]:
    """Return equations that fix the pinned shares."""
    rows: list[Floats] = []
    values: list[float] = []
    for place, home in enumerate(homes[:-1]):  # the last home's share follows from the others
        if weights is not None and home in weights:
            row = np.zeros(size)
            row[place], row[len(homes) + len(tiers)] = 1.0, -weights[home]
            rows.append(row)
            values.append(0.0)
    for place, tier in enumerate(tiers[:-1]):
        if kv is not None and tier in kv:
            row = np.zeros(size)
            row[len(homes) + place] = 1.0
            rows.append(row)
            values.append(kv[tier])
    return np.array(rows).reshape(-1, size), np.array(values)


def _vector(seconds: Mapping[str, float]) -> Floats:
    return np.array([float(seconds[resource]) for resource in RESOURCES])


def _sequence_seconds(expectation: Expectation, mean: RequestLoad, policy: Policy, home: str) -> Floats:
    """Return the seconds of each resource that one live sequence of the job adds to a pass, on average, with its KV at `home`."""
    load = mean.at(home, MANY_SEQUENCES)
    seconds = _vector(expectation.resources(price(load, expectation.spec, policy, PassWork()), policy))
    empty = PassWork(num_micro_batches=0)
    return (seconds - _vector(expectation.resources(empty, policy))) / MANY_SEQUENCES
