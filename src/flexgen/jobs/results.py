"""What takes the results of lines as they are answered: the database of a job (`Store`), or the shard of one of several workers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from flexgen.jobs.saved_progress import ProgressRow, SavedProgress


class Results(Protocol):
    """The results of a job.  The members are those of `Store`, whose docstrings say more."""

    def add(
        self, line_number: int, digest: int, record: bytes, *, failed: bool = False, prompt_tokens: int = 0, output_tokens: int = 0
    ) -> None:
        """Take the result of a line.  The line is done once the result is committed, now or later."""
        ...

    def keep(self, row: ProgressRow) -> None:
        """Take a finished choice of a line that is not finished."""
        ...

    def kept(self, line_number: int, digest: int) -> dict[int, SavedProgress]:
        """Return the progress that is stored for a line that is not done, by choice."""
        ...

    def commit_if_due(self) -> None:
        """Commit if much is pending, or if something has been pending for a while."""
        ...

    def commit(self, progress: Iterable[ProgressRow] = ()) -> None:
        """Make durable all pending results, and the given progress of lines that are not done."""
        ...
