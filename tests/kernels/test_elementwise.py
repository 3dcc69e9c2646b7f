"""Compiled norms against float64: whether they also add in torch's order is found out where they are put to use (models/fused.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexgen.kernels.cpu import elementwise
from flexgen.kernels.cpu.formats import carried

EPSILON = 1e-5
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}  # rounded twice or three times


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("style", [elementwise.WEIGHT_LAST, elementwise.WEIGHT_BEFORE_ROUNDING, elementwise.ONE_MORE])
@pytest.mark.parametrize("columns", [1, 7, 8, 33, 100, 519, 8200])
def test_norm(columns: int, style: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(columns)
    x, weight = torch.randn(5, columns, generator=generator).to(dtype), torch.randn(columns, generator=generator).to(dtype)
    out = torch.full((6, columns), 7, dtype=dtype)
    arrays = carried(x), carried(weight), np.float32(columns), np.float32(EPSILON), style, carried(out)
    elementwise.rms_norm(1, 5, *arrays)
    wide = x.double()
    factor = weight.double() + (1 if style == elementwise.ONE_MORE else 0)
    wanted = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON) * factor
    torch.testing.assert_close(out[1:5].double(), wanted[1:], rtol=2 * ROUNDOFF[dtype], atol=1e-7)
    assert bool((out[[0, 5]] == 7).all())
