"""The inner loops of attention on codes, for the pages and groups that nearly all models have: 16 tokens, 32 numbers.

Sums stay in registers until their scale is applied.  Of two codes of 4 bits that share a byte, loops multiply the byte and its low half:
with byte = 16 high + low, a low + b high = (a - b / 16) low + (b / 16) byte, which saves taking the high half out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from flexgen.base.compiled import intrinsic
from flexgen.kernels.codes import GROUP, HALF_GROUP
from flexgen.kernels.cpu.formats import FLOAT, HALF, INT32
from flexgen.kernels.cpu.rows import LANES, part
from flexgen.kernels.cpu.tile import CACHE_LINE, INT8, INT64, Places, prefetch
from flexgen.kernels.cpu.vectors import broadcast, vector_of

FAST_TOKENS = LANES  # tokens of a page
FLOATS, HALVES, BYTES, INTEGERS = (vector_of(element) for element in (FLOAT, HALF, INT8, INT32))
FUSED = ("contract",)
TILES = (8, 4, 2, 1)  # heads that one tile attends for


def _number(value: int) -> ir.Constant:
    return ir.Constant(INT64, value)


def _codes_of_bytes(builder: Any, at: Any, bits: int) -> list[Any]:
    """Load 16 bytes as vectors of float32: their low halves and the whole bytes of 4-bit codes, or 8-bit codes."""
    raw = builder.load(builder.bitcast(at, BYTES.as_pointer()), align=1)
    if bits == 8:
        return [builder.sitofp(builder.sext(raw, INTEGERS), FLOATS)]
    wide = builder.zext(raw, INTEGERS)
    low = builder.and_(wide, ir.Constant(INTEGERS, [15] * LANES))
    return [builder.sitofp(low, FLOATS), builder.sitofp(wide, FLOATS)]


def _multiply_add(builder: Any, one: Any, other: Any, addend: Any) -> Any:
    return builder.fadd(builder.fmul(one, other, flags=FUSED), addend, flags=FUSED)


def _half_vector(builder: Any, start: Any, offset: Any) -> Any:
    """Load 16 parameters."""
    at = builder.bitcast(builder.gep(start, [offset]), HALVES.as_pointer())
    return builder.fpext(builder.load(at, align=2), FLOATS)


def _prefetch_group(builder: Any, later: Any, group: Any, bits: int) -> None:
    """Prefetch a group's share of a page that is wanted later."""
    size = FAST_TOKENS * (GROUP * bits // 8 + (2 if bits == 8 else 4))
    for line in range(0, size, CACHE_LINE):
        prefetch(builder, builder.gep(later, [builder.add(builder.mul(group, _number(size)), _number(line))]))


def _make_key_tile(heads: int, bits: int) -> Any:
    """Generate `tile(queries, sums, codes, parameters, least, groups, later, scores)`: the scores of a page, for so many heads.

    queries are `Rows` of `folded` queries, sums `Rows` of each group's sum of queries, codes and parameters pointers; least is the
    distance of the least numbers from the scales; scores are `Rows`, to which is added.
    """

    @intrinsic
    def tile(
        typing_context: Any, queries: Any, sums: Any, codes: Any, parameters: Any, least: Any, groups: Any, later: Any, scores: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            queries_at, sums_at, scores_at = (Places(builder, arguments[place]) for place in (0, 1, 7))
            start, parameters, least, groups, later = arguments[2:7]
            lines = [_number(head) for head in range(heads)]
            totals = [cgutils.alloca_once_value(builder, builder.load(scores_at.vector(line, 0), align=4)) for line in lines]
            with cgutils.for_range(builder, groups) as loop:
                _prefetch_group(builder, later, loop.index, bits)
                begin = builder.gep(start, [builder.mul(loop.index, _number(GROUP * bits // 8 * LANES))])
                first = builder.mul(loop.index, _number(GROUP))
                found = [ir.Constant(FLOATS, [0.0] * LANES) for _ in range(2 * heads)]  # two sums of each head, so that neither waits
                for row in range(GROUP * bits // 8):
                    vectors = _codes_of_bytes(builder, builder.gep(begin, [_number(row * LANES)]), bits)
                    for place, vector in enumerate(vectors):
                        for head, line in enumerate(lines):
                            weight = builder.load(builder.gep(queries_at.scalar(line, row + place * HALF_GROUP), [first]))
                            index = 2 * head + (place if bits == 4 else row % 2)
                            found[index] = _multiply_add(builder, broadcast(builder, weight), vector, found[index])
                at = builder.mul(loop.index, _number(LANES))
                scale = _half_vector(builder, parameters, at)
                lowest = _half_vector(builder, parameters, builder.add(at, least)) if bits == 4 else None
                for head, (line, total) in enumerate(zip(lines, totals, strict=True)):
                    both = builder.fadd(found[2 * head], found[2 * head + 1])
                    score = _multiply_add(builder, scale, both, builder.load(total))
                    if bits == 4:
                        own = builder.load(builder.gep(sums_at.scalar(line, 0), [loop.index]))
                        score = _multiply_add(builder, lowest, broadcast(builder, own), score)
                    builder.store(score, total)
            for line, total in zip(lines, totals, strict=True):
                builder.store(builder.load(total), scores_at.vector(line, 0), align=4)
            return context.get_dummy_value()

        return types.void(queries, sums, codes, parameters, types.int64, types.int64, later, scores), generate

    return tile


def _make_value_tile(heads: int, bits: int) -> Any:
    """Generate `tile(weights, codes, stride, parameters, least, groups, later, out, offsets, scaled)`: weighted sums of a page's values.

    weights are `Rows` of 16 tokens, codes and parameters pointers; a token's codes are `stride` bytes behind the one before.  Each head's
    `out` is added to, in the form that `unfold` takes, and one vector of its `offsets` per group, which is to be summed up.  scaled is
    scratch.
    """

    @intrinsic
    def tile(
        typing_context: Any, weights: Any, codes: Any, stride: Any, parameters: Any, least: Any, groups: Any, later: Any, out: Any,
        offsets: Any, scaled: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights_at, out_at, offsets_at, scaled_at = (Places(builder, arguments[place]) for place in (0, 7, 8, 9))
            start, stride, parameters, least, groups, later = arguments[1:7]
            lines = [_number(head) for head in range(heads)]
            with cgutils.for_range(builder, groups) as loop:
                _prefetch_group(builder, later, loop.index, bits)
                at = builder.mul(loop.index, _number(LANES))
                scale = _half_vector(builder, parameters, at)
                lowest = _half_vector(builder, parameters, builder.add(at, least)) if bits == 4 else None
                for line in lines:
                    weight = builder.load(weights_at.vector(line, 0), align=4)
                    builder.store(builder.fmul(weight, scale), scaled_at.vector(line, 0), align=4)
                    if bits == 4:
                        place = builder.bitcast(builder.gep(offsets_at.scalar(line, 0), [at]), FLOATS.as_pointer())
                        builder.store(_multiply_add(builder, weight, lowest, builder.load(place, align=4)), place, align=4)
                first = builder.mul(loop.index, _number(GROUP))
                places = [
                    builder.bitcast(builder.gep(out_at.scalar(line, half), [first]), FLOATS.as_pointer())
                    for half in (0, HALF_GROUP)
                    for line in lines
                ]
                totals = [builder.load(place, align=4) for place in places]
                begin = builder.gep(start, [builder.mul(loop.index, _number(GROUP * bits // 8))])
                for token in range(LANES):
                    own = builder.gep(begin, [builder.mul(stride, _number(token))])
                    vectors = _codes_of_bytes(builder, own, bits)
                    if bits == 8:
                        vectors += _codes_of_bytes(builder, builder.gep(own, [_number(HALF_GROUP)]), bits)
                    for head, line in enumerate(lines):
                        weight = broadcast(builder, builder.load(scaled_at.scalar(line, token)))
                        for half, vector in enumerate(vectors):
                            totals[half * heads + head] = _multiply_add(builder, weight, vector, totals[half * heads + head])
                for place, total in zip(places, totals, strict=True):
                    builder.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(weights, codes, types.int64, parameters, types.int64, types.int64, later, out, offsets, scaled), generate

    return tile


def _make_scores(tiles: Sequence[Any], bits: int) -> Any:
    """Generate `add_scores`: tiles below each other, for any number of heads."""
    tile_8, tile_4, tile_2, tile_1 = tiles

    def add_scores(
        queries: Any, sums: Any, codes: Any, parameters: Any, least: int, groups: int, later: Any, scores: Any, heads: int
    ) -> None:
        """Add the scores of a page's whole groups to those of each head."""
        head = 0
        while heads - head >= 8:
            tile_8(part(queries, head, 0), part(sums, head, 0), codes, parameters, least, groups, later, part(scores, head, 0))
            head += 8
        if heads - head >= 4:
            tile_4(part(queries, head, 0), part(sums, head, 0), codes, parameters, least, groups, later, part(scores, head, 0))
            head += 4
        if heads - head >= 2:
            tile_2(part(queries, head, 0), part(sums, head, 0), codes, parameters, least, groups, later, part(scores, head, 0))
            head += 2
        if heads - head == 1:
            tile_1(part(queries, head, 0), part(sums, head, 0), codes, parameters, least, groups, later, part(scores, head, 0))

    add_scores.__qualname__ = f"add_scores_{bits}"  # a name of its own, see tile.py
    return njit(add_scores)


def _make_totals(tiles: Sequence[Any], bits: int) -> Any:
    """Generate `add_totals`: tiles below each other, for any number of heads."""
    tile_8, tile_4, tile_2, tile_1 = tiles

    def add_totals(
        weights: Any, codes: Any, stride: int, parameters: Any, least: int, groups: int, later: Any, out: Any, offsets: Any, scaled: Any,
        heads: int,
    ) -> None:  # fmt: skip
        """Add the weighted values of a page's whole groups to the totals of each head."""
        head = 0
        while heads - head >= 8:
            rows = part(weights, head, 0), part(out, head, 0), part(offsets, head, 0), part(scaled, head, 0)
            tile_8(rows[0], codes, stride, parameters, least, groups, later, rows[1], rows[2], rows[3])
            head += 8
        if heads - head >= 4:
            rows = part(weights, head, 0), part(out, head, 0), part(offsets, head, 0), part(scaled, head, 0)
            tile_4(rows[0], codes, stride, parameters, least, groups, later, rows[1], rows[2], rows[3])
            head += 4
        if heads - head >= 2:
            rows = part(weights, head, 0), part(out, head, 0), part(offsets, head, 0), part(scaled, head, 0)
            tile_2(rows[0], codes, stride, parameters, least, groups, later, rows[1], rows[2], rows[3])
            head += 2
        if heads - head == 1:
            rows = part(weights, head, 0), part(out, head, 0), part(offsets, head, 0), part(scaled, head, 0)
            tile_1(rows[0], codes, stride, parameters, least, groups, later, rows[1], rows[2], rows[3])

    add_totals.__qualname__ = f"add_totals_{bits}"
    return njit(add_totals)


add_scores_4, add_scores_8 = (_make_scores([_make_key_tile(heads, bits) for heads in TILES], bits) for bits in (4, 8))
add_totals_4, add_totals_8 = (_make_totals([_make_value_tile(heads, bits) for heads in TILES], bits) for bits in (4, 8))
