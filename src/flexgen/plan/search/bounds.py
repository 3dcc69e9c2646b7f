"""What a job or a request may take, and how far a policy is from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexgen.plan.play.simulate import Simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Seconds that a job, and each request from its first pass to its last, may take at most; None is no bound."""

    request_seconds: float | None = None
    job_seconds: float | None = None

    @property
    def are_given(self) -> bool:
        return self.request_seconds is not None or self.job_seconds is not None

    def excess(self, request_seconds: float, job_seconds: float) -> float:
        """By what share the worse of the two is exceeded; 0 where both are kept."""
        pairs = ((request_seconds, self.request_seconds), (job_seconds, self.job_seconds))
        return max((max(taken / most - 1.0, 0.0) for taken, most in pairs if most is not None), default=0.0)

    def tightened(self, request_share: float, job_share: float) -> Bounds:
        """Bounds of these shares, where those are less than 1."""
        shares = ((self.request_seconds, request_share), (self.job_seconds, job_share))
        request_seconds, job_seconds = (most and most * min(share, 1.0) for most, share in shares)
        return Bounds(request_seconds=request_seconds, job_seconds=job_seconds)


def longest_request_seconds(played: Simulation, seconds: npt.NDArray[np.float64]) -> float:
    """From a request's first pass to its last, of the one that takes longest, given the seconds of each pass."""
    if not len(played.first_passes):
        return 0.0
    until = np.concatenate([[0.0], np.cumsum(seconds)])
    return float((until[played.end_passes] - until[played.first_passes]).max())
