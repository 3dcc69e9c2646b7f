"""What the health of ranks is about: when one counts as lost, a loss as it is told, and the store that tells it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

_MOST_REASON_CHARS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """When a rank counts as lost; a loss is known to all after about 15 s, and over in less than 30 s.

    Attributes:
        beat_seconds: Time between two beats, and between two signs of life on an idle connection.
        silence_seconds: A rank or store that is silent for so long is lost; a connection may be silent for two beats longer.
        verdict_seconds: A broken connection is reported without the store's verdict after that time.
        grace_seconds: A main thread that has not come to its end so long after a loss is stuck, and its process is ended.
    """

    beat_seconds: float = 1.5
    silence_seconds: float = 12.0
    verdict_seconds: float = 4.0
    grace_seconds: float = 8.0

    @property
    def connection_seconds(self) -> float:
        """For how long a connection may be silent."""
        return self.silence_seconds + 2 * self.beat_seconds


class HealthStore(Protocol):
    """What is needed of torch's stores; any of it may raise RuntimeError."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def compare_set(self, key: str, expected_value: str, desired_value: str, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Failure:
    """A loss: the rank (None: it is not known which), and a predicate that says what is wrong with it."""

    rank: int | None
    reason: str

    def to_json(self) -> str:
        """Return it as it lies in the store."""
        return json.dumps({"rank": self.rank, "reason": self.reason[:_MOST_REASON_CHARS]})

    @classmethod
    def from_json(cls, data: bytes, size: int) -> Failure:
        """Return what lies in the store; what cannot be read is a loss all the same."""
        try:
            value: Any = json.loads(data)
            rank, reason = value["rank"], str(value["reason"])[:_MOST_REASON_CHARS]
        except (ValueError, TypeError, KeyError, RecursionError):
            return cls(None, "holds a report that cannot be read")
        return cls(rank if type(rank) is int and 0 <= rank < size else None, reason)
