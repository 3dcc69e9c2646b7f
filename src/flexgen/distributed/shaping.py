"""An artificial link, for tests and measurements on one machine: FLEXGEN_LINK="10ms,1Gbit" in the environment of the ranks.

Frames enter it one after the other at its rate and arrive a latency later; the next one enters meanwhile, as on a real link.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flexgen.errors import OptionError

VARIABLE = "FLEXGEN_LINK"
_LATENCY = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
_RATE = re.compile(r"(\d+(?:\.\d+)?)([KMG]?)bit", re.IGNORECASE)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkShape:
    """What a link is to be like: one-way latency, and rate (infinite where none is given)."""

    latency_seconds: float = 0.0
    bytes_per_s: float = float("inf")

    def seconds(self, num_bytes: int) -> float:
        """Return how long so many bytes take to enter the link."""
        return num_bytes / self.bytes_per_s


def parse_link(text: str) -> LinkShape:
    """Return what `text` describes: a latency ("10ms"), a rate ("1Gbit"), or both with a comma between them.

    Raises:
        OptionError: It is neither.
    """
    latency, rate = 0.0, float("inf")
    for part in text.split(","):
        given = "".join(part.split())
        if match := _LATENCY.fullmatch(given):
            latency = float(match[1]) * _SECONDS[match[2]]
        elif (match := _RATE.fullmatch(given)) and float(match[1]) > 0:
            rate = float(match[1]) * _FACTORS[match[2].upper()] / 8
        else:
            raise OptionError(f"{VARIABLE}={text!r}: write a latency (10ms), a rate (1Gbit), or both (10ms,1Gbit)")
    return LinkShape(latency_seconds=latency, bytes_per_s=rate)


class Shaper:
    """Says when each frame of a sender is through the artificial link.  Not thread-safe."""

    def __init__(self, shape: LinkShape) -> None:
        self._shape = shape
        self._free = 0.0  # when the last frame has entered the link, as time.monotonic() counts

    def due(self, num_bytes: int, now: float) -> float:
        """Return when a frame that is handed over now has arrived whole."""
        self._free = max(self._free, now) + self._shape.seconds(num_bytes)
        return self._free + self._shape.latency_seconds

    def seconds(self, num_bytes: int) -> float:
        """Return how long the link is busy with a frame."""
        return self._shape.seconds(num_bytes)
