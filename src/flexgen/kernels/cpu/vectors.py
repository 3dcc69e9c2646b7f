"""LLVM vectors of LANES elements, while code is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from flexgen.kernels.cpu.formats import INT32
from flexgen.kernels.cpu.rows import LANES


def vector_of(element: ir.Type) -> ir.VectorType:
    """Return the type of a vector."""
    return ir.VectorType(element, LANES)


def vector_at(builder: Any, start: Any, index: Any) -> Any:
    """Generate a pointer to the vector of this index from a pointer to elements on."""
    place = builder.gep(start, [builder.mul(index, ir.Constant(index.type, LANES))])
    return builder.bitcast(place, vector_of(start.type.pointee).as_pointer())


def transposed(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """Generate the transposition of LANES vectors: rows i and i + 8 are interleaved, four times over."""

    def mixed(one: Any, other: Any, first: int) -> Any:
        order = [first + i // 2 + (LANES if i % 2 else 0) for i in range(LANES)]
        return builder.shuffle_vector(one, other, ir.Constant(vector_of(INT32), order))

    rows, half_rows = list(rows), LANES // 2
    for _ in range(4):
        rows = [mixed(rows[i // 2], rows[i // 2 + half_rows], i % 2 * half_rows) for i in range(LANES)]
    return rows


def broadcast(builder: Any, scalar: Any) -> Any:
    """Generate a vector of equal elements."""
    empty = ir.Constant(vector_of(scalar.type), ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(INT32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(vector_of(INT32), [0] * LANES))


def permuted(builder: Any, table: Any, places: Any) -> Any:
    """Generate a vector of the elements of another one at given places, all of which exist.

    It is written element by element, in the form that LLVM makes one instruction of, where a processor has it for vectors of this length
    (x86 for 16 bytes, and with AVX2 for 8 elements of 32 bits).
    """
    result = ir.Constant(ir.VectorType(table.type.element, places.type.count), ir.Undefined)
    for i in range(places.type.count):
        index = ir.Constant(INT32, i)
        result = builder.insert_element(result, builder.extract_element(table, builder.extract_element(places, index)), index)
    return result
