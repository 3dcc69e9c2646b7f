"""The results of all steps as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from flexgen.base.quantities import format_size

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
    if found is not None and (rate := re.search(r"total throughput: *([0-9.]+)", str(found.get("text", "")))):
        return *head, rate[1], *empty[1:]
    return *head, *empty


def _steady(found: Any, driver_peak_bytes: int | None) -> tuple[str, ...]:
    steady = found["steady"]
    of_driver = "-" if driver_peak_bytes is None else format_size(driver_peak_bytes)
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
