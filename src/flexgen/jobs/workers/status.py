"""The workers of a job as seen from outside, also from another host."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen.jobs.folder import JobPaths
from flexgen.jobs.workers.members import LEASE_SECONDS, MemberFile, Observer
from flexgen.jobs.workers.place import current_run


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """What a worker has told last.

    Attributes:
        host: Name of its host.
        process: Its process id there.
        state: What it does ("reading", "answering", "waiting"), how it ended ("finished", "stopped", "refused", "failed"), or "gone" where
            its process can be seen from here to have ended without a word.
        reason: Why it ended; empty where that needs no reason.
        leases: Names of the leases that it holds.
        lines: Number of lines that it has stored.
        in_progress: Number of answers that it generates.
        output_tokens: Number of tokens that it has generated.
    """

    host: str
    process: int
    state: str
    reason: str
    leases: tuple[str, ...]
    lines: int
    in_progress: int
    output_tokens: int


def read_workers(paths: JobPaths) -> tuple[WorkerStatus, ...]:
    """Return the workers of a job's latest run with workers; none once that is over.

    Raises:
        StorageError: What they share cannot be read.
        JobError: It does not belong to this user.
    """
    folder = current_run(paths.workers)
    if folder is None:
        return ()
    return tuple(_status(each) for each in Observer(folder.members, lease_seconds=LEASE_SECONDS).members())


def _status(told: MemberFile) -> WorkerStatus:
    return WorkerStatus(
        host=told.process.host,
        process=told.process.pid,
        state="gone" if not told.has_ended and told.process.is_gone() else told.state,
        reason=told.reason,
        leases=told.leases,
        lines=told.lines,
        in_progress=0 if told.has_ended else int(told.figures.get("num_live_sequences") or 0),
        output_tokens=int(told.figures.get("output_tokens") or 0),
    )
