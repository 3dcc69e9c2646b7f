"""One run of a job, from what was asked for to an exit code."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.cli.options import load, write_asked
from flexgen.cli.signals import StopSignals
from flexgen.errors import FlexGenError, OptionError, OutOfMemoryError, RequestError, StorageError
from flexgen.jobs.interrupt import Stopped
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.jobs.folder import JobFolder
    from flexgen.jobs.runner import Job
    from flexgen.jobs.store import Store
    from flexgen.llm import LLM
    from flexgen.plan.workload import Workload
    from flexgen.report.show import Display
    from flexgen.request import SamplingParams

_LONG_ANSWER = 256  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked for, besides the engine's options; `source` and `output` are None for `-`, and `source` may be a pipe.

    Attributes:
        defaults: how lines are sampled that do not say, as flags give it: fields of SamplingParams, None where they do not.
    """

    model: str
    options: EngineOptions
    source: Path | None
    output: Path | None
    state: Path | None
    tokenizer: str | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    input_format: str
    defaults: dict[str, Any]
    strict: bool
    fresh: bool
    retry_errors: bool
    accept_changes: bool
    keep_going: bool
    checkpoint_seconds: float
    metrics: Path | None
    progress: str
    verbose: bool

    @property
    def source_is_stream(self) -> bool:
        """Whether the input can be read once only: standard input, a named pipe, or a shell's `<(...)`."""
        return self.source is None or not self.source.is_file()


def show_plan(asked: Asked, display: Display) -> int:
    """What would be done (`--dry-run`)."""
    from flexgen.jobs.mistaken import check_input
    from flexgen.jobs.runner import Job

    assert asked.source is not None
    with _load(asked) as llm:
        check_input(asked.source, input_format=asked.input_format)
        job = Job(llm, asked.source, None, defaults=bare_defaults(llm, asked.defaults), input_format=asked.input_format)
        if asked.strict:
            job.check()
        if not asked.keep_going:
            job.check_head()
        workload = job.scan()
        display.message(_describe(job, workload))
        if len(workload):
            display.plan(llm.plan(workload))
    return ExitCode.SOME_FAILED if job.num_bad_lines else ExitCode.ALL_ANSWERED


def answer_job(asked: Asked, display: Display, signals: StopSignals) -> int:
    """Answer what is not answered yet.

    Raises:
        Stopped: by a signal, before the model had anything.
        FlexGenError: refused before the start.
    """
    if asked.source is None and asked.output is None and asked.state is None:
        return _answer_in_passing(asked, display, signals)
    return _answer_kept(asked, display, signals)


def _answer_in_passing(asked: Asked, display: Display, signals: StopSignals) -> int:
    """From standard input to standard output: a job that nobody can name, kept in a temporary folder until it is done."""
    try:
        state = Path(tempfile.mkdtemp(prefix="flexgen-job-"))
    except OSError as error:
        raise StorageError(f"there is no place for the job ({error.strerror or error}): name a folder with --state") from error
    display.message(f"until it is done, the job is kept in {state}")
    code: int | None = None
    try:
        code = _answer_kept(dataclasses.replace(asked, state=state), display, signals)
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


def _answer_kept(asked: Asked, display: Display, signals: StopSignals) -> int:
    """The same for a job that has its place."""
    from flexgen.jobs.folder import JobFolder, job_paths

    paths = job_paths(None if asked.source_is_stream else asked.source, asked.output, asked.state)
    with JobFolder(paths) as folder:
        try:
            with _load(asked) as llm:  # what is wrong with the model is told before the input is read
                return _answer_in(folder, llm, asked, display, signals)
        except FlexGenError:
            folder.undo()
            raise


def _answer_in(folder: JobFolder, llm: LLM, asked: Asked, display: Display, signals: StopSignals) -> ExitCode:
    from flexgen.jobs.export import check_output
    from flexgen.jobs.identity import identity_of
    from flexgen.jobs.runner import Job
    from flexgen.jobs.stdin import settle_input
    from flexgen.jobs.store import Store

    source = _prepare_folder(folder, asked)
    with Store(folder) as store:
        check_output(folder.paths)
        defaults = bare_defaults(llm, asked.defaults)
        settings = {"chat_template_kwargs": asked.chat_template_kwargs, "input_format": asked.input_format}
        store.begin(identity_of(llm, defaults, **settings), llm.files.name, accept_changes=asked.accept_changes)
        job = Job(
            llm, source, store, defaults=defaults, input_format=asked.input_format, checkpoint_seconds=asked.checkpoint_seconds,
            stop=signals.request,
        )  # fmt: skip
        workload = _prepare_lines(job, store, asked)
        display.message(_describe(job, workload))
        if len(workload):
            display.plan(job.open(workload))
        folder.keep()
        job.source = settle_input(folder, source)
        with signals.deferred():
            return _answer(job, store, workload, asked, display, signals)


def _prepare_folder(folder: JobFolder, asked: Asked) -> Path:
    """What `--fresh` and a piped input ask for; the file to read, which looks like one of requests."""
    from flexgen.jobs.export import remove_job
    from flexgen.jobs.mistaken import check_input

    if asked.source is not None and not asked.source_is_stream:
        check_input(asked.source, input_format=asked.input_format)  # before anything is removed for it
        source = asked.source
        if asked.fresh:
            remove_job(folder)
    else:
        if asked.fresh:
            remove_job(folder)
        source = _keep_stream(folder, asked.source)
        check_input(source, input_format=asked.input_format, name=str(asked.source or "standard input"))
    return source


def _keep_stream(folder: JobFolder, pipe: Path | None) -> Path:
    from flexgen.jobs.stdin import keep_input

    if pipe is None:
        return keep_input(folder, sys.stdin.buffer)
    try:
        with pipe.open("rb") as stream:
            return keep_input(folder, stream)
    except OSError as error:
        raise StorageError(f"INPUT {pipe} cannot be read: {error.strerror}") from error


def _prepare_lines(job: Job, store: Store, asked: Asked) -> Workload:
    """What is left to answer, once the input has been found to be right."""
    if asked.strict:
        job.check()
    job.match(accept_changes=asked.accept_changes)
    if asked.retry_errors:
        store.forget_failed()
    if not asked.keep_going:
        job.check_head()
    return job.scan()


def _load(asked: Asked) -> LLM:
    templates = {"chat_template": asked.chat_template, "chat_template_kwargs": asked.chat_template_kwargs}
    llm = load(asked.model, asked.options, asked.progress, tokenizer=asked.tokenizer, **templates)
    llm.check_model()
    return llm


def bare_defaults(llm: LLM, given: Mapping[str, Any]) -> SamplingParams:
    """What lines get where they do not say: what flags give, or vLLM's defaults under generation_config.json, but up to the context.

    Raises:
        OptionError: a flag's value cannot be.
    """
    given = {name: value for name, value in given.items() if value is not None}
    limit = llm.files.generation_config.get("max_new_tokens")
    try:
        return dataclasses.replace(llm.get_default_sampling_params(), **{"max_tokens": limit, **given})
    except RequestError as error:
        if error.param not in given:
            raise
        raise OptionError(f"--{error.param.replace('_', '-')} {given[error.param]}: {error}") from error


def _answer(job: Job, store: Store, workload: Workload, asked: Asked, display: Display, signals: StopSignals) -> ExitCode:
    """Have the lines answered, and make the output from what there is then."""
    reason: object = None
    try:
        store.start_run(job.num_lines)
        _run(job, workload, display)
        code = ExitCode.SOME_FAILED if store.num_failed else ExitCode.ALL_ANSWERED
    except Stopped:
        code, reason = signals.exit_code, f"stopped by {signals.name}"
    except FlexGenError as error:
        code, reason = ExitCode.RESUMABLE if job.started else ExitCode.REFUSED, error
    display.close()
    try:
        _write_output(store, finished=reason is None)
        store.end_run(str(reason or "finished"))
    except FlexGenError as error:
        error = f"{error}{_how_to_get(store)}"
        code, reason = (ExitCode.RESUMABLE, error) if reason is None else (code, f"{reason}; then {error}")
    if reason is not None:
        done = store.num_answered + store.num_failed
        return complain(f"{reason}\n{done:,} of {job.num_lines:,} lines are done; the same command goes on from there", code)
    _conclude(job, store, workload, asked, display)
    return code


def _run(job: Job, workload: Workload, display: Display) -> None:
    """Half as many sequences at once whenever memory runs out."""
    while True:
        try:
            return job.run(workload, on_progress=display.progress)
        except OutOfMemoryError as error:
            num_seqs = job.model.shrink()
            if num_seqs is None:
                raise
            display.message(f"{error}\ngoing on with at most {num_seqs:,} sequences at once")
            workload = job.scan()


def _write_output(store: Store, *, finished: bool) -> None:
    """A file shows what there is; who reads standard output gets all or nothing."""
    from flexgen.jobs.export import export, export_to_stream

    if store.paths.output is not None:
        export(store.paths, store.paths.output)
    elif finished:
        export_to_stream(store.paths, sys.stdout.buffer)


def _how_to_get(store: Store) -> str:
    """Where answers are that could not be delivered."""
    if store.paths.output is not None:
        return ""
    return f"; the answers are kept: `flexgen export {store.paths.folder} --to FILE` writes them"


def _conclude(job: Job, store: Store, workload: Workload, asked: Asked, display: Display) -> None:
    from flexgen.report.progress import SCHEMA_VERSION

    metrics: dict[str, object] = {"schema_version": SCHEMA_VERSION}  # nothing else of a run that found nothing to do
    if len(workload):
        report = job.model.report()
        if job.num_resumed:
            display.message(
                f"{job.num_resumed:,} answers went on after {job.tokens_kept:,} tokens that earlier runs had generated; "
                f"{report.recomputed_tokens:,} tokens were computed again"
            )
        display.report(report, _done(job, store))
        if asked.verbose:
            display.details(report)
        metrics = dataclasses.asdict(report)
    else:
        what = "nothing was left to do" if store.num_found == job.num_lines else "done"  # all that was new failed as it was read
        display.message(f"{what}: {_done(job, store)}")
    if asked.metrics is not None:  # if that fails, the exit code still tells of the lines
        write_asked(asked.metrics, "--metrics", json.dumps({**metrics, "job": _figures(job, store)}, indent=2) + "\n")


def _done(job: Job, store: Store) -> str:
    """Where what is, and what may be done about errors."""
    before = f" ({store.num_found:,} done before)" if store.num_found else ""
    again = "; the same command with --retry-errors tries those again" if store.num_failed else ""
    lines = f"{store.num_answered:,} of {job.num_lines:,} lines answered, {store.num_failed:,} with errors"
    return f"{store.paths.name if store.paths.output is not None else 'standard output'}: {lines}{before}{again}"


def _figures(job: Job, store: Store) -> dict[str, int]:
    """The job's part of the metrics."""
    lines = {"lines": job.num_lines, "answered": store.num_answered, "failed": store.num_failed, "done_before": store.num_found}
    return lines | {"answers_resumed": job.num_resumed, "tokens_kept": job.tokens_kept}


def _unusual(defaults: SamplingParams) -> list[str]:
    """Defaults that are not vLLM's, besides those that are always told."""
    from flexgen.request import SamplingParams

    told = ("temperature", "top_p", "top_k", "max_tokens")
    usual = dataclasses.asdict(SamplingParams())
    return [f"{name} {value}" for name, value in dataclasses.asdict(defaults).items() if name not in told and value != usual[name]]


def _describe(job: Job, workload: Workload) -> str:
    """What is about to be answered, and with which defaults."""
    from flexgen.api.openai import COMPLETIONS_MAX_TOKENS

    found = job.store.num_found if job.store is not None else 0
    bare = job.defaults
    limit = f"{bare.max_tokens:,} tokens" if bare.max_tokens is not None else f"up to the context of {job.model.max_model_len:,}"
    sampling = "greedy" if bare.temperature == 0 else f"temperature {bare.temperature:g}, top_p {bare.top_p:g}, top_k {bare.top_k}"
    sampling = ", ".join([sampling, *_unusual(bare)])
    bad = f"{job.num_bad_lines:,} of them bad" + (f" ({job.first_bad})" if job.first_bad else "")
    told = (
        f"{job.source}: {job.num_lines:,} lines, {bad}, {found:,} done before, {len(workload):,} to answer: "
        f"{workload.prompt_tokens:,} prompt and at most {workload.output_tokens:,} output tokens\n"
        f"defaults of lines that leave them out: {sampling}, {limit} (/v1/completions: {COMPLETIONS_MAX_TOKENS} tokens)"
    )
    return "\n".join([told, *job.remarks.lines(), *_warn_of_length(job, workload)])


def _warn_of_length(job: Job, workload: Workload) -> list[str]:
    """Nobody may have meant answers of hundreds or thousands of tokens, or random ones."""
    longest = max(workload.output_lens, default=0)
    if not job.remarks.num_unbounded or longest < _LONG_ANSWER:
        return []
    return [
        f"warning: {job.remarks.num_unbounded:,} lines set no max_tokens, and there is no --max-tokens: "
        f"their answers may have up to {longest:,} tokens, sampled at temperature {job.defaults.temperature:g} where a line sets none; "
        "--max-tokens N bounds them, and --temperature T changes the default (0 is greedy)"
    ]
