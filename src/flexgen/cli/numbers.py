"""Numbers on the command line, which are refused in plain words: those of typer are its parser's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import ParameterInfo

from flexgen.base.scalars import as_int, in_python

_KINDS = {int: "a whole number", float: "a number"}


def in_words(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter of a command that parses its number as this file does; another parameter, or one with its own parser, as it is."""
    if get_origin(parameter.annotation) is not Annotated:
        return parameter
    hint, *notes = get_args(parameter.annotation)
    kind = next((kind for kind in _KINDS if hint is kind or kind in get_args(hint)), None)
    if kind is None:
        return parameter
    notes = [_with_parser(note, kind) if isinstance(note, ParameterInfo) and note.parser is None else note for note in notes]
    return parameter.replace(annotation=Annotated[(hint, *notes)])


def _with_parser(info: ParameterInfo, kind: type[int] | type[float]) -> ParameterInfo:
    info = copy.copy(info)
    info.parser = _parser(kind, info.min)
    return info


def _parser(kind: type[int] | type[float], least: float | None) -> Callable[[Any], int | float]:
    def parse(given: Any) -> int | float:
        number = _number(given, kind) if isinstance(given, str) else given
        if number is None:
            raise typer.BadParameter(f"{in_python(given)} is not {_KINDS[kind]}{_meant(given)}")
        if least is not None and not number >= least:
            raise typer.BadParameter(f"{given} is less than {least:g}")
        return number

    return parse


def _number(text: str, kind: type[int] | type[float]) -> int | float | None:
    try:
        return float(text) if kind is float else int(text)
    except ValueError:
        return None if kind is float else as_int(_number(text, float))


def _meant(text: str) -> str:
    share = _number(text.strip().removesuffix("%"), float) if text.strip().endswith("%") else None
    return "" if share is None else f"; write {share / 100:g}"
