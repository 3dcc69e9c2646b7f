"""The results of all steps as a table."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from flexgen.base.quantities import format_size

from .step import Step

COLUMNS = ("step", "status", "seconds", "tokens/s", "expected", "s a pass", "sequences", "overlap", "plan", "efficiency", "device, driver")


def format_table(results: Iterable[Any]) -> str:
    """Return a table in Markdown, and below it why steps were not done."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_row(each) for each in results)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    why = [f"{each['step']}: {each['why']}" for each in results if each["why"]]
    return "\n".join([*lines, "", *why]).rstrip()


def _row(result: Any) -> tuple[str, ...]:
    found, empty = result["result"], ("",) * (len(COLUMNS) - 3)
    head = (result["step"], result["status"], f"{result['seconds']:.0f}")
    if result["status"] == "done" and isinstance(found, dict) and "steady" in found:
        return *head, *_steady(found, result["driver_peak_bytes"])
    if result["status"] == "done" and isinstance(found, dict) and "peer" in found:
        return *head, *_peer(found, result["driver_peak_bytes"])
    return *head, *empty


def _steady(found: Any, driver_peak_bytes: int | None) -> tuple[str, ...]:
    steady, of_driver = found["steady"], _size(driver_peak_bytes)
    return (
        f"{found['output_tokens_per_s']:.2f}",
        f"{steady['expected_tokens_per_s']['these_passes']:.2f}",
        f"{steady['pass_seconds']['median']:.3g}",
        f"{steady['live_mean']:.1f}",
        f"{found['overlap']:.2f}",
        f"{found['plan']:.2f}",
        f"{found['efficiency']:.2f}",
        f"{format_size(found['peak_device_bytes'])}, {of_driver} of {format_size(found['device_budget_bytes'])}",
    )


def _peer(found: Any, driver_peak_bytes: int | None) -> tuple[str, ...]:
    memory = f"{_size(found.get('peak_device_bytes'))}, {_size(driver_peak_bytes)}"
    return f"{found['output_tokens_per_s']:.2f}", "", "", f"{found['sequences']}", "", "", "", memory


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_size(size_bytes)


def format_list(steps: Iterable[Step], seconds: float) -> str:
    """Return the steps as lines, with the time at which each begins if all take as long as expected, and their commands.

    Args:
        steps: The steps, in order.
        seconds: The time that all may take.
    """
    lines, begin = list[str](), 0.0
    for step in steps:
        when = f"skipped ({step.skipped})" if step.skipped else f"at {begin:.0f} s" if begin < seconds else "in another run"
        lines += [f"{step.name}: {when}, {step.seconds:.0f} s: {step.what}", f"    {shlex.join(step.command)}"]
        begin += 0 if step.skipped else step.seconds
    return "\n".join(lines)
