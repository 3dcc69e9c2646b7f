"""What the passes really did: seconds, ideal and expected seconds, waits.  Sums only: a long run costs no memory.  Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexgen.plan.machine import Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import Policy
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.price.work import PassLoad, PassWork, busiest, ideal_seconds, price, weights_work


class PassLog:
    """The passes of a run so far.

    Args:
        spec: The model.
        machine: Its rates, that the passes are compared with.
        policy: Where everything lives.
        homes: The home of each unit.

    Attributes:
        num_passes: Passes so far.
        busiest_seconds: Sum over the passes of the busiest resource's ideal time: what the engine could not beat with these passes.
        ideal: Resource -> sum of its ideal seconds.
        decided: Resource -> sum of its ideal seconds over the passes in which it was the busiest.
        expected_seconds: What these passes should have taken at typical rates.
        expected: Resource -> seconds that it should have been in use.
        seconds: What the passes took.
        waits: Cause -> seconds without anything to run.
        compute_share: Of the last pass, ideal seconds of computing over wall time.
    """

    def __init__(self, spec: ModelSpec, machine: Machine, policy: Policy, homes: Sequence[str]) -> None:
        self.machine = machine
        self._spec, self._policy = spec, policy
        self._expectation = Expectation(spec, machine, policy.dtype)
        self._weights = weights_work(spec, homes, policy.device)
        self.num_passes = 0
        self.busiest_seconds = self.expected_seconds = self.seconds = self.compute_share = 0.0
        self.ideal: dict[str, float] = {}
        self.decided: dict[str, float] = {}
        self.expected: dict[str, float] = {}
        self.waits: dict[str, float] = {}

    def work_of(self, load: PassLoad) -> PassWork:
        """What a pass moves and computes."""
        return price(load, self._spec, self._policy, self._weights)

    def add(self, seconds: float, work: PassWork, waits: Mapping[str, float]) -> None:
        """Count a pass as it went: its wall time, and its work as counted, not as planned."""
        ideal = ideal_seconds(work, self.machine, self._policy.dtype)
        expected = self._expectation.busy(work, self._policy)
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
        return float(self._expectation.seconds(work, self._policy))

    def busiest_seconds_at(self, rates: Mapping[str, float]) -> float:
        """A lower bound of `busiest_seconds`, had the best rates been others; other resources may decide the passes then.

        Args:
            rates: Resource -> how many times its best rate; 1 for those that are left out.
        """
        decided = sum(seconds / rates.get(resource, 1.0) for resource, seconds in self.decided.items())
        return max([decided, *(seconds / rates.get(resource, 1.0) for resource, seconds in self.ideal.items())])
