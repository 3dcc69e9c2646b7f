"""Measures reading memory, copying to a device and back, and decoding stored numbers."""

from __future__ import annotations

import contextlib

import torch

from flexgen.base.quantities import MIB
from flexgen.devices.arena import HostArena
from flexgen.devices.cudart import cuda_runtime
from flexgen.formats.plain import cast_into, dtype_name
from flexgen.plan.machine import Rate, has_device_tier
from flexgen.profile.compute import wait
from flexgen.profile.timing import measured_rate

STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def memory_rate(max_bytes: int, seconds: float) -> Rate:
    """Measure the bytes per second that all cores read together."""
    data = torch.ones(max_bytes // 4, dtype=torch.float32)
    return max((measured_rate(data.nbytes, run, seconds / 2) for run in (data.sum, data.max)), key=lambda rate: rate.typical)


def copy_rates(device: str, max_bytes: int, seconds: float) -> tuple[Rate | None, Rate | None]:
    """Measure copies in bytes per second.

    Returns:
        The rates from host to device and from device to host; None without a device tier.
    """
    if not has_device_tier(device):
        return None, None
    size = min(max_bytes // 2, 64 * MIB)
    with contextlib.closing(HostArena(cuda_runtime() if device == "cuda" else None)) as arena:  # memory as the engine's copies have it
        host = arena.allocate(size).fill_(1)
        other = torch.empty(size, dtype=torch.uint8, device="cuda" if device == "cuda" else "cpu").fill_(1)
        to_device = measured_rate(size, lambda: wait(other.copy_(host)), seconds / 2)
        to_host = measured_rate(size, lambda: wait(other, host.copy_(other)), seconds / 2)
    return to_device, to_host


def cast_rates(dtype: torch.dtype, max_bytes: int, seconds: float) -> dict[str, Rate]:
    """Measure the decode stage of stored numbers: "stored computed" -> bytes/s of the result."""
    rates: dict[str, Rate] = {}
    elements = max_bytes // 16
    computed = torch.empty(elements, dtype=dtype)
    for stored in STORED_DTYPES:
        if stored != dtype:
            source = torch.ones(elements, dtype=stored)
            name = f"{dtype_name(stored)} {dtype_name(dtype)}"
            rates[name] = measured_rate(computed.nbytes, lambda source=source: cast_into(computed, source), seconds / len(STORED_DTYPES))
    return rates
