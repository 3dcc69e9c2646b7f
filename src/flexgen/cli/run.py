"""`flexgen run`: a file of requests in, a file of answers out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen.base.files import check_target
from flexgen.cli.exit_codes import complain
from flexgen.cli.job import Asked, answer_job, show_plan
from flexgen.cli.options import Model, ProgressFlag, VerboseFlag, check_file, check_parent, engine_command, is_there, seconds
from flexgen.cli.signals import StopSignals
from flexgen.cli.streams import check_stdin, check_stdout
from flexgen.cli.terminal import showing
from flexgen.errors import OptionError
from flexgen.jobs.interrupt import Stopped
from flexgen.options import EngineOptions

_AGAIN = "The job and its earlier runs"


@engine_command
def run(
    model: Model,
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="Requests, one JSON object per line; - is stdin."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUTPUT", help="Answers, in the order of the input; - is stdout, when all is done.")
    ],
    options: EngineOptions,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Longest answer of chats and bare lines that set none. Default: up to the context."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="For lines that set none; 0 is greedy. Default: the model's generation_config, or 1.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="For lines that set none. Default: the model's generation_config, or 1.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="NAME", help="Another tokenizer than the model's: a folder or hub id.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="A Jinja template, or the name of one of the model's. Default: the model's own.")
    ] = None,
    chat_template_kwargs: Annotated[
        str, typer.Option(metavar="JSON", help='More variables for chat templates, such as {"enable_thinking": false}.')
    ] = "{}",
    input_format: Annotated[str, typer.Option(metavar="jsonl|text", help="Input form; text takes every line as a prompt.")] = "jsonl",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the input, show the plan, and stop.")] = False,
    metrics: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON (docs/metrics.md).")] = None,
    progress: ProgressFlag = "auto",
    verbose: VerboseFlag = False,
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
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="Go on though the first 100 lines all fail for the same reason.", rich_help_panel=_AGAIN),
    ] = False,
    checkpoint_seconds: Annotated[
        float,
        typer.Option(metavar="TIME", parser=seconds, help="Store the tokens of answers in progress this often.", rich_help_panel=_AGAIN),
    ] = 30.0,
) -> int:
    """Answer a file of requests.

    A line is {"prompt": text or token ids, "id", and sampling parameters as
    in vLLM}, or an OpenAI batch line. Each answer is stored when it is done.
    If the run is interrupted, the same command goes on where it stopped.
    `flexgen status OUTPUT` shows how far the job is.
    """
    asked = Asked(
        model=model,
        options=options,
        source=_named(source),
        output=_named(output),
        state=state,
        tokenizer=tokenizer,
        chat_template=chat_template,
        chat_template_kwargs=_object(chat_template_kwargs),
        input_format=input_format,
        defaults={"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p},
        strict=strict,
        fresh=fresh,
        retry_errors=retry_errors,
        accept_changes=accept_changes,
        keep_going=keep_going,
        checkpoint_seconds=checkpoint_seconds,
        metrics=metrics,
        progress=progress,
        verbose=verbose,
    )
    _check(asked, dry_run)
    messages = sys.stdout if dry_run else sys.stderr  # a dry run's plan is its result
    results = None if asked.output is not None else sys.stderr
    shown = "plain" if dry_run and progress == "none" else progress
    with showing(shown, messages=messages, results=results, steps=progress != "none") as display, StopSignals() as signals:
        try:
            return show_plan(asked, display) if dry_run else answer_job(asked, display, signals)
        except Stopped:
            display.close()  # or the last step would stand in the way
            return complain("stopped", signals.exit_code)


def _named(path: Path) -> Path | None:
    return None if path == Path("-") else path


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"--chat-template-kwargs {text[:80]!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise OptionError(f"--chat-template-kwargs {text[:80]!r} is not a JSON object")
    return value


def _check(asked: Asked, dry_run: bool) -> None:
    """Raises OptionError for paths and flags that cannot be meant."""
    from flexgen.jobs.forms import INPUT_FORMATS

    _check_source(asked)
    check_parent(asked.output, "--output")
    check_target(asked.output)
    check_file(asked.metrics, "--metrics")
    check_parent(asked.state, "--state")
    if asked.source is None:
        check_stdin()
    if asked.output is None or dry_run:
        check_stdout()
    used = [path.resolve() for path in (asked.source, asked.output) if path is not None]
    if len(set(used)) < len(used):
        raise OptionError(f"{asked.output} is the input; give another output")
    if asked.metrics is not None and asked.metrics.resolve() in used:
        raise OptionError(f"--metrics {asked.metrics} is the input or the output; give another file")
    if asked.output is None and asked.progress == "json":
        raise OptionError("--progress json writes to standard output, and so does -o -: give an output file")
    if asked.input_format not in INPUT_FORMATS:
        raise OptionError(f"--input-format {asked.input_format!r} is unknown; known: {', '.join(INPUT_FORMATS)}")
    again = {"--fresh": asked.fresh, "--retry-errors": asked.retry_errors, "--accept-changes": asked.accept_changes}
    given = [flag for flag, value in again.items() if value]
    if asked.fresh and len(given) > 1:
        raise OptionError(f"--fresh forgets earlier runs, which leaves {given[1]} nothing to do")
    if dry_run and asked.metrics is not None:
        raise OptionError("--dry-run has nothing to measure: leave out --metrics")
    if dry_run and (given or asked.source_is_stream):
        named = given[0] if given else f"{asked.source or '-'} and give a file"
        raise OptionError(f"--dry-run changes nothing and keeps nothing: leave out {named}")


def _check_source(asked: Asked) -> None:
    """Raises OptionError for an input that is no file and no pipe.  (Not by typer, which would look for a file named -.)"""
    source = asked.source
    if source is None or is_there(source, "INPUT", Path.is_file) or source.is_fifo() or source.is_socket():
        return
    if source.is_dir() and Path(asked.model).is_file():
        raise OptionError(f"INPUT {source} is a folder and MODEL {asked.model} a file; the model comes first: flexgen run MODEL INPUT")
    if source.is_dir():
        what = "this is the folder of a model" if (source / "config.json").is_file() else "this is a folder"
        raise OptionError(f"INPUT {source}: {what}; give a file with one request per line")
    if source.exists():
        raise OptionError(f"INPUT {source} is a device; give a file, or - to read standard input")
    swapped = "; MODEL is a file, and the model comes first: flexgen run MODEL INPUT" if Path(asked.model).is_file() else ""
    raise OptionError(f"INPUT {source}: there is no such file{swapped}")
