"""One run of a job, from its flags to an exit code."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen.cli.defaults import bare_defaults, describe
from flexgen.cli.exit_codes import ExitCode
from flexgen.cli.options import load
from flexgen.cli.reading import Reading
from flexgen.cli.run_flags import RunFlags
from flexgen.cli.signals import StopSignals
from flexgen.errors import FlexGenError, StorageError
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.jobs.folder import JobFolder
    from flexgen.jobs.runner import Job
    from flexgen.jobs.store import Store
    from flexgen.llm import LLM
    from flexgen.plan.workload import Workload
    from flexgen.report.show import Display
    from flexgen.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCommand:
    """One `flexgen run`.

    Attributes:
        flags: The flags of `flexgen run` alone.
        reading: The flags that say how the input is read.
        options: The options of the engine.
        display: The display for progress and messages.
        signals: The signals that may stop the run.
    """

    flags: RunFlags
    reading: Reading
    options: EngineOptions
    display: Display
    signals: StopSignals

    def show_plan(self) -> int:
        """Check the input, show the plan, and return the exit code (`--dry-run`)."""
        from flexgen.jobs.mistaken import check_input
        from flexgen.jobs.runner import Job

        source = self.flags.source
        assert source is not None
        with self._load() as llm:
            check_input(source, input_format=self.reading.form)
            job = Job(llm, source, None, defaults=self._defaults(llm), input_format=self.reading.form)
            workload = self._prepare_lines(job, None)
            self.display.message(describe(job, workload))
            if len(workload):
                self.display.plan(llm.plan(workload))
        return ExitCode.SOME_FAILED if job.num_bad_lines else ExitCode.ALL_ANSWERED

    def answer(self) -> int:
        """Answer the lines that are not answered yet, and return the exit code.

        Raises:
            Stopped: A signal arrived before the model had any request.
            FlexGenError: The job was refused before the start.
        """
        if self.flags.source is None and self.flags.output is None and self.flags.state is None:
            return self._answer_in_passing()
        return self._answer_kept(self.flags.state)

    def _answer_in_passing(self) -> int:
        """Answer standard input on standard output: the job has no name, and is kept in a temporary folder until it is done."""
        try:
            state = Path(tempfile.mkdtemp(prefix="flexgen-job-"))
        except OSError as error:
            raise StorageError(f"there is no place for the job ({error.strerror or error}): name a folder with --state") from error
        self.display.message(f"until it is done, the job is kept in {state}")
        code: int | None = None
        try:
            code = self._answer_kept(state)
            return code
        except FlexGenError:  # the job was refused, so that nothing can be continued
            shutil.rmtree(state, ignore_errors=True)
            raise
        finally:
            if code in (ExitCode.ALL_ANSWERED, ExitCode.SOME_FAILED) or not (state / "input").exists():
                shutil.rmtree(state, ignore_errors=True)
            else:
                said = f"the job is kept in {state}: the same command goes on with --state {state} and nothing as its input (</dev/null)"
                print(f"flexgen: {said}", file=sys.stderr)

    def _answer_kept(self, state: Path | None) -> int:
        """Answer a job whose state is kept in a folder."""
        from flexgen.jobs.folder import JobFolder, job_paths

        paths = job_paths(None if self.flags.source_is_stream else self.flags.source, self.flags.output, state)
        with JobFolder(paths) as folder:
            try:
                with self._load() as llm:  # errors of the model are reported before the input is read
                    return self._answer_in(folder, llm)
            except FlexGenError:
                folder.undo()
                raise

    def _answer_in(self, folder: JobFolder, llm: LLM) -> ExitCode:
        from flexgen.cli.answering import Answering
        from flexgen.jobs.export import check_output
        from flexgen.jobs.identity import identity_of
        from flexgen.jobs.input_file import settle_input
        from flexgen.jobs.runner import Job
        from flexgen.jobs.store import Store

        source = self._prepare_folder(folder)
        with Store(folder) as store:
            check_output(folder.paths)
            defaults = self._defaults(llm)
            settings = {"chat_template_kwargs": self.reading.template_kwargs, "input_format": self.reading.form}
            store.begin(identity_of(llm, defaults, **settings), llm.name, accept_changes=self.flags.accept_changes)
            job = Job(
                llm, source, store, defaults=defaults, input_format=self.reading.form, checkpoint_seconds=self.flags.checkpoint_seconds,
                stop=self.signals.request,
            )  # fmt: skip
            workload = self._prepare_lines(job, store)
            self.display.message(describe(job, workload))
            if len(workload):
                self.display.plan(job.open(workload))
            folder.keep()
            job.source = settle_input(folder, source)
            with self.signals.deferred():
                answering = Answering(llm=llm, job=job, store=store, flags=self.flags, display=self.display, signals=self.signals)
                return answering.run(workload)

    def _prepare_folder(self, folder: JobFolder) -> Path:
        """Remove earlier runs for `--fresh`, copy a piped input, and return the file to read, checked to be a file of requests."""
        from flexgen.jobs.export import remove_job
        from flexgen.jobs.mistaken import check_input

        source, form = self.flags.source, self.reading.form
        if source is not None and not self.flags.source_is_stream:
            check_input(source, input_format=form)  # checked before `--fresh` removes anything
            if self.flags.fresh:
                remove_job(folder)
            return source
        if self.flags.fresh:
            remove_job(folder)
        kept = _keep_stream(folder, source)
        check_input(kept, input_format=form, name=str(source or "standard input"))
        return kept

    def _prepare_lines(self, job: Job, store: Store | None) -> Workload:
        """Check the input, and return the workload that is left to answer."""
        if self.flags.strict:
            job.check()
        job.match(accept_changes=self.flags.accept_changes)
        if self.flags.retry_errors and store is not None:
            store.forget_failed()
        if not self.flags.keep_going:
            job.check_head()
        return job.scan()

    def _load(self) -> LLM:
        llm = load(self.flags.model, self.options, self.flags.progress, **self.reading.keywords)
        llm.check_model()
        return llm

    def _defaults(self, llm: LLM) -> SamplingParams:
        return bare_defaults(llm, {"max_tokens": self.reading.max_tokens, **self.flags.sampling})


def _keep_stream(folder: JobFolder, pipe: Path | None) -> Path:
    from flexgen.jobs.input_file import keep_input

    if pipe is None:
        return keep_input(folder, sys.stdin.buffer)
    try:
        with pipe.open("rb") as stream:
            return keep_input(folder, stream)
    except OSError as error:
        raise StorageError(f"INPUT {pipe} cannot be read: {error.strerror}") from error
