"""Random numbers on the host are NumPy's Philox, and those of a batch have the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.kernels.philox import UINT64, exponential_rows, exponentials, random_bits, signed

integers = st.one_of(st.integers(-(2**70), 2**70), st.sampled_from([0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]))
places = st.one_of(st.integers(0, 10**6), st.integers(0, 2**62))


def column(values: list[int]) -> torch.Tensor:
    return torch.tensor([[signed(value)] for value in values], dtype=torch.int64)


def numpy_bits(seed: int, position: int, size: int) -> np.ndarray:
    return np.random.Philox(key=seed & UINT64, counter=position << 64).random_raw(size)


@given(st.lists(st.tuples(integers, places), min_size=1, max_size=4), st.integers(1, 40))
def test_a_batch_has_numpys_bits(streams: list[tuple[int, int]], size: int) -> None:
    bits = random_bits(column([seed for seed, _ in streams]), column([position for _, position in streams]), size)
    assert (bits.shape, bits.dtype) == ((len(streams), size), torch.int64)
    for (seed, position), row in zip(streams, bits, strict=True):
        assert row.numpy().view(np.uint64).tolist() == numpy_bits(seed, position, size).tolist()


def test_many_ids() -> None:
    """So many that counters take more than 16 bits."""
    (row,) = random_bits(column([2**64 - 5]), column([77]), 300_001)
    assert np.array_equal(row.numpy().view(np.uint64), numpy_bits(-5, 77, 300_001))


def test_exponentials_of_a_batch_are_those_of_its_rows() -> None:
    seeds, positions = [0, 1, -7, 2**63], [1, 0, 5, 123_456]
    rows = exponential_rows(column(seeds), column(positions), 1000)
    for seed, position, row in zip(seeds, positions, rows.numpy(), strict=True):
        np.testing.assert_allclose(row, exponentials(seed, position, 1000), rtol=1e-15)


@pytest.mark.parametrize("number", [0, 1, -1, 2**63, 2**64 - 1, 2**64, -(2**63), 2**63 - 1, 2**70 + 3])
def test_signed_keeps_the_lowest_64_bits(number: int) -> None:
    assert -(2**63) <= signed(number) < 2**63
    assert signed(number) & UINT64 == number & UINT64
