"""One worker of a job, from what the run has left for it to the last line: an ordinary engine that is fed by leases."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flexgen.base.steps import step
from flexgen.errors import (
    EngineError,
    FlexGenError,
    JobError,
    OutOfMemoryError,
    StorageError,
    is_disk_failure,
    is_out_of_memory,
)
from flexgen.jobs.checkpoints import Checkpoints, rescue
from flexgen.jobs.forms import Forms
from flexgen.jobs.interrupt import Stopped, StopRequest
from flexgen.jobs.model import JobModel
from flexgen.jobs.reading import Reader, line_and_choice
from flexgen.jobs.serving import Judge, Serving
from flexgen.jobs.workers.board import Board
from flexgen.jobs.workers.leases import Ledger, Offer
from flexgen.jobs.workers.members import FAILED, FINISHED, REFUSED, STOPPED, Member, Observer
from flexgen.jobs.workers.place import SharedFolder, current_run
from flexgen.jobs.workers.results import SharedResults
from flexgen.jobs.workers.shard import ShardWriter
from flexgen.jobs.workers.supply import Leasing, Supply
from flexgen.jobs.workers.task import LineReader, OpenLines, SharedTask
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress, RunReport
from flexgen.session.lengths import RequestLengths

_POLL_SECONDS = 0.25
_SUMS = ("num_requests_done", "prompt_tokens", "output_tokens", "scored_tokens")  # figures of `Progress` that add up over runs


def work(
    model: JobModel,
    folder: SharedFolder,
    task: SharedTask,
    *,
    child: int = 0,
    stop: StopRequest | None = None,
    judge: Judge | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    report: Callable[[], RunReport] | None = None,
) -> int:
    """Answer lines of a job beside other workers until none is left.

    Args:
        model: The model, which is that of the job.
        folder: The folder of the run.
        task: What is to be answered.
        child: The number that the run gave this worker; 0 if the run has not started it.
        stop: The request to stop.
        judge: Says which answers are errors of their lines.
        on_progress: Called with the progress of this worker.
        report: Returns the report of the engine's last run.

    Returns:
        The number of lines that this worker has answered.

    Raises:
        Stopped: The worker was asked to stop; what was generated is kept.
        JobError: The job was begun anew.
        FlexGenError: See `Job.run`.
    """
    with Member(folder.members, lease_seconds=task.lease_seconds, child=child) as member:
        state, reason = FAILED, "a bug"
        try:
            worker = _Worker(model, folder, task, member, stop or StopRequest(), judge, on_progress, report)
            worker.answer()
            state, reason = FINISHED, ""
        except Stopped:
            state, reason = STOPPED, ""
            raise
        except Exception as error:
            state, reason = _ending(error), str(error)
            raise
        finally:
            with suppress(StorageError):  # the run may be over
                member.end(state, reason)
        return worker.results.num_stored


def _ending(error: Exception) -> str:
    """Return whether an error has to do with the lines that a worker had, or would have come with any others."""
    if isinstance(error, (EngineError, OutOfMemoryError)) or not (isinstance(error, FlexGenError) or is_disk_failure(error)):
        return FAILED
    return REFUSED


class _Worker:
    """What a worker has: the leases, its shard, and the engine."""

    def __init__(
        self, model: JobModel, folder: SharedFolder, task: SharedTask, member: Member, stop: StopRequest, judge: Judge | None,
        on_progress: Callable[[Progress], None] | None, report: Callable[[], RunReport] | None,
    ) -> None:  # fmt: skip
        self._model, self._folder, self._task, self._member, self._stop, self._judge = model, folder, task, member, stop, judge
        self._on_progress, self._report = on_progress, report
        self._lines = OpenLines.read(folder)
        self._reading = LineReader(Path(task.source), self._lines)
        board = Board(folder.leases, Ledger(len(self._lines), task.attempts))
        self._shard = ShardWriter(folder.shards / member.id)
        self.results = SharedResults(self._lines, self._shard, folder.begun, board.finish)
        observer = Observer(folder.members, lease_seconds=task.lease_seconds)
        self._leasing = Leasing(board, observer, self.results, folder.shards, member.id)
        forms = Forms(
            model=task.model_name, created=task.created, defaults=task.defaults, has_text=model.tokenizer is not None,
            input_format=task.input_format,
        )  # fmt: skip
        self._reader = Reader(model, forms, now=task.created or None)
        self._sums: dict[str, float] = dict.fromkeys((*_SUMS, "answers_resumed", "tokens_kept"), 0)  # of engine runs that are over
        self._latest: Progress | None = None
        self._waits = False
        self._longest = 0.0  # seconds of the run whose report is kept

    def answer(self) -> None:
        """Answer lines until none is left, or the run is over."""
        try:
            self._answer()
        except StorageError as error:
            if self._folder.is_current:
                raise
            self._check_over(error)
        finally:
            self._shard.close()

    def _answer(self) -> None:
        workload = self._measure()
        max_num_seqs = self._model.open(workload).policy.max_num_seqs
        held: list[Offer] = []
        while True:
            self._check_stop()  # reading and opening the engine may have taken long
            if not self.results.held:
                offer = self._leasing.take(0, max_num_seqs)
                held = [offer] if offer is not None else []
            if self.results.held:
                try:
                    self._run(workload, held, max_num_seqs)
                except OutOfMemoryError:
                    fewer = self._model.shrink()
                    if fewer is None:
                        raise
                    max_num_seqs = fewer
                    alone = any(offer.alone for offer in held)
                    held = [Offer(lease=lease, alone=alone) for lease in self.results.held]
            elif self._leasing.is_over:
                return
            elif not held:
                self._wait()

    def _check_stop(self) -> None:
        if self._stop.asked:
            raise Stopped

    def _wait(self) -> None:
        """Wait until other workers have finished their lines, or left some behind."""
        self._member.tell(now=not self._waits, state="waiting", leases=())
        self._waits = True
        time.sleep(_POLL_SECONDS)
        if not self._folder.is_current:
            raise StorageError("the run is over")

    def _check_over(self, error: StorageError) -> None:
        """Return if the run has ended, and refuse to go on if another one has taken its place."""
        if current_run(self._folder.root) is not None:
            raise JobError(f"{self._task.name} was begun anew by another run: the same command joins that one") from error

    def _measure(self) -> Workload:
        """Return a workload like this worker's part of the lines, and find what prompts of all lines have in common."""
        step(f"reading requests from {self._task.source}")
        lengths = RequestLengths(self._model.prefix_census())
        for request, token_requests in self._reader.read(self._reading.read(range(len(self._lines)))):
            kept = self.results.kept(request.line_number, request.digest)
            for each in token_requests:
                _, choice = line_and_choice(each.index)
                lengths.add(each, len(kept[choice].generated.token_ids) if choice in kept else 0)
        self._prefixes, whole = lengths.common_prefixes(), lengths.workload()
        return whole.take(range(0, len(whole), self._task.num_workers))

    def _run(self, workload: Workload, held: list[Offer], max_num_seqs: int) -> None:
        """Have the engine answer the lines of leases until it has none left."""
        serving = Serving(self._model, self.results, self._judge)
        supply = Supply(self._leasing, self.results, self._reading, self._reader, serving, offers=held, max_num_seqs=max_num_seqs)
        checkpoints = Checkpoints(self.results, serving, self._stop, seconds=self._task.checkpoint_seconds, tell=self._tell)
        how = {"prefixes": self._prefixes, "on_progress": checkpoints.within_pass, "on_pass": checkpoints.after_pass}
        self._member.tell(now=True, state="answering", leases=tuple(lease.name for lease in self.results.held))
        self._waits = False
        try:
            for result in self._model.stream(supply, workload, **how):
                serving.take(result)
            self.results.commit()
        except BaseException as error:
            rescue(self.results)
            if is_out_of_memory(error):
                raise OutOfMemoryError(f"memory ran out ({error}): lower max_num_seqs or micro_batch_tokens") from error
            raise
        finally:
            self._add_up(serving)
        if serving.num_unfinished:
            raise EngineError(f"the engine left {serving.num_unfinished:,} lines unanswered")
        self._keep_report()

    def _tell(self, progress: Progress) -> None:
        self._latest = progress
        figures: dict[str, float | None] = {**self._sums}
        for name in _SUMS:
            figures[name] = self._sums[name] + getattr(progress, name)
        figures |= {"num_live_sequences": progress.num_live_sequences, "eta_seconds": progress.eta_seconds}
        leases = tuple(lease.name for lease in self.results.held)
        self._member.tell(state="answering", lines=self.results.num_stored, leases=leases, figures=figures)
        if self._on_progress is not None:
            self._on_progress(progress)

    def _add_up(self, serving: Serving) -> None:
        """Add the figures of a run that is over to those of earlier ones."""
        latest, self._latest = self._latest, None
        if latest is not None:
            for name in _SUMS:
                self._sums[name] += getattr(latest, name)
        self._sums["answers_resumed"] += serving.num_resumed
        self._sums["tokens_kept"] += serving.tokens_kept
        self._member.tell(lines=self.results.num_stored, figures={**self._sums, "num_live_sequences": 0, "eta_seconds": None})

    def _keep_report(self) -> None:
        """Leave the report of the longest run of the engine, if somebody wants it."""
        if not self._task.reports or self._report is None:
            return
        report = self._report()
        if report.elapsed_seconds > self._longest:
            self._longest = report.elapsed_seconds
            with suppress(OSError):
                (self._folder.logs / f"{self._member.id}.report").write_text(report.to_json())


def reports(folder: SharedFolder) -> list[dict[str, object]]:
    """Return the reports that workers have left."""
    return [json.loads(path.read_text()) for path in sorted(folder.logs.glob("*.report"))]
