"""Sums over the passes of a run: measured, ideal and expected seconds, and waits.  Memory use does not grow with the length of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flexgen.plan.machine import Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import Policy
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.price.weights import weights_work
from flexgen.plan.price.work import PassLoad, PassWork, busiest, ideal_seconds, price


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRecord:
    """One pass.

    Attributes:
        work: What it moved and computed, as counted.
        expected_seconds: The seconds that it should have taken at typical rates; 0 where it is compared with no machine.
        ideal: For each resource, its ideal seconds; empty where it is compared with no machine.
        waits: For each cause, the seconds in which there was nothing to run.
    """

    work: PassWork = field(default_factory=PassWork)
    expected_seconds: float = 0.0
    ideal: Mapping[str, float] = field(default_factory=dict[str, float])
    waits: Mapping[str, float] = field(default_factory=dict[str, float])


class PassLog:
    """A log of the passes of a run.

    Args:
        spec: The model.
        machine: The measured rates of the machine, with which the passes are compared; None to record no ideal and expected seconds.
        policy: Where every byte lives and what a pass carries.
        homes: The home of each unit.

    Attributes:
        num_passes: The number of passes so far.
        busiest_seconds: The ideal time of the busiest resource, summed over the passes: a lower bound on the time of these passes.
        ideal: For each resource, the sum of its ideal seconds.
        decided: For each resource, the sum of its ideal seconds over the passes in which it was the busiest.
        expected_seconds: The seconds that these passes should have taken at typical rates.
        expected: For each resource, the seconds for which it should have been in use.
        seconds: The seconds that the passes took.
        waits: For each cause, the seconds in which there was nothing to run.
        compute_share: The ideal seconds of computing over the wall time, for the last pass.
        last: The last pass.
    """

    def __init__(self, spec: ModelSpec, machine: Machine | None, policy: Policy, homes: Sequence[str]) -> None:
        self.machine = machine
        self._spec, self._policy = spec, policy
        self._expectation = None if machine is None else Expectation(spec, machine, policy.dtype)
        self._weights = weights_work(spec, homes, policy.device)
        self.num_passes = 0
        self.busiest_seconds = self.expected_seconds = self.seconds = self.compute_share = 0.0
        self.ideal: dict[str, float] = {}
        self.decided: dict[str, float] = {}
        self.expected: dict[str, float] = {}
        self.waits: dict[str, float] = {}
        self.last = PassRecord()

    def work_of(self, load: PassLoad) -> PassWork:
        """Return the bytes that a pass moves and the work that it computes."""
        return price(load, self._spec, self._policy, self._weights)

    def add(self, seconds: float, work: PassWork, waits: Mapping[str, float]) -> None:
        """Add a finished pass: its wall time and its work as counted, not as planned."""
        self.num_passes += 1
        self.seconds += seconds
        _add(self.waits, waits)
        if self.machine is None or self._expectation is None:
            self.last = PassRecord(work=work, waits=waits)
            return
        ideal = ideal_seconds(work, self.machine, self._policy.dtype)
        self.last = PassRecord(work=work, expected_seconds=self.expected_of(work), ideal=ideal, waits=waits)
        _add(self.ideal, ideal)
        _add(self.expected, self._expectation.busy(work, self._policy))
        resource, most = busiest(ideal)
        self.busiest_seconds += most
        self.decided[resource] = self.decided.get(resource, 0.0) + most
        self.expected_seconds += self.last.expected_seconds
        self.compute_share = ideal["compute"] / max(seconds, 1e-9)

    def expected_of(self, work: PassWork) -> float:
        """Return the seconds that a pass with this work should take at typical rates."""
        return 0.0 if self._expectation is None else float(self._expectation.seconds(work, self._policy))

    def busiest_seconds_at(self, rates: Mapping[str, float]) -> float:
        """Return a lower bound of `busiest_seconds` for other best rates, at which other resources may decide the passes.

        Args:
            rates: For each resource, the factor by which its best rate changes; 1 for those that are left out.
        """
        decided = sum(seconds / rates.get(resource, 1.0) for resource, seconds in self.decided.items())
        return max([decided, *(seconds / rates.get(resource, 1.0) for resource, seconds in self.ideal.items())])


def _add(total: dict[str, float], new: Mapping[str, float]) -> None:
    for key, value in new.items():
        total[key] = total.get(key, 0.0) + float(value)
