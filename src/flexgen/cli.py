"""The command `flexgen`: flags to values, one call, print.  The only module that touches the terminal, and light to import:
what is heavy (torch, transformers) is imported by the command that needs it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexgen.errors import FlexGenError, OptionError
from flexgen.options import DEVICES, DTYPES, LOAD_FORMATS, SCHEDULES, EngineOptions

if TYPE_CHECKING:
    from flexgen.display import Display
    from flexgen.jobs.runner import Job
    from flexgen.jobs.store import Store
    from flexgen.llm import LLM
    from flexgen.plan.workload import Workload
    from flexgen.request import SamplingParams

ALL_ANSWERED, SOME_FAILED, USAGE, REFUSED, BUG, RESUMABLE, INTERRUPTED = 0, 1, 2, 3, 70, 75, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Batch inference for language models that are larger than the memory of the device that runs them.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure this machine's throughput with a model.")
app.add_typer(bench, name="bench")

# Every field of EngineOptions that has a flag: panel, metavar, help.
_BUDGETS, _PLACEMENT, _MODEL = "Budgets (4GiB is binary, 16GB decimal, 50% a share of what there is)", "Placement and schedule", "Model"
_FLAGS: dict[str, tuple[str, str, str]] = {
    "device_mem": (_BUDGETS, "SIZE", "Memory on the device. Default: most of what is free."),
    "host_mem": (_BUDGETS, "SIZE", "Memory of the whole process. Default: 80 % of what is free, limits of containers obeyed."),
    "disk": (_BUDGETS, "SIZE", "Room for spilled KV cache in the offload folder."),
    "offload_dir": (_BUDGETS, "DIR", "Folder for spilled KV cache. Default: a fresh one below the system's temporary folder."),
    "device": (_PLACEMENT, "|".join(DEVICES), "Where matrix products run; sim is a stand-in for an accelerator, for tests."),
    "weights": (_PLACEMENT, "SHARES", "Homes of the weights, such as device=.2,host=.3,disk=.5. Default: planned."),
    "kv": (_PLACEMENT, "SHARES", "Homes of the KV cache, such as host=1. Default: planned."),
    "max_num_seqs": (_PLACEMENT, "N", "Most sequences alive at once. Default: planned."),
    "micro_batch_tokens": (_PLACEMENT, "N", "Most tokens computed together. Default: planned."),
    "prefill_tokens": (_PLACEMENT, "N", "Most prompt tokens that a pass admits. Default: planned."),
    "schedule": (_PLACEMENT, "|".join(SCHEDULES), "Which sequences a pass carries: ours, the paper's, or one micro-batch at a time."),
    "dtype": (_MODEL, "|".join(DTYPES), "Compute and KV dtype; auto is the checkpoint's, but never float16 on a CPU."),
    "load_format": (_MODEL, "|".join(LOAD_FORMATS), "dummy makes random weights from config.json alone."),
    "max_model_len": (_MODEL, "N", "Most tokens of prompt and answer together. Default: the model's context."),
    "revision": (_MODEL, "REV", "Branch, tag or commit of a hub model."),
    "seed": (_MODEL, "N", "Base of the seeds of requests that name none."),
}


def _command(body: Callable[..., int]) -> Callable[..., None]:
    """A command from a function that takes `options` and returns an exit code: flags for the options, plain errors."""
    hints = typing.get_type_hints(EngineOptions)
    fields = {field.name: field for field in dataclasses.fields(EngineOptions) if field.name in _FLAGS}
    parameters = [p for p in inspect.signature(body, eval_str=True).parameters.values() if p.name != "options"]
    for name, (panel, metavar, text) in _FLAGS.items():
        flag = typer.Option("--" + name.replace("_", "-"), metavar=metavar, help=text, rich_help_panel=panel)
        annotation = Annotated[hints[name], flag]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=fields[name].default, annotation=annotation))

    @functools.wraps(body)
    def command(**values: Any) -> None:
        try:
            options = EngineOptions(**{name: values.pop(name) for name in _FLAGS})
            code = body(options=options, **values)
        except OptionError as error:
            code = _complain(error, USAGE)
        except FlexGenError as error:
            code = _complain(error, REFUSED)
        except KeyboardInterrupt:
            code = _complain("stopped", INTERRUPTED)
        raise typer.Exit(code)

    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    return command


def _complain(error: object, code: int) -> int:
    print(f"flexgen: {error}", file=sys.stderr)
    return code


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"flexgen {version('flexgen-engine')}")
        raise typer.Exit


@app.callback()
def _flexgen(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")] = False,
) -> None: ...


_Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or a hub id such as facebook/opt-6.7b.")]
_ProgressFlag = Annotated[str, typer.Option(metavar="auto|rich|plain|json|none", help="How to show progress; auto looks at the terminal.")]


@app.command()
@_command
def run(
    model: _Model,
    source: Annotated[Path, typer.Argument(metavar="INPUT", exists=True, dir_okay=False, help="Requests, one JSON object per line.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUTPUT", help="Answers, appended as they finish.")],
    options: EngineOptions,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Longest answer of bare lines that do not say. Default: up to the context."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the input, show the plan, and stop.")] = False,
    metrics: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON (docs/metrics.md).")] = None,
    progress: _ProgressFlag = "auto",
) -> int:
    """Answer a file of requests.

    A line is {"prompt": text or token ids, "id", "max_tokens", "temperature",
    "top_p", "top_k", "seed", "ignore_eos", "stop_token_ids"}, or an OpenAI
    batch line for /v1/completions. The same command again goes on where it
    stopped.

    Exit codes: 0 all lines answered, 1 some with errors, 2 usage, 3 refused
    before the start, 75 stopped by a failure and 130 by Ctrl-C (both go on
    with the same command).
    """
    _check_paths(source, output, metrics)
    with _showing(progress, dry_run=dry_run) as display, _load(model, options, progress) as llm:
        defaults = _bare_defaults(llm, max_tokens)
        if dry_run:
            return _show_plan(llm, source, defaults, display)
        return _run_job(llm, source, output, defaults, display, metrics)


@bench.command()
@_command
def throughput(
    model: _Model,
    options: EngineOptions,
    num_prompts: Annotated[int, typer.Option(metavar="N", min=1, help="How many requests.")] = 100,
    input_len: Annotated[int, typer.Option(metavar="N", min=1, help="Prompt tokens of each.")] = 256,
    output_len: Annotated[int, typer.Option(metavar="N", min=1, help="Output tokens of each.")] = 32,
    output_json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON (docs/metrics.md).")] = None,
    progress: _ProgressFlag = "auto",
) -> int:
    """Tokens per second over random prompts, with vLLM's figures and ours."""
    from flexgen.bench.throughput import format_throughput, run_throughput, uniform_workload

    _check_parent(output_json, "--output-json")
    with _showing(progress) as display, _load(model, options, progress) as llm:
        workload = uniform_workload(llm, num_prompts, input_len, output_len)
        display.plan(llm.open(workload))
        figures = run_throughput(llm, workload, on_progress=display.progress)
        display.close()
        display.report(llm.report())
    if progress != "json":
        print(format_throughput(figures))
    if output_json is not None:
        output_json.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["num_errors"]:
        return _complain(f"{figures['num_errors']} requests failed, so the figures mean little", SOME_FAILED)
    return ALL_ANSWERED


# -- steps of a run -----------------------------------------------------------------------------------------------------------------


def _check_paths(source: Path, output: Path, metrics: Path | None) -> None:
    if output.exists() and output.samefile(source):
        raise OptionError(f"{output} is the input; give another output")
    _check_parent(output, "--output")
    _check_parent(metrics, "--metrics")
    if metrics is not None and metrics.resolve() in (source.resolve(), output.resolve()):
        raise OptionError(f"--metrics {metrics} is the input or the output; give another file")


def _check_parent(path: Path | None, flag: str) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise OptionError(f"{flag} {path}: there is no folder {path.absolute().parent}")


@contextmanager
def _showing(progress: str, *, dry_run: bool = False) -> Iterator[Display]:
    """A display to which the library's log goes, too.  A dry run's plan is its result."""
    from flexgen.display import open_display

    display = open_display(progress, sys.stdout if dry_run else sys.stderr, sys.stdout)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            display.message(self.format(record))

    log, handler = logging.getLogger("flexgen"), Handler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield display
    finally:
        log.removeHandler(handler)
        display.close()


def _load(model: str, options: EngineOptions, progress: str) -> LLM:
    from flexgen.hub import resolve_model
    from flexgen.llm import LLM

    show = progress in ("auto", "rich") and sys.stderr.isatty()
    files = resolve_model(model, revision=options.revision, with_weights=options.load_format != "dummy", show_progress=show)
    return LLM(files, **dataclasses.asdict(options))


def _bare_defaults(llm: LLM, max_tokens: int | None) -> SamplingParams:
    """What bare lines get where they do not say: vLLM's defaults under generation_config.json, but up to the context."""
    defaults = llm.get_default_sampling_params()
    limit = max_tokens if max_tokens is not None else llm.files.generation_config.get("max_new_tokens")
    return dataclasses.replace(defaults, max_tokens=limit)


def _show_plan(llm: LLM, source: Path, defaults: SamplingParams, display: Display) -> int:
    from flexgen.jobs.runner import Job

    job = Job(llm, source, None, defaults=defaults)
    workload = job.scan()
    display.message(_describe(job, workload))
    if len(workload):
        display.plan(llm.plan(workload))
    return SOME_FAILED if job.num_bad_lines else ALL_ANSWERED


def _run_job(llm: LLM, source: Path, output: Path, defaults: SamplingParams, display: Display, metrics: Path | None) -> int:
    from flexgen.jobs.runner import Job, identity
    from flexgen.jobs.store import Store

    with Store(output, identity(llm, defaults)) as store:
        job = Job(llm, source, store, defaults=defaults)
        workload = job.scan()
        display.message(_describe(job, workload))
        try:
            if len(workload):
                display.plan(llm.open(workload))
                job.run(workload, on_progress=display.progress)
        except (FlexGenError, KeyboardInterrupt) as error:
            display.close()
            if not job.started:
                raise
            reason = "stopped" if isinstance(error, KeyboardInterrupt) else error
            hint = f"{_done(store):,} of {job.num_lines:,} lines are done; the same command goes on from there"
            return _complain(f"{reason}\n{hint}", INTERRUPTED if isinstance(error, KeyboardInterrupt) else RESUMABLE)
        display.close()
        _conclude(llm, job, store, workload, display, metrics)
        return SOME_FAILED if store.num_failed else ALL_ANSWERED


def _done(store: Store) -> int:
    return store.num_answered + store.num_failed


def _conclude(llm: LLM, job: Job, store: Store, workload: Workload, display: Display, metrics: Path | None) -> None:
    if len(workload):
        report = llm.report()
        display.report(report)
        if metrics is not None:
            lines = {"lines": job.num_lines, "answered": store.num_answered, "failed": store.num_failed, "done_before": store.num_found}
            metrics.write_text(json.dumps({**dataclasses.asdict(report), "job": lines}, indent=2) + "\n")
    display.message(f"{store.output}: {store.num_answered:,} lines answered, {store.num_failed:,} with errors")


def _describe(job: Job, workload: Workload) -> str:
    """What is about to be answered, and with which defaults."""
    found = job.store.num_found if job.store is not None else 0
    bare = job.defaults
    limit = f"{bare.max_tokens:,} tokens" if bare.max_tokens is not None else f"up to the context of {job.llm.max_model_len:,}"
    sampling = "greedy" if bare.temperature == 0 else f"temperature {bare.temperature:g}, top_p {bare.top_p:g}, top_k {bare.top_k}"
    return (
        f"{job.source}: {job.num_lines:,} lines, {job.num_bad_lines:,} of them bad, {found:,} done before, {len(workload):,} to answer: "
        f"{workload.prompt_tokens:,} prompt and at most {workload.output_tokens:,} output tokens\n"
        f"where lines do not say: {sampling}, {limit}; /v1/completions: 16 tokens"
    )


def main() -> None:
    """The entry point of the command."""
    # Read by the OpenMP runtime when torch loads it: threads that spin while they wait take the cores that reading and
    # attention need, and any other program's use of a core then stalls every matrix product (measured: docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except Exception:  # noqa: BLE001  (1 would say that lines have errors)
        traceback.print_exc()
        sys.exit(_complain("this is a bug in flexgen; please report it with the lines above", BUG))


if __name__ == "__main__":
    main()
