"""Answers in progress: the tokens generated for lines that are not done, stored so that a later run goes on from there.

Each row adds a few tokens to earlier rows, and the rows of a line are deleted when its result is stored.
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
    """The tokens that one choice of a line has received since its last row.

    Attributes:
        line_number: The line's number, from 1.
        digest: The digest of the line.
        choice: The index of the answer among those of the line, from 0.
        start: The number of tokens of the choice in earlier rows.
        generated: The tokens after those.
        result: The result of the choice if it is finished but other choices of its line are not; otherwise None.
    """

    line_number: int
    digest: int
    choice: int
    start: int
    generated: Generated
    result: TokenResult | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedProgress:
    """The tokens that earlier runs generated for a choice.

    Attributes:
        generated: The tokens.
        ending: The `finish_reason`, `stop_string` and `prompt_logprobs` of the result if the choice is finished; otherwise None.
    """

    generated: Generated = field(default_factory=Generated)
    ending: Mapping[str, Any] | None = None

    def result(self, index: int) -> TokenResult | None:
        """Return the choice as the engine's result for request `index`; None if it is not finished."""
        if self.ending is None:
            return None
        generated, scores = self.generated, self.ending.get("prompt_logprobs")
        return TokenResult(
            index=index,
            token_ids=generated.token_ids,
            logprobs=generated.logprobs,
            finish_reason=self.ending["finish_reason"],
            stop_string=self.ending["stop_string"],
            prompt_logprobs=None if scores is None else _from_json(scores),
        )


def since(generated: Generated, start: int) -> Generated:
    """Return the tokens after the first `start` ones."""
    logprobs = generated.logprobs
    return Generated(token_ids=generated.token_ids[start:], logprobs=None if logprobs is None else logprobs[start:])


def write(connection: sqlite3.Connection, rows: Iterable[tuple[int, ProgressRow]]) -> None:
    """Add (digest, row) pairs within the caller's transaction, with digests as signed integers.

    A row that starts at 0 begins its choice anew.
    """
    rows = list(rows)
    begun = ((row.line_number, row.choice) for _, row in rows if row.start == 0)
    connection.executemany("DELETE FROM begun WHERE line = ? AND choice = ?", begun)
    connection.executemany("INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (_row(digest, each) for digest, each in rows))


def read(connection: sqlite3.Connection, line_number: int, digest: int) -> dict[int, SavedProgress]:
    """Return the progress that earlier runs stored for a line, by choice; progress of a line with another digest is left out."""
    found: dict[int, SavedProgress] = {}
    query = "SELECT choice, start, token_ids, logprobs, ending FROM begun WHERE line = ? AND digest = ? ORDER BY choice, start"
    for row in connection.execute(query, (line_number, digest)):
        follow(found, *row)
    return found


def follow(found: dict[int, SavedProgress], choice: int, start: int, token_ids: str, logprobs: str | None, ending: str | None) -> None:
    """Add a row to the progress of a line, if it follows what is there.

    Args:
        found: The progress by choice, which is changed.
        choice: The choice of the row.
        start: The number of tokens before it.
        token_ids: The tokens, see `texts`.
        logprobs: Their log probabilities.
        ending: The rest of the choice's result.
    """
    before = found.get(choice, SavedProgress()).generated if start else Generated()
    if start != len(before.token_ids):
        return  # a row of an earlier attempt at the line, which these tokens do not follow
    found[choice] = SavedProgress(
        generated=_joined(before, tuple(json.loads(token_ids)), logprobs),
        ending=None if ending is None else json.loads(ending),
    )


def stale(connection: sqlite3.Connection, digests: Sequence[int]) -> list[tuple[int, int]]:
    """Return the (line number, digest) pairs of saved progress whose line has changed or is gone.

    Args:
        connection: The database of the job.
        digests: The digests of the present lines, by line number, as signed integers.
    """
    rows = connection.execute("SELECT DISTINCT line, digest FROM begun")
    return [(line, digest) for line, digest in rows if line >= len(digests) or digests[line] != digest]


def forget(connection: sqlite3.Connection, lines: Iterable[tuple[int, int]]) -> None:
    """Delete the progress of these (line number, digest) pairs within the caller's transaction."""
    connection.executemany("DELETE FROM begun WHERE line = ? AND digest = ?", lines)


def _row(digest: int, row: ProgressRow) -> tuple[Any, ...]:
    return (row.line_number, row.choice, row.start, digest, len(row.generated.token_ids), *texts(row))


def texts(row: ProgressRow) -> tuple[str, str | None, str | None]:
    """Return the tokens of a row, their log probabilities, and the rest of the choice's result if it is finished, as JSON texts."""
    generated, result = row.generated, row.result
    ending = None
    if result is not None:
        scores = None if result.prompt_logprobs is None else _to_json(result.prompt_logprobs)
        ending = {"finish_reason": result.finish_reason, "stop_string": result.stop_string, "prompt_logprobs": scores}
    return (
        json.dumps(generated.token_ids),
        None if generated.logprobs is None else json.dumps(_to_json(generated.logprobs)),
        None if ending is None else json.dumps(ending),
    )


def _joined(before: Generated, token_ids: tuple[int, ...], logprobs: str | None) -> Generated:
    """Return the tokens of earlier rows and those of the next row together."""
    if logprobs is None:
        return Generated(token_ids=before.token_ids + token_ids)
    return Generated(token_ids=before.token_ids + token_ids, logprobs=(*(before.logprobs or ()), *_from_json(json.loads(logprobs))))


def _to_json(logprobs: Sequence[TokenLogprobs]) -> list[Any]:
    return [[each.token_ids, each.logprobs, each.rank] for each in logprobs]


def _from_json(logprobs: Sequence[Any]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token_ids=tuple(ids), logprobs=tuple(values), rank=rank) for ids, values, rank in logprobs)
