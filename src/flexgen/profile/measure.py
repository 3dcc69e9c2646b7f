"""The best rates of this machine, measured in a few seconds and kept.

Buffers stay below `max_bytes`, since it may run inside a tight budget.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import hashlib
import json
import logging
import os
import platform
import time
from pathlib import Path

import torch

from flexgen.errors import OptionError
from flexgen.plan.machine import Machine
from flexgen.profile.compute import attention_rate, copy_rates, dense_rows, memory_rate
from flexgen.profile.disk import disk_rates, writable
from flexgen.sizes import MIB

logger = logging.getLogger(__name__)


def measure(device: str, dtype: str, folder: Path, *, quick: bool = False, max_bytes: int = 128 * MIB) -> Machine:
    """Measure the machine; about 8 seconds, or 3 if `quick`.

    Args:
        device: "cpu", "cuda" or "sim" (computes on the CPU; its links are copies in host memory).
        dtype: a torch name; only this one is measured.
        folder: where weights stream from: its largest file is read (a temporary one where all are small), and a
            temporary file is written.
        max_bytes: most memory of all buffers alive at once.

    Raises:
        StorageError: the file system fails. OptionError: an unknown dtype.
    """
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise OptionError(f"dtype={dtype!r} is not a dtype of torch")
    started = time.perf_counter()
    share = 0.4 if quick else 1.0
    where = torch.device("cuda" if device == "cuda" else "cpu")
    with torch.inference_mode():
        disk_read, disk_write = disk_rates(folder, quick, max_bytes)
        memory = memory_rate(max_bytes, 0.5 * share)
        rows = dense_rows(where, torch_dtype, max_bytes, 2.5 * share)
        attention = attention_rate(where, torch_dtype, max_bytes, 1.0 * share)
        to_device, to_host = copy_rates(device, max_bytes, 0.5 * share)
    _trim()
    logger.info("measured %s in %.1f s", device, time.perf_counter() - started)
    return Machine(
        name=_name(device),
        measured=datetime.datetime.now(datetime.UTC).date().isoformat(),
        cores=num_cores(),
        disk_read_bytes_per_s=disk_read,
        disk_write_bytes_per_s=disk_write,
        host_memory_bytes_per_s=memory,
        host_to_device_bytes_per_s=to_device,
        device_to_host_bytes_per_s=to_host,
        dense_flops={dtype: max(rate for _, rate in rows)},
        dense_rows={dtype: rows},
        attention_flops={dtype: attention},
    )


def cached_machine(
    device: str,
    dtype: str,
    folder: Path,
    *,
    cache_dir: Path | None = None,
    quick: bool = False,
    max_bytes: int = 128 * MIB,
    again: bool = False,
) -> Machine:
    """The machine as measured before, or measured now and kept.

    Kept per host, processor, cores, file system of `folder`, torch version, dtype and device; `again` measures anyway, and
    what was measured `quick` serves only those who ask for no more.

    Args:
        cache_dir: None is ~/.cache/flexgen.  A cache that cannot be read or written is done without.
    """
    key = machine_key(device, dtype, folder)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = (cache_dir or Path.home() / ".cache" / "flexgen") / f"machine-{digest}.json"
    if not again and (machine := _load(path, key, quick)) is not None:
        return machine
    machine = measure(device, dtype, folder, quick=quick, max_bytes=max_bytes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({"key": key, "quick": quick, "machine": json.loads(machine.to_json())}, indent=2))
        fresh.replace(path)
    except OSError as error:
        logger.warning("the machine's rates are not kept: %s", error)
    return machine


def machine_key(device: str, dtype: str, folder: Path) -> dict[str, str | int]:
    """What a measurement depends on."""
    return {
        "host": platform.node(),
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else "",
        "cores": num_cores(),
        "file_system": folder.stat().st_dev if folder.is_dir() else writable(folder).stat().st_dev,
        "torch": torch.__version__,
        "dtype": dtype,
        "device": device,
        "version": 2,
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _load(path: Path, key: dict[str, str | int], quick: bool) -> Machine | None:
    try:
        kept = json.loads(path.read_text())
        if kept["key"] != key or (kept["quick"] and not quick):
            return None
        return Machine.from_json(json.dumps(kept["machine"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OptionError) as error:
        logger.warning("%s is of no use and is measured again: %s", path, error)
        return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _name(device: str) -> str:
    name = f"{_processor()}, {num_cores()} cores"
    return f"{torch.cuda.get_device_name()}; {name}" if device == "cuda" else name


def _trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
