"""Opens a device by its name; each kind of device is one file, which is imported on demand."""

from __future__ import annotations

import importlib

from flexgen.devices.base import Device

DEVICES = {"cuda": ("flexgen.devices.cuda", "CudaDevice"), "sim": ("flexgen.devices.sim", "SimulatedDevice")}


def open_device(name: str, budget_bytes: int) -> Device | None:
    """Open the device of this name with the given budget; return None for "cpu", where computing happens in host memory."""
    if name not in DEVICES:
        return None
    module, own_name = DEVICES[name]
    return getattr(importlib.import_module(module), own_name)(budget_bytes)
