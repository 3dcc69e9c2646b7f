"""Handles measurements that other programs disturbed: they are repeated, or joined, rate by rate, with earlier ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flexgen.plan.machine import DiskRequest, Machine, Overheads, Rate
from flexgen.report.progress import BUSY_CORES

# Measurements agree within this share, in the rates that decide plans; one that is slower by more than the other is doubted.
AGREEMENT, SLOWER = 0.1, 0.15
# How often it is measured at most.
MOST_TIMES = 3
# Of which less is better, and what is what it is.
_SLOWDOWNS = ("disk_slowdown", "compute_slowdown", "duplex_slowdown", "link_slowdown", "host_slowdown")
_LESS = ("disk_core_seconds_per_byte", *_SLOWDOWNS, "busy_cores")


def is_disturbed(machine: Machine) -> bool:
    """Return whether other programs used the machine while it was measured."""
    return machine.busy_cores > BUSY_CORES


def settled(measure: Callable[[], Machine], before: Sequence[Machine], tell: Callable[[str], None]) -> Machine:
    """Measure the machine, and again if the result cannot be trusted.

    A measurement that was disturbed is joined with earlier ones, rate by rate.  Where there are none, and where an undisturbed one is
    slower than those, it is repeated until two agree, MOST_TIMES at most.

    Args:
        measure: Measures the machine once.
        before: Earlier measurements of this machine, in the same detail.
        tell: Called with each thing that is done, in words for people.
    """
    machine = measure()
    if not is_disturbed(machine) and not _is_slower(machine, before):
        return machine
    why = _busy(machine) if is_disturbed(machine) else "some rates are much lower than those measured before"
    if is_disturbed(machine) and before:
        joined = best_of([machine, *before])
        tell(f"{why}: of each rate, the better of now and before is kept ({_num_changed(machine, joined)} from before)")
        return joined
    found = [machine]
    while len(found) < MOST_TIMES and not (len(found) > 1 and agree(found[-2], found[-1])):
        tell(f"{why}: measuring again ({len(found) + 1} of at most {MOST_TIMES} times)")
        found.append(measure())
    if agree(*found[-2:]) and not any(is_disturbed(each) for each in found[-2:]):
        tell("two measurements agree: they replace what was measured before")
        return best_of(found[-2:])
    outcome = "two measurements agree" if agree(*found[-2:]) else f"{len(found)} measurements differ by more than {AGREEMENT:.0%}"
    tell(f"{outcome}: of each rate, the best is kept" + ", those from before included" * bool(before))
    return best_of([*found, *before])


def agree(first: Machine, second: Machine) -> bool:
    """Return whether two measurements show the same machine."""
    others = _deciding(second)
    return all(abs(rate / others[name] - 1) <= AGREEMENT for name, rate in _deciding(first).items() if name in others)


def best_of(machines: Sequence[Machine]) -> Machine:
    """Return the first machine with each rate the best of those that all have, and each fixed cost the least."""
    best = machines[0]
    for other in machines[1:]:
        fields = {field.name: getattr(best, field.name) for field in dataclasses.fields(Machine)}
        changes = {name: _better(value, getattr(other, name)) for name, value in fields.items() if name not in _LESS}
        changes |= {name: min(fields[name], getattr(other, name)) for name in _LESS}
        best = dataclasses.replace(best, **changes)
    return best


def _better(value: Any, other: Any) -> Any:
    """Return the better of two values of a field; for what is neither a rate nor a cost, the first."""
    if isinstance(value, Rate) and isinstance(other, Rate):
        higher = max(value, other, key=lambda rate: rate.typical)
        return dataclasses.replace(higher, best=max(value.best, other.best))
    if isinstance(value, (Overheads, DiskRequest)):
        return dataclasses.replace(
            value, **{f.name: min(getattr(value, f.name), getattr(other, f.name)) for f in dataclasses.fields(value)}
        )
    if isinstance(value, dict) and isinstance(other, dict):
        return {key: _better(each, other[key]) if key in other else each for key, each in value.items()}
    if isinstance(value, tuple) and isinstance(other, tuple):  # a curve
        rates = dict(other)
        return tuple((size, _better(rate, rates[size]) if size in rates else rate) for size, rate in value)
    return value


def _is_slower(machine: Machine, before: Sequence[Machine]) -> bool:
    rates = _deciding(machine)
    return any(rates.get(name, rate) < (1 - SLOWER) * rate for each in before for name, rate in _deciding(each).items())


def _deciding(machine: Machine) -> dict[str, float]:
    """Return the rates that decide plans, by name."""
    rates = {f"linear {dtype}": max(rate.typical for _, rate in curve) for dtype, curve in machine.dense.items()}
    return rates | {"disk read": machine.disk_read.typical, "memory": machine.host_memory.typical}


def _busy(machine: Machine) -> str:
    return f"other programs kept {machine.busy_cores:.1f} cores busy meanwhile"


def _num_changed(measured: Machine, joined: Machine) -> str:
    """Count how many of the rates come from another measurement."""
    pairs = list(zip(_rates(measured), _rates(joined), strict=True))
    return f"{sum(ours.typical != best.typical for ours, best in pairs)} of {len(pairs)}"


def _rates(value: Any) -> Iterator[Rate]:
    """Yield all rates within a value, in order."""
    if isinstance(value, Rate):
        yield value
    elif isinstance(value, Machine):
        for field in dataclasses.fields(value):
            yield from _rates(getattr(value, field.name))
    elif isinstance(value, dict):
        for each in value.values():
            yield from _rates(each)
    elif isinstance(value, tuple):
        for each in value:
            yield from _rates(each)
