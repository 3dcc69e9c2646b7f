"""Runs one job: every line of the input that is not blank ends in exactly one record.

The input is streamed several times: to compare it with the lines that earlier runs answered, under --strict to check it as a whole, to
answer bad lines and measure the others (the plan depends on their lengths), and to feed those to the model as it asks for them.
Knows lines and answers, and nothing of how the model runs.
"""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

from flexgen.api.job_request import JobRequest
from flexgen.base.failpoints import failpoint
from flexgen.base.quantities import counted
from flexgen.base.steps import counted_lines, step
from flexgen.base.text_input import READ_ERRORS, open_input
from flexgen.errors import EngineError, OutOfMemoryError, RequestError, StorageError, is_out_of_memory
from flexgen.jobs.checkpoints import Checkpoints, rescue
from flexgen.jobs.checks import HEAD_LINES, check_head, check_strictly
from flexgen.jobs.duplicate_ids import Census
from flexgen.jobs.forms import Forms, Remarks
from flexgen.jobs.interrupt import StopRequest
from flexgen.jobs.lines import Line, read_lines
from flexgen.jobs.model import JobModel
from flexgen.jobs.reading import Reader, line_and_choice
from flexgen.jobs.serving import Judge, Serving, add_failure
from flexgen.jobs.store import Store
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress
from flexgen.request import SamplingParams, TokenRequest
from flexgen.session.lengths import RequestLengths
from flexgen.text.common_prefixes import NO_PREFIXES

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0


class Job:
    """A file of requests that is answered by a model.

    Args:
        model: The model that answers the lines.
        source: The input file, which must not change while the job runs.
        store: The state of the job, which takes the results; None for a job that is only measured (`--dry-run`).
        defaults: The sampling parameters of lines that set none.
        input_format: The format of the input, see `Forms`.
        name: The name of the input in messages; None for its path.
        checkpoint_seconds: The least time between two passes after which the tokens of answers in progress are stored.
        stop: The request to stop, which is checked during and after every pass.
        judge: Says which answers are errors of their lines; None where every answer counts.

    Attributes:
        num_lines: The number of lines that are not blank.
        num_bad_lines: The number of lines that the scan answered with an error.
        first_bad: The number and the error of the first of these lines, for messages.
        started: Whether the model has taken requests.
        remarks: Remarks on the lines that the scan left for the model.
        num_resumed: The number of answers that went on from the tokens of an earlier run.
        tokens_kept: The number of tokens of those answers that were not generated again.
    """

    def __init__(
        self,
        model: JobModel,
        source: Path,
        store: Store | None,
        *,
        defaults: SamplingParams,
        input_format: str = "jsonl",
        name: str | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        stop: StopRequest | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.model, self.source, self.store, self.defaults = model, source, store, defaults
        self.num_lines = self.num_bad_lines = 0
        self.first_bad = ""
        self.started = False
        self.num_resumed = self.tokens_kept = 0
        self._checkpoint_seconds = checkpoint_seconds
        self._planned_seconds: float | None = None
        self._stop, self._judge = stop or StopRequest(), judge
        self._input_format, self._name = input_format, name
        self.remarks = Remarks(model.name)
        self._pending = array("Q")  # digests of the lines that the scan left for the model, in the order of the input
        self._numbers = array("Q")  # the numbers of these lines
        self._prefixes = NO_PREFIXES  # common prefixes of the prompts of these lines

    @property
    def name(self) -> str:
        """The name of the input in messages."""
        return self._name or str(self.source)

    @property
    def num_left(self) -> int:
        """The number of lines that the scan left for the model."""
        return len(self._pending)

    @property
    def left(self) -> tuple[array[int], array[int]]:
        """The numbers and the digests of these lines."""
        return self._numbers, self._pending

    # -- before the start ---------------------------------------------------------------------------------------------------------------

    def match(self, *, accept_changes: bool = False) -> None:
        """Compare the input with the lines that earlier runs answered.

        Raises:
            JobError: Lines that were answered have changed, and `accept_changes` is false.
            StorageError: The input cannot be read.
        """
        if self.store is not None:
            lines = counted_lines(self._lines(), f"comparing {self.name} with what was answered before")
            self.store.match_input(((line.number, line.digest) for line in lines), accept_changes=accept_changes)

    def check(self) -> None:
        """Check every line, done or not (--strict).

        Raises:
            JobError: Some lines cannot be served, or several lines have the same id; the message lists the first of them.
        """
        lines = counted_lines(self._lines(), f"checking {self.name}")
        check_strictly(self.name, (request for request, _ in self._reader(strict=True).read(lines)))

    def check_head(self) -> None:
        """Check the first lines, unless one of them is done or there are fewer than HEAD_LINES.

        Raises:
            JobError: All of them fail for the same reason.
        """
        head = list(itertools.islice(self._lines(), HEAD_LINES))
        if len(head) == HEAD_LINES and not any(self.store is not None and self.store.is_done(line.number) for line in head):
            check_head(self.name, head, (request for request, _ in self._reader().read(head)))

    def scan(self) -> Workload:
        """Answer bad lines, measure the good ones that have no answer yet, and find the common prefixes of their prompts.

        Every call of `run` needs a scan before it.

        Raises:
            StorageError: The input cannot be read, or an error cannot be stored.
        """
        self.num_lines, self._pending, self._numbers, self.remarks = 0, array("Q"), array("Q"), Remarks(self.model.name)
        census, lengths = Census(), RequestLengths(self.model.prefix_census())
        for request, token_requests in self._reader().read(self._unanswered()):
            census.add(request.line_number, request.id)
            if request.error is not None:
                self._note_bad(request, request.error)
                continue
            self.remarks.note(request)
            self._pending.append(request.digest)
            self._numbers.append(request.line_number)
            kept = self.store.kept(request.line_number, request.digest) if self.store is not None else {}
            for each in token_requests:
                _, choice = line_and_choice(each.index)
                lengths.add(each, len(kept[choice].generated.token_ids) if choice in kept else 0)
        self._prefixes = lengths.common_prefixes()
        if repeated := census.repeated():
            said = counted(len(repeated), "line has the id of an earlier line", "lines have the id of an earlier line")
            logger.warning("%s: %s; all are answered", self.name, said)
        if self.store is not None:
            self.store.commit()
        return lengths.workload()

    def _note_bad(self, request: JobRequest, error: RequestError) -> None:
        self.num_bad_lines += 1
        self.first_bad = self.first_bad or f"line {request.line_number}: {error}"
        if self.store is not None:
            add_failure(self.store, request, error)

    def open(self, workload: Workload) -> Plan:
        """Open the model for the workload that the scan returned, and return its plan."""
        plan = self.model.open(workload)
        if self.store is not None:
            self.store.settle(self.model.fingerprint())
        self._planned_seconds = plan.forecast.seconds
        return plan

    # -- the run ------------------------------------------------------------------------------------------------------------------------

    def run(self, workload: Workload, *, on_progress: Callable[[Progress], None] | None = None) -> None:
        """Have the model answer the lines that the scan left for it; results become durable as they finish.

        Raises:
            Stopped: The run was asked to stop; the generated tokens are stored.
            StorageError: The input changed since the scan, or results cannot be stored.
            OutOfMemoryError: Memory ran out; the job can go on after `ServedModel.shrink` and another scan.
            FlexGenError: The engine failed for another reason; finished lines are kept.
        """
        if self.store is None or not len(workload):
            return
        serving = Serving(self.model, self.store, self._judge)
        try:
            self._answer(serving, self.store, workload, on_progress)
        except BaseException as error:
            rescue(self.store)
            if is_out_of_memory(error):
                raise OutOfMemoryError(f"memory ran out ({error}): lower max_num_seqs or micro_batch_tokens") from error
            raise

    def answer(
        self,
        workload: Workload,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        on_shrink: Callable[[OutOfMemoryError, int], None] | None = None,
    ) -> None:
        """Do what `run` does, and halve the number of sequences at once whenever memory runs out.

        Args:
            workload: The workload that the scan returned.
            on_progress: A callback that is called with the progress of the run.
            on_shrink: A callback that is called with the error and the new number of sequences.

        Raises:
            FlexGenError: See `run`; OutOfMemoryError where one sequence is too much.
        """
        while True:
            try:
                return self.run(workload, on_progress=on_progress)
            except OutOfMemoryError as error:
                num_seqs = self.model.shrink()
                if num_seqs is None:
                    raise
                if on_shrink is not None:
                    on_shrink(error, num_seqs)
                workload = self.scan()

    def _answer(self, serving: Serving, store: Store, workload: Workload, on_progress: Callable[[Progress], None] | None) -> None:
        tell = store.run.teller(store.num_output_tokens, self._planned_seconds)

        def told(progress: Progress) -> None:
            tell(progress)
            if on_progress is not None:
                on_progress(progress)

        checkpoints = Checkpoints(store, serving, self._stop, seconds=self._checkpoint_seconds, tell=told)
        step(f"answering {self.name}")
        requests = self._token_requests(serving, store)
        how = {"prefixes": self._prefixes, "on_progress": checkpoints.within_pass, "on_pass": checkpoints.after_pass}
        for result in self.model.stream(requests, workload, **how):
            serving.take(result)
        store.commit()
        self.num_resumed, self.tokens_kept = serving.num_resumed, serving.tokens_kept
        num_left = len(self._pending) - serving.num_taken + serving.num_unfinished
        if num_left:
            raise EngineError(f"the engine left {num_left:,} of {counted(len(self._pending), 'line')} unanswered")

    # -- reading ------------------------------------------------------------------------------------------------------------------------

    def _reader(self, *, strict: bool = False) -> Reader:
        model, created = (self.store.model, self.store.created) if self.store is not None else (self.model.name, 0)
        forms = Forms(
            model=model, created=created, defaults=self.defaults, has_text=self.model.tokenizer is not None,
            input_format=self._input_format, strict=strict,
        )  # fmt: skip
        return Reader(self.model, forms, now=created or None)

    def _lines(self) -> Iterator[Line]:
        if not self.source.is_file():
            raise StorageError(f"{self.source} is not a file; the input is read several times, so it must be one")
        try:
            with open_input(self.source) as file:
                for line in read_lines(file):
                    failpoint("input.read")
                    yield line
        except READ_ERRORS as error:
            raise StorageError(f"{self.source} cannot be read: {error}") from error

    def _unanswered(self) -> Iterator[Line]:
        """Yield the lines for the scan: all that are not done."""
        for line in counted_lines(self._lines(), f"reading requests from {self.name}"):
            self.num_lines += 1
            if self.store is None or not self.store.is_done(line.number):
                yield line

    def _token_requests(self, serving: Serving, store: Store) -> Iterator[TokenRequest]:
        """Yield the engine's requests for the lines that the scan left, as the model pulls them."""
        for request, token_requests in self._reader().read(self._left_by_scan(store)):
            self.started = True
            if request.error is not None:  # a template may give another result than in the scan, or take too long only now
                serving.refuse(request, request.error)
            else:
                yield from serving.requests(request, token_requests)

    def _left_by_scan(self, store: Store) -> Iterator[Line]:
        """Yield the lines that the scan did not answer itself."""
        num_left = 0
        for line in self._lines():
            if num_left == len(self._pending):
                return
            if store.is_done(line.number):
                continue
            if line.digest != self._pending[num_left]:
                break
            num_left += 1
            yield line
        if num_left < len(self._pending):
            raise StorageError(f"{self.source} changed while it was being answered")
