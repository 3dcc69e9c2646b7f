"""The rates of this machine as they were measured before, in files that are made when they are first needed."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from flexgen.base.cache_home import cache_home
from flexgen.base.files import write_file
from flexgen.errors import OptionError, StorageError
from flexgen.plan.machine import Machine, machine_of, rounded_from
from flexgen.profile import measure as measuring
from flexgen.profile.decoding import with_formats
from flexgen.profile.disk import writable
from flexgen.profile.int8 import with_int8
from flexgen.profile.measure import DEVICE_BYTES, MAX_BYTES, num_cores, processor
from flexgen.profile.repeat import best_of, is_disturbed
from flexgen.profile.sparse import with_sparse

logger = logging.getLogger(__name__)


def cached_machine(
    device: str,
    dtype: str,
    folder: Path,
    *,
    cache_dir: Path | None = None,
    quick: bool = False,
    max_bytes: int = MAX_BYTES,
    device_bytes: int = DEVICE_BYTES,
    again: bool = False,
    formats: Iterable[str] = (),
    sparse: float | None = None,
) -> Machine:
    """Return the machine as measured before; if there is no such measurement, measure it now and keep the result.

    The decoding of number formats, products in int8 and sparse attention are measured when a model first needs them, and then added to what
    is kept.

    A measurement is kept per host, processor, cores, file system of `folder`, torch version, dtype and device.  One that other programs
    disturbed does not replace an earlier one (see `best_of`).

    Args:
        device: Device, as for `measure`.
        dtype: Name of a torch dtype.
        folder: Folder that weights stream from.
        cache_dir: Folder of kept measurements; None is flexgen's own.  One that cannot be read or written is not used.
        quick: Whether a quick measurement is enough.
        max_bytes: Most host memory of all buffers at the same time.
        device_bytes: The same of a CUDA device's memory.
        again: Whether to measure even if there is a measurement.
        formats: Names of the number formats whose decoding has to be known, as in ModelSpec.decoded_from; those that do not run are left
            out. If numbers are rounded to int8 after it, products in int8 have to be known, too.
        sparse: The share of positions of the sparse attention that has to be known; None for none.
    """
    before = kept_machine(device, dtype, folder, cache_dir=cache_dir, quick=quick)
    if not again and before is not None:
        return _completed(before, dtype, formats, sparse, _place(device, dtype, folder, cache_dir), max_bytes)
    machine = measuring.measure(device, [dtype], folder, quick=quick, max_bytes=max_bytes, device_bytes=device_bytes)
    if is_disturbed(machine):
        logger.warning(
            "other programs kept %.1f cores busy while this machine was measured, so plans may promise too little: "
            "`flexgen profile` measures it again", machine.busy_cores,
        )  # fmt: skip
        machine = best_of([machine, before]) if before is not None else machine
    keep(machine, [dtype], folder, cache_dir=cache_dir, quick=quick)
    return _completed(machine, dtype, formats, sparse, _place(device, dtype, folder, cache_dir), max_bytes)


def _completed(machine: Machine, dtype: str, formats: Iterable[str], sparse: float | None, place: _Place, max_bytes: int) -> Machine:
    """Return the machine with the rates that these formats and this sparse attention need; where some had to be measured, they are kept."""
    formats, quick = list(formats), _is_quick(place.path)
    knowing = with_formats(machine, dtype, formats, max_bytes)
    if any(rounded_from(name) is not None for name in formats):
        knowing = with_int8(knowing, dtype, max_bytes, quick=quick)
    if sparse is not None:
        knowing = with_sparse(knowing, dtype, sparse, max_bytes, quick=quick)
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
    return _Place((cache_dir or cache_home()) / f"machine-{digest}.json", key)


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
        "processor": processor(),
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else "",
        "cores": num_cores(),
        "file_system": folder.stat().st_dev if folder.is_dir() else writable(folder).stat().st_dev,
        "torch": torch.__version__,
        "numba": metadata.version("numba"),
        "dtype": dtype,
        "device": device,
        "version": 14,
    }


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
