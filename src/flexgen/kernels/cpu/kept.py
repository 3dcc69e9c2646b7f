"""Vectors over the products of one query head with all keys, for choosing among them: counted, marked and left out.

A row is a pointer to numbers of whole vectors.  Marks are a pointer to one int64 per vector, whose bits say which of its places are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from flexgen.base.compiled import intrinsic
from flexgen.kernels.cpu.formats import INT32
from flexgen.kernels.cpu.rows import LANES
from flexgen.kernels.cpu.tile import INT64
from flexgen.kernels.cpu.vectors import broadcast, vector_at, vector_of

INT1, INT16 = ir.IntType(1), ir.IntType(16)
FLAGS, INTEGERS = vector_of(INT1), vector_of(INT32)


@intrinsic
def extremes(typing_context: Any, row: Any, vectors: Any) -> Any:
    """Compile `extremes(row, vectors)`: the least and the highest number; what is not a number is none of them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = arguments[0].type.pointee
        found = [cgutils.alloca_once_value(builder, _constant(element, each)) for each in (float("inf"), float("-inf"))]
        with cgutils.for_range(builder, arguments[1]) as loop:
            numbers = builder.load(vector_at(builder, arguments[0], loop.index), align=_alignment(context, element))
            for place, relation in zip(found, "<>", strict=True):
                builder.store(_further(builder, relation, numbers, builder.load(place)), place)
        folded = [
            _folded(builder, builder.load(place), lambda a, b, relation=relation: _further(builder, relation, a, b))
            for place, relation in zip(found, "<>", strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, folded)

    return types.UniTuple(row.dtype, 2)(row, types.int64), generate


def _further(builder: Any, relation: str, number: Any, than: Any) -> Any:
    return builder.select(builder.fcmp_ordered(relation, number, than), number, than)


def _make_count(relation: str) -> Any:
    """Generate `count(row, vectors, limit)`: how many numbers have a relation to a limit; those that are not numbers have it, too."""

    @intrinsic
    def count(typing_context: Any, row: Any, vectors: Any, limit: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            start, vectors, limit = arguments
            limits, total = broadcast(builder, limit), cgutils.alloca_once_value(builder, ir.Constant(INTEGERS, [0] * LANES))
            with cgutils.for_range(builder, vectors) as loop:
                numbers = builder.load(vector_at(builder, start, loop.index), align=_alignment(context, limit.type))
                counted = builder.zext(builder.fcmp_unordered(relation, numbers, limits), INTEGERS)
                builder.store(builder.add(builder.load(total), counted), total)
            return builder.sext(_folded(builder, builder.load(total), builder.add), INT64)

        return types.int64(row, types.int64, row.dtype), generate

    return count


count_from, count_above = _make_count(">="), _make_count(">")


@intrinsic
def mark(
    typing_context: Any, row: Any, vectors: Any, begin: Any, ties_end: Any, own: Any, end: Any, limit: Any, marks: Any, union: Any
) -> Any:
    """Compile `mark(row, vectors, begin, ties_end, own, end, limit, marks, union)`: mark what is kept, and add it to the union's marks.

    That is what is above the limit or not a number, what equals it at begin <= place < ties_end, and own <= place < end.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, vectors = arguments[:2]
        begin, ties_end, own, end = (broadcast(builder, builder.trunc(each, INT32)) for each in arguments[2:6])
        limits, marks, union = broadcast(builder, arguments[6]), *arguments[7:]
        with cgutils.for_range(builder, vectors) as loop:
            numbers = builder.load(vector_at(builder, start, loop.index), align=_alignment(context, limits.type.element))
            first = builder.trunc(builder.mul(loop.index, ir.Constant(INT64, LANES)), INT32)
            places = builder.add(broadcast(builder, first), ir.Constant(INTEGERS, list(range(LANES))))
            above = builder.fcmp_unordered(">", numbers, limits)
            equal = builder.and_(builder.fcmp_ordered("==", numbers, limits), _within(builder, places, begin, ties_end))
            keeps = builder.or_(builder.or_(above, equal), _within(builder, places, own, end))
            bits = builder.zext(builder.bitcast(keeps, INT16), INT64)
            builder.store(bits, builder.gep(marks, [loop.index]))
            wanted = builder.gep(union, [loop.index])
            builder.store(builder.or_(builder.load(wanted), bits), wanted)
        return context.get_dummy_value()

    integers = (types.int64,) * 5
    return types.void(row, *integers, row.dtype, marks, union), generate


def _within(builder: Any, places: Any, begin: Any, end: Any) -> Any:
    return builder.and_(builder.icmp_signed(">=", places, begin), builder.icmp_signed("<", places, end))


@intrinsic
def keep_marked(typing_context: Any, row: Any, vectors: Any, marks: Any) -> Any:
    """Compile `keep_marked(row, vectors, marks)`: set to zero what is not marked, and return the sum of the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, vectors, marks = arguments
        element = start.type.pointee
        zeros = _constant(element, 0.0)
        total = cgutils.alloca_once_value(builder, zeros)
        with cgutils.for_range(builder, vectors) as loop:
            place = vector_at(builder, start, loop.index)
            bits = builder.trunc(builder.load(builder.gep(marks, [loop.index])), INT16)
            numbers = builder.load(place, align=_alignment(context, element))
            numbers = builder.select(builder.bitcast(bits, FLAGS), numbers, zeros)
            builder.store(numbers, place, align=_alignment(context, element))
            builder.store(builder.fadd(builder.load(total), numbers), total)
        return _folded(builder, builder.load(total), builder.fadd)

    return row.dtype(row, types.int64, marks), generate


@intrinsic
def _trailing_zeros(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(INT1, 0))

    return types.int64(types.int64), generate


@njit
def next_marked(marks: Any, place: int, end: int) -> int:
    """Return the next marked place from `place` on; `end` where there is none."""
    while place < end:
        bits = marks[place // LANES] >> (place % LANES)
        if bits != 0:
            return min(place + _trailing_zeros(bits), end)
        place += LANES - place % LANES
    return end


def _constant(element: ir.Type, number: float) -> ir.Constant:
    return ir.Constant(vector_of(element), [number] * LANES)


def _alignment(context: Any, element: ir.Type) -> int:
    return context.get_abi_sizeof(element)


def _folded(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine the elements of a vector, halves with halves."""
    size = LANES
    while size > 1:
        size //= 2
        halves = [ir.Constant(ir.VectorType(INT32, size), list(range(first, first + size))) for first in (0, size)]
        vector = combine(*(builder.shuffle_vector(vector, vector, half) for half in halves))
    return builder.extract_element(vector, ir.Constant(INT32, 0))
