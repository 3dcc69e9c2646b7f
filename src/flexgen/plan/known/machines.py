"""Machines that are known by name, for planning on hardware that is not there.

What a vendor prints is turned into what software reaches of it (box.py); a measured machine is a JSON file (`flexgen profile -o FILE`).
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

from flexgen.base.quantities import format_size, parse_size
from flexgen.errors import OptionError
from flexgen.options import EngineOptions
from flexgen.plan.known.box import box_of, device_box, is_box
from flexgen.plan.machine import Limits, Machine, Rate
from flexgen.plan.machine_file import machine_of, parsed

GB, TB = 10**9, 10**12
# Of the memory that a machine has, what a plan takes where nobody says.
HOST_SHARE, DEVICE_SHARE, STORAGE_SHARE = 0.8, 0.9, 0.8


def machine_names() -> tuple[str, ...]:
    """What `find_machine` knows without a file."""
    return tuple(_SHIPPED)


def find_machine(name: str) -> Machine:
    """The shipped machine of that name, or the one in a JSON file: measured, or described by a few figures (see box.py).

    Raises:
        OptionError: neither.
    """
    if name in _SHIPPED:
        return _SHIPPED[name]
    path = Path(name)
    if path.is_file():
        try:
            fields = parsed(path.read_text())
            return box_of(fields, path.stem) if is_box(fields) else machine_of(fields)
        except (OSError, UnicodeDecodeError, OptionError) as error:
            raise OptionError(f"--machine {name}: {error}") from error
    close = difflib.get_close_matches(name, _SHIPPED, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(_SHIPPED)}"
    raise OptionError(f"--machine {name} is neither a file nor a known machine; {hint}")


def limits_of(machine: Machine, options: EngineOptions) -> Limits:
    """The budgets on a machine that is not this one: the options', or most of what it has.

    Raises:
        OptionError: a size that cannot be read, or one for a tier that the machine does not have.
    """
    if options.device not in ("auto", machine.device):
        raise OptionError(f"--device {options.device}: machine {machine.name!r} computes on {machine.device!r}")
    if options.device_mem is not None and not machine.device_bytes:
        raise OptionError(f"--device-mem {options.device_mem}: machine {machine.name!r} has no device tier")
    host = _granted("--host-mem", options.host_mem, machine.host_bytes, HOST_SHARE)
    return Limits(
        device=machine.device,
        host_bytes=host,
        host_source=f"--host-mem {options.host_mem}" if options.host_mem else f"{HOST_SHARE:.0%} of what {machine.name} has",
        host_total_bytes=machine.host_bytes,
        host_total_source=machine.name,
        device_bytes=_granted("--device-mem", options.device_mem, machine.device_bytes, DEVICE_SHARE),
        device_total_bytes=machine.device_bytes,
        disk_bytes=_granted("--disk", options.disk, machine.disk_bytes, STORAGE_SHARE),
        disk_total_bytes=machine.disk_bytes,
        offload_dir="",
        offload_in_memory=False,
    )


def beside_checkpoint(limits: Limits, checkpoint_bytes: int, options: EngineOptions) -> Limits:
    """The budgets of `limits_of` once the model lies on the same disk; `--disk` is what it says."""
    if options.disk is not None:
        return limits
    return dataclasses.replace(limits, disk_bytes=int(STORAGE_SHARE * max(limits.disk_total_bytes - checkpoint_bytes, 0)))


def _granted(flag: str, text: str | None, total_bytes: int, share: float) -> int:
    if text is None:
        return int(share * total_bytes)
    size = parse_size(text, total_bytes=total_bytes, name=flag)
    if size > total_bytes:
        raise OptionError(f"{flag} {text} is more than the machine has ({format_size(total_bytes)})")
    return size


def _t4_of_the_paper() -> Machine:
    """The machine of Sheng et al. (ICML 2023), section 6: an NVIDIA T4 on Google's cloud.

    Links and disk as printed there (12 GB/s, about 2 GB/s read and 1 GB/s written); FLOP/s and the host's attention are the rates that
    its authors fitted to their runs (21.24 TFLOP/s of products in prefill, 9.97 of batched ones, 12.3 GFLOP/s on the host).
    """
    box = device_box(
        "t4-gcp", origin="paper", cores=16, host_bytes=208 * GB, device_bytes=16 * GB, disk_bytes=1500 * GB, disk_read=2e9, disk_write=1e9,
        host_memory=80e9, link=12e9, device_memory=320e9, flops={"float16": 65e12, "bfloat16": 65e12, "float32": 8.1e12},
    )  # fmt: skip
    fitted = Rate(best=21.24e12, typical=21.24e12)
    dense = {
        dtype: tuple((rows, min(rate, fitted, key=lambda each: each.typical)) for rows, rate in curve) if dtype != "float32" else curve
        for dtype, curve in box.dense.items()
    }
    attention = {dtype: Rate(best=9.97e12, typical=9.97e12) for dtype in box.attention}
    # OPT has one query per key: 1 FLOP per byte of KV in float16.
    host = {dtype: ((1.0, Rate(best=12.3e9, typical=12.3e9)),) for dtype in box.dense}
    return dataclasses.replace(
        box, dense=dense, attention=attention, decode_attention={**box.decode_attention, "host": host},
        disk_read=Rate(2e9, 2e9), disk_write=Rate(1e9, 1e9), host_to_device=Rate(12e9, 12e9), device_to_host=Rate(12e9, 12e9),
    )  # fmt: skip


def _nvidia(
    name: str, device_gb: int, host_gb: int, *, memory: float, tensor: float, plain: float, link: float, cores: int = 16
) -> Machine:
    """A desktop or server with one NVIDIA GPU and a PCIe 4 disk of 2 TB."""
    return device_box(
        name, cores=cores, host_bytes=host_gb * GB, device_bytes=device_gb * GB, disk_bytes=2 * TB, disk_read=7e9, disk_write=5e9,
        host_memory=80e9 if host_gb < 256 else 300e9, link=link, device_memory=memory,
        flops={"bfloat16": tensor, "float16": tensor, "float32": plain},
    )  # fmt: skip


# Dense tensor FLOP/s with float32 sums, memory and link rates as NVIDIA prints them.
_SHIPPED = {
    machine.name: machine
    for machine in (
        _t4_of_the_paper(),
        _nvidia("16gb-gpu-64gb", 16, 64, memory=288e9, tensor=88e12, plain=22e12, link=16e9),  # RTX 4060 Ti 16 GB, PCIe 4 x8
        _nvidia("rtx3090-64gb", 24, 64, memory=936e9, tensor=71e12, plain=35.6e12, link=32e9),
        _nvidia("rtx4090-64gb", 24, 64, memory=1008e9, tensor=165e12, plain=82.6e12, link=32e9),
        _nvidia("rtx5090-128gb", 32, 128, memory=1792e9, tensor=209e12, plain=104.8e12, link=64e9),
        _nvidia("a100-80gb-512gb", 80, 512, memory=2039e9, tensor=312e12, plain=19.5e12, link=32e9, cores=32),
        _nvidia("h100-80gb-512gb", 80, 512, memory=3350e9, tensor=989e12, plain=67e12, link=64e9, cores=32),
    )
}
