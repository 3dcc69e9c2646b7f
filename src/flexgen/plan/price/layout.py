"""What a placement of the weights takes and moves, remembered: a search asks again and again, and a model may have a thousand units."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import Fractions
from flexgen.plan.price.memory import scratch_bytes
from flexgen.plan.price.work import PassWork, unit_homes, weight_bytes, weights_work


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One placement of all units.

    Attributes:
        held: home tier -> bytes. from_disk, over_link: bytes of the units that stream, and `largest_...` of the largest.
        scratch_bytes: for decoding what streams. work: what every pass moves. tiers: those with at least one unit.
    """

    held: dict[str, int]
    from_disk: int
    largest_from_disk: int
    over_link: int
    largest_over_link: int
    scratch_bytes: int
    work: PassWork
    tiers: frozenset[str]


class Layouts:
    """The layouts of one model's weights on one kind of device."""

    def __init__(self, spec: ModelSpec, device: str) -> None:
        self._spec, self._device = spec, device
        self._known: dict[Fractions, Layout] = {}

    def __len__(self) -> int:
        """Layouts that are known."""
        return len(self._known)

    def of(self, weights: Fractions) -> Layout:
        """The layout that honours these shares."""
        if weights not in self._known:
            self._known[weights] = self._laid_out(weights)
        return self._known[weights]

    def _laid_out(self, weights: Fractions) -> Layout:
        homes = unit_homes(self._spec, weights)
        from_disk = [unit.disk_bytes for unit, home in zip(self._spec.units, homes, strict=True) if home == "disk"]
        crossing = [unit.carried_bytes for unit, home in zip(self._spec.units, homes, strict=True) if home != "device"]
        over_link = crossing if self._device != "cpu" else []
        return Layout(
            held=weight_bytes(self._spec, homes),
            from_disk=sum(from_disk),
            largest_from_disk=max(from_disk, default=0),
            over_link=sum(over_link),
            largest_over_link=max(over_link, default=0),
            scratch_bytes=scratch_bytes(self._spec, homes),
            work=weights_work(self._spec, homes, self._device),
            tiers=frozenset(homes),
        )
