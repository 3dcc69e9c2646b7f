"""Machine and Limits: rates and capacities of one computer, as numbers.  Found by profile/; machines are kept as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen.errors import OptionError

FEW_CORES = 4


def io_threads(cores: int) -> int:
    """Threads that read and write files: two keep a disk busy, and few cores have no time for more."""
    return 2 if cores <= FEW_CORES else 4


ORIGINS = ("measured", "datasheet", "paper")


@dataclass(frozen=True, slots=True)
class Rate:
    """Work per second, as measured again and again.

    Attributes:
        best: the best of all rounds; ideal times divide by it.
        typical: the median of all rounds; expected times divide by it.
        spread: the width of the middle 80 % of the rounds, as a share of the median.
    """

    best: float
    typical: float
    spread: float = 0.0

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Rate:
        """The rate that these rounds measured, each in work per second."""
        ranked = sorted(rounds)
        median = ranked[len(ranked) // 2] if len(ranked) % 2 else (ranked[len(ranked) // 2 - 1] + ranked[len(ranked) // 2]) / 2
        low, high = ranked[round(0.1 * (len(ranked) - 1))], ranked[round(0.9 * (len(ranked) - 1))]
        return cls(best=ranked[-1], typical=median, spread=(high - low) / median)


Curve = tuple[tuple[float, Rate], ...]
"""Rates by size, in order of rising sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Seconds that do not depend on how much is moved or computed.

    Attributes:
        per_pass: seconds of sampling, admission and bookkeeping in each pass.
        per_sequence: seconds for each next token or prompt of a pass.
        per_unit: seconds for each unit that streams in a pass.
        per_layer_and_micro_batch: seconds of the modules' own code and of switching, for each layer and micro-batch.
        per_gathered_row: seconds for each row of an embedding that is not resident.
    """

    per_pass: float
    per_sequence: float
    per_unit: float
    per_layer_and_micro_batch: float
    per_gathered_row: float


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """What a small read or write costs in addition to its bytes.

    Attributes:
        seconds: time of one request with all I/O threads at work, so that a thousand take a thousand times as long.
        core_seconds: processor time of one request.
    """

    seconds: float
    core_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Capacities and rates, measured apart from any run.

    Attributes:
        name: name that is shown to people.
        device: where matrix products run: "cpu", "cuda" or "sim".
        origin: where the numbers come from: "measured", "datasheet" or "paper".
        date: ISO date of the measurement.
        versions: versions of the software that was measured.
        busy_cores: cores that other programs kept busy during the measurement.
        cores: usable cores.
        host_bytes: memory of the host.
        device_bytes: memory of the device; 0 on "cpu".
        disk_bytes: size of the disk.
        disk_read: bytes/s read from the folder's file system, without the page cache.
        disk_write: bytes/s written to it, without the page cache.
        disk_core_seconds_per_byte: processor time of reading a byte.
        disk_request: what each small read or write costs in addition.
        disk_slowdown: how many times longer reading takes while a CPU device computes.
        compute_slowdown: how many times longer a CPU device computes while the disk is read.
        host_memory: bytes/s of plain reads by all cores.
        host_to_device: bytes/s of the link to the device; None where there is no separate device.
        device_to_host: bytes/s of the link back; None where there is no separate device.
        dense: dtype -> FLOP/s of linear layers over rows, on the device that computes.
        attention: dtype -> FLOP/s of causal prefill attention, on the device that computes.
        decode_attention: "host" or "device" -> dtype -> KV bytes/s of attention of next tokens, over FLOPs per KV byte.
        elementwise: dtype -> bytes/s through norms, activations and rotations (counted by pass_time.elementwise_bytes).
        casts: "float16 bfloat16" (stored, computed) -> bytes/s of what a decode stage yields.
        overheads: seconds that do not depend on how much is moved or computed.
    """

    name: str
    device: str
    origin: str
    date: str
    cores: int
    host_bytes: int
    device_bytes: int
    disk_bytes: int
    disk_read: Rate
    disk_write: Rate
    disk_core_seconds_per_byte: float
    disk_request: DiskRequest
    disk_slowdown: float
    compute_slowdown: float
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

    @property
    def io_threads(self) -> int:
        """Threads that read and write files."""
        return io_threads(self.cores)

    def dense_flops(self, dtype: str) -> float:
        """The best rate of a linear layer over all row counts.

        Raises:
            OptionError: when the machine was not measured in that dtype.
        """
        return max(rate.best for _, rate in self.dense[self.known(dtype)])

    def known(self, dtype: str) -> str:
        """The dtype, if the machine was measured in it.

        Raises:
            OptionError: if not.
        """
        if dtype not in self.dense:
            known = ", ".join(sorted(self.dense)) or "none"
            raise OptionError(f"machine {self.name!r} has no rates for {dtype} (known: {known}): measure it again")
        return dtype

    def to_json(self) -> str:
        """The JSON text that machine_file.py reads."""
        return json.dumps(dataclasses.asdict(self), indent=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The hard budgets of this process.  Found by profile/limits.py.

    Attributes:
        device: "cpu", "cuda" or "sim".
        host_bytes: budget of host memory for the whole process, interpreter included.
        host_source: where that number comes from, for people.
        host_total_bytes: the hard limit above it (physical memory, a control group, an rlimit).
        host_total_source: where the hard limit comes from, for people.
        device_bytes: budget of device memory; 0 on a CPU device.
        device_total_bytes: memory that the device has; 0 on a CPU device.
        disk_bytes: budget for spilled KV on the offload folder's file system.
        disk_total_bytes: size of that file system.
        offload_dir: folder in which a fresh offload folder is made.
        offload_in_memory: whether that folder lies on a memory file system: its bytes then count as host bytes.
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
