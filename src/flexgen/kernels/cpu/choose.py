"""Which positions the heads of a sparse attention keep, and their weights.

The k-th highest of many products is found by bisection, at first by value and then over the floating-point numbers in their order.  Each
step is one pass that counts, in vectors; nothing is moved and the result does not depend on an order of summation.  The softmax takes in
what is not kept, too, and its weights are set to zero afterwards: in vectors that is faster than bringing together what is kept.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import njit, types

from flexgen.base.compiled import intrinsic
from flexgen.kernels.cpu.kept import count_above, count_from, extremes, keep_marked, mark, next_marked
from flexgen.kernels.cpu.rows import LANES, clear, moved
from flexgen.kernels.cpu.softmax import absorb

STEPS_BY_VALUE = 16  # enough where the products that are near the wanted one have its size

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


@intrinsic
def _middle_of(typing_context: Any, one: Any, other: Any) -> Any:
    """Compile `_middle_of(one, other)`: the mean of two numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*(builder.fmul(each, ir.Constant(each.type, 0.5)) for each in arguments))

    return one(one, one), generate


@njit
def fill(row: Any, begin: int, end: int, number: Any) -> None:
    """Set places begin <= place < end."""
    for i in range(begin, end):
        row[i] = number


@njit
def threshold(products: Any, begin: int, end: int, kept: int) -> Any:
    """Return the product that the `kept` highest reach, and how many that equal it are among them, or more where all are.

    All are kept where `kept` is at least their number.  Products that are not numbers are among the highest.

    Args:
        products: A pointer to whole vectors of products; those outside of [begin, end) become negative infinity.
        begin: The first visible place, within the first pages.
        end: The place after the last one.
        kept: How many are kept.
    """
    vectors = (end + LANES - 1) // LANES
    fill(products, 0, begin, products[begin])
    fill(products, end, vectors * LANES, products[begin])
    least, most = extremes(products, vectors)
    fill(products, 0, begin, -math.inf)
    fill(products, end, vectors * LANES, -math.inf)
    if kept >= end - begin:
        return least, end - begin
    low, high, steps = _place_of(least), _place_of(most), 0  # at least `kept` products reach what is at `low`
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up
        if steps < STEPS_BY_VALUE:
            place = _place_of(_middle_of(_number_at(low, least), _number_at(high, least)))
            middle = place if low < place <= high else middle
        steps += 1
        count = count_from(products, vectors, _number_at(middle, least))
        if count == kept:
            return _number_at(middle, least), end - begin
        if count > kept:
            low = middle
        else:
            high = middle - 1
    found = _number_at(low, least)
    return found, kept - count_above(products, vectors, found)


@njit
def _ties_end(products: Any, begin: int, end: int, least: Any, num_equal: int) -> int:
    """Return the place after the first `num_equal` places of products that equal `least`."""
    if num_equal >= end - begin:
        return end
    place = begin
    while place < end and num_equal > 0:
        num_equal -= products[place] == least
        place += 1
    return place


@njit
def choose(
    products: Any, begin: int, border: int, end: int, kept: int, scaling: Any, softcap: Any, marks: Any, union: Any, maximum: Any,
    normalizer: Any,
) -> Any:  # fmt: skip
    """Turn one head's products[begin:end] into weights: 0 for what it does not keep.

    Args:
        products: A pointer to whole vectors of the head's products; outside of [begin, end) weights become 0.
        begin: The first visible place.
        border: The first place of the own page, from which on everything is kept.
        end: The place after the last one.
        kept: How many are kept for their products.
        scaling: As for `absorb`.
        softcap: As for `absorb`.
        marks: Scratch, as kept.py describes it.
        union: The marks of several heads, to which those of what is kept are added.
        maximum: As for `absorb`.
        normalizer: As for `absorb`.

    Returns:
        The maximum and the normalizer.
    """
    vectors = (end + LANES - 1) // LANES
    least, num_equal = threshold(products, begin, end, kept)
    mark(products, vectors, begin, _ties_end(products, begin, end, least, num_equal), max(begin, border), end, least, marks, union)
    largest, _, factor = absorb(products, begin, end, scaling, softcap, maximum, normalizer)  # the highest product is always kept
    return largest, normalizer * factor + keep_marked(products, vectors, marks)


@njit
def choose_rows(
    products: Any, begin: int, border: int, end: int, heads: int, kept: int, scaling: Any, softcap: Any, marks: Any, union: Any,
    state: Any,
) -> None:  # fmt: skip
    """Let `choose` turn each head's row of `products` into weights; the places that some head keeps are marked in `union`."""
    clear(union, (end + LANES - 1) // LANES)
    for head in range(heads):
        state.maxima[head], state.normalizers[head] = choose(
            moved(products.first, head * products.stride), begin, border, end, kept, scaling, softcap, marks, union, state.maxima[head],
            state.normalizers[head],
        )  # fmt: skip


@njit
def clear_rows(rows: Any, heads: int, size: int) -> None:
    """Set the first `size` elements of each head's row to zero."""
    for head in range(heads):
        clear(moved(rows.first, head * rows.stride), size)


@njit
def list_marked(union: Any, begin: int, end: int, size: int, place: int, columns: Any, places: Any, count: int) -> int:
    """Append the marked columns begin <= column < end of a page to a list, and where their values are; return the new length of the list.

    Args:
        union: Marks of columns.
        begin: The first column.
        end: The column after the last one.
        size: What lies between the values of two columns.
        place: Where the values of the first column are.
        columns: The list of columns.
        places: The list of places.
        count: The length of the lists.
    """
    column = next_marked(union, begin, end)
    while column < end:
        columns[count], places[count] = column, place + (column - begin) * size
        count += 1
        column = next_marked(union, column + 1, end)
    return count
