"""One run of a job, from what was asked for to an exit code."""

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
        flags: What was asked for.
        reading: How the input is read.
        options: Where and how the model runs.
        display: Shows how it goes.
        signals: May stop it.
    """

    flags: RunFlags
    reading: Reading
    options: EngineOptions
    display: Display
    signals: StopSignals

    def show_plan(self) -> int:
        """Show what would be done (`--dry-run`)."""
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
        """Answer what is not answered yet.

        Raises:
            Stopped: By a signal, before the model had anything.
            FlexGenError: Refused before the start.
        """
        if self.flags.source is None and self.flags.output is None and self.flags.state is None:
            return self._answer_in_passing()
        return self._answer_kept(self.flags.state)

    def _answer_in_passing(self) -> int:
        """From standard input to standard output: a job that nobody can name, kept in a temporary folder until it is done."""
        try:
            state = Path(tempfile.mkdtemp(prefix="flexgen-job-"))
        except OSError as error:
            raise StorageError(f"there is no place for the job ({error.strerror or error}): name a folder with --state") from error
        self.display.message(f"until it is done, the job is kept in {state}")
        code: int | None = None
        try:
            code = self._answer_kept(state)
            return code
        except FlexGenError:  # it was refused: nothing is there that could go on
            shutil.rmtree(state, ignore_errors=True)
            raise
        finally:
            if code in (ExitCode.ALL_ANSWERED, ExitCode.SOME_FAILED) or not (state / "input").exists():
                shutil.rmtree(state, ignore_errors=True)
            else:
                said = f"the job is kept in {state}: the same command goes on with --state {state} and nothing as its input (</dev/null)"
                print(f"flexgen: {said}", file=sys.stderr)

    def _answer_kept(self, state: Path | None) -> int:
        """Answer a job that has a place of its own."""
        from flexgen.jobs.folder import JobFolder, job_paths

        paths = job_paths(None if self.flags.source_is_stream else self.flags.source, self.flags.output, state)
        with JobFolder(paths) as folder:
            try:
                with self._load() as llm:  # what is wrong with the model is reported before the input is read
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
        """Do what `--fresh` and a piped input ask for; return the file to read, which looks like one of requests."""
        from flexgen.jobs.export import remove_job
        from flexgen.jobs.mistaken import check_input

        source, form = self.flags.source, self.reading.form
        if source is not None and not self.flags.source_is_stream:
            check_input(source, input_format=form)  # before anything is removed for it
            if self.flags.fresh:
                remove_job(folder)
            return source
        if self.flags.fresh:
            remove_job(folder)
        kept = _keep_stream(folder, source)
        check_input(kept, input_format=form, name=str(source or "standard input"))
        return kept

    def _prepare_lines(self, job: Job, store: Store | None) -> Workload:
        """What is left to answer, once the input has been found to be right."""
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
