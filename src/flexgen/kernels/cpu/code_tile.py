"""The inner loops of attention on codes of 4 bits, for the pages and groups that nearly all models have: 16 tokens, 32 numbers.

One vector holds 16 codes: the low or the high halves of 16 bytes.  Sums stay in registers until their scale is applied.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types

from flexgen.base.compiled import intrinsic
from flexgen.kernels.codes import HALF_GROUP
from flexgen.kernels.cpu.formats import FLOAT, HALF, INT32
from flexgen.kernels.cpu.rows import LANES, moved, part
from flexgen.kernels.cpu.tile import INT8, INT64, Places, prefetch
from flexgen.kernels.cpu.vectors import broadcast, vector_of

FAST_TOKENS = LANES  # tokens of a page
FLOATS, HALVES, BYTES, INTEGERS = (vector_of(element) for element in (FLOAT, HALF, INT8, INT32))
FUSED = ("contract",)


def _codes(builder: Any, at: Any) -> tuple[Any, Any]:
    """Load the low and the high codes of 16 bytes."""
    wide = builder.zext(builder.load(builder.bitcast(at, BYTES.as_pointer()), align=1), INTEGERS)
    low, high = builder.and_(wide, ir.Constant(INTEGERS, [15] * LANES)), builder.lshr(wide, ir.Constant(INTEGERS, [4] * LANES))
    return builder.sitofp(low, FLOATS), builder.sitofp(high, FLOATS)


def _multiply_add(builder: Any, one: Any, other: Any, addend: Any) -> Any:
    return builder.fadd(builder.fmul(one, other, flags=FUSED), addend, flags=FUSED)


def _half_vector(builder: Any, start: Any, offset: Any) -> Any:
    """Load 16 parameters."""
    at = builder.bitcast(builder.gep(start, [offset]), HALVES.as_pointer())
    return builder.fpext(builder.load(at, align=2), FLOATS)


def _make_key_tile(heads: int) -> Any:
    """Generate `tile(queries, sums, codes, parameters, least, scores)`: the scores of one group, for so many heads.

    queries are `Rows` at the group's first number, sums `Rows` at the group's sum of queries, codes and parameters pointers; least is the
    distance of the least numbers from the scales; scores are `Rows`, to which is added.
    """

    @intrinsic
    def tile(typing_context: Any, queries: Any, sums: Any, codes: Any, parameters: Any, least: Any, scores: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            queries_at, sums_at, scores_at = (Places(builder, arguments[place]) for place in (0, 1, 5))
            start, scales, least = arguments[2], arguments[3], arguments[4]
            zero = ir.Constant(FLOATS, [0.0] * LANES)
            low, high = [zero] * heads, [zero] * heads
            for row in range(HALF_GROUP):
                one, other = _codes(builder, builder.gep(start, [ir.Constant(INT64, row * LANES)]))
                for head in range(heads):
                    line = ir.Constant(INT64, head)
                    weight = broadcast(builder, builder.load(queries_at.scalar(line, row)))
                    low[head] = _multiply_add(builder, weight, one, low[head])
                    weight = broadcast(builder, builder.load(queries_at.scalar(line, HALF_GROUP + row)))
                    high[head] = _multiply_add(builder, weight, other, high[head])
            scale = _half_vector(builder, scales, ir.Constant(INT64, 0))
            lowest = _half_vector(builder, scales, least)
            for head in range(heads):
                line = ir.Constant(INT64, head)
                place = scores_at.vector(line, 0)
                total = builder.load(place, align=4)
                total = _multiply_add(builder, scale, builder.fadd(low[head], high[head]), total)
                total = _multiply_add(builder, lowest, broadcast(builder, builder.load(sums_at.scalar(line, 0))), total)
                builder.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(queries, sums, codes, parameters, types.int64, scores), generate

    return tile


def _make_value_tile(heads: int) -> Any:
    """Generate `tile(weights, codes, stride, parameters, least, out, offsets, scaled)`: the weighted sum of one group, for so many heads.

    weights are `Rows` of 16 tokens, codes and parameters pointers at the group's; a token's codes are `stride` bytes behind the one before.
    Two vectors of each head's `out`, and one of its `offsets`, which is to be summed up, are added to.  scaled is scratch.
    """

    @intrinsic
    def tile(
        typing_context: Any, weights: Any, codes: Any, stride: Any, parameters: Any, least: Any, out: Any, offsets: Any, scaled: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights_at, out_at, offsets_at, scaled_at = (Places(builder, arguments[place]) for place in (0, 5, 6, 7))
            start, stride, scales, least = arguments[1], arguments[2], arguments[3], arguments[4]
            scale = _half_vector(builder, scales, ir.Constant(INT64, 0))
            lowest = _half_vector(builder, scales, least)
            lines = [ir.Constant(INT64, head) for head in range(heads)]
            for line in lines:
                weight = builder.load(weights_at.vector(line, 0), align=4)
                builder.store(builder.fmul(weight, scale), scaled_at.vector(line, 0), align=4)
                place = offsets_at.vector(line, 0)
                builder.store(_multiply_add(builder, weight, lowest, builder.load(place, align=4)), place, align=4)
            places = [out_at.vector(line, column) for column in (0, HALF_GROUP) for line in lines]
            totals = [builder.load(place, align=4) for place in places]
            for token in range(LANES):
                at = builder.gep(start, [builder.mul(stride, ir.Constant(INT64, token))])
                vectors = _codes(builder, at)
                for head, line in enumerate(lines):
                    weight = broadcast(builder, builder.load(scaled_at.scalar(line, token)))
                    for half, vector in enumerate(vectors):
                        totals[half * heads + head] = _multiply_add(builder, weight, vector, totals[half * heads + head])
            for place, total in zip(places, totals, strict=True):
                builder.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(weights, codes, types.int64, parameters, types.int64, out, offsets, scaled), generate

    return tile


@intrinsic
def _prefetch_line(typing_context: Any, start: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(start), generate


@njit
def prefetch_bytes(start: Any, number: int) -> None:
    """Prefetch so many bytes from a pointer to bytes on."""
    for line in range(0, number, 64):
        _prefetch_line(moved(start, line))


def _make_scores() -> Any:
    """Generate `add_scores`: tiles below each other, for any number of heads."""
    tile_1, tile_2, tile_4, tile_8 = (_make_key_tile(heads) for heads in (1, 2, 4, 8))

    def add_scores(queries: Any, sums: Any, codes: Any, parameters: Any, least: int, scores: Any, heads: int) -> None:
        """Add the scores of one group of a page to those of each head."""
        head = 0
        while heads - head >= 8:
            tile_8(part(queries, head, 0), part(sums, head, 0), codes, parameters, least, part(scores, head, 0))
            head += 8
        if heads - head >= 4:
            tile_4(part(queries, head, 0), part(sums, head, 0), codes, parameters, least, part(scores, head, 0))
            head += 4
        if heads - head >= 2:
            tile_2(part(queries, head, 0), part(sums, head, 0), codes, parameters, least, part(scores, head, 0))
            head += 2
        if heads - head == 1:
            tile_1(part(queries, head, 0), part(sums, head, 0), codes, parameters, least, part(scores, head, 0))

    add_scores.__qualname__ = f"add_scores_{bits}"  # a name of its own, see tile.py
    return njit(add_scores)


def _make_totals() -> Any:
    """Generate `add_totals`: tiles below each other, for any number of heads."""
    tile_1, tile_2, tile_4, tile_8 = (_make_value_tile(heads) for heads in (1, 2, 4, 8))

    def add_totals(
        weights: Any, codes: Any, stride: int, parameters: Any, least: int, out: Any, offsets: Any, scaled: Any, heads: int
    ) -> None:
        """Add the weighted values of one group of a page to the totals of each head."""
        head = 0
        while heads - head >= 8:
            tile_8(
                part(weights, head, 0), codes, stride, parameters, least, part(out, head, 0), part(offsets, head, 0), part(scaled, head, 0)
            )
            head += 8
        if heads - head >= 4:
            tile_4(
                part(weights, head, 0), codes, stride, parameters, least, part(out, head, 0), part(offsets, head, 0), part(scaled, head, 0)
            )
            head += 4
        if heads - head >= 2:
            tile_2(
                part(weights, head, 0), codes, stride, parameters, least, part(out, head, 0), part(offsets, head, 0), part(scaled, head, 0)
            )
            head += 2
        if heads - head == 1:
            tile_1(
                part(weights, head, 0), codes, stride, parameters, least, part(out, head, 0), part(offsets, head, 0), part(scaled, head, 0)
            )

    add_totals.__qualname__ = f"add_totals_{bits}"
    return njit(add_totals)


add_scores, add_totals = _make_scores(), _make_totals()
