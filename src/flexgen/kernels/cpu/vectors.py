"""LLVM vectors of LANES elements, while code is generated."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from flexgen.kernels.cpu.formats import INT32
from flexgen.kernels.cpu.rows import LANES


def vector_of(element: ir.Type) -> ir.VectorType:
    """Return the type of a vector."""
    return ir.VectorType(element, LANES)


def broadcast(builder: Any, scalar: Any) -> Any:
    """Generate a vector of equal elements."""
    empty = ir.Constant(vector_of(scalar.type), ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(INT32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(vector_of(INT32), [0] * LANES))
