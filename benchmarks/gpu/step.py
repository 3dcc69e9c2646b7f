"""One step as a value: what it runs, and how long that should take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step.

    Attributes:
        name: The name, and that of its file.
        what: What it measures, for people.
        command: The command; what it prints is its result, as JSON if it is JSON.
        seconds: About how long it takes.
        skipped: Why it cannot be run here; empty if it can.
    """

    name: str
    what: str
    command: tuple[str, ...]
    seconds: float
    skipped: str = ""
