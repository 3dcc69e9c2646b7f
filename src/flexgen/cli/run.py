"""`flexgen run`: a file of requests in, a file of answers out."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexgen.cli.exit_codes import ExitCode
from flexgen.cli.options import Model, ProgressFlag, check_parent, engine_command, load
from flexgen.cli.signals import StopSignals
from flexgen.cli.terminal import complain, showing
from flexgen.errors import FlexGenError, OptionError
from flexgen.jobs.stopping import Stopped
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.display import Display
    from flexgen.jobs.folder import JobFolder
    from flexgen.jobs.runner import Job
    from flexgen.jobs.store import Store
    from flexgen.llm import LLM
    from flexgen.plan.workload import Workload
    from flexgen.request import SamplingParams

_AGAIN = "The job and its earlier runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What was asked for, besides the engine's options; `source` and `output` are None for `-`."""

    model: str
    options: EngineOptions
    source: Path | None
    output: Path | None
    state: Path | None
    tokenizer: str | None
    max_tokens: int | None
    strict: bool
    fresh: bool
    retry_errors: bool
    accept_changes: bool
    checkpoint_seconds: float
    metrics: Path | None
    progress: str


@engine_command
def run(
    model: Model,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", exists=True, dir_okay=False, allow_dash=True, help="Requests, one JSON object per line; - is stdin."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUTPUT", help="Answers, in the order of the input; - is stdout, when all is done.")
    ],
    options: EngineOptions,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Longest answer of bare lines that do not say. Default: up to the context."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="NAME", help="Another tokenizer than the model's: a folder or hub id.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the input, show the plan, and stop.")] = False,
    metrics: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON (docs/metrics.md).")] = None,
    progress: ProgressFlag = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse an input with bad lines or repeated ids.", rich_help_panel=_AGAIN)
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the job is kept. Default: OUTPUT.flexgen, or INPUT.flexgen for -o -.", rich_help_panel=_AGAIN
        ),
    ] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Answer lines again that ended in an error.", rich_help_panel=_AGAIN)
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier runs and remove what they wrote.", rich_help_panel=_AGAIN)] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Go on though the model, its settings or lines changed.", rich_help_panel=_AGAIN),
    ] = False,
    checkpoint_seconds: Annotated[
        float, typer.Option(metavar="S", min=0, help="Store the tokens of answers in progress this often.", rich_help_panel=_AGAIN)
    ] = 30.0,
) -> int:
    """Answer a file of requests.

    A line is {"prompt": text or token ids, "id", and sampling parameters as
    in vLLM}, or an OpenAI batch line. What is answered is kept as it is
    done: the same command again goes on where it stopped, and `flexgen
    status OUTPUT` tells how far it is.
    """
    asked = _Run(
        model=model, options=options, source=_named(source), output=_named(output), state=state, tokenizer=tokenizer,
        max_tokens=max_tokens, strict=strict, fresh=fresh, retry_errors=retry_errors, accept_changes=accept_changes,
        checkpoint_seconds=checkpoint_seconds, metrics=metrics, progress=progress,
    )  # fmt: skip
    _check(asked, dry_run)
    messages = sys.stdout if dry_run else sys.stderr  # a dry run's plan is its result
    results = sys.stdout if asked.output is not None else sys.stderr
    with showing(progress, messages=messages, results=results) as display, StopSignals() as signals:
        try:
            return _show_plan(asked, display) if dry_run else _run(asked, display, signals)
        except Stopped:
            return complain("stopped", signals.exit_code)


def _named(path: Path) -> Path | None:
    return None if path == Path("-") else path


def _check(asked: _Run, dry_run: bool) -> None:
    """Raises OptionError for paths and flags that cannot be meant."""
    check_parent(asked.output, "--output")
    check_parent(asked.metrics, "--metrics")
    check_parent(asked.state, "--state")
    used = [path.resolve() for path in (asked.source, asked.output) if path is not None]
    if len(set(used)) < len(used):
        raise OptionError(f"{asked.output} is the input; give another output")
    if asked.metrics is not None and asked.metrics.resolve() in used:
        raise OptionError(f"--metrics {asked.metrics} is the input or the output; give another file")
    if asked.output is None and asked.progress == "json":
        raise OptionError("--progress json writes to standard output, and so does -o -: give an output file")
    again = {"--fresh": asked.fresh, "--retry-errors": asked.retry_errors, "--accept-changes": asked.accept_changes}
    given = [flag for flag, value in again.items() if value]
    if asked.fresh and len(given) > 1:
        raise OptionError(f"--fresh forgets earlier runs, which leaves {given[1]} nothing to do")
    if dry_run and (given or asked.source is None):
        raise OptionError(f"--dry-run changes nothing and keeps nothing: leave out {given[0] if given else '- and give a file'}")


def _show_plan(asked: _Run, display: Display) -> int:
    from flexgen.jobs.runner import Job

    assert asked.source is not None
    with load(asked.model, asked.options, asked.progress, tokenizer=asked.tokenizer) as llm:
        job = Job(llm, asked.source, None, defaults=_bare_defaults(llm, asked.max_tokens))
        if asked.strict:
            job.check()
        workload = job.scan()
        display.message(_describe(job, workload))
        if len(workload):
            display.plan(llm.plan(workload))
    return ExitCode.SOME_FAILED if job.num_bad_lines else ExitCode.ALL_ANSWERED


def _run(asked: _Run, display: Display, signals: StopSignals) -> int:
    from flexgen.jobs.export import check_output
    from flexgen.jobs.folder import JobFolder, job_paths
    from flexgen.jobs.identity import identity_of
    from flexgen.jobs.runner import Job
    from flexgen.jobs.store import Store

    with JobFolder(job_paths(asked.source, asked.output, asked.state)) as folder:
        source = _prepare_folder(folder, asked)
        with load(asked.model, asked.options, asked.progress, tokenizer=asked.tokenizer) as llm, Store(folder) as store:
            check_output(folder.paths)
            defaults = _bare_defaults(llm, asked.max_tokens)
            store.begin(identity_of(llm, defaults), llm.files.name, accept_changes=asked.accept_changes)
            seconds = asked.checkpoint_seconds
            job = Job(llm, source, store, defaults=defaults, checkpoint_seconds=seconds, stop=signals.request)
            workload = _prepare_lines(job, store, asked)
            display.message(_describe(job, workload))
            if len(workload):
                display.plan(llm.open(workload))
            with signals.deferred():
                return _answer(job, store, workload, asked, display, signals)


def _prepare_folder(folder: JobFolder, asked: _Run) -> Path:
    """What `--fresh` and a piped input ask for; the file to read."""
    from flexgen.jobs.export import remove_job
    from flexgen.jobs.stdin import keep_input

    if asked.fresh:
        remove_job(folder)
    if asked.source is not None:
        return asked.source
    return keep_input(folder, sys.stdin.buffer, accept_changes=asked.accept_changes)


def _prepare_lines(job: Job, store: Store, asked: _Run) -> Workload:
    """What is left to answer, once the input has been found to be right."""
    job.match(accept_changes=asked.accept_changes)
    if asked.strict:
        job.check()
    if asked.retry_errors:
        store.forget_failed()
    return job.scan()


def _bare_defaults(llm: LLM, max_tokens: int | None) -> SamplingParams:
    """What bare lines get where they do not say: vLLM's defaults under generation_config.json, but up to the context."""
    defaults = llm.get_default_sampling_params()
    limit = max_tokens if max_tokens is not None else llm.files.generation_config.get("max_new_tokens")
    return dataclasses.replace(defaults, max_tokens=limit)


def _answer(job: Job, store: Store, workload: Workload, asked: _Run, display: Display, signals: StopSignals) -> ExitCode:
    """Have the lines answered, and make the output from what there is then."""
    reason: object = None
    try:
        store.start_run(job.num_lines)
        job.run(workload, on_progress=display.progress)
        code = ExitCode.SOME_FAILED if store.num_failed else ExitCode.ALL_ANSWERED
    except Stopped:
        code, reason = signals.exit_code, f"stopped by {signals.name}"
    except FlexGenError as error:
        code, reason = ExitCode.RESUMABLE if job.started else ExitCode.REFUSED, error
    display.close()
    try:
        store.end_run(str(reason or "finished"))
        _write_output(store, finished=reason is None)
    except FlexGenError as error:
        code, reason = (ExitCode.RESUMABLE, error) if reason is None else (code, f"{reason}; then {error}")
    if reason is not None:
        done = store.num_answered + store.num_failed
        return complain(f"{reason}\n{done:,} of {job.num_lines:,} lines are done; the same command goes on from there", code)
    _conclude(job, store, workload, asked, display)
    return code


def _write_output(store: Store, *, finished: bool) -> None:
    """A file shows what there is; who reads standard output gets all or nothing."""
    from flexgen.jobs.export import export, export_to_stream

    if store.paths.output is not None:
        export(store.paths, store.paths.output)
    elif finished:
        export_to_stream(store.paths, sys.stdout.buffer)


def _conclude(job: Job, store: Store, workload: Workload, asked: _Run, display: Display) -> None:
    if len(workload):
        report = job.llm.report()
        if job.num_resumed:
            display.message(
                f"{job.num_resumed:,} answers went on after {job.tokens_kept:,} tokens that earlier runs had generated; "
                f"{report.recomputed_tokens:,} tokens were computed again"
            )
        display.report(report)
        if asked.metrics is not None:
            _write_metrics(asked.metrics, {**dataclasses.asdict(report), "job": _figures(job, store)})
    display.message(f"{store.paths.name}: {store.num_answered:,} lines answered, {store.num_failed:,} with errors")


def _figures(job: Job, store: Store) -> dict[str, int]:
    """The job's part of the metrics."""
    lines = {"lines": job.num_lines, "answered": store.num_answered, "failed": store.num_failed, "done_before": store.num_found}
    return lines | {"answers_resumed": job.num_resumed, "tokens_kept": job.tokens_kept}


def _write_metrics(path: Path, metrics: dict[str, object]) -> None:
    path.write_text(json.dumps(metrics, indent=2) + "\n")


def _unusual(defaults: SamplingParams) -> list[str]:
    """Defaults that are not vLLM's, besides those that are always told."""
    from flexgen.request import SamplingParams

    told = ("temperature", "top_p", "top_k", "max_tokens")
    usual = dataclasses.asdict(SamplingParams())
    return [f"{name} {value}" for name, value in dataclasses.asdict(defaults).items() if name not in told and value != usual[name]]


def _describe(job: Job, workload: Workload) -> str:
    """What is about to be answered, and with which defaults."""
    found = job.store.num_found if job.store is not None else 0
    bare = job.defaults
    limit = f"{bare.max_tokens:,} tokens" if bare.max_tokens is not None else f"up to the context of {job.llm.max_model_len:,}"
    sampling = "greedy" if bare.temperature == 0 else f"temperature {bare.temperature:g}, top_p {bare.top_p:g}, top_k {bare.top_k}"
    sampling = ", ".join([sampling, *_unusual(bare)])
    return (
        f"{job.source}: {job.num_lines:,} lines, {job.num_bad_lines:,} of them bad, {found:,} done before, {len(workload):,} to answer: "
        f"{workload.prompt_tokens:,} prompt and at most {workload.output_tokens:,} output tokens\n"
        f"where lines do not say: {sampling}, {limit}; /v1/completions: temperature 1, 16 tokens"
    )
