"""Decode attention on sealed pages: codes become float32 tiles, which tensor cores multiply as three products in tf32.

The page of the query itself is a tail of plain numbers, which is attended to last, by the program that has the last position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexgen.kernels.triton.programs.codes import key_codes, value_codes
from flexgen.kernels.triton.programs.decode import attend_pages, group_rows, query_rows
from flexgen.kernels.triton.programs.pages import page_heads
from flexgen.kernels.triton.programs.softmax import absorb, scaled
from flexgen.kernels.triton.programs.splits import seen_part, store_rows


@triton.jit
def attend_codes(
    queries, keys, key_parameters, values, value_parameters, table, kv_head, first, end, scaling, softcap, base, total, sums,
    KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_CODE_BYTES: tl.constexpr, VALUE_CODE_BYTES: tl.constexpr, KEY_HEAD_BYTES: tl.constexpr, VALUE_HEAD_BYTES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, KEY_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the state of softmax after the positions first <= p < end, all on sealed pages, have been attended to."""
    for tile in range(first // TILE * TILE, end, TILE):
        positions = tile + tl.arange(0, TILE)
        visible, offsets = (positions >= first) & (positions < end), positions % PAGE_TOKENS
        places = page_heads(table, positions, first, end, kv_head, KV_HEADS, PAGE_TOKENS, TILE)
        found = key_codes(
            keys, key_parameters, places, offsets, KEY_DIM, KEY_BITS, KEY_CODE_BYTES, KEY_HEAD_BYTES, PAGE_TOKENS, KEY_COLUMNS, TILE
        )
        scores = scaled(tl.dot(queries, found, input_precision="tf32x3"), scaling, softcap)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        found = value_codes(
            values, value_parameters, places, offsets, visible, VALUE_DIM, VALUE_BITS, VALUE_CODE_BYTES, VALUE_HEAD_BYTES, PAGE_TOKENS,
            VALUE_COLUMNS, TILE,
        )  # fmt: skip
        base, total, sums = absorb(scores, found, base, total, sums, "tf32x3")
    return base, total, sums


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["query", "turned", "tables", "tails", "starts", "lengths", "out"],
)
def decode_sealed_attention(
    query, turned, keys, key_parameters, values, value_parameters, tail_keys, tail_values, tables, tails, starts, lengths, sinks, out,
    part_sums, part_states, scaling, softcap, query_stride, head_stride, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, KEY_CODE_BYTES: tl.constexpr, VALUE_CODE_BYTES: tl.constexpr, KEY_HEAD_BYTES: tl.constexpr,
    VALUE_HEAD_BYTES: tl.constexpr, PAGE_TOKENS: tl.constexpr, ROWS: tl.constexpr, KEY_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    TILE: tl.constexpr, TAIL_TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Attend to a part of a sequence, as `decode_attention` does.

    `turned` holds the queries, contiguous and in float32, rotated as the keys were; there are none if keys were not rotated.
    """
    sequence = tl.program_id(0).to(tl.int64)
    first, end = seen_part(starts, lengths, sequence, SPLIT)
    if first >= end:
        return
    kv_head, heads, row_mask = group_rows(KV_HEADS, GROUP, ROWS)
    key_dims = tl.arange(0, KEY_COLUMNS)
    queries = query_rows(query, sequence, query_stride, heads, head_stride, row_mask, key_dims, KEY_DIM)
    if turned is None:
        wide = queries.to(tl.float32)
    else:
        wide = query_rows(turned, sequence, KV_HEADS * GROUP * KEY_DIM, heads, KEY_DIM, row_mask, key_dims, KEY_DIM)
    base = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
    border = (tl.load(lengths + sequence).to(tl.int32) - 1) // PAGE_TOKENS * PAGE_TOKENS
    base, total, sums = attend_codes(
        wide, keys, key_parameters, values, value_parameters, tables + sequence * table_stride, kv_head, first, tl.minimum(end, border),
        scaling, softcap, base, total, sums, KV_HEADS, KEY_DIM, VALUE_DIM, KEY_BITS, VALUE_BITS, KEY_CODE_BYTES, VALUE_CODE_BYTES,
        KEY_HEAD_BYTES, VALUE_HEAD_BYTES, PAGE_TOKENS, KEY_COLUMNS, VALUE_COLUMNS, TILE,
    )  # fmt: skip
    base, total, sums = attend_pages(
        queries, tail_keys, tail_values, tails + sequence, kv_head, tl.maximum(first, border) - border, end - border, scaling, softcap,
        base, total, sums, KV_HEADS, KEY_DIM, VALUE_DIM, PAGE_TOKENS, KEY_COLUMNS, VALUE_COLUMNS, TAIL_TILE,
    )  # fmt: skip
    store_rows(
        base, total, sums, sinks, out, part_sums, part_states, sequence, heads, row_mask, tl.arange(0, VALUE_COLUMNS),
        KV_HEADS * GROUP, VALUE_DIM,
    )  # fmt: skip
