"""Opens the device and the offload folder that an engine, or one stage of a pipeline, executes its policy with."""

from __future__ import annotations

import contextlib
from pathlib import Path

from flexgen.devices.base import Device
from flexgen.devices.open import open_device
from flexgen.io.offload import OffloadFolder
from flexgen.plan.machine import Limits
from flexgen.plan.policy import Policy


def offload_folder(policy: Policy, limits: Limits, resources: contextlib.ExitStack) -> Path | None:
    """Return a fresh folder for spilled KV, which `resources` removes; None if the policy spills none.

    Raises:
        StorageError: No folder can be made.
    """
    if not policy.kv_disk_bytes:
        return None
    offload = OffloadFolder(Path(limits.offload_dir))
    resources.callback(offload.remove)
    return offload.path


def limited_device(limits: Limits, device: Device | None = None) -> Device | None:
    """Return the device with its budget, to be closed by the engine; None where computing happens in host memory.

    Args:
        limits: The budgets, which name the device.
        device: The device, if it is open already.
    """
    backend = device or open_device(limits.device, limits.device_bytes - limits.device_overhead_bytes)
    if backend is not None:
        backend.limit(limits.device_bytes)
    return backend
