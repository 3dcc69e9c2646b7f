"""What the passes really did: seconds, bytes and work per resource, pass by pass.  Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flexgen.plan.cost import PassWork, busiest, ideal_seconds
from flexgen.plan.machine import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRecord:
    """One pass as it went.

    Attributes:
        seconds: wall time. work: counted, not planned. ideal: resource -> least seconds of that work.
        waits: cause -> seconds without anything to run.
    """

    seconds: float
    work: PassWork
    ideal: dict[str, float]
    waits: dict[str, float]
    num_live: int
    micro_batches: int


@dataclass(slots=True)
class Trace:
    """The passes of a run so far."""

    machine: Machine
    dtype: str
    passes: list[PassRecord] = field(default_factory=list)

    def add(self, seconds: float, work: PassWork, waits: dict[str, float], num_live: int, micro_batches: int) -> PassRecord:
        record = PassRecord(
            seconds=seconds, work=work, ideal=ideal_seconds(work, self.machine, self.dtype), waits=dict(waits),
            num_live=num_live, micro_batches=micro_batches,
        )  # fmt: skip
        self.passes.append(record)
        return record

    @property
    def busiest_seconds(self) -> float:
        """Sum over the passes of the busiest resource's ideal time: what the engine could not beat with these passes."""
        return sum(busiest(record.ideal)[1] for record in self.passes)

    def ideal_by_resource(self) -> dict[str, float]:
        """Resource -> sum of its ideal seconds."""
        return _summed([record.ideal for record in self.passes])

    def waits(self) -> dict[str, float]:
        return _summed([record.waits for record in self.passes])

    def work(self) -> PassWork:
        return sum((record.work for record in self.passes), PassWork())


def _summed(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            total[key] = total.get(key, 0.0) + value
    return total
