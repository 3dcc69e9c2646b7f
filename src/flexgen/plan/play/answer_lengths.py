"""A distribution of answer lengths, for answers that may end early and whose lengths are unknown before the job has run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen.plan.workload import Workload

# The tokens of answers in conversations: twenty quantiles (2.5 %, 7.5 %, ...) of 19,366 requests: Azure LLM inference trace 2023
# (Patel et al., ISCA 2024; Azure/AzurePublicDataset, CC BY 4.0).
CONVERSATION_QUANTILES = (28, 48, 60, 72, 82, 88, 93, 99, 108, 120, 139, 162, 195, 373, 391, 396, 406, 416, 430, 522)
# Room is kept for an answer of the length that this share of the answers does not exceed (engine/admission.py).
RESERVED_QUANTILE = 0.9
# An irrational step visits all quantiles evenly, however many are drawn.
GOLDEN_STEP = (math.sqrt(5) - 1) / 2
# The assumed distribution counts as much as this many answers seen.
ASSUMED_ANSWERS = 16
DRAWN_QUANTILES = 1000


@dataclass(frozen=True, slots=True)
class OutputLengths:
    """A distribution of answer lengths.

    Attributes:
        quantiles: Equally likely lengths, rising.
    """

    quantiles: tuple[int, ...] = CONVERSATION_QUANTILES

    def at(self, share: float) -> int:
        """Return the length that `share` of the answers do not exceed, interpolated linearly between the quantiles."""
        place = min(max(share * len(self.quantiles) - 0.5, 0.0), len(self.quantiles) - 1.0)
        low = int(place)
        high = min(low + 1, len(self.quantiles) - 1)
        return max(round(self.quantiles[low] + (place - low) * (self.quantiles[high] - self.quantiles[low])), 1)

    def updated(self, seen: Sequence[int]) -> OutputLengths:
        """Return the distribution after answers of these lengths have ended; the more there are, the less the assumed lengths count."""
        if not seen:
            return self
        assumed = [self.at((each + 0.5) / ASSUMED_ANSWERS) for each in range(ASSUMED_ANSWERS)]
        ranked = sorted([*assumed, *seen])
        number = min(len(ranked), DRAWN_QUANTILES)
        return OutputLengths(tuple(ranked[int((each + 0.5) / number * len(ranked))] for each in range(number)))


def expected(workload: Workload, lengths: OutputLengths | None = None) -> Workload:
    """Return the workload with likely answer lengths within their bounds; one whose lengths are already known is returned as it is."""
    if not workload.may_end_early or workload.expected_lens:
        return workload
    lengths = lengths or OutputLengths()
    reserved = lengths.at(RESERVED_QUANTILE)
    bounds = list(zip(workload.least_lens or (0,) * len(workload), workload.output_lens, strict=True))
    return dataclasses.replace(
        workload,
        expected_lens=tuple(
            min(most, max(least, lengths.at((place + 1) * GOLDEN_STEP % 1.0))) for place, (least, most) in enumerate(bounds)
        ),
        reserved_lens=tuple(min(most, max(least, reserved)) for least, most in bounds),
        least_lens=(),
    )
