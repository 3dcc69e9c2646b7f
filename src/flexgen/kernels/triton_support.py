"""Whether Triton compiles kernels for a CUDA device.  Importing this does not import Triton."""

from __future__ import annotations

import importlib.util

import torch

LEAST_CAPABILITY = (8, 0)  # Triton does not compile for older devices


def why_not_triton(device: torch.device) -> str:
    """Return why there are no kernels of Triton for a CUDA device; an empty text if there are."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        return f"its compute capability is {major}.{minor}, not 8.0 or more"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'flexgen-engine[triton]')"
    return ""
