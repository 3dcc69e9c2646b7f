"""The results of one worker, as its job sees them: they become durable in its shard, and finish the leases that their lines belong to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from flexgen.jobs.saved_progress import ProgressRow, SavedProgress, follow, texts
from flexgen.jobs.workers.leases import Lease
from flexgen.jobs.workers.shard import Result, ShardReader, ShardWriter, rows_of
from flexgen.jobs.workers.task import OpenLines

_COMMIT_SECONDS = 0.1
_COMMIT_ITEMS = 1000


class SharedResults:
    """The results of one worker, see `Results`.

    Args:
        lines: The open lines of the job.
        shard: The shard of the worker.
        begun: The tokens that earlier runs have generated, as a shard.
        finish: Called with every lease whose lines are all durable.

    Attributes:
        held: For each lease that this worker holds, the indices of its lines without durable results.
        num_stored: The number of lines that this worker has stored.
    """

    def __init__(self, lines: OpenLines, shard: ShardWriter, begun: Path, finish: Callable[[Lease], None]) -> None:
        self._lines, self._shard, self._finish = lines, shard, finish
        self.held: dict[Lease, set[int]] = {}
        self.num_stored = 0
        self._done = bytearray(len(lines))
        self._readers: dict[Path, ShardReader] = {}
        self._kept: dict[int, dict[int, SavedProgress]] = {}  # by line number
        self._pending: list[int] = []  # indices of the lines with results that are not durable
        self._oldest = 0.0
        self.learn(begun)

    def learn(self, shard: Path) -> None:
        """Learn which lines another worker has answered, and what it has begun.

        Raises:
            StorageError: Its shard cannot be read.
        """
        reader = self._readers.setdefault(shard, ShardReader(shard))
        for result in reader.read():
            self._note_done(result.line_number)
        for line_number, (digest, choices) in reader.begun.items():
            index = self._lines.index_of(line_number)
            wanted = index is not None and not self._done[index] and self._lines.digests[index] == digest
            if wanted and num_tokens(choices) > num_tokens(self._kept.get(line_number, {})):
                self._kept[line_number] = dict(choices)

    def hold(self, lease: Lease) -> None:
        """Take the lines of a lease that are not done yet, with what was begun of them."""
        left = {index for index in range(lease.start, lease.stop) if not self._done[index]}
        if not left:
            self._finish(lease)
            return
        self.held[lease] = left
        for index in sorted(left):
            number = self._lines.numbers[index]
            for row in rows_of(number, self._lines.digests[index], self._kept.get(number, {})):
                self._shard.add(row)  # so that nobody needs two shards to go on with a line

    # -- as a job sees them ------------------------------------------------------------------------------------------------------------

    def add(
        self, line_number: int, digest: int, record: bytes, *, failed: bool = False, prompt_tokens: int = 0, output_tokens: int = 0
    ) -> None:
        """Take the result of a line of a lease that this worker holds."""
        result = Result(
            line_number=line_number, digest=digest, record=record, failed=failed, prompt_tokens=prompt_tokens, output_tokens=output_tokens
        )
        index = self._lines.index_of(line_number)
        assert index is not None, "a worker answers open lines only"
        self._wait()
        self._shard.add(result)
        self._pending.append(index)
        self.commit_if_due()

    def keep(self, row: ProgressRow) -> None:
        """Take a finished choice of a line that is not finished."""
        self._wait()
        self._take(row)
        self.commit_if_due()

    def kept(self, line_number: int, digest: int) -> dict[int, SavedProgress]:
        """Return the progress of a line that is not done, by choice."""
        return dict(self._kept.get(line_number, {}))

    def commit_if_due(self) -> None:
        """Commit if much is pending, or if something has been pending for a moment."""
        if self._oldest and (len(self._pending) >= _COMMIT_ITEMS or time.monotonic() - self._oldest >= _COMMIT_SECONDS):
            self.commit()

    def commit(self, progress: Iterable[ProgressRow] = ()) -> None:
        """Make durable all pending results, and the given progress.

        Raises:
            StorageError: The commit failed.
        """
        for row in progress:
            self._take(row)
        pending, self._pending, self._oldest = self._pending, [], 0.0
        self._shard.commit()
        for index in pending:
            self.num_stored += 1
            self._note_done(self._lines.numbers[index])
        for lease in [lease for lease, left in self.held.items() if not left]:
            del self.held[lease]
            self._finish(lease)

    def _wait(self) -> None:
        self._oldest = self._oldest or time.monotonic()

    def _take(self, row: ProgressRow) -> None:
        self._shard.add(row)
        follow(self._kept.setdefault(row.line_number, {}), row.choice, row.start, *texts(row))

    def _note_done(self, line_number: int) -> None:
        index = self._lines.index_of(line_number)
        if index is None:
            return
        self._done[index] = True
        self._kept.pop(line_number, None)
        for left in self.held.values():
            left.discard(index)


def num_tokens(choices: Mapping[int, SavedProgress]) -> int:
    """Return how far a line has come: the number of its tokens, and of its choices that have ended."""
    return sum(len(saved.generated.token_ids) + (saved.ending is not None) for saved in choices.values())
