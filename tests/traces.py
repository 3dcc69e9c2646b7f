"""Reads trace files in tests, and checks what every trace must keep to."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Trace:
    """A trace file.

    Attributes:
        slices: Track -> its slices.
        counters: Counter -> its values.
    """

    slices: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    counters: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def named(self, track: str, name: str) -> list[dict[str, Any]]:
        """Return the slices of a track whose names begin with `name`."""
        return [each for each in self.slices[track] if each["name"].startswith(name)]

    def bytes_of(self, track: str, name: str = "") -> int:
        return sum(each["args"]["bytes"] for each in self.named(track, name))


def read_trace(path: Path) -> Trace:
    """Read a file, and check its form: one JSON object, named tracks, slices that lie beside or within each other."""
    whole = json.loads(path.read_text())
    events, trace = whole["traceEvents"], Trace()
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert len(set(names.values())) == len(names)
    assert set(names) == {event["tid"] for event in events if event["name"] == "thread_sort_index"}
    assert [event["args"]["name"] for event in events if event["name"] == "process_name"] == ["flexgen"]
    for event in events:
        assert event["pid"] == 1
        if event["ph"] == "X":
            assert isinstance(event["ts"], int)
            assert event["dur"] >= 0
            trace.slices[names[event["tid"]]].append(event)
        elif event["ph"] == "C":
            trace.counters[event["name"]].append(event["args"]["bytes"])
        else:
            assert event["ph"] == "M"
    for track, slices in trace.slices.items():
        _check_nesting(track, slices)
    return trace


def _check_nesting(track: str, slices: list[dict[str, Any]]) -> None:
    open_ends: list[int] = []
    for each in sorted(slices, key=lambda each: (each["ts"], -each["dur"])):
        start, end = each["ts"], each["ts"] + each["dur"]
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1], f"{each} overlaps on {track}"
        open_ends.append(end)
