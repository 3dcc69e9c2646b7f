"""Online softmax, block by block (Milakov and Gimelshein, arXiv:1805.02867), and functions that vectorise.

Float32 exponentials are polynomials, since Numba calls the C library once per element.  Float64 exponentials are the library's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import overload

from flexgen.base.compiled import intrinsic
from flexgen.kernels.cpu.formats import narrow
from flexgen.kernels.cpu.rows import Rows, moved, padded, part

LOG2_E = np.float32(math.log2(math.e))
LN_2_HIGH, LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # their sum is ln 2; the high part has 10 bits
# Cephes expf: exp(r) = 1 + r + r^2 * p(r) for |r| <= ln(2) / 2
P0, P1, P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
P3, P4, P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
HALF, ONE, TWO = np.float32(0.5), np.float32(1), np.float32(2)
LEAST_EXPONENT = np.float32(-87)  # below, the result would be subnormal
# tanh x = x - x^3/3 + 2 x^5/15 - 17 x^7/315 + 62 x^9/2835 - ..., where 1 - exp(-2x) would cancel
T3, T5, T7, T9 = np.float32(-1 / 3), np.float32(2 / 15), np.float32(-17 / 315), np.float32(62 / 2835)
SMALL = np.float32(0.25)

LOWEST = -3e38  # near the lowest float32, yet finite: differences stay numbers

# A division that may raise ends vectorisation; a sum in one given order does too.
ELEMENTWISE: Any = {"error_model": "numpy", "fastmath": {"contract"}}
IN_ANY_ORDER: Any = {"error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}


class State(NamedTuple):
    """The state of a softmax over several heads: pointers to a maximum and a normalizer per head, and the totals.

    The totals are `Rows` of one head each, sums of weights times values.
    """

    maxima: Any
    normalizers: Any
    totals: Any


def exp_nonpositive(x: Any) -> Any:
    """Compute exp(x) for x <= 0; NaN stays NaN."""
    return math.exp(x)


def tanh(x: Any) -> Any:
    """Compute the hyperbolic tangent."""
    return math.tanh(x)


@intrinsic
def _power_of_two(typing_context: Any, exponent: Any) -> Any:
    """Compute 2 ** exponent as float32, for -126 <= exponent <= 127, by writing the exponent's bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        biased = builder.add(arguments[0], ir.Constant(ir.IntType(32), 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(ir.IntType(32), 23)), ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _larger(typing_context: Any, a: Any, b: Any) -> Any:
    """Return the larger of two numbers, in a form that LLVM takes for a maximum over a loop."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered(">", *arguments, flags=flags), *arguments, flags=flags)

    return a(a, a), generate


@overload(exp_nonpositive, jit_options=ELEMENTWISE)
def _exp_nonpositive(x: Any) -> Any:
    if x != types.float32:
        return exp_nonpositive

    def polynomial(x: Any) -> Any:
        x = LEAST_EXPONENT if x < LEAST_EXPONENT else x
        exponent = np.int32(x * LOG2_E - HALF)  # rounds to nearest: x is not positive
        n = np.float32(exponent)
        r = (x - n * LN_2_HIGH) - n * LN_2_LOW
        p = ((((P0 * r + P1) * r + P2) * r + P3) * r + P4) * r + P5
        return (p * r * r + r + ONE) * _power_of_two(exponent)

    return polynomial


@overload(tanh, jit_options=ELEMENTWISE)
def _tanh(x: Any) -> Any:
    if x != types.float32:
        return tanh

    def by_exponential(x: Any) -> Any:
        magnitude = abs(x)
        square = x * x
        series = x + x * square * (T3 + square * (T5 + square * (T7 + square * T9)))
        e = exp_nonpositive(-TWO * magnitude)
        large = (ONE - e) / (ONE + e)
        return series if magnitude < SMALL else math.copysign(large, x)

    return by_exponential


@njit(**IN_ANY_ORDER)
def _scale(scores: Any, begin: int, end: int, scaling: Any, maximum: Any) -> Any:
    """Scale scores in place, and return the largest, at least `maximum`."""
    for i in range(begin, end):
        score = scores[i] * scaling
        scores[i] = score
        maximum = _larger(maximum, score)
    return maximum


@njit(**ELEMENTWISE)
def _cap(scores: Any, begin: int, end: int, factor: Any, softcap: Any) -> None:
    for i in range(begin, end):
        scores[i] = softcap * tanh(scores[i] * factor)


@njit(**IN_ANY_ORDER)
def _exponentiate(scores: Any, begin: int, end: int, maximum: Any, total: Any) -> Any:
    """Replace scores by exp(score - maximum), and return their sum added to `total`."""
    for i in range(begin, end):
        weight = exp_nonpositive(scores[i] - maximum)
        scores[i] = weight
        total += weight
    return total


@njit(**ELEMENTWISE)
def absorb(scores: Any, begin: int, end: int, scaling: Any, softcap: Any, maximum: Any, normalizer: Any) -> Any:
    """Turn scores[begin:end], one row of a block, into weights.  A softcap of 0 caps nothing.

    Returns:
        The maximum so far, the normalizer (the sum of all weights so far), and the factor that brings sums taken under the old maximum
        to the new one.
    """
    if softcap > 0:
        _cap(scores, begin, end, scaling / softcap, softcap)
        scaling /= scaling
    largest = _scale(scores, begin, end, scaling, maximum)
    factor = exp_nonpositive(maximum - largest)
    return largest, _exponentiate(scores, begin, end, largest, normalizer * factor), factor


@njit
def softmax_state(memory: Any, rows: int, columns: int) -> Any:
    """Lay out a state of so many rows from a pointer on."""
    totals = Rows(memory, columns)
    maxima = moved(memory, padded(rows * columns))
    return State(maxima, moved(maxima, padded(rows)), totals)


@njit
def rows_from(state: Any, row: int) -> Any:
    """Return the state from a row on."""
    return State(moved(state.maxima, row), moved(state.normalizers, row), part(state.totals, row, 0))


@njit
def begin_rows(state: Any, heads: int, sinks: Any, first_sink: int) -> None:
    """Begin with nothing but the sinks: (H,), or (0,) where there are none."""
    for head in range(heads):
        state.maxima[head] = sinks[first_sink + head] if sinks.size else LOWEST
        state.normalizers[head] = 1 if sinks.size else 0
    for i in range(heads * state.totals.stride):
        state.totals.first[i] = 0


@njit
def absorb_rows(scores: Any, begin: int, end: int, heads: int, scaling: Any, softcap: Any, state: Any) -> None:
    """Let `absorb` take columns begin <= column < end of each head's scores, and rescale the head's totals."""
    for head in range(heads):
        row = head * scores.stride
        state.maxima[head], state.normalizers[head], factor = absorb(
            scores.first, row + begin, row + end, scaling, softcap, state.maxima[head], state.normalizers[head]
        )
        if factor != 1:
            for i in range(head * state.totals.stride, (head + 1) * state.totals.stride):
                state.totals.first[i] *= factor


@njit(**ELEMENTWISE)
def write_rows(state: Any, heads: int, columns: int, out: Any) -> None:
    """Divide the totals by the normalizers, and store them, adjacent by head, in the format of `out`."""
    for head in range(heads):
        normalizer = state.normalizers[head]
        for i in range(columns):
            out[head * columns + i] = narrow(state.totals.first[head * state.totals.stride + i] / normalizer, out[0])
