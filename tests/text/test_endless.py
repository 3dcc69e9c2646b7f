"""Constraints that always contain themselves again, and those that only may."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen.text.endless import is_endless_grammar, is_endless_schema

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
LEAF = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}

ENDLESS_SCHEMAS: dict[str, dict[str, Any]] = {
    "a reference to itself": {"$ref": "#"},
    "a property": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "a definition": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "two definitions": {
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}, "minItems": 1}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}},
        "anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
    },
    "an item": {"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "minItems": 2},
    "a name with a slash": {"$defs": {"a/b": {"$ref": "#/$defs/a~1b"}}, "$ref": "#/$defs/a~1b"},
}
FINITE_SCHEMAS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "an optional property": {"type": "object", "properties": {"a": {"$ref": "#"}}},
    "another type": {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "a list that may be empty": {"type": "array", "items": {"$ref": "#"}},
    "a way out": {"$defs": {"node": {**NODE, "properties": {"next": LEAF}}}, "$ref": "#/$defs/node"},
    "another first item": {"type": "array", "prefixItems": [{"type": "null"}], "items": {"$ref": "#"}, "minItems": 1},
    "a given value": {"const": {"$ref": "#"}},
    "elsewhere": {"$ref": "https://example.com/a.json"},
    "nowhere": {"$ref": "#/$defs/none"},
    "an anchor": {"$ref": "#name"},
    "a property of that name": {"type": "object", "properties": {"$ref": {"type": "string"}}, "required": ["$ref"]},
    "no schemas": {"type": "array", "items": 3, "minItems": 2, "anyOf": "x", "$ref": 5},
}
ENDLESS_GRAMMARS = {
    "itself": "start: start",
    "right": 'start: "a" start',
    "left": 'start: start "a" | "b" start',
    "a circle": 'start: a\na: "x" b+ | b "y"\nb: "(" a ")" | start',
    "a group": 'start: ("a" | "b") (start | "c" start) -> name\n     | "d" start{2,3}',
    "a count": 'start: "a" start~1..2',
    "a schema": 'start: "x" %json {"$ref": "#"}',
    "with options": '%llguidance {"no_forcing": true}\n// a remark\nstart[capture="x"]: "a" start  # another\nother: "b"',
    "among terminals": '%ignore /[ \\t]+/\nWORD: /[a-z]+/\nstart: WORD start',
}  # fmt: skip
FINITE_GRAMMARS = {
    "a text": 'start: "a"',
    "nothing": 'start: ""',
    "a choice": 'start: "a" start | "b"',
    "on another line": 'start: "a" start\n    | "b"\nb: "c"',
    "optional": 'start: "a" start?',
    "in brackets": 'start: "a" [start]',
    "any number": 'start: "a" start*',
    "none or more": 'start: "a" start~0..3',
    "at most": 'start: "a" start{,3}',
    "signs in texts": 'start: "a | (" /[|)\\]]+/ "\\"" <[3]> | start',
    "a range": 'start: "a".."z" | start start',
    "a schema": 'start: %json {"type": "object", "properties": {"start": {"type": "string"}}}',
    "a regular expression": 'start: %regex {"substring_words": "a b"} | start',
    "another rule": "begin: begin",
    "an unused rule": 'start: "a"\nother: other',
    "what is not judged": "start: start & start",
    "no grammar": "start: (((",
}  # fmt: skip


@pytest.mark.parametrize("schema", ENDLESS_SCHEMAS.values(), ids=ENDLESS_SCHEMAS)
def test_endless_schemas(schema: dict[str, Any]) -> None:
    assert is_endless_schema(schema)


@pytest.mark.parametrize("schema", FINITE_SCHEMAS.values(), ids=FINITE_SCHEMAS)
def test_finite_schemas(schema: dict[str, Any]) -> None:
    assert not is_endless_schema(schema)


def test_a_schema_that_is_too_deep_is_not_judged() -> None:
    schema: dict[str, Any] = {"$ref": "#"}
    for _ in range(5000):
        schema = {"allOf": [schema]}
    assert not is_endless_schema(schema)


@pytest.mark.parametrize("grammar", ENDLESS_GRAMMARS.values(), ids=ENDLESS_GRAMMARS)
def test_endless_grammars(grammar: str) -> None:
    assert is_endless_grammar(grammar)


@pytest.mark.parametrize("grammar", FINITE_GRAMMARS.values(), ids=FINITE_GRAMMARS)
def test_finite_grammars(grammar: str) -> None:
    assert not is_endless_grammar(grammar)
