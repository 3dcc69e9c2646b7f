"""A file whose first lines all fail for one reason: that is a mistake about the file, not about its lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from flexgen.errors import JobError, RequestError
from flexgen.jobs.lines import Line
from flexgen.jobs.reading import Refused, Served

HEAD_LINES = 100
# Errors whose code says it all: what differs from line to line is where it was found.
_SAY_ENOUGH = ("invalid_json", "invalid_utf8", "line_too_long", "context_length_exceeded")
_DETAILS = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")


def check_head(name: str, lines: Sequence[Line], reads: Iterable[Served | Refused]) -> None:
    """Compare why lines fail.

    Args:
        name: of the file. reads: what became of the lines.

    Raises:
        JobError: all of them fail, for the same reason.
    """
    first: RequestError | None = None
    for read in reads:
        if isinstance(read, Served):
            return
        first = first or read.error
        if _reason(read.error) != _reason(first):
            return
    raise JobError(
        f"{name}: the first {len(lines):,} lines all fail for the same reason, and nothing was answered; line {lines[0].number}: "
        f"{first}. {_advice(first, lines)}With --keep-going, such lines get their errors and the others their answers"
    )


def _reason(error: RequestError | None) -> tuple[str, ...]:
    """What errors of the same reason have in common."""
    assert error is not None
    if error.code in _SAY_ENOUGH:
        return (error.code,)
    return (error.code, str(error.param), _DETAILS.sub("", str(error)))


def _advice(error: RequestError | None, lines: Sequence[Line]) -> str:
    if error is None or error.code != "invalid_json":
        return ""
    starts = {(line.content or b"").lstrip()[:1] for line in lines}
    if starts == {b'"'}:
        return "The lines are JSON strings: jq -c '{prompt: .}' makes requests of them. "
    if starts == {b"{"}:
        return "JSON wants double quotes, and no comma before a closing bracket. "
    return "If every line is a prompt as it stands, --input-format text takes it so. " if b"{" not in starts else ""
