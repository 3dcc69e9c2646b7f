"""Dataclasses from JSON, as their annotations say."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import pytest

from flexgen.base.from_json import Positive, dataclass_from_json, fields_from_json, needed, parsed_json
from flexgen.errors import OptionError


@dataclasses.dataclass(frozen=True)
class Point:
    at: Positive
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Box:
    count: int
    heavy: bool
    pair: tuple[int, float]
    points: Annotated[tuple[Point, ...], needed(bool, "a point is needed")]
    by_name: dict[str, Point]
    other: Annotated[Any, str]


WHOLE = {
    "count": 2.0,
    "heavy": True,
    "pair": [1, 2],
    "points": [{"at": 1, "name": None}],
    "by_name": {"a": {"at": 0.5, "name": "b"}},
    "other": 7,
}


def test_every_kind_of_annotation() -> None:
    found = dataclass_from_json(Box, WHOLE, "a box")
    assert found == Box(2, True, (1, 2.0), (Point(1.0),), {"a": Point(0.5, "b")}, "7")
    assert (type(found.count), type(found.pair[1]), type(found.points[0].at)) == (int, float, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 1.5}, "a box: count is 1.5: a whole number is needed"),
        ({"count": True}, "a box: count is true: a number that is not negative is needed"),
        ({"count": float("inf")}, "a box: count is Infinity: a number that is not negative is needed"),
        ({"heavy": 1}, "a box: heavy is 1: true or false is needed"),
        ({"pair": [1]}, "a box: pair is [1]: a list of 2 is needed"),
        ({"pair": 1}, "a box: pair is 1: a list is needed"),
        ({"points": []}, "a box: points is []: a point is needed"),
        ({"points": [{"at": 0, "name": None}]}, 'a box: points is [{"at": 0, "name": null}]: more than 0 is needed'),
        ({"points": [{"at": 1}]}, "a box: points: missing keys: name"),
        ({"by_name": {"a": {"at": 1, "name": 3}}}, 'a box: by_name is {"a": {"at": 1, "name": 3}}: text is needed'),
        ({"by_name": []}, "a box: by_name is []: a JSON object is needed"),
        ({"colour": "grey", "age": 3}, "a box: unknown keys: age, colour"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        dataclass_from_json(Box, WHOLE | change, "a box")
    assert str(caught.value) == message


def test_what_is_no_object() -> None:
    with pytest.raises(OptionError, match="a box: it is not a JSON object"):
        dataclass_from_json(Box, [], "a box")
    with pytest.raises(OptionError, match="a box: "):
        parsed_json("[" * 100_000, "a box")


def test_only_the_fields_that_are_given() -> None:
    assert fields_from_json(Box, {"pair": [3, 4]}, "a box") == {"pair": (3, 4.0)}
