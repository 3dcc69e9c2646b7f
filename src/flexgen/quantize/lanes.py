"""The search for a scale and a zero point, for LANES groups at once: each element of a vector belongs to a group of its own.

So no sum has to be taken across a vector, and a group is rounded alike whatever is rounded beside it.  kernel.py says what is searched.
Weights come turned: a vector holds the weights of one place in all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from flexgen.base.compiled import intrinsic
from flexgen.kernels.cpu.formats import FLOAT, INT32, narrowed, widened
from flexgen.kernels.cpu.rows import LANES
from flexgen.kernels.cpu.vectors import broadcast, vector_at, vector_of

_INT8, _INT64 = ir.IntType(8), ir.IntType(64)
_FLOATS = vector_of(FLOAT)
_FUSED = ("contract",)
# Errors have to be smaller by more than the rounding of their sums, so that no group gets worse by being searched.
_CLEARLY = float(np.float32(1 - 1e-4))
_AT_ONCE = 2  # vectors of weights that a step of a loop takes, with a sum for each, so that neither waits for the other


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _smaller(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", one, other), one, other)


def _larger(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def _applied(builder: Any, name: str, vector: Any) -> Any:
    """Call an intrinsic of LLVM."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), [vector])


def _steps(builder: Any, weights: Any, inverse: Any, zero: Any, top: Any) -> Any:
    """Generate the nearest codes less their zero points; `inverse` is that of the scale."""
    rough = builder.fadd(builder.fmul(weights, inverse, flags=_FUSED), _constant(0.5), flags=_FUSED)
    least, most = builder.fneg(zero), builder.fadd(builder.fsub(top, zero), _constant(0.5))
    return _applied(builder, "floor", _smaller(builder, _larger(builder, rough, least), most))


class _Search:
    """The search, while code is generated.

    Args:
        builder: Where code is added.
        weights: A pointer to `size` vectors of float32, and room for as many: each weight's share in the error.
        size: The weights of a group.
        top: A vector of the largest code.
    """

    def __init__(self, builder: Any, weights: Any, size: Any, top: Any) -> None:
        self._builder, self._weights, self._size, self._top = builder, weights, size, top

    def best(self, shares: Any, num_shares: Any, stored: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Generate the search, and return the scales and the zero points; the scale of a group with a number that is not finite is none.

        Args:
            shares: A pointer to the widths of the ranges to try, as shares of that from the smallest to the largest weight.
            num_shares: Their number.
            stored: Generates scales as they will be stored.
        """
        builder = self._builder
        low, high, magnitudes = self._extremes()
        self._keep_shares_in_the_error(builder.fdiv(magnitudes, broadcast(builder, builder.sitofp(self._size, FLOAT))))
        whole = builder.fdiv(builder.fsub(high, low), self._top)
        scale = stored(whole)
        zero = self._zero_of(low, scale)
        weighted, plain = self._errors(scale, zero)
        most = builder.fmul(plain, _constant(_CLEARLY))
        found = [cgutils.alloca_once_value(builder, value) for value in (weighted, scale, zero)]
        with cgutils.for_range(builder, num_shares) as loop:
            share = broadcast(builder, builder.load(builder.gep(shares, [loop.index])))
            scale = stored(builder.fmul(whole, share))
            self._take_if_better(scale, self._zero_of(builder.fmul(low, share), scale), most, found)
        scale, zero = builder.load(found[1]), builder.load(found[2])
        self._take_if_better(stored(self._fitted_scale(scale, zero)), zero, most, found)
        empty = builder.fcmp_ordered("==", low, high)
        scale = builder.select(empty, _constant(1.0), builder.load(found[1]))
        zero = builder.select(empty, _constant(0.0), builder.load(found[2]))
        finite = builder.fcmp_ordered("==", builder.fsub(magnitudes, magnitudes), _constant(0.0))
        return builder.select(finite, scale, _constant(float("nan"))), builder.select(finite, zero, _constant(0.0))

    def _load(self, index: Any) -> Any:
        return self._builder.load(vector_at(self._builder, self._weights, index), align=4)

    def _share_in_the_error(self, index: Any) -> Any:
        return vector_at(self._builder, self._weights, self._builder.add(self._size, index))

    def _extremes(self) -> tuple[Any, Any, Any]:
        """Generate the range of the weights, which zero is always in, because a zero point is one of the codes, and the sum of |w|."""
        builder = self._builder
        low, high, total = (cgutils.alloca_once_value(builder, _constant(0.0)) for _ in range(3))
        with cgutils.for_range(builder, self._size) as loop:
            weights = self._load(loop.index)
            builder.store(_smaller(builder, weights, builder.load(low)), low)
            builder.store(_larger(builder, weights, builder.load(high)), high)
            builder.store(builder.fadd(builder.load(total), _applied(builder, "fabs", weights)), total)
        return builder.load(low), builder.load(high), builder.load(total)

    def _keep_shares_in_the_error(self, mean: Any) -> None:
        """Generate |w| + mean |w| for each weight."""
        builder = self._builder
        with cgutils.for_range(builder, self._size) as loop:
            share = builder.fadd(_applied(builder, "fabs", self._load(loop.index)), mean)
            builder.store(share, self._share_in_the_error(loop.index), align=4)

    def _zero_of(self, low: Any, scale: Any) -> Any:
        builder = self._builder
        rough = builder.fadd(builder.fdiv(builder.fneg(low), scale), _constant(0.5))
        return _smaller(builder, _applied(builder, "floor", rough), self._top)

    def _take_if_better(self, scale: Any, zero: Any, most: Any, found: Sequence[Any]) -> None:
        """Keep a scale and a zero point where the weighted error is the least so far, and the plain one not larger than `most`."""
        builder = self._builder
        weighted, plain = self._errors(scale, zero)
        is_less = builder.fcmp_ordered("<", weighted, builder.load(found[0]))
        better = builder.and_(is_less, builder.fcmp_ordered("<=", plain, most))
        for value, place in zip((weighted, scale, zero), found, strict=True):
            builder.store(builder.select(better, value, builder.load(place)), place)

    def _errors(self, scale: Any, zero: Any) -> tuple[Any, Any]:
        """Generate the squared error with weights |w| + mean |w|, and the plain one."""
        builder = self._builder
        inverse = builder.fdiv(_constant(1.0), scale)

        def terms(weights: Any, share: Any) -> tuple[Any, Any]:
            steps = _steps(builder, weights, inverse, zero, self._top)
            difference = builder.fsub(weights, builder.fmul(scale, steps, flags=_FUSED), flags=_FUSED)
            square = builder.fmul(difference, difference)
            return builder.fmul(square, share, flags=_FUSED), square

        return self._sums(terms)

    def _fitted_scale(self, scale: Any, zero: Any) -> Any:
        """Generate the scale with the least weighted error for the codes that `scale` gives; `scale` itself where all stand for 0."""
        builder = self._builder
        inverse = builder.fdiv(_constant(1.0), scale)

        def terms(weights: Any, share: Any) -> tuple[Any, Any]:
            steps = _steps(builder, weights, inverse, zero, self._top)
            weighted = builder.fmul(steps, share)
            return builder.fmul(weights, weighted, flags=_FUSED), builder.fmul(steps, weighted, flags=_FUSED)

        products, squares = self._sums(terms)
        positive = (builder.fcmp_ordered(">", value, _constant(0.0)) for value in (products, squares))
        return builder.select(builder.and_(*positive), builder.fdiv(products, squares), scale)

    def _sums(self, terms: Callable[[Any, Any], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Generate the sums over all weights of two terms, of the weights and their shares in the error."""
        builder = self._builder
        totals = [[cgutils.alloca_once_value(builder, _constant(0.0)) for _ in range(2)] for _ in range(_AT_ONCE)]
        with cgutils.for_range(builder, builder.udiv(self._size, ir.Constant(_INT64, _AT_ONCE))) as loop:
            first = builder.mul(loop.index, ir.Constant(_INT64, _AT_ONCE))
            for place, sums in enumerate(totals):
                index = builder.add(first, ir.Constant(_INT64, place))
                share = builder.load(self._share_in_the_error(index), align=4)
                for total, term in zip(sums, terms(self._load(index), share), strict=True):
                    builder.store(builder.fadd(builder.load(total), term, flags=_FUSED), total)
        (one, two), (three, four) = ([builder.load(total) for total in sums] for sums in totals)
        return builder.fadd(one, three), builder.fadd(two, four)


@intrinsic
def widen_vectors(typing_context: Any, stored: Any, count: Any, out: Any) -> Any:
    """Compile `widen_vectors(stored, count, out)`: so many vectors of any format to float32 (pointers)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, number, target = arguments
        with cgutils.for_range(builder, number) as loop:
            raw = builder.load(vector_at(builder, source, loop.index), align=context.get_abi_sizeof(source.type.pointee))
            builder.store(widened(builder, raw, stored.dtype), vector_at(builder, target, loop.index), align=4)
        return context.get_dummy_value()

    return types.void(stored, types.int64, out), generate


@intrinsic
def search_lanes(
    typing_context: Any, weights: Any, size: Any, shares: Any, num_shares: Any, top: Any, least: Any, scales: Any, zeros: Any
) -> Any:
    """Compile `search_lanes(weights, size, shares, num_shares, top, least, scales, zeros)`: the scales and zero points of LANES groups.

    weights points to `size` vectors of turned float32 and to room for as many more; shares to the ranges to try; scales and zeros to where
    one vector each is written, of the format of scales, in which they are at least `least`, and of float32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, number, ranges, num_ranges, largest, smallest, scales_at, zeros_at = arguments
        floor = broadcast(builder, smallest)

        def stored(scale: Any) -> Any:
            return widened(builder, narrowed(builder, _larger(builder, scale, floor), scales.dtype), scales.dtype)

        search = _Search(builder, start, number, broadcast(builder, largest))
        scale, zero = search.best(ranges, num_ranges, stored)
        narrow = narrowed(builder, scale, scales.dtype)
        place = builder.bitcast(scales_at, narrow.type.as_pointer())
        builder.store(narrow, place, align=context.get_abi_sizeof(scales_at.type.pointee))
        builder.store(zero, builder.bitcast(zeros_at, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    given = (weights, types.int64, shares, types.int64, types.float32, types.float32, scales, zeros)
    return types.void(*given), generate


def _make_pack(bits: int) -> Any:
    """Generate `pack(weights, size, scale, zero, top, packed)`: a group's codes of so many bits as bytes.

    Weights are of any format, in their order; of two codes in a byte, the first is in the low half.
    """

    @intrinsic
    def pack(typing_context: Any, weights: Any, size: Any, scale: Any, zero: Any, top: Any, packed: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, number, *parameters, target = arguments
            factor, point, largest = (broadcast(builder, value) for value in parameters)
            inverse = builder.fdiv(_constant(1.0), factor)
            with cgutils.for_range(builder, builder.udiv(number, ir.Constant(_INT64, LANES))) as loop:
                raw = builder.load(vector_at(builder, source, loop.index), align=context.get_abi_sizeof(source.type.pointee))
                steps = _steps(builder, widened(builder, raw, weights.dtype), inverse, point, largest)
                codes = builder.fptosi(builder.fadd(steps, point), vector_of(INT32))
                if bits == 4:
                    pairs = builder.bitcast(codes, ir.VectorType(_INT64, LANES // 2))
                    codes = builder.or_(pairs, builder.lshr(pairs, ir.Constant(pairs.type, [32 - bits] * (LANES // 2))))
                stored = builder.trunc(codes, ir.VectorType(_INT8, codes.type.count))
                place = builder.gep(target, [builder.mul(loop.index, ir.Constant(_INT64, codes.type.count))])
                builder.store(stored, builder.bitcast(place, stored.type.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(weights, types.int64, types.float32, types.float32, types.float32, packed), generate

    return pack


pack_4, pack_8 = _make_pack(4), _make_pack(8)
