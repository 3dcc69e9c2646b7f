"""Parses OpenAI's `response_format`: what an answer must consist of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flexgen.base.scalars import shown
from flexgen.base.structured import StructuredOutputsParams
from flexgen.errors import RequestError

_FIELD = "response_format"
_KINDS = ("text", "json_object", "json_schema")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def response_format(fields: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """Return the constraint that the field `response_format` of a body asks for; None if it asks for none.

    A schema is enforced whether or not it is `strict`.

    Raises:
        RequestError: The field cannot be served; `param` names it.
    """
    value = fields.get(_FIELD)
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str):
        raise RequestError(f"{_FIELD} must be an object with a type, not {shown(value)}", param=_FIELD)
    if kind not in _KINDS:
        message = f"{_FIELD} of type {kind[:80]!r} is not supported; {', '.join(_KINDS)} are"
        raise RequestError(message, code="unsupported_field", param=_FIELD)
    _check_names(value, ("type", "json_schema") if kind == "json_schema" else ("type",), _FIELD)
    if kind == "text":
        return None
    return StructuredOutputsParams(json_object=True) if kind == "json_object" else _json_schema(value.get("json_schema"))


def _json_schema(value: object) -> StructuredOutputsParams:
    place = f"{_FIELD}.json_schema"
    if not isinstance(value, dict):
        raise RequestError(f"{place} must be an object with a name and a schema, not {shown(value)}", param=place)
    _check_names(value, ("name", "description", "schema", "strict"), place)
    name, schema = value.get("name"), value.get("schema")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"{place}.name must be 1 to 64 letters, digits, _ and -, not {shown(name)}", param=f"{place}.name")
    if not isinstance(schema, dict):
        raise RequestError(f"{place}.schema must be a JSON schema, an object, not {shown(schema)}", param=f"{place}.schema")
    return StructuredOutputsParams(json=schema)


def _check_names(value: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for name in value:
        if name not in known:
            message = f"{place} has no {name[:80]!r}; it has {', '.join(known)}"
            raise RequestError(message, code="unknown_field", param=f"{place}.{name[:80]}")
