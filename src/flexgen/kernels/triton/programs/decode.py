"""Decode attention: one query token per sequence, whose program reads the pages of one key head once for all query heads that share it."""

from __future__ import annotations

import triton
import triton.language as tl

from flexgen.kernels.triton.programs.pages import key_tile, page_heads, value_tile
from flexgen.kernels.triton.programs.softmax import absorb, scaled
from flexgen.kernels.triton.programs.splits import seen_part, store_rows


@triton.jit
def group_rows(KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Return this program's key head, and the query heads of its rows with the mask of those that there are."""
    blocks: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    kv_head = tl.program_id(1) // blocks
    rows = tl.program_id(1) % blocks * ROWS + tl.arange(0, ROWS)
    return kv_head, kv_head * GROUP + rows, rows < GROUP


@triton.jit
def query_rows(query, sequence, stride, heads, head_stride, mask, dims, DIM: tl.constexpr):
    """Return the queries (rows, dims) of one sequence's heads."""
    places = sequence * stride + heads[:, None].to(tl.int64) * head_stride + dims[None, :]
    return tl.load(query + places, mask=mask[:, None] & (dims[None, :] < DIM), other=0.0)


@triton.jit
def attend_pages(
    queries, keys, values, table, kv_head, first, end, scaling, softcap, base, total, sums, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr, KEY_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the state of softmax after the positions first <= p < end of a page table have been attended to."""
    key_dims, value_dims = tl.arange(0, KEY_COLUMNS), tl.arange(0, VALUE_COLUMNS)
    for tile in range(first // TILE * TILE, end, TILE):
        positions = tile + tl.arange(0, TILE)
        visible, offsets = (positions >= first) & (positions < end), positions % PAGE_TOKENS
        places = page_heads(table, positions, first, end, kv_head, KV_HEADS, PAGE_TOKENS, TILE)
        found = key_tile(keys, places, offsets, key_dims, KEY_DIM, PAGE_TOKENS)
        scores = scaled(tl.dot(queries, found, input_precision="ieee"), scaling, softcap)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        found = value_tile(values, places, offsets, value_dims, visible, VALUE_DIM, PAGE_TOKENS)
        base, total, sums = absorb(scores, found, base, total, sums, "ieee")
    return base, total, sums


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["query", "tables", "starts", "lengths", "out"])
def decode_attention(
    query, keys, values, tables, starts, lengths, sinks, out, part_sums, part_states, scaling, softcap, query_stride, head_stride,
    table_stride, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, ROWS: tl.constexpr, KEY_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Attend to a part of a sequence: program_id(0) of the sequences, (1) of key heads and blocks of their rows, (2) of the parts."""
    sequence = tl.program_id(0).to(tl.int64)
    first, end = seen_part(starts, lengths, sequence, SPLIT)
    if first >= end:
        return
    kv_head, heads, row_mask = group_rows(KV_HEADS, GROUP, ROWS)
    queries = query_rows(query, sequence, query_stride, heads, head_stride, row_mask, tl.arange(0, KEY_COLUMNS), KEY_DIM)
    base = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
    base, total, sums = attend_pages(
        queries, keys, values, tables + sequence * table_stride, kv_head, first, end, scaling, softcap, base, total, sums,
        KV_HEADS, KEY_DIM, VALUE_DIM, PAGE_TOKENS, KEY_COLUMNS, VALUE_COLUMNS, TILE,
    )  # fmt: skip
    store_rows(
        base, total, sums, sinks, out, part_sums, part_states, sequence, heads, row_mask, tl.arange(0, VALUE_COLUMNS),
        KV_HEADS * GROUP, VALUE_DIM,
    )  # fmt: skip
