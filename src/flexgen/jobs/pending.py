"""What a job has taken and not committed yet: results of lines, and finished choices of lines that are not finished."""

from __future__ import annotations

import time

from flexgen.jobs.saved_progress import ProgressRow

ResultRow = tuple[int, int, int, bool, int, int]  # of the table `results`
RecordRow = tuple[int, bytes]  # of the table `records`


class Pending:
    """Rows that wait for the next commit.

    Attributes:
        results: Rows of the table `results`.
        records: Rows of the table `records`, one for each of the results.
        progress: Progress of lines that are not finished.
        size: About how much there is, in bytes of records and tokens of progress.
    """

    def __init__(self) -> None:
        self.results: list[ResultRow] = []
        self.records: list[RecordRow] = []
        self.progress: list[ProgressRow] = []
        self.size = 0
        self._oldest = 0.0  # time at which the first of them was added, on the monotonic clock

    def __bool__(self) -> bool:
        return bool(self.results or self.progress)

    @property
    def age_seconds(self) -> float:
        """The time for which the oldest of them has waited."""
        return time.monotonic() - self._oldest

    def add(self, result: ResultRow, record: bytes) -> None:
        self._wait(len(record))
        self.results.append(result)
        self.records.append((result[0], record))

    def keep(self, row: ProgressRow) -> None:
        self._wait(len(row.generated.token_ids))
        self.progress.append(row)

    def _wait(self, size: int) -> None:
        if not self:
            self._oldest = time.monotonic()
        self.size += size
