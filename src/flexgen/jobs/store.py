"""The state of a job: the lines that are done, with their records, and the tokens of lines in progress.

The database is authoritative, and the output file is made from it (export.py).  Results are committed many at a time, because a commit
waits for the disk; a line is done when its commit has returned.  Knows nothing of requests.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from flexgen.base.quantities import counted
from flexgen.errors import JobError
from flexgen.jobs import saved_progress
from flexgen.jobs.database import commit, connect, hold, transaction, translated
from flexgen.jobs.differences import by_number, describe_difference, differing, note, signed
from flexgen.jobs.folder import JobFolder
from flexgen.jobs.identity import Identity, changes, differing_from, in_words
from flexgen.jobs.pending import Pending
from flexgen.jobs.runs import RunRecorder
from flexgen.jobs.saved_progress import ProgressRow, SavedProgress

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 0.1
_COMMIT_RESULTS = 1000
_COMMIT_BYTES = 4 << 20
_CHOSEN = ("weight_format", "kv_format")  # what a model may choose for the first lines of a job


class Store:
    """The state of one job, for the run that holds its folder.

    Attributes:
        paths: The paths of the job.
        created: Time at which the job was first started, in seconds since 1970.
        model: Name of the model that is written into answers.
        run: The record of the current run, with its snapshots.
        num_answered: Number of lines with an answer, earlier runs included.
        num_failed: Number of lines with an error, earlier runs included.
        num_found: Number of lines that earlier runs had finished.

    Raises:
        StorageError: The state is damaged, belongs to another program, or cannot be read or written.
    """

    def __init__(self, folder: JobFolder) -> None:
        self.paths, self._path = folder.paths, folder.paths.database
        self.created, self.model = int(time.time()), ""
        self._pending = Pending()
        self._connection = connect(self.paths, create=True)
        self.run = RunRecorder(self._connection)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        """Load digests and counts from the database."""
        with translated(self._path):
            rows = self._connection.execute("SELECT line, digest FROM results ORDER BY line")
            self._digests = by_number(rows)  # 0 for lines that are not done
            query = "SELECT count(*), total(failed), ifnull(max(place), 0), total(output_tokens) FROM results"
            done, failed, self._num_ordered, tokens = self._connection.execute(query).fetchone()
            self._begun_lines = {line for (line,) in self._connection.execute("SELECT DISTINCT line FROM begun")}
        self.num_failed, self.num_answered, self._output_tokens = int(failed), done - int(failed), int(tokens)
        self.num_found = done

    # -- the start of a run -----------------------------------------------------------------------------------------------------------

    def begin(self, identity: Identity, model: str, *, accept_changes: bool = False) -> None:
        """Check that everything that changes answers is as in earlier runs.  A job without answers may change freely.

        Accepted changes, here and in `match_input`, are committed when the run starts; a run that is refused leaves the job as it was.

        Args:
            identity: The identity of the job now.
            model: Name of the model to write into answers, unless an earlier run of the same model chose one.
            accept_changes: Whether to go on although the identity changed.

        Raises:
            JobError: The identity changed, and `accept_changes` is false.
        """
        facts = self._facts()
        self.model = model
        if facts and (self._num_done or self._begun_lines):
            earlier = Identity.from_json(facts["identity"])
            self._compare(earlier, identity, accept_changes)
        if facts and (self._num_done or self._begun_lines):
            self.created = int(facts["created"])
            if earlier.answers.get("model") == identity.answers.get("model"):
                self.model = facts["model"]
        self._keep({"identity": identity.to_json(), "created": str(self.created), "model": self.model})

    def settle(self, fingerprint: Mapping[str, Any]) -> None:
        """Keep the fingerprint of a model that has chosen formats since the run began; no line was answered since then."""
        begun = Identity.from_json(self._facts()["identity"])
        if any(change.name in _CHOSEN for change in changes(begun.answers, fingerprint)):
            self._keep({"identity": dataclasses.replace(begun, answers={**begun.answers, **fingerprint}).to_json()})

    def _facts(self) -> dict[str, str]:
        with translated(self._path):
            return dict(self._connection.execute("SELECT name, value FROM facts"))

    def _keep(self, facts: Mapping[str, str]) -> None:
        with transaction(self._connection, self._path):
            self._connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    def _compare(self, earlier: Identity, identity: Identity, accept_changes: bool) -> None:
        for change in changes(earlier.versions, identity.versions):
            said = change.told(self.paths.spelling)
            logger.warning("%s was begun with %s; answers may differ in their last digits", self.paths.name, said)
        found = changes(earlier.answers, identity.answers)
        if not found:
            return
        said = in_words(found, self.paths.spelling)
        if not self.num_answered and not self._begun_lines:
            logger.info("%s was begun with %s; it has no answers yet, so that it starts anew", self.paths.name, said)
            self.forget_failed()
            return
        if not accept_changes:
            raise JobError(differing_from(self.paths, found))
        logger.warning("%s was begun with %s; answers in progress start anew", self.paths.name, said)
        hold(self._connection, self._path)
        with transaction(self._connection, self._path):
            self._connection.execute("DELETE FROM begun")
        self._begun_lines.clear()

    def match_input(self, lines: Iterable[tuple[int, int]], *, accept_changes: bool = False) -> None:
        """Compare the lines of the input with those that earlier runs had under the same numbers.

        A line that ended in an error may change or be removed; it is answered again.

        Args:
            lines: The (number, digest) pairs of the lines, in order.
            accept_changes: Whether answered lines that changed are answered again.

        Raises:
            JobError: An answered line changed or is gone, and `accept_changes` is false.
        """
        if not self._num_done and not self._begun_lines:
            return
        new = by_number((number, signed(digest)) for number, digest in lines)
        self._forget_begun(new)
        other = differing(self._digests, new)
        answered = self._answered(other)
        if answered and not accept_changes:
            raise JobError(
                f"{self.paths.name} answers another input ({describe_difference(self._digests, new, answered)}): "
                f"{self.paths.spelling.accept_changes} answers those again, {self.paths.spelling.anew}"
            )
        if answered:
            said = counted(len(other), "line of the input changed and is", "lines of the input changed and are")
            logger.warning("%s: %s answered again", self.paths.name, said)
        elif other:
            said = counted(len(other), "line that had an error changed, and is", "lines that had an error changed, and are")
            logger.info("%s: %s done again", self.paths.name, said)
        self._forget(other)

    def _answered(self, lines: Iterable[int]) -> array[int]:
        """Return those of the lines whose record is an answer."""
        query = "SELECT failed FROM results WHERE line = ?"
        with translated(self._path):
            return array("q", (line for line in lines if self._connection.execute(query, (line,)).fetchone() == (0,)))

    def _forget_begun(self, new: array[int]) -> None:
        """Delete the progress of lines that have changed."""
        with translated(self._path):
            stale = saved_progress.stale(self._connection, new)
        if stale:
            hold(self._connection, self._path)
            with transaction(self._connection, self._path):
                saved_progress.forget(self._connection, stale)
            self._load()

    def forget_failed(self) -> int:
        """Have lines that ended in an error answered again, and return their number."""
        with translated(self._path):
            failed = array("q", (line for (line,) in self._connection.execute("SELECT line FROM results WHERE failed")))
        self._forget(failed)
        return len(failed)

    def _forget(self, lines: Sequence[int]) -> None:
        if not lines:
            return
        hold(self._connection, self._path)
        with transaction(self._connection, self._path):
            for table in ("results", "records"):
                self._connection.executemany(f"DELETE FROM {table} WHERE line = ?", zip(lines))
        self._load()

    def keep_output_form(self, form: str) -> None:
        """Keep what `export` needs to know where the output is not a file of records."""
        self._keep({"output_form": form})

    def start_run(self, num_lines: int) -> None:
        """Record that a run begins, and commit the changes that were accepted."""
        with transaction(self._connection, self._path):
            self.run.start(num_lines, self._num_done, self._output_tokens + self._tokens_in_progress())
        if self._connection.in_transaction:
            commit(self._connection, self._path)

    @property
    def num_output_tokens(self) -> int:
        """The number of durable tokens that all runs have generated."""
        with translated(self._path):
            return self._output_tokens + self._tokens_in_progress()

    def end_run(self, ending: str) -> None:
        """Record the reason why the run ended."""
        with transaction(self._connection, self._path):
            self.run.end(ending)

    # -- lines --------------------------------------------------------------------------------------------------------------------------

    def is_done(self, line_number: int) -> bool:
        """Return whether the line has its record."""
        return line_number < len(self._digests) and self._digests[line_number] != 0

    def add(
        self, line_number: int, digest: int, record: bytes, *, failed: bool = False, prompt_tokens: int = 0, output_tokens: int = 0
    ) -> None:
        """Take the result of a line.  The line is done once the result is committed, now or later.

        Args:
            line_number: The line's number, from 1.
            digest: 64 bits of the hash of the line.
            record: The line of the output, with its line end.
            failed: Whether the record is an error.
            prompt_tokens: Number of tokens of the prompt.
            output_tokens: Number of generated tokens.
        """
        order = self._num_ordered + len(self._pending.results) + 1
        self._pending.add((line_number, signed(digest), order, failed, prompt_tokens, output_tokens), record)
        self.commit_if_due()

    def keep(self, row: ProgressRow) -> None:
        """Take a finished choice of a line that is not finished.  Like results, it is committed now or later."""
        self._pending.keep(row)
        self.commit_if_due()

    def kept(self, line_number: int, digest: int) -> dict[int, SavedProgress]:
        """Return the progress that earlier runs stored for a line that is not done, by choice."""
        if line_number not in self._begun_lines:
            return {}
        with translated(self._path):
            return saved_progress.read(self._connection, line_number, signed(digest))

    def commit_if_due(self) -> None:
        """Commit if much is pending, or if something has been pending for COMMIT_SECONDS."""
        many = len(self._pending.results) >= _COMMIT_RESULTS or self._pending.size >= _COMMIT_BYTES
        if self._pending and (many or self._pending.age_seconds >= COMMIT_SECONDS):
            self.commit()

    def commit(self, progress: Iterable[ProgressRow] = ()) -> None:
        """Make durable all pending results, and the given progress of lines that are not done.

        Raises:
            StorageError: The commit failed; nothing of it is stored then.
        """
        results, records, rows = self._pending.results, self._pending.records, [*self._pending.progress, *progress]
        if not results and not rows:
            return
        self._pending = Pending()
        with transaction(self._connection, self._path):
            saved_progress.write(self._connection, ((signed(row.digest), row) for row in rows))
            self._connection.executemany("INSERT INTO results VALUES (?, ?, ?, ?, ?, ?)", results)
            self._connection.executemany("INSERT INTO records VALUES (?, ?)", records)
            self._connection.executemany("DELETE FROM begun WHERE line = ?", ((line,) for line, _ in records))  # as written above, too
            self.run.update(self._output_tokens + sum(result[-1] for result in results) + self._tokens_in_progress())
        self._begun_lines.update(row.line_number for row in rows)
        for line_number, digest, order, failed, _, output_tokens in results:
            note(self._digests, line_number, digest)
            self.num_failed += failed
            self.num_answered += not failed
            self._output_tokens += output_tokens
            self._num_ordered = order
            self._begun_lines.discard(line_number)

    def _tokens_in_progress(self) -> int:
        return int(self._connection.execute("SELECT total(tokens) FROM begun").fetchone()[0])

    def close(self) -> None:
        """Close the database; what is not committed is lost."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _num_done(self) -> int:
        return self.num_answered + self.num_failed
