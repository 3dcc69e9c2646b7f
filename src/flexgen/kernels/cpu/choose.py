"""Which positions the heads of a sparse attention keep, and their weights.

The k-th highest of many products is found by bisection over the floating-point numbers in their order.  Each step is one pass that counts,
which compiles to vectors; nothing is moved and the result does not depend on an order of summation.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types

from flexgen.base.compiled import intrinsic
from flexgen.kernels.cpu.rows import clear, moved
from flexgen.kernels.cpu.softmax import ELEMENTWISE, absorb

SIGN = {32: 1 << 31, 64: 1 << 63}
INFINITY = {32: 0x7F80_0000, 64: 0x7FF0_0000_0000_0000}  # its bits


@intrinsic
def _place_of(typing_context: Any, number: Any) -> Any:
    """Compile `_place_of(number)`: the place of a number that is none of the NaNs in the order of all, int64; both zeros have place 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        width = number.bitwidth
        whole = ir.IntType(width)
        bits = builder.bitcast(arguments[0], whole)
        size = builder.and_(bits, ir.Constant(whole, SIGN[width] - 1))
        place = builder.select(builder.icmp_signed("<", bits, ir.Constant(whole, 0)), builder.neg(size), size)
        return place if width == 64 else builder.sext(place, ir.IntType(64))

    return types.int64(number), generate


@intrinsic
def _number_at(typing_context: Any, place: Any, like: Any) -> Any:
    """Compile `_number_at(place, like)`: the number at a place, of the type of `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        width = like.bitwidth
        whole = ir.IntType(width)
        bits = arguments[0] if width == 64 else builder.trunc(arguments[0], whole)
        negative = builder.icmp_signed("<", bits, ir.Constant(whole, 0))
        below = builder.or_(builder.neg(bits), ir.Constant(whole, SIGN[width]))
        number = builder.select(negative, below, bits)
        return builder.bitcast(number, context.get_value_type(like))

    return like(types.int64, like), generate


@njit(**ELEMENTWISE)
def _count_from(products: Any, begin: int, end: int, least: Any) -> int:
    """Return how many products are not below `least`; those that are not numbers are not."""
    count = 0
    for i in range(begin, end):
        count += not products[i] < least
    return count


@njit(**ELEMENTWISE)
def _count_above(products: Any, begin: int, end: int, most: Any) -> int:
    """Return how many products are above `most`, or are not numbers."""
    count = 0
    for i in range(begin, end):
        count += not products[i] <= most
    return count


@njit(**ELEMENTWISE)
def threshold(products: Any, begin: int, end: int, kept: int) -> Any:
    """Return the product that the `kept` highest reach, and how many that equal it are among them.

    All are kept where `kept` is at least their number.
    """
    least, most = products[begin], products[begin]
    for i in range(begin, end):
        product = products[i]
        least = product if product < least or least != least else least
        most = product if product > most or most != most else most
    if kept >= end - begin or most != most:
        return least, end - begin
    low, high = _place_of(least), _place_of(most)  # at least `kept` products reach what is at `low`
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up
        count = _count_from(products, begin, end, _number_at(middle, least))
        if count == kept:
            return _number_at(middle, least), kept
        if count > kept:
            low = middle
        else:
            high = middle - 1
    found = _number_at(low, least)
    return found, kept - _count_above(products, begin, end, found)


@njit
def choose(
    products: Any, begin: int, border: int, end: int, kept: int, scaling: Any, softcap: Any, compact: Any, union: Any,
    maximum: Any, normalizer: Any,
) -> Any:  # fmt: skip
    """Turn one head's products[begin:end] into weights: 0 for what it does not keep.

    Args:
        products: A pointer to the head's products.
        begin: The first visible place.
        border: The first place of the own page, from which on everything is kept.
        end: The place after the last one.
        kept: How many are kept for their products.
        scaling: As for `absorb`.
        softcap: As for `absorb`.
        compact: Scratch of `end` elements.
        union: Its element at each place that is kept becomes 1.
        maximum: As for `absorb`.
        normalizer: As for `absorb`.

    Returns:
        The maximum and the normalizer.
    """
    least, num_equal = threshold(products, begin, end, kept)
    equal, count = 0, 0
    for i in range(begin, end):
        product = products[i]
        equal += product == least
        if i >= border or not product <= least or (product == least and equal <= num_equal):
            compact[count] = product
            union[i] = 1
            count += 1
    maximum, normalizer, _ = absorb(compact, 0, count, scaling, softcap, maximum, normalizer)
    equal, count = 0, 0
    for i in range(begin, end):
        product = products[i]
        equal += product == least
        if i >= border or not product <= least or (product == least and equal <= num_equal):
            products[i] = compact[count]
            count += 1
        else:
            products[i] = 0
    return maximum, normalizer


@njit
def choose_rows(
    products: Any, begin: int, border: int, end: int, heads: int, kept: int, scaling: Any, softcap: Any,
    compact: Any, union: Any, state: Any,
) -> None:  # fmt: skip
    """Let `choose` turn each head's row of `products` into weights; `union` is 1 at each place that some head keeps, and 0 elsewhere.

    Places before `begin` have the weight 0, too.
    """
    clear(union, end)
    for head in range(heads):
        row = moved(products.first, head * products.stride)
        clear(row, begin)
        state.maxima[head], state.normalizers[head] = choose(
            row, begin, border, end, kept, scaling, softcap, compact, union, state.maxima[head], state.normalizers[head]
        )


@njit
def clear_rows(rows: Any, heads: int, size: int) -> None:
    """Set the first `size` elements of each head's row to zero."""
    for head in range(heads):
        clear(moved(rows.first, head * rows.stride), size)


@njit
def next_run(union: Any, place: int, end: int) -> Any:
    """Return the next places [first, stop) from `place` on that some head keeps; both are `end` where there are none."""
    while place < end and union[place] == 0:
        place += 1
    stop = place
    while stop < end and union[stop] != 0:
        stop += 1
    return place, stop
