"""Formats of weights and KV as a choice: what a job would take in each, and which of them is taken.  Values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Plans whose times differ by less than a plan's usual error (docs/plans.md) count as equally fast.
MARGIN = 0.05
# How much a format changes answers, in an order only: by the errors of weights and of logits in docs/kv-cache.md and docs/log.md.
WEIGHT_CHANGES = {"auto": 0, "int8": 1, "int4": 4}
KV_CHANGES = {"auto": 0, "int8": 1, "k8v4": 2, "int4": 5}


@dataclass(frozen=True, slots=True)
class Formats:
    """Formats of weights and KV together.

    Attributes:
        weights: The format of weights, as `weight_format` in EngineOptions.
        kv: The format of KV, as `kv_format` in EngineOptions.
    """

    weights: str
    kv: str

    def __str__(self) -> str:
        named = [f"{what} in {name}" for what, name in (("weights", self.weights), ("KV", self.kv)) if name != "auto"]
        return " and ".join(named) or "weights as stored"

    @property
    def change(self) -> int:
        """How much answers change: an order, not a measure."""
        return WEIGHT_CHANGES[self.weights] + KV_CHANGES[self.kv]


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatPrice:
    """What a job would take in certain formats.

    Attributes:
        formats: The formats.
        seconds: The expected time of the job; None where it is not possible in them.
        conversion_seconds: The expected time of converting the weights first; 0 if that is done already.
        num_refused: The number of requests that can never fit.
        problem: Why the job is not possible in them.
    """

    formats: Formats
    seconds: float | None = None
    conversion_seconds: float = 0.0
    num_refused: int = 0
    problem: str | None = None

    @property
    def total_seconds(self) -> float:
        """The time of the job and of the conversion before it."""
        return float("inf") if self.seconds is None else self.seconds + self.conversion_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatChoice:
    """The formats that were chosen, and what they were chosen from.

    Attributes:
        chosen: The formats of the plan.
        prices: What the job would take in every combination that is allowed; empty where the formats are those of an earlier run.
    """

    chosen: Formats
    prices: tuple[FormatPrice, ...] = ()


def best_of(prices: Sequence[FormatPrice]) -> Formats:
    """Return the formats that change answers least among those that are about the fastest and refuse fewest requests.

    One of them must be possible.
    """
    possible = [price for price in prices if price.seconds is not None]
    fewest = min(price.num_refused for price in possible)
    possible = [price for price in possible if price.num_refused == fewest]
    most = (1 + MARGIN) * min(price.total_seconds for price in possible)
    fast = [price for price in possible if price.total_seconds <= most]
    return min(fast, key=lambda price: (price.formats.change, price.total_seconds)).formats
