"""Random numbers in Triton are those of NumPy's Philox."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexgen.kernels.philox import exponentials, signed
from tests.kernels.triton_kernels import DEVICE, ON_GPU

pytestmark = ON_GPU


@pytest.mark.parametrize("size", [1, 5, 1023, 1024, 1025, 3000])
def test_like_numpy(size: int) -> None:
    from flexgen.kernels.triton.random_numbers import exponential_rows

    streams = [(0, 0), (1, 7), (-5, 2**40), (2**63, 3), (2**64 - 1, 2**62)]
    seeds = torch.tensor([[signed(seed)] for seed, _ in streams], device=DEVICE)
    positions = torch.tensor([[position] for _, position in streams], device=DEVICE)
    rows = exponential_rows(seeds, positions, size).cpu().numpy()
    assert rows.shape == (len(streams), size)
    for (seed, position), row in zip(streams, rows, strict=True):
        np.testing.assert_allclose(row, exponentials(seed, position, size), rtol=1e-14)
