"""The random numbers of `philox.exponential_rows`, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen.kernels.checks import check_shapes
from flexgen.kernels.triton.grids import on_grid
from flexgen.kernels.triton.programs import philox

COUNTERS = 256  # of a program


def exponential_rows(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """Return exponentially distributed numbers, float64 (rows, size); see `philox.exponential_rows`."""
    num_rows = len(seeds)
    check_shapes(seeds=(seeds, (num_rows, 1)), positions=(positions, (num_rows, 1)))
    out = torch.empty(num_rows, size, dtype=torch.float64, device=seeds.device)
    launch = on_grid(philox.exponential_rows, (num_rows, -(-size // (4 * COUNTERS))), out.device)
    launch(seeds.contiguous(), positions.contiguous(), out, size, COUNTERS=COUNTERS)
    return out
