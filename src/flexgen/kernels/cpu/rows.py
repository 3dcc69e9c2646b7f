"""Matrices in memory as bare pointers, because Numba would count references to every array that is passed on.

Whoever calls a kernel keeps the arrays alive.  Only visible positions are read from their pages.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit, types
from numba.extending import register_jitable

from flexgen.base.compiled import intrinsic
from flexgen.errors import EngineError
from flexgen.kernels.cpu.formats import widen

LANES = 16  # elements of a vector: one AVX-512 register of float32; LLVM splits it where registers are narrower
PANEL = 2 * LANES  # columns that are worked on at once


class Rows(NamedTuple):
    """A matrix in memory.  Element (i, j) is `first[i * stride + j]`."""

    first: Any
    stride: int


@intrinsic
def pointer(typing_context: Any, array: Any, index: Any) -> Any:
    """Compile `pointer(array, index)`: a pointer to an element of a contiguous array, counted in memory order.  It keeps nothing alive."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        return builder.gep(data, [arguments[1]])

    return types.CPointer(array.dtype)(array, types.int64), generate


@intrinsic
def moved(typing_context: Any, start: Any, elements: Any) -> Any:
    """Compile `moved(start, elements)`: the pointer moved on by so many elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return start(start, types.int64), generate


@register_jitable
def padded(size: int) -> int:
    """Round a size up so that what follows begins on a vector's boundary."""
    return (size + LANES - 1) // LANES * LANES


@njit
def part(rows: Any, row: int, column: int) -> Any:
    """Return the matrix that begins at (row, column)."""
    return Rows(moved(rows.first, row * rows.stride + column), rows.stride)


@njit
def widen_row(stored: Any, row: Any, size: int) -> None:
    """Widen `size` adjacent elements."""
    for i in range(size):
        row[i] = widen(stored[i])


@njit
def clear(row: Any, size: int) -> None:
    """Set `size` elements to zero."""
    for i in range(size):
        row[i] = 0


@njit
def page_and_next(table: Any, index: int, last: int, num_pages: int) -> Any:
    """Return a page of a sequence, and the one that will be read next."""
    page, following = table[index], table[min(index + 1, last)]
    if min(page, following) < 0 or max(page, following) >= num_pages:
        raise EngineError("a page table names no page of the pool at a visible position")
    return page, following
