"""The kernels of a device for the products of experts, chosen by a table."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from flexgen.kernels.grouped import GroupedKernels
from flexgen.kernels.triton_support import in_triton


@functools.cache
def grouped_kernels(device: torch.device) -> GroupedKernels | None:
    """Return the kernels for tensors on `device`; None if there are none."""
    make = KERNELS.get(device.type)
    return None if make is None else make(device)


def _cuda_kernels(device: torch.device) -> GroupedKernels | None:
    """Triton's kernels where Triton is installed and compiles for the device."""
    if not in_triton(device, "experts", otherwise="one by one"):
        return None
    from flexgen.kernels.triton.experts import TritonGroupedKernels

    return TritonGroupedKernels()


def _priced_kernels(device: torch.device) -> GroupedKernels:
    from flexgen.kernels.priced import PricedGroupedKernels

    return PricedGroupedKernels()


KERNELS: dict[str, Callable[[torch.device], GroupedKernels | None]] = {"cuda": _cuda_kernels, "meta": _priced_kernels}
