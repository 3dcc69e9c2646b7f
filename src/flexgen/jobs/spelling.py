"""How messages of a job write what its caller can change: as Python's callers write it, unless a front end has words of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flexgen.base.scalars import in_python


def _in_python(name: str, value: object) -> str:
    return f"{name}={in_python(value)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How messages of a job write what its caller can change.  The defaults are those of `answer_lines`.

    Attributes:
        option: Writes an option of the engine with its value.
        value: Writes a value by itself.
        accept_changes: What makes a job go on although something has changed.
        anew: A clause that says how to start anew.
        folder: What names the folder of a job, in brackets and after a space; empty where callers name it themselves in every case.
    """

    option: Callable[[str, object], str] = _in_python
    value: Callable[[object], str] = in_python
    accept_changes: str = "accept_changes=True"
    anew: str = "another folder starts anew"
    folder: str = ""


PYTHON = Spelling()
