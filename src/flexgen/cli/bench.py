"""`flexgen bench`: measures tokens per second over random prompts, of a whole job or of passes in its middle."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen.base.quantities import counted
from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.cli.options import Model, ProgressFlag, VerboseFlag, check_apart, check_file, engine_command, load, write_asked
from flexgen.cli.terminal import showing
from flexgen.options import EngineOptions

OverlapFlag = Annotated[
    bool,
    typer.Option(
        "--overlap/--no-overlap", help="Whether bytes are copied while something is computed; --no-overlap shows what that is worth."
    ),
]


@engine_command
def throughput(
    model: Model,
    options: EngineOptions,
    num_prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Number of requests.")] = 100,
    input_len: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each prompt.")] = 256,
    output_len: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each answer.")] = 32,
    overlap: OverlapFlag = True,
    output_json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON (docs/metrics.md).")] = None,
    progress: ProgressFlag = "auto",
    verbose: VerboseFlag = False,
) -> int:
    """Tokens per second over random prompts, with vLLM's figures and ours."""
    check_file(output_json, "--output-json")
    check_apart(options.trace, output_json)
    asked = dataclasses.replace(options, overlap=overlap)
    with showing(progress) as display, load(model, asked, progress) as llm:
        from flexgen.bench.throughput import format_throughput, run_throughput, uniform_workload

        workload = uniform_workload(llm, num_prompts, input_len, output_len)
        display.plan(llm.open(workload))
        figures = run_throughput(llm, workload, on_progress=display.progress)
        display.close()
        display.report(llm.report())
        if verbose:
            display.details(llm.report())
    if progress != "json":
        print(format_throughput(figures))
    return _written(output_json, figures)


@engine_command
def steady(
    model: Model,
    options: EngineOptions,
    num_prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Number of requests of the job that is planned.")] = 1000,
    input_len: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each prompt.")] = 512,
    output_len: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each answer.")] = 32,
    passes: Annotated[int, typer.Option(metavar="N", min=1, help="Passes that are measured.")] = 12,
    warmup: Annotated[int, typer.Option(metavar="N", min=0, help="Passes that are computed before them and do not count.")] = 2,
    overlap: OverlapFlag = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON (docs/metrics.md).")] = False,
    output_json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON (docs/metrics.md).")] = None,
    progress: ProgressFlag = "auto",
    verbose: VerboseFlag = False,
) -> int:
    """Tokens per second in the middle of a job, without waiting for it.

    The job is planned as a whole. Its first passes are scheduled but not
    computed: random tokens, keys and values stand for theirs.
    """
    check_file(output_json, "--output-json")
    check_apart(options.trace, output_json)
    asked = dataclasses.replace(options, overlap=overlap)
    with showing(progress, results=sys.stderr if as_json else None) as display, load(model, asked, progress) as llm:
        from flexgen.bench.steady import run_steady
        from flexgen.bench.throughput import uniform_workload
        from flexgen.report.steady import format_steady

        workload = uniform_workload(llm, num_prompts, input_len, output_len)
        display.plan(llm.open(workload))
        report = run_steady(llm, workload, warmup=warmup, passes=passes, on_progress=display.progress)
        display.close()
        display.report(report.run, f"{counted(passes, 'pass', 'passes')} in the middle of {counted(num_prompts, 'prompt')}")
        if verbose:
            display.details(report.run)
    figures = report.to_json()
    if as_json:
        print(json.dumps(figures, indent=2))
    elif progress != "json":
        print(format_steady(report))
    return _written(output_json, figures)


def _written(output_json: Path | None, figures: Mapping[str, Any]) -> int:
    """Write the figures if that was asked for, and return the exit code."""
    code = ExitCode.ALL_ANSWERED
    if output_json is not None:
        code = write_asked(output_json, "--output-json", json.dumps(figures, indent=2) + "\n")
    if figures["num_errors"]:
        return complain(f"{counted(figures['num_errors'], 'request')} failed, so the figures mean little", ExitCode.SOME_FAILED)
    return code
