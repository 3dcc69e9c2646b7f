"""JSON from strangers: bounded before it is parsed, and without what Python accepts although JSON does not have it."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

MAX_VALUES = 1 << 20  # a parsed value takes about 100 bytes
MAX_DEPTH = 100  # whoever walks the value must not run out of stack


def strict_json(data: bytes, *, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """Parse a JSON object in UTF-8.

    NaN, numbers beyond those of float64, a name that is given twice, deep nesting and more than `max_values` values are refused.

    Raises:
        ValueError: The data is refused; the message says why.
    """
    # Every value but the first stands behind one of these; those in strings are counted too, which honest files can afford.
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > max_values:
        raise ValueError(f"it holds more than {max_values:,} values")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"{twice[:80]!r} is listed twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"it contains {constant}")

    def finite(digits: str) -> float:
        if not math.isfinite(number := float(digits)):
            raise ValueError(f"the number {digits[:20]} is out of range")
        return number

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError("it is nested too deeply")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    """Return whether more than `depth` objects and lists are nested around some value, `value` itself included."""
    level = [value]
    for _ in range(depth):
        containers = [each for each in level if isinstance(each, (dict, list))]
        if not containers:
            return False
        level = [inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)]
    return any(isinstance(each, (dict, list)) for each in level)
