"""One run of a job, from its flags to an exit code."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexgen.base.quantities import counted
from flexgen.cli.defaults import describe, warnings_about
from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.cli.options import check_apart, follow_if_told, load
from flexgen.cli.run_flags import RunFlags
from flexgen.cli.signals import StopSignals
from flexgen.cli.spelling import OF_JOBS
from flexgen.cli.terminal import showing
from flexgen.cli.worker_places import check_crew
from flexgen.errors import FlexGenError, OptionError, StorageError
from flexgen.jobs.interrupt import Stopped
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.hub.model_files import ModelFiles
    from flexgen.jobs.folder import JobFolder
    from flexgen.jobs.runner import Job
    from flexgen.jobs.serving import Judge
    from flexgen.jobs.store import Store
    from flexgen.jobs.workers.task import SharedTask
    from flexgen.llm import LLM
    from flexgen.plan.workload import Workload
    from flexgen.report.show import Display
    from flexgen.request import SamplingParams


class JobLines(Protocol):
    """The lines that a command has answered."""

    @property
    def name(self) -> str | None:
        """The name of the input in messages; None for the path of the file with the lines."""
        ...

    @property
    def form(self) -> str:
        """The format of the lines, see `Forms`."""
        ...

    @property
    def keywords(self) -> Mapping[str, Any]:
        """The keywords of `LLM` that are not options of the engine."""
        ...

    @property
    def output_form(self) -> str | None:
        """What `export` needs to make the output (see `Store.keep_output_form`); None where it is a file of records."""
        ...

    def defaults(self, llm: LLM) -> SamplingParams:
        """Return the sampling parameters of lines that set none."""
        ...

    def judge(self, llm: LLM) -> Judge | None:
        """Return what says which answers are errors of their lines; None where every answer counts."""
        ...

    def to_measure(self, llm: LLM, show: Callable[[str], None]) -> AbstractContextManager[Path]:
        """Yield the file with the lines for `--dry-run`, after showing what the user wants to see of them."""
        ...

    def to_answer(self, folder: JobFolder, llm: LLM) -> Path:
        """Return the file with the lines, which may lie in the job's folder, and remove earlier runs for `--fresh`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCommand:
    """One run of a job by a command.

    Attributes:
        flags: The flags of the command.
        lines: The lines to answer.
        options: The options of the engine.
        display: The display for progress and messages.
        signals: The signals that may stop the run.
    """

    flags: RunFlags
    lines: JobLines
    options: EngineOptions
    display: Display
    signals: StopSignals

    def show_plan(self) -> int:
        """Check the input, show the plan, and return the exit code (`--dry-run`)."""
        from flexgen.jobs.runner import Job

        with self._load(check=lambda files: None) as llm, self.lines.to_measure(llm, self.display.message) as source:
            job = Job(llm.model, source, None, defaults=self.lines.defaults(llm), input_format=self.lines.form, name=self.lines.name)
            workload = self._prepare_lines(job, None)
            self._describe(job, workload)
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
                how = f"the same command goes on with --state {shlex.quote(str(state))} and nothing as its input (</dev/null)"
                print(f"flexgen: the job is kept in {state}: {how}", file=sys.stderr)

    def _answer_kept(self, state: Path | None) -> int:
        """Answer a job whose state is kept in a folder."""
        from flexgen.jobs.begin import check_begun
        from flexgen.jobs.folder import JobFolder, job_paths

        def check(files: ModelFiles) -> None:
            if not self.flags.fresh and not self.flags.accept_changes:
                check_begun(paths, files, self.options)

        paths = job_paths(None if self.flags.source_is_stream else self.flags.source, self.flags.output, state, OF_JOBS)
        with JobFolder(paths) as folder:
            try:
                with self._load(check) as llm:  # errors of the model are reported before the input is read
                    return self._answer_in(folder, llm)
            except (FlexGenError, OSError):
                folder.undo()
                raise

    def _answer_in(self, folder: JobFolder, llm: LLM) -> ExitCode:
        from flexgen.cli.answering import Answering
        from flexgen.cli.shared_answering import SharedAnswering, divide, settle_formats
        from flexgen.jobs.begin import begin_job
        from flexgen.jobs.export import check_output
        from flexgen.jobs.input_file import settle_input
        from flexgen.jobs.runner import Job
        from flexgen.jobs.store import Store
        from flexgen.jobs.workers.collect import take_in

        source = self.lines.to_answer(folder, llm)
        with Store(folder) as store:
            take_in(store)
            check_output(folder.paths)
            defaults = self.lines.defaults(llm)
            settings = {"chat_template_kwargs": self.lines.keywords["chat_template_kwargs"], "input_format": self.lines.form}
            resumed = begin_job(store, llm.model, defaults, accept_changes=self.flags.accept_changes, **settings)
            if resumed:
                self.display.message(f"{folder.paths.name} goes on as it was begun: {resumed}")
            job = Job(
                llm.model, source, store, defaults=defaults, input_format=self.lines.form, name=self.lines.name,
                checkpoint_seconds=self.flags.checkpoint_seconds, stop=self.signals.request, judge=self.lines.judge(llm),
            )  # fmt: skip
            workload = self._prepare_lines(job, store)
            self._describe(job, workload)
            crew, places = self.flags.crew, []
            if crew is not None and len(workload):
                settle_formats(llm, store, workload, max(crew.count, 1))
                places = divide(crew, self.options)
            elif len(workload):
                self.display.plan(job.open(workload))
            folder.keep()
            job.source = settle_input(folder, source)
            if self.lines.output_form is not None:
                store.keep_output_form(self.lines.output_form)
            with self.signals.deferred():
                parts = {"llm": llm, "job": job, "store": store, "flags": self.flags, "display": self.display, "signals": self.signals}
                if crew is None:
                    return Answering(**parts).run(workload)
                task = self._shared_task(llm, store, job.source, defaults, settings)
                here = f"starting {counted(len(places), 'worker')}" if places else "waiting for workers"
                self.display.message(f"{here}; `flexgen work {folder.paths.output}` adds one, on any host that sees the folder")
                return SharedAnswering(**parts, task=task, places=places).run(workload)

    def _shared_task(self, llm: LLM, store: Store, source: Path, defaults: SamplingParams, settings: Mapping[str, Any]) -> SharedTask:
        """Return what the workers of the run have to know."""
        from flexgen.cli.shared_answering import shared_task
        from flexgen.jobs.identity import identity_of

        assert self.flags.crew is not None
        return shared_task(
            llm, store, model=self.flags.model, source=source, keywords=self.lines.keywords, defaults=defaults,
            input_format=self.lines.form, output_form=self.lines.output_form, identity=identity_of(llm.model, defaults, **settings),
            num_workers=max(self.flags.crew.count, 1), checkpoint_seconds=self.flags.checkpoint_seconds,
            lease_seconds=self.flags.lease_seconds, attempts=self.flags.attempts, reports=self.flags.metrics is not None,
        )  # fmt: skip

    def _describe(self, job: Job, workload: Workload) -> None:
        """Show what is about to be answered, and what may be unintended about it."""
        self.display.message(describe(job, workload))
        for warning in warnings_about(job, workload):
            self.display.warning(warning)

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

    def _load(self, check: Callable[[ModelFiles], None]) -> LLM:
        llm = load(self.flags.model, self.options, self.flags.progress, check=check, **self.lines.keywords)
        llm.model.check()
        return llm


def run_job(flags: RunFlags, open_lines: Callable[[], JobLines], options: EngineOptions) -> int:
    """Answer the lines of a job, or show its plan for `--dry-run`, and return the exit code.

    Args:
        flags: The flags of the command.
        open_lines: A function that returns the lines to answer; it may take a while, and is called when steps are shown.
        options: The options of the engine.

    Raises:
        OptionError: The trace has nothing to show, or its file is another one of the job; or several workers cannot honour the options.
    """
    if flags.dry_run and flags.crew is not None:
        raise OptionError("--dry-run plans for one process: leave out --workers")
    if flags.crew is not None:
        if options.stages is not None and options.stages > 1:
            raise OptionError("--workers run the whole model each, and --stages divide it: leave out one of them")
        check_crew(flags.crew, options)
    follow_if_told(flags.model, options)
    if flags.dry_run and options.trace is not None:
        raise OptionError("--dry-run has nothing to trace: leave out --trace")
    check_apart(options.trace, flags.source, flags.output, flags.metrics)
    messages = sys.stdout if flags.dry_run else sys.stderr  # a dry run's plan is its result
    results = None if flags.output is not None else sys.stderr
    shown = "plain" if flags.dry_run and flags.progress == "none" else flags.progress
    with showing(shown, messages=messages, results=results, steps=flags.progress != "none") as display, StopSignals() as signals:
        command = JobCommand(flags=flags, lines=open_lines(), options=options, display=display, signals=signals)
        try:
            return command.show_plan() if flags.dry_run else command.answer()
        except Stopped:
            display.close()  # because the line of the last step would remain otherwise
            return complain("stopped", signals.exit_code)
