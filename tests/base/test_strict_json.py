"""JSON of strangers: what is no JSON, or would take far more memory than its file, is refused before or while it is parsed."""

from __future__ import annotations

import tracemalloc

import pytest

from flexgen.base.strict_json import MAX_DEPTH, strict_json


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, "x", {"b": true}]}', "{}", '\ufeff{"a": 1}'])
def test_an_object(text: str) -> None:
    assert isinstance(strict_json(text.encode()), dict)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "not a JSON object"),
        ('{"a": NaN}', "NaN"),
        ('{"a": [-Infinity]}', "Infinity"),
        ('{"a": 1e999}', "1e999 is out of range"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is listed twice"),
        ('{"x": {"a": 1, "a": 1}}', "twice"),
        ('{"a": ' + "[" * 10**5, "deeply"),
        ('{"a": ' + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}", "deeply"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a": [' + "1," * 2000 + "1]}", "more than 1,000 values"),
        ("", "Expecting value"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strict_json(text.encode(), max_values=1000 if "1,1,1" in text else 1 << 20)


def test_undecodable_bytes() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        strict_json(b'{"a": "\xff"}')


def test_depth_up_to_the_bound() -> None:
    assert strict_json(('{"a": ' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}").encode())


def test_a_bomb_is_refused_before_it_is_parsed() -> None:
    """Three million lists would take 200 MB."""
    bomb = b'{"a": [' + b"[]," * 3_000_000 + b"[]]}"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="values"):
            strict_json(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
