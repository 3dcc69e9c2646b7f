"""The softmax of all Triton kernels: tile by tile, as in FlashAttention-2 (arXiv:2307.08691), in powers of two.

The state of a row is its base, total and sums: the weight of a score s is 2**(s - base), and the result is sums / total.  The base lies
HEADROOM below the largest score, so that the largest weight is 2**HEADROOM and small ones are not lost where they become float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEADROOM = tl.constexpr(14.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scaled(products, scaling, softcap):
    """Return scores, in units of log2(e), for the products of queries and keys."""
    scores = products * scaling
    if softcap is not None:
        turned = tl.exp(2.0 * scores / softcap)  # tanh(x) = 1 - 2 / (exp(2x) + 1)
        scores = softcap * (1.0 - 2.0 / (turned + 1.0))
    return scores * LOG2_E


@triton.jit
def weigh(scores, base, total):
    """Return the weights of a tile of scores (rows, tokens), -inf where hidden, the new base and total, and the factor of earlier sums."""
    new = tl.maximum(base, tl.max(scores, 1) - HEADROOM)
    finite = tl.where(new == float("-inf"), 0.0, new)  # of rows that have seen nothing yet
    weights = tl.exp2(scores - finite[:, None])
    factor = tl.exp2(base - finite)
    return weights, new, total * factor + tl.sum(weights, 1), factor


@triton.jit
def absorb(scores, values, base, total, sums, PRECISION: tl.constexpr):
    """Return the state (base, total, sums) of rows after a tile of scores (rows, tokens) and of values (tokens, dim)."""
    weights, base, total, factor = weigh(scores, base, total)
    return base, total, add_product(weights, values, sums * factor[:, None], PRECISION)


@triton.jit
def halves(numbers, like):
    """Return float32 numbers as the sum of two numbers of 16 bits, of the type that `like` has."""
    high = numbers.to(like.dtype)
    return high, (numbers - high.to(tl.float32)).to(like.dtype)


@triton.jit
def add_product(weights, values, sums, PRECISION: tl.constexpr):
    """Return sums plus weights (rows, tokens), float32, times values (tokens, dim).

    Where values have 16 bits, weights are the sum of two numbers of their type: they keep 16 bits in bfloat16, and 22 in float16.
    """
    if values.dtype == tl.float32:
        sums = tl.dot(weights, values, sums, input_precision=PRECISION)
    else:
        high, low = halves(weights, values)
        sums = tl.dot(low, values, tl.dot(high, values, sums))
    return sums


@triton.jit
def finished(base, total, sums, sinks, heads, mask):
    """Return the results (rows, dim), zeros where masked; a sink is one more logit of a row's head, which adds nothing."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=mask, other=0.0).to(tl.float32) * LOG2_E
        total += tl.exp2(sink - base)
    return tl.where(mask[:, None], sums, 0.0) / tl.where(mask, total, 1.0)[:, None]
