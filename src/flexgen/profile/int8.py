"""Measures products in int8 on a CPU, and how fast weights are rounded for them; only where they are needed."""

from __future__ import annotations

import dataclasses

import torch

from flexgen.base.steps import step
from flexgen.kernels.int8.products import Int8Products, RoundedRows, round_rows, rounded_bytes
from flexgen.kernels.threads import KernelThreads
from flexgen.plan.machine import Curve, Machine, Rate, int8_name
from flexgen.profile import compute
from flexgen.profile.compute import LinearLayer, keep_busy, random_numbers, rates_by_rows, shrunken
from flexgen.profile.timing import measured_rate, median_seconds

PRODUCTS_SECONDS, ROUNDING_SECONDS, BUSY_SECONDS = 3.5, 0.4, 10.0
QUICK_SHARE = 0.3


def with_int8(machine: Machine, dtype: str, max_bytes: int, *, quick: bool) -> Machine:
    """Return the machine with the rates of products in int8 beside a dtype of computing; they are measured now if they are missing.

    The rates contain the scaling of sums, and the rounding of inputs for each product, although some have theirs in common.

    Args:
        machine: The machine, whose products run on a CPU.
        dtype: The dtype of computing.
        max_bytes: The most memory of all buffers at the same time.
        quick: Whether to measure less.
    """
    name, computed = int8_name(dtype), getattr(torch, dtype)
    if name in machine.dense and name in machine.casts:
        return machine
    step("measuring products in int8")
    with torch.inference_mode(), KernelThreads(torch.get_num_threads()) as threads:
        products = Int8Products(threads.over)
        if not quick:  # typical rates are those after some seconds of work
            keep_busy(torch.device("cpu"), computed, max_bytes, BUSY_SECONDS)
        curve = _product_rates(products, computed, max_bytes, PRODUCTS_SECONDS * (QUICK_SHARE if quick else 1.0))
        rounding = _rounding_rate(threads, computed, max_bytes)
    return dataclasses.replace(machine, dense=machine.dense | {name: curve}, casts=machine.casts | {name: rounding})


def _product_rates(products: Int8Products, dtype: torch.dtype, max_bytes: int, seconds: float) -> Curve:
    """Measure linear layers: (rows, FLOP/s), over shapes and rounds."""
    most = max_bytes // 4

    def make(shape: tuple[int, int]) -> LinearLayer:
        weight = _rounded(*shrunken(shape, dtype.itemsize, most), dtype)
        features_out, features_in = weight.codes.shape

        def rate(rows: int, seconds: float) -> float:
            x, out = random_numbers((rows, features_in), torch.device("cpu"), dtype), torch.empty(rows, features_out, dtype=dtype)
            taken = median_seconds(lambda: products.write(products.rounded(x), weight, None, out), seconds)
            return 2 * rows * features_in * features_out / taken

        return LinearLayer((features_in + features_out) * dtype.itemsize, rate)

    return rates_by_rows(make, compute.DENSE_ROWS, most, seconds)


def _rounded(rows: int, columns: int, dtype: torch.dtype) -> RoundedRows:
    weight = RoundedRows.within(torch.empty(rounded_bytes(rows, columns), dtype=torch.int8), rows, columns)
    round_rows(random_numbers((rows, columns), torch.device("cpu"), dtype), weight)
    return weight


def _rounding_rate(threads: KernelThreads, dtype: torch.dtype, max_bytes: int) -> Rate:
    """Measure the bytes per second of rounded weights."""
    rows, columns = max(max_bytes // 4 // (4096 * dtype.itemsize), 1), 4096
    numbers = random_numbers((rows, columns), torch.device("cpu"), dtype)
    data = torch.empty(rounded_bytes(rows, columns), dtype=torch.int8)
    rounded = RoundedRows.within(data, rows, columns)
    return measured_rate(data.nbytes, lambda: round_rows(numbers, rounded, threads.over), ROUNDING_SECONDS)
