"""The inner loop of attention on a CPU: rows of weights times a piece of the KV cache, with the sums in registers.

It is written as LLVM vectors, since compilers do not keep a block of sums in registers by themselves.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from flexgen.base.compiled import intrinsic
from flexgen.kernels.cpu.formats import INT32, widen, widened
from flexgen.kernels.cpu.rows import LANES, PANEL, moved, part
from flexgen.kernels.cpu.vectors import broadcast, vector_of

INT8, INT64 = ir.IntType(8), ir.IntType(64)
CACHE_LINE = 64


@njit
def add_product(weights: Any, page: Any, out: Any, heads: int, rows: int, columns: int, ahead: int) -> None:
    """Compute out (heads, columns) += weights (heads, rows) @ page (rows, columns), each `Rows`.

    weights and out hold float32 (float64 with a float64 page), page holds any format.  Elements that lie `ahead` behind
    each row of the page are prefetched, because hardware cannot guess which page comes next.
    """
    column = 0
    while columns - column >= PANEL:
        _add_wide(weights, part(page, 0, column), part(out, 0, column), heads, rows, ahead)
        column += PANEL
    if columns - column >= LANES:
        _add_narrow(weights, part(page, 0, column), part(out, 0, column), heads, rows, ahead)
        column += LANES
    for head in range(heads):
        for last in range(column, columns):
            total = out.first[head * out.stride + last]
            for row in range(rows):
                total += weights.first[head * weights.stride + row] * widen(page.first[row * page.stride + last])
            out.first[head * out.stride + last] = total


def _make_tile(heads: int, vectors: int) -> Any:
    """Generate `tile(weights, page, out, rows, ahead)`: `add_product` for so many heads and vectors of columns."""

    @intrinsic
    def tile(typing_context: Any, weights: Any, page: Any, out: Any, rows: Any, ahead: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights_at, page_at, out_at = (Places(builder, value) for value in arguments[:3])
            rows, ahead = arguments[3:]
            places = [out_at.vector(ir.Constant(INT64, head), v * LANES) for head in range(heads) for v in range(vectors)]
            alignment = context.get_abi_sizeof(out_at.element)
            sums = [cgutils.alloca_once_value(builder, builder.load(place, align=alignment)) for place in places]
            with cgutils.for_range(builder, rows) as loop:
                prefetch(builder, builder.gep(page_at.scalar(loop.index, 0), [ahead]))
                stored = [
                    builder.load(page_at.vector(loop.index, v * LANES), align=context.get_abi_sizeof(page_at.element))
                    for v in range(vectors)
                ]
                columns = [widened(builder, vector, page.types[0].dtype) for vector in stored]
                for head in range(heads):
                    weight = builder.gep(weights_at.scalar(ir.Constant(INT64, head), 0), [loop.index])
                    weight = broadcast(builder, builder.load(weight))
                    for total, column in zip(sums[head * vectors :], columns, strict=False):
                        product = builder.fmul(weight, column, flags=("contract",))
                        builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            for place, total in zip(places, sums, strict=True):  # LLVM has kept them in registers until here
                builder.store(builder.load(total), place, align=alignment)
            return context.get_dummy_value()

        return types.void(weights, page, out, types.int64, types.int64), generate

    return tile


class Places:
    """Addresses of the elements of a `Rows` argument, while code is generated."""

    def __init__(self, builder: Any, rows: Any) -> None:
        self._builder = builder
        self._first, self._stride = builder.extract_value(rows, 0), builder.extract_value(rows, 1)
        self.element = self._first.type.pointee

    def scalar(self, row: Any, column: int) -> Any:
        offset = self._builder.add(self._builder.mul(row, self._stride), ir.Constant(INT64, column))
        return self._builder.gep(self._first, [offset])

    def vector(self, row: Any, column: int) -> Any:
        return self._builder.bitcast(self.scalar(row, column), vector_of(self.element).as_pointer())


def prefetch(builder: Any, place: Any) -> None:
    """Generate a prefetch of the cache line at an address."""
    kind = ir.FunctionType(ir.VoidType(), [INT8.as_pointer(), INT32, INT32, INT32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [INT8.as_pointer()], kind)
    reading, every_level, data = (ir.Constant(INT32, x) for x in (0, 3, 1))
    builder.call(prefetch, [builder.bitcast(place, INT8.as_pointer()), reading, every_level, data])


@intrinsic
def prefetch_line(typing_context: Any, start: Any) -> Any:
    """Compile `prefetch_line(start)`: prefetch the cache line of a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(start), generate


@njit
def prefetch_bytes(start: Any, number: int) -> None:
    """Prefetch so many bytes from a pointer to bytes on."""
    for line in range(0, number, CACHE_LINE):
        prefetch_line(moved(start, line))


def _make_strip(vectors: int) -> Any:
    """Generate `add(weights, page, out, heads, rows, ahead)`: tiles below each other, for any number of heads."""
    tile_1, tile_2, tile_3, tile_4, tile_8 = (_make_tile(heads, vectors) for heads in (1, 2, 3, 4, 8))

    def add(weights: Any, page: Any, out: Any, heads: int, rows: int, ahead: int) -> None:
        head = 0
        while heads - head >= 8:
            tile_8(part(weights, head, 0), page, part(out, head, 0), rows, ahead)
            head += 8
        if heads - head >= 4:
            tile_4(part(weights, head, 0), page, part(out, head, 0), rows, ahead)
            head += 4
        if heads - head == 3:
            tile_3(part(weights, head, 0), page, part(out, head, 0), rows, ahead)
        elif heads - head == 2:
            tile_2(part(weights, head, 0), page, part(out, head, 0), rows, ahead)
        elif heads - head == 1:
            tile_1(part(weights, head, 0), page, part(out, head, 0), rows, ahead)

    # Compiled code that is kept on disk knows functions by their names and a count that begins anew in each process.  Two of one name, from
    # files that different processes compiled, may be taken for one another, so each has a name of its own.
    add.__qualname__ = f"add_strip_of_{vectors}"
    return njit(add)


_add_wide, _add_narrow = _make_strip(2), _make_strip(1)
