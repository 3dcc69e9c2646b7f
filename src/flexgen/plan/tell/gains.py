"""What a little more of something would gain, in tokens/s."""

from __future__ import annotations

import dataclasses
import functools

from flexgen.base.quantities import GIB
from flexgen.plan.play.simulate import Simulation
from flexgen.plan.policy import Policy
from flexgen.plan.price.pass_time import RESOURCES, Expectation
from flexgen.plan.search.bounds import Bounds
from flexgen.plan.search.evaluate import Player
from flexgen.plan.search.moves import wander
from flexgen.plan.search.optimise import Solution
from flexgen.plan.search.space import Space

# Gains from this on per GiB are looked for, with so much effort (see play.py), before they are promised.
PROMISE, EFFORT = 0.01, 6_000
# Rates are taken to be so many times as fast.
FASTER = 1.1


def memory_gains(space: Space, found: Solution, bounds: Bounds) -> dict[str, float]:
    """Tier -> relative gain by 1 GiB more of it: what the linear program says, or less where a search from `found` finds less.

    Args:
        bounds: that it keeps.
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


def rate_gains(played: Simulation, policy: Policy, expectation: Expectation) -> dict[str, float]:
    """Resource -> relative gain per relative gain of its rate, the policy being as it is: of `FASTER`, in the passes that it decides."""
    seconds = float(expectation.passes(played, policy).sum())
    faster = {name: float(expectation.passes(played, policy, times={name: FASTER}).sum()) for name in RESOURCES}
    return {name: (seconds / max(less, 1e-12) - 1) / (FASTER - 1) for name, less in faster.items()}
