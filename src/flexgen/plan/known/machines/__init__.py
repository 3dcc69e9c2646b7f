"""Machines that are known by name, for planning for hardware that is not at hand, and the budgets on them.

The JSON files beside this one are read as a user's are: that of the t4-gcp has all rates, the others have the figures of data sheets
(box.py).

* t4-gcp is the machine of Sheng et al. (ICML 2023), section 6: an NVIDIA T4 on Google's cloud. Links and disk are as printed there (12
  GB/s, about 2 GB/s read and 1 GB/s written). FLOP/s and the host's attention are the rates that its authors fitted to their runs: 21.24
  TFLOP/s for products in prefill, 9.97 for batched ones, and 12.3 GFLOP/s on the host, which is 12.3 GB/s of KV (OPT has one query per
  key).
* The others are desktops and servers with one NVIDIA GPU and a PCIe 4 disk of 2 TB: dense tensor FLOP/s with float32 sums, memory and link
  rates in one direction as NVIDIA prints them. `source` says where, and which link; of its printed rate 85 % are expected. 16gb-gpu-64gb
  has an RTX 4060 Ti 16 GB.
* GPUs before compute capability 8.0 have no rates for bfloat16.
"""

from __future__ import annotations

import dataclasses
import difflib
from importlib import resources
from pathlib import Path

from flexgen.base.from_json import parsed_json
from flexgen.base.quantities import MIB, format_size, parse_size
from flexgen.errors import OptionError
from flexgen.options import EngineOptions
from flexgen.plan.known.box import box_of, is_box
from flexgen.plan.machine import (
    CUDA_BYTES,
    DEVICE_SHARE,
    DISK_SHARE,
    HOST_SHARE,
    NOT_A_MACHINE,
    Limits,
    Machine,
    machine_of,
    too_little_for_cuda,
)

MACHINES = (
    "t4-gcp", "t4-64gb", "l4-64gb", "a10g-64gb", "16gb-gpu-64gb", "rtx3060-12gb-32gb", "rtx3090-64gb", "rtx4090-64gb", "rtx5090-128gb",
    "a100-80gb-512gb", "h100-80gb-512gb",
)  # fmt: skip

# Approximate resident memory of a run before any weight is loaded: the interpreter, torch, transformers, kernels.
PROCESS_BYTES = {"cpu": 480 * MIB, "sim": 480 * MIB, "cuda": 1500 * MIB}


def find_machine(name: str, option: str = "machine") -> Machine:
    """Return the shipped machine of that name, or the one in a JSON file: measured, or described by a few figures (see box.py).

    Args:
        name: The name or file.
        option: The option that names it, for messages.

    Raises:
        OptionError: The name is neither a file nor a shipped machine, or the file does not describe a machine.
    """
    if name in MACHINES:
        return _machine_of((resources.files(__name__) / f"{name}.json").read_text(encoding="utf-8"), name)
    path = Path(name)
    if path.is_file():
        try:
            return _machine_of(path.read_text(), path.stem)
        except (OSError, UnicodeDecodeError, OptionError) as error:
            raise OptionError(f"{option}={name!r}: {error}") from error
    close = difflib.get_close_matches(name, MACHINES, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(MACHINES)}"
    raise OptionError(f"{option}={name!r} is neither a file nor a known machine; {hint}")


def machine_names(text: str) -> list[str]:
    """Return the names or files of several machines, which stand between commas; "t4-gcp*4" stands for four that are alike.

    Raises:
        OptionError: A name is empty, or what follows its last star is not a number of machines.
    """
    names: list[str] = []
    for part in text.split(","):
        name, star, number = part.strip().rpartition("*")
        if not star:
            name, number = number, "1"
        if not name.strip() or not number.strip().isdecimal() or not int(number):
            raise OptionError(f"machines={text!r}: {part!r} is not a machine; write names or files between commas, NAME*4 for four alike")
        names += [name.strip()] * int(number)
    return names


def _machine_of(text: str, name: str) -> Machine:
    """Return the machine of a JSON text; `name` becomes its name where a few figures give none."""
    fields = parsed_json(text, NOT_A_MACHINE)
    return box_of(fields, name) if is_box(fields) else machine_of(fields)


def limits_of(machine: Machine, options: EngineOptions) -> Limits:
    """Return the budgets on a machine that is not this one: those of the options, else most of what the machine has.

    Raises:
        OptionError: The options name another device, or a size is invalid, too large, or for a tier that the machine does not have.
    """
    if options.device not in ("auto", machine.device):
        raise OptionError(f"device={options.device!r}: machine {machine.name!r} computes on {machine.device!r}")
    if options.device_mem is not None and not machine.device_bytes:
        raise OptionError(f"device_mem={options.device_mem!r}: machine {machine.name!r} has no device tier")
    host = _granted("host_mem", options.host_mem, machine.host_bytes, HOST_SHARE)
    device = _granted("device_mem", options.device_mem, machine.device_bytes, DEVICE_SHARE)
    overhead = CUDA_BYTES if machine.device == "cuda" else 0
    if 0 < overhead >= device:
        raise OptionError(too_little_for_cuda(options.device_mem, device, overhead))
    return Limits(
        device=machine.device,
        host_bytes=host,
        host_source=f"host_mem={options.host_mem!r}" if options.host_mem else f"{HOST_SHARE:.0%} of what {machine.name} has",
        host_total_bytes=machine.host_bytes,
        host_total_source=machine.name,
        device_bytes=device,
        device_total_bytes=machine.device_bytes,
        disk_bytes=_granted("disk", options.disk, machine.disk_bytes, DISK_SHARE),
        disk_total_bytes=machine.disk_bytes,
        offload_dir="",
        offload_in_memory=False,
        device_overhead_bytes=overhead,
    )


def beside_checkpoint(limits: Limits, checkpoint_bytes: int, options: EngineOptions) -> Limits:
    """Return the budgets of `limits_of` once the model lies on the same disk; a size given by `disk` stays as it is."""
    if options.disk is not None:
        return limits
    return dataclasses.replace(limits, disk_bytes=int(DISK_SHARE * max(limits.disk_total_bytes - checkpoint_bytes, 0)))


def _granted(name: str, text: str | None, total_bytes: int, share: float) -> int:
    if text is None:
        return int(share * total_bytes)
    size = parse_size(text, total_bytes=total_bytes, name=f"{name}=")
    if size > total_bytes:
        raise OptionError(f"{name}={text!r} is more than the machine has ({format_size(total_bytes)})")
    return size
