"""Lines from hostile files: one per line that is not blank, never an exception that is no RequestError."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import RequestError
from flexgen.jobs.lines import Line, parse_object, read_lines


def lines_of(content: bytes, **limits: int) -> list[Line]:
    return list(read_lines(io.BytesIO(content), **limits))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", []),
        (b"\n\r\n  \n\t\n", []),
        (b"a\nb\n", [(1, b"a"), (2, b"b")]),
        (b"a\nb", [(1, b"a"), (2, b"b")]),
        (b"a\r\nb\r\n", [(1, b"a"), (2, b"b")]),
        (b"\n\na\n\nb\n\n", [(3, b"a"), (5, b"b")]),
        (b"\xef\xbb\xbfa\n", [(1, b"a")]),
        (b"\xef\xbb\xbf\na\n", [(2, b"a")]),
        (b"a\x0bb\rc\xe2\x80\xa8d\n", [(1, b"a\x0bb\rc\xe2\x80\xa8d")]),  # only LF ends a line
    ],
)
def test_lines(content: bytes, wanted: list[tuple[int, bytes]]) -> None:
    assert [(line.number, line.content) for line in lines_of(content)] == wanted


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("length", [7, 8, 9, 10, 11, 12, 100])
def test_a_line_beyond_the_limit_has_no_content_and_does_not_hide_the_next(length: int, end: bytes) -> None:
    found = lines_of(b"x" * length + end + (b"next" if end else b""), max_line_bytes=8)
    assert [line.number for line in found] == ([1, 2] if end else [1])
    assert found[0].content == (b"x" * length if length <= 8 else None)
    assert not end or found[1].content == b"next"


def test_digests_tell_lines_apart_and_line_ends_do_not_count() -> None:
    long, other = b"x" * 100, b"x" * 99 + b"y"
    digests = [line.digest for line in lines_of(b"a\na\r\nb\n" + long + b"\n" + other, max_line_bytes=8)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert all(digests)


@given(st.binary(max_size=60), st.integers(1, 20))
def test_any_bytes_give_their_lines(content: bytes, limit: int) -> None:
    found = lines_of(content, max_line_bytes=limit)
    physical = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert {line.number for line in found} >= {number for number, text in enumerate(physical, 1) if text.strip()}
    for line in found:
        assert line.content is None or len(line.content) <= limit


def parse(content: bytes | None) -> dict:
    return parse_object(Line(number=1, content=content, digest=1))


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, "line_too_long", "longer"),
        (b"\xff{}", "invalid_utf8", "byte 0"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_utf8", "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "invalid_utf8", "UTF-8"),
        (b"{", "invalid_json", "column"),
        (b"{'a': 1}", "invalid_json", "double quotes"),
        (b'{"a": 1} {"b": 2}', "invalid_json", "Extra data"),
        (b'{"a": "\x00"}', "invalid_json", "control character"),
        (b"\x00", "invalid_json", "Expecting value"),
        (b'{"a": NaN}', "invalid_json", "NaN"),
        (b'{"a": -Infinity}', "invalid_json", "Infinity"),
        (b'{"a": 1e999}', "invalid_json", "out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json", "digits"),
        (b'{"a": 1, "a": 2}', "invalid_json", "'a' is there twice"),
        (b'{"b": {"a": 1, "a": 1}}', "invalid_json", "twice"),
        (b'{"a": "\\ud800"}', "invalid_json", "surrogate"),
        (b'{"\\udfff": 1}', "invalid_json", "surrogate"),
        (b'{"a": ' + b"[" * 100_000, "invalid_json", "deep"),
        (b'{"a": ' * 100_000, "invalid_json", "deep"),
        (b"[1]", "invalid_json", "not a JSON object"),
        (b"null", "invalid_json", "not a JSON object"),
        (b'"text"', "invalid_json", "not a JSON object"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_hostile_lines(content: bytes | None, code: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(content)
    assert caught.value.code == code
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200


def test_what_is_fine() -> None:
    assert parse(b'{"a": "\\u0000 \\ud83d\\ude00 \xe2\x98\x83", "b": [1, 2.5, null, true]}') == {"a": "\0 😀 ☃", "b": [1, 2.5, None, True]}
    assert parse(b' {"a": {"b": 1}, "c": {"b": 1}} ') == {"a": {"b": 1}, "c": {"b": 1}}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, st.data())
def test_damaged_lines_are_objects_or_request_errors(value: object, data: st.DataObject) -> None:
    content = bytearray(json.dumps(value).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = parse(bytes(content))
    except RequestError as error:
        found = {"code": error.code}
    assert isinstance(found, dict)


def test_a_line_in_another_encoding_says_how_to_convert_it() -> None:
    (line,) = lines_of('{"prompt": "café"}\n'.encode("latin-1"))
    with pytest.raises(RequestError, match=r"0xe9 at byte 15.*iconv -f WINDOWS-1252") as caught:
        parse_object(line)
    assert caught.value.code == "invalid_utf8"
