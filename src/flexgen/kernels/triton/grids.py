"""How programs are launched: on a grid or, where tensors have no memory, not at all, so that they are only compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

ALIGNMENT = 16  # bytes, and numbers: Triton compiles another program where an address or a stride is no multiple of it


def on_grid(kernel: Any, grid: tuple[int, ...], device: torch.device) -> Callable[..., Any]:
    """Return a function that launches a kernel with the arguments that it is given.

    Args:
        kernel: The kernel, as Triton makes it, which type checkers do not know.
        grid: The number of its programs.
        device: The device of the tensors.  On "meta", where they have no memory, the kernel is compiled for the current CUDA device.
    """
    return functools.partial(kernel.warmup, grid=grid) if device.type == "meta" else kernel[grid]
