"""Whether Triton's kernels can compute on a CUDA device."""

from __future__ import annotations

import importlib.util

import torch

LEAST_CAPABILITY = (8, 0)  # of a CUDA device; Triton does not compile for older ones


def why_not_triton(device: torch.device) -> str | None:
    """Return why Triton's kernels cannot compute on a CUDA device; None if they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"its compute capability is {capability[0]}.{capability[1]}, not 8.0 or more"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'flexgen-engine[triton]')"
    return None
