"""`flexgen work`: joins a job that a run has begun with `--workers`, as one more worker, on any host that sees the job's folder."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexgen.base.quantities import counted
from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.cli.options import FLAGS, ProgressFlag, command, load, takes
from flexgen.cli.signals import StopSignals
from flexgen.cli.spelling import OF_JOBS
from flexgen.cli.terminal import showing
from flexgen.errors import JobError
from flexgen.jobs.interrupt import Stopped

if TYPE_CHECKING:
    from flexgen.jobs.serving import Judge
    from flexgen.jobs.workers.place import SharedFolder
    from flexgen.jobs.workers.task import SharedTask
    from flexgen.llm import LLM
    from flexgen.report.show import Display


def _own(name: str) -> Any:
    """Return a flag of the engine that is as in the job where it is not given."""
    panel, metavar, text = FLAGS[name]
    return typer.Option(metavar=metavar, help=f"{text.partition(' Default:')[0]} Default: as in the job.", rich_help_panel=panel)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkFlags:
    """The flags of `flexgen work`."""

    job: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The output of the run, or its folder where it writes to standard output.")]
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Where the model lies on this host. Default: as in the job.")] = None
    source: Annotated[
        Path | None, typer.Option("--input", metavar="FILE", help="Where the input lies on this host. Default: as in the job.")
    ] = None
    progress: ProgressFlag = "auto"
    child: Annotated[int, typer.Option("--child", hidden=True)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The options of the engine that may be another host's own, because they do not change answers."""

    device_mem: Annotated[str | None, _own("device_mem")] = None
    host_mem: Annotated[str | None, _own("host_mem")] = None
    disk: Annotated[str | None, _own("disk")] = None
    offload_dir: Annotated[str | None, _own("offload_dir")] = None
    device: Annotated[str | None, _own("device")] = None
    weights: Annotated[str | None, _own("weights")] = None
    kv: Annotated[str | None, _own("kv")] = None
    host_attention: Annotated[str | None, _own("host_attention")] = None
    max_num_seqs: Annotated[int | None, _own("max_num_seqs")] = None
    micro_batch_tokens: Annotated[int | None, _own("micro_batch_tokens")] = None
    prefill_tokens: Annotated[int | None, _own("prefill_tokens")] = None
    schedule: Annotated[str | None, _own("schedule")] = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@command
@takes("flags", WorkFlags)
@takes("placement", Placement)
def work(flags: WorkFlags, placement: Placement) -> int:
    """Answer lines of a job that was begun with `flexgen run --workers`.

    The model, its settings and the input are those of the job. Several
    workers divide the lines, on one host or on hosts that share the job's
    folder; each ends when no line is left.
    """
    from flexgen.jobs.folder import find_workers
    from flexgen.jobs.workers.place import current_run
    from flexgen.jobs.workers.task import SharedTask

    with showing(flags.progress, steps=flags.progress != "none") as display, StopSignals() as signals:
        if flags.child:
            _stop_with_run()
        try:
            folder = current_run(find_workers(flags.job))
            if folder is None:
                raise JobError(f"there is no job of {flags.job} that workers can join: begin it with `flexgen run ... --workers N`")
            task = SharedTask.read(folder)
            task = dataclasses.replace(
                task, options=dataclasses.replace(task.options, **placement.given), model=flags.model or task.model,
                source=str(flags.source or task.source),
            )  # fmt: skip
            num_lines = _answer(folder, task, flags, display, signals)
        except Stopped:
            display.close()
            return complain("stopped; what was answered is kept", signals.exit_code)
        display.message(f"{task.name}: no line is left; this worker has answered {counted(num_lines, 'line')}")
    return ExitCode.ALL_ANSWERED


def _answer(folder: SharedFolder, task: SharedTask, flags: WorkFlags, display: Display, signals: StopSignals) -> int:
    """Load the model, check that it is that of the job, and answer lines; return their number."""
    from flexgen.jobs.workers import worker

    with load(task.model, task.options, flags.progress, **task.keywords) as llm:
        llm.model.check()
        check_identity(llm, task, display.warning)
        with signals.deferred():
            return worker.work(
                llm.model, folder, task, child=flags.child, stop=signals.request, judge=judge_of(llm, task),
                on_progress=display.progress, report=llm.report,
            )  # fmt: skip


def check_identity(llm: LLM, task: SharedTask, warn: Callable[[str], None]) -> None:
    """Check that a model and what it was loaded with are those of a job.

    Raises:
        JobError: Something that changes answers differs.
    """
    from flexgen.jobs.identity import changes, identity_of, in_words

    settings = {"chat_template_kwargs": task.keywords["chat_template_kwargs"], "input_format": task.input_format}
    here = identity_of(llm.model, task.defaults, **settings)
    if found := changes(task.identity.answers, here.answers):
        raise JobError(f"{task.name} was begun with {in_words(found, OF_JOBS)} on this host: a worker needs what the job has")
    for change in changes(task.identity.versions, here.versions):
        warn(f"{task.name} was begun with {change.told(OF_JOBS)} on this host; answers may differ in their last digits")


def judge_of(llm: LLM, task: SharedTask) -> Judge | None:
    """Return what says which answers are errors of their lines; None where every answer counts."""
    if task.output_form is None:
        return None
    from flexgen.tables.answers import Answers
    from flexgen.tables.checks import matching
    from flexgen.tables.form import TableForm

    asked = TableForm.from_json(task.output_form).task
    return Answers(asked, matching(llm.model, asked)).fault


def _stop_with_run() -> None:
    """Stop this process, as if it were told to by SIGTERM, when the run that has started it closes standard input or dies."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="flexgen-run", daemon=True).start()
