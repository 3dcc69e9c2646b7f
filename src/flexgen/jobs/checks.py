"""Checks that refuse an input as a whole before anything is answered: any fault under --strict, and first lines that all fail alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from flexgen.api.job_request import JobRequest
from flexgen.base.quantities import counted
from flexgen.errors import JobError, RequestError
from flexgen.jobs.duplicate_ids import Census
from flexgen.jobs.lines import Line

HEAD_LINES = 100
_MOST_COMPLAINTS = 20
# Errors whose code is reason enough: their messages differ from line to line only in where the fault was found.
_SAY_ENOUGH = ("invalid_json", "invalid_utf8", "line_too_long", "context_length_exceeded")
_DETAILS = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")


def check_strictly(name: str, requests: Iterable[JobRequest]) -> None:
    """Check every line of a file (--strict).

    Raises:
        JobError: Some lines cannot be served, or several lines have the same id; the message lists the first of them.
    """
    census = Census()
    complaints: list[tuple[int, str]] = []
    count = 0
    for request in requests:
        census.add(request.line_number, request.id)
        if request.error is not None:
            count += 1
            if count <= _MOST_COMPLAINTS:
                complaints.append((request.line_number, str(request.error)))
    repeated = census.repeated()
    complaints += [(line_number, "an earlier line has the same id") for line_number in repeated[:_MOST_COMPLAINTS]]
    if complaints:
        listed = "\n".join(f"line {line_number}: {what}" for line_number, what in sorted(complaints)[:_MOST_COMPLAINTS])
        raise JobError(f"{name}: --strict found {counted(count + len(repeated), 'fault')}; the first are\n{listed}")


def check_head(name: str, lines: Sequence[Line], requests: Iterable[JobRequest]) -> None:
    """Refuse a file whose first lines all fail for the same reason, because then the mistake is about the file, not about its lines.

    Args:
        name: The name of the file, for messages.
        lines: The first lines of the file.
        requests: The same lines as requests.

    Raises:
        JobError: All lines fail for the same reason.
    """
    first: RequestError | None = None
    for request in requests:
        first = first or request.error
        if request.error is None or first is None or _reason(request.error) != _reason(first):
            return
    raise JobError(
        f"{name}: the first {len(lines):,} lines all fail for the same reason, and nothing was answered; line {lines[0].number}: "
        f"{first}. {_advice(first, lines)}With --keep-going, such lines get their errors and the others their answers"
    )


def _reason(error: RequestError) -> tuple[str, ...]:
    """Return a key that is equal for errors with the same reason."""
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
