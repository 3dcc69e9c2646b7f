"""Makes machines from a few figures that vendors print, with usual values for the rates that software reaches and for all else."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

from flexgen.base.from_json import fields_from_json
from flexgen.base.quantities import format_size, parse_size
from flexgen.errors import OptionError
from flexgen.options import DTYPE_BYTES
from flexgen.plan.machine import NOT_A_MACHINE, Cores, Curve, DiskRequest, Machine, Overheads, Rate

# The shares of a printed rate that are usually reached; the last is that of the host's memory for elementwise operations of a model.
DENSE_SHARE, ATTENTION_SHARE, MEMORY_SHARE, LINK_SHARE, DISK_RATE_SHARE, ELEMENTWISE_SHARE = 0.7, 0.3, 0.8, 0.85, 0.9, 0.3
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 4096)
# Measured with PyTorch and transformers on server processors of the years 2022 to 2025.
DRIVEN_DEVICE = Overheads(per_pass=5e-3, per_sequence=3e-5, per_unit=2e-4, per_layer_and_micro_batch=1e-3, per_gathered_row=2e-6)
LAUNCH_SECONDS = 5e-6  # an estimate of what PyTorch takes of such a processor to launch an operation on a GPU
DISK_CORE_SECONDS_PER_BYTE = 2e-11
DISK_REQUEST = DiskRequest(seconds=3e-5, core_seconds=2e-5)

# The rate of writing as a share of that of reading, and the rate of float32 as a share of that of narrower dtypes.
WRITE_SHARE, WIDE_SHARE = 0.5, 0.5
# No machine has less than this: a description with 64 or 7 means GB.
LEAST_BYTES, LEAST_RATE = 16 << 20, 1e6
REQUIRED_BY_DEVICE = ("device_memory", "host_to_device")
EXAMPLE = '{"host_bytes": "64GB", "host_memory": 80e9, "disk_read": 7e9, "flops": 2e12}'


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError("it must be a number of at least 0")
    return float(value)


def _bytes(name: str) -> Callable[[Any], int]:
    """Return a reader of a number of bytes, or of a size such as "64GB"; `name` is that of the field."""

    def read(value: Any) -> int:
        size = parse_size(value, name=name) if isinstance(value, str) else int(_number(value))
        if size < LEAST_BYTES and not (size == 0 and name == "device_bytes"):
            raise ValueError(f'it is in bytes, and at least {format_size(LEAST_BYTES)}; sizes may be written as "64GB"')
        return size

    return read


def _rate(name: str) -> Callable[[Any], float]:
    """Return a reader of a number, or of a size per second such as "7GB/s"; `name` is that of the field."""

    def read(value: Any) -> float:
        if isinstance(value, str) and (size := re.fullmatch(r"(.*\S)\s*/\s*s", value)):
            value = parse_size(size[1], name=name)
        if _number(value) < LEAST_RATE:
            raise ValueError(f'it is per second, and at least {LEAST_RATE:g}; write 7e9 or "7GB/s" for bytes, and 165e12 for FLOP/s')
        return float(value)

    return read


def _flops(value: Any) -> dict[str, float]:
    """Read one rate, for bfloat16 and float16, or one per dtype."""
    if not isinstance(value, dict):
        rate = _rate("flops")(value)
        return {"bfloat16": rate, "float16": rate, "float32": WIDE_SHARE * rate}
    rates = {dtype: _rate(f"flops of {dtype}")(each) for dtype, each in cast(dict[str, Any], value).items()}
    if unknown := [dtype for dtype in rates if dtype not in DTYPE_BYTES]:
        raise OptionError(f"{NOT_A_MACHINE}: flops is {json.dumps(unknown[0])}: known dtypes: {', '.join(DTYPE_BYTES)}")
    if not rates:
        raise ValueError("a rate is needed")
    return rates


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """The fields of a description, in the order in which messages list them; None or 0 where they follow from others."""

    host_bytes: Annotated[Any, _bytes("host_bytes")]
    host_memory: Annotated[Any, _rate("host_memory")]
    disk_read: Annotated[Any, _rate("disk_read")]
    flops: Annotated[Any, _flops]
    device_memory: Annotated[Any, _rate("device_memory")] = None
    host_to_device: Annotated[Any, _rate("host_to_device")] = None
    name: str = ""
    cores: Cores = 16
    disk_bytes: Annotated[Any, _bytes("disk_bytes")] = 10**12
    disk_write: Annotated[Any, _rate("disk_write")] = None
    device_bytes: Annotated[Any, _bytes("device_bytes")] = 0
    device_to_host: Annotated[Any, _rate("device_to_host")] = None
    source: str = ""


def is_box(fields: Any) -> bool:
    """Return whether a JSON value describes a machine by a few figures, rather than by all that `flexgen profile` measures."""
    return isinstance(fields, dict) and not {"dense", "overheads", "origin"} & cast(dict[str, Any], fields).keys()


def box_of(fields: Mapping[str, Any], name: str) -> Machine:
    """Return the machine that a few figures describe.

    Args:
        fields: The figures as printed: bytes (numbers, or sizes such as "64GB"), rates per second, and `flops`, which is either one number,
            for bfloat16 and float16, or one per dtype.
        name: The name of the machine, where the fields have none.

    Raises:
        OptionError: A field is missing, unknown or impossible; the message names it.
    """
    _check_names(fields)
    box = _Box(**dict[str, Any](name=name) | fields_from_json(_Box, fields, NOT_A_MACHINE))
    flops, host_memory = box.flops, box.host_memory
    has_device = box.device_bytes > 0
    memory = box.device_memory if has_device else host_memory  # the memory of the device that computes
    # The host's kernels reach half the rate of its memory, and less where many queries share a key.
    attending = {"host": {dtype: ((1.0, _share(host_memory, 0.5)), (8.0, _share(host_memory, 0.3))) for dtype in flops}}
    if has_device:
        attending["device"] = {dtype: ((1.0, _share(memory, 0.6)), (8.0, _share(memory, 0.6))) for dtype in flops}
    return Machine(
        name=box.name,
        device="cuda" if has_device else "cpu",
        origin="datasheet",
        date="",
        cores=box.cores,
        host_bytes=box.host_bytes,
        device_bytes=box.device_bytes,
        disk_bytes=box.disk_bytes,
        disk_read=_share(box.disk_read, DISK_RATE_SHARE),
        disk_write=_share(box.disk_write or WRITE_SHARE * box.disk_read, DISK_RATE_SHARE),
        disk_core_seconds_per_byte=DISK_CORE_SECONDS_PER_BYTE,
        disk_request=DISK_REQUEST,
        disk_slowdown=1.0,
        compute_slowdown=1.0,
        host_memory=_share(host_memory, MEMORY_SHARE),
        host_to_device=_share(box.host_to_device, LINK_SHARE) if has_device else None,
        device_to_host=_share(box.device_to_host or box.host_to_device, LINK_SHARE) if has_device else None,
        dense={dtype: _dense(peak, memory, dtype) for dtype, peak in flops.items()},
        attention={dtype: _share(peak, ATTENTION_SHARE) for dtype, peak in flops.items()},
        decode_attention=attending,
        elementwise={dtype: _share(memory, MEMORY_SHARE if has_device else ELEMENTWISE_SHARE) for dtype in flops},
        casts={f"float16 {dtype}": _share(host_memory, 0.3) for dtype in flops if dtype != "float16"},
        overheads=dataclasses.replace(DRIVEN_DEVICE, per_operation=LAUNCH_SECONDS if has_device else 0.0),
        source=box.source,
    )


def _check_names(fields: Mapping[str, Any]) -> None:
    """Check for unknown and missing fields."""
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(_Box)}
    for field in fields:
        if field not in known:
            close = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise OptionError(f"{NOT_A_MACHINE}: unknown field {field!r}; {hint}")
    needs = [field for field, required in known.items() if required or (field in REQUIRED_BY_DEVICE and fields.get("device_bytes"))]
    if missing := [field for field in needs if field not in fields]:
        raise OptionError(f"{NOT_A_MACHINE}: missing {', '.join(missing)}; a description needs at least {EXAMPLE}")


def _share(printed: float, share: float) -> Rate:
    return Rate(best=printed, typical=share * printed)


def _dense(peak: float, device_memory: float, dtype: str) -> Curve:
    """Return a curve in which few rows are bound by reading the weights: two FLOPs per number and row."""
    return tuple(
        (float(rows), Rate(best=min(peak, most), typical=min(DENSE_SHARE * peak, MEMORY_SHARE * most)))
        for rows, most in ((rows, rows * 2 * device_memory / DTYPE_BYTES[dtype]) for rows in ROWS)
    )
