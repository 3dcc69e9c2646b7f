"""`flexgen bench throughput`: measures tokens per second over random prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flexgen.base.quantities import counted
from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.cli.options import Model, ProgressFlag, VerboseFlag, check_apart, check_file, engine_command, load, write_asked
from flexgen.cli.terminal import showing
from flexgen.options import EngineOptions


@engine_command
def throughput(
    model: Model,
    options: EngineOptions,
    num_prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Number of requests.")] = 100,
    input_len: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each prompt.")] = 256,
    output_len: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each answer.")] = 32,
    output_json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON (docs/metrics.md).")] = None,
    progress: ProgressFlag = "auto",
    verbose: VerboseFlag = False,
) -> int:
    """Tokens per second over random prompts, with vLLM's figures and ours."""
    check_file(output_json, "--output-json")
    check_apart(options.trace, output_json)
    with showing(progress) as display, load(model, options, progress) as llm:
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
    code = ExitCode.ALL_ANSWERED
    if output_json is not None:
        code = write_asked(output_json, "--output-json", json.dumps(figures, indent=2) + "\n")
    if figures["num_errors"]:
        return complain(f"{counted(figures['num_errors'], 'request')} failed, so the figures mean little", ExitCode.SOME_FAILED)
    return code
