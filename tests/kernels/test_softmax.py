"""The float32 functions that stand in for the C library's, against NumPy's in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from flexgen.kernels.cpu import softmax

EPSILON = 2.0**-23


@njit(**softmax.ELEMENTWISE)
def exponentials(numbers: Any, results: Any) -> None:
    for i in range(numbers.size):
        results[i] = softmax.exp_nonpositive(numbers[i])


@njit(**softmax.ELEMENTWISE)
def tangents(numbers: Any, results: Any) -> None:
    for i in range(numbers.size):
        results[i] = softmax.tanh(numbers[i])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponential(dtype: Any) -> None:
    numbers = np.concatenate([-np.geomspace(1e-9, 87, 100_000), [0.0]]).astype(dtype)
    results = np.empty_like(numbers)
    exponentials(numbers, results)
    np.testing.assert_allclose(results, np.exp(numbers.astype(np.float64)), rtol=2 * EPSILON)


def test_exponential_of_what_is_no_number() -> None:
    numbers, results = np.array([-200, -3e38, -np.inf, np.nan], np.float32), np.empty(4, np.float32)
    exponentials(numbers, results)
    assert (results[:3] < 2e-38).all()
    assert np.isnan(results[3])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hyperbolic_tangent(dtype: Any) -> None:
    magnitudes = np.geomspace(1e-9, 100, 100_000)
    numbers = np.concatenate([magnitudes, -magnitudes, [0.0]]).astype(dtype)
    results = np.empty_like(numbers)
    tangents(numbers, results)
    np.testing.assert_allclose(results, np.tanh(numbers.astype(np.float64)), rtol=2 * EPSILON)
