"""`flexgen cache`: the converted weights that runs with --weight-format keep."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexgen.base.quantities import counted, format_size
from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.cli.options import command
from flexgen.cli.terminal import showing
from flexgen.errors import OptionError, StorageError

if TYPE_CHECKING:
    from flexgen.quantize.cache import CacheEntry


@command
def ls(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each entry.")] = False) -> int:
    """List converted weights, with their sizes and what they were made from."""
    with showing("none"):
        from flexgen.quantize.cache import cache_folder, entries

        found = entries()
    if as_json:
        for entry in found:
            print(json.dumps({"name": entry.name, "bytes": entry.nbytes, **_told(entry)}))
        return ExitCode.ALL_ANSWERED
    print(f"{cache_folder()}: {format_size(sum(entry.nbytes for entry in found))} in {counted(len(found), 'conversion')}")
    for entry in found:
        state = "" if entry.state == "complete" else f", {entry.state}"
        print(f"  {format_size(entry.nbytes):>10}  {entry.name}: {entry.source or 'unknown'} in {entry.weight_format or '?'}{state}")
    return ExitCode.ALL_ANSWERED


def _told(entry: CacheEntry) -> dict[str, str]:
    return {"folder": str(entry.folder), "source": entry.source, "weight_format": entry.weight_format, "state": entry.state}


@command
def rm(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME ...", help="Names of entries, or of the models.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Remove all of them.")] = False,
) -> int:
    """Remove converted weights; a run that needs them makes them again."""
    if bool(names) == every:
        raise OptionError("name what to remove, as `flexgen cache ls` shows it, or give --all")
    with showing("none"):
        from flexgen.quantize.cache import entries, find_entries, remove

        found = entries() if every else find_entries(names or [])
        for entry in found:
            remove(entry)
    print(f"removed {counted(len(found), 'conversion')}, {format_size(sum(entry.nbytes for entry in found))}")
    return ExitCode.ALL_ANSWERED


@command
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME ...", help="Entries, models, or folders of `flexgen convert`. Default: all entries.")
    ] = None,
) -> int:
    """Read converted weights, and compare them with what was written."""
    with showing("auto"):
        damaged, count = _verified(names or [])
    for sentence in damaged:
        complain(sentence, ExitCode.SOME_FAILED)
    print(f"{counted(count, 'conversion')}: {counted(len(damaged), 'damage') if damaged else 'all as it was written'}")
    if damaged:
        print("a damaged file that is removed is written again by the next run, or by the same `flexgen convert`")
    return ExitCode.SOME_FAILED if damaged else ExitCode.ALL_ANSWERED


def _verified(names: list[str]) -> tuple[list[str], int]:
    """Return what is wrong, and how many conversions were read."""
    from flexgen.base.steps import step
    from flexgen.kernels.threads import KernelThreads
    from flexgen.quantize.cache import entries, find_entries
    from flexgen.quantize.record import RECORD_FILE, read_record
    from flexgen.quantize.sums import damages

    folders = [Path(name) for name in names if (Path(name) / RECORD_FILE).is_file()]
    cached = [name for name in names if Path(name) not in folders]
    folders += [entry.folder for entry in (find_entries(cached) if cached else entries() if not names else [])]
    found: list[str] = []
    with KernelThreads(len(os.sched_getaffinity(0))) as threads:
        for folder in folders:
            step(f"reading {folder}")
            try:
                record = read_record(folder)
            except StorageError as error:
                found.append(str(error))
                continue
            found += [f"{folder} is not the folder of a conversion"] if record is None else damages(folder, record, threads.over)
    return found, len(folders)
