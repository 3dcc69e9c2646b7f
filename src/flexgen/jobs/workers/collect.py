"""Collects what workers have answered into the database of their job, while they work and after they have ended, however they ended."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from contextlib import closing

from flexgen.base.failpoints import failpoint
from flexgen.errors import JobError
from flexgen.jobs.database import connect
from flexgen.jobs.folder import JobFolder, JobPaths
from flexgen.jobs.identity import Identity, changes
from flexgen.jobs.interrupt import PATIENCE_SECONDS
from flexgen.jobs.saved_progress import ProgressRow, SavedProgress
from flexgen.jobs.store import Store
from flexgen.jobs.workers.members import LEASE_SECONDS, Observer
from flexgen.jobs.workers.place import SharedFolder, current_run, names_in, translated
from flexgen.jobs.workers.results import num_tokens
from flexgen.jobs.workers.shard import ShardReader, rows_of
from flexgen.jobs.workers.task import OpenLines, SharedTask

_MOST_ROWS = 1000  # that are committed together
_ORPHAN_SECONDS = PATIENCE_SECONDS + 5.0
_POLL_SECONDS = 0.1


class Collector:
    """Collects the results of the workers of a run.

    Of several results of a line the first that is met counts, in the order of the workers' names; the others are dropped.

    Args:
        folder: The folder of the run.
        lines: The lines that workers answer.
        store: The state of the job.

    Attributes:
        num_left: The number of lines without a result.
    """

    def __init__(self, folder: SharedFolder, lines: OpenLines, store: Store) -> None:
        self._folder, self._lines, self._store = folder, lines, store
        self._readers: dict[str, ShardReader] = {}
        self._taken = bytearray(store.is_done(number) for number in lines.numbers)
        self.num_left = self._taken.count(0)

    def collect(self) -> int:
        """Make durable in the database what is new in the shards, and return the number of lines.

        Raises:
            StorageError: A shard cannot be read, or the database cannot be written.
        """
        num_found = 0
        with translated(self._folder.shards):
            names = names_in(self._folder.shards)
        for name in names:
            reader = self._readers.setdefault(name, ShardReader(self._folder.shards / name))
            for result in reader.read():
                index = self._lines.index_of(result.line_number)
                if index is None or self._taken[index] or self._lines.digests[index] != result.digest:
                    continue
                self._taken[index] = True
                num_found += 1
                failpoint("workers.collect")
                self._store.add(
                    result.line_number, result.digest, result.record, failed=result.failed, prompt_tokens=result.prompt_tokens,
                    output_tokens=result.output_tokens,
                )  # fmt: skip
        self._store.commit()
        self.num_left -= num_found
        return num_found

    def keep_progress(self) -> None:
        """Make durable in the database the tokens of lines without a result: of each line, those of the worker that has come furthest.

        Raises:
            StorageError: The database cannot be written.
        """
        begun: dict[int, ShardReader] = {}
        for _, reader in sorted(self._readers.items()):
            for line_number, (digest, choices) in reader.begun.items():
                index = self._lines.index_of(line_number)
                if index is None or self._taken[index] or self._lines.digests[index] != digest:
                    continue
                best = begun.get(line_number)
                if best is None or num_tokens(choices) > num_tokens(best.begun[line_number][1]):
                    begun[line_number] = reader
        rows = itertools.chain.from_iterable(_further(self._store, each, *reader.begun[each]) for each, reader in begun.items())
        while some := list(itertools.islice(rows, _MOST_ROWS)):
            self._store.commit(some)


def _further(store: Store, line_number: int, digest: int, choices: dict[int, SavedProgress]) -> Iterable[ProgressRow]:
    """Return the rows of a line's progress, if that is more than the database has."""
    return rows_of(line_number, digest, choices) if num_tokens(choices) > num_tokens(store.kept(line_number, digest)) else ()


def take_in(store: Store) -> bool:
    """Take into the database what workers of an earlier run have left, and return whether there was such a run.

    What they share stays, so that a run that is refused leaves the job as it was.

    Raises:
        JobError: The folder of the workers does not belong to this user.
        StorageError: It cannot be read, or the database cannot be written.
    """
    folder = current_run(store.paths.workers)
    if folder is None or not _belongs(SharedTask.read(folder), store.paths):
        return False
    _await_orphans(folder)
    collector = Collector(folder, OpenLines.read(folder), store)
    collector.collect()
    collector.keep_progress()
    return True


def _belongs(task: SharedTask, paths: JobPaths) -> bool:
    """Return whether workers had the job that the database is of, as it was begun last."""
    with closing(connect(paths)) as connection, translated(paths.database):
        facts = dict(connection.execute("SELECT name, value FROM facts"))
    same = "identity" in facts and facts["created"] == str(task.created)
    return same and not changes(Identity.from_json(facts["identity"]).answers, task.identity.answers)


def _await_orphans(folder: SharedFolder) -> None:
    """Wait a while for workers that the earlier run had started here: they stop after their pass, since that run is over."""
    observer, deadline = Observer(folder.members, lease_seconds=LEASE_SECONDS), time.monotonic() + _ORPHAN_SECONDS
    with translated(folder.members):
        while time.monotonic() < deadline and any(each.child and each.process.is_here() for each in observer.members()):
            time.sleep(_POLL_SECONDS)


def take_in_if_idle(paths: JobPaths) -> None:
    """Do what `take_in` does for a job that no run holds; a run does it by itself.

    Raises:
        StorageError: See `take_in`.
    """
    if current_run(paths.workers) is None:
        return
    try:
        with JobFolder(paths) as folder, Store(folder) as store:
            take_in(store)
    except JobError:
        return
