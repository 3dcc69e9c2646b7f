"""`flexgen convert`: writes a folder with the weights of a model in 8 or 4 bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexgen.base.quantities import MIB, format_size, parse_size
from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.cli.options import ProgressFlag, check_output_folder, command, is_there
from flexgen.cli.terminal import showing
from flexgen.errors import OptionError, StorageError

if TYPE_CHECKING:
    from flexgen.quantize.record import Record

_LEAST_SHARD_BYTES = MIB
_TERMINAL_SECONDS, _LOG_SECONDS = 0.25, 10.0


@command
def convert(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or a hub id such as facebook/opt-6.7b; not a GGUF file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder, or that of the same conversion, to go on.")],
    weight_format: Annotated[
        str, typer.Option(metavar="int4|int8|flexgen-v0", help="Format of the weights; flexgen-v0 is the FlexGen paper's, to compare.")
    ] = "int4",
    group_size: Annotated[
        int | None,
        typer.Option(metavar="32|64|128", help="Weights that share a scale, fewer are more exact; else 32 for int4, 64 for others."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Tensors that stay as they are, such as '*.down_proj.*'; may be repeated.")
    ] = None,
    eight_bits: Annotated[
        list[str] | None, typer.Option("--int8", metavar="PATTERN", help="Tensors that have 8 bits in int4, named alike; may be repeated.")
    ] = None,
    quantize_head: Annotated[bool, typer.Option("--quantize-head", help="Convert the output head, too.")] = False,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes of a file of weights.")] = "2GB",
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Also convert weights that are in a low-bit format already, and lose by it twice.")
    ] = False,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub model.")] = None,
    progress: ProgressFlag = "auto",
) -> int:
    """Write a model with its weights in 4 or 8 bits into a folder.

    A folder in int4 or int8 is in the format of compressed-tensors
    (pack-quantized), which vLLM and transformers read as well. Nothing but
    the model is needed: no calibration data. If it is interrupted, the same
    command goes on.
    """
    from flexgen.quantize.settings import QuantizeSettings

    if group_size == 0:
        raise OptionError("--group-size 0 is not supported; take one of 32, 64, 128, or leave it out")
    settings = QuantizeSettings(
        weight_format=weight_format, group_size=group_size or 0, keep=tuple(keep or ()), eight_bits=tuple(eight_bits or ()),
        quantize_head=quantize_head,
    )  # fmt: skip
    shard_bytes = parse_size(shard_size, name="--shard-size")
    if shard_bytes < _LEAST_SHARD_BYTES:
        meant = f"; did you mean {shard_size.strip()}MiB? (a number without a unit is bytes)" if shard_size.strip().isdecimal() else ""
        raise OptionError(f"--shard-size {shard_size!r} is less than {format_size(_LEAST_SHARD_BYTES)}{meant}")
    check_output_folder(output, "--output")
    is_there(Path(model), "MODEL", Path.is_dir)
    if Path(model).is_dir() and output.resolve() == Path(model).resolve():
        raise OptionError(f"--output {output} is the model itself: give another folder")
    on_terminal = progress in ("auto", "rich") and sys.stderr.isatty()
    with showing(progress) as display:
        from flexgen.hub.resolve import resolve_model
        from flexgen.quantize.cache import announced
        from flexgen.quantize.convert import convert as write
        from flexgen.quantize.convert import num_cores
        from flexgen.quantize.record import FolderIsLocked
        from flexgen.quantize.source import weight_bytes

        files = resolve_model(model, revision=revision, show_progress=on_terminal)
        tell = announced(files.name, _TERMINAL_SECONDS if on_terminal else _LOG_SECONDS)
        try:
            record = write(
                files, output, settings, num_threads=num_cores(), shard_bytes=shard_bytes, allow_requantize=allow_requantize,
                on_progress=tell,
            )  # fmt: skip
        except FolderIsLocked:
            raise
        except StorageError as error:
            display.close()
            return complain(error, ExitCode.RESUMABLE)
    print(format_record(output, record, before_bytes=weight_bytes(files)))
    return ExitCode.ALL_ANSWERED


def format_record(folder: Path, record: Record, *, before_bytes: int) -> str:
    """Return what a conversion has written, as text, and the bytes of the weights before it."""
    reasons: dict[str, list[str]] = {}
    for name, reason in record.kept.items():
        reasons.setdefault(reason, []).append(name)
    weight_format, group_size = record.settings["weight_format"], record.settings["group_size"]
    sizes = f"{format_size(record.total_bytes)} of weights ({format_size(before_bytes)} before)"
    lines = [f"{folder}: {record.source} in {weight_format}, groups of {group_size}, {sizes}"]
    for reason, names in sorted(reasons.items()):
        lines.append(f"  not converted, {reason}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    return "\n".join(lines)
