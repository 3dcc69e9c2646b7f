"""The kernels that decode stored numbers on a device, chosen by its kind.  What is stored on a CPU is decoded by compiled loops instead."""

from __future__ import annotations

import functools

import torch

from flexgen.kernels.dequantize.reference import DequantizeKernels
from flexgen.kernels.triton_support import in_triton, is_compiling


def dequantize_kernels(device: torch.device) -> DequantizeKernels:
    """Return the kernels for tensors on `device`.

    Tensors without memory stand for those of a CUDA device while kernels are compiled; at other times decoding them has a price only.
    """
    if device.type == "meta" and not is_compiling():
        return priced_kernels()
    return kernels_of(device)


@functools.cache
def priced_kernels() -> DequantizeKernels:
    """Return kernels that take the time of decoding only."""
    from flexgen.kernels.priced import PricedDequantizeKernels

    return PricedDequantizeKernels()


@functools.cache
def kernels_of(device: torch.device) -> DequantizeKernels:
    """Return Triton's kernels for a CUDA device that they compile for, and plain torch operations for every other device."""
    if not in_triton(device, "decoding of stored numbers", otherwise="in plain torch operations"):
        return DequantizeKernels()
    from flexgen.kernels.triton.dequantize import TritonDequantizeKernels

    return TritonDequantizeKernels()
