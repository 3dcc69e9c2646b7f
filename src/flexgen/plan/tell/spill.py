"""The gain of KV cache on disk for a job, and the share of an SSD's life that it costs."""

from __future__ import annotations

from dataclasses import dataclass

# The least relative gain of tokens/s for which more than the weights' bytes are written, unless the options give a budget on disk.
LEAST_SPILL_GAIN = 0.2
# The bytes that a typical SSD of 1 TB is rated to have written to it in its life (600 TBW).
ENDURANCE_BYTES = 600e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Spill:
    """Two plans for one job: the best, which writes KV to disk, and the best that does not.

    Attributes:
        chosen: Whether the plan is the one that writes.
        written_bytes: The bytes that it writes in all.
        seconds: The time of the job with KV on disk.
        seconds_without: The time of the job without KV on disk.
    """

    chosen: bool
    written_bytes: float
    seconds: float
    seconds_without: float

    @property
    def gain(self) -> float:
        """The relative gain of tokens/s by writing."""
        return self.seconds_without / max(self.seconds, 1e-9) - 1


def endurance_share(written_bytes: float) -> float:
    """Return the share of the bytes that an SSD rated for ENDURANCE_BYTES can take in its life."""
    return written_bytes / ENDURANCE_BYTES
