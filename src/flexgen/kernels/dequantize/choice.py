"""The kernels that decode stored numbers on a device, chosen by its kind.  What is stored on a CPU is decoded by compiled loops instead."""

from __future__ import annotations

import functools
import logging

import torch

from flexgen.kernels.dequantize.reference import DequantizeKernels
from flexgen.kernels.triton_support import why_not_triton

logger = logging.getLogger(__name__)


@functools.cache
def dequantize_kernels(device: torch.device) -> DequantizeKernels:
    """Return Triton's kernels for a CUDA device that they compile for, and plain torch operations for every other device.

    Where tensors have no numbers, decoding has a price only.
    """
    if device.type == "meta":
        from flexgen.kernels.priced import PricedDequantizeKernels

        return PricedDequantizeKernels()
    if device.type != "cuda":
        return DequantizeKernels()
    if reason := why_not_triton(device):
        logger.info("stored numbers are decoded on the device in plain torch operations: %s", reason)
        return DequantizeKernels()
    from flexgen.kernels.triton.dequantize import TritonDequantizeKernels

    logger.info("stored numbers are decoded on the device in Triton's kernels")
    return TritonDequantizeKernels()
