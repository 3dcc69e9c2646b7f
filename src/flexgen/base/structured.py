"""What an answer must consist of, as a value with vLLM's names.  Knows nothing of how that is enforced."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from flexgen.base.keywords import names_keywords
from flexgen.base.parameters import flag, must_be, texts
from flexgen.base.scalars import plain, shown
from flexgen.errors import RequestError

_UNSUPPORTED: Mapping[str, Any] = {"structural_tag": None, "disable_additional_properties": False, "disable_fallback": False}
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")
_OF_JSON = ("disable_any_whitespace", "whitespace_pattern")


@names_keywords(_UNSUPPORTED, write=shown)  # most come from lines of JSON
@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The constraint on an answer (vLLM's names): exactly one of the first five.

    Attributes:
        json: A JSON schema, as an object or as text; becomes text.
        regex: A regular expression that the whole answer matches, in the syntax of Rust's crate `regex`.
        choice: The texts of which the answer is one; becomes a tuple.
        grammar: A context-free grammar, Lark's or GBNF.
        json_object: True for any JSON object.
        disable_any_whitespace: Whether JSON has no white space between its tokens.
        whitespace_pattern: A regular expression of the white space between the tokens of JSON; None allows a space, or a line feed with up
            to 20 spaces or tabs behind it.

    Raises:
        RequestError: No constraint or several are given, or a value cannot be used; `param` names it.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            if (value := getattr(self, each.name)) is not each.default:
                object.__setattr__(self, each.name, _CHECKS[each.name](each.name, value))
        given = [name for name in _CONSTRAINTS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(f"give exactly one of {', '.join(_CONSTRAINTS)}, not {' and '.join(given) or 'none'}")
        idle = [name for name in _OF_JSON if getattr(self, name)]
        if idle and given[0] not in ("json", "json_object"):
            raise RequestError(f"{idle[0]} has no meaning for a {given[0]}: leave it out", param=idle[0])


def structured_outputs(param: str, value: object) -> StructuredOutputsParams | None:
    """Return a constraint, which may be given as an object with its fields.

    Raises:
        RequestError: The value is neither; `param` names it, or the field of it that cannot be used.
    """
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise must_be(param, f"an object with one of {', '.join(_CONSTRAINTS)}", value)
    try:
        return StructuredOutputsParams(**value)
    except RequestError as error:
        place = param if error.param is None else f"{param}.{error.param}"
        raise RequestError(f"{param}: {error}", code=error.code, param=place) from error


def _schema(param: str, value: object) -> str:
    """Return a schema as text, whose properties keep their order: answers have theirs."""
    try:
        schema = json_module.loads(value) if isinstance(value, str) else value
        if not isinstance(schema, Mapping):
            raise must_be(param, "a JSON schema: an object, or its text", value)
        return json_module.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{param} must be a JSON schema, and {shown(value)} is not JSON: {error}", param=param) from error


def _text(param: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise must_be(param, "a text that is not empty", value)
    return str(value)


def _choices(param: str, value: object) -> tuple[str, ...]:
    found = texts(param, value)
    if not found:
        raise must_be(param, "a list of at least one text", value)
    return found


def _flag_or_none(param: str, value: object) -> bool | None:
    return None if plain(value) is None else flag(param, value)


_CHECKS: Mapping[str, Callable[[str, object], Any]] = {
    "json": _schema,
    "regex": _text,
    "choice": _choices,
    "grammar": _text,
    "json_object": _flag_or_none,
    "disable_any_whitespace": flag,
    "whitespace_pattern": _text,
}
