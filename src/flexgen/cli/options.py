"""The parts that several commands share: flags for the fields of EngineOptions and for progress, and the translation of errors."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import OptionInfo

from flexgen.base.files import check_folder, check_target, write_file
from flexgen.base.quantities import counted, parse_seconds
from flexgen.base.recorder import check_trace
from flexgen.cli.exit_codes import ExitCode, complain, complain_of_bug, complain_of_disk
from flexgen.cli.numbers import in_words
from flexgen.cli.spelling import ENGINE_FLAGS, flag_of, in_flags
from flexgen.distributed.place import is_placed
from flexgen.errors import FlexGenError, OptionError, StageError, StorageError, is_disk_failure, is_out_of_memory
from flexgen.options import (
    ALLOWABLE_FORMATS,
    CPU_COMPUTES,
    DEVICES,
    DTYPES,
    HOST_ATTENTIONS,
    KV_FORMATS,
    LOAD_FORMATS,
    SCHEDULES,
    WEIGHT_FORMATS,
    EngineOptions,
)

if TYPE_CHECKING:
    from flexgen.hub.model_files import ModelFiles
    from flexgen.llm import LLM

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a GGUF file, or a hub id such as facebook/opt-6.7b.")]
ProgressFlag = Annotated[str, typer.Option(metavar="auto|rich|plain|json|none", help="How to show progress; auto looks at the terminal.")]
VerboseFlag = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="End with all figures: placement, bytes, waits, overlap, plan, efficiency (docs/metrics.md)."),
]

# Field of EngineOptions that has a flag -> (panel, metavar, help).
_BUDGETS, _PLACEMENT, _MODEL = "Budgets (4GiB is binary, 16GB decimal, 50% a share of the whole)", "Placement and schedule", "Model"
_OUTPUT = "Output"
FLAGS: dict[str, tuple[str, str, str]] = {
    "device_mem": (_BUDGETS, "SIZE", "Memory on the device. Default: most of what is free."),
    "host_mem": (_BUDGETS, "SIZE", "Memory of the whole process. Default: 80 % of what is free, limits of containers obeyed."),
    "disk": (_BUDGETS, "SIZE", "Room for spilled KV cache in the offload folder; 0 forbids spilling."),
    "offload_dir": (_BUDGETS, "DIR", "Folder for spilled KV cache. Default: a fresh one below the system's temporary folder."),
    "device": (_PLACEMENT, "|".join(DEVICES), "Where matrix products run; cuda:0,cuda:1 are stages; sim is for tests."),
    "weights": (
        _PLACEMENT,
        "SHARES",
        "Homes of the weights: shares of device, host, encoded (in host memory as stored), disk. Default: planned.",
    ),
    "kv": (_PLACEMENT, "SHARES", "Homes of the KV cache, such as host=1. Default: planned."),
    "host_attention": (_PLACEMENT, "|".join(HOST_ATTENTIONS), "Next tokens attend to KV in host memory there; off: on the device."),
    "max_num_seqs": (_PLACEMENT, "N", "Most sequences alive at once. Default: planned."),
    "micro_batch_tokens": (_PLACEMENT, "N", "Most tokens computed together. Default: planned."),
    "prefill_tokens": (_PLACEMENT, "N", "Most prompt tokens that a pass admits. Default: planned."),
    "schedule": (_PLACEMENT, "|".join(SCHEDULES), "Which sequences a pass carries: ours, the paper's, or one micro-batch at a time."),
    "prefix_sharing": (_PLACEMENT, "", "Whether what several prompts begin with is computed once; tokens do not change."),
    "stages": (_PLACEMENT, "N", "Divide the layers among N machines (torchrun) or processes of this one (docs/distributed.md)."),
    "interface": (_PLACEMENT, "NAME", "Network interface on which stages listen. Default: loopback, or what the host's name leads to."),
    "max_request_seconds": (
        _PLACEMENT,
        "TIME",
        "Plan so that no request should take longer (90, 30min, 8h) from first to last pass.",
    ),
    "max_job_seconds": (_PLACEMENT, "TIME", "Plan so that the job should take no longer (8h, 1d12h); refused if no plan is that fast."),
    "dtype": (_MODEL, "|".join(DTYPES), "Compute and KV dtype; auto is the checkpoint's, but never float16 on a CPU."),
    "cpu_compute": (_MODEL, "|".join(CPU_COMPUTES), "int8: products of rounded numbers, faster; answers change (docs/cpu-compute.md)."),
    "kv_format": (_MODEL, "|".join(KV_FORMATS), "KV cache in fewer bits; answers change a little (docs/kv-cache.md). auto: the dtype."),
    "sparse_attention": (
        _MODEL,
        "SHARE",
        "Generated tokens attend to this share of the positions, such as 0.1; answers change (docs/sparse-attention.md). Default: all.",
    ),
    "load_format": (_MODEL, "|".join(LOAD_FORMATS), "dummy makes random weights from config.json alone."),
    "weight_format": (_MODEL, "|".join(WEIGHT_FORMATS), "int8 and int4 convert the weights once, into a cache, and run from there."),
    "allow_formats": (_MODEL, "FORMATS", f"Let the plan choose among {', '.join(ALLOWABLE_FORMATS)} (docs/plans.md), such as int4,k8v4."),
    "max_model_len": (_MODEL, "N", "Most tokens of prompt and answer together. Default: the model's context."),
    "revision": (_MODEL, "REV", "Branch, tag or commit of a hub model."),
    "max_logprobs": (_MODEL, "N", "Most log probabilities per token that a request may ask for; -1 is any number."),
    "verify_reads": (_PLACEMENT, "", "Compare weights and spilled KV with what was read or written before: a tenth of a core per GB/s."),
    "seed": (_MODEL, "N", "Base of the seeds of requests that name none."),
    "trace": (_OUTPUT, "FILE", "Write what happens when, for Perfetto or chrome://tracing (docs/trace.md)."),
    "trace_passes": (_OUTPUT, "FIRST:STOP", "Passes in the trace, counted from 0, such as 10:20. Default: all, up to 256 MiB."),
}
_LISTS = ("weights", "kv", "allow_formats")


def seconds(text: str | float) -> float:
    """Parse the value of a flag that takes a time, and return seconds."""
    try:
        return text if isinstance(text, (int, float)) else parse_seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def command(body: Callable[..., int]) -> Callable[..., None]:
    """Make a command of a function that returns an exit code; errors that flexgen raises on purpose become messages."""

    signature = inspect.signature(body, eval_str=True)
    signature = signature.replace(parameters=[in_words(each) for each in signature.parameters.values()])
    flags = {**ENGINE_FLAGS, **_flags(signature)}

    @functools.wraps(body)
    def wrapped(**values: Any) -> None:
        try:
            code = body(**values)
        except FlexGenError as error:
            code = _refused(error, flags)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            code = complain(f"memory ran out: {str(error).partition(chr(10))[0]}".rstrip(": "), ExitCode.RESUMABLE)
        except PermissionError as error:  # of a model's file, for instance; those of outputs and states are FlexGenErrors
            code = complain(f"{error.filename}: {error.strerror}" if error.filename else error, ExitCode.REFUSED)
        except KeyboardInterrupt:
            code = complain("stopped", ExitCode.INTERRUPTED)
        except (EOFError, BrokenPipeError):  # typer would exit with 1, which means that lines have errors
            code = complain_of_bug()
        raise typer.Exit(code)

    wrapped.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return wrapped


def _refused(error: FlexGenError, flags: Mapping[str, str]) -> ExitCode:
    """Say why a command was refused, with flags in place of names, and return the exit code.

    What a disk or a lost stage is to blame for can go on.
    """
    said = in_flags(str(error), flags) if isinstance(error, OptionError) else error
    if is_disk_failure(error):
        return complain_of_disk(error, said)
    if isinstance(error, StageError):
        return complain(f"{said}\nthe same command goes on", ExitCode.RESUMABLE)
    return complain(said, ExitCode.USAGE if isinstance(error, OptionError) else ExitCode.REFUSED)


def _flags(signature: inspect.Signature) -> dict[str, str]:
    """Return the flags of a command by the names of its parameters."""
    flags = dict[str, str]()
    for name, parameter in signature.parameters.items():
        for each in typing.get_args(parameter.annotation)[1:]:
            if isinstance(each, OptionInfo):
                # Within Annotated, typer keeps the first name as the default.
                declared = (*((each.default,) if isinstance(each.default, str) else ()), *(each.param_decls or ()))
                long = (flag.partition("/")[0] for flag in declared if flag.startswith("--"))
                flags[name] = next(long, flag_of(name))
    return flags


def engine_command(body: Callable[..., int]) -> Callable[..., None]:
    """Make a command of a function that takes `options`, with a flag for every field of EngineOptions in FLAGS."""
    hints = typing.get_type_hints(EngineOptions)
    fields = {field.name: field for field in dataclasses.fields(EngineOptions) if field.name in FLAGS}
    parameters: list[inspect.Parameter] = []
    for name, (panel, metavar, text) in FLAGS.items():
        parser = seconds if metavar == "TIME" else None
        flag = typer.Option(_spelling(name, fields[name].default), metavar=metavar or None, help=text, rich_help_panel=panel, parser=parser)
        parameters.append(_flag(name, fields[name].default, Annotated[list[str] | None if name in _LISTS else hints[name], flag]))
    return command(_with_parameters(body, "options", _engine_options, parameters))


def _engine_options(**values: Any) -> EngineOptions:
    """Return the options that flags give; what is a list with commas may also be given by several flags."""
    options = EngineOptions(**{**values, **{name: ",".join(values[name]) for name in _LISTS if values[name]}})
    check_trace(options.trace)
    return options


def takes(argument: str, flags: type[Any]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return a decorator that replaces the parameter `argument` by the fields of a dataclass, which are annotated as options of typer."""
    hints = typing.get_type_hints(flags, include_extras=True)
    unset = {dataclasses.MISSING: inspect.Parameter.empty}
    parameters = [_flag(each.name, unset.get(each.default, each.default), hints[each.name]) for each in dataclasses.fields(flags)]
    return lambda body: _with_parameters(body, argument, flags, parameters)


def _flag(name: str, default: object, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with_parameters(
    body: Callable[..., int], argument: str, make: Callable[..., object], parameters: list[inspect.Parameter]
) -> Callable[..., int]:
    """Return `body` with `parameters` in place of `argument`, whose value `make` builds from theirs."""

    @functools.wraps(body)
    def wrapped(**values: Any) -> int:
        made = make(**{each.name: values.pop(each.name) for each in parameters})
        return body(**{argument: made}, **values)

    own = [each for each in inspect.signature(body, eval_str=True).parameters.values() if each.name != argument]
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    wrapped.__signature__ = inspect.Signature([*own, *parameters])  # pyright: ignore[reportAttributeAccessIssue]
    return wrapped


def _spelling(name: str, default: object) -> str:
    """Return the flag of a field; a field that is on by default also gets a flag to turn it off."""
    flag = flag_of(name)
    return f"{flag}/--no-{flag.removeprefix('--')}" if default is True else flag


def load(
    model: str, options: EngineOptions, progress: str, *, check: Callable[[ModelFiles], None] = lambda files: None, **more: Any
) -> LLM:
    """Load the model that a command names, downloading it if need be; weights are not read yet.

    Args:
        model: The folder, GGUF file or hub id of the model.
        options: The options of the engine.
        progress: The value of `--progress`.
        check: Called with the files of the model before they are loaded, and before weights are converted.
        **more: Keywords of LLM that are not engine options.
    """
    from flexgen.llm import LLM
    from flexgen.session.lookup import files_of

    follow_if_told(model, options)
    is_there(Path(model), "MODEL", Path.is_dir)
    show = progress in ("auto", "rich") and sys.stderr.isatty()
    files = files_of(model, options, show_progress=show)
    check(files)
    return LLM(files, **more, **dataclasses.asdict(options))


def follow_if_told(model: str, options: EngineOptions) -> None:
    """Serve as a stage of a pipeline, and exit, if torchrun started this process as one that is not the first.

    Raises:
        OptionError: torchrun started another number of processes than the options name stages.
    """
    if not is_placed(os.environ):
        return
    if str(options.stages or 1) != (started := os.environ["WORLD_SIZE"]):
        given = "" if options.stages is None else f", not {options.stages}"
        raise OptionError(f"torchrun has started {counted(int(started), 'process', 'processes')}: give --stages {started}{given}")
    if os.environ["RANK"] != "0":
        from flexgen.session.follower import follow_leader

        raise typer.Exit(follow_leader(model, options))


def check_file(path: Path | None, flag: str) -> None:
    """Check that a file can be created at `path`.

    Raises:
        OptionError: The file cannot be created.
    """
    check_parent(path, flag)
    try:
        check_target(path)
    except StorageError as error:
        raise OptionError(f"{flag} {error}") from error


def check_apart(trace: str | None, *others: Path | None) -> None:
    """Check that the trace is written to none of the other files of a command.

    Raises:
        OptionError: It is.
    """
    if trace is not None and Path(trace).resolve() in [each.resolve() for each in others if each is not None]:
        raise OptionError(f"--trace {trace} is another file of this command; give another file")


def check_output_folder(path: Path | None, flag: str) -> None:
    """Check that a folder can be made, or written to, in a folder that exists.

    Raises:
        OptionError: It cannot.
    """
    check_parent(path, flag)
    try:
        if path is not None:
            check_folder(path)
    except StorageError as error:
        raise OptionError(f"{flag} {error}") from error


def check_parent(path: Path | None, flag: str) -> None:
    """Check that the folder of a file that is to be created exists.

    Raises:
        OptionError: The folder does not exist.
    """
    if path is not None and not is_there(path.parent, flag, Path.is_dir):
        raise OptionError(f"{flag} {path}: there is no folder {path.parent}")


def is_there(path: Path, flag: str, kind: Callable[[Path], bool]) -> bool:
    """Return whether a path is of a kind.

    Args:
        path: The path.
        flag: The name of the flag or argument, for messages.
        kind: The test, `Path.is_file` or `Path.is_dir`.

    Raises:
        OptionError: The path cannot be examined.
    """
    try:
        return kind(path)
    except OSError as error:
        raise OptionError(f"{flag} {path}: {error.strerror or error}") from error


def write_asked(path: Path, flag: str, text: str) -> ExitCode:
    """Write a file that a flag asks for, and return the exit code of a command whose result it is."""
    try:
        write_file(path, text)
    except StorageError as error:
        return complain(f"{flag} {error}", ExitCode.RESUMABLE)
    return ExitCode.ALL_ANSWERED
