"""The command `flexgen`: each command turns its flags into values, makes one call, and prints the result.

This is the only package that touches the terminal.  It is light to import: torch and transformers are imported by the commands that need
them.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from flexgen.cli import bench, cache, convert, export, map, plan, profile, run, status, work
from flexgen.cli import eval as evaluations
from flexgen.cli.exit_codes import complain_of_bug, complain_of_disk
from flexgen.cli.help import CONTEXT_SETTINGS, Command, Group
from flexgen.cli.streams import standard_streams
from flexgen.errors import is_disk_failure

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    context_settings=CONTEXT_SETTINGS,
    rich_markup_mode=None,  # plain text, see help.py
    pretty_exceptions_enable=False,
    help="Batch inference for language models that are larger than the memory of the device that runs them.",
)
for _command in (run.run, map.map, work.work, status.status, export.export, plan.plan, profile.profile, convert.convert):
    app.command(cls=Command)(_command)
_bench = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None, help="Measure this machine's throughput with a model.")
for _command in (bench.throughput, bench.steady):
    _bench.command(cls=Command)(_command)
app.add_typer(_bench, name="bench")
_eval = typer.Typer(
    cls=Group, no_args_is_help=True, rich_markup_mode=None, help="Evaluate a model: perplexity, LAMBADA, lm-evaluation-harness."
)
for _command in (evaluations.perplexity, evaluations.lambada):
    _eval.command(cls=Command)(_command)
_eval.command(cls=Command, context_settings=evaluations.LM_EVAL_CONTEXT)(evaluations.lm_eval)
app.add_typer(_eval, name="eval")
_cache = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None, help="The converted weights that runs keep.")
for _command in (cache.ls, cache.rm, cache.verify):
    _cache.command(cls=Command)(_command)
app.add_typer(_cache, name="cache")


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"flexgen {version('flexgen-engine')}")
        raise typer.Exit


@app.callback()
def _flexgen(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")] = False,
) -> None: ...


def main() -> None:
    """Run the command `flexgen`."""
    # The OpenMP runtime reads this when torch loads it.  Threads that spin while they wait take the cores that reading and
    # attention need, and any other program's use of a core then stalls every matrix product (measurements: docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        with standard_streams():
            app()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001  (the default exit code 1 would mean that lines have errors)
        if is_disk_failure(error):
            sys.exit(complain_of_disk(error, error))
        sys.exit(complain_of_bug())
