"""The values of small floating-point formats, by code."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# E2M1 of OCP Microscaling Formats 1.0, section 5.3.3: a sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@functools.cache
def e4m3() -> tuple[float, ...]:
    """Return the 256 values of E4M3 without infinities (torch.float8_e4m3fn)."""
    return tuple(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist())


@functools.cache
def e8m0() -> tuple[float, ...]:
    """Return the 256 values of E8M0 (torch.float8_e8m0fnu): powers of two, and NaN for 255."""
    return (*(2.0 ** (code - 127) for code in range(255)), math.nan)


@functools.cache
def powers() -> tuple[float, ...]:
    """Return 2 ** (code - 127) for codes in plain bytes, as transformers computes it: that of 255 is infinite in float32."""
    return (*(2.0 ** (code - 127) for code in range(255)), math.inf)


@functools.cache
def on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a table as float32 on a device.  It is copied there once, since the computing waits for such a copy."""
    return torch.tensor(values, dtype=torch.float32, device=device)
