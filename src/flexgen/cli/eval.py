"""`flexgen eval`: perplexity, LAMBADA, and lm-evaluation-harness with a model of ours."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexgen.base.steps import step
from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.cli.options import (
    Model,
    ProgressFlag,
    VerboseFlag,
    check_file,
    check_parent,
    engine_command,
    is_there,
    load,
    takes,
    write_asked,
)
from flexgen.cli.signals import StopSignals
from flexgen.cli.streams import check_stdout
from flexgen.cli.terminal import showing
from flexgen.errors import EngineError, FlexGenError, OptionError, OutOfMemoryError, RequestError, StorageError
from flexgen.jobs.interrupt import Stopped
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.evaluation.answers import Answers
    from flexgen.evaluation.encoding import Encoding
    from flexgen.llm import LLM
    from flexgen.report.show import Display

    Evaluation = Callable[[Display, LLM, Answers], None]  # what runs when the model is open

# Arguments that are not ours are lm-eval's.
LM_EVAL_CONTEXT = {"ignore_unknown_options": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonFlags:
    """The flags that all evaluations share, besides those of the engine."""

    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep requests and results here: the same command goes on from there, and scores nothing twice."),
    ] = None
    progress: ProgressFlag = "auto"
    verbose: VerboseFlag = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultFlags:
    """The flags of evaluations whose result is printed here."""

    as_json: Annotated[bool, typer.Option("--json", help="Print the result as a JSON object (docs/evaluation.md).")] = False
    metrics: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")] = None
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Take only so many texts of each file.")] = None


@engine_command
@takes("common", CommonFlags)
@takes("result", ResultFlags)
def perplexity(
    model: Model,
    files: Annotated[list[Path], typer.Argument(metavar="FILE ...", help='Texts, or JSON lines {"text": ...} in files named .jsonl.')],
    result: ResultFlags,
    common: CommonFlags,
    options: EngineOptions,
) -> int:
    """Perplexity of texts: per word, byte and token.

    A text is scored in windows of the model's context, as
    lm-evaluation-harness does it (loglikelihood_rolling).
    """
    for file in files:
        _check_file_to_read(file)

    def read() -> list[str]:
        from flexgen.evaluation.documents import read_documents

        return [text for file in files for text in read_documents(file, result.limit)]

    def figures(answers: Answers, encoding: Encoding, texts: Sequence[str]) -> Mapping[str, Any]:
        from flexgen.evaluation.perplexity import perplexity as measured

        return measured(answers, encoding, texts).to_json()

    return _evaluation(model, options, common, result, read, figures)


@engine_command
@takes("common", CommonFlags)
@takes("result", ResultFlags)
def lambada(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help='Passages, JSON lines {"text": ...}, such as lambada_test.jsonl.')],
    result: ResultFlags,
    common: CommonFlags,
    options: EngineOptions,
) -> int:
    """How often the last word of a passage is predicted.

    Accuracy and perplexity of the last words, as lm-evaluation-harness's
    lambada_openai has them.
    """
    _check_file_to_read(file)

    def read() -> list[str]:
        from flexgen.evaluation.lambada import read_passages

        return read_passages(file, result.limit)

    def figures(answers: Answers, encoding: Encoding, passages: Sequence[str]) -> Mapping[str, Any]:
        from flexgen.evaluation.lambada import lambada as measured

        return measured(answers, encoding, passages).to_json()

    return _evaluation(model, options, common, result, read, figures)


@engine_command
@takes("common", CommonFlags)
def lm_eval(
    model: Model,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="LM_EVAL_ARGUMENTS ...", help="Arguments of `lm-eval run`, after the options below; all of them after --."),
    ] = None,
    *,
    common: CommonFlags,
    options: EngineOptions,
) -> int:
    """Any task of lm-evaluation-harness (extra: eval).

    Its own arguments follow: --tasks, --num_fewshot, --limit, --include_path,
    --output_path, --log_samples, --apply_chat_template, --gen_kwargs and so on.
    """
    if model.startswith("-"):
        raise OptionError(f"the model comes first, {model} of lm-eval after it: flexgen eval lm-eval MODEL --tasks ...")

    def begin() -> Evaluation:
        step("loading lm-evaluation-harness")
        from flexgen.evaluation.lm_eval import FlexGenLM
        from flexgen.evaluation.lm_eval_command import evaluate, model_arguments, parse_arguments

        parsed = parse_arguments(arguments or [])
        own = model_arguments(parsed)

        def run(display: Display, llm: LLM, answers: Answers) -> None:
            with _log_of("lm_eval", display):
                display.close()  # lm-eval writes to the terminal itself until there is something to compute
                made = FlexGenLM(llm, state=answers.state, on_progress=answers.on_progress, stop=answers.stop, **own)
                with made as lm:
                    evaluate(lm, model, parsed)

        return run

    return _evaluate(model, options, common, begin)


def _evaluation(
    model: str,
    options: EngineOptions,
    common: CommonFlags,
    result: ResultFlags,
    read: Callable[[], Sequence[str]],
    figures: Callable[[Answers, Encoding, Sequence[str]], Mapping[str, Any]],
) -> int:
    """Run an evaluation of the texts that `read` returns, and print and write what `figures` returns.

    Raises:
        OptionError: Sparse attention was asked for, which texts that are scored do not meet.
    """
    if options.kept_share is not None:
        raise OptionError("sparse_attention changes how generated tokens attend, and this evaluation generates none: leave it out")
    check_file(result.metrics, "--metrics")
    check_stdout()
    found: dict[str, Any] = {}

    def begin() -> Evaluation:
        step("reading texts")
        texts = read()

        def run(display: Display, llm: LLM, answers: Answers) -> None:
            from flexgen.evaluation.encoding import Encoding

            found.update(figures(answers, Encoding(llm.get_tokenizer()), texts))
            display.close()

        return run

    code = _evaluate(model, options, common, begin)
    if code:
        return code
    whole = {"model": model, **found}
    print(json.dumps(whole, indent=2) if result.as_json else _table(found))
    if result.metrics is not None:
        return write_asked(result.metrics, "--metrics", json.dumps(whole, indent=2) + "\n")
    return code


def _evaluate(model: str, options: EngineOptions, common: CommonFlags, begin: Callable[[], Evaluation]) -> int:
    """Run the evaluation that `begin` returns, and return the exit code; it can be resumed whatever ends it.

    What `begin` refuses is refused before the model is opened.
    """
    check_parent(common.state, "--state")
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
        try:
            with load(model, options, common.progress) as llm:
                llm.model.check()
                answers = Answers(llm=llm, state=state.folder, on_progress=display.progress, stop=signals.request)
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
        except (StorageError, OutOfMemoryError, EngineError) as error:
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
            print(f"flexgen: the same command goes on with --state {state.folder}", file=sys.stderr)


@contextmanager
def _log_of(library: str, display: Display) -> Iterator[None]:
    """Show the log of a library as messages."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            display.message(self.format(record))

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


def _check_file_to_read(path: Path) -> None:
    if not is_there(path, "FILE", Path.is_file):
        kind = "this is a folder; give files" if path.is_dir() else "there is no such file"
        raise OptionError(f"FILE {path}: {kind}")


def _table(figures: Mapping[str, Any]) -> str:
    width = max(map(len, figures))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {_number(value)}" for name, value in figures.items())


def _number(value: object) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
