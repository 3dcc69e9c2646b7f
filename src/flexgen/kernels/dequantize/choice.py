"""The kernels that decode stored numbers on a device, chosen by its kind.  What is stored on a CPU is decoded by compiled loops instead."""

from __future__ import annotations

import functools

import torch

from flexgen.kernels.dequantize.reference import DequantizeKernels
from flexgen.kernels.triton_support import in_triton


@functools.cache
def dequantize_kernels(device: torch.device) -> DequantizeKernels:
    """Return Triton's kernels for a CUDA device that they compile for, and plain torch operations for every other device."""
    if not in_triton(device, "decoding of stored numbers", otherwise="in plain torch operations"):
        return DequantizeKernels()
    from flexgen.kernels.triton.dequantize import TritonDequantizeKernels

    return TritonDequantizeKernels()
