"""The flags of `flexgen run`, and the check for values and combinations that make no sense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen.base.files import check_target
from flexgen.cli.options import Model, ProgressFlag, VerboseFlag, check_file, check_parent, is_there, seconds
from flexgen.cli.streams import check_stdin, check_stdout
from flexgen.cli.worker_places import Crew
from flexgen.errors import OptionError

AGAIN = "The job and its earlier runs"
WORKERS = "Several workers (docs/workers.md)"
_LEAST_LEASE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFlags:
    """The flags of `flexgen run` besides those of the engine and of reading; `source` and `output` are None for `-`."""

    model: Model
    source: Annotated[Path | None, typer.Argument(metavar="INPUT", help="Requests, one JSON object per line; - is stdin.")]
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUTPUT", help="Answers, in the order of the input; - is stdout, when all is done."),
    ]
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="For lines that set none; 0 is greedy. Default: the model's generation_config, or 1.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="For lines that set none. Default: the model's generation_config, or 1.")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the input, show the plan, and stop.")] = False
    metrics: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON (docs/metrics.md).")] = None
    progress: ProgressFlag = "auto"
    verbose: VerboseFlag = False
    strict: Annotated[bool, typer.Option("--strict", help="Refuse an input with bad lines or repeated ids.", rich_help_panel=AGAIN)] = False
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the job is kept. Default: OUTPUT.flexgen, or INPUT.flexgen for -o -.", rich_help_panel=AGAIN
        ),
    ] = None
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Answer lines again that ended in an error.", rich_help_panel=AGAIN)
    ] = False
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier runs and remove what they wrote.", rich_help_panel=AGAIN)] = False
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Go on though the model, its settings or lines changed.", rich_help_panel=AGAIN),
    ] = False
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="Go on though the first 100 lines all fail for the same reason.", rich_help_panel=AGAIN),
    ] = False
    checkpoint_seconds: Annotated[
        float,
        typer.Option(metavar="TIME", parser=seconds, help="Store the tokens of answers in progress this often.", rich_help_panel=AGAIN),
    ] = 30.0

    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|DEVICES",
            help="Divide the job among N processes, or one per device (cuda:0,cuda:1); 0 leaves it to `flexgen work`.",
            rich_help_panel=WORKERS,
        ),
    ] = None
    lease_seconds: Annotated[
        float,
        typer.Option(
            metavar="TIME", parser=seconds, help="Take over the lines of a worker that was silent so long.", rich_help_panel=WORKERS
        ),
    ] = 60.0
    attempts: Annotated[
        int, typer.Option(metavar="N", min=2, help="A line that so many workers died with ends in an error.", rich_help_panel=WORKERS)
    ] = 3

    def __post_init__(self) -> None:
        for name in ("source", "output"):
            if getattr(self, name) == Path("-"):
                object.__setattr__(self, name, None)

    @property
    def source_is_stream(self) -> bool:
        """Whether the input can be read only once: standard input, a named pipe, or a shell's `<(...)`."""
        return self.source is None or not self.source.is_file()

    @property
    def crew(self) -> Crew | None:
        """The workers that the run starts; None for a run that answers by itself.

        Raises:
            OptionError: `--workers` is neither a number nor a list of devices.
        """
        return None if self.workers is None else Crew.parse(self.workers)

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that flags give to lines that set none."""
        given = {"temperature": self.temperature, "top_p": self.top_p}
        return {name: value for name, value in given.items() if value is not None}


def check(flags: RunFlags) -> None:
    """Check paths, standard streams and combinations of flags.

    Raises:
        OptionError: A path cannot be used, or flags contradict each other.
        StorageError: The output cannot be written, or a standard stream is closed.
    """
    _check_source(flags)
    check_job(flags)


def check_job(flags: RunFlags) -> None:
    """Check all flags but the input itself.

    Raises:
        OptionError: A path cannot be used, or flags contradict each other.
        StorageError: The output cannot be written, or a standard stream is closed.
    """
    _ = flags.crew
    if flags.lease_seconds < _LEAST_LEASE_SECONDS:
        raise OptionError(f"--lease-seconds {flags.lease_seconds:g}: workers that live may be silent for {_LEAST_LEASE_SECONDS:g} seconds")
    check_parent(flags.output, "--output")
    check_target(flags.output)
    check_file(flags.metrics, "--metrics")
    check_parent(flags.state, "--state")
    if flags.source is None:
        check_stdin()
    if flags.output is None or flags.dry_run:
        check_stdout()
    used = [path.resolve() for path in (flags.source, flags.output) if path is not None]
    if len(set(used)) < len(used):
        raise OptionError(f"{flags.output} is the input; give another output")
    if flags.metrics is not None and flags.metrics.resolve() in used:
        raise OptionError(f"--metrics {flags.metrics} is the input or the output; give another file")
    if flags.output is None and flags.progress == "json":
        raise OptionError("--progress json writes to standard output, and so does -o -: give an output file")
    again = {"--fresh": flags.fresh, "--retry-errors": flags.retry_errors, "--accept-changes": flags.accept_changes}
    given = [flag for flag, value in again.items() if value]
    if flags.fresh and len(given) > 1:
        raise OptionError(f"--fresh forgets earlier runs, which leaves {given[1]} nothing to do")
    if flags.dry_run and flags.metrics is not None:
        raise OptionError("--dry-run has nothing to measure: leave out --metrics")
    if flags.dry_run and (given or flags.source_is_stream):
        named = given[0] if given else f"{flags.source or '-'} and give a file"
        raise OptionError(f"--dry-run changes nothing and keeps nothing: leave out {named}")


def _check_source(flags: RunFlags) -> None:
    """Refuse an input that is neither a file nor a pipe.  Typer does not check this, because it would look for a file named `-`."""
    source = flags.source
    if source is None or is_there(source, "INPUT", Path.is_file) or source.is_fifo() or source.is_socket():
        return
    if source.is_dir() and Path(flags.model).is_file():
        raise OptionError(f"INPUT {source} is a folder and MODEL {flags.model} a file; the model comes first: flexgen run MODEL INPUT")
    if source.is_dir():
        what = "this is the folder of a model" if (source / "config.json").is_file() else "this is a folder"
        raise OptionError(f"INPUT {source}: {what}; give a file with one request per line")
    if source.exists():
        raise OptionError(f"INPUT {source} is a device; give a file, or - to read standard input")
    swapped = "; MODEL is a file, and the model comes first: flexgen run MODEL INPUT" if Path(flags.model).is_file() else ""
    raise OptionError(f"INPUT {source}: there is no such file{swapped}")
