"""Answers in progress: what the model has generated for lines that are not done, kept so that a later run goes on from there.

Rows are only ever added, a few tokens each, and go away with the line's result.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexgen.request import Generated, TokenLogprobs, TokenResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a choice ended whose line is not done, because others of its choices are not."""

    finish_reason: str
    stop_string: str | None = None

    @classmethod
    def of(cls, result: TokenResult) -> Ending:
        """What a result says besides its tokens."""
        return cls(finish_reason=result.finish_reason, stop_string=result.stop_string)

    def to_json(self) -> str:
        """As one object."""
        return json.dumps({"finish_reason": self.finish_reason, "stop_string": self.stop_string})

    @classmethod
    def from_json(cls, text: str) -> Ending:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What one choice of a line has got since its last row.

    Attributes:
        digest: of the line.
        start: tokens of the choice in earlier rows.
        ending: set where the choice is finished.
    """

    line_number: int
    digest: int
    choice: int
    start: int
    generated: Generated
    ending: Ending | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """All that earlier runs generated for a choice; `ending` as in `Begun`."""

    generated: Generated = field(default_factory=Generated)
    ending: Ending | None = None

    def result(self, index: int) -> TokenResult | None:
        """The engine's answer to request `index`, if this is all of it."""
        if self.ending is None:
            return None
        return TokenResult(
            index=index,
            token_ids=self.generated.token_ids,
            finish_reason=self.ending.finish_reason,
            stop_string=self.ending.stop_string,
            logprobs=self.generated.logprobs,
        )


def since(generated: Generated, start: int) -> Generated:
    """What follows the first `start` tokens."""
    logprobs = generated.logprobs
    return Generated(token_ids=generated.token_ids[start:], logprobs=None if logprobs is None else logprobs[start:])


def write(connection: sqlite3.Connection, rows: Iterable[tuple[int, Begun]]) -> None:
    """Add rows, each with its line's digest as SQLite holds it, within the caller's transaction."""
    rows = list(rows)
    begun = ((row.line_number, row.choice, digest) for digest, row in rows if row.start == 0)
    connection.executemany("DELETE FROM begun WHERE line = ? AND choice = ? AND digest != ?", begun)
    connection.executemany("INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (_row(digest, each) for digest, each in rows))


def read(connection: sqlite3.Connection, line_number: int, digest: int) -> dict[int, Kept]:
    """What is kept of a line, by choice; nothing if it was another line then."""
    found: dict[int, Kept] = {}
    query = "SELECT choice, start, token_ids, logprobs, ending FROM begun WHERE line = ? AND digest = ? ORDER BY choice, start"
    for choice, start, token_ids, logprobs, ending in connection.execute(query, (line_number, digest)):
        before = found.get(choice, Kept()).generated
        if start != len(before.token_ids):
            continue  # not what follows: of an earlier, shorter attempt at the line
        found[choice] = Kept(
            generated=_joined(before, tuple(json.loads(token_ids)), logprobs),
            ending=None if ending is None else Ending.from_json(ending),
        )
    return found


def stale(connection: sqlite3.Connection, digests: Sequence[int]) -> list[tuple[int, int]]:
    """(line number, digest) of what is kept of lines that are others now, or gone; digests by line number, as SQLite holds them."""
    rows = connection.execute("SELECT DISTINCT line, digest FROM begun")
    return [(line, digest) for line, digest in rows if line >= len(digests) or digests[line] != digest]


def forget(connection: sqlite3.Connection, lines: Iterable[tuple[int, int]]) -> None:
    """Drop what is kept of those lines, within the caller's transaction."""
    connection.executemany("DELETE FROM begun WHERE line = ? AND digest = ?", lines)


def _row(digest: int, begun: Begun) -> tuple[Any, ...]:
    generated = begun.generated
    return (
        begun.line_number, begun.choice, begun.start, digest, len(generated.token_ids), json.dumps(generated.token_ids),
        None if generated.logprobs is None else json.dumps([[each.token_ids, each.logprobs, each.rank] for each in generated.logprobs]),
        None if begun.ending is None else begun.ending.to_json(),
    )  # fmt: skip


def _joined(before: Generated, token_ids: tuple[int, ...], logprobs: str | None) -> Generated:
    """Earlier tokens and those of the next row."""
    if logprobs is None:
        return Generated(token_ids=before.token_ids + token_ids)
    entries = (TokenLogprobs(token_ids=tuple(ids), logprobs=tuple(values), rank=rank) for ids, values, rank in json.loads(logprobs))
    return Generated(token_ids=before.token_ids + token_ids, logprobs=(*(before.logprobs or ()), *entries))
