"""Has this process see the GPU of its own stage alone."""

from __future__ import annotations

import os

import torch

from flexgen.distributed.devices import VISIBLE, own_device


def see_own_device(devices: str | None) -> None:
    """Hide the GPUs of other stages of this machine; CUDA must not have begun.

    Args:
        devices: As in EngineOptions.

    Raises:
        OptionError: A device is hidden already, or stages have no device of their own.
    """
    visible = own_device(os.environ, devices, torch.cuda.device_count())
    if visible is not None:
        os.environ[VISIBLE] = visible
