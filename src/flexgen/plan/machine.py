"""Machine and Limits: the rates, capacities and budgets of one computer as numbers, found by profile/; machines are kept as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

from flexgen.base.from_json import Positive, dataclass_from_json, needed, parsed_json
from flexgen.base.quantities import MIB, format_size
from flexgen.errors import OptionError
from flexgen.options import DEVICES

FEW_CORES = 4
# The shares of memory and of free disk that a plan may use where the options give no budget.
HOST_SHARE, DEVICE_SHARE, DISK_SHARE = 0.8, 0.9, 0.8
CUDA_BYTES = 512 * MIB  # of a CUDA device: its context and libraries in a process, where they were not measured
# Of each layer of the model with which `per_layer_and_micro_batch` is measured (profile/overheads.py), as ModelSpec.operations counts.
LAYER_OPERATIONS = 42
_INT8, _SPARSE = " int8", " sparse "
NOT_A_MACHINE = "this is not the description of a machine"  # how messages begin


def io_threads(cores: int) -> int:
    """Return the number of threads that read and write files: two keep a disk busy, and few cores have no time for more."""
    return 2 if cores <= FEW_CORES else 4


def kv_rate_name(dtype: str, kv_format: str) -> str:
    """Return the key of `Machine.decode_attention` for a low-bit format of KV beside that dtype of computing."""
    return f"{dtype} {kv_format}"


def sparse_rate_name(name: str, share: float) -> str:
    """Return the key of `Machine.decode_attention` for sparse attention with this share of the positions; `name` is that of all of them."""
    return f"{name}{_SPARSE}{share:g}"


def int8_name(name: str) -> str:
    """Return the key of what concerns numbers that are rounded to 8 bits for computing: in `Machine.dense` and `Machine.casts` with the
    dtype of computing, in `ModelSpec.decoded_from` with the stored dtype or format."""
    return name + _INT8


def rounded_from(name: str) -> str | None:
    """Return what `int8_name` was called with; None for other names."""
    return name.removesuffix(_INT8) if name.endswith(_INT8) else None


Cores = Annotated[int, needed(bool, "more than 0 is needed")]
ORIGINS = ("measured", "datasheet", "paper")
_DEVICES = tuple(name for name in DEVICES if name != "auto")


def too_little_for_cuda(device_mem: str | None, budget_bytes: int, overhead_bytes: int) -> str:
    """Return the message for a budget of device memory that has no room beside CUDA's context and libraries."""
    asked = "the device's free memory" if device_mem is None else f"device_mem={device_mem!r}"
    return (
        f"{asked} ({format_size(budget_bytes)}) has no room for a model: CUDA's context and libraries alone take "
        f"{format_size(overhead_bytes)}: {'free some memory of the device' if device_mem is None else 'raise device_mem'}"
    )


def has_device_tier(device: str) -> bool:
    """Return whether a device is apart from the host, with memory of its own behind a link; a CPU computes in host memory."""
    return device != "cpu"


@dataclass(frozen=True, slots=True)
class Rate:
    """Work per second, measured in several rounds.

    Attributes:
        best: The best of all rounds. Ideal times divide by it.
        typical: The median of all rounds. Expected times divide by it.
        spread: The width of the middle 80 % of the rounds, as a share of the median.
    """

    best: Positive
    typical: Positive
    spread: float = 0.0

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Rate:
        """Return the rate that these rounds measured, each in work per second."""
        ranked = sorted(rounds)
        median = ranked[len(ranked) // 2] if len(ranked) % 2 else (ranked[len(ranked) // 2 - 1] + ranked[len(ranked) // 2]) / 2
        low, high = ranked[round(0.1 * (len(ranked) - 1))], ranked[round(0.9 * (len(ranked) - 1))]
        return cls(best=ranked[-1], typical=median, spread=(high - low) / median)


Curve = Annotated[tuple[tuple[Positive, Rate], ...], needed(bool, "a curve needs a point")]
"""Rates by size, in order of rising sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Seconds that do not depend on how many bytes are moved or FLOPs computed.

    Attributes:
        per_pass: Seconds of sampling, admission and bookkeeping in each pass.
        per_sequence: Seconds for each next token or prompt of a pass.
        per_unit: Seconds for each unit that streams in a pass.
        per_layer_and_micro_batch: Seconds of the modules' own code, of launching LAYER_OPERATIONS on a device, and of switching, for each
            layer and micro-batch.
        per_gathered_row: Seconds for each row of an embedding that is not resident.
        per_operation: Seconds of the host to launch an operation on a device; 0 where that is not known. It is part of the others, and
            prices the operations by which layers differ from those that were measured.
    """

    per_pass: float
    per_sequence: float
    per_unit: float
    per_layer_and_micro_batch: float
    per_gathered_row: float
    per_operation: float = 0.0


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """The cost of a small read or write in addition to its bytes.

    Attributes:
        seconds: The time of one request while all I/O threads are at work, so that a thousand take a thousand times as long.
        core_seconds: The processor time of one request.
    """

    seconds: float
    core_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Capacities and rates of a computer, measured outside of any run.

    Attributes:
        name: The name that is shown to people.
        device: Where matrix products run: "cpu", "cuda" or "sim".
        origin: Where the numbers come from: "measured", "datasheet" or "paper".
        date: The ISO date of the measurement.
        versions: The versions of the software that was measured.
        busy_cores: The number of cores that other programs kept busy during the measurement.
        cores: The number of usable cores.
        host_bytes: The memory of the host.
        device_bytes: The memory of the device; 0 on "cpu".
        disk_bytes: The size of the disk.
        disk_read: Bytes/s read from the folder's file system, without the page cache.
        disk_write: Bytes/s written to it, without the page cache.
        disk_core_seconds_per_byte: The processor time of reading a byte.
        disk_request: The additional cost of each small read or write.
        disk_slowdown: How many times longer reading takes while the host computes: all there is on a CPU device, attention beside another.
        compute_slowdown: How many times longer that takes while the disk is read.
        host_memory: Bytes/s of plain reads by all cores.
        host_to_device: Bytes/s of the link to the device; None where there is no separate device.
        device_to_host: Bytes/s of the link back; None where there is no separate device.
        dense: By dtype, FLOP/s of linear layers by the number of rows, on the device that computes; in int8 on a CPU by names such as
            "bfloat16 int8" (see `int8_name`).
        attention: By dtype, FLOP/s of causal prefill attention, on the device that computes.
        decode_attention: By "host" or "device" and then by dtype, KV bytes/s of the attention of next tokens, by FLOPs per KV byte; for KV
            in a low-bit format by names such as "bfloat16 int4" (see `kv_rate_name`). Under sparse attention the bytes of all that tokens
            see count, by names such as "bfloat16 int4 sparse 0.1" (see `sparse_rate_name`).
        elementwise: By dtype, bytes/s through norms, activations and rotations (counted by pass_time.elementwise_bytes).
        casts: By stored dtype or format and computed dtype ("float16 bfloat16", "mxfp4 bfloat16"), bytes/s that a decode stage yields; for
            rounding numbers of a dtype see `int8_name`.
        overheads: Seconds that do not depend on how many bytes are moved or FLOPs computed.
        duplex_slowdown: How many times longer a copy in one direction of a link takes beside copies in the other.
        link_slowdown: How many times longer copies to a device take while the host attends.
        host_slowdown: How many times longer the host attends while copies go to a device.
        device_casts: What `casts` is of the host, of a device that decodes units itself.
        source: Where the figures of a datasheet or paper stand, for people.
    """

    name: str
    device: Annotated[str, needed(_DEVICES.__contains__, f"known: {', '.join(_DEVICES)}")]
    origin: Annotated[str, needed(ORIGINS.__contains__, f"known: {', '.join(ORIGINS)}")]
    date: str
    cores: Cores
    host_bytes: int
    device_bytes: int
    disk_bytes: int
    disk_read: Rate
    disk_write: Rate
    disk_core_seconds_per_byte: float
    disk_request: DiskRequest
    disk_slowdown: Positive
    compute_slowdown: Positive
    host_memory: Rate
    host_to_device: Rate | None
    device_to_host: Rate | None
    dense: dict[str, Curve]
    attention: dict[str, Rate]
    decode_attention: dict[str, dict[str, Curve]]
    elementwise: dict[str, Rate]
    casts: dict[str, Rate]
    overheads: Overheads
    versions: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    busy_cores: float = 0.0
    duplex_slowdown: Positive = 1.0
    link_slowdown: Positive = 1.0
    host_slowdown: Positive = 1.0
    device_casts: dict[str, Rate] = dataclasses.field(default_factory=dict[str, Rate])
    source: str = ""

    @property
    def io_threads(self) -> int:
        """Threads that read and write files."""
        return io_threads(self.cores)

    @property
    def has_bfloat16(self) -> bool:
        """Whether there are units for bfloat16: a machine whose rates are those of data sheets has what they print."""
        return self.origin == "measured" or "bfloat16" in self.dense

    def dense_flops(self, dtype: str) -> float:
        """Return the best rate of a linear layer over all row counts.

        Raises:
            OptionError: The machine was not measured in that dtype.
        """
        return max(rate.best for _, rate in self.dense[self.known(dtype)])

    def known(self, dtype: str) -> str:
        """Return the dtype unchanged if the machine was measured in it.

        Raises:
            OptionError: The machine was not measured in that dtype.
        """
        if dtype not in self.dense:
            if (of := rounded_from(dtype)) is not None:
                raise OptionError(f"machine {self.name!r} has no rates for products in int8 beside {of}: measure it again")
            known = ", ".join(sorted(self.dense)) or "none"
            raise OptionError(f"machine {self.name!r} has no rates for {dtype} (known: {known}): measure it again")
        return dtype

    def to_json(self) -> str:
        """Return the JSON text that `read_machine` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2)


# What descriptions of machines need not have.
_ADDED: dict[str, Any] = {"duplex_slowdown": 1.0, "link_slowdown": 1.0, "host_slowdown": 1.0, "device_casts": {}, "source": ""}


def read_machine(text: str) -> Machine:
    """Return the machine that a JSON text describes.

    Raises:
        OptionError: The text is not JSON, or does not describe a machine (see `machine_of`).
    """
    return machine_of(parsed_json(text, NOT_A_MACHINE))


def machine_of(fields: Any) -> Machine:
    """Return the machine that a JSON value describes.

    Raises:
        OptionError: A key is unknown or missing, a value is impossible (the message names both), or the value is not a JSON object.
    """
    if isinstance(fields, dict):
        fields = _ADDED | cast(dict[str, Any], fields)
        if isinstance(costs := fields.get("overheads"), dict):
            fields["overheads"] = {"per_operation": 0.0} | cast(dict[str, Any], costs)
    return dataclass_from_json(Machine, fields, NOT_A_MACHINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The hard budgets of this process, found by profile/limits.py.

    Attributes:
        device: "cpu", "cuda" or "sim".
        host_bytes: The budget of host memory for the whole process, interpreter included.
        host_source: Where that budget comes from, for people.
        host_total_bytes: The hard limit above it (physical memory, a control group, an rlimit).
        host_total_source: Where the hard limit comes from, for people.
        device_bytes: The budget of device memory for the whole process, context and libraries included; 0 on a CPU device.
        device_total_bytes: The memory that the device has; 0 on a CPU device.
        disk_bytes: The budget for spilled KV on the offload folder's file system.
        disk_total_bytes: The size of that file system.
        offload_dir: The folder in which a fresh offload folder is made.
        offload_in_memory: Whether that folder lies on a memory file system: its bytes then count as host bytes.
        device_overhead_bytes: Of the budget of device memory, what a CUDA context and its libraries take; 0 on other devices.
    """

    device: str
    host_bytes: int
    host_source: str
    host_total_bytes: int
    host_total_source: str
    device_bytes: int
    device_total_bytes: int
    disk_bytes: int
    disk_total_bytes: int
    offload_dir: str
    offload_in_memory: bool
    device_overhead_bytes: int = 0
