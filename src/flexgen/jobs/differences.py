"""Compares an input with the one that a job has answered, by the digests of the lines: signed 64-bit integers, 0 where there is no line."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from flexgen.base.quantities import counted

_CONFIRMED_LINES = 1  # a line counts as moved if this many lines after it moved with it


def by_number(lines: Iterable[tuple[int, int]]) -> array[int]:
    """Return an array of digests by line number, from (number, digest) pairs in ascending order."""
    digests = array("q")
    for number, digest in lines:
        note(digests, number, digest)
    return digests


def note(digests: array[int], number: int, digest: int) -> None:
    """Put a digest at the number of its line."""
    digests.extend([0] * (number + 1 - len(digests)))
    digests[number] = digest


def signed(digest: int) -> int:
    """Return 64 unsigned bits as the signed integer that arrays hold and SQLite stores."""
    return digest - (1 << 64) if digest >= 1 << 63 else digest


def differing(old: array[int], new: array[int]) -> array[int]:
    """Return the numbers of the lines of `old` that are different or missing in `new`."""
    found = array("q", (number for number, (before, now) in enumerate(zip(old, new, strict=False)) if before and before != now))
    found.extend(number for number in range(len(new), len(old)) if old[number])
    return found


def describe_difference(old: array[int], new: array[int], answered: Sequence[int]) -> str:
    """Describe, for an error message, how the input differs.

    Args:
        old: Digests of the lines that earlier runs finished, by line number.
        new: Digests of the lines of the input, by line number.
        answered: Numbers of the answered lines that differ, in ascending order, at least one.
    """
    found = (
        f"{counted(len(answered), 'line that was answered differs', 'lines that were answered differ')}, the first is line {answered[0]}"
    )
    move = moved(old, new, answered[0])
    if move is None:
        return found
    return (
        f"{found}; what was line {move[0]} is line {move[1]} now, and answers belong to line numbers: "
        "leave a blank line in place of one that is taken out, and put new lines at the end"
    )


def moved(old: array[int], new: array[int], line: int) -> tuple[int, int] | None:
    """Return the former and the present number of a line that moved, if lines were removed or inserted at the line that differs."""
    moves: list[tuple[int, int]] = []
    if line < len(new) and new[line] in old[line + 1 :]:
        moves.append((old.index(new[line], line + 1), line))
    if old[line] in new[line + 1 :]:
        moves.append((line, new.index(old[line], line + 1)))
    return next((move for move in moves if _go_on_alike(old, new, *move)), None)


def _go_on_alike(old: array[int], new: array[int], was: int, now: int) -> bool:
    count = min(len(old) - was, len(new) - now, 1 + _CONFIRMED_LINES)
    return old[was] != 0 and old[was : was + count] == new[now : now + count]
