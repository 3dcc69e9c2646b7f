"""Answers in progress: what the model has generated for lines that are not done, kept so that a later run goes on from there.

Rows are only ever added, a few tokens each, and go away with the line's result.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexgen.request import Generated, TokenLogprobs, TokenResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRow:
    """What one choice of a line has got since its last row.

    Attributes:
        line_number: The line's number, from 1.
        digest: The digest of the line.
        choice: Which of the line's answers it is, from 0.
        start: How many tokens of the choice earlier rows have.
        generated: The tokens since then.
        result: Set where the choice is finished and its line is not, because others of its choices are not.
    """

    line_number: int
    digest: int
    choice: int
    start: int
    generated: Generated
    result: TokenResult | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedProgress:
    """All that earlier runs generated for a choice.

    Attributes:
        generated: The tokens.
        ending: `finish_reason` and `stop_string` of its result, where the choice is finished.
    """

    generated: Generated = field(default_factory=Generated)
    ending: Mapping[str, Any] | None = None

    def result(self, index: int) -> TokenResult | None:
        """The engine's result for request `index`, where the choice is finished."""
        if self.ending is None:
            return None
        generated = self.generated
        return TokenResult(index=index, token_ids=generated.token_ids, logprobs=generated.logprobs, **self.ending)


def since(generated: Generated, start: int) -> Generated:
    """What follows the first `start` tokens."""
    logprobs = generated.logprobs
    return Generated(token_ids=generated.token_ids[start:], logprobs=None if logprobs is None else logprobs[start:])


def write(connection: sqlite3.Connection, rows: Iterable[tuple[int, ProgressRow]]) -> None:
    """Add rows, each with its line's digest as SQLite holds it, within the caller's transaction."""
    rows = list(rows)
    begun = ((row.line_number, row.choice, digest) for digest, row in rows if row.start == 0)
    connection.executemany("DELETE FROM begun WHERE line = ? AND choice = ? AND digest != ?", begun)
    connection.executemany("INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (_row(digest, each) for digest, each in rows))


def read(connection: sqlite3.Connection, line_number: int, digest: int) -> dict[int, SavedProgress]:
    """What earlier runs generated for a line, by choice; nothing where it was another line then."""
    found: dict[int, SavedProgress] = {}
    query = "SELECT choice, start, token_ids, logprobs, ending FROM begun WHERE line = ? AND digest = ? ORDER BY choice, start"
    for choice, start, token_ids, logprobs, ending in connection.execute(query, (line_number, digest)):
        before = found.get(choice, SavedProgress()).generated
        if start != len(before.token_ids):
            continue  # it does not follow: a row of an earlier, shorter attempt at the line
        found[choice] = SavedProgress(
            generated=_joined(before, tuple(json.loads(token_ids)), logprobs),
            ending=None if ending is None else json.loads(ending),
        )
    return found


def stale(connection: sqlite3.Connection, digests: Sequence[int]) -> list[tuple[int, int]]:
    """The (line number, digest) of saved progress whose line has changed or is gone.

    Args:
        connection: The database of the job.
        digests: By line number, the digests of the lines as they are now, as SQLite holds them.
    """
    rows = connection.execute("SELECT DISTINCT line, digest FROM begun")
    return [(line, digest) for line, digest in rows if line >= len(digests) or digests[line] != digest]


def forget(connection: sqlite3.Connection, lines: Iterable[tuple[int, int]]) -> None:
    """Drop the progress of those lines, within the caller's transaction."""
    connection.executemany("DELETE FROM begun WHERE line = ? AND digest = ?", lines)


def _row(digest: int, row: ProgressRow) -> tuple[Any, ...]:
    generated, result = row.generated, row.result
    ending = None if result is None else {"finish_reason": result.finish_reason, "stop_string": result.stop_string}
    return (
        row.line_number, row.choice, row.start, digest, len(generated.token_ids), json.dumps(generated.token_ids),
        None if generated.logprobs is None else json.dumps([[each.token_ids, each.logprobs, each.rank] for each in generated.logprobs]),
        None if ending is None else json.dumps(ending),
    )  # fmt: skip


def _joined(before: Generated, token_ids: tuple[int, ...], logprobs: str | None) -> Generated:
    """Earlier tokens and those of the next row."""
    if logprobs is None:
        return Generated(token_ids=before.token_ids + token_ids)
    entries = (TokenLogprobs(token_ids=tuple(ids), logprobs=tuple(values), rank=rank) for ids, values, rank in json.loads(logprobs))
    return Generated(token_ids=before.token_ids + token_ids, logprobs=(*(before.logprobs or ()), *entries))
