"""Machine and Limits: rates and capacities of one computer, as numbers.  Found by profile/; machines are kept as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from flexgen.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Best rates at favourable sizes, measured apart from any run.

    Attributes:
        name: for people. measured: ISO date, or "datasheet".
        cores: usable cores.
        disk_read_bytes_per_s, disk_write_bytes_per_s: of the folder's file system, O_DIRECT, best depth.
        host_memory_bytes_per_s: plain reads, all cores.
        host_to_device_bytes_per_s, device_to_host_bytes_per_s: None where there is no separate device.
        dense_flops: dtype name -> best rate of a linear layer over row counts, on the device that computes.
        dense_rows: dtype name -> [(rows, rate), ...] as measured, rising rows.
        attention_flops: dtype name -> best rate of causal prefill attention.
    """

    name: str
    measured: str
    cores: int
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    host_memory_bytes_per_s: float
    host_to_device_bytes_per_s: float | None
    device_to_host_bytes_per_s: float | None
    dense_flops: dict[str, float]
    dense_rows: dict[str, list[tuple[int, float]]]
    attention_flops: dict[str, float]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Machine:
        """Raises OptionError on an unknown or missing key."""
        fields = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != known:
            raise OptionError(f"machine: keys differ: {sorted(set(fields) ^ known)}")
        fields["dense_rows"] = {dtype: [tuple(point) for point in points] for dtype, points in fields["dense_rows"].items()}
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The hard budgets of this process.  Found by profile/limits.py.

    Attributes:
        device: "cpu", "cuda" or "sim".
        host_bytes: for the whole process, interpreter included. host_source: where the number comes from, for people.
        host_total_bytes, host_total_source: the hard limit above it (physical memory, a control group, an rlimit).
        device_bytes, device_total_bytes: 0 on a CPU device.
        disk_bytes, disk_total_bytes: of the offload folder's file system, for spilled KV.
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
