"""Prefill attention: a program attends with a tile of a prompt's tokens under one query head, block by block of what they see."""

from __future__ import annotations

import triton
import triton.language as tl

from flexgen.kernels.triton.programs.pages import key_tile, page_heads, value_tile
from flexgen.kernels.triton.programs.softmax import absorb, finished, scaled

NO_POSITION = tl.constexpr(2**31 - 1)


@triton.jit
def key_rows(key, positions, stride, first, dims, mask, DIM: tl.constexpr):
    """Return the keys (dims, tokens) of contiguous tokens; `first` is where the head of the first one begins."""
    places = first + positions[None, :].to(tl.int64) * stride + dims[:, None]
    return tl.load(key + places, mask=mask[None, :] & (dims[:, None] < DIM), other=0.0)


@triton.jit
def value_rows(value, positions, stride, first, dims, mask, DIM: tl.constexpr):
    """Return the values (tokens, dims) of contiguous tokens."""
    places = first + positions[:, None].to(tl.int64) * stride + dims[None, :]
    return tl.load(value + places, mask=mask[:, None] & (dims[None, :] < DIM), other=0.0)


@triton.jit
def attend_rows(
    queries, key, value, table, kv_head, begins, ends, scaling, softcap, base, total, sums, key_stride, key_head_stride, value_stride,
    value_head_stride, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the state of softmax after each row has attended to begins <= p < ends, in pages or, without a table, in rows of tokens."""
    key_dims, value_dims = tl.arange(0, KEY_COLUMNS), tl.arange(0, VALUE_COLUMNS)
    first = tl.min(tl.where(begins < ends, begins, NO_POSITION), 0)
    end = tl.max(tl.where(begins < ends, ends, 0), 0)
    for tile in range(first // TILE * TILE, end, TILE):
        positions = tile + tl.arange(0, TILE)
        some = (positions >= first) & (positions < end)
        if table is None:
            keys = key_rows(key, positions, key_stride, kv_head * key_head_stride, key_dims, some, KEY_DIM)
        else:
            places, offsets = page_heads(table, positions, first, end, kv_head, KV_HEADS, PAGE_TOKENS, TILE), positions % PAGE_TOKENS
            keys = key_tile(key, places, offsets, key_dims, KEY_DIM, PAGE_TOKENS)
        scores = scaled(tl.dot(queries, keys, input_precision="ieee"), scaling, softcap)
        visible = (begins[:, None] <= positions[None, :]) & (positions[None, :] < ends[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        if table is None:
            values = value_rows(value, positions, value_stride, kv_head * value_head_stride, value_dims, some, VALUE_DIM)
        else:
            values = value_tile(value, places, offsets, value_dims, some, VALUE_DIM, PAGE_TOKENS)
        base, total, sums = absorb(scores, values, base, total, sums, "ieee")
    return base, total, sums


@triton.jit
def tile_of(tiles, num_queries, num_keys, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Return this program's first row, the number of its rows, the position of the first, and the row of its page table.

    Without a list of tiles the queries are the last of one prompt's positions, which are counted as its keys are.
    """
    # The last queries see the most, so they come first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    if tiles is None:
        first_row = (program * ROWS).to(tl.int64)
        rows, position, prompt = num_queries - first_row, num_keys - num_queries + first_row, first_row * 0
    else:
        blocks: tl.constexpr = TILE_ROWS // ROWS
        tile, skipped = tiles + program // blocks * 4, program % blocks * ROWS
        first_row, position, prompt = tl.load(tile) + skipped, tl.load(tile + 2) + skipped, tl.load(tile + 3)
        rows = tl.load(tile + 1) - skipped  # none in later blocks of a short tile
    return first_row, tl.minimum(rows, ROWS), position, prompt


@triton.jit(do_not_specialize=["num_queries", "num_keys", "exact_start", "num_stored", "table_stride"])
def prefill_attention(
    query, key, value, starts, sinks, out, tiles, tables, stored_key, stored_value, borders, scaling, softcap, num_queries, num_keys,
    exact_start, num_stored, query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride,
    stored_key_stride, stored_key_head_stride, stored_value_stride, stored_value_head_stride, table_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, KEY_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attend with a tile of queries: program_id(0) of the tiles, program_id(1) of the query heads.

    Positions before `borders` are seen as they were stored, if there are stored keys; the first key stands at `exact_start` then.
    """
    first_row, num_rows, position, prompt = tile_of(tiles, num_queries, num_keys, ROWS, TILE_ROWS)
    if num_rows <= 0:
        return
    head = tl.program_id(1)
    kv_head = (head // (HEADS // KV_HEADS)).to(tl.int64)
    rows, key_dims, value_dims = tl.arange(0, ROWS), tl.arange(0, KEY_COLUMNS), tl.arange(0, VALUE_COLUMNS)
    mask = rows < num_rows
    places = (first_row + rows)[:, None] * query_stride + head.to(tl.int64) * query_head_stride + key_dims[None, :]
    queries = tl.load(query + places, mask=mask[:, None] & (key_dims[None, :] < KEY_DIM), other=0.0)
    begins = tl.maximum(tl.load(starts + first_row + rows, mask=mask, other=0).to(tl.int32), 0)
    ends = tl.where(mask, position.to(tl.int32) + rows + 1, 0)
    base = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
    if stored_key is not None:
        border = tl.load(borders + first_row + rows, mask=mask, other=0).to(tl.int32)
        base, total, sums = attend_rows(
            queries, stored_key, stored_value, None, kv_head, begins, tl.minimum(border, num_stored), scaling, softcap, base, total, sums,
            stored_key_stride, stored_key_head_stride, stored_value_stride, stored_value_head_stride,
            KV_HEADS, KEY_DIM, VALUE_DIM, PAGE_TOKENS, KEY_COLUMNS, VALUE_COLUMNS, TILE,
        )  # fmt: skip
        begins = tl.maximum(tl.maximum(begins, border) - exact_start, 0)
    table = None if tables is None else tables + prompt * table_stride
    base, total, sums = attend_rows(
        queries, key, value, table, kv_head, begins, ends, scaling, softcap, base, total, sums,
        key_stride, key_head_stride, value_stride, value_head_stride,
        KV_HEADS, KEY_DIM, VALUE_DIM, PAGE_TOKENS, KEY_COLUMNS, VALUE_COLUMNS, TILE,
    )  # fmt: skip
    results = finished(base, total, sums, sinks, head + tl.zeros([ROWS], tl.int32), mask)
    places = ((first_row + rows)[:, None] * HEADS + head) * VALUE_DIM + value_dims[None, :]
    tl.store(out + places, results.to(out.dtype.element_ty), mask=mask[:, None] & (value_dims[None, :] < VALUE_DIM))
