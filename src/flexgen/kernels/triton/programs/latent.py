"""Decode attention on cached latents, plain or sealed.  All query heads share them, and a tile of latents is keys and values at once."""

from __future__ import annotations

import triton
import triton.language as tl

from flexgen.kernels.triton.programs.codes import key_codes, value_codes
from flexgen.kernels.triton.programs.decode import group_rows, query_rows
from flexgen.kernels.triton.programs.pages import key_tile, page_heads, value_tile
from flexgen.kernels.triton.programs.softmax import absorb, add_product, halves, scaled, weigh
from flexgen.kernels.triton.programs.splits import seen_part, store_rows


@triton.jit
def attend_latents(
    queries, rope_queries, keys, values, table, first, end, scaling, base, total, sums, RANK: tl.constexpr, ROPE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, RANK_COLUMNS: tl.constexpr, ROPE_COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the state of softmax after the positions first <= p < end of a page table have been attended to."""
    for tile in range(first // TILE * TILE, end, TILE):
        positions = tile + tl.arange(0, TILE)
        visible, offsets = (positions >= first) & (positions < end), positions % PAGE_TOKENS
        places = page_heads(table, positions, first, end, 0, 1, PAGE_TOKENS, TILE)
        latents = key_tile(keys, places, offsets, tl.arange(0, RANK_COLUMNS), RANK, PAGE_TOKENS)
        latents = tl.where(visible[None, :], latents, 0.0)
        ropes = value_tile(values, places, offsets, tl.arange(0, ROPE_COLUMNS), visible, ROPE, PAGE_TOKENS)
        products = tl.dot(queries, latents, input_precision="ieee")
        products = tl.dot(rope_queries, tl.trans(ropes), products, input_precision="ieee")
        scores = tl.where(visible[None, :], scaled(products, scaling, None), float("-inf"))
        base, total, sums = absorb(scores, tl.trans(latents), base, total, sums, "ieee")
    return base, total, sums


@triton.jit
def attend_latent_codes(
    queries, rope_queries, keys, key_parameters, values, value_parameters, table, first, end, scaling, base, total, sums,
    RANK: tl.constexpr, ROPE: tl.constexpr, RANK_HEAD_BYTES: tl.constexpr, ROPE_HEAD_BYTES: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    RANK_COLUMNS: tl.constexpr, ROPE_COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the state of softmax after the positions first <= p < end, all on sealed pages, have been attended to.

    Queries have 16 bits.  Latents are the sum of two numbers of that type, because tiles of float32 would not fit the shared memory.
    """
    for tile in range(first // TILE * TILE, end, TILE):
        positions = tile + tl.arange(0, TILE)
        visible, offsets = (positions >= first) & (positions < end), positions % PAGE_TOKENS
        places = page_heads(table, positions, first, end, 0, 1, PAGE_TOKENS, TILE)
        latents = key_codes(keys, key_parameters, places, offsets, RANK, 8, RANK, RANK_HEAD_BYTES, PAGE_TOKENS, RANK_COLUMNS, TILE)
        ropes = value_codes(
            values, value_parameters, places, offsets, visible, ROPE, 8, ROPE, ROPE_HEAD_BYTES, PAGE_TOKENS, ROPE_COLUMNS, TILE
        )
        high, low = halves(tl.where(visible[None, :], latents, 0.0), queries)
        rope_high, rope_low = halves(ropes, queries)
        products = tl.dot(queries, high, tl.dot(queries, low))
        products = tl.dot(rope_queries, tl.trans(rope_high), tl.dot(rope_queries, tl.trans(rope_low), products))
        scores = tl.where(visible[None, :], scaled(products, scaling, None), float("-inf"))
        weights, base, total, factor = weigh(scores, base, total)
        sums = add_product(weights, tl.trans(high), sums * factor[:, None], "ieee")
        sums = tl.dot(weights.to(queries.dtype), tl.trans(low), sums)
    return base, total, sums


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["query", "query_rope", "tables", "code_tables", "starts", "lengths", "out"],
)
def decode_latent_attention(
    query, query_rope, keys, values, tables, codes, code_parameters, rope_codes, rope_parameters, code_tables, starts, lengths, sinks, out,
    part_sums, part_states, scaling, query_stride, head_stride, rope_stride, rope_head_stride, table_stride,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, RANK_HEAD_BYTES: tl.constexpr, ROPE_HEAD_BYTES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, ROWS: tl.constexpr, RANK_COLUMNS: tl.constexpr, ROPE_COLUMNS: tl.constexpr, TILE: tl.constexpr,
    CODE_TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Attend to a part of a sequence, as `decode_attention` does: to plain pages of `tables`, or to codes and to a tail.

    With codes, `tables` holds the one page of each sequence's tail, and `code_tables` those of its sealed pages.
    """
    sequence = tl.program_id(0).to(tl.int64)
    first, end = seen_part(starts, lengths, sequence, SPLIT)
    if first >= end:
        return
    _, heads, row_mask = group_rows(1, HEADS, ROWS)
    rank_dims = tl.arange(0, RANK_COLUMNS)
    queries = query_rows(query, sequence, query_stride, heads, head_stride, row_mask, rank_dims, RANK)
    rope_queries = query_rows(
        query_rope, sequence, rope_stride, heads, rope_head_stride, row_mask, tl.arange(0, ROPE_COLUMNS), ROPE
    )  # fmt: skip
    base = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, RANK_COLUMNS], tl.float32)
    table = tables + sequence * table_stride
    if codes is not None:
        border = (tl.load(lengths + sequence).to(tl.int32) - 1) // PAGE_TOKENS * PAGE_TOKENS
        base, total, sums = attend_latent_codes(
            queries, rope_queries, codes, code_parameters, rope_codes, rope_parameters,
            code_tables + sequence * table_stride, first, tl.minimum(end, border), scaling, base, total, sums,
            RANK, ROPE, RANK_HEAD_BYTES, ROPE_HEAD_BYTES, PAGE_TOKENS, RANK_COLUMNS, ROPE_COLUMNS, CODE_TILE,
        )  # fmt: skip
        first, end, table = tl.maximum(first, border) - border, end - border, tables + sequence
    base, total, sums = attend_latents(
        queries, rope_queries, keys, values, table, first, end, scaling, base, total, sums, RANK, ROPE, PAGE_TOKENS, RANK_COLUMNS,
        ROPE_COLUMNS, TILE,
    )  # fmt: skip
    store_rows(base, total, sums, sinks, out, part_sums, part_states, sequence, heads, row_mask, rank_dims, HEADS, RANK)
