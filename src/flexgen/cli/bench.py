"""`flexgen bench`: measures tokens per second over random prompts, of a whole job or of passes in its middle."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexgen.base.quantities import counted
from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.cli.options import Model, ProgressFlag, VerboseFlag, check_apart, check_file, engine_command, load, write_asked
from flexgen.cli.terminal import showing
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.report.show import Display
    from flexgen.report.steady import SteadyReport


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
    machine: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Simulate the passes on a machine that is not at hand, as for `flexgen plan`; see below."),
    ] = None,
    slow_motion: Annotated[
        float, typer.Option(metavar="N", min=1, help="With --machine: how many times longer everything takes here than there.")
    ] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON (docs/metrics.md).")] = False,
    output_json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON (docs/metrics.md).")] = None,
    progress: ProgressFlag = "auto",
    verbose: VerboseFlag = False,
) -> int:
    """Tokens per second in the middle of a job, without waiting for it.

    The job is planned as a whole. Its first passes are scheduled but not
    computed: random tokens, keys and values stand for theirs.

    With --machine nothing is computed: the engine runs, in slow motion, on a
    simulated device on which copies and kernels take the time that they should
    take there. This shows how its schedule works out, and measures no card.
    """
    check_file(output_json, "--output-json")
    check_apart(options.trace, output_json)
    job = {"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
    counts = {"warmup": warmup, "passes": passes}
    with showing(progress, results=sys.stderr if as_json else None) as display:
        if machine is None:
            report, figures = _measured(model, options, progress, display, job, counts)
        else:
            report, figures = _simulated(model, options, machine, slow_motion, display, job, counts)
        display.close()
        where = "" if machine is None else f", simulated on {report.run.machine['name']}"
        display.report(report.run, f"{counted(passes, 'pass', 'passes')} in the middle of {counted(num_prompts, 'prompt')}{where}")
        if verbose:
            display.details(report.run)
    if as_json:
        print(json.dumps(figures, indent=2))
    elif progress != "json":
        from flexgen.report.steady import format_steady

        print(format_steady(report))
    return _written(output_json, figures)


def _measured(
    model: str, options: EngineOptions, progress: str, display: Display, job: dict[str, int], counts: dict[str, int]
) -> tuple[SteadyReport, dict[str, Any]]:
    """Measure passes on this machine; return the report, and its figures as JSON."""
    with load(model, options, progress) as llm:
        from flexgen.bench.steady import run_steady
        from flexgen.bench.throughput import uniform_workload

        workload = uniform_workload(llm, **job)
        display.plan(llm.open(workload))
        report = run_steady(llm, workload, **counts, on_progress=display.progress)
    return report, report.to_json()


def _simulated(
    model: str, options: EngineOptions, machine: str, slow_motion: float, display: Display, job: dict[str, int], counts: dict[str, int]
) -> tuple[SteadyReport, dict[str, Any]]:
    """Simulate passes on another machine; return the report, and its figures as JSON."""
    from flexgen.bench.simulated import prepare_steady, simulate_steady

    prepared = prepare_steady(model, machine, options, **job, slow_motion=slow_motion)
    display.plan(prepared.plan)
    simulated = simulate_steady(
        prepared, **counts, seed=options.seed, trace=options.trace, trace_passes=options.trace_passes, on_progress=display.progress
    )
    return simulated.steady, simulated.to_json()


def _written(output_json: Path | None, figures: Mapping[str, Any]) -> int:
    """Write the figures if that was asked for, and return the exit code."""
    code = ExitCode.ALL_ANSWERED
    if output_json is not None:
        code = write_asked(output_json, "--output-json", json.dumps(figures, indent=2) + "\n")
    if figures["num_errors"]:
        return complain(f"{counted(figures['num_errors'], 'request')} failed, so the figures mean little", ExitCode.SOME_FAILED)
    return code
