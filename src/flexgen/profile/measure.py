"""The best rates of this machine, measured in a few seconds and kept for later runs.

Buffers stay below `max_bytes`, since measuring may happen inside a tight budget.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from flexgen.base.files import write_file
from flexgen.base.quantities import MIB
from flexgen.base.steps import step
from flexgen.errors import OptionError, StorageError
from flexgen.options import KV_FORMATS
from flexgen.plan.machine import Curve, Machine, io_threads, kv_rate_name, machine_of, rounded_from
from flexgen.profile.busy import BusyCores
from flexgen.profile.compute import attention_rate, better, dense_rates, device_elementwise_rate, keep_busy, step_rates
from flexgen.profile.contention import slowdowns
from flexgen.profile.copies import cast_rates, copy_rates, memory_rate
from flexgen.profile.decoding import with_formats
from flexgen.profile.disk import disk_rates, writable
from flexgen.profile.int8 import with_int8
from flexgen.profile.low_bit import low_bit_rates
from flexgen.profile.overheads import NO_OVERHEADS, elementwise_rate, overheads
from flexgen.profile.repeat import best_of, is_disturbed

logger = logging.getLogger(__name__)

# Processors are faster for some seconds after a rest (docs/log.md): typical rates of products are those after this time of work.
BUSY_SECONDS = 10.0
MAX_BYTES = 256 * MIB  # of all buffers at the same time, where nothing else is said


def measure(device: str, dtypes: Sequence[str], folder: Path, *, quick: bool = False, max_bytes: int = MAX_BYTES) -> Machine:
    """Measure the machine.  It takes about 22 seconds and 11 more per dtype, or 9 and 5 if `quick`.

    Args:
        device: "cpu", "cuda" or "sim" (computes on the CPU; its links are copies in host memory).
        dtypes: Names of torch dtypes; only these are measured.
        folder: Folder that weights stream from.  Its largest file is read (a temporary one where all are small), and temporary files are
            written to it.
        quick: Whether to measure less.
        max_bytes: Most memory of all buffers at the same time.

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
        dense, together = _products(device, where, torch_dtypes, folder, max_bytes, quick=quick)
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
            disk_slowdown=together[0],
            compute_slowdown=together[1],
            host_memory=memory_rate(max_bytes, 1.0 * share),
            host_to_device=to_device,
            device_to_host=to_host,
            dense=dense,
            attention={name: attention_rate(where, dtype, max_bytes, 1.5 * share) for name, dtype in torch_dtypes.items()},
            decode_attention={
                place: _steps(at, torch_dtypes, max_bytes, share)
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
    machine = dataclasses.replace(machine, overheads=found)
    for name, dtype in torch_dtypes.items():
        if device == "cuda":
            machine.elementwise[name] = device_elementwise_rate(where, dtype, max_bytes, 0.5 * share)
        else:
            machine.elementwise[name] = elementwise_rate(dtype, writable(folder), machine, max_bytes)
    _trim()
    logger.info("measured %s in %.1f s", device, time.perf_counter() - started)
    return machine


def _products(
    device: str, where: torch.device, dtypes: Mapping[str, torch.dtype], folder: Path, max_bytes: int, *, quick: bool
) -> tuple[dict[str, Curve], tuple[float, float]]:
    """Measure matrix products, and how reading and computing slow each other down; typical rates are those after BUSY_SECONDS.

    Returns:
        The rates of products by dtype, and the slowdowns of the disk and of computing.
    """

    def dense(seconds: float) -> dict[str, Curve]:
        return {name: dense_rates(where, dtype, max_bytes, seconds) for name, dtype in dtypes.items()}

    main, share, rounds = next(iter(dtypes.values())), 0.3 if quick else 1.0, 1 if quick else 3
    working = time.perf_counter()
    rested = dense(3.5 * share)
    together = slowdowns(folder, main, max_bytes, 4.0 * share, rounds=rounds) if device != "cuda" else (1.0, 1.0)
    if quick:
        return rested, together
    keep_busy(where, main, max_bytes, BUSY_SECONDS - (time.perf_counter() - working))
    return {name: better(curve, rested[name]) for name, curve in dense(3.5).items()}, together


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


def cached_machine(
    device: str,
    dtype: str,
    folder: Path,
    *,
    cache_dir: Path | None = None,
    quick: bool = False,
    max_bytes: int = MAX_BYTES,
    again: bool = False,
    formats: Iterable[str] = (),
) -> Machine:
    """Return the machine as measured before; if there is no such measurement, measure it now and keep the result.

    The decoding of number formats, and products in int8, are measured when a model first needs them, and then added to what is kept.

    A measurement is kept per host, processor, cores, file system of `folder`, torch version, dtype and device.  One that other programs
    disturbed does not replace an earlier one (see `best_of`).

    Args:
        device: Device, as for `measure`.
        dtype: Name of a torch dtype.
        folder: Folder that weights stream from.
        cache_dir: Folder of kept measurements; None is ~/.cache/flexgen.  One that cannot be read or written is not used.
        quick: Whether a quick measurement is enough.
        max_bytes: Most memory of all buffers at the same time.
        again: Whether to measure even if there is a measurement.
        formats: Names of the number formats whose decoding has to be known, as in ModelSpec.decoded_from; those that do not run are left
            out. If numbers are rounded to int8 after it, products in int8 have to be known, too.
    """
    before = kept_machine(device, dtype, folder, cache_dir=cache_dir, quick=quick)
    if not again and before is not None:
        return _with_formats(before, dtype, formats, _place(device, dtype, folder, cache_dir), max_bytes)
    machine = measure(device, [dtype], folder, quick=quick, max_bytes=max_bytes)
    if is_disturbed(machine):
        logger.warning(
            "other programs kept %.1f cores busy while this machine was measured, so plans may promise too little: "
            "`flexgen profile` measures it again", machine.busy_cores,
        )  # fmt: skip
        machine = best_of([machine, before]) if before is not None else machine
    keep(machine, [dtype], folder, cache_dir=cache_dir, quick=quick)
    return _with_formats(machine, dtype, formats, _place(device, dtype, folder, cache_dir), max_bytes)


def _with_formats(machine: Machine, dtype: str, formats: Iterable[str], place: _Place, max_bytes: int) -> Machine:
    """Return the machine with the rates that these formats need; where some had to be measured, they are kept."""
    formats, quick = list(formats), _is_quick(place.path)
    knowing = with_formats(machine, dtype, formats, max_bytes)
    if any(rounded_from(name) is not None for name in formats):
        knowing = with_int8(knowing, dtype, max_bytes, quick=quick)
    if knowing is not machine:
        _write(knowing, place, quick=quick)
    return knowing


def kept_machine(device: str, dtype: str, folder: Path, *, cache_dir: Path | None = None, quick: bool = True) -> Machine | None:
    """Return the machine as `cached_machine` keeps it; None if it was not measured, or only `quick` where that is not enough."""
    return _load(*_place(device, dtype, folder, cache_dir), quick)


def keep(machine: Machine, dtypes: Sequence[str], folder: Path, *, cache_dir: Path | None = None, quick: bool = False) -> list[Path]:
    """Keep a measurement for later runs, in a file per dtype.

    Returns:
        The files that could be written.
    """
    kept: list[Path] = []
    for dtype in dtypes:
        place = _place(machine.device, dtype, folder, cache_dir)
        if _write(machine, place, quick=quick):
            kept.append(place.path)
    return kept


class _Place(NamedTuple):
    """The file of a kept measurement, and everything that the measurement depends on."""

    path: Path
    key: dict[str, str | int]


def _place(device: str, dtype: str, folder: Path, cache_dir: Path | None) -> _Place:
    key = machine_key(device, dtype, folder)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return _Place((cache_dir or Path.home() / ".cache" / "flexgen") / f"machine-{digest}.json", key)


def _write(machine: Machine, place: _Place, *, quick: bool) -> bool:
    """Write a measurement to its file; return False, with a warning, where that fails."""
    try:
        place.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(place.path, json.dumps({"key": place.key, "quick": quick, "machine": json.loads(machine.to_json())}, indent=2))
    except (OSError, StorageError) as error:
        logger.warning("the machine's rates are not kept: %s", error)
        return False
    return True


def _is_quick(path: Path) -> bool:
    """Return whether a kept measurement is a quick one; True if there is none."""
    try:
        return bool(json.loads(path.read_text())["quick"])
    except (OSError, ValueError, KeyError, TypeError):
        return True


def machine_key(device: str, dtype: str, folder: Path) -> dict[str, str | int]:
    """Return everything that a measurement depends on."""
    return {
        "host": platform.node(),
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else "",
        "cores": num_cores(),
        "file_system": folder.stat().st_dev if folder.is_dir() else writable(folder).stat().st_dev,
        "torch": torch.__version__,
        "numba": metadata.version("numba"),
        "dtype": dtype,
        "device": device,
        "version": 11,
    }


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _load(path: Path, key: dict[str, str | int], quick: bool) -> Machine | None:
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text())
        if kept["key"] != key or (kept["quick"] and not quick):
            return None
        return machine_of(kept["machine"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OptionError) as error:
        logger.warning("%s cannot be used, so the machine is measured again: %s", path, error)
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
