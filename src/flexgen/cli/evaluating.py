"""One evaluation, from its flags to an exit code: it can be resumed whatever ends it."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.cli.options import ProgressFlag, VerboseFlag, check_output_folder, load
from flexgen.cli.signals import StopSignals
from flexgen.cli.terminal import showing
from flexgen.errors import EngineError, FlexGenError, OutOfMemoryError, RequestError, StageError, StorageError
from flexgen.jobs.interrupt import Stopped
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.evaluation.answers import Answers
    from flexgen.llm import LLM
    from flexgen.report.show import Display

    Evaluation = Callable[[Display, LLM, Answers], None]  # what runs when the model is open


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonFlags:
    """The flags that all evaluations share, besides those of the engine."""

    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep requests and results here: the same command goes on from there, and scores nothing twice."),
    ] = None
    progress: ProgressFlag = "auto"
    verbose: VerboseFlag = False


def run_evaluation(model: str, options: EngineOptions, common: CommonFlags, begin: Callable[[], Evaluation]) -> int:
    """Run the evaluation that `begin` returns, and return the exit code; it can be resumed whatever ends it.

    What `begin` refuses is refused before the model is opened.
    """
    check_output_folder(common.state, "--state")
    with showing(common.progress, results=sys.stderr) as display, StopSignals() as signals:
        try:
            run = begin()
        except Stopped:
            display.close()
            return complain("stopped", signals.exit_code)
        return _resumable(model, options, common, run, display=display, signals=signals)


def _resumable(model: str, options: EngineOptions, common: CommonFlags, run: Evaluation, *, display: Display, signals: StopSignals) -> int:
    """Open the model and the state, run an evaluation, and return the exit code."""
    from flexgen.evaluation.answers import Answers

    with _state(common.state, display) as state:
        begun = False
        try:
            with load(model, options, common.progress) as llm:
                llm.model.check()
                answers = Answers(llm=llm, state=state.folder, on_progress=display.progress, stop=signals.request)
                begun = True
                with signals.deferred():
                    run(display, llm, answers)
                display.close()
                state.is_done = True
                _report(display, llm, verbose=common.verbose)
            return ExitCode.ALL_ANSWERED
        except Stopped:
            display.close()
            return complain("stopped; the same command goes on", signals.exit_code)
        except RequestError as error:
            display.close()
            return complain(error, ExitCode.SOME_FAILED)
        except (StorageError, OutOfMemoryError, StageError, EngineError) as error:
            if not begun:
                raise
            display.close()
            return complain(f"{error}\nthe same command goes on", ExitCode.RESUMABLE)


def _report(display: Display, llm: LLM, *, verbose: bool) -> None:
    """Show the report of the last job; there is none where everything was done before."""
    try:
        report = llm.report()
    except FlexGenError:
        return display.message("nothing was left to do")
    display.report(report)
    if verbose:
        display.details(report)
    return None


class _State:
    """The folder of an evaluation's jobs.

    Attributes:
        folder: The folder.
        is_done: Whether the evaluation is done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.is_done = folder, False


@contextmanager
def _state(named: Path | None, display: Display) -> Iterator[_State]:
    """Yield the folder that the user named, or a temporary one, which is kept where the evaluation is not done and can go on."""
    if named is not None:
        yield _State(named)
        return
    try:
        state = _State(Path(tempfile.mkdtemp(prefix="flexgen-eval-")))
    except OSError as error:
        raise StorageError(f"there is no place for the state ({error.strerror or error}): name a folder with --state") from error
    display.message(f"until it is done, the state is kept in {state.folder}")
    try:
        yield state
    finally:
        if state.is_done or not any(state.folder.iterdir()):
            shutil.rmtree(state.folder, ignore_errors=True)
        else:
            print(f"flexgen: the same command goes on with --state {shlex.quote(str(state.folder))}", file=sys.stderr)


@contextmanager
def log_of(library: str, display: Display) -> Iterator[None]:
    """Show the log of a library as messages."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            (display.warning if record.levelno >= logging.WARNING else display.message)(self.format(record))

    log, handler = logging.getLogger(library), Handler()
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
