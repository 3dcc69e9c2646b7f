"""What the passes really did: seconds, ideal and expected seconds, waits.  Sums only: a long run costs no memory.  Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flexgen.plan.policy import Policy
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.price.work import PassWork, busiest, ideal_seconds


@dataclass(slots=True)
class Trace:
    """The passes of a run so far.

    Attributes:
        busiest_seconds: sum over the passes of the busiest resource's ideal time: what the engine could not beat with these passes.
        ideal: resource -> sum of its ideal seconds. decided: the same of the passes in which it was the busiest.
        expected_seconds: what these passes should have taken at typical rates. expected: resource -> seconds that it
            should have been in use.
        seconds: what they took. waits: cause -> seconds without anything to run.
        compute_share: of the last pass: ideal seconds of computing over wall time.
    """

    expectation: Expectation
    policy: Policy
    num_passes: int = 0
    busiest_seconds: float = 0.0
    ideal: dict[str, float] = field(default_factory=dict)
    decided: dict[str, float] = field(default_factory=dict)
    expected_seconds: float = 0.0
    expected: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    waits: dict[str, float] = field(default_factory=dict)
    compute_share: float = 0.0

    def add(self, seconds: float, work: PassWork, waits: Mapping[str, float]) -> None:
        """A pass as it went: wall time, and work as counted, not as planned."""
        ideal = ideal_seconds(work, self.expectation.machine, self.policy.dtype)
        expected = self.expectation.busy(work, self.policy)
        self.num_passes += 1
        self.seconds += seconds
        resource, most = busiest(ideal)
        self.busiest_seconds += most
        self.decided[resource] = self.decided.get(resource, 0.0) + most
        self.expected_seconds += self.expected_of(work)
        self.compute_share = ideal["compute"] / max(seconds, 1e-9)
        for total, new in ((self.ideal, ideal), (self.expected, expected), (self.waits, waits)):
            for key, value in new.items():
                total[key] = total.get(key, 0.0) + float(value)

    def expected_of(self, work: PassWork) -> float:
        """Seconds that a pass with this work should take at typical rates."""
        return float(self.expectation.seconds(work, self.policy))

    def busiest_seconds_at(self, rates: Mapping[str, float]) -> float:
        """`busiest_seconds`, had the best rates been so many times what they are (at least: passes may be decided by others then).

        Args:
            rates: resource -> times its best rate; 1 of those that are left out.
        """
        decided = sum(seconds / rates.get(resource, 1.0) for resource, seconds in self.decided.items())
        return max([decided, *(seconds / rates.get(resource, 1.0) for resource, seconds in self.ideal.items())])
