"""The kernels of a device for the products of experts."""

from __future__ import annotations

import functools

import torch

from flexgen.kernels.grouped import GroupedKernels
from flexgen.kernels.triton_support import in_triton


@functools.cache
def grouped_kernels(device: torch.device) -> GroupedKernels | None:
    """Return the kernels for tensors on `device`: Triton's for a CUDA device that they compile for; None if there are none."""
    if not in_triton(device, "experts", otherwise="one by one"):
        return None
    from flexgen.kernels.triton.experts import TritonGroupedKernels

    return TritonGroupedKernels()
