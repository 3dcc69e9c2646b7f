"""Ids that several lines have."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from flexgen.jobs.duplicate_ids import Census


def repeated(ids: Sequence[str | int | None]) -> list[int]:
    census = Census()
    for line_number, identity in enumerate(ids, 1):
        census.add(line_number, identity)
    return census.repeated()


def test_examples() -> None:
    assert repeated([]) == []
    assert repeated([None, None]) == []
    assert repeated(["a", "b", "a", "c", "a", "b"]) == [3, 5, 6]
    assert repeated([1, "1"]) == []


@given(st.lists(st.none() | st.integers(0, 5) | st.sampled_from("abc0"), max_size=30))
def test_like_a_set(ids: list[str | int | None]) -> None:
    seen: set[str | int] = set()
    again = [line for line, each in enumerate(ids, 1) if each is not None and (each in seen or seen.add(each))]
    assert repeated(ids) == again
