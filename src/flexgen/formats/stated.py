"""Reads what a quantization_config states: every value is checked where it is read, and what is wrong is named with its place.

People and tools write these files.  A key that is null is as good as a missing one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from flexgen.base.scalars import shown
from flexgen.errors import UnsupportedModelError

_Default = TypeVar("_Default")
_PLACE = "quantization_config"


class Stated:
    """A JSON object within config.json.

    Args:
        values: The object.
        place: The keys that lead to it, joined by dots.

    Attributes:
        values: The object, unchecked.

    Raises:
        UnsupportedModelError: It is no object; every method raises it, too, for a value that cannot be used.
    """

    def __init__(self, values: object, place: str = _PLACE) -> None:
        if not isinstance(values, Mapping):
            raise UnsupportedModelError(f"config.json: {place} must be an object, not {shown(values)}")
        self.values: Mapping[str, Any] = values
        self._place = place

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def wrong(self, key: str, wanted: str) -> UnsupportedModelError:
        """Return the error of a value, or of a key that is missing."""
        said = f"must be {wanted}, not {shown(self.values[key])}" if key in self else f"is missing; it must be {wanted}"
        return UnsupportedModelError(f"config.json: {self._place}.{key} {said}")

    def text(self, key: str, default: _Default) -> str | _Default:
        """Return a text."""
        return self._read(key, default, lambda value: isinstance(value, str), "a text")

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        return self._read(key, default, lambda value: isinstance(value, bool), "true or false")

    def whole(self, key: str, default: _Default, holds: Callable[[int], bool] = lambda value: True, wanted: str = "") -> int | _Default:
        """Return a whole number.

        Args:
            key: The key.
            default: What a missing key means.
            holds: Whether a number can be used.
            wanted: The numbers that can be used, in words.
        """
        return self._read(key, default, lambda value: type(value) is int and holds(value), f"a whole number{wanted and f', {wanted}'}")

    def group_size(self, key: str, default: int = 128) -> int:
        """Return how many numbers share a scale; -1 stands for all of a row."""
        return self.whole(key, default, lambda value: value > 0 or value == -1, "above 0 or -1")

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of names of modules; none where the key is missing."""
        return tuple(self._read(key, (), _are_names, "a list of names"))

    def lists_of_names(self, key: str) -> tuple[str, ...]:
        """Return the names in a list of names, or of lists of names; none where the key is missing."""
        holds: Callable[[Any], bool] = lambda value: _are_names(value) or (isinstance(value, list) and all(map(_are_names, value)))  # noqa: E731
        found = self._read(key, (), holds, "a list of names, or of lists of names")
        return tuple(name for part in found for name in ([part] if isinstance(part, str) else part))

    def inner(self, key: str) -> Stated | None:
        """Return an object within this one; None where the key is missing."""
        return Stated(self.values[key], f"{self._place}.{key}") if key in self else None

    def objects(self, key: str) -> Iterator[tuple[str, Stated]]:
        """Yield the objects within an object by their names; none where the key is missing."""
        for name, value in () if (found := self.inner(key)) is None else found.values.items():
            yield name, Stated({} if value is None else value, f"{self._place}.{key}.{name}")

    def pattern(self, key: str, expression: str) -> str:
        """Return a regular expression that is stated in the value of a key."""
        try:
            re.compile(expression)
        except re.error as error:
            raise UnsupportedModelError(
                f"config.json: {self._place}.{key} has {expression!r:.80}, which is not a regular expression ({error})"
            ) from error
        return expression

    def _read(self, key: str, default: Any, holds: Callable[[Any], bool], wanted: str) -> Any:
        if key not in self:
            return default
        if not holds(self.values[key]):
            raise self.wrong(key, wanted)
        return self.values[key]


def _are_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
