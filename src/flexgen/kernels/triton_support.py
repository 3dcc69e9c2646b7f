"""Whether Triton compiles kernels for a CUDA device.  Importing this does not import Triton."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import logging
from collections.abc import Iterator

import torch

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)  # Triton does not compile for older devices
_compiling = contextvars.ContextVar("compiling", default=False)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Within this block tensors without memory stand for those of a CUDA device, for which kernels are compiled."""
    token = _compiling.set(True)
    try:
        yield
    finally:
        _compiling.reset(token)


def is_compiling() -> bool:
    """Return whether kernels are being compiled, see `compiling`."""
    return _compiling.get()


def in_triton(device: torch.device, what: str, otherwise: str) -> bool:
    """Return whether something is computed on a device in Triton's kernels, and say on the log which way is taken on a CUDA device.

    While kernels are compiled, tensors without memory stand for those of the CUDA device that torch sees, if there is one: kernels that are
    launched with them are compiled for that device (kernels/triton/grids.py).

    Args:
        device: The device.
        what: What is computed.
        otherwise: How it is computed where Triton is not installed, or does not compile for the device.
    """
    if device.type == "meta":
        return is_compiling() and torch.cuda.is_available() and not why_not_triton(torch.device("cuda"))
    if device.type != "cuda":
        return False
    reason = why_not_triton(device)
    logger.info("%s on the device %s", what, f"{otherwise}: {reason}" if reason else "in Triton's kernels")
    return not reason


def why_not_triton(device: torch.device) -> str:
    """Return why there are no kernels of Triton for a CUDA device; an empty text if there are."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        return f"its compute capability is {major}.{minor}, not 8.0 or more"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'flexgen-engine[triton]')"
    return ""
