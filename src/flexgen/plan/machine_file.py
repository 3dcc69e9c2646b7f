"""Reads machines from JSON and checks every value, since people write and change these files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from flexgen.errors import OptionError
from flexgen.plan.machine import ORIGINS, Curve, DiskRequest, Machine, Overheads, Rate


def read_machine(text: str) -> Machine:
    """Return the machine that `Machine.to_json` wrote.

    Raises:
        OptionError: The text is not JSON, or does not describe a machine (see `machine_of`).
    """
    return machine_of(parsed(text))


def parsed(text: str) -> Any:
    """Parse the JSON text of a machine.

    Raises:
        OptionError: The text is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"this is not the description of a machine: {error}") from error


def machine_of(fields: Any) -> Machine:
    """Return the machine that a JSON value describes.

    Raises:
        OptionError: A key is unknown or missing, a value is impossible (the message names both), or the value is not a JSON object.
    """
    _check_keys("", fields, Machine)
    return Machine(**{name: _read(name, _READERS[name], value) for name, value in fields.items()})


def _check_keys(what: str, fields: Any, cls: type) -> None:
    if not isinstance(fields, dict):
        raise OptionError(f"this is not the description of a machine: {what or 'it'} is not a JSON object")
    known, given = {field.name for field in dataclasses.fields(cls)}, set(cast(dict[str, Any], fields))
    for problem, names in (("unknown keys", given - known), ("missing keys", known - given)):
        if names:
            raise OptionError(f"this is not the description of a machine: {what and f'{what}: '}{problem}: {', '.join(sorted(names))}")


def _read(name: str, reader: Callable[[Any], Any], value: Any) -> Any:
    try:
        return reader(value)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(f"this is not the description of a machine: {name} is {json.dumps(value)[:80]}: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text is needed")
    return value


def _one_of(known: Sequence[str]) -> Callable[[Any], str]:
    def reader(value: Any) -> str:
        if value not in known:
            raise ValueError(f"known: {', '.join(known)}")
        return value

    return reader


def _number(value: Any) -> float:
    """Check that a value is a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError("a number that is not negative is needed")
    return value


def _positive(value: Any) -> float:
    if not _number(value):
        raise ValueError("more than 0 is needed")
    return float(value)


def _count(value: Any) -> int:
    if int(_number(value)) != value:
        raise ValueError("a whole number is needed")
    return int(value)


def _cores(value: Any) -> int:
    return int(_positive(_count(value)))


def _rate(fields: Mapping[str, Any]) -> Rate:
    if set(fields) != {"best", "typical", "spread"}:
        raise ValueError("a rate has best, typical and spread")
    return Rate(best=_positive(fields["best"]), typical=_positive(fields["typical"]), spread=_number(fields["spread"]))


def _link(fields: Mapping[str, Any] | None) -> Rate | None:
    return None if fields is None else _rate(fields)


def _rates(fields: Mapping[str, Any]) -> dict[str, Rate]:
    return {key: _rate(rate) for key, rate in fields.items()}


def _curves(fields: Mapping[str, Any]) -> dict[str, Curve]:
    curves = {dtype: tuple((_positive(size), _rate(rate)) for size, rate in points) for dtype, points in fields.items()}
    if not all(curves.values()):
        raise ValueError("a curve needs a point")
    return curves


def _places(fields: Mapping[str, Any]) -> dict[str, dict[str, Curve]]:
    return {place: _curves(curves) for place, curves in fields.items()}


def _numbers(name: str, cls: type) -> Callable[[Any], Any]:
    """Return a reader of a dataclass whose fields are all numbers."""

    def reader(fields: Any) -> Any:
        _check_keys(name, fields, cls)
        return cls(**{key: float(_number(value)) for key, value in fields.items()})

    return reader


def _versions(fields: Mapping[str, Any]) -> dict[str, str]:
    return {_text(key): _text(value) for key, value in fields.items()}


_READERS: dict[str, Callable[[Any], Any]] = {
    "name": _text,
    "device": _one_of(("cpu", "cuda", "sim")),
    "origin": _one_of(ORIGINS),
    "date": _text,
    "cores": _cores,
    "host_bytes": _count,
    "device_bytes": _count,
    "disk_bytes": _count,
    "disk_read": _rate,
    "disk_write": _rate,
    "disk_core_seconds_per_byte": _number,
    "disk_request": _numbers("disk_request", DiskRequest),
    "disk_slowdown": _positive,
    "compute_slowdown": _positive,
    "host_memory": _rate,
    "host_to_device": _link,
    "device_to_host": _link,
    "dense": _curves,
    "attention": _rates,
    "decode_attention": _places,
    "elementwise": _rates,
    "casts": _rates,
    "overheads": _numbers("overheads", Overheads),
    "versions": _versions,
    "busy_cores": _number,
}
