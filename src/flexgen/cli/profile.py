"""`flexgen profile`: measures the rates of this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexgen.base.quantities import counted, format_size
from flexgen.cli.exit_codes import ExitCode
from flexgen.cli.options import check_file, command, write_asked
from flexgen.cli.terminal import showing
from flexgen.errors import OptionError
from flexgen.options import DEVICES, DTYPES

if TYPE_CHECKING:
    from flexgen.plan.machine import Machine, Rate

logger = logging.getLogger(__name__)


@command
def profile(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Whose disk to measure: where weights stream from.", exists=True, file_okay=False)
    ] = Path(),
    device: Annotated[str, typer.Option(metavar="|".join(DEVICES), help="Where matrix products run.")] = "auto",
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="|".join(DTYPES[1:]), help="Dtype to measure; may be repeated. Default: what runs here use.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the rates as JSON, for --machine.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure in a third of the time, less exactly.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Measure this machine, in half a minute.

    Disk, memory, links, matrix products, attention, and what a pass costs
    by itself. Up to three times as long where other programs disturb it:
    then the better rates are kept. Runs use what is kept until hardware or
    versions change.
    """
    check_file(output, "--output")
    if device not in DEVICES:
        raise OptionError(f"--device {device!r} is unknown; known: {', '.join(DEVICES)}")
    if dtype and (unknown := [name for name in dtype if name not in DTYPES[1:]]):
        raise OptionError(f"--dtype {unknown[0]!r} is unknown; known: {', '.join(DTYPES[1:])}")
    with showing("auto"):
        machine = _measured(device, dtype, folder, quick=quick)
    print(machine.to_json() if as_json else format_machine(machine))
    return ExitCode.ALL_ANSWERED if output is None else write_asked(output, "--output", machine.to_json() + "\n")


def _measured(device: str, dtype: list[str] | None, folder: Path, *, quick: bool) -> Machine:
    """Measure the machine, keep its profile, and return it."""
    from flexgen.profile.int8 import with_int8
    from flexgen.profile.kept import keep, kept_machine
    from flexgen.profile.limits import find_device
    from flexgen.profile.measure import MAX_BYTES, measure
    from flexgen.profile.repeat import settled
    from flexgen.session.dtypes import has_bfloat16

    device = find_device(device)
    usual = ("bfloat16", "float16" if device == "cuda" else "float32") if has_bfloat16(device) else ("float16", "float32")
    dtypes = tuple(dtype or usual)
    before: list[Machine] = []
    for name in dtypes:
        kept = kept_machine(device, name, folder, quick=quick)
        before += [kept] if kept is not None and kept not in before else []
    machine = settled(lambda: measure(device, dtypes, folder, quick=quick), before, logger.info)
    if device == "cpu":
        for name in dtypes:
            machine = with_int8(machine, name, MAX_BYTES, quick=quick)
    for path in keep(machine, dtypes, folder, quick=quick):
        logger.info("kept in %s", path)
    return machine


def format_machine(machine: Machine) -> str:
    """Return the rates as text, a line each: typical rate, best rate, spread."""
    from flexgen.profile.repeat import is_disturbed

    lines = [f"{machine.name} ({machine.origin} {machine.date}), {format_size(machine.host_bytes)} of memory"]
    lines += [_line("disk read", machine.disk_read, "B/s"), _line("disk write", machine.disk_write, "B/s")]
    lines.append(f"{'reading takes':<32}{machine.disk_core_seconds_per_byte * 1e9:10.3f} core-seconds per GB")
    request = machine.disk_request
    lines.append(f"{'a small read or write':<32}{request.seconds * 1e6:10.0f} µs       {request.core_seconds * 1e6:.0f} µs of a core")
    lines += _together(machine)
    lines.append(_line("memory read", machine.host_memory, "B/s"))
    links = {"host to device": machine.host_to_device, "device to host": machine.device_to_host}
    lines += [_line(name, rate, "B/s") for name, rate in links.items() if rate is not None]
    for dtype, curve in machine.dense.items():
        lines += [_line(f"linear, {dtype}, {counted(round(rows), 'row')}", rate, "FLOP/s") for rows, rate in curve]
    lines += [_line(f"prompt attention, {dtype}", rate, "FLOP/s") for dtype, rate in machine.attention.items()]
    for home, curves in machine.decode_attention.items():
        for dtype, curve in curves.items():
            lines += [_line(f"KV on {home}, {dtype}, {ratio:g} FLOP/B", rate, "B/s") for ratio, rate in curve]
    lines += [_line(f"elementwise, {dtype}", rate, "B/s") for dtype, rate in machine.elementwise.items()]
    lines += [_line(f"cast {cast.replace(' ', ' to ')}", rate, "B/s") for cast, rate in machine.casts.items()]
    lines += [_line(f"{cast.replace(' ', ' to ')} on device", rate, "B/s") for cast, rate in machine.device_casts.items()]
    costs = machine.overheads
    lines.append(
        f"a pass by itself {costs.per_pass * 1e3:.2f} ms; per sequence {costs.per_sequence * 1e6:.0f} µs, per streamed unit "
        f"{costs.per_unit * 1e6:.0f} µs, per layer and micro-batch {costs.per_layer_and_micro_batch * 1e6:.0f} µs, "
        f"per gathered row {costs.per_gathered_row * 1e6:.1f} µs"
        + (f", per launched operation {costs.per_operation * 1e6:.1f} µs" if costs.per_operation else "")
    )
    if is_disturbed(machine):
        lines.append(
            f"other programs kept at least {machine.busy_cores:.1f} cores busy whenever this was measured: once they are done, "
            "`flexgen profile` finds the better rates"
        )
    return "\n".join(lines)


def _together(machine: Machine) -> list[str]:
    """Return how much what goes on at the same time slows each other down."""
    pairs = [("reading", machine.disk_slowdown, "computing", machine.compute_slowdown)]
    if machine.device == "cuda":
        attending = "attending on the host"
        pairs = [
            ("reading", machine.disk_slowdown, attending, machine.compute_slowdown),
            ("copying to the device", machine.link_slowdown, attending, machine.host_slowdown),
            ("copying to the device", machine.duplex_slowdown, "copying back", machine.duplex_slowdown),
        ]
    return [
        f"together: {one} takes {factor:.2f} times as long while {other}, {other} {of_other:.2f} times while {one}"
        for one, factor, other, of_other in pairs
    ]


def _line(what: str, rate: Rate, unit: str) -> str:
    giga = 1e9
    return f"{what:<32}{rate.typical / giga:10.2f} G{unit:<7} best {rate.best / giga:10.2f}   spread {rate.spread:4.0%}"
