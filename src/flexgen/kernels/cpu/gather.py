"""Values of single positions, brought together as float32 (float64 stays) and multiplied with their weights.

Rows that are wanted soon are prefetched, because hardware cannot guess where they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import register_jitable

from flexgen.base.compiled import intrinsic
from flexgen.kernels.codes import GROUP, HALF_GROUP
from flexgen.kernels.cpu.code_tile import BYTES, FLOATS, INTEGERS
from flexgen.kernels.cpu.formats import widen, widened
from flexgen.kernels.cpu.rows import LANES, Rows, moved, padded, pointer
from flexgen.kernels.cpu.sealed import code_bytes_of, decode_head
from flexgen.kernels.cpu.tile import INT64, add_product, prefetch_bytes, prefetch_line
from flexgen.kernels.cpu.vectors import broadcast, vector_of

BLOCK_ROWS = 32  # they stay in the first-level cache
ROWS_AHEAD = 16


class Gathered(NamedTuple):
    """Memory for a block of positions.

    Attributes:
        weights: `Rows` of a head each, one weight per position.
        values: `Rows` of a position each.
        columns: The list of the columns of weights of all positions.
        places: The list of places of their values.
    """

    weights: Any
    values: Any
    columns: Any
    places: Any


@register_jitable
def gathered_size(heads: int, dim: int) -> int:
    """Return the numbers that a `Gathered` takes."""
    return padded(heads * BLOCK_ROWS) + padded(BLOCK_ROWS * dim)


def list_workspace(columns: int) -> int:
    """Return the number of int64 that marks and lists of so many columns take."""
    return 2 * padded(columns) + 2 * padded(columns // LANES)


@njit
def laid_out_lists(lists: Any, memory: Any, columns: int, heads: int, dim: int) -> Any:
    """Return marks of a head, marks of several heads, and a `Gathered`, whose numbers begin at a pointer."""
    marks = pointer(lists, 0)
    union = moved(marks, padded(columns // LANES))
    listed = moved(union, padded(columns // LANES))
    weights, values = Rows(memory, BLOCK_ROWS), Rows(moved(memory, padded(heads * BLOCK_ROWS)), dim)
    return marks, union, Gathered(weights, values, listed, moved(listed, padded(columns)))


@intrinsic
def _widen_vectors(typing_context: Any, stored: Any, row: Any, vectors: Any) -> Any:
    """Compile `_widen_vectors(stored, row, vectors)`: widen so many vectors of adjacent elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stored_at, row_at, vectors = arguments
        sizes = [context.get_abi_sizeof(each.type.pointee) for each in (stored_at, row_at)]
        with cgutils.for_range(builder, vectors) as loop:
            first = builder.mul(loop.index, ir.Constant(INT64, LANES))
            source, target = (
                builder.bitcast(builder.gep(each, [first]), vector_of(each.type.pointee).as_pointer()) for each in (stored_at, row_at)
            )
            builder.store(widened(builder, builder.load(source, align=sizes[0]), stored.dtype), target, align=sizes[1])
        return context.get_dummy_value()

    return types.void(stored, row, types.int64), generate


@njit
def add_plain(weights: Any, values: Any, line: int, heads: int, dim: int, count: int, block: Any, totals: Any) -> None:
    """Add the weighted values of the first `count` listed positions; `line` is how many stored numbers a cache line has."""
    for first in range(0, count, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, count - first)
        for row in range(rows):
            later = moved(values, block.places[min(first + row + ROWS_AHEAD, count - 1)])
            for ahead in range(0, dim, line):
                prefetch_line(moved(later, ahead))
            stored, own = moved(values, block.places[first + row]), moved(block.values.first, row * dim)
            _widen_vectors(stored, own, dim // LANES)
            for i in range(dim // LANES * LANES, dim):
                own[i] = widen(stored[i])
        _add_block(weights, first, rows, heads, dim, block, totals)


@njit
def _add_block(weights: Any, first: int, rows: int, heads: int, dim: int, block: Any, totals: Any) -> None:
    for head in range(heads):
        row, own = moved(weights.first, head * weights.stride), moved(block.weights.first, head * BLOCK_ROWS)
        for i in range(rows):
            own[i] = row[block.columns[first + i]]
    add_product(block.weights, block.values, totals, heads, rows, dim, 0)


def _make_decode_group(bits: int) -> Any:
    """Generate `decode_group(codes, scale, least, row)`: the numbers of a whole group; 8-bit codes have no least number."""

    @intrinsic
    def decode_group(typing_context: Any, codes: Any, scale: Any, least: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, scale, least, row = arguments
            scale, least = broadcast(builder, scale), broadcast(builder, least)
            for half in range(2):
                begin = builder.gep(codes, [ir.Constant(INT64, half * LANES if bits == 8 else 0)])
                raw = builder.load(builder.bitcast(begin, BYTES.as_pointer()), align=1)
                if bits == 8:
                    numbers = builder.fmul(builder.sitofp(builder.sext(raw, INTEGERS), FLOATS), scale)
                else:
                    wide = builder.zext(raw, INTEGERS)
                    code = builder.lshr(wide, _integers(4)) if half else builder.and_(wide, _integers(15))
                    product = builder.fmul(builder.sitofp(code, FLOATS), scale, flags=("contract",))
                    numbers = builder.fadd(product, least, flags=("contract",))
                place = builder.gep(row, [ir.Constant(INT64, half * HALF_GROUP)])
                builder.store(numbers, builder.bitcast(place, FLOATS.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(codes, types.float32, types.float32, row), generate

    return decode_group


def _integers(value: int) -> ir.Constant:
    return ir.Constant(INTEGERS, [value] * LANES)


_decode_group_4, _decode_group_8 = _make_decode_group(4), _make_decode_group(8)


@njit
def add_coded(weights: Any, values: Any, heads: int, count: int, block: Any, totals: Any) -> None:
    """Add the weighted values of the first `count` listed positions of sealed pages; places are those where heads of pages begin."""
    code_bytes, dim, tokens = code_bytes_of(values.dim, values.bits), values.dim, values.page_tokens
    for first in range(0, count, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, count - first)
        for row in range(rows):
            later = min(first + row + ROWS_AHEAD, count - 1)
            page = moved(values.memory, block.places[later])
            prefetch_bytes(moved(page, block.columns[later] % tokens * code_bytes), code_bytes)
            prefetch_bytes(moved(page, tokens * code_bytes), values.head_bytes - tokens * code_bytes)
            place, token = block.places[first + row], block.columns[first + row] % tokens
            codes = moved(values.memory, place + token * code_bytes)
            parameters = moved(values.parameters, (place + tokens * code_bytes) // 2 + token)
            _decode_row(values, codes, parameters, moved(block.values.first, row * dim))
        _add_block(weights, first, rows, heads, dim, block, totals)


@njit
def _decode_row(values: Any, codes: Any, parameters: Any, row: Any) -> None:
    groups, stride = values.dim // GROUP, values.page_tokens
    if groups * GROUP < values.dim:
        decode_head(codes, 1, parameters, stride, values.dim, values.bits, row)
        return
    for group in range(groups):
        scale = widen(parameters[group * stride])
        own, out = moved(codes, code_bytes_of(group * GROUP, values.bits)), moved(row, group * GROUP)
        if values.bits == 8:
            _decode_group_8(own, scale, scale, out)
        else:
            _decode_group_4(own, scale, widen(parameters[(groups + group) * stride]), out)
