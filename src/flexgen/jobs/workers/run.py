"""A run whose lines workers answer: it leaves the lines for them, collects their results, and says how far they are all together."""

from __future__ import annotations

import time
from typing import Self

from flexgen.errors import StorageError
from flexgen.jobs.runner import Job
from flexgen.jobs.store import Store
from flexgen.jobs.workers.board import Board
from flexgen.jobs.workers.collect import Collector
from flexgen.jobs.workers.leases import Fate, Ledger
from flexgen.jobs.workers.members import MemberFile, Observer
from flexgen.jobs.workers.place import make_folder, publish, remove_folder
from flexgen.jobs.workers.shard import ShardWriter, rows_of
from flexgen.jobs.workers.task import OpenLines, SharedTask
from flexgen.report.progress import Progress

_PART_TOLD = 10  # once a tenth of the lines is done, their pace says how long the others take


class SharedRun:
    """A run with workers, while the context is open.

    What workers have stored is in the database when the context has been left, whatever ended it.

    Args:
        job: The job, after its scan.
        store: The state of the job.
        task: What workers have to know.

    Attributes:
        folder: The folder that the workers share.

    Raises:
        StorageError: The folder cannot be written.
        JobError: The folder does not belong to this user.
    """

    def __init__(self, job: Job, store: Store, task: SharedTask) -> None:
        self._store = store
        numbers, digests = job.left
        lines = OpenLines(numbers=numbers, digests=digests)
        self.folder = make_folder(store.paths.workers)
        lines.write(self.folder)
        begun = ShardWriter(self.folder.begun)
        for number, digest in zip(numbers, digests, strict=True):
            for row in rows_of(number, digest, store.kept(number, digest)):
                begun.add(row)
        begun.commit()
        begun.close()
        task.write(self.folder)
        self._num_lines, self._began = len(lines), 0.0
        self._collector = Collector(self.folder, lines, store)
        self._observer = Observer(self.folder.members, lease_seconds=task.lease_seconds)
        self._board = Board(self.folder.leases, Ledger(len(lines), task.attempts))
        publish(self.folder)

    @property
    def num_left(self) -> int:
        """The number of lines without a result in the database."""
        return self._collector.num_left

    def members(self) -> list[MemberFile]:
        """Return what all workers have told last."""
        return self._observer.members()

    def collect(self) -> Progress:
        """Collect what is new, and return how far the workers are.

        Raises:
            StorageError: Something cannot be read or written; or workers have finished all lines, and records of some are not there.
        """
        if self._collector.collect() == 0 and self.num_left:
            self._board.refresh()
            if self._board.ledger.is_over and self._collector.collect() == 0 and self.num_left:
                raise StorageError(f"{self.folder.path}: workers have finished all lines, but records of {self.num_left:,} are lost")
        return self._progress()

    def totals(self) -> dict[str, int]:
        """Return the sums of the workers' figures."""
        names = ("prompt_tokens", "output_tokens", "scored_tokens", "answers_resumed", "tokens_kept")
        members = self.members()
        return {name: int(sum(each.figures.get(name) or 0 for each in members)) for name in names}

    def _progress(self) -> Progress:
        members = self.members()
        live = [each for each in members if self._observer.fate_of(each.worker) is Fate.ALIVE and not each.has_ended]
        now = time.monotonic()
        if not self._began and any(each.state != "reading" for each in members):
            self._began = now
        elapsed = now - self._began if self._began else 0.0
        totals, num_done = self.totals(), self._num_lines - self.num_left
        return Progress(
            elapsed_seconds=elapsed, num_requests=self._num_lines, num_requests_done=num_done,
            num_live_sequences=int(sum(each.figures.get("num_live_sequences") or 0 for each in live)),
            prompt_tokens=totals["prompt_tokens"], output_tokens=totals["output_tokens"], scored_tokens=totals["scored_tokens"],
            prompt_tokens_per_s=totals["prompt_tokens"] / max(elapsed, 1e-9) if elapsed else 0.0,
            output_tokens_per_s=totals["output_tokens"] / max(elapsed, 1e-9) if elapsed else 0.0,
            scored_tokens_per_s=totals["scored_tokens"] / max(elapsed, 1e-9) if elapsed else 0.0,
            eta_seconds=self._eta_seconds(elapsed, num_done, live), pass_index=0, unit=0, num_units=0,
        )  # fmt: skip

    def _eta_seconds(self, elapsed: float, num_done: int, live: list[MemberFile]) -> float | None:
        """Return the time left: at the pace of the lines that are done, or by the workers' own estimates while few are."""
        if elapsed and num_done * _PART_TOLD >= self._num_lines:
            return elapsed * self.num_left / num_done
        estimates = [each.figures["eta_seconds"] for each in live if each.figures.get("eta_seconds") is not None]
        return sum(each for each in estimates if each is not None) / len(estimates) if estimates else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Collect what is left; where every line has a record, remove what the workers share."""
        self._collector.collect()
        if self.num_left:
            self._collector.keep_progress()
        else:
            remove_folder(self.folder.root)
