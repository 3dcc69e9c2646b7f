"""The best rates of this machine, measured in a few seconds.

Buffers stay below `max_bytes`, since measuring may happen inside a tight budget.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import psutil
import torch

from flexgen.base.heap import trim_heap
from flexgen.base.quantities import GIB, MIB, counted
from flexgen.base.steps import step
from flexgen.devices.open import open_device
from flexgen.errors import OptionError
from flexgen.options import KV_FORMATS
from flexgen.plan.machine import Curve, Machine, io_threads, kv_rate_name
from flexgen.profile.beside import COPY_BYTES, Slowdowns, slowdowns_beside
from flexgen.profile.busy import BusyCores
from flexgen.profile.compute import (
    attention_rate,
    better,
    dense_rates,
    device_elementwise_rate,
    keep_busy,
    launch_seconds,
    step_rates,
)
from flexgen.profile.contention import slowdowns
from flexgen.profile.copies import cast_rates, copy_rates, memory_rate
from flexgen.profile.disk import disk_rates, writable
from flexgen.profile.low_bit import low_bit_rates
from flexgen.profile.overheads import NO_OVERHEADS, elementwise_rate, overheads

logger = logging.getLogger(__name__)

# Processors are faster for some seconds after a rest (docs/log.md): typical rates of products are those after this time of work.
BUSY_SECONDS = 10.0
MAX_BYTES = 256 * MIB  # of all buffers at the same time, where nothing else is said
DEVICE_BYTES = 1 * GIB  # of those on a device: its largest products are of 16,384 rows


def measure(
    device: str, dtypes: Sequence[str], folder: Path, *, quick: bool = False, max_bytes: int = MAX_BYTES, device_bytes: int = DEVICE_BYTES
) -> Machine:
    """Measure the machine.  It takes about 22 seconds and 11 more per dtype, or 9 and 5 if `quick`.

    Args:
        device: "cpu", "cuda" or "sim" (computes on the CPU; its links are copies in host memory).
        dtypes: Names of torch dtypes; only these are measured.
        folder: Folder that weights stream from.  Its largest file is read (a temporary one where all are small), and temporary files are
            written to it.
        quick: Whether to measure less.
        max_bytes: Most host memory of all buffers at the same time.
        device_bytes: The same of a CUDA device's memory.

    Raises:
        StorageError: The file system fails.
        OptionError: A dtype is unknown.
    """
    torch_dtypes = {name: _dtype(name) for name in dtypes}
    about = 9 + 5 * len(dtypes) if quick else 22 + 11 * len(dtypes)
    step(f"measuring this machine: about {about} seconds, kept for later runs")
    started, busy = time.perf_counter(), BusyCores()
    share = 0.3 if quick else 1.0
    where, host = torch.device("cuda" if device == "cuda" else "cpu"), torch.device("cpu")
    with torch.inference_mode():
        disk = disk_rates(folder, quick, max_bytes, io_threads(num_cores()))
        there = max_bytes if device != "cuda" else device_bytes  # the memory of the device that computes
        dense = _products(where, torch_dtypes, there, quick=quick)
        beside = _slowdowns(device, folder, next(iter(torch_dtypes.values())), max_bytes, quick=quick)
        to_device, to_host = copy_rates(device, max_bytes, 1.0 * share)
        machine = Machine(
            name=_name(device),
            device=device,
            origin="measured",
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            cores=num_cores(),
            host_bytes=psutil.virtual_memory().total,
            device_bytes=torch.cuda.mem_get_info()[1] if device == "cuda" else 0,
            disk_bytes=shutil.disk_usage(writable(folder)).total,
            disk_read=disk.read,
            disk_write=disk.write,
            disk_core_seconds_per_byte=disk.core_seconds_per_byte,
            disk_request=disk.request,
            disk_slowdown=beside.disk,
            compute_slowdown=beside.compute,
            duplex_slowdown=beside.duplex,
            link_slowdown=beside.link,
            host_slowdown=beside.host,
            host_memory=memory_rate(max_bytes, 1.0 * share),
            host_to_device=to_device,
            device_to_host=to_host,
            dense=dense,
            attention={name: attention_rate(where, dtype, there, 1.5 * share) for name, dtype in torch_dtypes.items()},
            decode_attention={
                place: _steps(at, torch_dtypes, max_bytes if place == "host" else there, share)
                for place, at in (("host", host), ("device", where))
                if place == "host" or device == "cuda"
            },
            elementwise={},
            casts={cast: rate for dtype in torch_dtypes.values() for cast, rate in cast_rates(dtype, max_bytes, 0.5 * share).items()},
            overheads=NO_OVERHEADS,
            versions=_versions(),
            busy_cores=busy.by_others(),
        )
    found = overheads(device, next(iter(torch_dtypes.values())), writable(folder), machine, quick=quick)
    if device == "cuda":
        found = dataclasses.replace(found, per_operation=launch_seconds(where, 0.5 * share))
    machine = dataclasses.replace(machine, overheads=found)
    for name, dtype in torch_dtypes.items():
        if device == "cuda":
            machine.elementwise[name] = device_elementwise_rate(where, dtype, there, 0.5 * share)
        else:
            machine.elementwise[name] = elementwise_rate(dtype, writable(folder), machine, max_bytes)
    trim_heap()
    if device == "cuda":
        torch.cuda.empty_cache()
    logger.info("measured %s in %.1f s", device, time.perf_counter() - started)
    return machine


def _products(where: torch.device, dtypes: Mapping[str, torch.dtype], max_bytes: int, *, quick: bool) -> dict[str, Curve]:
    """Measure matrix products: rates by dtype, of which typical ones are those after BUSY_SECONDS."""

    def dense(seconds: float) -> dict[str, Curve]:
        return {name: dense_rates(where, dtype, max_bytes, seconds) for name, dtype in dtypes.items()}

    working = time.perf_counter()
    rested = dense(3.5 * (0.3 if quick else 1.0))
    if quick:
        return rested
    keep_busy(where, next(iter(dtypes.values())), max_bytes, BUSY_SECONDS - (time.perf_counter() - working))
    return {name: better(curve, rested[name]) for name, curve in dense(3.5).items()}


def _slowdowns(device: str, folder: Path, dtype: torch.dtype, max_bytes: int, *, quick: bool) -> Slowdowns:
    """Measure how much what goes on at the same time slows each other down; without a link that has a rate of its own, what shares none."""
    seconds, rounds = (1.2, 1) if quick else (4.0, 3)
    if device != "cuda":
        disk, compute = slowdowns(folder, dtype, max_bytes, seconds, rounds=rounds)
        return Slowdowns(duplex=1.0, link=1.0, host=1.0, disk=disk, compute=compute)
    backend = open_device(device, 4 * COPY_BYTES)
    assert backend is not None
    with contextlib.closing(backend):
        return slowdowns_beside(backend, folder, dtype, max_bytes, seconds, rounds=rounds)


def _steps(where: torch.device, dtypes: Mapping[str, torch.dtype], max_bytes: int, share: float) -> dict[str, Curve]:
    """Measure the attention of next tokens by dtype, and by format of KV (in float64 no one is in a hurry)."""
    curves = {name: step_rates(where, dtype, max_bytes, 1.0 * share) for name, dtype in dtypes.items()}
    for name, dtype in dtypes.items():
        for kv in KV_FORMATS:
            if kv != "auto" and dtype != torch.float64:
                curves[kv_rate_name(name, kv)] = low_bit_rates(where, dtype, kv, max_bytes, 0.5 * share)
    return curves


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise OptionError(f"dtype={name!r} is not a dtype of torch")
    return dtype


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "numba": metadata.version("numba"),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def processor() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _name(device: str) -> str:
    name = f"{processor()}, {counted(num_cores(), 'core')}"
    return f"{torch.cuda.get_device_name()}; {name}" if device == "cuda" else name
