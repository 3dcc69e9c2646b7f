"""Decode attention on sealed latents.  All query heads share one key head, so each code is made a number once and serves all of them.

A block is widened twice, scale applied: as it lies, for the scores, and turned into panels, for the weighted sum.  The query's own page is
a tail of plain numbers.  Work items are those of latent.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from flexgen.base.compiled import entry, intrinsic
from flexgen.kernels.codes import GROUP
from flexgen.kernels.cpu.formats import FLOAT, HALF, widen, widened
from flexgen.kernels.cpu.latent import LATENT_BLOCK, add_panels, latent_workspace, turn_latents, turn_rope
from flexgen.kernels.cpu.rows import LANES, PANEL, Rows, clear, moved, padded, page_and_next, part, pointer, widen_row
from flexgen.kernels.cpu.softmax import absorb_rows, begin_rows, softmax_state, write_rows
from flexgen.kernels.cpu.tile import INT8, INT64, add_product, prefetch_bytes
from flexgen.kernels.cpu.vectors import transposed, vector_of

FLOATS, HALVES, BYTES = (vector_of(element) for element in (FLOAT, HALF, INT8))


def sealed_latent_workspace(heads: int, rank: int, rope_dim: int, page_tokens: int) -> int:
    """Return the number of elements that `decode_sealed_latent_attention` needs as workspace."""
    return latent_workspace(heads, rank, rope_dim, page_tokens) + padded(rank * page_tokens)


@entry
def decode_sealed_latent_attention(
    begin: int,
    end: int,
    query_latent: Any,
    query_rope: Any,
    keys: Any,
    key_scales: Any,
    values: Any,
    value_scales: Any,
    tail_keys: Any,
    tail_values: Any,
    page_tables: Any,
    tails: Any,
    starts: Any,
    lengths: Any,
    sinks: Any,
    scaling: Any,
    item_heads: int,
    out: Any,
    workspace: Any,
) -> None:
    """Compute work items begin <= sequence * items per sequence + item < end, of `item_heads` heads each, without sinks.

    `keys` and `values` are int8 (pages, 1, bytes of a head), the scales the same memory as int16.
    """
    num_tails, _, rank, page_tokens = tail_keys.shape
    num_pages, key_bytes, value_bytes = keys.shape[0], keys.shape[2], values.shape[2]
    heads, rope_dim = query_rope.shape[1:]
    items_per_sequence = (heads + item_heads - 1) // item_heads
    columns, block_tokens = (rank + PANEL - 1) // PANEL * PANEL, max(LATENT_BLOCK, page_tokens) // page_tokens * page_tokens
    latent_queries = Rows(pointer(workspace, 0), rank)
    rope_queries = Rows(moved(latent_queries.first, padded(item_heads * rank)), rope_dim)
    ropes = Rows(moved(rope_queries.first, padded(item_heads * rope_dim)), page_tokens)
    numbers = Rows(moved(ropes.first, padded(rope_dim * page_tokens)), page_tokens)
    latents = moved(numbers.first, padded(rank * page_tokens))
    scores = Rows(moved(latents, padded(columns * block_tokens)), block_tokens)
    state = softmax_state(moved(scores.first, padded(item_heads * block_tokens)), item_heads, columns)

    for item in range(begin, end):
        sequence, head = item // items_per_sequence, item % items_per_sequence * item_heads
        start, length, tail = starts[sequence], lengths[sequence], tails[sequence]
        page_and_next(pointer(tails, 0), sequence, sequence, num_tails)  # is it in the pool
        item_size, border = min(item_heads, heads - head), (length - 1) // page_tokens * page_tokens
        table, last_page = pointer(page_tables, sequence * page_tables.shape[1]), border // page_tokens - 1
        first_head = sequence * heads + head
        widen_row(pointer(query_latent, first_head * rank), latent_queries.first, item_size * rank)
        widen_row(pointer(query_rope, first_head * rope_dim), rope_queries.first, item_size * rope_dim)
        begin_rows(state, item_size, sinks, 0)
        for block in range(start - start % page_tokens, length, block_tokens):
            block_end, visible = min(block + block_tokens, length), max(start, block)
            clear(scores.first, item_size * block_tokens)
            for position in range(block, block_end, page_tokens):
                page_scores, panels = part(scores, 0, position - block), moved(latents, (position - block) * PANEL)
                if position < border:
                    page, following = page_and_next(table, position // page_tokens, last_page, num_pages)
                    prefetch_bytes(pointer(keys, following * key_bytes), key_bytes)
                    prefetch_bytes(pointer(values, following * value_bytes), value_bytes)
                    key, value = page * key_bytes, page * value_bytes
                    widen_latents(
                        pointer(keys, key), pointer(key_scales, (key + rank * page_tokens) // 2), numbers, panels, rank, block_tokens
                    )
                    widen_ropes(pointer(values, value), pointer(value_scales, (value + rope_dim * page_tokens) // 2), ropes, rope_dim)
                    add_product(latent_queries, numbers, page_scores, item_size, rank, page_tokens, 0)
                else:
                    own = Rows(pointer(tail_keys, tail * rank * page_tokens), page_tokens)
                    add_product(latent_queries, own, page_scores, item_size, rank, page_tokens, 0)
                    turn_latents(own, panels, rank, block_tokens)
                    turn_rope(pointer(tail_values, tail * page_tokens * rope_dim), ropes, rope_dim)
                add_product(rope_queries, ropes, page_scores, item_size, rope_dim, page_tokens, 0)
            absorb_rows(scores, visible - block, block_end - block, item_size, scaling, scaling * 0, state)
            add_panels(part(scores, 0, visible - block), latents, visible - block, block_end - block, item_size, block_tokens, state.totals)
        write_rows(state, item_size, rank, pointer(out, first_head * rank))


@njit
def widen_latents(codes: Any, scales: Any, numbers: Any, panels: Any, rank: int, block_tokens: int) -> None:
    """Make numbers of a page's codes (rank, page_tokens), as they lie and in panels (see `turn_latents`); a group is as wide as a panel."""
    page_tokens = numbers.stride
    for first in range(0, rank, GROUP):
        scale, panel = moved(scales, first // GROUP * page_tokens), moved(panels, first * block_tokens)
        if page_tokens == LANES and rank - first >= GROUP:
            for half in range(0, GROUP, LANES):
                begin = (first + half) * page_tokens
                turn_codes(moved(codes, begin), scale, moved(numbers.first, begin), moved(panel, half))
            continue
        for i in range(first, min(first + GROUP, rank)):
            for token in range(page_tokens):
                number = widen(codes[i * page_tokens + token]) * widen(scale[token])
                numbers.first[i * page_tokens + token] = number
                panel[token * PANEL + i - first] = number


@njit
def widen_ropes(codes: Any, scales: Any, ropes: Any, rope_dim: int) -> None:
    """Make numbers of a page's codes (page_tokens, rope_dim), turned into (rope_dim, page_tokens)."""
    page_tokens = ropes.stride
    for first in range(0, rope_dim, GROUP):
        scale = moved(scales, first // GROUP * page_tokens)
        for token in range(page_tokens):
            factor = np.float32(widen(scale[token]))
            for i in range(first, min(first + GROUP, rope_dim)):
                ropes.first[i * page_tokens + token] = widen(codes[token * rope_dim + i]) * factor


@intrinsic
def turn_codes(typing_context: Any, codes: Any, scales: Any, numbers: Any, panel: Any) -> Any:
    """Compile `turn_codes(codes, scales, numbers, panel)`: LANES rows of codes, each of LANES tokens, times the tokens' scales.

    They are stored as rows of LANES numbers, and by token as rows of PANEL numbers, of which LANES are written.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes_at, scales_at, numbers_at, panel_at = arguments
        scale = builder.load(builder.bitcast(scales_at, HALVES.as_pointer()), align=2)
        scale = builder.fpext(scale, FLOATS)
        rows = []
        for row in range(LANES):
            place = builder.gep(codes_at, [ir.Constant(INT64, row * LANES)])
            stored = builder.load(builder.bitcast(place, BYTES.as_pointer()), align=1)
            rows.append(builder.fmul(widened(builder, stored, codes.dtype), scale))
        for lines, at, stride in ((rows, numbers_at, LANES), (transposed(builder, rows), panel_at, PANEL)):
            for number, line in enumerate(lines):
                place = builder.gep(at, [ir.Constant(INT64, number * stride)])
                builder.store(line, builder.bitcast(place, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(codes, scales, numbers, panel), generate
