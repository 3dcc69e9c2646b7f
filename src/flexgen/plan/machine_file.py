"""Reads machines from JSON, as `Machine.to_json` writes them."""

from __future__ import annotations

from typing import Any

from flexgen.base.from_json import dataclass_from_json, parsed_json
from flexgen.plan.machine import Machine

NOT_A_MACHINE = "this is not the description of a machine"  # how the message of each error begins


def read_machine(text: str) -> Machine:
    """Return the machine that a JSON text describes.

    Raises:
        OptionError: The text is not JSON, or does not describe a machine (see `machine_of`).
    """
    return machine_of(parsed_json(text, NOT_A_MACHINE))


def machine_of(fields: Any) -> Machine:
    """Return the machine that a JSON value describes.

    Raises:
        OptionError: A key is unknown or missing, a value is impossible (the message names both), or the value is not a JSON object.
    """
    return dataclass_from_json(Machine, fields, NOT_A_MACHINE)
